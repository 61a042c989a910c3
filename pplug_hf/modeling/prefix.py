"""A soft prompt among the tokens of a prompt, and the backbone's own `generate` from there.

| placement | causal model | encoder-decoder model |
|---|---|---|
| `prompt` (equation 5) | in front of the prompt, behind its BOS | in front of the prompt |
| `answer` | behind the prompt, in front of the answer | appended to the encoder's output, which the decoder attends to |

The prefix enters as `inputs_embeds`; everything else (beams, sampling, caches, constraints) is the backbone's.
B batch, P prefix tokens, T prompt tokens, H backbone width.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

from ..errors import ConfigurationError, DataError, MismatchError
from .plug import SoftPrompt

DEFAULT_NEW_TOKENS = 20  # of generate, if no length is given

logger = logging.getLogger(__name__)

# Each would silently ignore the persona, or fail deep inside generate.
_REFUSED = {
    "assistant_model": "the assistant would draft without the persona",
    "assistant_early_exit": "the first layers would draft without the persona",
    "prompt_lookup_num_tokens": "drafting from the prompt does not see the persona",
    "use_mtp": "the model would draft without the persona",
    "encoder_outputs": "they were computed without the persona",
    "inputs_embeds": "the persona is put among the prompt's ids, so pass input_ids",
}
_REFUSED_CAUSAL = {
    "guidance_scale": "its unconditional pass needs the prompt as ids",
    "prefill_chunk_size": "chunked prefill needs the prompt as ids",
    "token_healing": "it rewrites the prompt's ids",
}


class Reading(NamedTuple):
    """The way in which a backbone takes a soft prompt."""

    by_ids: bool = False  # in the places of ids, because `inputs_embeds` mean something else to it than ids
    padding: bool = True  # rows of a batch may differ in length
    pure: bool = True  # False: besides its vector, a soft token has something of the id that stands in its place


_PLAIN = Reading()


class Inserted(NamedTuple):
    """A batch of prompts with their soft prompts."""

    embeddings: Tensor  # [B, P + T, H] of soft prompt and prompt
    mask: Tensor  # [B, P + T]
    order: Tensor  # [B, P + T], of `prefix_order`
    input_ids: Tensor  # [B, T], as they were given
    text_mask: Tensor  # [B, T]
    position: Tensor  # [B], number of prompt tokens in front of the soft prompt
    next_token: Tensor  # [B, T], the place that predicts the token behind each token of the prompt
    ids: Tensor | None  # [B, P + T], for a backbone that is given ids, whose embeddings are replaced
    behind: tuple[Tensor, Tensor] | None  # [B, P, H] and its mask, to append to the encoder's output


class Known(NamedTuple):
    """The states of prompts from a cache."""

    states: Any  # a cache or an encoder's output, as the backbone takes them
    mask: Tensor  # [B, T]


def cache_argument(backbone: PreTrainedModel) -> str:
    """Return the name under which a causal model takes a cache: it changed after transformers 5.20."""
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


def word_embeddings(backbone: PreTrainedModel) -> Any:
    """The module that embeds a prompt, scaling included: the encoder's own, which untied weights set apart from the
    model's (BART with tie_word_embeddings=False)."""
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    try:
        return reader.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # how transformers says that a module names none, as FSMT's encoder
        return backbone.get_input_embeddings()


def default_position(config: PreTrainedConfig, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return [B], the number of real tokens in front of the prefix: a causal model's BOS, else none (equation 5).

    Args:
        config: of the backbone.
        input_ids, attention_mask: [B, T] of the prompts.
    """
    if config.is_encoder_decoder:
        return attention_mask.new_zeros(len(input_ids))
    bos = getattr(config.get_text_config(), "bos_token_id", None)  # Pegasus has none
    first = input_ids.gather(1, attention_mask.argmax(dim=1, keepdim=True)).squeeze(1)
    starts_with_bos = torch.isin(first, torch.as_tensor([] if bos is None else bos, device=first.device).to(first))
    return (starts_with_bos & attention_mask.any(dim=1)).long()


def prefix_order(attention_mask: Tensor, position: Tensor, prefix_mask: Tensor, pad_left: bool) -> Tensor:
    """Return the order of tokens once a prefix stands among the real ones and padding is on one side.

    Args:
        attention_mask: [B, T], ones at real tokens, padding anywhere.
        position: [B], number of real tokens in front of the prefix.
        prefix_mask: [B, P], ones at what is there of each row's prefix; the rest becomes padding.
        pad_left: padding in front (causal models) or behind (encoder-decoder models).

    Returns:
        [B, P + T] indices into the concatenation of prefix and text along the tokens, to `gather` with.
    """
    mask, shown = attention_mask.bool(), prefix_mask.bool()
    rank = mask.cumsum(dim=1) - 1  # [B, T], number of a token among the row's real ones
    rank = rank + shown.sum(dim=1, keepdim=True) * (rank >= position[:, None])
    prefix = position[:, None] + shown.cumsum(dim=1) - 1  # [B, P]
    padding = -1 if pad_left else mask.shape[1] + shown.shape[1]
    key = torch.cat([prefix.masked_fill(~shown, padding), rank.masked_fill(~mask, padding)], dim=1)
    return key.argsort(dim=1, stable=True)


def reorder(order: Tensor, prefix: Tensor, text: Tensor) -> Tensor:
    """Concatenate [B, P, ...] and [B, T, ...] along the tokens and bring them in `order` ([B, P + T])."""
    both = torch.cat([prefix, text], dim=1)
    return both.gather(1, order[(...,) + (None,) * (both.ndim - 2)].expand_as(both))


def placeholders(order: Tensor, input_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Return the ids [B, P + T] of a prompt, its own first token in the places of the soft prompt.

    Args:
        order: [B, P + T], of `prefix_order`.
        input_ids, text_mask: [B, T], of the prompt alone.
    """
    first = input_ids.gather(1, text_mask.argmax(dim=1, keepdim=True))
    return reorder(order, first.expand(-1, order.shape[1] - input_ids.shape[1]), input_ids)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return the positions [B, L] of the tokens of a causal model, counted without padding."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def position_limit(backbone: PreTrainedModel) -> int | None:
    """Return how many tokens the table of positions has room for; None where positions are computed (rotary, relative).

    Models with rotary positions go on behind their `max_position_embeddings`, as well or badly as without a persona.
    """
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    named = (*reader.named_modules(), *reader.named_buffers())
    others = ("vision", "visual", "image", "audio")  # of a model that also sees or hears
    tables = [(name.rpartition(".")[2], table) for name, table in named if not any(part in name for part in others)]
    limits = []
    for name, table in tables:
        if ("pos" not in name and "wpe" not in name) or "rel" in name:
            continue
        if isinstance(table, nn.Embedding) and not hasattr(table, "make_weight"):  # FSMT's, which grows
            limits.append(table.num_embeddings - int(getattr(table, "offset", 0)))  # BART and OPT skip rows
        elif isinstance(table, Tensor) and table.ndim == 2 and table.is_floating_point():  # GPT-J
            limits.append(len(table))
    return min(limits, default=None)


def check_positions(limit: int | None, attention_mask: Tensor, prefix_length: int, causal: bool) -> None:
    """Refuse prompts that are too long for the backbone once their prefix is there.

    Args:
        limit: of `position_limit`.
        attention_mask: [B, P + T] of prefix and prompt.
        prefix_length: P.
        causal: positions count real tokens only; an encoder counts padding, too.

    Raises:
        DataError: names the surplus.
    """
    longest = attention_mask.shape[1]
    if limit is None or longest <= limit:
        return
    longest = int(attention_mask.sum(dim=1).max()) if causal else longest
    if longest > limit:
        raise DataError(
            f"A prompt of {longest - prefix_length} tokens and the persona's {prefix_length} are {longest - limit} more "
            f"than the backbone's {limit} positions: cut prompts to max_length={limit - prefix_length} tokens."
        )


def make_contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy a slice of the hidden states, [B, L, H] of `logits_to_keep`, before the output layer multiplies it.

    torch folds a batch into one matrix product only if the input is contiguous or the weight needs a gradient. Otherwise
    it copies the frozen weight, the whole vocabulary, once per row.
    """
    return tuple(map(Tensor.contiguous, inputs))


def checked_ids(input_ids: object, attention_mask: Tensor | None, labels: Tensor | None, aligned: bool) -> Tensor:
    """Return a batch of token ids, if its mask has its shape and its labels have rows and places for them.

    Raises:
        DataError: they have not, or it is something else.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            got = f"{list(input_ids.shape)} of {input_ids.dtype}"
        raise DataError(
            f"input_ids must be [batch, tokens], got {got}: pass a processor's batch as **batch, and texts "
            "through the processor."
        )
    shape = list(input_ids.shape)
    if attention_mask is not None and list(attention_mask.shape) != shape:
        raise DataError(f"attention_mask must be {shape}, as input_ids are, got {list(attention_mask.shape)}.")
    if labels is not None and aligned and list(labels.shape) != shape:
        raise DataError(
            f"labels must be {shape}, as input_ids are, got {list(labels.shape)}: a causal backbone is given prompt and "
            "answer as one row, with -100 where there is nothing to learn; processor(..., labels=answers) makes both."
        )
    if labels is not None and (labels.ndim != 2 or len(labels) != len(input_ids)):
        raise DataError(f"labels must be [{len(input_ids)}, tokens], got {list(labels.shape)}: one answer per prompt.")
    return input_ids


def inferred_mask(input_ids: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return the mask [B, T] of prompts that came without one, as `generate` of transformers infers it.

    Args:
        input_ids: [B, T] of the prompts.
        settings: of `generate`.
    """
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    padding = torch.zeros_like(input_ids) if pad is None else (input_ids == pad).long()
    if pad not in (eos if isinstance(eos, list) else [eos]):
        return 1 - padding
    if len(input_ids) > 1 and padding.any():
        logger.warning(
            "The pad token may also be the end of a text, so all of the prompts is read: pass attention_mask."
        )
    return torch.ones_like(input_ids)


def insert(
    backbone: PreTrainedModel,
    soft_prompt: SoftPrompt,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    labels: Tensor | None = None,
    position: Tensor | None = None,
    reading: Reading = _PLAIN,
    limit: int | None = None,
) -> Inserted:
    """Put the soft prompts of a batch where they belong.

    Args:
        backbone: the language model.
        soft_prompt: of each row, with its placement.
        input_ids, attention_mask: [B, T] of the prompts; a causal model's may be followed by answers.
        labels: of the answers.
        position: [B], number of prompt tokens in front of each soft prompt, where that is not its usual place.
        reading: the way in which the backbone takes soft prompts.
        limit: of `position_limit`.

    Raises:
        ConfigurationError: rows of different lengths, and a backbone that cannot have padding.
        DataError: a position outside of its prompt, or a prompt that is too long.
        MismatchError: not one position per prompt.
    """
    mask, causal = attention_mask, not backbone.config.is_encoder_decoder
    words = word_embeddings(backbone)(input_ids)  # [B, T, H]
    prefix, shown = soft_prompt.embeddings.to(words), soft_prompt.mask.to(mask)  # [B, P, H], [B, P]
    last = soft_prompt.at_answer.to(mask.device)  # [B]
    behind = None
    if not causal and last.any():
        behind = prefix, shown * last[:, None]
        shown = shown * ~last[:, None]
        if last.all():
            prefix, shown = prefix[:, :0], shown[:, :0]
    if position is None:
        position = default_position(backbone.config, input_ids, mask)
        behind_text = last | ~shown.any(dim=1)  # of a row without a soft prompt, too, which stands nowhere
        position = torch.where(behind_text, _prompt_lengths(mask, labels), position) if causal else position
    else:
        position = _checked_position(torch.as_tensor(position, device=mask.device), mask)
    order = prefix_order(mask, position, shown, pad_left=causal)
    both = reorder(order, shown, mask)  # [B, P + T]
    P = shown.shape[1]
    check_positions(limit, both, P, causal=causal)
    if not reading.padding and not both.all():
        raise ConfigurationError(
            f"Padding changes the answers of the backbone {type(backbone).__name__}, which has no attention mask or counts "
            "positions with the padding. Pass rows of one length, or one row at a time "
            "(per_device_train_batch_size=1 in training)."
        )
    ids = placeholders(order, input_ids, mask) if reading.by_ids else None
    where = order.argsort(dim=1)[:, P:]  # [B, T], where each prompt token went
    before = (mask.cumsum(dim=1) == position[:, None]) & mask.bool()  # the token in front of the soft prompt
    next_token = where + before * shown.sum(dim=1, keepdim=True)
    return Inserted(reorder(order, prefix, words), both, order, input_ids, mask, position, next_token, ids, behind)


def _prompt_lengths(mask: Tensor, labels: Tensor | None) -> Tensor:
    """Return [B], the number of real tokens in front of the answers."""
    return (mask if labels is None else mask * ((labels != -100).cumsum(dim=1) == 0)).sum(dim=1)


def _checked_position(position: Tensor, mask: Tensor) -> Tensor:
    if position.shape != mask.shape[:1]:
        raise MismatchError(
            f"persona_position must hold one number per prompt, [{len(mask)}], got {list(position.shape)}."
        )
    if ((position < 0) | (position > mask.sum(dim=1))).any():
        raise DataError("persona_position must lie between 0 and the number of tokens of its prompt.")
    return position


def generate_with_prefix(
    backbone: Any,  # a PreTrainedModel whose class also has `generate`
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    input_ids: Tensor,
    text_mask: Tensor,
    generation_config: GenerationConfig,
    options: dict[str, Any],
    limit: int | None = None,
    behind: tuple[Tensor, Tensor] | None = None,
    known: Known | None = None,
) -> Tensor | ModelOutput:
    """Call `backbone.generate` on a prompt that already holds its prefix.

    The backbone is given the prompt's ids beside the embeddings with the prefix: a causal model reads the embeddings
    once and counts ids from then on, an encoder-decoder model gets the encoder's output. So everything that looks at
    ids or counts them (stopping criteria, logits processors, penalties, n-gram rules, lengths, streamers) sees what it
    sees without a prefix.

    Args:
        backbone: the frozen language model.
        inputs_embeds: [B, P + T, H] prefix and prompt.
        attention_mask: [B, P + T] its mask.
        input_ids: [B, T] the prompt alone, as the user gave it.
        text_mask: [B, T] the prompt's mask.
        generation_config: defaults, which `options` override.
        options: whatever `backbone.generate` takes.
        limit: of `position_limit`. Answers end there at the latest, with a warning.
        behind: as of `encode`.
        known: what a cache has of the prompts.

    Returns:
        What `backbone.generate` returns for the prompt without a prefix: token ids or a `ModelOutput`. Causal models
        give the prompt as it came, followed by the new tokens.

    Raises:
        ConfigurationError: an option that cannot see the persona.
    """
    causal = not backbone.config.is_encoder_decoder
    config, options = _settings(generation_config, options, causal)
    if not causal:
        shown = {"output_attentions": config.output_attentions, "output_hidden_states": config.output_hidden_states}
        encoded, mask = encode(backbone, inputs_embeds, attention_mask, behind, options | shown, known)
        return backbone.generate(
            input_ids, encoder_outputs=encoded, attention_mask=mask, generation_config=config, **options
        )

    P, T = inputs_embeds.shape[1] - input_ids.shape[1], input_ids.shape[1]
    if limit is not None:
        _keep_within(config, limit, attention_mask, T)
    given = config.max_length or config.min_length or config.max_cache_len or backbone.generation_config.max_length
    if P > 0 and (given or backbone.generation_config.min_length):
        _count_without_prefix(config, backbone.generation_config, P, T)
    # Padding goes in front, as in the embeddings: a rule reads each prompt right before its answer.
    ids = input_ids.gather(1, text_mask.argsort(dim=1, stable=True))
    if config.repetition_penalty not in (None, 1.0):
        _penalise_prompts(config, options, attention_mask, text_mask)
    if known is not None:  # generate reads the embeddings behind it
        known.states.batch_repeat_interleave(max(config.num_beams or 1, config.num_return_sequences or 1))
        options[cache_argument(backbone)] = known.states
    output = backbone.generate(
        ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, generation_config=config, **options
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, T:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _settings(
    generation_config: GenerationConfig, options: dict[str, Any], causal: bool
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return a copy of the settings with the caller's options, and the options that are not settings."""
    config = copy.deepcopy(generation_config)
    for name, why in (_REFUSED | _REFUSED_CAUSAL if causal else _REFUSED).items():
        value = options.get(name, getattr(config, name, None))
        if value is not None and value is not False and (name, value) != ("guidance_scale", 1):
            raise ConfigurationError(f"generate({name}=...) does not work with a persona: {why}. Leave it out.")
    if options.get("max_new_tokens") is not None and options.get("max_length") is None:
        config.max_length = None  # a default, which the caller overrides
    rest = config.update(**options)
    if config.cache_implementation == "paged":
        raise ConfigurationError(
            "generate(cache_implementation='paged') does not work with a persona: continuous batching takes ids alone. "
            "Leave it out."
        )
    return config, rest


def encode(
    backbone: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor,
    behind: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
    known: Known | None = None,
) -> tuple[ModelOutput, Tensor]:
    """Return the encoder's output for embeddings [B, L, H] as `generate` computes it, and the mask of what it holds.

    Args:
        backbone: an encoder-decoder model.
        embeds, mask: of the prompt, [B, L, H] and [B, L].
        behind: soft prompts [B, P, H] with their mask [B, P] to append to the encoder's states.
        options: those that the encoder knows are passed on.
        known: the encoder's output and its mask, if a cache has them.
    """
    encoder = backbone.get_encoder()
    own = {name: options[name] for name in inspect.signature(encoder.forward).parameters if name in options}
    if known is not None:
        encoded, mask = known.states, known.mask
    else:
        encoded = encoder(**own, inputs_embeds=embeds, attention_mask=mask, return_dict=True)
    states = encoded.last_hidden_state.to(embeds.device)  # of a model in parts
    if behind is not None:
        states, mask = torch.cat([states, behind[0].to(states)], dim=1), torch.cat([mask, behind[1]], dim=1)
    encoded["last_hidden_state"] = states
    return encoded, mask


def _keep_within(config: GenerationConfig, limit: int, attention_mask: Tensor, T: int) -> None:
    """End answers where the table of positions ends; the backbone would fail there, on a GPU for good."""
    asked = config.max_new_tokens or (config.max_length - T if config.max_length else 0)
    if attention_mask.shape[1] + max(asked, DEFAULT_NEW_TOKENS) - 1 <= limit:
        return
    room = limit - int(attention_mask.sum(dim=1).max()) + 1  # the last token is not read again
    if room >= (asked or DEFAULT_NEW_TOKENS):
        return
    if asked:
        logger.warning(
            "With prompt and persona, %d new tokens are %d more than the backbone's %d positions allow: answers have at "
            "most %d. Cut prompts, or pass max_new_tokens=%d.",
            *(asked, asked - room, limit, room, room),
        )
    config.max_new_tokens, config.max_length = room, None


def _count_without_prefix(config: GenerationConfig, default: GenerationConfig, P: int, T: int) -> None:
    """Undo what `generate` does to lengths where there are more embeddings than ids: it subtracts all embeddings."""
    if config.max_new_tokens is None:  # else it decides
        longest = config.max_length or default.max_length
        config.max_length = longest and longest + P + T
    if config.min_new_tokens is None:
        shortest = config.min_length or default.min_length
        config.min_length = shortest and shortest + P + T
    if config.max_cache_len:  # a static cache is made for ids and embeddings
        config.max_cache_len = 2 * config.max_cache_len + P


def _penalise_prompts(
    config: GenerationConfig, options: dict[str, Any], attention_mask: Tensor, text_mask: Tensor
) -> None:
    """Give `generate` its own repetition penalty where it would take rows without a prefix for more padding."""
    padding = text_mask.shape[1] - text_mask.sum(dim=1)
    if torch.equal(padding, attention_mask.shape[1] - attention_mask.sum(dim=1)):
        return
    given = list(options.get("logits_processor") or ())
    if not any(type(one) is RepetitionPenaltyLogitsProcessor for one in given):
        rows = max(config.num_beams or 1, config.num_return_sequences or 1)
        try:
            rule = RepetitionPenaltyLogitsProcessor(config.repetition_penalty, padding.repeat_interleave(rows))
        except ValueError:  # an older transformers, which penalises all ids of a row, padding among them
            return
        options["logits_processor"] = LogitsProcessorList([rule, *given])
