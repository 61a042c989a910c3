"""Selectors: their loss and texts against definitions, what they learn, what they ask, and what they refuse."""

import contextlib
import hashlib
import json
import math
import random
import shutil
from dataclasses import asdict, fields, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from bench_data import SHELVES, make_world, plugs_of, predictions, quietly, save_plug, settings_for, write_data
from torch.nn import functional as F

from pplug_hf.cli import main
from pplug_hf.commands import fit_selector
from pplug_hf.commands.fit import FitSettings, fit
from pplug_hf.data.histories import three_way_split
from pplug_hf.data.lamp import read_lamp
from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods import label_frequencies
from pplug_hf.methods.artefacts import Draft, read_artefact
from pplug_hf.methods.base import Method
from pplug_hf.methods.decoding import Answers, ModelInputs
from pplug_hf.methods.label_frequencies import divided
from pplug_hf.methods.names import METHODS
from pplug_hf.methods.selection import (
    SelectionModel,
    SelectionTraining,
    TextForm,
    choose,
    informative,
    selection_loss,
    train_selection,
)
from pplug_hf.tasks.task import TASKS

# ---- the loss and the texts -----------------------------------------------------------------------------------------


def test_the_loss_of_the_specification():
    z = torch.tensor([[0.2, 0.1, -0.3], [0.0, 0.0, 0.0]])
    g = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert selection_loss(z[:1], g[:1]) == pytest.approx(0.130166, abs=1e-6)
    assert selection_loss(z[1:], g[1:]) == pytest.approx(0, abs=1e-7)
    assert selection_loss(z, g) == pytest.approx(0.065083, abs=1e-6)


def test_the_loss_is_the_divergence_and_its_gradient_the_difference_of_the_distributions():
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(3, 4)), requires_grad=True)
    g, tau = rng.random((3, 4)), 0.25
    total = 0.0
    for scores, rewards in zip(z.detach().numpy(), g, strict=True):
        p = [math.exp(r / tau) / sum(math.exp(s / tau) for s in rewards) for r in rewards]
        q = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    loss = selection_loss(z, torch.tensor(g), tau)
    loss.backward()
    assert loss.item() == pytest.approx(total)
    expected = (F.softmax(z.detach(), -1) - F.softmax(torch.tensor(g) / tau, -1)) / 3
    torch.testing.assert_close(z.grad, expected)


def test_of_equal_scores_the_first_way_counts():
    assert choose(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [3.0, 1.0, 3.0]])) == [0, 1, 0]
    rewards = torch.tensor([[1.0, 1.0], [0.5, 0.5 + 1e-12], [0.0, 1.0]])
    assert informative(rewards).tolist() == [2]


def test_texts_of_both_orders():
    parts = ("<eos>", ["q1", "q2"], [["A q1", "A q2"], ["B q1", "B q2"]], [["Yes", "No"], ["Sea", "War"]])
    assert TextForm().texts(*parts) == [
        ["Yes <eos> q1 <eos> A q1", "Sea <eos> q1 <eos> B q1"],
        ["No <eos> q2 <eos> A q2", "War <eos> q2 <eos> B q2"],
    ]
    assert TextForm().texts(*parts[:3]) == [
        ["q1 <eos> A q1", "q1 <eos> B q1"],
        ["q2 <eos> A q2", "q2 <eos> B q2"],
    ]
    paper = TextForm(order="paper")
    assert paper.texts(*parts)[0] == ["a q1 <eos> Yes", "b q1 <eos> Sea"]
    assert paper.texts(*parts[:3])[1] == ["a q2", "b q2"]


def scored(form, texts):
    model = SelectionModel.from_encoder(tiny.shared_encoder(), form)
    torch.nn.init.normal_(model.head["weight"])
    return model, model.scores([texts])[0]


def test_a_long_text_keeps_its_start_or_in_the_papers_order_its_end():
    base = "sea moon war snow rain"
    model, scores = scored(TextForm(length=7), [base, f"{base} story", f"{base} dog", f"dog {base}"])
    assert scores[0] == scores[1] == scores[2] != scores[3]
    assert model.count_cut([[base, f"{base} story"], [base, f"dog {base}"]]) == 2
    _, scores = scored(TextForm(order="paper", length=7), [base, f"story {base}", f"dog {base}", f"{base} dog"])
    assert scores[0] == scores[1] == scores[2] != scores[3]
    with pytest.raises(ConfigurationError, match="reads 1 to 64 tokens, and text_length is 65"):
        SelectionModel.from_encoder(tiny.shared_encoder(), TextForm(length=65))


def test_the_encoder_that_is_given_stays_as_it_was():
    encoder = tiny.encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    length = encoder.max_seq_length
    model = SelectionModel.from_encoder(encoder, TextForm(order="paper", length=5))
    train_selection(model, *[[["sea", "war"]], torch.tensor([[1.0, 0.0]])] * 2, SelectionTraining(epochs=1))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.max_seq_length == length and encoder.tokenizer.truncation_side == "right"


def test_scores_are_of_each_text_alone():
    """With and without gradients, in any order of the ways and beside any others; a fresh head gives zero."""
    model = SelectionModel.from_encoder(tiny.shared_encoder(), TextForm())
    texts = [["sea", "war and snow", "a dark film"], ["a dark film", "sea", "rain"]]
    assert model.scores(texts).abs().max() == 0
    torch.nn.init.normal_(model.head["weight"])
    scores = model.scores(texts)
    torch.testing.assert_close(model(texts).detach(), scores)
    assert scores[0, 0] == scores[1, 1] and scores[0, 2] == scores[1, 0]
    torch.testing.assert_close(model.scores([own[::-1] for own in texts]), scores.flip(1))
    torch.testing.assert_close(model.scores(texts, batch_size=1), scores)


def test_each_row_has_a_part_of_the_head():
    model = SelectionModel.from_encoder(tiny.shared_encoder(), TextForm(), ways=2)
    texts = [["sea", "sea"], ["war and snow", "sea"], ["rain", "a dark film"]]
    for name in model.head:
        torch.nn.init.normal_(model.head[name])
    vectors = {text: model.encoder.encode([text], convert_to_tensor=True)[0] for own in texts for text in own}
    weights = {name: value.detach() for name, value in model.head.items()}
    expected = [
        [
            float(
                (weights["weight"][0] + weights["row_weights"][m]) @ vectors[text]
                + weights["bias"]
                + weights["row_biases"][m]
            )
            for m, text in enumerate(own)
        ]
        for own in texts
    ]
    torch.testing.assert_close(model.scores(texts), torch.tensor(expected))
    torch.testing.assert_close(model(texts).detach(), torch.tensor(expected))
    assert model.scores(texts)[0, 0] != model.scores(texts)[0, 1], "the same text in two rows"


def test_one_row_that_is_always_better_is_found_without_any_word():
    texts, rewards = [["sea"] * 3] * 40, torch.tensor([[0.0, 0.0, 1.0]] * 30 + [[1.0, 0.0, 0.0]] * 10)
    model = SelectionModel.from_encoder(tiny.shared_encoder(), TextForm(), ways=3)
    train_selection(model, texts, rewards, texts, rewards, SelectionTraining(epochs=5))
    assert choose(model.scores(texts[:1])) == [2]


# ---- learning -------------------------------------------------------------------------------------------------------


def synthetic(n, seed):
    """Three ways, of which the one whose text says "good" is right, in half of the cases; in the others all are wrong."""
    rng = random.Random(seed)
    texts, rewards = [], []
    for _ in range(n):
        right = rng.randrange(3) if rng.random() < 0.5 else None
        words = [rng.sample([w for w in tiny.WORDS if w != "good"], 5) for _ in range(3)]
        if right is not None:
            words[right][rng.randrange(5)] = "good"
        texts.append([" ".join(each) for each in words])
        rewards.append([float(m == right) for m in range(3)])
    return texts, torch.tensor(rewards)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_selector_learns_what_the_texts_show(bf16):
    train, held, test = synthetic(240, 0), synthetic(80, 1), synthetic(200, 2)
    model = SelectionModel.from_encoder(tiny.encoder(pooling="mean"), TextForm())
    settings = SelectionTraining(epochs=20, learning_rate=3e-3, head_learning_rate=3e-2, temperature=0.25, bf16=bf16)
    curve = train_selection(model, *train, *held, settings)
    assert curve[-1]["loss"] < curve[0]["loss"] and len(curve) <= 20
    rewards = test[1]
    got = rewards[range(200), choose(model.scores(test[0]))].mean()
    any_way, best = rewards.mean(), rewards.max(dim=1).values.mean()
    assert (got - any_way) / (best - any_way) > 0.9


def test_the_best_epoch_is_kept_and_training_stops_in_time():
    train, held = synthetic(40, 0), synthetic(30, 1)
    model = SelectionModel.from_encoder(tiny.encoder(), TextForm())
    curve = train_selection(model, *train, *held, SelectionTraining(epochs=12, patience=2, head_learning_rate=0.1))
    best = max(range(len(curve)), key=lambda i: (curve[i]["held_reward"], -curve[i]["held_loss"]))
    assert len(curve) == min(12, best + 3)
    kept = informative(held[1]).tolist()
    scores = model.scores([held[0][i] for i in kept])
    assert held[1][kept][range(len(kept)), choose(scores)].mean() == pytest.approx(curve[best]["held_reward"])
    assert selection_loss(scores, held[1][kept]) == pytest.approx(curve[best]["held_loss"], abs=1e-5)


def test_questions_without_a_choice_change_nothing():
    train, held = synthetic(30, 0), synthetic(20, 1)
    kept = informative(train[1]).tolist()
    models = [SelectionModel.from_encoder(tiny.encoder(), TextForm()) for _ in range(2)]
    settings = SelectionTraining(epochs=1, questions_per_step=len(kept))
    train_selection(models[0], *train, *held, settings)
    train_selection(models[1], [train[0][i] for i in kept], train[1][kept], *held, settings)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for rewards, message in (
        ((torch.ones(30, 3), held[1]), "For all 30 questions to learn from, every row of the pool is equally good"),
        ((train[1], torch.zeros(20, 3)), "For all 20 questions of the held-out users"),
    ):
        with pytest.raises(DataError, match=message):
            train_selection(models[0], train[0], rewards[0], held[0], rewards[1], settings)


def test_a_model_that_was_saved_is_the_same(tmp_path):
    model, _ = scored(TextForm(order="paper", length=9), ["sea"])
    model.save(tmp_path)
    loaded = SelectionModel.load(tmp_path / "encoder", tmp_path / "head.safetensors", model.form)
    texts = [["sea " * 20 + "war", "a dark film"]]
    torch.testing.assert_close(loaded.scores(texts), model.scores(texts))
    assert not list(tmp_path.rglob("*.bin")) and not any(p.requires_grad for p in loaded.parameters())
    tiny.encoder(width=8).save(str(tmp_path / "other"))
    with pytest.raises(MismatchError, match="of another encoder"):
        SelectionModel.load(tmp_path / "other", tmp_path / "head.safetensors", model.form)


# ---- fit and bench --------------------------------------------------------------------------------------------------


class Told(Method):
    """A method that is right for a third of the questions, where its prompt says so."""

    asked: ClassVar[list[tuple[int, int]]] = []  # number of the method, and how many questions

    def __init__(self, number):
        self.number = number

    def is_right(self, e):
        return int(hashlib.sha256(e.id.encode()).hexdigest(), 16) % 4 == self.number % 10

    def inputs(self, examples, resources):
        return ModelInputs([f"{'good' if self.is_right(e) else 'old'} {e.prompt}" for e in examples])

    def answer(self, examples, resources):
        Told.asked.append((self.number, len(examples)))
        return Answers([e.target if self.is_right(e) else "rain" for e in examples])

    def key(self, resources):
        return {"told": self.number}


TOLD = ("one", "two", "three")


@pytest.fixture(autouse=True)
def told(monkeypatch):
    numbers = dict(zip((*TOLD, "copy"), (0, 1, 2, 10), strict=True))
    for name, number in numbers.items():
        monkeypatch.setitem(METHODS, name, partial(Told, number))
    monkeypatch.setattr(Told, "asked", [])


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    root = make_world(places, tmp_path_factory.mktemp("selection"))
    write_data(root / "many", SHELVES, users=30)
    for family in ("t5", "llama"):
        (root / family).symlink_to(places / family)
    tiny.encoder(pooling="mean").save(str(root / "encoder"))
    return root


def job(world, output, method="rspg-post", **more):
    """The settings of `fit`, and the method's options."""
    settings = {"data": str(world / "many"), "backbone": str(world / "t5"), "vectors": str(world / "vectors")}
    settings |= {"select_users": 0.5, "held_users": 0.3}
    own = {"answers": str(output) + "-answers", "pool": list(TOLD), "encoder": str(world / "encoder")}
    own |= {"epochs": 15, "learning_rate": 3e-3, "head_learning_rate": 3e-2, "questions_per_step": 4}
    names = {f.name for f in fields(FitSettings)}
    settings |= {name: value for name, value in more.items() if name in names}
    own |= {name: value for name, value in more.items() if name not in names}
    return FitSettings(method=method, output=str(output), **settings), own


def train(settings, own):
    return quietly(settings, lambda s: fit(s, SHELVES, **own))


def compare(world, output, *rows, **more):
    given = {"data": str(world / "many"), "backbone": str(world / "t5"), "plugs": None}
    return quietly(settings_for(world, output, *rows, **{**given, **more}), task=SHELVES)


@pytest.fixture(scope="module")
def selectors(world):
    """One of each kind, which share the answers of their pool."""
    with pytest.MonkeyPatch.context() as patch:
        for name, number in zip((*TOLD, "copy"), (0, 1, 2, 10), strict=True):
            patch.setitem(METHODS, name, partial(Told, number))
        patch.setattr(Told, "asked", [])
        for method in ("rspg-post", "rspg-pre"):
            _, printed = train(*job(world, world / method, method, answers=str(world / "answers")))
        assert len(Told.asked) == 3 and "3 of 3 runs are there already" in printed
    return [f"{method}={world / method}" for method in ("rspg-pre", "rspg-post")]


def test_an_artefact_says_what_it_is(world, selectors):
    made = read_artefact(world / "rspg-pre")
    assert made.kind == "selector" and list(made.settings["pool"]) == list(TOLD)
    assert made.settings["reads"] == "prompts" and made.settings["training"]["temperature"] == 0.25
    assert "head.safetensors" in made.files and any(name.startswith("encoder/") for name in made.files)
    asked = made.about["questions"]
    assert asked["select"] == 30 and asked["held"] == 18 and 0 < asked["informative"] < 30
    assert made.about["cost"]["language_model_passes"] == 3 * 48 and len(made.about["curve"]) >= 3
    assert 0 <= made.about["cut_texts"] <= 1 and sum(made.about["rewards"].values()) <= 1
    files = [path for path in (world / "rspg-pre").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    text = (world / "rspg-pre" / "method.json").read_text()
    assert "book" not in text, "no text of a user"


def test_selectors_find_what_can_be_found(world, selectors, tmp_path):
    made, printed = compare(world, tmp_path, *TOLD, "rspg-pre", "rspg-post", trained=selectors)
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {record["row"]: record["accuracy"] for record in results["rows"]}
    best, any_way = scores["rspg-pre:oracle"], scores["rspg-pre:random"]
    for row in ("rspg-pre", "rspg-post"):
        assert (scores[row] - any_way) / (best - any_way) > 0.9 and scores[row] <= best
        per_question = made.scores()
        assert (per_question[row] <= per_question["rspg-pre:oracle"]).all()
        assert (per_question[row] >= per_question["rspg-pre:worst"]).all()
    (pool,) = results["pools"]  # of both, because it is the same
    assert pool["name"] == "rspg-pre" and {"rspg-pre", "rspg-post"} < pool["best"].keys() and pool["chance"] is None
    saved = predictions(tmp_path)
    for row, generations in (("rspg-pre", 1), ("rspg-post", 3)):
        about = saved[f"{row},0.json"]["about"]
        assert (
            about["cost"]["generations_per_question"] == generations and about["cost"]["language_model_passes"] == 144
        )
        counts = about["prompts"]
        assert sum(n for name, n in counts.items() if name.startswith("chosen")) == 60
        assert saved[f"{row},0.json"]["key"]["pool"] == {name: {"told": i} for i, name in enumerate(TOLD)}
    assert "rspg-pre chooses between the answers of one, two, three" in printed
    costs = printed[printed.index("Costs of training and answering") :].splitlines()
    head, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in costs[2:] if line.startswith("|")]
    table = {line[0]: dict(zip(head, line, strict=True)) for line in lines[1:6]}
    generations = [table[row]["generations per question"] for row in ("one", "rspg-pre", "rspg-post")]
    assert generations == ["1", "1", "3"]
    assert (
        table["rspg-post"]["passes of the language model in training"] == "144"
        and table["rspg-pre"]["trained weights"]
    )
    assert table["one"]["trained weights"] == ""


def test_nobody_is_asked_if_answers_are_there_else_pre_once_per_question(world, selectors, tmp_path):
    compare(world, tmp_path, *TOLD, trained=selectors)
    Told.asked.clear()
    compare(world, tmp_path, "rspg-post", *TOLD, trained=selectors)
    assert Told.asked == [], "though the selector's row comes first"
    compare(world, tmp_path, "rspg-pre", *TOLD, trained=selectors)
    assert Told.asked == []
    there = predictions(tmp_path)
    compare(world, tmp_path / "pre", "rspg-pre", trained=selectors)
    assert sum(n for _, n in Told.asked) == 60 and len({m for m, _ in Told.asked}) == len(Told.asked) <= 3
    assert predictions(tmp_path / "pre")["rspg-pre,0.json"]["golds"] == there["rspg-pre,0.json"]["golds"]
    Told.asked.clear()
    compare(world, tmp_path / "alone", "rspg-post", trained=selectors)
    assert sorted(Told.asked) == [(0, 60), (1, 60), (2, 60)], "the rows of its pool are not in this comparison"
    assert predictions(tmp_path / "alone")["rspg-post,0.json"]["golds"] == there["rspg-post,0.json"]["golds"]


def test_pre_chooses_without_reading_answers(world, selectors, tmp_path):
    compare(world, tmp_path, *TOLD, "rspg-pre", "rspg-post", trained=selectors)
    before = predictions(tmp_path)
    for name in TOLD:
        path = tmp_path / "predictions" / f"{name}.json"
        content = json.loads(path.read_text())
        content["golds"] = [{**gold, "output": "poison"} for gold in content["golds"]]
        path.write_text(json.dumps(content))
    for row in ("rspg-pre", "rspg-post"):
        (tmp_path / "predictions" / f"{row},0.json").unlink()
    compare(world, tmp_path, *TOLD, "rspg-pre", "rspg-post", trained=selectors)
    after = predictions(tmp_path)
    chosen = [of["rspg-pre,0.json"]["about"]["prompts"] for of in (before, after)]
    assert chosen[0] == chosen[1] and any(name.startswith("chosen ") for name in chosen[0])
    for row in ("rspg-pre", "rspg-post"):
        assert {gold["output"] for gold in after[f"{row},0.json"]["golds"]} == {"poison"}


def test_rows_that_answer_alike_are_one(world, tmp_path):
    """Not by their names: `copy` has the prompts and answers of `one`."""
    train(*job(world, tmp_path / "s", pool=["one", "copy", "two"], row_heads=False, epochs=1))
    made, _ = compare(world, tmp_path / "bench", "one", "copy", "two", "s", trained=[f"s={tmp_path / 's'}"])
    counts = predictions(tmp_path / "bench")["s,0.json"]["about"]["prompts"]
    assert "chosen copy" not in counts and counts["chosen one"] > 0
    draft = Draft.open(tmp_path / "equal", "selector", {})
    shutil.copytree(tmp_path / "s" / "encoder", tmp_path / "equal" / "encoder")
    shutil.copy(tmp_path / "s" / "head.safetensors", tmp_path / "equal")
    known = read_artefact(tmp_path / "s").settings
    draft.finish({**known, "pool": {name: known["pool"][name] for name in ("copy", "one")}})
    made, _ = compare(world, tmp_path / "bench", "one", "equal", trained=[f"equal={tmp_path / 'equal'}"])
    assert made.predictions["equal"] == made.predictions["one"]


def test_counts_of_a_pool_are_fitted_on_users_whom_their_plug_has_not_seen(world, tmp_path, monkeypatch):
    """As a bench fits them, which is the row that is chosen later."""
    monkeypatch.setattr(label_frequencies, "FEWEST", 1)
    plug = save_plug(world, tmp_path / "plug")
    split = {"leave_out_users": 0.0, "validation_users": 0.8, "split_seed": 0}
    (tmp_path / "plug" / "train_settings.json").write_text(json.dumps({"settings": split}))
    asked = []
    log_probs = label_frequencies.LabelFrequencies._log_probs
    monkeypatch.setattr(
        label_frequencies.LabelFrequencies, "_log_probs", lambda *args: asked.append(args[1]) or log_probs(*args)
    )
    pool = {"pool": ["no-persona", "pplug:frequencies", "one"], "plugs": [f"pplug={plug}"]}
    with contextlib.suppress(DataError):  # all rows may be equally good
        train(*job(world, tmp_path / "gate", encoder=None, epochs=1, **pool))
    users = three_way_split(read_lamp(world / "many", "train", SHELVES)[1], 0.5, 0.3)
    unseen = {e.user for e in (*users.select, *users.held)}
    assert {e.user for e in asked[0]} == unseen and not unseen & {e.user for e in users.fit}


def test_a_plug_that_knows_users_of_the_selector_is_refused(world, tmp_path):
    plug, settings = (
        save_plug(world, tmp_path / "plug", item_template="{text}"),
        tmp_path / "plug" / "train_settings.json",
    )
    pool = {"pool": ["no-persona", "pplug", "one"], "plugs": [f"pplug={plug}"], "epochs": 1}
    users = three_way_split(read_lamp(world / "many", "train", SHELVES)[1], 0.5, 0.3)
    asked = {e.user for e in (*users.select, *users.held)}
    for split in ({"validation_users": 0.1}, {"validation_users": 0.8, "split_seed": 7}):
        split = {"leave_out_users": 0.0, "split_seed": 0} | split
        settings.write_text(json.dumps({"settings": split}))
        known, _ = divided(plug, read_lamp(world / "many", "train", SHELVES)[1])
        count = len({e.user for e in known} & asked)
        message = f"trained on {count} of the {len(asked)} users .* --validation_users 0.8 .* --split_seed 0`"
        with pytest.raises(ConfigurationError, match=message):
            train(*job(world, tmp_path / "gate", **pool))
        assert count and not (tmp_path / "gate").exists()
    # It may bring its encoder, or have held out more users.
    train(*job(world, tmp_path / "encoder", **{**pool, "pool": ["one", "two"], "encoder": None}))
    settings.write_text(json.dumps({"settings": {**split, "validation_users": 0.9, "split_seed": 0}}))
    _, printed = train(*job(world, tmp_path / "gate", **pool))
    assert "Nothing says" not in printed


def test_what_does_not_say_whom_it_learned_from_is_named(world, selectors, tmp_path):
    shutil.copytree(world / "rspg-pre", tmp_path / "silent")
    about = json.loads((tmp_path / "silent" / "method.json").read_text())
    about["run"].pop("split")
    (tmp_path / "silent" / "method.json").write_text(json.dumps(about))
    plug = save_plug(world, tmp_path / "plug", item_template="{text}")
    pool = {"pool": ["no-persona", "pplug", "one"], "plugs": [f"pplug={plug}"], "epochs": 1}
    _, printed = train(
        *job(world, tmp_path / "gate", trained=[*selectors[:1], f"silent={tmp_path / 'silent'}"], **pool)
    )
    assert f"Nothing says which users '{tmp_path / 'silent'}', '{tmp_path / 'plug'}' learned from" in printed


def test_a_pool_of_plugs_and_rankers(world, tmp_path):
    """A gate between persona and retrieval, two rows of which have the same prompts."""
    pool, plugs = ["no-persona", "bm25@2", "pplug", "frequencies", "one"], plugs_of(world)[:1]
    train(*job(world, tmp_path / "gate", "rspg-pre", pool=pool, plugs=plugs, encoder=None, epochs=1))
    made = read_artefact(tmp_path / "gate")
    assert set(made.settings["pool"]["pplug"]) == {"plug"}
    more = {"trained": [f"gate={tmp_path / 'gate'}"], "plugs": plugs, "backbone": None}
    made, _ = compare(world, tmp_path / "bench", *pool, "gate", oracle=["no-persona,pplug"], **more)
    counts = predictions(tmp_path / "bench")["gate,0.json"]["about"]["prompts"]
    chosen = {name.removeprefix("chosen "): n for name, n in counts.items() if name.startswith("chosen")}
    assert sum(chosen.values()) == 60 and set(chosen) <= set(pool)
    answers = {row: runs[0] for row, runs in made.predictions.items()}
    places = [[row for row in pool if answers[row][i] == text] for i, text in enumerate(answers["gate"])]
    assert all(places), "each answer is that of a row"
    assert {"gate:oracle", "pool:oracle", "pool:chance"} <= made.predictions.keys()
    assert len(made.predictions["gate:oracle"]) == 2 == len(made.predictions["pplug"]), "of both seeds of the plug"
    other = [f"pplug={world / 'mean'}"]
    with pytest.raises(MismatchError, match=r"learned from another row pplug than this comparison has.*: plug"):
        compare(world, tmp_path / "other", "gate", **{**more, "plugs": other})
    with pytest.raises(ConfigurationError, match=r"gate chooses among no-persona, .*cannot make all of them.*'pplug'"):
        compare(world, tmp_path / "other", "gate", **{**more, "plugs": None, "backbone": str(world / "t5")})


def test_the_usual_pool_is_what_there_is(world, selectors, tmp_path):
    with pytest.raises(ConfigurationError, match="rspg-pre reads answers of other rows"):
        train(*job(world, tmp_path / "s", pool=None, trained=selectors[:1]))
    made = SimpleNamespace(task=SHELVES, resources=SimpleNamespace(retriever=None))
    assert fit_selector.usual_pool(made, {}, {}) == ["no-persona", "recency@4", "bm25@4"]
    plugs = {"pplug": ["a"], "other": ["b"]}
    usual = ["no-persona", "recency@4", "bm25@4", "dense@4", "pplug", "other"]
    assert fit_selector.usual_pool(made, plugs, {}) == usual


def test_a_kill_costs_no_answers_and_changes_nothing(world, tmp_path, monkeypatch):
    whole = train(*job(world, tmp_path / "whole"))[0]
    Told.asked.clear()

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("train_selection", "rewards_of"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fit_selector, name, killed)
            train(*job(world, tmp_path / "killed"))
        with pytest.raises(DataError, match="is not complete: run the same `pplug-hf fit` again"):
            compare(world, tmp_path / "bench", "s", trained=[f"s={tmp_path / 'killed'}"])
    assert len(Told.asked) == 3
    made = train(*job(world, tmp_path / "killed"))[0]
    assert len(Told.asked) == 3 and made.files == whole.files and made.digest == whole.digest
    train(*job(world, tmp_path / "killed"))
    assert len(Told.asked) == 3, "it is complete"
    with pytest.raises(ConfigurationError, match=r"holds another training; these differ: .*seed"):
        train(*job(world, tmp_path / "killed", seed=1))
    other = train(*job(world, tmp_path / "seed", seed=1, answers=f"{tmp_path / 'killed'}-answers"))[0]
    assert len(Told.asked) == 3 and other.digest != made.digest, "seeds share the answers"


def test_seeds_share_the_answers_to_random_items(world, tmp_path):
    pool = {"pool": ["one", "two", "random@2"], "answers": str(tmp_path / "answers"), "epochs": 1}
    first, _ = train(*job(world, tmp_path / "0", **pool))
    second, printed = train(*job(world, tmp_path / "1", seed=1, **pool))
    assert "3 of 3 runs are there already" in printed and "Again" not in printed
    assert first.settings["pool"] == second.settings["pool"] and first.run["seed"] != second.run["seed"]
    trained = [f"first={tmp_path / '0'}", f"second={tmp_path / '1'}"]
    compare(world, tmp_path / "bench", "random@2", "first", "second", trained=trained, seed=3)


def test_weights_of_single_users_are_in_no_pool(world, tmp_path):
    for kind in ("ftp", "oppu", "user-tokens"):
        Draft.open(tmp_path / kind, kind, {"split": {}}).finish({"retrieval": None})
        trained = [f"own={tmp_path / kind}"]
        for pool in (["one", "own"], ["one", "own:no-history"], None):
            with pytest.raises(
                ConfigurationError, match=r"The row own.* answers with weights of the users of one split"
            ):
                train(*job(world, tmp_path / "none", pool=pool, trained=trained))


def test_what_cannot_be_chosen_from_is_refused(world, selectors, tmp_path):
    for more, error, message in (
        ({"pool": ["one"]}, ConfigurationError, "two or more different rows, and the pool has 1"),
        ({"pool": ["one", "ghost"]}, ConfigurationError, "There is no row 'ghost'"),
        ({"pool": ["one", "bm25@2:wrong-user"]}, ConfigurationError, "depends on who else is asked"),
        (
            {"pool": ["one", "rspg-pre"], "trained": selectors[:1]},
            ConfigurationError,
            "reads answers of other rows itself",
        ),
        ({"encoder": None}, ConfigurationError, "pass encoder, or plugs"),
        ({"select_users": 0.0}, DataError, "0 questions to learn to choose from"),
        ({"text_length": 65}, ConfigurationError, "text_length is 65"),
        ({"questions_per_step": 0}, ConfigurationError, "questions_per_step is 0; give more than 0"),
        ({"target_temperature": 0.0}, ConfigurationError, "target_temperature is 0.0; give more than 0"),
        ({"pool": ["one", "copy"]}, DataError, "every row of the pool is equally good"),
        (
            {"trained": selectors[:1], "split_seed": 7},
            ConfigurationError,
            "was trained with split_seed=0, so it may know the users",
        ),
    ):
        with pytest.raises(error, match=message):
            train(*job(world, tmp_path / "none", **more))
        assert not (tmp_path / "none" / "method.json").exists()
        shutil.rmtree(tmp_path / "none", ignore_errors=True)


def test_a_selector_that_does_not_belong_here_is_refused(world, selectors, tmp_path, monkeypatch):
    with pytest.raises(MismatchError, match="answers of another language model"):
        compare(world, tmp_path / "bench", "rspg-pre", trained=selectors, backbone=str(world / "llama"))
    with pytest.raises(MismatchError, match="trained on the task 'shelves' and cannot answer 'racks'"):
        asked = settings_for(
            world, tmp_path / "bench", "rspg-pre", trained=selectors, plugs=None, backbone=str(world / "t5")
        )
        quietly(asked, task=replace(SHELVES, name="racks"))
    with pytest.raises(MismatchError, match=r"decoded otherwise; these differ: decoding\.num_beams"):
        compare(world, tmp_path / "bench", "rspg-pre", trained=selectors, num_beams=2)
    shutil.copytree(world / "rspg-pre", tmp_path / "copy")
    (tmp_path / "copy" / "head.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"'head.safetensors' of the artefact .* is damaged"):
        compare(world, tmp_path / "bench", "broken", trained=[f"broken={tmp_path / 'copy'}"])
    monkeypatch.setitem(METHODS, "two", partial(Told, 11))
    with pytest.raises(
        MismatchError, match="learned from another row two than this comparison has; these differ: told"
    ):
        compare(world, tmp_path / "bench", "rspg-pre", trained=selectors)


def test_rewards_are_between_zero_and_one():
    examples = [Example(f"{i}", "u", "", "", gold, []) for i, gold in enumerate(("1", "3", "5"))]

    def rewards(metric, *answers):
        task = replace(TASKS["LaMP-3"], metric=metric, labels=TASKS["LaMP-3"].labels if metric == "mae" else ())
        return fit_selector.rewards_of(task, examples, answers).tolist()

    assert rewards("mae", ["1", "5", "4"], ["none", "3", "100"]) == [[1, 0], [0, 1], [0.75, 0]]
    assert rewards("rouge", ["1", "3 4", "2"]) == pytest.approx(np.array([[1], [2 / 3], [0]]))


def test_the_command_line_trains_and_compares(world, tmp_path, capsys):
    arguments = ["--data", str(world / "many"), "--backbone", str(world / "t5"), "--vectors", str(world / "vectors")]
    (tmp_path / "task.json").write_text(json.dumps(asdict(SHELVES)))
    arguments += ["--task", str(tmp_path / "task.json")]
    own = ["--method", "rspg-pre", "--pool", *TOLD, "--encoder", str(world / "encoder"), "--select-users", "0.5"]
    own += ["--answers", str(world / "answers"), "--held_users", "0.3", "--epochs", "1"]
    assert main(["fit", *arguments, *own, "--output", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert "of 30 questions have answers that are not all equally good" in printed and "Saved:" in printed
    made = ["--trained", f"gate={tmp_path / 's'}", "--rows", *TOLD, "gate", "--output", str(tmp_path / "bench")]
    assert main(["bench", *arguments, *made]) == 0
    assert "gate:oracle" in capsys.readouterr().out
    assert main(["bench", *arguments[:2], *arguments[-2:], "--output", str(tmp_path / "bench"), "--tables_only"]) == 0
    assert "gate:oracle" in capsys.readouterr().out
    assert main(["fit", *arguments, *own, "--text_length", "0", "--output", str(tmp_path / "s")]) == 1
    assert "--text_length must be greater than 0" in capsys.readouterr().err
