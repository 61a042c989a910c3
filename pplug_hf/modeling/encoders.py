"""Sentence encoders: equation (1) frozen for the history, equation (2) trained for the query.

Both are a `SentenceTransformer` as it is, with its pooling, normalisation, dense heads and prompts.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Router
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from ..errors import ConfigurationError, DataError, kind_of
from ..storage.location import Location, cached_commit
from ..tasks.items import item_text, whole_texts

Item: TypeAlias = str | Mapping[str, object]
History: TypeAlias = Sequence[Item]
Query: TypeAlias = str | Sequence[str] | Tensor  # texts, or vectors [B, D]


def load_encoder(source: str | os.PathLike | Location | SentenceTransformer, **kwargs: Any) -> SentenceTransformer:
    """Load the encoder of a Hub id or local folder; a loaded encoder is returned as it is.

    Args:
        source: what to load. All its files come from one commit, which `origin` tells afterwards.
        **kwargs: for what is not loaded yet: of `SentenceTransformer` (device, model_kwargs, ...), and where it is to be
            found, as transformers calls it (revision, token, cache_dir, local_files_only, force_download).

    Raises:
        MissingFileError: no such folder, and neither the cache nor the Hub has it.
        HubError: the Hub refuses.
        ConfigurationError: it needs code of its own, or is not an encoder, or there are arguments for one that is loaded.
    """
    if isinstance(source, SentenceTransformer) and not isinstance(source, SparseEncoder):
        if unused := [name for name, value in kwargs.items() if value is not None]:
            raise ConfigurationError(
                f"The encoder is loaded already, and {', '.join(unused)} would say how to load one: leave it out, or pass the "
                "encoder's Hub id or folder."
            )
        return source
    if not isinstance(source, str | os.PathLike | Location):
        raise ConfigurationError(
            f"The encoder must be a SentenceTransformer that gives dense vectors, or its Hub id or folder, got a "
            f"{type(source).__name__}: a bare transformers model needs a pooling first, as in "
            "SentenceTransformer(modules=[Transformer(name), Pooling(width)])."
        )
    if not isinstance(source, Location):
        source = Location(os.fspath(source), kind="encoder")
    if "cache_folder" in kwargs:  # as SentenceTransformer calls it
        kwargs["cache_dir"] = kwargs.pop("cache_folder")
    location, kwargs = source.updated(kwargs)
    if location.subfolder:
        raise ConfigurationError(
            f"sentence-transformers loads no encoder from a subfolder, got {location.subfolder!r} of {location.name!r}: "
            "pass the path of that folder on this machine, or download it first (huggingface_hub.snapshot_download)."
        )
    kwargs["model_kwargs"] = {"use_safetensors": True, **(kwargs.get("model_kwargs") or {})}
    location = location.pinned()
    location.check_attention()
    _check_is_encoder(location)
    try:
        if location.force_download:
            location.refresh()
        encoder = location.with_retries(
            lambda: SentenceTransformer(location.name, **location.encoder_arguments, **kwargs)
        )
    except OSError as error:
        raise location.load_error(error) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a module that is code of the repository, a pickle, nonsense in one of its files
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigurationError(
            f"The sentence encoder {location.name!r} cannot be used ({type(error).__name__}: {reason})."
        ) from error
    vars(encoder)["_source"] = (location.name, location.commit)
    return encoder


def _check_is_encoder(location: Location) -> None:
    """Refuse a model that generates text, of which SentenceTransformer would make an untrained encoder."""
    generates = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    kinds = [name for name in location.settings().get("architectures") or () if str(name).endswith(generates)]
    if kinds and location.file("modules.json") is None:
        raise ConfigurationError(
            f"The encoder {location.name!r} is a language model ({kinds[0]}), not a sentence encoder: name a "
            "sentence-transformers model, e.g. BAAI/bge-base-en-v1.5, or pass a loaded SentenceTransformer to insist."
        )


def freeze_encoder(encoder: SentenceTransformer) -> SentenceTransformer:
    """Freeze an encoder in place: no gradients, no dropout."""
    return encoder.requires_grad_(False).eval()


def _routes(encoder: SentenceTransformer, task: str) -> dict[Router, str]:
    """Return the routers that have a route of their own for the texts of a task ("query", "document"), and its name."""
    found = {}
    for router in encoder.modules():
        if isinstance(router, Router):
            mapped = router.route_mappings
            route = mapped.get((task, "text")) or mapped.get((task, None)) or task
            if route in router.sub_modules:
                found[router] = route
    return found


def has_routes(encoder: SentenceTransformer) -> bool:
    """Return true if queries pass through other modules than documents."""
    return bool(_routes(encoder, "query"))


def _task(encoder: SentenceTransformer, task: str) -> dict[str, Any]:
    return {"task": task} if _routes(encoder, task) else {}  # other encoders may have tasks of their own


def trainable_copy(encoder: SentenceTransformer) -> SentenceTransformer:
    """Return an fp32 copy to train as the encoder of queries, of the queries' side if there are two.

    Its pooler head never sees a gradient, so it stays frozen.
    """
    trained = copy.deepcopy(encoder).float().requires_grad_(True)
    for router, route in _routes(trained, "query").items():
        router.sub_modules = nn.ModuleDict({route: router.sub_modules[route]})
        router.route_mappings = {key: to for key, to in router.route_mappings.items() if to == route}
        router.default_route = route
    for name, parameter in trained.named_parameters():
        if is_unused(name):
            parameter.requires_grad_(False)
    return trained


def is_unused(parameter_name: str) -> bool:
    """Return whether a parameter belongs to a BERT-style pooler head, which sentence vectors do not pass through."""
    return ".pooler." in parameter_name


def encoder_size(encoder: SentenceTransformer) -> int:
    """Measure D: a Dense head or a truncation may have changed what the configuration says."""
    return _digest_and_dim(encoder)[1]


def length_notes(encoder: SentenceTransformer, texts: Iterable[str], prompt: str = "") -> list[str]:
    """Return a sentence about items that are longer than the encoder reads."""
    limit, texts = encoder.max_seq_length, list(texts)
    if limit is None:
        return []
    # A token is at least one byte; most items are too short to be worth counting.
    long = [prompt + text for text in texts if len((prompt + text).encode("utf-8", "replace")) > limit - 2]
    tokens = encoder.tokenizer(long, truncation=True, max_length=limit + 1)["input_ids"] if long else []
    if not (cut := sum(len(ids) > limit for ids in tokens)):
        return []
    return [
        f"{cut} of {len(texts)} items are longer than the {limit} tokens that the encoder reads and lose their end."
    ]


def item_texts(history: Iterable[object], template: str | None) -> list[str]:
    """Return the text of every item, as the encoder reads it.

    Args:
        history: texts, or task items (mappings of fields) that `template` turns into texts.
        template: a format string over the fields of an item.

    Raises:
        DataError: something that is not a text, or an item without a field of the template. Names the position
            and the type or the field, never what the item says.
    """
    if isinstance(history, str | Mapping) or not isinstance(history, Iterable):
        raise DataError(f"A history is a list of texts or items, got a single {type(history).__name__}: pass [text].")
    texts = []
    for i, item in enumerate(history):
        if is_mapping := isinstance(item, Mapping):
            if template is None:
                raise DataError(
                    f"History item {i} is a mapping with the fields {sorted(map(str, item))}, and the model has no "
                    "item_template to turn it into text: set config.item_template, or pass texts."
                )
            item = item_text(item, template, f"History item {i}")
        if not isinstance(item, str):
            raise no_text(i, item)
        if not is_mapping and not item.strip():
            raise DataError(f"History item {i} is an empty text, which tells nothing of its user: leave it out.")
        texts.append(item)
    return texts


def no_text(place: int, item: object) -> DataError:
    """Return the error for an item that is neither a text nor a mapping of fields."""
    is_vector = isinstance(item, Tensor | np.ndarray | np.number | float)
    wrap = ", or wrap finished vectors as Persona(vectors, model.personalizer.spec)" if is_vector else ""
    return DataError(f"History item {place} is {kind_of(item)}, not a text: pass str, or a mapping of fields{wrap}.")


@torch.no_grad()
def embed(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    prompt: str = "",
    batch_size: int = 32,
    show_progress: bool = False,
    task: str = "document",
    pool: dict | None = None,
) -> Tensor:
    """Equation (1): vectors [len(texts), D] in fp32, detached. Each distinct text is encoded once.

    Args:
        encoder: a frozen encoder.
        texts: may repeat; each distinct text is encoded once.
        prompt: put in front of every text.
        batch_size: texts per forward pass.
        show_progress: show a progress bar.
        task: "document" or "query", for encoders that have a side for each.
        pool: of processes, as the encoder's `start_multi_process_pool` gives it.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = encoder.encode(
        distinct if "".join(distinct).isascii() else whole_texts(distinct),
        prompt=prompt,
        batch_size=batch_size,
        show_progress_bar=show_progress,
        convert_to_tensor=True,
        pool=pool,
        **(_task(encoder, task) if isinstance(encoder[0], Router) else {}),
    )
    row = dict(zip(distinct, range(len(distinct)), strict=True))
    # Indexing copies, which also turns encode's inference tensors into ones that autograd may save.
    return vectors.float()[list(map(row.__getitem__, texts))].clone()


def check_finite(vectors: Tensor) -> None:
    """Raise a `DataError` if a value of item vectors [N, D] is not finite."""
    if math.isfinite(vectors.sum().item()):  # then every value is, and one pass without a copy has told
        return
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise DataError(
            f"{len(bad)} of {len(vectors)} item vectors hold NaN or infinity (first at item {bad[0]}). "
            "Encode the history again with model.encode_persona(history)."
        )


def embed_with_gradient(
    encoder: SentenceTransformer, texts: Sequence[str], prompt: str = "", bf16: bool = False
) -> Tensor:
    """Equation (2): [B, D] vectors of queries, part of the autograd graph.

    Args:
        encoder: whose weights may be trained.
        texts: B texts.
        prompt: put in front of each.
        bf16: compute in bfloat16 with the weights as they are (mixed precision); the vectors are float32.
    """
    device = next(encoder.parameters()).device
    task = _task(encoder, "query") if isinstance(encoder[0], Router) else {}
    texts = list(texts) if "".join(texts).isascii() else whole_texts(list(texts))
    features = encoder.preprocess(texts, prompt=prompt, **task)
    # Not `enabled=False`: that would switch off the mixed precision of a Trainer around this.
    with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        vectors = encoder(batch_to_device(features, device), **task)["sentence_embedding"]
    vectors = vectors.float() if bf16 else vectors
    return vectors if encoder.truncate_dim is None else vectors[..., : encoder.truncate_dim]


def fingerprint(encoder: SentenceTransformer, history_prompt: str = "") -> dict[str, Any]:
    """Return the properties that two encoders must share to give the same item vectors.

    The digest covers every weight and the settings of every module (pooling, normalisation, lengths). Weights are
    read as bfloat16, so that the same encoder loaded in fp32 and in bf16 counts as one.
    """
    digest, size = _digest_and_dim(encoder)
    model_config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
    return {
        "model_type": getattr(model_config, "model_type", type(encoder[0]).__name__),
        "embedding_size": size,
        "vocab_size": getattr(model_config, "vocab_size", None),
        "digest": digest,
        "history_prompt": history_prompt,
    }


# What was measured of an encoder, and the state it was in: reading every weight takes longer than loading a plug.
_known: WeakKeyDictionary[SentenceTransformer, tuple[object, tuple[str, int]]] = WeakKeyDictionary()


def _digest_and_dim(encoder: SentenceTransformer) -> tuple[str, int]:
    """Return digest and width D, from memory unless the encoder has changed since."""
    routed = [part for router in encoder.modules() if isinstance(router, Router) for part in _parts(router)]
    settings = [[type(module).__name__, _settings(module)] for module in (*encoder, *routed)]
    weights = sorted((name, weight) for name, weight in encoder.state_dict().items() if not is_unused(name))
    state = settings, encoder.max_seq_length, encoder.truncate_dim, [state_of(weight) for _, weight in weights]
    if encoder not in _known or _known[encoder][0] != state:
        digest = hashlib.sha256()
        for module in settings:
            digest.update(json.dumps(module, sort_keys=True).encode())
        for name, weight in weights:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy())
        digest.update(str((encoder.max_seq_length, encoder.truncate_dim)).encode())
        _known[encoder] = state, (digest.hexdigest()[:16], embed(encoder, ["width"]).shape[1])
    return _known[encoder][1]


def _parts(router: Router) -> list[nn.Module]:
    return [part for _, route in sorted(router.sub_modules.items()) for part in route]  # type: ignore[union-attr]


def _settings(module: nn.Module) -> dict[str, str | int | float | bool]:
    settings = getattr(module, "get_config_dict", dict)()
    return {key: value for key, value in settings.items() if isinstance(value, str | int | float | bool)}


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """Changes with every write to a tensor: torch counts those, except through `.data`, which a sample notices."""
    step = max(1, tensor.numel() // 64)
    version = object() if tensor.is_inference() else tensor._version  # those are not counted: never the same
    sample = tensor.detach().flatten()[::step].tolist()
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, sample


def origin(encoder: SentenceTransformer) -> tuple[str | None, str | None]:
    """Return (Hub id or folder, commit) of an encoder, as far as it, or else the cache, knows."""
    if "_source" in vars(encoder):
        return vars(encoder)["_source"]
    config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
    name = getattr(config, "name_or_path", None) or None
    return name, getattr(config, "_commit_hash", None) or cached_commit(name)
