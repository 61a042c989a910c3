"""Everything that a server refuses because it is too much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        body: bytes of a request.
        items: items of a request, 10,000 at most.
        item_characters: characters of an item's text, and of a query.
        user_items: items of a user.
        new_tokens: tokens of an answer, which is also the default.
        stop_characters: characters of a stop text.
        choices: answers to one request, over all its prompts.
        concurrency: requests in progress; more are refused with 429.
        client_seconds: time for a client to send its request, and to take a piece of an answer.
    """

    body: int = 4 * 2**20
    items: int = 1000
    item_characters: int = 20_000
    user_items: int = 10_000
    new_tokens: int = 512
    stop_characters: int = 256
    choices: int = 16
    concurrency: int = 256
    client_seconds: float = 30.0
