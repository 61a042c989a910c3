"""docs/your-product.md runs as it stands, from a log to answers over HTTP, with the demo's models and a short training."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path

import pytest

from pplug_hf import cli

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-product.md").read_text(encoding="utf-8")
ASSETS = files("pplug_hf.demo") / "assets"
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(ASSETS / "backbone"),
    "sentence-transformers/all-MiniLM-L6-v2": str(ASSETS / "encoder"),
}
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def commands():
    """The words of each command of the page, in order."""
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [[STAND_INS.get(word, word) for word in shlex.split(line)] for line in text.splitlines() if line]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder where all commands before the server have run."""
    folder, before = tmp_path_factory.mktemp("shop"), Path.cwd()
    (folder / "examples").symlink_to(ROOT / "examples")
    os.chdir(folder)
    try:
        for words in commands():
            if words[0] == "pplug-hf":
                words += ["--epochs", "2"] if words[1] == "train" else []
                words += ["--vectors", "vectors"] if words[1] in ("train", "evaluate") else []
                assert cli.main(words[1:]) == 0, words
            elif words[0] == "python" and "encode.py" in words[1]:
                subprocess.run([sys.executable, *words[1:]], check=True, env=ENVIRONMENT)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def server(shop):
    """The address of the page's server, on a free port."""
    (words,) = [words for words in commands() if words[0] == "python" and "serve.py" in words[1]]
    command = [sys.executable, *words[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=shop, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        yield address
        process.terminate()


def post(url, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body.encode()), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_log_becomes_a_plug_a_table_and_files_without_text(shop):
    assert (shop / "shop-plug" / "model.safetensors").is_file() and (shop / "shop-results" / "results.json").is_file()
    personas = [*(shop / "personas").iterdir()]
    assert len(personas) == 80 and not any("r0066" in path.name for path in personas)
    assert not any(b"sword" in path.read_bytes() or b"r0066" in path.read_bytes() for path in personas)


def test_the_server_answers_each_reader_and_takes_new_items(server):
    asked = [words for words in commands() if words[0] == "curl"]
    replies = [post(words[1].replace("localhost:8000", server), words[3]) for words in asked]
    assert [status for status, _ in replies] == [200, 200, 200]
    (_, first), (_, second), (_, added) = replies
    assert first["items"] == second["items"] == 15 and added == {"items": 1}
    assert {first["answer"], second["answer"]} <= {"fantasy", "mythology", "epic saga"}  # shelves for such a book
    once_more = {"user": "new", "items": [{"text": "the storm", "answer": "nautical"}]}
    assert post(f"{server}/items", json.dumps(once_more)) == (200, {"items": 2})
    stranger = {**json.loads(asked[0][3]), "user": "a stranger"}
    status, reply = post(f"{server}/answer", json.dumps(stranger))
    assert status == 200 and reply["items"] == 0 and reply["answer"]


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/elsewhere", "{}", 404, "POST to /answer or /items"),
        ("/answer", "no JSON", 400, "send JSON"),
        ("/answer", '{"user": 1, "text": "x"}', 400, "send JSON"),
        ("/items", '{"user": "u", "items": [{"text": "a secret"}]}', 400, "has no field"),
    ],
)
def test_a_bad_request_is_told_so_without_its_text(server, path, body, status, message):
    code, reply = post(server + path, body)
    assert code == status and message in reply["error"] and "secret" not in reply["error"]
