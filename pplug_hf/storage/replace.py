"""Atomic replacement of a plug folder: a reader finds the old plug or the new one, even if the writer is killed.

A file system replaces a single file atomically, but not several. The new files are therefore written to a folder inside
the plug folder, which is then renamed to `.pplug-saved`: from that moment the new plug counts. Its files are moved into
place one by one; if the process is killed meanwhile, the next reader or writer of the folder moves the rest.

Writers of one folder wait for each other. A reader does not wait; it looks before and after whether
`config.json` is still the same file, to find out whether all it has read belongs to one plug.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..errors import ConfigurationError, DataError
from .files import locked, read_json_object
from .layout import (
    CHAT_TEMPLATES,
    CONFIG,
    HIDDEN,
    PROCESSOR_CONFIG,
    SAVED,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
)

_WRITING = f"{HIDDEN}saving-"
_NAMES = ".names"  # inside SAVED: the names of the new plug's files

MODEL_TYPE = "pplug"


def check_writable(folder: str | os.PathLike) -> None:
    """Raise a `ConfigurationError` if a plug saved here would overwrite something else."""
    folder = Path(folder)
    if folder.is_file():
        raise ConfigurationError(f"{str(folder)!r} is a file; a plug is saved as a folder.")
    if (folder / CONFIG).is_file():
        model_type = None
        with contextlib.suppress(DataError):
            model_type = read_json_object(folder / CONFIG, CONFIG).get("model_type")
        if model_type == MODEL_TYPE:
            return
        raise ConfigurationError(
            f"{str(folder)!r} exists and holds a model of type {model_type!r}, not a plug: choose another folder, or "
            "remove it first."
        )
    if (folder / WEIGHTS).exists():
        raise ConfigurationError(f"{str(folder)!r} holds weights that are not a plug: choose another folder.")


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """Yield a staging folder whose files replace those of `folder`, all or none, when the block ends without an error.

    Files that do not belong to a plug stay. A process killed while it writes leaves a hidden folder, which the next
    save removes.

    Raises:
        ConfigurationError: see `check_writable`.
    """
    check_writable(folder)
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            for abandoned in folder.glob(f"{_WRITING}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            # Inside the folder, because only a rename within one file system is atomic.
            staging = Path(tempfile.mkdtemp(prefix=_WRITING, dir=folder))
            try:
                yield str(staging)
                names = [path.relative_to(staging).as_posix() for path in sorted(staging.rglob("*")) if path.is_file()]
                (staging / _NAMES).write_text(json.dumps(names), encoding="utf-8")
                _move(folder)
                staging.rename(folder / SAVED)
                _move(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: the save succeeded
                folder.rmdir()


def finish(folder: Path) -> None:
    """Complete an interrupted save, if there is a `.pplug-saved`: move the remaining files of the new plug into place.

    If the process that saves is still alive, wait until it is done.

    Raises:
        DataError: the folder cannot be written, or what was saved is damaged.
    """
    with locked(folder):
        _move(folder)


def _move(folder: Path) -> None:
    saved = folder / SAVED
    if saved.is_symlink() or not saved.is_dir():
        return
    try:
        names = list(map(str, json.loads((saved / _NAMES).read_text(encoding="utf-8"))))
    except FileNotFoundError:  # killed while removing the folder: every file was moved
        names = []
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{str(saved)!r} is damaged ({error}): remove it, and the plug is the one before.") from None
    try:
        for name in names:
            path = PurePosixPath(name)
            inside = (folder / path).parent.resolve().is_relative_to(folder.resolve())  # a link may lead out of it
            if path.is_absolute() or ".." in path.parts or not inside:
                raise DataError(f"{str(saved)!r} names {name!r}, which leads out of the folder: remove it.")
            (folder / path).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved already
                os.replace(saved / path, folder / path)
        # No file of the old vocabulary may stay beside the new one, no old weights beside a new configuration, and no old
        # settings that a processor would prefer.
        stale = {TOKENIZER_CONFIG: TOKENIZER_FILES, CONFIG: (PROCESSOR_CONFIG, WEIGHTS)}
        for name in {old for new, files in stale.items() if new in names for old in files} - set(names):
            (folder / name).unlink(missing_ok=True)
        if TOKENIZER_CONFIG in names:  # which holds all of its chat templates
            shutil.rmtree(folder / CHAT_TEMPLATES, ignore_errors=True)
        shutil.rmtree(saved, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The last save into {str(folder)!r} was interrupted, and it cannot be completed here ({error.strerror}): "
            "load the plug once where the folder can be written."
        ) from error
