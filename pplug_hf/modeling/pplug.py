"""A frozen language model with a persona plug: equations (5) and (6), as a transformers model.

The plug alone is built by `__init__`; backbone and encoders are attached afterwards and never saved. That order
matters: transformers initialises, casts and moves what a constructor builds, and would corrupt loaded parts
without a word.

Letters: B batch, N items of one user, T text length, P prefix length, D encoder width, H backbone width,
K persona tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError, MismatchError
from . import backbone as backbones
from . import encoders
from . import plug_folder as files
from .aggregators import AGGREGATORS
from .encoding import check_part
from .generation import generate_with_prefix
from .plug import PersonaPlug
from .plugs import DEFAULT, PlugsMixin
from .saving import SavingMixin, drop_frozen, ignore_missing_frozen


class PPlugForConditionalGeneration(SavingMixin, PlugsMixin, PreTrainedModel, GenerationMixin):
    """Any frozen seq2seq or causal language model, personalised by a plug (Liu et al., ACL 2025).

    Create one with [`from_backbone`], load one with [`from_pretrained`]. `model.backbone` is the frozen model and
    stays usable alone (its dropout rates are zero from then on); `model.plug` is everything that is trained.

    Args:
        config: a complete [`PPlugConfig`]. The constructor builds the plug only; see [`attach`].
    """

    config_class = PPlugConfig
    base_model_prefix = "plug"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch itself
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the choice is the backbone's

    def __init__(self, config: PPlugConfig):
        super().__init__(config)
        self.loss_type = None  # transformers would pick one by the class name
        self.plug = PersonaPlug(config)
        self.backbone: Any = None  # a PreTrainedModel, once attached
        self.history_encoder: Any = None  # a SentenceTransformer, once attached
        self.tokenizer: Any = None  # the backbone's; decodes prompts into queries
        self._slots = {DEFAULT: None}
        self.register_state_dict_post_hook(drop_frozen)
        self.register_load_state_dict_post_hook(ignore_missing_frozen)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The plug draws its own weights, and what is attached is trained already."""

    # ---- creating, attaching -------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        encoder: str | SentenceTransformer,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        **choices: Any,
    ) -> PPlugForConditionalGeneration:
        """A fresh plug over a frozen language model.

        Args:
            backbone: Hub id, local folder, or a loaded seq2seq or causal model.
            encoder: Hub id, local folder, or a loaded `SentenceTransformer`.
            tokenizer: the backbone's; found beside the backbone if not given.
            backbone_kwargs: for the backbone's `from_pretrained` (dtype, device_map, quantization_config, ...).
            encoder_kwargs: for `SentenceTransformer` (revision, device, model_kwargs, ...).
            **choices: fields of [`PPlugConfig`], e.g. `num_persona_tokens=4`. Prompts default to the encoder's own
                ("query" for requests, "document" for history items).

        Returns:
            The model in eval mode, its plug freshly drawn and in fp32.

        Raises:
            ConfigurationError: an unknown choice, or not a language model.
            MissingFileError: backbone or encoder cannot be found.
        """
        from ..configuration.pplug import choices as known

        if unknown := set(choices) - set(known()):
            raise ConfigurationError(f"Unknown option {sorted(unknown)}; options are {', '.join(known())}.")
        backbone = backbones.load_backbone(backbone, **(backbone_kwargs or {}))
        encoder = encoders.load_encoder(encoder, **(encoder_kwargs or {}))
        if tokenizer is None:
            tokenizer = backbones.find_tokenizer(backbone, **(backbone_kwargs or {}))
        choices.setdefault("query_prompt", encoder.prompts.get("query") or "")
        choices.setdefault("history_prompt", encoder.prompts.get("document") or "")
        (backbone_name, backbone_commit), (encoder_name, encoder_commit) = (
            backbones.origin(backbone),
            encoders.origin(encoder),
        )
        config = PPlugConfig(
            backbone=files.absolute_if_local(backbone_name),
            backbone_revision=backbone_commit,
            backbone_fingerprint=backbones.fingerprint(backbone),
            encoder=files.absolute_if_local(encoder_name),
            encoder_revision=encoder_commit,
            encoder_fingerprint=encoders.fingerprint(encoder, choices["history_prompt"]),
            is_encoder_decoder=bool(backbone.config.is_encoder_decoder),
            hidden_size=backbones.hidden_size(backbone),
            encoder_size=encoders.encoder_size(encoder),
            embedding_norm=backbones.embedding_norm(backbone, len(tokenizer) if tokenizer is not None else None),
            **choices,
        )
        model = cls(config)
        model.attach(backbone, encoder, tokenizer)
        return model.eval()

    def attach(
        self,
        backbone: PreTrainedModel,
        encoder: SentenceTransformer,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Put the plug on its frozen backbone and encoder, on the backbone's device.

        Args:
            backbone: the language model, which is frozen here.
            encoder: the sentence encoder, which is frozen here; a copy of it becomes the input encoder.
            tokenizer: the backbone's; without it every request needs a `query`.

        Raises:
            MismatchError: one of them is not the one the plug was made for; the message names both.
        """
        check_part(self.config, "backbone", backbones.fingerprint(backbone))
        check_part(self.config, "encoder", encoders.fingerprint(encoder, self.config.history_prompt))
        self._put_on(backbone, encoder, tokenizer)

    def _put_on(self, backbone: Any, encoder: SentenceTransformer, tokenizer: PreTrainedTokenizerBase | None) -> None:
        backbones.freeze_backbone(backbone)
        self.backbone = backbone
        device: Any = backbones.word_embeddings(backbone).weight.device
        encoders.freeze_encoder(encoder)
        self.history_encoder = encoder if encoder.device == device else encoder.to(device)
        if self.config.train_input_encoder and AGGREGATORS[self.config.aggregator].needs_query:
            self.plug.input_encoder = encoders.trainable_copy(encoder)
        self.plug.to(device)
        self.tokenizer = tokenizer
        self.generation_config = copy.deepcopy(backbone.generation_config)

    def _attached(self) -> tuple[Any, Any]:
        if self.backbone is None or self.history_encoder is None:
            raise ConfigurationError(
                "This plug has no backbone yet: use PPlugForConditionalGeneration.from_backbone or "
                "PPlugModel.from_pretrained, or call model.attach(backbone, encoder)."
            )
        return self.backbone, self.history_encoder

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the plug and the backbone in place, each one graph: between them texts are read, outside of any graph.

        Args:
            *args: as of `torch.compile`.
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        backbone, _ = self._attached()
        self.plug.compile(*args, **kwargs)
        backbone.compile(*args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's method. The encoders keep what they were loaded with: they compute in a dtype of their own.

        Args:
            *args: as of the backbone's: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        self._attached()[0].set_attn_implementation(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The backbone's, for what looks for them in any model of transformers; None before there is one."""
        return None if self.backbone is None else self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Likewise the layer that gives the logits."""
        return None if self.backbone is None else self.backbone.get_output_embeddings()

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> PPlugForConditionalGeneration:
        """The history encoder never leaves eval mode; the backbone has no dropout left to switch on."""
        super().train(mode)
        if mode and self.history_encoder is not None:
            self.history_encoder.eval()
        return self

    def print_trainable_parameters(self) -> None:
        """One line, as PEFT prints it."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # ---- forward, generate ---------------------------------------------------------------------------------

    def _prefixed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        persona: Any,
        query: Any,
        position: Any,
        plug: Any,
        labels: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Equation (5): embeddings [B, P + T, H] of prefix and prompt, their mask, their order, the prompt's mask."""
        backbone, _ = self._attached()
        if input_ids is None or input_ids.ndim != 2:
            raise DataError(
                f"input_ids must be [batch, tokens], got {None if input_ids is None else list(input_ids.shape)}."
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        prefix, shown = self._soft_prompts(plug, persona, query, input_ids, mask, labels)  # [B, P, H], [B, P]
        words = backbones.word_embeddings(backbone)(input_ids)  # [B, T, H]
        prefix = prefix.to(words)
        if position is None:
            position = backbones.default_position(backbone, input_ids, mask)
        else:
            position = _checked_position(torch.as_tensor(position, device=mask.device), mask)
        order = backbones.prefix_order(mask, position, shown, pad_left=not self.config.is_encoder_decoder)
        embeds = backbones.reorder(order, prefix, words)
        full_mask = backbones.reorder(order, shown, mask)
        return embeds, full_mask, order, mask

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        persona: Any = None,
        query: Any = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput:
        """Logits, and the loss of equation (6) if there are labels.

        Args:
            input_ids: [B, T] prompts; for a causal model in training, prompts followed by answers.
            attention_mask: [B, T], ones at real tokens; padding may be on either side.
            labels: [B, L] answers (encoder-decoder) or [B, T] (causal), -100 where there is nothing to predict.
            persona: one history, [`Persona`] or None per row. None is a user without history.
            query: one request per row that weights the history: texts, or vectors [B, D]. Default: the prompt.
            persona_position: [B], number of prompt tokens in front of the prefix. Default: the BOS of a causal model.
            plug: name of the loaded plug to use, or one name per row, None for a row without any plug. Default: the
                active plug.
            num_items_in_batch: divide the summed loss by this (the Trainer gives it) instead of by the number of
                labels here.
            **kwargs: for the backbone's forward.

        Returns:
            The backbone's output; the logits of a causal model are [B, T, V], aligned with `input_ids`. In training,
            with labels and gradients, a causal model computes no more logits than its loss needs: [B, L, V] at the end
            of the rows, from the first position that predicts an answer on.
        """
        backbone, _ = self._attached()
        embeds, mask, order, _ = self._prefixed(
            input_ids, attention_mask, persona, query, persona_position, plug, labels
        )
        P = order.shape[1] - input_ids.shape[1]
        if self.training:
            kwargs.setdefault("use_cache", False)
        if self.config.is_encoder_decoder:
            if labels is not None and kwargs.get("decoder_input_ids") is None:
                kwargs["decoder_input_ids"] = backbone.prepare_decoder_input_ids_from_labels(labels=labels)
            output = backbone(inputs_embeds=embeds, attention_mask=mask, **kwargs)
            if labels is not None:
                output["loss"] = _token_loss(output.logits, labels, num_items_in_batch)
            return output

        kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if labels is None:
            output = backbone(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        else:
            targets = backbones.reorder(order, labels.new_full((len(labels), P), -100), labels)
            targets = targets[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # nothing stands in front of a first token
            targets = F.pad(targets, (0, 1), value=-100)  # [B, P + T], what each position has to predict
            # Padding is in front, so answers end together: only the last L positions need logits, the widest layer.
            L = targets.shape[1] - int((targets != -100).any(dim=0).int().argmax())
            learning = self.training and torch.is_grad_enabled()
            if learning and "logits_to_keep" in inspect.signature(backbone.forward).parameters:
                kwargs["logits_to_keep"] = L
            output = backbone(inputs_embeds=embeds, attention_mask=mask, **kwargs)
            logits = output.logits[:, -L:]  # [B, L, V]
            output["loss"] = _token_loss(logits, targets[:, -L:], num_items_in_batch)
            if learning:
                output["logits"] = logits
                return output
        where = order.argsort(dim=1)[:, P:, None]  # [B, T, 1], where each prompt token went
        output["logits"] = output.logits.gather(1, where.expand(-1, -1, output.logits.shape[-1]))
        return output

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Any = None,
        *,
        attention_mask: Tensor | None = None,
        persona: Any = None,
        query: Any = None,
        persona_position: Tensor | None = None,
        plug: str | Sequence[str | None] | None = None,
        generation_config: GenerationConfig | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Answer prompts as their users would like them answered. Takes and returns what the backbone's generate does.

        Args:
            input_ids: [B, T] prompts, padded on either side.
            attention_mask: [B, T].
            persona, query, persona_position, plug: as in `forward`.
            generation_config: default `model.generation_config`.
            labels: ignored; the Trainer passes its whole batch.
            **kwargs: any argument of `generate`: max_new_tokens, num_beams, do_sample, streamer, ...

        Returns:
            [B * num_return_sequences, length] token ids, or a `ModelOutput`. Causal models: prompt and new tokens.
        """
        backbone, _ = self._attached()
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        embeds, mask, _, text_mask = self._prefixed(
            input_ids, attention_mask, persona, query, persona_position, plug, None
        )
        settings = copy.deepcopy(generation_config or self.generation_config)
        if generation_config is not None:
            settings.update(**self.generation_config.to_dict(), defaults_only=True)  # completes a partial one
        return generate_with_prefix(backbone, embeds, mask, input_ids, text_mask, settings, **kwargs)


class PPlugModel:
    """The front door: `PPlugModel.from_pretrained(plug)` gives the right class, ready to generate."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise ConfigurationError(
            "PPlugModel is loaded with PPlugModel.from_pretrained(plug); to create a plug use "
            "PPlugForConditionalGeneration.from_backbone(backbone, encoder=...)."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PPlugForConditionalGeneration:
        """See [`PPlugForConditionalGeneration.from_pretrained`]."""
        return PPlugForConditionalGeneration.from_pretrained(*args, **kwargs)


def _token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Equation (6): summed next-token NLL over the number of answer tokens (of the whole accumulated batch)."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _checked_position(position: Tensor, mask: Tensor) -> Tensor:
    if position.shape != mask.shape[:1]:
        raise MismatchError(
            f"persona_position must hold one number per prompt, [{len(mask)}], got {list(position.shape)}."
        )
    if ((position < 0) | (position > mask.sum(dim=1))).any():
        raise DataError("persona_position must lie between 0 and the number of tokens of its prompt.")
    return position
