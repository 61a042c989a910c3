"""vLLM in this process: an event loop of its own that many threads hand requests to, which vLLM answers together."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from ..errors import ConfigurationError, EngineError, TimeLimitError
from ..optional import require

T = TypeVar("T")

_PATIENCE = 10.0  # seconds that vLLM has to drop a request, before it is ended all the same

# Arguments of vLLM that would answer without the persona, or share what must not be shared.
_REFUSED = {
    "kv_transfer_config": "caches outside of the engine know states by token ids alone, and would give one user another's",
    "skip_tokenizer_init": "stop texts need the tokenizer",
    "speculative_config": "drafts are made without the persona",
}


class Piece(NamedTuple):
    """Piece of an answer: what an engine has made since the last one."""

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"] | None


class Work:
    """A request that is being answered.

    Args:
        task: what answers it; cancelled when nobody listens any more.
        pieces: the queue that it fills, with None behind the last piece, or what went wrong.
    """

    def __init__(self, task: Future[None], pieces: SimpleQueue[Piece | Exception | None]):
        self.task, self.pieces, self._began = task, pieces, time.monotonic()

    def __call__(self, seconds: float | None = None) -> Iterator[Piece]:
        """Yield the pieces.

        Args:
            seconds: that all may take together since the request was sent, however late they are asked for.

        Raises:
            EngineError: the engine failed.
            TimeLimitError: it was too slow.
        """
        end = None if seconds is None else self._began + seconds
        while True:
            try:
                piece = self.pieces.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except Empty:
                raise TimeLimitError(f"The answer was not finished within {seconds:g} seconds.") from None
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                return
            yield piece

    def cancel(self) -> None:
        """End the work, if it has not ended."""
        self.task.cancel()


class VllmCore:
    """A vLLM engine.

    Args:
        model: Hub id or folder of the language model.
        **arguments: of `vllm.AsyncEngineArgs`.

    Raises:
        MissingPackageError: vLLM is not installed.
        ConfigurationError: an argument that does not go with personas, or vLLM cannot load the model.
    """

    def __init__(self, model: str, **arguments: Any):
        for name, why in _REFUSED.items():
            if arguments.get(name):
                raise ConfigurationError(f"{name} does not go with VllmEngine: {why}. Leave it out.")
        self._vllm = require("vllm", "vllm", "VllmEngine")
        if require("vllm.platforms", "vllm", "VllmEngine").current_platform.is_cpu():
            arguments.setdefault("enforce_eager", True)  # compiling takes minutes at every start there
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pplug-vllm", daemon=True)
        self._thread.start()
        self._closed: str | None = None
        self._closing = threading.Lock()  # no request is sent behind the one that ends the engine
        self._answering: set[asyncio.Task[Any]] = set()  # changed by the event loop's thread alone
        try:
            self._llm: Any = self._wait(self._start({"model": model, **arguments, "enable_prompt_embeds": True}))
        except Exception as error:
            self._stop_loop()
            raise ConfigurationError(f"vLLM cannot load {model!r} ({type(error).__name__}: {error})") from error
        config = self._llm.model_config
        self.dtype: torch.dtype = config.dtype
        self.width: int = config.get_hidden_size()
        self.max_length: int = config.max_model_len
        self.max_running: int = self._llm.vllm_config.scheduler_config.max_num_seqs

    @property
    def running(self) -> int:
        """Number of requests that are not answered yet."""
        return len(self._answering)

    def start(self, prompt: Mapping[str, object], options: Mapping[str, object], stream: bool = False) -> Work:
        """Begin to answer a prompt, together with all others that are being answered.

        Args:
            prompt: of `mixed_prompt`.
            options: of `sampling_options`.
            stream: give pieces as they are made; otherwise the answer as one.

        Raises:
            ConfigurationError: settings that mean nothing.
            EngineError: the engine is closed or dead.
        """
        kinds = require("vllm.sampling_params", "vllm", "VllmEngine").RequestOutputKind
        try:
            params = self._vllm.SamplingParams(**options, output_kind=kinds.DELTA if stream else kinds.FINAL_ONLY)
        except Exception as error:  # some of vLLM's own are not ValueErrors
            raise ConfigurationError(f"vLLM refuses these settings: {error}") from error
        pieces: SimpleQueue[Piece | Exception | None] = SimpleQueue()
        with self._closing:
            if self._closed:
                raise EngineError(self._closed)
            return Work(asyncio.run_coroutine_threadsafe(self._answer(prompt, params, pieces), self._loop), pieces)

    def close(self) -> None:
        """End the engine and its process. Requests that are not answered yet fail."""
        with self._closing:
            if self._closed:
                return
            self._closed = "The engine is closed."
        self._wait(self._shutdown())
        self._stop_loop()

    async def _start(self, arguments: Mapping[str, object]) -> Any:
        given = self._vllm.AsyncEngineArgs(**{"disable_log_stats": True, **arguments})
        return self._vllm.AsyncLLMEngine.from_engine_args(given)

    async def _answer(
        self, prompt: Mapping[str, object], params: object, pieces: SimpleQueue[Piece | Exception | None]
    ) -> None:
        """Fill a queue. Being cancelled ends the request in the engine, too."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            async for output in self._llm.generate(prompt, params, uuid.uuid4().hex):
                made = output.outputs[0]
                if made.finish_reason not in (None, "stop", "length"):
                    raise EngineError(f"vLLM ended an answer early ({made.finish_reason}).")
                pieces.put(Piece(made.text, list(made.token_ids), made.finish_reason))
            pieces.put(None)
        except asyncio.CancelledError:
            pieces.put(EngineError(self._closed or "The request was cancelled."))
            raise
        except EngineError as error:
            pieces.put(error)
        except Exception as error:  # its text may hold what a user wrote
            pieces.put(EngineError(f"vLLM failed ({type(error).__name__}): restart the engine if others fail, too."))
        finally:
            self._answering.discard(task)

    async def _shutdown(self) -> None:
        if answering := [*self._answering]:  # vLLM leaves those waiting who ask when it ends
            for task in answering:
                task.cancel()
            await asyncio.wait(answering, timeout=_PATIENCE)
        self._llm.shutdown()
        self._llm = None

    def _wait(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
