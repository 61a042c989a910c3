"""Metrics of texts that LaMP does not have.

rouge-unicode  ROUGE-1 and ROUGE-L over the words of any script. Scripts without spaces between words (Chinese,
               Japanese, Thai, Lao, Khmer, Burmese) are compared by characters. Not comparable with "rouge".
meteor         METEOR, ROUGE-1 and ROUGE-L, as LongLaMP reports them. METEOR here matches equal words and equal stems
               (Porter). It downloads nothing, so it lacks what nltk's version does with downloaded data: synonyms of
               WordNet, and Punkt's sentence splitter, which keeps the period of an abbreviation. It is therefore
               somewhat lower than nltk's where answers use synonyms.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Unpack

import numpy as np

from ..optional import require
from .lamp_metrics import Rouge
from .metrics import METRICS as METRICS
from .metrics import Judged, Metric, Options, Texts, register_metric

_BY_CHARACTER = "".join(
    rf"\p{{scx={script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_TOKEN = rf"[{_BY_CHARACTER}&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_BY_CHARACTER}]]+"
_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5  # METEOR's usual settings


class UnicodeTokenizer:
    """Words of any script, as rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, compared without case and compatibility forms."""
        return _word_finder()(unicodedata.normalize("NFKC", text).casefold())


@cache
def _word_finder() -> Callable[[str], list[str]]:
    regex = require("regex", "eval", "The metric rouge-unicode")
    return regex.compile(_TOKEN, regex.V1).findall


class UnicodeRouge(Rouge):
    """ROUGE-1 and ROUGE-L over the words of any script."""

    name, main = "rouge-unicode", "rouge-1-unicode"
    titles = (("rouge-1-unicode", "ROUGE-1 (Unicode)", ""), ("rouge-L-unicode", "ROUGE-L (Unicode)", ""))
    tokenizer = UnicodeTokenizer()

    def check(self) -> None:
        super().check()
        _word_finder()

    def is_readable(self, text: str) -> bool:
        return bool(UnicodeTokenizer().tokenize(text))


class Meteor(Metric):
    """METEOR without synonyms, which reads any script, and next to it ROUGE-1 and ROUGE-L."""

    name, main = "meteor", "meteor"
    titles = (("meteor", "METEOR", "meteor"), *Rouge.titles)
    rouge = Rouge()

    def check(self) -> None:
        self.rouge.check()
        _word_tokenizer()
        _stemmer()

    def is_readable(self, text: str) -> bool:
        """Return true if a text has a token of METEOR's."""
        return bool(_words(text))

    def summary(
        self, values: np.ndarray, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> dict[str, float]:
        scores = {self.main: float(values.mean()), **self.rouge.means(predictions, golds)}
        return scores | {"unparsed": sum(not self.is_readable(text) for text in predictions)}

    def notes(self, golds: Texts) -> list[str]:
        return self.rouge.notes(golds)

    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        return np.array([meteor(prediction, gold) for prediction, gold in zip(predictions, golds, strict=True)])


def meteor(prediction: str, gold: str) -> float:
    """Return METEOR of an answer: F of the words matched, less a penalty for each break in their order."""
    given, right = _words(prediction), _words(gold)
    pairs = sorted(_alignment(given, right))
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(given), len(pairs) / len(right)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks = 1 + sum((b - a, d - c) != (1, 1) for (a, c), (b, d) in pairwise(pairs))
    return mean * (1 - _GAMMA * (chunks / len(pairs)) ** _BETA)


def _words(text: str) -> list[str]:
    tokenize = _word_tokenizer()
    return [word.lower() for sentence in re.split(r"(?<=[.!?])\s+", text) for word in tokenize(sentence)]


def _alignment(given: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Return the positions of words matched one to one: equal ones first, then those of equal stems, from the end."""
    pairs: list[tuple[int, int]] = []
    stages: tuple[Callable[[str], str], ...] = (str, _stem)
    rest_given, rest_right = dict(enumerate(given)), dict(enumerate(right))
    for form in stages:
        places = defaultdict(list)
        for place, word in rest_right.items():
            places[form(word)].append(place)
        for place in sorted(rest_given, reverse=True):
            if free := places.get(form(rest_given[place])):
                pairs.append((place, free.pop()))
        rest_given = {i: word for i, word in rest_given.items() if i not in {a for a, _ in pairs}}
        rest_right = {i: word for i, word in rest_right.items() if i not in {b for _, b in pairs}}
    return pairs


@cache
def _stem(word: str) -> str:
    return _stemmer()(word)


@cache
def _word_tokenizer() -> Callable[[str], list[str]]:
    return require("nltk.tokenize", "eval", "METEOR").NLTKWordTokenizer().tokenize


@cache
def _stemmer() -> Callable[[str], str]:
    return require("nltk.stem", "eval", "METEOR").PorterStemmer().stem


for _metric in (UnicodeRouge(), Meteor()):
    register_metric(_metric)
