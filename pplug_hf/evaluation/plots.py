"""Figures: how history items are weighted for a query, and how the rows of a bench compare.

    plot_rows(results["rows"], "accuracy", "pplug", heading(results)).savefig("rows.png")

Every function raises a `MissingPackageError` if matplotlib is not installed.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from ..methods.names import read_name
from ..methods.persona import Plug
from ..optional import require
from ..tasks.metrics import score_titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Mapping[str, Record]


_BAR, _REFERENCE = "#9db4d3", "#24528f"


def plot_weights(
    weights: Tensor,
    texts: Sequence[str],
    title: str = "",
    most: int = 12,
    *,
    dates: Sequence[str | None] = (),
    answer: str = "",
) -> Figure:
    """Draw horizontal bars of the heaviest items' weights. The figure shows the user's own texts: keep it private.

    Args:
        weights: [N] from `model.persona_weights(...)[0]`.
        texts: [N] labels of the bars.
        title: written above it.
        most: show this many items at most; items that have hardly any weight are left out.
        dates: [N] dates of the items, written in front of the labels.
        answer: what the model answered, written below the title.

    Returns:
        A matplotlib figure, which `figure.savefig(path)` saves.
    """
    values = [float(weight) for weight in weights]
    order = weights.argsort(descending=True)[:most].tolist()
    order = [i for place, i in enumerate(order) if place < 3 or values[i] >= max(0.005, values[order[0]] / 50)]
    labels = [f"{dates[i]} {texts[i]}" if i < len(dates) and dates[i] else str(texts[i]) for i in order]
    title = textwrap.fill(_cut(title, 220), 110)
    title += f"\n{textwrap.fill(_cut(f'Answer: {answer}', 220), 110)}" if answer else ""
    figure, axes = _figure(10, 1 + 0.34 * len(order) + 0.2 * title.count("\n"))
    bars = axes.barh(range(len(order)), [values[i] for i in order], color=_BAR)
    axes.bar_label(bars, [f"{values[i]:.1%}" for i in order], padding=3, fontsize=8)
    axes.axvline(1 / len(values), color="0.5", linestyle="--", linewidth=1, label="all items equal")
    axes.set_yticks(range(len(order)), [_cut(label, 70) for label in labels], fontsize=9, parse_math=False)  # dollars
    axes.invert_yaxis()
    axes.margins(x=0.08)
    rest = len(values) - len(order)
    others = f"; the other {rest} have {1 - sum(values[i] for i in order):.1%} together" if rest else ""
    axes.set_xlabel(f"weight (sum over all {len(values)} items: 1{others})")
    figure.suptitle(title, fontsize=10, x=0.01, horizontalalignment="left", parse_math=False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def heading(results: Mapping[str, Any]) -> str:
    """Return the title of a picture: task, split, numbers of questions and users, and the language model if it is known."""
    settings = results.get("settings", {})
    task = ", ".join(str(part) for part in (results.get("task"), settings.get("split")) if part)
    backbone = str(settings.get("backbone") or "").rstrip("/\\").replace("\\", "/").split("/")[-1]
    asked = f"{results['examples']:,} questions of {results['users']:,} users" if "examples" in results else ""
    return ", ".join(part for part in (": ".join(filter(None, (task, asked))), backbone) if part)


def plot_rows(records: Sequence[Record], metric: str, reference: str, title: str = "") -> Figure:
    """Draw one bar per row of a `Comparison`, with the 95 % interval over users.

    Args:
        records: `Comparison.rows()` of a full comparison.
        metric: which number of theirs.
        reference: the row that stands out, and at whose value a line is drawn.
        title: written above it, as in `heading(results)`.
    """
    figure, axes = _figure(9, 1.5 + 0.36 * len(records), title=title)
    known = 0
    for place, record in enumerate(records):
        is_reference = record["row"] == reference
        axes.barh(place, record[metric], color=_REFERENCE if is_reference else _BAR, height=0.7)
        low, high = record.get("interval") or (None, None)
        end = record[metric]
        if low is not None and high is not None:
            known, end = known + 1, max(high, end)
            axes.errorbar((low + high) / 2, place, xerr=(high - low) / 2, color="0.2", capsize=3, linewidth=1)
        look = {"va": "center", "fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        axes.annotate(f"{record[metric]:.3f}", (end, place), (5, 0), textcoords="offset points", **look)
        if is_reference:
            axes.axvline(record[metric], color="0.5", linestyle="--", linewidth=1)
    names = [record["row"] + (f" ({record['seeds']} seeds)" if record["seeds"] > 1 else "") for record in records]
    axes.set_yticks(range(len(records)), [_cut(name, 50) for name in names], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(
        f"{_named(metric)} ({'95 % interval over users' if known else 'no intervals: they need two users'})"
    )
    return figure


def plot_history_length(results: Mapping[str, Any], metric: str) -> Figure:
    """Draw how a score depends on the length of the history: for users who have so many items (left), and, where there
    are rows NAME:last-N, for the same users with at most N items (right).

    Args:
        results: `Comparison.results()` of a full comparison.
        metric: the task's main one.
    """
    rows = {record["row"]: record for record in results["rows"]}
    looks = {row: _look(place, row == results["reference"]) for place, row in enumerate(rows)}
    newest: dict[str, dict[int, Record]] = {}
    for row, record in rows.items():
        method = read_name(row)
        if isinstance(method, Plug) and method.history == "last" and method.retrieval is None:
            newest.setdefault(method.name, {})[method.items] = record

    title = heading(results)
    figure, axes = _figure(12, 4.8, columns=2, title=title) if newest else _figure(8, 4.8, title=title)
    left = axes[0] if newest else axes
    bins = results["by_history_length"]
    for row, look in looks.items():
        left.plot(_ranges(bins), [b["rows"][row] for b in bins], label=row, **look)
    left.set_xlabel(
        "items in the history (n: questions; means without intervals, which would cover each other)", fontsize=8
    )
    left.set_ylabel(_named(metric))
    if newest:
        _plot_newest(axes[1], newest, rows, looks, metric)
    # Next to the panels, not on them: a bench has a dozen rows or more.
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7, handlelength=3.5
    )
    return figure


def _plot_newest(
    axes: Axes, newest: Mapping[str, Mapping[int, Record]], rows: Records, looks: Records, metric: str
) -> None:
    """Draw the rows NAME:last-N, by NAME and N, and behind them the row NAME, which shows all items."""
    counts = sorted({count for records in newest.values() for count in records})
    ticks = [*map(str, counts), *(["all"] if newest.keys() & rows.keys() else [])]
    for name, records in newest.items():
        drawn = {str(count): records[count] for count in counts if count in records}
        drawn |= {"all": rows[name]} if name in rows else {}
        places = [ticks.index(tick) for tick in drawn]
        look = looks[list(drawn.values())[-1]["row"]]
        axes.plot(places, [record[metric] for record in drawn.values()], label=name, **look)
        if all(None not in record.get("interval", [None]) for record in drawn.values()):
            low, high = zip(*(record["interval"] for record in drawn.values()), strict=True)
            axes.fill_between(places, low, high, alpha=0.2, color=look["color"])
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("newest items shown (95 % interval over users)")
    axes.legend(frameon=False, fontsize=7)


def plot_weight_profiles(profiles: Records, title: str = "") -> Figure:
    """Draw how items are weighted, over all users: by age (left) and by place among the weights (right), without texts.

    Args:
        profiles: row -> profile, from `evaluation/attention_profile.py`.
        title: written above it, as in `heading(results)`.
    """
    figure, axes = _figure(11, 4.5, columns=2, title=title)
    from matplotlib.ticker import MaxNLocator

    for each, name, label in (
        (axes[0], "by_age", "age of the item (1: the newest; n: questions)"),
        (axes[1], "by_rank", "place among the weights (1: the heaviest; n: questions)"),
    ):
        for row, profile in profiles.items():
            places = profile[name]
            ticks = _ranges(places)
            means, low, high = zip(*(p["weight"] for p in places), strict=True)
            each.plot(ticks, means, marker="o", markersize=3, label=row)
            if None not in (*low, *high):
                each.fill_between(ticks, low, high, alpha=0.2)
        each.axhline(1, color="0.5", linestyle="--", linewidth=1, label="all items equal")
        each.set_yscale("log", base=2)
        least, most = each.get_ylim()
        if most < 8 * least:  # too few powers of 2 to read a value from
            each.yaxis.set_major_locator(MaxNLocator(6))
        each.yaxis.set_major_formatter("{x:g}")
        each.tick_params(axis="x", labelrotation=45)
        each.set_xlabel(label)
    axes[0].set_ylabel("weight, in units of the uniform one\n(95 % interval over users)")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def _ranges(places: Sequence[Mapping[str, object]]) -> list[str]:
    """Return labels for points that stand for several lengths or places, with the number of their questions."""
    labels = [f"{p['from']}" if p["from"] == p["to"] else f"{p['from']} to {p['to']}" for p in places]
    return [
        f"{label}\nn = {p['examples']:,}" if "examples" in p else label
        for label, p in zip(labels, places, strict=True)
    ]


def _look(place: int, is_reference: bool) -> dict[str, Any]:
    """Return how a row's line is drawn: ten colours, then the same ones dashed and dotted; the reference row thick and black."""
    line = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3], "linewidth": 1.4}
    if is_reference:
        line = {"color": "black", "linestyle": "-", "linewidth": 2.8}
    return {**line, "marker": "o", "markersize": 3}


def _named(metric: str) -> str:
    """Return a metric's label for an axis. Of errors, unlike all others, fewer are better."""
    _, _, higher_is_better = score_titles().get(metric, ("", "", True))
    return metric if higher_is_better else f"{metric}, less is better"


def _cut(text: str, most: int) -> str:
    """Cut a text to one line of so many letters' width at most, at the end of a word, where its script has words."""
    text, width = " ".join(text.split()), 0
    for place, letter in enumerate(text):
        width += 2 if unicodedata.east_asian_width(letter) in "FW" else 1
        if width > most:
            kept = text[: place - 2]
            words = kept if text[place - 2] == " " else kept.rpartition(" ")[0]
            return f"{(words if len(words) > len(kept) / 3 else kept).rstrip()} …"
    return text


@cache
def _matplotlib() -> tuple[ModuleType, ...]:
    """Import what figures and what draws them without a screen."""
    return tuple(require(f"matplotlib.{name}", "viz", "Drawing") for name in ("figure", "backends.backend_agg"))


def _figure(width: float, height: float, columns: int = 1, title: str = "") -> tuple[Figure, Any]:
    """Make a figure with a title and its axes, drawn without a screen."""
    figures, canvases = _matplotlib()
    figure = figures.Figure((width, height), dpi=120, layout="constrained")
    canvases.FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    if title:
        figure.suptitle(_cut(title, 110), fontsize=10, x=0.01, horizontalalignment="left", parse_math=False)
    for each in axes if columns > 1 else [axes]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
