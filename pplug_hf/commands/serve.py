"""`pplug-hf serve`: an OpenAI-compatible server with the personas of a store."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from ..modeling.prompt_cache import size_in_bytes
from ..serving.engine import Engine
from ..serving.listening import listen
from ..serving.open_store import open_store
from .options import ServeSettings


def serve(settings: ServeSettings) -> None:
    """Serve until the process is interrupted.

    Raises:
        PPlugError: settings, a plug or a store that cannot be used.
    """
    from ..serving.server import app, limits
    from ..serving.server.api_keys import ApiKeys

    size_in_bytes(settings.prompt_cache or 0)  # raises before anything is loaded
    keys = None if settings.keys is None else ApiKeys.from_file(settings.keys)
    app.check_host(settings.host, keys)
    listen(settings.host, settings.port).close()  # a port that is taken is said before models are loaded
    engine = _engine(settings)
    store = open_store(settings.store, next(iter(engine.personalizers.values())).spec)
    chosen = limits.Limits(
        body=settings.max_body,
        user_items=settings.max_items,
        new_tokens=settings.max_new_tokens,
        concurrency=settings.max_queue + settings.max_batch,
    )
    app.serve(
        app.create_app(engine, store, keys=keys, limits=chosen, temperature=settings.temperature or 0.0),
        settings.host,
        settings.port,
    )


def _engine(settings: ServeSettings) -> Engine:
    """Return the engine that was chosen, with all plugs."""
    plugs = {}
    for given in settings.plugs or ():
        name, equals, place = given.partition("=")
        if not (name and equals and place):
            raise ConfigurationError(f"plugs are given as NAME=FOLDER, got {given!r}.")
        if name in plugs:
            raise ConfigurationError(f"Two plugs have the name {name!r}: give each its own, as NAME=FOLDER.")
        plugs[name] = place
    options: dict[str, Any] = {"plugs": plugs, "time_limit": settings.time_limit}
    options |= {name: getattr(settings, name) for name in ("backbone", "encoder", "device")}
    own = {name: getattr(settings, name) for name in ("max_prompt_tokens", "prompt_cache")}  # of TransformersEngine
    own = {name: value for name, value in own.items() if value is not None}
    if settings.engine == "vllm":
        if own:
            raise ConfigurationError(
                f"--engine vllm has no {' and no '.join(f'--{name}' for name in own)}: leave it out."
            )
        from ..serving.vllm_engine import VllmEngine

        options |= {"max_num_seqs": settings.max_batch, "max_queue": settings.max_queue}
        return VllmEngine.from_pretrained(settings.plug, **options)
    from ..serving.transformers_engine import TransformersEngine

    options |= {"max_batch": settings.max_batch, "max_queue": settings.max_queue, **own}
    return TransformersEngine.from_pretrained(settings.plug, **options)
