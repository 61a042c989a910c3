"""One LoRA per user: the strongest way to personalise where every user has data and may be trained for.

Trains one for some of the synthetic readers that ship with the package, on the books that they shelved before, and
compares: the language model alone, another reader's LoRA, the reader's own. Needs peft: pip install 'pplug-hf[rivals]'.
"""

import argparse
import gzip
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from pplug_hf import BenchSettings, bench
from pplug_hf.commands.fit import fit
from pplug_hf.commands.options import FitSettings

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))


def read(name: str) -> list[dict]:
    """Return the questions of a split, each with its answer."""
    packed = [ASSETS / "data" / f"{name}_{part}.json.gz" for part in ("questions", "outputs")]
    questions, outputs = (json.loads(gzip.decompress(path.read_bytes())) for path in packed)
    answers = {gold["id"]: gold["output"] for gold in outputs["golds"]}
    return [{**question, "output": answers[question["id"]]} for question in questions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=12, help="readers to train for (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=7, help="passes over a reader's books (default: %(default)s)")
    arguments = parser.parse_args()
    dev = read("dev")
    users = sorted({question["user_id"] for question in dev})[: arguments.users]
    data = {"train": read("train"), "dev": [question for question in dev if question["user_id"] in users]}
    backbone = str(ASSETS / "backbone")

    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(method="ftp", task="demo", data="", output=f"{folder}/ftp", backbone=backbone)
        artefact = fit(settings, data=data, epochs=arguments.epochs, learning_rate=1e-3)
        about = artefact.about
        print(
            f"{about['users']} readers: {about['weights_per_user']:,} weights and {about['bytes_per_user']:,} bytes each, "
            f"{about['seconds_per_user']} seconds for a new one."
        )
        settings = BenchSettings(
            data="",
            task="demo",
            output=f"{folder}/bench",
            backbone=backbone,
            trained=[f"ftp={folder}/ftp"],
            rows=["no-persona", "ftp:wrong-user", "ftp"],
            reference="ftp",
        )
        comparison = bench(settings, data=data)
        print("\nShelves that two readers' own weights choose:")
        answers = dict(zip([e.id for e in comparison.examples], comparison.predictions["ftp"][0], strict=True))
        for user in users[:2]:
            (question, *_) = [e for e in comparison.examples if e.user == user]
            print(f"   reader {user}: {question.query}: {answers[question.id]}")


if __name__ == "__main__":
    main()
