"""Encoding a corpus of histories: the vector store compared with `SentenceTransformer.encode` on the distinct texts.

    python benchmarks/speed/encoding.py

Texts of 10 to 120 tokens, each three times in the corpus, in the order of users. The store starts empty, hashes,
encodes, and writes its file; encode gets the distinct texts. Then the same corpus again: nothing is left to encode.
"""

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns

from pplug_hf import VectorStore


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    distinct_texts, repeats = (12, 3) if args.small else (192, 3)
    rng = random.Random(0)
    texts = [shapes.text(rng.randint(10, 120), rng) for _ in range(distinct_texts)]
    corpus = texts * repeats
    rng.shuffle(corpus)
    distinct = list(dict.fromkeys(corpus))
    encoder = shapes.bert_encoder()
    batch = {"batch_size": 32}
    results: dict[str, torch.Tensor] = {}

    with tempfile.TemporaryDirectory() as folder:
        fresh = iter(range(10**6))

        def store() -> VectorStore:
            made = VectorStore(encoder, folder=Path(folder) / str(next(fresh)))
            results["package"] = made(corpus, show_progress=False, **batch)
            return made

        def library() -> None:
            results["library"] = encoder.encode(distinct, convert_to_tensor=True, **batch)

        seconds = take_turns({"encode": library, "package": store}, args.repetitions)
        full = store()
        again = take_turns({"again": lambda: full(corpus, show_progress=False)}, args.repetitions)["again"]

    row = {text: i for i, text in enumerate(distinct)}
    expected = results["library"][[row[text] for text in corpus]]
    sides = {side: spread([len(distinct) / s for s in times]) | {"unit": "texts/s"} for side, times in seconds.items()}
    sides["package, all known"] = spread(again)
    return [
        figure(
            f"encoding {len(corpus)} texts, {len(distinct)} of them distinct",
            sides,
            ratios(seconds["encode"], seconds["package"]),
            at_least=0.97,
            checks={"difference": difference(results["package"], expected), "encoded": full.encoded},
            known_texts=ratios(again, seconds["package"]),
        )
    ]


if __name__ == "__main__":
    run(measure, __doc__ or "", repetitions=3)
