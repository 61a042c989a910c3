"""How items are weighted."""

import math

import pytest
import tiny
import torch
from bench_data import SHELVES, write_data
from reference import close
from safetensors.torch import load_file

from pplug_hf import Persona, PPlugConfig, PPlugModel
from pplug_hf.cli import main
from pplug_hf.errors import ConfigurationError
from pplug_hf.modeling.aggregators import AGGREGATORS, Aggregator, Attention, Items, Mean, register_aggregator
from pplug_hf.modeling.plug import PersonaPlug
from pplug_hf.tasks.task import TASKS

QUERY, ITEMS = tiny.vectors(1)[0], tiny.vectors(6, seed=1)


def attention(**choices):
    return Attention(tiny.config(**choices))


def alone(aggregator, query=QUERY, items=ITEMS):
    """The weights of one row, which owns all items."""
    return aggregator(
        None if query is None else query[None], Items(items, torch.ones(1, len(items), dtype=torch.bool))
    )[0]


def test_the_configuration_takes_the_name_of_any_aggregator():
    """It does not know which are registered: that is found out when a plug is built."""
    for name in (*AGGREGATORS, "newest-first", "mine_2"):
        assert PPlugConfig.from_dict(tiny.config(aggregator=name).to_dict()).aggregator == name


@pytest.mark.parametrize("aggregator", [attention(), attention(attention_temperature=0.01), Mean(tiny.config())])
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
    close(flat, alone(Mean(tiny.config())))


def test_only_a_learned_temperature_is_trained_and_saved():
    fixed, learned = attention(), attention(learn_temperature=True)
    assert not list(fixed.parameters()) and not fixed.state_dict()
    assert [name for name, _ in learned.named_parameters()] == ["log_temperature"] == list(learned.state_dict())
    alone(learned)[0].backward()
    assert learned.log_temperature.grad.abs() > 0


def test_the_mean_does_not_look_at_the_request():
    assert not Mean.needs_query
    assert alone(Mean(tiny.config()), None).tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize("aggregator", [attention(attention_temperature=0.1), Mean(tiny.config())])
def test_rows_weigh_their_own_items_only(aggregator):
    own = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    queries = tiny.vectors(4, seed=2)
    weights = aggregator(queries, Items(ITEMS, own))
    for query, mine, row in zip(queries[:3], own, weights, strict=False):
        close(row[mine], alone(aggregator, query, ITEMS[mine]))
        assert not row[~mine].any()
    assert weights.isfinite().all()  # of a row without items, which the plug leaves out


def test_an_unknown_aggregator_names_the_options():
    with pytest.raises(ConfigurationError, match=r"attention, mean; got 'median'"):
        PersonaPlug(tiny.config(aggregator="median", hidden_size=8, encoder_size=4))


# ---- one of your own --------------------------------------------------------------------------------------------


@pytest.fixture
def halving(monkeypatch):
    """An aggregator of one class: an item's weight halves with every year, whatever the query."""
    monkeypatch.setattr("pplug_hf.modeling.aggregators.AGGREGATORS", dict(AGGREGATORS))

    @register_aggregator("halving")
    class Halving(Aggregator):
        needs_query, needs_ages = False, True

        def __init__(self, config):
            super().__init__(config)
            self.rate = torch.nn.Parameter(torch.tensor(math.log(2) / 365))

        def forward(self, queries, items):
            assert items.ages is not None
            return (items.mask * (-self.rate * items.ages).exp()).nan_to_num() / (
                (items.mask * (-self.rate * items.ages).exp()).sum(dim=1, keepdim=True).clamp(min=1e-9)
            )

    return Halving


DATED = [{"text": text, "date": f"{2020 + i}-01-01"} for i, text in enumerate(tiny.HISTORY)]


def test_an_aggregator_of_ones_own_sees_how_old_items_are(halving):
    model = tiny.model("gpt2", aggregator="halving", item_template="{text}")
    with torch.no_grad():
        model.plug.aggregator.rate.fill_(math.log(2) / 365)
    expected = torch.tensor([2.0 ** (-days / 365) for days in (366 + 365 + 365, 365 + 365, 365, 0)])
    for persona in (DATED, model.encode_persona(DATED)):
        close(model.persona_weights([persona, []])[0], expected / expected.sum(), 1e-5)
        close(model.persona_weights(persona)[0], expected / expected.sum(), 1e-5)


@pytest.fixture
def recent(monkeypatch):
    """Ages where there are dates, and equal weights where there are none."""
    monkeypatch.setattr("pplug_hf.modeling.aggregators.AGGREGATORS", dict(AGGREGATORS))

    @register_aggregator("recent")
    class Recent(Aggregator):
        needs_query, needs_ages = False, True

        def forward(self, queries, items):
            scores = items.mask.float() if items.ages is None else items.mask * 0.5 ** (items.ages / 365)
            return scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-9)

    return Recent


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("gradients", [True, False])  # without, projections are remembered
def test_a_users_weights_do_not_depend_on_who_else_is_in_the_batch(recent, encoded, gradients):
    model = tiny.model("gpt2", aggregator="recent", item_template="{text}")
    undated = [{"text": text} for text in tiny.HISTORY]
    users = [DATED, undated, [], DATED[1:], undated[2:], *[DATED] * 17]
    users = model.encode_persona(users) if encoded else users
    users.append(Persona(torch.zeros(0, 12), model.personalizer.spec))  # of nobody, who has no dates
    with torch.set_grad_enabled(gradients):
        together = model.personalizer(users).embeddings
        alone = torch.cat([model.personalizer([user]).embeddings for user in users])
    close(together, alone)
    weights = model.persona_weights(users)
    assert weights[1].tolist() == [0.25] * 4 and weights[0, 3] > 0.4
    for row, user in zip(weights, users, strict=True):
        close(row[: len(user)], model.persona_weights(user)[0])


def test_an_aggregator_of_ones_own_is_saved_loaded_and_trained(halving, tmp_path):
    model = tiny.model("t5", aggregator="halving", item_template="{text}")
    model.save_pretrained(tmp_path)
    again = PPlugModel.from_pretrained(tmp_path, backbone=tiny.backbone("t5"), encoder=tiny.shared_encoder())
    assert again.config.aggregator == "halving" and torch.equal(again.plug.aggregator.rate, model.plug.aggregator.rate)
    close(again.soft_prompt(DATED), model.soft_prompt(DATED))
    again.train()
    with torch.no_grad():
        again.plug.aggregator.rate.fill_(math.log(2) / 365)
    again(input_ids=torch.tensor([[9, 10]]), labels=torch.tensor([[11]]), persona=[DATED]).loss.backward()
    assert again.plug.aggregator.rate.grad.abs() > 0


def test_an_aggregator_of_ones_own_is_named_on_the_command_line(halving, places, tmp_path, capsys):
    write_data(tmp_path / "data", SHELVES)
    arguments = ["train", "--data", str(tmp_path / "data"), "--backbone", str(places / "t5"), "--task", "shelves"]
    arguments += [
        "--encoder",
        str(places / "encoder"),
        "--epochs",
        "1",
        "--validation_users",
        "0.5",
        "--vectors",
        str(tmp_path / "vectors"),
    ]
    TASKS["shelves"] = SHELVES
    try:
        assert main([*arguments, "--output", str(tmp_path / "plug"), "--aggregator", "halving"]) == 0
        assert load_file(tmp_path / "plug" / "model.safetensors")["plug.aggregator.rate"].isfinite()
        assert main([*arguments, "--output", str(tmp_path / "none"), "--aggregator", "median"]) == 1
    finally:
        del TASKS["shelves"]
    assert "aggregator must be one of attention, mean, halving; got 'median'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigurationError, match=r"attention, mean.*'median'"):
        PersonaPlug(tiny.config(aggregator="median", hidden_size=4, encoder_size=4))
