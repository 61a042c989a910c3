"""The examples for vLLM, against a server that takes the requests and answers with what it was sent."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples" / "serve"
SYSTEM = "i like rain"


@pytest.fixture(scope="module")
def plug(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plug")
    model = tiny.from_backbone(str(places / "llama"), str(places / "encoder"), placement="answer", system=SYSTEM)
    model.save_pretrained(folder)
    return folder, model


def run(name, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_export_soft_prompts(plug, tmp_path):
    folder, model = plug
    histories = {"ann": tiny.HISTORY, "bob": []}
    (tmp_path / "histories.json").write_text(json.dumps(histories))
    output = tmp_path / "soft.safetensors"
    options = ["--plug", folder, "--histories", tmp_path / "histories.json", "--query", "the sea", "--output", output]
    assert "2 soft prompts of 2 tokens" in run("export_soft_prompts.py", *options)
    rows = load_file(output)
    for name, history in histories.items():
        torch.testing.assert_close(rows[name], model.soft_prompt(history, "the sea")[0])


class Server(BaseHTTPRequestHandler):
    got: ClassVar[list[dict]] = []

    def do_GET(self):
        self.send({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "me"}]})

    def do_POST(self):
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": f"answer {len(self.got)}"}
        self.send({
            **{"id": "1", "object": "chat.completion", "created": 0, "model": "tiny"},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        })  # fmt: skip

    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def test_ask_the_server(plug, tmp_path):
    pytest.importorskip("openai")
    folder, model = plug
    (tmp_path / "history.txt").write_text("\n".join(tiny.HISTORY))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        options = ["--plug", folder, "--history", tmp_path / "history.txt", "--question", "the sea"]
        said = run("vllm_soft_prompt.py", *options, "--url", f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        server.shutdown()
        server.server_close()
    assert said == "for this user: answer 1\nfor nobody: answer 2\n"
    personal, plain = (request["messages"] for request in Server.got)
    assert plain == [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "the sea"}]
    assert personal[0] == plain[0] and personal[1]["content"][0] == {"type": "text", "text": "the sea"}
    sent = torch.load(io.BytesIO(base64.b64decode(personal[1]["content"][1]["data"])), weights_only=True)
    torch.testing.assert_close(sent, model.soft_prompt(tiny.HISTORY, "the sea")[0])
