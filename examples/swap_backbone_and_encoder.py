"""The same data with two backbones and two sentence encoders; one line changes each time.

A plug belongs to the backbone and the encoder it was trained with: widths are measured, fingerprints are recorded, and
loading the plug on others is an error that names both. Data, task and code stay the same. Runs offline on the models that
ship with the package; use Hub ids for others.
"""

import argparse
import random
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pplug_hf import MismatchError, PPlugForConditionalGeneration, PPlugModel, PPlugProcessor, read_lamp

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))


def causal_backbone():
    """Return a causal language model and its tokenizer, where you would use `AutoModelForCausalLM.from_pretrained(...)`.

    Its weights are random, so its losses show only that the plug learns.
    """
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "backbone")
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end)
    return GPT2LMHeadModel(config), tokenizer


def train(model, examples, steps, batch_size):
    """Train for a few steps in a plain loop; return the last loss."""
    processor = PPlugProcessor.from_model(model)
    personas = model.encode_persona([e.history for e in examples])
    optimizer = torch.optim.AdamW([p for p in model.plug.parameters() if p.requires_grad], 5e-3)
    draw, loss = random.Random(0), torch.zeros(())
    model.train()
    for _ in range(steps):
        rows = draw.choices(range(len(examples)), k=batch_size)
        batch = processor(
            text=[examples[i].prompt for i in rows],
            persona=[personas[i] for i in rows],
            query=[examples[i].query for i in rows],
            labels=[str(examples[i].target) for i in rows],
        )
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each plug (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="questions per step (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task, examples = read_lamp(ASSETS / "data", "train")
    examples = examples[: arguments.steps * arguments.batch_size]

    gpt2, tokenizer = causal_backbone()
    backbones = {"T5 (folder)": (str(ASSETS / "backbone"), None), "GPT-2 (object)": (gpt2, tokenizer)}
    encoders = {
        "64 numbers": SentenceTransformer(str(ASSETS / "encoder")),
        "the first 16 of them": SentenceTransformer(str(ASSETS / "encoder"), truncate_dim=16),
    }
    models = {}
    for backbone_name, (backbone, own_tokenizer) in backbones.items():
        for encoder_name, encoder in encoders.items():
            model = PPlugForConditionalGeneration.from_backbone(
                backbone,
                encoder=encoder,
                tokenizer=own_tokenizer,
                item_template=task.item_template,
            )
            loss = train(model, examples, arguments.steps, arguments.batch_size)
            models[backbone_name, encoder_name] = model
            config = model.config
            print(
                f"{backbone_name}, {encoder_name}: D = {config.encoder_size}, H = {config.hidden_size}, a soft token "
                f"has norm {config.embedding_norm:.2f}; loss after {arguments.steps} steps {loss:.3f}"
            )

    # A plug on a backbone that it was not trained with is refused before anything is computed.
    with tempfile.TemporaryDirectory() as folder:
        models["T5 (folder)", "64 numbers"].save_pretrained(folder)
        try:
            PPlugModel.from_pretrained(folder, backbone=gpt2)
        except MismatchError as error:
            print(f"\nThe T5's plug on the GPT-2: {error}")

    # Vectors of two encoders cannot be mixed either: a persona records the encoder that made it.
    persona = models["T5 (folder)", "64 numbers"].encode_persona(examples[0].history)
    try:
        models["T5 (folder)", "the first 16 of them"].persona_weights(persona, query=examples[0].query)
    except MismatchError as error:
        print(f"\nA persona of the other encoder: {error}")


if __name__ == "__main__":
    main()
