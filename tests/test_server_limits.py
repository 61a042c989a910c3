"""Limits of the server: large and slow bodies, too many requests, slow answers."""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError
from serving import ANNA, CHAT, ITEMS, served, slow

from pplug_hf.serving.engine import Answer
from pplug_hf.serving.server.bodies import ChatBody, CompletionBody, ItemsBody
from pplug_hf.serving.server.limits import Limits


def raw(server, data, wait=10):
    """Send bytes and return what comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(data)
        text = b""
        while b"request_timeout" not in text and (more := connection.recv(100_000)):
            text += more
        return text.decode()


def test_a_large_body_is_refused_and_a_slow_one_ends(server):
    large = json.dumps({"items": [{"id": "1", "text": "x" * 10_000_000}]}).encode()
    status, reply, _ = server("PUT", "/v1/personas/anna/items", large)
    assert (status, reply["error"]["code"]) == (413, "body_too_large")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(server, head + b"Content-Length: 1000\r\n\r\n{")  # and never the rest
    assert answer.startswith("HTTP/1.1 408") and "request_timeout" in answer
    answer = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    assert answer.startswith("HTTP/1.1 408")
    assert server("GET", "/v1/personas/anna")[1]["items"] == 4


@pytest.mark.parametrize(
    "kind, body",
    [
        (CompletionBody, {"prompt": [1] * 1000}),
        (CompletionBody, {"prompt": "a", "stop": [1] * 1000}),
        (CompletionBody, {"prompt": "a", "persona": {"user": "anna"} | {str(i): 1 for i in range(1000)}}),
        (ChatBody, {"messages": [1] * 1000}),
        (ChatBody, {"messages": [{}] * 10_001}),
        (ItemsBody, {"items": [{}] * 1000}),
        (ItemsBody, {"items": [{"id": "1"}] * 10_001}),
        (ItemsBody, {"items": []} | {str(i): 1 for i in range(1000)}),
    ],
)
def test_the_first_error_ends_the_check_of_a_body(kind, body):
    """All of them together keep the server busy for half a minute, and other requests waiting."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 2  # of a text or list, one for each


def test_requests_that_need_no_key_take_no_room(tmp_path):
    """Those that send nothing, a part of their head, or a body for ever to a route that needs no key."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with served(tmp_path, limits=Limits(concurrency=1)) as server, contextlib.ExitStack() as stack:
        for sent in (b"", head, head + b"Content-Length: 9\r\n\r\n{") * 3:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            connection.sendall(sent)
            if sent.endswith(b"{"):
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert server("GET", "/health")[0] == server("GET", "/v1/models")[0] == 200


def test_more_requests_than_there_is_room_for_are_told_to_come_again(tmp_path, monkeypatch):
    with served(tmp_path, limits=Limits(concurrency=2)) as server:
        slow(server.engine, monkeypatch, 0.05)
        body = {"messages": CHAT, "max_tokens": 20, "stop": "nothing like it"}
        with ThreadPoolExecutor(8) as pool:
            replies = [*pool.map(lambda _: server("POST", "/v1/chat/completions", body), range(8))]
        assert {status for status, _, _ in replies} == {200, 429}
        refused = [reply for reply in replies if reply[0] == 429]
        assert all(r[1]["error"]["code"] == "too_many_requests" and r[2]["retry-after"] for r in refused)
    with served(tmp_path, max_queue=1, max_batch=1) as server:
        slow(server.engine, monkeypatch, 0.05)
        with ThreadPoolExecutor(8) as pool:
            replies = [*pool.map(lambda _: server("POST", "/v1/chat/completions", body), range(8))]
        assert {status for status, _, _ in replies} == {200, 429}
        assert {r[1]["error"]["code"] for r in replies if r[0] == 429} == {"engine_overloaded"}


def test_an_answer_that_takes_too_long_ends(tmp_path, monkeypatch):
    with served(tmp_path) as server:
        server.engine.time_limit = 0.3  # only now: the question that an engine asks itself first may take longer
        slow(server.engine, monkeypatch, 0.1)
        body = {"messages": CHAT, "max_tokens": 20, "stop": "nothing like it"}
        status, reply, headers = server("POST", "/v1/chat/completions", body)
        assert (status, reply["error"]["code"]) == (503, "timeout") and headers["retry-after"]


def test_streams_of_many_answers_leave_room_for_other_requests(tmp_path, monkeypatch):
    with served(tmp_path, limits=Limits(concurrency=4)) as server, ThreadPoolExecutor(4) as pool:
        begun, go_on = threading.Semaphore(0), threading.Event()

        def stream(question):
            begun.release()
            go_on.wait(60)
            yield Answer("the", "length", 1, 1)

        monkeypatch.setattr(server.engine, "stream", stream)
        body = {"messages": CHAT, "n": 16, "stream": True}
        streams = [pool.submit(server, "POST", "/v1/chat/completions", body) for _ in range(2)]
        try:
            assert all(begun.acquire(timeout=10) for _ in range(2 * 16))
            for call in (("PUT", "/v1/personas/anna/items", {"items": ITEMS}), ("GET", "/v1/personas/anna")):
                assert pool.submit(server, *call).result(10)[0] == 200
            answer = pool.submit(server, "POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, **ANNA})
            assert answer.result(10)[0] == 200
        finally:
            go_on.set()
        assert all(stream.result()[1].endswith(b"data: [DONE]\n\n") for stream in streams)
