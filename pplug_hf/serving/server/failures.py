"""Errors as the OpenAI API writes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ...errors import DamagedPersonaError, EngineBusyError, EngineError, PPlugError, StoreError, TimeLimitError

logger = logging.getLogger("pplug_hf.server")

INVALID = "invalid_request_error"
_NO_ROUTE = "There is no such route. Ids in a path are percent-encoded: a/b is a%2Fb."
_NO_STORE = (
    "The store cannot do its work now: its disk is full, a file is damaged, or its server is away. Send the request again "
    "later; what was done already is not done twice."
)
_DAMAGED = "The persona of this user is damaged, and nothing was sent to the language model: replace or delete it."


class ApiError(Exception):
    """A request that ends with an error.

    Args:
        status: of HTTP.
        code: for programs.
        message: for people; never a text or an id of a user.
        param: what in the request is wrong.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def body(self) -> dict[str, object]:
        """The error as JSON."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or (INVALID if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.body, self.status, {"Retry-After": "1"} if self.status in (429, 503) else None)


class _Failure(NamedTuple):
    status: int
    code: str
    message: str | None = (
        None  # instead of the error's own, which is for whoever runs the server and goes into the log
    )


_FAILURES: dict[type[PPlugError], _Failure] = {  # the first that fits
    EngineBusyError: _Failure(429, "engine_overloaded"),
    TimeLimitError: _Failure(503, "timeout"),
    EngineError: _Failure(503, "engine_unavailable"),
    StoreError: _Failure(503, "store_unavailable", _NO_STORE),
    DamagedPersonaError: _Failure(500, "persona_damaged", _DAMAGED),
    PPlugError: _Failure(422, "invalid_value"),  # data and settings of the request
}


def api_error(error: BaseException) -> ApiError:
    """Return any error as one of the API. An unforeseen one keeps its text to itself, which may hold a user's."""
    if isinstance(error, ApiError):
        return error
    for kind, (status, code, message) in _FAILURES.items():
        if isinstance(error, kind):
            if message is not None:
                logger.error(str(error), extra={"fields": {"code": code}})
            return ApiError(status, code, message or str(error))
    return ApiError(500, "internal_error", f"The server failed ({type(error).__name__}).")


def add_handlers(app: FastAPI) -> None:
    """Let an app answer every error in this form."""

    @app.exception_handler(ApiError)
    @app.exception_handler(PPlugError)
    async def ours(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        if first["type"] == "json_invalid":
            return ApiError(400, "invalid_json", "The body is not valid JSON.").response()
        text = f"{where or 'body'}: {str(first['msg']).rstrip('.')}."
        if where is None and "json" not in request.headers.get("content-type", ""):
            text = "The body must be JSON, with the header Content-Type: application/json (curl --json)."
        return ApiError(422, "invalid_value", text, where).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, code, _NO_ROUTE if code == "not_found" else str(error.detail)).response()
