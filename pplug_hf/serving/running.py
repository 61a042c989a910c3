"""A request on its way through an engine: its tokens so far, their text, and who waits for it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Literal

from ..errors import EngineError, TimeLimitError
from .engine import Answer, Request
from .served_plug import ServedPlug

_UNFINISHED = "\ufffd"  # what a tokenizer makes of a part of a character
_READ_AGAIN = 16  # tokens in front of a new one that are decoded with it: its text depends on them


class Running:
    """A request, its prompt and its answer so far. One thread takes tokens in, others wait for pieces of text.

    Args:
        request: as it was asked.
        served: the plug that writes the prompt; its tokenizer reads the answer, and its end tokens end it.
        ids: tokens of the prompt.
        position: tokens of the prompt in front of the soft prompt.
        plug: name, or None for an answer without a soft prompt.
        soft_tokens: length of the soft prompt.
        limit: most tokens of the answer.
        seconds: until the answer must be finished.
        streams: send pieces as they are made, not the whole answer alone.
    """

    def __init__(
        self,
        request: Request,
        served: ServedPlug,
        ids: Sequence[int],
        position: int,
        plug: str | None,
        soft_tokens: int,
        limit: int,
        seconds: float,
        streams: bool = False,
    ):
        self.request, self.served, self.plug = request, served, plug
        self.ids, self.position, self.limit = list(ids), position, limit
        self.length = len(self.ids) + soft_tokens
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.streams, self.is_alone = streams, False
        self.ended = self.cancelled = False
        self.pieces: SimpleQueue[Answer | Exception] = SimpleQueue()
        self.tokens: list[int] = []
        self._sent = 0  # characters
        seed = request.sampling.seed
        # Python draws the same for a number and its negative; other seeds below 2**64 stay as they are.
        self._seed = int.from_bytes(os.urandom(8)) if seed is None else seed % 2**64
        self.restart()

    def restart(self) -> None:
        """Begin the answer anew, with the same draws; what was sent of it is not sent again."""
        self.tokens.clear()
        self._known, self._start, self._overlap = "", 0, ""
        self.draws = random.Random(self._seed)

    def take(self, token: int) -> None:
        """Take in the id of the next token, and send what it makes certain."""
        self.tokens.append(token)
        is_end = token in self.served.ends
        reason = "stop" if is_end else "length" if len(self.tokens) >= self.limit else None
        stops = self.request.sampling.stop
        if not (reason or self.streams or stops):
            return
        searched = len(self._known)
        text = self.served.decode(self.tokens[:-1] if is_end else self.tokens) if reason else self._text()
        found = [at for stop in stops if (at := text.find(stop, max(0, searched - len(stop)))) >= 0]
        if found:
            text, reason = text[: min(found)], "stop"
        if reason:
            self.end(self._answer(text, reason))
        elif self.streams and len(text := _certain(text, stops)) > self._sent:
            self.pieces.put(self._answer(text, None))
            self._sent = len(text)

    def _text(self) -> str:
        """Return the text so far, as `decode` gives it for all tokens, without decoding all of them again at each one.

        `_overlap`, the text of the tokens from `_start` on, is the end of `_known`, the text of all tokens up to there.
        """
        end = self.served.decode(self.tokens[self._start :])
        if not end.startswith(self._overlap):  # the new token changes the text in front of it
            return self.served.decode(self.tokens)
        text = self._known + end[len(self._overlap) :]
        if len(self.tokens) - self._start > 3 * _READ_AGAIN and not text.endswith(_UNFINISHED):
            overlap = self.served.decode(self.tokens[-_READ_AGAIN:])
            if text.endswith(overlap):  # it begins with a whole character
                self._known, self._start, self._overlap = text, len(self.tokens) - _READ_AGAIN, overlap
        return text

    def _answer(self, text: str, reason: Literal["stop", "length"] | None) -> Answer:
        return Answer(text[self._sent :], reason, self.length, len(self.tokens))

    def end(self, result: Answer | Exception) -> None:
        """Send the last piece, or what went wrong; what comes later is not sent."""
        if not self.ended:
            self.ended = True
            self.pieces.put(result)

    def is_over(self) -> bool:
        """Return whether nothing more is to be done, because it is answered, cancelled or late."""
        asked = self.request.cancelled
        if self.cancelled or (asked is not None and asked.is_set()):
            self.end(EngineError("The request was cancelled."))
        elif time.monotonic() > self.deadline:
            self.end(self._late())
        return self.ended

    def _late(self) -> TimeLimitError:
        return TimeLimitError(f"The answer was not finished within {self.seconds:g} seconds.")

    def next_piece(self) -> Answer:
        """Wait for the next piece, and return it.

        Raises:
            PPlugError: what went wrong.
        """
        try:
            piece = self.pieces.get(timeout=max(0.0, self.deadline - time.monotonic()))
        except Empty:  # also if the model hangs
            self.cancelled = True
            raise self._late() from None
        if isinstance(piece, Exception):
            raise piece
        return piece


def _certain(text: str, stops: Sequence[str]) -> str:
    """Return the beginning of a text that no later token changes: no half of a character, nor the beginning of a stop."""
    text = text.rstrip(_UNFINISHED)
    return text[: min((_begun(text, stop) for stop in stops), default=len(text))]


def _begun(text: str, stop: str) -> int:
    """Return where the end of a text may become a stop, which is not in it yet; its length if nowhere."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) if at < 0 else at
