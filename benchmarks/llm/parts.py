"""Which questions does a history help with? Rows of run.py on parts of the questions, one row compared with the others.

    python benchmarks/llm/parts.py --data ../shared/lamp --results runs/llm --task LaMP_2 --by seen --reference pplug-k8
    python benchmarks/llm/parts.py ... --by history

`seen` divides by whether the train split has the question's text, asked or in a history; `history` divides the users into
thirds by the length of theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from corpus import TASKS
from tables import answers_of, asked, compared, load, nats_of, rows_of, scores_of

from pplug_hf import read_lamp
from pplug_hf.data.records import Example
from pplug_hf.tasks.items import normalise
from pplug_hf.tasks.task import Task, higher_is_better


def by_seen(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return the part of the questions whose text is in the train split, and the others, as masks [n]."""
    texts = [e.query for e in train] + [task.question(item, e.prompt)[1] for e in train for item in e.history]
    known = set(map(normalise, texts))
    seen = np.array([normalise(e.query) in known for e in examples])
    return {"seen": seen, "unseen": ~seen}


def by_history(task: Task, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return the questions of the third of the users with the shortest histories, and so on, as masks [n]."""
    lengths = {e.user: len(e.history) for e in examples}
    thirds = np.array_split(sorted(lengths, key=lambda user: (lengths[user], user)), 3)
    users = np.array([e.user for e in examples])
    return {f"{lengths[part[0]]} to {lengths[part[-1]]} items": np.isin(users, part) for part in thirds}


def main() -> None:
    """Print each part of dev and test: every row's metric and nats, and by how much the reference is better."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--results", type=Path, required=True, help="results.tar, or the output folder of run.py")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--by", choices=("seen", "history"), required=True)
    parser.add_argument("--reference", default="pplug", help="row to compare with (default: %(default)s)")
    args = parser.parse_args()
    about, found = load(args.results)
    found = [group for group in found if group["group"].startswith(f"{args.task}-")]
    corpus = asked(args.data, args.task, about)
    task, train = read_lamp(args.data / args.task, "train")
    divide, val = {"seen": by_seen, "history": by_history}[args.by], rows_of(found, "val")
    for split in ("dev", "test"):
        examples, rows = corpus.examples(split), rows_of(found, split)
        answers = answers_of(task, rows, val, examples, corpus.examples("val"))
        gains = {"metric": {name: scores_of(task, examples, of) for name, of in answers.items()}}
        gains["nats"] = {name: nats_of(of) for name, of in rows.items()}
        for part, mask in divide(task, train, examples).items():
            users = [e.user for e, is_in in zip(examples, mask, strict=True) if is_in]
            print(f"{split}, {part}: {len(users)} questions of {len(set(users))} users")
            for kind, values in gains.items():
                if args.reference not in values:
                    continue
                sign = 1 if kind == "nats" or higher_is_better(task) else -1
                for name, value in values.items():
                    facts = compared(sign * (values[args.reference] - value)[mask], users)
                    mean, low, high = facts["better"]
                    row = f"  {kind:6} {name:40} {value[mask].mean():7.3f}"
                    print(f"{row}  {mean:+.3f} [{low:+.3f}, {high:+.3f}]  p {facts['p']:.4f}")


if __name__ == "__main__":
    main()
