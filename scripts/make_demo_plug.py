"""Train the plug that comes with the package, on the assets of scripts/make_demo_assets.py.

    python scripts/make_demo_plug.py --output pplug_hf/demo/assets/plug

It is a small plug: its query encoder is not trained. No path of this machine is in it; whoever loads it names the backbone
and the encoder beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from pplug_hf import TrainSettings, train
from pplug_hf.storage.layout import CONFIG, GENERATION_CONFIG, WEIGHTS

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))
PLACES = ("backbone", "encoder", "backbone_revision", "encoder_revision", "transformers_version")


def main() -> None:
    """Train, and copy the plug alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    output = parser.parse_args().output
    torch.set_num_threads(1)  # sums in one order
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            data=str(ASSETS / "data"),
            backbone=str(ASSETS / "backbone"),
            encoder=str(ASSETS / "encoder"),
            task="demo",
            output=f"{folder}/plug",
            vectors=f"{folder}/vectors",
            epochs=parser.parse_args().epochs,
            batch_size=64,
            learning_rate=2e-3,
            resume=False,
        )
        train(settings, placement="prompt", num_persona_tokens=2, projector_size=None, train_input_encoder=False)
        output.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, GENERATION_CONFIG):
            shutil.copyfile(f"{folder}/plug/{name}", output / name)
        config = json.loads(Path(folder, "plug", CONFIG).read_text(encoding="utf-8"))
        config = {name: value for name, value in config.items() if name not in PLACES}
        (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
