"""What a card says of a bench: numbers and names of rows, nothing else of the file gets out of here."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..errors import ConfigurationError, DataError, MissingFileError

# Metric of a row -> (name in the table, metric id of the Hub).
METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("macro-F1", "f1"),
    "mae": ("MAE", "mae"),
    "rmse": ("RMSE", "rmse"),
    "rouge-1": ("ROUGE-1", "rouge"),
    "rouge-L": ("ROUGE-L", "rouge"),
}
LOWER_IS_BETTER = ("mae", "rmse")
# Controls that show what of a gain is personal, as `bench` and `evaluate` name them; {} is the plug's row.
CONTROLS = (
    ("no-persona", "no persona"),
    ("instruction-only", "instruction only"),
    ("{}:wrong-user", "wrong user's history"),
)
_NAME = re.compile(r"[\w .,'=+@:-]{1,60}")


@dataclass(frozen=True)
class Results:
    """A bench as a card shows it.

    Args:
        task, split: what was asked.
        examples, users: how many.
        row: of the plug.
        reference: row that the others are compared with.
        rows: one list of cells for each row; the first one is the head.
        scores: metric -> value of the plug's row.
        seeds: of the plug's row.
        missing: controls that this bench has not.
        style_of_golds: what the users' own answers have as style, if it was measured.
        decoding: in words.
    """

    task: str
    split: str
    examples: int
    users: int
    row: str
    reference: str
    rows: list[list[str]]
    scores: dict[str, float]
    seeds: int
    missing: list[str]
    style_of_golds: float | None
    decoding: str

    def model_index(self, name: str, dataset: str | None) -> list[dict[str, Any]]:
        """The `model-index` of the metadata.

        Args:
            name: of the model.
            dataset: Hub id of the data; None if it is not on the Hub.
        """
        return eval_results_to_model_index(
            name,
            [
                EvalResult(
                    task_type="text-generation",
                    task_name="Personalized text generation",
                    dataset_type=dataset or self.task.lower(),
                    dataset_name=self.task,
                    dataset_split=self.split,
                    metric_type=METRICS[metric][1],
                    metric_name=METRICS[metric][0],
                    metric_value=round(value, 4),
                )
                for metric, value in self.scores.items()
            ],
        )


def read_results(path: Path) -> Results:
    """The results of `pplug-hf bench` or `pplug-hf evaluate`.

    Args:
        path: their folder, or its results.json.

    Raises:
        MissingFileError: There are none.
        DataError: Something else than they write.
        ConfigurationError: No row is a plug's own.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(
            f"There are no results in {str(path)!r} ({type(error).__name__}): name the --output folder of "
            "pplug-hf bench, or its results.json."
        ) from None
    except ValueError:
        raise DataError(f"{str(file)!r} is no JSON: run the bench again.") from None
    try:
        return _results(content)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{str(file)!r} is not what pplug-hf bench writes ({type(error).__name__}: {error}): run the bench again."
        ) from None


def _results(content: dict[str, Any]) -> Results:
    settings, records = content["settings"], {_name(record["row"]): record for record in content["rows"]}
    row = _own_row(content["reference"], settings, list(records))
    metrics = [metric for metric in METRICS if metric in records[row]]
    if not metrics:
        raise DataError(f"The row {row!r} has none of the metrics {', '.join(METRICS)}.")
    names = {control for pair in CONTROLS for control in (pair[0].format(row), pair[1])}
    return Results(
        task=_name(content["task"]),
        split=_name(settings["split"]),
        examples=round(_number(content["examples"])),
        users=round(_number(content["users"])),
        row=row,
        reference=_name(content["reference"]),
        rows=_table(records, metrics, _name(content["reference"]), row, names),
        scores={metric: _number(records[row][metric]) for metric in metrics},
        seeds=round(_number(records[row].get("seeds", 1))),
        missing=[pair[0].format(row) for pair in CONTROLS if not {pair[0].format(row), pair[1]} & records.keys()],
        style_of_golds=_number(golds[0]) if (golds := content.get("style_of_golds")) else None,
        decoding=_decoding(settings),
    )


def _own_row(reference: str, settings: dict[str, Any], rows: list[str]) -> str:
    """The row of the plug itself: the reference, or the first plug that was trained with histories."""
    plugs = settings.get("plugs")
    names = [str(plug).partition("=")[0] for plug in plugs] if plugs else ["PPlug"]  # evaluate has no names
    own = [name for name in names if name in rows and name != "instruction-only"]
    if not own:
        raise ConfigurationError(
            f"No row of these results is a plug's own; there are {', '.join(rows)}. Ask the bench for the row of "
            f"{' or '.join(names)}."
        )
    return reference if reference in own else own[0]


def _table(
    records: dict[str, dict[str, Any]], metrics: list[str], reference: str, row: str, controls: set[str]
) -> list[list[str]]:
    """Head and rows: the plug first, its controls, then everything else in the order of the bench."""
    known = any(record.get("interval") for record in records.values())
    head = ["row", METRICS[metrics[0]][0] + (" [95 %]" if known else "")]
    styled = any(record.get("style") for record in records.values())
    head += [METRICS[metric][0] for metric in metrics[1:]] + ["unparsed"] + ["style [95 %]"] * styled
    head += [f"{reference} is better by [95 %]"]
    order = sorted(records, key=lambda name: (name != row, name not in controls))
    lines = [head]
    for name in order:
        record = records[name]
        seeds = round(_number(record.get("seeds", 1)))
        title = f"**{name}**" if name == row else name
        cells = [title + (f" ({seeds} seeds)" if seeds > 1 else "")]
        for metric in metrics:
            cell = f"{_number(record[metric]):.3f}"
            if f"{metric}_sd" in record:
                cell += f" ± {_number(record[f'{metric}_sd']):.3f}"
            if metric == metrics[0] and record.get("interval"):
                cell += " " + _interval(record["interval"], "")
            cells.append(cell)
        cells.append(f"{_number(record.get('unparsed', 0)):.0f}")
        for key, sign in [("style", "")] * styled + [("gain", "+")]:
            value = record.get(key)
            cells.append(f"{_number(value[0]):{sign}.3f} {_interval(value[1:], sign)}" if value else "")
        lines.append(cells)
    return lines


def _decoding(settings: dict[str, Any]) -> str:
    beams = round(_number(settings.get("num_beams") or 1))
    words = "greedy decoding" if beams == 1 else f"{beams} beams"
    if settings.get("max_length"):
        words += f", prompts of at most {_number(settings['max_length']):.0f} tokens"
    if settings.get("max_new_tokens"):
        words += f", answers of at most {_number(settings['max_new_tokens']):.0f} tokens"
    return words + (", answers can only be labels" if settings.get("constrained") is True else "")


def _interval(bounds: list[Any], sign: str) -> str:
    low, high = (f"{_number(bound):{sign}.3f}" if bound is not None else "?" for bound in bounds)
    return f"[{low}, {high}]"


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"a {type(value).__name__} where a number belongs")
    return float(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise TypeError("a name that is not short and plain")
    return value
