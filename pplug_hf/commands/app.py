"""`pplug-hf app`: a page to try a plug in a browser."""

from __future__ import annotations

import signal
import sys
import tempfile
from contextlib import ExitStack
from types import FrameType

from ..apps.assistant import Assistant, load_demo
from ..apps.page import build, load_gradio, web_app
from ..modeling import PPlugModel
from ..modeling.device import checked_device
from ..optional import require
from ..serving.listening import listen, url
from ..serving.open_store import open_store
from .options import AppSettings

ENDING = (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def app(settings: AppSettings) -> None:
    """Serve the page until it is interrupted.

    Args:
        settings: see the fields.

    Raises:
        PPlugError: a plug or a store that cannot be used, or Gradio is not installed.
    """
    load_gradio()
    uvicorn = require("uvicorn", "app", "The page")
    device = checked_device(settings.device)
    listen(settings.host, settings.port).close()  # a port that is taken is said before models are loaded
    samples = []
    if settings.plug is None:
        model, samples = load_demo()
    else:
        model = PPlugModel.from_pretrained(settings.plug, backbone=settings.backbone, encoder=settings.encoder)
    if model.device.type != device.type or device.index is not None:
        model.to(device)
    _end_on_signals()
    with ExitStack() as stack:
        place = settings.store or stack.enter_context(tempfile.TemporaryDirectory(prefix="pplug-app-"))
        store = stack.enter_context(open_store(place, model.personalizer.spec))
        page = build(Assistant(model, store, samples, settings.max_new_tokens), "Persona plug")
        if settings.host not in LOOPBACK:
            print(f"Anybody who reaches {settings.host} can use this page and its store: it has no login.")
        if settings.store is None:
            print("Stored users are deleted when the page is closed; --store FOLDER keeps them.")
        listening = stack.enter_context(listen(settings.host, settings.port))
        print(f"The page is at {url(settings.host, listening)} (Ctrl+C ends it).", flush=True)
        config = uvicorn.Config(web_app(page), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


def _end_on_signals() -> None:
    """Let SIGTERM, and a terminal that is closed, end the page as Ctrl+C does: what it has opened is closed and deleted."""
    # nohup ignores SIGHUP, and that stays so.
    ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:  # a closed terminal may send several, which must not interrupt the deletion
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in ours:
        signal.signal(number, end)
