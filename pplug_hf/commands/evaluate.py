"""`pplug-hf evaluate`: a plug beside the rows that show whether it personalises."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..baselines.frequencies import LabelFrequencies, history_labels, label_log_probs
from ..configuration.tasks import Task
from ..data.dataset import PersonaDataset
from ..data.histories import split_users
from ..data.lamp import Example, read_lamp
from ..data.vectors import DEFAULT_FOLDER, VectorStore
from ..errors import ConfigurationError
from ..evaluation.answers import answer, wrong_users
from ..evaluation.compare import Comparison
from ..modeling import PPlugForConditionalGeneration, PPlugModel
from ..modeling.persona import Persona
from ..processing import PPlugProcessor
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
    max_length: int = field(default=256, metadata={"help": "Tokens of a prompt at most."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the wrong users."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})
    output: str | None = field(default=None, metadata={"help": "Folder for results.json, table.md and predictions."})


def evaluate(settings: EvaluateSettings) -> Comparison:
    """Answer the split with every row, print the table, and save it if asked to."""
    task, examples = read_lamp(settings.data, settings.split, settings.task)
    comparison = Comparison(task, examples, reference=PPLUG)
    prompts, queries = [e.prompt for e in examples], [e.query for e in examples]
    decoding: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
        "max_new_tokens": settings.max_new_tokens or task.max_new_tokens,
        "num_beams": settings.num_beams,
    }
    model: PPlugForConditionalGeneration | None = None
    for plug in settings.plug:
        model = load(plug, settings, model)
        processor = PPlugProcessor.from_model(model)
        if model is not None and BARE not in comparison.predictions:
            comparison.add(BARE, answer(model.backbone.generate, processor, prompts, description=BARE, **decoding))
        personas = encode(model, examples, settings)
        for row, chosen in ((WRONG, wrong_users(examples, settings.seed)), (PPLUG, range(len(examples)))):
            given = [personas[i] for i in chosen]
            comparison.add(
                row,
                answer(
                    model.generate, processor, prompts, personas=given, queries=queries, description=row, **decoding
                ),
            )
    if model is None:
        raise ConfigurationError("plug is empty: name at least one plug folder.")
    for plug in settings.instruction_only or ():
        other = load(plug, settings, model)
        answers = answer(other.generate, processor, prompts, description=INSTRUCTION, **decoding)
        comparison.add(INSTRUCTION, answers)
    if settings.frequencies and task.labels and task.answer_field:
        comparison.add(FREQUENCIES, frequency_answers(model, processor, task, examples, settings))

    order = [BARE, INSTRUCTION, WRONG, FREQUENCIES, PPLUG]
    comparison.predictions = {row: comparison.predictions[row] for row in order if row in comparison.predictions}
    users = len({e.user for e in examples})
    print(f"\n{task.name}, {settings.split}: {len(examples)} questions of {users} users\n\n{comparison.markdown()}")
    if settings.output:
        comparison.save(settings.output, **asdict(settings))
    return comparison


def load(
    plug: str, settings: EvaluateSettings, previous: PPlugForConditionalGeneration | None
) -> PPlugForConditionalGeneration:
    """A plug, on the backbone and encoder of the previous one if there is one: they are loaded once."""
    if previous is None:
        return PPlugModel.from_pretrained(plug, backbone=settings.backbone, dtype=settings.backbone_dtype)
    return PPlugModel.from_pretrained(plug, backbone=previous.backbone, encoder=previous.history_encoder)


def encode(model: PPlugForConditionalGeneration, examples: list[Example], settings: EvaluateSettings) -> list[Persona]:
    """Every example's history, through the vector store."""
    store = VectorStore(model.history_encoder, model.config.history_prompt, settings.vectors)
    dataset = PersonaDataset(examples, store, model.config.item_template)
    return [dataset.persona(i) for i in range(len(dataset))]


def frequency_answers(
    model: PPlugForConditionalGeneration,
    processor: PPlugProcessor,
    task: Task,
    examples: list[Example],
    settings: EvaluateSettings,
) -> list[str]:
    """The rival's answers; its two weights are fitted on training users whom the backbone does not know."""
    _, training = read_lamp(settings.data, "train", task)
    if settings.leave_out_users:
        training, _ = split_users(training, settings.leave_out_users, settings.split_seed)
    options = {"batch_size": settings.batch_size, "max_length": settings.max_length}
    rival = LabelFrequencies.fit(
        label_log_probs(model.backbone, processor, [e.prompt for e in training], task.labels, **options),
        [history_labels(e, task) for e in training],
        [str(e.target) for e in training],
        task.labels,
    )
    log_probs = label_log_probs(model.backbone, processor, [e.prompt for e in examples], task.labels, **options)
    return rival.predict(log_probs, [history_labels(e, task) for e in examples])
