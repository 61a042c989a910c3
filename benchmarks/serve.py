"""Load of a server: requests per second and tail latency, with personas and of the bare language model.

    python benchmarks/serve.py [--requests 10000] [--clients 16] [--backbone FOLDER --encoder FOLDER] [--output FOLDER]

Starts `pplug-hf serve` on 127.0.0.1 on a free port, fills its store with synthetic users, and sends a bounded number of
requests from so many clients, in alternating rounds with a persona and without. Both arms use the same server, prompts and
lengths of answers. Weights of the plug are random, and so are texts. Without --backbone, both models are the tiny ones of
the demo, which shows the cost of the server itself. The clients share the processor with the server.
"""

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

WORDS = "a quiet harbour storm novel detective garden kitchen winter letter river forgotten song museum engine"
ARMS = ("persona", "bare")
KINDS = ("chat", "completion", "stream")


class Client:
    """One connection to a server, which it keeps."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        self.connection.connect()
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, bytes, Any]:
        data = None if body is None else json.dumps(body).encode()
        self.connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer.headers


def make_plug(folder: str, backbone: str, encoder: str, placement: str) -> None:
    """Save a plug with random weights."""
    import torch

    from pplug_hf import PPlugForConditionalGeneration

    torch.manual_seed(0)
    model = PPlugForConditionalGeneration.from_backbone(backbone, encoder, placement=placement)
    model.save_pretrained(folder)


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS.split(), k=words))


def send(port: int, clients: int, bodies: list[tuple[str, dict[str, Any]]]) -> tuple[float, list[float], Counter]:
    """Send requests from so many clients at once; return seconds, latencies, and statuses with the state of the persona."""
    seconds, seen, turns, lock = [0.0] * len(bodies), Counter(), count(), threading.Lock()

    def work() -> None:
        client = Client(port)
        while (i := next(turns)) < len(bodies):
            path, body = bodies[i]
            start = time.perf_counter()
            status, answer, headers = client("POST", path, body)
            seconds[i] = time.perf_counter() - start
            whole = b"[DONE]" in answer if body.get("stream") else b"usage" in answer
            with lock:
                seen[f"{status} {headers['X-Persona']} {'whole' if whole else 'torn'}"] += 1

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, seconds, seen


def request(arm: str, i: int, draw: random.Random, users: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """Return path and body of the i-th request, of the three kinds in turn."""
    kind = KINDS[i % 3]
    body: dict[str, Any] = {"model": "default", "max_tokens": tokens, "temperature": 0}
    if arm == "persona":
        body["persona"] = {"user": f"user {draw.randrange(users)}"}
    prompt = f"Which shelf does this reader put the book on? book: {text(draw, 12)}"
    if kind == "completion":
        return "/v1/completions", {**body, "prompt": prompt}
    messages = [{"role": "user", "content": prompt}]
    return "/v1/chat/completions", {**body, "messages": messages, "stream": kind == "stream"}


def percentile(values: list[float], share: float) -> float:
    """Return the value in milliseconds that a share of all stays below."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def measure(arguments: argparse.Namespace, port: int) -> dict[str, Any]:
    """Fill the store, send all requests, and return the figures."""
    client, draw = Client(port), random.Random(0)
    for user in range(arguments.users):
        items = [{"id": str(i), "text": text(draw, 20)} for i in range(arguments.items)]
        status, answer, _ = client("PUT", f"/v1/personas/user%20{user}/items", {"items": items})
        assert status == 200, answer
    for arm in ARMS:  # warm
        send(port, arguments.clients, [request(arm, i, draw, arguments.users, arguments.tokens) for i in range(48)])
    each = arguments.requests // (2 * arguments.rounds)
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    latencies: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seen = Counter()
    for n in range(arguments.rounds):
        for arm in ARMS if n % 2 else ARMS[::-1]:
            bodies = [request(arm, i, draw, arguments.users, arguments.tokens) for i in range(each)]
            wall, seconds, statuses = send(port, arguments.clients, bodies)
            rates[arm].append(each / wall)
            latencies[arm] += seconds
            seen += statuses
            print(f"round {n + 1}, {arm}: {each / wall:.1f} requests/s", file=sys.stderr)
    ready = Client(port)("GET", "/ready")[0]
    ratios = sorted(a / b for a, b in zip(rates["persona"], rates["bare"], strict=True))
    figures = {
        arm: {
            "requests": len(latencies[arm]),
            "requests_per_second": round(sum(rates[arm]) / len(rates[arm]), 1),
            **{f"p{int(100 * share)}_ms": percentile(latencies[arm], share) for share in (0.5, 0.95, 0.99)},
        }
        for arm in ARMS
    }
    ratio = {"median": ratios[len(ratios) // 2], "lowest": ratios[0], "highest": ratios[-1]}
    return {
        **figures,
        "rate_with_persona_over_bare": {name: round(value, 3) for name, value in ratio.items()},
        "answers": dict(sorted(seen.items())),
        "ready_afterwards": ready == 200,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="in all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each arm (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--users", type=int, default=50, help="users in the store (default: %(default)s)")
    parser.add_argument("--items", type=int, default=50, help="items of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument("--placement", default="answer", help="prompt or answer (default: %(default)s)")
    parser.add_argument("--backbone", help="folder of the language model (default: the demo's)")
    parser.add_argument("--encoder", help="folder of the sentence encoder (default: the demo's)")
    parser.add_argument("--max_seconds", type=float, default=3600, help="stop after this time (default: %(default)s)")
    parser.add_argument("--name", default="demo", help="of the figures (default: %(default)s)")
    parser.add_argument("--output", help="folder whose serve.json gets the figures")
    arguments = parser.parse_args()
    assets = files("pplug_hf.demo") / "assets"
    backbone, encoder = arguments.backbone or str(assets / "backbone"), arguments.encoder or str(assets / "encoder")
    with tempfile.TemporaryDirectory() as folder:
        make_plug(f"{folder}/plug", backbone, encoder, arguments.placement)
        command = [sys.executable, "-m", "pplug_hf", "serve", "--plug", f"{folder}/plug", "--store", f"{folder}/store"]
        command += ["--port", "0", "--time_limit", "300"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with (
            open(f"{folder}/log", "w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server,
        ):
            timer = threading.Timer(arguments.max_seconds, server.kill)
            timer.daemon = True
            timer.start()
            try:
                line = server.stdout.readline()  # type: ignore[union-attr]
                if not line:
                    sys.exit(Path(f"{folder}/log").read_text()[-2000:])
                figures = measure(arguments, int(line.rpartition(":")[2]))
            finally:
                timer.cancel()
                server.kill()
    settings = ("clients", "users", "items", "tokens", "placement")
    figures |= {"settings": {name: getattr(arguments, name) for name in settings} | {"cores": os.cpu_count()}}
    print(json.dumps(figures, indent=2))
    if arguments.output:
        place = Path(arguments.output) / "serve.json"
        known = json.loads(place.read_text()) if place.is_file() else {}
        place.write_text(json.dumps({**known, arguments.name: figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
