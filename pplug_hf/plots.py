"""The picture of a persona: which history items speak for a request."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError("Pictures need matplotlib: pip install 'pplug-hf[viz]'.") from None

    order = weights.argsort(descending=True)[:most].tolist()
    shown = [textwrap.shorten(str(texts[i]), 70, placeholder=" …") for i in order]
    figure = Figure(figsize=(10, 0.9 + 0.34 * len(order)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(range(len(order)), [float(weights[i]) for i in order], color="#4c72b0")
    axes.axvline(1 / len(weights), color="0.5", linestyle="--", linewidth=1, label="all items equal")
    axes.set_yticks(range(len(order)), shown, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"weight (sum over all {len(weights)} items: 1)")
    figure.suptitle(textwrap.fill(title, 110), fontsize=10, x=0.01, horizontalalignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
