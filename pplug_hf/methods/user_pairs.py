"""Training pairs of one user: history items as (prompt, answer) of the task, without what the evaluation asks.

| rule | items of a user with several questions |
|---|---|
| `common` | those in the histories of all of them, so no question is answered by weights that saw later items |
| `union` | those in any of them, questions included. It leaks, and is there to show how much a leak is worth |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..data.records import Example
from ..errors import ConfigurationError
from ..tasks.items import item_id, newest_first, normalise
from ..tasks.task import Task

ItemsRule = Literal["common", "union"]


class Pair(NamedTuple):
    """A history item as an example to train on."""

    item: dict[str, str]
    example: Example  # the item as a question; its history is what stands before it, to retrieve from


@dataclass(frozen=True)
class Asked:
    """Questions of an evaluation, none of which may be trained on.

    Args:
        of_user: (user, normalised query) of each.
        of_anybody: queries that nobody's items may ask: those of a free-text task, because co-authors share a title.
    """

    of_user: Collection[tuple[str, str]] = field(default_factory=frozenset)
    of_anybody: Collection[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, examples: Iterable[Example], task: Task) -> Asked:
        """Return the questions of examples."""
        pairs = frozenset((e.user, normalise(e.query)) for e in examples)
        return cls(pairs, frozenset(text for _, text in pairs) if task.is_free_text else frozenset())

    def includes(self, user: str, query: str) -> bool:
        """Return whether this is asked."""
        return (user, text := normalise(query)) in self.of_user or text in self.of_anybody


def check_pairs(task: Task) -> None:
    """Raise a `ConfigurationError` for a task whose items give nothing to train on."""
    if task.answer_field is None and not task.own_answer:
        raise ConfigurationError(
            f"Items of {task.name} carry no answer, so no weights can be trained on them: set the task's answer_field, or "
            "own_prompt and own_answer."
        )


def questions_by_user(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Return the questions of each user, in order of first appearance."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.user, []).append(example)
    return found


def user_pairs(
    questions: Sequence[Example], task: Task, asked: Asked, rule: ItemsRule = "common", max_items: int | None = None
) -> list[Pair]:
    """Return the training pairs of one user, oldest first.

    Args:
        questions: all questions that this user is asked.
        task: their task.
        asked: questions of the whole evaluation; ignored by `union`.
        rule: which items may be used.
        max_items: use only this many of the newest items.

    Returns:
        One pair per usable item: it has a query and an answer, which is a label if the task has labels.
    """
    items = _common(questions) if rule == "common" else _union(questions)
    marked = next((e.prompt for e in questions if task.query_marker in e.prompt), questions[0].prompt)
    made: dict[int, Pair] = {}
    for place, item in enumerate(items):
        prompt, query, answer = _question(task, item, marked)
        if not query or not answer or (rule == "common" and asked.includes(questions[0].user, query)):
            continue
        user = questions[0].user
        made[place] = Pair(item, Example(f"{user}/{item_id(item)}", user, prompt, query, answer, items[:place]))
    newest = [place for place in newest_first(items) if place in made][:max_items]
    return [made[place] for place in sorted(newest)]


def _question(task: Task, item: Mapping[str, object], like: str) -> tuple[str, str, str]:
    """Return prompt, query and answer of an item as an example."""
    prompt, query = task.question(item, like)
    if task.own_answer:
        prompt, answer = task.own_question(item)
        return prompt, query, answer
    return prompt, query, task.item_label(item)


def _common(questions: Sequence[Example]) -> list[dict[str, str]]:
    """Return the items that all histories have, in the order of the shortest one."""
    shared = set.intersection(*({item_id(item) for item in e.history} for e in questions))
    shortest = min(questions, key=lambda e: len(e.history)).history
    return _distinct(item for item in shortest if item_id(item) in shared)


def _union(questions: Sequence[Example]) -> list[dict[str, str]]:
    """Return the items that any history has, those of the longest one first."""
    return _distinct(item for e in sorted(questions, key=lambda e: -len(e.history)) for item in e.history)


def _distinct(items: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return items at their first place."""
    found: dict[str, dict[str, str]] = {}
    for item in items:
        found.setdefault(item_id(item), item)
    return list(found.values())
