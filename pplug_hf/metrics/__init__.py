"""LaMP's official rules as modules of the `evaluate` library; they load offline, and each folder can be a Space.

    import evaluate, pplug_hf.metrics

    ratings = evaluate.load(pplug_hf.metrics.path("lamp_mae"))
    ratings.compute(predictions=["4", "five"], references=["5", "5"])  # {"mae": 2.5, "rmse": ..., "unparsed": 1}

The rules themselves are in `pplug_hf/tasks/lamp_metrics.py`; a module only hands them on.
"""

from pathlib import Path

from ..errors import ConfigurationError

NAMES = ("lamp_accuracy", "lamp_mae", "lamp_rouge")


def path(name: str) -> str:
    """Return the folder of a module, for `evaluate.load`.

    Args:
        name: "lamp_accuracy", "lamp_mae" or "lamp_rouge".

    Raises:
        ConfigurationError: There is no such module.
    """
    if name not in NAMES:
        raise ConfigurationError(f"There is no metric module {name!r}; choose one of {', '.join(NAMES)}.")
    return str(Path(__file__).parent / name)
