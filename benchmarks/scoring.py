"""Is scoring a predictions file bound by rouge-score itself?

    python benchmarks/scoring.py --predictions 100000

Makes headlines of random words, scores them with `pplug_hf.tasks.task.score` and with the command's function
(both files read and checked), and divides by the time of a plain loop over rouge-score. Repetitions are interleaved, so
that a busy machine slows all of them; medians are printed. Also the seconds of a label task and of a rating task.
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from pplug_hf.commands.score import ScoreSettings, score_files
from pplug_hf.tasks.task import get_task, score


def headlines(n: int, seed: int) -> list[str]:
    """Texts of 5 to 15 words out of 2000."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 15))).capitalize() for _ in range(n)]


def plain_loop(predictions: list[str], golds: list[str]) -> None:
    """What anybody would write with rouge-score alone."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    sums = [0.0, 0.0]
    for prediction, gold in zip(predictions, golds, strict=True):
        scores = scorer.score(gold, prediction)
        sums[0] += scores["rouge1"].fmeasure
        sums[1] += scores["rougeL"].fmeasure


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--predictions", type=int, default=10_000, help="how many")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    n = args.predictions
    predictions, golds = headlines(n, 0), headlines(n, 1)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder) / f"{name}.json") for name in ("golds", "predictions")}
        for name, texts in (("golds", golds), ("predictions", predictions)):
            rows = [{"id": str(i), "output": text} for i, text in enumerate(texts)]
            Path(files[name]).write_text(json.dumps({"task": "LaMP_4", "golds": rows}))
        runs = {
            "rouge-score, plain loop": lambda: plain_loop(predictions, golds),
            "score": lambda: score("LaMP-4", predictions, golds),
            "pplug-hf score": lambda: score_files(ScoreSettings(**files)),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repetition in range(args.repetitions + 1):
            for name, run in runs.items():
                took = seconds(run)
                if repetition:  # the first warms up
                    times[name].append(took)
    base = statistics.median(times["rouge-score, plain loop"])
    print(f"{n:,} headlines, median of {args.repetitions} interleaved repetitions")
    for name, took in times.items():
        print(f"  {name:24} {statistics.median(took):8.2f} s  {statistics.median(took) / base:5.2f} times rouge-score")
    for name in ("LaMP-2", "LaMP-3"):
        rng = random.Random(0)
        labels = get_task(name).labels
        right, given = rng.choices(labels, k=n), rng.choices([*labels, "none of these"], k=n)
        took = statistics.median(seconds(lambda: score(name, given, right)) for _ in range(args.repetitions))  # noqa: B023
        print(f"  {name:24} {took:8.2f} s")


if __name__ == "__main__":
    main()
