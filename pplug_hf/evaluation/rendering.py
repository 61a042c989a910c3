"""Tables, text and pictures of a comparison, and the files that hold them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..methods.base import COSTS
from ..storage.files import write_text
from ..tasks.metrics import get_metric
from ..tasks.task import main_metric
from .compare import Comparison, save_results
from .plots import heading, plot_history_length, plot_rows, plot_weight_profiles
from .pools import CHANCE
from .predictions import official

# A bootstrap's 95 % intervals over 5 users hold the truth in about 84 % of cases, over 10 in 89 %, over 20 in 92 %.
ENOUGH_USERS = 20


def markdown(comparison: Comparison, records: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Return the table as people read it.

    Args:
        comparison: the numbers.
        records: its rows, if they are worked out already.

    Returns:
        A Markdown table with a line per row; of few users, a note below it says what it cannot show.
    """
    records = comparison.rows() if records is None else records
    scores = [*(name for name, _, _ in get_metric(comparison.task.metric).titles), "unparsed"]
    metrics = [name for name in scores if all(name in record for record in records)]
    styled, full = any("style" in record for record in records), comparison.full
    head = ["row", *metrics, *(["style [95 %]"] if styled else []), f"{comparison.reference} is better by [95 %]"]
    head += ["for users: better, equal, worse"] if full else []
    lines = [head, ["---"] * len(head)]
    for record in records:
        cells = [record["row"] + (f" ({record['seeds']} seeds)" if record["seeds"] > 1 else "")]
        for metric in metrics:
            spread = record.get(f"{metric}_sd")
            value = f"{record[metric]:.0f}" if metric == "unparsed" else f"{record[metric]:.3f}"
            cells.append(value + (f" ± {spread:.3f}" if spread is not None else ""))
        cells += [_cell(record["style"], "")] if styled else []
        cells.append("" if "gain" not in record else _cell(record["gain"], "+"))
        if full:
            users = record.get("users")
            cells.append("" if users is None else f"{users['win']}, {users['tie']}, {users['loss']}")
        lines.append(cells)
    table = _table(lines)
    return table + (f"\n\n{note}" if (note := few_users(len({e.user for e in comparison.examples}))) else "")


def _table(lines: list[list[str]]) -> str:
    """Return cells as a Markdown table; the second line is the one below the head."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def few_users(users: int) -> str:
    """Return what cannot be concluded from the answers of so few users; nothing if they are enough."""
    if users >= ENOUGH_USERS:
        return ""
    return (
        f"{'One user' if users == 1 else f'{users} users'}: too few to conclude that a row is better than another, or that "
        f"it is not, for anybody else. Intervals over fewer than {ENOUGH_USERS} users are too narrow."
    )


def _cell(interval: Sequence[float | None], sign: str) -> str:
    """Return a mean and its interval."""
    mean, *bounds = (f"{value:{sign}.3f}" if value is not None else "?" for value in interval)
    return f"{mean} [{', '.join(bounds)}]"


def report(comparison: Comparison, results: Mapping[str, Any], split: str) -> str:
    """Return the table of a bench, and what is needed to read it."""
    metric = main_metric(comparison.task)
    lines = [
        f"# {comparison.task.name}, {split}: {results['examples']} questions of {results['users']} users",
        "",
        markdown(comparison, results["rows"]),
        "",
        f"± is the standard deviation over seeds. Brackets are 95 % intervals of a paired bootstrap over users "
        f"(10,000 resamples) of the mean over seeds, for {metric}.",
    ]
    lines += [line for note in results.get("notes", []) for line in ("", note)]
    if (golds := results.get("style_of_golds")) is not None:
        lines += [
            "",
            "Style: the share of other users whose texts an answer resembles less than its own user's. 0.5 is chance; "
            f"the users' real answers have {golds[0]:.3f}.",
        ]
    if short := _without_room(comparison, results["runs"]):
        lines += [
            "",
            f"Questions asked without the items that were found, for lack of room: {', '.join(short)}. A larger max_length "
            "or fewer items would help.",
        ]
    if short := _short(comparison, results["runs"], "without_own_weights"):
        lines += ["", f"Questions of users who have no weights of their own: {', '.join(short)}."]
    lines += _per_user(comparison, results["per_user"]["rows"], results["users"])
    for pool in results.get("pools", []):
        lines += _pool(pool)
    lines += _costs(results["runs"])
    kinds = {True: "users of the train split", False: "new users"}
    groups = {
        f"{kinds[part['seen']]} ({part['users']}; {part['examples']})": part for part in results["per_user"]["groups"]
    }
    lines += _parts(f"{metric} of users whom training may have seen (users; questions):", groups)
    lengths = {f"{part['from']} to {part['to']} ({part['examples']})": part for part in results["by_history_length"]}
    lines += _parts(f"{metric} by number of history items:", lengths) if len(lengths) > 1 else []
    return "\n".join(lines) + "\n"


def _per_user(comparison: Comparison, records: Sequence[Mapping[str, Any]], users: int) -> list[str]:
    """Return the lines of the differences where each user counts once."""
    if not records:
        return []
    head = ["row", f"{comparison.reference} is better by [95 %]", "sign test", "p", "p (Holm)", "detectable"]
    cells = [head, ["---"] * len(head)]
    for record in records:
        smallest = "?" if record["detectable"] is None else f"{record['detectable']:.3f}"
        values = [_p_value(record[name]) for name in ("sign_test", "p", "p_holm")]
        cells.append([record["row"], _cell(record["gain"], "+"), *values, smallest])
    return [
        "",
        "The same differences where each user counts once, however many questions that user asked:",
        "",
        _table(cells),
        "",
        f"The sign test counts the users who are better and worse off. p is that of a permutation test over users, and p "
        f"(Holm) is corrected for the {len(records)} rows of this table. Differences below the last column cannot be seen "
        f"with {users} users (power 80 %, two-sided test at 5 %).",
    ]


def _p_value(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _pool(pool: Mapping[str, Any]) -> list[str]:
    """Return the lines of what there was to choose between rows."""
    name, own = pool["name"], pool["rows"]
    cells = [["row", "as good as the best", "share of being best"], ["---"] * 3]
    for row, best in pool["best"].items():
        cells.append([row, f"{best:.1%}", f"{pool['wins'][row]:.1%}" if row in pool["wins"] else ""])
    chance = (
        f"{name}:chance is the best of {pool['chance']} draws of {CHANCE}: only what {name}:oracle has above it shows that the "
        "rows complement each other."
        if pool["chance"]
        else f"The best of {len(own)} answers is better than each by chance, too, and there are not enough runs of {CHANCE} "
        "to say by how much."
    )
    return [
        "",
        f"{name} chooses between the answers of {', '.join(own)}, which are equally good for {pool['tied']:.1%} of the "
        f"questions. {name}:oracle has the best of them, {name}:worst the worst, {name}:random any; they know the right "
        f"answers. {chance} Questions with an answer as good as the best, and shares of being best (equally good rows "
        "share):",
        "",
        _table(cells),
    ]


def _costs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the lines of what the rows cost, of the first seed of each; nothing if no row says."""
    costs = {row: found[0]["about"].get("cost") or {} for row, found in runs.items()}
    names = [name for name in COSTS if any(name in cost for cost in costs.values())]
    if not names:
        return []
    usual = {"generations_per_question": 1}
    cells = [["row", *(COSTS[name] for name in names)], ["---"] * (len(names) + 1)]
    for row, cost in costs.items():
        values = [(usual | cost).get(name) for name in names]
        cells.append([row, *("" if value is None else f"{value:,}" for value in values)])
    return ["", "Costs of training and answering, as far as they are known, for one seed:", "", _table(cells)]


def _parts(title: str, parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of scores in parts of the questions; nothing if there are no parts."""
    if not parts:
        return []
    rows = next(iter(parts.values()))["rows"]
    lines = ["", title, "", "| row | " + " | ".join(parts) + " |", "| --- " * (len(parts) + 1) + "|"]
    return lines + [
        f"| {row} | " + " | ".join(f"{part['rows'][row]:.3f}" for part in parts.values()) + " |" for row in rows
    ]


def _without_room(comparison: Comparison, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the rows whose retrieved items did not fit into all prompts, with the number of those prompts."""
    return _short(comparison, runs, "prompts_without_items", sum(not e.history for e in comparison.examples))


def _short(
    comparison: Comparison, runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, usual: int = 0
) -> list[str]:
    """Return the rows that count more than the usual number of questions under a name, with the number above it."""
    counts = {row: found[0]["about"].get("prompts", {}).get(name, 0) - usual for row, found in runs.items()}
    return [f"{row} {n} of {len(comparison.examples)}" for row, n in counts.items() if n > 0]


def save_pictures(results: Mapping[str, Any], metric: str, folder: Path) -> None:
    """Draw the results of a bench, where matplotlib is installed."""
    try:
        plot_rows(results["rows"], metric, results["reference"], heading(results)).savefig(folder / "rows.png")
        plot_history_length(results, metric).savefig(folder / "history-length.png")
        if results["weights"]:
            plot_weight_profiles(results["weights"], heading(results)).savefig(folder / "weights.png")
    except ConfigurationError as error:
        print(error)


def save(comparison: Comparison, folder: str | os.PathLike, **settings: object) -> None:
    """Write results.json, table.md, and each row's answers in the benchmark's own format, for answers of any origin."""
    save_results({**comparison.results(), "settings": settings}, markdown(comparison) + "\n", folder)
    used = set()
    for name, runs in comparison.predictions.items():
        for i, answers in enumerate(runs):
            file = re.sub(r"[^\w.,=+@-]+", "_", name.replace("'", "")) + ("" if len(runs) == 1 else f"-{i}")
            while file in used:  # two names that look alike as file names
                file += "_"
            used.add(file)
            pairs = zip((e.id for e in comparison.examples), answers, strict=True)
            write_text(Path(folder) / "predictions" / f"{file}.json", official(comparison.task, pairs))
