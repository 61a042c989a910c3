"""Settings that the recipes share: the paper's, and the changes of its authors' code and of ours, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from ..recipes import Recipe, spelled
from ..task import Task

_NOT_REPRODUCED = (
    "The soft prompt's fixed scale (539.9738, and a seventh of it for I) is presumably FlanT5-XXL's mean embedding norm: "
    "here the scale is measured from any backbone's token embeddings.",
    "I has no MLP of its own: it is a trained vector, which can become every vector that the MLP could give.",
    "P starts at a tenth of a token's size and not where the authors' initialisation puts it.",
    "The checkpoint is the one with the best loss on a tenth of the training users, who are held out for that.",
    "The plug is computed in float32 on a bfloat16 backbone.",
    "The frozen language model's dropout stays on in their training; here it is off.",
    "Their batches are made by length, not shuffled; here prompts of similar length share a shuffled batch.",
    "Their ten sub-histories of an example lose at least one item each, and are the same in every epoch; here they are "
    "drawn anew, and may lose none.",
    "Their last 512 items are the last in the file; here they are the newest by date, where every item has one.",
    "Their query is cut with the prompt; here only the encoder's own limit cuts it.",
    "Their prompts are encoded, decoded and encoded again; here they are encoded once.",
    "They cut the unused rows of the vocabulary; here the backbone stays as it is.",
    "They do not clip gradients; here their norm is clipped at 1, the default of transformers' trainer.",
    "Their DeepSpeed file sets accumulation to 1, so their updates are on 2 x GPUs examples, and the batch of 64 may not "
    "be what made their table; here a batch has 64.",
)

Changes: TypeAlias = Mapping[str, tuple[object, str]]

_SHARED = {"backbone_dtype": "bfloat16", "max_length": 256, "max_items": 512}
_PAPER_TRAINING = {
    "backbone": "google/flan-t5-xxl",
    "encoder": "BAAI/bge-base-en-v1.5",
    "train_on_histories": False,
    "history_dropout": 0.5,
    "history_repeats": 10,
    "epochs": 2,
    "patience": 100,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "encoder_learning_rate": 1e-4,
    "weight_decay": 1e-4,
    "warmup": 0.05,
    "max_target_length": 128,
}
_PAPER_PLUG = {
    "placement": "prompt",
    "num_persona_tokens": 1,
    "projector_size": None,
    "instruction": True,
    "aggregator": "attention",
    "attention_temperature": 1.0,
    "learn_temperature": False,
    "normalize": True,
    "train_input_encoder": True,
    "query_prompt": "Represent this sentence for searching relevant passages: ",
    "history_prompt": "",
}
# Setting -> (value, why it is not the paper's); None leaves the setting to its default.
_TRAINING: Changes = {
    "backbone": ("google/flan-t5-base", "It trains on one small GPU; pass --backbone for any other."),
    "max_items": (None, "An item costs one vector that is encoded once, so none need be left out."),
    "train_on_histories": (True, "Every answered item becomes an example: a plug needs many more than there are."),
    "history_repeats": (0, "With an example for every item, one draw of what is dropped per pass is enough."),
    "batch_size": (32, "Smaller batches make more steps of the few examples of a small data set."),
    "learning_rate": (
        1e-2,
        "Without an encoder to train, what is left is small and starts from nothing. SmolLM2-135M-Instruct did better at 3e-2 "
        "to 2e-1, and worse at 1e-3; other backbones were not compared.",
    ),
    "encoder_learning_rate": (None, "No encoder is trained."),
    "weight_decay": (0.01, "Small data sets have few users, and a plug soon memorises them."),
    "evaluations_per_epoch": (8, "Passes are few, and the best checkpoint may lie within one."),
}
_PLUG: Changes = {
    "placement": (
        "answer",
        "SmolLM2-135M-Instruct on LaMP-2 (one seed, 100 steps): behind the question the validation loss per token was 0.866 "
        "(in front of it 1.208) and accuracy 0.299 (0.149), and a step took a sixth of the time. "
        "The results with very small models in benchmarks/results were made in front of it.",
    ),
    "num_persona_tokens": (4, "A user is more than one vector, and three more tokens cost next to nothing."),
    "projector_size": (256, "Fewer parameters for as few users as small data sets have."),
    "attention_temperature": (0.1, "At 1, unit vectors get almost the same weight each."),
    "learn_temperature": (True, "How sharply to choose among items depends on the task, and can be learned."),
    "train_input_encoder": (False, "The plug stays small, and requests are encoded once."),
    "item_template": (None, "The task's own text, in which title and text are told apart."),
    "query_prompt": (None, "An encoder's own prompts are used, so that another encoder needs no other recipe."),
    "history_prompt": (None, "As query_prompt."),
}
# Reasons that several tasks share.
UNLABELLED_ITEMS = (False, "The authors' code leaves tags and scores out; the paper's table 7 shows them.")
FEW_EXAMPLES = "Its items carry no answers to learn from, so examples are few."
MANY_EXAMPLES = "Every item is an example, so a pass is long."


def paper_recipe(
    task: Task,
    training: dict[str, object] | None = None,
    answering: dict[str, object] | None = None,
    not_reproduced: tuple[str, ...] = (),
    item_template: str = "",
) -> Recipe:
    """Return the paper's recipe for a task: the settings that its tasks share, and those that differ here."""
    shared = {"task": task.name, **_SHARED}
    return Recipe(
        name=f"paper/{spelled(task.name)}",
        task=task.name,
        training=shared | _PAPER_TRAINING | (training or {}),
        plug=_PAPER_PLUG | ({"item_template": item_template} if item_template else {}),
        answering=shared | {"num_beams": 4, "max_new_tokens": 128} | (answering or {}),
        not_reproduced=_NOT_REPRODUCED + not_reproduced,
    )


def release_recipe(paper: Recipe, training: Changes | None = None) -> Recipe:
    """Return the recipe that follows the authors' released code where it is not what the paper says.

    Args:
        paper: the paper's recipe for the task.
        training: setting -> (value, why it is not the paper's).
    """
    training = training or {}
    return replace(
        paper,
        name=paper.name.replace("paper/", "release/", 1),
        training=_changed(paper.training, training),
        reasons={name: why for name, (_, why) in training.items()},
    )


def our_recipe(task: Task, paper: Recipe, training: Changes | None = None, plug: Changes | None = None) -> Recipe:
    """Return our recipe for a task: the paper's with the changes that all of ours share, and those of this task.

    Args:
        task: the task.
        paper: the paper's recipe for it.
        training, plug: setting -> (value, why it is not the paper's); None leaves the setting to its default.
    """
    in_training, in_plug = {**_TRAINING, **(training or {})}, {**_PLUG, **(plug or {})}
    if "item_template" not in paper.plug and in_plug["item_template"][0] is None:
        del in_plug["item_template"]
    if task.answer_field is None:
        del in_training["train_on_histories"]  # there is nothing in the items to learn from
    shared = {name: change for name, change in in_training.items() if name in paper.answering}
    return Recipe(
        name=f"ours/{spelled(task.name)}",
        task=task.name,
        training=_changed(paper.training, in_training),
        plug=_changed(paper.plug, in_plug),
        answering=_changed(paper.answering, shared),
        reasons={name: why for name, (_, why) in (in_training | in_plug).items()},
    )


def _changed(settings: Mapping[str, object], changes: Changes) -> dict[str, object]:
    changed = {**settings, **{name: value for name, (value, _) in changes.items()}}
    return {name: value for name, value in changed.items() if value is not None or name not in changes}
