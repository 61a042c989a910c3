"""Closeness of answers to their user's own style, which ROUGE cannot see: it ignores case and punctuation.

    style = Style.fit({"ann": anns_titles, "bob": bobs_titles, ...})
    scores = style.score(answers, users)          # [n], each in [0, 1]
    bootstrap_mean(*user_means(scores, users))
    style.gaps(answers, users)                    # which features differ, in standard deviations

A text becomes numbers that say little about its topic: length, casing, punctuation, function words. Users differ in
some of these and texts of one user vary in all, so features are weighted by linear discriminant analysis with a
Gaussian for every user (a two-covariance model): in its coordinates texts of one user have variance 1 and users have
variance b, and a user with n texts of mean m is expected to write next

    N(m * n b / (n b + 1), 1 + b / (n b + 1))       in each coordinate: few texts are trusted little

The closeness of a text to a user is how much likelier it is from that user than from anybody, in standard deviations
of what other users' texts get, or users with an ordinary style would be close to everything. The score of an answer
is the share of **other** users to whom it is less close than to its own. So 1 is a text that nobody else would have
written like that, and 0 one that everybody else would rather. Another user's text gets about 0.5 on average, and one
answer for all users exactly 0.5: blandness earns nothing. That holds for means over users, not over questions, of
which some users have more: see `user_statistics.user_means`. What the users' real answers get is what can be reached.

U users, F features, n answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.records import Example
from ..errors import ConfigurationError, DataError, MismatchError
from ..tasks.task import Task, get_task

# Groups of words that hold a sentence together, whatever it is about.
FUNCTION_WORDS = {
    "article": "a an the",
    "pronoun I": "i me my mine we us our ours",
    "pronoun you": "you your yours",
    "pronoun other": "he him his she her hers it its they them their theirs",
    "demonstrative": "this that these those",
    "preposition": "of in on at by for with from to into over under about after before between through",
    "conjunction": "and or but nor so yet because while although if as than",
    "auxiliary": "am is are was were be been being do does did have has had",
    "modal": "can could will would shall should may might must",
    "negation": "not no never none nothing cannot don't doesn't didn't isn't aren't won't can't",
    "question": "who what when where why how which whose",
    "quantity": "all any both each every few more most much many some such only very too just",
}
PUNCTUATION = {  # escaped are the typographic ones
    "comma": ",",
    "period": ".",
    "colon": ":",
    "semicolon": ";",
    "exclamation": "!",
    "question mark": "?",
    "apostrophe": "'\u2019`",
    "quotation mark": '"\u201c\u201d\u2018\u00ab\u00bb',
    "hyphen": "-\u2010",
    "dash": "\u2013\u2014",
    "bracket": "()[]{}",
    "ellipsis": "\u2026",
    "slash": "/|",
    "ampersand": "&",
    "at or hash": "@#",
    "currency or percent": "$\u20ac\u00a3%",
}
_LENGTH = ("log words", "log characters", "letters per word", "sentences")
_CASE = ("upper-case letters", "capitalised words", "all-capital words", "starts lower-case", "starts upper-case")
_END = ("ends with a period", "ends with a question mark", "ends with an exclamation mark", "digits", "not ASCII")
FEATURES = (*_LENGTH, *_CASE, *_END, *PUNCTUATION, *(f"{name} words" for name in FUNCTION_WORDS))

_CLIP = 5.0  # standard deviations: what hardly any text has (an exclamation mark in a paper's title) must not decide
_COHORT = 2000  # texts that say how close strangers come to a user
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_GROUP = {word: group for group, words in FUNCTION_WORDS.items() for word in words.split()}
_CHUNK = 4_000_000  # distances at once


def features(texts: Sequence[str]) -> np.ndarray:
    """Return the stylistic features of each text, [n, F]: the columns are `FEATURES`. An empty text is all zeros."""
    rows = np.zeros((len(texts), len(FEATURES)))
    for row, text in zip(rows, texts, strict=True):
        text = " ".join(text.split())
        if not text:
            continue
        words = _WORD.findall(text)
        letters = [c for c in text if c.isalpha()]
        long = [word for word in words if len(word) > 1]
        end = text.rstrip("\"'\u201d\u2019)")[-1:]
        groups = [_GROUP.get(word.lower().replace("\u2019", "'")) for word in words]
        many, per_word, letter_count = max(1, len(words)), 1 / max(1, len(words)), max(1, len(letters))
        row[:] = [
            *(np.log1p(len(words)), np.log1p(len(text)), sum(map(len, words)) * per_word),
            len(re.findall(r"[.!?\u2026]+(?:\s|$)", text)),
            sum(c.isupper() for c in letters) / letter_count,
            sum(word[0].isupper() for word in words) * per_word,
            sum(word.isupper() for word in long) / max(1, len(long)),
            *(bool(letters) and letters[0].islower(), bool(letters) and letters[0].isupper()),
            *(end == ".", end == "?", end == "!"),
            sum(c.isdigit() for c in text) / len(text),
            sum(not c.isascii() for c in letters) / letter_count,
            *(sum(text.count(mark) for mark in marks) / many for marks in PUNCTUATION.values()),
            *(groups.count(group) * per_word for group in FUNCTION_WORDS),
        ]
    return rows


@dataclass(frozen=True, eq=False)
class Style:
    """The styles of a pool of users."""

    users: dict[str, int]  # name -> row
    mean: np.ndarray  # [F] of the users' texts
    deviation: np.ndarray  # [F] of single texts
    raw: np.ndarray  # [U, F] each user's mean, in units of `deviation`
    projection: np.ndarray  # [F, F] from standardised features to coordinates
    expected: np.ndarray  # [U, F] where each user's next text is expected
    variance: np.ndarray  # [U, F] how far around
    origin: np.ndarray  # [F] where texts of a user whom we do not know are expected
    between: np.ndarray  # [F] b: how much users vary
    strangers: np.ndarray  # [2, U] mean and standard deviation of how close other users' texts come to a user

    @classmethod
    def fit(cls, texts: Mapping[str, Sequence[str]]) -> Style:
        """Learn the styles of users from their own texts.

        Args:
            texts: Per user, texts of the kind that the answers are of (titles for titles). None of them may be a gold
                that is scored later. Users without texts are left out.

        Returns:
            The styles.

        Raises:
            DataError: There are fewer than two users with texts, or no user has two.
        """
        texts = {user: [text for text in own if text.strip()] for user, own in texts.items()}
        texts = {user: own for user, own in texts.items() if own}
        if len(texts) < 2 or max(map(len, texts.values())) < 2:
            raise DataError(
                f"A style needs texts of at least 2 users, and 2 texts of one of them; {len(texts)} users have "
                f"{sum(map(len, texts.values()))} texts in all."
            )
        sizes = np.array([len(own) for own in texts.values()])  # [U]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        raw = features([text for own in texts.values() for text in own])
        mean, deviation = raw.mean(axis=0), raw.std(axis=0)
        deviation[deviation < 1e-9] = 1.0
        rows = ((raw - mean) / deviation).clip(-_CLIP, _CLIP)
        means = np.zeros((len(sizes), rows.shape[1]))
        np.add.at(means, owner, rows)
        means /= sizes[:, None]

        rest = rows - means[owner]
        within = rest.T @ rest / max(1, len(rows) - len(sizes))
        # Shrunk to its diagonal where texts are few; the floor is for features that no user varies.
        keep = len(rows) / (len(rows) + 2 * len(FEATURES))
        within = keep * within + (1 - keep) * np.diag(np.diag(within)) + 0.01 * np.eye(len(within))
        whiten = np.linalg.inv(np.linalg.cholesky(within)).T  # [F, F]: rows @ whiten has covariance 1
        # Users' means vary by b + 1/n: users with more texts tell more about b.
        weights = sizes / (sizes + 5)
        center = weights @ means / weights.sum()
        spread = (means - center) @ whiten
        values, vectors = np.linalg.eigh((spread.T * weights) @ spread / weights.sum())
        between = np.maximum(0, values - (weights / sizes).sum() / weights.sum())  # b, [F]
        projection = whiten @ vectors

        trust = sizes[:, None] * between / (sizes[:, None] * between + 1)  # [U, F]
        origin = center @ projection
        style = cls(
            users={user: row for row, user in enumerate(texts)},
            mean=mean,
            deviation=deviation,
            raw=means,
            projection=projection,
            expected=origin + trust * (means @ projection - origin),
            variance=1 + between * (1 - trust),
            origin=origin,
            between=between,
            strangers=np.array([np.zeros(len(sizes)), np.ones(len(sizes))]),
        )
        # As many texts of each user as of any other, as far as they have them.
        order = np.lexsort((owner, np.concatenate([np.arange(size) for size in sizes])))[:_COHORT]
        close = np.ma.array(
            style._closeness(rows[order] @ projection), mask=owner[order][:, None] == np.arange(len(sizes))
        )
        spread = close.std(axis=0).filled(1.0)
        return replace(
            style, strangers=np.stack([close.mean(axis=0).filled(0.0), np.where(spread > 1e-9, spread, 1.0)])
        )

    def closeness(self, answers: Sequence[str]) -> np.ndarray:
        """Return how much likelier each answer is from each user than from anybody, [n, U], in standard deviations of what
        other users' texts get: users whose style is close to everybody's have no advantage."""
        mean, deviation = self.strangers
        return (self._closeness(self._standardised(answers) @ self.projection) - mean) / deviation

    def _standardised(self, answers: Sequence[str]) -> np.ndarray:
        return ((features(answers) - self.mean) / self.deviation).clip(-_CLIP, _CLIP)

    def _closeness(self, rows: np.ndarray) -> np.ndarray:
        """Return log-likelihood ratios, [n, F] to [n, U]."""
        precision = 1 / self.variance
        constant = (self.expected**2 * precision + np.log(self.variance)).sum(axis=1)
        user = rows**2 @ precision.T - 2 * rows @ (self.expected * precision).T + constant
        anybody = ((rows - self.origin) ** 2 / (1 + self.between) + np.log(1 + self.between)).sum(axis=1)
        return (anybody[:, None] - user) / 2

    def score(self, answers: Sequence[str], users: Sequence[str]) -> np.ndarray:
        """Return the share of other users to whom each answer is less close than to its own, ties counted half.

        Args:
            answers: n texts.
            users: Whose each should be.

        Returns:
            [n]: 0.5 is chance, 1 unmistakable; NaN for users without texts.

        Raises:
            MismatchError: The lengths differ.
        """
        own = self._rows(answers, users)
        scores = np.full(len(own), np.nan)
        step = max(1, _CHUNK // len(self.users))
        for start in range(0, len(own), step):
            rows = np.arange(start, min(start + step, len(own)))
            rows = rows[own[rows] >= 0]
            closeness = self.closeness([answers[int(row)] for row in rows])
            mine = closeness[np.arange(len(rows)), own[rows]][:, None]
            less = (closeness < mine).sum(axis=1) + ((closeness == mine).sum(axis=1) - 1) / 2
            scores[rows] = less / (len(self.users) - 1)
        return scores

    def gaps(self, answers: Sequence[str], users: Sequence[str]) -> dict[str, float]:
        """Return how answers differ from their users' own texts, by feature: mean difference in standard deviations of texts.

        Args and errors as in `score`; users without texts are left out. Largest differences first.
        """
        own = self._rows(answers, users)
        kept = np.flatnonzero(own >= 0)
        if not len(kept):
            return {}
        rows = self._standardised([answers[int(row)] for row in kept])
        difference = (rows - self.raw[own[kept]]).mean(axis=0)
        order = np.argsort(-np.abs(difference), kind="stable")
        return {FEATURES[int(column)]: float(difference[column]) for column in order}

    def _rows(self, answers: Sequence[str], users: Sequence[str]) -> np.ndarray:
        if len(answers) != len(users):
            raise MismatchError(f"There are {len(answers)} answers and {len(users)} users; give one user per answer.")
        return np.array([self.users.get(user, -1) for user in users], dtype=np.int64)


def own_texts(examples: Sequence[Example], task: Task | str) -> dict[str, list[str]]:
    """Return each user's own texts of the kind that the task asks for, from all their histories.

    Args:
        examples: With histories. What is a gold of any of them is left out: the histories of a user's later questions
            may hold the answers to earlier ones.
        task: Their task: free text, not labels.

    Returns:
        Distinct texts per user: the items' answers, or their query where items carry none (LaMP-7's tweets).

    Raises:
        ConfigurationError: The task's answers are labels.
    """
    task = get_task(task)
    if not task.is_free_text:
        raise ConfigurationError(f"Task {task.name} has labels for answers; style is measured on free text only.")
    name = task.answer_field or task.query_field
    asked = {(example.user, example.target) for example in examples}
    texts: dict[str, dict[str, None]] = {}
    for example in examples:
        own = texts.setdefault(example.user, {})
        for item in example.history:
            text = str(item.get(name) or "").strip()
            if text and (example.user, text) not in asked:
                own[text] = None
    return {user: list(own) for user, own in texts.items()}
