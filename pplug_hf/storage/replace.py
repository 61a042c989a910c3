"""Saving a folder as a whole: whoever reads it, and whenever the writer is killed, it is the old plug or the new one.

A file system replaces single files at once, not several. So the new files are written into a folder inside, which is
then renamed to `.pplug-saved`: from that moment the new plug counts. Its files are moved into place one by one; if the
process is killed meanwhile, whoever reads or writes the folder next moves the rest.

Those who save into one folder wait for each other. A reader waits for nobody, and learns from `stamp` whether what it
has read so far is of one plug.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ConfigurationError, DataError
from .files import read_json_object
from .layout import CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES, WEIGHTS

_WRITING = ".pplug-saving-"
_SAVED = ".pplug-saved"
_NAMES = ".names"  # in it: what the new plug consists of, so that what is left of the old one can go

MODEL_TYPE = "pplug"


def check_writable(folder: str | os.PathLike) -> None:
    """Raise a `ConfigurationError` if writing a plug here would overwrite something that is none."""
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
        raise ConfigurationError(f"{str(folder)!r} holds weights that are no plug: choose another folder.")


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """A staging folder whose files replace those of `folder`, all of them or none, once the block is left.

    Files that are no part of a plug stay. A process killed while it writes leaves an invisible folder behind, which
    the next save removes.

    Raises:
        ConfigurationError: see `check_writable`.
    """
    check_writable(folder)
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
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
            staging.rename(folder / _SAVED)
            _move(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):  # not empty: the save went well
                    folder.rmdir()


def finish(folder: Path) -> None:
    """Move the rest of a new plug into place, if the process that saved it was killed over it.

    If it is alive and at it, wait until it is done.

    Raises:
        DataError: it cannot be done here.
    """
    if (folder / _SAVED).is_dir():
        with locked(folder):
            _move(folder)


def stamp(folder: Path) -> Any:
    """Changes whenever a plug is saved here."""
    try:
        there = (folder / CONFIG).stat()
    except OSError:
        return None
    return there.st_dev, there.st_ino, there.st_mtime_ns


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among those who save into the folder. The system unlocks what a killed process has locked.

    Where folders cannot be locked (Windows, some network file systems), nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _move(folder: Path) -> None:
    saved = folder / _SAVED
    if saved.is_symlink() or not saved.is_dir():
        return
    try:
        names = list(json.loads((saved / _NAMES).read_text(encoding="utf-8")))
    except FileNotFoundError:  # killed over removing it: every file was moved
        names = []
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{str(saved)!r} is damaged ({error}): remove it, and the plug is the one before.") from None
    try:
        for name in names:
            path = PurePosixPath(str(name))
            inside = (folder / path).parent.resolve().is_relative_to(folder.resolve())  # which a link may lead out of
            if path.is_absolute() or ".." in path.parts or not inside:
                raise DataError(f"{str(saved)!r} names {name!r}, which leads out of the folder: remove it.")
            (folder / path).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved already
                os.replace(saved / path, folder / path)
        if TOKENIZER_CONFIG in names:  # nothing of the old vocabulary may stay beside the new one
            for name in set(TOKENIZER_FILES) - set(names):
                (folder / name).unlink(missing_ok=True)
        shutil.rmtree(saved, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The last save into {str(folder)!r} was interrupted, and it cannot be completed here ({error.strerror}): "
            "load the plug once where the folder can be written."
        ) from error
