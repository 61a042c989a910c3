"""The rival: label scores against the models' own loss, the fit against a grid, scikit-learn and known truth."""

import dataclasses
import json
import random

import families
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from pplug_hf.commands.options import TrainSettings
from pplug_hf.commands.train import choose_examples
from pplug_hf.data.examples import read_examples
from pplug_hf.data.lamp import Example
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods import label_frequencies, likelihood
from pplug_hf.methods.label_frequencies import (
    LabelFrequencies,
    LabelMixture,
    held_out,
    history_labels,
    label_log_probs,
)
from pplug_hf.methods.likelihood import target_log_probs
from pplug_hf.modeling.backbone import freeze_backbone
from pplug_hf.processing import PPlugProcessor
from pplug_hf.tasks.task import get_task

PROMPTS = [*tiny.PROMPTS, "like rain", "write a long story about two fish in the cold sea"]
LABELS = ["sea", "the dark moon", "rain and snow", "cat"]  # of one to three tokens


# ---- questions to fit on ----------------------------------------------------------------------------------------


def test_a_plugs_mixture_is_fitted_on_the_users_that_its_training_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(label_frequencies, "FEWEST", 12)
    rows = [
        {
            "id": f"{user}-{q}",
            "user_id": f"u{user}",
            "input": f"Which tag? description: a film {q}",
            "output": "comedy",
        }
        | {"profile": [{"id": "1", "tag": "comedy", "description": "old"}]}
        for user in range(40)
        for q in range(3)
    ]
    chosen = {"validation_users": 0.2, "leave_out_users": 0.1, "split_seed": 4}
    options = TrainSettings(data="", output="", backbone="", encoder="", train_on_histories=False, **chosen)
    task, known, validation = choose_examples(options, get_task("LaMP-2"), {"train": rows})
    _, train = read_examples({"train": rows}, "train", task)
    assert held_out(str(tmp_path), train) is train  # a plug that was not made by the command
    (tmp_path / "train_settings.json").write_text(json.dumps({"settings": chosen}))
    found = held_out(str(tmp_path), train)
    assert found == validation and len(found) >= 12 and not {e.id for e in found} & {e.id for e in known}
    assert label_frequencies._split_of(str(tmp_path)) == [0.1, 0.2, 4], "part of the key"
    asked = []
    monkeypatch.setattr(
        LabelFrequencies, "_log_probs", lambda self, examples, resources: asked.extend(examples) or 1 / 0
    )
    for name, expected in (("pplug", found), ("", train)):
        asked.clear()
        with pytest.raises(ZeroDivisionError):
            LabelFrequencies(name, str(tmp_path)).fit(train, None)
        assert asked == list(expected)
    for settings_of in (
        {**chosen, "validation_users": 0.01},
        {"split_seed": "4"},
        [],
        None,
    ):  # few users, or none that are known
        (tmp_path / "train_settings.json").write_text(json.dumps({"settings": settings_of}))
        assert held_out(str(tmp_path), train) is train


# ---- label scores -----------------------------------------------------------------------------------------------


@torch.no_grad()
def by_loss(backbone, processor, prompts, labels):
    """The definition: one pair at a time, the model's own mean loss times the number of tokens."""
    scores = torch.zeros(len(prompts), len(labels))
    for i, prompt in enumerate(prompts):
        for j, label in enumerate(labels):
            batch = processor(text=prompt, labels=label)
            scores[i, j] = -backbone(**batch).loss * (batch["labels"] != -100).sum()
    return scores


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def backbone(request):
    return tiny.backbone(request.param)


@pytest.fixture(scope="module")
def processor(backbone):
    family = backbone.config.model_type  # FlanT5's is T5, and so is its tokenizer
    return PPlugProcessor(tiny.tokenizer(family), is_encoder_decoder=backbone.config.is_encoder_decoder)


@pytest.mark.parametrize("batch_size", [1, 9, 1000])
def test_scores_are_the_models_own_losses(backbone, processor, batch_size):
    scores = label_log_probs(backbone, processor, PROMPTS, LABELS, batch_size)
    torch.testing.assert_close(scores, by_loss(backbone, processor, PROMPTS, LABELS), atol=1e-4, rtol=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert (scores.std(dim=0) > 0.05).all()  # prompts matter


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_models_that_always_give_all_logits_score_the_same(backbone, processor, monkeypatch):
    expected = label_log_probs(backbone, processor, PROMPTS, LABELS)
    forward = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda **inputs: forward(**inputs))
    torch.testing.assert_close(label_log_probs(backbone, processor, PROMPTS, LABELS), expected)


def test_a_model_in_training_scores_without_drop_out(backbone, processor):
    expected = label_log_probs(backbone, processor, PROMPTS, LABELS)
    backbone.train()
    scores = label_log_probs(backbone, processor, PROMPTS, LABELS)
    assert backbone.training
    backbone.eval()
    torch.testing.assert_close(scores, expected)


def test_prompts_are_cut_and_labels_are_not(backbone, processor):
    limit = len(processor(text="the sea the")["input_ids"][0])
    kept = [processor(text=prompt, max_length=limit)["input_ids"][0] for prompt in PROMPTS]
    short = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]
    assert short != PROMPTS
    scores = label_log_probs(backbone, processor, PROMPTS, LABELS, max_length=limit)
    torch.testing.assert_close(scores, label_log_probs(backbone, processor, short, LABELS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_each_prompt_is_encoded_once(family):
    backbone, rows = tiny.backbone(family), []
    backbone.get_encoder().register_forward_hook(lambda *args: rows.append(len(args[2].last_hidden_state)))
    processor = PPlugProcessor(tiny.tokenizer(family), is_encoder_decoder=True)
    label_log_probs(backbone, processor, PROMPTS, LABELS, batch_size=2 * len(LABELS))
    assert rows == [2, 2, 1]


def by_length(prompts, size):
    """Batches of prompts, the longest first."""
    ordered = sorted(prompts, key=len, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3_text", "mistral", "bloom", "jamba", "mamba"])
def test_each_prompt_is_read_once_where_its_states_can_be_repeated(name, monkeypatch):
    """Sliding windows are 8 tokens wide here; Jamba and Mamba keep other states than keys and values."""
    backbone = families.backbone(name, "causal")  # random weights by a seed
    freeze_backbone(backbone)
    processor = PPlugProcessor(tiny.tokenizer("llama"))
    prompts = ["write a long story about two fish in the cold sea and the dark moon like " + p for p in PROMPTS]
    pairs = [(prompt, label) for prompt in prompts for label in LABELS]
    expected, _ = target_log_probs(backbone, processor, *zip(*pairs, strict=True))  # one answer to each: read whole
    known, read = likelihood._keeps_states(backbone), []
    assert known == (name not in ("jamba", "mamba"))
    monkeypatch.setattr(likelihood, "_keeps_states", lambda _: known)  # finds it out by asking the model
    backbone.register_forward_pre_hook(
        lambda module, args, options: read.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    scores = label_log_probs(backbone, processor, prompts, LABELS, batch_size=2 * len(LABELS))
    torch.testing.assert_close(scores.flatten(), expected, atol=1e-4, rtol=1e-5)
    longest = max(map(len, processor.answer_ids(LABELS)))
    batches = [processor(batch)["input_ids"].shape for batch in by_length(prompts, 2)]
    if known:
        calls = [((B, T - 1), (B * len(LABELS), longest)) for B, T in batches]
        assert read == [shape for pair in calls for shape in pair]
    else:
        assert read == [(B * len(LABELS), T + longest) for B, T in batches]


def test_no_prompts():
    processor = PPlugProcessor(tiny.tokenizer("gpt2"))
    assert label_log_probs(tiny.backbone("gpt2"), processor, [], LABELS).shape == (0, 4)


# ---- the labels of a history ------------------------------------------------------------------------------------


def test_history_labels_are_the_items_own_answers():
    items = [{"tag": "comedy", "description": "a"}, {"tag": " action ", "description": "b"}, {"tag": "", "x": "c"}]
    example = Example(id="1", user="u", prompt="", query="", target=None, history=items)
    assert history_labels(example, "LaMP-2") == history_labels(example, get_task("LaMP-2")) == ["comedy", "action"]
    assert history_labels(example, "LaMP-1") == []  # its items carry no answer


# ---- the fit ----------------------------------------------------------------------------------------------------


def world(n=2000, labels=3, strength=1.0, items=(0, 30), seed=0):
    """Users with tastes, golds drawn from softmax(logp + strength * log taste): so a = 1 and b = strength, nearly."""
    rng = np.random.default_rng(seed)
    names = [f"label {k}" for k in range(labels)]
    tastes = rng.dirichlet([1.0] * labels, size=n)
    log_probs = torch.tensor(rng.normal(size=(n, labels))).log_softmax(dim=-1)
    histories = [rng.choice(names, size=rng.integers(*items), p=taste).tolist() for taste in tastes]
    chances = (log_probs + strength * torch.tensor(tastes).log()).softmax(dim=-1).numpy()
    golds = [names[rng.choice(labels, p=chance)] for chance in chances]
    return log_probs, histories, golds, names


def accuracy(fit, log_probs, histories, golds):
    return np.mean([p == g for p, g in zip(fit.predict(log_probs, histories), golds, strict=True)])


def by_hand(alpha, a, b, log_probs, histories, golds, labels):
    """The definition, in plain Python: (mean NLL, predictions)."""
    prior = [(golds.count(label) + 1) / (len(golds) + len(labels)) for label in labels]
    nll, predictions = [], []
    for row, history, gold in zip(log_probs.tolist(), histories, golds, strict=True):
        known = [label for label in history if label in labels]
        frequency = [
            (known.count(label) + alpha * p) / (len(known) + alpha) for label, p in zip(labels, prior, strict=True)
        ]
        scores = np.array([a * lp + b * np.log(f) for lp, f in zip(row, frequency, strict=True)])
        nll.append(np.logaddexp.reduce(scores) - scores[labels.index(gold)])
        predictions.append(labels[int(scores.argmax())])
    return np.mean(nll), predictions


def test_finds_the_truth_where_histories_are_informative():
    train, (log_probs, histories, golds, _) = world(items=(80, 120)), world(seed=1, items=(80, 120))
    fit = LabelMixture.fit(*train)
    assert fit.backbone_weight == pytest.approx(1, abs=0.12)
    assert fit.history_weight == pytest.approx(1, abs=0.12)
    without = dataclasses.replace(fit, history_weight=0.0)
    assert accuracy(fit, log_probs, histories, golds) > accuracy(without, log_probs, histories, golds) + 0.1


def test_shuffled_histories_get_no_weight():
    log_probs, histories, golds, labels = world()
    random.Random(0).shuffle(histories)
    fit = LabelMixture.fit(log_probs, histories, golds, labels)
    strong = LabelMixture.fit(*world())
    assert abs(fit.history_weight) < 0.15 < 0.7 < strong.history_weight
    assert 0.5 < fit.backbone_weight < 1  # less than 1, as golds now depend on what nobody can see


def test_keeps_the_smoothing_that_makes_the_golds_most_likely():
    data = world(n=300, items=(0, 6))
    alphas = (0.5, 2.0, 50.0)
    fits = [LabelMixture.fit(*data, alphas=(alpha,)) for alpha in alphas]
    losses = [by_hand(fit.alpha, fit.backbone_weight, fit.history_weight, *data)[0] for fit in fits]
    assert LabelMixture.fit(*data, alphas=alphas) == fits[int(np.argmin(losses))]
    assert len(set(losses)) == 3


def test_no_point_of_a_grid_is_better():
    data = world(n=60, labels=4)
    fit = LabelMixture.fit(*data, alphas=(1.0, 5.0, 50.0))
    best = by_hand(fit.alpha, fit.backbone_weight, fit.history_weight, *data)[0]
    for alpha in (1.0, 5.0, 50.0):
        for a in np.linspace(-1, 3, 17):
            for b in np.linspace(-1, 3, 17):
                assert best <= by_hand(alpha, a, b, *data)[0] + 1e-9
    for step in (-1e-3, 1e-3):  # and right around the optimum
        assert best <= by_hand(fit.alpha, fit.backbone_weight + step, fit.history_weight, *data)[0]
        assert best <= by_hand(fit.alpha, fit.backbone_weight, fit.history_weight + step, *data)[0]


def test_two_labels_are_a_logistic_regression():
    log_probs, histories, golds, labels = world(n=400, labels=2)
    fit = LabelMixture.fit(log_probs, histories, golds, labels, alphas=(2.0,))
    ones = dataclasses.replace(fit, backbone_weight=0.0, history_weight=1.0)
    features = torch.stack([log_probs, ones.scores(log_probs, histories)])  # [2, n, 2]
    x = (features[..., 1] - features[..., 0]).T.numpy()
    reference = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(x, [g == labels[1] for g in golds])
    assert [fit.backbone_weight, fit.history_weight] == pytest.approx(reference.coef_[0].tolist(), abs=1e-4)


histories_of_anything = st.lists(st.lists(st.sampled_from([*"abc", "no label"]), max_size=6), min_size=1, max_size=8)


@given(histories_of_anything, st.data())
@settings(deadline=None, max_examples=40)
def test_predictions_are_those_of_the_definition(histories, data):
    golds = data.draw(st.lists(st.sampled_from("abc"), min_size=len(histories), max_size=len(histories)))
    log_probs = torch.randn(len(golds), 3, generator=torch.Generator().manual_seed(len(golds))) * 5
    fit = LabelMixture.fit(log_probs, histories, golds, "abc", alphas=(2.0,))
    fit = dataclasses.replace(fit, backbone_weight=0.7, history_weight=1.3)  # few examples may have no finite optimum
    expected = by_hand(fit.alpha, 0.7, 1.3, log_probs, histories, golds, list("abc"))
    assert fit.predict(log_probs, histories) == expected[1]
    nll = -fit.scores(log_probs, histories).gather(1, torch.tensor([["abc".index(g)] for g in golds])).mean().item()
    assert nll == pytest.approx(expected[0])


def mixture(chances, labels):
    """A fit whose scores are exactly these chances, [n, L]."""
    fit = LabelMixture(tuple(labels), (1 / len(labels),) * len(labels), 1.0, 1.0, 0.0)
    return fit, torch.tensor(chances, dtype=torch.float64).log()


def test_for_mae_the_answer_is_the_median():
    chances = [
        [0.40, 0.05, 0.04, 0.25, 0.26],  # 1 is the most likely, but half of the chance lies at 4 and above
        [0.30, 0.10, 0.04, 0.05, 0.51],
        [0.30, 0.40, 0.10, 0.10, 0.10],
    ]
    fit, log_probs = mixture(chances, "12345")
    assert fit.predict(log_probs, [[]] * 3) == fit.predict(log_probs, [[]] * 3, "rouge") == ["1", "5", "2"]
    expected_errors = [sum(p * abs(label - answer) for label, p in enumerate(chances[0], 1)) for answer in range(1, 6)]
    assert expected_errors == pytest.approx([1.92, 1.72, 1.62, 1.60, 2.08])
    assert fit.predict(log_probs, [[]] * 3, "mae") == ["4", "5", "2"]


def test_for_mae_labels_are_numbers_in_any_order_at_any_distance():
    fit, log_probs = mixture([[0.4, 0.25, 0.35]], ["10", "0.5", "2"])
    assert fit.predict(log_probs, [[]]) == ["10"] and fit.predict(log_probs, [[]], "mae") == ["2"]
    fit, log_probs = mixture([[0.4, 0.6]], ["good", "bad"])
    with pytest.raises(MismatchError, match="good, bad; metric 'mae' needs numbers"):
        fit.predict(log_probs, [[]], "mae")


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_no_other_label_has_a_lower_expected_error(weights):
    chances = [[w / sum(row) for w in row] for row in weights]
    fit, log_probs = mixture(chances, "12345")
    error = lambda row, answer: sum(p * abs(label - answer) for label, p in enumerate(row, 1))  # noqa: E731
    for row, answer in zip(chances, fit.predict(log_probs, [[]] * len(chances), "mae"), strict=True):
        assert error(row, int(answer)) <= min(error(row, other) for other in range(1, 6)) + 1e-12


def test_empty_histories_and_unknown_labels_leave_the_prior():
    log_probs, histories, golds, labels = world(n=200)
    fit = LabelMixture.fit(log_probs, histories, golds, labels)
    only_history = dataclasses.replace(fit, backbone_weight=0.0, history_weight=1.0)
    scores = only_history.scores(log_probs[:2], [[], ["unheard of"]])
    torch.testing.assert_close(scores.exp(), torch.tensor([fit.prior, fit.prior], dtype=torch.float64))
    assert sum(fit.prior) == pytest.approx(1)


def test_histories_may_all_be_empty():
    log_probs, _, golds, labels = world(n=200)
    fit = LabelMixture.fit(log_probs, [[]] * 200, golds, labels)
    assert np.isfinite([fit.backbone_weight, fit.history_weight]).all() and fit.backbone_weight > 0.5


def test_a_label_nobody_gave_stays_possible():
    fit = LabelMixture.fit(torch.zeros(4, 3), [["b"]] * 4, ["a", "a", "a", "b"], "abc")
    assert fit.prior == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    assert fit.predict(torch.tensor([[-99.0, -99.0, 0.0]]), [["c"] * 9])[0] in "abc"


def test_perfect_scores_have_no_optimum_and_still_a_fit():
    golds = list("abca")
    log_probs = torch.tensor([[0.0 if label == gold else -30.0 for label in "abc"] for gold in golds])
    fit = LabelMixture.fit(log_probs, [[gold] for gold in golds], golds, "abc")
    assert np.isfinite([fit.backbone_weight, fit.history_weight]).all()
    assert fit.predict(log_probs, [[gold] for gold in golds]) == golds


def test_what_all_labels_share_does_not_matter():
    """A summed log-probability has no natural zero: only differences between labels count."""
    log_probs, histories, golds, labels = world(n=200)
    shifted = log_probs - 1000 * torch.rand(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (LabelMixture.fit(each, histories, golds, labels) for each in (log_probs, shifted))
    assert dataclasses.astuple(one)[3:] == pytest.approx(dataclasses.astuple(other)[3:], abs=1e-5)


def test_a_fit_can_be_repeated_and_kept():
    data = world(n=200)
    fit = LabelMixture.fit(*data)
    assert fit == LabelMixture.fit(*data)
    kept = json.loads(json.dumps(dataclasses.asdict(fit)))
    kept = LabelMixture(**kept | {"labels": tuple(kept["labels"]), "prior": tuple(kept["prior"])})
    assert kept == fit and kept.predict(*data[:2]) == fit.predict(*data[:2])


def test_fits_where_gradients_are_off():
    data = world(n=50)
    with torch.no_grad():
        assert LabelMixture.fit(*data) == LabelMixture.fit(*data)
    with torch.inference_mode():
        log_probs = data[0].clone()
    assert LabelMixture.fit(log_probs, *data[1:]) == LabelMixture.fit(*data)


ZEROS = torch.zeros(2, 2)


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (MismatchError, "are not labels", (ZEROS, [[], []], ["a", "x"], "ab")),
        (MismatchError, "2 golds for 3", (torch.zeros(3, 2), [[], [], []], ["a", "b"], "ab")),
        (MismatchError, "must be", (ZEROS, [[]], ["a", "b"], "ab")),
        (MismatchError, "must be", (ZEROS, [[], []], ["a", "b"], "abc")),
        (DataError, "0 golds", (ZEROS[:0], [], [], "ab")),
        (DataError, "each label once", (ZEROS, [[], []], ["a", "a"], "aa")),
        (DataError, "not finite", (ZEROS.log(), [[], []], ["a", "b"], "ab")),
    ],
)
def test_what_does_not_fit_is_an_error(error, match, arguments):
    with pytest.raises(error, match=match):
        LabelMixture.fit(*arguments)


@pytest.mark.parametrize("alphas", [(), (0.0,), (1.0, -1.0)])
def test_smoothing_is_positive(alphas):
    with pytest.raises(ConfigurationError, match="alphas"):
        LabelMixture.fit(ZEROS, [[], []], ["a", "b"], "ab", alphas)
