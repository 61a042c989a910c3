"""What the guides show works: their Python runs on local stand-ins, and their commands are ones that exist."""

import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
from hub_server import Hub
from test_cli import as_movies, movie_tag, write_data

from pplug_hf import PPlugForConditionalGeneration, cli
from pplug_hf.methods.names import METHODS
from pplug_hf.modeling.aggregators import AGGREGATORS
from pplug_hf.tasks.metrics import METRICS
from pplug_hf.tasks.recipes import RECIPES
from pplug_hf.tasks.task import TASKS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
ASSETS = files("pplug_hf.demo") / "assets"
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<bot>"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Names on the Hub -> folders of models small enough for a test."""
    chat = tmp_path_factory.mktemp("chat")
    tiny.backbone("qwen3").save_pretrained(chat)
    tokenizer = tiny.tokenizer("qwen3")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chat)
    plug = tmp_path_factory.mktemp("plug") / "plug"
    demo = {"backbone": str(ASSETS / "backbone"), "encoder": str(ASSETS / "encoder")}
    PPlugForConditionalGeneration.from_backbone(**demo, item_template="{tag}: {text}").save_pretrained(plug)
    return {
        "demo-output/plug": str(plug),
        "google/flan-t5-base": str(ASSETS / "backbone"),
        "BAAI/bge-base-en-v1.5": str(ASSETS / "encoder"),
        "sentence-transformers/all-MiniLM-L6-v2": str(ASSETS / "encoder"),
        "Qwen/Qwen3-0.6B": str(chat),
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(chat),
    }


@pytest.fixture(autouse=True)
def registries():
    """Keep from other tests what the guides register."""
    known = [AGGREGATORS, METHODS, METRICS, RECIPES, TASKS]
    before = [dict(registry) for registry in known]
    yield
    for registry, entries in zip(known, before, strict=True):
        registry.clear()
        registry.update(entries)


def blocks(page, language):
    """The code of a page, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


SHARE = ROOT / "docs" / "share.md"
PYTHON = [page for page in PAGES if blocks(page, "python") and page != SHARE]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "LaMP_2", "LaMP_2", as_movies, movie_tag)
    names = {}
    for code in blocks(page, "python"):
        for name, place in stand_ins.items():
            code = code.replace(f'"{name}"', repr(place))
        exec(compile(code, str(page), "exec"), names)


def test_the_python_about_the_hub_runs_against_one(stand_ins, tmp_path):
    """As it stands, in a process that takes a server on this machine for the Hub."""
    with Hub({"hf_mine": "me"}) as hub:
        for name, place in stand_ins.items():
            hub.repo(name).add(Path(place))
        code = "\n".join(blocks(SHARE, "python"))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=hub.environment("hf_mine", tmp_path / "home"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made = hub.repos["me/pplug-flan-t5-base-lamp2"]
        assert made.private and {"config.json", "model.safetensors", "README.md"} <= {*made.files()}, done.stderr


COMMANDS = [(page, words) for page in PAGES for words in commands(page) if words[0] == "pplug-hf"]


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda part: getattr(part, "stem", None) or part[1])
def test_the_commands_of_a_page_parse(page, words, monkeypatch):
    """The command is parsed and its function is not run."""
    module, _, function, _ = cli._COMMANDS[words[1]]
    ran = []
    monkeypatch.setattr(cli, "_check_places", lambda values: None)  # the data are not there
    monkeypatch.setattr(f"pplug_hf.commands.{module}.{function}", lambda *args, **kwargs: ran.append(args))
    assert cli.main(words[1:]) == 0 and ran
