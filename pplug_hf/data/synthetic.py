"""Synthetic users, for training when real ones are few.

A plug has to learn two things: to read from item vectors which answers a user prefers, and to move the backbone's answer
accordingly. Both can be learned from synthetic histories: items are sampled from all users to match the label frequencies
of one real user. What synthetic users cannot show, that one user's *comedy* is another one's *satire*, the plug learns
from the real examples.

This is not in the paper, which has thousands of users per task.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from ..errors import ConfigurationError, DataError
from ..tasks.items import item_id, normalise
from ..tasks.task import Task, get_task
from .records import Example


def synthetic_examples(
    examples: Sequence[Example], task: Task | str, count: int, seed: int = 0, exclude: Iterable[Example] = ()
) -> list[Example]:
    """Make examples of synthetic users.

    Each has the label frequencies of one real user and the length of some example's history. That many labels and one
    more are drawn, and for each label an item of any user; the last item is the question. No history holds the text of
    its own question.

    Args:
        examples: Whose histories are used.
        task: Theirs: one whose items carry one of a list of labels.
        count: How many to make.
        seed: Of all draws.
        exclude: Examples, as of dev and test: items that they ask the item's own user are not used.

    Returns:
        `count` examples of as many users, with ids `"synthetic/0"`, `"synthetic/1"`, ...; items are shared, not copied.

    Raises:
        ConfigurationError: The task's items carry no label, or `count` is negative.
        DataError: No history has labelled items of two texts.
    """
    task = get_task(task)
    if not (task.labels and task.answer_field):
        raise ConfigurationError(
            f"Synthetic users need items with one of a list of labels, and those of {task.name} have none: "
            "leave it out."
        )
    if count < 0:
        raise ConfigurationError(f"The number of synthetic users is {count}; give 0 or more.")
    if count == 0:
        return []
    asked = {(e.user, normalise(e.query)) for e in exclude}
    prompts = [e.prompt for e in examples]
    like = next((prompt for prompt in prompts if task.query_marker in prompt), "".join(prompts[:1]))
    items: dict[str, dict[str, dict[str, str]]] = {}  # user -> id -> item
    for e in examples:
        items.setdefault(e.user, {}).update((item_id(item), item) for item in e.history)
    pool: dict[str, list[dict[str, str]]] = {}
    texts: dict[int, str] = {}  # id of an item in the pool -> its query, for comparison
    users: list[list[str]] = []  # of each user with items, the label of each
    for user, own in items.items():
        labels = []
        for item in own.values():
            label, text = task.item_label(item), normalise(task.question(item, like)[1])
            if label and text and (user, text) not in asked:
                pool.setdefault(label, []).append(item)
                texts[id(item)] = text
                labels.append(label)
        if labels:
            users.append(labels)
    if len(set(texts.values())) < 2:
        raise DataError("Synthetic users need labelled items of at least two texts: leave them out.")

    lengths = [len(e.history) for e in examples if e.history]
    rng = random.Random(f"recombined/{seed}")  # the name it had first: the draws stay the same
    made = []
    for number in range(count):
        labels = rng.choice(users)
        drawn = [rng.choice(pool[rng.choice(labels)]) for _ in range(rng.choice(lengths) + 1)]
        target = drawn.pop()
        prompt, query = task.question(target, like)
        name = f"synthetic/{number}"
        made.append(
            Example(
                id=name,
                user=name,
                prompt=prompt,
                query=query,
                target=task.item_label(target),
                history=[item for item in drawn if texts[id(item)] != texts[id(target)]],
            )
        )
    return made
