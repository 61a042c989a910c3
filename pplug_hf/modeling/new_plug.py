"""The configuration of a new plug, which records the language model and the encoder that it is made for."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import PPlugConfig
from ..storage.location import local_files
from . import backbone as backbones
from . import encoders
from .frozen import note_changed_backbone
from .plug_folder import absolute_if_local
from .weight_sample import weight_digests


def new_config(
    backbone: PreTrainedModel,
    encoder: SentenceTransformer,
    tokenizer: PreTrainedTokenizerBase | None,
    chat: bool | str,
    choices: dict[str, Any],
) -> PPlugConfig:
    """Return the configuration of a new plug.

    Args:
        backbone: the language model.
        encoder: the sentence encoder.
        tokenizer: the backbone's.
        chat: as of `from_backbone`.
        choices: fields of the configuration; prompts default to the encoder's own.
    """
    prompts = {"query_prompt": encoder.prompts.get("query"), "history_prompt": encoder.prompts.get("document")}
    choices = {name: prompt or "" for name, prompt in prompts.items()} | choices
    name, commit = backbones.origin(backbone)
    encoder_name, encoder_commit = encoders.origin(encoder)
    at_states = backbone.config.is_encoder_decoder and choices.get("placement", PPlugConfig.placement) == "answer"
    norm = backbones.state_norm if at_states else backbones.embedding_norm
    note_changed_backbone(name, local_files(name, commit), backbone)
    return PPlugConfig(
        backbone=absolute_if_local(name),
        backbone_revision=commit,
        backbone_fingerprint={**backbones.fingerprint(backbone), **weight_digests(backbone)},
        encoder=absolute_if_local(encoder_name),
        encoder_revision=encoder_commit,
        encoder_fingerprint=encoders.fingerprint(encoder, choices["history_prompt"]),
        is_encoder_decoder=bool(backbone.config.is_encoder_decoder),
        hidden_size=backbones.hidden_size(backbone),
        encoder_size=encoders.encoder_size(encoder),
        embedding_norm=norm(backbone, len(tokenizer) if tokenizer is not None else None),
        chat=backbones.writes_chats(tokenizer, chat),
        **choices,
    )
