"""Faults around the server: engines that die, clients that leave, damaged stores."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import tiny
import torch
from serving import CHAT, ITEMS, SECRET, ask, served, slow

from pplug_hf import EncoderSpec, MismatchError, open_store
from pplug_hf.errors import EngineError, StoreError
from pplug_hf.serving.engine import Answer, Engine
from pplug_hf.serving.server.app import create_app
from pplug_hf.serving.server.service import Service


class Broken(Engine):
    """An engine that dies in the middle of a stream."""

    def __init__(self, engine):
        self.engine, self.is_dead = engine, False

    @property
    def personalizers(self):
        return self.engine.personalizers

    def generate(self, requests):
        if self.is_dead:
            raise RuntimeError("a secret of the engine")
        return self.engine.generate(requests)

    def stream(self, request):
        yield Answer("the", None, 1, 1)
        self.is_dead = True
        raise EngineError("The engine has failed: restart it.")

    def check(self):
        if self.is_dead:
            raise ValueError("a secret of the engine")

    def close(self):
        self.engine.close()


def test_an_engine_that_dies_in_a_stream_is_an_error_and_not_ready(server, tmp_path, caplog):
    store = open_store(tmp_path, server.store.spec, secret=SECRET)
    with served(tmp_path, engine=Broken(server.engine), store=store) as broken:
        broken.engine.close = lambda: None
        assert broken("GET", "/ready")[0] == 200
        with openai.OpenAI(base_url=broken.url + "/v1", api_key="none", max_retries=0) as client:
            chunks = ask(client, stream=True)[0]
            with pytest.raises(openai.APIError, match="The engine has failed") as caught:
                list(chunks)
            assert caught.value.code == "engine_unavailable"
            with pytest.raises(openai.InternalServerError, match="RuntimeError") as caught:
                ask(client)
        assert "secret" not in str(caught.value) and "secret" not in caplog.text
        time.sleep(1.1)
        status, reply, _ = broken("GET", "/ready")
        assert status == 503 and "secret" not in json.dumps(reply)
        assert broken("GET", "/health")[0] == 200
        assert broken("PUT", "/v1/personas/anna/items", {"items": ITEMS})[0] == 200  # what needs no engine goes on


def test_readiness_does_not_trust_the_clock_of_the_day(server, tmp_path, monkeypatch):
    store = open_store(tmp_path, server.store.spec, secret=SECRET)
    with served(tmp_path, engine=Broken(server.engine), store=store) as broken:
        broken.engine.close = lambda: None
        assert broken("GET", "/ready")[0] == 200
        clock = time.time
        monkeypatch.setattr(time, "time", lambda: clock() - 3600)
        broken.engine.is_dead = True
        time.sleep(1.1)
        assert broken("GET", "/ready")[0] == 503
        broken.engine.is_dead = False
        time.sleep(1.1)
        assert broken("GET", "/ready")[0] == 200


def test_readiness_does_not_wait_behind_a_batch_and_finds_a_changed_model(tmp_path, monkeypatch):
    with served(tmp_path) as server:
        monkeypatch.setattr(Service, "patience", 0.1)
        slow(server.engine, monkeypatch, 0.05)
        with ThreadPoolExecutor(1) as pool:
            body = {"messages": CHAT, "max_tokens": 400, "stop": "nothing like it"}
            answer = pool.submit(server, "POST", "/v1/chat/completions", body)
            while not server.engine._batch:
                time.sleep(0.01)
            assert server("GET", "/ready")[0] == 200 and not answer.done()
            monkeypatch.setattr(server.engine, "_known", ("another", [0]))
            server.engine._batch[0].cancelled = True
        while server("GET", "/ready")[0] == 200:
            time.sleep(0.05)
        status, reply, _ = server("GET", "/ready")
        assert (status, reply["error"]["code"]) == (503, "engine_unavailable")


def test_a_client_that_leaves_a_stream_ends_the_work_on_it(server, client, monkeypatch):
    slow(server.engine, monkeypatch, 0.05)
    chunks = ask(client, stream=True, max_tokens=64)[0]
    next(chunks)
    (row,) = server.engine._batch
    chunks.close()
    while not row.ended:
        time.sleep(0.01)
    assert len(row.tokens) < 60


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_leaves_before_the_answer_ends_the_work_on_it(tmp_path, monkeypatch, stream, waits):
    with served(tmp_path, max_batch=1) as server, ThreadPoolExecutor(1) as pool:
        slow(server.engine, monkeypatch, 0.05)
        if waits:  # in the queue, behind another's
            other = {"messages": CHAT, "max_tokens": 400, "stop": "nothing like it"}
            pool.submit(server, "POST", "/v1/chat/completions", other)
        monkeypatch.setattr("pplug_hf.serving.running._certain", lambda text, stops: "")  # no piece before the end
        while waits and not server.engine._batch:
            time.sleep(0.01)
        body = {"messages": CHAT, "max_tokens": 400, "stop": "nothing like it", "stream": stream}
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            while not (rows := server.engine._waiting if waits else server.engine._batch):
                time.sleep(0.01)
            (row,) = rows
        if waits:
            while not row.request.cancelled.is_set():
                time.sleep(0.01)
            server.engine._batch[0].limit = 0  # the other's answer ends
        while not row.ended:
            time.sleep(0.01)
        assert len(row.tokens) < 60
        wanted = 'pplug_requests_total{route="/v1/chat/completions",status="499"} 1.0'
        while wanted not in (text := server("GET", "/metrics")[1].decode()):
            assert 'status="503"' not in text
            time.sleep(0.01)


def test_a_damaged_persona_is_named_and_nothing_is_asked_of_the_engine(server, client, monkeypatch):
    persona = server.store.get_many(["anna"])[0]  # one of its own
    persona.vectors[0, 0] = torch.nan
    monkeypatch.setattr(type(server.store), "get", lambda self, user: persona)
    monkeypatch.setattr(server.engine, "_enter", lambda rows, first=False: pytest.fail("the engine was asked"))
    with pytest.raises(openai.InternalServerError, match="damaged") as caught:
        ask(client)
    assert caught.value.code == "persona_damaged"
    monkeypatch.undo()
    assert ask(client)[1]["x-persona"] == "applied"


def test_vectors_that_are_damaged_in_a_server_are_named(tmp_path, store_server):
    model = tiny.model("llama")
    with served(tmp_path, model, store=store_server.open(model.personalizer.spec)) as server:
        for user in ("anna", "ben"):
            assert server("PUT", f"/v1/personas/{user}/items", {"items": ITEMS})[0] == 200
        store = server.store
        _, vectors = store._backend._names(store._keys.user("", "anna"))
        store._place._client.setrange(vectors, 0, b"\xff" * 4)
        body = {"messages": CHAT, "max_tokens": 2, "persona": {"user": "anna"}}
        for method, path, sent in (("GET", "/v1/personas/anna", None), ("POST", "/v1/chat/completions", body)):
            status, reply, _ = server(method, path, sent)
            assert (status, reply["error"]["code"]) == (500, "persona_damaged")
        assert server("GET", "/v1/personas/ben")[1]["items"] == len(ITEMS)
        assert server("PUT", "/v1/personas/anna/items", {"items": ITEMS})[0] == 200
        assert server("POST", "/v1/chat/completions", body)[2]["x-persona"] == "applied"


def test_a_corrupt_shard_costs_one_user_at_most(tmp_path):
    with served(tmp_path) as server:
        for i in range(40):
            assert server("PUT", f"/v1/personas/u{i}/items", {"items": ITEMS})[0] == 200
    with open_store(tmp_path, server.store.spec, secret=SECRET) as store:
        needle = store.get("u7").vectors.numpy().tobytes()[:24]
    found = [
        (path, at) for path in tmp_path.rglob("*") if path.is_file() and (at := path.read_bytes().find(needle)) >= 0
    ]
    (path, at), *_ = found
    with open(path, "r+b") as file:  # equal items have equal vectors: the first user of that shard
        file.seek(at)
        file.write(b"\xff" * 4)
    with served(tmp_path) as server:
        replies = [server("GET", f"/v1/personas/u{i}") for i in range(40)]
        broken = [reply for reply in replies if reply[0] != 200]
        assert len(broken) == 1 and broken[0][:2][0] == 500 and broken[0][1]["error"]["code"] == "persona_damaged"
        user = f"u{replies.index(broken[0])}"
        body = {"messages": CHAT, "max_tokens": 2, "persona": {"user": user}}
        assert server("POST", "/v1/chat/completions", body)[1]["error"]["code"] == "persona_damaged"
        assert server("PUT", f"/v1/personas/{user}/items", {"items": ITEMS})[0] == 200
        assert server("POST", "/v1/chat/completions", body)[2]["x-persona"] == "applied"


@pytest.mark.parametrize("damage", ["file", "row", "length", "kind"])
def test_damage_of_the_store_is_an_error_of_the_server_that_shows_nothing_of_it(tmp_path, caplog, damage):
    """A row that is damaged, cut, or a number instead of bytes costs one user, and a damaged file all that are in it."""
    with served(tmp_path) as server:
        assert server("PUT", "/v1/personas/anna/items", {"items": ITEMS})[0] == 200
    (path,) = [path for path in tmp_path.rglob("*.sqlite") if _users(path)]
    if damage == "file":
        path.write_bytes(os.urandom(8192))
    else:
        vectors = {"row": "zeroblob(length(data))", "length": "substr(data, 2)", "kind": "7"}[damage]
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(f"UPDATE chunks SET data = {vectors}")
    expected = (503, "store_unavailable") if damage == "file" else (500, "persona_damaged")
    more = {"items": [{"id": "new", "text": "the sea"}]}
    body = {"messages": CHAT, "max_tokens": 2, "persona": {"user": "anna"}}
    calls = [
        ("GET", "/v1/personas/anna", None),
        ("POST", "/v1/chat/completions", body),
        ("POST", "/v1/personas/anna/items", more),
        ("DELETE", f"/v1/personas/anna/items/{ITEMS[0]['id']}", None),
    ]
    healing = [("PUT", "/v1/personas/anna/items", more), ("DELETE", "/v1/personas/anna", None)]
    with served(tmp_path) as server:
        for call in [*calls, *(healing if damage == "file" else [])]:
            status, answer, _ = server(*call)
            assert (status, answer["error"]["code"]) == expected
            assert not re.search(r"sqlite|[0-9a-f]{16}", answer["error"]["message"])
        assert ("sqlite" if damage == "file" else "items of user") in caplog.text  # for whoever runs the server
        if damage != "file":
            assert [server(*call)[0] for call in healing] == [200, 200]


def _users(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT count(*) FROM users").fetchone()[0]


def test_a_full_store_loses_nothing(server, monkeypatch):
    def full(*args, **kwargs):
        raise StoreError("The disk of the store is full.")

    monkeypatch.setattr(type(server.store), "append", full)
    monkeypatch.setattr(type(server.store), "replace", full)
    for method in ("PUT", "POST"):
        status, reply, _ = server(method, "/v1/personas/anna/items", {"items": [{"id": "new", "text": "rain"}]})
        assert (status, reply["error"]["code"]) == (503, "store_unavailable") and "full" in reply["error"]["message"]
    monkeypatch.undo()
    assert server("GET", "/v1/personas/anna")[1]["items"] == 4


def test_a_store_of_another_encoder_is_refused(server, tmp_path):
    with (
        open_store(tmp_path, EncoderSpec("another", 12), secret=SECRET) as store,
        pytest.raises(MismatchError, match="another"),
    ):
        create_app(server.engine, store)
