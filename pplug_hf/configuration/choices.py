"""The choices of a plug's configuration, which are options of the command line; they load no model library."""

from dataclasses import Field, dataclass, field, fields
from typing import TypeVar

T = TypeVar("T")


def choice(default: T, help: str) -> T:
    """Return a field of the configuration that a user chooses, with the sentence that explains it."""
    return field(default=default, metadata={"help": help})


@dataclass
class PlugChoices:
    """Choices of a user about a plug; everything else in a configuration is measured or recorded."""

    placement: str = choice(
        "answer",
        "Where the soft prompt stands: behind the prompt, where the answer begins (answer), or in front of it (prompt, paper).",
    )
    num_persona_tokens: int = choice(4, "K: soft tokens the personal embedding is spread over (paper: 1).")
    projector_size: int | None = choice(256, "M: width of the projector's hidden layer (paper: H, the value none).")
    instruction: bool = choice(True, "Put a trained instruction embedding in front of the personal embedding.")
    aggregator: str = choice(
        "attention", "How items become one embedding: attention (paper), mean, or a registered name."
    )
    attention_temperature: float = choice(
        0.1, "Temperature of the attention's softmax (paper: 1); the start value if it is learned."
    )
    learn_temperature: bool = choice(True, "Train the temperature (paper: no).")
    project_no_persona: bool = choice(
        False,
        "Learn the soft prompt for users without history through the projector. It takes far fewer steps than bare numbers, so "
        "`train` sets it with `--use_history False` and `--new_users`.",
    )
    normalize: bool = choice(True, "L2-normalise item and query vectors before the attention and the projector.")
    train_input_encoder: bool = choice(
        False,
        "Train the encoder of the request (paper: yes). If not, the frozen encoder embeds it and the plug is small.",
    )
    query_prompt: str = choice("", "Text put in front of every request for the input encoder.")
    history_prompt: str = choice("", "Text put in front of every history item for the history encoder.")
    item_template: str | None = choice(
        None, "Format string that turns a history item's fields into its text, e.g. '{tag}: {description}'."
    )
    output_init: float = choice(0.1, "Root mean square of a fresh personal embedding, in units of a token embedding.")


def choices() -> dict[str, Field]:
    """Return the fields that a user chooses, by name."""
    return {f.name: f for f in fields(PlugChoices)}
