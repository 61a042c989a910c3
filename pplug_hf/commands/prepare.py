"""`pplug-hf prepare`: a data set and its task from a log of events."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.events import Answers, EventData, Split, from_events
from ..errors import ConfigurationError
from .options import option, required


@dataclass
class PrepareSettings:
    """Make a data set and a task of a log with one event per row: who, when, a text, and the answer."""

    source: str = required("Log of events: a .csv, .tsv, .parquet or .jsonl file, plain or gzipped.")
    output: str = required("Folder for the data set: a new one, or one that this command made.")
    user: str = required("Column with the user.")
    text: str = required("Column with the text that was answered.")
    answer: str = required("Column with the user's answer: a label, a number or a text.")
    time: str | None = option(None, "Column with the time: dates or numbers (default: rows are oldest first).")
    question: str | None = option(None, "Column with a question for each event, asked before the text.")
    instruction: str | None = option(None, "Instruction before each text, if there is no column of questions.")
    name: str | None = option(None, "Name of the task (default: that of the output folder).")
    answers: Answers = option("auto", "Kind of answers (auto: few and repeated answers are labels).")
    metric: str | None = option(None, "How answers are judged (default: accuracy, mae for numbers, rouge for texts).")
    split: Split = option(
        "users",
        "What dev and test hold: all questions of users whom train does not have, the newest of every user, or the newest "
        "of all.",
    )
    dev: float = option(0.1, "Share of users (or of events) in dev.")
    test: float = option(0.1, "Share of users (or of events) in test.")
    min_history: int = option(1, "Items that a question must have before it.")
    questions_per_user: int | None = option(None, "Keep at most this many of a user's newest questions in each split.")
    time_format: str | None = option(None, "Format of the times, as for strptime (default: ISO 8601).")
    seed: int = option(0, "Seed of the choice of users.")


def prepare(settings: PrepareSettings, data: Any = None) -> EventData:
    """Write the data set, and print what it holds and the next command.

    Args:
        settings: see the fields.
        data: instead of the file `settings.source`: a table of pandas or `datasets`, or mappings.

    Returns:
        The data set.

    Raises:
        PPlugError: see `from_events`; nothing is written then.
    """
    chosen = asdict(settings)
    source, output = chosen.pop("source"), chosen.pop("output")
    if Path(output).is_file():
        raise ConfigurationError(f"The output {output!r} is a file: name a folder.")
    made = from_events(
        source if data is None else data, **{**chosen, "name": settings.name or Path(output).resolve().name}
    )
    made.save(output)
    print(made)
    print(
        f"Data set and task are in {output}. Next: pplug-hf train --data {output} --backbone ... --encoder ... --output my-plug"
    )
    return made
