"""The page: its work alone, and the whole of it in a real browser that may not reach anything else."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tiny
from browser import BROWSER, Browser

from pplug_hf import cli
from pplug_hf.apps.assistant import Assistant, items_of, load_demo
from pplug_hf.apps.page import build, web_app
from pplug_hf.errors import DataError
from pplug_hf.optional import require
from pplug_hf.serving.open_store import open_store

ROOT = Path(__file__).parent.parent
NEW = 8


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture
def assistant(demo, tmp_path):
    model, samples = demo
    with open_store(tmp_path / "store", model.personalizer.spec) as store:
        yield Assistant(model, store, samples, NEW)


# ---- without a page ---------------------------------------------------------------------------------------------


def test_three_answers_and_the_weights(assistant):
    first, second = assistant.samples[:2]
    made = assistant.ask(first.prompt, first.query, first.items, second.items, 1.0)
    assert len({made.bare, made.own, made.other}) == 3
    weights, texts = zip(*made.weights, strict=True)
    assert sum(weights) == pytest.approx(1, abs=1e-5) and list(weights) == sorted(weights, reverse=True)
    assert sorted(texts) == sorted(first.items) and made.own in texts[0]  # the shelf of the heaviest item
    alone = assistant.model.generate(
        **assistant.processor(text=[first.prompt], persona=[first.items], query=[first.query]), max_new_tokens=NEW
    )
    assert assistant.processor.decode_answers(alone) == [made.own]
    bare = assistant.model.backbone.generate(
        **assistant.processor.tokenizer([first.prompt], return_tensors="pt"), max_new_tokens=NEW
    )
    assert assistant.processor.decode_answers(bare) == [made.bare]
    nobody = assistant.ask(first.prompt, "", first.items, second.items, 0.0)
    assert nobody.own == nobody.other
    assert assistant.ask(first.prompt, "", [], second.items, 1.0).weights == []


def test_answers_are_greedy_whatever_the_model_is_set_to(assistant, monkeypatch):
    first, second = assistant.samples[:2]
    expected = assistant.ask(first.prompt, first.query, first.items, second.items, 1.0)
    for name, value in {"do_sample": True, "temperature": 5.0, "num_beams": 3}.items():
        monkeypatch.setattr(assistant.model.generation_config, name, value)
    assert assistant.ask(first.prompt, first.query, first.items, second.items, 1.0) == expected


def test_a_stored_user_answers_without_their_texts_and_can_be_deleted(assistant):
    first, second = assistant.samples[:2]
    said = assistant.keep("ann", first.items)
    assert said.startswith(f"Stored {len(first.items)} items as vectors")
    made = assistant.ask(first.prompt, first.query, "ann", second.items, 1.0)
    there = assistant.ask(first.prompt, first.query, first.items, second.items, 1.0)
    assert made.own == there.own and made.weights[0][1].startswith("item ")
    assert assistant.keep("ann", first.items[:2]).startswith("Stored 2 items")
    assert assistant.forget("ann").startswith("Deleted 2 items. Receipt: user key ")
    for name in ("ann", "nobody", " "):
        with pytest.raises(DataError, match="Nobody is stored under this name"):
            assistant.ask(first.prompt, "", name, [], 1.0)


def test_what_is_refused(assistant):
    with pytest.raises(DataError, match="prompt is empty"):
        assistant.ask(" ", "", [], [], 1.0)
    with pytest.raises(DataError, match="strength"):
        assistant.ask("a", "", [], [], float("nan"))
    assert items_of("one\n\n  two  \n") == ["one", "two"]


def test_a_causal_model_answers_without_the_prompt(tmp_path):
    model = tiny.model("gpt2", attention_temperature=0.2)
    with open_store(tmp_path, model.personalizer.spec) as store:
        made = Assistant(model, store, max_new_tokens=4).ask("what is a good film", "", tiny.HISTORY, [], 1.0)
    assert not made.own.startswith("what") and len(made.weights) == len(tiny.HISTORY)


@pytest.mark.parametrize("header", ["{}", "http://{}"], ids=["host", "origin"])
@pytest.mark.parametrize("host, status", [("localhost:7860", 200), ("127.0.0.1", 200), ("evil.example:7860", 421)])
def test_a_page_of_another_name_does_not_get_in(assistant, host, status, header):
    pytest.importorskip("gradio")
    client = pytest.importorskip("fastapi.testclient").TestClient(web_app(build(assistant, "t")), "http://127.0.0.1")
    for path in ("/", "/config"):
        name = "Origin" if "//" in header else "Host"
        assert client.get(path, headers={name: header.format(host)}).status_code == status


# ---- in a browser -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*options, **environment):
    """Start `pplug-hf app` in a process of its own, offline, and give the process and the address of the page."""
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pplug_hf", "app", "--port", str(port), "--max_new_tokens", str(NEW), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}

    def as_in_a_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup

    given = {"env": environment, "stdout": subprocess.PIPE, "text": True, "preexec_fn": as_in_a_terminal}
    with subprocess.Popen(command, **given) as process:
        assert process.stdout is not None
        said = next((line for line in process.stdout if line.startswith("The page is at")), "")
        assert f"http://127.0.0.1:{port}" in said
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                assert process.wait(60) in (0, 130)


@pytest.fixture
def address(tmp_path):
    with running("--store", str(tmp_path / "store")) as (_, address):
        yield address


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_page_that_is_told_to_end_leaves_no_user(tmp_path, number):
    with running(TMPDIR=str(tmp_path)) as (process, _):
        (store,) = tmp_path.glob("pplug-app-*")
        assert (store / "secret").exists()
        for _ in range(2):  # as a terminal does
            process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not store.exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
def test_the_page_in_a_browser(address, assistant, tmp_path):
    pytest.importorskip("websockets")
    first, second = assistant.samples[:2]
    expected = assistant.ask(first.prompt, first.query, first.items, second.items, 1.0)
    browser = Browser(tmp_path / "profile")

    def answers():
        return [browser.value(f"#{name} textarea") for name in ("bare", "own", "another")]

    def ask(until):
        browser.click("#ask")
        browser.wait(until)

    try:
        browser.open(address, "!!document.querySelector('#ask') && !!document.querySelector('#items textarea').value")
        ask("document.querySelector('#another textarea').value")
        assert answers() == [expected.bare, expected.own, expected.other]
        assert browser.value("#weights .text") == expected.weights[0][1]

        # Strength 0 is nobody, for both users.
        browser.fill("#strength input[type=number]", "0", "blur")
        ask("document.querySelector('#own textarea').value == document.querySelector('#another textarea').value")
        assert answers()[0] == expected.bare
        browser.fill("#strength input[type=number]", "1", "blur")
        ask(f"document.querySelector('#own textarea').value == '{expected.own}'")

        # A history that is pasted is shown as text, never as markup; what is asked while an answer is written is asked next.
        browser.click("#ask")
        browser.fill("#items textarea", "<img src=x onerror=alert(1)>")
        ask("[...document.querySelectorAll('#weights .text')].some(e => e.innerText.startsWith('<img'))")
        assert browser.js("document.querySelectorAll('#weights img').length") == 0

        # A user is stored, answers without texts, and is deleted.
        browser.fill("#items textarea", "\n".join(first.items))
        browser.fill("#user textarea, #user input", "ann")
        browser.click("#store")
        browser.wait("document.querySelector('#status').innerText.includes('Stored')")
        assert len(assistant.store.get("ann")) == len(first.items)
        browser.fill("#items textarea", "")
        browser.click("#source label:last-of-type input")
        ask("document.querySelector('#weights .text').innerText.startsWith('item ')")
        assert answers() == [expected.bare, expected.own, expected.other]
        browser.click("#forget")
        browser.wait(f"document.querySelector('#status').innerText.includes('Deleted {len(first.items)} items')")
        assert assistant.store.get("ann") is None
        ask("document.body.innerText.includes('Nobody is stored under this name')")

        elsewhere = {urlsplit(url).netloc for url in browser.requests} - {urlsplit(address).netloc, ""}
        assert not elsewhere
        assert browser.js("fetch('https://example.org').then(() => 'reached').catch(() => 'refused')") != "reached"
    finally:
        browser.close()


def test_without_gradio_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(Exception, match=r"needs gradio; install it with: pip install 'pplug-hf\[app\]'"):
        require("gradio", "app", "The page")


@pytest.mark.parametrize("port", ["taken", 99999])
def test_a_port_that_cannot_be_had_is_one_line(capsys, port):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1] if port == "taken" else port
        assert cli.main(["app", "--port", str(number)]) == 1
    printed = capsys.readouterr()
    assert "The page is at" not in printed.out and printed.err.splitlines()[-1].startswith("pplug-hf app: ")
    assert str(number) in printed.err and "Traceback" not in printed.err
