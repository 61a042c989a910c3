"""The server's personas: written, shown, forgotten, and their limits."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
import tiny
import torch
from serving import CHAT, ITEMS, served


def test_a_persona_is_written_shown_and_forgotten(server):
    path = "/v1/personas/ben"
    times = [{**item, "time": time} for item, time in zip(ITEMS, ("2026-01-02", 1767400000, None, None), strict=True)]
    status, reply, _ = server("PUT", f"{path}/items", {"items": times[:2]})
    assert status == 200 and {k: reply[k] for k in ("id", "object", "items")} == {
        "id": "ben",
        "object": "persona",
        "items": 2,
    }
    assert reply["updated_at"] == pytest.approx(time.time(), abs=60)  # however old the items are
    assert reply["encoder"] == server.store.spec.digest and "vectors" not in json.dumps(reply)
    for _ in range(2):  # appending may be repeated
        status, reply, _ = server("POST", f"{path}/items", {"items": times[1:]})
        assert (status, reply["items"]) == (200, 4)
    assert server("GET", path)[1] == reply
    assert server.store.get("ben").item_ids == ("i0", "i1", "i2", "i3")
    status, reply, _ = server("DELETE", f"{path}/items/i1")
    assert (status, reply["object"], reply["deleted"]) == (200, "persona.item.deleted", True)
    assert server("DELETE", f"{path}/items/i1")[1]["error"]["code"] == "item_not_found"
    assert server("GET", path)[1]["items"] == 3
    assert server("PUT", f"{path}/items", {"items": times[:1]})[1]["items"] == 1
    status, reply, _ = server("DELETE", path)
    assert (status, reply["object"], reply["items"]) == (200, "persona.deleted", 1)
    for method in ("GET", "DELETE"):
        status, reply, _ = server(method, path)
        assert (status, reply["error"]["code"]) == (404, "persona_not_found")


HOSTILE = [
    "../../etc/passwd",
    "a/b",
    "\0",
    "%00",
    "..%2f",
    "' OR 1=1 --",
    "user\n\r",
    "é",
    "e\u0301",
    "\u0430",  # looks like the next one
    "a",
    "💥" * 64,
    "items",
]


def test_any_text_is_a_user_and_no_two_are_the_same(server):
    for i, user in enumerate(HOSTILE):
        path = f"/v1/personas/{quote(user, safe='')}"
        items = [{"id": f"{user[:9]}/{n}", "text": "rain"} for n in range(i + 1)]
        assert server("PUT", f"{path}/items", {"items": items})[1]["id"] == user
    for i, user in enumerate(HOSTILE):
        path = f"/v1/personas/{quote(user, safe='')}"
        assert server("GET", path)[1]["items"] == i + 1
        item = quote(f"{user[:9]}/0", safe="")
        assert server("DELETE", f"{path}/items/{item}")[0] == 200
        body = {"messages": CHAT, "max_tokens": 1, "persona": {"user": user}}
        assert server("POST", "/v1/chat/completions", body)[2]["x-persona-items"] == str(i)
        assert server("DELETE", path)[0] == (200 if i else 404)


@pytest.mark.parametrize(
    "path, status",
    [
        (f"/v1/personas/{'a' * 257}", 422),
        ("/v1/personas/%FF", 422),
        ("/v1/personas//items", 404),
        ("/v1/personas/a/b/c", 404),
    ],
)
def test_ids_that_are_none_are_refused(server, path, status):
    body = {"items": []} if path.endswith("items") else None
    assert server("PUT" if body else "GET", path, body)[0] == status


def test_an_id_of_a_megabyte_is_not_read(server):
    with contextlib.suppress(ConnectionError):  # refused while it is sent
        assert 400 <= server("GET", f"/v1/personas/{'a' * 1_000_000}")[0] < 500
    assert server("GET", "/v1/personas/anna", None, None, X_Persona_User="a" * 50_000)[0] == 200


@pytest.mark.parametrize(
    "items, code",
    [
        ([{"id": "1"}], "invalid_value"),
        ([{"id": "1", "text": ""}], "invalid_value"),
        ([{"id": "1", "text": 5}], "invalid_value"),
        ([{"text": "a secret"}], "invalid_value"),
        ([{"id": "", "text": "a secret"}], "invalid_value"),
        (["a secret"], "invalid_value"),
        ("a secret", "invalid_value"),
        ([{"id": "1", "text": "a secret"}] * 2, "invalid_value"),
        ([{"id": "1", "text": "a secret", "time": "once"}], "invalid_value"),
        ([{"id": "1", "text": "secret" * 40}], "item_too_long"),
        ([{"id": str(i), "text": "a secret"} for i in range(21)], "too_many_items"),
    ],
)
def test_items_that_are_none_change_nothing(server, items, code):
    status, reply, _ = server("PUT", "/v1/personas/anna/items", {"items": items})
    assert (status, reply["error"]["code"]) == (422, code) and "secret" not in json.dumps(reply)
    assert server("GET", "/v1/personas/anna")[1]["items"] == 4


def test_a_user_has_a_limit_of_items(server):
    items = [{"id": f"x{i}", "text": "rain"} for i in range(20)]
    assert server("PUT", "/v1/personas/full/items", {"items": items})[0] == 200
    assert server("POST", "/v1/personas/full/items", {"items": [{**i, "id": "y" + i["id"]} for i in items]})[0] == 422
    assert server("DELETE", "/v1/personas/full")[1]["items"] == 20


def test_the_limit_of_items_holds_for_requests_at_once(server, monkeypatch):
    encode, all_have_counted, encoded = server.service.encode, threading.Barrier(6), []

    def waits(texts, *rest):
        encoded.extend(texts)
        all_have_counted.wait(60)  # each has read that the user has no items
        return encode(texts, *rest)

    monkeypatch.setattr(server.service, "encode", waits)

    def append(i):
        items = [{"id": f"{i}-{n}", "text": "rain"} for n in range(7)]  # 30 at most
        return server("POST", "/v1/personas/many/items", {"items": items})

    with ThreadPoolExecutor(6) as pool:
        replies = [*pool.map(append, range(6))]
    assert sorted(status for status, _, _ in replies) == [200] * 4 + [422] * 2
    assert {reply["error"]["code"] for status, reply, _ in replies if status == 422} == {"too_many_items"}
    assert len(encoded) == 6 * 7 and server("DELETE", "/v1/personas/many")[1]["items"] == 28


def test_an_append_during_which_a_user_is_replaced_loses_no_item(server, monkeypatch):
    encode, path, items = server.service.encode, "/v1/personas/raced/items", [{"id": i, "text": "rain"} for i in "abc"]
    server("PUT", path, {"items": items[:1]})
    written = server.service.monitoring.items.labels("written")
    others = [encode(["snow"], ["c"], [1.0])]

    def replaces(*arguments):
        newer = encode(*arguments)
        if others:
            server.store.replace("raced", others.pop())
        return newer

    monkeypatch.setattr(server.service, "encode", replaces)
    before = written._value.get()
    status, reply, _ = server("POST", path, {"items": items[1:]})
    assert (status, reply["items"], written._value.get() - before) == (200, 2, 1)
    assert server.store.get("raced").item_ids == ("c", "b")


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("path", ["", "/items/a"])
def test_a_write_that_began_before_a_deletion_does_not_undo_it(server, monkeypatch, method, path):
    encode, user = server.service.encode, "/v1/personas/leaves"
    first = [{"id": i, "text": "rain"} for i in "ab"]
    server("PUT", f"{user}/items", {"items": first})

    def deletes(*arguments):
        newer = encode(*arguments)
        assert server("DELETE", user + path)[0] == 200
        return newer

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "encode", deletes)
        status, reply, _ = server(method, f"{user}/items", {"items": [*first, {"id": "c", "text": "snow"}]})
    persona = server.store.get("leaves")
    assert (status, reply["error"]["code"]) == (409, "persona_changed")
    assert persona.item_ids == ("b",) if path else persona is None
    server("DELETE", user)


def test_an_append_reads_the_vectors_that_are_there_for_no_answer(server, monkeypatch):
    server("PUT", "/v1/personas/long/items", {"items": ITEMS[:2]})
    read = []
    get_many = type(server.store).get_many
    monkeypatch.setattr(
        type(server.store), "get_many", lambda store, users: read.append(users) or get_many(store, users)
    )
    for item in ITEMS[2:]:
        assert server("POST", "/v1/personas/long/items", {"items": [item]})[0] == 200
    assert len(read) == 2  # before each append, to know which items are new
    server("DELETE", "/v1/personas/long")


MANY = {"items": [{"id": str(i), "text": f"rain {i}"} for i in range(320)]}


def test_a_large_write_takes_turns_with_others(tmp_path, monkeypatch):
    with served(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        encode, encode_chunk = server.service.encode, server.service.personalizer.encode
        large_began, small_asks, order = threading.Event(), threading.Event(), []

        def asks(texts, *rest):
            if len(texts) == 1:
                small_asks.set()
            return encode(texts, *rest)

        def encodes(texts):
            order.append(len(texts))
            large_began.set()
            small_asks.wait(20)
            time.sleep(0.05)  # until the small write waits for its turn
            return encode_chunk(texts)

        monkeypatch.setattr(server.service, "encode", asks)
        monkeypatch.setattr(server.service.personalizer, "encode", encodes)
        large = pool.submit(server, "PUT", "/v1/personas/large/items", MANY)
        large_began.wait(20)
        small = pool.submit(server, "PUT", "/v1/personas/small/items", {"items": ITEMS[:1]})
        assert (small.result()[0], large.result()[0]) == (200, 200)
        assert sum(order) == 321 and 0 < order.index(1) < len(order) - 1
        written = server.store.get("large")
        assert written.item_ids == tuple(item["id"] for item in MANY["items"])
        expected = encode_chunk([item["text"] for item in MANY["items"]]).vectors
        assert torch.cosine_similarity(written.vectors.float(), expected).min().item() > 0.999


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_client_that_leaves_its_write_ends_the_work_on_it(tmp_path, monkeypatch, method):
    with served(tmp_path) as server:
        encode, encode_chunk = server.service.encode, server.service.personalizer.encode
        began, client_left, chunks = threading.Event(), [], []

        def asks(texts, ids, times, left):
            client_left.append(left)
            return encode(texts, ids, times, left)

        def encodes(texts):
            chunks.append(texts)
            began.set()
            client_left[0].wait(20)
            return encode_chunk(texts)

        monkeypatch.setattr(server.service, "encode", asks)
        monkeypatch.setattr(server.service.personalizer, "encode", encodes)
        data = json.dumps(MANY).encode()
        head = f"{method} /v1/personas/anna/items HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            assert began.wait(20)
        wanted = 'pplug_requests_total{route="/v1/personas/{user}/items",status="499"} 1.0'
        for _ in range(2000):
            if wanted in (text := server("GET", "/metrics")[1].decode()):
                break
            time.sleep(0.01)
        assert wanted in text and len(chunks) == 1
        assert server("GET", "/v1/personas/anna")[0] == 404


@pytest.fixture(scope="module")
def template_server(tmp_path_factory):
    model = tiny.model("llama", item_template="{tag} is {text}")
    with served(tmp_path_factory.mktemp("store"), model) as server:
        yield server


def test_an_item_template_makes_texts_of_fields(tmp_path):
    model = tiny.model("llama", item_template="{tag} is {text}")
    with served(tmp_path, model) as server:
        path = "/v1/personas/anna/items"
        assert server("PUT", path, {"items": [{"id": "1", "text": "rain", "tag": "cold"}]})[0] == 200
        vectors = server.service.personalizer.encode([{"text": "rain", "tag": "cold"}]).vectors
        assert torch.cosine_similarity(server.store.get("anna").vectors.float(), vectors).item() > 0.999
        status, reply, _ = server("PUT", path, {"items": [{"id": "1", "text": "a secret"}]})
        assert status == 422 and "'tag'" in reply["error"]["message"] and "secret" not in reply["error"]["message"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tag": "a secret"}, "Item 1 cannot be used: no field 'text'"),
        ({"tag": "a secret", "txt": "a secret"}, "no field 'text'"),
        ({"tag": "", "text": " "}, "no text"),
        ({"tag": None, "text": None}, "no text"),
        ({"tag": {"a": ["a secret"]}, "text": "rain"}, "the field 'tag' is a dict"),
        ({"tag": ["a secret"], "text": "rain"}, "the field 'tag' is a list"),
    ],
)
def test_fields_that_make_no_text_are_refused(template_server, fields, message):
    path, good = "/v1/personas/anna/items", {"id": "0", "text": "rain", "tag": "cold"}
    status, reply, _ = template_server("POST", path, {"items": [good, {"id": "1", **fields}]})
    assert (status, reply["error"]["code"]) == (422, "invalid_value")
    assert message in reply["error"]["message"] and "secret" not in json.dumps(reply)
    assert template_server("GET", "/v1/personas/anna")[0] == 404


def test_a_field_may_be_empty_a_number_or_half_a_character(template_server):
    path = "/v1/personas/ben/items"
    items = b'{"items": [{"id": "1", "tag": null, "text": "rain"}, {"id": "2", "tag": 5, "text": "a \\ud800"}]}'
    assert template_server("PUT", path, items)[1]["items"] == 2
