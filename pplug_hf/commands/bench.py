"""`pplug-hf bench`: rows side by side, in one folder from which an interrupted run continues."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..data.examples import Source, has_split, read_examples
from ..data.histories import newest, remaining
from ..data.records import Example, data_digest, history_notes, some
from ..errors import ConfigurationError, DataError, MissingFileError
from ..evaluation.attention_profile import mean_profile
from ..evaluation.compare import Comparison, save_results, to_json
from ..evaluation.plots import plot_weights
from ..evaluation.pools import CHANCE, Pool, add_pool, chance_runs, parse_pools, pools_of
from ..evaluation.predictions import (
    Prediction,
    check_together,
    git_commit,
    note_others,
    read_predictions,
    versions,
)
from ..evaluation.rendering import report, save_pictures
from ..evaluation.runner import Runner
from ..methods.base import Method, Retrieval
from ..methods.names import (
    canonical,
    default_rows,
    methods_of,
    name_in_files,
    parse_plugs,
    parse_trained,
    reference_of,
)
from ..methods.persona import Plug
from ..methods.resources import Decoding, Resources
from ..modeling.encoders import item_texts
from ..modeling.plug_folder import load_config
from ..storage.files import private_write
from ..tasks.task import Task, main_metric
from ..version import __version__
from .options import AnsweringSettings, BenchSettings

T = TypeVar("T")
_TRAINED = {"plug", "training", "artefact"}  # in the keys of rows that training made
_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "numpy", "rouge-score", "bm25s")


def bench(settings: BenchSettings, task: Task | None = None, data: Source | None = None) -> Comparison:
    """Answer what is missing, then write and print the table.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.

    Returns:
        The comparison, saved in `settings.output`.

    Raises:
        PPlugError: settings, rows, data or plugs that cannot be used; nothing is written then.
    """
    source = settings.data if data is None else data
    task, examples = read_questions(settings, task, source)
    plugs = parse_plugs(settings.plugs or ())
    trained = parse_trained(settings.trained or (), plugs)
    if settings.show_history is not None:
        _check_show_history(settings, examples)
    pools = parse_pools(settings.oracle) if settings.oracle else []
    if settings.tables_only:
        return _tables(settings, task, source, examples, plugs, trained, pools)

    has_labels = bool(task.labels and task.answer_field)
    rows, training = settings.rows, []
    if rows is None:
        training = read_training(settings, task, source) if has_labels else []
        users = len({e.user for e in examples})
        if plugs and users < 2:
            print("Left out: the row with another user's history (it needs a second user).")
        rows = default_rows(
            task,
            list(plugs),
            users=users,
            frequencies=bool(training),
            trained=trained,
            dense=bool(settings.retriever or plugs),
            reference=settings.reference,
        )
    methods, pools = _with_pools(rows, pools, partial(methods_of, plugs=plugs, trained=trained))
    if pools:
        with suppress(ConfigurationError):  # of a task whose items have no form in a prompt
            methods |= chance_runs(pools, task)
    if not training and any("training" in method.needs for method, *_ in methods.values()):
        training = read_training(settings, task, source)
    reference = reference_of(settings.reference, list(methods), plugs)
    resources, made = answer_rows(settings, task, examples, plugs, methods, training, trained)
    comparison = _finish(settings, task, source, examples, made, reference, pools)
    if settings.show_history is not None:
        method = methods[reference][0]
        name = method.name if isinstance(method, Plug) else next(iter(plugs))
        answered = next(p.answers[settings.show_history] for p in made if p.row == reference)
        _draw_history(Plug(name, plugs[name][0]), resources, examples, settings, answered)
    return comparison


def read_questions(
    settings: AnsweringSettings, task: Task | None, source: Source, *, require_outputs: bool = True
) -> tuple[Task, list[Example]]:
    """Read the task and the examples to answer.

    Raises:
        ConfigurationError: the output folder cannot be made.
    """
    output: str | None = getattr(settings, "output", None)
    places = [] if output is None else [Path(output), *Path(output).parents]
    if file := next((path for path in places if path.is_file()), None):
        raise ConfigurationError(f"The output {output!r} cannot be made, for {str(file)!r} is a file: name a folder.")
    task, examples = read_examples(source, settings.split, task or settings.task, require_outputs=require_outputs)
    return task, examples if settings.max_items is None else newest(examples, settings.max_items)


def read_training(settings: AnsweringSettings, task: Task, source: Source) -> list[Example]:
    """Read the examples that methods are fitted on; nothing if there is no train split."""
    if not has_split(source, "train"):
        return []
    _, training = read_examples(source, "train", task)
    return remaining(training, settings.leave_out_users, settings.split_seed, settings.max_items)


def answer_rows(
    settings: AnsweringSettings,
    task: Task,
    examples: list[Example],
    plugs: dict[str, list[str]],
    methods: Mapping[str, Sequence[Method]],
    training: Sequence[Example],
    trained: dict[str, list[str]] | None = None,
    *,
    scored: bool = True,
) -> tuple[Resources, list[Prediction]]:
    """Check everything, print warnings, then answer what the output folder does not have.

    Returns:
        What the methods shared, and the predictions of all seeds of all rows.
    """
    decoding = Decoding(**{f.name: getattr(settings, f.name) for f in fields(Decoding)})
    own = (
        "backbone",
        "backbone_dtype",
        "chat",
        "system",
        "device",
        "batch_size",
        "retriever",
        "seed",
        "vectors",
        "fuse",
    )
    given = {name: getattr(settings, name) for name in own if hasattr(settings, name)}
    resources = Resources(task, plugs, trained=trained or {}, decoding=decoding, **given)
    output: str | None = getattr(settings, "output", None)
    runner = Runner(resources, examples, training, None if output is None else Path(output) / "predictions")
    runner.check(methods)
    if scored:
        Comparison(task, examples, "")  # raises if an example has no gold
    print(f"{task.name}, {settings.split}: {len(examples)} questions of {len({e.user for e in examples})} users")
    asked = [part for method, *_ in methods.values() for part in (method, getattr(method, "retrieval", None))]
    most = max((part.k for part in asked if isinstance(part, Retrieval)), default=1)
    prompts = [e.prompt for e in examples]
    for note in [*history_notes(examples, most), *resources.processor.length_notes(prompts, settings.max_length)]:
        print(note)
    return resources, runner.run(methods)


def _with_pools(
    rows: Iterable[str], pools: Iterable[Pool], read: Callable[[Iterable[str]], dict[str, T]]
) -> tuple[dict[str, T], list[Pool]]:
    """Return what was asked for, the rows of pools included, and the pools, all by the names that a table has.

    Args:
        rows: names as typed.
        pools: of such names.
        read: finds what stands behind them, by their names in a table: bm25@04 is bm25@4.
    """
    found = read([*rows, *(row for pool in pools for row in pool.rows)])
    return found, [replace(pool, rows=tuple(read(pool.rows))) for pool in pools]


def _tables(
    settings: BenchSettings,
    task: Task,
    source: Source,
    examples: list[Example],
    plugs: Mapping[str, list[str]],
    trained: Mapping[str, list[str]],
    pools: list[Pool],
) -> Comparison:
    """Make everything but the predictions from the predictions.

    With plugs or artefacts, the table has the rows and seeds that a bench with them has, else all seeds that are there.

    Raises:
        MissingFileError: There are none, or not those of a row.
        MismatchError: They were made with different data, backbones or decodings, or are of other questions.
    """
    folder = Path(settings.output) / "predictions"
    found = {(made.row, made.run): made for made in read_predictions(folder)}
    if not found:
        raise MissingFileError(f"There are no predictions of a bench in {str(folder)!r}: run it without tables_only.")
    there: dict[str, list[int]] = {}
    for row, run in sorted(found):
        there.setdefault(row, []).append(run)

    def read(names: Iterable[str]) -> dict[str, Sequence[int]]:
        """Return the runs of rows."""
        if plugs or trained:
            return {row: range(len(seeds)) for row, seeds in methods_of(names, plugs, trained).items()}
        return {row: there.get(row, [0]) for row in map(name_in_files, names)}

    def is_known(name: str) -> bool:
        with suppress(ConfigurationError):
            return bool(read([name]))
        return False

    rows = canonical([name for name in there if is_known(name)]) if settings.rows is None else settings.rows
    runs, pools = _with_pools(rows, pools, read)
    draws = range(max((len(pool.rows) for pool in pools), default=0))
    if pools and set(draws) <= set(there.get(CHANCE, ())):
        runs[CHANCE] = draws
    # Keys tell plugs from adapters, whose rows have names of the same form; with more variants, more is asked about a plug.
    variants = Counter(re.split("[:+]", row)[0] for row, own in there.items() if "plug" in found[row, own[0]].key)
    likely = plugs if plugs or trained else [name for name, _ in variants.most_common()]
    reference = reference_of(settings.reference, list(runs), likely)
    wanted = [(row, run) for row, numbers in runs.items() for run in numbers]
    for row, run in wanted:
        if (row, run) not in found:
            raise MissingFileError(
                f"There are no predictions of the row {row!r}{f' (run {run})' if run else ''} in {str(folder)!r}; there are "
                f"{', '.join(canonical(there))}."
            )
    note_others(found, wanted)
    return _finish(settings, task, source, examples, [found[run] for run in wanted], reference, pools)


def _finish(
    settings: BenchSettings,
    task: Task,
    source: Source,
    examples: list[Example],
    chosen: Sequence[Prediction],
    reference: str,
    pools: Sequence[Pool],
) -> Comparison:
    """Write and print the numbers of the predictions."""
    check_together(chosen, data_digest(task, examples, answers=False), examples)
    known: set[str] = set()
    if settings.split != "train" and any(_was_trained(made.key) for made in chosen):
        with suppress(DataError):  # a train split that cannot be read is no reason to lose the table
            known = {e.user for e in read_training(settings, task, source) if e.named}
    comparison = Comparison(task, examples, reference, full=True, trained_users=known)
    runs: dict[str, list[dict[str, Any]]] = {}
    for made in chosen:
        comparison.add(made.row, [made.answers[e.id] for e in examples])
        runs.setdefault(made.row, []).append({"key": made.key, "about": made.about})
    chosen_from = pools_of(chosen, pools) if pools or any("pool" in made.key for made in chosen) else {}
    found = [add_pool(comparison, pool, settings.seed, choosers) for pool, choosers in chosen_from.items()]
    weights = {row: [run["about"].get("weights") for run in found] for row, found in runs.items()}
    results = {
        **comparison.results(),
        **({"pools": found} if found else {}),
        "weights": {row: mean_profile(found) for row, found in weights.items() if all(found)},
        "runs": runs,
        "settings": {k: v for k, v in asdict(settings).items() if k != "tables_only"}
        | {"backbone": _backbone(settings)}
        # That of the answers, whatever is passed now.
        | (chosen[0].key.get("decoding", {}) if settings.tables_only else {}),
        "versions": {"pplug-hf": __version__, "python": platform.python_version(), **versions(_PACKAGES)},
        "git_commit": git_commit(),
    }
    text, output = report(comparison, results, settings.split), Path(settings.output)
    save_results(results, text, output)
    save_pictures(results, main_metric(task), output)
    if settings.pairs:
        with private_write(output / "pairs.json") as file:
            file.write(to_json(comparison.pairs(settings.seed)).encode())
        print(f"Private, with scores of single users: {output / 'pairs.json'}")
    print(f"\n{text}\nIn {settings.output}: table.md, results.json, predictions.")
    return comparison


def _was_trained(key: Mapping[str, object]) -> bool:
    """Return true if a key says that its answers depend on training."""
    return any(name in _TRAINED or (isinstance(value, dict) and _was_trained(value)) for name, value in key.items())


def _backbone(settings: BenchSettings) -> str | None:
    """Return the name of the language model, as far as it is known without the network."""
    places = [
        place for places in parse_plugs(settings.plugs or ()).values() for place in places if Path(place).is_dir()
    ]
    return settings.backbone or (load_config(places[0]).backbone if places else None)


def _check_show_history(settings: BenchSettings, examples: Iterable[Example]) -> None:
    """Raise unless there is a history to draw, and a plug that weights it."""
    if settings.tables_only or not settings.plugs:
        raise ConfigurationError("show_history needs a plug that weights the items: pass plugs, and no tables_only.")
    if settings.show_history not in (ids := [e.id for e in examples]):
        raise DataError(
            f"There is no question with the id {settings.show_history!r} to show the history of; the first ids are "
            f"{some(ids)}."
        )
    if not any(e.history for e in examples if e.id == settings.show_history):
        raise DataError(f"The history of the question {settings.show_history!r} is empty: name another question.")


def _draw_history(
    plug: Plug, resources: Resources, examples: Iterable[Example], settings: BenchSettings, answered: str
) -> None:
    """Draw the weight of each item of one history, with the user's texts, and the reference row's answer."""
    (example,) = [e for e in examples if e.id == settings.show_history]
    path = Path(settings.output) / f"history-{re.sub(r'[^A-Za-z0-9_.-]+', '_', example.id)}.png"
    texts = item_texts(example.history, resources.config(plug.folder).item_template)
    try:
        (weights,) = plug.weights([example], resources)
        dates = [str(item.get("date") or "")[:10] for item in example.history]
        title = f"Weights of history items for: {example.query}"
        figure = plot_weights(weights, texts, title, dates=dates, answer=answered)
        with private_write(path) as file:
            figure.savefig(file, format="png")
        print(f"Private, with the user's texts: {path}")
    except ConfigurationError as error:
        print(error)
