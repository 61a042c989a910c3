"""Reads, appends, deletions and sizes of persona stores, compared with plain files in the same run; needs no data.

    python benchmarks/store.py --json benchmarks/results/store/store.json

A raw read is `pread` of one user's vectors from one file of all users, into a tensor of its own. The store's read
checks the bytes, and gives a `Persona` with ids and times. A user who asked before, and has not changed, is not read
again. A raw append writes at the end of a file and waits for the disk (`fsync`), as a durable append must.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path += [str(HERE / "speed"), str(HERE.parent / "tests")]

from harness import figure, ratios, run, spread, take_turns  # noqa: E402
from resp_server import resp_server  # noqa: E402

from pplug_hf import EncoderSpec, Persona, open_store  # noqa: E402

WIDTH, ITEMS = 768, 60
SIZE = WIDTH * ITEMS * 2
SECRET = "secret of a benchmark"
SPEC = EncoderSpec("benchmark", WIDTH)


def persona(user: int, start: int = 0, n: int = ITEMS) -> Persona:
    vectors = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(user)).half()
    ids = tuple(f"{user}-{i}" for i in range(start, start + n))
    return Persona(vectors, SPEC, ids, torch.arange(n).double() + 1.7e9)


def per_call(work: Callable[[Any], Any], arguments: list[Any]) -> Callable[[], None]:
    def all_of_them() -> None:
        for one in arguments:
            work(one)

    return all_of_them


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    users, calls = (100, 50) if args.small else (2000, 1000)
    writes = calls // 10
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        _, url = stack.enter_context(resp_server(root / "server"))
        places: dict[str, Any] = {"SQLite": root / "sqlite", "SQLite, int8": root / "int8", "Valkey": url}
        types = {"SQLite, int8": "int8"}
        stores = {
            name: stack.enter_context(open_store(place, SPEC, secret=SECRET, dtype=types.get(name)))
            for name, place in places.items()
        }
        raw = os.open(root / "raw", os.O_RDWR | os.O_CREAT)
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        empty = {name: store.stats().size for name, store in stores.items()}
        for user in range(users):
            one = persona(user)
            os.write(raw, one.vectors.numpy().tobytes())
            for store in stores.values():
                store.append(str(user), one)

        for name, store in stores.items():
            if name != "Valkey":
                store.compact()
            size = store.stats().size - (empty[name] if name == "Valkey" else 0)
            bytes_of_vectors = SIZE * users / (2 if "int8" in name else 1)
            side = {
                name: spread([size]) | {"unit": "bytes"},
                "vectors": spread([bytes_of_vectors]) | {"unit": "bytes"},
            }
            limit = None if name == "Valkey" else 1.05
            yield figure(f"size, {name}", side, ratios([size], [bytes_of_vectors]), at_most=limit)

        def read(user: int) -> torch.Tensor:
            buffer = bytearray(SIZE)
            os.preadv(raw, [buffer], user * SIZE)
            return torch.frombuffer(buffer, dtype=torch.float16).view(ITEMS, WIDTH)

        chosen = [chance.randrange(users) for _ in range(calls)]
        sides: dict[str, Callable[[], Any]] = {
            "raw": per_call(read, chosen),
            "pread alone": per_call(lambda user: os.pread(raw, SIZE, user * SIZE), chosen),
            "raw, as a persona": per_call(lambda user: Persona(read(user), SPEC), chosen),
        }
        for name, store in stores.items():
            sides[name] = per_call(lambda user, store=store: store.get_many([str(user)])[0], chosen)
            other = stack.enter_context(open_store(places[name], SPEC, secret=SECRET))
            known = [str(user) for user in chosen[: calls // 2]] * 2  # fewer than a process keeps
            sides[f"{name}, asked before"] = per_call(other.get, known)
            sides[f"{name}, 100 at once"] = per_call(
                store.get_many, [list(map(str, chosen[i : i + 100])) for i in range(0, calls, 100)]
            )
        # CPU seconds, which a busy machine changes less; a server's own are not among them, so there the clock counts.
        for clock, kinds in ((time.process_time, ("SQLite", "SQLite, int8")), (time.perf_counter, ("Valkey",))):
            names = [f"{kind}{more}" for kind in kinds for more in ("", ", asked before", ", 100 at once")]
            compared = ["raw", "pread alone", "raw, as a persona"]
            seconds = take_turns({name: sides[name] for name in compared + names}, args.repetitions, clock=clock)
            micro = {name: [1e6 * s / calls for s in times] for name, times in seconds.items()}
            for name in names:
                limit = 4 if name == "SQLite, asked before" else None
                parts = {side: spread(micro[side]) | {"unit": "us"} for side in [*compared, name]}
                yield figure(f"read of a user, {name}", parts, ratios(micro[name], micro["raw"]), at_most=limit)

        for n in (1, ITEMS):
            data = bytes(n * WIDTH * 2)
            count = iter(range(10**9))

            def append_raw(_: int, data: bytes = data) -> None:
                os.write(log, data)
                os.fsync(log)

            def append(store: Any, n: int = n, count: Iterator[int] = count) -> Callable[[int], Any]:
                return lambda user: store.append(str(user), persona(user, 1000 * (1 + next(count)), n))

            some = chosen[:writes]
            sides = {"raw": per_call(append_raw, some)}
            sides |= {name: per_call(append(store), some) for name, store in stores.items()}
            seconds = take_turns(sides, args.repetitions)
            milli = {name: [1e3 * s / writes for s in times] for name, times in seconds.items()}
            for name in stores:
                parts = {side: spread(milli[side]) | {"unit": "ms"} for side in ("raw", name)}
                yield figure(f"durable append of {n}, {name}", parts, ratios(milli[name], milli["raw"]))

        for name, store in stores.items():
            gone = iter(range(users))
            times = take_turns(
                {name: per_call(lambda _, store=store, gone=gone: store.delete_user(str(next(gone))), [0] * 10)},
                args.repetitions,
            )[name]
            yield figure(f"deletion of a user, {name}", {name: spread([1e3 * s / 10 for s in times]) | {"unit": "ms"}})


def table(results: dict[str, Any]) -> str:
    rows = ["| figure | store | next to it | ratio [range] | target | met |", "|---|---|---|---|---|---|"]
    for one in results["figures"]:
        shown = [f"{side} {value['median']:.4g} {value['unit']}" for side, value in one["sides"].items()]
        ratio = "{median:.3g} [{min:.3g}, {max:.3g}]".format(**one["ratio"]) if one["ratio"] else ""
        met = {None: "", True: "yes", False: "**no**"}[one["met"]]
        mine = next(at for at, side in enumerate(one["sides"]) if one["name"].endswith(f", {side}"))
        cells = [one["name"], shown.pop(mine), ", ".join(shown), ratio, one["target"] or "", met]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(run(measure, __doc__ or "")))
