"""Does memory stay flat when a large questions file is read into a table?

    python benchmarks/memory.py --megabytes 2000

Makes a LaMP-4 split of that size in a temporary folder, reads it with `pplug_hf.data.tables.read_table` in a fresh
process, and prints the peak of its resident memory before and after. For comparison, --whole reads the same file with
`read_lamp`, which holds everything.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def make(folder: Path, megabytes: float, items: int = 100) -> int:
    """Writes dev_questions.json and dev_outputs.json, row by row; texts of random words. Returns the rows."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    number, golds = 0, []
    with (folder / "dev_questions.json").open("w") as file:
        file.write("[")
        while file.tell() < megabytes * 1e6:
            profile = [
                {
                    "id": f"{number}-{i}",
                    "text": " ".join(rng.choices(words, k=40)),
                    "title": " ".join(rng.choices(words, k=8)),
                    "date": f"{2000 + i // 10}-01-01",
                }
                for i in range(items)
            ]
            question = "Generate a headline for the following article: " + " ".join(rng.choices(words, k=40))
            row = {"id": str(number), "user_id": f"u{number}", "input": question, "profile": profile}
            file.write((", " if number else "") + json.dumps(row))
            golds.append({"id": str(number), "output": " ".join(rng.choices(words, k=8))})
            number += 1
        file.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
    return number


def read(folder: str, whole: bool) -> dict[str, float]:
    """Reads the split and measures this process."""
    import datasets  # noqa: F401  (what is loaded anyway does not count)
    import ijson  # noqa: F401
    import pyarrow  # noqa: F401

    from pplug_hf.data.lamp import read_lamp
    from pplug_hf.data.tables import read_table

    before, started = _peak(), time.perf_counter()
    rows = read_lamp(folder, "dev")[1] if whole else read_table(folder, "dev", folder=folder).rows
    return {
        "rows": len(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_before_mb": round(before, 1),
        "peak_mb": round(_peak(), 1),
        "growth_mb": round(_peak() - before, 1),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=2000, help="size of the questions file")
    parser.add_argument("--whole", action="store_true", help="also read it with read_lamp, all in memory")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="pplug-hf-memory-") as folder:
        rows = make(Path(folder), args.megabytes)
        size = (Path(folder) / "dev_questions.json").stat().st_size / 1e6
        results: dict[str, object] = {"megabytes": round(size, 1), "rows": rows}
        context = multiprocessing.get_context("spawn")  # a fork would start with this process's peak
        for name, whole in (("reading", False), *((("whole", True),) if args.whole else ())):
            with context.Pool(1) as pool:
                results[name] = pool.apply(read, (folder, whole))
    print(json.dumps(results, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
