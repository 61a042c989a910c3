"""What a persona plug needs to know about a language model: load it, freeze it, measure it, put a prefix in it.

Letters: B batch, T text tokens, P prefix tokens, H backbone width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..errors import ConfigurationError, MissingFileError


def load_backbone(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The language model of a Hub id or local folder; a loaded model is returned as it is.

    Args:
        source: what to load.
        **kwargs: for `from_pretrained` (revision, dtype, device_map, quantization_config, ...).

    Raises:
        ConfigurationError: not a model that generates text from embeddings.
        MissingFileError: no such folder, and neither the cache nor the Hub has it.
    """
    if isinstance(source, str):
        source = _load(source, **kwargs)
    if not isinstance(source, PreTrainedModel) or not source.can_generate():
        raise ConfigurationError(
            f"The backbone must be a transformers model that generates text, got {type(source).__name__}: load it with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM, or pass its Hub id or folder."
        )
    return source


def _load(name: str, **kwargs: Any) -> PreTrainedModel:
    hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
    try:
        config = _load_config(name, **hub)
        if config.is_encoder_decoder and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            auto: Any = AutoModelForSeq2SeqLM
        elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
            config, "auto_map", {}
        ):
            auto = AutoModelForCausalLM
        else:
            raise ConfigurationError(
                f"The backbone {name!r} is of type {config.model_type!r}, which transformers has neither as a causal "
                "nor as an encoder-decoder language model. Options are e.g. t5, bart, gpt2, llama, qwen3."
            )
        model, report = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    except OSError as error:
        raise MissingFileError(
            f"Cannot load the backbone {name!r}: it is no complete model folder, and neither the cache nor the Hub "
            f"answered for it ({type(error).__name__}). Check the name and the connection, or pass backbone=<a loaded "
            "model>."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigurationError(
            f"The backbone {name!r} lacks {len(missing)} weights of a {type(model).__name__} (first {missing[0]}), which "
            "would stay random: it is no complete language model."
        )
    return model


def _load_config(name: str, **kwargs: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        raise ConfigurationError(
            f"The backbone {name!r} is of no type that transformers knows ({str(error).splitlines()[0]})"
        ) from error


_HUB_ARGUMENTS = (
    "revision",
    "subfolder",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "trust_remote_code",
)


def freeze_backbone(backbone: PreTrainedModel) -> None:
    """In place: no gradients, and every dropout rate zero.

    Rates are zeroed rather than the mode fixed to `eval()`, because activation checkpointing is skipped by layers
    in eval mode. They are modules (`nn.Dropout`) or plain attributes (`attention_dropout`, `layerdrop`, ...).
    """
    backbone.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def fingerprint(backbone: PreTrainedModel) -> dict[str, Any]:
    """What must be equal for a plug to fit: type, kind, width and vocabulary."""
    return {
        "model_type": backbone.config.model_type,
        "is_encoder_decoder": bool(backbone.config.is_encoder_decoder),
        "hidden_size": hidden_size(backbone),
        "vocab_size": backbone.config.get_text_config().vocab_size,
    }


def hidden_size(backbone: PreTrainedModel) -> int:
    """H: the width of what the input embeddings give."""
    return _embed_ids(backbone, torch.zeros(1, dtype=torch.long)).shape[-1]


def source_of(backbone: PreTrainedModel) -> tuple[str | None, str | None]:
    """(Hub id or folder, commit) a backbone was loaded from, as far as it knows."""
    return backbone.config.name_or_path or None, getattr(backbone.config, "_commit_hash", None)


def find_tokenizer(backbone: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a backbone; None if there is none, which only matters once a prompt must be decoded."""
    name, revision = source_of(backbone)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision) if name else None
    except (OSError, ValueError):
        return None


@torch.no_grad()
def embedding_norm(backbone: PreTrainedModel, vocab_size: int | None = None) -> float:
    """Mean L2 norm of the token embeddings, as the module gives them (BART and Gemma scale inside it).

    Args:
        backbone: the language model.
        vocab_size: number of real tokens, where the table has unused rows behind them (default: all rows).

    Rows of zeros (padding) are left out.
    """
    rows = fingerprint(backbone)["vocab_size"]
    ids = torch.arange(min(vocab_size or rows, rows))
    norms = torch.cat([_embed_ids(backbone, chunk).float().norm(dim=-1).cpu() for chunk in ids.split(8192)])
    return norms[norms > 0].mean().item()


def _embed_ids(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    embeddings = backbone.get_input_embeddings()
    return embeddings(ids.to(next(embeddings.parameters()).device))


def default_position(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B]: how many real tokens stay in front of the prefix: a causal model's BOS, else none (equation 5)."""
    if backbone.config.is_encoder_decoder:
        return attention_mask.new_zeros(len(input_ids))
    bos = backbone.config.get_text_config().bos_token_id
    first = input_ids.gather(1, attention_mask.argmax(dim=1, keepdim=True)).squeeze(1)
    starts_with_bos = torch.isin(first, torch.as_tensor([] if bos is None else bos, device=first.device).to(first))
    return (starts_with_bos & attention_mask.any(dim=1)).long()


def prefix_order(attention_mask: Tensor, position: Tensor, prefix_length: int, pad_left: bool) -> Tensor:
    """Where everything goes when a prefix is put among the real tokens and padding moves to one side.

    Args:
        attention_mask: [B, T], ones at real tokens, padding anywhere.
        position: [B], number of real tokens in front of the prefix.
        prefix_length: P.
        pad_left: padding in front (causal models) or behind (encoder-decoder models).

    Returns:
        [B, P + T] indices into the concatenation of prefix and text along the tokens, to `gather` with.
    """
    mask = attention_mask.bool()
    rank = mask.cumsum(dim=1) - 1  # [B, T], number of a token among the row's real ones
    rank = rank + prefix_length * (rank >= position[:, None])
    prefix = position[:, None] + torch.arange(prefix_length, device=mask.device)
    padding = -1 if pad_left else rank.shape[1] + prefix_length
    key = torch.cat([prefix, rank.masked_fill(~mask, padding)], dim=1)
    return key.argsort(dim=1, stable=True)


def reorder(order: Tensor, prefix: Tensor, text: Tensor) -> Tensor:
    """Concatenate [B, P, ...] and [B, T, ...] along the tokens and bring them in `order` ([B, P + T])."""
    both = torch.cat([prefix, text], dim=1)
    return both.gather(1, order[(...,) + (None,) * (both.ndim - 2)].expand_as(both))
