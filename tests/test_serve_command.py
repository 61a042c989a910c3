"""`pplug-hf serve` in a process of its own: what it says, what it refuses, and what a kill leaves."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
import serving
import tiny

from pplug_hf import PPlugForConditionalGeneration, cli, open_store

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def plug(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plug") / "plug"
    model = PPlugForConditionalGeneration.from_backbone(str(places / "gpt2"), str(places / "encoder"))
    tiny.randomise(model.plug)
    model.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def running(plug, store, *options):
    """Start the command, and give the process and requests to it."""
    command = [
        sys.executable,
        "-m",
        "pplug_hf",
        "serve",
        "--plug",
        plug,
        "--store",
        str(store),
        "--port",
        "0",
        *options,
    ]
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads fills up, and the server waits
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):

        def log():
            errors.seek(0)
            return errors.read()

        line = process.stdout.readline()
        assert line.startswith("Serving default") and "http://127.0.0.1:" in line, log()
        asked = serving.Served.__new__(serving.Served)
        asked.log = log
        asked.port = int(line.rpartition(":")[2])
        try:
            yield process, asked
        finally:
            process.kill()


def test_it_serves_and_ends_when_it_is_told_to(plug, tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({hashlib.sha256(b"key").hexdigest(): "acme"}))
    options = ["--keys", str(keys), "--plugs", f"second={plug}", "--max_new_tokens", "5"]
    options += ["--max_batch", "1", "--max_queue", "1"]
    with running(plug, tmp_path / "store", *options) as (process, ask), contextlib.ExitStack() as stack:
        for _ in range(8):  # who sends nothing keeps nobody out
            stack.enter_context(socket.create_connection(("127.0.0.1", ask.port)))
        assert ask("GET", "/ready")[0] == 200 and ask("GET", "/v1/models")[0] == 401
        names = [model["id"] for model in ask("GET", "/v1/models", key="key")[1]["data"]]
        assert names == ["default", "second"]
        assert ask("PUT", "/v1/personas/anna/items", {"items": serving.ITEMS}, "key")[0] == 200
        body = {"prompt": tiny.PROMPTS[0], "model": "second", "persona": {"user": "anna"}}
        status, answer, headers = ask("POST", "/v1/completions", body, "key")
        assert status == 200 and headers["x-persona"] == "applied" and answer["usage"]["completion_tokens"] <= 5
        process.send_signal(signal.SIGINT)
        assert process.wait() in (130, 0)  # as of every command that is interrupted; 0 with older uvicorn
        log = ask.log()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["route"] for line in lines if line["event"] == "request"][-1] == "/v1/completions"
    assert "anna" not in log and "story" not in log


def test_nothing_that_was_acknowledged_is_lost_by_a_kill(plug, tmp_path):
    """Items are appended by several clients while the process is killed, twice."""
    acknowledged = {f"u{i}": [] for i in range(4)}
    for n in range(2):
        with running(plug, tmp_path) as (process, ask):
            enough = threading.Semaphore(0)

            def append(user, n=n, ask=ask, enough=enough):
                with contextlib.suppress(OSError):
                    for i in range(10_000):
                        name = f"{n}-{i}"
                        body = {"items": [{"id": name, "text": "the moon"}]}
                        if ask("POST", f"/v1/personas/{user}/items", body)[0] == 200:
                            acknowledged[user].append(name)
                        if i == 10:
                            enough.release()

            threads = [threading.Thread(target=append, args=(user,)) for user in acknowledged]
            for thread in threads:
                thread.start()
            for _ in threads:  # of each user: SQLite lets one wait while others write
                assert enough.acquire(timeout=60)
            process.kill()
            for thread in threads:
                thread.join()
    spec = PPlugForConditionalGeneration.from_pretrained(plug).personalizer.spec
    with open_store(tmp_path, spec) as store:
        for user, names in acknowledged.items():
            kept = store.get(user).item_ids
            assert len(names) > 3 and set(names) <= set(kept) and len(set(kept)) == len(kept)
            assert len(kept) - len(names) <= 2  # written, and killed before it was said


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host", "0.0.0.0"], "--keys"),
        (["--keys", "nowhere.json"], "no file of API keys 'nowhere.json'"),
        (["--plugs", "second"], "NAME=FOLDER"),
        (["--prompt_cache", "much"], "'4GB'"),
        (["--engine", "vllm", "--prompt_cache", "256MB"], "--engine vllm has no --prompt_cache: leave it out"),
        (["--engine", "vllm", "--max_prompt_tokens", "9"], "--engine vllm has no --max_prompt_tokens: leave it out"),
        (["--time_limit", "0"], "--time_limit must be greater than 0"),
        (["--time_limit", "inf"], "--time_limit must be finite and greater than 0, got inf"),
        (["--temperature", "nan"], "--temperature must be finite and greater than 0, got nan"),
        (["--temperature", "-1"], "--temperature must be greater than 0"),
        (["--max_queue", "-50"], "--max_queue must be greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_one_line(plug, tmp_path, capsys, options, message):
    assert cli.main(["serve", "--plug", plug, "--store", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--plug", "nowhere", "--store", str(tmp_path), "--port", str(port)]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err


def test_an_engine_that_is_not_installed_says_what_to_install(plug, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main(["serve", "--plug", plug, "--store", str(tmp_path), "--engine", "vllm"]) == 1
    assert "pip install 'pplug-hf[vllm]'" in capsys.readouterr().err
