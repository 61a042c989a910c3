"""Do plugs know the questions? LaMP-2 by whether training had the question's text, asked or in a history.

python benchmarks/llm/seen.py --data ../shared/lamp --results runs/llm --reference pplug-k8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from corpus import SPLIT_SEED, VALIDATION_USERS, _some, split_users
from tables import answers_of, compared, load, rows_of

from pplug_hf import read_lamp
from pplug_hf.tasks.items import normalise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--results", type=Path, required=True, help="folder of run.py")
    parser.add_argument("--reference", default="pplug", help="row to compare with (default: %(default)s)")
    args = parser.parse_args()
    task, train = read_lamp(args.data / "LaMP_2", "train")
    texts = [e.query for e in train] + [task.question(item, e.prompt)[1] for e in train for item in e.history]
    known = set(map(normalise, texts))
    found = [group for group in load(args.results)[1] if group["task"] == task.name and group["answers"]]
    val = rows_of(found, "val")
    count = len(next(iter(next(iter(val.values())).values()))["nll"])
    held_out = _some(split_users(train, VALIDATION_USERS, SPLIT_SEED, nearest=True)[1], count)
    for split in ("dev", "test"):
        examples = read_lamp(args.data / "LaMP_2", split)[1]
        seen = np.array([normalise(e.query) in known for e in examples])
        golds = [task.label_of(e.target) for e in examples]
        answers = answers_of(task, rows_of(found, split), val, examples, held_out)
        right = {
            name: np.mean([[a == g for a, g in zip(said, golds, strict=True)] for said in seeds.values()], axis=0)
            for name, seeds in answers.items()
        }
        for part, chosen in (("seen", seen), ("unseen", ~seen)):
            users = [e.user for e, is_in in zip(examples, chosen, strict=True) if is_in]
            print(f"{split}, {part}: {len(users)} questions of {len(set(users))} users")
            for name, hits in right.items():
                facts = compared((right[args.reference] - hits)[chosen], users)
                mean, low, high = facts["better"]
                print(
                    f"  {name:40} {hits[chosen].mean():.3f}  {mean:+.3f} [{low:+.3f}, {high:+.3f}]  p {facts['p']:.4f}"
                )


if __name__ == "__main__":
    main()
