"""Figures of a server for Prometheus, and its log. Neither holds a text or a user id."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...modeling import Persona, Personalizer
from ..monitoring import persona_norm, weight_entropy

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Monitoring:
    """Counters of requests, and averages over the last personas that were used.

    Args:
        waiting: number of requests in the engine's queue.
        every: look at one of so many answers, for which weights are computed once more, and of so many appends.
        last: average over so many personas that were looked at.
    """

    def __init__(self, waiting: Callable[[], int], every: int = 16, last: int = 256):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("pplug_requests", "Requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "pplug_request_seconds", "Time to the end of an answer.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.tokens = Counter("pplug_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self.personas = Counter("pplug_personas", "Answers with a persona, and without.", ["state"], registry=registry)
        self.items = Counter("pplug_items", "Items written and deleted.", ["change"], registry=registry)
        self.running = Gauge("pplug_requests_running", "Requests in progress.", registry=registry)
        queue = Gauge("pplug_queue", "Requests that wait for the language model.", registry=registry)
        queue.set_function(waiting)
        for name, what in (
            (
                "persona_entropy",
                "Mean entropy of the weights over its maximum: 0 one item decides, 1 all count alike.",
            ),
            ("persona_norm", "Mean norm of P over the norm of a token embedding."),
            ("persona_empty", "Share of requests for a user whose history is empty or unknown."),
            ("history_drift", "Mean cosine distance between a user's mean item before and after an append."),
        ):
            values: deque[float] = deque(maxlen=last)
            setattr(self, name.rpartition("_")[2], values)
            Gauge(f"pplug_{name}", what, registry=registry).set_function(lambda v=values: _mean(v))
        self.every, self._seen = every, defaultdict[str, int](int)

    entropy: deque[float]
    norm: deque[float]
    empty: deque[float]
    drift: deque[float]

    def is_due(self, kind: str) -> bool:
        """Return true for one of `every` calls of a kind."""
        self._seen[kind] += 1
        return self._seen[kind] % self.every == 1 or self.every == 1

    def look_at(self, personalizer: Personalizer, persona: Persona, query: str) -> None:
        """Take in how a persona was used."""
        if len(persona) > 1:
            entropy = weight_entropy(personalizer.weights(persona, query))
            self.entropy.append(entropy.item() / math.log(len(persona)))
        norm = persona_norm(personalizer.embedding(persona, query), personalizer.config.embedding_norm)
        self.norm.append(norm.item())

    def appended(self, before: Persona, newer: Persona) -> None:
        """Take in how far new items move a user who has some."""
        old, new = (persona.vectors.float().sum(dim=0).double() for persona in (before, newer))
        self.drift.append(1 - float(torch.cosine_similarity(old, old + new, dim=0)))

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus."""
        return generate_latest(self.registry)


def _mean(values: deque[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception, its type and place alone: its text may hold a user's."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON; its fields are in `record.fields`."""
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line |= place_of(record.exc_info[1])
        return json.dumps(line)


def place_of(error: BaseException) -> dict[str, str]:
    """Return the type of an error and where it arose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return {"error": type(error).__name__, "at": where}


def now() -> int:
    """Return the seconds since 1970."""
    return int(time.time())
