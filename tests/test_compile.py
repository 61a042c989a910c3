"""torch.compile: the plug and a backbone's steps are one graph each, few graphs do for all batches, numbers stay.

Graphs are counted with cheap backends; one test goes through the real compiler.
"""

import random
from typing import Any

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from reference import close
from test_plug import plug, rows
from torch import _dynamo as dynamo
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from pplug_hf.modeling.plug_batched import batch_histories


@pytest.fixture(autouse=True)
def from_scratch():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def graphs():
    """How many were made; a break would make more of one call."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def random_rows(B, rng):
    """Requests and histories of B users: some are new, some have one item, the first two are the same user."""
    queries, histories = rows([rng.choice([0, 1, rng.randint(2, 40), rng.randint(2, 40)]) for _ in range(B)], B)
    return queries, [histories[0], *histories[:1], *histories[2:]][:B]


def with_gradients(module, made, *batch):
    made.zero_grad()
    prompt = module(*batch)
    prompt.square().sum().backward()
    return prompt, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


# ---- the plug ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [{"attention_temperature": 0.3, "learn_temperature": True}, {"aggregator": "mean", "num_persona_tokens": 3}],
    ids=["attention", "mean"],
)
def test_batches_of_any_length_share_three_graphs(choices):
    made, rng = plug(**choices), random.Random(0)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for B in (20, 20, 18, 31):
        queries, histories = random_rows(B, rng)
        got, gradients = with_gradients(compiled, made, queries, batch_histories(histories))
        expected, wanted = with_gradients(made, made, queries, histories)
        close(got, expected)
        close(gradients, wanted)
    assert graphs() <= 3  # the first sizes, other numbers of items, other numbers of rows


def test_what_is_known_of_a_persona_shares_graphs_too():
    made = plug()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        for n in (90, 7, 300, 2):
            queries, (items,) = rows([n])
            close(compiled(queries, batch_histories(*([x] for x in made.project(items)))), made(queries, [items]))
    assert graphs() <= 2


def test_histories_in_a_list_are_one_graph():
    made = plug()
    queries, histories = random_rows(5, random.Random(0))
    explained = dynamo.explain(made)(queries, histories)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    close(torch.compile(made, fullgraph=True, backend="eager")(queries, histories), made(queries, histories))


def test_long_histories_do_not_make_graphs_of_their_own():
    made = plug()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    for n in (10, 20, 3000, 9000):  # chunks of 2,048 would be 1, 1, 2 and 5 loops
        queries, histories = rows([n, 3])
        close(compiled(queries, batch_histories(histories)), made(queries, histories))
    assert graphs() <= 2


@torch.no_grad()
def test_the_real_compiler_computes_the_same():
    made = plug(attention_temperature=0.3)
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for lengths in ([3, 0, 7, 1], [8, 2, 9]):
        queries, histories = rows(lengths)
        close(compiled(queries, batch_histories(histories)), made(queries, histories))
    assert graphs() == 1


# ---- generation -------------------------------------------------------------------------------------------------

TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def prompts(model, texts=tiny.PROMPTS):
    side = "right" if model.config.is_encoder_decoder else "left"
    batch = model.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return batch | {"persona": tiny.HISTORIES, "query": ["the sky", "a film", "sea"]}


def static_and_compiled():
    """transformers compiles the decode step for a static cache; on a CPU only if told to."""
    compile_config: Any = CompileConfig(fullgraph=True, backend="eager")
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def answer(model, batch=None, **settings: Any) -> Any:
    return model.generate(**(batch or prompts(model)), **TOKENS, **settings)


def test_a_static_cache_and_a_compiled_step_give_the_same_tokens(model):
    for settings in ({}, {"num_beams": 2}):
        expected = answer(model, **settings)
        assert torch.equal(answer(model, cache_implementation="static", **settings), expected)
    assert not graphs()
    expected = answer(model)
    for _ in range(2):
        assert torch.equal(answer(model, **static_and_compiled()), expected)
    assert graphs() == 1


def test_a_models_own_settings_compile_its_step():
    model = tiny.model("gpt2")
    expected = answer(model)
    model.generation_config.update(**static_and_compiled())
    for settings in ({}, {"generation_config": GenerationConfig()}):
        assert torch.equal(answer(model, **settings), expected)
    assert graphs() == 1


def test_the_longest_cache_counts_without_the_prefix():
    model = tiny.model("llama")
    short, long = (prompts(model, texts) for texts in (["the"] * 3, tiny.PROMPTS))
    longest = long["input_ids"].shape[1] + TOKENS["max_new_tokens"]
    for batch in (short, long):
        answer(model, batch, max_cache_len=longest, **static_and_compiled())
    assert graphs() == 1


# ---- both -------------------------------------------------------------------------------------------------------


def learned(model) -> Any:
    """Loss and gradients of a training step. The encoder has dropout, so it stays out."""
    batch = prompts(model)
    batch["query"] = tiny.vectors(3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train().zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.plug.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_compiled_model_trains_and_answers_as_before(family):
    if family == "bart" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("seen with transformers 5.20: BART itself breaks its graph to draw whether a layer is dropped")
    plain, compiled = tiny.model(family), tiny.model(family)
    compiled.compile(fullgraph=True, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    close(learned(compiled), learned(plain))
    assert graphs() == 2  # plug and backbone
    assert torch.equal(answer(compiled.eval()), answer(plain.eval()))
    assert graphs() <= 6  # the plug for one request, the first word, the second, all others
