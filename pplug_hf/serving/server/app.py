"""The server: an OpenAI-compatible API in front of an engine, each answer with the persona of its user.

with TransformersEngine.from_pretrained("me/movie-tags") as engine:
    spec = next(iter(engine.personalizers.values())).spec
    with open_store("personas/", spec) as store:
        app = create_app(engine, store)              # FastAPI, for any ASGI server
        serve(app, "127.0.0.1", 8000)                # or uvicorn, with the limits that fit
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Response

from ...errors import ConfigurationError
from ...version import __version__
from ..engine import Engine
from ..listening import listen, url
from ..store import PersonaStore
from . import answers, personas
from .api_keys import ApiKeys
from .failures import add_handlers
from .guard import Guard
from .limits import Limits
from .monitoring import JsonLines
from .service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def create_app(
    engine: Engine,
    store: PersonaStore,
    *,
    keys: ApiKeys | None = None,
    limits: Limits | None = None,
    temperature: float = 0.0,
) -> FastAPI:
    """Return an app that answers with an engine and keeps personas in a store. It closes both when it ends.

    Args:
        engine: see the class.
        store: of the encoder of the engine's plugs.
        keys: who may ask (default: everybody who reaches the server, as one tenant).
        limits: of requests.
        temperature: of requests that name none.

    Raises:
        MismatchError: the store holds vectors of another encoder.
    """
    service = Service(engine, store, limits or Limits(), temperature)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="pplug-hf", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, keys=keys, limits=service.limits, monitoring=service.monitoring)  # type: ignore[arg-type]
    add_handlers(app)
    app.include_router(answers.router)
    app.include_router(personas.router)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Say that the language model answers, which is asked a question with a known answer."""
        await service.check()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give all figures to Prometheus."""
        return Response(service.monitoring.text(), media_type="text/plain; version=0.0.4")

    return app


def check_host(host: str, keys: ApiKeys | None) -> None:
    """Refuse to be reached by others without keys.

    Raises:
        ConfigurationError: names the remedy.
    """
    if host not in LOOPBACK and not keys:
        raise ConfigurationError(
            f"host={host!r} can be reached from other machines, and everybody would be let in: pass keys=<file of API keys>, "
            "or host='127.0.0.1' behind a gateway of your own."
        )


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until the process is interrupted. One line on standard output says where, the log is JSON on standard error.

    Args:
        app: of `create_app`.
        host: address to listen on.
        port: 0 takes a free one.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("pplug_hf", "uvicorn"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
    logging.getLogger("pplug_hf").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # would hold the ids of users
        log_config=None,
        log_level="warning",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    listening = listen(host, port)
    print(f"Serving {', '.join(app.state.service.engine.plugs)} on {url(host, listening)}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
