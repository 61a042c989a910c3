"""Examples with encoded histories, ready for a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigurationError
from ..modeling.encoders import item_texts
from ..modeling.persona import EncoderSpec, Persona, item_facts
from .lamp import Example
from .vectors import VectorStore


class PersonaDataset(Dataset):
    """Rows of `text`, `query`, `target` and `persona`; every history is a view into one matrix of vectors.

    Args:
        examples: what to learn from or to answer.
        store: encodes the items of all histories, each distinct text once.
        item_template: turns task items into texts; None if the histories are texts.
        history_dropout: in each epoch, every history loses a random share of its items, between none and this.
        repeats: extra copies of each example with more than two items, as in the paper: the copies lose items, the
            example itself does not; shorter histories lose nothing.
        new_users: in each epoch, this share of the examples is shown without their histories, so that a model learns to
            answer users who have none.
        use_history: False makes all histories empty, to train instruction-only plugs.
        queries: [len(examples), D] vectors of the queries, for a model whose input encoder is frozen.
        seed: of the drop-out. What is dropped depends on seed, epoch and row alone, not on the order of access, so
            a resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        store: VectorStore,
        item_template: str | None = None,
        history_dropout: float = 0.0,
        use_history: bool = True,
        queries: Tensor | None = None,
        seed: int = 0,
        repeats: int = 0,
        new_users: float = 0.0,
    ):
        if not 0 <= history_dropout <= 1:
            raise ConfigurationError(f"history_dropout must be in [0, 1], got {history_dropout}.")
        if not 0 <= new_users <= 1:
            raise ConfigurationError(f"new_users must be in [0, 1], got {new_users}.")
        if repeats < 0 or (repeats and not history_dropout):
            raise ConfigurationError(
                f"history_repeats is {repeats} with history_dropout {history_dropout}: give at least 0 repeats, and a "
                "share of items that they lose, or they are all the same."
            )
        self.examples, self.queries = examples, queries
        self.spec = EncoderSpec.from_fingerprint(store.fingerprint, item_template)
        self.history_dropout, self.new_users, self.seed = history_dropout, new_users, seed
        self._epoch = torch.tensor(0).share_memory_()  # with workers that outlive an epoch, too
        self._index = _index_items([example.history if use_history else () for example in examples], item_template)
        self.rows, self.vectors = self._index.rows, store(self._index.texts)
        # The rows of an epoch: an example's number, and whether its history loses items.
        self.views = [(i, bool(history_dropout) and not repeats) for i in range(len(examples))]
        # By the example, not by `rows`: the instruction-only ablation takes as many steps.
        self.views += [(i, True) for i, e in enumerate(examples) if len(e.history) > 2 for _ in range(repeats)]

    @property
    def epoch(self) -> int:
        """Number of the epoch whose items are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other items from now on, in worker processes that are running, too; trainers call it.

        Args:
            epoch: its number, from 0 on.
        """
        self._epoch.fill_(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy's is in no shared memory; a worker's is, and stays the same

    def __copy__(self) -> PersonaDataset:
        copy = type(self).__new__(type(self))
        copy.__setstate__({**self.__dict__, "_epoch": self._epoch.clone()})
        return copy

    def persona(self, index: int) -> Persona:
        """Return the history of a row, as it is in this epoch.

        Args:
            index: of the row.
        """
        number, loses = self.views[index]
        rows = self.rows[number]
        persona = Persona(self.vectors[torch.from_numpy(rows)], self.spec, *self._index.facts(number))
        if loses and len(rows):
            rng = np.random.default_rng((self.seed, self.epoch, index))
            kept = len(rows) - int(rng.uniform(0, self.history_dropout) * len(rows) + 0.5)
            persona = persona.select(rng.choice(len(rows), kept, replace=False).tolist())
        if self.new_users and np.random.default_rng((self.seed, self.epoch, index, 1)).random() < self.new_users:
            persona = persona.last(0)
        return persona

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, object]:
        number, _ = self.views[index]
        example = self.examples[number]
        query = example.query if self.queries is None else self.queries[number]
        return {"text": example.prompt, "query": query, "target": example.target, "persona": self.persona(index)}


class _Index(NamedTuple):
    """Histories as numbers of items and texts.

    Args:
        texts: all different ones.
        rows: per history, the place of each item's text in `texts`, [N].
        items: per history, the place of each item in `ids` and `times`, [N].
        ids: of the items; None for one that has none.
        times: of the items; nan likewise.
    """

    texts: list[str]
    rows: list[np.ndarray]
    items: list[np.ndarray]
    ids: np.ndarray
    times: np.ndarray

    def facts(self, number: int) -> tuple[tuple[str, ...] | None, Tensor | None]:
        """Return ids and times of a history's items, each None unless all items have it, as `item_facts` does."""
        items = self.items[number]
        ids, times = self.ids[items].tolist(), self.times[items]
        return None if None in ids else tuple(ids), None if np.isnan(times).any() else torch.from_numpy(times)


def _index_items(histories: Iterable[Any], template: str | None) -> _Index:
    """Look at each item of many histories once: examples that were made of one history share its items."""
    number: dict[str, int] = {}  # place of a text
    known: dict[int, int] = {}  # place of an item, by its identity, which is its own while `kept` has it
    kept: list[object] = []
    row_of: list[int] = []
    ids: list[str | None] = []
    times: list[float] = []
    longest: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # items and rows of a history, by its first item
    found = []
    for history in histories:
        if isinstance(history, str | Mapping) or not isinstance(history, Iterable):
            item_texts(history, template)  # raises
        history = list(history)
        new = list({id(item): item for item in history if id(item) not in known}.values())
        for item, text in zip(new, item_texts(new, template), strict=True):
            known[id(item)] = len(known)
            kept.append(item)
            row_of.append(number.setdefault(text, len(number)))
            name, time = item_facts([item])
            ids.append(name[0] if name else None)
            times.append(np.nan if time is None else time.item())
        items = np.array([known[id(item)] for item in history], dtype=np.int32)
        # As a rule, they are its beginnings: views of the same arrays, or memory would grow with its square.
        first = known[id(history[0])] if history else -1
        if first not in longest or not np.array_equal(longest[first][0][: len(items)], items):
            longest[first] = items, np.array([row_of[item] for item in items], dtype=np.int32)
        found.append([each[: len(items)] for each in longest[first]])
    return _Index(
        list(number), [r for _, r in found], [i for i, _ in found], np.array(ids, dtype=object), np.array(times)
    )
