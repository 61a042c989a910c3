"""`Engine`: what answers requests with a language model, each with the persona of its own user.

engine = TransformersEngine.from_pretrained("me/movie-tags")
answers = engine.generate([Request("What is this about? ...", persona=persona, query="..."), Request("Hello")])
for piece in engine.stream(Request("Hello", persona=persona)):
    print(piece.text, end="")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from types import TracebackType
from typing import Literal, Self

from ..modeling import Persona, Personalizer


@dataclass(frozen=True)
class Sampling:
    """Settings by which an answer is continued.

    Args:
        max_new_tokens: of the answer.
        temperature: 0 takes the most likely token.
        top_p, top_k: nucleus and number of tokens to draw from (1 and 0: all).
        stop: texts that end the answer and are not part of it.
        seed: of the draws; None draws anew each time.
        repetition_penalty, presence_penalty, frequency_penalty: as usual; an engine may refuse them with a persona.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Request:
    """One question of one user.

    Args:
        prompt: text, or messages of a chat ({"role", "content"}), oldest first.
        persona: of the user; None answers as the bare model.
        query: what the items are weighted by (default: what the plug takes from the prompt, or from the last text of the user).
        plug: name of the plug, of an engine that has several (default: its first).
        strength: of the persona: 0 as for nobody, 1 as trained.
        sampling: see the class.
        tenant: whose request it is; what is cached of one tenant's requests is never used for another's.
        cancelled: set by the caller, from any thread, when nobody wants the answer any more; it is then an error, or is
            finished all the same by an engine that does not look.
    """

    prompt: str | Sequence[Mapping[str, str]]
    persona: Persona | None = None
    query: str | None = None
    plug: str | None = None
    strength: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    cancelled: Event | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer, or a piece of one that is streamed: the last piece alone has a finish reason.

    Args:
        text: of the answer, without a stop text.
        finish_reason: "stop" at the end token or a stop text, "length" at `max_new_tokens`; None in the middle.
        prompt_tokens: tokens of the prompt, soft prompt included.
        completion_tokens: tokens generated so far.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(ABC):
    """Base class. All methods may be called from several threads at once."""

    @property
    @abstractmethod
    def personalizers(self) -> Mapping[str, Personalizer]:
        """The plugs with their encoders by name, the default first: what encodes items and weights them."""

    @property
    def plugs(self) -> Sequence[str]:
        """Names of the plugs that requests may choose, the default first."""
        return list(self.personalizers)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their turn."""
        return 0

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order.

        Args:
            requests: of any users, plugs and sampling settings.

        Raises:
            PPlugError: a request that cannot be answered; others of the same moment, of other callers, are unharmed.
        """

    @abstractmethod
    def stream(self, request: Request) -> Iterator[Answer]:
        """Yield an answer in pieces as they are made; closing the iterator ends the work on it.

        Args:
            request: of one user.
        """

    @abstractmethod
    def check(self) -> None:
        """Ask a question whose answer is known, and raise unless it comes: a health check that can fail."""

    @abstractmethod
    def close(self) -> None:
        """End all work and free the memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
