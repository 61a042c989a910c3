"""Selectors: their loss and texts against definitions, what they learn, what they ask, and what they refuse."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from bench_data import SHELVES, make_world, plugs_of, predictions, quietly, settings_for
from torch.nn import functional as F

from pplug_hf.commands import fit_selector
from pplug_hf.commands.fit import FitSettings, fit
from pplug_hf.data.examples import read_examples
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods.artefacts import read_artefact
from pplug_hf.methods.names import methods_of
from pplug_hf.methods.resources import Resources
from pplug_hf.methods.selection import (
    SelectionModel,
    SelectionTraining,
    TextForm,
    choose,
    informative,
    selection_loss,
    train_selection,
)
from pplug_hf.methods.selector import Selector

POOL = ["no-persona", "bm25@2", "pplug"]


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
    parts = ("<eos>", ["a", "b"], ["q1", "q2"], [["A q1", "A q2"], ["B q1", "B q2"]], [["Yes", "No"], ["Sea", "War"]])
    assert TextForm().texts(*parts) == [
        ["a <eos> Yes <eos> q1 <eos> A q1", "b <eos> Sea <eos> q1 <eos> B q1"],
        ["a <eos> No <eos> q2 <eos> A q2", "b <eos> War <eos> q2 <eos> B q2"],
    ]
    assert TextForm(show_names=False).texts(*parts[:4]) == [
        ["q1 <eos> A q1", "q1 <eos> B q1"],
        ["q2 <eos> A q2", "q2 <eos> B q2"],
    ]
    paper = TextForm(order="paper", show_names=False)
    assert paper.texts(*parts)[0] == ["a q1 <eos> Yes", "b q1 <eos> Sea"]
    assert paper.texts(*parts[:4])[1] == ["a q2", "b q2"]


def scored(form, texts):
    model = SelectionModel.from_encoder(tiny.shared_encoder(), form)
    torch.nn.init.normal_(model.head.weight)
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
    torch.nn.init.normal_(model.head.weight)
    scores = model.scores(texts)
    torch.testing.assert_close(model(texts).detach(), scores)
    assert scores[0, 0] == scores[1, 1] and scores[0, 2] == scores[1, 0]
    torch.testing.assert_close(model.scores([own[::-1] for own in texts]), scores.flip(1))
    torch.testing.assert_close(model.scores(texts, batch_size=1), scores)


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


def test_a_selector_learns_what_the_texts_show():
    train, held, test = synthetic(240, 0), synthetic(80, 1), synthetic(200, 2)
    model = SelectionModel.from_encoder(tiny.encoder(pooling="mean"), TextForm())
    settings = SelectionTraining(epochs=20, learning_rate=3e-3, head_learning_rate=3e-2, temperature=0.25)
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
