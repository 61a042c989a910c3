"""Reader of results.json, and of what a model card may show of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, MissingFileError
from ..methods.names import INSTRUCTION_ONLY, NO_PERSONA, WRONG_USER
from ..storage.files import read_json_object
from ..tasks.metrics import score_titles
from .compare import RESULTS

PPLUG = "PPlug"  # the row of `pplug-hf evaluate` with the plugs
_DECODING = ("num_beams", "max_length", "max_new_tokens", "constrained")
_NAME = re.compile(r"[\w .,'=+@:-]{1,60}")


def load_results(path: str | os.PathLike) -> dict[str, Any]:
    """Return all that results.json holds, which may come from anybody.

    Args:
        path: the folder of a bench or an evaluation, or its results.json.

    Raises:
        MissingFileError: there are none.
        DataError: the file holds something else.
    """
    file = Path(path, RESULTS) if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise MissingFileError(
            f"There are no results in {str(path)!r}: name the --output folder of pplug-hf bench, or its results.json."
        )
    return read_json_object(file, repr(str(file)), "run the bench again")


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a model card shows: checked numbers and plain names, because no text of a user may get out.

    Args:
        path: see `load_results`.

    Returns:
        task, split; examples, users; metrics, titles by name; rows, the plug's own first and its ablations next;
        reference, the row that the others are compared with; missing, ablations that these results lack;
        style_of_golds, the style score of the users' real answers and its interval, if they are known; num_beams,
        max_length, max_new_tokens (0 is not set) and constrained.

    Raises:
        MissingFileError: there are none.
        DataError: the file holds something else.
        ConfigurationError: no row is a plug's own.
    """
    content = load_results(path)
    try:
        results, plugs = _checked(content), _plugs(content["settings"])
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{str(path)!r} is not what pplug-hf bench writes ({type(error).__name__}: {error}): run the bench again."
        ) from None
    names = [row["name"] for row in results["rows"]]
    own = next((name for name in (results["reference"], *plugs) if name in plugs and name in names), None)
    if own is None:
        raise ConfigurationError(
            f"No row of these results is a plug's own; there are {', '.join(names)}. Ask the bench for the row of "
            f"{' or '.join(plugs)}."
        )
    ablations = (NO_PERSONA, INSTRUCTION_ONLY, f"{own}:{WRONG_USER}")
    rows = sorted(results["rows"], key=lambda row: (row["name"] != own, row["name"] not in ablations))
    return {**results, "rows": rows, "missing": [name for name in ablations if name not in names]}


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    settings, titles = content["settings"], {metric: title for metric, (title, _, _) in score_titles().items()}
    rows = [_row(record, titles) for record in content["rows"] if not record.get("bound")]
    metrics = {metric: title for metric, title in titles.items() if all(metric in row for row in rows)}
    if not metrics:
        raise KeyError(f"one of the metrics {', '.join(titles)} in every row")
    return {
        "task": _name(content["task"]),
        "split": _name(settings["split"]),
        "examples": _number(content["examples"]),
        "users": _number(content["users"]),
        **{key: _number(settings.get(key) or 0) for key in _DECODING},
        "reference": _name(content["reference"]),
        "metrics": metrics,
        "rows": rows,
        "style_of_golds": _numbers(content.get("style_of_golds")),
    }


def _row(record: dict[str, Any], metrics: Collection[str]) -> dict[str, Any]:
    """Return the name and the numbers of a row, and its intervals as [mean and] bounds."""
    names = {"seeds", "unparsed", *metrics, *(f"{metric}_sd" for metric in metrics)}
    numbers = {key: _number(value) for key, value in record.items() if key in names}
    intervals = {key: _numbers(record.get(key)) for key in ("interval", "style", "gain")}
    return {"name": _name(record["row"]), "seeds": 1, "unparsed": 0, **numbers, **intervals}


def _plugs(settings: dict[str, Any]) -> list[str]:
    """Return the names of the plugs that were trained with histories."""
    plugs = settings.get("plugs") or [PPLUG]  # `pplug-hf evaluate` takes no names
    return [name for plug in plugs if (name := _name(plug.partition("=")[0])) != INSTRUCTION_ONLY]


def _numbers(values: Any) -> list[float | None]:
    return [None if value is None else _number(value) for value in values or ()]


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return float(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise TypeError("a name that is not short and plain")
    return value
