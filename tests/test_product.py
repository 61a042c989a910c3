"""docs/your-product.md runs as it stands, from a log to answers over HTTP, with the demo's models and a short training."""

import http.client
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import pytest

from pplug_hf import Personalizer, cli, open_store

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-product.md").read_text(encoding="utf-8")
ASSETS = files("pplug_hf.demo") / "assets"
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(ASSETS / "backbone"),
    "sentence-transformers/all-MiniLM-L6-v2": str(ASSETS / "encoder"),
}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def commands(language="bash"):
    """The words of each command of the page, in order. The JSON of a request may have several lines."""
    text = "".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = re.split(r"^(?=pplug-hf |curl )", text, flags=re.MULTILINE)[1:]
    return [[STAND_INS.get(word, word) for word in shlex.split(line)] for line in lines]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder where all commands before the server have run."""
    folder, before = tmp_path_factory.mktemp("shop"), Path.cwd()
    (folder / "examples").symlink_to(ROOT / "examples")
    os.chdir(folder)
    try:
        *preparing, serving = commands()
        assert serving[1] == "serve"
        for words in preparing:
            words += ["--epochs", "2"] if words[1] == "train" else []
            words += ["--vectors", "vectors"] if words[1] in ("train", "evaluate") else []
            assert cli.main(words[1:]) == 0, words
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def server(shop):
    """The address of the page's server, on a free port."""
    command = [sys.executable, "-m", "pplug_hf", *commands()[-1][1:], "--port", "0"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=shop, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split("http://")[1].strip()
        process.terminate()


def ask(server, method, path, body=None):
    """Return status, JSON and headers of one request."""
    with closing(http.client.HTTPConnection(server, timeout=60)) as connection:
        connection.request(method, path, body, {} if body is None else {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.load(answer), answer.headers


def curl(server, words):
    """Ask what a curl line of the page asks: `curl ADDRESS [--json BODY] [-X METHOD]`."""
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[0] == "curl" and options.keys() <= {"--json", "-X"}
    method = options.get("-X", "POST" if "--json" in options else "GET")
    return ask(server, method, words[1].removeprefix("localhost:8000"), options.get("--json"))


def test_the_log_becomes_a_plug_a_table_and_a_store_without_text(shop):
    assert (shop / "shop-plug" / "model.safetensors").is_file() and (shop / "shop-results" / "results.json").is_file()
    with open_store(
        shop / "personas", Personalizer.from_pretrained(shop / "shop-plug", encode_only=True).spec
    ) as store:
        assert (store.stats().users, store.stats().items, len(store.get("r0066"))) == (80, 1200, 15)
    made = [path for path in (shop / "personas").rglob("*") if path.is_file()]
    assert made and not any("r0066" in str(path.relative_to(shop)) for path in made)
    assert not any(b"sword" in path.read_bytes() or b"r0066" in path.read_bytes() for path in made)


def test_the_server_answers_each_reader_and_takes_new_items(server):
    asked = commands("sh")
    replies = [curl(server, words) for words in asked]
    assert [status for status, _, _ in replies] == [200] * 5
    (_, first, for_first), (_, second, for_second), (_, added, _), (_, third, for_third), (_, deleted, _) = replies
    answers = [reply["choices"][0]["text"] for reply in (first, second, third)]
    assert set(answers) <= {"fantasy", "mythology", "epic saga"}  # shelves for such a book
    assert answers[0] != answers[1]
    assert [headers["X-Persona-Items"] for headers in (for_first, for_second, for_third)] == ["15", "15", "1"]
    assert (added["id"], added["items"]) == ("new", 1) and (deleted["id"], deleted["items"]) == ("new", 1)

    def about_sword(user):
        return json.dumps({**json.loads(asked[0][3]), "persona": {"user": user}})

    for stranger in ("new", "a stranger"):  # who was deleted is not known any more
        status, reply, headers = ask(server, "POST", "/v1/completions", about_sword(stranger))
        assert (status, headers["X-Persona"], headers["X-Persona-Items"]) == (200, "unknown", "0")
        assert reply["choices"][0]["text"]
    assert ask(server, "GET", "/v1/personas/new")[0] == 404
    for expected in (1, 2):
        item = {"id": str(expected), "text": "the storm", "answer": "nautical"}
        status, reply, _ = ask(server, "POST", "/v1/personas/another/items", json.dumps({"items": [item]}))
        assert (status, reply["items"]) == (200, expected)


def test_the_page_shows_what_the_server_says(server):
    shown = [
        line
        for block in re.findall(r"^```text\n(\{.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    for line, words in zip(shown, commands("sh"), strict=True):
        said = json.dumps(curl(server, words)[1])
        assert all(f'"{name}": ' in said for name in re.findall(r'"(\w+)":', line)), line


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/elsewhere", "{}", 404, "There is no such route"),
        ("/v1/completions", "no JSON", 400, "not valid JSON"),
        ("/v1/completions", '{"persona": {"user": 1}, "prompt": "x"}', 422, "persona.user"),
        ("/v1/personas/u/items", '{"items": [{"id": "1", "text": "a secret"}]}', 422, "no field 'answer'"),
    ],
)
def test_a_bad_request_is_told_so_without_its_text(server, path, body, status, message):
    code, reply, _ = ask(server, "POST", path, body)
    assert code == status and message in reply["error"]["message"] and "secret" not in reply["error"]["message"]
