"""`pplug-hf demo`: the main job from start to end on data and models that ship with the package.

Everything is synthetic: readers who shelve books by their own scheme, a tiny frozen T5, a tiny frozen sentence
encoder (made by scripts/make_demo_assets.py). The numbers show that the machinery works, not what real data gives.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from ..data.lamp import Example
from ..errors import PPlugError
from ..evaluation.plots import plot_weights
from ..methods.decoding import answer
from ..methods.names import INSTRUCTION_ONLY
from ..modeling import PPlugForConditionalGeneration
from ..processing import PPlugProcessor
from ..storage.files import write_text
from .evaluate import PPLUG, EvaluateSettings, evaluate
from .options import DemoSettings
from .train import TrainSettings, train

PLUG = {"placement": "prompt", "num_persona_tokens": 2, "projector_size": None, "train_input_encoder": True}


def demo(settings: DemoSettings) -> dict[str, float]:
    """Run the demo.

    Returns:
        Row -> accuracy on held-out readers.
    """
    output = Path(settings.output)
    with as_file(files("pplug_hf.demo") / "assets") as assets:
        common = {
            "data": str(assets / "data"),
            "backbone": str(assets / "backbone"),
            "encoder": str(assets / "encoder"),
            "task": "demo",
            "vectors": str(output / "vectors"),
            "batch_size": 64,
            "learning_rate": 2e-3,
            "seed": settings.seed,
            "resume": False,
        }
        print("1. A plug that knows the task but no reader: the ablation\n")
        train(
            TrainSettings(**common, output=str(output / "instruction-only"), use_history=False, epochs=1, patience=1),
            **PLUG,
        )
        print("\n2. The persona plug, trained on readers' histories\n")
        model = train(TrainSettings(**common, output=str(output / "plug"), epochs=settings.epochs), **PLUG)

        print("\n3. Readers that were not seen in training\n")
        comparison = evaluate(
            EvaluateSettings(
                plug=[str(output / "plug")],
                instruction_only=[str(output / "instruction-only")],
                data=common["data"],
                task="demo",
                vectors=common["vectors"],
                frequencies=False,
                output=str(output / "results"),
            )
        )
        print("\n4. One question, two readers\n")
        first, second, answers = two_readers(model, comparison.examples)
        print(f"   {first.prompt}")
        for reader, text in zip((first, second), answers, strict=True):
            print(f"   reader {reader.user}, {len(reader.history)} books shelved before: {text}")
        texts = [f"{item['tag']}: {item['text']}" for item in first.history]
        weights = model.persona_weights(model.encode_persona(first.history), query=first.query)[0]
        picture = output / "weights.png"
        plot_weights(weights, texts, title=f"Weights of history items for: {first.query}").savefig(picture)
        print(f"   the weights of {first.user}'s books: {picture}")

        print("\n5. The saved plug in a new process\n")
        for reader, expected in zip((first, second), answers, strict=True):
            again = ask_new_process(output / "plug", first.prompt, first.query, reader, output)
            print(f"   reader {reader.user}: {again}")
            if again != expected:
                raise PPlugError(f"The reloaded plug answers {again!r}, the trained one {expected!r}.")
        print("   identical")
    rows = {record["row"]: record["accuracy"] for record in comparison.rows()}
    print(
        f"\nOf 100 held-out questions, {100 * rows[PPLUG]:.0f} are answered as the reader would; "
        f"{100 * rows[INSTRUCTION_ONLY]:.0f} without a history, "
        f"{100 * rows[f'{PPLUG}:wrong-user']:.0f} with another reader's."
    )
    return rows


def two_readers(
    model: PPlugForConditionalGeneration, examples: Sequence[Example]
) -> tuple[Example, Example, tuple[str, str]]:
    """Return the first question's reader, and the first other reader for whom the model answers it differently."""
    readers = list({example.user: example for example in reversed(examples)}.values())[::-1]
    first = readers[0]
    answers = answer(
        model.generate,
        PPlugProcessor.from_model(model),
        [first.prompt] * len(readers),
        personas=model.encode_persona([reader.history for reader in readers]),
        queries=[first.query] * len(readers),
        max_new_tokens=6,
    )
    other = next((i for i, text in enumerate(answers) if text != answers[0]), 1)
    return first, readers[other], (answers[0], answers[other])


def ask_new_process(plug: Path, prompt: str, query: str, reader: Example, folder: Path) -> str:
    """Return what `pplug-hf generate` answers in a process of its own."""
    history = folder / f"history-{reader.user}.json"
    write_text(history, json.dumps(list(reader.history)))
    command = [sys.executable, "-m", "pplug_hf", "generate", "--plug", str(plug), "--prompt", prompt]
    command += ["--query", query, "--history", str(history), "--max_new_tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PPlugError(f"The new process failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()
