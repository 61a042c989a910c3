"""`TransformersEngine`: answers of a transformers model, many requests at once, each with a persona of its own.

Requests wait in a queue. One thread takes as many as fit into a batch, whatever their users, plugs, lengths and sampling
settings, and calls `model.generate`. Only plugs whose generation settings differ, such as their end tokens, are not batched
together. A row's answer goes out when it ends; the next batch begins when all have.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..errors import ConfigurationError, DataError, EngineBusyError, EngineError, PPlugError
from ..modeling import Persona, Personalizer, PPlugForConditionalGeneration, PPlugModel
from ..modeling.prefix import position_limit
from ..modeling.prompt_cache import PromptCache, TenantsPromptCache, size_in_bytes
from ..modeling.strength import checked_strength
from ..processing import PPlugProcessor
from .engine import Answer, Engine, Request, Sampling
from .prompts import check_persona, check_sampling, check_size, prompt_row, query_of
from .row_sampling import RowSampling
from .running import Running
from .served_plug import ServedPlug

logger = logging.getLogger(__name__)

_CANARY = "What is good today?"


class TransformersEngine(Engine):
    """An engine on a loaded model. It alone uses the model, from one thread of its own; `close` it at the end.

    Args:
        model: with its plugs; those that are loaded later can be asked for, too.
        max_batch: requests that are answered at once.
        max_queue: requests that may wait; more are refused.
        max_prompt_tokens: of a prompt; a prompt with over 32 times as many characters is refused, too.
        time_limit: seconds from asking to the end of an answer.
        gather: seconds in which those who asked during the last batch are expected again, and waited for, at least (a
            twentieth of the time that this batch took, if that is more). Later nobody is waited for.
        prompt_cache: memory for the states of prompts, used for plugs with the placement "answer"; 0 for none. Tenants
            share nothing in it.

    Raises:
        PPlugError: the model does not answer, or has no tokenizer.
    """

    def __init__(
        self,
        model: PPlugForConditionalGeneration,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_prompt_tokens: int = 2048,
        time_limit: float = 60.0,
        gather: float = 0.005,
        prompt_cache: str | int = "256MB",
    ):
        self.model = model.eval()
        self.max_batch, self.max_queue, self.max_prompt_tokens = max_batch, max_queue, max_prompt_tokens
        self.time_limit, self.gather = time_limit, gather
        self.prompt_cache = PromptCache(prompt_cache) if size_in_bytes(prompt_cache) else None
        self._tokenizer = PPlugProcessor.from_model(model).tokenizer
        self._served: WeakKeyDictionary[Personalizer, ServedPlug] = WeakKeyDictionary()
        self._default, self._limit = model.active_plug, position_limit(model.backbone)
        self._waiting: deque[Running] = deque()
        self._batch: list[Running] = []
        self._peak = 1  # requests at once during the last batch
        self._lasted = self._ended = 0.0  # its seconds, and when it ended
        self._changed = threading.Condition()
        self._tokenising = threading.Lock()  # a fast tokenizer may refuse a second thread
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._work, name="pplug-engine", daemon=True)
        self._thread.start()
        try:
            self._known = self._ask_canary()
        except BaseException:  # the thread must not keep the model; one that hangs is not waited for
            self._close("The engine has not started.")
            raise

    @classmethod
    def from_pretrained(cls, plug: str, plugs: Mapping[str, str] | None = None, **options: Any) -> Self:
        """Load a plug with its language model, and an engine on it.

        Args:
            plug: folder or Hub id.
            plugs: more plugs of the same language model, by name.
            **options: of the class and of `PPlugModel.from_pretrained`; `device` is where to put the model.

        Returns:
            The engine, which has answered a first question.
        """
        own = {name: options.pop(name) for name in inspect.signature(cls).parameters if name in options}
        device = options.pop("device", None)
        model = PPlugModel.from_pretrained(plug, **options)
        for name, place in (plugs or {}).items():
            model.load_plug(place, name)
        return cls(model if device is None else model.to(device), **own)

    # ---- asking --------------------------------------------------------------------------------------------

    @property
    def personalizers(self) -> Mapping[str, Personalizer]:
        """The plugs with their encoders by name, the default first: what encodes items and weights them."""
        found = self.model.personalizers
        return {self._default: found.pop(self._default), **found}

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a batch."""
        return len(self._waiting)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order.

        Args:
            requests: of any users, plugs and sampling settings.

        Returns:
            One answer per request.

        Raises:
            DataError, ConfigurationError, MismatchError: a request that cannot be answered; then none is.
            EngineBusyError: too many are waiting already.
            EngineError: the engine is closed or has failed, or an answer took too long.
        """
        rows = [self._prepared(request) for request in requests]
        self._enter(rows)
        try:
            return [row.next_piece() for row in rows]
        finally:
            for row in rows:
                row.cancelled = True

    def stream(self, request: Request) -> Iterator[Answer]:
        """Yield an answer in pieces as they are made; closing the iterator ends the work on it.

        Args:
            request: of one user.

        Returns:
            An iterator of pieces, the last of which has the finish reason.

        Raises:
            PPlugError: as `generate`, when the first piece is asked for.
        """
        row = self._prepared(request, streams=True)
        self._enter([row])
        try:
            while True:
                yield (piece := row.next_piece())
                if piece.finish_reason is not None:
                    return
        finally:
            row.cancelled = True

    def check(self) -> None:
        """Ask a question whose answer is known from the start, ahead of all that wait.

        Raises:
            EngineError: another answer comes, or none.
        """
        if self._ask_canary() != self._known:
            raise EngineError("The engine gives another answer to a known question than at its start: restart it.")

    def close(self) -> None:
        """End all work. Requests that are not answered yet fail."""
        self._close("The engine is closed.")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _close(self, why: str) -> None:
        with self._changed:
            self._closed = self._closed or why
            for row in (*self._waiting, *self._batch):
                row.end(EngineError(self._closed))
            self._waiting.clear()
            self._changed.notify_all()

    def _enter(self, rows: list[Running], first: bool = False) -> None:
        """Put requests in the queue."""
        with self._changed:
            if self._closed:
                raise EngineError(self._closed)
            if len(self._waiting) >= self.max_queue:  # some of them may be waited for no more
                self._waiting = deque(row for row in self._waiting if not row.is_over())
            if first:
                self._waiting.extendleft(rows)
            elif len(self._waiting) >= self.max_queue:
                raise EngineBusyError(
                    f"{len(self._waiting)} requests are waiting, and no more are taken: ask again later."
                )
            else:
                self._waiting.extend(rows)
            self._changed.notify_all()

    def _ask_canary(self) -> tuple[str, list[int]]:
        """Return the answer to the known question, for a user who is made of a fixed vector."""
        spec = self.model.personalizers[self._default].spec
        vector = torch.linspace(-1, 1, spec.width or 1)[None]
        row = self._prepared(Request(_CANARY, Persona(vector, spec), sampling=Sampling(max_new_tokens=4)))
        row.is_alone = True  # so that its numbers are the same to the last bit
        self._enter([row], first=True)
        return row.next_piece().text, row.tokens

    # ---- prompts -------------------------------------------------------------------------------------------

    def _prepared(self, request: Request, streams: bool = False) -> Running:
        """Return a request as tokens, after all checks that need no language model."""
        name, persona, sampling = request.plug or self._default, request.persona, request.sampling
        plug = self.model.personalizers.get(name)
        if plug is None:
            raise ConfigurationError(f"There is no plug {name!r}; there are {', '.join(self.plugs)}.")
        if persona is not None:
            check_persona(request, plug)
        checked_strength([request.strength], rows=1)  # without a persona, too: a batch is checked as a whole
        check_sampling(sampling)
        check_size(request, self.max_prompt_tokens)
        with self._tokenising:
            served = self._as_served(name)
            row = prompt_row(served.processor, self.model.backbone.config, request.prompt)
        if not row.ids:
            raise DataError("The prompt is empty.")
        if len(row.ids) > self.max_prompt_tokens:
            raise DataError(f"The prompt has {len(row.ids)} tokens, and at most {self.max_prompt_tokens} are taken.")
        soft = 0 if persona is None else plug.config.prefix_length
        limit = sampling.max_new_tokens
        if self._limit is not None:
            behind = self.model.config.is_encoder_decoder
            room = self._limit if behind else self._limit - len(row.ids) - soft + 1
            if room < 1 or (behind and len(row.ids) + soft > self._limit):
                raise DataError(f"The prompt has {len(row.ids)} tokens, and the model reads {self._limit}.")
            limit = min(limit, room)
        request = replace(request, query=query_of(request, plug.config))
        used = None if persona is None else name
        return Running(request, served, row.ids, row.position, used, soft, limit, self.time_limit, streams)

    def _as_served(self, name: str) -> ServedPlug:
        """Return what a plug is asked with, made once. Plugs with equal settings share one object of them."""
        plug = self.model.personalizers[name]
        if plug not in self._served:
            made = ServedPlug(self.model, name, self._tokenizer)
            known = (other.settings for other in self._served.values() if other.settings == made.settings)
            made.settings = next(known, made.settings)
            self._served[plug] = made
        return self._served[plug]

    # ---- the thread that uses the model --------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._closed is None:
                if rows := self._next_batch():
                    start, self._peak = time.monotonic(), 1
                    self._answer_all(rows)
                    self._ended = time.monotonic()
                    self._lasted = self._ended - start
                self._batch = []
        except BaseException as error:
            logger.exception("The engine has failed.")
            self._close(f"The engine has failed ({type(error).__name__}): restart it.")

    def _next_batch(self) -> list[Running]:
        """Wait for requests, and take those that go together with the oldest."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            # Clients who were just answered ask again in a moment: without them, two halves would take turns for ever.
            moment = max(self.gather, self._lasted / 20)
            if time.monotonic() < self._ended + moment:
                self._changed.wait_for(self._are_all_here, moment)
            rows: list[Running] = []
            for row in [*self._waiting]:
                if row.is_over():
                    self._waiting.remove(row)
                elif self._goes_with(row, rows):
                    self._waiting.remove(row)
                    rows.append(row)
                if len(rows) >= self.max_batch:
                    break
            self._batch = rows
            return rows

    def _are_all_here(self) -> bool:
        """Return whether as many wait as there were at once during the last batch, or one that goes alone."""
        waiting = self._waiting
        return (
            bool(self._closed) or not waiting or waiting[0].is_alone or len(waiting) >= min(self._peak, self.max_batch)
        )

    def _note(self, unfinished: int) -> None:
        self._peak = max(self._peak, unfinished + len(self._waiting))

    def _goes_with(self, row: Running, rows: list[Running]) -> bool:
        """Return whether a request can be answered in one batch with others, and as it would be alone."""
        if not rows:
            return True
        if row.is_alone or rows[0].is_alone or not self.model._reading.padding:
            return False
        if row.served.settings is not rows[0].served.settings:
            return False
        if self._limit is None or self.model.config.is_encoder_decoder:
            return True
        both = [*rows, row]  # a batch is as long as its longest prompt and its longest answer
        return max(r.length for r in both) + max(r.limit for r in both) - 1 <= self._limit

    def _answer_all(self, rows: list[Running]) -> None:
        """Answer a batch. If it fails, each of its requests is tried alone, so that one of them harms no other."""
        try:
            return self._generate(rows)
        except Exception as error:
            if len(rows) == 1:
                rows[0].end(_as_ours(error))
                return None
            logger.warning("A batch of %d requests failed (%s): each is tried alone.", len(rows), type(error).__name__)
        for row in rows:
            if not row.is_over():
                row.restart()
                self._answer_all([row])

    def _generate(self, rows: list[Running]) -> None:
        model, causal = self.model, not self.model.config.is_encoder_decoder
        device, served = model.get_input_embeddings().weight.device, rows[0].served
        ids, mask = (t.to(device) for t in served.processor._pad([r.ids for r in rows], served.fill, left=causal))
        used = {row.plug for row in rows if row.plug is not None}
        cache: TenantsPromptCache | None = None
        if self.prompt_cache is not None and all(model.plugs[name].placement == "answer" for name in used):
            cache = self.prompt_cache.of_tenants([row.request.tenant for row in rows])
        model.generate(
            ids,
            attention_mask=mask,
            persona=[row.request.persona for row in rows],
            query=[row.request.query or "" for row in rows],
            persona_position=torch.tensor([row.position for row in rows], device=device),
            persona_strength=[row.request.strength for row in rows],
            plug=[row.plug for row in rows],
            prompt_cache=cache,
            generation_config=served.settings,
            # A forced end replaces the last token of the longest answer, so it comes behind the limits of all rows.
            max_new_tokens=max(row.limit for row in rows) + served.forces_end,
            logits_processor=LogitsProcessorList([RowSampling(rows, counts_prompt=causal)]),
            stopping_criteria=StoppingCriteriaList([_Progress(rows, self._note)]),
        )
        for row in rows:
            row.end(EngineError("The model ended without an answer."))  # of rows that have none


class _Progress(StoppingCriteria):
    """Hands every row its new token, and ends those that are answered, cancelled or late."""

    def __init__(self, rows: Sequence[Running], note: Callable[[int], None]):
        self.rows, self.note = rows, note

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        self.note(sum(not row.ended for row in self.rows))
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.is_over():
                row.take(token)
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)


def _as_ours(error: Exception) -> Exception:
    """Return an error as one of this package; its own text is left out, for it may hold what a user wrote."""
    return error if isinstance(error, PPlugError) else EngineError(f"The model failed ({type(error).__name__}).")
