"""Folder of users' weights.

    method.json
    shared/adapter_model.safetensors, adapter_config.json     of `oppu`; prompt.safetensors of `user-tokens`
    users/<hash>/adapter_model.safetensors, adapter_config.json, training.json

Users are named by a hash, items by hashes of their ids; no text is kept. A folder of a user is written beside its place
and renamed, so a killed training goes on with the next user.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ..errors import StoreError
from ..storage.files import new_folder, read_json_object, write_text
from ..tasks.items import item_id
from .artefacts import FILE, read_artefact
from .private_prompt import PROMPT, PrivatePrompt
from .private_weights import Lora, LoraShape, PrivateWeights, merged
from .resources import Resources

SHARED, USERS, TRAINING, SECONDS = "shared", "users", "training.json", ".seconds"
CONFIG = "adapter_config.json"  # peft's name


def user_hash(user: str) -> str:
    """Return the name of a user's folder."""
    return short_hash(user)


def item_hash(item: Mapping[str, str]) -> str:
    """Return the name of an item in the record of a training."""
    return short_hash(item_id(item))


@contextmanager
def open_weights(folder: Path, kind: str, resources: Resources, facts: Mapping[str, Any]) -> Iterator[PrivateWeights]:
    """Put weights of an artefact's form on the language model, with the shared ones in place, within the block.

    Args:
        folder: of the artefact.
        kind: of the artefact.
        resources: language model.
        facts: of what was trained; a finished artefact has them in its settings.
    """
    model, processor = resources.language_model, resources.processor
    with ExitStack() as stack:
        if kind == "user-tokens":
            shape = load_file(folder / SHARED / PrivatePrompt.file)[PROMPT].shape
            yield stack.enter_context(PrivatePrompt(model, processor.tokenizer, facts["plug"], shape))
            return
        shape = LoraShape(**facts["lora"])
        if kind == "oppu":
            stack.enter_context(merged(model, processor, shape, load_file(folder / SHARED / Lora.file)))
        yield stack.enter_context(Lora(model, processor, shape))


def save_folder(place: Path, weights: PrivateWeights, record: Mapping[str, object], seconds: float) -> None:
    """Write weights with their settings and the record of their training; the folder appears as a whole.

    The seconds are in a hidden file, which does not count: equal trainings make equal artefacts.
    """
    with new_folder(place) as staging:
        save_file(weights.state(), staging / weights.file)
        for name, content in ((CONFIG, weights.config()), (TRAINING, record), (SECONDS, round(seconds, 3))):
            if content is not None:
                (staging / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def delete_user(folder: str | Path, user: str) -> bool:
    """Delete the weights of one user from a finished artefact, which is another one for a bench from then on.

    Args:
        folder: of the artefact.
        user: as in the data.

    Returns:
        True if there were any files of this user, such as those that an interrupted call left.

    Raises:
        StoreError: they cannot be deleted. They do not count any more, and are still there.
    """
    artefact, place = read_artefact(folder), f"{USERS}/{user_hash(user)}"
    content = read_json_object(artefact.folder / FILE, FILE)
    left = {name: digest for name, digest in artefact.files.items() if not name.startswith(f"{place}/")}
    # From now on the weights do not count, even if deleting them is interrupted.
    write_text(artefact.folder / FILE, json.dumps(content | {"files": left}, indent=2) + "\n")
    # Also what a killed training had half written.
    found = [artefact.folder / place, *artefact.folder.glob(f"{USERS}/.{user_hash(user)}-*")]
    found = [path for path in found if path.exists()]
    for path in found:
        try:
            shutil.rmtree(path)
        except OSError as error:
            if path.exists():  # else another process was faster
                raise StoreError(
                    f"The weights of a user in {str(path)!r} cannot be deleted ({error.strerror or error}), so they are still "
                    "there: delete this folder, or call delete_user again."
                ) from error
    return bool(found)


def cost(folder: Path) -> dict[str, object]:
    """Return what the weights cost: in memory, in time, and in passes of the language model."""
    paths = sorted(folder.glob(f"{USERS}/[!.]*/{TRAINING}"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first = next(path for path in map(paths[0].with_name, (Lora.file, PrivatePrompt.file)) if path.is_file())
    curves = [r["curve"] for r in records]
    passes = max(map(len, curves))
    curve = [sum(each[min(i, len(each) - 1)] for each in curves) / len(curves) for i in range(passes)]
    seconds = sum(json.loads(path.with_name(SECONDS).read_text(encoding="utf-8")) for path in paths)
    return {
        "users": len(records),
        "pairs": sum(r["pairs"] for r in records),
        "weights_per_user": sum(value.numel() for value in load_file(first).values()),
        "bytes_per_user": first.stat().st_size,
        "trained_examples": sum(r["passes"] * r["pairs"] for r in records),
        "seconds_per_user": round(seconds / len(records), 3),
        "first_loss": sum(r["first_loss"] for r in records) / len(records),
        "last_loss": sum(r["last_loss"] for r in records) / len(records),
        **({"held_loss_by_pass": curve} if curve else {}),
    }


def short_hash(text: str) -> str:
    """Return a digest of a text, to name a file by or to make a seed of."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
