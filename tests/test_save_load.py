"""A plug is a small folder; what is loaded from it is what was saved, or an error says why not."""

import errno
import json
import os
import pydoc
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock
from reference import close
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from pplug_hf import PPlugConfig, PPlugForConditionalGeneration, PPlugModel, PPlugProcessor
from pplug_hf.commands.train import check_output
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError
from pplug_hf.modeling import backbone, encoders
from pplug_hf.storage.files import locked
from pplug_hf.storage.replace import replacing

ASKED = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS}
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def made(places, family="gpt2", **choices):
    """A plug on parts that were loaded from folders, as a user makes it."""
    model = tiny.from_backbone(str(places / family), str(places / "encoder"), **choices)
    tiny.randomise(model.plug)
    return model


@pytest.fixture(scope="module")
def saved(places, tmp_path_factory):
    """A saved plug on GPT-2. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("saved") / "plug"
    made(places).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "plug")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same_answers(one, two):
    assert torch.equal(one.soft_prompt(**ASKED), two.soft_prompt(**ASKED))
    batch = PPlugProcessor.from_model(one)(tiny.PROMPTS, **ASKED)
    assert torch.equal(one.generate(**batch, max_new_tokens=6), two.generate(**batch, max_new_tokens=6))


# ---- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, choices",
    [
        *[(family, {}) for family in tiny.FAMILIES],
        ("gpt2", {"num_persona_tokens": 4, "instruction": False, "projector_size": 5, "learn_temperature": True}),
        ("t5", {"aggregator": "mean", "normalize": False}),
        ("llama", {"train_input_encoder": False, "query_prompt": "what is ", "history_prompt": "a film about "}),
    ],
    ids=str,
)
def test_a_loaded_plug_answers_as_the_saved_one(family, choices, places, tmp_path):
    model = made(places, family, **choices)
    model.save_pretrained(tmp_path / "plug")
    assert set(contents(tmp_path / "plug")) >= FILES and not (tmp_path / "plug" / "adapter_config.json").exists()
    weights = load_file(tmp_path / "plug" / "model.safetensors")
    assert set(weights) == {name for name, p in model.named_parameters() if p.requires_grad}
    loaded = PPlugModel.from_pretrained(tmp_path / "plug")
    assert type(loaded) is PPlugForConditionalGeneration and not loaded.training
    same_answers(model, loaded)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    backbone, encoder = tiny.backbone(family), tiny.encoder()
    loaded = PPlugModel.from_pretrained(str(tmp_path / "plug"), backbone=backbone, encoder=encoder)
    assert loaded.backbone is backbone and loaded.history_encoder is encoder
    same_answers(model, loaded)


def test_the_files_stay_small(places, tmp_path):
    made(places).save_pretrained(tmp_path / "paper")
    made(places, train_input_encoder=False).save_pretrained(tmp_path / "frozen")
    made(places, aggregator="mean").save_pretrained(tmp_path / "mean")
    names = {kind: set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("paper", "frozen", "mean")}
    assert any("input_encoder" in name for name in names["paper"])
    assert (
        names["frozen"]
        == names["mean"]
        == {
            "plug.instruction",
            "plug.no_persona",
            "plug.projector.hidden.weight",
            "plug.projector.hidden.bias",
            "plug.projector.output.weight",
            "plug.projector.output.bias",
        }
    )


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    PPlugModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(saved)["model.safetensors"]
    assert json.loads(contents(tmp_path / "again")["config.json"]) == json.loads(contents(saved)["config.json"])


def test_saving_over_an_old_plug_replaces_it(places, copy):
    model = made(places, num_persona_tokens=3)
    model.save_pretrained(copy)
    same_answers(model, PPlugModel.from_pretrained(copy))


def test_the_order_of_tensors_does_not_matter(copy, saved):
    weights = load_file(copy / "model.safetensors")
    save_file({name: weights[name] for name in reversed(weights)}, copy / "model.safetensors", {"format": "pt"})
    same_answers(PPlugModel.from_pretrained(copy), PPlugModel.from_pretrained(saved))


def test_the_generation_configuration_is_part_of_a_plug(places, tmp_path):
    model = made(places)
    model.generation_config.update(max_new_tokens=7, num_beams=3)
    assert model.backbone.generation_config.max_new_tokens is None
    model.save_pretrained(tmp_path / "plug")
    loaded = PPlugModel.from_pretrained(tmp_path / "plug")
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.num_beams) == (7, 3)
    assert loaded.backbone.generation_config.max_new_tokens is None
    same_answers(model, loaded)


def test_arguments_reach_the_backbone_and_the_encoder(saved):
    loaded = PPlugModel.from_pretrained(
        saved, dtype="bfloat16", attn_implementation="eager", encoder_kwargs={"model_kwargs": {"dtype": "bfloat16"}}
    )
    assert loaded.backbone.dtype == torch.bfloat16 and loaded.backbone.config._attn_implementation == "eager"
    assert next(loaded.history_encoder.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in loaded.plug.parameters()} == {torch.float32}


def test_a_plug_finds_a_backbone_and_an_encoder_in_a_subfolder_again(places, tmp_path, caplog):
    for part, others in (("llama", "gpt2"), ("encoder", "t5")):  # in the root is something else
        shutil.copytree(places / others, tmp_path / part)
        shutil.copytree(places / part, tmp_path / part / "inner")
    parts = str(tmp_path / "llama"), str(tmp_path / "encoder")
    inner = {"subfolder": "inner"}
    model = tiny.from_backbone(*parts, backbone_kwargs=inner, encoder_kwargs=inner)
    tiny.randomise(model.plug)
    assert model.config.backbone == str(tmp_path / "llama" / "inner") and model.tokenizer is not None
    model.save_pretrained(tmp_path / "plug")
    same_answers(model, PPlugModel.from_pretrained(tmp_path / "plug"))
    given = {"backbone_kwargs": inner, "encoder_kwargs": inner}
    same_answers(model, PPlugModel.from_pretrained(tmp_path / "plug", backbone=parts[0], encoder=parts[1], **given))
    assert not caplog.records


def test_only_the_main_process_writes(saved, tmp_path):
    PPlugModel.from_pretrained(saved).save_pretrained(tmp_path / "plug", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_frozen_weights_in_a_given_state_dict_are_left_out(saved, tmp_path):
    model = PPlugModel.from_pretrained(saved)
    everything = model.state_dict() | {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    model.save_pretrained(tmp_path / "plug", state_dict=everything)
    assert contents(tmp_path / "plug")["model.safetensors"] == contents(saved)["model.safetensors"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_weights_may_have_the_names_of_a_wrapper(saved, tmp_path, prefix):
    model = PPlugModel.from_pretrained(saved)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plug", state_dict=state)
    assert contents(tmp_path / "plug")["model.safetensors"] == contents(saved)["model.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {f"wrapped.{key}": value for key, value in state.items()}, "lacks"),
        (lambda state: dict(list(state.items())[1:]), "lacks 1 of the plug's"),
        (lambda state: state | {"plug.more": torch.zeros(1)}, "has 1 weights that this plug has not .first plug.more"),
    ],
)
def test_a_state_dict_that_is_not_the_plugs_is_refused(copy, change, message):
    model, before = PPlugModel.from_pretrained(copy), contents(copy)
    with pytest.raises(DataError, match=message):
        model.save_pretrained(copy, state_dict=change(model.state_dict()))
    assert contents(copy) == before


def test_a_new_configuration_never_stands_beside_old_weights(copy):
    """As the Trainer saves a model whose weights DeepSpeed keeps in files of its own."""
    PPlugModel.from_pretrained(copy).save_pretrained(copy, state_dict={})
    assert {path.name for path in copy.iterdir()} == FILES - {"model.safetensors"}


def test_a_fresh_process_gives_the_same_answers(places, tmp_path, monkeypatch):
    """From another working directory than the one in which relative names were given."""
    monkeypatch.chdir(places)
    model = tiny.from_backbone("gpt2", encoder="encoder")
    tiny.randomise(model.plug)
    model.save_pretrained(tmp_path / "plug")
    expected = model.generate(torch.tensor([[9, 10]]), persona=tiny.HISTORY, query="the sea", max_new_tokens=8)
    code = (
        "import sys, torch; from pplug_hf import PPlugModel; model = PPlugModel.from_pretrained(sys.argv[1]);"
        "ids = torch.tensor([[9, 10]]); asked = {'persona': sys.argv[2:], 'query': 'the sea'};"
        "print(model.generate(ids, **asked, max_new_tokens=8).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "plug"), *tiny.HISTORY]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.strip().splitlines()[-1]) == expected.tolist()


# ---- state dicts ------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel and others wrap a model, with something of its own beside it."""

    def __init__(self, module):
        super().__init__()
        self.first = torch.nn.Linear(2, 2)
        self.module = module
        self.last = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_the_plug_and_loads_strictly(prefix):
    one, two = tiny.model("gpt2", seed=0), tiny.model("gpt2", seed=1)
    assert not torch.equal(one.soft_prompt(**ASKED), two.soft_prompt(**ASKED))
    wrapped, other = (Wrapper(one), Wrapper(two)) if prefix else (one, two)
    state = wrapped.state_dict()
    plug = {name for name, p in one.named_parameters() if p.requires_grad}
    assert {name for name in state if "plug" in name} == {prefix + name for name in plug}
    assert len(state) == len(plug) + (4 if prefix else 0)  # the wrapper's own parameters stay
    result = other.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    same_answers(one, two)


@pytest.mark.parametrize("missing", ["module.plug.no_persona", "first.bias", "last.bias"])
def test_strict_loading_still_misses_what_is_missing(missing):
    wrapped = Wrapper(tiny.model("gpt2"))
    state = wrapped.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=missing):
        wrapped.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="surprise"):
        wrapped.load_state_dict(wrapped.state_dict() | {"surprise": torch.zeros(1)}, strict=True)


# ---- not what it should be --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file(copy, share):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"model.safetensors of .*plug' is truncated or damaged.*download or save"):
        PPlugModel.from_pretrained(copy)


def nan(weights):
    weights["plug.projector.hidden.weight"][0, 0] = float("nan")


def infinite(weights):
    weights["plug.instruction"][0] = float("inf")


def one_missing(weights):
    del weights["plug.projector.output.bias"]


def one_too_many(weights):
    weights["plug.surprise"] = torch.zeros(1)


def other_shape(weights):
    weights["plug.instruction"] = torch.zeros(17)


@pytest.mark.parametrize(
    "damage, message",
    [
        (nan, "NaN or infinity in plug.projector.hidden.weight"),
        (infinite, "NaN or infinity in plug.instruction"),
        (one_missing, r"1 missing \(first \['plug.projector.output.bias'\]\), 0 unexpected"),
        (one_too_many, r"0 missing .*1 unexpected \(first \['plug.surprise'\]\)"),
        (other_shape, r"plug.instruction is \[17\], expected \[16\]"),
    ],
)
def test_weights_that_cannot_be_right(copy, damage, message):
    weights = load_file(copy / "model.safetensors")
    damage(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=message):
        PPlugModel.from_pretrained(copy)


def test_weights_of_another_configuration(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_persona_tokens": 2}))
    with pytest.raises(DataError, match=r"do not fit its configuration: plug\.no_persona is"):
        PPlugModel.from_pretrained(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\x00"])
def test_a_damaged_configuration(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config.json of .* is damaged"):
        PPlugModel.from_pretrained(copy)


def test_values_that_cannot_work(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"aggregator": "median"}))
    with pytest.raises(ConfigurationError, match="aggregator must be one of"):
        PPlugModel.from_pretrained(copy)


def test_a_configuration_from_another_folder(copy, places, tmp_path):
    settings = json.loads((copy / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings | {"system": "Be brief."}))
    assert PPlugModel.from_pretrained(copy, config=tmp_path / "other").config.system == "Be brief."
    with pytest.raises(ConfigurationError, match="is a model of type 'gpt2', not a plug"):
        PPlugModel.from_pretrained(copy, config=places / "gpt2")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(MissingFileError, match=f"Cannot load {name} of the plug"):
        PPlugModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["nobody/no-such-plug", "no-such-plug", "./no/such/folder", "/no/such/folder"])
def test_unknown_names_give_one_clear_error(name):
    with pytest.raises(MissingFileError, match=r"Cannot load config\.json of the plug") as error:
        PPlugModel.from_pretrained(name)
    remedy = (
        "it is not a Hub id (owner/name). Check the path" if name[0] in "./" else "HF_HUB_OFFLINE is set. Unset it"
    )
    assert name in str(error.value) and "no such folder" in str(error.value) and remedy in str(error.value)


@pytest.mark.parametrize("part", ["backbone", "encoder"])
def test_a_part_that_is_gone(copy, part):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {part: "nobody/gone"}))
    with pytest.raises(MissingFileError, match=f"Cannot load the (sentence )?{part} 'nobody/gone'.*pass {part}="):
        PPlugModel.from_pretrained(copy)
    (copy / "config.json").write_text(json.dumps(config | {part: None}))
    with pytest.raises(ConfigurationError, match=f"does not say where its {part} is: pass {part}="):
        PPlugModel.from_pretrained(copy)
    given = {"backbone": tiny.backbone("gpt2"), "encoder": tiny.encoder()}[part]
    assert PPlugModel.from_pretrained(copy, **{part: given})


def test_a_plug_is_no_language_model_and_a_language_model_is_no_plug(saved, places):
    with pytest.raises(ConfigurationError, match=r"model of type 'gpt2', not a plug. .*from_backbone"):
        PPlugModel.from_pretrained(places / "gpt2")
    with pytest.raises(ConfigurationError, match="is of type 'pplug'"):
        tiny.from_backbone(str(saved), tiny.encoder())


# ---- another backbone, another encoder --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_another_backbone_is_refused(saved, family):
    with pytest.raises(MismatchError, match=rf"made for the backbone .*model_type=gpt2.*got .*model_type={family}"):
        PPlugModel.from_pretrained(saved, backbone=tiny.backbone(family))


def test_a_backbone_with_another_vocabulary_is_refused(saved):
    backbone = tiny.backbone("gpt2")
    backbone.resize_token_embeddings(90)
    with pytest.raises(MismatchError, match=r"vocab_size=67.*vocab_size=90"):
        PPlugModel.from_pretrained(saved, backbone=backbone)


def test_a_finetuned_backbone_of_the_same_shape_fits_and_is_told_of(saved, places, tmp_path, caplog):
    same = PPlugModel.from_pretrained(saved).backbone
    PPlugModel.from_pretrained(saved, backbone=same)
    assert "was trained on" not in caplog.text
    assert PPlugModel.from_pretrained(saved, backbone=tiny.backbone("gpt2", seed=1))  # which has no name
    tiny.backbone("gpt2", seed=1).save_pretrained(tmp_path / "tuned")
    PPlugModel.from_pretrained(saved, backbone=tmp_path / "tuned")
    assert f"was trained on the backbone {places / 'gpt2'} at None and is put on {tmp_path / 'tuned'}" in caplog.text


@pytest.mark.parametrize(
    "other, message",
    [
        ({"width": 8}, "embedding_size=12.*embedding_size=8"),
        ({"seed": 1}, "digest="),
        ({"pooling": "mean"}, "digest="),
    ],
    ids=str,
)
def test_another_encoder_is_refused(saved, places, other, message):
    with pytest.raises(MismatchError, match=f"made for the encoder '{places / 'encoder'}' .*{message}"):
        PPlugModel.from_pretrained(saved, encoder=tiny.encoder(**other))


def test_the_same_encoder_loaded_in_half_precision_fits(saved, places):
    encoder = SentenceTransformer(str(places / "encoder"), model_kwargs={"dtype": "bfloat16"})
    loaded = PPlugModel.from_pretrained(saved, encoder=encoder)
    close(loaded.soft_prompt(**ASKED), PPlugModel.from_pretrained(saved).soft_prompt(**ASKED), 0.1)


# ---- whole or not at all ----------------------------------------------------------------------------------------


def test_another_models_folder_is_not_overwritten(saved, places, tmp_path):
    other = shutil.copytree(places / "gpt2", tmp_path / "gpt2")
    before = contents(other)
    with pytest.raises(ConfigurationError, match="holds a model of type 'gpt2', not a plug"):
        PPlugModel.from_pretrained(saved).save_pretrained(other)
    (other / "config.json").unlink()
    with pytest.raises(ConfigurationError, match="holds weights that are not a plug"):
        PPlugModel.from_pretrained(saved).save_pretrained(other)
    assert contents(other) == {name: data for name, data in before.items() if name != "config.json"}
    with pytest.raises(ConfigurationError, match="is a file"):
        PPlugModel.from_pretrained(saved).save_pretrained(other / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_a_folder_with_other_files_keeps_them(saved, tmp_path):
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug" / "notes.txt").write_text("mine")
    PPlugModel.from_pretrained(saved).save_pretrained(tmp_path / "plug")
    assert set(contents(tmp_path / "plug")) == {*contents(saved), "notes.txt"}


@pytest.mark.parametrize("where", ["tokenizer", "weights", "last step"])
def test_a_failed_save_leaves_the_old_plug_whole_and_nothing_else(copy, where, monkeypatch):
    model, before = PPlugModel.from_pretrained(copy), contents(copy)
    with torch.no_grad():
        model.plug.instruction += 1

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if where == "tokenizer":
        monkeypatch.setattr(model.tokenizer, "save_pretrained", fail)
    elif where == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    for folder in (copy, copy.parent / "new"):
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(folder)
    assert contents(copy) == before and len(list(copy.iterdir())) == len(before)
    assert [path.name for path in copy.parent.iterdir()] == ["plug"]  # no staging folder is left


STEPS = ["transformers.modeling_utils.safe_save_file", "pathlib.Path.rename", "os.replace", "shutil.rmtree"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where, call", [*((step, 0) for step in STEPS), *(("os.replace", n) for n in range(1, 5))])
def test_a_killed_save_leaves_the_old_plug_or_the_new_one(places, copy, where, call, monkeypatch):
    """At whichever step: one that had the new configuration and the old weights would not load."""
    old, new = PPlugModel.from_pretrained(copy), made(places, num_persona_tokens=3)
    step, calls = pydoc.locate(where), []

    def kill(*args, **kwargs):
        calls.append(where)
        return step(*args, **kwargs) if len(calls) <= call else os._exit(9)

    PPlugProcessor(old.tokenizer, placement="prompt", system="old").save_pretrained(copy)
    (copy / "special_tokens_map.json").write_text("{}")  # of an older vocabulary
    if (child := os.fork()) == 0:
        monkeypatch.setattr(where, kill)
        new.save_pretrained(copy)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    is_old = where in STEPS[:2]
    elsewhere = shutil.copytree(copy, copy.parent / "elsewhere")  # a killed save survives being copied
    same_answers(PPlugModel.from_pretrained(elsewhere), old if is_old else new)
    assert (elsewhere / "special_tokens_map.json").exists() == is_old
    assert PPlugProcessor.from_pretrained(elsewhere).system == ("old" if is_old else None)
    old.save_pretrained(copy)
    same_answers(PPlugModel.from_pretrained(copy), old)
    assert set(contents(copy)) - {"special_tokens_map.json"} == FILES
    assert not [path for path in (*copy.iterdir(), *elsewhere.iterdir()) if path.is_dir() and "saved" in path.name]


def test_a_processor_saved_with_the_old_plug_does_not_outlive_it(copy, places):
    for placement in ("prompt", "answer"):
        model = made(places, placement=placement)
        model.save_pretrained(copy)
        assert PPlugProcessor.from_pretrained(copy).placement == placement
        PPlugProcessor.from_model(model).save_pretrained(copy)
        assert PPlugProcessor.from_pretrained(copy).placement == placement


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["tokenizer", "processor", *range(3)])
def test_a_killed_save_of_a_processor_leaves_the_old_files_or_the_new_ones(places, copy, moment, monkeypatch):
    model, new = PPlugModel.from_pretrained(copy), made(places)
    PPlugProcessor(model.tokenizer, system="old").save_pretrained(copy)
    new.tokenizer.add_tokens(["sailor"])
    processor, replace, calls = PPlugProcessor(new.tokenizer, system="new"), os.replace, []

    def kill(*args, **kwargs):
        calls.append(args)
        return replace(*args, **kwargs) if moment in range(len(calls), 4) else os._exit(9)

    def kill_while_writing(folder, *args, **kwargs):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_text("{")
        os._exit(9)

    if (child := os.fork()) == 0:
        if moment == "tokenizer":
            monkeypatch.setattr(type(new.tokenizer), "save_pretrained", lambda self, *args: kill_while_writing(*args))
        elif moment == "processor":
            monkeypatch.setattr(PPlugProcessor, "to_json_file", kill)
        else:
            monkeypatch.setattr(os, "replace", kill)
        processor.save_pretrained(copy)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    is_old = moment in ("tokenizer", "processor")
    same_answers(PPlugModel.from_pretrained(copy), model)
    loaded = PPlugProcessor.from_pretrained(copy)
    assert loaded.system == ("old" if is_old else "new")
    assert ("sailor" in loaded.tokenizer.get_vocab()) != is_old


def test_a_processor_is_saved_as_transformers_saves_one(copy, places, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(PPlugProcessor, "push_to_hub", lambda self, *args, **options: pushed.append((args, options)))
    processor = PPlugProcessor.from_model(made(places))
    processor.chat_template = processor.tokenizer.chat_template = {"default": "a", "tools": "b"}
    for folder in (tmp_path / "alone", str(copy)):
        assert processor.save_pretrained(folder) == [os.path.join(folder, "processor_config.json")] and not pushed
        loaded = PPlugProcessor.from_pretrained(folder)
        assert loaded.chat_template == loaded.tokenizer.chat_template == {"default": "a", "tools": "b"}
        assert all(path.is_file() for path in Path(folder).iterdir())
    processor.save_pretrained(tmp_path / "alone", push_to_hub=True, private=True)
    processor.save_pretrained(tmp_path / "alone", push_to_hub=True, repo_id="me/words")
    assert pushed == [(("alone",), {"private": True}), (("me/words",), {})]
    with pytest.raises(ConfigurationError, match="not a plug"):
        processor.save_pretrained(places / "gpt2")


def test_saves_at_the_same_time_wait_for_each_other(copy):
    inside, leave, second = threading.Event(), threading.Event(), threading.Event()

    def save(text, entered, wait):
        with replacing(copy) as staging:
            entered.set()
            for name in ("config.json", "tokenizer_config.json"):
                Path(staging, name).write_text(text)
                wait.wait(10)

    first = threading.Thread(target=save, args=('{"model_type": "pplug", "n": 1}', inside, leave))
    later = threading.Thread(target=save, args=('{"model_type": "pplug", "n": 2}', second, leave))
    first.start()
    assert inside.wait(10)
    later.start()
    assert not second.wait(0.3)
    leave.set()
    first.join()
    later.join()
    assert {json.loads((copy / name).read_text())["n"] for name in ("config.json", "tokenizer_config.json")} == {2}
    assert not list(copy.glob(".pplug*"))


def test_a_save_waits_for_a_lock_that_another_program_holds(saved, copy):
    """A lock file that every system and every version of filelock knows, not a lock of the folder itself."""
    model, done = PPlugModel.from_pretrained(saved), threading.Event()
    later = threading.Thread(target=lambda: (model.save_pretrained(copy), done.set()))
    with FileLock(copy / ".pplug-lock"):
        later.start()
        assert not done.wait(0.3)
        assert PPlugModel.from_pretrained(copy)  # a reader does not wait
    later.join()
    assert done.is_set() and set(contents(copy)) == FILES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_holds_no_lock_and_its_lock_file_disturbs_nobody(saved, tmp_path):
    folder = tmp_path / "plug"
    if (child := os.fork()) == 0:
        try:
            with replacing(folder):
                os._exit(9)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (folder / ".pplug-lock").exists()
    check_output(folder)  # as good as empty
    PPlugModel.from_pretrained(saved).save_pretrained(folder)
    assert set(contents(folder)) == FILES and len(list(folder.iterdir())) == len(FILES)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_writer_at_a_time_and_no_lock_file_afterwards(tmp_path):
    """Although the lock file goes with every release: four processes count, and none overwrites another's number."""
    count, children = tmp_path / "count", []
    count.write_text("0")
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                for _ in range(40):
                    with locked(tmp_path):
                        count.write_text(str(int(count.read_text()) + 1))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert count.read_text() == "160" and list(tmp_path.iterdir()) == [count]


def test_where_there_are_no_locks_nobody_waits(saved, copy, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    PPlugModel.from_pretrained(saved).save_pretrained(copy)
    assert set(contents(copy)) == FILES


def test_the_lock_file_leads_nowhere(saved, copy, tmp_path):
    (copy / ".pplug-lock").symlink_to(tmp_path / "elsewhere")
    PPlugModel.from_pretrained(saved).save_pretrained(copy)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("moment", ["load_encoder", "load_backbone"])
def test_a_plug_that_is_saved_while_it_is_loaded_is_no_mixture(places, copy, moment, monkeypatch):
    """Same sizes, other settings and weights: nothing else would tell."""
    other = made(places, item_template="{text}")
    module = encoders if moment == "load_encoder" else backbone
    load = getattr(module, moment)

    def save_meanwhile(*args, **kwargs):
        other.save_pretrained(copy)
        return load(*args, **kwargs)

    monkeypatch.setattr(module, moment, save_meanwhile)
    with pytest.raises(DataError, match="saved anew while it was being read: load it again"):
        PPlugModel.from_pretrained(copy)
    monkeypatch.undo()
    assert PPlugModel.from_pretrained(copy).config.item_template == "{text}"


def test_a_killed_save_that_cannot_be_completed_says_so(copy):
    saved = copy / ".pplug-saved"
    saved.mkdir()
    for names in ('["../outside"]', '["/outside"]', "{"):
        (saved / ".names").write_text(names)
        with pytest.raises(DataError, match=r"pplug-saved' (is damaged|names .* leads out).*remove it"):
            PPlugModel.from_pretrained(copy)


# ---- the front door ---------------------------------------------------------------------------------------------


def test_the_front_door_only_loads():
    with pytest.raises(ConfigurationError, match=r"from_pretrained.*from_backbone"):
        PPlugModel()


def test_a_bare_configuration_makes_no_model():
    with pytest.raises(ConfigurationError, match="knows no hidden_size and encoder_size"):
        PPlugForConditionalGeneration(PPlugConfig())
    bare = PPlugForConditionalGeneration(PPlugConfig(hidden_size=4, encoder_size=4))
    for call in (bare, bare.generate):
        with pytest.raises(ConfigurationError, match="has no backbone yet"):
            call(torch.tensor([[1]]))
    with pytest.raises(ConfigurationError, match="has no sentence encoder yet"):
        bare.encode_persona(["sea"])
