"""Peak memory of a training step, the package compared with the plain reference, and of one very long history among short ones.

    python benchmarks/speed/memory.py

Every side runs in a fresh process. Counted are the tensors that one step (forward, backward, AdamW) allocates on top
of model, optimizer state and gradients' last step: the highest sum of what torch's CPU allocator hands out and has not
taken back, which torch's profiler reports exactly. The growth of the process's peak resident memory stands beside it.
Of an epoch's batches, in the order that each side trains in, the median and the largest are reported. Beside them stands
the floor: the frozen backbone's forward and backward alone on the package's batches, without any plug.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import reference
import shapes
import torch
import train_step
import transformers
from harness import figure, run, spread
from torch.profiler import ProfilerActivity, profile


def peak(step: Callable[[], Any]) -> int:
    """Bytes of tensors that `step` has allocated and not yet freed, at their highest."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    highest = total = 0
    for _, size in changes:
        total += size
        highest = max(highest, total)
    return highest


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One side on one backbone, in a process of its own."""
    name, side = args.child.split(":")
    n, batch = (8, 4) if args.small else (train_step.EXAMPLES, train_step.BATCH)
    model = shapes.personalised(name)
    dataset = train_step.data(model, n, batch)
    if side == "reference":
        plain = reference.PlainModel(model)
        loader, plug = train_step.plain_loader(model, train_step.plain_rows(dataset), batch), plain.plug
    else:
        loader, plug = train_step.ours_loader(model, dataset, batch), model.plug
        model.train()
    optimizer = train_step.optimizer_of(plug)

    def step(given: dict[str, Any]) -> None:
        if side == "backbone alone":
            return train_step.floor(model, [given])()  # type: ignore[arg-type]
        optimizer.zero_grad()
        if side == "reference":
            loss = plain(**given).loss
        else:
            loss = model(**{k: v for k, v in given.items() if not k.startswith("prompt_")}).loss
        loss.backward()
        optimizer.step()

    batches = list(loader)
    smallest = {k: v[:1] for k, v in min(batches, key=lambda b: b["input_ids"].numel()).items()}
    step(smallest)  # the optimizer's state is there
    before = resident()
    peaks = [peak(lambda given=given: step(given)) for given in batches]
    return {"peaks": peaks, "resident_growth": resident() - before}


def long_history(args: argparse.Namespace) -> dict[str, Any]:
    """A batch of 15 short histories and one of 10,000 items: the plug's step compared with the size of its content."""
    long = 1_000 if args.small else 10_000
    model = shapes.personalised("t5")
    lengths = [90] * 15 + [long]
    histories = [shapes.items(n, seed=i) for i, n in enumerate(lengths)]
    queries = shapes.items(16, seed=99)
    plug = model.plug

    def step() -> None:
        plug(queries, histories).sum().backward()

    step()
    D, M, _, _ = model.config.sizes
    content = sum(lengths) * (2 * D + 3 * M) * 4  # joined and unit vectors; hidden layer, its gelu, one gradient
    padded = max(lengths) * len(lengths) * (2 * D + 3 * M) * 4
    return {"peak": peak(step), "content": content, "padded": padded}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    for name in shapes.BACKBONES:
        found = {}
        for side in ("reference", "package", "backbone alone"):
            command = [sys.executable, __file__, "--child", f"{name}:{side}", "--threads", str(args.threads)]
            done = subprocess.run(command + ["--small"] * args.small, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        sides = {side: spread([p / 1e6 for p in found[side]["peaks"]]) | {"unit": "MB"} for side in found}
        for kind in ("median", "max"):
            ratio, best, over = (
                sides[above][kind] / sides[below][kind]
                for above, below in (
                    ("package", "reference"),
                    ("backbone alone", "reference"),
                    ("package", "backbone alone"),
                )
            )
            growth = {side: f"{found[side]['resident_growth'] / 1e6:.0f} MB" for side in found}
            figures.append(
                figure(
                    f"peak memory of a training step, {name}, {'median' if kind == 'median' else 'largest'} batch",
                    sides,
                    dict.fromkeys(("median", "min", "max"), ratio) | {"n": len(found["package"]["peaks"])},
                    at_most=0.5,
                    checks={f"resident growth, {side}": value for side, value in growth.items()},
                    best_possible=best,
                    over_the_floor=over,
                )
            )
    long = long_history(args)
    figures.append(
        figure(
            "plug's step with one very long history among 15 short ones",
            {k: spread([v / 1e6]) | {"unit": "MB"} for k, v in long.items()},
            dict.fromkeys(("median", "min", "max"), long["peak"] / long["content"]) | {"n": 1},
            at_most=1.2,
        )
    )
    return figures


if __name__ == "__main__":
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--small", action="store_true")
        arguments = parser.parse_args()
        torch.set_num_threads(arguments.threads)
        transformers.logging.set_verbosity_error()
        print(json.dumps(child(arguments)))
    else:
        run(measure, __doc__ or "", repetitions=1)
