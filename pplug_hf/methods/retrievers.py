"""Retrieval baselines: orders of a history's items for a query. The first items go into the prompt.

    ranker = get_ranker("bm25", task)
    found = retrieve(ranker, examples, k=4)  # per example up to four items, best first
    prompts = [retrieval_prompt(task, e.prompt, items, tokenizer).text for e, items in zip(examples, found)]

| name | order |
|---|---|
| `random` | a draw of the seed and the example's id |
| `recency` | newest first |
| `bm25` | the benchmark's Okapi, over words as they stand between white space |
| `bm25s` | Lucene's BM25 over lower-case words, by the library bm25s; another ranking, not a faster `bm25` |
| `dense` | similarity of sentence vectors, which come from the store that personas use |
| `rrf` | reciprocal rank fusion of other rankers' orders |

Every order is complete, the same in every run, and puts the newer of two equal items first. In the benchmark the order of
equal items depends on how the machine sorts.

N items of one user, D encoder width.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal, get_args

import numpy as np

from ..data.lamp import Example
from ..data.vectors import VectorStore
from ..errors import ConfigurationError
from ..modeling.encoders import has_routes, item_texts
from ..optional import require
from ..tasks.items import newest_first
from ..tasks.task import Task, get_task

Similarity = Literal["dot", "cosine"]
FUSION_C = 60.0  # of reciprocal rank fusion


class Ranker(ABC):
    """An order over one user's history for one query.

    Args:
        task: the task, or its name; it says what is read of a query and of an item.
    """

    def __init__(self, task: Task | str):
        self.task = get_task(task)

    def prepare(self, examples: Sequence[Example]) -> None:  # noqa: B027 - most rankers have nothing to prepare
        """Prepare many examples at once, which is faster than one by one; optional."""

    @abstractmethod
    def rank(self, example: Example) -> list[int]:
        """Return all positions in the example's history, best first; none for an empty history."""


class RandomRanker(Ranker):
    """A draw that depends on seed and example alone. The first k of it are k random items, whatever k is."""

    def __init__(self, task: Task | str, seed: int = 0):
        super().__init__(task)
        self.seed = seed

    def rank(self, example: Example) -> list[int]:
        order = list(range(len(example.history)))
        random.Random(f"{self.seed}/{example.id}").shuffle(order)  # from a text: the same on every machine
        return order


class RecencyRanker(Ranker):
    """Newest first: by date if every item of the history has one that can be read, else the last item first."""

    def rank(self, example: Example) -> list[int]:
        return newest_first(example.history)


class BM25Ranker(Ranker):
    """The benchmark's BM25: [`Okapi`] over white-space separated words, upper and lower case apart."""

    def rank(self, example: Example) -> list[int]:
        if not example.history:
            return []
        documents = [self.task.retrieval_text(item).split() for item in example.history]
        return _best_first(Okapi(documents).scores(self.task.retrieval_query(example.prompt).split()))


class BM25SRanker(Ranker):
    """Lucene's BM25 over lower-case words of two or more letters, by the library bm25s.

    Raises:
        MissingPackageError: bm25s is not installed.
    """

    def __init__(self, task: Task | str):
        super().__init__(task)
        self._bm25s = require("bm25s", "retrieval", "The ranker 'bm25s'", ", or choose 'bm25'")

    def rank(self, example: Example) -> list[int]:
        if not example.history:
            return []
        # No stop words: the library's are English, and what a rare word is, BM25 finds out by itself.
        options = {"stopwords": None, "show_progress": False}
        documents = self._bm25s.tokenize([self.task.retrieval_text(item) for item in example.history], **options)
        (query,) = self._bm25s.tokenize(self.task.retrieval_query(example.prompt), return_ids=False, **options)
        scores = np.zeros(len(example.history))
        if query and any(documents.ids):
            index = self._bm25s.BM25(method="lucene", k1=1.5, b=0.75)
            index.index(documents, show_progress=False)
            scores = index.get_scores(query)
        return _best_first(scores)


class DenseRanker(Ranker):
    """Similarity of sentence vectors, from any sentence-transformers model (the paper's: facebook/contriever).

    Args:
        task: as above.
        store: gives the items' vectors. A plug's own store shares its vectors, if the items' texts are the same.
        item_template: of the items' texts; pass `model.config.item_template` to share a plug's vectors. Default:
            the task's text for rankers, which shows no tags and scores.
        query_prompt: put before queries, where the encoder wants one; queries then have a store next to
            `store`.
        similarity: "dot" (the benchmark's), or "cosine". The same for encoders that normalise.
        query_store: gives the queries' vectors, if they have an encoder of their own; it then has their prompt.

    Raises:
        ConfigurationError: no such similarity.
    """

    def __init__(
        self,
        task: Task | str,
        store: VectorStore,
        item_template: str | None = None,
        query_prompt: str = "",
        similarity: Similarity = "dot",
        query_store: VectorStore | None = None,
    ):
        super().__init__(task)
        if similarity not in get_args(Similarity):
            raise ConfigurationError(f"similarity is {similarity!r}; choose one of {', '.join(get_args(Similarity))}.")
        self.items, self.item_template, self.similarity = store, item_template, similarity
        if query_store is None:
            same = query_prompt == store.prompt and not has_routes(store.encoder)
            query_store = (
                store if same else VectorStore(store.encoder, query_prompt, store.folder.parent, task="query")
            )
        self.queries = query_store
        # By an example's id: the example, so that nothing else gets its id, and the rows of its items [N] and query.
        self._found: dict[int, tuple[Example, np.ndarray, int]] = {}

    def prepare(self, examples: Sequence[Example]) -> None:
        """Encode every new text of these examples, in large batches, and remember where the vectors are."""
        self._found = {id(example): found for example, found in zip(examples, self._find(examples), strict=True)}

    def rank(self, example: Example) -> list[int]:
        if not example.history:
            return []
        _, rows, row = self._found.get(id(example)) or self._find([example], show_progress=False)[0]
        items, query = self.items.vectors.numpy().take(rows, axis=0), self.queries.vectors.numpy()[row]  # [N, D], [D]
        # Not a matrix product: its rounding depends on the row, and equal items must have equal scores.
        scores = np.einsum("nd,d->n", items, query)
        if self.similarity == "cosine":
            scores = scores / np.maximum(np.sqrt(np.einsum("nd,nd->n", items, items)), np.finfo(np.float32).tiny)
        return _best_first(scores)

    def _find(self, examples: Sequence[Example], show_progress: bool = True) -> list[tuple[Example, np.ndarray, int]]:
        """Find the examples' vectors in the stores. Readers share equal items as one object: each is read once."""
        number: dict[str, int] = {}
        item_number: dict[int, int] = {}
        for example in examples:
            new = [item for item in example.history if id(item) not in item_number]
            for item, text in zip(new, self._texts(new), strict=True):
                item_number[id(item)] = number.setdefault(text, len(number))
        rows = np.array(self.items.rows(list(number), show_progress=show_progress), dtype=np.intp)
        items = [rows[[item_number[id(item)] for item in example.history]] for example in examples]
        texts = [self.task.retrieval_query(example.prompt) for example in examples]
        return list(zip(examples, items, self.queries.rows(texts, show_progress=show_progress), strict=True))

    def _texts(self, items: Sequence[Mapping[str, str]]) -> list[str]:
        if self.item_template is None:
            return [self.task.retrieval_text(item) for item in items]
        return item_texts(items, self.item_template)


class FusionRanker(Ranker):
    """Reciprocal rank fusion: an item's score is the sum of 1 / (c + rank) over several rankers, rank 1 being the best.

    Args:
        task: as above.
        rankers: whose orders are fused, all of one task (default: recency and bm25).
        c: the larger, the less the first ranks count; 60 is that of Cormack et al. (2009).

    Raises:
        ConfigurationError: no rankers, or a negative c.
    """

    def __init__(self, task: Task | str, rankers: Sequence[Ranker] | None = None, c: float = FUSION_C):
        super().__init__(task)
        self.rankers = [RecencyRanker(task), BM25Ranker(task)] if rankers is None else list(rankers)
        self.c = c
        if not self.rankers or c < 0:
            raise ConfigurationError(f"rrf got {len(self.rankers)} rankers and c={c}: give at least one, and c >= 0.")

    def prepare(self, examples: Sequence[Example]) -> None:
        for ranker in self.rankers:
            ranker.prepare(examples)

    def rank(self, example: Example) -> list[int]:
        return fuse([ranker.rank(example) for ranker in self.rankers], self.c)


def fuse(orders: Sequence[Sequence[int]], c: float = FUSION_C) -> list[int]:
    """Return one order of N positions made of several, by reciprocal rank fusion; of equals the last position first."""
    places = np.argsort(
        np.array(orders, dtype=np.intp).reshape(len(orders), -1), axis=1
    )  # [R, N]: rank - 1 of each item
    # Sorted before they are added: the order of the rankers must not decide between equals by rounding.
    return _best_first(np.sort(1 / (c + 1 + places), axis=0).sum(axis=0))


RANKERS: dict[str, Callable[..., Ranker]] = {
    "random": RandomRanker,
    "recency": RecencyRanker,
    "bm25": BM25Ranker,
    "bm25s": BM25SRanker,
    "dense": DenseRanker,
    "rrf": FusionRanker,
}


def get_ranker(name: str, task: Task | str, **options: object) -> Ranker:
    """Return the ranker of that name.

    Args:
        name: one of the table above.
        task: the task, or its name.
        **options: `seed` of "random"; `store` (needed), `item_template`, `query_prompt`, `similarity` of "dense";
            `rankers`, `c` of "rrf".

    Returns:
        An object whose `rank(example)` gives the positions of the history's items, best first.

    Raises:
        ConfigurationError: no such ranker or option, or something it needs is missing.
    """
    if name not in RANKERS:
        raise ConfigurationError(f"There is no ranker {name!r}; choose one of {', '.join(RANKERS)}.")
    try:
        return RANKERS[name](task, **options)
    except TypeError as error:
        raise ConfigurationError(
            f"The ranker {name!r} does not take these options ({sorted(options)}): {error}."
        ) from error


def retrieve(ranker: Ranker, examples: Sequence[Example], k: int) -> list[list[dict[str, str]]]:
    """Return the k items of each history that match the query best.

    Args:
        ranker: from `get_ranker`.
        examples: n of them.
        k: items per example.

    Returns:
        n lists, best first: the whole history where it has no more than k items, nothing where it is empty.

    Raises:
        ConfigurationError: k is less than 1.
    """
    if k < 1:
        raise ConfigurationError(f"k is {k}; retrieve at least 1 item.")
    ranker.prepare(examples)
    return [[example.history[i] for i in ranker.rank(example)[:k]] for example in examples]


class Okapi:
    """BM25 as the benchmark computes it (with the library rank-bm25), for a handful of documents and one query.

        score(document) = sum over the query's words: idf(word) * f * (k1 + 1) / (f + k1 * (1 - b + b * length / mean))
        idf(word) = log(N - n + 1/2) - log(n + 1/2); where negative: epsilon * (mean idf of all words)

    where f is how often the word is in the document and n in how many documents it is. The mean includes the negative
    ones, so in a small history the replacement may be negative itself.

    Args:
        documents: N lists of words.
        k1, b, epsilon: as above.
    """

    def __init__(self, documents: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75, epsilon: float = 0.25):
        self.k1, N = k1, len(documents)
        lengths = np.array([len(document) for document in documents], dtype=np.float64)
        mean = lengths.mean() if lengths.any() else 1.0
        self._norms = k1 * (1 - b + b * lengths / mean)
        self._counts = [Counter(document) for document in documents]
        self._containing = Counter(chain.from_iterable(self._counts))  # n of every word
        # A word's idf follows from its n. Summed by n, so that the order of the documents has no say in the rounding.
        words = sorted(Counter(self._containing.values()).items())
        idf = {n: math.log(N - n + 0.5) - math.log(n + 0.5) for n, _ in words}
        average = sum(count * idf[n] for n, count in words) / max(1, len(self._containing))
        self._idf = {n: value if value >= 0 else epsilon * average for n, value in idf.items()}

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """Return the scores [N] in fp64; a word that the query repeats counts as often. Words that no document has add nothing."""
        scores, parts = np.zeros(len(self._counts)), {}
        for word in query:
            n = self._containing.get(word)
            if n is None:
                continue
            if word not in parts:
                f = np.array([count.get(word, 0) for count in self._counts], dtype=np.float64)
                parts[word] = self._idf[n] * (f * (self.k1 + 1) / (f + self._norms))
            scores += parts[word]
        return scores


def _best_first(scores: np.ndarray) -> list[int]:
    return np.argsort(scores, kind="stable")[::-1].tolist()
