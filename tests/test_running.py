"""A request on its way: what of its text is certain, and what that costs."""

from types import SimpleNamespace

import pytest
import tiny
from hypothesis import assume, given
from hypothesis import strategies as st

from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.running import Running, _certain


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_what_may_become_a_stop_text_is_not_certain(text, stops):
    assume(not any(stop in text for stop in stops))
    begun = [n for n in range(len(text)) if any(stop.startswith(text[n:]) for stop in stops)]
    half_a_character = "\ufffd"
    assert _certain(text + half_a_character, stops) == text[: min(begun, default=len(text))]


def test_a_long_stop_text_is_compared_only_where_it_may_begin():
    compared = []

    class Stop(str):
        def startswith(self, *arguments):
            compared.append(arguments)
            return super().startswith(*arguments)

    text = "the sea is cold " * 1000
    assert _certain(text + "b", [Stop("b" * 20_000)] * 16) == text
    assert len(compared) == 16


def running(tokenizer, limit=10_000, stop=("nothing like it",)):
    """A stream, and the number of tokens of each call of its tokenizer."""
    read = []

    def decode(tokens):
        read.append(len(tokens))
        return tokenizer.decode(tokens, skip_special_tokens=True)

    request = Request("sea", sampling=Sampling(limit, stop=stop))
    return Running(request, SimpleNamespace(decode=decode, ends=()), [1], 0, None, 0, limit, 60, streams=True), read


def pieces(row):
    return [row.pieces.get_nowait().text for _ in range(row.pieces.qsize())]


TEXT = "the sea 😀 is cold, don't you see? ö 海は青い \n\n  and the moon . �"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@given(data=st.data())
def test_the_text_so_far_is_that_of_all_tokens(family, data):
    tokenizer = tiny.tokenizer(family)
    some = [*tokenizer(TEXT)["input_ids"], *range(len(tokenizer))][: len(tokenizer) + 50]
    tokens = data.draw(st.lists(st.sampled_from(some), min_size=100, max_size=150))
    row, _ = running(tokenizer)
    for n, token in enumerate(tokens, 1):
        row.tokens.append(token)
        assert row._text() == tokenizer.decode(tokens[:n], skip_special_tokens=True)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_long_answer_is_not_decoded_again_with_each_token(family):
    tokenizer = tiny.tokenizer(family)
    tokens = (tokenizer(TEXT, add_special_tokens=False)["input_ids"] * 100)[:1000]
    row, read = running(tokenizer, len(tokens))
    for token in tokens:
        row.take(token)
    assert "".join(pieces(row)) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert sum(read) < 100 * len(tokens)


def test_a_stop_text_is_found_wherever_it_stands():
    tokenizer = tiny.tokenizer("gpt2")
    for n in range(60, 100):
        row, _ = running(tokenizer, stop=("cold moon",))
        for token in tokenizer("the sea " * n + "is cold moon and more")["input_ids"]:
            if not row.ended:
                row.take(token)
        assert row.ended and "".join(pieces(row)).endswith("the sea is ")
