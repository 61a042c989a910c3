"""`pplug-hf card`: write a plug folder's model card, or bring it up to date."""

from __future__ import annotations

from pathlib import Path

from ..errors import MissingFileError
from ..evaluation.results import load_results
from ..hub.cards import write_card
from ..methods.persona import plug_digest
from ..modeling import plug_folder as files
from .options import CardSettings


def card(settings: CardSettings) -> None:
    """Write the card, and warn about results of another plug and a missing licence."""
    folder = Path(settings.plug)
    if not folder.is_dir():
        raise MissingFileError(
            f"There is no plug folder {settings.plug!r}: name the --output folder of pplug-hf train."
        )
    config = files.load_config(folder)
    metadata = write_card(
        folder,
        config,
        repo_id=settings.repo,
        results=settings.results,
        license=settings.license,
        datasets=settings.datasets or (),
        language=settings.language or (),
    )
    if settings.results and not _is_of(settings.results, plug_digest(settings.plug, config)):
        print(
            "Look again: these results belong to other weights or settings than this plug's, or to an older version."
        )
    print(f"Card written: {folder / 'README.md'}")
    if not metadata.get("license"):
        print("No licence given: others may not use the plug. Pass --license.")


def _is_of(results: str, digest: str) -> bool:
    """Tell whether a bench has answers of the plug with this digest; results without digests are believed."""
    keys = [run.get("key", {}) for runs in load_results(results).get("runs", {}).values() for run in runs]
    return not keys or any(key.get("plug") == digest for key in keys)
