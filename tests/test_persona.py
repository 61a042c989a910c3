"""A user as the model sees them: vectors, and the encoder that made them."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close

from pplug_hf import Persona
from pplug_hf.errors import DataError, MismatchError
from pplug_hf.modeling.persona import describe, is_history, item_texts

SECRET = "my secret diary"
PRINT = {"digest": "abc", "history_prompt": ""}


def persona(n=3, **fingerprint):
    return Persona(tiny.vectors(n), PRINT | fingerprint)


# ---- vectors ----------------------------------------------------------------------------------------------------


def test_length_and_words():
    assert len(persona(3)) == 3 and repr(persona(3)) == "Persona(3 items x 12)"
    assert len(persona(0)) == 0


def test_a_history_grows_by_adding_newer_items():
    both = persona(3) + persona(2)
    assert torch.equal(both.embeddings, torch.cat([tiny.vectors(3), tiny.vectors(2)]))
    assert both.fingerprint == PRINT
    assert torch.equal((persona(0) + persona(2)).embeddings, tiny.vectors(2))
    assert (persona(2) + persona(1).to(torch.bfloat16)).embeddings.dtype == torch.float32


@pytest.mark.parametrize("other", [{"digest": "xyz"}, {"history_prompt": "a film "}], ids=str)
def test_vectors_of_two_encoders_do_not_add_up(other):
    with pytest.raises(MismatchError, match=r"digest=.*digest="):
        persona() + persona(**other)


def test_to_another_type():
    assert persona().to(torch.float64).embeddings.dtype == torch.float64
    assert persona().to("cpu").fingerprint == PRINT


@pytest.mark.parametrize(
    "vectors",
    [torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(2, 3, dtype=torch.long), [[1.0]], None],
    ids=["1d", "3d", "int", "list", "None"],
)
def test_only_a_floating_point_matrix_is_a_persona(vectors):
    with pytest.raises(DataError, match=r"floating point tensor of shape \[items, width\], got"):
        Persona(vectors, PRINT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors = tiny.vectors(5)
    vectors[2, 1] = vectors[4, 0] = value
    with pytest.raises(DataError, match=r"2 of 5 item vectors hold NaN or infinity \(first at item 2\)"):
        Persona(vectors, PRINT)


def test_a_persona_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        persona().embeddings = tiny.vectors(1)


def test_describe_leaves_out_what_is_not_known():
    assert describe({"model_type": "bert", "vocab_size": None, "history_prompt": ""}) == "(model_type=bert)"


# ---- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, expected",
    [
        ([], True),
        (["a"], True),
        (("a", "b"), True),
        ([{"text": "a"}], True),
        ([["a"]], False),
        ([[], ["a"]], False),
        ([None], False),
        ([persona()], False),
        (persona(), False),
        ("a", False),
        (None, False),
    ],
    ids=repr,
)
def test_one_history_or_a_batch_of_them(value, expected):
    assert is_history(value) is expected


@given(st.lists(st.text()))
def test_texts_stay_what_they_are(texts):
    assert item_texts(texts, None) == texts
    assert item_texts([{"t": text} for text in texts], "{t}") == texts


def test_a_template_turns_items_into_texts():
    items = [{"tag": "comedy", "year": 1999, "description": "{braces} stay"}, "a bare text"]
    assert item_texts(items, "{tag} ({year}): {description}") == ["comedy (1999): {braces} stay", "a bare text"]


@pytest.mark.parametrize(
    "history, template, message",
    [
        ([SECRET, 3], None, "History item 1 is a int, not a text"),
        ([SECRET, None], None, "History item 1 is a NoneType"),
        ([SECRET, [SECRET]], None, "History item 1 is a list"),
        ([SECRET.encode()], None, "History item 0 is a bytes"),
        (SECRET, None, "a single str: pass"),
        (3, None, "a single int"),
        ([{"text": SECRET}], None, r"has no item_template.*set config.item_template"),
        ([{"text": SECRET}], "{title}", r"History item 0 has no field 'title'.*its fields are \['text'\]"),
    ],
)
def test_what_is_no_text_is_refused_without_telling_what_it_says(history, template, message):
    with pytest.raises(DataError, match=message) as error:
        item_texts(history, template)
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None  # a chained KeyError would not tell either


# ---- encoding ---------------------------------------------------------------------------------------------------


def test_encode_once_use_often(model):
    made = model.encode_persona(tiny.HISTORY)
    assert made.embeddings.shape == (4, 12) and made.fingerprint == model.config.encoder_fingerprint
    expected = torch.tensor(model.history_encoder.encode(tiny.HISTORY))
    close(made.embeddings, expected)
    assert not made.embeddings.requires_grad and not made.embeddings.is_inference()
    close(model.soft_prompt(made, query="sea"), model.soft_prompt(tiny.HISTORY, query="sea"))


def test_many_histories_give_many_personas(model):
    several = model.encode_persona(tiny.HISTORIES)
    assert [len(one) for one in several] == [4, 1, 0]
    for one, history in zip(several, tiny.HISTORIES, strict=True):
        close(one.embeddings, model.encode_persona(history).embeddings)
    assert len(model.encode_persona([])) == 0 and model.encode_persona([]).embeddings.shape == (0, 12)


def test_encoding_a_persona_gives_the_same_persona(model):
    made = model.encode_persona(tiny.HISTORY)
    assert model.encode_persona(made) is made
    again, other = model.encode_persona([made, ["sea"]])
    assert again is made and len(other) == 1


def test_adding_is_encoding_the_longer_history(model):
    older, newer = model.encode_persona(tiny.HISTORY[:1]), model.encode_persona(tiny.HISTORY[1:])
    close((older + newer).embeddings, model.encode_persona(tiny.HISTORY).embeddings)


def test_the_template_and_the_prompt_of_the_configuration_are_used():
    model = tiny.model("gpt2", item_template="{tag} {text}", history_prompt="a film about ")
    made = model.encode_persona([{"tag": "cold", "text": "sea"}, "moon"])
    expected = torch.tensor(model.history_encoder.encode(["a film about cold sea", "a film about moon"]))
    close(made.embeddings, expected)
    assert made.fingerprint["history_prompt"] == "a film about "


def test_a_batch_may_mix_every_form(model):
    mixed = [model.encode_persona(tiny.HISTORY), tiny.HISTORY, tuple(tiny.HISTORY), [], None]
    weights = model.persona_weights(mixed, query=["sea"] * 5)
    close(weights[0], weights[1])
    close(weights[0], weights[2])
    assert weights[3:].abs().sum() == 0
