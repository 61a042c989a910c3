"""`pplug-hf evaluate`: a preset of `bench` with the rows that show whether a plug personalises."""

from __future__ import annotations

from dataclasses import asdict

from ..data.examples import Source
from ..errors import ConfigurationError
from ..evaluation.compare import Comparison
from ..evaluation.rendering import markdown
from ..evaluation.results import PPLUG, save_results
from ..methods.names import FREQUENCIES, INSTRUCTION_ONLY, ablations_of, methods_of
from ..tasks.task import Task
from .bench import answer_rows, read_questions, read_training
from .options import EvaluateSettings


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
    rows = ablations_of(PPLUG)
    left_out = {} if settings.instruction_only else {INSTRUCTION_ONLY: "--instruction_only names no plug"}
    if has_labels and not training:
        left_out[FREQUENCIES] = "no train split to fit it on" if settings.frequencies else "--frequencies is false"
    if len({e.user for e in examples}) < 2:
        left_out[f"{PPLUG}:wrong-user"] = "it needs a second user"
    if left_out:
        print(f"Left out: {'; '.join(f'{row} ({why})' for row, why in left_out.items())}.")
    methods = methods_of(
        [name for name in rows if name not in left_out and (has_labels or name != FREQUENCIES)], plugs
    )
    _, predictions = answer_rows(settings, task, examples, plugs, methods, training)
    comparison = Comparison(task, examples, reference=PPLUG)
    for made in predictions:
        comparison.add(made.row, [made.answers[e.id] for e in examples])
    named = "\n".join(f"- {name}: {rows[name]}" for name in methods)
    table = f"{markdown(comparison)}\n\n{named}"
    print(f"\n{table}")
    if settings.output:
        save_results({**comparison.results(), "settings": asdict(settings)}, table + "\n", settings.output)
    return comparison
