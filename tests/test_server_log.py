"""Figures and log of the server hold neither texts nor users."""

import json
import logging
import time
from pathlib import Path

import openai
import pytest
from serving import ITEMS, ask

from pplug_hf.serving.server.monitoring import JsonLines


def test_figures_hold_no_user(server, client, monkeypatch):
    monkeypatch.setattr(server.service.monitoring, "every", 1)
    for user in ("anna", "nobody-knows-me"):
        ask(client, extra_body={"persona": {"user": user}})
    server("POST", "/v1/personas/anna-2/items", {"items": ITEMS[:2]})
    server("POST", "/v1/personas/anna-2/items", {"items": ITEMS[2:]})
    while not (server.service.monitoring.norm and server.service.monitoring.drift):
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
    assert line["error"] == "ZeroDivisionError" and Path(__file__).name in line["at"]
    assert "secret" not in "".join(JsonLines().format(r) for r in caplog.records)
