"""`pplug-hf evaluate`: a plug beside the rows that show whether it personalises. `bench` has more rows, and resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ..data.histories import split_users
from ..data.lamp import read_lamp
from ..data.vectors import DEFAULT_FOLDER
from ..errors import ConfigurationError
from ..evaluation.bench import Bench, Decoding
from ..evaluation.compare import Comparison
from ..evaluation.rows import INSTRUCTION_ONLY, Row
from .train import DType

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
    data: str = field(metadata={"help": "Folder with {split}_questions.json[.gz] and {split}_outputs.json[.gz]."})
    split: str = field(default="dev", metadata={"help": "Split to answer."})
    task: str | None = field(default=None, metadata={"help": "Task (default: what the outputs file says)."})
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
    batch_size: int = field(default=32, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the wrong users."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})
    output: str | None = field(default=None, metadata={"help": "Folder for results.json, table.md and predictions."})


def evaluate(settings: EvaluateSettings) -> Comparison:
    """Answer the split with every row, print the table, and save it if asked to."""
    task, examples = read_lamp(settings.data, settings.split, settings.task)
    if not settings.plug:
        raise ConfigurationError("plug is empty: name at least one plug folder.")
    plugs = {PPLUG: settings.plug}
    titles = {Row(): BARE}
    if settings.instruction_only:
        plugs[INSTRUCTION_ONLY] = settings.instruction_only
        titles[Row(plug=INSTRUCTION_ONLY)] = INSTRUCTION
    titles[Row(plug=PPLUG, shown="wrong-user")] = WRONG
    training = []
    if settings.frequencies and task.labels and task.answer_field:
        titles[Row(frequencies=True)] = FREQUENCIES
        _, training = read_lamp(settings.data, "train", task)
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
    comparison = Comparison(task, examples, reference=PPLUG, predictions={title: [] for title in titles.values()})
    runs = [(row, run) for row in titles for run in range(len(plugs[row.plug]) if row.plug else 1)]
    for done in bench.run(runs, titles):
        comparison.add(titles[done.row], done.answers)
    users = len({e.user for e in examples})
    print(f"\n{task.name}, {settings.split}: {len(examples)} questions of {users} users\n\n{comparison.markdown()}")
    if settings.output:
        comparison.save(settings.output, **asdict(settings))
    return comparison
