"""Saving and loading: a saved plug is the plug alone, a loaded one comes with its backbone and encoder.

Frozen modules are dropped from every state dict, and may be missing when one is loaded, so that checkpoints, wrappers
and `save_pretrained` alike hold the trained tensors only.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, Self

from huggingface_hub import CommitInfo
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError
from ..storage.location import HubArguments
from ..storage.replace import replacing
from . import backbone as backbones
from . import encoders, frozen, plug_folder
from .plug import PersonaPlug
from .weight_sample import weight_digests

# What `torch.compile`, DDP and FSDP put in front of a model's names.
_WRAPPERS = re.compile(r"^((_orig_mod|module|_fsdp_wrapped_module)\.)+")
# Options of transformers that change nothing in a plug, which is one small safetensors file.
_FORMATS = ("max_shard_size", "safe_serialization", "save_function", "save_original_format", "save_peft_format")


class SavingMixin:
    """Saving and loading of [`PPlugForConditionalGeneration`], which has what they need."""

    config: PPlugConfig
    plug: PersonaPlug
    tokenizer: Any  # a PreTrainedTokenizerBase, or None
    state_dict: Callable[..., dict[str, Tensor]]

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

        The folder holds the old plug or the new one, also if the process is killed meanwhile.

        Args:
            save_directory: a new folder, or one that holds a plug.
            state_dict: weights to write (default: the model's), also as a wrapper names them (`torch.compile`, DDP). Frozen
                ones are left out. An empty one writes none, for they are in other files (DeepSpeed's, at stage 3).
            is_main_process: write at all.
            push_to_hub: upload afterwards; `kwargs` then go to `push_to_hub`.
            **kwargs: options of `push_to_hub`. Those of transformers about shards and formats are accepted too: a plug is one
                safetensors file.

        Raises:
            ConfigurationError: the folder holds another kind of model, or an option is unknown.
            DataError: `state_dict` does not hold the weights of this plug.
        """
        if not is_main_process:
            return
        options = save_options({k: v for k, v in kwargs.items() if k not in _FORMATS}, self.push_to_hub)
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {_WRAPPERS.sub("", key): value for key, value in weights.items()}
        weights = {key: value for key, value in weights.items() if _is_plug(key)}
        if state_dict:
            _check_names(weights.keys(), filter(_is_plug, self.plug.state_dict(prefix="plug.")))
        with replacing(save_directory) as staging:
            super().save_pretrained(staging, state_dict=weights)  # type: ignore[misc]
            if self.tokenizer is not None:
                plug_folder.save_tokenizer(self.tokenizer, staging)
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        subfolder: str = "",
        commit_message: str | None = None,
        commit_description: str | None = None,
        token: str | bool | None = None,
        tags: str | Sequence[str] | None = None,
        results: str | os.PathLike | None = None,
        license: str | None = None,
        datasets: str | Sequence[str] = (),
        language: str | Sequence[str] = (),
    ) -> CommitInfo:
        """Upload the plug, the backbone's tokenizer and a model card, in one commit. The backbone is never uploaded.

        Args:
            repo_id: "name" or "owner/name"; made if it does not exist.
            private: visibility of a new repository (default: the owner's).
            revision: branch; made if it does not exist.
            create_pr: open a pull request instead of changing the branch.
            subfolder: where in the repository.
            commit_message, commit_description: of the commit.
            token: to log in with (default: that of `hf auth login`).
            tags: more tags for the card, one or several.
            results: folder of `pplug-hf bench`, for the card.
            license, datasets, language: for the card. Of data sets (Hub ids) and languages one or several.

        Returns:
            The commit; `commit_url`, and `pr_url` of a pull request, say where it is.

        Raises:
            HubError: the Hub refuses, or the connection broke; the repository is as it was.
        """
        from ..hub.push import push_folder  # on top of this module

        with tempfile.TemporaryDirectory(prefix="pplug-push-") as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                subfolder=subfolder,
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                tags=tags,
                results=results,
                license=license,
                datasets=datasets,
                language=language,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        backbone: str | PreTrainedModel | None = None,
        encoder: str | SentenceTransformer | None = None,
        config: PPlugConfig | str | os.PathLike | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        check_backbone: bool = True,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a plug from a folder or the Hub, on its backbone and encoder at the commits it was trained with.

        All its files come from one commit, which a branch or tag is resolved to once. Offline, from the cache.

        Args:
            pretrained_model_name_or_path: plug folder or Hub id.
            backbone: a loaded model (or a folder or Hub id) to use instead of the recorded one; it must fit.
            encoder: likewise.
            config: instead of the plug's own; also the folder or Hub id of a plug that has it.
            backbone_kwargs: for the backbone's `from_pretrained`.
            encoder_kwargs: for `SentenceTransformer`.
            check_backbone: as of `from_backbone`.
            revision, subfolder: of the plug.
            token, cache_dir, local_files_only, force_download: for every part.
            **kwargs: more `backbone_kwargs`: dtype, device_map, quantization_config, attn_implementation, ... They are for a
                backbone that is not loaded yet.

        Returns:
            The model in eval mode. The plug is fp32 whatever the backbone's dtype.

        Raises:
            MissingFileError: the plug, its backbone or its encoder cannot be found.
            HubError: the Hub refuses, or fails.
            ConfigurationError: the plug's backbone or encoder is on no Hub and was not given, there are arguments for one
                that is loaded already, or the configuration is another kind of model's.
            MismatchError: backbone or encoder is not the one the plug was trained with.
            DataError: the weights are damaged or do not fit the configuration.
        """
        any_place: HubArguments = {"token": token, "cache_dir": cache_dir}
        any_place |= {"local_files_only": local_files_only, "force_download": force_download}
        if config is not None and not isinstance(config, PPlugConfig):
            config = plug_folder.load_config(config, **any_place)
        arguments: HubArguments = {"revision": revision, "subfolder": subfolder, **any_place}
        location = plug_folder.open_location(pretrained_model_name_or_path, **arguments)
        config = config or plug_folder.load_config(location)
        location.folder()  # all of it, so that whatever breaks below, the cache has the whole plug or no weights
        # What does not fit is found out before a large backbone is loaded.
        plug_folder.check_sizes(plug_folder.weight_shapes(location), config, location.name)

        backbone_place = frozen.locate("backbone", backbone, config, location)
        encoder_place = frozen.locate("encoder", encoder, config, location)
        model_type = (config.backbone_fingerprint or {}).get("model_type")
        backbone = backbones.load_backbone(backbone_place, model_type=model_type, **(backbone_kwargs or {}), **kwargs)
        encoder = encoders.load_encoder(encoder_place, **(encoder_kwargs or {}))
        # Before memory is reserved for the sizes that the configuration says.
        frozen.check_fits(config, "backbone", backbones.fingerprint(backbone))
        name, commit = backbones.origin(backbone)
        frozen.note_other_backbone(config, plug_folder.absolute_if_local(name), commit)
        frozen.note_other_weights(config, weight_digests(backbone))
        frozen.check_fits(config, "encoder", encoders.fingerprint(encoder, config.history_prompt))
        model: Any = cls(config)  # type: ignore[call-arg]
        tokenizer = plug_folder.load_tokenizer(location) or backbones.find_tokenizer(backbone, location)
        model._put_on(backbone, encoder, tokenizer, check_backbone)
        model.personalizer.load_weights(location)
        generation_config = plug_folder.load_generation_config(location)
        if generation_config is not None:
            model.generation_config = generation_config
        return model.eval()


def save_options(given: dict[str, Any], push_to_hub: Callable[..., object]) -> dict[str, Any]:
    """Return the options of a `save_pretrained` that are set.

    Args:
        given: by name.
        push_to_hub: the method that takes them.

    Raises:
        ConfigurationError: it does not.
    """
    options = {name: value for name, value in given.items() if value is not None}
    takes = signature(push_to_hub)
    try:
        takes.bind_partial(**options)
    except TypeError as error:
        raise ConfigurationError(
            f"save_pretrained {error}: there are push_to_hub=True, and for it {', '.join(takes.parameters)}."
        ) from None
    return options


def _check_names(given: Iterable[str], expected: Iterable[str]) -> None:
    """Raise a `DataError` unless a state dict has the plug's weights: others would stand beside its configuration."""
    given, expected = set(given), set(expected)
    if missing := sorted(expected - given):
        raise DataError(
            f"state_dict lacks {len(missing)} of the plug's {len(expected)} weights (first {missing[0]}): pass "
            "model.state_dict(), or leave it out."
        )
    if surplus := sorted(given - expected):
        raise DataError(
            f"state_dict has {len(surplus)} weights that this plug has not (first {surplus[0]}): it is another plug's."
        )


def _is_plug(key: str, prefix: str = "") -> bool:
    return key.startswith(prefix + "plug.") and not encoders.is_unused(key)


def drop_frozen(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    """Remove all but the plug from a state dict, for save_pretrained, checkpoints and wrappers alike."""
    for key in [key for key in state_dict if key.startswith(prefix) and not _is_plug(key, prefix)]:
        del state_dict[key]


def _is_frozen(path: list[str]) -> bool:
    """Return whether a state dict key, split at its dots, belongs to a frozen module, with or without a wrapper's prefix."""
    if "plug" in path:
        return encoders.is_unused(".".join(path))
    return "backbone" in path or "history_encoder" in path


def ignore_missing_frozen(module: nn.Module, incompatible: Any) -> None:
    """Allow a loaded state dict to lack the frozen modules, also under a wrapper's prefix."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not _is_frozen(key.split("."))]
