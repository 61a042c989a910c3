"""A server on loopback in this process, raw requests to it, and what its answers should be."""

import contextlib
import http.client
import json
import logging
import threading
import time

import tiny
import uvicorn

from pplug_hf import PPlugProcessor, open_store
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.server.api_keys import ApiKeys
from pplug_hf.serving.server.app import create_app
from pplug_hf.serving.transformers_engine import TransformersEngine

SECRET = "a secret of the tests"
PROMPT = tiny.PROMPTS[0]
CHAT = [{"role": "user", "content": PROMPT}]
ANNA = {"persona": {"user": "anna"}}
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


def ask(client, create="chat", **options):
    """Return an answer and the headers that came with it."""
    options = {"model": "default", "max_tokens": 6, "extra_body": ANNA, **options}
    if create == "chat":
        raw = client.chat.completions.with_raw_response.create(**{"messages": CHAT, **options})
    else:
        raw = client.completions.with_raw_response.create(**{"prompt": PROMPT, **options})
    return raw.parse(), raw.headers


def expected(server, user="anna", prompt=PROMPT, **options):
    """Return what `model.generate` says to it."""
    persona = None if user is None else server.store.get(user)
    return alone(server.engine.model, Request(prompt, persona, sampling=Sampling(6), **options))


def with_two_plugs(folder, second, **choices):
    """A model with a second plug on the same language model."""
    model = tiny.model("llama", attention_temperature=0.2)
    other = tiny.from_backbone(
        tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=tiny.tokenizer("llama"), **choices
    )
    tiny.randomise(other.plug, 1)
    other.save_pretrained(folder)
    model.load_plug(folder, second)
    return model


def alone(model, request):
    """What `model.generate` answers to one request."""
    processor = PPlugProcessor.from_model(model)
    inputs = processor(text=[request.prompt])
    ids = model.generate(
        **inputs,
        persona=[request.persona],
        query=[request.query or request.prompt],
        plug=[None if request.persona is None else request.plug or model.active_plug],
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    return processor.decode_answers(ids, prompt_length=inputs["input_ids"].shape[1])[0]


def slow(engine, monkeypatch, seconds=0.05):
    """Let each step of an engine take its time."""
    for plug in engine._served.values():
        decode = plug.decode
        monkeypatch.setattr(plug, "decode", lambda tokens, decode=decode: (time.sleep(seconds), decode(tokens))[1])
