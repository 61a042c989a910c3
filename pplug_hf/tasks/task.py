"""A task as data: where the query stands in an input, the text of a history item, how answers are judged.

A task of your own is one `Task`: hand it over wherever a task's name is accepted, or `register_task` it to use its
name. How retrieval reads and shows items has defaults, so most tasks need none of it.

    task = get_task("LaMP-2")
    task.query("Which tag ... tags: [...] description: A burglar dreams.")  # "A burglar dreams."
    task.item_text({"tag": "sci-fi", "description": "A clock stops."})      # "sci-fi: A clock stops."
    score(task, ["sci-fi", "action"], ["sci-fi", "comedy"])["accuracy"]     # 0.5
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from string import Formatter
from typing import TypeAlias

import numpy as np

from ..configuration.queries import split_prompt
from ..errors import ConfigurationError
from .items import field_text, fields_of, item_text, text_of
from .lamp_metrics import clean, warn_notes
from .metrics import Fallback, Metric, Options, Texts, get_metric
from .recipes import Recipe, register_recipe, spelled
from .text_metrics import METRICS  # with all of this package's in it


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Format of a prompt with retrieved items and an input; the defaults are the benchmark's.

    The last four say how many tokens the benchmark keeps free for what is not an item's text. They matter only where
    something must be cut, and are its numbers where those differ from what the finished prompt takes.
    """

    item: str = field(metadata={"help": "What a retrieved item becomes."})
    cut: str = field(metadata={"help": "Field of an item that is cut to fit the token budget."})
    join: str = field(default=", and ", metadata={"help": "What stands between two items."})
    frame: str = field(
        default="{head}{items}. {input}", metadata={"help": "The whole: items, and the input behind `after`."}
    )
    after: str = field(
        default="",
        metadata={"help": "Text of an input; up to its first occurrence is the frame's head. Without it no items."},
    )
    reserved: str = field(default="", metadata={"help": "Words of the frame for which tokens are kept free."})
    frame_tokens: int = field(default=1, metadata={"help": "Tokens kept free for the frame besides those words."})
    join_tokens: int = field(default=2, metadata={"help": "Tokens kept free for every join."})
    item_tokens: int | str = field(
        default="",
        metadata={"help": "Tokens kept free for an item without its text, or what to count instead of the item."},
    )

    def __post_init__(self) -> None:
        for name, needed in (("item", (self.cut,)), ("frame", ("head", "items", "input"))):
            template = getattr(self, name)
            if not all(template.count(f"{{{part}}}") == 1 for part in needed):
                raise ConfigurationError(
                    f"A prompt format's {name} is {template!r}; it must hold "
                    f"{' and '.join(f'{{{part}}}' for part in needed)}, each once."
                )

    @property
    def fields(self) -> frozenset[str]:
        """The fields of an item that are shown or counted."""
        return fields_of(self.item) | fields_of(self.item_tokens if isinstance(self.item_tokens, str) else "")

    def split(self, input_text: str) -> tuple[str, str] | None:
        """Return an input as (head, rest), which joined are the input; None if retrieved items have no place in it.

        Args:
            input_text: an input of the task.
        """
        if not self.after:
            return "", input_text
        head, after, rest = input_text.partition(self.after)
        return (head + after, rest) if after else None


class _Divided(str):
    """A text of which a format string may name the first words (`:start`) or the others (`:rest`)."""

    def __format__(self, part: str) -> str:
        words = self.split()
        share = 0.1 + 0.15 * int.from_bytes(hashlib.sha256(self.encode("utf-8", "surrogatepass")).digest()[:4]) / 2**32
        cut = max(1, int(len(words) * share))
        parts = {"": str(self), "start": " ".join(words[:cut]), "rest": " ".join(words[cut:])}
        return parts[part]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One personalised task."""

    name: str = field(metadata={"help": "Name of the task, as in 'LaMP-2'."})
    query_marker: str = field(metadata={"help": "Text of an input after which the query starts (first occurrence)."})
    query_end: str = field(
        default="",
        metadata={"help": "Text at which the query ends (last occurrence); empty: at the end of the input."},
    )
    query_field: str = field(metadata={"help": "Field of a history item that plays the role of the query."})
    answer_field: str | None = field(
        default=None,
        metadata={"help": "Field of a history item with its own answer; None if items carry none."},
    )
    item_template: str = field(metadata={"help": "Text of a history item for the encoder, its answer included."})
    item_template_unlabelled: str = field(
        metadata={"help": "The same without tags and scores (titles stay), as in the code of the paper's authors."}
    )
    retrieval_template: str = field(
        default="",
        metadata={"help": "Text of a history item for rankers of words; empty: item_template_unlabelled."},
    )
    retrieval_query_pattern: str = field(
        default="",
        metadata={"help": "Regular expression whose groups rankers look for; empty, or if not found: the query."},
    )
    prompt: PromptFormat | None = field(
        default=None,
        metadata={"help": "How retrieved items enter a prompt; None: item_template in quotes, query_field is cut."},
    )
    labels: tuple[str, ...] = field(
        default=(),
        metadata={"help": "All possible answers; () for free text, or for 'the labels seen in the golds'."},
    )
    metric: str = field(
        metadata={
            "help": "How answers are judged: accuracy, mae, rouge, rouge-unicode, meteor, or a metric of your own that you "
            "registered.",
            "choices": METRICS,
        }
    )
    max_new_tokens: int = field(metadata={"help": "Most tokens an answer may have."})
    history_prompt_template: str = field(
        default="",
        repr=False,  # see `identity`
        metadata={
            "help": "Input that asks for the answer of a history item, as a format string over the item's fields, for "
            "training on histories; empty: the input of a question, with the item's query_field for its query."
        },
    )

    input_template: str = field(
        default="",
        repr=False,
        metadata={"help": "Input of a question, as a format string over the row's fields; empty: its field 'input'."},
    )
    user_field: str = field(
        default="",
        repr=False,
        metadata={"help": "Field of a row that says whose it is; empty: 'user_id' or 'user'."},
    )

    own_prompt: str = field(
        default="",
        repr=False,
        metadata={
            "help": "Another question that a history item answers by itself, as a format string over its fields, to train a "
            "user's own weights on where items carry no answer of the task; {text:start} is the first words of a field."
        },
    )
    own_answer: str = field(
        default="",
        repr=False,
        metadata={"help": "Its answer, likewise; {text:rest} is the field without those first words."},
    )

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ConfigurationError(f"Task {self.name!r}: {fault}")

    def _faults(self) -> Iterator[str]:
        """Yield a message for each field that cannot work; later checks rely on earlier ones."""
        if self.metric not in METRICS:
            yield f"metric is {self.metric!r}; choose one of {', '.join(METRICS)}, or register_metric one of your own."
        labels: object = self.labels
        if isinstance(labels, str) or not all(
            isinstance(label, str) and label == label.strip() != "" for label in labels
        ):
            yield f"labels are {labels!r}; give a list of texts without white space around them, none of them empty."
        if len(set(labels)) < len(labels):
            yield f"labels are {labels!r}; give each label once."
        if not self.query_marker:
            yield "query_marker is empty; give the text before the query."
        pattern, groups = self.retrieval_query_pattern, 0
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            yield f"retrieval_query_pattern is not a valid regular expression ({error})."
        if pattern and not groups:
            yield f"retrieval_query_pattern {pattern!r} has no group: put what rankers look for in parentheses."
        numbers = bool(self.labels) and all(_number(label) is not None for label in self.labels)
        if get_metric(self.metric).needs_numbers and not numbers:
            yield (
                f"labels are {labels!r}; metric {self.metric!r} needs numbers as labels, as in ('1', '2', '3', '4', '5')."
            )
        if self.input_template and self.query_marker not in self.input_template:
            yield f"input_template is {self.input_template!r}; it must hold the query_marker {self.query_marker!r}."
        template = self.history_prompt_template
        named = fields_of(template)
        shows_answer = self.answer_field in named
        if template and (shows_answer or self.query_marker not in item_text(dict.fromkeys(named), template)):
            yield (
                f"history_prompt_template is {template!r}; it must hold the query_marker {self.query_marker!r}, as inputs "
                "do, and must not show the answer."
            )

        if wrong := _parts_of(self.own_prompt + self.own_answer) - {"", "start", "rest"}:
            yield f"own_prompt and own_answer name {', '.join(sorted(wrong))} of a field; there is start, and rest."
        if bool(self.own_prompt) != bool(self.own_answer):
            yield "own_prompt and own_answer belong together: give both, or neither."

    @property
    def identity(self) -> str:
        """Text that determines questions and answers, for digests; later fields are in it only if they are set."""
        return repr(self) + self.history_prompt_template + self.input_template + self.user_field

    @property
    def digest(self) -> str:
        """Fingerprint of the task."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    @property
    def fields(self) -> frozenset[str]:
        """Fields that every history item of this task has (`id` and `date` come on top, where known)."""
        named = fields_of(self.item_template + self.item_template_unlabelled + self.retrieval_template)
        named |= fields_of(self.history_prompt_template + self.own_prompt + self.own_answer)
        named |= {self.query_field} | ({self.answer_field} if self.answer_field else set())
        return named | (self.prompt.fields if self.prompt else frozenset())

    @property
    def is_free_text(self) -> bool:
        """True if answers are texts, not labels."""
        return get_metric(self.metric).is_free_text

    @property
    def has_labelled_items(self) -> bool:
        """True if history items carry a label of their own."""
        return self.answer_field is not None and (bool(self.labels) or not self.is_free_text)

    def label_of(self, answer: object) -> str:
        """Return an answer as a label: a number equal to a label's number is that label, so 5.0 is "5".

        Args:
            answer: a gold, or the answer in a history item, as text or as a number.

        Returns:
            The label; the answer without white space around it where it is none, or the task has no list of labels.
        """
        text = text_of(answer).strip()
        return text if text in self.labels else _by_number(self.labels).get(_number(text), text)

    def item_label(self, item: Mapping[str, object]) -> str:
        """Return the answer in a history item by the same rule; empty if it has none, or one that is not a label.

        Args:
            item: a history item.
        """
        answer = self.label_of(field_text(item, self.answer_field))
        return answer if not self.labels or answer in self.labels else ""

    @property
    def prompt_format(self) -> PromptFormat:
        """Format of retrieved items in a prompt: `prompt`, or the one that follows from the templates.

        Raises:
            ConfigurationError: There is no `prompt`, and `item_template` does not show the `query_field`.
        """
        return self.prompt or PromptFormat(item=f'"{self.item_template}" ', cut=self.query_field)

    def query(self, input_text: str) -> str:
        """Return the part of an input that is the user's own, without the instruction around it.

        Args:
            input_text: An input of this task.

        Returns:
            What stands between `query_marker` and `query_end`. The whole input where the marker is missing:
            the benchmark has such rows (LaMP-2 dev, id 110).
        """
        return self._split(input_text)[1]

    def retrieval_query(self, input_text: str) -> str:
        """Return what a ranker looks for: the query, unless the task has a pattern (LaMP-1: both candidates' titles).

        Args:
            input_text: An input of this task.

        Returns:
            The groups of `retrieval_query_pattern` with a space in between, or the query.
        """
        found = re.search(self.retrieval_query_pattern, input_text) if self.retrieval_query_pattern else None
        return " ".join(group or "" for group in found.groups()) if found else self.query(input_text)

    def retrieval_text(self, item: Mapping[str, object]) -> str:
        """Return the text of an item for rankers of words, which see no tags and scores in the benchmark.

        Args:
            item: A history item.

        Returns:
            The filled template; a null field is empty.

        Raises:
            DataError: The item lacks a field of the template.
        """
        return item_text(item, self.retrieval_template or self.item_template_unlabelled)

    def prompt_for(self, item: Mapping[str, object], like: str) -> str:
        """Return an input that asks for the answer of a history item; arguments and errors as in `question`."""
        return self.question(item, like)[0]

    def question(self, item: Mapping[str, object], like: str) -> tuple[str, str]:
        """Return a history item as a question, to train on histories.

        Args:
            item: a history item.
            like: an input of this task, best one with the marker: without it there is no instruction to keep.

        Returns:
            The input: the filled `history_prompt_template`, or `like` with its query replaced by the item's
            `query_field`. And its query.

        Raises:
            DataError: the item lacks a field of the template.
        """
        if self.history_prompt_template:
            prompt = item_text(item, self.history_prompt_template)
            return prompt, self.query(prompt)
        before, _, after = self._split(like)
        query = field_text(item, self.query_field)
        return before + query + after, query

    def own_question(self, item: Mapping[str, object]) -> tuple[str, str]:
        """Return what a history item answers by itself, where it carries no answer of the task.

        Args:
            item: a history item.

        Returns:
            The filled `own_prompt` and `own_answer`. Of a field that is cut, the first words are a share of between 10 and
            25 %, drawn by the text; at least one.
        """
        values = {name: _Divided(field_text(item, name)) for name in fields_of(self.own_prompt + self.own_answer)}
        return self.own_prompt.format_map(values), self.own_answer.format_map(values)

    def item_text(self, item: Mapping[str, object], labelled: bool = True) -> str:
        """Return the text of an item for the history encoder.

        Args:
            item: A history item.
            labelled: With the user's tag or score, or without (the code of the paper's authors).

        Returns:
            The filled template; a null field is empty.

        Raises:
            DataError: The item lacks a field of the template.
        """
        return item_text(item, self.item_template if labelled else self.item_template_unlabelled)

    def _split(self, input_text: str) -> tuple[str, str, str]:
        """Return an input as (instruction, query, rest), which joined are the input."""
        return split_prompt(input_text, self.query_marker, self.query_end)


def _parts_of(template: str) -> set[str]:
    """Return what a template asks for of its fields."""
    return {part or "" for _, name, part, _ in Formatter().parse(template) if name}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@lru_cache  # asked once per history item
def _by_number(labels: tuple[str, ...]) -> dict[float | None, str]:
    """Return the labels by their numbers; without numbers that two labels share."""
    numbers = {label: number for label in labels if (number := _number(label)) is not None}
    shared = Counter(numbers.values())
    return {number: label for label, number in numbers.items() if shared[number] == 1}


TASKS: dict[str, Task] = {}


def register_task(task: Task, recipes: Iterable[Recipe] = (), exist_ok: bool = False) -> None:
    """Make a task known by its name, to `get_task`, the command line and readers of data.

    Args:
        task: the task.
        recipes: settings that suit it, known by their names from now on.
        exist_ok: replace a task or a recipe of the same name.

    Raises:
        ConfigurationError: a name is taken, and `exist_ok` is not given.
    """
    same = [name for name in TASKS if spelled(name) == spelled(task.name)]
    if same and not exist_ok:
        raise ConfigurationError(f"There is a task {same[0]!r} already: pass exist_ok=True to replace it.")
    for recipe in recipes:
        register_recipe(recipe, exist_ok)
    for name in same:
        del TASKS[name]
    TASKS[task.name] = task


def get_task(name: str | Task) -> Task:
    """Return the task of that name.

    Args:
        name: "LaMP-2", "LaMP_2" or "lamp-2"; a `Task` is handed back as it is.

    Returns:
        The task.

    Raises:
        ConfigurationError: There is no task of that name.
    """
    if isinstance(name, Task):
        return name
    for task in TASKS.values():
        if spelled(task.name) == spelled(name):
            return task
    raise ConfigurationError(
        f"There is no task {name!r}; choose one of {', '.join(TASKS)}, or pass a Task of your own, or a .json file "
        "with one."
    )


Extra: TypeAlias = Sequence[Mapping[str, object]] | None


def score(
    task: Task | str, predictions: Texts, golds: Texts, *, fallback: Fallback = "farthest", extra: Extra = None
) -> dict[str, float]:
    """Return all scores of the answers to a set of questions.

    Args:
        task: their task.
        predictions: one answer per question.
        golds: the right answers, in the same order.
        fallback: for ratings that are not a number: "farthest" is LaMP's rule; "first-digit" is the one of the
            paper's authors, the first digit in the answer, else the low end of the scale.
        extra: `Example.extra` of each question, for a metric that reads further fields of a row.

    Returns:
        For LaMP "accuracy" and "f1", "mae" and "rmse", or "rouge-1" and "rouge-L"; and "unparsed", the number of
        answers that are not a label, not a number, or have no word that the metric reads.

    Raises:
        MismatchError: predictions and golds differ in number, there are none, or a gold is impossible.
        ConfigurationError: no such task or fallback, or the metric needs `extra`.
    """
    metric, task, predictions, golds, options = _judged(task, predictions, golds, fallback, extra)
    warn_notes(metric, golds)
    return metric.score(predictions, golds, task, **options)


def score_each(
    task: Task | str, predictions: Texts, golds: Texts, *, fallback: Fallback = "farthest", extra: Extra = None
) -> tuple[dict[str, float], np.ndarray]:
    """Return what `score` and what `per_example` return, and judge each answer once. Arguments and errors as in `score`."""
    metric, task, predictions, golds, options = _judged(task, predictions, golds, fallback, extra)
    warn_notes(metric, golds)
    return metric.score_each(predictions, golds, task, **options)


def per_example(
    task: Task | str, predictions: Texts, golds: Texts, *, fallback: Fallback = "farthest", extra: Extra = None
) -> np.ndarray:
    """Return the main score of each answer, for a bootstrap. Arguments and errors as in `score`.

    Returns:
        For LaMP correctness (0 or 1), absolute error, or ROUGE-1, [n]. Its mean is `score(...)[main_metric(task)]`.
    """
    metric, task, predictions, golds, options = _judged(task, predictions, golds, fallback, extra)
    return metric.per_example(predictions, golds, task, **options)


def main_metric(task: Task | str) -> str:
    """Return the name of the score that decides: for LaMP "accuracy", "mae" or "rouge-1"."""
    return get_metric(get_task(task).metric).main


def higher_is_better(task: Task | str) -> bool:
    """Return true unless the task is judged by errors."""
    return get_metric(get_task(task).metric).higher_is_better


def _judged(
    task: Task | str, predictions: Texts, golds: Texts, fallback: Fallback, extra: Extra
) -> tuple[Metric, Task, Texts, Texts, Options]:
    """Return the metric, the task, clean answers and golds, and what this metric takes of the rest."""
    task = get_task(task)
    metric = get_metric(task.metric)
    options: Options = {"fallback": fallback} if metric.fallbacks else {}
    if metric.fields:
        if extra is None:
            raise ConfigurationError(
                f"The metric {metric.name!r} needs the fields {', '.join(metric.fields)} of the rows, and answers alone "
                "do not have them: use `pplug-hf bench`, or pass extra."
            )
        options["extra"] = extra
    predictions, golds = clean(predictions, golds)
    return metric, task, predictions, [task.label_of(gold) for gold in golds], options
