"""`pplug-hf pairs`: the answers of two rows side by side, for human judges, where there are no gold answers to score by."""

from __future__ import annotations

from ..data.examples import Source
from ..errors import ConfigurationError
from ..evaluation.pairs import KEY, PAIRS, write_pairs
from ..methods.names import methods_of, parse_plugs, parse_trained
from ..tasks.task import Task
from .bench import answer_rows, read_questions, read_training
from .options import PairsSettings


def pairs(settings: PairsSettings, task: Task | None = None, data: Source | None = None) -> None:
    """Answer what is missing, as a bench does, and write the pairs and their key.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names, as for `bench`.

    Raises:
        PPlugError: settings, rows, data or plugs that cannot be used; nothing is written then.
    """
    source = settings.data if data is None else data
    plugs = parse_plugs(settings.plugs or ())
    trained = parse_trained(settings.trained or (), plugs)
    methods = methods_of(settings.rows, plugs, trained)
    if len(methods) != 2:
        raise ConfigurationError(
            f"A pair is of two different rows, got {' '.join(settings.rows)}: name two, e.g. no-persona NAME."
        )
    task, examples = read_questions(settings, task, source, require_outputs=False)
    needs_training = any("training" in method.needs for method, *_ in methods.values())
    training = read_training(settings, task, source) if needs_training else []
    _, made = answer_rows(settings, task, examples, plugs, methods, training, trained, scored=False)
    answers = {prediction.row: prediction.answers for prediction in reversed(made)}  # of several seeds the first
    written, equal = write_pairs(settings.output, examples, answers, settings.seed)
    print(
        f"In {settings.output}: {written} pairs for the judges in {PAIRS}, and which row gave which answer in {KEY}. "
        f"{equal} equal answers are not asked about."
    )
