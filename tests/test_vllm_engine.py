"""`VllmEngine` without vLLM: its prompts and checks, with a core that reads prompts as vLLM does and asks transformers.

tests/test_vllm.py runs the same engine on vLLM.
"""

import asyncio
import threading
from queue import Empty, SimpleQueue
from types import SimpleNamespace

import pytest
import tiny
import torch

from pplug_hf import ConfigurationError, DataError, MismatchError, Persona, PPlugProcessor
from pplug_hf.errors import EngineBusyError, EngineError, MissingPackageError, TimeLimitError
from pplug_hf.processing import Row
from pplug_hf.serving import vllm_core
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.vllm_core import Piece, VllmCore
from pplug_hf.serving.vllm_engine import LoadedPlug, VllmEngine, _is_sound
from pplug_hf.serving.vllm_prompt import LARGEST_NORM, checked_rows, mixed_prompt, sampling_options

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}<bot>"
SIX = Sampling(max_new_tokens=6)


class Core:
    """Answers greedily, one prompt at a time: words by their ids, and rows where the mask says so."""

    def __init__(self, backbone, tokenizer, dtype=torch.float32, max_length=128):
        self.backbone, self.tokenizer, self.dtype, self.max_length = backbone, tokenizer, dtype, max_length
        self.width = backbone.get_input_embeddings().weight.shape[1]
        self.running, self.max_running = 0, 2
        self.sent, self.cancelled, self.is_poisoned, self.is_closed = [], 0, False, False

    @torch.no_grad()
    def start(self, prompt, options, stream=False):
        self.sent.append((prompt, options))
        ids = torch.tensor([prompt["prompt_token_ids"]])
        embeds = self.backbone.get_input_embeddings()(ids)
        if "prompt_embeds" in prompt:
            is_text = torch.tensor(prompt["prompt_is_token_ids"])
            assert len(is_text) == len(prompt["prompt_embeds"]) == ids.shape[1]
            embeds[0, ~is_text] = prompt["prompt_embeds"][~is_text].to(embeds)
        limit = {"max_new_tokens": options["max_tokens"], "do_sample": False, "pad_token_id": tiny.PAD}
        if options.get("ignore_eos"):
            limit["eos_token_id"] = None
        made = self.backbone.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **limit)[0].tolist()
        made = [0] * len(made) if self.is_poisoned else made
        reason = "stop" if made[-1] == tiny.EOS and not options.get("ignore_eos") else "length"
        return Work(self, [Piece(f"{self.tokenizer.decode([i])} ", [i], None) for i in made[:-1]] + [
            Piece("" if reason == "stop" else self.tokenizer.decode(made[-1:]), made[-1:], reason)
        ])  # fmt: skip

    def close(self):
        self.is_closed = True


class Work:
    def __init__(self, core, pieces):
        self.core, self.pieces = core, pieces

    def __call__(self, seconds=None):
        yield from self.pieces

    def cancel(self):
        self.core.cancelled += 1


def loaded(family="llama", template=None, **choices):
    """A model with a plug, and an engine on the same backbone."""
    tokenizer = tiny.tokenizer(family)
    tokenizer.chat_template = template
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.from_backbone(tiny.backbone(family), tiny.shared_encoder(), tokenizer=tokenizer, **choices)
    tiny.randomise(model.plug)
    return model


def engine_of(*models, core=None, **options):
    first = models[0]
    plugs = {f"plug{i}": LoadedPlug(m.personalizer, PPlugProcessor.from_model(m)) for i, m in enumerate(models)}
    core = core or Core(first.backbone, first.tokenizer)
    return VllmEngine(core, plugs, first.backbone.config, **options), core


def by_model(model, prompt, persona, query=None, tokens=6, **options):
    processor = PPlugProcessor.from_model(model)
    if isinstance(prompt, str):
        batch = processor([prompt], persona=[persona], query=[query or prompt])
    else:
        batch = processor.apply_chat_template(prompt, persona=[persona], query=query, add_generation_prompt=True)
    options |= {"max_new_tokens": tokens, "do_sample": False}
    made = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :].tolist()
    made = made[: made.index(tiny.EOS)] if tiny.EOS in made else made
    return model.tokenizer.decode(made)


@pytest.fixture(scope="module")
def llama():
    return loaded(placement="answer", num_persona_tokens=2)


@pytest.fixture(scope="module")
def made(llama):
    engine, core = engine_of(llama)
    return engine, core, llama


@pytest.fixture
def engine(made):
    engine, core, _ = made
    core.sent.clear()
    return engine


@pytest.fixture
def core(made):
    return made[1]


# ---- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CAUSAL)
@pytest.mark.parametrize("placement", ["prompt", "answer"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["text", "chat"])
def test_answers_are_those_of_the_model(family, placement, template):
    model = loaded(family, template, placement=placement, num_persona_tokens=2)
    engine, core = engine_of(model)
    personas = model.encode_persona(tiny.HISTORIES)
    core.sent.clear()
    requests = [Request(p, persona, sampling=SIX) for p in tiny.PROMPTS for persona in personas]
    answers = [answer.text.strip() for answer in engine.generate(requests)]
    assert answers == [by_model(model, r.prompt, r.persona) for r in requests]
    assert len(set(answers)) > 3
    assert len(core.sent) == 9


def test_messages_of_a_chat():
    model = loaded("llama", TEMPLATE, placement="answer")
    engine, _ = engine_of(model)
    chat = [
        {"role": "user", "content": "write about the sea"},
        {"role": "assistant", "content": "the sea is cold"},
        {"role": "user", "content": "write about the moon"},
    ]
    persona = model.encode_persona(tiny.HISTORY)
    (answer,) = engine.generate([Request(chat, persona, sampling=SIX)])
    assert answer.text.strip() == by_model(model, chat, persona, ["write about the moon"])


def test_without_a_persona_it_is_the_bare_model(engine, core, llama):
    (answer,) = engine.generate([Request(tiny.PROMPTS[0], sampling=SIX)])
    ids = llama.tokenizer(tiny.PROMPTS[0])["input_ids"]
    made = llama.backbone.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert answer.text.split() == [tiny.VOCABULARY[i] for i in made if i != tiny.EOS]
    assert set(core.sent[0][0]) == {"prompt_token_ids", "cache_salt"} and answer.prompt_tokens == len(ids)


def test_requests_choose_plugs_and_queries(llama):
    other = loaded(placement="prompt")
    other.backbone = llama.backbone
    engine, _ = engine_of(llama, other)
    persona = llama.encode_persona(tiny.HISTORY)
    prompt = tiny.PROMPTS[0]
    requests = [
        Request(prompt, persona, plug="plug1", sampling=SIX),
        Request(prompt, persona, query="snow", sampling=SIX),
        Request(prompt, None, plug="plug1", sampling=SIX),
    ]
    answers = [answer.text.strip() for answer in engine.generate(requests)]
    assert answers[:2] == [by_model(other, prompt, persona), by_model(llama, prompt, persona, "snow")]
    assert engine.plugs == ["plug0", "plug1"]
    with pytest.raises(ConfigurationError, match="no plug 'third'; there are plug0, plug1"):
        engine.generate([Request(prompt, plug="third")])


def test_strength(engine, llama):
    persona, prompt = llama.encode_persona(tiny.HISTORY), tiny.PROMPTS[0]
    requests = [Request(prompt, persona, strength=strength, sampling=SIX) for strength in (0.0, 1.0, 1.7)]
    texts = [
        answer.text.strip() for answer in engine.generate([*requests, Request(prompt, nobody(persona), sampling=SIX)])
    ]
    assert texts[0] == texts[3] and len(set(texts)) == 3
    assert texts[2] == by_model(llama, prompt, persona, persona_strength=1.7)


def nobody(persona):
    return persona.select([])


def test_a_stream_is_the_answer_in_pieces(engine, core, llama):
    request = Request(tiny.PROMPTS[0], llama.encode_persona(tiny.HISTORY), sampling=SIX)
    (whole,) = engine.generate([request])
    pieces = list(engine.stream(request))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1] == type(whole)(
        pieces[-1].text, whole.finish_reason, whole.prompt_tokens, whole.completion_tokens
    )
    cancelled, stream = core.cancelled, engine.stream(request)
    next(stream)
    stream.close()
    assert core.cancelled == cancelled + 1


def test_threads_ask_at_once(engine, llama):
    personas = llama.encode_persona(tiny.HISTORIES)
    requests = [Request(prompt, persona, sampling=SIX) for prompt in tiny.PROMPTS for persona in personas]
    expected, got = engine.generate(requests), {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: engine.generate([requests[i]])[0]})) for i in range(9)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [got[i] for i in range(9)] == expected


def test_the_time_limit_is_one_for_all_answers_of_a_request(monkeypatch):
    """The second answer is waited for only as long as the first one has left."""
    waits = []

    class Never(SimpleQueue):
        def get(self, block=True, timeout=None):
            waits.append(timeout)
            raise Empty

    clock = [100.0]
    monkeypatch.setattr("pplug_hf.serving.vllm_core.time.monotonic", lambda: clock[0])
    second = vllm_core.Work(None, Never())
    clock[0] += 45  # which the first one took
    with pytest.raises(TimeLimitError, match="within 60 seconds"):
        list(second(60.0))
    assert waits == [15.0]


# ---- what is sent -----------------------------------------------------------------------------------------------


def test_a_prompt_has_ids_rows_and_a_mask():
    soft = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    prompt = mixed_prompt(Row([7, 8, 9], 1, []), soft, "acme")
    assert prompt["prompt_token_ids"] == [7, 7, 7, 8, 9]
    assert prompt["prompt_is_token_ids"] == [True, False, False, True, True]
    assert prompt["prompt_embeds"][1:3].equal(soft)


def test_a_soft_token_of_zeros_is_told_from_the_filler_as_a_word():
    """vLLM caches states by ids and rows; the mask is not part of the key."""
    soft = mixed_prompt(Row([7, 8], 1, []), torch.zeros(1, 4), "")
    word = mixed_prompt(Row([7, 7, 8], 3, []), torch.full((1, 4), 2.0), "")
    assert soft["prompt_token_ids"] == word["prompt_token_ids"][:3]
    assert not soft["prompt_embeds"].equal(word["prompt_embeds"][:3])


def test_tenants_share_nothing_that_is_cached(engine, core):
    engine.generate([Request("the sea", tenant=tenant, sampling=SIX) for tenant in ("acme", "acme", "other", "")])
    salts = [prompt["cache_salt"] for prompt, _ in core.sent]
    assert salts[0] == salts[1] and len(set(salts)) == 3 and "acme" not in salts


def test_sampling_settings():
    chosen = Sampling(7, 0.5, 0.9, 40, ("###",), 3, 1.1, 0.2, 0.3)
    assert sampling_options(chosen, has_persona=False, stop_ids=(2,)) == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["###"],
        "seed": 3,
        "stop_token_ids": [2],
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
    }


def test_an_answer_ends_where_the_engine_does(llama):
    core = Core(llama.backbone, llama.tokenizer, max_length=20)
    engine, _ = engine_of(llama, core=core)
    (answer,) = engine.generate([Request("sea " * 15, sampling=Sampling(max_new_tokens=50))])
    assert core.sent[-1][1]["max_tokens"] == 4 and answer.prompt_tokens == 16
    persona = llama.encode_persona(tiny.HISTORY)
    with pytest.raises(DataError, match="The prompt has 21 tokens, persona included, and the engine reads 20"):
        engine.generate([Request("sea " * 17, persona)])


# ---- what is refused, before anything is sent ----------------------------------------------------------------------


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_prompt_with_far_too_many_characters_is_not_read(engine, core, llama, monkeypatch, as_chat):
    monkeypatch.setattr("pplug_hf.serving.vllm_engine.prompt_row", lambda *_: pytest.fail("it was tokenised"))
    monkeypatch.setattr(llama.personalizer, "soft_prompt", lambda *_: pytest.fail("it was encoded as a query"))
    text = "a" * (32 * core.max_length + 1)
    request = Request([{"role": "user", "content": text}] if as_chat else text, llama.encode_persona(tiny.HISTORY))
    for ask in (lambda: engine.generate([Request("the sea"), request]), lambda: next(engine.stream(request))):
        with pytest.raises(DataError, match=r"The prompt has 4\d+ characters, and at most 128 tokens are taken"):
            ask()
    assert not core.sent


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_do_not_go_with_a_persona(engine, core, llama, penalty):
    persona, sampling = llama.encode_persona(tiny.HISTORY), Sampling(6, **{penalty: 1.5})
    with pytest.raises(ConfigurationError, match=f"{penalty}=1.5 does not go with a persona"):
        engine.generate([Request("the sea", sampling=SIX), Request("the sea", persona, sampling=sampling)])
    assert not core.sent
    engine.generate([Request("the sea", sampling=sampling)])
    assert core.sent[0][1][penalty] == 1.5


def damaged(llama, value):
    persona = llama.encode_persona(tiny.HISTORY)
    persona.vectors[1, 3] = value
    return persona


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_persona_is_refused_and_others_are_answered(engine, core, llama, value):
    good = Request(tiny.PROMPTS[0], llama.encode_persona(tiny.HISTORY), sampling=SIX)
    expected = engine.generate([good])
    core.sent.clear()
    with pytest.raises(DataError, match="NaN or infinity"):
        engine.generate([good, Request(tiny.PROMPTS[1], damaged(llama, value), sampling=SIX)])
    with pytest.raises(DataError, match="NaN or infinity"):
        next(iter(engine.stream(Request(tiny.PROMPTS[1], damaged(llama, value), sampling=SIX))))
    assert not core.sent
    assert engine.generate([good]) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_soft_prompt_that_comes_out_wrong_is_refused(engine, core, llama, monkeypatch, value):
    """A check of the persona does not see what a plug makes of it."""
    persona = llama.encode_persona(tiny.HISTORY)
    plug = llama.personalizer.plug
    monkeypatch.setattr(plug, "scale", value)
    with pytest.raises(DataError, match="The persona of this request is damaged"):
        engine.generate([Request("the sea", persona, sampling=SIX)])
    assert not core.sent


def test_rows_of_another_shape_or_kind():
    for rows in (torch.ones(2, 3), torch.ones(4), torch.ones(1, 2, 4), torch.ones(2, 4, dtype=torch.long)):
        with pytest.raises(MismatchError, match=r"is \[tokens, 4\] of floating point numbers"):
            checked_rows(rows, torch.float32, 4, 1.0)
    assert checked_rows(torch.ones(2, 4), torch.bfloat16, 4, 1.0).dtype == torch.bfloat16


def test_rows_that_the_dtype_does_not_hold():
    rows = torch.full((1, 4), 70000.0)
    assert checked_rows(rows, torch.float32, 4, 1e5).equal(rows)
    with pytest.raises(DataError, match="NaN or infinity"):
        checked_rows(rows, torch.float16, 4, 1e5)


def test_the_norm_of_a_soft_token():
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert len(checked_rows(rows * LARGEST_NORM, torch.float32, 2, 1.0)) == 2
    with pytest.raises(DataError, match=r"has a norm of 35\.2, and tokens of this language model have 1"):
        checked_rows(rows * LARGEST_NORM * 1.1, torch.float32, 2, 1.0)
    assert checked_rows(rows[:0], torch.float32, 2, 1.0).shape == (0, 2)


def test_a_persona_of_another_encoder(engine, core, llama):
    spec = type(llama.personalizer.spec)("another", 12)
    with pytest.raises(MismatchError, match="another"):
        engine.generate([Request("the sea", Persona(tiny.vectors(2), spec))])
    with pytest.raises(DataError, match="is a Persona, got list"):
        engine.generate([Request("the sea", tiny.HISTORY)])
    with pytest.raises(ConfigurationError, match="temperature"):
        engine.generate([Request("the sea", sampling=Sampling(temperature=-1))])
    assert not core.sent


def test_encoder_decoder_models():
    with pytest.raises(ConfigurationError, match="vLLM serves causal language models alone"):
        engine_of(tiny.model("t5"))


def test_a_plug_of_another_language_model(llama):
    with pytest.raises(MismatchError, match="made for the backbone"):
        VllmEngine(
            Core(llama.backbone, llama.tokenizer),
            {"one": LoadedPlug(llama.personalizer, PPlugProcessor.from_model(llama))},
            tiny.backbone("gpt2").config,
        )
    core = Core(llama.backbone, llama.tokenizer)
    core.width = 32
    with pytest.raises(MismatchError, match="soft tokens of width 16, and vLLM's model has 32"):
        engine_of(llama, core=core)


def test_a_full_queue(llama):
    engine, core = engine_of(llama, max_queue=3)
    core.running = 4
    assert engine.waiting == 2 and engine.generate([Request("the sea", sampling=SIX)])
    core.running, core.sent = 5, []
    with pytest.raises(EngineBusyError, match="3 requests are waiting"):
        engine.generate([Request("the sea", sampling=SIX)])
    assert not core.sent
    engine.check()  # health is asked for all the same


# ---- health -----------------------------------------------------------------------------------------------------


def test_the_check_is_red_once_the_engine_is_poisoned(llama):
    engine, core = engine_of(llama)
    engine.check()
    salts = [prompt["cache_salt"] for prompt, _ in core.sent]
    assert len(set(salts)) == len(salts), "nothing of it may come from a cache"
    core.is_poisoned = True
    with pytest.raises(EngineError, match="poisoned"):
        engine.check()
    core.is_poisoned = False  # blocks that are written anew look sound again, and others are not
    with pytest.raises(EngineError, match="poisoned"):
        engine.check()


@pytest.mark.parametrize(
    "made, is_sound",
    [([5, 6, 7], True), ([5, 8, 9], True), ([0, 0, 0], False), ([5, 0, 0], False), ([6, 5, 7], False), ([], False)],
)
def test_what_rounding_changes_is_no_poison(made, is_sound):
    assert _is_sound(("", made), ("", [5, 6, 7])) == is_sound


def test_a_canary_of_ones_own(llama):
    engine, core = engine_of(llama)
    (right,) = engine.generate([Request("the sea", sampling=Sampling(3))])
    word = right.text.split()[0]
    engine, core = engine_of(llama, canary=("the sea", word))
    core.is_poisoned = True
    with pytest.raises(EngineError, match="poisoned"):
        engine.check()
    with pytest.raises(EngineError):
        engine_of(llama, canary=("the sea", "no such answer"))


def test_the_end(llama):
    engine, core = engine_of(llama)
    with engine:
        assert list(engine.personalizers) == ["plug0"]
    assert core.is_closed


def test_who_waits_for_an_answer_is_told_when_the_core_ends(monkeypatch):
    """vLLM itself leaves them waiting."""
    asked, got = threading.Event(), []

    class Llm:
        model_config = SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 16, max_model_len=128)
        vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))

        async def generate(self, prompt, params, name):
            asked.set()
            await asyncio.Event().wait()
            yield

        def shutdown(self):
            pass

    fake = SimpleNamespace(
        AsyncEngineArgs=dict,
        AsyncLLMEngine=SimpleNamespace(from_engine_args=lambda arguments: Llm()),
        SamplingParams=dict,
        current_platform=SimpleNamespace(is_cpu=lambda: True),
        RequestOutputKind=SimpleNamespace(DELTA=0, FINAL_ONLY=1),
    )
    monkeypatch.setattr(vllm_core, "require", lambda *names: fake)
    core = VllmCore("model")
    work = core.start({}, {})

    def wait():
        try:
            list(work())
        except EngineError as error:
            got.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert asked.wait(60) and core.running == 1
    core.close()
    waiting.join(60)
    assert got == ["The engine is closed."] and core.running == 0
    core.close()
    with pytest.raises(EngineError, match="closed"):
        core.start({}, {})


# ---- loading ----------------------------------------------------------------------------------------------------


def test_vllm_is_optional(places, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    model = tiny.from_backbone(str(places / "llama"), str(places / "encoder"))
    model.save_pretrained(tmp_path)
    with pytest.raises(MissingPackageError, match=r"pip install 'pplug-hf\[vllm\]'"):
        VllmEngine.from_pretrained(str(tmp_path))


def test_loading_gives_vllm_the_folder_and_the_tokenizer(places, tmp_path, monkeypatch):
    model = tiny.from_backbone(str(places / "llama"), str(places / "encoder"))
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    got = {}

    def start(model_name, **arguments):
        got.update(arguments, model=model_name)
        return Core(tiny.backbone("llama"), tiny.tokenizer("llama"))

    monkeypatch.setattr("pplug_hf.serving.vllm_engine.VllmCore", start)
    engine = VllmEngine.from_pretrained(str(tmp_path / "one"), {"two": str(tmp_path / "two")}, max_model_len=128)
    assert got["model"] == str(places / "llama") and got["max_model_len"] == 128
    one, two = engine.personalizers.values()
    assert one.history_encoder is two.history_encoder
    engine.close()
    with pytest.raises(ConfigurationError, match="'default' is the name of the plug that is loaded first"):
        VllmEngine.from_pretrained(str(tmp_path / "one"), {"default": str(tmp_path / "two")})


@pytest.mark.parametrize("argument", ["speculative_config", "kv_transfer_config", "skip_tokenizer_init"])
def test_arguments_that_would_answer_without_the_persona(argument):
    with pytest.raises(ConfigurationError, match=f"{argument} does not go with VllmEngine"):
        VllmCore("model", **{argument: {"some": "thing"}})


def test_the_server_passes_its_limits_on(monkeypatch):
    from pplug_hf.commands.options import ServeSettings
    from pplug_hf.commands.serve import _engine

    monkeypatch.setattr(VllmEngine, "from_pretrained", lambda *given, **options: (given, options))
    settings = ServeSettings(
        plug="one", store="s", plugs=["late=two"], engine="vllm", max_batch=3, max_queue=4, time_limit=5
    )
    given, options = _engine(settings)
    assert given == ("one",) and options["plugs"] == {"late": "two"}
    assert (options["max_num_seqs"], options["max_queue"], options["time_limit"]) == (3, 4, 5)
    settings.plugs += ["late=three"]
    with pytest.raises(ConfigurationError, match="Two plugs have the name 'late'"):
        _engine(settings)
