"""Several tasks as one to train on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from corpus import Corpus, Rows
from torch import Tensor

from pplug_hf.data.records import Example


class Histories(NamedTuple):
    """What `PersonaDataset` knows of histories."""

    vectors: Tensor  # [S, D] of all items
    rows: list[np.ndarray]  # of each example's items


class Mixture:
    """The examples of several tasks, one task after the other.

    Args:
        corpora: of the tasks, with one tokenizer.
        checks: examples of each task to validate on.
    """

    def __init__(self, corpora: Sequence[Corpus], checks: int):
        self.corpora, self.checks, self.tokenizer = corpora, checks, corpora[0].tokenizer

    def _some(self, split: str, found: Sequence[Any]) -> Sequence[Any]:
        return found[: self.checks] if split == "val" else found

    def template(self, items: str) -> str:
        """Return the first task's template of an item's text; the plugs are given vectors."""
        return self.corpora[0].template(items)

    def examples(self, split: str) -> list[Example]:
        """Return the examples of all tasks, see `Corpus.examples`."""
        return [e for c in self.corpora for e in self._some(split, c.examples(split))]

    def rows(self, split: str, form: str = "plain", placement: str = "answer") -> Rows:
        """Return their tokens, see `Corpus.rows`."""
        made = [c.rows(split, form, placement) for c in self.corpora]
        return Rows(*(list(chain(*(self._some(split, part) for part in parts))) for parts in zip(*made, strict=True)))

    def queries(self, split: str) -> Tensor:
        """Return the vectors of their queries, [n, D]."""
        return torch.cat([torch.as_tensor(self._some(split, c.queries(split))) for c in self.corpora])

    def dataset(self, split: str, items: str = "main") -> Histories:
        """Return the vectors of all items, and which of them each example has."""
        sets = [c.dataset(split, items) for c in self.corpora]
        starts = np.cumsum([0, *(len(found.vectors) for found in sets)])
        rows = [
            np.asarray(r) + s for found, s in zip(sets, starts, strict=False) for r in self._some(split, found.rows)
        ]
        return Histories(torch.cat([found.vectors for found in sets]), rows)

    def mean_item(self, items: str = "main") -> Tensor:
        """Return the mean of the tasks' mean items, [1, D]."""
        return torch.stack([c.mean_item(items) for c in self.corpora]).mean(dim=0)
