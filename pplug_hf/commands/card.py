"""`pplug-hf card`: write a plug folder's model card, or bring it up to date."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MissingFileError
from ..hub.cards import write_card
from ..methods.persona import plug_digest
from ..modeling import plug_folder as files


@dataclass
class CardSettings:
    """Write the README.md of a plug folder for the Hub. What you edited in one that is there stays."""

    plug: str = field(metadata={"help": "Plug folder."})
    repo: str | None = field(default=None, metadata={"help": "Hub id the plug will have, as owner/name."})
    results: str | None = field(default=None, metadata={"help": "Folder of pplug-hf bench with results of this plug."})
    license: str | None = field(default=None, metadata={"help": "Licence of the plug, e.g. apache-2.0."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data it was trained on."})
    language: list[str] | None = field(default=None, metadata={"help": "Codes of the data's languages, e.g. en."})


def card(settings: CardSettings) -> None:
    """Write it, and say what was left as you edited it."""
    folder = Path(settings.plug)
    if not folder.is_dir():
        raise MissingFileError(
            f"There is no plug folder {settings.plug!r}: name the --output folder of pplug-hf train."
        )
    config = files.load_config(folder)
    edited = write_card(
        folder,
        config,
        trainable=sum(math.prod(shape) for shape in files.weight_shapes(folder).values()),
        repo_id=settings.repo,
        results=settings.results,
        license=settings.license,
        datasets=settings.datasets or (),
        language=settings.language or (),
    )
    if settings.results and not _is_of(settings.results, plug_digest(settings.plug, config)):
        print("Look again: these results are of other weights or settings than this plug's, or of an older version's.")
    print(f"Card written: {folder / 'README.md'}")
    if edited:
        print(f"Left as you edited them: {', '.join(edited)}.")
    if not settings.license and "license:" not in (folder / "README.md").read_text(encoding="utf-8"):
        print("It names no licence: without one nobody may use the plug. Give it with --license.")


def _is_of(results: str, digest: str) -> bool:
    """Whether a bench has answers of the plug with this digest; results that know no digests are believed."""
    path = Path(results)
    content = json.loads((path / "results.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    keys = [run.get("key", {}) for runs in content.get("runs", {}).values() for run in runs]
    return not keys or any(key.get("plug") == digest for key in keys)
