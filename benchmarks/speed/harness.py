"""What every figure is measured with: sides that take turns, medians with spread, ratios within a repetition.

A busy machine slows both sides of a repetition, so its ratio stands where the times do not. Ratios are those of each
repetition; their median and range are reported.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers


def take_turns(
    sides: dict[str, Callable[[], Any]],
    repetitions: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every side in every repetition. Who goes first rotates; the first rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for repetition in range(-warm_up, repetitions):
        for name in names:
            start = clock()
            sides[name]()
            if repetition >= 0:
                seconds[name].append(clock() - start)
        names = names[1:] + names[:1]
    return seconds


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(above: list[float], below: list[float]) -> dict[str, Any]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def figure(
    name: str,
    sides: dict[str, Any],
    ratio: dict[str, Any] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    checks: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line of the table: what the sides took, their ratio, the target, and that both computed the same."""
    met = None
    if ratio is not None and (at_least, at_most) != (None, None):
        met = ratio["median"] >= at_least if at_least is not None else ratio["median"] <= at_most
    target = None if met is None else f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
    return {
        "name": name,
        "sides": sides,
        "ratio": ratio,
        "target": target,
        "met": met,
        "checks": checks or {},
        **more,
    }


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    scale = expected.abs().max().clamp(min=1e-30)
    return ((got.double() - expected.double()).abs().max() / scale).item()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(
    measure: Callable[[argparse.Namespace], Iterable[dict[str, Any]]], doc: str, repetitions: int = 5
) -> dict[str, Any]:
    """The command line of a script: measure, print, and write JSON if asked to, after every figure of a generator."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="few and short: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(), "figures": []}
    for one in measure(args):
        print(line(one), flush=True)
        results["figures"].append(one)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")
    return results


def line(one: dict[str, Any]) -> str:
    """A figure in one line of text."""
    parts = [one["name"]]
    for side, value in one["sides"].items():
        parts.append(
            f"{side}: {value['median']:.4g} [{value['min']:.4g}, {value['max']:.4g}] {value.get('unit', 's')}"
        )
    if one["ratio"]:
        r = one["ratio"]
        parts.append(f"ratio {r['median']:.3g} [{r['min']:.3g}, {r['max']:.3g}]")
    if one["target"]:
        parts.append(f"target {one['target']}: {'met' if one['met'] else 'NOT met'}")
    parts += [
        f"{name} = {value:.2g}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in one["checks"].items()
    ]
    return " | ".join(parts)
