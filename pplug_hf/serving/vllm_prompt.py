"""Prompts as vLLM reads them: ids where the text is, and rows of a soft prompt that were checked before they are sent.

vLLM checks nothing itself. One row with NaN makes its answer empty, and those of everybody after it, while the engine
still says that it is healthy; a row of another width ends the engine.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..errors import ConfigurationError, DataError, MismatchError
from ..processing import Row
from .engine import Sampling

# Times the mean norm of a token's embedding. The loudest token of SmolLM2 has 2.3, soft tokens of trained plugs up to 9,
# twice that where a persona is made stronger; what is far above comes of broken weights.
LARGEST_NORM = 32.0

_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def checked_rows(rows: Tensor, dtype: torch.dtype, width: int, embedding_norm: float) -> Tensor:
    """Return a soft prompt as it may be sent.

    Args:
        rows: [P, H] of one request.
        dtype: of the engine.
        width: H, of the language model.
        embedding_norm: mean norm of its token embeddings.

    Returns:
        [P, H] in the engine's dtype, on the CPU.

    Raises:
        MismatchError: not rows of this width.
        DataError: NaN, infinity, more than the dtype holds, or a norm that no plug gives.
    """
    if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point():
        raise MismatchError(
            f"A soft prompt for this language model is [tokens, {width}] of floating point numbers, got "
            f"{list(rows.shape)} of {rows.dtype}: the plug was made for another one."
        )
    rows = rows.detach().to("cpu", dtype)
    if not rows.isfinite().all():
        raise DataError(
            "The persona of this request is damaged: its soft prompt holds NaN or infinity. Encode it again."
        )
    loudest = float(rows.float().norm(dim=-1).max()) if len(rows) else 0.0
    if loudest > LARGEST_NORM * embedding_norm:
        raise DataError(
            f"The persona of this request is damaged: its soft prompt has a norm of {loudest:.3g}, and tokens of this "
            f"language model have {embedding_norm:.3g}. Encode it again, or lower its strength."
        )
    return rows


def mixed_prompt(row: Row, soft: Tensor | None, tenant: str) -> dict[str, object]:
    """Return a prompt for `vllm.LLM.generate` and the like.

    Args:
        row: the text's ids, with the place of the soft prompt.
        soft: [P, H] of `checked_rows`; None for the text alone.
        tenant: whose cached states may be used.

    Returns:
        Token ids, and for a soft prompt `prompt_embeds` [T, H] and the mask that tells ids from rows.
    """
    salt = hashlib.sha256(tenant.encode()).hexdigest()
    if soft is None:
        return {"prompt_token_ids": row.ids, "cache_salt": salt}
    at, P = row.position, len(soft)
    T = len(row.ids) + P
    # Ones, which no soft token is, at the texts: they are not read there, but they are part of the key under which vLLM
    # caches states, and the mask is not. A soft token of zeros cannot be taken for the filler as a word.
    embeds = torch.ones(T, soft.shape[1], dtype=soft.dtype)
    embeds[at : at + P] = soft
    return {
        "prompt_embeds": embeds,
        "prompt_token_ids": [*row.ids[:at], *row.ids[:1] * P, *row.ids[at:]],
        "prompt_is_token_ids": [not at <= i < at + P for i in range(T)],
        "cache_salt": salt,
    }


def sampling_options(chosen: Sampling, has_persona: bool, stop_ids: tuple[int, ...] = ()) -> dict[str, object]:
    """Return settings as `vllm.SamplingParams` takes them.

    Args:
        chosen: of the request.
        has_persona: whether a soft prompt is in the prompt.
        stop_ids: tokens that end an answer, besides the language model's own.

    Raises:
        ConfigurationError: a penalty with a persona: vLLM counts the ids of a prompt, and a soft token has none.
    """
    penalties = {name: getattr(chosen, name) for name in _PENALTIES}
    given = [name for name, value in penalties.items() if value != _PENALTIES[name]]
    if has_persona and given:
        raise ConfigurationError(
            f"{given[0]}={penalties[given[0]]} does not go with a persona under vLLM, which counts the ids of a prompt, and "
            "a soft prompt has none: leave it out, or use TransformersEngine."
        )
    return {
        "max_tokens": chosen.max_new_tokens,
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "top_k": chosen.top_k,
        "stop": list(chosen.stop),
        "seed": chosen.seed,
        "stop_token_ids": list(stop_ids),
        **penalties,
    }
