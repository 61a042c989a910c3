"""`pplug-hf evaluate`: a preset of `bench` with the rows that show whether a plug personalises."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..data.examples import Source
from ..errors import ConfigurationError
from ..evaluation.compare import Comparison
from ..evaluation.rendering import markdown, save_results
from ..methods.names import FREQUENCIES, INSTRUCTION_ONLY, methods_of, titles_of
from ..tasks.task import Task
from .bench import answer_rows, read_questions, read_training
from .options import AnsweringSettings, option, required

PPLUG = "PPlug"


@dataclass(kw_only=True)
class EvaluateSettings(AnsweringSettings):
    """Compare a plug with: no persona, instruction only, the history of another user, the user's label frequencies."""

    plug: list[str] = required("Plug folder or Hub id; several are seeds of one row.")
    instruction_only: list[str] | None = option(
        None, "Plugs trained with --use_history False, for the row of that name."
    )
    frequencies: bool = option(
        True, "On label tasks, add a baseline: label probabilities mixed with the user's label frequencies."
    )
    output: str | None = option(
        None, "Folder for results.json, table.md and predictions; those that it has are not answered again."
    )


def evaluate(settings: EvaluateSettings, task: Task | None = None, data: Source | None = None) -> Comparison:
    """Answer the split with every row, print the table, and save it if asked to.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.

    Returns:
        The comparison.

    Raises:
        ConfigurationError: settings that cannot be used; nothing is written then.
        PPlugError: data or plugs that cannot be used; likewise.
    """
    if not settings.plug:
        raise ConfigurationError("plug is empty: name at least one plug folder.")
    source = settings.data if data is None else data
    task, examples = read_questions(settings, task, source)
    has_labels = bool(task.labels and task.answer_field)
    training = read_training(settings, task, source) if settings.frequencies and has_labels else []
    plugs = {PPLUG: settings.plug, INSTRUCTION_ONLY: settings.instruction_only or []}
    titles = titles_of(PPLUG)
    left_out = {*([] if settings.instruction_only else [INSTRUCTION_ONLY]), *([] if training else [FREQUENCIES])}
    methods = methods_of([name for name in titles if name not in left_out], plugs)
    _, predictions = answer_rows(settings, task, examples, plugs, methods, training)
    comparison = Comparison(task, examples, reference=PPLUG)
    for made in predictions:
        comparison.add(titles[made.row], [made.answers[e.id] for e in examples])
    table = markdown(comparison)
    print(f"\n{table}")
    if settings.output:
        save_results({**comparison.results(), "settings": asdict(settings)}, table + "\n", settings.output)
    return comparison
