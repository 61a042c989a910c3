# ruff: noqa: B023  (every closure is called before its loop goes on)
"""Loading a plug on a loaded backbone, and the size of its folder.

    python benchmarks/speed/loading.py

Backbone and encoder are loaded. The floor reads every byte of the plug's folder, builds the plug's modules, and copies
the weights in. The first load of an encoder object also reads all its weights, to tell whether it is the plug's;
later ones remember. Beside the package's time stands what it is spent on; what the floor does too is marked so.
"""

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import shapes
import torch
from harness import figure, ratios, run, spread, take_turns
from safetensors.torch import load
from transformers import PreTrainedTokenizerFast

from pplug_hf import PPlugConfig, PPlugForConditionalGeneration, PPlugModel
from pplug_hf.modeling import backbone as backbones
from pplug_hf.modeling import encoders
from pplug_hf.modeling import plug_folder as files
from pplug_hf.modeling.plug import PersonaPlug
from pplug_hf.storage.location import Location

# The parts of a load, none inside another: what they are for, and the functions that take their time.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "tokenizer (in the floor too)": [(files, "load_tokenizer")],
    "building the modules (in the floor too)": [(PPlugForConditionalGeneration, "__init__")],
    "reading weights and configuration (in the floor too)": [(files, "load_weights"), (files, "load_config")],
    "copying the encoder (in the floor too)": [(encoders, "trainable_copy")],
    "is this the plug's encoder, is this its backbone": [(encoders, "fingerprint"), (backbones, "fingerprint")],
    "freezing backbone and encoder, eval mode": [
        (encoders, "freeze_encoder"),
        (backbones, "freeze_backbone"),
        (PPlugForConditionalGeneration, "eval"),
    ],
    "do the weights fit the configuration": [(files, "weight_shapes"), (files, "check_sizes")],
    "are the folder's files what they should be": [(Location, "folder"), (files, "open_location")],
}


def floor(folder: Path, encoder: Any) -> Any:
    """What cannot be avoided: the bytes, the modules, the weights in them, the tokenizer."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = PPlugConfig.from_dict(json.loads(files["config.json"]))
    plug = PersonaPlug(config)
    if config.train_input_encoder:
        plug.input_encoder = encoders.trainable_copy(encoder)
    weights = load(files["model.safetensors"])
    plug.load_state_dict({key.removeprefix("plug."): value for key, value in weights.items()}, strict=False)
    return plug, PreTrainedTokenizerFast.from_pretrained(folder)


def profile(load: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Share of every part in the time of a load, in the median of several."""
    rows = []
    for _ in range(repetitions + 1):
        seconds = dict.fromkeys(PARTS, 0.0)
        inside: list[str] = []  # a part that another calls counts as the other's
        with contextlib.ExitStack() as stack:
            for part, functions in PARTS.items():
                for owner, name in functions:
                    stack.enter_context(
                        mock.patch.object(owner, name, clocked(getattr(owner, name), part, seconds, inside))
                    )
            start = time.perf_counter()
            load()
            total = time.perf_counter() - start
        rows.append({part: spent / total for part, spent in seconds.items()})
    shares = {part: statistics.median(row[part] for row in rows[1:]) for part in PARTS}
    return shares | {"all else": 1 - sum(shares.values())}


def clocked(function: Any, part: str, seconds: dict[str, float], inside: list[str]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if inside:
            return function(*args, **kwargs)
        inside.append(part)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[inside.pop()] += time.perf_counter() - start

    return call


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    encoder = shapes.bert_encoder(layers=1 if args.small else 12)
    for trained in (False, True):
        model = shapes.personalised("t5", encoder, train_input_encoder=trained)
        kind = "plug with its input encoder" if trained else "plug without input encoder"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "plug"
            model.save_pretrained(folder)
            fingerprint = encoders.fingerprint(encoder)
            sides = {
                "floor": lambda: floor(folder, encoder),
                "package": lambda: PPlugModel.from_pretrained(folder, backbone=model.backbone, encoder=encoder),
            }
            seconds = take_turns(sides, args.repetitions)
            loaded = sides["package"]()
            same = all(
                torch.equal(a, b) for a, b in zip(loaded.plug.parameters(), model.plug.parameters(), strict=True)
            )
            encoders._known.pop(encoder, None)
            first = take_turns({"first": lambda: encoders.fingerprint(encoder)}, 1, warm_up=0)["first"]
            figures.append(
                figure(
                    f"loading a {kind} on a loaded backbone",
                    {side: spread(times) for side, times in seconds.items()},
                    ratios(seconds["package"], seconds["floor"]),
                    at_most=1.2,
                    checks={"weights equal": same, "fingerprint kept": encoders.fingerprint(encoder) == fingerprint},
                    first_reading_of_an_encoder=spread(first),
                    where_its_time_goes=profile(sides["package"], args.repetitions),
                )
            )
            figures.append(size(folder, model, kind))
    return figures


def size(folder: Path, model: Any, kind: str) -> dict[str, Any]:
    """The plug's own files; the tokenizer beside them is the backbone's."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    own = sum(size for name, size in sizes.items() if not name.startswith(("tokenizer", "special_tokens")))
    value = {"median": own / trainable, "min": own / trainable, "max": own / trainable, "n": 1}
    return figure(
        f"folder of a {kind}",
        {
            "trainable": spread([trainable / 1e6]) | {"unit": "MB"},
            "folder without tokenizer": spread([own / 1e6]) | {"unit": "MB"},
            "tokenizer": spread([(sum(sizes.values()) - own) / 1e6]) | {"unit": "MB"},
        },
        value,
        at_most=1.02,
    )


if __name__ == "__main__":
    run(measure, __doc__ or "")
