"""Pushing a plug folder: the plug, its vocabulary and its card are uploaded, and nothing about this machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, HubError, PPlugError
from ..modeling.plug_folder import load_config, weight_shapes
from ..storage.files import read_json_object
from ..storage.hub_errors import FAILURES, chain_of, hub_error, status_of
from ..storage.layout import CARD, CONFIG, PLUG_FILES, TRAIN_SETTINGS
from ..storage.location import Location, hub_repository, is_hub_id
from ..version import __version__
from .cards import write_card
from .stub import add_stub

# Where something was loaded from, as transformers and its tokenizers may record it.
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
    **card: Any,
) -> CommitInfo:
    """Upload a plug folder in one commit: the repository holds the previous plug or this one, never a mixture.

    A backbone or encoder that is not on the Hub is recorded by its fingerprint alone. The card in the repository is
    brought up to date and keeps what a person wrote; if that fails, the plug is pushed without a card.

    Args:
        folder: a saved plug.
        repo_id: "name" or "owner/name"; created if it does not exist.
        private: visibility of a new repository (default: the owner's).
        revision: branch; created if it does not exist.
        create_pr: open a pull request instead of changing the branch.
        subfolder: of the repository, to push into.
        commit_message, commit_description: of the commit.
        token: to log in with (default: that of `hf auth login`).
        **card: for `write_card`: results, license, datasets, language, tags.

    Returns:
        The commit; `commit_url`, and `pr_url` of a pull request, say where it is.

    Raises:
        MissingFileError, DataError, ConfigurationError: the folder does not hold a complete plug.
        HubError: the Hub refuses, or the connection broke.
    """
    target = Location(repo_id, revision, subfolder, token)
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"repo_id must be 'name' or 'owner/name', got {repo_id!r}.")
    api = HfApi(token=token, library_name="pplug-hf", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="pplug-push-") as temporary:
        staging = Path(temporary)
        config = _stage(Location(os.fspath(folder)), staging, api)
        if not subfolder:  # where transformers does not look for it
            add_stub(staging)
        try:
            target = replace(target, name=api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(target.name, branch=revision, exist_ok=True)
            _write_card(staging, config, target, card, api)
            # One commit of all files, which the client's upload_folder does not promise.
            return api.create_commit(
                target.name,
                _operations(staging, target),
                commit_message=commit_message or "Upload plug",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except PPlugError:
            raise
        except (*FAILURES, RuntimeError, ValueError) as error:  # of one file; an answer that makes no sense
            raise _failed(error, repo_id) from error


def _stage(location: Location, staging: Path, api: HfApi) -> PPlugConfig:
    """Copy the files of a plug without any trace of this machine, and those that its card is written from."""
    config = load_config(location)
    weight_shapes(location)  # damaged weights are refused here
    for name in (*PLUG_FILES, TRAIN_SETTINGS, CARD):
        if (path := location.file(name)) is not None:
            shutil.copyfile(path, staging / name)
    for path in staging.glob("*config.json"):
        values = read_json_object(path, f"The {path.name} of {location.name!r}", "save it again")
        values = {key: value for key, value in values.items() if key not in _ORIGINS}
        if path.name == CONFIG:
            for kind in ("backbone", "encoder"):
                name, commit = _published(values.get(kind), values.get(f"{kind}_revision"), kind, api)
                values |= {kind: name, f"{kind}_revision": commit}
            config = PPlugConfig.from_dict(values)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return config


def _published(name: Any, commit: Any, kind: str, api: HfApi) -> tuple[str | None, str | None]:
    """Return the Hub id and commit of a frozen part as a repository may name them; (None, None) for a local one."""
    repository = hub_repository(name)
    if repository is None:
        return None, None
    if isinstance(commit, str):
        return name, commit
    try:  # it was loaded by somebody else, who did not say which commit
        commit = api.resolve_revision(repository).resolved
    except FAILURES as error:
        logger.warning(
            "The commit of the %s %r is not known, and the Hub does not tell (%s). It is recorded as a local one: "
            "whoever loads the plug must pass %s=.",
            *(kind, name, type(error).__name__, kind),
        )
        return None, None
    logger.warning("The commit of the %s %r is not known; the present one, %s, is recorded.", kind, name, commit)
    return name, commit


def _write_card(staging: Path, config: PPlugConfig, target: Location, options: dict[str, Any], api: HfApi) -> None:
    """Write README.md into the staging folder. Whatever goes wrong, the plug is pushed, if need be without it."""
    try:
        # The card that is there now; one in the cache may be of yesterday.
        there = replace(target, force_download=True).file(CARD)
        options = {**options, "published": there.read_bytes() if there else b""}
        metadata = write_card(staging, config, repo_id=target.name, subfolder=target.subfolder, **options)
        _validate(staging / CARD, api)
        if not metadata.get("license"):
            logger.warning("The card names no licence: others may not use the plug.")
    except Exception as error:
        logger.warning("The plug is pushed without a new card: %s", error)
        (staging / CARD).unlink(missing_ok=True)


def _validate(card: Path, api: HfApi) -> None:
    """Let the Hub check a card. `RepoCard.validate` of huggingface-hub 2.0 asks the public Hub, whatever the endpoint."""
    content = {"content": card.read_text(encoding="utf-8"), "repoType": "model"}
    hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=content))


def _operations(staging: Path, target: Location) -> list[CommitOperationAdd | CommitOperationDelete]:
    prefix = f"{target.subfolder}/" if target.subfolder else ""
    paths = {path.name: path for path in sorted(staging.iterdir()) if path.name != TRAIN_SETTINGS}
    # A file that the plug before had and this one lacks must not stay: a chat template, another vocabulary.
    stale = [name for name in PLUG_FILES if name in target.sizes and name not in paths]
    added = [CommitOperationAdd(prefix + name, path) for name, path in paths.items()]
    return [*added, *(CommitOperationDelete(prefix + name) for name in stale)]


def _failed(error: BaseException, repo_id: str) -> HubError:
    task = f"Could not push to {repo_id!r}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain_of(error)):
        return HubError(f"{task}: HF_HUB_OFFLINE is set. The repository is unchanged.")
    if status_of(error) is None:
        reason = f"the connection broke ({type(error).__name__})"
        return HubError(f"{task}: {reason}. The repository holds all of the new plug or none of it: push again.")
    return HubError(f"{hub_error(error, task)} The repository is unchanged.")
