"""The whole life of a plug: create, train in a plain torch loop, save, load, answer one question for two readers.

Runs offline on the synthetic readers, the tiny T5 and the tiny sentence encoder that ship with the package. To use other
models, replace the two folders below by Hub ids, e.g. "google/flan-t5-base" and "BAAI/bge-base-en-v1.5".
"""

import argparse
import random
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from pplug_hf import PPlugForConditionalGeneration, PPlugModel, PPlugProcessor, read_lamp

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))
BACKBONE, ENCODER = str(ASSETS / "backbone"), str(ASSETS / "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="questions per step (default: %(default)s)")
    parser.add_argument("--output", help="folder for the plug (default: one that is removed at the end)")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # Create. The backbone and the encoder are frozen; only the plug is trained.
    task, examples = read_lamp(ASSETS / "data", "train")
    model = PPlugForConditionalGeneration.from_backbone(
        BACKBONE,
        encoder=ENCODER,
        item_template=task.item_template,  # a history item is {"text": ..., "tag": ...}
    )
    processor = PPlugProcessor.from_model(model)
    model.print_trainable_parameters()

    # Train. Histories are encoded once, before the loop.
    examples = examples[: arguments.steps * arguments.batch_size]
    personas = model.encode_persona([e.history for e in examples])
    optimizer = torch.optim.AdamW(model.plug.parameters(), lr=1e-2)
    draw = random.Random(0)
    model.train()
    for step in range(arguments.steps):
        rows = draw.choices(range(len(examples)), k=arguments.batch_size)
        batch = processor(
            text=[examples[i].prompt for i in rows],
            persona=[personas[i] for i in rows],
            query=[examples[i].query for i in rows],
            labels=[str(examples[i].target) for i in rows],
        )
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.plug.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    # Save and load the plug; loading finds its backbone and its encoder again.
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or temporary
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model, processor = PPlugModel.from_pretrained(folder), PPlugProcessor.from_pretrained(folder)

    # Use: one question, two readers who were not in the training data.
    _, unseen = read_lamp(ASSETS / "data", "dev")
    question = unseen[0]
    readers = [question, next(e for e in unseen if e.user != question.user)]
    inputs = processor(text=[question.prompt] * 2, persona=[r.history for r in readers], query=[question.query] * 2)
    print(f"\n{question.prompt}")
    for reader, text in zip(readers, processor.decode_answers(model.generate(**inputs)), strict=True):
        print(f"  reader {reader.user}: {text}")

    weights = model.persona_weights(question.history, query=question.query)[0]
    print(f"The most important items of reader {question.user}:")
    for i in weights.argsort(descending=True)[:3]:
        print(f"  {weights[i]:.2f}  {task.item_text(question.history[i])}")


if __name__ == "__main__":
    main()
