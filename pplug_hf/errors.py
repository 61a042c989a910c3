"""The errors of this package.

Each one is also the built-in error that fits, so `except ValueError` and `except FileNotFoundError` keep
working. A message says what we got, what to do, and which options there are; it never holds a text of a
user's history.
"""


class PPlugError(Exception):
    """Any error that this package raises on purpose."""


class DataError(PPlugError, ValueError):
    """A data file is not what it should be."""


class MissingFileError(DataError, FileNotFoundError):
    """A data file is not where it should be."""


class HubError(PPlugError, OSError):
    """The Hub refuses, or fails."""


class ConfigurationError(PPlugError, ValueError):
    """A setting has a value that cannot work."""


class MissingPackageError(ConfigurationError, ImportError):
    """An optional package is not installed."""


class MismatchError(PPlugError, ValueError):
    """Two things that must belong together do not."""
