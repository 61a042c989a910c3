"""A plug on disk and back: what is saved is the plug alone, what is loaded comes with its backbone and encoder.

The frozen parts are dropped from every state dict and forgiven when one is loaded, so that checkpoints, wrappers
and `save_pretrained` alike hold the trained tensors only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration import PPlugConfig
from . import backbone as backbones
from . import encoders, files

if TYPE_CHECKING:
    from .pplug import PPlugForConditionalGeneration


class SavingMixin:
    """Saving and loading of [`PPlugForConditionalGeneration`], which has what they need."""

    config: PPlugConfig
    tokenizer: Any
    state_dict: Callable[..., dict[str, Tensor]]
    push_to_hub: Callable[..., Any]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a plug folder: configuration, trained tensors, generation configuration, the backbone's tokenizer.

        The folder is complete or unchanged: everything is written beside it first, then moved in file by file.

        Args:
            save_directory: a new folder, or one that holds a plug.
            state_dict: weights to write (default: the model's); frozen ones are left out.
            is_main_process: write at all.
            push_to_hub: upload afterwards; `kwargs` then go to `push_to_hub`.

        Raises:
            ConfigurationError: the folder holds another kind of model.
        """
        if not is_main_process:
            return
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {key: value for key, value in weights.items() if _is_plug(key)}
        with files.replacing(save_directory) as staging:
            super().save_pretrained(staging, state_dict=weights)  # type: ignore[misc]
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        backbone: str | PreTrainedModel | None = None,
        encoder: str | SentenceTransformer | None = None,
        config: PPlugConfig | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> PPlugForConditionalGeneration:
        """A plug from a folder or the Hub, on its backbone and encoder at the commits it was trained with.

        Args:
            pretrained_model_name_or_path: plug folder or Hub id.
            backbone: a loaded model (or another place) to use instead of the recorded one; it must fit.
            encoder: likewise.
            config: instead of the plug's own.
            backbone_kwargs: for the backbone's `from_pretrained`.
            encoder_kwargs: for `SentenceTransformer`.
            revision, subfolder: of the plug.
            token, cache_dir, local_files_only, force_download: for every part.
            **kwargs: more `backbone_kwargs`: dtype, device_map, quantization_config, attn_implementation, ...

        Returns:
            The model in eval mode. The plug is fp32 whatever the backbone's dtype.

        Raises:
            MissingFileError: the plug, its backbone or its encoder cannot be found.
            MismatchError: backbone or encoder is not the one the plug was trained with.
            DataError: the weights are damaged or do not fit the configuration.
        """
        shared = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        place = {**shared, "force_download": force_download, "revision": revision, "subfolder": subfolder}
        config = config or files.load_config(pretrained_model_name_or_path, **place)
        weights = files.load_weights(pretrained_model_name_or_path, **place)

        backbone_kwargs = {**shared, "force_download": force_download, **(backbone_kwargs or {}), **kwargs}
        if backbone is None:
            backbone_kwargs.setdefault("revision", config.backbone_revision)
        encoder_kwargs = {"cache_folder": cache_dir, "token": token, "local_files_only": local_files_only} | (
            encoder_kwargs or {}
        )
        if encoder is None:
            encoder_kwargs.setdefault("revision", config.encoder_revision)
        backbone = backbones.load_backbone(files.required(backbone, config.backbone, "backbone"), **backbone_kwargs)
        encoder = encoders.load_encoder(files.required(encoder, config.encoder, "encoder"), **encoder_kwargs)

        model: Any = cls(config)  # type: ignore[call-arg]
        tokenizer = files.load_tokenizer(pretrained_model_name_or_path, **place) or backbones.find_tokenizer(backbone)
        model.attach(backbone, encoder, tokenizer)
        files.check_weights(weights, model.state_dict(), pretrained_model_name_or_path)
        model.load_state_dict(weights)
        generation_config = files.load_generation_config(pretrained_model_name_or_path, **place)
        if generation_config is not None:
            model.generation_config = generation_config
        return model.eval()


def _is_plug(key: str, prefix: str = "") -> bool:
    return key.startswith(prefix + "plug.") and not encoders.is_unused(key)


def drop_frozen(module: Any, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """A state dict of the model is the plug, for save_pretrained, checkpoints and wrappers alike."""
    for key in [key for key in state_dict if key.startswith(prefix) and not _is_plug(key, prefix)]:
        del state_dict[key]


def _is_frozen(path: list[str]) -> bool:
    """Whether a state dict key, split at its dots, is of a frozen part; in front may stand a wrapper's prefix."""
    if "plug" in path:
        return encoders.is_unused(".".join(path))
    return "backbone" in path or "history_encoder" in path


def forgive_frozen(module: Any, incompatible: Any) -> None:
    """... so loading one must not ask for the rest, under a wrapper's prefix either."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not _is_frozen(key.split("."))]
