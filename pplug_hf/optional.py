"""Import of optional packages, with one clear error for a missing one."""

import importlib
from types import ModuleType

from .errors import MissingPackageError


def require(module: str, extra: str, purpose: str, remedy: str = "") -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: e.g. "rouge_score.rouge_scorer".
        extra: of this package, which installs it.
        purpose: what needs it, for the message, e.g. "ROUGE".
        remedy: another way out, for the message, e.g. ", or choose another metric".

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        install = f"pip install 'pplug-hf[{extra}]'"
        raise MissingPackageError(f"{purpose} needs {package}; install it with: {install}{remedy}.") from error
