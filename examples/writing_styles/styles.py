"""Synthetic users who write headlines, each in a style of their own, and functions that say which style a headline has.

A style has three parts, and every combination of them is one: the form (a statement, a question, the number first, or a
few words), the case (as in a sentence, Title Case, or all lower case) and the end (nothing, an emoji, or exclamation marks).
The notes say nothing about the style; only the headlines of a user's history show it. Held-out users write about other
topics and places than those of training, and half of them in combinations that no training user has. The texts were
written for this example.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from pplug_hf import Example, Metric

FORMS = ("statement", "question", "number first", "terse")
CASES = ("sentence", "title", "lower")
ENDS = ("plain", "emoji", "exclamation")


class Style(NamedTuple):
    """A combination of form, case and end."""

    form: str
    case: str
    end: str

    def __str__(self) -> str:
        return ", ".join(self)


class Topic(NamedTuple):
    """Somebody who does something with a number of things."""

    actor: str
    base: str
    third: str
    past: str
    things: str
    emoji: str


class Event(NamedTuple):
    """Something to write a headline about."""

    topic: Topic
    place: str
    number: int
    day: str

    @property
    def note(self) -> str:
        """The text from which a headline is written."""
        actor, _, _, past, things, _ = self.topic
        return f"On {self.day} the {actor} in {self.place} {past} {self.number} {things}."

    def headline(self, style: Style) -> str:
        """Return the headline of a user who writes in a style."""
        actor, base, third, _, things, emoji = self.topic
        text = {
            "statement": f"{self.place} {actor} {third} {self.number} {things}",
            "question": f"Why did the {self.place} {actor} {base} {self.number} {things}?",
            "number first": f"{self.number} {things} from the {self.place} {actor}",
            "terse": f"{things.capitalize()} in {self.place}",
        }[style.form]
        text = {"sentence": text, "title": text.title(), "lower": text.lower()}[style.case]
        return text + {"plain": "", "emoji": f" {emoji}", "exclamation": "!!!"}[style.end]


def _topics(*lines: str) -> tuple[Topic, ...]:
    return tuple(Topic(*line.split("/")) for line in lines)


TOPICS = _topics(
    "bakery/bake/bakes/baked/small cakes/🎂",
    "library/buy/buys/bought/old books/📚",
    "choir/sing/sings/sang/new songs/🎵",
    "school/plant/plants/planted/tall trees/🌳",
    "farm/sell/sells/sold/red apples/🍎",
    "club/win/wins/won/silver cups/🏆",
    "cinema/show/shows/showed/short films/🎬",
    "market/weigh/weighs/weighed/fresh fish/🐟",
    "garden/grow/grows/grew/white roses/🌹",
    "museum/lose/loses/lost/broken clocks/⏰",
    "hotel/clean/cleans/cleaned/large rooms/🏨",
    "shop/repair/repairs/repaired/used bikes/🚲",
    "hospital/order/orders/ordered/warm beds/🏥",
    "theatre/wear/wears/wore/black hats/🎩",
    "port/count/counts/counted/little boats/⛵",
    "college/teach/teaches/taught/young doctors/🎓",
    "station/paint/paints/painted/green trains/🚂",
    "café/serve/serves/served/hot drinks/☕",
    "gallery/hang/hangs/hung/blue pictures/🎨",
    "office/open/opens/opened/long letters/📦",
)
NEW_TOPICS = _topics(
    "zoo/feed/feeds/fed/hungry lions/🦁",
    "factory/build/builds/built/smart robots/🤖",
    "church/light/lights/lit/bright candles/🔥",
    "restaurant/cook/cooks/cooked/brown eggs/🥚",
    "studio/draw/draws/drew/funny cats/🐱",
    "university/find/finds/found/distant stars/⭐",
    "circus/train/trains/trained/clever horses/🐴",
    "palace/give/gives/gave/gold rings/💍",
)
PLACES = (
    *("London", "Boston", "Dublin", "Oslo", "Vienna", "Madrid", "Chicago", "Sydney", "Toronto", "Berlin"),
    *("Lisbon", "Athens", "Cairo", "Denver", "Dallas", "Geneva", "Prague", "Rome", "Milan", "Seattle"),
)
NEW_PLACES = ("Paris", "Tokyo", "Moscow", "Delhi", "Houston", "Miami", "Warsaw", "Atlanta")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STYLES = [Style(*parts) for parts in product(FORMS, CASES, ENDS)]
# Every two parts of a new style occur together in training, and never all three.
_NEW = [s for s in STYLES if (FORMS.index(s.form) + CASES.index(s.case) + ENDS.index(s.end)) % 3 == 0]
NEW_STYLES = {"train": [], "validation": [_NEW[i] for i in (4, 8, 9)], "test": [_NEW[i] for i in (2, 3, 7)]}
_KNOWN = [s for s in STYLES if s not in NEW_STYLES["validation"] + NEW_STYLES["test"]]


class Split(NamedTuple):
    """The users of a split write in these styles, about these topics and places."""

    styles: list[Style]
    topics: tuple[Topic, ...]
    places: tuple[str, ...]


SPLITS = {
    "train": Split(_KNOWN, TOPICS, PLACES),
    "validation": Split(_KNOWN[4::5] + 2 * NEW_STYLES["validation"], NEW_TOPICS, NEW_PLACES),
    "test": Split(_KNOWN[3::5] + 2 * NEW_STYLES["test"], NEW_TOPICS, NEW_PLACES),
}


def make_examples(split: str, users_per_style: int, questions: int, seed: int = 0) -> list[Example]:
    """Return the questions of synthetic users; each user has one style and 3 to 10 earlier headlines.

    In training every tenth user or so has none, so that the plug also learns what to do for somebody unknown.

    Args:
        split: "train", "validation" or "test"; the styles of half of the users of the latter two are new.
        users_per_style: number of users for each entry of the split's styles.
        questions: of each user; all users are asked about the same 300 notes.
        seed: of all draws.
    """
    styles, topics, places = SPLITS[split]
    fewest = 0 if split == "train" else 3
    rng = random.Random(f"{split}/{seed}")
    asked = [_event(rng, topics, places) for _ in range(300)]
    examples = []
    for number, style in enumerate(styles * users_per_style):
        user, own = f"{split}-{number}", rng.sample(asked, questions)
        answered = {(event.topic, event.place) for event in own}  # a history must not hold the answer
        history = []
        for _ in range(rng.choice([fewest, *range(3, 11)])):
            event = _event(rng, topics, places)
            while (event.topic, event.place) in answered:
                event = _event(rng, topics, places)
            history.append(_item(event, style))
        for place, event in enumerate(own):
            item = _item(event, style)
            examples.append(Example(f"{user}/{place}", user, item["note"], item["note"], item["headline"], history))
    return examples


def is_new(example: Example) -> bool:
    """Return whether no user of the training data writes in this style."""
    return style_of(str(example.target)) not in SPLITS["train"].styles


def _event(rng: random.Random, topics: Sequence[Topic], places: Sequence[str]) -> Event:
    return Event(rng.choice(topics), rng.choice(places), rng.randint(12, 99), rng.choice(DAYS))


def _item(event: Event, style: Style) -> dict[str, str]:
    return {"note": event.note, "headline": event.headline(style)}


# ---- judging ----------------------------------------------------------------------------------------------------

_EMOJI = "\u2300-\u27bf\u2b00-\u2bff\U0001f300-\U0001faff"
_END_OF_EMOJI = re.compile(f"[{_EMOJI}][\ufe0f\u200d{_EMOJI}]*$")


def style_of(headline: str) -> Style:
    """Return the style of any text; its form is "other" if it is not a headline, and its case may be "capitals"."""
    text = headline.strip()
    end = "emoji" if _END_OF_EMOJI.search(text) else "exclamation" if text.endswith("!") else "plain"
    text = _END_OF_EMOJI.sub("", text).rstrip("! ")
    return Style(_form(text), _case(text), end)


def _form(text: str) -> str:
    words = text.split()
    if not words or len(words) > 14 or "\n" in text:
        return "other"
    if text.endswith("?"):
        return "question"
    if text[0].isdigit():
        return "number first"
    return "terse" if len(words) < 6 and not any(c.isdigit() for c in text) else "statement"


def _case(text: str) -> str:
    if text.isupper():
        return "capitals"
    if text.islower():
        return "lower"
    long = [word for word in re.findall(r"[^\W\d]+", text)[1:] if len(word) > 3]
    return "title" if long and all(word[0].isupper() for word in long) else "sentence"


class WritingStyle(Metric):
    """Share of answers in the style of the true one: in all of it, and in each of its parts."""

    name, main = "writing-style", "style"
    titles = (("style", "whole style", ""), ("form", "form", ""), ("case", "case", ""), ("end", "end", ""))

    def per_example(self, predictions: Sequence[str], golds: Sequence[str], task: Any, **options: Any) -> np.ndarray:
        return self._right(predictions, golds).all(axis=1).astype(np.float64)

    def score(self, predictions: Sequence[str], golds: Sequence[str], task: Any, **options: Any) -> dict[str, float]:
        parts = self._right(predictions, golds).mean(axis=0).tolist()
        return super().score(predictions, golds, task) | dict(zip(Style._fields, parts, strict=True))

    @staticmethod
    def _right(predictions: Sequence[str], golds: Sequence[str]) -> np.ndarray:
        """[n, 3]"""
        pairs = zip(map(style_of, predictions), map(style_of, golds), strict=True)
        return np.array([[a == b for a, b in zip(given, right, strict=True)] for given, right in pairs])
