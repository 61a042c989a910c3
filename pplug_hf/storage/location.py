"""The location of a plug, a backbone or an encoder, as one object: every step of a load passes it on, so that no step
forgets the token, the cache or the commit.

    location = Location("me/plug", revision="main", token="hf_...").pinned()  # one commit, even if main moves on
    location.file("config.json")                                              # its path in the cache
    location.folder()                                                         # all files of a plug, in one folder
    location.frozen_module("google/flan-t5-base", commit, "backbone")         # another repository, the same token

A repository is not trusted. Only files with known names are fetched, a file that is too large is rejected before it is
read, and a link in a local folder may not lead out of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigurationError, DataError, MissingFileError, PPlugError
from ..version import __version__
from .files import read_json_object
from .hub_errors import FAILURES, hub_error
from .layout import CHAT_TEMPLATES, CONFIG, FROZEN_FILES, PLUG_FILES, SAVED, VOCABULARIES, WEIGHTS
from .replace import finish
from .retry import T, with_retries

_MB = 2**20
# Bytes at most. The largest vocabularies in use have about 40 MB; settings have some thousand bytes.
_LIMITS: dict[str, int | None] = {**dict.fromkeys(VOCABULARIES, 256 * _MB), WEIGHTS: None}
_LIMIT = 10 * _MB

_REMEDIES = {
    "backbone": ", or pass backbone=<a loaded model>",
    "encoder": ", or pass encoder=<a loaded SentenceTransformer>",
}
# The argument with which a user allows weights that Python would unpickle.
_UNPICKLED = {
    "backbone": 'backbone_kwargs={"use_safetensors": False}',
    "encoder": 'encoder_kwargs={"model_kwargs": {"use_safetensors": False}}',
}
# In the errors of transformers.
_NO_SAFETENSORS = ("no file named model.safetensors", "cannot be loaded with `safetensors`")
_ENCODER_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_ENCODER_COPIES = ("onnx/*", "openvino/*")  # the same weights for other engines


class HubArguments(TypedDict, total=False):
    """The arguments of transformers' `from_pretrained` that say where to load from."""

    revision: str | None
    subfolder: str
    token: str | bool | None
    cache_dir: str | os.PathLike | None
    local_files_only: bool
    force_download: bool


HUB_ARGUMENTS = tuple(HubArguments.__annotations__)
_ARGUMENTS = (*HUB_ARGUMENTS, "gguf_file")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """A folder or a repository, and the options to read it with."""

    name: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False
    kind: str = "plug"  # or backbone, encoder, persona
    gguf_file: str = ""  # of a backbone that is one file in the GGUF format; it may also end the name

    def __post_init__(self) -> None:
        name, inner = split_inner(self.name) if self.kind == "backbone" else (self.name, "")
        folder, file = ("", inner) if inner.endswith(".gguf") else (inner, "")
        gguf_file = PurePosixPath((self.gguf_file or file).replace("\\", "/"))
        path = PurePosixPath(folder, (self.subfolder or "").replace("\\", "/"), gguf_file.parent)
        if path.is_absolute() or ".." in path.parts:
            option, value = ("gguf_file", gguf_file) if gguf_file.name else ("subfolder", self.subfolder)
            raise ConfigurationError(f"{option} must lie inside the {self.kind}, got {str(value)!r}.")
        subfolder = "" if path == PurePosixPath() else str(path)
        inner = os.path.join(name, subfolder)
        if subfolder and self.kind in ("backbone", "encoder") and os.path.isdir(name) and os.path.isdir(inner):
            name, subfolder = inner, ""  # a model in a folder of a folder is a model in a folder
        options = {"name": name, "gguf_file": gguf_file.name, "subfolder": subfolder}
        for option, value in options.items():
            object.__setattr__(self, option, value)
        if self.force_download and self.local_files_only:
            raise ConfigurationError(
                "force_download=True and local_files_only=True contradict each other: choose one."
            )

    def updated(self, arguments: Mapping[str, object]) -> tuple[Location, dict[str, Any]]:
        """Return the location with the options in `arguments`, and the arguments that are not about the location."""
        options = {key: arguments[key] for key in _ARGUMENTS if arguments.get(key) is not None}
        return replace(self, **options), {key: value for key, value in arguments.items() if key not in _ARGUMENTS}

    def frozen_module(self, name: str, revision: str | None, kind: str) -> Location:
        """Return the location of a backbone or encoder, with the same token, cache and download options."""
        return replace(self, name=name, revision=revision, subfolder="", gguf_file="", kind=kind)

    @property
    def full_name(self) -> str:
        """The name, and behind it the subfolder and the GGUF file: what `Location` takes apart again."""
        inner = PurePosixPath(self.subfolder, self.gguf_file)
        return self.name if inner == PurePosixPath() else str(self.name / inner)

    @property
    def is_local(self) -> bool:
        """True for a folder on this machine."""
        return os.path.isdir(self.name)

    @property
    def commit(self) -> str | None:
        """Commit hash once pinned; None for a local folder."""
        return None if self.is_local else self.revision

    @property
    def hub_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the `from_pretrained` of transformers."""
        return {key: getattr(self, key) for key in HUB_ARGUMENTS}

    @property
    def encoder_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `SentenceTransformer`, which has no subfolder and no force_download (see `refresh`)."""
        arguments = {key: getattr(self, key) for key in ("revision", "token", "local_files_only")}
        return {**arguments, "cache_folder": self.cache_dir}

    def refresh(self) -> None:
        """Download a sentence encoder again, even if it is in the cache."""
        if not self.is_local:
            patterns = {"allow_patterns": _ENCODER_FILES, "ignore_patterns": _ENCODER_COPIES}
            arguments = {key: value for key, value in self.hub_arguments.items() if key != "subfolder"}
            snapshot_download(self.name, **patterns, **arguments)

    def pinned(self) -> Location:
        """Return the same location with its revision resolved to a commit; offline, to the commit in the cache.

        Raises:
            MissingFileError: there is no such repository or revision.
            HubError: the Hub refuses the request, or fails.
        """
        if self.is_local:
            return self
        try:
            return replace(self, revision=self._resolved())
        except FAILURES as error:
            raise self.load_error(error) from error

    def _resolved(self) -> str:
        validate_repo_id(self.name)
        options: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        resolve = partial(self.api.resolve_revision, self.name, **options)
        try:
            return with_retries(lambda: resolve(local_files_only=self.local_files_only)).resolved
        except HfHubHTTPError as error:
            # As the client does for single files: a cached copy stays usable when the Hub refuses.
            if self.force_download or isinstance(error, RevisionNotFoundError):
                raise
            try:
                commit = resolve(local_files_only=True).resolved
            except FAILURES:
                raise error from None
            logger.warning("%s Using what the cache has.", self.load_error(error))
            return commit

    @property
    def api(self) -> HfApi:
        """The Hub's client, with this token."""
        return HfApi(token=self.token, library_name="pplug-hf", library_version=__version__)

    def load_error(self, error: BaseException, filename: str = "") -> PPlugError:
        """Return the error to raise after a library failed to load from this location."""
        if self.kind in _UNPICKLED and any(text in str(error) for text in _NO_SAFETENSORS):
            return MissingFileError(
                f"{self._task(filename)}: it is not a complete model folder, for it has no model.safetensors. Other weights "
                f"can carry code and are not opened: if you trust them, pass {_UNPICKLED[self.kind]}, or convert them "
                f"once with save_pretrained{_REMEDIES[self.kind]}."
            )
        if self.is_local:
            return MissingFileError(
                f"{self._task(filename)}: it is not a complete model folder ({type(error).__name__}). Save or download it "
                f"again{_REMEDIES.get(self.kind, '')}."
            )
        return hub_error(error, self._task(filename), _REMEDIES.get(self.kind, ""))

    def _task(self, filename: str = "") -> str:
        filename = filename or (CONFIG if self.kind == "plug" else "")
        kind = "sentence encoder" if self.kind == "encoder" else self.kind
        return f"Cannot load {filename + ' of ' if filename else ''}the {kind} {self.full_name!r}"

    def with_retries(self, call: Callable[[], T]) -> T:
        """Return the result of a library's call that loads from here; what may be downloaded is tried again, see `retry`."""
        return call() if self.is_local else with_retries(call)

    # ---- files ---------------------------------------------------------------------------------------------

    def file(self, filename: str) -> Path | None:
        """Return the path of one file, downloaded if necessary, or None if there is none.

        Raises:
            MissingFileError: there is no such repository, or neither the cache nor the Hub has it.
            HubError: the Hub refuses the request, or fails.
            DataError: the file is too large for its kind, or a link that leads out of the folder.
        """
        if "/" in filename or "\\" in filename or filename in ("", ".", ".."):
            raise DataError(f"{self._task(repr(filename))}: that is not a file name.")
        if self.is_local:
            return self._local_file(filename)
        if filename in self._fetched:
            return self._fetched[filename]
        if filename not in self.sizes:
            return None
        self._check_size(filename, self.sizes[filename])
        try:
            path = Path(with_retries(lambda: hf_hub_download(self.name, filename, **self._download_arguments)))
        except (*FAILURES, ValueError) as error:  # the latter: force_download while offline
            raise self.load_error(error, filename) from error
        self._check_size(filename, path.stat().st_size)
        self._fetched[filename] = path
        return path

    @cached_property
    def _fetched(self) -> dict[str, Path]:
        return {}  # so that force_download downloads a file once, not at every use

    def require(self, filename: str) -> Path:
        """Return the path of a file that must exist; see `file`."""
        path = self.file(filename)
        if path is None:
            where = "its folder" if self.is_local else "the cache" if self.local_files_only else "its repository"
            raise MissingFileError(
                f"{self._task(filename)}: there is no such file in {where}. Check the name, revision= and subfolder=."
            )
        return path

    def gguf_path(self) -> str:
        """Return the absolute path of the GGUF file, downloaded if necessary.

        Raises:
            MissingFileError, HubError: see `file`; there is no such file.
        """
        if not self.is_local:
            return os.path.abspath(self.require(self.gguf_file))
        path = os.path.abspath(self.full_name)  # a user's own folder may hold a link to it
        if not os.path.isfile(path):
            raise MissingFileError(f"{self._task()}: there is no such file{_REMEDIES[self.kind]}.")
        return path

    def folder(self, filenames: Iterable[str] = PLUG_FILES) -> Path:
        """Return a local folder with those of the files that exist; see `file`."""
        paths = [path for name in filenames if (path := self.file(name)) is not None]
        if not paths:
            self.require(CONFIG)
        return paths[0].parent

    def chat_templates(self) -> list[Path]:
        """Return the additional chat templates of a tokenizer in a local folder; a pushed one has them in its settings.

        Raises:
            DataError: one is too large, or a link that leads out of the folder.
        """
        if not self.is_local:
            return []
        names = sorted(path.name for path in Path(self.name, self.subfolder, CHAT_TEMPLATES).glob("*.jinja"))
        return [path for name in names if (path := self._local_file(f"{CHAT_TEMPLATES}/{name}")) is not None]

    def settings(self) -> dict[str, Any]:
        """Read the config.json of a backbone or encoder before a library does; empty if there is none.

        Raises:
            MissingFileError, HubError: see `sizes`.
            DataError: it is not a JSON object, or one of the files that are read whole is too large.
        """
        folder = Path(self.name, self.subfolder) if self.is_local else self._snapshot
        sizes = self._folder_sizes(folder)
        is_here = self.is_local or (CONFIG in sizes and not self.force_download)
        if not is_here:
            sizes = self.sizes
        for filename in FROZEN_FILES:
            if filename in sizes:
                self._check_size(filename, sizes[filename])
        if CONFIG not in sizes:
            return {}
        path = folder / CONFIG if is_here else self.file(CONFIG)
        return read_json_object(path, f"{self._task(CONFIG)}: it") if path else {}

    def check_attention(self) -> None:
        """Refuse a backbone or encoder whose settings name a repository of kernels: only the user may have code fetched.

        Raises:
            ConfigurationError: they do.
            DataError: they are damaged, or larger than settings are.
        """
        settings = self.settings()
        configs = [settings, *(value for value in settings.values() if isinstance(value, dict))]  # of text, of images
        named = [config.get(key) for config in configs for key in ("attn_implementation", "_attn_implementation")]
        if any("/" in str(name) for name in named):
            raise ConfigurationError(
                f"The {self.kind} {self.name!r} wants the attention of a repository of kernels, which is code and is not "
                f"fetched: if you trust it, load it yourself and pass {self.kind}=<a loaded one>."
            )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes in bytes of the files in the repository's folder; of the cached ones if the Hub cannot be reached.

        Raises:
            MissingFileError: there is no such repository or revision, or neither the cache nor the Hub has it.
            HubError: the Hub refuses the request, or fails.
        """
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        cached = self._folder_sizes(self._snapshot)
        if self.local_files_only:
            return cached
        try:
            entries = list(self.api.list_repo_tree(self.name, self.subfolder or None, revision=self.revision))
        except RemoteEntryNotFoundError:  # no such subfolder
            return {}
        except FAILURES as error:
            if cached and not self.force_download:
                return cached
            raise self.load_error(error) from error
        return {entry.path.removeprefix(prefix): entry.size for entry in entries if isinstance(entry, RepoFile)}

    @property
    def _snapshot(self) -> Path:
        return _snapshots(self.name, self.cache_dir) / (self.revision or "") / self.subfolder

    @staticmethod
    def _folder_sizes(folder: Path) -> dict[str, int]:
        if not folder.is_dir():
            return {}
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}

    @property
    def _download_arguments(self) -> dict[str, Any]:
        return {**self.hub_arguments, "library_name": "pplug-hf", "library_version": __version__}

    def _check_size(self, filename: str, size: int) -> None:
        limit = None if self.kind == "persona" or filename == self.gguf_file else _LIMITS.get(filename, _LIMIT)
        if limit is not None and size > limit:
            raise DataError(
                f"{self._task(filename)}: it has {size / _MB:.0f} MB, and such a file has at most {limit / _MB:.0f} MB. "
                "It is not read."
            )

    @cached_property
    def _local_roots(self) -> tuple[Path, Path, tuple[Path, ...]]:
        """Paths of the folder and its subfolder, and the folders that links of a cached snapshot may lead to."""
        root = Path(self.name).resolve()
        return root, (root / self.subfolder).resolve(), (root, *_cache_of(root))

    @cached_property
    def _stamp(self) -> tuple[int, int, int] | None:
        return _stamp_of(self._local_roots[1])

    def _local_file(self, filename: str) -> Path | None:
        root, folder, roots = self._local_roots
        if folder.is_relative_to(root) and (folder / SAVED).is_dir():
            finish(folder)
        if _stamp_of(folder) != self._stamp:  # files read earlier belong to another plug
            raise DataError(f"The {self.kind} in {self.name!r} was saved anew while it was being read: load it again.")
        path = folder / filename
        real = Path(os.path.realpath(path))  # unlike `resolve`, it accepts circular links
        if not real.is_file():
            return None
        if not any(real.is_relative_to(allowed) for allowed in roots):
            raise DataError(
                f"{self._task(filename)}: it is a link that leads out of the folder. If that is meant, put the file itself "
                "there."
            )
        self._check_size(filename, real.stat().st_size)
        return path


def _stamp_of(folder: Path) -> tuple[int, int, int] | None:
    """Return a value that changes whenever a plug is saved in the folder."""
    try:
        there = (folder / CONFIG).stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino, there.st_mtime_ns


def _cache_of(folder: Path) -> tuple[Path, ...]:
    """Return the blob folders that a snapshot in the Hub's cache, models--me--plug/snapshots/COMMIT, links to."""
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            # The second is shared between repositories.
            return snapshots.parent / "blobs", snapshots.parent.parent / "blobs"
    return ()


def split_gguf(name: str) -> tuple[str, str]:
    """Return ("folder", "file.gguf") of "folder/file.gguf", likewise of "owner/name/file.gguf"; (name, "") of all others."""
    return split_inner(name) if name.endswith(".gguf") else (name, "")


def split_inner(name: str) -> tuple[str, str]:
    """Return what `split_gguf` does, and ("owner/name", "inner/folder") of a folder inside of a repository."""
    if os.path.isdir(name):
        return name, ""
    folder, file = os.path.split(name)
    if name.endswith(".gguf") and os.path.isdir(folder or os.curdir):
        return folder or os.curdir, file
    owner, *rest = name.split("/", 2)
    repository = f"{owner}/{rest[0]}" if len(rest) == 2 else None
    return (repository, rest[1]) if repository and is_hub_id(repository) else (name, "")


def hub_repository(name: str | None, kind: str) -> str | None:
    """Return the repository that the name of a frozen module says; None if it is on no Hub.

    Args:
        name: of a "backbone" maybe with a folder or a GGUF file in the repository.
        kind: "backbone" or "encoder".
    """
    split = split_inner if kind == "backbone" else split_gguf
    repository = split(name)[0] if name else None
    return repository if is_hub_id(repository) else None


def is_hub_id(name: str | None) -> bool:
    """Return True for a name that a repository on the Hub can have."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def _snapshots(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the cache folder with the commits of a repository."""
    return Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")


def local_files(name: str | None, commit: str | None) -> Path | None:
    """Return the folder of a model on this machine, its own or that of a commit in the cache; None if there is none."""
    if name is None or split_gguf(name)[1]:
        return None
    repository, inner = split_inner(name)
    folder = Path(name) if os.path.isdir(name) else _snapshots(repository) / (commit or "") / inner
    return folder if (folder / CONFIG).is_file() else None


def cached_commit(name: str | None) -> str | None:
    """Return the commit of a repository if the cache holds exactly one; None if there may be others.

    For models that the user has loaded: they do not record their commit.
    """
    if name is None or not is_hub_id(name) or os.path.isdir(name):
        return None
    snapshots = _snapshots(name)
    commits = [path.name for path in snapshots.iterdir() if (path / CONFIG).exists()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None
