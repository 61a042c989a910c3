"""Who gets in: keys, tenants, and pages of other sites."""

import hashlib
import json

import openai
import pytest
from serving import CHAT, ITEMS, PROMPT, served

from pplug_hf import ConfigurationError
from pplug_hf.serving.server.api_keys import ApiKeys
from pplug_hf.serving.server.app import check_host

KEYS = {"key-a": "acme", "key-b": "bolt", "key-c": "acme"}


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
