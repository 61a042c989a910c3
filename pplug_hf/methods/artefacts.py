"""Trained artefacts: what a method has learned, as a folder with `method.json` and safetensors files.

    draft = Draft.open("runs/ropg", "ranker", run={"seed": 0, "data": "1f..."})   # new, or continued after a kill
    save_file(weights, draft.folder / "weights.safetensors")
    artefact = draft.finish({"task": "LaMP-2"}, about={"curve": [0.4, 0.5]})       # from now on it counts

    artefact = read_artefact("runs/ropg", "ranker")
    weights = load_file(artefact.file("weights.safetensors"))

`method.json` is written last and names every file with its digest, so a folder without it is one whose training was
interrupted, and a file that was copied in part is noticed when it is used. The bench takes artefacts as
`--trained NAME=FOLDER`. What is learned about single users is personal data: no command uploads it, and it is never
written into a plug.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, MismatchError, MissingFileError
from ..storage.files import read_json_object, write_text
from ..storage.layout import ARTEFACT, CONFIG
from ..storage.replace import MODEL_TYPE
from .digests import differences, json_digest

FORMAT = 1
FILE, UNFINISHED = ARTEFACT, "unfinished.json"

# Kind -> its class, or where it is: a `Ranker` with `load(artefact, resources)`, or a subclass of `Trained`.
KINDS: dict[str, type | str] = {
    "ranker": "pplug_hf.methods.trained_ranker:TrainedRanker",
    "selector": "pplug_hf.methods.selector:Selector",
    **dict.fromkeys(("ftp", "oppu", "user-tokens"), "pplug_hf.methods.adapters:UserAdapters"),
}


def register_kind(kind: str, made_by: type | str) -> None:
    """Make a kind of artefact known, so that `--trained NAME=FOLDER` takes it.

    Args:
        kind: as in `method.json`.
        made_by: a subclass of `Trained`, or of `Ranker` with a static method `load(artefact, resources)`; or its place,
            "module:Class".

    Raises:
        ConfigurationError: the kind is taken.
    """
    if kind in KINDS:
        raise ConfigurationError(f"There is a kind of artefact {kind!r} already: choose another name.")
    KINDS[kind] = made_by


def class_of(kind: str) -> type:
    """Return the class of a kind.

    Raises:
        ConfigurationError: no such kind.
    """
    found = KINDS.get(kind)
    if found is None:
        raise ConfigurationError(
            f"There is no kind of trained artefact {kind!r}; choose one of {', '.join(KINDS)}, or register_kind one of your "
            "own."
        )
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = KINDS[kind] = getattr(importlib.import_module(module), name)
    return found


@dataclass(frozen=True)
class Artefact:
    """A finished artefact.

    Attributes:
        folder: where it is.
        kind: what it is, as in `KINDS`.
        settings: what determines its answers besides the files, and what it belongs to, as JSON takes it.
        run: what its training was determined by.
        about: what else is known, such as learning curves and places; not in the digest.
        files: path inside the folder -> SHA-256.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    run: Mapping[str, Any]
    about: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """A fingerprint of settings and files, for keys: that of a copy is the same."""
        return json_digest({"kind": self.kind, "settings": self.settings, "files": self.files})

    def file(self, name: str) -> Path:
        """Return the place of a file, after comparing its contents with what was saved.

        Args:
            name: path inside the folder.

        Raises:
            DataError: the artefact has no such file, or it is missing or damaged.
        """
        path = self.folder / name
        if name not in self.files:
            raise DataError(f"The artefact {str(self.folder)!r} has no file {name!r}: train it again.")
        if not path.is_file() or _sha256(path) != self.files[name]:
            raise DataError(
                f"{name!r} of the artefact {str(self.folder)!r} is {'damaged' if path.is_file() else 'missing'}: copy the "
                "folder again, or train it again."
            )
        return path

    def folder_of(self, name: str) -> Path:
        """Return the place of a subfolder after comparing all its files; errors as in `file`."""
        inside = [each for each in self.files if each.startswith(f"{name}/")]
        for each in inside or [f"{name}/"]:
            self.file(each)
        return self.folder / name

    def check_task(self, name: str, digest: str) -> None:
        """Raise a `MismatchError` if `settings["task"]` is another task than the one with this name and digest."""
        trained_on = self.settings.get("task", {})
        if trained_on.get("digest") != digest:
            raise MismatchError(
                f"The artefact {str(self.folder)!r} was trained on the task {trained_on.get('name')!r} and cannot answer "
                f"{name!r}: train one for this task."
            )


def read_artefact(folder: str | Path, kind: str | None = None) -> Artefact:
    """Read a finished artefact; its files are compared when they are used.

    Args:
        folder: where it is.
        kind: what it has to be (default: anything).

    Raises:
        MissingFileError: no such folder.
        ConfigurationError: it is not an artefact.
        DataError: it is unfinished, damaged, or of a later format.
        MismatchError: it is of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"There is no folder {str(folder)!r} with a trained artefact; check the path.")
    if not (folder / FILE).is_file():
        if (folder / UNFINISHED).is_file():
            raise DataError(
                f"The training of {str(folder)!r} is not complete: run the same `pplug-hf fit` again, which continues it."
            )
        hint = ": it is a plug, which --plugs takes" if _is_plug(folder) else ": name the output of `pplug-hf fit`"
        raise ConfigurationError(f"{str(folder)!r} holds no {FILE}, so it is not a trained artefact{hint}.")
    values = read_json_object(folder / FILE, f"The {FILE} of {str(folder)!r}", "copy or train it again")
    if values.get("format") != FORMAT:
        raise DataError(
            f"{str(folder)!r} has the format {values.get('format')!r}, and this version reads {FORMAT}: install a newer "
            "pplug-hf, or train it again."
        )
    parts = [values.get(name) for name in ("settings", "run", "about", "files")]
    if not isinstance(values.get("kind"), str) or not all(isinstance(part, dict) for part in parts):
        raise DataError(f"The {FILE} of {str(folder)!r} is damaged (a part is missing): copy or train it again.")
    artefact = Artefact(folder, values["kind"], *parts)  # type: ignore[arg-type]
    if kind is not None and artefact.kind != kind:
        raise MismatchError(f"{str(folder)!r} holds an artefact of kind {artefact.kind!r}, not {kind!r}.")
    return artefact


@dataclass(frozen=True)
class Draft:
    """An artefact in the making; its folder is not an artefact before `finish`.

    Attributes:
        folder: for its files; whoever writes them makes sure that each is whole.
        kind: what it will be.
        run: what its training is determined by: settings and digests, no places.
        finished: the artefact, if this very training was complete already.
    """

    folder: Path
    kind: str
    run: Mapping[str, object]
    finished: Artefact | None = None

    @classmethod
    def open(cls, folder: str | Path, kind: str, run: Mapping[str, object], resume: bool = True) -> Draft:
        """Make a folder for an artefact, or go on with one of the same run.

        Args:
            folder: a new or empty one, or one with an artefact.
            kind: what it will be.
            run: as above, as JSON takes it.
            resume: continue what is there; False deletes it first.

        Raises:
            ConfigurationError: the folder is within a plug, or holds something else or another training.
        """
        folder, run = Path(folder), json.loads(json.dumps(run))
        if folder.is_file():
            raise ConfigurationError(f"{str(folder)!r} is a file; an artefact is saved as a folder.")
        if plug := next((each for each in (folder, *folder.absolute().parents) if _is_plug(each)), None):
            raise ConfigurationError(f"{str(folder)!r} is in the plug {plug.name!r}: choose a folder of its own.")
        there = None
        if (folder / FILE).is_file():
            there = read_artefact(folder)
            before: Mapping[str, object] = {"kind": there.kind, "run": there.run}
        elif (folder / UNFINISHED).is_file():
            before = read_json_object(folder / UNFINISHED, f"The {UNFINISHED} of {str(folder)!r}", "remove the folder")
        elif folder.is_dir() and any(folder.iterdir()):
            raise ConfigurationError(f"{str(folder)!r} is not empty and holds no artefact: choose another folder.")
        else:
            resume, before = False, {}
        now = {"kind": kind, "run": run}
        differing = differences(before, now)
        if differing and there is None and not any(path.name != UNFINISHED for path in folder.glob("*")):
            resume = False  # nothing was made there yet
        if resume:
            if differing:
                names = ", ".join(name.removeprefix("run.") for name in differing)
                raise ConfigurationError(
                    f"{str(folder)!r} holds another training; these differ: {names}. Choose a new output folder, or start "
                    "again in this one with resume=False."
                )
            return cls(folder, kind, run, there)
        _clear(folder, there)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / UNFINISHED, json.dumps(now, indent=2) + "\n")
        return cls(folder, kind, run)

    def finish(self, settings: Mapping[str, object], about: Mapping[str, object] | None = None) -> Artefact:
        """Declare the artefact complete with all files that are in its folder, hidden ones apart; return it.

        Args:
            settings: what determines its answers besides the files, and what it belongs to, as JSON takes it.
            about: what else to keep, such as learning curves.
        """
        for folder in [path for path in self.folder.rglob(".*") if path.is_dir()]:
            shutil.rmtree(folder, ignore_errors=True)  # half-written, by a process that was killed
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != UNFINISHED)
        names = {path.relative_to(self.folder): path for path in paths}
        files = {
            name.as_posix(): _sha256(path)
            for name, path in names.items()
            if name.as_posix() != FILE and not _is_hidden(name)
        }
        content = {"format": FORMAT, "kind": self.kind, "settings": settings, "run": self.run}
        content |= {"about": about or {}, "files": files}
        write_text(self.folder / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return read_artefact(self.folder, self.kind)


def _clear(folder: Path, there: Artefact | None) -> None:
    """Delete an artefact's own files, or everything of an unfinished one."""
    if there is None:
        if (folder / UNFINISHED).is_file():
            shutil.rmtree(folder)
        return
    own = {folder / name for name in (FILE, *there.files)}
    found = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))]
    if others := [path.name for path in found if path not in own]:
        raise ConfigurationError(
            f"{str(folder)!r} holds other files besides the artefact ({others[0]!r}): choose another folder."
        )
    (folder / FILE).unlink()  # first: from then on it does not count
    shutil.rmtree(folder)


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _is_plug(folder: Path) -> bool:
    with suppress(DataError, OSError):
        return read_json_object(folder / CONFIG, CONFIG).get("model_type") == MODEL_TYPE
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
