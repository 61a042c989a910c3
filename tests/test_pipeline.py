"""pipeline("personalized-text-generation"): what comes out is what generate gives by hand, for every form of input."""

import threading
from types import SimpleNamespace

import datasets
import pytest
import reference
import tiny
import torch
from test_processing import CHATS, TEMPLATES
from torch.utils.data import Dataset
from transformers import GenerationConfig, TextIteratorStreamer, pipeline

from pplug_hf import (
    EncoderSpec,
    Persona,
    PersonalizedTextGenerationPipeline,
    PPlugProcessor,
)
from pplug_hf.errors import ConfigurationError, DataError, MismatchError

TASK = "personalized-text-generation"
NEW = {"max_new_tokens": 6}
FAMILIES = ("gpt2", "llama", "t5", "bart")
SECRET = "my secret diary"


@pytest.fixture(scope="module", params=FAMILIES)
def made(request):
    """A pipeline, and the answers by hand of one prompt at a time."""
    model = tiny.model(request.param, attention_temperature=0.2)
    return SimpleNamespace(pipe=pipeline(TASK, model=model), model=model, causal=request.param in tiny.CAUSAL)


def by_hand(model, prompt, persona=None, query=None, **kwargs):
    """Texts of one prompt, from tensors to tensors."""
    processor = PPlugProcessor.from_model(model)
    inputs = processor([prompt])
    query = None if query is None else [query]
    ids = model.generate(**inputs, persona=[persona], query=query, **{**NEW, **kwargs})
    return processor.decode_answers(ids, prompt_length=inputs["input_ids"].shape[1])


def texts(records, prompt="", causal=True):
    assert all(set(record) == {"generated_text"} for record in records)
    start = prompt if causal else ""
    assert all(record["generated_text"].startswith(start) for record in records)
    return [record["generated_text"].removeprefix(start) for record in records]


# ---- prompts and personas ---------------------------------------------------------------------------------------


def test_one_prompt(made):
    prompt = tiny.PROMPTS[0]
    answers = {}
    for name, persona in {"history": tiny.HISTORY, "nobody": None, "empty": []}.items():
        records = made.pipe(prompt, persona=persona, query="sea", **NEW)
        answers[name] = texts(records, prompt, made.causal)
        assert answers[name] == by_hand(made.model, prompt, persona, "sea")
    assert answers["nobody"] == answers["empty"] != answers["history"]
    assert (
        made.pipe(prompt, **NEW) == made.pipe(prompt, persona=None, **NEW) == made.pipe(prompt, plug="default", **NEW)
    )
    assert made.pipe({"text": prompt, "persona": tiny.HISTORY, "query": "sea"}, **NEW) == made.pipe(
        prompt, persona=tiny.HISTORY, query="sea", **NEW
    )


def test_against_a_loop_written_out():
    model = tiny.model("gpt2", attention_temperature=0.2)
    soft = reference.soft_prompt(model, tiny.HISTORY, "sea")
    ids = tiny.tokenizer("gpt2")(tiny.PROMPTS[0])["input_ids"]
    expected = reference.greedy(lambda so_far: reference.next_logits(model, soft, ids, so_far), 6, tiny.EOS)
    answer = pipeline(TASK, model=model)(
        tiny.PROMPTS[0], persona=tiny.HISTORY, query="sea", return_full_text=False, **NEW
    )
    assert texts(answer) == [model.tokenizer.decode(expected, skip_special_tokens=True)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_many_prompts_in_batches(made, batch_size):
    expected = [by_hand(made.model, p, h) for p, h in zip(tiny.PROMPTS, tiny.HISTORIES, strict=True)]
    several = made.pipe(tiny.PROMPTS, persona=tiny.HISTORIES, batch_size=batch_size, **NEW)
    assert [texts(r, p, made.causal) for r, p in zip(several, tiny.PROMPTS, strict=True)] == expected


def test_every_form_of_persona_and_query(made):
    personas = [made.model.encode_persona(tiny.HISTORY), tiny.HISTORIES[1], None]
    queries = ["sea", "moon", "war"]
    several = made.pipe(tiny.PROMPTS, persona=personas, query=queries, batch_size=3, **NEW)
    for records, prompt, persona, query in zip(several, tiny.PROMPTS, personas, queries, strict=True):
        assert texts(records, prompt, made.causal) == by_hand(made.model, prompt, persona, query)
    rows = [{"text": p, "persona": h, "query": q} for p, h, q in zip(tiny.PROMPTS, personas, queries, strict=True)]
    assert made.pipe(rows, batch_size=2, **NEW) == several
    assert made.pipe(tuple(tiny.PROMPTS), persona=tuple(personas), query=queries, **NEW) == several


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def several_plugs(request, tmp_path_factory):
    """Two plugs on one backbone, the second with an encoder and a template of its own."""
    model = tiny.model(request.param, attention_temperature=0.2, item_template="{text}")
    encoder, folder = tiny.encoder(width=8, seed=5), tmp_path_factory.mktemp("other")
    other = tiny.from_backbone(
        tiny.backbone(request.param),
        encoder,
        tokenizer=tiny.tokenizer(request.param),
        item_template="{title}",
        num_persona_tokens=3,
    )
    tiny.randomise(other.plug, seed=9)
    other.save_pretrained(folder)
    model.load_plug(folder, "other", encoder=encoder)
    return SimpleNamespace(pipe=pipeline(TASK, model=model), model=model, causal=request.param in tiny.CAUSAL)


def test_a_plug_for_all_or_one_per_prompt(several_plugs):
    pipe, model = several_plugs.pipe, several_plugs.model
    history = [{"text": "a dark film about the sea", "title": "my dog and the moon"}]

    def expected(prompt, name):
        inputs = pipe.processor([prompt])
        ids = model.generate(**inputs, persona=[history], query=["sea"], plug=[name], **NEW)
        return pipe.processor.decode_answers(ids, prompt_length=inputs["input_ids"].shape[1])

    names = ["other", None, "default"]
    alone = [expected(prompt, name) for prompt, name in zip(tiny.PROMPTS, names, strict=True)]
    asked = {"persona": history, "query": "sea", **NEW}
    rows = [{"text": prompt, "plug": name} for prompt, name in zip(tiny.PROMPTS[:2], names, strict=False)]
    for got in (
        pipe(tiny.PROMPTS, plug=names, batch_size=3, **asked),
        pipe(tiny.PROMPTS, plug=names, **asked),
        pipe([*rows, tiny.PROMPTS[2]], batch_size=3, **asked),  # the last one has the active plug
        pipe([*rows, tiny.PROMPTS[2]], batch_size=3, plug="default", **asked),
        list(pipe((row for row in [*rows, tiny.PROMPTS[2]]), batch_size=2, **asked)),
    ):
        assert [texts(r, p, several_plugs.causal) for r, p in zip(got, tiny.PROMPTS, strict=True)] == alone
    whole = pipe(tiny.PROMPTS[1], plug="other", **asked)
    assert texts(whole, tiny.PROMPTS[1], several_plugs.causal) == expected(tiny.PROMPTS[1], "other") != alone[1]
    assert pipeline(TASK, model=model, persona=history, plug="other")(tiny.PROMPTS[1], query="sea", **NEW) == whole
    with pytest.raises(MismatchError, match="Got 2 for plug and 3 prompts"):
        pipe(tiny.PROMPTS, plug=names[:2], **asked)
    with pytest.raises(ConfigurationError, match=r"no plug 'none'.*default, other"):
        pipe(tiny.PROMPTS, plug=["none"] * 3, **asked)


def test_one_persona_and_query_for_all(made, monkeypatch):
    encoded = []
    encode = made.model.encode_persona
    monkeypatch.setattr(made.model, "encode_persona", lambda history: encoded.append(history) or encode(history))
    several = made.pipe(tiny.PROMPTS, persona=tiny.HISTORY, query="sea", **NEW)
    assert encoded == [tiny.HISTORY]  # once, for three passes
    for records, prompt in zip(several, tiny.PROMPTS, strict=True):
        assert texts(records, prompt, made.causal) == by_hand(made.model, prompt, tiny.HISTORY, "sea")


def test_several_sequences_and_a_settings_object(made):
    prompt = tiny.PROMPTS[1]
    options = {"num_beams": 3, "num_return_sequences": 3}
    expected = by_hand(made.model, prompt, tiny.HISTORY, **options)
    one = made.pipe(prompt, persona=tiny.HISTORY, **options, **NEW)
    assert texts(one, prompt, made.causal) == expected and len(one) == 3
    two = made.pipe([prompt, tiny.PROMPTS[0]], persona=tiny.HISTORY, batch_size=2, **options, **NEW)
    assert [len(records) for records in two] == [3, 3] and two[0] == one
    settings = GenerationConfig(max_new_tokens=6, **options)
    assert made.pipe(prompt, persona=tiny.HISTORY, generation_config=settings) == one
    outputs = made.pipe(
        prompt, persona=tiny.HISTORY, return_dict_in_generate=True, output_scores=True, **options, **NEW
    )
    assert outputs == one


def test_sampling_is_that_of_generate(made):
    options = {"do_sample": True, "top_k": 10, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = by_hand(made.model, tiny.PROMPTS[0], tiny.HISTORY, **options)
    torch.manual_seed(0)
    assert (
        texts(made.pipe(tiny.PROMPTS[0], persona=tiny.HISTORY, **options, **NEW), tiny.PROMPTS[0], made.causal)
        == expected
    )


def test_a_pipeline_of_one_user(made):
    own = pipeline(TASK, model=made.model, persona=tiny.HISTORY, query="sea", num_beams=2, **NEW)
    everybody = {"query": "sea", "num_beams": 2, **NEW}
    assert own(tiny.PROMPTS) == made.pipe(tiny.PROMPTS, persona=tiny.HISTORY, **everybody)
    assert own(tiny.PROMPTS[0], persona=None) == made.pipe(tiny.PROMPTS[0], **everybody)


class Rows(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"text": tiny.PROMPTS[i], "persona": tiny.HISTORIES[i]}


def test_generators_and_data_sets_are_read_as_they_are_answered():
    pipe = pipeline(TASK, model=tiny.model("gpt2"), **NEW)
    expected = pipe(tiny.PROMPTS, persona=tiny.HISTORIES)
    read = []

    def prompts():
        for prompt in tiny.PROMPTS:
            read.append(prompt)
            yield prompt

    answers = pipe(prompts(), persona=iter(tiny.HISTORIES))
    assert len(read) <= 1 and next(iter(answers)) == expected[0] and len(read) < 3
    assert list(pipe(prompts(), persona=tiny.HISTORIES, batch_size=2)) == expected
    columns = datasets.Dataset.from_dict({"text": tiny.PROMPTS, "persona": tiny.HISTORIES})
    assert list(pipe(Rows(), batch_size=2)) == list(pipe(columns)) == expected


@pytest.mark.parametrize("name, values, which", [("persona", [[SECRET]], "fewer"), ("query", ["sea"] * 4, "more")])
@pytest.mark.parametrize("read", [iter, list], ids=["generator", "list"])
def test_a_generator_with_another_number_of_values_is_refused(gpt2, name, values, which, read):
    """When the shorter one ends."""
    pipe = pipeline(TASK, model=gpt2, **NEW)
    with pytest.raises(MismatchError, match=f"There are {which} for {name} than prompts") as raised:
        list(pipe(iter(tiny.PROMPTS), **{name: read(values)}))
    assert "secret" not in str(raised.value)


def test_nothing_to_answer(made):
    assert made.pipe([]) == made.pipe([], persona=tiny.HISTORY) == []


# ---- texts ------------------------------------------------------------------------------------------------------


def test_with_and_without_the_prompt(made):
    prompt, options = tiny.PROMPTS[0], {"persona": tiny.HISTORY, **NEW}
    answer = by_hand(made.model, prompt, tiny.HISTORY)[0]
    assert made.pipe(prompt, return_full_text=False, **options) == [{"generated_text": answer}]
    if made.causal:
        assert made.pipe(prompt, return_full_text=True, **options) == [{"generated_text": prompt + answer}]
    else:
        with pytest.raises(ConfigurationError, match=r"return_full_text=True is for causal backbones"):
            made.pipe(prompt, return_full_text=True, **options)


def test_by_default_there_is_room_for_an_answer(made, monkeypatch):
    got = {}
    monkeypatch.setattr(made.model, "generate", lambda **kwargs: got.update(kwargs) or torch.zeros(1, 3).long())
    made.pipe(tiny.PROMPTS[0])
    own = got.get("generation_config")  # transformers 5.19 gives the pipeline's default in one
    assert got.get("max_new_tokens", own and own.max_new_tokens) == 256


def test_an_answer_ends_where_it_is_told(made, monkeypatch):
    got = {}
    monkeypatch.setattr(made.model, "generate", lambda **kwargs: got.update(kwargs) or torch.zeros(1, 3).long())
    made.pipe(tiny.PROMPTS[0], stop_sequence="###")
    assert got["stop_strings"] == "###" and got["tokenizer"] is made.pipe.tokenizer


def test_long_prompts_can_be_cut():
    pipe = pipeline(TASK, model=tiny.model("gpt2"))
    cut = {"max_length": 2}
    answers = [
        pipe(p, persona=tiny.HISTORY, tokenizer_encode_kwargs=cut, **NEW)
        for p in ("the sea is cold", "the sun and cold")
    ]
    assert texts(answers[0], "the sea is cold") == texts(answers[1], "the sun and cold")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chats(family, chat):
    model = tiny.model(family, attention_temperature=0.2)
    model.tokenizer.chat_template = TEMPLATES["plain"].replace("bos_token", "'<bos>'")
    pipe, processor = pipeline(TASK, model=model), PPlugProcessor.from_model(model)
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    query = [message["content"] for message in chat if message["role"] == "user"][-1]
    ids = model.generate(**inputs, persona=tiny.HISTORY, query=query, **NEW)[:, inputs["input_ids"].shape[1] :]
    answer = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    expected = [{"generated_text": [*chat, {"role": "assistant", "content": answer}]}]
    assert pipe(chat, persona=tiny.HISTORY, **NEW) == expected
    both = pipe([chat, CHATS["one turn"]], persona=[tiny.HISTORY, None], batch_size=2, **NEW)
    assert both[0] == expected and both[1][0]["generated_text"][0] == CHATS["one turn"][0]
    assert pipe(chat, persona=tiny.HISTORY, return_full_text=False, **NEW) == [{"generated_text": answer.strip()}]
    assert pipe({"text": chat, "persona": tiny.HISTORY}, **NEW) == expected


def test_a_chat_begins_as_the_prompts_of_training_do():
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = TEMPLATES["plain"].replace("bos_token", "'<bos>'")
    model = tiny.from_backbone(tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=tokenizer, system="good night")
    pipe, chat = pipeline(TASK, model=model), [{"role": "user", "content": "the sea"}]
    (text,), (talk,) = (
        pipe(prompt, persona=tiny.HISTORY, return_full_text=False, **NEW) for prompt in ("the sea", chat)
    )
    assert talk == text
    row = pipe.preprocess(chat)["input_ids"]
    assert torch.equal(row, pipe.preprocess("the sea")["input_ids"])
    assert "good night" in tokenizer.decode(row[0])
    own = [{"role": "system", "content": "cold"}, *chat]
    assert "good" not in tokenizer.decode(pipe.preprocess(own)["input_ids"][0])
    assert pipe(chat, **NEW)[0]["generated_text"][0] == chat[0]  # the system text is not the user's


def test_an_answer_to_a_text_that_is_written_as_a_chat_is_not_glued_to_it():
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = TEMPLATES["plain"].replace("bos_token", "'<bos>'")
    torch.manual_seed(0)
    model = tiny.from_backbone(tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=tokenizer)
    pipe, chat = pipeline(TASK, model=model), [{"role": "user", "content": "the sea"}]
    (answer,) = pipe("the sea", persona=tiny.HISTORY, return_full_text=False, **NEW)
    assert pipe("the sea", persona=tiny.HISTORY, **NEW) == [answer]
    whole = pipe(chat, persona=tiny.HISTORY, **NEW)
    assert whole[0]["generated_text"][1]["content"].strip() == answer["generated_text"]
    assert pipe("the sea", persona=tiny.HISTORY, return_full_text=True, **NEW) == whole


@pytest.mark.parametrize(
    "choices",
    [{"placement": "prompt"}, {"system": "good night"}, {"chat": "never"}],
    ids=["placement", "system", "raw"],
)
def test_each_plug_is_asked_as_its_training_did(choices, tmp_path):
    tokenizer, backbone = tiny.tokenizer("llama"), tiny.backbone("llama")
    tokenizer.chat_template = TEMPLATES["plain"].replace("bos_token", "'<bos>'")
    made, options = [], {"persona": tiny.HISTORY, "return_full_text": False, **NEW}
    for seed, own in enumerate(({}, choices)):
        made.append(
            tiny.from_backbone(backbone, tiny.shared_encoder(), tokenizer=tokenizer, **{"placement": "answer", **own})
        )
        tiny.randomise(made[-1].plug, seed)
    made[1].save_pretrained(tmp_path)
    prompts = ["the sea and the moon", [{"role": "user", "content": "the sea"}]]
    first, second = (pipeline(TASK, model=model)(prompts, **options) for model in made)
    made[0].load_plug(tmp_path, "second", encoder=tiny.shared_encoder())
    pipe = pipeline(TASK, model=made[0])
    assert pipe(prompts, plug="second", **options) == second
    mixed = pipe([*prompts, *prompts], plug=["second"] * 2 + ["default"] * 2, batch_size=4, **options)
    assert mixed == [*second, *first]
    made[0].set_plug("second")
    assert pipe(prompts, **options) == second and pipe(prompts, plug="default", **options) == first


def test_each_plug_is_asked_in_its_own_template_and_up_to_its_own_end(tmp_path):
    backbone, made = tiny.backbone("llama"), []
    options = {"persona": tiny.HISTORY, "return_full_text": False, **NEW}
    for seed, template in enumerate((TEMPLATES["plain"], "{% for m in messages %}{{ m.content }} {% endfor %}")):
        words = tiny.tokenizer("llama")
        words.chat_template = template.replace("bos_token", "'<bos>'")
        torch.manual_seed(seed)  # of the weights that are drawn with the plug
        made.append(tiny.from_backbone(backbone, tiny.shared_encoder(), tokenizer=words))
        tiny.randomise(made[-1].plug, seed)
    prompts = ["the sea and the moon", [{"role": "user", "content": "the sea"}]]
    word = pipeline(TASK, model=made[1])(prompts[0], **options)[0]["generated_text"].split()[1]
    made[1].generation_config.eos_token_id = [tiny.EOS, tiny.VOCABULARY.index(word)]
    made[1].save_pretrained(tmp_path)
    first, second = (pipeline(TASK, model=model)(prompts, **options) for model in made)
    assert second[0][0]["generated_text"].endswith(word) and len(second[0][0]["generated_text"].split()) == 2
    made[0].load_plug(tmp_path, "second", encoder=tiny.shared_encoder())
    pipe = pipeline(TASK, model=made[0])
    assert pipe(prompts, plug="second", **options) == second and pipe(prompts, **options) == first
    mixed = ["second", "default", "default", "second"]
    assert pipe([prompts[i // 2] for i in range(4)], plug=mixed, batch_size=4, **options) == [
        *(second[0], first[0]),
        *(first[1], second[1]),
    ]
    whole = pipe(prompts[0], plug="second", eos_token_id=tiny.EOS, **options)  # the caller's choice
    assert len(whole[0]["generated_text"].split()) == 6
    made[0].set_plug("second")
    assert pipe(prompts, **options) == second and pipe(prompts, plug="default", **options) == first


def test_a_chat_that_ends_with_the_assistant_goes_on():
    model = tiny.model("llama")
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    begun = {"role": "assistant", "content": "the moon is"}
    chat = pipeline(TASK, model=model)([*CHATS["one turn"], begun], persona=tiny.HISTORY, **NEW)[0]["generated_text"]
    assert len(chat) == 2 and chat[1]["content"].startswith("the moon is") and chat[1] != begun


def test_a_chat_in_text_parts_is_answered_as_one_in_texts():
    model = tiny.model("llama")
    model.tokenizer.chat_template = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    pipe, texts = pipeline(TASK, model=model), [*CHATS["one turn"], {"role": "assistant", "content": "the moon is"}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in texts]
    for n in (1, 2):  # a new answer, and one that goes on
        (a,), (b,) = (pipe(chat[:n], persona=tiny.HISTORY, **NEW) for chat in (parts, texts))
        assert a["generated_text"][-1] == b["generated_text"][-1]
        assert a["generated_text"][: n - 1] == parts[: n - 1]


def test_a_streamer_gets_the_answer_piece_by_piece(made):
    streamer = TextIteratorStreamer(made.pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"persona": tiny.HISTORY, "streamer": streamer, **NEW}
    thread = threading.Thread(target=made.pipe, args=(tiny.PROMPTS[0],), kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).split() == by_hand(made.model, tiny.PROMPTS[0], tiny.HISTORY)[0].split()
    assert len(pieces) > 2


# ---- making one -------------------------------------------------------------------------------------------------


def test_from_a_folder_and_back_into_one(tmp_path):
    model = tiny.model("t5")
    pipe = pipeline(TASK, model=model)
    tiny.backbone("t5").save_pretrained(tmp_path / "backbone")
    parts = {"backbone": str(tmp_path / "backbone"), "encoder": tiny.shared_encoder()}
    pipe.save_pretrained(tmp_path / "plug")
    assert {file.suffix for file in (tmp_path / "plug").iterdir()} <= {".json", ".safetensors", ".jinja"}
    again = pipeline(TASK, model=str(tmp_path / "plug"), model_kwargs=parts, device="cpu")
    assert (
        type(again) is PersonalizedTextGenerationPipeline
        and again.model.backbone.config.name_or_path == parts["backbone"]
    )
    asked = {"persona": tiny.HISTORIES, **NEW}
    assert again(tiny.PROMPTS, **asked) == pipe(tiny.PROMPTS, **asked)


def test_a_tokenizer_or_a_processor_of_ones_own():
    model = tiny.model("gpt2")
    model.tokenizer = None
    with pytest.raises(ConfigurationError, match="No tokenizer was found"):
        pipeline(TASK, model=model)
    processor = PPlugProcessor(tiny.tokenizer("gpt2"))
    assert pipeline(TASK, model=model, processor=processor).tokenizer is processor.tokenizer
    other = tiny.tokenizer("gpt2")
    assert pipeline(TASK, model=model, tokenizer=other).tokenizer is other is model.tokenizer


def test_the_device(made):
    assert pipeline(TASK, model=made.model, device="cpu").device == torch.device("cpu")
    made.model.backbone.hf_device_map = {"": "cpu"}  # as accelerate leaves it
    try:
        assert pipeline(TASK, model=made.model).device == made.model.device
        made.model.hf_device_map = {"model": "meta", "lm_head": "cuda:1"}  # over several
        assert pipeline(TASK, model=made.model).device == torch.device("meta")
    finally:
        del made.model.backbone.hf_device_map
        vars(made.model).pop("hf_device_map", None)


# ---- what cannot work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, kwargs, error, message",
    [
        ("the sea", {"persona": [[SECRET], [SECRET]]}, MismatchError, "Got 2 for persona and 1 prompts"),
        (["the sea", "the moon"], {"persona": [[SECRET]]}, MismatchError, "Got 1 for persona and 2 prompts"),
        (["the sea", "the moon"], {"query": ["sea"]}, MismatchError, "Got 1 for query and 2 prompts"),
        (["the sea", "the moon"], {"persona": SECRET}, DataError, "must be one for all prompts or a list .* a str"),
        ("the sea", {"persona": [SECRET, 3]}, DataError, "History item 1 is an int"),
        ("the sea", {"persona": Persona(torch.zeros(1, 12), EncoderSpec("x", 12))}, MismatchError, "was encoded by"),
        (3, {}, DataError, "A prompt is a text, a chat, or .*; got an int"),
        ([3], {}, DataError, r"text\[0\] is an int, not a text"),
        ([{"prompt": SECRET}], {}, DataError, r"needs a 'text', got \['prompt'\]"),
        ("the sea", {"persona": [SECRET], "query": " "}, DataError, "query of row 0 is empty"),
        ([[{"role": "system", "content": SECRET}]], {}, DataError, "none of the 1 messages is a user's"),
        ("the sea", {"prompt_lookup_num_tokens": 3}, ConfigurationError, "does not work with a persona"),
    ],
)
def test_bad_input(gpt2, prompts, kwargs, error, message):
    processor = PPlugProcessor(tiny.tokenizer("gpt2"))
    processor.tokenizer.chat_template = TEMPLATES["plain"]
    with pytest.raises(error, match=message) as raised:
        pipeline(TASK, model=gpt2, processor=processor)(prompts, **kwargs)
    assert "secret" not in str(raised.value)


def test_an_assistant_model_is_refused(gpt2):
    with pytest.raises(ConfigurationError, match="An assistant_model would draft without the persona"):
        pipeline(TASK, model=gpt2, assistant_model=tiny.backbone("gpt2"))


def test_a_model_without_a_plug_is_refused():
    with pytest.raises(ConfigurationError, match="needs a plug, got a GPT2LMHeadModel"):
        pipeline(TASK, model=tiny.backbone("gpt2"), tokenizer=tiny.tokenizer("gpt2"))
