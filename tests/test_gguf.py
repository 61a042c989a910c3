"""A backbone that is one file in the GGUF format: its place is recorded and found again, its tokenizer is in it."""

import hashlib
import json
import os
import shutil
import sys

import pytest
import tiny
import torch
from test_cli import ENCODER, SMALL, quietly, write_data

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.cli import main
from pplug_hf.errors import ConfigurationError, MissingFileError, MissingPackageError
from pplug_hf.modeling.backbone import check_gradients, find_tokenizer, load_backbone, origin
from pplug_hf.storage.location import Location, hub_repository

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'pplug-hf[gguf]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The path of a file, and its weights."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return path, tiny.gguf(path)


@pytest.fixture(scope="module")
def plug(made, places, tmp_path_factory):
    """A plug on a copy of the file, saved, and what it answers."""
    folder = tmp_path_factory.mktemp("plug")
    shutil.copy(made[0], folder / "tiny.gguf")
    model = tiny.from_backbone(str(folder), str(places / "encoder"), backbone_kwargs={"gguf_file": "tiny.gguf"})
    tiny.randomise(model.plug)
    model.save_pretrained(folder / "plug")
    return folder / "plug", answers(model)


def answers(model):
    batch = PPlugProcessor.from_model(model)(text="what is a good film", persona=[tiny.HISTORY])
    return model.generate(**batch, max_new_tokens=5, do_sample=False).tolist()


# ---- loading ----------------------------------------------------------------------------------------------------


def test_the_file_is_loaded_with_its_weights_and_its_tokenizer(made):
    path, weights = made
    backbone = load_backbone(path)
    for name, tensor in weights.items():
        assert torch.equal(tensor, backbone.state_dict()[name]), name
    assert origin(backbone) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    tokenizer = find_tokenizer(backbone)
    assert tokenizer.decode(tokenizer("what is a good film").input_ids) == "what is a good film"
    assert tokenizer.eos_token == "<eos>"
    check_gradients(backbone)


@pytest.mark.parametrize(
    "folder, file", [("models", "tiny.gguf"), ("", "models/tiny.gguf"), ("models/tiny.gguf", None)]
)
def test_the_place_may_be_said_in_several_ways(made, tmp_path, monkeypatch, folder, file):
    (tmp_path / "models").mkdir()
    shutil.copy(made[0], tmp_path / "models")
    tiny.gguf(tmp_path / "tiny.gguf", seed=1)  # another one of that name, in the working directory
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone(folder or ".", gguf_file=file)
    assert origin(backbone)[0] == os.path.join("models", "tiny.gguf")
    assert torch.equal(backbone.model.norm.weight, made[1]["model.norm.weight"])
    assert find_tokenizer(backbone, gguf_file=file) is not None


def test_arguments_reach_the_loader(made):
    backbone = load_backbone(made[0], dtype="bfloat16", attn_implementation="eager")
    assert backbone.dtype == torch.bfloat16 and backbone.config._attn_implementation == "eager"


def test_weights_are_unpacked(made, monkeypatch):
    """Packed ones would need kernels, which are code of a repository."""
    from transformers import AutoModelForCausalLM

    passed = {}
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: passed.update(k) or load(*a, **k))
    load_backbone(made[0])
    assert passed["quantization_config"].dequantize


def test_a_model_that_the_user_loaded_says_its_file(made):
    from transformers import AutoModelForCausalLM

    path = made[0]
    backbone = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert origin(backbone) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    assert find_tokenizer(backbone) is not None


# ---- plugs ------------------------------------------------------------------------------------------------------


def test_a_plug_finds_the_file_again(plug, tmp_path, monkeypatch, caplog):
    folder, before = plug
    monkeypatch.chdir(tmp_path)
    model = PPlugModel.from_pretrained(folder)
    file = folder.parent / "tiny.gguf"
    assert model.config.backbone == str(file)
    assert model.config.backbone_revision == hashlib.sha256(file.read_bytes()).hexdigest()
    assert answers(model) == before
    assert "was trained on the backbone" not in caplog.text


def test_a_changed_file_is_told_of(plug, tmp_path, caplog):
    folder, _ = plug
    shutil.copytree(folder, tmp_path / "plug")
    tiny.gguf(tmp_path / "tiny.gguf", seed=1)
    settings = json.loads((tmp_path / "plug" / "config.json").read_text())
    settings["backbone"] = str(tmp_path / "tiny.gguf")
    (tmp_path / "plug" / "config.json").write_text(json.dumps(settings))
    PPlugModel.from_pretrained(tmp_path / "plug")
    assert "was trained on the backbone" in caplog.text and settings["backbone_revision"] in caplog.text


def test_a_file_that_is_gone(plug, tmp_path):
    with pytest.raises(MissingFileError, match=r"backbone '.*other\.gguf': there is no such file, or pass backbone="):
        PPlugModel.from_pretrained(plug[0], gguf_file="other.gguf")


def test_commands_take_the_path_of_the_file(plug, made, capsys, caplog):
    prompt = ["--prompt", "what is a good film", "--max_new_tokens", "3"]
    main(["generate", "--plug", str(plug[0]), "--backbone", str(made[0]), *prompt])
    printed = capsys.readouterr().out
    main(["generate", "--plug", str(plug[0]), *prompt])
    assert capsys.readouterr().out == printed != "\n"
    assert "was trained on the backbone" not in caplog.text  # a copy elsewhere is the same file


def test_training_and_evaluating_on_a_file(made, tmp_path):
    write_data(tmp_path / "data")
    data = ["--data", tmp_path / "data", "--vectors", tmp_path / "vectors", "--backbone", made[0]]
    quietly("train", *data, *SMALL, "--encoder", ENCODER, "--output", tmp_path / "plug")
    assert json.loads((tmp_path / "plug" / "config.json").read_text())["backbone"] == str(made[0])
    assert "PPlug" in quietly("evaluate", *data, "--plug", tmp_path / "plug")


# ---- what is not a backbone ----------------------------------------------------------------------------------------


def test_a_file_that_is_no_language_model(tmp_path):
    tiny.gguf(tmp_path / "clip.gguf", architecture="clip")
    with pytest.raises(ConfigurationError, match=r"The backbone '.*clip\.gguf' .*clip"):
        load_backbone(tmp_path / "clip.gguf")


@pytest.mark.parametrize("kept", [0, 10, 3000, 20000])
def test_a_file_that_is_damaged(made, tmp_path, kept):
    (tmp_path / "cut.gguf").write_bytes(made[0].read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match=r"The backbone '.*cut\.gguf' "):
        load_backbone(tmp_path / "cut.gguf")


def test_a_file_without_a_tokenizer(places, tmp_path):
    tiny.gguf(tmp_path / "bare.gguf", words=False)
    model = tiny.from_backbone(str(tmp_path / "bare.gguf"), str(places / "encoder"))
    with pytest.raises(ConfigurationError, match=r"No tokenizer was found beside the backbone '.*bare\.gguf'.*: pass"):
        PPlugProcessor.from_model(model)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package(made, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"needs {package}; install it with: pip install 'pplug-hf\[gguf\]'"
    ):
        load_backbone(made[0])


# ---- the Hub ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, repository",
    [
        ("me/model/x.gguf", "me/model"),
        ("me/model/q4/x.gguf", "me/model"),
        ("me/model", "me/model"),
        ("me/model.gguf", "me/model.gguf"),
        ("gpt2", "gpt2"),
        ("/me/model/x.gguf", None),
        ("me/model/inner/folder", "me/model"),
        ("../model/x.gguf", None),
        ("x.gguf", None),
        (None, None),
    ],
)
def test_the_repository_of_a_name(name, repository):
    assert hub_repository(name, "backbone") == repository


@pytest.mark.parametrize("name", ["me/model/../../etc/x.gguf", "me/model//etc/x.gguf", "me/model/..\\x.gguf"])
def test_a_name_that_leads_out_of_the_repository(name):
    with pytest.raises(ConfigurationError, match="gguf_file must lie inside the backbone"):
        Location(name, kind="backbone")
