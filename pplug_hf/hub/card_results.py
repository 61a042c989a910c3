"""The results of a bench for a card: checked numbers and plain names, because no text of a user may get out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..errors import ConfigurationError, DataError, MissingFileError, PPlugError
from ..methods.names import INSTRUCTION_ONLY, NO_PERSONA
from ..tasks.metrics import score_titles

_NAME = re.compile(r"[\w .,'=+@:-]{1,60}")


def read_results(path: Path) -> dict[str, Any]:
    """Return what the template shows of the results of `pplug-hf bench` or `pplug-hf evaluate`.

    Args:
        path: their folder, or its results.json.

    Returns:
        task, split; examples, users; metrics, titles by name; rows, the plug's own first and its ablations next;
        reference, the row that the others are compared with; missing, ablations that this bench lacks; style_of_golds,
        the style score of the users' real answers or None; num_beams, max_length, max_new_tokens (0 is not set) and
        constrained.

    Raises:
        MissingFileError: there are none.
        DataError: the file holds something else.
        ConfigurationError: no row is a plug's own.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")))
    except PPlugError:
        raise
    except OSError as error:
        raise MissingFileError(
            f"There are no results in {str(path)!r} ({type(error).__name__}): name the --output folder of "
            "pplug-hf bench, or its results.json."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{str(file)!r} is not what pplug-hf bench writes ({type(error).__name__}: {error}): run the bench again."
        ) from None


def model_index(results: dict[str, Any], name: str, dataset: str | None) -> list[dict[str, Any]]:
    """Return the `model-index` of the metadata.

    Args:
        results: of `read_results`.
        name: of the model.
        dataset: Hub id of the data; None if it is not on the Hub.
    """
    task, own = results["task"], results["rows"][0]
    common: dict[str, Any] = {"task_name": "Personalized text generation", "dataset_split": results["split"]}
    scores = [
        EvalResult(
            "text-generation", dataset or task.lower(), task, kind, round(own[metric], 4), metric_name=title, **common
        )
        for metric, title in results["metrics"].items()
        for kind in [score_titles()[metric][1] or metric]
    ]
    return eval_results_to_model_index(name, scores)


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    settings, reference = content["settings"], _name(content["reference"])
    titles = {metric: title for metric, (title, _, _) in score_titles().items()}
    numbers = {"seeds", "unparsed", *titles, *(f"{metric}_sd" for metric in titles)}
    rows = {
        row["name"]: row for row in (_row(record, numbers) for record in content["rows"] if not record.get("bound"))
    }
    own = _own_row(list(rows), settings, reference)
    metrics = {metric: title for metric, title in titles.items() if all(metric in row for row in rows.values())}
    if not metrics:
        raise KeyError(f"one of the metrics {', '.join(titles)} in every row")
    # Name -> what the first versions of `pplug-hf evaluate` called it.
    controls = {
        NO_PERSONA: "no persona",
        INSTRUCTION_ONLY: "instruction only",
        f"{own}:wrong-user": "wrong user's history",
    }
    order = sorted(rows, key=lambda name: (name != own, name not in {*controls, *controls.values()}))
    return {
        **{"task": _name(content["task"]), "split": _name(settings["split"]), "reference": reference},
        **{key: _number(content[key]) for key in ("examples", "users")},
        **{
            key: _number(settings.get(key) or 0)
            for key in ("num_beams", "max_length", "max_new_tokens", "constrained")
        },
        **{"metrics": metrics, "rows": [rows[name] for name in order]},
        "missing": [name for name, other in controls.items() if not {name, other} & rows.keys()],
        "style_of_golds": _number(golds[0]) if (golds := content.get("style_of_golds")) else None,
    }


def _row(record: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the name and numbers of a row, and its intervals as [mean and] bounds."""
    numbers = {key: _number(value) for key, value in record.items() if key in names}
    intervals = {key: record.get(key) or () for key in ("interval", "style", "gain")}
    bounds = {key: [None if x is None else _number(x) for x in values] for key, values in intervals.items()}
    return {"name": _name(record["row"]), "seeds": 1, "unparsed": 0, **numbers, **bounds}


def _own_row(rows: list[str], settings: dict[str, Any], reference: str) -> str:
    """Return the plug's own row: the reference, or the first plug that was trained with histories."""
    plugs = settings.get("plugs") or ["PPlug"]  # evaluate has no names
    names = [str(plug).partition("=")[0] for plug in plugs]
    own = [name for name in names if name in rows and name != "instruction-only"]
    if not own:
        raise ConfigurationError(
            f"No row of these results is a plug's own; there are {', '.join(rows)}. Ask the bench for the row of "
            f"{' or '.join(names)}."
        )
    return reference if reference in own else own[0]


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return float(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise TypeError("a name that is not short and plain")
    return value
