"""The curl lines of docs/serve.md and the examples of clients run against a server with the demo's models."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from inspect import signature
from pathlib import Path

import pytest
import tiny
from serving import served

from pplug_hf import PPlugForConditionalGeneration
from pplug_hf.commands.options import ServeSettings
from pplug_hf.serving.server.limits import Limits
from pplug_hf.serving.server.monitoring import Monitoring
from pplug_hf.serving.transformers_engine import TransformersEngine

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "serve"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    assets = files("pplug_hf.demo") / "assets"
    model = PPlugForConditionalGeneration.from_backbone(
        str(assets / "backbone"), str(assets / "encoder"), item_template="{tag}: {text}"
    )
    tiny.randomise(model.plug)
    with served(tmp_path_factory.mktemp("store"), model) as server:
        yield server


def test_the_curl_lines_of_the_page_work(server):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    blocks = re.findall(r"^```sh\n(curl .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.split(r"^(?=curl )", "".join(blocks), flags=re.MULTILINE)[1:]
    replies = []
    for line in lines:
        command = line.replace("localhost:8000", server.url)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        replies.append(json.loads(done.stdout))
    written, answered = replies
    assert (written["id"], written["object"], written["items"]) == ("anna", "persona", 2)
    assert answered["object"] == "chat.completion" and answered["usage"]["completion_tokens"] >= 1
    assert server("DELETE", "/v1/personas/anna")[0] == 200


def test_the_lines_of_the_readme_work(server):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL) if "openai" in c]
    assert (
        server("PUT", "/v1/personas/anna/items", {"items": [{"id": "1", "tag": "epic saga", "text": "a sword"}]})[0]
        == 200
    )
    names = {}
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), names)
    assert isinstance(names["answer"].choices[0].message.content, str)
    assert server("DELETE", "/v1/personas/anna")[0] == 200


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "openai_client",
            ["anna has 2 books", "(persona applied)", "somebody new (persona unknown)", "ben are forgotten"],
        ),
        ("langchain_chat", ["for anna:", "ben, in pieces: ["]),
    ],
)
def test_the_examples_of_clients_run(server, name, says):
    if name == "langchain_chat":
        pytest.importorskip("langchain_openai")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--url", f"{server.url}/v1"]
    environment = {**os.environ, "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(text in done.stdout for text in says), done.stdout


def test_the_page_says_what_the_limits_are():
    limits, settings = Limits(), ServeSettings(plug="", store="")
    engine = signature(TransformersEngine).parameters
    prompt_tokens, cache = engine["max_prompt_tokens"].default, engine["prompt_cache"].default
    helps = {field.name: field.metadata["help"] for field in fields(ServeSettings)}
    assert f"default: {prompt_tokens};" in helps["max_prompt_tokens"] and f"default: {cache};" in helps["prompt_cache"]
    assert f"{limits.items:,}; {limits.user_items:,}; {limits.item_characters:,}" in PAGE
    assert f"{prompt_tokens:,}; {limits.new_tokens}" in PAGE and limits.body == settings.max_body == 4 * 2**20
    assert f"| {settings.max_batch}; {settings.max_queue} |" in PAGE and f"| {limits.choices} |" in PAGE
    assert f"| {settings.time_limit:g} |" in PAGE and f"| {limits.client_seconds:g} |" in PAGE
    assert (limits.user_items, limits.new_tokens) == (settings.max_items, settings.max_new_tokens)


def test_every_error_code_and_figure_is_on_a_page():
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "pplug_hf" / "serving" / "server").glob("*.py"))
    codes = set(re.findall(r"(?:ApiError|_Failure)\(\s*\d{3}, \"(\w+)\"", sources))
    assert len(codes) > 15 and not {code for code in codes if f"`{code}`" not in PAGE} - {
        "internal_error",
        "disconnected",
    }
    figures = re.findall(r"^# TYPE (\w+)", Monitoring(lambda: 0).text().decode(), re.MULTILINE)
    assert len(figures) > 9 and all(f"`{name}" in OPERATIONS for name in figures if not name.endswith("_created"))
