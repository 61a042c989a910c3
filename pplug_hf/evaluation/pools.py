"""Bounds of choosing between rows: for each question the best of their answers, the worst, or any.

    comparison = Comparison(task, examples, "pplug", predictions)
    found = add_pool(comparison, Pool("pool", ("no-persona", "bm25@4", "pplug")))  # adds pool:oracle, :worst, :random

They are made of answers that are there, with the right answers at hand, so they are not methods. The best of several
answers is better than each row even where the rows differ by chance alone: `pool:chance` is the best of as many runs of
random retrieval, and only what the oracle has above it shows that the rows complement each other.

n examples, R rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigurationError
from ..methods.base import Method, Retrieval
from ..methods.names import check_name, name_of
from ..tasks.task import Task, higher_is_better
from .compare import Comparison
from .predictions import Prediction

_RANDOM = Retrieval("random", 4)
CHANCE = name_of(_RANDOM)  # the row whose runs differ by chance alone


@dataclass(frozen=True)
class Pool:
    """Rows to choose from.

    Args:
        name: in front of the names of its bounds.
        rows: R different ones; of several equally good answers that of the first counts.
    """

    name: str
    rows: tuple[str, ...]


def parse_pools(texts: Iterable[str]) -> list[Pool]:
    """Read pools as the command line has them: ROW,ROW,... or NAME=ROW,ROW,...; the first form is called "pool".

    Raises:
        ConfigurationError: not of this form, one row or the same twice, or a name that is taken or impossible.
    """
    pools: dict[str, Pool] = {}
    for text in texts:
        name, equals, rows = text.rpartition("=")
        name, found = name if equals else "pool", tuple(row.strip() for row in rows.split(","))
        if len(set(found)) < max(2, len(found)) or not all(found):
            raise ConfigurationError(
                f"--oracle got {text!r}: write ROW,ROW or NAME=ROW,ROW with two or more different rows."
            )
        check_name(name, "--oracle")
        if name in pools:
            raise ConfigurationError(f"--oracle has two pools named {name!r}: write NAME=ROW,ROW with another name.")
        pools[name] = Pool(name, found)
    return list(pools.values())


def chance_runs(pools: Sequence[Pool], task: Task) -> dict[str, list[Method]]:
    """Return the runs that differ by chance alone, as many as the largest pool has rows.

    Raises:
        ConfigurationError: the task's items cannot be put into a prompt.
    """
    task.prompt_format  # noqa: B018 - raises if there is none
    most = max(len(pool.rows) for pool in pools)
    return {CHANCE: [replace(_RANDOM, draw=draw) for draw in range(most)]}


def pools_of(predictions: Sequence[Prediction], asked: Iterable[Pool]) -> dict[Pool, list[str]]:
    """Return the pools that were asked for, and those of selectors in a table, with the selectors that choose from each.

    Args:
        predictions: of all rows. A selector whose pool is not in the table has no bounds.
        asked: pools of one's own; a selector that chooses from the same rows is compared with these bounds.
    """
    rows = list(dict.fromkeys(made.row for made in predictions))
    found: dict[Pool, list[str]] = {pool: [] for pool in asked}
    keys = {made.row: made.key.get("pool") for made in predictions}
    for row, known in keys.items():
        if known and set(known) <= set(rows):
            same = next((pool for pool in found if set(pool.rows) == set(known)), Pool(row, tuple(known)))
            found.setdefault(same, []).append(row)
    return found


def check_pool(pool: Pool, rows: Sequence[str]) -> None:
    """Raise a `ConfigurationError` if the table lacks a row of a pool."""
    if missing := [row for row in pool.rows if row not in rows]:
        raise ConfigurationError(
            f"The pool {pool.name} chooses from {', '.join(missing)}, and there is no such row in the table, which has "
            f"{', '.join(rows)}."
        )


def add_pool(comparison: Comparison, pool: Pool, seed: int = 0, choosers: Sequence[str] = ()) -> dict[str, object]:
    """Add the bounds of a pool to a comparison, and describe what there was to choose.

    Args:
        comparison: with the rows of the pool. Where one has several runs (seeds), so have the bounds; a row with fewer
            starts again with its first.
        pool: what to choose from.
        seed: of the random choice.
        choosers: other rows, which choose from this pool.

    Returns:
        As JSON takes it: `tied`, the share of questions to which all answers are equally good; `best`, per row (of the
        pool, of `choosers`, and the random choice) the share of questions to which its answer is as good as the best;
        `wins`, per row of the pool its share of being best, of equally good ones each a part; `chance`, how many runs
        the chance bound is made of, null without enough of them.

    Raises:
        ConfigurationError: the comparison lacks a row.
    """
    check_pool(pool, list(comparison.predictions))
    shares, wins, ties = [], [], []
    names = {kind: f"{pool.name}:{kind}" for kind in ("oracle", "worst", "random", "chance")}
    others = [*(row for row in choosers if row in comparison.predictions), names["random"]]
    for answers, goods in _runs(comparison, [comparison.predictions[row] for row in pool.rows]):
        draws = [random.Random(f"{seed}/{e.id}").randrange(len(answers)) for e in comparison.examples]
        for kind, choice in (("oracle", goods.argmax(axis=0)), ("worst", goods.argmin(axis=0)), ("random", draws)):
            _add(comparison, names[kind], answers, choice)
        top = goods >= goods.max(axis=0) - 1e-9  # [R, n]
        ties.append(top.all(axis=0).mean())
        shares.append(top.mean(axis=1))
        wins.append((top / top.sum(axis=0)).mean(axis=1))
    best = dict(zip(pool.rows, np.mean(shares, axis=0).tolist(), strict=True))
    highest = _good(comparison, comparison.predictions[names["oracle"]])  # [runs, n]
    for row in others:
        own = _good(comparison, comparison.predictions[row])
        best[row] = float(np.mean([one >= highest[i % len(highest)] - 1e-9 for i, one in enumerate(own)]))
    draws = comparison.predictions.get(CHANCE, [])[: len(pool.rows)]
    enough = len(draws) == len(pool.rows)
    if enough:
        ((answers, goods),) = _runs(comparison, [[run] for run in draws])
        _add(comparison, names["chance"], answers, goods.argmax(axis=0))
    return {
        "name": pool.name,
        "rows": list(pool.rows),
        "tied": float(np.mean(ties)),
        "best": best,
        "wins": dict(zip(pool.rows, np.mean(wins, axis=0).tolist(), strict=True)),
        "chance": len(draws) if enough else None,
    }


def _good(comparison: Comparison, runs: Sequence[list[str]]) -> np.ndarray:
    """Return how good each run's answers are, larger being better, [runs, n]."""
    sign = 1 if higher_is_better(comparison.task) else -1
    return np.array([sign * comparison.judge(answers)[1] for answers in runs])


def _runs(comparison: Comparison, rows: list[list[list[str]]]) -> list[tuple[list[list[str]], np.ndarray]]:
    """Return, for each run, the answers of all rows, R lists of n, and how good they are, [R, n]."""
    seeds = max(len(runs) for runs in rows)
    chosen = [[runs[i % len(runs)] for runs in rows] for i in range(seeds)]
    return [(answers, _good(comparison, answers)) for answers in chosen]


def _add(comparison: Comparison, name: str, answers: list[list[str]], choice: Iterable[int]) -> None:
    """Add a run that takes the answer of row `choice[i]` to question i."""
    comparison.add(name, [answers[row][i] for i, row in enumerate(choice)])
    comparison.derived.add(name)
