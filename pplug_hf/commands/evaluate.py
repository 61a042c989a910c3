"""`pplug-hf evaluate`: a plug beside the rows that show whether it personalises. `bench` has more rows, and resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ..data.examples import Source, has_split, read_examples
from ..data.histories import newest, split_users
from ..data.vectors import DEFAULT_FOLDER
from ..errors import ConfigurationError
from ..evaluation.compare import Comparison
from ..evaluation.runner import Bench, Decoding
from ..methods.names import INSTRUCTION_ONLY, Row
from ..tasks.task import Task
from .data_warnings import warn_short_histories, warn_truncated_prompts
from .train import TASK, DType

PPLUG, BARE, INSTRUCTION, WRONG, FREQUENCIES = (
    "PPlug",
    "no persona",
    "instruction only",
    "wrong user's history",
    "user's label frequencies",
)


@dataclass
class EvaluateSettings:
    """Compare a plug with: no persona, instruction only, the history of another user, the user's label frequencies."""

    plug: list[str] = field(metadata={"help": "Plug folder or Hub id; several are seeds of one row."})
    data: str = field(
        metadata={"help": "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file."}
    )
    split: str = field(default="dev", metadata={"help": "Split of a folder to answer."})
    task: str | None = field(default=None, metadata={"help": TASK})
    instruction_only: list[str] | None = field(
        default=None, metadata={"help": "Plugs trained with --use_history False, for the row of that name."}
    )
    frequencies: bool = field(
        default=True,
        metadata={"help": "On label tasks, add the rival: label log-probabilities mixed with the user's frequencies."},
    )
    leave_out_users: float = field(
        default=0.0, metadata={"help": "As in training; the rival's weights are fitted on the users that are left."}
    )
    split_seed: int = field(default=0, metadata={"help": "As in training."})
    backbone: str | None = field(default=None, metadata={"help": "Use the backbone at this place."})
    backbone_dtype: DType = field(default="auto", metadata={"help": "Data type of the backbone."})
    num_beams: int = field(default=1, metadata={"help": "Beams."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of an answer (default: the task's)."})
    constrained: bool = field(default=False, metadata={"help": "On label tasks, answer with the task's labels only."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a prompt at most."})
    max_items: int | None = field(default=None, metadata={"help": "Newest items of a history at most (default: all)."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the wrong users."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})
    output: str | None = field(default=None, metadata={"help": "Folder for results.json, table.md and predictions."})


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
        PPlugError: settings, data or plugs that cannot be used; nothing is written then.
    """
    if not settings.plug:
        raise ConfigurationError("plug is empty: name at least one plug folder.")
    source = settings.data if data is None else data
    task, examples = read_examples(source, settings.split, task or settings.task)
    if settings.max_items is not None:
        examples = newest(examples, settings.max_items)
    plugs = {PPLUG: settings.plug}
    titles = {Row(): BARE}
    if settings.instruction_only:
        plugs[INSTRUCTION_ONLY] = settings.instruction_only
        titles[Row(plug=INSTRUCTION_ONLY)] = INSTRUCTION
    titles[Row(plug=PPLUG, shown="wrong-user")] = WRONG
    training = []
    if settings.frequencies and task.labels and task.answer_field and has_split(source, "train"):
        titles[Row(frequencies=True)] = FREQUENCIES
        _, training = read_examples(source, "train", task)
        training, _ = split_users(training, settings.leave_out_users, settings.split_seed)
    titles[Row(plug=PPLUG)] = PPLUG
    bench = Bench(
        task,
        examples,
        plugs,
        backbone=settings.backbone,
        backbone_dtype=settings.backbone_dtype,
        decoding=Decoding(
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            max_length=settings.max_length,
            constrained=settings.constrained,
        ),
        batch_size=settings.batch_size,
        training=training,
        seed=settings.seed,
        vectors=settings.vectors,
    )
    bench.check(titles)
    warn_short_histories(examples)
    warn_truncated_prompts(bench.processor.tokenizer, examples, settings.max_length)
    comparison = Comparison(task, examples, reference=PPLUG, predictions={title: [] for title in titles.values()})
    runs = [(row, run) for row in titles for run in range(len(plugs[row.plug]) if row.plug else 1)]
    for done in bench.run(runs, titles):
        comparison.add(titles[done.row], done.answers)
    users = len({e.user for e in examples})
    print(f"\n{task.name}, {settings.split}: {len(examples)} questions of {users} users\n\n{comparison.markdown()}")
    if settings.output:
        comparison.save(settings.output, **asdict(settings))
    return comparison
