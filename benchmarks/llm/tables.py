"""Tables and prediction files from the results of run.py, on a CPU.

    python benchmarks/llm/tables.py --results runs/llm/results.tar --data ../shared/lamp --output runs/llm/tables

For every task and split: the official metric of each row (mean and deviation over seeds), by how much PPlug (or another row, `--reference`) is better with a
95 % interval over users, the same as a mean over users, the p-value of sign flips over users (Holm's correction over the
table), the smallest difference that these users can show, and nats per token of the right answer. Labels are chosen by
their likelihood, as the task's metric wants them: the most likely one, or for a mean absolute error the median.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import TASKS, Corpus
from plan import groups
from run import sizes_of

from pplug_hf.data.records import Example
from pplug_hf.evaluation.compare import Comparison, to_json
from pplug_hf.evaluation.predictions import Prediction, file_name, write_prediction
from pplug_hf.evaluation.user_statistics import (
    bootstrap_mean,
    holm,
    paired_bootstrap,
    sign_flip,
    smallest_difference,
    user_means,
)
from pplug_hf.methods.label_frequencies import LabelMixture, history_labels
from pplug_hf.storage.files import write_text
from pplug_hf.tasks.metrics import get_metric
from pplug_hf.tasks.task import Task, higher_is_better, main_metric, per_example

COUNTED = ("instruction-only", "instruction-only-mlp", "instruction-only-mlp-k8", "pplug", "pplug-k8")
COUNTED += (
    "instruction-only-mlp-together",
    "pplug-together",
    "instruction-only-mlp-from-together",
    "pplug-from-together",
)
MIXED = {"frequencies": "no-persona", **{f"{row} x frequencies": row for row in COUNTED}}


def load(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what results were made with, and those of all groups, from a folder or a results.tar."""
    if results.is_dir():
        about = json.loads((results / "about.json").read_text())
        return about, [json.loads(gzip.decompress(p.read_bytes())) for p in sorted(results.glob("groups/*.json.gz"))]
    with tarfile.open(results) as tar:
        files = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.isfile()}
        read = {name: file.read() for name, file in files.items() if file}
    found = [json.loads(gzip.decompress(read[name])) for name in sorted(read) if name.endswith(".json.gz")]
    return json.loads(read["about.json"]), found


def rows_of(found: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Return row -> seed -> what it says to a split, in the order of the plan."""
    rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for group in found:
        for name, said in group["answers"].get(split, {}).items():
            rows[name][group["seed"]] = said
    return dict(rows)


def chosen(task: Task, log_probs: Any) -> list[str]:
    """Return the label with the best expected score of each example, given [n, L]."""
    scores = torch.tensor(log_probs, dtype=torch.float64).log_softmax(dim=-1).numpy()
    return [task.labels[best] for best in get_metric(task.metric).best_labels(scores, task.labels)]


def answers_of(
    task: Task,
    rows: Mapping[str, Any],
    val: Mapping[str, Any],
    examples: Sequence[Example],
    held_out: Sequence[Example],
) -> dict[str, dict[int, list[str]]]:
    """Return row -> seed -> answers; with the label frequencies, fitted on held-out training users, mixed in."""
    made: dict[str, dict[int, list[str]]] = {}
    for name, seeds in rows.items():
        if task.labels:
            made[name] = {seed: chosen(task, said["labels"]) for seed, said in seeds.items()}
        elif any("answers" in said for said in seeds.values()):
            made[name] = {seed: said["answers"] for seed, said in seeds.items() if "answers" in said}
    if not (task.labels and task.answer_field):
        return made
    golds = [task.label_of(e.target) for e in held_out]
    known, asked = [history_labels(e, task) for e in held_out], [history_labels(e, task) for e in examples]
    for name, base in MIXED.items():
        for seed, said in rows.get(base, {}).items():
            if (fitted := val.get(base, {}).get(seed)) is None:
                continue
            mixture = LabelMixture.fit(torch.tensor(fitted["labels"]), known, golds, task.labels)
            answers = mixture.predict(torch.tensor(said["labels"]), asked, task.metric)
            made.setdefault(name, {})[seed] = answers
    return made


def scores_of(task: Task, examples: Sequence[Example], answers: Mapping[int, list[str]]) -> np.ndarray:
    """Return the score of each answer [n], the mean over seeds."""
    golds = [e.target or "" for e in examples]
    return np.mean([per_example(task, given, golds) for given in answers.values()], axis=0)


def nats_of(runs: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """Return the log-likelihood per token of each right answer [n], the mean over seeds."""
    return -np.mean([np.array(said["nll"]) / np.array(said["tokens"]) for said in runs.values()], axis=0)


def compared(gain: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    """Return all that is said about differences [n]: mean, interval, mean over users, p, what could be shown."""
    means, _ = user_means(gain, users)
    return {
        "better": _plain(paired_bootstrap(gain, np.zeros(len(gain)), users)),
        "per_user": _plain(bootstrap_mean(means, list(range(len(means))))),
        "p": sign_flip(gain, users),
        "smallest": smallest_difference(gain, users),
        "users": [int((means > 1e-9).sum()), int((abs(means) <= 1e-9).sum()), int((means < -1e-9).sum())],
    }


def _plain(interval: Sequence[float]) -> list[float]:
    return [float(value) for value in interval]


def records_of(
    task: Task,
    examples: Sequence[Example],
    rows: Mapping[str, Any],
    answers: Mapping[str, Mapping[int, list[str]]],
    reference: str,
) -> list[dict[str, Any]]:
    """Return one record per row."""
    users = [e.user for e in examples]
    comparison = Comparison(task, examples, reference, {n: list(of.values()) for n, of in answers.items()}, full=True)
    official = {record["row"]: record for record in comparison.rows()}
    sign = 1 if higher_is_better(task) else -1
    scores = {name: scores_of(task, examples, of) for name, of in answers.items()}
    nats = {name: nats_of(of) for name, of in rows.items()}
    records = []
    for name in [*rows, *(name for name in answers if name not in rows)]:
        record: dict[str, Any] = {"row": name, "seeds": len(rows.get(name) or answers[name]), **official.get(name, {})}
        if name in answers and reference in answers and name != reference:
            record["metric"] = compared(sign * (scores[reference] - scores[name]), users)
        if name in rows:
            record["nats"] = float(nats[name].mean())
            if reference in rows and name != reference:
                record["likelihood"] = compared(nats[reference] - nats[name], users)
        records.append(record)
    for kind in ("metric", "likelihood"):
        tested = [record[kind] for record in records if kind in record]
        for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
            one["p_holm"] = p
    return records


def table(task: Task, records: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Return the records as people read them."""
    metrics = [name for name, _, _ in get_metric(task.metric).titles if any(name in record for record in records)]
    kinds = {"metric": main_metric(task), "likelihood": "nats per token"}
    head = ["row", "seeds", *metrics, "nats per token", *(["style"] if any("style" in r for r in records) else [])]
    for title in kinds.values():
        head += [f"{reference} better, {title} [95 %]", "mean of users", "p (Holm)", "smallest"]
    lines = [head, ["---"] * len(head)]
    for record in records:
        cells = [record["row"], str(record["seeds"])]
        for name in metrics:
            spread = record.get(f"{name}_sd")
            value = f"{record[name]:.3f}" if name in record else ""
            cells.append(value + (f" ± {spread:.3f}" if spread is not None else ""))
        cells.append(f"{record['nats']:.3f}" if "nats" in record else "")
        if "style" in head:
            cells.append(f"{record['style'][0]:.3f}" if record.get("style") else "")
        for kind in kinds:
            cells += _compared_cells(record.get(kind))
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _compared_cells(one: Mapping[str, Any] | None) -> list[str]:
    if one is None:
        return [""] * 4
    mean, low, high = one["better"]
    p = "<.001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}"
    return [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", f"{one['per_user'][0]:+.3f}", p, f"{one['smallest']:.3f}"]


def costs(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what was trained: rates, losses on held-out users, weights, and time of each group."""
    lines = [
        "| group | plug | learning rate | loss per token on held-out users | weights | steps | seconds of the group |"
    ]
    lines.append("| --- " * 7 + "|")
    for group in found:
        seconds = f"{group['seconds']['train']} + {group['seconds']['ask']}"
        for name, plug in (group["plugs"] or {"-": {}}).items():
            cells = [group["group"], name, plug.get("rate", ""), plug.get("loss", ""), plug.get("weights", "")]
            cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
            lines.append("| " + " | ".join([*cells, str(group["steps"]), seconds]) + " |")
    return "\n".join(lines)


def asked(data: Path, task: str, about: Mapping[str, Any]) -> Corpus:
    """Return the corpus that results come from; it encodes and tokenises nothing."""
    return Corpus(data, task, None, None, data, sizes_of(about["smoke"]), about.get("for_selectors", False))


def main() -> None:
    """Write all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results.tar, or the output folder of run.py")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--reference", default="pplug", help="row that the others are compared with")
    parser.add_argument("--predictions", action="store_true", help="also write each row's answers")
    args = parser.parse_args()
    about, found = load(args.results)
    order = {group.key: (group.level, i) for i, group in enumerate(groups())}
    found.sort(key=lambda group: order.get(group["group"], (99, 0)))
    for folder in TASKS:
        mine = [group for group in found if group["group"].startswith(f"{folder}-")]
        if not mine:
            continue
        corpus = asked(args.data, folder, about)
        val = rows_of(mine, "val")
        for split in ("dev", "test"):
            rows = rows_of(mine, split)
            if not rows:
                continue
            name = f"{folder.lower().replace('_', '-')}-{split}"
            examples, held_out = corpus.examples(split), corpus.examples("val")
            answers = answers_of(corpus.task, rows, val, examples, held_out)
            records = records_of(corpus.task, examples, rows, answers, args.reference)
            users = len({e.user for e in examples})
            text = f"# {corpus.task.name}, {split}: {len(examples)} questions of {users} users\n\n"
            write_text(args.output / name / "table.md", text + table(corpus.task, records, args.reference) + "\n")
            write_text(args.output / name / "results.json", to_json({"about": about, "rows": records}))
            if args.predictions:
                for row, runs in answers.items():
                    for seed, given in runs.items():
                        said = {e.id: one for e, one in zip(examples, given, strict=True)}
                        file = file_name(row.replace(" ", "_"), seed)
                        made = Prediction(row, seed, {"row": row, "seed": seed}, about, said, file)
                        write_prediction(args.output / name / "predictions", corpus.task, made)
            print(text.strip(), f"{len(records)} rows", sep=", ")
        write_text(args.output / f"{folder.lower().replace('_', '-')}-training.md", costs(mine) + "\n")


if __name__ == "__main__":
    main()
