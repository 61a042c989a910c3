"""Texts to model inputs."""

import logging

import pytest
import reference
import tiny
import torch
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

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


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_that_are_cut_are_counted_and_said_once(family, chat, caplog, monkeypatch):
    logging.Logger.warning_once.cache_clear()
    for name in ("transformers", "pplug_hf"):
        monkeypatch.setattr(transformers_logging.get_logger(name), "propagate", True)
    made = processor(family, TEMPLATES["plain"] if chat else None)
    made.chat = chat
    answers = ["the sea is cold and dark", "the sea", "sea"]
    whole = max(map(len, made.answer_ids(answers[1:])))
    options = {"max_length": 30, "max_target_length": whole}
    batch = made(tiny.PROMPTS, labels=answers, **options)
    assert [row[row != -100][-1].item() for row in batch["labels"]] == [tiny.EOS] * 3
    assert (batch["labels"] != -100).sum(1).max() == whole
    made(tiny.PROMPTS, labels=answers, **options)
    said = [r.getMessage() for r in caplog.records if "answer" in r.getMessage()]
    assert said == [
        f"An answer is longer than max_target_length={whole} tokens and is learned as if it ended there: raise "
        "max_target_length, or shorten the answers."
    ]
    notes = made.length_notes(tiny.PROMPTS, 30, answers, whole)
    assert notes == [
        f"1 of 3 answers have more than max_target_length={whole} tokens and are learned as if they ended there."
    ]
    assert len(made.length_notes(tiny.PROMPTS, 3 + 4 * chat, answers, whole)) == 2
    assert not made.length_notes(tiny.PROMPTS, 30, answers, max(map(len, made.answer_ids(answers))))
    assert not made.length_notes(tiny.PROMPTS, 30)


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
        ({"text": ["a", 3]}, DataError, r"text\[1\] is an int, not a text"),
        ({"text": "a", "labels": [None]}, DataError, r"labels\[0\] is a NoneType"),
        ({"text": "a", "persona": "my secret diary"}, DataError, r"pass \[text\]"),
        ({"text": "a", "return_tensors": "np"}, ConfigurationError, "is return_tensors='pt'.*got 'np'"),
        ({"text": "a", "padding": "max_length"}, ConfigurationError, "padded to its longest .* padding='max_length'"),
        ({"text": "a", "max_length": 0}, ConfigurationError, "max_length must be at least 1, got 0"),
        ({"text": "a", "max_target_length": 0}, ConfigurationError, "max_target_length must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        processor()(**arguments)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_standard_arguments_are_those_of_chats(family):
    made = processor(family)
    made.tokenizer.model_max_length = 3
    texts = ["the sea the moon cold", "a dog"]
    expected = made(texts, max_length=3)
    for options in (
        {"truncation": True},
        {"truncation": True, "max_length": 3},
        {"truncation": False, "max_length": 3},
    ):
        for padding in (True, "longest"):
            batch = made(text=texts, padding=padding, return_tensors="pt", **options)
            assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask"))
    whole = made(texts, truncation=False)["input_ids"]
    assert whole.shape[1] > 3 and torch.equal(whole, made(texts)["input_ids"])


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


# ---- chats to train on ----------------------------------------------------------------------------------------------

WRITES_BOS = TEMPLATES["plain"].replace("bos_token", "'<bos>'")
NO_END = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
THINKS = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot> dream {% endif %}"
)
TALK = [[USER, {"role": "assistant", "content": "the sea is cold"}], [USER, {"role": "assistant", "content": "moon"}]]


@pytest.mark.parametrize(
    "template", [WRITES_BOS, TEMPLATES["trims"], NO_END, THINKS], ids=["bos", "no bos", "no end", "thinks"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # one whose tokenizer writes BOS itself, and one that does not
def test_a_batch_to_train_on(family, template):
    made = processor(family, template)
    batch = made.apply_chat_template(TALK, persona=tiny.HISTORIES[:2], query=["sea", "moon"], labels=True)
    prompts = [made.apply_chat_template(chat[:-1], add_generation_prompt=True) for chat in TALK]
    for b, chat in enumerate(TALK):
        real = batch["attention_mask"][b].bool()
        row, labels = batch["input_ids"][b][real].tolist(), batch["labels"][b][real].tolist()
        prompt = prompts[b]["input_ids"][0].tolist()  # what a user will ask with
        assert row == prompt + ids(chat[-1]["content"]) + [tiny.EOS]
        assert labels == [-100] * len(prompt) + row[len(prompt) :]
        assert batch["persona_position"][b] == prompts[b]["persona_position"][0]
        assert row.count(tiny.BOS) == (template is WRITES_BOS)
        assert (batch["labels"][b][~real] == -100).all()
    assert batch["persona"] == tiny.HISTORIES[:2] and batch["query"] == ["sea", "moon"]
    answers = made.apply_chat_template([chat[:-1] for chat in TALK], labels=[chat[-1]["content"] for chat in TALK])
    assert all(torch.equal(answers[name], batch[name]) for name in ("input_ids", "labels", "persona_position"))


def test_an_encoder_decoder_model_trains_on_chats():
    batch = processor("t5", NO_END).apply_chat_template(TALK, labels=True)
    assert batch["labels"].tolist() == [ids("the sea is cold <eos>"), [*ids("moon <eos>"), -100, -100, -100]]
    assert batch["input_ids"].tolist() == [ids("<user> write about the sea <bot>")] * 2


def test_a_batch_of_chats_has_the_loss_of_its_sequences():
    model, made = tiny.model("llama"), processor("llama", WRITES_BOS)
    batch = made.apply_chat_template(TALK[:1], persona=tiny.HISTORY, query="sea", labels=True)
    row, at = batch["input_ids"][0].tolist(), batch["persona_position"].item()
    start = row.index(tiny.VOCABULARY.index("<bot>")) + 1
    soft = reference.soft_prompt(model, tiny.HISTORY, "sea")
    nll = 0.0
    for i in range(start, len(row)):
        logits = reference.next_logits(model, soft, row[:start], row[start:i], at)
        nll -= logits.log_softmax(-1)[row[i]].item()
    assert abs(model(**batch).loss.item() - nll / (len(row) - start)) < 1e-4


def test_template_variables_arrive():
    made = processor("llama", "{{ effort }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
    assert made.apply_chat_template([USER], effort="long")["input_ids"].tolist() == [ids("long write about the sea")]
    assert made.apply_chat_template([USER], effort="long", max_length=3)["input_ids"].shape == (1, 3)


PARTS = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {% if m.content is string %}{{ m.content }} "
    "{% else %}{% for c in m.content %}{{ c.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def test_contents_may_be_text_parts():
    made = processor("llama", PARTS)
    parts = [{"type": "text", "text": "write about"}, {"type": "text", "text": "the sea"}]
    batch = made.apply_chat_template([{"role": "system", "content": "cold"}, {"role": "user", "content": parts}])
    assert batch["input_ids"].tolist() == [ids("<system> cold <user> write about the sea")]
    assert batch["persona_position"].tolist() == [3]
    learnt = made.apply_chat_template([{"role": "user", "content": parts}], labels=["moon"])
    assert learnt["labels"].tolist() == [[-100] * 6 + ids("moon <eos>")]


@pytest.mark.parametrize(
    "chat, options, error, message",
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], {}, DataError, "a part of type 'image'"),
        ([{"role": "user", "content": 3}], {}, DataError, "a part of type 'int'"),
        ("the sea", {}, DataError, "A chat is a list of messages"),
        ([], {}, DataError, "a list that is empty"),
        ([USER], {"labels": True}, DataError, "must be the assistant's"),
        ([USER], {"labels": ["a", "b"]}, MismatchError, "Got 2 of labels for 1 chats"),
        ([USER], {"persona": [tiny.HISTORY] * 2}, MismatchError, "Got 2 of persona for 1 chats"),
        ([USER], {"labels": ["a"], "tokenize": False}, ConfigurationError, "leave out tokenize"),
        ([USER], {"return_tensors": "np"}, ConfigurationError, "return_tensors='pt'"),
        ([USER], {"return_assistant_tokens_mask": True}, ConfigurationError, "use labels=True"),
        ([USER], {"max_length": 0}, ConfigurationError, "max_length must be at least 1, got 0"),
        (TALK[0], {"labels": True, "max_length": 3}, DataError, "The chat template needs 4 tokens around"),
    ],
)
def test_chats_that_do_not_fit_are_refused(chat, options, error, message):
    with pytest.raises(error, match=message):
        processor("llama", TEMPLATES["plain"]).apply_chat_template(chat, **options)


def test_a_template_that_leaves_the_user_out_is_refused():
    with pytest.raises(DataError, match="does not write the last user's text"):
        processor("llama", "{{ messages[0].content }}").apply_chat_template(
            [*TALK[0][::-1], {"role": "user", "content": "moon"}]
        )


def test_half_an_emoji_is_repaired_everywhere(model):
    half, whole = "half \ud83d emoji", "half \ufffd emoji"
    made = PPlugProcessor.from_model(model)
    one, two = (made(text=t, query=t, labels=t) for t in (half, whole))
    assert torch.equal(one["input_ids"], two["input_ids"]) and one["query"] == [whole]
    assert torch.equal(one["labels"], two["labels"])
    assert torch.equal(model.soft_prompt([half], half), model.soft_prompt([whole], whole))
    joined = made(text="\ud83d\ude00")  # both halves are an emoji
    assert joined["input_ids"].tolist() == made(text="\U0001f600")["input_ids"].tolist()
    made.tokenizer.chat_template = NO_END
    chats = [[{"role": "user", "content": t}] for t in (half, whole)]
    one, two = (made.apply_chat_template(chat)["input_ids"] for chat in chats)
    assert torch.equal(one, two)


def test_what_is_decoded():
    made = processor("gpt2")
    ids = [[20, 21], [22, -100]]
    expected = made.decode_answers(torch.tensor(ids), 0)
    assert made.decode_answers(ids, 0) == made.decode_answers(ModelOutput(sequences=torch.tensor(ids)), 0) == expected
    for given, kind in (("x", "a str"), ([1, 2], "a list"), (torch.tensor([1]), "a Tensor")):
        with pytest.raises(DataError, match=rf"token ids \[B, L\].*got {kind}"):
            made.decode_answers(given, 0)
