"""Answers to many prompts, and whose history the wrong-user and nearest-user ablations see."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data.lamp import Example
from ..errors import ConfigurationError, DataError, MismatchError
from ..modeling import PPlugForConditionalGeneration
from ..modeling.persona import Persona, PersonaLike
from .constrained import only_labels

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..processing import PPlugProcessor


class ModelInputs(NamedTuple):
    """Inputs of the language model for n examples.

    Args:
        prompts: n texts.
        personas: n personas, for a plug.
        queries: n texts, or vectors [n, D] for a plug with a frozen input encoder.
        positions: [n] tokens before the soft prompt, where that is not its usual place.
        turns: earlier turns of each prompt's chat, (question, answer) each.
        counts: of retrieved items, to keep with the answers.
        strength: of the personas (default: as trained).
    """

    prompts: list[str]
    personas: Sequence[PersonaLike] | None = None
    queries: Sequence[str] | Tensor | None = None
    positions: Tensor | None = None
    turns: Sequence[Sequence[tuple[str, str]]] | None = None
    counts: dict[str, int] = {}  # noqa: RUF012 - never written to
    strength: float | None = None

    def batch(
        self,
        rows: Sequence[int],
        processor: PPlugProcessor,
        max_length: int | None,
        labels: Sequence[str] | None = None,
    ) -> BatchFeature:
        """Return some rows as one batch of the processor.

        Args:
            rows: B of them, in any order and more than once.
            processor: of the model.
            max_length: most tokens of a prompt.
            labels: an answer to each, to learn or to score.
        """
        batch = processor(
            text=[self.prompts[row] for row in rows],
            persona=None if self.personas is None else [self.personas[row] for row in rows],
            query=None
            if self.queries is None or isinstance(self.queries, Tensor)
            else [self.queries[i] for i in rows],
            turns=None if self.turns is None else [self.turns[row] for row in rows],
            labels=labels,
            max_length=max_length,
        )
        if isinstance(self.queries, Tensor):
            batch["query"] = self.queries[list(rows)]  # the processor takes texts only
        if self.positions is not None:
            batch["persona_position"] = self.positions[list(rows)]
        return batch


class Answers(NamedTuple):
    """Answers to n examples."""

    texts: list[str]
    counts: dict[str, int] = {}  # noqa: RUF012 - of retrieved items; never written to
    weights: list[Tensor] | None = None  # n vectors [N]: how much each history item counted, where that is of interest
    cost: dict[str, int] = {}  # noqa: RUF012 - of these answers, by the names of COSTS; never written to


def answer(
    generate: Callable[..., Any],
    processor: PPlugProcessor,
    prompts: Sequence[str],
    *,
    personas: Sequence[PersonaLike] | None = None,
    queries: Sequence[str] | Tensor | None = None,
    persona_positions: Tensor | None = None,
    persona_strength: float | None = None,
    turns: Sequence[Sequence[tuple[str, str]]] | None = None,
    batch_size: int = 32,
    max_length: int | None = 256,
    max_new_tokens: int,
    num_beams: int = 1,
    labels: Sequence[str] | None = None,
    description: str = "Answering",
) -> list[str]:
    """Answer prompts in batches, greedily or with beams; never sampled, so that a comparison can be repeated.

    Args:
        generate: `model.generate` of a plug, or of its bare backbone (then without personas and queries). A model
            in training mode is in eval mode meanwhile.
        processor: Of that model.
        prompts: n of them.
        personas: One history, `Persona` or None per prompt.
        queries: What weights each history: n texts, or vectors [n, D]. Default: the prompts.
        persona_positions: [n] tokens of each prompt in front of the persona, cut as here; see `methods/prompts.py`.
        persona_strength: Of all personas: 0 is nobody, 1 as trained (the default).
        turns: Earlier turns of each prompt's chat.
        batch_size: Prompts per batch.
        max_length: Cut prompts to this many tokens.
        max_new_tokens: Most tokens an answer may have.
        num_beams: 1 is greedy.
        labels: Answer with one of these and nothing else, see `methods/constrained.py`. Default: with anything.
        description: Title of the progress bar; "" shows none.

    Returns:
        One answer per prompt, in their order.

    Raises:
        MismatchError: Personas, queries or positions are not as many as prompts.
        ConfigurationError: `batch_size` is less than 1, or a label cannot be written in `max_new_tokens` or at all.
        DataError: There are not labels, or two are the same.
    """
    inputs = ModelInputs(list(prompts), personas, queries, persona_positions, turns)
    given = {"personas": personas, "queries": queries, "persona_positions": persona_positions, "turns": turns}
    for name, values in given.items():
        if values is not None and len(values) != len(prompts):
            raise MismatchError(f"Got {len(values)} {name} for {len(prompts)} prompts: pass one per prompt.")
    model = getattr(generate, "__self__", None)
    if labels is not None and model is None:
        raise ConfigurationError("labels need to know whose generate it is: pass the bound method, model.generate.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    strength = {} if persona_strength is None else {"persona_strength": persona_strength}
    answers: dict[int, str] = {}
    with evaluating(model):
        for rows in batches_by_length(prompts, batch_size, description):
            batch = inputs.batch(rows, processor, max_length)
            if not isinstance(model, PPlugForConditionalGeneration):
                batch.pop("persona_position", None)  # of a chat; a language model alone has no use for it
            batch = batch.to(device=getattr(model, "device", None))
            if labels is not None:
                options = only_labels(model, processor, labels, batch["input_ids"], num_beams)
                if options["max_new_tokens"] > max_new_tokens:
                    raise ConfigurationError(
                        f"max_new_tokens is {max_new_tokens}, and the longest label has {options['max_new_tokens']} "
                        "tokens with its end: give at least as many."
                    )
            generated = generate(**batch, **options, **strength, do_sample=False)
            texts = processor.decode_answers(generated, prompt_length=batch["input_ids"].shape[1])
            answers.update(zip(rows, texts, strict=True))
    return [answers[row] for row in range(len(prompts))]


def shuffle_histories(examples: Sequence[Example], seed: int = 0) -> list[int]:
    """Choose another user's history for each example: if it helps as much, that is not personalisation.

    Args:
        examples: Of at least two users.
        seed: Another seed pairs other users. The order of the examples does not matter.

    Returns:
        For each example the index of the one whose history it gets. It is always another user's, the same for all
        examples of a user, and never empty unless no other user has a history. Users with a history pass theirs
        around in one ring, so each of these histories is used equally often.

    Raises:
        DataError: There are fewer than two users.
    """
    rows_of: dict[str, list[int]] = {}
    for row in sorted(range(len(examples)), key=lambda row: (examples[row].user, examples[row].id)):
        rows_of.setdefault(examples[row].user, []).append(row)
    check_two_users(examples, "wrong-user")
    rng = random.Random(seed)
    users = list(rows_of)
    rng.shuffle(users)
    shown = {}  # which of a user's histories another one gets
    for user in users:
        rows = rows_of[user]
        shown[user] = rng.choice([row for row in rows if examples[row].history] or rows)

    users.sort(key=lambda user: not examples[shown[user]].history)  # stable: those without a history go last
    donors = [user for user in users if examples[shown[user]].history] or users
    given = {}
    for place, user in enumerate(users, start=1):
        donor = donors[place % len(donors)]
        given[user] = shown[users[1] if donor == user else donor]  # equal only if a single user has a history
    return [given[example.user] for example in examples]


def nearest_histories(examples: Sequence[Example], personas: Sequence[Persona]) -> list[int]:
    """Choose the most similar history of another user for each example: how much of a gain is a taste that users share?

    Args:
        examples: of at least two users. Their order does not matter.
        personas: the history of each.

    Returns:
        For each example the index of the one whose history it gets: the highest cosine between the means of the item
        vectors; of equals the first by user and id. Never one of the same user, and never an empty one unless no other
        user has a history. An empty history is equally far from all.

    Raises:
        DataError: there are fewer than two users.
    """
    check_two_users(examples, "nearest-user")
    order = sorted(range(len(examples)), key=lambda row: (examples[row].user, examples[row].id))
    means = torch.stack([personas[row].vectors.double().sum(dim=0) for row in order])  # [n, D], up to their lengths
    means = F.normalize(means, dim=-1)
    empty = torch.tensor([not len(personas[row]) for row in order])
    number = {user: i for i, user in enumerate(sorted({e.user for e in examples}))}
    users = torch.tensor([number[examples[row].user] for row in order])
    given = [0] * len(examples)
    for start in range(0, len(order), 1024):
        rows = slice(start, start + 1024)
        cosines = (means[rows] @ means.T).masked_fill(empty, -2.0)  # [b, n]
        nearest = cosines.masked_fill(users[rows, None] == users, -3.0).argmax(dim=1)
        for row, donor in zip(order[rows], nearest.tolist(), strict=True):
            given[row] = order[donor]
    return given


def check_two_users(examples: Sequence[Example], ablation: str) -> None:
    """Raise a `DataError` if nobody else's history is there to be taken."""
    if (users := len({e.user for e in examples})) < 2:
        raise DataError(f"The {ablation} ablation needs at least 2 users, and these examples have {users}.")


def batches_by_length(texts: Sequence[str], batch_size: int, description: str) -> Iterator[list[int]]:
    """Yield indices of texts of similar length, so that little is padded; with a progress bar that counts texts unless `description` is "".

    The longest come first: what does not fit into memory fails at once, and the time left is not underestimated.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}; give at least 1.")
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)
    with tqdm(total=len(texts), desc=description, disable=not description) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield rows
            bar.update(len(rows))


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Switch off gradients and drop-out; a model that was training goes back to it. Anything else is left alone.

    Not `inference_mode`: a model may keep tensors made there (rotary tables), and could not be trained on.
    """
    trained = model if isinstance(model, nn.Module) and model.training else None
    if trained is not None:
        trained.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if trained is not None:
            trained.train()
