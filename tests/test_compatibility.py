"""A plug outlives the version that made it: fields of other versions, and the answers of a released plug."""

import configparser
import importlib.util
import json
import logging
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close
from safetensors.torch import load_file
from transformers import AutoConfig

import pplug_hf
from pplug_hf import Persona, PPlugConfig, PPlugModel, PPlugProcessor
from pplug_hf.configuration import pplug as module
from pplug_hf.errors import ConfigurationError, DataError

ROOT = Path(__file__).parent.parent
MINE = {"hidden_size": 4, "encoder_size": 3}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the user is told, each message once however often it is given: what `warning_once` remembers is forgotten."""
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(module.logger, "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- there and back ---------------------------------------------------------------------------------------------

names = st.text("aé_ -", min_size=1, max_size=9)
counts = st.integers(1, 2**20)
positive = st.floats(1e-300, 1e300) | st.integers(1, 2**53)
texts = st.text('aé {}"\\\n\0😀', max_size=20)
values = {
    "backbone": st.none() | texts,
    "backbone_revision": st.none()
    | st.from_regex(r"[0-9a-f]{40}", fullmatch=True)
    | st.sampled_from(["main", "refs/pr/3"]),
    "backbone_fingerprint": st.none()
    | st.dictionaries(texts, st.none() | texts | st.integers() | st.booleans(), max_size=3),
    "encoder": st.none() | texts,
    "hidden_size": st.none() | counts,
    "encoder_size": st.none() | counts,
    "embedding_norm": positive,
    "placement": st.sampled_from(["prompt", "answer"]),
    "num_persona_tokens": counts,
    "projector_size": st.none() | counts,
    "instruction": st.booleans(),
    "aggregator": st.sampled_from(["attention", "mean"]),
    "attention_temperature": positive,
    "learn_temperature": st.booleans(),
    "normalize": st.booleans(),
    "train_input_encoder": st.booleans(),
    "query_prompt": texts,
    "history_prompt": texts,
    "item_template": st.none()
    | st.lists(names, max_size=3).map(lambda parts: "{{}}: ".join(f"{{{p}}}" for p in parts)),
    "output_init": positive,
    "is_encoder_decoder": st.booleans(),
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=values))
def test_every_configuration_survives_dictionary_and_json(chosen):
    config = PPlugConfig(**chosen)
    assert all(getattr(config, name) == value for name, value in chosen.items() if name != "projector_size" or value)
    for restored in (
        PPlugConfig.from_dict(config.to_dict()),
        PPlugConfig.from_dict(json.loads(config.to_json_string())),
        PPlugConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert restored.to_dict() == config.to_dict()
        assert json.loads(restored.to_json_string()) == json.loads(config.to_json_string())


def test_every_field_of_a_plug_is_written_out(tmp_path):
    """Whatever a later version's defaults are, a plug says what it was made with."""
    PPlugConfig(**MINE).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    own = {f.name for f in fields(PPlugConfig) if "help" in f.metadata}
    assert own | {"model_type"} <= written.keys()
    assert written["config_version"] == module.CONFIG_VERSION == 1 and written["model_type"] == "pplug"


def test_whole_numbers_are_fine_temperatures():
    config = PPlugConfig(attention_temperature=2, output_init=1, embedding_norm=540)
    assert (config.attention_temperature, config.output_init, config.embedding_norm) == (2.0, 1.0, 540.0)
    assert type(config.attention_temperature) is float
    config.attention_temperature = 3
    assert PPlugConfig.from_dict(json.loads(config.to_json_string())).attention_temperature == 3.0


# ---- values that cannot work ------------------------------------------------------------------------------------

WRONG = [
    ("num_persona_tokens", "4", "num_persona_tokens must be a whole number, got '4'"),
    ("num_persona_tokens", 1.0, "num_persona_tokens must be a whole number, got 1.0"),
    ("num_persona_tokens", True, "num_persona_tokens must be a whole number, got True"),
    ("num_persona_tokens", None, "num_persona_tokens must be a whole number, got None"),
    ("num_persona_tokens", 10**15, "num_persona_tokens must be a whole number of at most 1048576"),
    ("hidden_size", [4], r"hidden_size must be a whole number or nothing, got \[4\]"),
    ("hidden_size", 0, "hidden_size must be a whole number of at least 1, got 0"),
    ("config_version", -1, "config_version must be a whole number of at least 1, got -1"),
    ("instruction", "yes", "instruction must be true or false, got 'yes'"),
    ("instruction", 1, "instruction must be true or false, got 1"),
    ("attention_temperature", "hot", "attention_temperature must be a number, got 'hot'"),
    ("attention_temperature", True, "attention_temperature must be a number, got True"),
    ("attention_temperature", 10**400, "attention_temperature must be a number, got 1000"),
    ("attention_temperature", 10**5000, "attention_temperature must be a number, got a number too long to write"),
    ("attention_temperature", float("nan"), "attention_temperature must be a number greater than 0, got nan"),
    ("query_prompt", None, "query_prompt must be a text, got None"),
    ("query_prompt", ["a"] * 1000, r"query_prompt must be a text, got \['a', .{,100}\.\.\.\."),
    ("backbone", 3, "backbone must be a text or nothing, got 3"),
    ("backbone_fingerprint", "t5", "backbone_fingerprint must be a mapping or nothing, got 't5'"),
    ("aggregator", "a mean", "aggregator must be a name, as in 'attention', got 'a mean'"),
    ("aggregator", "", "aggregator must be a name, as in 'attention', got ''"),
    ("aggregator", "a" * 65, "aggregator must be a name, as in 'attention', got 'aaa"),
    ("aggregator", {}, "aggregator must be a text, got {}"),
    ("is_encoder_decoder", "no", "is_encoder_decoder must be true or false, got 'no'"),
    ("dtype", "float33", "dtype must be one of float32, .*got 'float33'"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", WRONG, ids=lambda v: str(v)[:30] if not isinstance(v, int) else "")
def test_a_value_of_the_wrong_kind_names_field_value_and_what_was_expected(name, value, message):
    with pytest.raises(ConfigurationError, match=message):
        PPlugConfig(**{name: value})
    with pytest.raises(ConfigurationError, match=message):
        PPlugConfig.from_dict({"model_type": "pplug", name: value})
    with pytest.raises(ConfigurationError, match=message):
        setattr(PPlugConfig(), name, value)


def test_a_misspelt_field_names_the_fields():
    with pytest.raises(
        ConfigurationError, match=r"has no field atention_temperature; its fields are .*attention_temper"
    ):
        PPlugConfig(atention_temperature=0.1)


# ---- fields of other versions -----------------------------------------------------------------------------------


def test_unknown_fields_are_warned_about_by_name_once_and_left_out(warnings):
    stored = {
        "model_type": "pplug",
        "num_persona_tokens": 3,
        "a_later_field": 1,
        "num_labels": 10**12,
        "use_cache": False,
    }
    for _ in range(3):
        config = PPlugConfig.from_dict(dict(stored))
    assert config.num_persona_tokens == 3
    (message,) = warnings()
    assert (
        f"pplug-hf {pplug_hf.__version__} does not know and ignores: 'a_later_field', 'num_labels', 'use_cache'."
        in message
    )
    assert not hasattr(config, "a_later_field") and len(config.id2label) < 10
    assert not {"a_later_field", "num_labels", "use_cache"} & (config.to_dict().keys() | config.to_diff_dict().keys())


def test_many_unknown_fields_make_a_short_warning(warnings):
    PPlugConfig.from_dict({f"{'x' * 10**6}{i}\n": 1 for i in range(50)})
    (message,) = warnings()
    assert len(message) < 2000 and "\n" not in message and message.endswith("..., ....")


def test_a_known_configuration_is_read_without_a_word(warnings):
    PPlugConfig.from_dict(PPlugConfig(**MINE).to_dict() | {"auto_map": {"AutoConfig": "x.Y"}})
    assert not warnings()


def test_what_others_set_on_a_configuration_is_not_saved(tmp_path, warnings):
    """The Trainer notes use_cache and special tokens there."""
    config = PPlugConfig(**MINE)
    config.use_cache, config.pad_token_id = False, 3
    config.save_pretrained(tmp_path)
    assert not {"use_cache", "pad_token_id"} & json.loads((tmp_path / "config.json").read_text()).keys()
    PPlugConfig.from_pretrained(tmp_path)
    assert not warnings()


def test_renamed_fields_are_mapped(monkeypatch, warnings):
    monkeypatch.setattr(
        module, "RENAMED", {"temperature_of_attention": "attention_temperature", "k": "num_persona_tokens"}
    )
    old = {"model_type": "pplug", "temperature_of_attention": 0.3, "k": 5}
    config = PPlugConfig.from_dict(old)
    assert (config.attention_temperature, config.num_persona_tokens) == (0.3, 5)
    assert not {"temperature_of_attention", "k"} & config.to_dict().keys() and not warnings()
    assert PPlugConfig.from_dict(old | {"num_persona_tokens": 2}).num_persona_tokens == 2  # today's name wins
    with pytest.raises(ConfigurationError, match="num_persona_tokens must be a whole number, got 'five'"):
        PPlugConfig.from_dict({"k": "five"})


def test_the_renamed_fields_of_this_version_exist():
    assert set(module.RENAMED.values()) <= {f.name for f in fields(PPlugConfig)} and not set(module.RENAMED) & {
        f.name for f in fields(PPlugConfig)
    }


def test_a_plug_without_a_version_is_the_first(warnings):
    old = PPlugConfig(**MINE).to_dict()
    del old["config_version"]
    assert PPlugConfig.from_dict(old).config_version == module.CONFIG_VERSION and not warnings()


def test_a_newer_version_is_warned_about_with_both_versions(warnings):
    config = PPlugConfig.from_dict({"config_version": 7, "num_persona_tokens": 2, "newer": 1})
    newer, unknown = warnings()
    assert f"config_version 7, and pplug-hf {pplug_hf.__version__} knows versions up to 1" in newer
    assert "Update pplug-hf" in newer and "'newer'" in unknown
    assert config.num_persona_tokens == 2
    assert config.config_version == 1  # which is what would be saved again


# ---- keyword names that equal fields ----------------------------------------------------------------------------


def test_keywords_for_other_parts_do_not_leak_into_the_configuration():
    stored = PPlugConfig(**MINE, backbone="a/b", encoder="c/d").to_dict()
    given = {"backbone": object(), "encoder": object(), "dtype": "bfloat16", "hidden_size": 9, "device_map": "auto"}
    config, unused = PPlugConfig.from_dict(
        stored, return_unused_kwargs=True, _from_auto=True, name_or_path="me/plug", num_persona_tokens=3, **given
    )
    assert unused == given
    assert (config.backbone, config.encoder, config.hidden_size, config.dtype) == ("a/b", "c/d", 4, None)
    assert (config.num_persona_tokens, config.name_or_path) == (3, "me/plug")
    json.loads(config.to_json_string(use_diff=False))


def test_auto_config_hands_the_rest_on(tmp_path):
    PPlugConfig(**MINE, backbone="a/b").save_pretrained(tmp_path)
    backbone = tiny.backbone("gpt2")
    config, unused = AutoConfig.from_pretrained(
        tmp_path, backbone=backbone, dtype="float16", attn_implementation="eager", return_unused_kwargs=True
    )
    assert type(config) is PPlugConfig and config.backbone == "a/b"
    assert unused == {"backbone": backbone, "dtype": "float16", "attn_implementation": "eager"}


# ---- the answers of released plugs ------------------------------------------------------------------------------

GOLDEN = [path.parent for path in sorted((Path(__file__).parent / "golden").glob("*/*/asked.json"))]


def golden(folder, plug=None):
    return PPlugModel.from_pretrained(
        plug or folder / "plug", backbone=str(folder / "backbone"), encoder=str(folder.parent / "encoder")
    )


def check_answers(model, folder):
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    answers = load_file(folder / "answers.safetensors")
    persona = {"persona": asked["histories"], "query": asked["queries"]}
    batch = PPlugProcessor.from_pretrained(folder / "plug")(asked["prompts"], **persona)
    assert torch.equal(batch["input_ids"], answers["input_ids"])
    close(model.soft_prompt(**persona), answers["soft_prompt"], 1e-5)
    close(model.persona_weights(**persona), answers["weights"], 1e-5)
    labels = {"labels": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    close(model(**batch, **labels).logits[:, -1], answers["logits"], 1e-4)
    length = asked["max_new_tokens"]
    assert torch.equal(model.generate(**batch, max_new_tokens=length), answers["greedy"])
    assert torch.equal(model.generate(**batch, max_new_tokens=length, num_beams=3), answers["beams"])


def test_there_is_a_golden_plug_of_both_kinds():
    kinds = {json.loads((folder / "plug" / "config.json").read_text()).get("is_encoder_decoder") for folder in GOLDEN}
    assert kinds == {True, None}
    assert sum(path.stat().st_size for path in GOLDEN[0].parent.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_released_plug_answers_as_it_did(folder, warnings, tmp_path):
    model = golden(folder)
    assert not warnings()
    check_answers(model, folder)
    model.save_pretrained(tmp_path / "plug")  # as this version writes it
    check_answers(golden(folder, tmp_path / "plug"), folder)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_released_persona_is_still_understood(folder):
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    persona, model = Persona.from_pretrained(folder / "persona"), golden(folder)
    close(
        model.soft_prompt(persona=persona, query=asked["queries"][0])[0],
        load_file(folder / "answers.safetensors")["soft_prompt"][0],
        1e-5,
    )


def test_a_plug_of_an_older_version_answers_as_it_did(tmp_path, monkeypatch, warnings):
    """A golden plug, as a version would have written it in which a field had another name and versions were unknown."""
    folder = next(folder for folder in GOLDEN if "llama" in folder.name)
    plug = shutil.copytree(folder / "plug", tmp_path / "plug")
    config = json.loads((plug / "config.json").read_text())
    config["tokens_per_persona"] = config.pop("num_persona_tokens")
    del config["config_version"]
    (plug / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="do not fit its configuration"):  # it matters: two tokens are not the default
        golden(folder, plug)
    monkeypatch.setattr(module, "RENAMED", {"tokens_per_persona": "num_persona_tokens"})
    before = len(warnings())
    check_answers(golden(folder, plug), folder)
    assert len(warnings()) == before


# ---- the lowest versions ----------------------------------------------------------------------------------------


def lowest():
    specification = importlib.util.spec_from_file_location("lowest", ROOT / "scripts" / "lowest.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.lowest


def test_lowest_versions_are_read_from_requirements():
    text = """
[options]
install_requires =
    torch>=2.13
    some-name[extra] >= 1.0.post1,<2
    unbounded
[options.extras_require]
eval =
    torch>=2.13
    mine[all,eval]
    other==3
"""
    assert lowest()(text) == {"torch": "2.13", "some-name": "1.0.post1"}
    with pytest.raises(ValueError, match=r"torch has two lower bounds, 2\.13 and 2\.14"):
        lowest()(text.replace("    torch>=2.13\n    mine", "    torch>=2.14\n    mine"))


def test_everything_that_is_needed_has_a_lowest_version():
    """What a user installs: other versions than those that `make test-lowest` tries are not declared."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"]]
    lists += [config["options.extras_require"][extra] for extra in ("train", "eval", "retrieval", "viz")]
    names = {re.match(r"[\w.-]+", line)[0] for line in "\n".join(lists).split("\n") if line.strip()}
    assert names >= {"torch", "transformers", "datasets"}
    assert names <= lowest()((ROOT / "setup.cfg").read_text(encoding="utf-8")).keys()
