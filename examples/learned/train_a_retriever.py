"""A retriever that is trained with the answers of the language model (ROPG), next to the encoder that it started from.

Runs on the synthetic readers that ship with the package. There is little to gain on them: the encoder alone finds an item
with which the language model is right for nine of ten questions.
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

from pplug_hf import BenchSettings, FitSettings, bench, fit, markdown

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="passes over the questions (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="questions to train on (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="items per question (default: %(default)s)")
    arguments = parser.parse_args()
    data, backbone, encoder = (str(ASSETS / name) for name in ("data", "backbone", "encoder"))

    with tempfile.TemporaryDirectory() as folder:
        shared = {"data": data, "task": "demo", "backbone": backbone, "vectors": f"{folder}/vectors"}
        for method in ("ropg-kd", "ropg-rl"):  # the second one asks the language model nothing: the rewards are there
            artefact = fit(
                FitSettings(
                    method=method,
                    output=f"{folder}/{method}",
                    max_questions=arguments.questions,
                    max_length=128,
                    **shared,
                ),
                encoder=encoder,
                candidates=arguments.candidates,
                epochs=arguments.epochs,
                rewards=f"{folder}/rewards",
            )
            rewards = [f"{epoch['reward']:.3f}" for epoch in artefact.about["curve"]]
            print(
                f"{method}: reward of the item put first, before training and after each epoch: {', '.join(rewards)}"
            )

        comparison = bench(
            BenchSettings(
                output=f"{folder}/bench",
                retriever=encoder,
                rows=["no-persona", "bm25@1:wrong-user", "dense@1", "rrf@1", "ropg-kd@1", "ropg-rl@1"],
                trained=[f"{method}={folder}/{method}" for method in ("ropg-kd", "ropg-rl")],
                fuse=["bm25", "ropg-kd"],
                reference="dense@1",
                max_length=128,
                **shared,
            )
        )
    print(f"\n{markdown(comparison)}")


if __name__ == "__main__":
    main()
