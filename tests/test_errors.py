"""What a user gets wrong is said in one clear error, which never holds a text of a history."""

from dataclasses import replace

import pytest
import tiny
import torch

import pplug_hf.errors
from pplug_hf import Persona, PPlugConfig
from pplug_hf.errors import (
    ConfigurationError,
    DataError,
    EngineError,
    HubError,
    MismatchError,
    MissingFileError,
    PPlugError,
    StoreError,
    TimeLimitError,
)

SECRET = "my secret diary"
IDS = torch.tensor([[9, 10, 11]])
TWO = IDS.repeat(2, 1)


@pytest.fixture(params=["forward", "generate"])
def call(request, gpt2):
    return gpt2 if request.param == "forward" else gpt2.generate


def test_every_error_is_also_the_built_in_one():
    errors = [e for e in vars(pplug_hf.errors).values() if isinstance(e, type) and issubclass(e, PPlugError)]
    assert len(errors) == 13
    of_engines = {e for e in errors if issubclass(e, EngineError)}
    others = {PPlugError, HubError, StoreError, *of_engines}
    assert all(issubclass(e, ValueError) for e in errors if e not in others)
    assert issubclass(HubError, OSError) and issubclass(StoreError, OSError)
    assert all(issubclass(e, RuntimeError) for e in of_engines) and issubclass(TimeLimitError, TimeoutError)
    assert issubclass(MissingFileError, FileNotFoundError)


@pytest.mark.parametrize(
    "ids, arguments, error, message",
    [
        (TWO, {"persona": [SECRET, "b"]}, MismatchError, "Got 1 personas for 2 prompts: pass one per prompt"),
        (TWO, {"persona": [[SECRET]] * 3}, MismatchError, "Got 3 personas for 2 prompts"),
        (IDS, {"persona": [[SECRET], ["b"]]}, MismatchError, "Got 2 personas for 1 prompts"),
        (IDS, {"persona": SECRET}, DataError, r"a list of texts, got a single str\. Wrap it: persona=\[text\]"),
        (TWO, {"persona": [SECRET, SECRET], "query": "a"}, MismatchError, "Got 1 personas for 2 prompts"),
        (TWO, {"persona": [[SECRET], SECRET]}, DataError, "got a single str"),
        (IDS, {"persona": [SECRET, 3]}, DataError, "History item 1 is an int, not a text"),
        (IDS, {"persona": [[SECRET, None]]}, DataError, "History item 1 is a NoneType, not a text"),
        (IDS, {"persona": [{"text": SECRET}]}, DataError, "has no item_template"),
        (IDS, {"persona": 3}, DataError, "got a single int"),
        (IDS, {"persona": torch.zeros(1, 12)}, DataError, "got a single Tensor.*or pass a Persona"),
        (IDS, {"persona": [SECRET], "query": ""}, DataError, "query of row 0 is empty.*Pass query="),
        (IDS, {"persona": [SECRET], "query": "  \n"}, DataError, "query of row 0 is empty"),
        (TWO, {"persona": [[SECRET]] * 2, "query": ["a", ""]}, DataError, "query of row 1 is empty"),
        (TWO, {"persona": [[SECRET]] * 2, "query": ["a", 3]}, DataError, "query of row 1 is empty or not a text"),
        (TWO, {"persona": [[SECRET]] * 2, "query": ["a"]}, MismatchError, "Got 1 queries for 2 prompts"),
        (TWO, {"persona": [[SECRET]] * 2, "query": "a"}, MismatchError, "Got 1 queries for 2 prompts"),
        (IDS, {"persona": [SECRET], "query": torch.zeros(1, 5)}, MismatchError, r"must be \[1, 12\], got \[1, 5\]"),
        (IDS, {"persona": [SECRET], "query": torch.full((1, 12), torch.nan)}, DataError, "NaN or infinity"),
        (IDS, {"persona": [torch.zeros(1, 12)]}, DataError, "History item 0 is a Tensor, not a text"),
        (IDS, {"persona": {"text": SECRET}}, DataError, "got a single dict"),
        (IDS[0], {"persona": [SECRET]}, DataError, r"input_ids must be \[batch, tokens\], got \[3\]"),
        (None, {"persona": [SECRET]}, DataError, "input_ids must be .*got None"),
        (IDS.float(), {"persona": [SECRET]}, DataError, r"input_ids must be .*got \[1, 3\] of torch.float32"),
        (IDS, {"attention_mask": TWO > 0}, DataError, r"attention_mask must be \[1, 3\].*got \[2, 3\]"),
        (IDS, {"persona": [SECRET], "query": 3}, DataError, "query must be a text or a list of texts.*got an int"),
        (
            TWO,
            {"persona_position": [1]},
            MismatchError,
            r"persona_position must hold one number per prompt, \[2\], got \[1\]",
        ),
        (IDS, {"persona_position": [-1]}, DataError, "persona_position must lie between 0 and"),
        (IDS, {"persona_position": [4]}, DataError, "persona_position must lie between 0 and"),
    ],
)
def test_inputs_that_cannot_be_right(call, ids, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        call(ids, **arguments)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "family, labels, message",
    [
        ("gpt2", IDS[:, 1:], r"labels must be \[1, 3\], as input_ids are, got \[1, 2\].*labels=answers"),
        ("t5", TWO, r"labels must be \[1, tokens\], got \[2, 3\]: one answer per prompt"),
    ],
)
def test_labels_that_do_not_belong_to_their_prompts(family, labels, message):
    with pytest.raises(DataError, match=message):
        tiny.model(family)(IDS, labels=labels)


def test_a_prompt_of_special_tokens_only_is_no_request(call):
    with pytest.raises(DataError, match="query of row 0 is empty"):
        call(torch.tensor([[tiny.EOS, tiny.EOS]]), persona=tiny.HISTORY)


def test_without_a_tokenizer_a_request_must_be_given():
    model = tiny.model("gpt2")
    model.tokenizer = None
    with pytest.raises(ConfigurationError, match=r"query= is missing.*pass query=<text>, or set model\.tokenizer"):
        model(IDS, persona=tiny.HISTORY)
    assert model(IDS, persona=tiny.HISTORY, query="sea").logits.isfinite().all()
    assert model(IDS).logits.isfinite().all()  # nothing to weight


def test_a_persona_of_another_encoder(call, gpt2):
    other = Persona(tiny.vectors(3), replace(gpt2.personalizer.spec, digest="0" * 16))
    with pytest.raises(MismatchError, match=r"digest=0{16}.*the model uses.*encode_persona"):
        call(IDS, persona=other)
    prompted = Persona(tiny.vectors(3), replace(gpt2.personalizer.spec, prompt="a film "))
    with pytest.raises(MismatchError, match="prompt=a film "):
        call(IDS, persona=[prompted])


def test_a_persona_of_another_width(call, gpt2):
    with pytest.raises(MismatchError, match=r"width=5.*width=12"):
        call(IDS, persona=Persona(tiny.vectors(3, 5), replace(gpt2.personalizer.spec, width=5)))


# ---- creating ---------------------------------------------------------------------------------------------------


def create(backbone="gpt2", **choices):
    backbone = tiny.backbone(backbone) if backbone in tiny.FAMILIES else backbone
    return tiny.from_backbone(backbone, tiny.shared_encoder(), **choices)


def test_an_unknown_option_names_the_options():
    with pytest.raises(
        ConfigurationError, match=r"Unknown option num_tokens; options are placement, num_persona_tokens, "
    ):
        create(num_tokens=4)
    with pytest.raises(ConfigurationError, match="Unknown option"):
        create(hidden_size=3)  # measured, not chosen


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"num_persona_tokens": 0}, "num_persona_tokens must be a whole number of at least 1, got 0"),
        ({"projector_size": -3}, "projector_size must be a whole number of at least 1, got -3"),
        ({"attention_temperature": 0.0}, "attention_temperature must be a number greater than 0"),
        ({"attention_temperature": float("nan")}, "attention_temperature must be a number greater than 0, got nan"),
        ({"output_init": float("inf")}, "output_init must be a number greater than 0"),
        ({"aggregator": "median"}, "aggregator must be one of attention, mean"),
    ],
    ids=str,
)
def test_values_that_cannot_work(choice, message):
    with pytest.raises(ConfigurationError, match=message):
        create(**choice)


@pytest.mark.parametrize(
    "choice", [{"num_persona_tokens": "4"}, {"instruction": "yes"}, {"query_prompt": None}], ids=str
)
def test_values_of_the_wrong_type_name_the_field(choice):
    with pytest.raises(ConfigurationError, match=next(iter(choice))):
        create(**choice)


def test_whole_numbers_are_numbers():
    assert create(attention_temperature=2, output_init=1).config.attention_temperature == 2


def test_the_scale_needs_a_backbone():
    with pytest.raises(ConfigurationError, match="knows no hidden_size"):
        _ = PPlugConfig().scale


@pytest.mark.parametrize("part", ["backbone", "encoder"])
def test_without_network_and_cache(part):
    parts = {"backbone": tiny.backbone("gpt2"), "encoder": tiny.shared_encoder()} | {part: "nobody/nothing"}
    with pytest.raises(MissingFileError, match=f"Cannot load the (sentence )?{part} 'nobody/nothing'"):
        tiny.from_backbone(**parts)
