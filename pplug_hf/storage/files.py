"""Files and new folders that appear as a whole, the lock of a folder, and reading a JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from ..errors import DataError, kind_of
from .layout import HIDDEN


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Replace a file as a whole: a reader sees the old file or the new one, even if the writer is killed.

    Args:
        path: of the file; its folder is made if there is none.

    Yields:
        The path to write the new file to. It replaces `path` when the block ends without an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # in the same folder: a rename there is atomic
    try:
        yield staging
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def private_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Replace a file as a whole by one that its owner alone can read; see `atomic_write`.

    Args:
        path: of the file; its folder is made if there is none.

    Yields:
        The new file, open for writing.
    """
    with (
        atomic_write(path) as staging,
        open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        yield file


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder that appears as a whole, or not at all if the writer is killed.

    Args:
        path: of the folder, of which there is none yet; the one that holds it is made.

    Yields:
        A folder, readable by its owner alone, that gets this name when the block ends without an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    staging.mkdir(mode=0o700)
    try:
        yield staging
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a text file as a whole, in UTF-8 and with the line ends of `text`; see `atomic_write`."""
    with atomic_write(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="")


def read_json_object(path: str | os.PathLike, name: str, remedy: str = "download or save it again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        name: the file in a message, e.g. "The config.json of 'me/plug'".
        remedy: the end of the message.

    Raises:
        DataError: the file is not valid JSON in UTF-8, or holds something other than an object.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is damaged ({error}): {remedy}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{name} is damaged (it holds {kind_of(values)}, not settings by name): {remedy}.")
    return values


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: its writers wait for each other. The system releases the lock of a killed process.

    Where there is no lock to be had (a folder that cannot be written, a file system without locks), nobody waits.
    """
    path = folder / f"{HIDDEN}lock"
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    with contextlib.suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            # While the lock is held: who gets the lock of a file that is gone, tries again. Windows does it on release.
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()
