"""Train on a folder in LaMP's format, then find out whether it personalises, with ablations and baselines.

    python examples/train_on_lamp.py --data LaMP_2 --backbone google/flan-t5-base --encoder BAAI/bge-base-en-v1.5

Without options it runs offline on the synthetic readers and the tiny models that ship with the package. From a shell,
`pplug-hf train` and then `pplug-hf bench` do the same. A second run with the same `--output` trains and answers only what
is missing.
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

from pplug_hf import BenchSettings, TrainSettings, bench, train

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))
ROWS = ["no-persona", "bm25@1", "instruction-only", "pplug:wrong-user", "pplug"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ASSETS / "data"), help="folder with train and dev files")
    parser.add_argument("--backbone", default=str(ASSETS / "backbone"), help="Hub id or folder")
    parser.add_argument("--encoder", default=str(ASSETS / "encoder"), help="Hub id or folder")
    parser.add_argument("--epochs", type=float, default=1, help="passes over the examples (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="plugs to train of each kind (default: %(default)s)")
    parser.add_argument("--output", help="folder for plugs and results (default: one that is removed at the end)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(arguments.output or temporary)
        shared = {"data": arguments.data, "backbone": arguments.backbone, "vectors": str(output / "vectors")}
        plugs: dict[str, list[str]] = {}
        for seed in range(arguments.seeds):
            # The ablation is trained in the same way, on the same examples, without any history: what it gains over the
            # bare backbone comes from learning the task, not from personalisation.
            for name, use_history in (("pplug", True), ("instruction-only", False)):
                folder = output / f"{name}-{seed}"
                plugs.setdefault(name, []).append(str(folder))
                if (folder / "model.safetensors").is_file():
                    continue
                settings = TrainSettings(
                    **shared,
                    output=str(folder),
                    encoder=arguments.encoder,
                    use_history=use_history,
                    epochs=arguments.epochs,
                    batch_size=64,
                    seed=seed,
                )
                train(settings)

        # The same frozen backbone answers all rows. Brackets are 95 % intervals over users.
        names = [f"{name}={','.join(folders)}" for name, folders in plugs.items()]
        bench(BenchSettings(**shared, output=str(output / "bench"), rows=ROWS, plugs=names, reference="pplug"))


if __name__ == "__main__":
    main()
