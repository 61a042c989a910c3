"""The server, through the official `openai` client and raw requests."""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import openai
import pytest
import tiny
import torch
from serving import ITEMS, served
from test_chats import IGNORES_SYSTEM
from test_chats import PLAIN as PLAIN_TEMPLATE
from test_engine import alone, slow, with_two_plugs

from pplug_hf import ConfigurationError, EncoderSpec, MismatchError, open_store
from pplug_hf.errors import EngineError, StoreError
from pplug_hf.serving.engine import Answer, Engine, Request, Sampling
from pplug_hf.serving.server.api_keys import ApiKeys
from pplug_hf.serving.server.app import check_host, create_app
from pplug_hf.serving.server.limits import Limits
from pplug_hf.serving.server.monitoring import JsonLines
from pplug_hf.serving.server.service import Service

PROMPT = tiny.PROMPTS[0]
CHAT = [{"role": "user", "content": PROMPT}]
ANNA = {"persona": {"user": "anna"}}
PLAIN = [Request(PROMPT, sampling=Sampling(1))]
KEYS = {"key-a": "acme", "key-b": "bolt", "key-c": "acme"}
LIMITS = Limits(body=20_000, items=20, user_items=30, item_characters=200, new_tokens=64, client_seconds=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a model with two plugs, which knows one user."""
    model = with_two_plugs(tmp_path_factory.mktemp("other"), "other", attention_temperature=0.2)
    with served(tmp_path_factory.mktemp("store"), model, limits=LIMITS) as server:
        assert server("PUT", "/v1/personas/anna/items", {"items": ITEMS})[0] == 200
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, create="chat", **options):
    """Return an answer and the headers that came with it."""
    options = {"model": "default", "max_tokens": 6, "extra_body": ANNA, **options}
    if create == "chat":
        raw = client.chat.completions.with_raw_response.create(**{"messages": CHAT, **options})
    else:
        raw = client.completions.with_raw_response.create(**{"prompt": PROMPT, **options})
    return raw.parse(), raw.headers


def expected(server, user="anna", prompt=PROMPT, **options):
    """What `model.generate` says to it."""
    persona = None if user is None else server.store.get(user)
    return alone(server.engine.model, Request(prompt, persona, sampling=Sampling(6), **options))


# ---- answers


def test_a_chat_is_answered_for_its_user(server, client):
    answer, headers = ask(client)
    (choice,) = answer.choices
    assert choice.message.content.strip() == expected(server) != expected(server, None)
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert (headers["x-persona"], headers["x-persona-items"]) == ("applied", "4")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert answer.object == "chat.completion" and answer.model == "default"


def test_who_has_no_persona_is_told_so(server, client):
    for extra, state, text in (
        ({"persona": {"user": "nobody"}}, "unknown", expected(server, None)),
        ({}, "none", expected(server, None)),
    ):
        answer, headers = ask(client, extra_body=extra)
        assert answer.choices[0].message.content.strip() == text
        assert (headers["x-persona"], headers["x-persona-items"]) == (state, "0")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, extra_body={"persona": {"user": "nobody", "required": True}})
    assert caught.value.code == "persona_not_found" and "nobody" not in str(caught.value)


def test_the_user_may_be_in_a_header_percent_encoded(server, client):
    server("PUT", f"/v1/personas/{quote('ä/b', safe='')}/items", {"items": ITEMS})
    for value, state in (("anna", "applied"), ("%C3%A4%2Fb", "applied"), ("anna%20", "unknown")):
        assert ask(client, extra_body={}, extra_headers={"X-Persona-User": value})[1]["x-persona"] == state
    body = {"persona": {"user": "nobody"}}
    assert ask(client, extra_body=body, extra_headers={"X-Persona-User": "anna"})[1]["x-persona"] == "unknown"
    with pytest.raises(openai.UnprocessableEntityError, match="UTF-8"):
        ask(client, extra_body={}, extra_headers={"X-Persona-User": "%FF"})


def test_a_query_and_a_strength_go_with_the_persona(server, client, monkeypatch):
    generate, asked = server.engine.generate, []
    monkeypatch.setattr(server.engine, "generate", lambda questions: asked.extend(questions) or generate(PLAIN))
    ask(client, extra_body={"persona": {"user": "anna", "query": "rain", "strength": 0.5}})
    ask(client, extra_body={**ANNA, "persona_strength": 0.0})
    ask(client)
    assert [(q.query, q.strength) for q in asked] == [("rain", 0.5), (None, 0.0), (None, 1.0)]
    assert all(len(q.persona) == 4 and q.tenant == "" for q in asked)


def test_a_model_is_a_plug(server, client):
    assert [model.id for model in client.models.list()] == ["default", "other"]
    assert client.models.retrieve("other").id == "other"
    answer, _ = ask(client, model="other")
    assert answer.choices[0].message.content.strip() == expected(server, plug="other") != expected(server)
    with pytest.raises(openai.NotFoundError, match="default, other") as caught:
        ask(client, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_stream_is_the_answer_in_pieces(server, client):
    whole, _ = ask(client)
    chunks, headers = ask(client, stream=True, stream_options={"include_usage": True})
    chunks = list(chunks)
    assert headers["x-persona"] == "applied" and headers["content-type"].startswith("text/event-stream")
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"] and not chunks[-1].choices
    assert not any(chunk.usage for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    plain, _ = ask(client, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_completions_take_several_prompts_and_give_several_answers(server, client):
    prompts = tiny.PROMPTS[:2]
    answer, headers = ask(client, "complete", prompt=prompts, n=2)
    assert headers["x-persona"] == "applied" and answer.object == "text_completion"
    texts = [choice.text.strip() for choice in answer.choices]
    assert texts == [expected(server, prompt=prompt) for prompt in prompts for _ in range(2)]
    single = [ask(client, "complete", prompt=prompt)[0].usage for prompt in prompts]
    assert answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in single)
    assert answer.usage.completion_tokens == 2 * sum(usage.completion_tokens for usage in single)
    pieces = ask(client, "complete", prompt=prompts, n=2, stream=True)[0]
    joined = ["", "", "", ""]
    for piece in pieces:
        joined[piece.choices[0].index] += piece.choices[0].text
    assert [text.strip() for text in joined] == texts


def test_draws_follow_the_seed(client):
    def draws(**options):
        return [c.message.content for c in ask(client, temperature=2, n=3, **options)[0].choices]

    assert len({*draws(seed=1)}) == 3 and draws(seed=1) == draws(seed=1) != draws(seed=5)
    assert draws() != draws()


def test_a_stop_text_ends_an_answer(client):
    whole = ask(client)[0].choices[0].message.content
    stop = whole.split()[2]
    for given in (stop, ["nothing like it", stop]):
        choice = ask(client, stop=given)[0].choices[0]
        assert choice.message.content == whole.partition(stop)[0] and choice.finish_reason == "stop"


def test_max_completion_tokens_and_parts_of_content_are_taken(client):
    parts = [
        {"role": "developer", "content": "write"},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    ]
    answer, _ = ask(client, messages=parts, max_tokens=openai.omit, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2
    flat = [{"role": "system", "content": "write"}, {"role": "user", "content": PROMPT}]
    assert ask(client, messages=flat, max_tokens=2)[0].choices[0].message == answer.choices[0].message


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, IGNORES_SYSTEM], ids=["plain", "ignores system"])
def test_a_chat_gets_the_system_text_of_its_plug_as_a_text_does(tmp_path, template):
    words = tiny.tokenizer("llama")
    words.chat_template = template
    with served(
        tmp_path, tiny.from_backbone(tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=words, system="cold")
    ) as server:
        _, text, _ = server("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 6})
        for content in (PROMPT, [{"type": "text", "text": PROMPT[:3]}, {"type": "text", "text": PROMPT[3:]}]):
            chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 6}
            _, answer, _ = server("POST", "/v1/chat/completions", chat)
            assert answer["choices"][0]["message"]["content"] == text["choices"][0]["text"]
            assert answer["usage"] == text["usage"]


def test_many_clients_at_once_get_what_each_would_alone(server, client):
    users = [None, "anna", "anna", None] * 8
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, client, extra_body={"persona": {"user": user}} if user else {}) for user in users]
    texts = [future.result()[0].choices[0].message.content.strip() for future in asked]
    assert texts == [expected(server, user) for user in users]


@pytest.mark.parametrize(
    "options, status, code",
    [
        ({"presence_penalty": 1}, 400, "unsupported_parameter"),
        ({"frequency_penalty": 1}, 400, "unsupported_parameter"),
        ({"logprobs": True}, 400, "unsupported_parameter"),
        ({"create": "text", "logprobs": 0}, 400, "unsupported_parameter"),
        ({"extra_body": {"repetition_penalty": 0}}, 400, "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, 400, "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
        ({"extra_body": {"prompt_embeds": "AAAA"}}, 400, "unsupported_parameter"),
        ({"extra_body": {"repetition_penalty": 1.2}}, 400, "unsupported_parameter"),
        ({"extra_body": {"min_p": 0.1}}, 400, "unsupported_parameter"),
        ({"max_tokens": 65}, 422, "too_many_tokens"),
        ({"max_tokens": 0}, 422, "invalid_value"),
        ({"n": 17}, 422, "too_many_choices"),
        ({"temperature": -1}, 422, "invalid_value"),
        ({"top_p": 0}, 422, "invalid_value"),
        ({"stop": [""]}, 422, "invalid_value"),
        ({"messages": []}, 422, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "invalid_value"),
        ({"messages": [{"role": "user", "content": "sea " * 3000}]}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": ""}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "a" * 257}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": 7}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "\ud800"}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "vectors": [[1.0]]}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "query": " "}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "query": "sea " * 51}}}, 422, "invalid_value"),
        ({"extra_body": {"persona": {"user": "anna", "strength": -0.5}}}, 422, "invalid_value"),
        ({"extra_body": {"persona_strength": -0.5}}, 422, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_a_clear_error(client, options, status, code, stream):
    try:
        json.dumps(options, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        pytest.skip("this client cannot send half a surrogate pair")
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, stream=stream, **options)
    assert (caught.value.status_code, caught.value.code) == (status, code), caught.value.message


def test_parameters_at_values_that_change_nothing_are_taken(client):
    neutral = {
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "min_tokens": 0,
        "logprobs": False,
        "top_logprobs": 0,
        "best_of": 1,
        "ignore_eos": False,
        "response_format": {"type": "text"},
    }
    assert ask(client, extra_body={**ANNA, **neutral})[0].choices == ask(client)[0].choices


def test_penalties_go_without_a_persona(client):
    text = ask(client, extra_body={}, frequency_penalty=2, max_tokens=32)[0].choices[0].message.content
    assert len(text.split()) > 2


def test_bodies_that_are_no_json_or_too_deep_or_hold_half_a_character_are_refused(server):
    path = "/v1/chat/completions"
    assert server("POST", path, b"{no json")[:1] == (400,)
    assert server("POST", path, b"")[0] == 422
    assert server("POST", path, b"[" * 9000 + b"]" * 9000)[0] in (400, 422)
    half = b'{"messages": [{"role": "user", "content": "sea"}], "persona": {"user": "\\ud800"}}'
    status, reply, _ = server("POST", path, half)
    assert (status, reply["error"]["code"]) == (422, "invalid_value")
    half = b'{"messages": [{"role": "user", "content": "sea \\ud800"}], "max_tokens": 2}'
    assert server("POST", path, half)[0] == 200
    assert server("POST", "/v1/completions", b'{"prompt": "sea \\ud800", "max_tokens": 2}')[0] == 200
    status, reply, _ = server("POST", path, {"messages": CHAT}, Content_Type="text/plain")
    assert status == 422 and "application/json" in reply["error"]["message"]
    status, reply, _ = server("POST", path, {"messages": "a secret text"})
    assert status == 422 and "secret" not in json.dumps(reply) and reply["error"]["param"] == "messages"
    assert server("GET", "/v1/nothing")[1]["error"]["code"] == "not_found"
    assert server("PATCH", "/v1/models")[:2][0] == 405


# ---- personas


def test_a_persona_is_written_shown_and_forgotten(server):
    path = "/v1/personas/ben"
    times = [{**item, "time": time} for item, time in zip(ITEMS, ("2026-01-02", 1767400000, None, None), strict=True)]
    status, reply, _ = server("PUT", f"{path}/items", {"items": times[:2]})
    assert status == 200 and {k: reply[k] for k in ("id", "object", "items", "updated_at")} == {
        "id": "ben",
        "object": "persona",
        "items": 2,
        "updated_at": 1767400000,
    }
    assert reply["encoder"] == server.store.spec.digest and "vectors" not in json.dumps(reply)
    for _ in range(2):  # appending may be repeated
        status, reply, _ = server("POST", f"{path}/items", {"items": times[1:]})
        assert (status, reply["items"]) == (200, 4)
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
    status, reply, _ = server("POST", path, {"items": items[:2]})
    assert (status, reply["items"], written._value.get() - before) == (200, 3, 2)
    assert server.store.get("raced").item_ids == ("c", "a", "b")


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


# ---- keys


def test_a_key_reaches_its_own_tenant_alone(tmp_path):
    keys = {hashlib.sha256(key.encode()).hexdigest(): tenant for key, tenant in KEYS.items()}
    with served(tmp_path, keys=keys) as server:
        for key in (None, "key-x", "key-a ", "", "KEY-A"):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("DELETE", "/v1/personas/anna")):
                status, reply, _ = server(method, path, key=key.strip() + "x" if key else key)
                assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert server("GET", "/health")[0] == server("GET", "/ready")[0] == 200
        assert server("PUT", "/v1/personas/anna/items", {"items": ITEMS}, "key-a")[0] == 200

        body = {"messages": CHAT, "max_tokens": 6, "persona": {"user": "anna"}}
        own, others = (server("POST", "/v1/chat/completions", body, key) for key in ("key-c", "key-b"))
        assert own[2]["x-persona"] == "applied" and others[2]["x-persona"] == "unknown"
        assert own[1]["choices"] != others[1]["choices"]
        strangers = server("POST", "/v1/chat/completions", {**body, "persona": {"user": "nobody"}}, "key-b")
        assert others[1]["choices"] == strangers[1]["choices"]
        for method, path in (
            ("GET", "/v1/personas/anna"),
            ("DELETE", "/v1/personas/anna/items/i1"),
            ("DELETE", "/v1/personas/anna"),
        ):
            others, strangers = (
                server(method, path.replace("anna", user), key="key-b") for user in ("anna", "nobody")
            )
            assert others[:2] == strangers[:2] and others[0] == 404
        assert server("PUT", "/v1/personas/anna/items", {"items": ITEMS[:1]}, "key-b")[1]["items"] == 1
        assert server("DELETE", "/v1/personas/anna", key="key-b")[0] == 200
        assert server("GET", "/v1/personas/anna", key="key-c")[1]["items"] == 4

        with openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key" and "wrong" not in str(caught.value)


def test_without_keys_nobody_else_gets_in(tmp_path):
    check_host("127.0.0.1", None)
    check_host("0.0.0.0", ApiKeys({"0" * 64: "acme"}))
    for keys in (None, ApiKeys({})):
        with pytest.raises(ConfigurationError, match="keys"):
            check_host("0.0.0.0", keys)
    file = tmp_path / "keys.json"
    for text in ("[]", '{"key-a": "acme"}', '{"' + "0" * 64 + '": ""}', "{", '{"' + "0" * 64 + '": 1}'):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match="API keys"):
            ApiKeys.from_file(file)


REBOUND = [
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "evil.example",
    "",
    "[::1",
    "10.0.0.1",
    "localhost@evil.example:1",
]


@pytest.mark.parametrize("host", REBOUND)
def test_without_keys_no_page_of_another_name_gets_in(server, host):
    for method, path in (
        ("GET", "/v1/personas/anna"),
        ("PUT", "/v1/personas/anna/items"),
        ("DELETE", "/v1/personas/anna"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/metrics"),
    ):
        status, reply, _ = server(method, path, {"items": []} if method in ("PUT", "POST") else None, Host=host)
        assert (status, reply["error"]["code"]) == (421, "misdirected_request")
    assert server("GET", "/v1/personas/anna")[1]["items"] == 4


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "https://[::1", ""]
)
def test_without_keys_no_page_from_elsewhere_writes(server, origin):
    """As `fetch(url, {mode: "no-cors"})` sends it, which needs no leave: text, or a blob without a type."""
    body = json.dumps({"items": ITEMS[:1], "messages": CHAT}).encode()
    for path in ("/v1/personas/victim/items", "/v1/chat/completions"):
        for kind in ("text/plain", "", "application/json"):
            status, reply, _ = server("POST", path, body, Origin=origin, Content_Type=kind)
            assert (status, reply["error"]["code"]) == (421, "misdirected_request")
    assert server("GET", "/v1/personas/victim")[0] == 404


def test_pages_of_this_machine_get_in_and_with_keys_every_page(server, tmp_path):
    for origin in (server.url, "http://localhost:3000", "http://[::1]:8000"):
        assert server("GET", "/v1/personas/anna", Origin=origin)[0] == 200
        assert server("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1}, Origin=origin)[0] == 200
    with served(tmp_path, keys={hashlib.sha256(b"key-a").hexdigest(): "acme"}) as locked:
        assert locked("GET", "/v1/models", key="key-a", Origin="https://api.example")[0] == 200


def test_the_names_of_loopback_get_in_and_with_keys_every_name(server, tmp_path):
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "127.1.2.3"):
        assert server("GET", "/v1/personas/anna", Host=host)[0] == 200
    with served(tmp_path, keys={hashlib.sha256(b"key-a").hexdigest(): "acme"}) as locked:
        assert locked("GET", "/v1/models", key="key-a", Host="api.example")[0] == 200


# ---- limits


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


# ---- faults


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
    store = open_store(tmp_path, server.store.spec, secret="a secret of the tests")
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
    with open_store(tmp_path, server.store.spec, secret="a secret of the tests") as store:
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
        open_store(tmp_path, EncoderSpec("another", 12), secret="a secret of the tests") as store,
        pytest.raises(MismatchError, match="another"),
    ):
        create_app(server.engine, store)


# ---- figures and log


def test_figures_hold_no_user(server, client, monkeypatch):
    monkeypatch.setattr(server.service.monitoring, "every", 1)
    for user in ("anna", "nobody-knows-me"):
        ask(client, extra_body={"persona": {"user": user}})
    server("POST", "/v1/personas/anna-2/items", {"items": ITEMS[:2]})
    server("POST", "/v1/personas/anna-2/items", {"items": ITEMS[2:]})
    while not server.service.monitoring.norm:
        time.sleep(0.01)
    text = server("GET", "/metrics")[1].decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['pplug_requests_total{route="/v1/chat/completions",status="200"}']) >= 2
    assert float(figures['pplug_personas_total{state="unknown"}']) >= 1
    assert float(figures['pplug_tokens_total{kind="completion"}']) > 6
    assert 0 < float(figures["pplug_persona_entropy"]) <= 1 and 0 < float(figures["pplug_persona_empty"]) < 1
    assert float(figures["pplug_persona_norm"]) > 0 and 0 < float(figures["pplug_history_drift"]) < 2
    assert "pplug_queue" in figures and float(figures["pplug_requests_running"]) == 1
    assert "anna" not in text and "nobody" not in text
    server("DELETE", "/v1/personas/anna-2")


def test_the_log_holds_neither_texts_nor_users(server, client, caplog):
    caplog.set_level(logging.INFO, "pplug_hf.server")
    ask(client)
    server("PUT", "/v1/personas/anna-3/items", {"items": ITEMS})
    server("GET", "/v1/personas/anna-3?secret=1")
    server("DELETE", "/v1/personas/anna-3")
    server("GET", "/secret/path")
    wanted = {
        ("POST", "/v1/chat/completions", 200),
        ("PUT", "/v1/personas/{user}/items", 200),
        ("GET", "/v1/personas/{user}", 200),
        ("DELETE", "/v1/personas/{user}", 200),
        ("GET", "other", 404),
    }
    requests = {}
    while not wanted <= requests.keys():  # a line is written behind its answer
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
        requests = {(x["method"], x["route"], x["status"]): x for x in lines if x["event"] == "request"}
    asked = requests["POST", "/v1/chat/completions", 200]
    assert asked["completion_tokens"] == 6 and asked["persona"] == "applied"
    text = json.dumps(lines)
    assert not any(word in text for word in ("anna", "secret", "story", "rain"))


def test_an_unforeseen_error_is_logged_without_its_text(server, client, monkeypatch, caplog):
    def fails(*args):
        raise ZeroDivisionError("a secret text")

    monkeypatch.setattr(type(server.store), "get", fails)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        ask(client)
    (line,) = [json.loads(JsonLines().format(r)) for r in caplog.records if r.getMessage() == "failed"]
    assert line["error"] == "ZeroDivisionError" and "test_server.py" in line["at"]
    assert "secret" not in "".join(JsonLines().format(r) for r in caplog.records)
