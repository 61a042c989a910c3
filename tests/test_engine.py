"""`TransformersEngine`: every answer is the one that `generate` gives alone, whoever else asks at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch
from serving import alone, slow, with_two_plugs

from pplug_hf import ConfigurationError, DataError, MismatchError, Persona, PPlugProcessor
from pplug_hf.errors import EngineBusyError, EngineError, TimeLimitError
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.row_sampling import draw
from pplug_hf.serving.transformers_engine import TransformersEngine

SIX = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An engine on a model with two plugs, of the two placements."""
    model = with_two_plugs(tmp_path_factory.mktemp("late"), "late", placement="answer", attention_temperature=0.2)
    with_engine = TransformersEngine(model)
    yield with_engine
    with_engine.close()


def personas(engine):
    return [engine.personalizers["default"].encode(history) for history in tiny.HISTORIES]


@pytest.mark.parametrize("placement", ["prompt", "answer"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_answers_as_each_request_alone(family, placement):
    model = tiny.model(family, attention_temperature=0.2, placement=placement)
    engine = TransformersEngine(model)
    users = [*personas(engine), None]
    requests = [
        Request(prompt, persona=user, sampling=Sampling(max_new_tokens=3 + len(prompt) % 5))
        for prompt in tiny.PROMPTS
        for user in users
    ]
    answers = engine.generate(requests)
    assert [a.text.strip() for a in answers] == [alone(model, request) for request in requests]
    assert len({a.text for a in answers}) > 3  # personas and prompts matter
    assert (engine.prompt_cache.computed > 0) == (placement == "answer")
    soft = model.config.prefix_length
    assert [a.prompt_tokens for a in answers[:4]] == [answers[3].prompt_tokens + soft] * 3 + [answers[3].prompt_tokens]
    engine.check()
    engine.close()


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_forced_end_does_not_depend_on_the_longest_answer_of_a_batch(family):
    model = tiny.model(family)
    model.generation_config.eos_token_id, model.generation_config.forced_eos_token_id = None, tiny.EOS
    short, long = (Request(tiny.PROMPTS[0], sampling=Sampling(max_new_tokens=n)) for n in (3, 6))
    with TransformersEngine(model) as engine:
        answers = [*engine.generate([short]), *engine.generate([long]), *engine.generate([short, long])]
    assert answers[:2] == answers[2:]
    assert [(a.completion_tokens, a.finish_reason) for a in answers[:2]] == [(3, "length"), (6, "length")]


def test_requests_of_a_batch_name_plugs_of_their_own(llama, monkeypatch):
    sizes, generate = [], llama._generate
    monkeypatch.setattr(llama, "_generate", lambda rows: sizes.append(len(rows)) or generate(rows))
    assert list(llama.plugs) == ["default", "late"]
    user = personas(llama)[0]
    requests = [Request(tiny.PROMPTS[0], user, plug=plug, sampling=SIX) for plug in (None, "late", "default")]
    requests.append(Request(tiny.PROMPTS[0], sampling=SIX))
    answers = [a.text.strip() for a in llama.generate(requests)]
    assert answers == [alone(llama.model, request) for request in requests]
    assert len(set(answers)) == 3 and answers[0] == answers[2] and sizes == [4]


def test_a_strength_is_of_one_row(llama):
    user = personas(llama)[0]
    strengths = (0.0, 1.0, 3.0)
    requests = [Request(tiny.PROMPTS[0], user, strength=strength, sampling=SIX) for strength in strengths]
    answers = [a.text.strip() for a in llama.generate([*requests, Request(tiny.PROMPTS[0], sampling=SIX)])]
    inputs = PPlugProcessor.from_model(llama.model)(text=[tiny.PROMPTS[0]] * 4, query=[tiny.PROMPTS[0]] * 4)
    options = {"persona": [user, user, user, None], "persona_strength": [*strengths, 1.0]}
    ids = llama.model.generate(**inputs, **options, max_new_tokens=6, do_sample=False, num_beams=1)
    expected = PPlugProcessor.from_model(llama.model).decode_answers(ids, inputs["input_ids"].shape[1])
    assert answers[:3] == expected[:3] and answers[0] == expected[3] and len(set(answers)) > 2


def test_sixteen_callers_at_once_are_answered_as_one_after_the_other(llama):
    users = personas(llama)
    requests = [Request(tiny.PROMPTS[i % 3], users[i % 2], sampling=SIX) for i in range(16)]
    one_by_one = [llama.generate([request])[0] for request in requests]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda request: llama.generate([request])[0], requests)) == one_by_one


def test_callers_who_ask_again_and_again_share_batches(llama, monkeypatch):
    """Half of them begin while the others are answered, and they do not take turns for ever."""
    sizes, generate = [], llama._generate
    monkeypatch.setattr(llama, "_generate", lambda rows: sizes.append(len(rows)) or generate(rows))
    monkeypatch.setattr(llama, "gather", 0.2)
    slow(llama, monkeypatch, 0.01)
    request = Request(tiny.PROMPTS[0], sampling=Sampling(6, stop=("nothing like it",)))

    def ask(i):
        time.sleep(0.1 * (i % 2))
        asked = 0
        while sizes[-5:] != [8] * 5 and len(sizes) < 40:  # on a busy machine, one of them may ask too late for a batch
            llama.generate([request])
            asked += 1
        return asked

    with ThreadPoolExecutor(8) as pool:
        asked = sum(pool.map(ask, range(8)))
    assert sum(sizes) == asked and sizes[-5:] == [8] * 5


def test_a_request_long_after_a_batch_waits_for_nobody(llama, monkeypatch):
    slow(llama, monkeypatch, 0.05)
    request = Request(tiny.PROMPTS[0], sampling=Sampling(6, stop=("nothing like it",)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(llama.generate, [[request]] * 2))
    monkeypatch.undo()
    monkeypatch.setattr(llama, "gather", 2.0)
    time.sleep(2.1)
    start = time.monotonic()
    llama.generate([request])
    assert time.monotonic() - start < 1


def test_generate_itself_may_be_called_from_sixteen_threads(gpt2):
    processor = PPlugProcessor.from_model(gpt2)
    inputs = [processor(text=[tiny.PROMPTS[i % 3]]) for i in range(16)]

    def answer(i):
        return gpt2.generate(
            **inputs[i], persona=[tiny.HISTORIES[i % 2]], query=[tiny.PROMPTS[i % 3]], max_new_tokens=6
        ).tolist()

    one_by_one = [answer(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(answer, range(16))) == one_by_one


def test_draws_depend_on_the_seed_and_on_nobody_else(llama):
    user = personas(llama)[0]

    def ask(seed, temperature=1.5):
        return Request(tiny.PROMPTS[0], user, sampling=Sampling(12, temperature=temperature, seed=seed))

    first = llama.generate([ask(1)])[0]
    others = [ask(2), Request(tiny.PROMPTS[1], sampling=SIX), ask(1), ask(None), ask(None)]
    answers = llama.generate(others)
    assert answers[2] == first and answers[0] != first and answers[3] != answers[4]
    assert answers[1].text.strip() == alone(llama.model, others[1])  # greedy in the same batch
    for lowest in (1e-4, 1e-6, 1e-40):  # float32 has no number between 0 and the last one
        assert llama.generate([ask(1, temperature=lowest)])[0].text.strip() == alone(llama.model, ask(1))


def test_a_token_is_drawn_among_the_likeliest():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log().repeat(5, 1)
    settings = [
        Sampling(temperature=1),
        Sampling(temperature=1, top_k=2),
        Sampling(temperature=1, top_p=0.5),
        Sampling(temperature=1, top_p=0.1),
        Sampling(temperature=0.01),
    ]
    assert draw(logits[:1], [Sampling(temperature=1, top_k=10**400)], [0.999]).tolist() == [1]
    assert draw(logits, settings, [0.999] * 5).tolist() == [1, 2, 2, 0, 0]
    assert draw(logits, settings, [0.0] * 5).tolist() == [0] * 5
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    drawn = draw(logits[:1].repeat(1000, 1), settings[:1] * 1000, numbers)
    assert drawn.bincount().tolist() == [400, 100, 300, 200]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_of_one_row(llama, penalty):
    plain, punished = (Request(tiny.PROMPTS[2], sampling=Sampling(24, **options)) for options in ({}, {penalty: 20.0}))
    a, b = llama.generate([plain, punished])
    assert a.text.strip() == alone(llama.model, plain)
    assert len(set(b.text.split())) == len(b.text.split()) > len(set(a.text.split()))
    assert b == llama.generate([punished])[0]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(llama):
    user = personas(llama)[0]
    whole = llama.generate([Request(tiny.PROMPTS[0], user, sampling=SIX)])[0]
    words = whole.text.split()
    stop = f"{words[2]} {words[3]}"
    request = Request(tiny.PROMPTS[0], user, sampling=Sampling(6, stop=("nothing like it", stop)))
    answer = llama.generate([request, Request(tiny.PROMPTS[1])])[0]
    assert answer.text == whole.text.partition(stop)[0] and answer.finish_reason == "stop"
    assert answer.completion_tokens == 4
    pieces = list(llama.stream(request))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "stop"


def test_the_end_token_and_the_length_are_told_apart():
    model = tiny.model("gpt2")
    with torch.no_grad():
        model.backbone.lm_head.weight[tiny.EOS] = 3 * model.backbone.lm_head.weight[tiny.WORDS.index("of") + 7]
    with TransformersEngine(model) as engine:
        answers = engine.generate([Request(p, sampling=Sampling(40)) for p in tiny.PROMPTS])
    assert "stop" in {a.finish_reason for a in answers}
    assert all((a.finish_reason == "length") == (a.completion_tokens == 40) for a in answers)


def test_pieces_come_one_by_one_and_are_the_answer(llama):
    request = Request(tiny.PROMPTS[0], personas(llama)[1], sampling=Sampling(12))
    pieces = list(llama.stream(request))
    assert len(pieces) > 6 and "".join(p.text for p in pieces) == llama.generate([request])[0].text
    assert [p.completion_tokens for p in pieces] == sorted(p.completion_tokens for p in pieces)


def test_a_closed_stream_ends_the_work(llama, monkeypatch):
    slow(llama, monkeypatch)
    stream = llama.stream(Request(tiny.PROMPTS[0], sampling=Sampling(100)))
    next(stream)
    (row,) = llama._batch
    stream.close()
    llama.generate([Request(tiny.PROMPTS[1], sampling=SIX)])
    assert row.ended and len(row.tokens) < 50


def test_a_chat_is_written_as_the_plug_was_trained():
    words = tiny.tokenizer("qwen3")
    words.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<bot>"
    model = tiny.from_backbone(tiny.backbone("qwen3"), tiny.shared_encoder(), tokenizer=words, system="be good")
    tiny.randomise(model.plug)
    user = model.encode_persona(tiny.HISTORY)
    chat = [{"role": "user", "content": tiny.PROMPTS[0]}]
    with TransformersEngine(model) as engine:
        texts = [tiny.PROMPTS[0], chat, [{"role": "system", "content": "be good"}, *chat], [*chat, *chat]]
        answers = engine.generate([Request(text, user, sampling=SIX) for text in texts])
    expected = alone(model, Request(tiny.PROMPTS[0], user, sampling=SIX))
    assert [a.text.strip() for a in answers[:3]] == [expected] * 3 and answers[3].text.strip() != expected


TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"


def with_own_words(folder, prompt):
    """A model whose second plug has a chat template and an end token of its own, and that plug as the only one."""
    backbone, made = tiny.backbone("qwen3"), []
    for seed, template in enumerate((TEMPLATE + "<bot>", TEMPLATE)):
        words = tiny.tokenizer("qwen3")
        words.chat_template = template
        torch.manual_seed(seed)  # of the weights that are drawn with the plug
        made.append(tiny.from_backbone(backbone, tiny.shared_encoder(), tokenizer=words))
        tiny.randomise(made[-1].plug, seed)
    model, second = made
    first_word = alone(second, Request(prompt, sampling=SIX)).split()[0]
    second.generation_config.eos_token_id = [tiny.EOS, tiny.VOCABULARY.index(first_word)]
    second.save_pretrained(folder)
    model.load_plug(folder, "second", encoder=tiny.shared_encoder())
    return model, second


def test_a_plug_is_asked_in_its_own_template_and_up_to_its_own_end(tmp_path):
    model, second = with_own_words(tmp_path, tiny.PROMPTS[0])
    user = model.encode_persona(tiny.HISTORY)
    chat = [{"role": "user", "content": tiny.PROMPTS[0]}]
    requests = [
        Request(prompt, persona, sampling=SIX) for prompt in (tiny.PROMPTS[0], chat) for persona in (user, None)
    ]
    with TransformersEngine(second) as engine:
        expected = engine.generate(requests)
    assert (expected[1].finish_reason, expected[1].completion_tokens) == ("stop", 1)
    with TransformersEngine(model) as engine:
        usual = engine.generate(requests)
        both = engine.generate([*(replace(request, plug="second") for request in requests), *requests])
    assert both == [*expected, *usual] and usual != expected


def test_a_chat_for_a_model_without_a_template_is_its_texts(llama):
    chat = [{"role": "system", "content": "write"}, {"role": "user", "content": "a story"}]
    a, b = llama.generate([Request(chat, sampling=SIX), Request("write\na story", sampling=SIX)])
    assert a == b


@pytest.mark.parametrize("prompt", ["sea \ud800", [{"role": "user", "content": "sea \ud800"}]])
def test_half_a_surrogate_pair_is_a_replacement_character(llama, prompt):
    a, b = llama.generate([Request(prompt, sampling=SIX), Request("sea \ufffd", sampling=SIX)])
    assert a == b


# ---- bad input and faults


def broken(persona):
    """The same persona with a NaN, which its constructor would refuse."""
    made = Persona(persona.vectors.clone(), persona.spec)
    made.vectors[0, 0] = torch.nan
    return made


def test_a_persona_with_a_nan_is_refused_before_it_is_batched(llama):
    user = personas(llama)[0]
    with pytest.raises(DataError, match="NaN"):
        llama.generate([Request(tiny.PROMPTS[0], user), Request(tiny.PROMPTS[0], broken(user))])
    with pytest.raises(DataError, match="NaN"):
        next(llama.stream(Request(tiny.PROMPTS[0], broken(user))))
    llama.check()


def test_a_nan_that_comes_about_later_fails_one_request_alone(llama, monkeypatch):
    monkeypatch.setattr("pplug_hf.serving.prompts.check_finite", lambda vectors: None)
    user = personas(llama)[0]
    good = Request(tiny.PROMPTS[0], user, sampling=SIX)
    with ThreadPoolExecutor(4) as pool:
        asked = [good, Request(tiny.PROMPTS[0], broken(user)), Request(tiny.PROMPTS[1], sampling=SIX), good]
        futures = [pool.submit(llama.generate, [request]) for request in asked]
    with pytest.raises(EngineError, match="NaN"):
        futures[1].result()
    for i in (0, 2, 3):
        assert futures[i].result()[0].text.strip() == alone(llama.model, asked[i])
    llama.check()


def test_of_a_batch_that_fails_each_request_is_tried_alone(llama, monkeypatch):
    generate, calls = llama.model.generate, []

    def fails(ids, **options):
        calls.append(len(ids))
        if "bad" in options["query"]:
            raise RuntimeError("a secret text")
        return generate(ids, **options)

    monkeypatch.setattr(llama.model, "generate", fails)
    monkeypatch.setattr(llama, "gather", 60)
    monkeypatch.setattr(llama, "_are_all_here", lambda: len(llama._waiting) == 4)
    user = personas(llama)[0]
    with ThreadPoolExecutor(3) as pool:
        good = pool.submit(llama.generate, [Request(tiny.PROMPTS[0], user, sampling=SIX)] * 3)
        bad = pool.submit(llama.generate, [Request(tiny.PROMPTS[0], user, query="bad", sampling=SIX)])
    with pytest.raises(EngineError, match="RuntimeError") as caught:
        bad.result()
    assert "secret" not in str(caught.value)
    monkeypatch.undo()
    assert {a.text.strip() for a in good.result()} == {
        alone(llama.model, Request(tiny.PROMPTS[0], user, query=tiny.PROMPTS[0], sampling=SIX))
    }
    assert 4 in calls


@pytest.mark.parametrize(
    "request_, error, message",
    [
        (Request("", sampling=SIX), DataError, None),
        (Request("sea " * 40), DataError, "at most 30"),
        (Request("sea" * 400), DataError, "characters"),
        (Request([{"role": "user", "content": "sea" * 400}]), DataError, "characters"),
        (Request([{"role": "user", "content": ""}] * 40), DataError, "characters"),
        (Request("sea", plug="nobody"), ConfigurationError, "default, late"),
        (Request("sea", sampling=Sampling(0)), ConfigurationError, "max_new_tokens"),
        (Request("sea", sampling=Sampling(temperature=float("nan"))), ConfigurationError, "temperature"),
        (Request("sea", sampling=Sampling(top_p=0)), ConfigurationError, "top_p"),
        (Request("sea", strength=-1.0), DataError, "at least 0"),
        (Request("sea", strength=float("nan")), DataError, "finite"),
        (Request("sea", strength=None), DataError, "a number"),
        (Request("sea", sampling=Sampling(stop=("",))), ConfigurationError, "stop"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(llama, monkeypatch, request_, error, message):
    monkeypatch.setattr(llama, "max_prompt_tokens", 30)
    if message == "characters":
        monkeypatch.setattr(llama, "_as_served", lambda name: pytest.fail("it was read"))
    if request_.prompt == "":
        monkeypatch.setattr("pplug_hf.serving.transformers_engine.prompt_row", lambda *_: type("Row", (), {"ids": []}))
    monkeypatch.setattr(llama, "_enter", lambda rows: pytest.fail("it would share a batch with others"))
    with pytest.raises(error, match=message):
        llama.generate([request_])


def test_a_persona_of_another_encoder_is_refused(llama):
    spec = type(llama.personalizers["default"].spec)("another", 12)
    with pytest.raises(MismatchError, match="another"):
        llama.generate([Request("sea", Persona(tiny.vectors(2), spec))])


def test_prompts_stay_within_the_positions_of_the_model():
    model = tiny.model("gpt2")
    with TransformersEngine(model) as engine:
        user = personas(engine)[0]
        long = Request("sea " * 100, user, sampling=Sampling(100))  # 128 positions
        short = Request("sea", user, sampling=Sampling(100))
        with ThreadPoolExecutor(2) as pool:
            a, b = pool.map(lambda request: engine.generate([request])[0], (long, short))
        assert a.completion_tokens == 128 - 102 + 1 and b.completion_tokens == 100
        with pytest.raises(DataError, match="the model reads 128"):
            engine.generate([Request("sea " * 128, user)])


def test_a_full_queue_refuses_and_a_late_answer_ends(llama, monkeypatch):
    slow(llama, monkeypatch, 0.1)
    monkeypatch.setattr(llama, "max_queue", 1)
    monkeypatch.setattr(llama, "max_batch", 1)
    with ThreadPoolExecutor(3) as pool:
        request = Request("sea", sampling=Sampling(100, stop=("nothing like it",)))
        running = pool.submit(llama.generate, [request])
        while not llama._batch:
            time.sleep(0.001)
        waiting = pool.submit(llama.generate, [Request("sea", sampling=SIX)])
        while not llama.waiting:
            time.sleep(0.001)
        with pytest.raises(EngineBusyError, match="1 requests are waiting"):
            llama.generate([request])
        left = threading.Event()
        llama._waiting[0].request = replace(llama._waiting[0].request, cancelled=left)
        left.set()  # who waits has gone, and another has the place
        other = pool.submit(llama.generate, [Request("sea", sampling=SIX)])
        with pytest.raises(EngineError, match="cancelled"):
            waiting.result()
        while not llama.waiting and not other.done():
            time.sleep(0.001)
        llama._batch[0].limit = 0  # the running answer ends
        assert running.result()[0].text and other.result()[0].text
    monkeypatch.setattr(llama, "time_limit", 0.15)
    with pytest.raises(TimeLimitError, match=r"0\.15 seconds"):
        llama.generate([request])
    monkeypatch.undo()
    assert llama.generate([Request("sea", sampling=SIX)])[0].text  # the engine goes on


def test_the_known_question_is_asked_ahead_of_others_and_finds_a_changed_model(monkeypatch):
    engine = TransformersEngine(tiny.model("qwen3"))
    slow(engine, monkeypatch, 0.01)
    engine.max_batch = 1
    threads = [threading.Thread(target=engine.generate, args=([Request("sea", sampling=SIX)],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    engine.check()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        engine.model.plug.projector.output.weight[:] = torch.nan
    with pytest.raises(EngineError, match="NaN"):
        engine.check()
    tiny.randomise(engine.model.backbone, 1)
    with torch.no_grad():
        engine.model.plug.projector.output.weight[:] = 0
    with pytest.raises(EngineError, match="another answer"):
        engine.check()
    engine.close()


def test_a_closed_engine_and_one_whose_thread_died_say_so(monkeypatch):
    engine = TransformersEngine(tiny.model("gpt2"))
    slow(engine, monkeypatch)
    stream = engine.stream(Request("sea", sampling=Sampling(100)))
    next(stream)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        engine.generate([Request("sea")])

    def dies(rows):
        raise SystemExit

    engine = TransformersEngine(tiny.model("gpt2"))
    monkeypatch.setattr(engine, "_answer_all", dies)
    for ask in (lambda: engine.generate([Request("sea")]), engine.check):
        with pytest.raises(EngineError, match=r"has failed \(SystemExit\)"):
            ask()


def test_an_engine_that_does_not_start_leaves_no_thread():
    before = {*threading.enumerate()}
    with pytest.raises(DataError, match="at most 1"):
        TransformersEngine(tiny.model("gpt2"), max_prompt_tokens=1)
    for thread in {*threading.enumerate()} - before:
        if thread.name == "pplug-engine":
            thread.join(60)
            assert not thread.is_alive()


def test_a_model_that_hangs_is_noticed(llama, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(llama, "_answer_all", lambda rows: go_on.wait())
    monkeypatch.setattr(llama, "time_limit", 0.2)
    with pytest.raises(TimeLimitError):
        llama.generate([Request("sea")])
    with pytest.raises(TimeLimitError):
        llama.check()
    go_on.set()
    monkeypatch.undo()
    llama.check()


# ---- cached prompts


def test_a_tenant_reads_no_state_that_another_left():
    model = tiny.model("llama", placement="answer", attention_temperature=0.2)
    with TransformersEngine(model) as engine:
        users, cache = personas(engine)[:2], engine.prompt_cache
        computed = []
        for tenant in ("", "a", "b", "a", "", "b"):
            answers = engine.generate([Request(tiny.PROMPTS[0], user, tenant=tenant, sampling=SIX) for user in users])
            assert [a.text.strip() for a in answers] == [
                alone(model, Request(tiny.PROMPTS[0], user, sampling=SIX)) for user in users
            ]
            computed.append(cache.computed)
        prompt = answers[0].prompt_tokens - model.config.prefix_length
        known = computed[0] - prompt  # of the known question
        assert computed == [known + n * prompt for n in (1, 2, 3, 3, 3, 3)]


def test_tenants_with_equal_prompts_in_one_batch_and_a_small_cache_answer_as_alone():
    model = tiny.model("gpt2", placement="answer", attention_temperature=0.2)
    with TransformersEngine(model, prompt_cache=4000) as engine:
        users = personas(engine)[:2]
        expected = {
            (prompt, i): alone(model, Request(prompt, user, sampling=SIX))
            for prompt in tiny.PROMPTS
            for i, user in enumerate(users)
        }
        for _ in range(25):
            asked = [(prompt, i) for prompt in tiny.PROMPTS for i in (0, 1)]
            requests = [Request(prompt, users[i], tenant=str(i), sampling=SIX) for prompt, i in asked]
            assert [a.text.strip() for a in engine.generate(requests)] == [expected[one] for one in asked]
            assert engine.prompt_cache.used <= 4000
