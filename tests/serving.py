"""A server on loopback in this process, and raw requests to it."""

import contextlib
import http.client
import json
import logging
import threading
import time

import tiny
import uvicorn

from pplug_hf import open_store
from pplug_hf.serving.server.api_keys import ApiKeys
from pplug_hf.serving.server.app import create_app
from pplug_hf.serving.transformers_engine import TransformersEngine

SECRET = "a secret of the tests"
ITEMS = [{"id": f"i{i}", "text": text} for i, text in enumerate(tiny.HISTORY)]


class Served:
    """Address and parts of a running server."""

    def __init__(self, app, port):
        self.app, self.port, self.service = app, port, app.state.service
        self.engine, self.store = self.service.engine, self.service.store
        self.url = f"http://127.0.0.1:{port}"

    def __call__(self, method, path, body=None, key=None, **headers):
        """Return status, JSON (or bytes) and headers of one request, whose path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        if data is not None:
            headers.setdefault("Content-Type", "application/json")
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            text = answer.read()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text, answer.headers


@contextlib.contextmanager
def served(place, model=None, keys=None, engine=None, store=None, temperature=0.0, limits=None, **options):
    """Serve a tiny model with the store in a folder."""
    engine = engine or TransformersEngine(model or tiny.model("llama", attention_temperature=0.2), **options)
    spec = next(iter(engine.personalizers.values())).spec
    store = store or open_store(place, spec, secret=SECRET)
    app = create_app(engine, store, keys=keys and ApiKeys(keys), limits=limits, temperature=temperature)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, access_log=False, log_config=None, log_level="warning")
    server = uvicorn.Server(config)
    logging.getLogger("pplug_hf").setLevel(logging.INFO)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Served(app, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
