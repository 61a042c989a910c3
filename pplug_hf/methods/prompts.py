"""Retrieved items and an input in one prompt, as the LaMP benchmark puts them together.

    found = retrieve(get_ranker("bm25", task), examples, k=4)
    prompts = [retrieval_prompt(task, e.prompt, items, tokenizer, 256) for e, items in zip(examples, found)]
    batch = processor(text=[prompt.text for prompt in prompts], max_length=256)

How it looks is data of the task (`Task.prompt_format`). What has to be cut is decided in tokens:

- The input keeps what it needs, at most 60 % of the budget; the items share the rest equally.
- Of an item only one field is cut, at its end (the text; never the label). What an item leaves of its share passes on
  to those after it.
- Where not even the labels fit, the input keeps 50 %, then 40 %, ... 0 %. If that does not help, there are no items:
  the prompt is the input, as it is for an empty history.
- The benchmark's own code does not cut a text at all whose share leaves no token for it; here it becomes empty, or
  counts as not fitting if even special tokens have no room. Nor does a cut here leave half a character.

The input itself is never cut here; a prompt that is still too long loses the middle of its text in the processor.

With a plug, a prompt has two orders. Ours is [I; P; retrieved; input]: hand the texts over as they are. The paper's is
[retrieved; I; P; input]: pass `persona_position=persona_positions(processor, prompts, 256)` too.

A chat model can also be shown items as earlier turns, see `turns_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError
from ..tasks.items import item_text, whole_fields, whole_texts
from ..tasks.task import PromptFormat, Task, get_task

if TYPE_CHECKING:
    from ..processing import PPlugProcessor

# So much of a text is read for every token that it may have: texts of any size cost the same, and prose has five
# characters or so to a token.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class RetrievalPrompt:
    """A prompt with retrieved items."""

    text: str
    items: int  # how many of them are in it
    items_end: int  # the character of `text` behind the last of them and the words around them; 0 if there are none


def retrieval_prompt(
    task: Task | str,
    input_text: str,
    items: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 256,
) -> RetrievalPrompt:
    """Put items before an input (inside it for LaMP-1), each cut to its share of the token budget.

    Args:
        task: the task, or its name.
        input_text: an input of this task.
        items: retrieved items, best first; the first ones have the first say in the budget.
        tokenizer: of the backbone.
        max_length: the budget, in tokens.

    Returns:
        The prompt. A text that is cut comes back from its tokens, and so does one that is not: white space and
        characters that the tokenizer does not keep are gone. Of a text no more than 32 characters per token of the
        budget are looked at. No items if there are none, if they do not fit, or if the input lacks the place for
        them.

    Raises:
        ConfigurationError: `max_length` is less than 1, or the task's items have no format.
    """
    if max_length < 1:
        raise ConfigurationError(f"max_length is {max_length}; give a budget of at least 1 token.")
    form = get_task(task).prompt_format
    (input_text,) = whole_texts([input_text])
    items = [whole_fields(item) for item in items]
    parts = form.split(input_text)
    if parts is None or not items:
        return RetrievalPrompt(input_text, 0, 0)
    head, rest = parts

    asked = _length(tokenizer, input_text, max_length)
    tokens = [_tokens(tokenizer, item_text(item, f"{{{form.cut}}}"), max_length) for item in items]
    costs = [_item_cost(tokenizer, form, item, max_length) for item in items]
    reserved = _length(tokenizer, form.reserved, max_length) if form.reserved else 0
    fixed = form.frame_tokens + reserved + form.join_tokens * (len(items) - 1)
    added = len(tokenizer("")["input_ids"])  # special tokens; the benchmark counts them with every text
    for tenths in range(6, -1, -1):
        share = (max_length - min(asked, max_length * tenths // 10) - fixed) // len(items)
        limits = _limits([len(ids) + added for ids in tokens], costs, share)
        if min(limits) >= added:
            break
    else:
        return RetrievalPrompt(input_text, 0, 0)

    shown = []
    for item, ids, limit in zip(items, tokens, limits, strict=True):
        kept = str(tokenizer.decode(ids[: limit - added], skip_special_tokens=True))
        if limit - added < len(ids):
            kept = kept.rstrip("\ufffd")  # a character may be several tokens
        shown.append(item_text({**item, form.cut: kept}, form.item))
    # The frame ends in the input's place or has words behind it: either way, what stands before that place is known.
    before, after = form.frame.split("{input}")
    fields = {"head": head, "items": form.join.join(shown)}
    before, after = item_text(fields, before), item_text(fields, after)
    return RetrievalPrompt(before + rest + after, len(items), len(before))


def text_budget(processor: PPlugProcessor, max_length: int) -> int:
    """Return the tokens that a retrieval prompt may have, so that the processor cuts nothing of it.

    The template of a chat takes its part of `max_length`; other special tokens are counted by `retrieval_prompt` itself.
    """
    return max(1, processor.room(max_length)) if processor.chat else max_length


def persona_positions(
    processor: PPlugProcessor, prompts: Sequence[RetrievalPrompt], max_length: int | None = None
) -> Tensor:
    """Return the position of the soft prompt in the paper's order: behind the retrieved items, before the input.

    Args:
        processor: of the model.
        prompts: B of them, from `retrieval_prompt`.
        max_length: as the processor is given it.

    Returns:
        [B], for `persona_position` of `forward` and `generate`. Where a prompt has no items, the soft prompt stands
        where it would without retrieval.

    Raises:
        ConfigurationError: the tokenizer does not say which characters a token stands for.
    """
    texts = [prompt.text for prompt in prompts]
    offsets = [prompt.items_end if prompt.items else None for prompt in prompts]
    return torch.tensor([row.position for row in processor.rows(texts, persona_offset=offsets, max_length=max_length)])


def turns_of(
    task: Task | str,
    input_text: str,
    items: Sequence[Mapping[str, str]],
    processor: PPlugProcessor,
    max_length: int = 256,
) -> list[tuple[str, str]]:
    """Return retrieved items as earlier turns of a chat: an item as a question, then the user's own answer to it.

    Args:
        task: the task, or its name; its items carry answers.
        input_text: the question that the turns go in front of.
        items: retrieved items, best first; of those that do not fit, the last are left out.
        processor: of the model.
        max_length: the budget of the whole prompt, in tokens.

    Returns:
        (question, answer) of each turn, the best item last, next to the question.
    """
    task = get_task(task)
    asked = [(task.question(item, input_text)[0], task.item_label(item)) for item in items]
    turns = [(question, answer) for question, answer in asked if question and answer]
    while turns and len(processor.rows([input_text], turns=[turns[::-1]])[0].ids) > max_length:
        turns.pop()
    return turns[::-1]


def _limits(lengths: list[int], costs: list[int], share: int) -> list[int]:
    """Return the most tokens that the text of each item may have; a negative number if nothing fits."""
    limits, saved = [], 0
    for length, cost in zip(lengths, costs, strict=True):
        limits.append(share + saved - cost)
        saved += share - cost - min(length, limits[-1])
    return limits


def _item_cost(
    tokenizer: PreTrainedTokenizerBase, form: PromptFormat, item: Mapping[str, str], max_length: int
) -> int:
    """Count the tokens of an item without the text that is cut: a space stands in for it, and counts, as in the benchmark."""
    if isinstance(form.item_tokens, int):
        return form.item_tokens
    label = item_text({**item, form.cut: " "}, form.item_tokens or form.item)
    return _length(tokenizer, label, max_length) if label == _start(label, max_length) else max_length + 1


def _length(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> int:
    """Count the tokens of a text, special ones included; exact up to `most`."""
    return len(tokenizer(_start(text, most), verbose=False)["input_ids"])


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> list[int]:
    """Return the first `most` tokens of a text, or all; without special ones."""
    return tokenizer(_start(text, most), add_special_tokens=False, verbose=False)["input_ids"][:most]


def _start(text: str, tokens: int) -> str:
    return text[: _CHARACTERS_PER_TOKEN * tokens]
