"""A transformers model around a frozen language model, which is attached once the model is built and never saved.

That order matters: transformers initialises, casts and moves what a constructor builds, and would corrupt loaded parts
without a word.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigurationError
from . import backbone as backbones
from .backbone_check import check_backbone
from .device import checked_device
from .prefix import Reading, position_limit


class FrozenBackboneModel(PreTrainedModel, GenerationMixin):
    """A model whose `backbone` is frozen and answers transformers in its place.

    Args:
        config: of the model.
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the choice is the backbone's

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.loss_type = None  # transformers would pick one by the class name
        self.backbone: Any = None  # a PreTrainedModel that generates, once attached
        self._reading = Reading()  # the way in which the backbone takes soft prompts
        self._position_limit: int | None = None  # of the backbone

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave all weights alone: the plug initialises its own, and attached modules are trained already."""

    def _freeze(self, backbone: PreTrainedModel, check: bool) -> None:
        """Take in a backbone and freeze it; `check` finds out how it takes soft prompts."""
        if check:
            self._reading = check_backbone(backbone)
        else:
            backbones.freeze_backbone(backbone)
        self.backbone, self._position_limit = backbone, position_limit(backbone)
        vars(self).pop("hf_device_map", None)  # of an earlier backbone
        devices = set(map(str, (getattr(backbone, "hf_device_map", None) or {}).values()))
        if len(devices) > 1 and not devices & {"cpu", "disk"}:
            self.hf_device_map = backbone.hf_device_map  # or the Trainer would move all parts to one device

    def _attached(self) -> Any:
        """Return the backbone."""
        if self.backbone is None:
            raise ConfigurationError(
                "This plug has no backbone yet: use PPlugForConditionalGeneration.from_backbone or "
                "PPlugModel.from_pretrained, or call model.attach(backbone, encoder)."
            )
        return self.backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the plug and the backbone in place, each as one graph. Texts are tokenised and encoded outside of them.

        Args:
            *args: as of `torch.compile`.
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        for module in (self._attached(), self.base_model):
            module.compile(*args, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Choose the backbone's attention. The encoders keep theirs: they compute in a dtype of their own.

        Args:
            *args: as of the backbone's: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        self._attached().set_attn_implementation(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """Return the backbone's input embeddings, which some tools expect of any model; None before there is a backbone."""
        return None if self.backbone is None else self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the backbone's output layer; None before there is a backbone."""
        return None if self.backbone is None else self.backbone.get_output_embeddings()

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the weights that are tied in the backbone, and no others.

        transformers would go by the configuration, which says "tied" for FlanT5 although the checkpoint is not, and would
        overwrite the output layer.

        Args:
            missing_keys: ignored, no weights of the backbone are loaded here.
            recompute_mapping: likewise.
        """
        if self.backbone is not None:
            self.backbone.tie_weights(recompute_mapping=False)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Return the backbone's input embeddings; another size is refused, for a plug fits one vocabulary.

        Args:
            new_num_tokens, pad_to_multiple_of: None.
            mean_resizing: ignored.

        Raises:
            ConfigurationError: a size is given.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        raise ConfigurationError(
            f"A plug fits the vocabulary that its backbone had when it was made, got new_num_tokens={new_num_tokens}, "
            f"pad_to_multiple_of={pad_to_multiple_of}: resize and save the backbone alone, then make a new plug on it "
            "with PPlugForConditionalGeneration.from_backbone."
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Move the model, as in every model of transformers.

        Raises:
            ConfigurationError: a device that is not there, or no device.
        """
        try:
            return super().to(*args, **kwargs)
        except (AssertionError, RuntimeError):  # a torch without CUDA; a name that it does not recognise
            device = kwargs.get("device", args[0] if args else None)
            if isinstance(device, str | torch.device):
                checked_device(device)
            raise

    def cuda(self, device: int | torch.device | None = None) -> Self:  # type: ignore[override]
        """Move the model to a GPU. Errors as in `to`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters in one line, as PEFT does."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-probability of each token that `generate` chose: the backbone's method, with its arguments.

        Args:
            *args: `sequences`, `scores`, `beam_indices`, `normalize_logits` of an output of `generate`.
            **kwargs: likewise.

        Raises:
            ConfigurationError: the model has no backbone yet.
        """
        return self._attached().compute_transition_scores(*args, **kwargs)

    def generate_batch(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse continuous batching, which takes ids alone.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "Continuous batching takes ids alone and would not see a persona: use model.generate, with one persona per "
            "prompt, or an engine that takes prompt embeddings and model.soft_prompt."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch
