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

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, is_offline_mode
from huggingface_hub.utils import get_session, hf_raise_for_status

from ..errors import ConfigurationError, HubError
from ..modeling.plug_folder import join_chat_templates, load_config, weight_shapes
from ..storage.files import read_json_object
from ..storage.hub_errors import FAILURES, hub_error, status_of
from ..storage.layout import CARD, CHAT_TEMPLATES, CONFIG, PLUG_FILES, TRAIN_SETTINGS
from ..storage.location import Location, hub_repository, is_hub_id
from .cards import card_options, write_card
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
    brought up to date and keeps what a person wrote; if that fails, the plug is pushed without a card. What is said about the
    card is checked first.

    Args:
        folder: a saved plug.
        repo_id: "name" or "owner/name"; created if it does not exist.
        private: visibility of a new repository (default: the owner's).
        revision: branch; created if it does not exist.
        create_pr: open a pull request instead of changing the branch.
        subfolder: of the repository, to push into.
        commit_message, commit_description: of the commit.
        token: to log in with (default: that of `hf auth login`).
        **card: for the card: results, license, datasets, language, tags; see `card_options`.

    Returns:
        The commit; `commit_url`, and `pr_url` of a pull request, say where it is.

    Raises:
        MissingFileError, DataError, ConfigurationError: the folder does not hold a complete plug.
        ConfigurationError: an unknown option of the card, or a name that the Hub does not take.
        HubError: the Hub refuses, or the connection broke.
    """
    card = card_options(card)
    target, task = Location(repo_id, revision, subfolder, token), f"Could not push to {repo_id!r}"
    if not is_hub_id(repo_id):
        raise ConfigurationError(f"repo_id must be 'name' or 'owner/name', got {repo_id!r}.")
    if is_offline_mode():
        raise HubError(f"{task}: HF_HUB_OFFLINE is set. The repository is unchanged.")
    with tempfile.TemporaryDirectory(prefix="pplug-push-") as temporary:
        staging = Path(temporary)
        _stage(Location(os.fspath(folder)), staging, target.api)
        if not subfolder:  # where transformers does not look for it
            add_stub(staging)
        try:
            target = replace(target, name=target.api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                target.api.create_branch(target.name, branch=revision, exist_ok=True)
            _write_card(staging, target, card)
            # One commit of all files, which the client's upload_folder does not promise.
            return target.api.create_commit(
                target.name,
                _operations(staging, target),
                commit_message=commit_message or "Upload plug",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except (*FAILURES, RuntimeError, ValueError) as error:  # of one file; an answer that makes no sense
            if status_of(error) is not None:
                raise HubError(f"{hub_error(error, task)} The repository is unchanged.") from error
            raise HubError(
                f"{task}: the connection broke ({type(error).__name__}). The repository holds all of the new plug or "
                "none of it: push again."
            ) from error


def _stage(location: Location, staging: Path, api: HfApi) -> None:
    """Copy the files of a plug without any trace of this machine, and those that its card is written from."""
    load_config(location)
    weight_shapes(location)  # damaged weights are refused here
    for name in (*PLUG_FILES, TRAIN_SETTINGS, CARD):
        if (path := location.file(name)) is not None:
            shutil.copyfile(path, staging / name)
    for path in location.chat_templates():
        (staging / CHAT_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, staging / CHAT_TEMPLATES / path.name)
    join_chat_templates(staging)
    for path in staging.glob("*config.json"):
        values = read_json_object(path, f"The {path.name} of {location.name!r}", "save it again")
        values = {key: value for key, value in values.items() if key not in _ORIGINS}
        if path.name == CONFIG:
            values |= _published(values, "backbone", api) | _published(values, "encoder", api)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _published(config: dict[str, Any], kind: str, api: HfApi) -> dict[str, str | None]:
    """Return the Hub id and the commit of a frozen part as a repository may name them; None and None of a local one."""
    name, commit = config.get(kind), config.get(f"{kind}_revision")
    repository = hub_repository(name, kind)
    if repository and commit is None:  # it was loaded by somebody else, who did not say which commit
        try:
            commit = api.resolve_revision(repository).resolved
            recorded = f"the present one, {commit}, is recorded"
        except FAILURES as error:
            recorded = f"the Hub does not tell it ({type(error).__name__}): whoever loads the plug must pass {kind}="
        logger.warning("The commit of the %s %r is not known; %s.", kind, name, recorded)
    found = (name, commit) if repository and commit else (None, None)
    return {kind: found[0], f"{kind}_revision": found[1]}


def _write_card(staging: Path, target: Location, options: dict[str, Any]) -> None:
    """Write README.md into the staging folder. Whatever goes wrong, the plug is pushed, if need be without it."""
    try:
        # The card that is there now; one in the cache may be of yesterday.
        there = replace(target, force_download=True).file(CARD)
        published = there.read_bytes() if there else b""
        place = {"repo_id": target.name, "subfolder": target.subfolder, "published": published}
        metadata = write_card(staging, load_config(staging), **place, **options)
        # `RepoCard.validate` of huggingface-hub 2.0 asks the public Hub, whatever the endpoint.
        content = {"content": (staging / CARD).read_text(encoding="utf-8"), "repoType": "model"}
        hf_raise_for_status(get_session().post(f"{target.api.endpoint}/api/validate-yaml", json=content))
        if not metadata.get("license"):
            logger.warning("The card names no licence: others may not use the plug.")
    except Exception as error:
        logger.warning("The plug is pushed without a new card: %s", error)
        (staging / CARD).unlink(missing_ok=True)


def _operations(staging: Path, target: Location) -> list[CommitOperationAdd | CommitOperationDelete]:
    prefix = f"{target.subfolder}/" if target.subfolder else ""
    paths = {path.name: path for path in sorted(staging.iterdir()) if path.name != TRAIN_SETTINGS}
    # A file that the plug before had and this one lacks must not stay: a chat template, another vocabulary.
    stale = [name for name in PLUG_FILES if name in target.sizes and name not in paths]
    added = [CommitOperationAdd(prefix + name, path) for name, path in paths.items()]
    return [*added, *(CommitOperationDelete(prefix + name) for name in stale)]
