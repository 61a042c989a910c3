"""What README.md shows works: its Python runs on local stand-ins, and its commands' options exist."""

import importlib
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest

import pplug_hf
from pplug_hf import cli
from pplug_hf.configuration.pplug import choices

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ASSETS = files("pplug_hf.demo") / "assets"
STAND_INS = {"google/flan-t5-base": str(ASSETS / "backbone"), "BAAI/bge-base-en-v1.5": str(ASSETS / "encoder")}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    for name, place in STAND_INS.items():
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(place))
    _, examples = pplug_hf.read_lamp(ASSETS / "data", "train")
    history = [f"{item['tag']}: {item['text']}" for item in examples[0].history]
    names = {
        "prompts": [e.prompt for e in examples[:3]],
        "histories": [history, history[:2], []],
        "queries": [e.query for e in examples[:3]],
        "targets": [e.target for e in examples[:3]],
        "prompt": examples[0].prompt,
        "history": history,
    }
    exec(compile(code, "README.md", "exec"), names)
    model, config = names["model"], names["model"].config
    assert names["loss"].requires_grad and names["loss"].isfinite()
    assert (tmp_path / "my-plug" / "model.safetensors").is_file() and not model.training
    assert len(names["answer"]) == 1 and isinstance(names["answer"][0], str)
    assert names["weights"].shape == (1, len(history)) and names["weights"].sum().item() == pytest.approx(1)
    assert names["prefix"].shape == (1, 1 + config.num_persona_tokens, config.hidden_size)


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
    assert isinstance(chosen, getattr(module, settings)) and set(plug) <= set(choices())


def test_the_readme_shows_every_command_but_the_demo():
    assert {c[1] for c in COMMANDS if c and c[0] == "pplug-hf"} == set(cli._COMMANDS) - {"demo"}


def test_make_has_the_targets():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    shown = [c[1] for c in COMMANDS if c and c[0] == "make"]
    assert shown == ["demo", "test"] and all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in shown)


def test_extras_exist():
    setup = (Path(__file__).parent.parent / "setup.cfg").read_text(encoding="utf-8")
    for extra in re.findall(r"pip install \.\[(\w+)\]", README):
        assert re.search(rf"^{extra} =$", setup, re.MULTILINE)
