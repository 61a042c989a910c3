"""`pplug-hf bench`: rows side by side, in one folder that a killed run goes on from."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..configuration.pplug import choices
from ..data.examples import Source, has_split, read_examples
from ..data.histories import newest, split_users
from ..data.records import Example, some
from ..data.vectors import DEFAULT_FOLDER
from ..errors import ConfigurationError, DataError, MismatchError, MissingFileError
from ..evaluation.attention_profile import mean_profile
from ..evaluation.compare import Comparison, to_json
from ..evaluation.plots import plot_history_length, plot_rows, plot_weight_profiles, plot_weights
from ..evaluation.provenance import data_digest, versions
from ..evaluation.runner import Bench, Decoding
from ..methods.names import FREQUENCIES, INSTRUCTION_ONLY, NO_PERSONA, canonical, default_rows, parse_plugs, parse_rows
from ..modeling.encoders import item_texts
from ..storage.files import write_text
from ..tasks.metrics import main_metric
from ..tasks.task import Task
from ..version import __version__
from .data_warnings import warn_short_histories, warn_truncated_prompts
from .train import TASK, DType

_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "numpy", "rouge-score", "bm25s")


@dataclass
class BenchSettings:
    """Answer a split with many rows and compare them. Rows that a folder has already are not answered again."""

    data: str = field(
        metadata={"help": "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file."}
    )
    output: str = field(metadata={"help": "Folder for predictions, results.json, table.md and pictures."})
    task: str | None = field(default=None, metadata={"help": TASK})
    split: str = field(default="dev", metadata={"help": "Split of a folder to answer."})
    rows: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rows, e.g. no-persona frequencies bm25@4 NAME NAME:wrong-user NAME:top-4 NAME:last-8 NAME+bm25@1 "
            "(default: those that show what a persona is worth)."
        },
    )
    plugs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of plugs, each as NAME=FOLDER or NAME=FOLDER,FOLDER for several seeds. The name "
            "instruction-only is for plugs trained with --use_history False."
        },
    )
    reference: str | None = field(
        default=None, metadata={"help": "Row that the others are compared with (default: the first plug's own)."}
    )
    backbone: str | None = field(default=None, metadata={"help": "Language model (default: the first plug's)."})
    backbone_dtype: DType = field(default="auto", metadata={"help": "Data type of the backbone."})
    device: str | None = field(default=None, metadata={"help": "Where it runs (default: an accelerator, else CPU)."})
    retriever: str | None = field(
        default=None,
        metadata={"help": "Sentence encoder of the rows dense@K (default: the first plug's, with its vectors)."},
    )
    num_beams: int = field(default=1, metadata={"help": "Beams."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of an answer (default: the task's)."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a prompt at most, retrieved items included."})
    constrained: bool = field(default=False, metadata={"help": "On label tasks, answer with the task's labels only."})
    max_items: int | None = field(default=None, metadata={"help": "Newest items of a history at most (default: all)."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per batch."})
    leave_out_users: float = field(
        default=0.0, metadata={"help": "As in training; label frequencies are fitted on the users that are left."}
    )
    split_seed: int = field(default=0, metadata={"help": "As in training."})
    seed: int = field(default=0, metadata={"help": "Seed of the wrong users and of random retrieval."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})
    show_history: str | None = field(
        default=None,
        metadata={
            "help": "Also draw how much each item of this question's history speaks (its id), with the user's texts: keep "
            "that picture private."
        },
    )
    tables_only: bool = field(
        default=False, metadata={"help": "Load no model: make tables and pictures of the predictions that are there."}
    )


class Saved(NamedTuple):
    """A predictions file of a bench."""

    path: Path
    row: str
    run: int
    key: dict[str, Any]
    about: dict[str, Any]  # what does not determine the answers: counts, seconds, commit
    answers: dict[str, str]


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
    output = Path(settings.output)
    if file := next((path for path in (output, *output.parents) if path.is_file()), None):
        raise ConfigurationError(
            f"The output {settings.output!r} cannot be made, for {str(file)!r} is a file: name a folder."
        )
    source = settings.data if data is None else data
    task, examples = read_examples(source, settings.split, task or settings.task)
    if settings.max_items is not None:
        examples = newest(examples, settings.max_items)
    plugs = parse_plugs(settings.plugs or ())
    if settings.show_history is not None:
        check_shown(settings, examples)
    if settings.tables_only:
        return tables(settings, task, examples)

    bench_, rows, reference = plan(settings, task, examples, plugs, source)
    runs = [(row, run) for row in rows for run in range(len(plugs[row.plug]) if row.plug else 1)]
    print(f"{task.name}, {settings.split}: {len(examples)} questions of {len({e.user for e in examples})} users")
    warn_short_histories(examples, max(row.k for row in rows))
    warn_truncated_prompts(bench_.processor.tokenizer, examples, settings.max_length)
    folder = output / "predictions"
    saved = {(s.row, s.run): s for s in read_predictions(folder)}
    keys = {(row, run): bench_.key(row, run) for row, run in runs}
    todo = []
    for row, run in runs:
        there = saved.get((str(row), run))
        if there is not None and there.key == keys[row, run]:
            continue
        todo.append((row, run))
        if there is not None:
            print(
                f"Again: {there.path.name} was made with another {', '.join(differences(there.key, keys[row, run]))}."
            )
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are there already.")
    shared = Comparison(task, examples, str(rows[0]))
    commit = git_commit()
    for done in bench_.run(todo):
        about = {"seconds": round(done.seconds, 1), "device": str(bench_.language_model.device.type)}
        about |= {"git_commit": commit, **({"prompts": done.counts} if done.counts else {})}
        if done.row.plug:
            place = plugs[done.row.plug][done.run]
            about["plug"] = {name: getattr(bench_.config(place), name) for name in choices()}
            if (seed := training_seed(place)) is not None:
                about["training_seed"] = seed
        if done.weights is not None:
            about["weights"] = done.weights
        more = {"row": str(done.row), "run": done.run, "key": keys[done.row, done.run], "about": about}
        path = folder / file_name(str(done.row), done.run if done.row.plug else None)
        write_text(path, shared.official(done.answers, **more))

    here = {(s.row, s.run): s for s in read_predictions(folder)}
    asked = [here[str(row), run] for row, run in runs]
    if others := [s.path.name for pair, s in here.items() if s not in asked]:
        print(f"In the folder and not in the table, because nobody asked for them now: {', '.join(sorted(others))}.")
    comparison = finish(settings, task, examples, asked, reference)
    if settings.show_history is not None:
        name = next((row.plug for row in rows if str(row) == reference and row.plug), next(iter(plugs)))
        draw_history(bench_, plugs[name][0], settings.show_history, output)
    return comparison


def check_shown(settings: BenchSettings, examples: Sequence[Example]) -> None:
    """Raise unless there is a history to draw, and a plug to weigh it."""
    if settings.tables_only or not settings.plugs:
        raise ConfigurationError("show_history needs a plug that weighs the items: pass plugs, and no tables_only.")
    if settings.show_history not in {e.id for e in examples}:
        raise DataError(
            f"There is no question with the id {settings.show_history!r} to show the history of; the first ids are "
            f"{some(e.id for e in examples)}."
        )


def plan(
    settings: BenchSettings, task: Task, examples: list[Example], plugs: dict[str, list[str]], source: Source
) -> tuple[Bench, list[Any], str]:
    """The bench, its rows and the name of its reference, all checked; nothing is loaded yet."""
    training: list[Example] = []
    if (settings.rows is None or FREQUENCIES in settings.rows) and task.labels and task.answer_field:
        training = read_training(settings, task, source)
    decoding = Decoding(
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        max_length=settings.max_length,
        constrained=settings.constrained,
    )
    bench_ = Bench(
        task,
        examples,
        plugs,
        backbone=settings.backbone,
        backbone_dtype=settings.backbone_dtype,
        device=settings.device,
        decoding=decoding,
        batch_size=settings.batch_size,
        retriever=settings.retriever,
        training=training,
        seed=settings.seed,
        vectors=settings.vectors,
    )
    if settings.rows is None:
        rows = default_rows(
            task,
            list(plugs),
            users=len({e.user for e in examples}),
            frequencies=bool(training),
            dense=bool(settings.retriever or plugs),
            reference=settings.reference,
        )
    else:
        rows = parse_rows(settings.rows, list(plugs))
    reference = decide_reference(settings.reference, [str(row) for row in rows], list(plugs))
    bench_.check(rows)
    return bench_, rows, reference


def decide_reference(wanted: str | None, rows: Sequence[str], plugs: Sequence[str] = ()) -> str:
    """The name of the reference row."""
    if wanted is not None:
        if wanted not in rows:
            raise ConfigurationError(f"The reference {wanted!r} is no row of this bench; it has {', '.join(rows)}.")
        return wanted
    if not rows:
        raise ConfigurationError("rows is empty: name at least one, or leave it out for the usual ones.")
    own = [name for name in plugs if name in rows]
    return next((name for name in own if name != INSTRUCTION_ONLY), own[0] if own else rows[0])


def read_training(settings: BenchSettings, task: Task, source: Source) -> list[Example]:
    """What the label frequencies are fitted on; nothing if there is no train split."""
    if not has_split(source, "train"):
        return []
    _, training = read_examples(source, "train", task)
    training, _ = split_users(training, settings.leave_out_users, settings.split_seed)
    return training if settings.max_items is None else newest(training, settings.max_items)


# ---- predictions ----------------------------------------------------------------------------------------------------


def file_name(row: str, run: int | None) -> str:
    """A row's file; the comma stands for the colon, which not every file system takes, and in no other name."""
    return row.replace(":", ",") + ("" if run is None else f",{run}") + ".json"


def read_predictions(folder: Path) -> Iterator[Saved]:
    """The bench's own files in a folder; what is damaged or of somebody else is passed over, with a line that says so."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            answers = {str(gold["id"]): str(gold["output"]) for gold in content["golds"]}
            yield Saved(path, content["row"], content["run"], content["key"], content["about"], answers)
        except (ValueError, KeyError, TypeError):
            print(f"Passed over {path.name}: no predictions of a bench.")


def differences(old: dict[str, Any], new: dict[str, Any], inside: str = "") -> list[str]:
    """The names of what two keys differ in."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{inside}{name}.")
        elif a != b:
            names.append(f"{inside}{name}")
    return names


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(settings: BenchSettings, task: Task, examples: list[Example]) -> Comparison:
    """Everything but the predictions, from the predictions.

    Raises:
        MissingFileError: There are none, or not those of a row.
        MismatchError: They were made with different data, backbones or decodings, or are of other questions.
    """
    folder = Path(settings.output) / "predictions"
    found = list(read_predictions(folder))
    if not found:
        raise MissingFileError(f"There are no predictions of a bench in {str(folder)!r}: run it without tables_only.")
    names = list(dict.fromkeys(settings.rows or canonical({s.row for s in found})))
    if missing := [name for name in names if name not in {s.row for s in found}]:
        raise MissingFileError(
            f"There are no predictions of the row {missing[0]!r} in {str(folder)!r}; there are "
            f"{', '.join(canonical({s.row for s in found}))}."
        )
    chosen = [s for name in names for s in sorted(found, key=lambda s: s.run) if s.row == name]
    plugs = [name for name in names if not any(c in name for c in ":+@") and name not in _BARE]
    # Files do not say which plug was the reference; it is the one whose control rows were asked for.
    plugs.sort(key=lambda plug: -sum(name.startswith((f"{plug}:", f"{plug}+")) for name in names))
    reference = decide_reference(settings.reference, names, plugs)
    return finish(settings, task, examples, chosen, reference)


_BARE = (NO_PERSONA, FREQUENCIES)


def finish(
    settings: BenchSettings, task: Task, examples: list[Example], chosen: Sequence[Saved], reference: str
) -> Comparison:
    """Write and print what the predictions say."""
    digest = data_digest(task, examples, answers=False)
    check_together(chosen, digest, {e.id for e in examples})
    comparison = Comparison(task, examples, reference, full=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for s in chosen:
        comparison.add(s.row, [s.answers[e.id] for e in examples])
        runs.setdefault(s.row, []).append({"key": s.key, "about": s.about})
    told = {row: [run["about"].get("weights") for run in found] for row, found in runs.items()}
    profiles = {row: mean_profile(found) for row, found in told.items() if found and all(found)}
    output = Path(settings.output)
    results = {
        **comparison.results(),
        "weights": profiles,
        "runs": runs,
        "settings": {k: v for k, v in asdict(settings).items() if k != "tables_only"},
        "versions": {"pplug-hf": __version__, "python": platform.python_version(), **versions(_PACKAGES)},
        "git_commit": git_commit(),
    }
    text = report(comparison, results, settings.split)
    write_text(output / "results.json", to_json(results))
    write_text(output / "table.md", text)
    draw(comparison, results, output)
    print(f"\n{text}\nIn {settings.output}: table.md, results.json, predictions.")
    return comparison


def check_together(chosen: Sequence[Saved], digest: str, ids: Iterable[str]) -> None:
    """Raise a `MismatchError` unless all files belong to these questions and were made the same way."""
    ids = set(ids)
    for s in chosen:
        if s.answers.keys() != ids:
            raise MismatchError(
                f"{s.path.name} answers other questions than the data asks: {len(s.answers.keys() - ids)} of its ids "
                f"are unknown, {len(ids - s.answers.keys())} are missing. Use the data and the split it was made for."
            )
        if s.key.get("data") != digest:
            raise MismatchError(
                f"{s.path.name} was made for other data under the same ids: use the data, the split and max_items of "
                "that run."
            )
        for part in ("backbone", "decoding"):
            if s.key.get(part) != chosen[0].key.get(part):
                raise MismatchError(
                    f"{s.path.name} and {chosen[0].path.name} were made with different "
                    f"{', '.join(differences(s.key, chosen[0].key))}: name rows that belong together, or run them again."
                )


def report(comparison: Comparison, results: dict[str, Any], split: str) -> str:
    """table.md: the table, and what is needed to read it."""
    task = comparison.task
    lines = [
        f"# {task.name}, {split}: {results['examples']} questions of {results['users']} users",
        "",
        comparison.markdown(),
        "",
        f"± is the standard deviation over seeds. Brackets are 95 % intervals of a paired bootstrap over users "
        f"(10,000 resamples) of the mean over seeds, for {main_metric(task)}.",
    ]
    if (golds := results.get("style_of_golds")) is not None:
        lines += [
            "",
            "Style: the share of other users to whose texts an answer is less close than to its own user's. 0.5 is chance; "
            f"the users' real answers have {golds[0]:.3f}.",
        ]
    if short := without_room(comparison, results["runs"]):
        lines += [
            "",
            f"Questions asked without the items that were found, for lack of room: {', '.join(short)}. A larger max_length "
            "or fewer items would help.",
        ]
    lengths = results["by_history_length"]
    if len(lengths) > 1:
        names = list(comparison.predictions)
        lines += ["", f"{main_metric(task)} by number of history items:", ""]
        lines += ["| row | " + " | ".join(f"{b['from']} to {b['to']} ({b['examples']})" for b in lengths) + " |"]
        lines += ["| --- " * (len(lengths) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{b['rows'][name]:.3f}" for b in lengths) + " |" for name in names]
    return "\n".join(lines) + "\n"


def without_room(comparison: Comparison, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rows with retrieval whose items did not fit into all prompts, and how many; those rows are less than they say."""
    nothing_found = sum(not e.history for e in comparison.examples)
    counts = {row: found[0]["about"].get("prompts", {}).get("prompts_without_items", 0) for row, found in runs.items()}
    return [
        f"{row} {n - nothing_found} of {len(comparison.examples)}" for row, n in counts.items() if n > nothing_found
    ]


def draw(comparison: Comparison, results: dict[str, Any], output: Path) -> None:
    """The pictures, where matplotlib is installed."""
    metric = main_metric(comparison.task)
    try:
        plot_rows(results["rows"], metric, comparison.reference, output / "rows.png")
        plot_history_length(results, metric, output / "history-length.png")
        if results["weights"]:
            plot_weight_profiles(results["weights"], output / "weights.png")
    except ConfigurationError as error:
        print(error)


def draw_history(bench_: Bench, place: str, id_: str, output: Path) -> None:
    """How much each item of one history speaks for its question, with the user's texts."""
    model = bench_.load(place)
    number = next(i for i, e in enumerate(bench_.examples) if e.id == id_)
    example = bench_.examples[number]
    persona, query = bench_.personas(model)[number], bench_.queries(model)[number : number + 1]
    path = output / f"history-{re.sub(r'[^A-Za-z0-9_.-]+', '_', id_)}.png"
    try:
        plot_weights(
            model.persona_weights([persona], query=query)[0],
            item_texts(example.history, model.config.item_template),
            path,
            title=f"Who speaks for: {example.query}",
        )
        print(f"Private, with the user's texts: {path}")
    except ConfigurationError as error:
        print(error)


# ---- what was there when it ran -------------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The commit of this package's own checkout, with a + if files were changed since; none for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def training_seed(place: str) -> int | None:
    """The seed a plug was trained with, as far as its folder says."""
    path = Path(place) / "training_args.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("seed")
    except (OSError, ValueError, AttributeError):
        return None
