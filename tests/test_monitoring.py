"""Monitoring: each number is its equation, on tensors and on the personas of a plug."""

import math

import pytest
import tiny
import torch

from pplug_hf.errors import MismatchError
from pplug_hf.serving.monitoring import empty_share, persona_drift, persona_norm, weight_entropy


def test_the_entropy_of_weights():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.0] * 4])
    expected = [0.5 * math.log(2) + 0.5 * math.log(4), 0.0, math.log(4), 0.0]
    assert weight_entropy(weights).tolist() == pytest.approx(expected)
    mean = tiny.model("gpt2", aggregator="mean").personalizer
    made = weight_entropy(mean.weights(tiny.HISTORIES, query=tiny.PROMPTS))
    assert made.tolist() == pytest.approx([math.log(4), 0.0, 0.0])


def test_the_share_of_empty_histories():
    personas = tiny.model("gpt2").encode_persona(tiny.HISTORIES)
    assert empty_share([*personas, None]) == 0.5
    assert empty_share(personas[:2]) == empty_share([]) == 0.0


def test_the_norm_of_a_persona_is_in_units_of_a_word():
    P = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert persona_norm(P, 2.0).tolist() == [(5 + 1) / 2 / 2, 0.0]
    model = tiny.model("gpt2", num_persona_tokens=3)
    norm, made = model.config.embedding_norm, model.persona_embedding(tiny.HISTORY, query="sea")
    assert persona_norm(made, norm).item() == pytest.approx(made[0].norm(dim=1).mean().item() / norm, rel=1e-5)


def test_the_drift_of_a_persona():
    before = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    after = torch.tensor([[[3.0, 4.0]], [[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert persona_drift(before, after).tolist() == [0.0, 2.0, 0.0, math.inf]
    with pytest.raises(MismatchError, match=r"one shape, got \[4, 1, 2\] and \[4, 2, 2\]"):
        persona_drift(before, after.expand(4, 2, 2))


def test_a_new_item_makes_a_persona_drift_and_strength_does_as_the_line_says():
    model = tiny.model("gpt2")
    P = model.persona_embedding(tiny.HISTORY, query="sea")
    longer = model.persona_embedding([*tiny.HISTORY, "snow"], query="sea")
    assert 0 < persona_drift(P, longer).item() < 10
    nobody = model.persona_embedding(None, query="sea")
    stronger = model.persona_embedding(tiny.HISTORY, query="sea", strength=2)
    assert persona_drift(P, stronger).item() == pytest.approx(((P - nobody).norm() / P.norm()).item(), rel=1e-5)
