"""Renders speed.json as one Markdown page with plots.

python benchmarks/speed/page.py            # again from the JSON that is there
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent.parent / "results" / "speed"


def render(folder: Path = FOLDER) -> None:
    """README.md and the pictures beside `folder`/speed.json."""
    results = json.loads((folder / "speed.json").read_text())
    figures = [figure for script in results["scripts"] for figure in script["figures"]]
    _targets(figures, folder / "targets.png")
    growth = next((f["growth"] for f in figures if "growth" in f), None)
    if growth:
        _growth({int(n): seconds for n, seconds in growth.items()}, folder / "growth.png")
    stages = {f["name"]: f["stages"] for f in figures if "stages" in f}
    if stages:
        _stages(stages, folder / "stages.png")
    (folder / "README.md").write_text(_page(results, figures, bool(growth), stages))


def _page(results: dict[str, Any], figures: list[dict[str, Any]], growth: bool, stages: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items() if value is not None)
    lines = [
        "# Speed",
        "",
        "How much time and memory a persona plug adds, and how much faster the package is than code that one would write first",
        "(`benchmarks/speed/reference.py`). In short: nearly all the time goes into the frozen language model, which a plug cannot",
        "make faster; what the plug itself adds is small. The table has all figures, those that miss their target included; the sections",
        "below say what was measured and how.",
        "",
        "The two sides of a figure take turns on one machine; a ratio is the median of the ratios of single repetitions, with its",
        "range. Every script checks that both sides computed the same numbers. Weights are random, and data are synthetic with",
        "LaMP's lengths.",
        "",
        f"Machine: {machine}.",
        "",
        "| figure | ratio [range] | target | met |",
        "|---|---|---|---|",
    ]
    for f in figures:
        if f["ratio"]:
            met = {True: "yes", False: "**no**", None: ""}[f["met"]]
            lines.append(f"| {f['name']} | {_range(f['ratio'])} | {f['target'] or ''} | {met} |")
    lines += ["", "![How far each figure is from its target](targets.png)", ""]
    if growth:
        lines += ["![Time of a persona embedding against the number of items](growth.png)", ""]
    if stages:
        lines += ["Where a training step's time goes:", "", "![Stages of a training step](stages.png)", ""]
    for script in results["scripts"]:
        lines += [f"## {script['title']}", "", *script["description"], ""]
        lines += [f"`python benchmarks/speed/{script['script']}`", ""]
        if own := script.get("machine"):
            versions = f"torch {own['torch']}, transformers {own['transformers']}"
            busy = f"load average {own['load_average']:.1f} before the start"
            lines += [f"Measured on {own['date']}, {own['threads']} threads, {busy}, {versions}.", ""]
        for f in script["figures"]:
            lines += [f"**{f['name']}**", ""]
            lines += [f"- {side}: {_range(v)} {v.get('unit', 's')}" for side, v in f["sides"].items()]
            lines += [f"- {name.replace('_', ' ')}: {_value(v)}" for name, v in _more(f).items()]
            lines += [f"- check, {name}: {_value(v)}" for name, v in f["checks"].items()]
            lines.append("")
    lines += [
        "## With a GPU",
        "",
        results.get("gpu")
        or "`python benchmarks/speed/gpu.py` measures a FlanT5-XXL-shaped and a Llama-2-7B-shaped backbone in bf16. No GPU "
        "was there when this page was made: it awaits one. With `--small` the same script runs on a CPU.",
        "",
        "This page is made by `python benchmarks/speed/all.py`; do not edit it.",
        "",
    ]
    return "\n".join(lines)


def _more(one: dict[str, Any]) -> dict[str, Any]:
    known = ("name", "sides", "ratio", "target", "met", "checks", "growth")
    return {key: value for key, value in one.items() if key not in known}


def _range(value: dict[str, Any]) -> str:
    if value["n"] == 1 or value["min"] == value["max"]:
        return f"{value['median']:.3g}"
    return f"{value['median']:.3g} [{value['min']:.3g}, {value['max']:.3g}]"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return _range(value) if "median" in value else ", ".join(f"{k} {v:.1%}" for k, v in value.items())
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _targets(figures: list[dict[str, Any]], path: Path) -> None:
    """Bars: how much better (right of the line) or worse than its target every figure is."""
    rows = [f for f in figures if f["target"]][::-1]
    factors = []
    for f in rows:
        sign, target = f["target"].split()
        ratio = max(f["ratio"]["median"], 1e-3)
        factors.append(ratio / float(target) if sign == ">=" else float(target) / ratio)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1))
    axes.barh([f["name"] for f in rows], factors, color=["#3a7" if f["met"] else "#c55" for f in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times better than the target (1 = just met)")
    _save(figure, path)


def _growth(growth: dict[int, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5))
    n, seconds = list(growth), list(growth.values())
    axes.loglog(n, seconds, "o-", label="persona embedding")
    axes.loglog(n, [seconds[-1] * i / n[-1] for i in n], ":", color="gray", label="linear")
    axes.set_xlabel("items of the history")
    axes.set_ylabel("seconds")
    axes.legend()
    _save(figure, path)


def _stages(stages: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(stages) + 1.4))
    names, left = list(stages), [0.0] * len(stages)
    for stage in next(iter(stages.values())):
        shares = [stages[name][stage] for name in names]
        axes.barh(names, shares, left=left, label=f"{stage}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_xlabel("share of the step's time")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    render()
