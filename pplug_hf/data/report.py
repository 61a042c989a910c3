"""Description of a data set's histories, before anything is trained on them. Numbers and ids only.

    task, examples, repairs = stream("lamp/LaMP_2", "dev")
    report = describe(examples, task)
    print(report)

For label tasks the report compares how much users differ in their labels with how much they would differ by chance,
because short histories look personal by accident, and counts how often a user's favourite label is the answer. It also
lists questions that occur in their own history, where the answer can be copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date

import numpy as np
from numpy.typing import ArrayLike

from pplug_hf.data.records import Example, Findings, Repairs
from pplug_hf.tasks.items import day_number, field_text, item_id, normalise, parse_date
from pplug_hf.tasks.task import Task, get_task

FINDINGS = {
    "unanswered": "questions without an answer",
    "empty_query": "questions whose query is empty",
    "empty_history": "questions with an empty history",
    "empty_items": "history items without a text",
    "unlabelled_items": "history items without an answer",
    "foreign_labels": "history items whose answer is none of the task's labels",
    "repeated_ids": "history items whose id an earlier one of that history has",
    "repeated_texts": "history items whose text an earlier one of that history has",
    "question_in_history": "history items with the text of their question",
    "near_question_in_history": "history items with nearly the text of their question",
    "answer_in_history": "history items with the text of their question, nearly or fully, and its answer",
}
NEAR = 0.8  # token Jaccard from which two texts are nearly the same
OTHER = "(other)"
_DRAWS = 20  # random histories per user
_YEAR = 365.25


@dataclass(frozen=True, slots=True)
class Spread:
    """Distribution of some numbers."""

    count: int
    min: float
    median: float
    mean: float
    p90: float
    max: float

    @classmethod
    def of(cls, values: ArrayLike) -> Spread | None:
        """Return the distribution of values; None if there are none."""
        numbers = np.asarray(values, dtype=np.float64)
        if not len(numbers):
            return None
        middle, high = np.percentile(numbers, [50, 90])
        return cls(len(numbers), *(float(x) for x in (numbers.min(), middle, numbers.mean(), high, numbers.max())))


@dataclass(frozen=True, slots=True)
class Labels:
    """Distribution of the labels in the histories, of each user compared with all users."""

    everybody: dict[str, float]  # share of each label among all users' items; what is not a label is OTHER
    top_share: float  # of the most frequent label, all users' items together
    user_top_share: float  # of each user's own most frequent label: median over users
    user_top_share_by_chance: float  # the same if every user drew from everybody's labels
    total_variation: float  # between a user's shares and everybody's: mean over users
    total_variation_by_chance: float
    users: int  # with at least one labelled item
    favourite_is_gold: float | None  # answered questions whose gold is the most frequent label of their history
    global_favourite_is_gold: float | None  # the same questions, and the most frequent label of everybody


@dataclass(slots=True)
class HistoryReport:
    """Result of `describe`."""

    task: str
    questions: int = 0
    users: int = 0
    history_items: Spread | None = None  # per question
    questions_per_user: Spread | None = None
    items_per_user: Spread | None = None  # distinct items in all histories of a user
    words_per_item: Spread | None = None  # distinct items of a user
    first_date: str | None = None
    last_date: str | None = None
    dated_share: float | None = None  # of all users' distinct items
    years_per_history: Spread | None = None  # from the first dated item to the last, per question
    age_of_items: Spread | None = None  # years before the last item of the same user
    labels: Labels | None = None
    findings: Findings = field(default_factory=Findings)
    repairs: Repairs = field(default_factory=Repairs)  # of the reader, if it is told

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.task}: {self.questions:,} questions of {self.users:,} users", ""]
        spreads = [
            (name, getattr(self, key))
            for key, name in (
                ("history_items", "items in a history"),
                ("items_per_user", "distinct items of a user"),
                ("questions_per_user", "questions of a user"),
                ("words_per_item", "words of an item"),
                ("years_per_history", "years a history spans"),
                ("age_of_items", "years an item is older than its user's last"),
            )
        ]
        width = max(len(name) for name, _ in spreads)
        head = "".join(f"{name:>10}" for name in ("min", "median", "mean", "90 %", "max"))
        lines.append(" " * width + head)
        for name, spread in spreads:
            if spread is not None:
                numbers = (spread.min, spread.median, spread.mean, spread.p90, spread.max)
                lines.append(f"{name:{width}}" + "".join(f"{_short(number):>10}" for number in numbers))
        if self.dated_share is not None and self.first_date:
            lines += [
                "",
                f"dates: {self.first_date} to {self.last_date}; {self.dated_share:.1%} of the items have one",
            ]
        elif self.dated_share is not None:
            lines += ["", "dates: no item has one"]
        if self.labels is not None:
            lines += ["", *_label_lines(self.labels)]
        lines += ["", *(self.findings.lines(FINDINGS) or ["nothing to find fault with"])]
        if self.repairs:
            lines += ["", "while reading:", f"{self.repairs}"]
        return "\n".join(lines)


@dataclass(slots=True)
class _User:
    """Numbers of one user, without texts."""

    questions: int = 0
    items: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))  # distinct, see `_key`
    labels: Counter[str] = field(default_factory=Counter)
    days: array[int] = field(default_factory=lambda: array("i"))

    def new(self, history: Sequence[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
        """Yield the items that this user did not have before, each once, and remember them."""
        keys = np.array([_key(item) for item in history], dtype=np.uint64)
        distinct, first = np.unique(keys, return_index=True)
        fresh = ~np.isin(distinct, self.items, kind="sort")  # numpy 2.0 builds no table of large unsigned numbers
        self.items = np.concatenate([self.items, distinct[fresh]])
        yield from (history[place] for place in np.sort(first[fresh]))


def describe(
    examples: Iterable[Example], task: Task | str, repairs: Repairs | None = None, seed: int = 0
) -> HistoryReport:
    """Describe the histories of examples in one pass.

    Args:
        examples: A list, or a stream; what is kept of each is a few numbers.
        task: Their task.
        repairs: Of the reader, to be printed with the rest.
        seed: Of the histories that chance makes.

    Returns:
        The report. A user's items are told apart by their ids, or by what they say where they have none.

    Raises:
        DataError: As the stream does.
        ConfigurationError: There is no such task.
    """
    task = get_task(task)
    labelled = task.has_labelled_items
    report = HistoryReport(task.name)
    users: dict[str, _User] = {}
    lengths, words, years, golds = array("i"), array("i"), array("d"), []
    for example in examples:
        user = users.setdefault(example.user, _User())
        user.questions += 1
        lengths.append(len(example.history))
        for item in user.new(example.history):
            words.append(len(field_text(item, task.query_field).split()))
            user.labels.update(_label(item, task, labelled))
            user.days.extend(_day(item))
        if days := [day for item in example.history for day in _day(item)]:
            years.append((max(days) - min(days)) / _YEAR)
        labels = Counter(label for item in example.history for label in _label(item, task, labelled))
        if labels and example.target is not None:
            most = max(labels.values())
            golds.append((task.label_of(example.target), [label for label, count in labels.items() if count == most]))
        _find(example, task, labelled, report.findings)

    everyone = list(users.values())
    report.questions, report.users = len(lengths), len(users)
    report.history_items, report.years_per_history = Spread.of(lengths), Spread.of(years)
    report.words_per_item = Spread.of(words)
    report.questions_per_user = Spread.of([user.questions for user in everyone])
    report.items_per_user = Spread.of([len(user.items) for user in everyone])
    days = [np.array(user.days) for user in everyone if user.days]
    if words:
        report.dated_share = sum(map(len, days)) / len(words)
    if days:
        first, last = min(own.min() for own in days), max(own.max() for own in days)
        report.first_date, report.last_date = (date.fromordinal(int(day)).isoformat() for day in (first, last))
        report.age_of_items = Spread.of(np.concatenate([(own.max() - own) / _YEAR for own in days]))
    if labelled:
        report.labels = _labels([user.labels for user in everyone if user.labels], golds, task.labels, seed)
    if repairs is not None:
        report.repairs = repairs
    return report


def _find(example: Example, task: Task, labelled: bool, findings: Findings) -> None:
    """Count the findings of one question."""
    found: Counter[str] = Counter()
    found["unanswered"] = not (example.target or "").strip()
    found["empty_query"] = not example.query.strip()
    found["empty_history"] = not example.history
    query, query_words = normalise(example.query), frozenset(normalise(example.query).split())
    ids, texts = set(), set()
    for item in example.history:
        text, answer, id_ = (field_text(item, name) for name in (task.query_field, task.answer_field, "id"))
        found["empty_items"] += not text
        found["unlabelled_items"] += task.answer_field is not None and not answer
        found["foreign_labels"] += labelled and bool(answer) and not task.item_label(item)
        found["repeated_ids"] += id_ in ids
        ids |= {id_} if id_ else set()
        if not text:
            continue
        text = normalise(text)
        found["repeated_texts"] += text in texts
        texts.add(text)
        same = text == query
        near = not same and jaccard(query_words, frozenset(text.split())) >= NEAR
        found["question_in_history"] += same
        found["near_question_in_history"] += near
        found["answer_in_history"] += (
            (same or near) and bool(answer) and normalise(answer) == normalise(example.target or "")
        )
    for kind in FINDINGS:
        findings.add(kind, example.id, int(found[kind]))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return shared words over all words; 0 if one has none, or if the sizes differ too much to reach `NEAR`."""
    small, large = sorted((len(a), len(b)))
    if small < NEAR * large or not small:  # the result is at most small / large
        return 0.0
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def _labels(
    users: list[Counter[str]], golds: list[tuple[str, list[str]]], known: Sequence[str], seed: int
) -> Labels | None:
    total = sum(users, Counter())
    if not total:
        return None
    names = [name for name, _ in total.most_common()]
    everybody = np.array([total[name] for name in names], dtype=np.float64) / total.total()  # [L]
    counts = np.array([[user[name] for name in names] for user in users])  # [U, L]
    sizes = counts.sum(axis=1)
    rng = np.random.default_rng(seed)

    def top_and_variation(drawn: np.ndarray) -> np.ndarray:
        variation = np.abs(drawn / sizes[:, None] - everybody).sum(axis=1) / 2  # [U]
        return np.array([np.median(drawn.max(axis=1) / sizes), variation.mean()])

    top, variation = top_and_variation(counts)
    chance = np.mean([top_and_variation(rng.multinomial(sizes, everybody)) for _ in range(_DRAWS)], axis=0)

    # Among equally frequent labels of a history, the one that all users give more often. A label may be that of items alone
    # which repeat an id, and are not counted.
    order = {name: rank for rank, name in enumerate(names)}
    hits = [min(favourites, key=lambda name: order.get(name, len(order))) == gold for gold, favourites in golds]
    shown: dict[str, float] = {}
    for name, share, donors in zip(names, everybody.tolist(), (counts > 0).sum(axis=0), strict=True):
        # An answer that only one user gave may be a text of theirs and not a label.
        name = name if name in known or (not known and donors > 1) else OTHER
        shown[name] = shown.get(name, 0.0) + share
    return Labels(
        everybody=shown,
        top_share=float(everybody[0]),
        user_top_share=float(top),
        user_top_share_by_chance=float(chance[0]),
        total_variation=float(variation),
        total_variation_by_chance=float(chance[1]),
        users=len(users),
        favourite_is_gold=float(np.mean(hits)) if hits else None,
        global_favourite_is_gold=float(np.mean([gold == names[0] for gold, _ in golds])) if golds else None,
    )


def _label_lines(labels: Labels) -> list[str]:
    shares = ", ".join(f"{name} {share:.1%}" for name, share in list(labels.everybody.items())[:15])
    more = "" if len(labels.everybody) <= 15 else f", ... ({len(labels.everybody)} in all)"
    lines = [
        f"labels of the items of {labels.users:,} users: {shares}{more}",
        f"share of the most frequent label: {labels.top_share:.3f} of all items; {labels.user_top_share:.3f} of the "
        f"median user's ({labels.user_top_share_by_chance:.3f} if users did not differ)",
        f"distance of a user's labels from everybody's: {labels.total_variation:.3f} total variation "
        f"({labels.total_variation_by_chance:.3f} if users did not differ)",
    ]
    if labels.favourite_is_gold is not None:
        lines.append(
            f"the answer is the history's most frequent label in {labels.favourite_is_gold:.1%} of the questions, "
            f"everybody's most frequent one in {labels.global_favourite_is_gold:.1%}"
        )
    return lines


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _label(item: Mapping[str, str], task: Task, labelled: bool) -> tuple[str, ...]:
    """Return the item's label, if it has one."""
    label = task.label_of(field_text(item, task.answer_field)) if labelled else ""
    return (label,) if label else ()


def _key(item: Mapping[str, str]) -> int:
    """Return 8 bytes that identify an item."""
    return int.from_bytes(hashlib.blake2b(item_id(item).encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _day(item: Mapping[str, str]) -> tuple[int, ...]:
    """Return the number of the item's day; nothing without a date."""
    numbers = parse_date(item.get("date"))
    return (day_number(numbers),) if numbers else ()
