"""What a plug remembers of a persona: the numbers of the equations before and after any change, and nothing too long."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import tiny
import torch
from reference import close
from torch import nn

from pplug_hf import EncoderSpec, Persona
from pplug_hf.modeling import plug_batched as plugs
from pplug_hf.modeling import projection_cache as item_cache
from pplug_hf.modeling.plug import PersonaPlug
from pplug_hf.modeling.plug_batched import batch_histories
from pplug_hf.modeling.projection_cache import get_or_compute

D, M, H = 12, 16, 10
QUERIES = tiny.vectors(3, D, seed=1)


def made(**choices):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": H, "projector_size": M, "encoder_size": D}
        plug = PersonaPlug(tiny.config(attention_temperature=0.2, **sizes, **choices))
    tiny.randomise(plug)
    return plug


def user(n=5, seed=0):
    return Persona(tiny.vectors(n, D, seed), EncoderSpec(None, D))


@torch.no_grad()
def asked(plug, personas, queries=QUERIES):
    """Soft prompts as the model computes them."""
    return plug(queries, batch_histories(*get_or_compute(plug, personas)))


@torch.no_grad()
def by_hand(plug, personas, queries=QUERIES):
    rows = [
        reference.prefix(plug, query.double(), list(one.vectors.double()))
        for query, one in zip(queries, personas, strict=True)
    ]
    return plug.config.scale * torch.stack(rows).float()


class Projected:
    """Counts the items that go through the first layer of a plug's projector."""

    def __init__(self, plug):
        self.sizes = []
        plug.projector.hidden.register_forward_hook(lambda module, given, out: self.sizes.append(len(out)))

    def new(self):
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.mark.parametrize("choices", [{}, {"aggregator": "mean"}, {"learn_temperature": True, "num_persona_tokens": 3}])
def test_every_request_gets_the_numbers_of_the_equations_and_the_first_one_pays(choices):
    plug = made(**choices)
    projected = Projected(plug)
    one, other, nobody = user(5), user(90, seed=3), user(0)
    for personas, paid in (([one, other, one], 95), ([other, nobody, one], 0), ([one] * 3, 0), ([nobody] * 3, 0)):
        close(asked(plug, personas), by_hand(plug, personas))
        assert sum(projected.new()) == paid


def step(optimizer, **options):
    def change(plug, one):
        plug(QUERIES[:1], [one.vectors]).sum().backward()
        optimizer(plug.projector.parameters(), lr=0.3, **options).step()

    return change


def in_place(edit):
    @torch.no_grad()
    def change(plug, one):
        edit(plug, one)

    return change


def other_weights(assign):
    return lambda plug, one: plug.load_state_dict(
        {key: 1.5 * value for key, value in plug.state_dict().items()}, assign=assign
    )


CHANGES = {
    "step of SGD": step(torch.optim.SGD),
    "step of AdamW": step(torch.optim.AdamW),
    "step of AdamW, for each": step(torch.optim.AdamW, foreach=True),
    "step of AdamW, fused": step(torch.optim.AdamW, fused=True),
    "one weight": in_place(lambda plug, one: plug.projector.hidden.weight[3, 5].fill_(2.0)),
    "one bias": in_place(lambda plug, one: plug.projector.hidden.bias[3].fill_(2.0)),
    "data": in_place(lambda plug, one: plug.projector.hidden.weight.data.mul_(1.5)),
    "other weights": other_weights(assign=False),
    "other tensors": other_weights(assign=True),
    "another layer": lambda plug, one: setattr(plug.projector, "hidden", nn.Linear(D, M)),
    "another item": in_place(lambda plug, one: one.vectors[2].neg_()),
    "items by data": in_place(lambda plug, one: one.vectors.data.mul_(torch.linspace(0.5, 2, D))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_to_the_weights_or_the_items_is_seen(change):
    plug, one = made(), user()
    before = asked(plug, [one] * 3)
    change(plug, one)
    after = asked(plug, [one] * 3)
    close(after, by_hand(plug, [one] * 3))
    assert (after - before).abs().max() > 1e-3
    close(asked(plug, [one] * 3), after)


def test_another_type_and_back():
    plug, one = made(), user()
    expected = asked(plug, [one] * 3)
    assert asked(plug.double(), [one] * 3, QUERIES.double()).dtype == torch.float64
    close(asked(plug.double(), [one] * 3, QUERIES.double()).float(), expected)
    close(asked(plug.float(), [one] * 3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rough = asked(plug, [one] * 3)
    assert not torch.equal(rough.float(), expected)
    assert torch.equal(asked(plug, [one] * 3), expected)


def test_plugs_remember_apart():
    first, second, personas = made(), made(instruction=False), [user(), user(7, seed=2), user(1, seed=4)]
    tiny.randomise(second, seed=8)
    for plug in (first, second, first, second):
        close(asked(plug, personas), by_hand(plug, personas))


def test_switching_plugs_switches_what_is_remembered(tmp_path):
    def model():
        return tiny.model("gpt2", attention_temperature=0.2, train_input_encoder=False)

    switched, other = model(), model()
    tiny.randomise(other.plug, seed=6)
    other.save_pretrained(tmp_path)
    switched.load_plug(tmp_path, "other")
    persona = switched.encode_persona(tiny.HISTORY)
    alone = [m.soft_prompt(persona, query=tiny.PROMPTS[0]) for m in (model(), other)]
    for _ in range(2):
        for name, expected in zip(("default", "other"), alone, strict=True):
            switched.set_plug(name)
            close(switched.soft_prompt(persona, query=tiny.PROMPTS[0]), expected)


def test_what_is_remembered_takes_no_gradient_away():
    plug, one = made(), user()

    def gradient():
        plug.zero_grad()
        plug(QUERIES, batch_histories(*get_or_compute(plug, [one] * 3))).sum().backward()
        return plug.projector.hidden.weight.grad

    expected = gradient()
    with torch.inference_mode():
        asked(plug, [one] * 3)
    close(asked(plug, [one] * 3), by_hand(plug, [one] * 3))
    assert torch.equal(gradient(), expected) and expected.abs().max() > 0


def test_it_goes_with_the_persona_and_with_the_plug():
    plug, one, other = made(), user(), user(seed=2)
    with torch.no_grad():
        of_one, of_other = (weakref.ref(get_or_compute(plug, [u])[1][0]) for u in (one, other))
    assert of_one() is not None and of_other() is not None
    del one
    gc.collect()
    assert of_one() is None and of_other() is not None
    del plug
    gc.collect()
    assert of_other() is None


def test_it_is_never_copied_or_written():
    plug, one = made(), user()
    before = len(pickle.dumps(plug)), len(pickle.dumps(one))
    asked(plug, [one] * 3)
    assert (len(pickle.dumps(plug)), len(pickle.dumps(one))) == before
    twin = copy.deepcopy(plug)
    projected = Projected(twin)
    close(asked(twin, [one] * 3), asked(plug, [one] * 3))
    assert projected.new() == [len(one)]


ITEM = (D + M) * 4  # bytes


def test_beyond_the_limit_those_go_that_were_not_used_for_longest(monkeypatch):
    monkeypatch.setattr(item_cache, "LIMIT", 10 * ITEM)
    plug, users = made(), [user(3, seed) for seed in range(4)]
    projected = Projected(plug)
    for i in (0, 1, 2):
        asked(plug, [users[i]] * 3)
    asked(plug, [users[0]] * 3)  # used again: number 1 is now the one that waits longest
    assert projected.new() == [3, 3, 3]
    asked(plug, [users[3]] * 3)
    for i in (0, 2, 3):
        asked(plug, [users[i]] * 3)
    assert projected.new() == [3]
    asked(plug, [users[1]] * 3)
    assert projected.new() == [3]


def test_a_batch_beyond_the_limit_is_computed_in_pieces_and_not_kept(monkeypatch):
    monkeypatch.setattr(item_cache, "LIMIT", 10 * ITEM)
    monkeypatch.setattr(plugs, "CHUNK", 4)
    plug, small, large = made(), user(3), user(9, seed=2)
    projected = Projected(plug)
    asked(plug, [small] * 3)
    for _ in range(2):
        close(asked(plug, [small, large, small]), by_hand(plug, [small, large, small]))
    assert projected.new() == [3, 4, 4, 4, 4, 4, 4]
    asked(plug, [small] * 3)
    assert projected.new() == []


def test_weights_that_are_not_whole_are_not_looked_at():
    """As DeepSpeed leaves them between two uses: the layer puts them together when it is called."""
    plug, one = made(), user()
    expected = by_hand(plug, [one] * 3)
    layer = plug.projector.hidden
    weight, layer.weight.data = layer.weight.data, torch.empty(0)
    layer.register_forward_pre_hook(lambda module, given: setattr(module.weight, "data", weight))
    layer.register_forward_hook(lambda module, given, out: setattr(module.weight, "data", torch.empty(0)))
    close(asked(plug, [one] * 3), expected)
    weight.mul_(1.5)
    assert (asked(plug, [one] * 3) - expected).abs().max() > 1e-3


def test_threads_may_ask_at_once(monkeypatch):
    monkeypatch.setattr(item_cache, "LIMIT", 40 * ITEM)  # of 80 items: some are always being forgotten
    plug, users = made(), [user(10, seed) for seed in range(8)]
    expected = [by_hand(plug, [one] * 3) for one in users]

    def ask(i):
        users.append(user(1, seed=i))  # comes,
        asked(plug, [users.pop()] * 3)  # and may go at any moment
        return asked(plug, [users[i % 8]] * 3)

    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(ask, range(200))):
            close(got, expected[i % 8])
