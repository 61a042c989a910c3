"""The configuration of a persona plug: everything but the weights, validated when it is built.

Each field is followed by the sentence that becomes the help of the command line, so that the code, the
reference and the CLI cannot disagree.
"""

from dataclasses import Field, field, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..errors import ConfigurationError

AGGREGATORS = ("attention", "mean")


def _recorded(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choice": False})


def _choice(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choice": True})


@strict
class PPlugConfig(PreTrainedConfig):
    """Configuration of [`PPlugForConditionalGeneration`].

    The sizes and the fingerprints are measured from the backbone and the encoder by
    `PPlugForConditionalGeneration.from_backbone`; the rest are choices. Letters as in the paper and in the
    code: D encoder width, H backbone width, M projector width, K persona tokens.

    Raises:
        ConfigurationError: a value is outside its range; the message names the field, the value and the options.
    """

    model_type: ClassVar[str] = "pplug"

    # The frozen parts, by name: their weights are never part of a plug.
    backbone: str | None = _recorded(None, "Frozen language model: Hub id or local folder.")
    backbone_revision: str | None = _recorded(None, "Commit of the backbone.")
    backbone_fingerprint: dict | None = _recorded(
        None, "Model type, sizes and kind of the backbone that the plug was made for."
    )
    encoder: str | None = _recorded(None, "Frozen sentence encoder: Hub id or local folder.")
    encoder_revision: str | None = _recorded(None, "Commit of the sentence encoder.")
    encoder_fingerprint: dict | None = _recorded(
        None, "Model type, sizes and weight digest of the encoder, and its history prompt."
    )

    # Measured.
    hidden_size: int | None = _recorded(None, "H: width of the backbone's input embeddings.")
    encoder_size: int | None = _recorded(None, "D: width of the encoder's sentence vectors.")
    embedding_norm: float = _recorded(
        1.0,
        "Mean L2 norm of the backbone's token embeddings. The plug computes in units of embedding_norm/sqrt(H) "
        "per component, so that a soft prompt has the size of a token for every backbone.",
    )

    # Choices.
    num_persona_tokens: int = _choice(1, "K: soft tokens the personal embedding is spread over (paper: 1).")
    projector_size: int | None = _choice(None, "M: width of the projector's hidden layer (default: H).")
    instruction: bool = _choice(True, "Put a trained instruction embedding in front of the personal embedding.")
    aggregator: str = _choice("attention", "How items become one embedding: attention (paper) or mean.")
    attention_temperature: float = _choice(
        1.0, "Temperature of the attention's softmax (paper: 1); the start value if it is learned."
    )
    learn_temperature: bool = _choice(False, "Train the temperature.")
    normalize: bool = _choice(True, "L2-normalise item and query vectors before the attention and the projector.")
    train_input_encoder: bool = _choice(
        True,
        "Train the encoder of the request (paper: yes). If not, the frozen encoder embeds it and the plug is small.",
    )
    query_prompt: str = _choice("", "Text put in front of every request for the input encoder.")
    history_prompt: str = _choice("", "Text put in front of every history item for the history encoder.")
    item_template: str | None = _choice(
        None, "Format string that turns a history item's fields into its text, e.g. '{tag}: {description}'."
    )
    output_init: float = _choice(0.1, "Root mean square of a fresh personal embedding, in units of a token embedding.")

    is_encoder_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.projector_size is None:
            self.projector_size = self.hidden_size
        for name in ("num_persona_tokens", "projector_size", "hidden_size", "encoder_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("attention_temperature", "embedding_norm", "output_init"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} must be a number greater than 0, got {value!r}.")
        if self.aggregator not in AGGREGATORS:
            raise ConfigurationError(f"aggregator must be one of {', '.join(AGGREGATORS)}; got {self.aggregator!r}.")
        super().__post_init__(**kwargs)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(D, M, H, K).

        Raises:
            ConfigurationError: they are not measured yet.
        """
        if self.encoder_size is None or self.projector_size is None or self.hidden_size is None:
            raise ConfigurationError(
                "This configuration knows no hidden_size and encoder_size: create the model with "
                "PPlugForConditionalGeneration.from_backbone(backbone, encoder=...), which measures them."
            )
        return self.encoder_size, self.projector_size, self.hidden_size, self.num_persona_tokens

    @property
    def prefix_length(self) -> int:
        """Soft tokens in front of a prompt: the instruction, if any, and K persona tokens."""
        return int(self.instruction) + self.num_persona_tokens

    @property
    def scale(self) -> float:
        """Root mean square component of a token embedding: what one unit of the plug's output is."""
        return self.embedding_norm / self.sizes[2] ** 0.5


def choices() -> dict[str, Field]:
    """The fields a user chooses, by name; the command line takes type, default and help from them."""
    return {f.name: f for f in fields(PPlugConfig) if f.metadata.get("choice")}
