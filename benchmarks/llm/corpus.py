"""What plugs learn from and are asked: examples, prompts as chats, item vectors, retrieved items.

n examples, S items of all of them, D encoder width.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.examples import read_examples
from pplug_hf.data.histories import history_examples, split_users, three_way_split
from pplug_hf.data.records import Example
from pplug_hf.data.synthetic import synthetic_examples
from pplug_hf.data.vectors import VectorStore
from pplug_hf.methods.decoding import nearest_histories, shuffle_histories
from pplug_hf.methods.prompts import retrieval_prompt, turns_of
from pplug_hf.methods.retrievers import get_ranker
from pplug_hf.modeling.persona import item_facts
from pplug_hf.processing import PPlugProcessor
from pplug_hf.storage.files import write_text
from pplug_hf.tasks.task import Task

TASKS = ("LaMP_1", "LaMP_2", "LaMP_3", "LaMP_4", "LaMP_5")
PLAIN_LENGTH, RETRIEVAL_LENGTH, TEMPLATE_LENGTH, ANSWER_LENGTH = 320, 512, 40, 48  # tokens of a prompt, an answer
SYNTHETIC_USERS = {"LaMP_2": 3000, "LaMP_3": 3000}
# Text of an item for the encoder, and another one to compare with: tags and scores left out, titles alone, or all.
ITEMS = {
    "LaMP_1": ("{title}: {abstract}", "{title}"),
    "LaMP_2": ("tag: {tag}. tag: {tag}. {description}", "{description}"),
    "LaMP_3": ("rated {score} of 5: {text}", "{text}"),
    "LaMP_4": ("{title}", "{title}: {text}"),
    "LaMP_5": ("{title}: {abstract}", "{title}"),
}
SPLITS = ("val", "dev", "test")
VALIDATION_USERS, SPLIT_SEED = 0.15, 1


@dataclass(frozen=True)
class Sizes:
    """How many examples there are at most."""

    train: int = 8000
    val: int = 400
    test: int = 1000  # of dev and of test


class Rows(NamedTuple):
    """Tokenised examples: what stands before the soft prompt, what behind it, and the answer with its end."""

    before: list[list[int]]
    after: list[list[int]]
    answers: list[list[int]]


@dataclass
class Corpus:
    """One task.

    Args:
        folder: with the tasks' folders in LaMP's layout.
        name: of the task's folder.
        encoder: the frozen sentence encoder.
        tokenizer: of the language model, with a chat template.
        work: folder for vectors and rankings.
        sizes: of its splits.
        for_selectors: learn from the users alone from whom `pplug-hf fit` trains retrievers, and validate on those on whom it
            does: so a selector can have the plugs in its pool.
    """

    folder: Path
    name: str
    encoder: Any
    tokenizer: Any
    work: Path
    sizes: Sizes = field(default_factory=Sizes)
    for_selectors: bool = False

    def __post_init__(self) -> None:
        self.task: Task
        self.task, questions = read_examples(self.folder / self.name, "train")
        held_out = [read_examples(self.folder / self.name, split, self.task)[1] for split in ("dev", "test")]
        self.others = [e for split in held_out for e in split]
        if self.for_selectors:
            self.questions, _, val = three_way_split(questions)
        else:
            self.questions, val = split_users(questions, VALIDATION_USERS, SPLIT_SEED, nearest=True)
        self.splits = {
            "val": _some(val, self.sizes.val),
            "dev": held_out[0][: self.sizes.test],
            "test": held_out[1][: self.sizes.test],
        }
        self._made: dict[Any, Any] = {}

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # ---- examples --------------------------------------------------------------------------------------------

    def examples(self, split: str) -> list[Example]:
        """Return "val", "dev", "test", or a way to train: "all", "questions", "quarter", "half", "real".

        A quarter and a half are of the users; "questions" are without their history items, "real" without synthetic users.
        """
        return (
            self.splits[split] if split in self.splits else self._once(("examples", split), lambda: self._train(split))
        )

    def _train(self, kind: str) -> list[Example]:
        made = list(self.questions)
        if kind in ("quarter", "half"):
            _, made = split_users(made, 0.25 if kind == "quarter" else 0.5, SPLIT_SEED + 1, nearest=True)
        if kind != "questions":
            made += history_examples(made, self.task, self.others)
        if kind not in ("questions", "real") and (count := SYNTHETIC_USERS.get(self.name, 0)):
            made += synthetic_examples(made, self.task, count, 0, self.others)
        return _some(made, self.sizes.train)

    def users(self, split: str) -> list[str]:
        """Return whose examples they are."""
        return [e.user for e in self.examples(split)]

    # ---- prompts ---------------------------------------------------------------------------------------------

    def rows(self, split: str, form: str = "plain", placement: str = "answer") -> Rows:
        """Return tokenised examples, as turns of a chat.

        Args:
            split: see `examples`.
            form: "plain", "bm25@1", "dense@4" (inside the user's turn) or "bm25@4:turns" (as earlier turns).
            placement: of the soft prompt, see [`PPlugConfig`].
        """
        return self._once((split, form, placement), lambda: self._kept_rows(split, form, placement))

    def _kept_rows(self, split: str, form: str, placement: str) -> Rows:
        """Return the rows from a file, if another process has made them: retrieved items take long to fit in."""
        examples = self.examples(split)
        if split in SPLITS or form == "plain":
            return self._rows(examples, form, placement)
        name = f"{self.name}-{split}-{len(examples)}-{form}-{placement}".replace(":", ",")
        path = self.work / "rows" / f"{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(self._rows(examples, form, placement)))
        return Rows(*json.loads(path.read_text()))

    def _rows(self, examples: Sequence[Example], form: str, placement: str) -> Rows:
        processor = PPlugProcessor(self.tokenizer, placement=placement, chat=True)
        length, texts, turns = PLAIN_LENGTH, [e.prompt for e in examples], None
        if form != "plain":
            length, (name, _, as_turns) = RETRIEVAL_LENGTH, form.partition(":")
            ranker, _, k = name.partition("@")
            orders = self.ranking(ranker, examples)
            found = [[e.history[i] for i in order[: int(k)]] for e, order in zip(examples, orders, strict=True)]
            pairs = list(zip(texts, found, strict=True))
            if as_turns:
                turns = [turns_of(self.task, text, items, processor, length) for text, items in pairs]
            else:
                room = length - TEMPLATE_LENGTH
                texts = [retrieval_prompt(self.task, *pair, self.tokenizer, room).text for pair in pairs]
        targets = [str(e.target).strip() for e in examples]
        made = processor.rows(texts, targets, turns=turns, max_length=length, max_target_length=ANSWER_LENGTH)
        return Rows([r.ids[: r.position] for r in made], [r.ids[r.position :] for r in made], [r.answer for r in made])

    def ranking(self, ranker: str, examples: Sequence[Example]) -> list[list[int]]:
        """Return the four best items of each history; BM25's are kept in a file."""
        if ranker == "dense":
            found = get_ranker("dense", self.task, store=self.store, item_template=self.template("main"))
            found.prepare(examples)
            return [found.rank(e)[:4] for e in examples]
        known: dict[str, list[int]] = self._once("bm25", self._read_ranking)
        made = get_ranker(ranker, self.task)
        return [known[key] if (key := _key(e)) in known else made.rank(e)[:4] for e in examples]

    @property
    def ranking_file(self) -> Path:
        """The file of BM25's orders."""
        return self.work / f"bm25-{self.name}.json"

    def _read_ranking(self) -> dict[str, list[int]]:
        return json.loads(self.ranking_file.read_text()) if self.ranking_file.is_file() else {}

    def rank(self) -> None:
        """Write BM25's orders of all examples that are asked with retrieved items."""
        if not self.ranking_file.is_file():
            ranker = get_ranker("bm25", self.task)
            examples = [e for split in (*SPLITS, "all") for e in self.examples(split)]
            write_text(self.ranking_file, json.dumps({_key(e): ranker.rank(e)[:4] for e in examples}))

    def labels(self) -> list[list[int]]:
        """Return the tokens of each label with its end; none for free text."""
        labels = self.task.labels
        return PPlugProcessor(self.tokenizer, chat=True).answer_ids(labels) if labels else []

    # ---- histories -------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> VectorStore:
        """The vectors of texts."""
        return VectorStore(self.encoder, "", self.work / "vectors" / self.name)

    def template(self, items: str) -> str:
        """Return the template of an item's text: "main" or "other"."""
        return ITEMS[self.name][("main", "other").index(items)]

    def encode(self) -> int:
        """Encode the items and queries that most groups need; return how many texts were new."""
        for split in (*SPLITS, "all"):
            self.dataset(split)
            self.queries(split)
        return self.store.encoded

    def dataset(self, split: str, items: str = "main") -> PersonaDataset:
        """Return the examples with rows of `dataset.vectors` for every history."""
        return self._once(
            ("dataset", split, items),
            lambda: PersonaDataset(self.examples(split), self.store, self.template(items)),
        )

    def mean_item(self, items: str = "main") -> Tensor:
        """Return the mean of all items to train on, [1, D]."""
        return self._once(
            ("mean item", items),
            lambda: normalize(self.dataset("all", items).vectors, dim=-1).mean(dim=0, keepdim=True),
        )

    def queries(self, split: str) -> Tensor:
        """Return the frozen encoder's vectors of the queries, [n, D]."""
        return self._once(
            ("queries", split), lambda: self.store([e.query for e in self.examples(split)], show_progress=False)
        )

    def donors(self, split: str, ablation: str, items: str = "main") -> list[int]:
        """Return for each example the one whose history it gets: "wrong-user" or "nearest-user"."""
        examples = self.examples(split)

        def choose() -> list[int]:
            if ablation == "wrong-user":
                return shuffle_histories(examples, 0)
            dataset = self.dataset(split, items)
            return nearest_histories(examples, [dataset.persona(i) for i in range(len(dataset))])

        return self._once(("donors", split, ablation, items), choose)

    def newest(self, split: str, count: int, items: str = "main") -> list[np.ndarray]:
        """Return the rows of the newest items of each history, as `Persona.last` chooses them."""
        found = []
        for e, rows in zip(self.examples(split), self.dataset(split, items).rows, strict=True):
            times = item_facts(e.history)[1]
            order = np.arange(len(rows)) if times is None else times.argsort(stable=True).numpy()
            found.append(np.asarray(rows)[np.sort(order[max(0, len(rows) - count) :])])
        return found


def _key(example: Example) -> str:
    return f"{example.id}|{example.user}"


def _some(examples: list[Example], most: int) -> list[Example]:
    """Return that many of them at most, drawn once and for all, in their order."""
    if len(examples) <= most:
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), most))]
