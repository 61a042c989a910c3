"""Pictures: which history items speak for a request, and how the rows of a bench compare."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import ConfigurationError


def plot_weights(
    weights: Tensor, texts: Sequence[str], path: str | os.PathLike, title: str = "", most: int = 12
) -> None:
    """Horizontal bars of the heaviest items' weights, as a PNG. It shows the user's own texts: keep it private.

    Args:
        weights: [N] from `model.persona_weights(...)[0]`.
        texts: [N] what to write beside each bar.
        path: where the picture goes.
        title: written above it.
        most: show this many items.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    order = weights.argsort(descending=True)[:most].tolist()
    shown = [textwrap.shorten(str(texts[i]), 70, placeholder=" …") for i in order]
    figure, axes = _figure(10, 0.9 + 0.34 * len(order))
    axes.barh(range(len(order)), [float(weights[i]) for i in order], color="#4c72b0")
    axes.axvline(1 / len(weights), color="0.5", linestyle="--", linewidth=1, label="all items equal")
    axes.set_yticks(range(len(order)), shown, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"weight (sum over all {len(weights)} items: 1)")
    figure.suptitle(textwrap.fill(title, 110), fontsize=10, x=0.01, horizontalalignment="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def plot_rows(records: Sequence[Mapping[str, Any]], metric: str, reference: str, path: str | os.PathLike) -> None:
    """One bar per row of a `Comparison`, with the 95 % interval over users, as a PNG.

    Args:
        records: `Comparison.rows()` of a full comparison.
        metric: which number of theirs.
        reference: the row that stands out, and at whose value a line is drawn.
        path: where the picture goes.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _figure(9, 1.2 + 0.36 * len(records))
    for place, record in enumerate(records):
        colour = "#c44e52" if record["row"] == reference else "#4c72b0"
        axes.barh(place, record[metric], color=colour, height=0.7)
        low, high = record.get("interval") or (None, None)
        if low is not None and high is not None:
            middle = (low + high) / 2
            axes.errorbar(middle, place, xerr=(high - low) / 2, color="0.2", capsize=3, linewidth=1)
        if record["row"] == reference:
            axes.axvline(record[metric], color="0.5", linestyle="--", linewidth=1)
    names = [record["row"] + (f" ({record['seeds']} seeds)" if record["seeds"] > 1 else "") for record in records]
    axes.set_yticks(range(len(records)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (95 % interval over users)")
    figure.savefig(path, dpi=120)


def plot_history_length(results: Mapping[str, Any], metric: str, path: str | os.PathLike) -> None:
    """How a score depends on the length of the history, as a PNG: of the users who have so many items (left), and, where
    there are rows NAME:last-N, of the same users with no more than N shown (right).

    Args:
        results: `Comparison.results()` of a full comparison.
        metric: the task's main one.
        path: where the picture goes.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _figure(11, 4.5, columns=2)
    bins = results["by_history_length"]
    labels = [f"{b['from']}" if b["from"] == b["to"] else f"{b['from']} to {b['to']}" for b in bins]
    for record in results["rows"]:
        axes[0].plot(labels, [b["rows"][record["row"]] for b in bins], marker="o", markersize=3, label=record["row"])
    axes[0].set_xlabel("items in the history")
    axes[0].set_ylabel(metric)
    axes[0].legend(frameon=False, fontsize=7)

    shown: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for record in results["rows"]:
        name, found, number = record["row"].partition(":last-")
        if found and number.isdecimal():
            shown.setdefault(name, []).append((int(number), record))
    whole = {record["row"]: record for record in results["rows"]}
    for name, points in shown.items():
        points.sort(key=lambda point: point[0])
        ticks = [str(number) for number, _ in points] + (["all"] if name in whole else [])
        drawn = [record for _, record in points] + ([whole[name]] if name in whole else [])
        axes[1].plot(ticks, [record[metric] for record in drawn], marker="o", markersize=3, label=name)
        if all(None not in record.get("interval", [None]) for record in drawn):
            low, high = zip(*(record["interval"] for record in drawn), strict=True)
            axes[1].fill_between(ticks, low, high, alpha=0.2)
    axes[1].set_xlabel("newest items shown (95 % interval over users)")
    if shown:
        axes[1].legend(frameon=False, fontsize=7)
    else:
        axes[1].set_visible(False)
    figure.savefig(path, dpi=120)


def plot_weight_profiles(profiles: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Which items speak, over all users, as a PNG: by age (left) and by place among the weights (right). It shows no text.

    Args:
        profiles: row -> what `evaluation/weights.py` says.
        path: where the picture goes.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _figure(11, 4.2, columns=2)
    for each, name, label in (
        (axes[0], "by_age", "age of the item (1: the newest)"),
        (axes[1], "by_rank", "place among the weights (1: the heaviest)"),
    ):
        for row, profile in profiles.items():
            places = profile[name]
            ticks = [f"{p['from']}" if p["from"] == p["to"] else f"{p['from']} to {p['to']}" for p in places]
            means, low, high = zip(*(p["weight"] for p in places), strict=True)
            each.plot(ticks, means, marker="o", markersize=3, label=row)
            if None not in (*low, *high):
                each.fill_between(ticks, low, high, alpha=0.2)
        each.axhline(1, color="0.5", linestyle="--", linewidth=1, label="all items equal")
        each.set_yscale("log", base=2)
        each.yaxis.set_major_formatter("{x:g}")
        each.tick_params(axis="x", labelrotation=45)
        each.set_xlabel(label)
    axes[0].set_ylabel("weight, in units of the uniform one\n(95 % interval over users)")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("Pictures need matplotlib: pip install 'pplug-hf[viz]'.") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for each in axes if columns > 1 else [axes]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
