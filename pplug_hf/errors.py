"""The errors of this package.

Each one is also the matching built-in error, so `except ValueError` and `except FileNotFoundError` work too. A message
says what was given, what to do and which options there are; it never contains a text of a user's history.
"""


class PPlugError(Exception):
    """Any error that this package raises on purpose."""


class DataError(PPlugError, ValueError):
    """A data file is damaged, or its contents are not valid."""


class MissingFileError(DataError, FileNotFoundError):
    """A file does not exist."""


class HubError(PPlugError, OSError):
    """The Hub refuses a request, or fails."""


class StoreError(PPlugError, OSError):
    """A store cannot do its work now: its disk is full, it is busy, or its server does not answer."""


class DamagedStoreError(DataError, StoreError):
    """A file of a store is damaged or missing."""


class DamagedPersonaError(DataError):
    """The stored items of one user are damaged; all others are not affected."""


class ConfigurationError(PPlugError, ValueError):
    """A setting has a value that cannot work."""


class MissingPackageError(ConfigurationError, ImportError):
    """An optional package is not installed."""


class MismatchError(PPlugError, ValueError):
    """Two things that must belong together do not."""


class EngineError(PPlugError, RuntimeError):
    """An engine cannot answer: it is closed, or it has failed."""


class EngineBusyError(EngineError):
    """An engine has as many requests waiting as it takes; ask again later."""


class TimeLimitError(EngineError, TimeoutError):
    """An answer was not finished within its time."""


def kind_of(value: object) -> str:
    """Return the type of a value with its article, for a message: "an int", "a NoneType"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
