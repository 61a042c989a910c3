"""A user as the model sees them: vectors, the encoder that made them, the file they travel in."""

import json
import logging
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import close
from safetensors.torch import load_file, save_file

from pplug_hf import EncoderSpec, Persona, Personalizer
from pplug_hf.errors import DataError, MismatchError, MissingFileError
from pplug_hf.modeling.encoders import item_texts
from pplug_hf.modeling.frozen import describe
from pplug_hf.modeling.personalizer import is_one_user

SECRET = "my secret diary"
SPEC = EncoderSpec("abc", 12)


def persona(n=3, **changes):
    return Persona(tiny.vectors(n), replace(SPEC, **changes))


# ---- vectors ----------------------------------------------------------------------------------------------------


def test_length_and_words():
    assert len(persona(3)) == 3 and repr(persona(3)) == "Persona(3 items x 12)"
    assert len(persona(0)) == 0


def test_a_history_grows_by_adding_newer_items():
    both = persona(3) + persona(2)
    assert torch.equal(both.vectors, torch.cat([tiny.vectors(3), tiny.vectors(2)]))
    assert both.spec == SPEC
    assert torch.equal((persona(0) + persona(2)).vectors, tiny.vectors(2))
    assert (persona(2) + persona(1).to(torch.bfloat16)).vectors.dtype == torch.float32


@pytest.mark.parametrize("other", [{"digest": "xyz"}, {"prompt": "a film "}, {"item_template": "{title}"}], ids=str)
def test_vectors_of_two_encoders_do_not_add_up(other):
    with pytest.raises(MismatchError, match=r"encoded by .*digest=.*the model uses .*digest="):
        persona() + persona(**other)


def test_to_another_type():
    assert persona().to(torch.float64).vectors.dtype == torch.float64
    assert persona().to("cpu").spec == SPEC


@pytest.mark.parametrize(
    "vectors",
    [
        torch.zeros(3),
        torch.zeros(1, 2, 3),
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(2, 3).to(torch.float8_e4m3fn),
        [[1.0]],
        None,
    ],
    ids=["1d", "3d", "int", "fp8", "list", "None"],
)
def test_only_a_floating_point_matrix_is_a_persona(vectors):
    with pytest.raises(DataError, match=r"floating point tensor of shape \[items, width\], got"):
        Persona(vectors, SPEC)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_are_refused(value):
    vectors = tiny.vectors(5)
    vectors[2, 1] = vectors[4, 0] = value
    with pytest.raises(DataError, match=r"2 of 5 item vectors hold NaN or infinity \(first at item 2\)"):
        Persona(vectors, SPEC)


def test_a_persona_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        persona().vectors = tiny.vectors(1)


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
    assert is_one_user(value) is (expected or value is None or isinstance(value, Persona))


@given(st.lists(st.text().filter(str.strip)))
def test_texts_stay_what_they_are(texts):
    assert item_texts(texts, None) == texts
    assert item_texts([{"t": text} for text in texts], "{t}") == texts


def test_a_template_turns_items_into_texts():
    items = [{"tag": "comedy", "year": 1999, "description": "{braces} stay"}, "a bare text"]
    assert item_texts(items, "{tag} ({year}): {description}") == ["comedy (1999): {braces} stay", "a bare text"]


@pytest.mark.parametrize(
    "history, template, message",
    [
        ([SECRET, 3], None, "History item 1 is an int, not a text"),
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
    assert made.vectors.shape == (4, 12) and made.spec == EncoderSpec.of(model.config)
    expected = torch.tensor(model.history_encoder.encode(tiny.HISTORY))
    close(made.vectors, expected)
    assert not made.vectors.requires_grad and not made.vectors.is_inference()
    close(model.soft_prompt(made, query="sea"), model.soft_prompt(tiny.HISTORY, query="sea"))


def test_many_histories_give_many_personas(model):
    several = model.encode_persona(tiny.HISTORIES)
    assert [len(one) for one in several] == [4, 1, 0]
    for one, history in zip(several, tiny.HISTORIES, strict=True):
        close(one.vectors, model.encode_persona(history).vectors)
    assert len(model.encode_persona([])) == 0 and model.encode_persona([]).vectors.shape == (0, 12)


def test_encoding_a_persona_gives_the_same_persona(model):
    made = model.encode_persona(tiny.HISTORY)
    assert model.encode_persona(made) is made
    again, other = model.encode_persona([made, ["sea"]])
    assert again is made and len(other) == 1


def test_adding_is_encoding_the_longer_history(model):
    older, newer = model.encode_persona(tiny.HISTORY[:1]), model.encode_persona(tiny.HISTORY[1:])
    close((older + newer).vectors, model.encode_persona(tiny.HISTORY).vectors)


def test_the_template_and_the_prompt_of_the_configuration_are_used():
    model = tiny.model("gpt2", item_template="{tag} {text}", history_prompt="a film about ")
    made = model.encode_persona([{"tag": "cold", "text": "sea"}, "moon"])
    expected = torch.tensor(model.history_encoder.encode(["a film about cold sea", "a film about moon"]))
    close(made.vectors, expected)
    assert made.spec.prompt == "a film about " and made.spec.item_template == "{tag} {text}"


def test_a_batch_may_mix_every_form(model):
    mixed = [model.encode_persona(tiny.HISTORY), tiny.HISTORY, tuple(tiny.HISTORY), [], None]
    weights = model.persona_weights(mixed, query=["sea"] * 5)
    close(weights[0], weights[1])
    close(weights[0], weights[2])
    assert weights[3:].abs().sum() == 0


# ---- files ------------------------------------------------------------------------------------------------------

DTYPES = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


@given(
    n=st.integers(0, 6),
    width=st.integers(1, 5),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**31),
    template=st.none() | st.text(),
    ids=st.booleans(),
    times=st.booleans(),
)
def test_a_saved_persona_comes_back_bit_for_bit(tmp_path_factory, n, width, dtype, seed, template, ids, times):
    bits = torch.randint(-(2**15), 2**15, (n, width * dtype.itemsize // 2), generator=torch.manual_seed(seed))
    vectors = bits.to(torch.int16).view(dtype)
    vectors = torch.where(vectors.isfinite(), vectors, torch.zeros((), dtype=dtype))
    folder = tmp_path_factory.mktemp("persona")
    spec = EncoderSpec("abc", width, "a film: ", template, "phrase", "bert")
    item_ids = tuple(f"{seed}-{i}é" for i in range(n)) if ids else None
    timestamps = torch.arange(n, dtype=torch.float64) * 1e9 if times else None
    Persona(vectors, spec, item_ids, timestamps).save_pretrained(folder)
    again = Persona.from_pretrained(folder)
    assert again.vectors.dtype == dtype and again.vectors.shape == (n, width)
    assert torch.equal(again.vectors.view(DTYPES[dtype]), vectors.view(DTYPES[dtype]))
    assert again.spec == spec and again.spec.model_type == "bert" and again.item_ids == item_ids
    assert again.timestamps is None if timestamps is None else torch.equal(again.timestamps, timestamps)


def test_a_view_of_a_tensor_that_is_trained_is_saved_alone(tmp_path):
    whole = torch.nn.Parameter(tiny.vectors(100))
    Persona(whole[::50, ::2], replace(SPEC, width=6)).save_pretrained(tmp_path)
    again = Persona.from_pretrained(tmp_path).vectors
    assert torch.equal(again, whole[::50, ::2].detach()) and not again.requires_grad
    assert (tmp_path / "persona.safetensors").stat().st_size < 600


def test_a_folder_with_one_file_per_user(tmp_path):
    for user in range(3):
        persona(user).save_pretrained(tmp_path / "users" / f"{user}.safetensors")
    assert sorted(os.listdir(tmp_path / "users")) == [f"{user}.safetensors" for user in range(3)]
    assert [len(Persona.from_pretrained(tmp_path / "users" / f"{user}.safetensors")) for user in range(3)] == [0, 1, 2]


def test_a_saved_persona_still_grows(tmp_path):
    persona(3).save_pretrained(tmp_path)
    (Persona.from_pretrained(tmp_path) + persona(2)).save_pretrained(tmp_path)
    assert torch.equal(Persona.from_pretrained(tmp_path).vectors, (persona(3) + persona(2)).vectors)


def test_no_text_is_in_the_file(model, tmp_path):
    model.encode_persona(["a dark film about the sea"]).save_pretrained(tmp_path)
    content = (tmp_path / "persona.safetensors").read_bytes()
    for word in (b"dark", b"film", b"sea"):
        assert word not in content
    assert list(load_file(tmp_path / "persona.safetensors")) == ["vectors"]


def test_a_model_with_another_encoder_refuses_a_saved_persona(gpt2, tmp_path):
    persona().save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="This persona was encoded by"):
        gpt2.soft_prompt(Persona.from_pretrained(tmp_path), query="sea")


def test_nothing_is_left_of_a_save_that_fails(tmp_path, monkeypatch):
    persona(3).save_pretrained(tmp_path)

    def fails(tensors, filename, metadata):
        Path(filename).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("pplug_hf.modeling.persona.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        persona(2).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["persona.safetensors"] and len(Persona.from_pretrained(tmp_path)) == 3


FINE = {"vectors": torch.zeros(2, 3)}
HEADER = {"persona_format": "2", "spec": json.dumps(SPEC.to_dict() | {"width": None})}
OLD = {"fingerprint": json.dumps({"digest": "abc", "history_prompt": ""})}
BROKEN = {
    "nan": (FINE | {"vectors": torch.tensor([[0.0, float("nan")]])}, HEADER, "1 of 1 item vectors hold NaN"),
    "1d": (FINE | {"vectors": torch.zeros(3)}, HEADER, r"needs a floating point tensor of shape \[items, width\]"),
    "int": (FINE | {"vectors": torch.zeros(2, 3, dtype=torch.int8)}, HEADER, "needs a floating point tensor"),
    "fp8": (FINE | {"vectors": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, HEADER, "needs a floating point tensor"),
    "no header": (FINE, {}, "expected vectors and the spec of their encoder"),
    "no spec": (FINE, {"persona_format": "2"}, "expected vectors and the spec of their encoder"),
    "odd format": (FINE, HEADER | {"persona_format": "two"}, "expected vectors and the spec of their encoder"),
    "odd spec": (FINE, HEADER | {"spec": "{}"}, "missing 2 required positional arguments"),
    "ids that are not texts": (FINE, HEADER | {"item_ids": "[1, 2]"}, "its item_ids are not a list of texts"),
    "too few ids": (FINE, HEADER | {"item_ids": '["a"]'}, "2 items got 1 item_ids"),
    "too many times": (FINE | {"timestamps": torch.zeros(3)}, HEADER, "2 items got 3 timestamps"),
    "another file": ({"weight": torch.zeros(2, 3)}, HEADER, r"got tensors \['weight'\]"),
    "more in an old one": (
        {"embeddings": torch.zeros(2, 3), "texts": torch.zeros(3)},
        OLD,
        "expected vectors and the",
    ),
    "no json": (FINE, HEADER | {"spec": "{"}, "Expecting"),
    "no mapping": (FINE, HEADER | {"spec": "[1]"}, "its spec is a list, not a mapping"),
    "no mapping in an old one": (
        {"embeddings": torch.zeros(2, 3)},
        {"fingerprint": "[1]"},
        "is a list, not a mapping",
    ),
    "deep": (FINE, HEADER | {"spec": "[" * 200_000}, "recursion"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_persona_is_refused(tmp_path, name):
    tensors, header, message = BROKEN[name]
    save_file(tensors, tmp_path / "persona.safetensors", header)
    with pytest.raises(DataError, match=rf"persona.safetensors' is damaged or not a persona: .*{message}"):
        Persona.from_pretrained(tmp_path)


def raw(header, body=b""):
    header = header.encode()
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><p>Not found</p>",
        raw("{}")[:9],
        struct.pack("<Q", 2**40) + b"{}",  # a header of a terabyte
        raw('{"embeddings":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}', b"0000"),
        raw('{"embeddings":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}', b"0000"),  # cut off
        raw('{"embeddings":{"dtype":"F32","shape":[1,1],"data_offsets":[100,104]}}', b"0000"),
        raw('{"embeddings":{"dtype":"F33","shape":[1,1],"data_offsets":[0,4]}}', b"0000"),
    ],
    ids=["empty", "html", "no header", "huge header", "huge shape", "cut off", "offset", "type"],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "persona.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"persona.safetensors' is damaged or not a persona"):
        Persona.from_pretrained(tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingFileError, match=r"There is no persona file '.*u.safetensors'"):
        Persona.from_pretrained(tmp_path / "u.safetensors")
    with pytest.raises(MissingFileError, match=r"Cannot load the persona '.*nobody'"):
        Persona.from_pretrained(tmp_path / "nobody")
    with pytest.raises(MissingFileError, match="persona 'me/nobody'"):
        Persona.from_pretrained("me/nobody", revision="main", token="x", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"persona.safetensors"):
        Persona.from_pretrained(tmp_path / "empty")


# ---- ids, times, formats ----------------------------------------------------------------------------------------

DATED = [
    {"id": 7, "text": "sea", "date": "2020-03-01"},
    {"id": "b", "text": "moon", "date": "2019"},
    {"id": "c", "text": "rain", "date": "2021-01"},
]


@pytest.fixture(scope="module")
def dated():
    return tiny.model("gpt2", item_template="{text}").encode_persona(DATED)


def test_items_bring_their_ids_and_times(dated, gpt2):
    assert dated.item_ids == ("7", "b", "c")
    assert dated.timestamps.tolist() == [1583020800.0, 1546300800.0, 1609459200.0]  # midnight, UTC
    for part in ("id", "date"):
        model = tiny.model("gpt2", item_template="{text}")
        some = model.encode_persona([{k: v for k, v in item.items() if k != part} for item in DATED[:1]] + DATED[1:])
        assert (some.item_ids is None) is (part == "id") and (some.timestamps is None) is (part == "date")
    plain = gpt2.encode_persona(tiny.HISTORY)
    assert plain.item_ids is None and plain.timestamps is None


def test_items_leave_by_id(dated):
    left = dated.without(["b", "nobody's"])
    assert left.item_ids == ("7", "c") and torch.equal(left.vectors, dated.vectors[[0, 2]])
    assert left.timestamps.tolist() == [1583020800.0, 1609459200.0]
    assert dated.without("7").item_ids == ("b", "c") and len(dated.without(["7", "b", "c"])) == 0
    with pytest.raises(DataError, match="have no ids"):
        persona().without(["a"])


def test_the_newest_and_the_heaviest_items(dated):
    assert dated.last(2).item_ids == ("7", "c")  # by time, in the history's order
    assert torch.equal(persona(3).last(2).vectors, tiny.vectors(3)[1:])  # without times those at the end
    assert len(persona(3).last(9)) == 3 and len(persona(3).last(0)) == 0
    weights = torch.tensor([0.2, 0.6, 0.2])
    assert dated.top(2, weights).item_ids == ("b", "c")  # of equal ones the later
    assert len(dated.top(9, weights)) == 3


def test_ids_and_times_grow_with_the_history(dated):
    grown = dated + dated.last(1)
    assert grown.item_ids == ("7", "b", "c", "c") and len(grown.timestamps) == 4
    assert (dated + replace(dated, item_ids=None)).item_ids is None
    assert (replace(dated, timestamps=None) + dated).timestamps is None


def test_a_number_of_ids_or_times_that_does_not_fit():
    with pytest.raises(DataError, match="A persona of 3 items got 2 item_ids: give one per item"):
        Persona(tiny.vectors(3), SPEC, item_ids=("a", "b"))
    with pytest.raises(DataError, match="A persona of 3 items got 1 timestamps"):
        Persona(tiny.vectors(3), SPEC, timestamps=torch.zeros(1))


def test_a_persona_of_another_item_template_is_refused(dated):
    other = tiny.model("gpt2", item_template="{id} {text}")
    with pytest.raises(MismatchError, match=r"item_template=\{text\}.*the model uses.*item_template=\{id\} \{text\}"):
        other.soft_prompt(dated, query="sea")


def test_a_file_of_format_1_fits_every_template_of_its_encoder(gpt2, tmp_path):
    made = gpt2.encode_persona(tiny.HISTORY)
    header = {"fingerprint": json.dumps(gpt2.config.encoder_fingerprint)}
    save_file({"embeddings": made.vectors}, tmp_path / "persona.safetensors", header)
    old = Persona.from_pretrained(tmp_path)
    assert torch.equal(old.vectors, made.vectors) and old.item_ids is None
    close(gpt2.soft_prompt(old, query="sea"), gpt2.soft_prompt(made, query="sea"))
    assert tiny.model("gpt2", item_template="{text}").soft_prompt(old, query="sea").isfinite().all()
    with pytest.raises(MismatchError, match="prompt=a film"):
        tiny.model("gpt2", history_prompt="a film ").soft_prompt(old, query="sea")


@pytest.mark.parametrize("version", ["2", "3"])
def test_what_a_later_version_adds_is_left_out_with_a_warning(tmp_path, caplog, version):
    tensors, header = FINE | {"phrases": torch.zeros(5, 3)}, HEADER | {"persona_format": version, "more": "x"}
    header["spec"] = json.dumps(SPEC.to_dict() | {"width": 3, "language": "en"})
    save_file(tensors, tmp_path / "persona.safetensors", header)
    with caplog.at_level(logging.WARNING):
        assert len(Persona.from_pretrained(tmp_path)) == 2
    (record,) = caplog.records
    assert f"has format {version}" in record.message and "left out (phrases)" in record.message


# ---- encoding without a backbone --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plug(places, tmp_path_factory):
    """A plug folder whose backbone is gone, and what its model gave for the histories while it was there."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(places / "gpt2", folder / "backbone")
    choices = {"item_template": "{tag} {text}", "history_prompt": "a film about "}
    made = tiny.from_backbone(str(folder / "backbone"), encoder=str(places / "encoder"), **choices)
    made.save_pretrained(folder / "plug")
    shutil.rmtree(folder / "backbone")
    return folder / "plug", made


ITEMS = [{"tag": "cold", "text": "sea"}, "moon", {"tag": "cold", "text": "sea"}]


def test_a_device_encodes_what_the_model_would(plug):
    folder, made = plug
    encoder = Personalizer.from_pretrained(folder)
    mine, theirs = encoder.encode(ITEMS), made.encode_persona(ITEMS)
    assert torch.equal(mine.vectors, theirs.vectors) and mine.spec == theirs.spec
    several = encoder.encode([ITEMS, [], None, mine], batch_size=1)
    assert [len(one) for one in several] == [3, 0, 0, 3] and several[3] is mine
    close(several[0].vectors, mine.vectors)
    close(made.soft_prompt(mine, query="sea"), made.soft_prompt(ITEMS, query="sea"))
    with pytest.raises(DataError, match="History item 0 has no field 'text'"):
        encoder.encode([{"tag": SECRET}])


def test_a_device_loads_neither_backbone_nor_trained_weights(plug, tmp_path):
    folder, made = plug
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(
        Personalizer.from_pretrained(tmp_path, encode_only=True).encode(ITEMS).vectors,
        made.encode_persona(ITEMS).vectors,
    )


def test_a_device_may_have_its_encoder_elsewhere_but_not_another_one(plug, places):
    folder, _ = plug
    for options in (
        {"encoder": tiny.encoder()},
        {"encoder": str(places / "encoder"), "encoder_kwargs": {"device": "cpu"}},
    ):
        assert len(Personalizer.from_pretrained(folder, **options).encode(["a"]))
    with pytest.raises(MismatchError, match=r"made for the encoder .* and got \(model_type=bert"):
        Personalizer.from_pretrained(folder, encoder=tiny.encoder(seed=1))


def test_a_device_gets_the_encoder_at_its_commit(plug, monkeypatch, tmp_path):
    folder, _ = plug
    config = json.loads((folder / "config.json").read_text()) | {"encoder_revision": "abc123", "encoder": "me/encoder"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = {}

    def load(source, **kwargs):
        asked.update(kwargs, source=source)
        return tiny.encoder()

    monkeypatch.setattr("pplug_hf.modeling.encoders.load_encoder", load)
    Personalizer.from_pretrained(
        tmp_path, encode_only=True, token="t", cache_dir="c", local_files_only=True, encoder_kwargs={"device": "cpu"}
    )
    place = asked["source"]
    assert (place.name, place.revision, place.token, place.cache_dir) == ("me/encoder", "abc123", "t", "c")
    assert place.local_files_only and asked["device"] == "cpu"
    Personalizer.from_pretrained(tmp_path, encoder="other/place", encode_only=True)
    assert asked["source"].name == "other/place" and asked["source"].revision is None
