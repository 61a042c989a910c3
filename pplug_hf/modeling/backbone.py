"""Language models as backbones: loading, freezing and measuring them.

Letters: B batch, T text tokens, P prefix tokens, H backbone width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..configuration.pplug import DTYPES
from ..errors import ConfigurationError, PPlugError
from ..optional import require
from ..storage.location import Location, cached_commit
from .prefix import make_contiguous, word_embeddings

logger = logging.getLogger(__name__)

CHAT_CHOICES = ("auto", "always", "never")


def load_backbone(
    source: str | os.PathLike | Location | PreTrainedModel, *, model_type: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load the language model of a Hub id, local folder or GGUF file; a loaded model is returned as it is.

    Args:
        source: what to load. All its files come from one commit, which `origin` tells afterwards.
        model_type: of the text model alone, if the files hold one that also sees: "gemma3_text" of a "gemma3".
        **kwargs: for `from_pretrained`, of what is not loaded yet (revision, subfolder, dtype, device_map,
            quantization_config, gguf_file, ...).

    Raises:
        ConfigurationError: not a model that generates text from embeddings, or arguments for one that is loaded.
        MissingFileError: no such folder, and neither the cache nor the Hub has it.
        HubError: the Hub refuses.
        MissingPackageError: a GGUF file needs a package that is not installed.
    """
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise ConfigurationError(f"dtype must be one of auto, {', '.join(DTYPES)}, or a torch.dtype; got {dtype!r}.")
    if isinstance(source, str | os.PathLike):
        source = Location(os.fspath(source), kind="backbone")
    given = kwargs
    if isinstance(source, Location):
        given, source = {}, _load(*source.updated(kwargs), model_type)
    if not isinstance(source, PreTrainedModel) or not source.can_generate() or source.config.model_type == "pplug":
        raise ConfigurationError(
            f"The backbone must be a transformers model that generates text, got {type(source).__name__}: {_advice(source)}."
        )
    if unused := [name for name, value in given.items() if value is not None and (name, value) != ("dtype", "auto")]:
        raise ConfigurationError(
            f"The backbone is loaded already, and {', '.join(unused)} would say how to load one: leave it out, or pass the "
            "backbone's Hub id or folder. If it is meant for something else, check its spelling."
        )
    return source


def _advice(source: object) -> str:
    """Return what to pass instead of an object that is not a backbone: often it holds one."""
    if hasattr(source, "merge_and_unload"):  # PEFT
        return "merge the adapter into its model, model = model.merge_and_unload()"
    for name in ("backbone", "module", "_orig_mod", "model"):  # a plug, DataParallel, torch.compile, a pipeline
        inner = getattr(source, name, None)
        if isinstance(inner, PreTrainedModel) and inner.can_generate():
            return f"pass its .{name}"
    return "load it with AutoModelForCausalLM or AutoModelForSeq2SeqLM, or pass its Hub id or folder"


def checked_tokenizer(tokenizer: object) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer, or None, as it is.

    Raises:
        ConfigurationError: it is something else.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    inner = isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase)
    raise ConfigurationError(
        f"The tokenizer must be one of transformers, got {type(tokenizer).__name__}: "
        + ("pass its .tokenizer." if inner else "load it with AutoTokenizer.from_pretrained.")
    )


def writes_chats(tokenizer: PreTrainedTokenizerBase | None, chat: bool | str = "auto") -> bool:
    """Return whether prompts are written in the tokenizer's chat template.

    Args:
        tokenizer: of the backbone, or None.
        chat: "auto" (if there is a template), "always" (True) or "never" (False).

    Raises:
        ConfigurationError: another word, or a template is asked for and there is none.
    """
    if chat not in CHAT_CHOICES and not isinstance(chat, bool):
        raise ConfigurationError(f"chat must be one of {', '.join(CHAT_CHOICES)}, got {chat!r}.")
    template = getattr(tokenizer, "chat_template", None)
    if chat in ("always", True) and not template:
        raise ConfigurationError(
            "chat is 'always', and the tokenizer of this backbone has no chat template: choose an instruct model, set "
            "tokenizer.chat_template, or take chat='auto'."
        )
    return bool(template) and chat in ("auto", "always", True)


def _load(location: Location, kwargs: dict[str, Any], model_type: str | None) -> PreTrainedModel:
    location = location.pinned()
    name, arguments = _loading_arguments(location)
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    if location.gguf_file:  # packed weights would need code of another repository, and pass no gradient
        kwargs = {"quantization_config": GgufConfig(dequantize=True), **kwargs}
    try:
        location.check_attention()
        config = _load_config(location, name, arguments | {"trust_remote_code": kwargs["trust_remote_code"]})
        if config.is_encoder_decoder and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            auto: Any = AutoModelForSeq2SeqLM
        elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
            config, "auto_map", {}
        ):
            auto = AutoModelForCausalLM
        elif config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            auto = AutoModelForImageTextToText
        elif config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:  # causal ones that listen, too
            auto = AutoModelForSeq2SeqLM
        else:
            raise ConfigurationError(
                f"The backbone {location.full_name!r} is of type {config.model_type!r}, which transformers has neither as a "
                "causal nor as an encoder-decoder language model. Options are e.g. t5, bart, gpt2, llama, qwen3."
            )
        text = config.get_text_config()
        if model_type == text.model_type != config.model_type and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        kwargs |= arguments | ({"config": config} if location.gguf_file else {})  # read once, for it takes seconds
        model, report = location.with_retries(lambda: auto.from_pretrained(name, output_loading_info=True, **kwargs))
    except (PPlugError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise location.load_error(error) from error
    except Exception as error:  # nonsense in a file, options that do not go together, a package that it needs
        raise ConfigurationError(
            f"The backbone {location.full_name!r} cannot be used ({type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')})."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigurationError(
            f"The backbone {location.full_name!r} lacks {len(missing)} weights of a {type(model).__name__} (first "
            f"{missing[0]}), which would stay random: it is not a complete language model."
        )
    model.config._commit_hash = location.commit  # as transformers did until 5.20
    model.config.name_or_path = location.full_name  # of which transformers keeps the first part
    return model


def _loading_arguments(location: Location) -> tuple[str, dict[str, Any]]:
    """Return what to pass to `from_pretrained` of transformers: the name, and where to find the files of that name."""
    if not location.gguf_file:
        return location.name, location.hub_arguments
    for package in ("gguf", "accelerate"):
        require(package, "gguf", "A backbone in a GGUF file")
    path = location.gguf_path()
    # Absolute, for transformers would prefer a file of that name in the working directory.
    return os.path.dirname(path), {"gguf_file": path, "local_files_only": True}


def _load_config(location: Location, name: str, arguments: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, **arguments)
    except ValueError as error:
        if isinstance(error, OSError):
            raise
        if location.file("adapter_config.json") is not None:
            raise ConfigurationError(
                f"The backbone {location.name!r} is an adapter, not a whole model: load it with peft, merge it "
                "(merge_and_unload), save the result and pass that folder."
            ) from error
        raise ConfigurationError(
            f"The backbone {location.full_name!r} is of no type that transformers knows ({str(error).splitlines()[0]})"
        ) from error


def freeze_backbone(backbone: PreTrainedModel) -> None:
    """Freeze a backbone in place: no gradients, no noise in training mode, a contiguous input of the output layer.

    In training mode its modules stay in eval mode, whatever they would do at random. Exceptions are the layers that
    checkpoint activations, which they skip in eval mode: their dropout rates are zero, be it modules (`nn.Dropout`), plain
    attributes (`layerdrop`, ...) or numbers of their configuration.
    """
    backbone.requires_grad_(False)
    output = backbone.get_output_embeddings()
    # Once, however many plugs freeze the backbone.
    if output is not None and make_contiguous not in output._forward_pre_hooks.values():
        output.register_forward_pre_hook(make_contiguous)
    for module in backbone.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif _follows_mode(module) or module is backbone:
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
                module.config = _Quiet(config)  # type: ignore[assignment]
    vars(backbone)["train"] = partial(_train, backbone)
    backbone.train(backbone.training)


def _train(backbone: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """Switch the mode of a frozen backbone: of the layers that need to know it, and of nothing that would be noisy."""
    type(backbone).train(backbone, mode)
    for module in backbone.modules():
        if module is not backbone and not _follows_mode(module):
            module.training = False
    return backbone


def _follows_mode(module: nn.Module) -> bool:
    """Return True for layers that checkpoint activations in training mode, and for quantised ones, which have modes."""
    quantised = isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    return quantised or isinstance(module, GradientCheckpointingLayer)


class _Quiet:
    """A configuration as it is, but for its dropout rates, which are zero.

    Args:
        config: to look everything up in.
    """

    def __init__(self, config: PreTrainedConfig):
        vars(self)["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while it is being copied
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if "drop" in name and isinstance(value, float) else value


@contextmanager
def training_attention(backbone: PreTrainedModel) -> Iterator[None]:
    """Let a bfloat16 backbone on a CPU attend without torch's fused kernel, whose backward pass takes longer there.

    For short passes behind a cache: the plain kind keeps a matrix of all pairs of tokens.

    Args:
        backbone: of any kind; all others attend as before.
    """
    if (
        getattr(backbone.config, "_attn_implementation", None) != "sdpa"
        or backbone.dtype != torch.bfloat16
        or backbone.device.type != "cpu"
    ):
        yield
        return
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation("sdpa")


def check_gradients(backbone: PreTrainedModel) -> None:
    """Refuse a quantised backbone that passes no gradient, through which a plug could not learn.

    Raises:
        ConfigurationError: names the first such layer. Quantised activations are the usual reason.
    """
    if not getattr(backbone, "is_quantized", False):
        return
    layers: list[tuple[str, Any]] = [pair for pair in backbone.named_modules() if isinstance(pair[1], nn.Linear)]
    for name, layer in layers:
        weight = layer.weight
        if type(weight) is nn.Parameter and weight.is_floating_point():
            continue
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # bitsandbytes would pack 4 bits for inference once it evaluates
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        x = torch.zeros(1, layer.in_features, dtype=dtype, device=weight.device, requires_grad=True)
        y = layer(x).sum()
        gradient = torch.autograd.grad(y, x, allow_unused=True)[0] if y.requires_grad else None
        if gradient is None or not gradient.any():
            raise ConfigurationError(
                f"The quantised layer {name!r} of the backbone passes no gradient, so a plug cannot learn through it: "
                "quantise weights only (e.g. torchao's Int8WeightOnlyConfig), or train on the backbone as it is. "
                "Generating with it works."
            )


def fingerprint(backbone: PreTrainedModel) -> dict[str, object]:
    """Return the properties that must be equal for a plug to fit: type, kind, width and vocabulary."""
    return {
        "model_type": backbone.config.model_type,
        "is_encoder_decoder": bool(backbone.config.is_encoder_decoder),
        "hidden_size": hidden_size(backbone),
        "vocab_size": backbone.config.get_text_config().vocab_size,
    }


def hidden_size(backbone: PreTrainedModel) -> int:
    """Measure H, the width of the input embeddings' output."""
    return _embed_ids(backbone, torch.zeros(1, dtype=torch.long)).shape[-1]


def origin(backbone: PreTrainedModel) -> tuple[str | None, str | None]:
    """(Hub id or folder, commit) a backbone was loaded from, as far as it, or else the cache, knows.

    Of a folder in a repository: ("owner/name/folder", commit). Of a GGUF file: (its path, its SHA-256), or on the Hub
    ("owner/name/file.gguf", commit).
    """
    config = backbone.config
    name = config.name_or_path or None
    commit = getattr(config, "_commit_hash", None) or cached_commit(name)
    file = getattr(getattr(config, "quantization_config", None), "gguf_file", None)
    if name and file and not name.endswith(".gguf"):  # loaded by the user
        name = str(PurePosixPath(name, file))
    if name and name.endswith(".gguf") and commit is None and os.path.isfile(name):
        with open(name, "rb") as weights:
            commit = config._commit_hash = hashlib.file_digest(weights, "sha256").hexdigest()
    return name, commit


def find_tokenizer(
    backbone: PreTrainedModel, location: Location | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer saved with a backbone; None if there is none, which only matters once a prompt must be decoded.

    One whose class is code of the repository counts as none, with a warning: trust reaches the backbone alone.

    Args:
        backbone: the language model.
        location: of the plug, whose token, cache and choices serve for the tokenizer too.
        **kwargs: those that `load_backbone` had, otherwise.
    """
    name, commit = origin(backbone)
    if name is None:
        return None
    location = (location or Location(name).updated(kwargs)[0]).frozen_module(name, commit, "backbone")
    try:
        name, arguments = _loading_arguments(location)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            logger.warning(
                "The tokenizer of the backbone %s is code of its repository, which is not run: prompts are neither written nor "
                "read with it, and its chat template is not known. If you trust it, load it with AutoTokenizer and pass "
                "tokenizer=<the loaded one>.",
                location.full_name,
            )
        return None


@torch.no_grad()
def embedding_norm(backbone: PreTrainedModel, vocab_size: int | None = None) -> float:
    """Measure the mean L2 norm of the token embeddings, as the module gives them (BART and Gemma scale inside it).

    Args:
        backbone: the language model.
        vocab_size: number of real tokens, where the table has unused rows behind them (default: all rows).

    Rows of zeros (padding) are left out.
    """
    rows = backbone.config.get_text_config().vocab_size
    ids = torch.arange(min(vocab_size or rows, rows))
    norms = torch.cat([_embed_ids(backbone, chunk).float().norm(dim=-1).cpu() for chunk in ids.split(8192)])
    return norms[norms > 0].mean().item()


@torch.no_grad()
def state_norm(backbone: PreTrainedModel, vocab_size: int | None = None) -> float:
    """Measure the mean L2 norm of the states [B, T, H] that an encoder makes of words.

    Args:
        backbone: an encoder-decoder model.
        vocab_size: as of `embedding_norm`.

    Raises:
        ConfigurationError: its encoder's states have another width than its word embeddings.
    """
    size = backbone.config.get_text_config().vocab_size
    rows = min(vocab_size or size, size)
    ids = torch.arange(256).view(16, 16) * (rows // 256 or 1) % rows
    encoder = backbone.get_encoder()
    states = encoder(input_ids=ids.to(word_embeddings(backbone).weight.device), return_dict=True).last_hidden_state
    if states.shape[-1] != hidden_size(backbone):
        raise ConfigurationError(
            f"The encoder of {type(backbone).__name__} gives states of width {states.shape[-1]} for words of width "
            f"{hidden_size(backbone)}, so a soft prompt cannot be appended to them: choose placement='prompt'."
        )
    return states.float().norm(dim=-1).mean().item()


def _embed_ids(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    embeddings = word_embeddings(backbone)
    return embeddings(ids.to(next(embeddings.parameters()).device))


def digest_of_tensors(tensors: dict[str, Tensor]) -> Any:
    """Return a hash over names, types, shapes and values, to which more can be added."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if isinstance(tensor, Tensor) and not tensor.is_meta:  # what is off-loaded to disk counts by its name
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest


def backbone_digest(model: Any, tokenizer: Any) -> str:
    """Return a fingerprint of a language model: weights, settings, those of its generation, and its tokenizer."""
    digest = digest_of_tensors(model.state_dict())
    for settings in (model.config.to_dict(), model.generation_config.to_dict()):
        known = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    return digest.hexdigest()[:16]


def _tokenizer_state(tokenizer: Any) -> str:
    """Return all that determines the tokens of a text.

    Not the padding and truncation of the last call, which a fast tokenizer keeps. The text is that of a tokenizer which
    was never called, so keys that were made at the start of a bench stay the same.
    """
    if not tokenizer.is_fast:
        return str(sorted(tokenizer.get_vocab().items()))
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()
