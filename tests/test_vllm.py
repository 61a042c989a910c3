"""`VllmEngine` on vLLM itself, against transformers in float32. `make test-vllm` runs it, in an environment of its own.

PPLUG_VLLM_MODEL names a folder of a real causal language model to test with, too.
"""

import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress

import pytest
import tiny
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pplug_hf import ConfigurationError, DataError, MismatchError, PPlugModel, PPlugProcessor
from pplug_hf.errors import EngineError
from pplug_hf.processing import Row
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.vllm_engine import VllmEngine
from pplug_hf.serving.vllm_export import content_parts, export
from pplug_hf.serving.vllm_prompt import mixed_prompt

pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm` makes an environment with it")
openai = pytest.importorskip("openai")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

REAL = os.environ.get("PPLUG_VLLM_MODEL")
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}<bot>"
PROMPTS = [*tiny.PROMPTS, "is the old city like a good dream", "love and war"]


def tiny_llama(folder):
    """A language model of SmolLM2's kind whose heads have a size that vLLM's attention for CPUs has."""
    config = LlamaConfig(
        vocab_size=len(tiny.VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny.tokenizer("llama").save_pretrained(folder)
    return str(folder)


def save_plug(backbone, encoder, folder, seed, template=None, **choices):
    """Write a plug with random weights: its personas are as loud as tokens, or louder."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    if template:
        tokenizer.chat_template = template
    model = tiny.from_backbone(backbone, encoder, tokenizer=tokenizer, **choices)
    tiny.randomise(model.plug, seed)
    model.save_pretrained(folder)
    return str(folder)


class Made:
    """An engine with two plugs, and the same plugs on transformers."""

    def __init__(self, backbone, folder, template, **options):
        encoder = str(folder / "encoder")
        tiny.encoder().save(encoder)
        places = [
            save_plug(
                backbone, encoder, folder / placement, i, template, placement=placement, num_persona_tokens=i + 1
            )
            for i, placement in enumerate(("answer", "prompt"))
        ]
        self.engine = VllmEngine.from_pretrained(places[0], {"prompt": places[1]}, dtype="float32", **options)
        self.model = PPlugModel.from_pretrained(places[0], dtype="float32")
        self.model.load_plug(places[1], "prompt")
        self.personas = self.model.encode_persona(tiny.HISTORIES)

    def by_transformers(self, request):
        name = request.plug or "default"
        processor = PPlugProcessor.from_config(self.model.plugs[name], self.model.tokenizer)
        batch = processor([request.prompt], persona=[request.persona], query=[request.query or request.prompt])
        plug = [None] if request.persona is None else name
        ids = self.model.generate(**batch, plug=plug, max_new_tokens=request.sampling.max_new_tokens, do_sample=False)
        text = self.model.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    def by_vllm(self, requests):
        return [
            answer.text.strip() for answer in self.engine.generate(requests)
        ]  # vLLM keeps the space behind the prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    made = Made(
        tiny_llama(folder / "llama"),
        folder,
        None,
        max_model_len=256,
        max_num_seqs=16,
        block_size=32,
        num_gpu_blocks_override=48,  # a small cache, which is soon full
    )
    yield made
    made.engine.close()
    gc.collect()


def test_greedy_answers_are_those_of_transformers(made):
    requests = [
        Request(prompt, persona, plug=plug, sampling=Sampling(16))
        for plug in ("default", "prompt")
        for persona in (*made.personas, None)
        for prompt in PROMPTS
    ]
    answers = made.by_vllm(requests)
    assert answers == [made.by_transformers(request) for request in requests]
    assert len(set(answers)) > 20


def test_a_stream_and_threads(made):
    requests = [Request(prompt, persona, sampling=Sampling(12)) for prompt in PROMPTS for persona in made.personas]
    expected, got = made.engine.generate(requests), {}

    def ask(i):
        pieces = list(made.engine.stream(requests[i]))
        got[i] = "".join(piece.text for piece in pieces), pieces[-1].finish_reason, pieces[-1].completion_tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [got[i] for i in range(len(requests))] == [(e.text, e.finish_reason, e.completion_tokens) for e in expected]
    stream = made.engine.stream(requests[0])
    next(stream)
    stream.close()
    assert made.engine.generate(requests[:1]) == expected[:1]


def test_stop_texts_and_sampling(made):
    request = Request(PROMPTS[0], made.personas[0], sampling=Sampling(12))
    (whole,) = made.engine.generate([request])
    word = whole.text.split()[3]
    (cut,) = made.engine.generate([Request(PROMPTS[0], made.personas[0], sampling=Sampling(12, stop=(word,)))])
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(word)]
    drawn = [
        made.engine.generate([Request(PROMPTS[0], made.personas[0], sampling=Sampling(12, 2.0, seed=seed))])[0].text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_user_reads_the_states_of_another(made):
    """Two users, equal text of equal length, different personas, a small warm cache, 100 rounds of both at once."""
    text = " ".join(tiny.WORDS[i % len(tiny.WORDS)] for i in range(90))
    for plug in ("default", "prompt"):
        requests = [
            Request(text, persona, query="the sea", plug=plug, sampling=Sampling(8)) for persona in made.personas[:2]
        ]
        expected = [made.by_transformers(request) for request in requests]
        assert expected[0] != expected[1]
        for _ in range(100):
            assert made.by_vllm(requests) == expected


def test_what_is_refused_harms_nobody(made):
    good = Request(PROMPTS[0], made.personas[0], sampling=Sampling(8))
    expected = made.engine.generate([good])
    damaged = made.model.encode_persona(tiny.HISTORY)
    damaged.vectors[0, 0] = float("nan")
    for bad, error in (
        (Request(PROMPTS[0], damaged), DataError),
        (Request(PROMPTS[0], made.personas[0], sampling=Sampling(8, presence_penalty=1.0)), ConfigurationError),
        (Request("sea " * 300, made.personas[0]), DataError),
    ):
        with pytest.raises(error):
            made.engine.generate([good, bad])
    with pytest.raises(ConfigurationError, match="vLLM refuses"):
        made.engine._core.start({"prompt_token_ids": [5]}, {"top_p": 7.0})
    assert made.engine.generate([good]) == expected
    made.engine.check()


def test_a_wrong_width_is_refused(made, monkeypatch):
    plug = made.engine._plugs["default"].personalizer
    monkeypatch.setattr(plug, "soft_prompt", lambda personas, *_: torch.ones(len(personas), 2, 63))
    with pytest.raises(MismatchError, match=r"is \[tokens, 64\]"):
        made.engine.generate([Request(PROMPTS[0], made.personas[0])])
    monkeypatch.undo()
    made.engine.check()


def test_a_poisoned_engine_fails_its_check(made):
    """The last test of this engine: what the checks keep away is sent around them."""
    made.engine.check()
    good = Request(PROMPTS[0], made.personas[0], sampling=Sampling(8))
    row = made.engine._ready(good, made.engine._plugs["default"], None)
    ids = row.prompt["prompt_token_ids"]
    poison = mixed_prompt(Row(ids, 1, []), torch.full((1, 64), float("nan")), "")
    for _ in range(8):
        pieces = list(made.engine._core.start(poison, row.options)(60))
        assert not any(piece.text for piece in pieces)
    for _ in range(2):  # and stays so
        with pytest.raises(EngineError, match="poisoned"):
            made.engine.check()


# ---- vLLM's own server ----------------------------------------------------------------------------------------------


@contextmanager
def server(command):
    """vLLM's server on loopback; `vllm serve` itself does not start where vLLM is the package vllm-cpu."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert command[:2] == ["vllm", "serve"]
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*module, *options], stdout=log, stderr=log)
        try:
            for _ in range(600):
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    if answer.status == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise AssertionError(log.read()[-3000:])
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.parametrize("placement", ["answer", "prompt"])
def test_the_server_with_the_exported_template(tmp_path, placement):
    backbone = REAL or tiny_llama(tmp_path / "llama")
    encoder = str(tmp_path / "encoder")
    tiny.encoder().save(encoder)
    template = None if REAL else TEMPLATE
    plug = save_plug(backbone, encoder, tmp_path / "plug", 0, template, placement=placement, num_persona_tokens=3)
    model = PPlugModel.from_pretrained(plug, dtype="float32")
    processor = PPlugProcessor.from_model(model)
    assert processor.chat
    command = export(tmp_path / "export", model.personalizer, processor, backbone)
    asked = [(prompt, persona) for persona in model.encode_persona(tiny.HISTORIES) for prompt in PROMPTS[:3]]
    expected, answers = [], []
    for prompt, persona in asked:
        batch = processor([prompt], persona=[persona])
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)
        expected += processor.decode_answers(ids, prompt_length=batch["input_ids"].shape[1])
    with server(command) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        name = client.models.list().data[0].id
        for prompt, persona in asked:
            content = content_parts(prompt, model.soft_prompt(persona, prompt)[0], placement)
            messages = [{"role": "user", "content": content}]
            answer = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=16)
            answers.append(answer.choices[0].message.content.strip())
    assert answers == expected and len(set(answers)) > 3


# ---- a real language model ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="PPLUG_VLLM_MODEL does not name a language model's folder")
def test_a_real_language_model(tmp_path):
    made = Made(
        REAL, tmp_path, None, max_model_len=512, max_num_seqs=32, canary=("What is the capital of France?", "Paris")
    )
    try:
        prompts = [
            "What is a good film?",
            "Tell me about the sea.",
            "Write a headline about rain.",
            "Why is snow cold?",
        ]
        requests = [
            Request(prompt, persona, plug=plug, sampling=Sampling(32))
            for plug in ("default", "prompt")
            for persona in (*made.personas, None)
            for prompt in prompts
        ]
        answers = made.by_vllm(requests)
        expected = [made.by_transformers(request) for request in requests]
        agree = sum(one == other for one, other in zip(answers, expected, strict=True))
        print(f"{agree} of {len(requests)} answers of 32 tokens are equal")
        assert agree >= len(requests) - 1, "ties of two tokens are broken by rounding, once in about 1,000 tokens"
        made.engine.check()
    finally:
        made.engine.close()
