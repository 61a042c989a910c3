"""What README.md shows works: its Python and its commands run as they stand, on local stand-ins for models of the Hub."""

import importlib
import os
import re
import shlex
import subprocess
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest
import tiny

from pplug_hf import cli
from pplug_hf.configuration.pplug import choices
from pplug_hf.methods.fit_options import options_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ASSETS = files("pplug_hf.demo") / "assets"
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<bot>"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


COMMANDS = [words for block in blocks("bash") for words in commands(block)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("chat"))
    tiny.backbone("qwen3").save_pretrained(folder)
    tokenizer = tiny.tokenizer("qwen3")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_the_python_runs(chat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _client = blocks("python")
    stand_ins = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": chat_model,
        "sentence-transformers/all-MiniLM-L6-v2": str(ASSETS / "encoder"),
    }
    for name, place in stand_ins.items():
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(place))
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    model, config = names["model"], names["model"].config
    assert names["loss"].requires_grad and names["loss"].isfinite()
    assert (tmp_path / "my-plug" / "model.safetensors").is_file() and not model.training
    assert len(names["answer"]) == 1 and isinstance(names["answer"][0], str)
    assert names["weights"].shape == (1, len(names["anna"])) and names["weights"].sum().item() == pytest.approx(1)
    assert names["prefix"].shape == (1, 1 + config.num_persona_tokens, config.hidden_size)
    assert config.chat and names["inputs"]["persona_position"].tolist() == [1 + len(names["question"].split())]


def test_the_commands_on_the_log_run_from_the_first_to_the_last(tmp_path, monkeypatch, capsys):
    """With the demo's models, one epoch and few rows of a bench."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (block,) = [block for block in blocks("bash") if "pplug-hf prepare" in block]
    for words in commands(block):
        if words[0] != "pplug-hf":
            line = next(line for line in block.splitlines() if line.startswith(words[0]))
            subprocess.run(["bash", "-c", line], check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
            continue
        words = [word.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(ASSETS / "backbone")) for word in words[1:]]
        words = [word.replace("sentence-transformers/all-MiniLM-L6-v2", str(ASSETS / "encoder")) for word in words]
        words += {"train": ["--epochs", "0.5"], "bench": ["--rows", "bm25@4", "instruction-only", "pplug"]}.get(
            words[0], []
        )
        words += ["--vectors", "vectors"] if words[0] in ("train", "evaluate", "bench") else []
        assert cli.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "24 labels" in printed and "| row" in printed and "2 items of 64 numbers" in printed
    made = ["shop/task.json", "weights.png", "anna.safetensors", "shop-bench/table.md", "shop-plug/README.md"]
    assert all((tmp_path / name).is_file() for name in made)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c and c[0] == "pplug-hf"], ids=lambda c: " ".join(c[:2]))
def test_the_commands_parse(command, monkeypatch):
    """The command is parsed and its function is not run."""
    module, settings, function, _ = cli._COMMANDS[command[1]]
    module = importlib.import_module(f"pplug_hf.commands.{module}")
    seen = []
    monkeypatch.setattr(cli, "_check_places", lambda values: None)  # the data are not there
    monkeypatch.setattr(module, function, lambda chosen, **plug: seen.append((chosen, plug)))
    assert cli.main(command[1:]) == 0
    ((chosen, plug),) = seen
    own = {f.name for f in fields(options_of(chosen.method))} if command[1] == "fit" else set(choices())
    assert isinstance(chosen, getattr(module, settings)) and set(plug) <= own


def test_the_readme_shows_every_command_but_the_demo():
    assert {c[1] for c in COMMANDS if c and c[0] == "pplug-hf"} == set(cli._COMMANDS) - {"demo"}


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = [c[1] for c in COMMANDS if c and c[0] == "make"]
    assert shown == ["demo", "test"] and all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in shown)


def test_extras_exist():
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    shown = {extra for found in re.findall(r"pip install '\.\[([\w,]+)\]'", README) for extra in found.split(",")}
    assert shown == {"all", "serve", "app"} and "pip install .[" not in README  # zsh wants quotes
    for extra in shown:
        assert re.search(rf"^{extra} =$", setup, re.MULTILINE)


def test_pictures_and_pages_are_there():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", README):
        assert (ROOT / target).exists(), target
