"""Answers at several strengths of the persona: the metric, and the distance to the user's style.

    make demo-llm && python benchmarks/strength.py --plug demo-llm-output/plug
    pplug-hf demo && python benchmarks/strength.py --demo demo-output/plug

The first takes headlines of the synthetic users of examples/writing_styles, who are not in the training data; the second the
readers of the demo. Strength 1 is the plug as trained and 0 is nobody. Both write into one page, and draw what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pplug_hf import BenchSettings, bench, register_metric

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "writing_styles"))

STRENGTHS = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)
ROWS = {a: "pplug" if a == 1 else f"pplug:strength-{a:g}" for a in STRENGTHS}
DEMO, HEADLINES = "shelves of the demo's readers", "headlines in the user's style"


PAGE = """# Strength of the persona

<!-- figures -->
`python benchmarks/strength.py`; 1 is the plug as trained, 0 is nobody. Style distance is the share of other users whose writing
an answer resembles more than its own user's, so .5 is what one answer for everybody gets; the other columns are shares of answers.

![Accuracy, shares in the user's style and style distance over the strength of the persona.](strength.png)

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plug", help="plug of make demo-llm")
    parser.add_argument("--demo", help="plug of pplug-hf demo")
    parser.add_argument("--users", type=int, default=2, help="a dozen users, this many times (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the language model (default: %(default)s)")
    parser.add_argument("--runs", default="runs/strength", help="folder of the benches (default: %(default)s)")
    parser.add_argument("--output", default=ROOT / "benchmarks" / "results" / "strength", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "strength.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if arguments.demo:
        found[DEMO] = readers(arguments)
    if arguments.plug:
        found[HEADLINES] = headlines(arguments)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = PAGE + "\n".join(as_table(*pair) for pair in found.items())
    (arguments.output / "README.md").write_text(page, encoding="utf-8")
    draw(found, arguments.output / "strength.png")
    print(page)


def readers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask the demo's readers."""
    with as_file(files("pplug_hf.demo") / "assets" / "data") as data:
        return ask(arguments, "demo", arguments.demo, str(data), task="demo")


def headlines(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ask for headlines of users who are not in the training data."""
    from demo_llm import TASK
    from styles import WritingStyle, make_examples

    class InStyle(WritingStyle):
        """The same share under a name of its own: the bench calls another measure "style"."""

        name, main = "in-style", "in_style"
        titles = (("in_style", "in the user's style", ""), *WritingStyle.titles[1:])

    register_metric(InStyle(), exist_ok=True)
    rows = [
        {"id": e.id, "user_id": e.user, "input": e.prompt, "output": e.target, "profile": list(e.history)}
        for e in make_examples("test", arguments.users, 3, 0)
    ]
    return ask(
        arguments, "headlines", arguments.plug, "", task=replace(TASK, metric=InStyle.name), data={"test": rows}
    )


def ask(arguments: argparse.Namespace, name: str, plug: str, folder: str, task: Any, **options: Any) -> dict[str, Any]:
    """Return for each strength the shares that the bench measured, and the share of other users' styles that are closer."""
    settings = BenchSettings(
        data=folder or name,
        task=task if isinstance(task, str) else None,
        split="test" if options else "dev",
        output=f"{arguments.runs}/{name}",
        rows=list(ROWS.values()),
        plugs=[f"pplug={plug}"],
        backbone_dtype=arguments.dtype,
        vectors=f"{arguments.runs}/vectors",
    )
    comparison = bench(settings, task=None if isinstance(task, str) else task, **options)
    records = {record["row"]: record for record in comparison.rows()}
    users = len({e.user for e in comparison.examples})
    found: dict[str, Any] = {"asked": f"{len(comparison.examples)} questions of {users} users", "strengths": {}}
    for a, row in ROWS.items():
        record = records[row]
        numbers = {key: value for key, value in record.items() if isinstance(value, float) and key in SHOWN}
        if record.get("style"):
            numbers["style distance"] = 1 - record["style"][0]
        found["strengths"][f"{a:g}"] = {key: round(value, 3) for key, value in numbers.items()}
    return found


SHOWN = ("accuracy", "in_style", "form", "case", "end")


def as_table(title: str, found: dict[str, Any]) -> str:
    """Return the numbers of one bench as Markdown."""
    columns = list(next(iter(found["strengths"].values())))
    lines = [f"## {title[0].upper()}{title[1:]}: {found['asked']}\n", "| strength | " + " | ".join(columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for a, numbers in found["strengths"].items():
        lines.append(f"| {a} | " + " | ".join(f"{numbers[column]:.3f}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw one panel for each bench."""
    figure = Figure((5.2 * len(found), 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, made) in zip(panels, found.items(), strict=True):
        at = [float(a) for a in made["strengths"]]
        for key in next(iter(made["strengths"].values())):
            main = key in ("accuracy", "in_style")
            style = {"color": "#24528f", "linewidth": 2.4} if main else {"linewidth": 1.2}
            style |= {"linestyle": "--", "color": "#c0504d"} if key == "style distance" else {}
            axes.plot(at, [n[key] for n in made["strengths"].values()], marker="o", ms=4, label=key, **style)
        axes.axvline(1, color="0.6", linestyle=":", linewidth=1)
        axes.set(xlabel="strength of the persona", ylim=(0, 1.02))
        axes.set_title(f"{title}\n({made['asked']})", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
