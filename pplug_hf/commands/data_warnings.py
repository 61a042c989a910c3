"""Warnings about data that works, but perhaps not as expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..data.records import Example
from ..tasks.items import field_text
from ..tasks.task import Task

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from ..processing import PPlugProcessor


def warn_truncated_prompts(processor: PPlugProcessor, examples: Sequence[Example], max_length: int) -> None:
    """Print how many prompts are longer than the budget: the middle of their text is lost."""
    special = len(processor.rows(["?"])[0].ids) - len(processor.tokenizer("?", add_special_tokens=False)["input_ids"])
    texts, limit = [e.prompt for e in examples], max_length - special
    encoded = processor.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max(limit, 0) + 1)
    if cut := sum(len(ids) > limit for ids in encoded["input_ids"]):
        print(
            f"{cut} of {len(examples)} prompts have more than max_length={max_length} tokens and lose the middle of their "
            "text."
        )


def warn_truncated_items(encoder: SentenceTransformer, texts: Iterable[str], prompt: str = "") -> None:
    """Print how many items are longer than the encoder reads."""
    limit, texts = encoder.max_seq_length, list(texts)
    if limit is None:
        return
    # A token is at least one byte; most items are too short to be worth counting.
    long = [prompt + text for text in texts if len((prompt + text).encode("utf-8", "replace")) > limit - 2]
    tokens = encoder.tokenizer(long, truncation=True, max_length=limit + 1)["input_ids"] if long else []
    if cut := sum(len(ids) > limit for ids in tokens):
        print(
            f"{cut} of {len(texts)} items are longer than the {limit} tokens that the encoder reads and lose their end."
        )


def warn_short_histories(examples: Sequence[Example], k: int = 1) -> None:
    """Print how many histories are empty, and how many have fewer items than are asked for."""
    lengths = [len(e.history) for e in examples]
    if empty := lengths.count(0):
        print(f"{empty} of {len(examples)} histories are empty: these users are answered as new ones.")
    if short := sum(0 < length < k for length in lengths):
        print(f"{short} of {len(examples)} histories have fewer than {k} items and are shown whole.")


def warn_foreign_labels(task: Task, examples: Sequence[Example]) -> None:
    """Print how many history items have an answer that is not a label: they are never trained on."""
    items = {id(item): item for e in examples for item in e.history}.values()
    foreign = sum(bool(field_text(item, task.answer_field)) and not task.item_label(item) for item in items)
    if foreign:
        print(f"{foreign} of {len(items)} history items have an answer that is not a label of {task.name}.")
