"""What the guides show works: their Python runs on local stand-ins, and their commands are ones that exist."""

import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
from test_cli import as_movies, movie_tag, write_data

from pplug_hf import cli

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
    return {
        "google/flan-t5-base": str(ASSETS / "backbone"),
        "BAAI/bge-base-en-v1.5": str(ASSETS / "encoder"),
        "Qwen/Qwen3-0.6B": str(chat),
    }


def blocks(page, language):
    """The code of a page, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "LaMP_2", "LaMP_2", as_movies, movie_tag)
    names = {}
    for code in blocks(page, "python"):
        for name, place in stand_ins.items():
            code = code.replace(f'"{name}"', repr(place))
        exec(compile(code, str(page), "exec"), names)


COMMANDS = [(page, words) for page in PAGES for words in commands(page) if words[0] == "pplug-hf"]


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda part: getattr(part, "stem", None) or part[1])
def test_the_commands_of_a_page_parse(page, words):
    _, _, parser = cli.load_command(words[1])
    *_, unknown = parser.parse_args_into_dataclasses(
        words[2:], return_remaining_strings=True, look_for_args_file=False
    )
    assert not unknown
