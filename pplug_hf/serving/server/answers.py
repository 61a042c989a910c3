"""Routes of answers: OpenAI's chat and text completions, each for its user."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ...chats import Message, chats_of
from ..engine import Answer, Sampling
from ..engine import Request as Question
from ..prompts import query_of
from .bodies import AnswerBody, ChatBody, CompletionBody
from .failures import ApiError, api_error
from .leaving import unless_left
from .monitoring import now
from .personas import Services, Tenant, decoded
from .service import Found, Service

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(service: Services) -> dict[str, object]:
    """List the plugs, each of which is a model to clients."""
    return {"object": "list", "data": [_model(service, name) for name in service.engine.plugs]}


@router.get("/models/{name}")
async def model(name: str, service: Services) -> dict[str, object]:
    """Describe a plug."""
    return _model(service, _plug(service, name))


@router.post("/chat/completions")
async def chat(body: ChatBody, request: Request, service: Services, tenant: Tenant) -> Response:
    """Answer a conversation."""
    (messages,) = chats_of([body.messages])
    for message in messages:
        if message.get("role") == "developer":  # OpenAI's newer name of the system
            message["role"] = "system"
    return await _answer(body, [messages], _Chat(), request, service, tenant)


@router.post("/completions")
async def complete(body: CompletionBody, request: Request, service: Services, tenant: Tenant) -> Response:
    """Answer one prompt or several."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return await _answer(body, prompts, _Completion(), request, service, tenant)


async def _answer(
    body: AnswerBody,
    prompts: Sequence[str | Sequence[Message]],
    form: _Completion,
    request: Request,
    service: Service,
    tenant: str,
) -> Response:
    body.check()
    plug = _plug(service, body.model)
    sampling = _sampling(body, service)
    n = body.n or 1
    if not 1 <= n * len(prompts) <= service.limits.choices:
        text = f"{n * len(prompts)} answers were asked for; a request has 1 to {service.limits.choices}."
        raise ApiError(422, "too_many_choices", text, "n")
    header = request.headers.get("x-persona-user")
    user = body.persona.user if body.persona else decoded(header) if header is not None else None
    if user is not None and (body.presence_penalty or body.frequency_penalty):
        text = "Penalties do not go with a persona: leave out presence_penalty and frequency_penalty."
        raise ApiError(
            400, "unsupported_parameter", text, "presence_penalty" if body.presence_penalty else "frequency_penalty"
        )
    query = body.persona.query if body.persona else None
    if len(query or "") > service.limits.item_characters:
        text = f"The query has at most {service.limits.item_characters} characters, as an item."
        raise ApiError(422, "invalid_value", text, "persona.query")
    found = await service.run(service.find, tenant, user, bool(body.persona and body.persona.required))
    service.monitoring.personas.labels(found.state).inc()
    left = threading.Event()
    question = Question(prompts[0], found.persona, query, plug, body.strength, sampling, tenant, left)
    questions = [
        replace(question, prompt=prompt, sampling=_seeded(sampling, i)) for prompt in prompts for i in range(n)
    ]
    reply = _Reply(form, body, plug, found, request)
    if body.stream:
        return await reply.stream(service, questions, left)
    answers = await unless_left(request, left, service.run(service.engine.generate, questions))
    _watch(service, question)
    return reply.whole(service, answers, n)


def _plug(service: Service, name: str | None) -> str:
    plugs = service.engine.plugs
    if name in (None, ""):
        return plugs[0]
    if name not in plugs:
        text = f"There is no such model; there are: {', '.join(plugs)}."
        raise ApiError(404, "model_not_found", text, "model")
    return name


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "pplug-hf"}


def _sampling(body: AnswerBody, service: Service) -> Sampling:
    limit = service.limits.new_tokens
    tokens = body.max_completion_tokens or body.max_tokens or limit
    if tokens > limit:
        raise ApiError(422, "too_many_tokens", f"An answer has at most {limit} tokens, got {tokens}.", "max_tokens")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sizes, longest = sorted(map(len, stop)), service.limits.stop_characters
    if len(stop) > 16 or (sizes and not 1 <= sizes[0] <= sizes[-1] <= longest):
        text = f"stop is up to 16 texts of 1 to {longest} characters, got {len(stop)} of {sizes[0]} to {sizes[-1]}."
        raise ApiError(422, "invalid_value", text, "stop")
    return Sampling(
        max_new_tokens=tokens,
        temperature=service.temperature if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=body.top_k or 0,
        stop=stop,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
    )


def _seeded(sampling: Sampling, i: int) -> Sampling:
    """Return the settings of a prompt's i-th answer, which is to differ from the others."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)


def _watch(service: Service, question: Question) -> None:
    """Let the monitoring look at some of the personas."""
    if question.persona is not None and service.monitoring.is_due("answer"):
        personalizer = service.engine.personalizers[question.plug or service.engine.plugs[0]]
        query = query_of(question, personalizer.config)
        service.start(service.monitoring.look_at, personalizer, question.persona, query)


class _Completion:
    """Answers as `/v1/completions` writes them."""

    prefix, kind, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, answer: Answer, index: int) -> dict[str, object]:
        """Return a whole answer."""
        return {"index": index, "text": answer.text, "logprobs": None, "finish_reason": answer.finish_reason}

    def opening(self, index: int) -> list[dict[str, object]]:
        """Return what stands in front of the first piece of an answer."""
        return []

    def piece(self, answer: Answer, index: int) -> dict[str, object]:
        """Return a piece of an answer."""
        return self.choice(answer, index)


class _Chat(_Completion):
    """Answers as `/v1/chat/completions` writes them."""

    prefix, kind, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, answer: Answer, index: int) -> dict[str, object]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}

    def opening(self, index: int) -> list[dict[str, object]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def piece(self, answer: Answer, index: int) -> dict[str, object]:
        delta = {"content": answer.text} if answer.text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": answer.finish_reason}


class _Reply:
    """The answer to one request, whole or in pieces."""

    def __init__(self, form: _Completion, body: AnswerBody, plug: str, found: Found, request: Request):
        self.form, self.headers, self.request = form, found.headers, request
        self.facts: dict[str, object] = {
            "model": plug,
            "persona": found.state,
            "items": int(found.headers["X-Persona-Items"]),
        }
        self.common = {"id": form.prefix + uuid.uuid4().hex, "created": now(), "model": plug}
        self.shows_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.n = body.n or 1
        request.state.facts = self.facts

    def whole(self, service: Service, answers: list[Answer], n: int) -> JSONResponse:
        """Return all answers at once."""
        choices = [self.form.choice(answer, i) for i, answer in enumerate(answers)]
        usage = self._count(service, answers)
        return JSONResponse(
            {**self.common, "object": self.form.kind, "choices": choices, "usage": usage}, headers=self.headers
        )

    def _count(self, service: Service, answers: list[Answer]) -> dict[str, int]:
        """Return the tokens of a request; a prompt with several answers counts once."""
        prompt = sum(answer.prompt_tokens for answer in answers[:: self.n])
        completion = sum(answer.completion_tokens for answer in answers)
        for kind, number in (("prompt", prompt), ("completion", completion)):
            service.monitoring.tokens.labels(kind).inc(number)
        self.facts |= {"prompt_tokens": prompt, "completion_tokens": completion}
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def stream(self, service: Service, questions: list[Question], left: threading.Event) -> StreamingResponse:
        """Return the pieces of all answers as they come. What fails before the first piece is an ordinary error."""
        pieces = _Pieces(service, questions, left)
        try:
            first = await unless_left(self.request, left, pieces.get())
        except BaseException:
            pieces.close()
            raise
        _watch(service, questions[0])
        headers = {**self.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._events(service, pieces, first), media_type="text/event-stream", headers=headers)

    async def _events(self, service: Service, pieces: _Pieces, first: tuple[int, Answer]) -> AsyncIterator[str]:
        last: dict[int, Answer] = {}
        try:
            for i in range(pieces.number):
                for opening in self.form.opening(i):
                    yield self._chunk([opening])
            piece: tuple[int, Answer] | None = first
            while piece is not None:
                index, answer = piece
                last[index] = answer
                yield self._chunk([self.form.piece(answer, index)])
                piece = None if pieces.are_over(last) else await pieces.get()
            usage = self._count(service, [last[i] for i in range(pieces.number)])
            if self.shows_usage:
                yield self._chunk([], usage)
            yield "data: [DONE]\n\n"
        except Exception as error:
            failure = api_error(error)
            self.facts["failed"] = failure.code
            yield f"data: {json.dumps(failure.body)}\n\n"
        finally:
            pieces.close()

    def _chunk(self, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> str:
        chunk = {**self.common, "object": self.form.chunk, "choices": choices}
        if self.shows_usage:
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


class _Pieces:
    """Pieces of several answers in the order in which they are made, each read from the engine by a thread."""

    def __init__(self, service: Service, questions: list[Question], left: threading.Event):
        self.number, self._left = len(questions), left
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Answer] | Exception]()
        self._closed = threading.Event()
        for i, question in enumerate(questions):
            service.read(self._read, service, i, question)

    def _read(self, service: Service, i: int, question: Question) -> None:
        pieces = service.engine.stream(question)
        try:
            for piece in pieces:
                if self._closed.is_set():
                    break
                self._put((i, piece))
        except Exception as error:
            self._put(error)
        finally:
            pieces.close()  # type: ignore[attr-defined]  # of a generator, which ends the work

    def _put(self, value: tuple[int, Answer] | Exception) -> None:
        if not self._closed.is_set() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, value)

    async def get(self) -> tuple[int, Answer]:
        """Return the next piece and the number of its answer.

        Raises:
            Exception: what went wrong in the engine.
        """
        value = await self._queue.get()
        if isinstance(value, Exception):
            raise value
        return value

    def are_over(self, last: dict[int, Answer]) -> bool:
        """Return whether all answers have ended."""
        return len(last) == self.number and all(answer.finish_reason for answer in last.values())

    def close(self) -> None:
        """Let the engine end what nobody waits for."""
        self._closed.set()
        self._left.set()
