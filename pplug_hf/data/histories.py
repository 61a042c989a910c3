"""Training examples made of histories, the newest items, and splits by user.

A plug needs many more examples than a benchmark has questions. The user answered each item of a history, so each item
becomes a question whose history is what came before it. Questions of the evaluation must not become training examples:
pass them as `exclude`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from pplug_hf.data.lamp import Example
from pplug_hf.errors import ConfigurationError
from pplug_hf.tasks.items import item_id, newest_first, normalise, oldest_first
from pplug_hf.tasks.task import Task, get_task

_History: TypeAlias = list[dict[str, str]]


def history_examples(examples: Sequence[Example], task: Task | str, exclude: Iterable[Example] = ()) -> list[Example]:
    """Make an example of every history item that has an answer.

    Args:
        examples: Whose histories are used. One person's rows need one `user`, or their items count twice.
        task: Their task.
        exclude: Examples nothing of which may enter, as those of dev and test.

    Returns:
        One example for each distinct (user, item id), with id `"{user}/{item id}"`, in order of first
        appearance. Its history is what comes before the item in that profile of the user which has most
        before it (profiles may be windows, so this need not be the longest): by date if every item of the
        profile has one, else by its place. Texts are shared, not copied. Left out are items without query or
        answer, items whose answer is not a label of the task, questions that `examples` or `exclude` ask the
        same user, and, where the answer is free text, questions that `exclude` asks anybody: co-authors share
        a paper's title. Empty for a task whose items carry no answer.
    """
    task = get_task(task)
    if task.answer_field is None:
        return []
    exclude = list(exclude)
    asked = {(example.user, normalise(example.query)) for example in (*examples, *exclude)}
    asked_anybody = {normalise(example.query) for example in exclude} if task.is_free_text else set()

    places: dict[tuple[str, str], tuple[str, _History, int]] = {}  # prompt, history and place in it
    names: dict[str, set[str]] = {}
    for example, history, known in _in_order(examples):
        seen = names[example.user] = names[example.user] if known else set()
        for position, item in enumerate(history[known:], known):
            name = item_id(item)
            if name in seen:
                continue  # twice in one profile: from its second place it would find its own answer
            seen.add(name)
            key = (example.user, name)
            if key not in places or position > places[key][2]:
                places[key] = (example.prompt, history, position)

    # Not a prompt without its instruction, of which LaMP has one.
    whole = next((example.prompt for example in examples if task.query_marker in example.prompt), None)
    made = []
    for (user, name), (prompt, history, position) in places.items():
        item = history[position]
        like = prompt if whole is None or task.query_marker in prompt else whole
        prompt, query = task.question(item, like)
        answer, text = task.item_label(item), normalise(query)
        if not query or not answer or (user, text) in asked or text in asked_anybody:
            continue
        made.append(
            Example(
                id=f"{user}/{name}",
                user=user,
                prompt=prompt,
                query=query,
                target=answer,
                history=history[:position],
            )
        )
    return made


def newest(examples: Sequence[Example], most: int) -> list[Example]:
    """Keep only the newest items of each history, in their order.

    Args:
        examples: With histories.
        most: Items of a history.

    Raises:
        ConfigurationError: `most` is less than 1.
    """
    if most < 1:
        raise ConfigurationError(f"max_items is {most}; keep at least 1 item, or leave it out.")
    made = []
    for example, history, _ in _in_order(examples):
        if len(history) > most:
            if history is example.history:  # in order
                kept = history[-most:]
            else:
                kept = [example.history[i] for i in sorted(newest_first(example.history)[:most])]
            example = replace(example, history=kept)
        made.append(example)
    return made


def _in_order(examples: Iterable[Example]) -> Iterator[tuple[Example, _History, int]]:
    """Yield examples with their histories, oldest item first, and how many items the user's last one began with, too.

    Most histories of a user begin with the one before: only what is new is looked at, or time would grow with the square.
    A history that is in order is the example's own list.
    """
    last: dict[str, _History] = {}
    for example in examples:
        history = example.history if isinstance(example.history, list) else list(example.history)
        before = last.get(example.user, [])
        known = len(before) if history[: len(before)] == before else 0
        new = history[max(known - 1, 0) :]  # and the one before, to compare with
        if oldest_first(new) != new:
            history, known = oldest_first(history), 0
        last[example.user] = history
        yield example, history, known


def nearest_users(users: Iterable[str], fraction: float, seed: int = 0) -> list[str]:
    """Return the number of users that is nearest to a fraction of them, the first by a hash of seed and name.

    At least one of two or more is held out, and one is kept, unless the fraction is 0 or 1.
    """
    ordered = sorted(set(users), key=lambda user: (_draw(seed, user), user))
    count = int(len(ordered) * fraction + 0.5)
    if 0 < fraction < 1:
        count = min(max(count, 1), len(ordered) - 1)
    return ordered[: max(count, 0)]


def split_users(
    examples: Iterable[Example], fraction: float, seed: int = 0, *, nearest: bool = False
) -> tuple[list[Example], list[Example]]:
    """Hold some users out, for early stopping on users whom the plug has not seen.

    Args:
        examples: What to split; examples of one user stay together.
        fraction: Share of the users to hold out. Each user is drawn by a hash of seed and name alone, so
            the share is met on average only, and neither the order nor who else is there matters.
        seed: Another seed holds out other users.
        nearest: Hold out the number of users nearest to the share, the first by that hash; then it matters who else is
            there.

    Returns:
        The examples kept and those held out, each in the order given.

    Raises:
        ConfigurationError: `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigurationError(f"fraction is {fraction!r}; give a share of the users between 0 and 1.")
    examples = list(examples)
    users = {example.user for example in examples}
    chosen = set(nearest_users(users, fraction, seed)) if nearest else {u for u in users if _draw(seed, u) < fraction}
    kept: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        (held_out if example.user in chosen else kept).append(example)
    return kept, held_out


class UserSplit(NamedTuple):
    """Examples in three parts, those of one user in one of them."""

    fit: list[Example]  # to train on
    select: list[Example]  # to learn to choose among trained methods, none of which has seen these users
    held: list[Example]  # to stop in time and to choose settings


def remaining(
    examples: Iterable[Example], leave_out_users: float = 0.0, split_seed: int = 0, max_items: int | None = None
) -> list[Example]:
    """Return what methods are fitted on: examples without those of the users left out, with their newest items.

    Args:
        examples: of the train split.
        leave_out_users, split_seed: as of `split_users`.
        max_items: as of `newest`; None for all.
    """
    kept, _ = split_users(examples, leave_out_users, split_seed)
    return kept if max_items is None else newest(kept, max_items)


def three_way_split(examples: Iterable[Example], select: float = 0.3, held: float = 0.1, seed: int = 0) -> UserSplit:
    """Divide examples by their users, the same way for all methods that are compared.

    Args:
        examples: what to divide.
        select, held: shares of the users; the nearest numbers of users are drawn by a hash of seed and name. The held-out
            users are those on whom `pplug-hf train` validates at the same share and seed; at the sum of both shares, it
            trains on the same users as the methods here.
        seed: another seed divides otherwise.

    Raises:
        ConfigurationError: the shares are negative, or leave nothing to train on.
    """
    if min(select, held) < 0 or select + held >= 1:
        raise ConfigurationError(f"select is {select} and held {held}: give shares of the users with a sum below 1.")
    examples = list(examples)
    _, last = split_users(examples, held, seed + 1, nearest=True)
    fit, outside = split_users(examples, select + held, seed + 1, nearest=True)
    of_last = {example.user for example in last}
    chosen = [example for example in outside if example.user not in of_last]
    return UserSplit(fit, chosen, last)


def _draw(seed: int, user: str) -> float:
    """Return a number in [0, 1) that is the same on every machine and in every process, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}/{user}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48
