"""A request on its way: what of its text is certain, and what that costs."""

from hypothesis import assume, given
from hypothesis import strategies as st

from pplug_hf.serving.running import _certain


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
