"""`pplug-hf prepare`: a data set and its task from a log of events."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..data.events import EventData, from_events
from ..errors import ConfigurationError
from .options import PrepareSettings


def prepare(settings: PrepareSettings, data: object = None) -> EventData:
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
