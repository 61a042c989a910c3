"""Texts to model inputs."""

import pytest
import reference
import tiny
import torch

from pplug_hf import PPlugProcessor
from pplug_hf.errors import ConfigurationError, DataError, MismatchError

TEMPLATES = {
    "plain": (
        "{{ bos_token }} {% for m in messages %}"
        "{{ '<system>' if m.role == 'system' else '<user>' if m.role == 'user' else '<bot>' }} {{ m.content }} <eos> "
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    ),
    "trims": (
        "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content | trim }} <eos> "
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    ),
    "last user only": (
        "{% for m in messages %}{% if loop.last or m.role == 'system' %}<{{ m.role }}> {{ m.content }} "
        "{% endif %}{% endfor %}"
    ),
}
USER = {"role": "user", "content": "write about the sea"}
CHATS = {
    "one turn": [USER],
    "with a system": [{"role": "system", "content": "i like rain"}, USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": "the sea is cold"},
        {"role": "user", "content": "write about the moon"},
    ],
    "the user repeats": [USER, {"role": "assistant", "content": "write about the sea"}, USER],
    "spaces": [{"role": "user", "content": "  write about the sea  "}],
}


def processor(family="gpt2", template=None):
    tokenizer = tiny.tokenizer(family)
    tokenizer.chat_template = template
    return PPlugProcessor(tokenizer, is_encoder_decoder=family in ("t5", "bart"))


def ids(text):
    return [tiny.VOCABULARY.index(word) for word in text.split()]


# ---- prompts and answers ----------------------------------------------------------------------------------------


def test_one_prompt():
    batch = processor()("the sea", persona=tiny.HISTORY, query="sea")
    assert batch["input_ids"].tolist() == [ids("the sea")] and batch["attention_mask"].tolist() == [[1, 1]]
    assert batch["persona"] == [tiny.HISTORY] and batch["query"] == ["sea"]
    assert set(processor()("the sea")) == {"input_ids", "attention_mask"}


def test_causal_prompts_and_answers_are_one_sequence_padded_left():
    batch = processor("llama")(["write a story", "the"], labels=["the sea", "moon"])
    assert batch["input_ids"].tolist() == [
        ids("<bos> write a story the sea <eos>"),
        ids("<pad> <pad> <pad> <bos> the moon <eos>"),
    ]
    assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 3 + [1] * 4]
    assert batch["labels"].tolist() == [[-100] * 4 + ids("the sea <eos>"), [-100] * 5 + ids("moon <eos>")]


def test_seq2seq_prompts_and_answers_are_two_sequences_padded_right():
    batch = processor("t5")(["write a story", "the"], labels=["the sea", "moon"])
    assert batch["input_ids"].tolist() == [ids("write a story <eos>"), ids("the <eos> <pad> <pad>")]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [ids("the sea <eos>"), [*ids("moon <eos>"), -100]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cuts(family):
    batch = processor(family)(
        ["write a story about the sea"], labels=["the sea is cold"], max_length=3, max_target_length=2
    )
    seq2seq = family in ("t5", "bart")
    assert batch["input_ids"].shape[1] == (3 if seq2seq else 5)
    assert (batch["labels"] != -100).sum() == 2
    assert batch["labels"][0, -1] == tiny.EOS  # what teaches the model to stop is never cut


def test_personas_stay_what_they_are(model):
    made = model.encode_persona(tiny.HISTORY)
    batch = processor()(["a", "the"], persona=[made, None])
    assert batch["persona"][0] is made and batch["persona"][1] is None
    assert processor()("a", persona=made)["persona"] == [made]
    assert processor()("a", persona=[])["persona"] == [[]]
    items = [{"tag": "dark", "text": "sea"}]
    assert processor()("a", persona=items)["persona"] == [items]


def test_the_batch_is_what_the_model_takes(model):
    made = PPlugProcessor.from_model(model)
    asked = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS}
    assert model(**made(tiny.PROMPTS, **asked, labels=tiny.ANSWERS)).loss.isfinite()
    batch = made(tiny.PROMPTS, **asked)
    generated = model.generate(**batch, max_new_tokens=4)
    answers = made.decode_answers(generated, prompt_length=batch["input_ids"].shape[1])
    for answer, prompt in zip(answers, tiny.PROMPTS, strict=True):
        assert set(answer.split()) <= {*tiny.WORDS, "<user>", "<bot>", "<system>"} and not answer.startswith(prompt)


def test_decoding_answers():
    generated = torch.tensor([[*ids("the sea the moon <eos>"), -100], ids("<pad> a dog <eos> <pad> <pad>")])
    assert processor("gpt2").decode_answers(generated, prompt_length=2) == ["the moon", "dog"]
    assert processor("t5").decode_answers(generated) == ["the sea the moon", "a dog"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"text": ["a", "the"], "persona": tiny.HISTORY}, MismatchError, "Got 1 of persona for 2 prompts"),
        ({"text": ["a", "the"], "persona": [tiny.HISTORY] * 3}, MismatchError, "Got 3 of persona for 2 prompts"),
        ({"text": "a", "query": ["a", "b"]}, MismatchError, "Got 2 of query for 1 prompts"),
        ({"text": "a", "labels": []}, DataError, "labels is empty"),
        ({"text": []}, DataError, "text is empty"),
        ({"text": ["a", 3]}, DataError, r"text\[1\] is a int, not a text"),
        ({"text": "a", "labels": [None]}, DataError, r"labels\[0\] is a NoneType"),
        ({"text": "a", "persona": "my secret diary"}, DataError, r"pass \[text\]"),
        ({"text": "a", "return_tensors": "np"}, ConfigurationError, "must be 'pt', got 'np'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        processor()(**arguments)
    assert "secret" not in str(raised.value)


def test_a_vocabulary_without_pad_token():
    made = processor()
    made.tokenizer.pad_token = None
    with pytest.raises(ConfigurationError, match="no pad token: set one"):
        made(["a", "the sea"])
    assert made(["the moon", "the sea"])["input_ids"].shape == (2, 2)  # nothing to pad
    made.tokenizer.pad_token = made.tokenizer.eos_token
    assert made(["a", "the sea"])["input_ids"].tolist() == [ids("<eos> a"), ids("the sea")]


def test_from_model_takes_a_tokenizer():
    model = tiny.model("gpt2")
    model.tokenizer = None
    with pytest.raises(ConfigurationError, match="No tokenizer was found beside the backbone"):
        PPlugProcessor.from_model(model)
    tokenizer = tiny.tokenizer("gpt2")
    assert PPlugProcessor.from_model(model, tokenizer=tokenizer).tokenizer is tokenizer is model.tokenizer


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saving_and_loading(family, tmp_path):
    made = processor(family, TEMPLATES["plain"])
    made.save_pretrained(tmp_path)
    loaded = PPlugProcessor.from_pretrained(tmp_path)
    assert loaded.is_encoder_decoder == made.is_encoder_decoder
    one, two = (p(tiny.PROMPTS, labels=tiny.ANSWERS) for p in (made, loaded))
    assert all(torch.equal(one[name], two[name]) for name in ("input_ids", "attention_mask", "labels"))
    one, two = (p.apply_chat_template(CHATS["several turns"], add_generation_prompt=True) for p in (made, loaded))
    assert one["persona_position"].tolist() == two["persona_position"].tolist()


# ---- chats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_persona_stands_right_in_front_of_the_last_users_text(family, template, chat):
    made = processor(family, template.replace("bos_token", "'<bos>'"))
    batch = made.apply_chat_template(chat, add_generation_prompt=True)
    text = made.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    row, position = batch["input_ids"][0].tolist(), batch["persona_position"].item()
    assert row == ids(text)  # the template wrote BOS, the tokenizer added no second one
    said = ids(next(m["content"] for m in reversed(chat) if m["role"] == "user"))
    starts = [i for i in range(len(row)) if row[i : i + len(said)] == said]
    assert position == starts[-1]
    assert row[position - 1] == tiny.VOCABULARY.index("<user>")


def test_chats_of_different_lengths():
    made = processor("llama", TEMPLATES["plain"])
    chats = list(CHATS.values())
    batch = made.apply_chat_template(chats, add_generation_prompt=True)
    for b, chat in enumerate(chats):
        alone = made.apply_chat_template(chat, add_generation_prompt=True)
        real = batch["attention_mask"][b].bool()
        assert batch["input_ids"][b][real].tolist() == alone["input_ids"][0].tolist()
        assert batch["persona_position"][b] == alone["persona_position"][0]
        assert real.tolist() == sorted(real.tolist())  # padded left


@torch.no_grad()
def test_a_chat_generates_with_the_persona_in_its_place():
    model = tiny.model("llama")
    made = processor("llama", TEMPLATES["plain"])
    chats, queries = [CHATS["several turns"], CHATS["one turn"]], ["the moon", "the sea"]
    batch = made.apply_chat_template(chats, add_generation_prompt=True)
    generated = model.generate(**batch, persona=tiny.HISTORIES[:2], query=queries, max_new_tokens=6)
    for b, (chat, query) in enumerate(zip(chats, queries, strict=True)):
        alone = made.apply_chat_template(chat, add_generation_prompt=True)
        row, position = alone["input_ids"][0].tolist(), alone["persona_position"].item()
        soft = reference.soft_prompt(model, tiny.HISTORIES[b], query)
        step = lambda so_far, s=soft, r=row, p=position: reference.next_logits(model, s, r, so_far, p)  # noqa: E731
        expected = reference.greedy(step, 6, tiny.EOS)
        assert generated[b, batch["input_ids"].shape[1] :][: len(expected)].tolist() == expected


def test_a_chat_without_a_user_is_refused():
    made = processor("llama", TEMPLATES["plain"])
    with pytest.raises(DataError, match="none of the 1 messages is a user's") as error:
        made.apply_chat_template([{"role": "system", "content": "my secret diary"}])
    assert "secret" not in str(error.value)


def test_other_forms_are_those_of_the_tokenizer():
    made = processor("llama", TEMPLATES["plain"])
    for options in ({"tokenize": False}, {"return_dict": False}):
        expected = made.tokenizer.apply_chat_template(CHATS["one turn"], **options)
        assert made.apply_chat_template(CHATS["one turn"], **options) == expected
