"""Pushing a plug folder: what is uploaded is the plug, its vocabulary and its card, and says nothing of this machine."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from safetensors import SafetensorError, safe_open

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError, HubError, PPlugError
from ..storage.hub_errors import FAILURES, hub_error, status_of
from ..storage.layout import CARD, CONFIG, PLUG_FILES, WEIGHTS
from ..storage.location import Location, is_hub_id
from ..version import __version__
from .stub import add_stub

# Read for the card and not uploaded: they hold places of this machine.
_SETTINGS = ("training_args.json", "train_settings.json")
# What transformers and its tokenizers may write of where they were loaded from.
_ORIGINS = {
    *("name_or_path", "_name_or_path", "is_local", "local_files_only", "cache_dir", "token"),
    *("vocab_file", "merges_file", "tokenizer_file", "spm_file", "special_tokens_map_file"),
}

logger = logging.getLogger(__name__)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str = "",
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] = (),
    **card: Any,
) -> CommitInfo:
    """Upload a plug folder in one commit: the repository holds the plug of before or this one, never a mixture.

    A backbone or encoder that is on no Hub is recorded by its fingerprint alone. The card in the repository is brought up
    to date and keeps what a person wrote; if that fails, the plug is pushed without.

    Args:
        folder: a saved plug.
        repo_id: "name" or "owner/name"; made if it does not exist.
        private: visibility of a new repository (default: the owner's).
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead of changing the branch.
        subfolder: where in the repository.
        commit_message, commit_description: of the commit.
        token: to log in with (default: that of `hf auth login`).
        tags: more tags for the card.
        **card: for `write_card`: results, license, datasets, language.

    Returns:
        The commit; `commit_url`, and `pr_url` of a pull request, say where it is.

    Raises:
        MissingFileError, DataError, ConfigurationError: the folder holds no whole plug.
        HubError: the Hub refuses, or the connection broke.
    """
    target = Location(repo_id, revision, subfolder, token)
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"repo_id must be 'name' or 'owner/name', got {repo_id!r}.")
    api = HfApi(token=token, library_name="pplug-hf", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="pplug-push-") as staging:
        config = _stage(Location(os.fspath(folder)), Path(staging), api)
        if not subfolder:  # where transformers does not look for it
            add_stub(Path(staging))
        trainable = _count(Path(staging))
        try:
            target = replace(target, name=api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(target.name, branch=revision, exist_ok=True)
            _write_card(Path(staging), config, trainable, target, tags, card)
            return _commit(
                api,
                Path(staging),
                target,
                create_pr=create_pr,
                commit_message=commit_message or "Upload plug",
                commit_description=commit_description,
            )
        except PPlugError:
            raise
        except (*FAILURES, RuntimeError, ValueError) as error:  # of one file; an answer that makes no sense
            raise _failed(error, repo_id) from error


def _stage(place: Location, staging: Path, api: HfApi) -> PPlugConfig:
    """The files of a plug, without what they say of this machine, and those that the card is written from."""
    for name in (CONFIG, WEIGHTS):
        place.require(name)
    for name in (*PLUG_FILES, *_SETTINGS, CARD):
        if (path := place.file(name)) is not None:
            shutil.copyfile(path, staging / name)
    for path in staging.glob("*.json"):
        if path.name.endswith("config.json"):
            values = _read_json(path, place.name)
            path.write_text(_dump({k: v for k, v in values.items() if k not in _ORIGINS}), encoding="utf-8")
    values = _read_json(staging / CONFIG, place.name)
    if values.get("model_type") != PPlugConfig.model_type:
        raise ConfigurationError(
            f"{place.name!r} holds a model of type {values.get('model_type')!r}, not a plug; only plugs are pushed."
        )
    for kind in ("backbone", "encoder"):
        name, commit = values.get(kind), values.get(f"{kind}_revision")
        values[kind], values[f"{kind}_revision"] = _published(name, commit, kind, api)
    (staging / CONFIG).write_text(_dump(values), encoding="utf-8")
    return PPlugConfig.from_dict(values)


def _published(name: Any, commit: Any, kind: str, api: HfApi) -> tuple[str | None, str | None]:
    """What a repository says of where a frozen part is: Hub id and commit, or nothing."""
    if not isinstance(name, str) or not is_hub_id(name) or os.path.isabs(name):
        return None, None
    if isinstance(commit, str):
        return name, commit
    # Loaded by somebody else, who did not say which commit. If there is such a repository, it is taken as it is now.
    try:
        commit = api.resolve_revision(name).resolved
    except FAILURES as error:
        logger.warning(
            "The commit of the %s %r is not known, and the Hub does not tell (%s). It is recorded as one that is on no "
            "Hub: whoever loads the plug must pass %s=.",
            *(kind, name, type(error).__name__, kind),
        )
        return None, None
    logger.warning("The commit of the %s %r is not known; the present one, %s, is recorded.", kind, name, commit)
    return name, commit


def _write_card(
    staging: Path,
    config: PPlugConfig,
    trainable: int,
    target: Location,
    tags: Sequence[str],
    options: dict[str, Any],
) -> None:
    """README.md in the staging folder, from the one there or in the repository. Without one if anything goes wrong."""
    path = staging / CARD
    try:
        from .cards import write_card

        # The card that is there now; one in the cache may be of yesterday.
        there = replace(target, force_download=True).file(CARD)
        options = {**options, "tags": tags, "published": there and there.read_bytes()}
        kept = write_card(
            staging, config, trainable=trainable, repo_id=target.name, subfolder=target.subfolder, **options
        )
        if kept:
            logger.info("The card keeps what was edited by hand: %s.", ", ".join(kept))
    except Exception as error:
        logger.warning("The plug is pushed without a new card: %s", error)
        path.unlink(missing_ok=True)
    finally:
        for name in _SETTINGS:
            (staging / name).unlink(missing_ok=True)


def _commit(api: HfApi, staging: Path, target: Location, **options: Any) -> CommitInfo:
    """One commit of all files. (The client's upload_folder may make several, and transformers' knows no folders.)"""
    prefix = f"{target.subfolder}/" if target.subfolder else ""
    # A file that the plug before had and this one lacks must not stay: a chat template, another vocabulary.
    stale = [prefix + name for name in PLUG_FILES if name in target.sizes and not (staging / name).exists()]
    card = staging / CARD

    def commit() -> CommitInfo:
        added = [CommitOperationAdd(prefix + path.name, path) for path in sorted(staging.iterdir())]
        operations = [*added, *map(CommitOperationDelete, stale)]
        return api.create_commit(target.name, operations, revision=target.revision, **options)

    try:
        return commit()
    except (ValueError, HTTPError, HfHubHTTPError) as error:  # the client has each card checked before it commits
        told = f"{error} {getattr(getattr(error, '_request', None), 'url', '')}"
        about_card = isinstance(error, json.JSONDecodeError) or any(text in told for text in (CARD, "validate-yaml"))
        if not card.exists() or not about_card:
            raise
        logger.warning("The plug is pushed without a new card, which the Hub does not accept: %s", error)
        card.unlink()
        return commit()


def _failed(error: BaseException, repo_id: str) -> PPlugError:
    task = f"Cannot push to {repo_id!r}, where nothing is half-written"
    if status_of(error) is None:
        return HubError(f"{task}: the connection broke ({type(error).__name__}). Check it, and push again.")
    return HubError(str(hub_error(error, task)))


def _count(staging: Path) -> int:
    """Number of trained parameters."""
    try:
        with safe_open(staging / WEIGHTS, framework="np") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"The {WEIGHTS} of the plug is truncated or damaged ({error}): save it again.") from error
    return sum(math.prod(shape) for shape in shapes)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"The {path.name} of {name!r} is damaged ({error}): save it again.") from error
    if not isinstance(values, dict):
        raise DataError(f"The {path.name} of {name!r} holds a {type(values).__name__}, not settings by name.")
    return values


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
