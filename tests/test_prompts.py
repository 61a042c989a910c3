"""Prompts of retrieved items: cases worked out by hand, budgets, huge and odd texts, and where the persona stands.

The tokenizers of `tiny` make one token of every word between spaces, so tokens can be counted by eye.
"""

import functools
from dataclasses import fields, replace

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.methods.prompts import RetrievalPrompt, persona_positions, retrieval_prompt
from pplug_hf.processing import PPlugProcessor
from pplug_hf.tasks.task import TASKS, PromptFormat, Task, get_task

LAMP = [name for name in TASKS if "LongLaMP" not in name]  # test_long_tasks.py has the others
GPT2, T5 = tiny.tokenizer("gpt2"), tiny.tokenizer("t5")  # T5's adds <eos>
TEN = "a dark film about the sea in winter and snow"
ONE = {"title": "red moon", "text": TEN, "abstract": TEN, "description": TEN, "tag": "comedy", "score": "4"}
TWO = {"title": "rain", "text": "i like rain", "abstract": "i like rain", "description": "i like rain"}
TWO |= {"tag": "action", "score": "1"}


def prompt(name, items, max_length, asked="review: cold rain", tokenizer=GPT2):
    return retrieval_prompt(name, asked, items, tokenizer, max_length).text


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Byte-level BPE, as GPT-2 and most newer models have: a rare character is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(tiny.WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_two_movies_share_the_budget():
    # The input has 3 tokens, so 40 - 3 = 37 are left. Less 1 for the stop and 2 for ", and": 34, so 17 each.
    # The tag, the quotes and the words around them take 9: the tag for the movie: " " is "comedy". 8 are for the text.
    assert prompt("LaMP-2", [ONE, TWO], 40, "description: cold rain") == (
        'the tag for the movie: "a dark film about the sea in winter" is "comedy" , and '
        'the tag for the movie: "i like rain" is "action" . description: cold rain'
    )


def test_half_an_emoji_is_a_sign_of_its_own(bytes_tokenizer):
    broken, whole = ({**ONE, "tag": f"come{half}dy", "description": f"{half} {TEN}"} for half in ("\ud83d", "\ufffd"))
    expected = prompt("LaMP-2", [whole], 60, "description: \ufffd rain", bytes_tokenizer)
    assert "\ufffd" in expected
    assert prompt("LaMP-2", [broken], 60, "description: \ud83d rain", bytes_tokenizer) == expected


def test_what_an_item_leaves_passes_to_the_next():
    # As above, but the first has 3 words of its 8: the next may have 13, and 10 are all it has.
    assert prompt("LaMP-2", [TWO, ONE], 40, "description: cold rain") == (
        'the tag for the movie: "i like rain" is "action" , and '
        f'the tag for the movie: "{TEN}" is "comedy" . description: cold rain'
    )
    # 32 - 3 - 3 = 26, 13 each, 4 of them for the text; 1 is left, so the next has 5.
    assert prompt("LaMP-2", [TWO, ONE], 32, "description: cold rain") == (
        'the tag for the movie: "i like rain" is "action" , and '
        'the tag for the movie: "a dark film about the" is "comedy" . description: cold rain'
    )


def test_special_tokens_count_wherever_the_benchmark_counts_them():
    # With <eos> the input has 4: 40 - 4 - 3 = 33, 16 each; 10 around the text and 1 behind it leave 5.
    assert prompt("LaMP-2", [ONE, TWO], 40, "description: cold rain", T5) == (
        'the tag for the movie: "a dark film about the" is "comedy" , and '
        'the tag for the movie: "i like rain" is "action" . description: cold rain'
    )


def test_reviews():
    # 20 - 3 - 1 = 16; 4 is the score for " " takes 7, leaves 9.
    assert prompt("LaMP-3", [ONE], 20) == (
        '4 is the score for "a dark film about the sea in winter and" . review: cold rain'
    )


@pytest.mark.parametrize("name", ["LaMP-4", "LaMP-6"])
def test_headlines_and_subjects(name):
    # 20 - 3 - 1 = 16; "red moon" is the title for " " takes 8, leaves 8.
    assert prompt(name, [ONE], 20, "article: cold rain") == (
        '"red moon" is the title for "a dark film about the sea in winter" . article: cold rain'
    )


def test_papers():
    # 20 - 3 - 1 = 16, less 4 for Following the given patterns. The benchmark counts "red moon" is a title " ", 7,
    # where it writes 8: 5 are left, one more than fit.
    assert prompt("LaMP-5", [ONE], 20, "paper: cold rain") == (
        '"red moon" is a title for "a dark film about the" . Following the given patterns paper: cold rain'
    )


def test_tweets():
    # 20 - 3 - 1 = 16, less 8 for are written by user. Following the given patterns, 1 for the quotes: 7.
    assert prompt("LaMP-7", [ONE], 20, "tweet: cold rain") == (
        '"a dark film about the sea in"  are written by a person. Following the given patterns tweet: cold rain'
    )
    # 20 - 3 - 1 - 2 - 8 = 6: 3 each, 2 without the quotes.
    assert prompt("LaMP-7", [ONE, TWO], 20, "tweet: cold rain") == (
        '"a dark" , and "i like"  are written by a person. Following the given patterns tweet: cold rain'
    )


def test_citations():
    asked = 'with the title "cold rain", which reference?'  # 7 tokens
    items = [{"title": TEN, "abstract": "x"}, {"title": "i like rain", "abstract": "x"}]
    # 17 - 7 - 2 = 8, 4 each, of which quotes take 2; nothing is kept free for the ", and " in front.
    assert prompt("LaMP-1", items, 17, asked) == (
        'with the title, and "a dark", and "i like" "cold rain", which reference?'
    )
    assert prompt("LaMP-1", items[1:], 50, asked) == 'with the title, and "i like rain" "cold rain", which reference?'
    # The first title of the input, whatever word it is part of; without one there is no place for items.
    assert prompt("LaMP-1", items[1:], 50, "untitled title") == 'untitle, and "i like rain"d title'
    assert retrieval_prompt("LaMP-1", "which reference?", items, GPT2, 50) == RetrievalPrompt("which reference?", 0, 0)


def test_the_demo():
    # 20 - 3 - 1 = 16; the shelf for the book: " " is "comedy" takes 9, leaves 7.
    assert prompt("demo", [ONE], 20, "book: cold rain") == (
        'the shelf for the book: "a dark film about the sea in" is "comedy" . book: cold rain'
    )


def test_a_task_of_ones_own_needs_no_format():
    task = Task(
        name="mine",
        query_marker="ask:",
        query_field="body",
        answer_field="kind",
        item_template="{kind} - {body}",
        item_template_unlabelled="{body}",
        metric="rouge",
        max_new_tokens=9,
    )
    # 14 - 3 - 1 = 10; "short - " takes 3, leaves 7.
    items = [{"kind": "short", "body": TEN}]
    assert prompt(task, items, 14, "ask: cold rain") == '"short - a dark film about the sea in" . ask: cold rain'
    formatted = replace(task, prompt=PromptFormat(item="{body}/", cut="body", join="", join_tokens=0))
    assert prompt(formatted, items * 2, 14, "ask: a") == "a dark film about/a dark film about/. ask: a"


# ---- budgets ----------------------------------------------------------------------------------------------------


def test_a_long_input_keeps_at_most_sixty_percent():
    asked = " ".join(["review:", *["cold"] * 99])
    # 20 - 12 - 1 = 7, and 7 are around the text. The input is whole: the processor cuts its end.
    made = retrieval_prompt("LaMP-3", asked, [ONE], GPT2, 20)
    assert made.text == '4 is the score for "" . ' + asked
    (ids,) = PPlugProcessor(GPT2)(text=made.text, max_length=20)["input_ids"].tolist()
    assert len(ids) == 20 and ids[-1] == tiny.VOCABULARY.index("cold")
    # Of 30, 18 are the input's, 11 the item's: 4 for the text.
    assert prompt("LaMP-3", [ONE], 30, asked) == '4 is the score for "a dark film about" . ' + asked


def test_the_input_keeps_less_where_labels_would_not_fit():
    asked = " ".join(["article:", *["cold"] * 99])
    # "red moon" is the title for " " takes 8 and 1 for the stop: more than 20 - 12, but 20 - 10 leaves one word.
    assert prompt("LaMP-4", [ONE], 20, asked) == '"red moon" is the title for "a" . ' + asked
    # Of 10 tokens the input keeps 10 %: 10 - 1 - 1 - 8 = 0 words. Of 9 it keeps none.
    assert prompt("LaMP-4", [ONE], 10, asked) == '"red moon" is the title for "" . ' + asked
    assert prompt("LaMP-4", [ONE], 9, asked) == '"red moon" is the title for "" . ' + asked
    assert retrieval_prompt("LaMP-4", asked, [ONE], GPT2, 8) == RetrievalPrompt(asked, 0, 0)


def test_all_items_or_none():
    # The second label alone has 20 words.
    items = [ONE, TWO | {"title": TEN + " " + TEN, "text": "i like rain and snow"}]
    assert retrieval_prompt("LaMP-4", "article: cold", items, GPT2, 36).items == 0
    assert retrieval_prompt("LaMP-4", "article: cold", items[:1], GPT2, 36).items == 1
    # It takes 26, and the first leaves 3 of its (46 - 3) // 2 = 21, though the input gives up all it has.
    assert retrieval_prompt("LaMP-4", "article: cold", items, GPT2, 46).items == 0
    # A shorter one takes 10 of (46 - 2 - 3) // 2 = 20, and so the second has its label and four words.
    made = retrieval_prompt("LaMP-4", "article: cold", [TWO, items[1]], GPT2, 46)
    assert made.text == (
        f'"rain" is the title for "i like rain" , and "{TEN} {TEN}" is the title for "i like rain and" . article: cold'
    )


@pytest.mark.parametrize("name", LAMP)
@pytest.mark.parametrize("tokenizer", [GPT2, T5], ids=["gpt2", "t5"])
def test_an_empty_history_and_a_tiny_budget_leave_the_input(name, tokenizer):
    asked = f"title {TASKS[name].query_marker} cold rain"
    assert retrieval_prompt(name, asked, [], tokenizer, 256) == RetrievalPrompt(asked, 0, 0)
    assert retrieval_prompt(name, asked, [ONE], tokenizer, 1) == RetrievalPrompt(asked, 0, 0)
    assert retrieval_prompt(name, "", [], tokenizer, 1) == RetrievalPrompt("", 0, 0)
    assert retrieval_prompt(name, asked, [ONE], tokenizer, 256).items == 1


@pytest.mark.parametrize("max_length", [0, -5])
def test_a_budget_has_a_token(max_length):
    with pytest.raises(ConfigurationError, match=f"max_length is {max_length}"):
        retrieval_prompt("LaMP-2", "secret", [ONE], GPT2, max_length)


texts = st.lists(st.sampled_from(tiny.WORDS), max_size=20).map(" ".join)


@pytest.mark.parametrize("name", LAMP)
@settings(deadline=None, max_examples=60)
@given(histories=st.lists(st.tuples(texts, texts), max_size=6), asked=texts, max_length=st.integers(1, 200))
def test_what_every_prompt_keeps_to(name, histories, asked, max_length):
    task = get_task(name)
    asked = f"title {task.query_marker} {asked}"
    items = [ONE | {task.prompt_format.cut: text, task.answer_field or "x": label} for text, label in histories]
    made = retrieval_prompt(name, asked, items, GPT2, max_length)
    assert made.items in (0, len(items))
    head, rest = task.prompt_format.split(asked)
    assert made.text.startswith(head) and made.text.endswith(rest)
    assert made.items or made.text == asked
    assert made.text[made.items_end :] == (rest if made.items else asked)
    for _, label in histories if made.items and task.answer_field else ():
        assert label in made.text  # labels are never cut
    length, widest = len(asked.split()), max([14 + len(label.split()) for _, label in histories], default=0)
    if length + len(histories) * widest + 12 <= max_length:  # labels fit, so the input need not give anything up
        assert made.items == len(histories)
        if name not in ("LaMP-1", "LaMP-5"):  # which count one or two tokens less than they write
            assert len(made.text.split()) <= max(max_length, length + max_length * 4 // 10)
    # All shares are equal at first, and an item passes on what it leaves to later ones only.
    largest = max([20 + len(text.split()) + len(label.split()) for text, label in histories], default=0)
    if length + len(histories) * largest + 12 <= max_length:
        assert all(text in made.text for text, _ in histories)  # nothing is cut without need


# ---- huge and odd texts -----------------------------------------------------------------------------------------


class Spy:
    """A tokenizer that notes the longest text it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest, self.decode = tokenizer, 0, tokenizer.decode

    def __call__(self, text, **kwargs):
        self.longest = max(self.longest, len(text))
        return self.tokenizer(text, **kwargs)


TEN_MB = "sea " * 2_500_000


@pytest.mark.parametrize("name", LAMP)
def test_ten_megabytes_are_not_read(name):
    spy = Spy(GPT2)
    item = ONE | {TASKS[name].prompt_format.cut: TEN_MB}
    asked = f"title {TASKS[name].query_marker} cold"
    made = retrieval_prompt(name, asked, [item, TWO], spy, 100)
    assert spy.longest <= 3200 and made.items == 2 and len(made.text) < 1000
    assert made == retrieval_prompt(
        name, asked, [item | {TASKS[name].prompt_format.cut: TEN_MB[:4000]}, TWO], GPT2, 100
    )
    made = retrieval_prompt(name, asked + TEN_MB, [ONE], spy, 100)
    assert spy.longest <= 3200 and made.items == 1 and made.text.endswith(TEN_MB)


@pytest.mark.parametrize("title", [TEN_MB, "s" * 10_000_000])
def test_a_label_of_ten_megabytes_does_not_fit(title):
    spy = Spy(GPT2)
    made = retrieval_prompt("LaMP-4", "article: cold", [ONE | {"title": title}], spy, 100)
    assert made == RetrievalPrompt("article: cold", 0, 0) and spy.longest <= 3200


def test_texts_in_any_script(bytes_tokenizer):
    item = {"title": "海 {x} %s 🌊", "text": "das Meer süß\n🌊 {y}"}
    made = retrieval_prompt("LaMP-4", "article: 日本", [item], bytes_tokenizer, 500)
    assert made.text == '"海 {x} %s 🌊" is the title for "das Meer süß\n🌊 {y}" . article: 日本'
    # A vocabulary of words cannot say them: they are gone from what is cut, and stay elsewhere.
    assert prompt("LaMP-4", [item], 100, "article: 日本") == '"海 {x} %s 🌊" is the title for "" . article: 日本'


def test_a_character_is_never_cut_in_two(bytes_tokenizer):
    waves = {"title": "sea", "text": "🌊" * 20}
    lengths = set()
    for max_length in range(30, 90):
        text = retrieval_prompt("LaMP-4", "article: a", [waves], bytes_tokenizer, max_length).text
        assert "\ufffd" not in text
        lengths.add(text.count("🌊"))
    assert len(lengths) > 8
    kept = {"title": "sea", "text": "a \ufffd"}  # one that the user wrote
    assert '"a \ufffd"' in retrieval_prompt("LaMP-4", "article: a", [kept], bytes_tokenizer, 200).text


@pytest.mark.parametrize("name", LAMP)
def test_null_fields_are_empty_and_missing_ones_an_error(name):
    asked = f"title {TASKS[name].query_marker} cold"
    expected = prompt(name, [dict.fromkeys(ONE, "")], 100, asked)
    assert prompt(name, [dict.fromkeys(ONE)], 100, asked) == expected
    with pytest.raises(DataError, match="The item has no field"):
        prompt(name, [{}], 100, asked)


def test_zero_is_a_text():
    task = replace(TASKS["LaMP-3"], prompt=PromptFormat(item="{text} {score}", cut="score"))
    assert prompt(task, [{"text": "a", "score": 0}], 50, "b", tiny_numbers()) == "a 0. b"


def tiny_numbers():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "0": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


# ---- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item": "{title}", "cut": "text"}, r"item is '\{title\}'.*\{text\}"),
        ({"item": "{text} {text}", "cut": "text"}, "each once"),
        ({"item": "{text}", "cut": "text", "frame": "{items}. {input}"}, r"\{head\} and \{items\} and \{input\}"),
        ({"item": "{text}", "cut": "text", "frame": "{head}{items}{input}{input}"}, "each once"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        PromptFormat(**arguments)


def test_a_template_without_the_query_needs_a_format():
    task = replace(TASKS["demo"], prompt=None, item_template="{tag}")
    with pytest.raises(ConfigurationError, match="text"):
        retrieval_prompt(task, "book: a", [ONE], GPT2)


def test_every_field_has_its_help():
    assert all(field.metadata.get("help", "").endswith(".") for field in fields(PromptFormat))


def test_a_format_adds_its_fields_to_the_tasks():
    task = replace(TASKS["demo"], prompt=PromptFormat(item="{text} of {place}", cut="text"))
    assert task.fields == {"place", "tag", "text"}


# ---- the two orders of persona and retrieved items --------------------------------------------------------------

ASKED = "what is a good film"
ITEMS = [{"text": "i like rain and snow", "tag": "cold"}, {"text": "the sea", "tag": "blue"}]
PLAIN = PromptFormat(item="{tag} {text}", cut="text", join=" and ", frame="{head}{items} . {input}")
PLAIN = replace(TASKS["demo"], prompt=PLAIN)


def prompts_of(tokenizer):
    first = replace(PLAIN, prompt=replace(PLAIN.prompt, after="what is", frame="{head} {items}{input}"))
    return [
        retrieval_prompt(PLAIN, ASKED, ITEMS, tokenizer),
        retrieval_prompt(PLAIN, "write", [], tokenizer),
        retrieval_prompt(first, ASKED, ITEMS[:1], tokenizer),
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_paper_has_the_persona_right_behind_the_items(family):
    processor = PPlugProcessor(tiny.tokenizer(family), is_encoder_decoder=family in ("t5", "bart"))
    prompts = prompts_of(processor.tokenizer)
    batch = processor(text=[p.text for p in prompts])
    positions = persona_positions(processor, prompts)
    in_front = []
    for row, mask, position in zip(batch["input_ids"], batch["attention_mask"], positions, strict=True):
        in_front.append(" ".join(tiny.VOCABULARY[i] for i in row[mask.bool()][:position]))
    bos = "<bos> " if family in ("bart", "llama") else ""
    assert in_front == [
        f"{bos}cold i like rain and snow and blue the sea <unk>",  # the stop is no word here
        "<bos>" if family == "llama" else "",
        f"{bos}what is cold i like rain and snow",
    ]


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_where_nothing_is_retrieved_the_persona_stands_where_it_always_does(family):
    for placement in ("prompt", "answer"):
        processor = PPlugProcessor(tiny.tokenizer(family), placement=placement)
        prompts = [*prompts_of(processor.tokenizer)[:2], RetrievalPrompt("", 0, 0)]
        for max_length in (None, 6):
            batch = processor(text=[p.text for p in prompts], max_length=max_length)
            last = batch["attention_mask"].sum(dim=1)
            first = (batch["input_ids"] == tiny.BOS).sum(dim=1)
            usual = last if placement == "answer" else first
            assert persona_positions(processor, prompts, max_length)[1:].tolist() == usual[1:].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "family, placement", [*((f, "prompt") for f in tiny.FAMILIES), *((f, "answer") for f in tiny.CAUSAL)]
)
def test_both_orders_are_those_of_the_reference(family, placement):
    model = tiny.model(family, attention_temperature=0.2, placement=placement)
    processor = PPlugProcessor.from_model(model)
    prompts = prompts_of(processor.tokenizer)
    positions = persona_positions(processor, prompts)
    asked = {"persona": tiny.HISTORIES, "query": tiny.PROMPTS, "max_new_tokens": 6}
    batch = processor(text=[p.text for p in prompts])
    skip = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    paper = model.generate(**batch, **asked, persona_position=positions)[:, skip:]
    ours = model.generate(**batch, **asked)[:, skip:]
    for b, made in enumerate(prompts):
        soft = reference.soft_prompt(model, tiny.HISTORIES[b], tiny.PROMPTS[b])
        row = reference.row(model, made.text)
        usual = len(row) if placement == "answer" else None
        for generated, position in ((paper, positions[b].item()), (ours, usual)):
            logits = functools.partial(reference.next_logits, model, soft, row, position=position)
            expected = reference.greedy(logits, 6, tiny.EOS)
            got = generated[b, 1:] if model.config.is_encoder_decoder else generated[b]
            assert got[: len(expected)].tolist() == expected
    assert paper[1].tolist() == ours[1].tolist()  # nothing retrieved: nothing to stand behind


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_positions_in_a_prompt_that_is_cut(family):
    processor = PPlugProcessor(tiny.tokenizer(family), is_encoder_decoder=family == "bart")
    made = [retrieval_prompt(PLAIN, ASKED, ITEMS, processor.tokenizer)]
    assert persona_positions(processor, made).item() == 12  # BOS, 6 of an item, 1 between them, 3, the stop
    whole = processor(text=made[0].text)["input_ids"][0].tolist()
    for max_length in (len(whole), len(whole) - 3, 12, 4):
        kept = processor(text=made[0].text, max_length=max_length)["input_ids"][0].tolist()
        head = (max_length + 1) // 2 if max_length < len(whole) else len(whole)  # the middle is lost
        assert kept == whole[:head] + whole[len(whole) - max_length + head :]
        expected = 12 if head >= 12 else max(head, 12 - (len(whole) - max_length))
        assert persona_positions(processor, made, max_length).item() == expected


def test_a_token_across_the_border_is_the_inputs(bytes_tokenizer):
    made = RetrievalPrompt("a sea", 1, 2)
    assert bytes_tokenizer("a sea").tokens() == ["a", "Ġsea"]
    assert persona_positions(PPlugProcessor(bytes_tokenizer), [made]).item() == 1  # the space belongs to " sea"


def test_without_offsets_the_papers_order_is_refused():
    processor = PPlugProcessor(tiny.tokenizer("gpt2"))

    class Slow:
        is_fast = False

    processor.tokenizer = Slow()
    with pytest.raises(ConfigurationError, match="Slow does not say where its tokens are"):
        persona_positions(processor, [RetrievalPrompt("a", 0, 0)])
