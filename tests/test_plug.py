"""The plug alone, on vectors: equations 3 to 5 and what follows from them."""

import math

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close

from pplug_hf.modeling.plug import PersonaPlug

D, H = 12, 10
CHOICES = {
    "paper": {},
    "mean": {"aggregator": "mean"},
    "sharp": {"attention_temperature": 0.1},
    "learned": {"attention_temperature": 0.3, "learn_temperature": True},
    "four tokens": {"num_persona_tokens": 4},
    "no instruction": {"instruction": False, "num_persona_tokens": 2},
    "narrow": {"projector_size": 3},
    "nobody projected": {"project_no_persona": True, "num_persona_tokens": 2},
}


def plug(**choices):
    """A plug with random weights on an imaginary backbone."""
    made = PersonaPlug(tiny.config(hidden_size=H, encoder_size=D, embedding_norm=7.0, **choices))
    tiny.randomise(made)
    return made.eval()


PLUG = plug(attention_temperature=0.2, num_persona_tokens=2)


def rows(lengths, seed=0):
    """Random queries [B, D], and one history per length."""
    items = tiny.vectors(sum(lengths), D, seed).split(list(lengths))
    return tiny.vectors(len(lengths), D, seed + 1), list(items)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_equals_the_equations_item_by_item(choices):
    made = plug(**choices)
    queries, histories = rows([3, 1, 0, 7])
    weights, persona, prompt = (
        made.weights(queries, histories),
        made.persona_embedding(queries, histories),
        made(queries, histories),
    )
    scale = 7.0 / math.sqrt(H)
    for b, (query, items) in enumerate(zip(queries.double(), histories, strict=True)):
        items = items.double()
        if len(items):
            assert weights[b].tolist() == pytest.approx(reference.weights(made, query, items), abs=1e-6)
        close(persona[b], (scale * reference.persona_embedding(made, query, items)).float())
        close(prompt[b], (scale * reference.prefix(made, query, items)).float())


def test_shapes():
    queries, histories = rows([2, 5])
    assert plug(num_persona_tokens=4).persona_embedding(queries, histories).shape == (2, 4, H)
    assert plug(num_persona_tokens=4)(queries, histories).shape == (2, 5, H)
    assert plug(num_persona_tokens=4, instruction=False)(queries, histories).shape == (2, 4, H)


def test_projecting_after_pooling_is_the_same_as_before():
    made = plug(normalize=False).double()
    queries, histories = rows([50])
    queries, items = queries.double(), histories[0].double()
    (weights,) = made.weights(queries, [items])
    before = (weights[:, None] * made.projector(items)).sum(0)
    close(made.persona_embedding(queries, [items])[0, 0], before * made.config.scale)


def test_length_of_vectors_counts_only_without_normalisation():
    queries, histories = rows([4])
    longer = [3 * items for items in histories]
    made = plug()
    close(made(queries, longer), made(queries, histories))
    made = plug(normalize=False)
    assert not torch.allclose(made(queries, longer), made(queries, histories))


# ---- invariance -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_order_of_items_does_not_matter(data):
    n = data.draw(st.integers(1, 30))
    order = data.draw(st.permutations(range(n)))
    queries, (items,) = rows([n], seed=data.draw(st.integers(0, 99)))
    close(PLUG(queries, [items[order]]), PLUG(queries, [items]))
    close(PLUG.weights(queries, [items[order]])[0], PLUG.weights(queries, [items])[0][order])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 99))
def test_a_batch_equals_its_rows(lengths, seed):
    queries, histories = rows(lengths, seed)
    together = PLUG(queries, histories)
    for b in range(len(lengths)):
        alone = PLUG(queries[b : b + 1], histories[b : b + 1])[0]
        close(together[b], alone)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(2, 5))
def test_a_history_said_twice_is_the_same_history(n, times):
    queries, (items,) = rows([n])
    close(PLUG(queries, [items.repeat(times, 1)]), PLUG(queries, [items]))


@pytest.mark.parametrize("n", [0, 1, 10_000])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e18])
def test_finite_for_histories_of_any_length_and_size(n, size):
    queries, histories = rows([n, 1])
    assert PLUG(queries * size, [items * size for items in histories]).isfinite().all()


def test_equal_vectors_get_equal_weights():
    query = tiny.vectors(1, D)
    (weights,) = PLUG.weights(query, [query.expand(10_000, -1)])
    close(weights, torch.full((10_000,), 1e-4))


def test_a_user_without_history_gets_the_learned_stand_in():
    made = plug(num_persona_tokens=3)
    persona = made.persona_embedding(tiny.vectors(2, D), [torch.zeros(0, D), tiny.vectors(2, D)])
    close(persona[0], made.config.scale * made.no_persona)
    assert made.persona_embedding(None, [torch.zeros(0, D)]).shape == (1, 3, H)  # nothing to weight: no query needed
    assert PersonaPlug(made.config).no_persona.abs().max() == 0


def test_the_stand_in_learns_faster_through_the_projector():
    target, errors = tiny.vectors(3, H, 5) * 7 / math.sqrt(H), []
    for project in (False, True):
        torch.manual_seed(0)
        made = PersonaPlug(
            tiny.config(
                hidden_size=H, encoder_size=D, embedding_norm=7.0, num_persona_tokens=3, project_no_persona=project
            )
        )
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
        for _ in range(20):
            error = (made.persona_embedding(None, [torch.zeros(0, D)])[0] - target).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        errors.append(error.item())
    assert errors[1] < 0.5 * errors[0]


# ---- gradients, initialisation ----------------------------------------------------------------------------------


def test_gradients_equal_those_of_the_equations():
    made = plug(learn_temperature=True, num_persona_tokens=2).double()
    queries, histories = rows([3, 0])
    (made(queries.double(), [h.double() for h in histories]).square().sum() / 7).backward()
    got = {name: p.grad.clone() for name, p in made.named_parameters()}
    for name, parameter in made.named_parameters():  # by finite differences, in a random direction
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step * direction
                values.append(
                    sum(
                        (made.config.scale * reference.prefix(made, q, h)).square().sum().item() / 7
                        for q, h in zip(queries.double(), [h.double() for h in histories], strict=True)
                    )
                )
                parameter -= step * direction
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((got[name] * direction).sum().item(), rel=1e-4), name


@pytest.mark.parametrize("normalize", [True, False])
def test_a_fresh_persona_is_a_tenth_of_a_word(normalize):
    torch.manual_seed(0)
    config = tiny.config(hidden_size=256, encoder_size=64, embedding_norm=540.0, normalize=normalize)
    queries, histories = tiny.vectors(50, 64), list(tiny.vectors(50, 64, seed=1).split(1))
    prompt = PersonaPlug(config)(queries, histories)
    norms = prompt.norm(dim=-1).mean(0) / 540.0  # of the instruction, of the persona
    assert norms.tolist() == pytest.approx([0.1, 0.1], rel=0.4)
