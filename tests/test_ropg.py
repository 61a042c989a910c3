"""ROPG: losses by hand and against slow loops, rewards against single answers, resumption, and whether it learns."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from bench_data import SHELVES, USERS, make_rows, predictions, quietly, save_plug, settings_for, write_data
from safetensors.torch import load_file
from torch import nn

from pplug_hf.cli import main
from pplug_hf.commands.fit import fit
from pplug_hf.commands.options import FitSettings
from pplug_hf.data.lamp import Example, read_lamp
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods import rewards as rewards_module
from pplug_hf.methods import ropg
from pplug_hf.methods.artefacts import Draft, read_artefact
from pplug_hf.methods.base import Retrieval
from pplug_hf.methods.decoding import answer
from pplug_hf.methods.prompts import retrieval_prompt
from pplug_hf.methods.resources import Decoding, Resources
from pplug_hf.methods.retrievers import fuse, get_ranker
from pplug_hf.methods.rewards import Rewards, RewardTable, normalised
from pplug_hf.methods.ropg import Policy, Questions, kd_loss, rl_loss
from pplug_hf.methods.trained_ranker import KIND, ranking_text
from pplug_hf.modeling.encoders import fingerprint
from pplug_hf.tasks.task import TASKS, per_example

ALL = torch.ones(1, 3).bool()


# ---- losses -----------------------------------------------------------------------------------------------------


def with_gradient(loss, scores, *args, **options):
    scores = scores.clone().requires_grad_()
    value = loss(scores, *args, **options)
    value.backward()
    return value.item(), scores.grad


@pytest.mark.parametrize(
    "form, value, gradient",
    [
        ("paper", 0.657205, [0.509879, -0.177590, -0.332288]),
        ("release", 1.217703, [0.096438, -0.067710, -0.028727]),
    ],
)
def test_the_distillation_by_hand(form, value, gradient):
    scores, rewards = torch.tensor([[2.0, 1, 0]]), torch.tensor([[0.0, 1, 1]])
    found, grad = with_gradient(kd_loss, scores, rewards, ALL, form=form)
    assert found == pytest.approx(value, abs=1e-6)
    assert grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_the_expected_gain_by_hand_and_by_drawing():
    scores, rewards = torch.tensor([[0.5, -0.2, 1, 0.1]]), torch.tensor([[1.0, 0, 0, 1]])
    mask = torch.ones(1, 4).bool()
    expected = [0.147353, -0.056972, -0.189154, 0.098773]  # of the reward; a loss is its negative
    _, grad = with_gradient(rl_loss, scores, rewards, mask)
    assert (-grad[0]).tolist() == pytest.approx(expected, abs=1e-6)
    draws = 200_000
    generator = torch.Generator().manual_seed(0)
    many = [each.expand(draws, -1) for each in (scores, rewards, mask)]
    _, drawn = with_gradient(rl_loss, *many, form="sampled", generator=generator)
    assert (-drawn.sum(dim=0)).tolist() == pytest.approx(expected, abs=3e-3)  # the loss is a mean already


def slow_kd(scores, rewards, tau_t, tau, form):
    """For one question with its own candidates, in fp64 and plain Python."""

    def softmax(values):
        top = max(values)
        parts = [math.exp(v - top) for v in values]
        return [part / sum(parts) for part in parts]

    target, policy = softmax([g / tau_t for g in rewards]), softmax([s / tau for s in scores])
    if form == "release":
        return -sum(p * math.log(q) for p, q in zip(target, softmax(policy), strict=True))
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(target, policy, strict=True))


def slow_rl(scores, rewards, tau):
    parts = [math.exp(s / tau) for s in scores]
    return -sum(part / sum(parts) * (g - rewards[0]) for part, g in zip(parts, rewards, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_padded_batch_is_the_mean_of_its_questions(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 6) for _ in range(4)]
    scores = [[rng.gauss(0, 2) for _ in range(n)] for n in lengths]
    rewards = [[rng.choice([0, 0.5, 1, 4]) for _ in range(n)] for n in lengths]

    def padded(rows, value):
        return torch.tensor([row + [value] * (9 - len(row)) for row in rows], dtype=torch.float64)

    mask = padded([[1] * n for n in lengths], 0).bool()
    inputs = padded(scores, 50.0), padded(rewards, 7.0), mask  # what is padded is large, and must not count
    for form in ("paper", "release"):
        found, grad = with_gradient(kd_loss, *inputs, 0.7, 0.3, form)
        expected = [slow_kd(s, g, 0.7, 0.3, form) for s, g in zip(scores, rewards, strict=True)]
        assert found == pytest.approx(sum(expected) / 4) and not grad[~mask].any() and grad.isfinite().all()
    found, grad = with_gradient(rl_loss, *inputs, 0.3)
    expected = [slow_rl(s, g, 0.3) for s, g in zip(scores, rewards, strict=True)]
    assert found == pytest.approx(sum(expected) / 4) and not grad[~mask].any() and grad.isfinite().all()
    generator = torch.Generator().manual_seed(seed)
    _, grad = with_gradient(rl_loss, *inputs, 0.3, "sampled", generator)
    assert not grad[~mask].any() and grad.isfinite().all()


def test_padding_with_empty_items_as_the_release_does_changes_the_target():
    """Two real ratings in four places: the release's padding has the un-normalised worst error as its reward."""
    real = torch.tensor([[1.0, 0.67]])
    released = torch.tensor([[1.0, 0.67, 3.0, 3.0]]).softmax(dim=1)
    assert released[0, 2:].min() > 0.4, "padding would be the target"
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.2]])
    mask = torch.tensor([[True, True, False, False]])
    padded = torch.tensor([[1.0, 0.67, 3.0, 3.0]])
    whole = kd_loss(scores[:, :2], real, torch.ones(1, 2).bool())
    assert kd_loss(scores, padded, mask) == pytest.approx(whole.item())
    assert rl_loss(scores, padded, mask) == pytest.approx(rl_loss(scores[:, :2], real, mask[:, :2]).item())


# ---- rewards ----------------------------------------------------------------------------------------------------


def test_ratings_become_rewards_by_the_farthest_end():
    task = TASKS["LaMP-3"]
    golds, answers = ["1", "3", "5", "4", "3"], ["1", "5", "1", "3", "nonsense"]
    scores = per_example(task, answers, golds)
    assert normalised(task, scores, golds).tolist() == pytest.approx([1, 0, 0, 2 / 3, 0])
    assert normalised(TASKS["LaMP-2"], np.array([0.0, 1.0]), ["a", "b"]).tolist() == [0, 1]


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_data(root / "shelves", SHELVES)
    save_plug(places, root / "plug0", item_template="{tag} {text}")
    return root


def resources_of(places, **options):
    given = {"backbone": str(places / "llama"), "retriever": str(places / "encoder"), "batch_size": 4}
    return Resources(SHELVES, **{**given, **options})


@pytest.fixture
def asked(monkeypatch):
    """How many prompts the language model read."""
    counts = []
    compute = RewardTable.compute
    monkeypatch.setattr(RewardTable, "compute", lambda self, texts: counts.extend(texts) or compute(self, texts))
    return counts


def candidates_of(examples, most=3):
    return [list(range(len(e.history)))[::-1][:most] for e in examples]


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("kind", ["metric", "log_prob"])
def test_rewards_are_those_of_single_answers(world, places, tmp_path, family, kind, asked):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    resources = resources_of(places, backbone=str(places / family))
    positions = candidates_of(examples)
    rewards = Rewards.of(resources, examples, positions, kind, tmp_path)
    model, processor = resources.language_model, resources.processor
    for e, chosen, values in zip(examples, positions, rewards.values, strict=True):
        assert len(chosen) == len(values)
        for i, value in zip(chosen, values.tolist(), strict=True):
            prompt = retrieval_prompt(SHELVES, e.prompt, [e.history[i]], processor.tokenizer, 256).text
            if kind == "metric":
                (text,) = answer(model.generate, processor, [prompt], max_new_tokens=3)
                assert value == per_example(SHELVES, [text], [e.target])[0]
            else:
                batch = processor(text=prompt, labels=e.target)
                with torch.no_grad():
                    loss = model(**batch).loss * (batch["labels"] != -100).sum()
                assert value == pytest.approx(-loss.item(), abs=1e-3)
    assert len(asked) == len(set(asked)) == rewards.passes == rewards.asked
    asked.clear()
    again = Rewards.of(resources_of(places, backbone=str(places / family)), examples, positions, kind, tmp_path)
    assert not asked and again.asked == 0 and again.passes == rewards.passes
    assert all(torch.equal(a, b) for a, b in zip(again.values, rewards.values, strict=True))


def test_what_changes_a_reward_misses_the_table(world, places, tmp_path, asked):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    examples = examples[-2:]

    def new(kind="metric", given=examples, **options):
        asked.clear()
        Rewards.of(resources_of(places, **options), given, candidates_of(given), kind, tmp_path)
        return len(asked)

    assert new() > 0 and new() == 0
    assert new(decoding=Decoding(num_beams=2)) > 0 and new(backbone=str(places / "gpt2")) > 0
    assert new("log_prob") > 0 and new("log_prob", decoding=Decoding(num_beams=2)) == 0  # it decodes nothing
    assert new("log_prob", decoding=Decoding(max_length=99)) > 0
    assert new(given=[replace(e, target="war" if e.target != "war" else "sea") for e in examples]) > 0
    longer = replace(SHELVES.prompt, item="{text} within {tag}")
    other = resources_of(places)
    other.task = replace(SHELVES, prompt=longer)
    asked.clear()
    Rewards.of(other, examples, candidates_of(examples), "metric", tmp_path)
    assert asked


def test_the_table_holds_no_text_and_keeps_whole_files_of_a_killed_run(world, places, tmp_path, monkeypatch, asked):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    monkeypatch.setattr(rewards_module, "_CHUNK", 4)
    generate = Resources.generate

    def killed(self, inputs, **options):
        if len(asked) > 8:
            raise KeyboardInterrupt
        return generate(self, inputs, **options)

    monkeypatch.setattr(Resources, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        Rewards.of(resources_of(places), examples, candidates_of(examples), "metric", tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    monkeypatch.setattr(Resources, "generate", generate)
    asked.clear()
    rewards = Rewards.of(resources_of(places), examples, candidates_of(examples), "metric", tmp_path)
    assert len(asked) == rewards.passes - 8
    (place,) = {path.parent for path in files}
    assert {name for path in place.glob("*.safetensors") for name in load_file(path)} == {"sha256", "vectors"}
    written = b"".join(path.read_bytes() for path in place.iterdir())
    texts = [item["text"] for e in examples for item in e.history]
    assert texts and not any(text.encode() in written for text in texts)
    assert json.loads((place / "key.json").read_text())["decoding"]["num_beams"] == 1


def test_what_there_is_to_learn_is_summed_up():
    values = [torch.tensor(v) for v in ([0.0, 1, 0], [1.0, 1], [0.0, 0, 0], [1.0])]
    assert Rewards(values, "metric").summary() == {
        "informative": 0.25,
        "gain": 0.25,
        "any_right": 0.75,
        "first_right": 0.5,
    }
    assert Rewards(values, "log_prob").summary() == {"informative": 0.25, "gain": 0.25}


# ---- scores and batches -----------------------------------------------------------------------------------------


def questions_of(world, values=None, dated=False, most=4):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    examples = [e for e in examples if e.history]
    positions = candidates_of(examples, most)
    rng = random.Random(0)
    values = values or [torch.tensor([rng.random() for _ in chosen]) for chosen in positions]
    return examples, positions, Questions.of(SHELVES, examples, positions, values, dated)


def policy_of(side, questions, encoder=None):
    encoder = encoder or tiny.shared_encoder()
    vectors = torch.tensor(encoder.encode(questions.items)) if side == "query" else None
    return Policy(encoder, (vectors, vectors) if side == "query" else None, ("", ""), 0.3, True)


@pytest.mark.parametrize("side", ["query", "both"])
def test_a_batch_with_shared_items_is_its_questions_one_by_one(world, side):
    examples, positions, questions = questions_of(world)
    policy = policy_of(side, questions)
    rows = list(range(len(examples)))
    scores = policy.scores(questions, rows)
    encoder = tiny.shared_encoder()
    for row, e in enumerate(examples):
        query = encoder.encode(SHELVES.retrieval_query(e.prompt))
        for place, i in enumerate(positions[row]):
            item = encoder.encode(SHELVES.retrieval_text(e.history[i]))
            assert scores[row, place].item() == pytest.approx(float(query @ item), abs=1e-5)
        assert questions.mask[row].sum() == len(positions[row])
    assert len(questions.items) == len({SHELVES.retrieval_text(item) for e in examples for item in e.history[-4:]})

    def gradient(rows):
        policy.zero_grad()
        scores = policy.scores(questions, rows)
        loss = kd_loss(scores, questions.rewards[rows], questions.mask[rows], 1.0, policy.temperature)
        (loss * len(rows)).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole = gradient(rows)
    torch.testing.assert_close(gradient(rows[::-1]), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sum(gradient([row]) for row in rows), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["query", "both"])
def test_mixed_precision_is_for_training_alone(world, side):
    examples, _, questions = questions_of(world)
    policy, rows = policy_of(side, questions), range(len(examples))
    plain = policy.scores(questions, rows)
    policy.bf16 = True
    assert torch.equal(policy.scores(questions, rows, held=True), plain)
    mixed = policy.scores(questions, rows)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, plain)
    torch.testing.assert_close(mixed, plain, atol=5e-2, rtol=5e-2)


def test_the_questions_of_one_user_share_a_batch(world):
    _, _, questions = questions_of(world)
    for seed in (None, "0/1", "0/2"):
        batches = list(questions.batches(4, seed))
        assert sorted(row for batch in batches for row in batch) == list(range(len(questions.users)))
        assert all(len({questions.users[row] for row in batch}) == 2 for batch in batches if len(batch) == 4)
    assert list(questions.batches(4, "0/1")) == list(questions.batches(4, "0/1"))
    assert list(questions.batches(2, "0/1")) != list(questions.batches(2, "0/2"))


def test_an_items_date_is_shown_if_it_has_one():
    item = {"text": "the sea", "tag": "moon", "date": "2019"}
    assert ranking_text(SHELVES, item, False) == "the sea"
    assert ranking_text(SHELVES, item, True) == "the sea date: 2019"
    assert ranking_text(SHELVES, {**item, "date": ""}, True) == "the sea"


class Turned(nn.Module):
    """Vectors by number, behind a linear map that is to be learned."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors
        self.map = nn.Parameter(torch.eye(vectors.shape[1]))

    def forward(self, rows):
        return self.vectors[rows] @ self.map


@pytest.mark.parametrize("form, least", [("kd", 0.6), ("exact", 0.4)])
def test_it_learns_to_put_the_right_item_first(form, least):
    """Queries that were turned away from their items; one item of 16 is right."""
    generator = torch.Generator().manual_seed(0)
    n, length, width = 300, 16, 24
    items = nn.functional.normalize(torch.randn(n, length, width, generator=generator), dim=-1)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    right = torch.randint(length, (n,), generator=generator)
    queries = items[torch.arange(n), right] @ turn
    rewards, mask = nn.functional.one_hot(right, length).float(), torch.ones(n, length).bool()
    model = Turned(queries)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        rows = torch.randint(n, (64,), generator=generator)
        scores = torch.einsum("bd,bld->bl", model(rows), items[rows])
        loss = (
            kd_loss(scores, rewards[rows], mask[rows], 0.25, 0.1)
            if form == "kd"
            else rl_loss(scores, rewards[rows], mask[rows], 0.1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def first_right(queries):
        return (torch.einsum("bd,bld->bl", queries, items).argmax(dim=1) == right).float().mean().item()

    assert first_right(queries) < 0.2 and first_right(model(torch.arange(n)).detach()) > least


# ---- the whole training -----------------------------------------------------------------------------------------


def settings_of(world, places, output, method="ropg-kd", **more):
    given = {"data": str(world / "shelves"), "output": str(output), "backbone": str(places / "llama")}
    given |= {"vectors": str(world / "vectors"), "held_users": 0.3, "select_users": 0.0}
    return FitSettings(method=method, **{**given, **more})


def train(world, places, output, method="ropg-kd", settings=None, **options):
    given = {"encoder": str(places / "encoder"), "rewards": str(world / "rewards"), "epochs": 2}
    made = settings_of(world, places, output, method, **(settings or {}))
    return quietly(made, lambda settings: fit(settings, SHELVES, **{**given, **options}))


@pytest.mark.parametrize(
    "method, options",
    [
        ("ropg-kd", {}),
        ("ropg-kd", {"loss": "release", "reward": "metric", "trained_side": "both", "dated_items": True}),
        ("ropg-rl", {}),
        ("ropg-rl", {"loss": "sampled", "train_on_histories": True}),
    ],
)
def test_a_ranker_is_trained_saved_and_put_into_a_bench(world, places, tmp_path, method, options):
    settings = {"constrained": True}  # random weights write no label by themselves
    artefact, printed = train(world, places, tmp_path / "r", method, settings, learning_rate=0.05, **options)
    assert "Kept: epoch" in printed and f"--trained {method}={tmp_path / 'r'}" in printed
    assert read_artefact(tmp_path / "r", KIND) == artefact
    assert [epoch["epoch"] for epoch in artefact.about["curve"]] == [0, 1, 2]
    assert artefact.about["cost"]["language_model_passes"] > 10 and artefact.about["rewards"]["fit"]["informative"] > 0
    assert not [path.name for path in (tmp_path / "r").rglob(".*")]
    _, printed = train(world, places, tmp_path / "r", method, settings, learning_rate=0.05, **options)
    assert "complete already" in printed

    given = {"plugs": None, "backbone": str(places / "llama"), "retriever": str(places / "encoder")}
    given |= {"trained": [f"ropg={tmp_path / 'r'}"], "vectors": str(tmp_path / "vectors")}
    quietly(settings_for(world, tmp_path / "bench", "dense@1", "ropg@1", "ropg@4", **given), task=SHELVES)
    key = predictions(tmp_path / "bench")["ropg@1,0.json"]["key"]
    assert key["retriever"] == {"artefact": artefact.digest}
    assert (tmp_path / "vectors" / "rankers" / artefact.digest).is_dir()
    quietly(settings_for(world, tmp_path / "seeds", "rrf@4", **given, fuse=["bm25", "ropg"]), task=SHELVES)

    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    resources = resources_of(places, vectors=str(tmp_path / "vectors"))
    found = Retrieval("ropg", 9, folder=str(tmp_path / "r")).items(examples, resources)
    assert found != Retrieval("dense", 9).items(examples, resources), "it has learned something"
    from sentence_transformers import SentenceTransformer

    trained = SentenceTransformer(str(tmp_path / "r" / "encoder"), device="cpu")
    for e, items in zip(examples, found, strict=True):
        texts = [ranking_text(SHELVES, item, options.get("dated_items", False)) for item in e.history]
        if texts:
            of_items = trained if options.get("trained_side") == "both" else tiny.shared_encoder()
            scores = of_items.encode(texts) @ trained.encode(SHELVES.retrieval_query(e.prompt))
            order = sorted(range(len(texts)), key=lambda i: (round(float(scores[i]), 4), i), reverse=True)
            ranked = [round(float(scores[e.history.index(item)]), 4) for item in items]
            assert ranked == pytest.approx([round(float(scores[i]), 4) for i in order], abs=2e-4)


@pytest.mark.parametrize("side", ["query", "both"])
def test_an_untrained_copy_ranks_as_the_encoder_does(world, places, tmp_path, side):
    train(world, places, tmp_path / "r", learning_rate=1e-30, trained_side=side)
    given = {"plugs": None, "backbone": str(places / "llama"), "retriever": str(places / "encoder")}
    given |= {"trained": [f"ropg={tmp_path / 'r'}"], "vectors": str(tmp_path / "vectors")}
    quietly(settings_for(world, tmp_path / "bench", "dense@4", "ropg@4", "dense@1", "ropg@1", **given), task=SHELVES)
    made = predictions(tmp_path / "bench")
    for k in (1, 4):
        assert made[f"ropg@{k},0.json"]["golds"] == made[f"dense@{k}.json"]["golds"]


def test_trainings_share_the_rewards(world, places, tmp_path, asked):
    options = {"rewards": str(tmp_path / "rewards")}
    train(world, places, tmp_path / "a", **options)
    assert asked
    asked.clear()
    train(world, places, tmp_path / "b", settings={"seed": 1}, **options)
    train(world, places, tmp_path / "c", "ropg-rl", **options)
    assert not asked


@pytest.mark.parametrize("method, options", [("ropg-kd", {"trained_side": "both"}), ("ropg-rl", {"loss": "sampled"})])
def test_a_killed_training_goes_on_to_the_same_weights(world, places, tmp_path, monkeypatch, method, options):
    options = {"epochs": 4, "patience": 4, "questions_per_step": 2, "learning_rate": 1e-2, **options}
    whole, _ = train(world, places, tmp_path / "whole", method, **options)
    judge, calls = ropg._judge, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:  # after two epochs, within the third
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(ropg, "_judge", killed)
    with pytest.raises(KeyboardInterrupt):
        train(world, places, tmp_path / "killed", method, **options)
    with pytest.raises(DataError, match="not complete"):
        read_artefact(tmp_path / "killed")
    monkeypatch.setattr(ropg, "_judge", judge)
    made, printed = train(world, places, tmp_path / "killed", method, **options)
    assert "Going on after epoch 2." in printed and made.about["curve"] == whole.about["curve"]
    assert made.digest == whole.digest
    with pytest.raises(ConfigurationError, match=r"these differ: options\.epochs"):
        train(world, places, tmp_path / "killed", method, **options | {"epochs": 5})


def test_patience_ends_a_training_and_the_best_epoch_is_kept(world, places, tmp_path, monkeypatch):
    rewards, weights = iter([0.5, 0.6, 0.8, 0.8, 0.7, 0.9]), []

    def judged(job, policy, held):
        (name,) = [name for name in policy.encoder.state_dict() if name.endswith("word_embeddings.weight")]
        weights.append(policy.encoder.state_dict()[name].clone())
        return {"loss": float(len(weights)), "reward": next(rewards)}

    monkeypatch.setattr(ropg, "_judge", judged)
    made, _ = train(world, places, tmp_path / "r", epochs=9, patience=2, learning_rate=1e-2)
    assert (
        made.about["epoch"] == 2 and len(made.about["curve"]) == 5
    )  # the third has the same reward, and a higher loss
    saved = load_file(made.file("encoder/model.safetensors"))
    name = next(name for name in saved if name.endswith("word_embeddings.weight"))
    assert torch.equal(saved[name], weights[2]) and not torch.equal(weights[2], weights[3])


# ---- what cannot work -------------------------------------------------------------------------------------------


def test_a_retriever_of_another_encoder_is_refused(world, places, tmp_path):
    tiny.encoder(seed=1).save(str(tmp_path / "other"))
    tiny.encoder().save(str(tmp_path / "base"))
    train(world, places, tmp_path / "r", encoder=str(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "moved")
    ranker, folder = str(tmp_path / "r"), str(tmp_path / "v")
    with pytest.raises(MismatchError, match=r"belongs to the sentence encoder with the digest .*pass retriever="):
        resources_of(places, retriever=str(tmp_path / "other"), vectors=folder).ranker("x", ranker)
    found = resources_of(places, retriever=str(tmp_path / "moved"), vectors=folder).ranker("x", ranker)
    assert found.items.fingerprint["digest"] == fingerprint(tiny.encoder())["digest"]
    of_a_plug = resources_of(places, retriever=None, plugs={"pplug": [str(world / "plug0")]}, vectors=folder)
    assert of_a_plug.ranker("x", ranker).items.fingerprint["digest"] == found.items.fingerprint["digest"]


def test_rewards_that_are_all_equal_teach_nothing(world, places, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardTable, "compute", lambda self, texts: torch.ones(len(texts), 2))
    with pytest.raises(DataError, match=r"All candidates of a question have the same reward, for all .* fit users"):
        train(world, places, tmp_path / "r", rewards=str(tmp_path / "rewards"))


def test_uninformative_questions_can_be_left_out(world, places, tmp_path, monkeypatch):
    def compute(self, texts):  # only the prompts with a word in them are any better
        return torch.tensor([[float("moon" in text), 1.0] for text in texts])

    monkeypatch.setattr(RewardTable, "compute", compute)
    sizes = []
    of = Questions.of.__func__
    monkeypatch.setattr(
        Questions, "of", classmethod(lambda cls, *args, **more: sizes.append(len(args[1])) or of(cls, *args, **more))
    )
    train(world, places, tmp_path / "a", rewards=str(tmp_path / "rewards"))
    train(world, places, tmp_path / "b", rewards=str(tmp_path / "rewards"), drop_uninformative=True)
    assert sum(sizes[2:]) < sum(sizes[:2])


def test_users_without_items_and_short_histories(world, places, tmp_path):
    """User 0 has no history, user 1 two items; more candidates than anybody has items."""
    made, _ = train(world, places, tmp_path / "r", candidates=50)
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    asked = sum(part["questions"] for part in made.about["rewards"].values())
    assert asked == sum(bool(e.history) for e in examples) == 2 * (USERS - 1)
    passes = sum(part["language_model_passes"] for part in made.about["rewards"].values())
    assert passes == sum(len(e.history) for e in examples)
    rows = [
        {"id": str(i), "user": str(i), "input": f"for the book: {i}", "output": "sea", "profile": []} for i in range(9)
    ]
    options = {"encoder": str(places / "encoder"), "rewards": str(tmp_path / "rewards")}
    with pytest.raises(DataError, match="No question of the fit users has a history"):
        settings = settings_of(world, places, tmp_path / "none")
        quietly(settings, lambda settings: fit(settings, SHELVES, {"train": rows}, **options))


def test_histories_teach_nothing_that_another_split_asks(world, places, tmp_path, monkeypatch):
    excluded = []

    def recorded(examples, task, exclude):
        excluded.append([e.id for e in exclude])
        return []

    monkeypatch.setattr(ropg, "history_examples", recorded)
    questions, golds = make_rows(SHELVES, 1)
    rows = [{**question, **gold} for question, gold in zip(questions, golds, strict=True)]
    data = {"train": rows, "validation": rows[:3], "test": rows[3:4]}
    options = {"data": data, "train_on_histories": True, "epochs": 1}
    train(world, places, tmp_path / "r", **options)
    assert excluded == [[row["id"] for row in rows[:4]]]
    data["validation"] = rows[:2]
    with pytest.raises(ConfigurationError, match=r"these differ: left_out"):
        train(world, places, tmp_path / "r", **options)
    train(world, places, tmp_path / "questions", **options | {"train_on_histories": False})
    assert "left_out" not in read_artefact(tmp_path / "questions").run


@pytest.mark.parametrize(
    "options, settings, error, message",
    [
        ({"candidates": 1}, {}, ConfigurationError, "candidates is 1; give at least 2"),
        ({"candidates_by": "bm26"}, {}, ConfigurationError, "no ranker 'bm26'"),
        ({"nonsense": 1}, {}, ConfigurationError, "cannot be trained with these options: .*nonsense"),
        *(({name: 0}, {}, ConfigurationError, f"{name} is 0; give more than 0") for name in ("epochs", "temperature")),
        ({"questions_per_step": 0}, {}, ConfigurationError, "questions_per_step is 0; give more than 0"),
        ({}, {"held_users": 0.0}, ConfigurationError, "held_users is 0"),
        ({}, {"max_items": 0}, ConfigurationError, "keep at least 1 item"),
    ],
)
def test_settings_that_cannot_work(world, places, tmp_path, options, settings, error, message):
    with pytest.raises(error, match=message):
        train(world, places, tmp_path / "r", settings=settings, **options)
    assert not (tmp_path / "r").exists()


def test_a_half_written_ranker_is_one_clear_line(world, places, tmp_path, capsys):
    train(world, places, tmp_path / "r")
    path = tmp_path / "r" / "encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    write_data(tmp_path / "data", TASKS["LaMP-2"])
    with pytest.raises(DataError, match=r"'encoder/model\.safetensors' of the artefact .* is damaged"):
        resources_of(places, vectors=str(tmp_path / "v")).ranker("x", str(tmp_path / "r"))
    Draft.open(tmp_path / "half", KIND, {})
    given = ["--data", str(tmp_path / "data"), "--output", "x", "--backbone", str(places / "llama")]
    assert main(["bench", *given, "--task", "LaMP-2", "--trained", f"r={tmp_path / 'half'}"]) == 1
    assert "is not complete: run the same `pplug-hf fit` again" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_names_the_options(world, places, tmp_path, capsys):
    given = ["--data", str(world / "shelves"), "--output", "x", "--backbone", "x/y", "--encoder", "x/y"]
    assert main(["fit", "--method", "ropg-kd", *given, "--task", "none"]) == 1
    assert "There is no task 'none'" in capsys.readouterr().err
    assert main(["fit", "--method", "nothing", *given]) == 1
    assert "no method 'nothing' to train; choose one of ropg-kd, ropg-rl" in capsys.readouterr().err
    for method in ("ropg-kd", "ropg-rl"):
        with pytest.raises(SystemExit):
            main(["fit", "--method", method, "--help"])
        shown = capsys.readouterr().out
        assert "--candidates_by" in shown and ("--target_temperature" in shown) == (method == "ropg-kd")


# ---- fusion -----------------------------------------------------------------------------------------------------


def test_fusion_by_hand():
    """Lists abcd, cadb, dcba."""
    orders = [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]]
    assert [f"{sum(1 / (60 + order.index(i) + 1) for order in orders):.7f}" for i in (2, 0, 3, 1)] == [
        "0.0483955",
        "0.0481475",
        "0.0478915",
        "0.0476270",
    ]
    assert fuse(orders) == [2, 0, 3, 1]
    assert fuse([orders[1]]) == orders[1]
    assert fuse([orders[2], orders[0], orders[1]]) == fuse(orders)
    assert fuse([[0, 1], [1, 0]]) == [1, 0]  # equal: the newer one
    assert fuse([[], []]) == []


@pytest.mark.parametrize("seed", range(20))
def test_fusion_is_the_slow_loop_and_its_pools_order_is_irrelevant(seed):
    rng = random.Random(seed)
    n, rankers = rng.randint(1, 30), rng.randint(1, 5)
    orders = [rng.sample(range(n), n) for _ in range(rankers)]
    score = {i: math.fsum(1 / (61 + order.index(i)) for order in orders) for i in range(n)}
    found = fuse(orders)
    assert [round(score[i], 12) for i in found] == sorted((round(v, 12) for v in score.values()), reverse=True)
    for _ in range(5):
        rng.shuffle(orders)
        assert fuse(orders) == found


def test_the_fusion_ranker_fuses_its_rankers():
    history = [{"id": str(i), "text": text, "tag": "sea"} for i, text in enumerate(["the sea", "a dog", "sea sea"])]
    asked = Example("1", "u", "for the book: sea", "sea", None, history)
    own = [get_ranker(name, SHELVES) for name in ("recency", "bm25")]
    assert get_ranker("rrf", SHELVES, rankers=own).rank(asked) == fuse([ranker.rank(asked) for ranker in own])
    assert get_ranker("rrf", SHELVES).rank(asked) == get_ranker("rrf", SHELVES, rankers=own[::-1]).rank(asked)
    assert get_ranker("rrf", SHELVES, rankers=own[1:]).rank(asked) == own[1].rank(asked)
    for options in ({"rankers": []}, {"c": -1}):
        with pytest.raises(ConfigurationError, match="give at least one"):
            get_ranker("rrf", SHELVES, **options)
