"""How items are weighted."""

import math

import pytest
import tiny
import torch
from reference import close

from pplug_hf import PPlugConfig
from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.aggregators import AGGREGATORS, Attention, Mean
from pplug_hf.modeling.plug import PersonaPlug

QUERY, ITEMS = tiny.vectors(1)[0], tiny.vectors(6, seed=1)


def attention(**choices):
    return Attention(PPlugConfig(**choices))


def alone(aggregator, query=QUERY, items=ITEMS):
    """The weights of one row, which owns all items."""
    return aggregator(None if query is None else query[None], items, torch.ones(1, len(items), dtype=torch.bool))[0]


def test_the_configuration_takes_the_name_of_any_aggregator():
    """It does not know which are registered: that is found out when a plug is built."""
    for name in (*AGGREGATORS, "newest-first", "mine_2"):
        assert PPlugConfig.from_dict(PPlugConfig(aggregator=name).to_dict()).aggregator == name


@pytest.mark.parametrize("aggregator", [attention(), attention(attention_temperature=0.01), Mean(PPlugConfig())])
def test_weights_are_a_distribution(aggregator):
    weights = alone(aggregator)
    assert weights.shape == (6,) and (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("learn", [True, False])
def test_attention_is_a_softmax_of_scaled_products(temperature, learn):
    scores = [
        math.exp(sum(q * h for q, h in zip(QUERY.tolist(), item, strict=True)) / temperature)
        for item in ITEMS.tolist()
    ]
    weights = alone(attention(attention_temperature=temperature, learn_temperature=learn))
    assert weights.tolist() == pytest.approx([score / sum(scores) for score in scores], rel=1e-3, abs=1e-6)


def test_temperature_runs_from_the_best_item_to_the_mean():
    best = alone(attention(attention_temperature=1e-4))
    assert best.argmax() == (ITEMS @ QUERY).argmax() and best.max() > 0.999
    flat = alone(attention(attention_temperature=1e6))
    close(flat, alone(Mean(PPlugConfig())))


def test_only_a_learned_temperature_is_trained_and_saved():
    fixed, learned = attention(), attention(learn_temperature=True)
    assert not list(fixed.parameters()) and not fixed.state_dict()
    assert [name for name, _ in learned.named_parameters()] == ["log_temperature"] == list(learned.state_dict())
    alone(learned)[0].backward()
    assert learned.log_temperature.grad.abs() > 0


def test_the_mean_does_not_look_at_the_request():
    assert not Mean.needs_query
    assert alone(Mean(PPlugConfig()), None).tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("aggregator", [attention(attention_temperature=0.1), Mean(PPlugConfig())])
def test_rows_weigh_their_own_items_only(aggregator):
    own = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    queries = tiny.vectors(4, seed=2)
    weights = aggregator(queries, ITEMS, own)
    for query, mine, row in zip(queries[:3], own, weights, strict=False):
        close(row[mine], alone(aggregator, query, ITEMS[mine]))
        assert not row[~mine].any()
    assert weights.isfinite().all()  # of a row without items, which the plug leaves out


def test_an_unknown_aggregator_names_the_options():
    with pytest.raises(ConfigurationError, match=r"attention, mean.*'median'"):
        PersonaPlug(PPlugConfig(aggregator="median", hidden_size=4, encoder_size=4))
