"""Answering in batches, and the pairs of the wrong-user control."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.lamp import Example
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods.decoding import answer, evaluating, shuffle_histories
from pplug_hf.processing import PPlugProcessor

PROMPTS = [*tiny.PROMPTS, "like rain", "write a long story about two fish in the cold sea", "what is it like"]
PERSONAS = [*tiny.HISTORIES, None, tiny.HISTORY[1:], tiny.HISTORY[:1]]
QUERIES = ["night sky", "film", "sun", "rain", "fish", "dog"]


@pytest.fixture(scope="module")
def processor(model):
    return PPlugProcessor.from_model(model)


def one_by_one(generate, processor, **rows):
    """The definition: no batches, no padding, no order."""
    answers = []
    for values in zip(*rows.values(), strict=True):
        batch = processor(**{name: [value] for name, value in zip(rows, values, strict=True)})
        generated = generate(**batch, max_new_tokens=6, do_sample=False)
        answers += processor.decode_answers(generated, batch["input_ids"].shape[1])
    return answers


# ---- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_answer_as_single_prompts_do(model, processor, batch_size):
    expected = one_by_one(model.generate, processor, text=PROMPTS, persona=PERSONAS, query=QUERIES)
    options = {"personas": PERSONAS, "queries": QUERIES, "batch_size": batch_size, "max_new_tokens": 6}
    assert answer(model.generate, processor, PROMPTS, **options) == expected
    assert len(set(expected)) > 1  # else the test would prove nothing


def test_answers_follow_their_prompts(model, processor):
    options = {"batch_size": 2, "max_new_tokens": 6}
    there = answer(model.generate, processor, PROMPTS, personas=PERSONAS, queries=QUERIES, **options)
    back = answer(model.generate, processor, PROMPTS[::-1], personas=PERSONAS[::-1], queries=QUERIES[::-1], **options)
    assert back == there[::-1]


def test_a_bare_backbone_answers_without_personas(model, processor):
    answers = answer(model.backbone.generate, processor, PROMPTS, batch_size=4, max_new_tokens=6)
    assert answers == one_by_one(model.backbone.generate, processor, text=PROMPTS)


def test_query_vectors_stand_for_query_texts(model, processor):
    vectors = torch.cat([model.personalizer._queries([query], [torch.ones(1, 12)]) for query in QUERIES])
    options = {"personas": PERSONAS, "batch_size": 2, "max_new_tokens": 6}
    by_vector = answer(model.generate, processor, PROMPTS, queries=vectors.detach(), **options)
    assert by_vector == answer(model.generate, processor, PROMPTS, queries=QUERIES, **options)


def test_beams_reach_generate_and_nothing_is_sampled(gpt2):
    seen = []

    def generate(input_ids, attention_mask, **options):
        seen.append(options)
        return input_ids

    processor = PPlugProcessor.from_model(gpt2)
    assert answer(generate, processor, PROMPTS, max_new_tokens=3, num_beams=4, max_length=2) == [""] * len(PROMPTS)
    assert seen == [{"max_new_tokens": 3, "num_beams": 4, "do_sample": False}]


def test_long_prompts_are_cut_and_come_first(gpt2):
    shapes = []

    def generate(input_ids, **options):
        shapes.append(list(input_ids.shape))
        return input_ids

    answer(generate, PPlugProcessor.from_model(gpt2), PROMPTS, batch_size=3, max_length=5, max_new_tokens=3)
    assert shapes == [[3, 5], [3, 4]]


def test_a_model_in_training_answers_without_drop_out_and_goes_on_training():
    model = tiny.model("gpt2")
    processor = PPlugProcessor.from_model(model)
    expected = answer(model.generate, processor, PROMPTS, personas=PERSONAS, max_new_tokens=6)
    model.train()
    assert answer(model.generate, processor, PROMPTS, personas=PERSONAS, max_new_tokens=6) == expected
    assert model.training and not model.history_encoder.training
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert model.training and torch.is_grad_enabled()


def test_nothing_to_answer(gpt2):
    assert answer(gpt2.generate, PPlugProcessor.from_model(gpt2), [], max_new_tokens=3) == []


@pytest.mark.parametrize("wrong", [{"personas": PERSONAS[1:]}, {"queries": [*QUERIES, "the"]}])
def test_one_per_prompt(gpt2, wrong):
    with pytest.raises(MismatchError, match="for 6 prompts"):
        answer(gpt2.generate, PPlugProcessor.from_model(gpt2), PROMPTS, max_new_tokens=3, **wrong)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_positive(gpt2, batch_size):
    with pytest.raises(ConfigurationError, match="batch_size"):
        answer(gpt2.generate, PPlugProcessor.from_model(gpt2), PROMPTS, max_new_tokens=3, batch_size=batch_size)


# ---- wrong users ------------------------------------------------------------------------------------------------


def example(number, user, items):
    return Example(id=str(number), user=user, prompt="", query="", target=None, history=[{"text": "a"}] * items)


def make_examples(rows):
    return [example(number, user, items) for number, (user, items) in enumerate(rows)]


several_users = (
    st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 2)), min_size=2, max_size=12)
    .filter(lambda rows: len({user for user, _ in rows}) > 1)
    .map(make_examples)
)


@given(several_users, st.integers(0, 5))
@settings(deadline=None)
def test_everybody_gets_the_history_of_another_user(examples, seed):
    given_ = shuffle_histories(examples, seed)
    assert all(examples[other].user != own.user for own, other in zip(examples, given_, strict=True))
    assert len({(own.user, other) for own, other in zip(examples, given_, strict=True)}) == len(
        {own.user for own in examples}
    )
    for own, other in zip(examples, given_, strict=True):
        available = any(each.history for each in examples if each.user != own.user)
        assert bool(examples[other].history) == available


@given(several_users, st.integers(0, 5), st.randoms())
@settings(deadline=None)
def test_pairs_depend_on_the_seed_and_not_on_the_order(examples, seed, shuffler):
    shuffled = shuffler.sample(examples, len(examples))
    pairs, again = (
        {own.id: each[other].id for own, other in zip(each, shuffle_histories(each, seed), strict=True)}
        for each in (examples, shuffled)
    )
    assert pairs == again


def test_another_seed_pairs_others():
    examples = make_examples([(user, 1) for user in "abcdefgh"])
    assert len({tuple(shuffle_histories(examples, seed)) for seed in range(20)}) > 10
    assert sorted(shuffle_histories(examples, 0)) == list(range(8))  # nobody's history is used twice


@pytest.mark.parametrize("rows", [[], [("a", 1), ("a", 2)]])
def test_one_user_alone_is_an_error(rows):
    with pytest.raises(DataError, match="at least 2 users"):
        shuffle_histories(make_examples(rows))
