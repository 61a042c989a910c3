"""The configuration of a persona plug: everything but the weights, validated whenever a field is set.

Each field carries the sentence that the command line and the reference show as its help. A configuration may come from a
stranger's plug, so every value is checked: its type is that of the field's declaration, and a message names the field, the
value and what was expected.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import Field, field, fields
from functools import cache
from string import Formatter
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..errors import ConfigurationError
from ..version import __version__
from .choices import PlugChoices, T, choices
from .queries import query_of

CONFIG_VERSION = 1  # of the fields below; raise it with every renamed or removed field

# Old name of a field -> its name today. Plugs with old names load without a warning.
RENAMED: dict[str, str] = {}

# What plugs do that were written before there was such a choice.
_BEFORE = {"placement": "prompt"}

# Fields of transformers that a plug keeps, and one for readers without this package.
_INHERITED = {"architectures", "dtype", "model_type", "transformers_version"}
_OF_OTHERS = {"auto_map"}

DTYPES = ("float32", "bfloat16", "float16", "float64")
PLACEMENTS = ("prompt", "answer")

_COUNTS = ("config_version", "num_persona_tokens", "projector_size", "hidden_size", "encoder_size")
_MAX = 2**20  # above every width in use
_POSITIVE = ("attention_temperature", "embedding_norm", "output_init")
_REVISIONS = ("backbone_revision", "encoder_revision")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
_MAX_FIELDS = 100  # an item's text is at most so many times its longest field

logger = logging.get_logger(__name__)


def _recorded(default: T, help: str) -> T:
    return field(default=default, metadata={"help": help})


class PPlugConfig(PreTrainedConfig, PlugChoices):
    """Configuration of [`PPlugForConditionalGeneration`].

    The sizes and the fingerprints are measured from the backbone and the encoder by
    `PPlugForConditionalGeneration.from_backbone`; the rest are choices. Letters as in the paper and in the
    code: D encoder width, H backbone width, M projector width, K persona tokens.

    Raises:
        ConfigurationError: there is no such field, or a value is of another type or outside its range; the message
            names the field, the value and what was expected. The same when a field is set later.
    """

    model_type: ClassVar[str] = "pplug"
    # Outputs that a Trainer cannot gather, because they are not tensors; the name changed after transformers 5.20.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    config_version: int = _recorded(CONFIG_VERSION, "What the fields of this file mean; see CONFIG_VERSION.")

    # The frozen modules, by name: their weights are never saved with a plug.
    backbone: str | None = _recorded(None, "Frozen language model: Hub id, local folder, or path of a GGUF file.")
    backbone_revision: str | None = _recorded(None, "Commit of the backbone; of a local GGUF file its SHA-256.")
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

    # How a prompt is written for the backbone, so that it is asked as it was trained.
    chat: bool = _recorded(False, "Write prompts as the user's turn of the backbone's chat template.")
    system: str | None = _recorded(None, "System text of these chats (default: the template's own).")
    query_marker: str = _recorded(
        "", "Text of a prompt after which its query begins, where none is given; empty: the whole prompt is the query."
    )
    query_end: str = _recorded("", "Text of a prompt before which its query ends; empty: it goes on to the end.")

    is_encoder_decoder: bool = False  # the kind of the backbone, measured

    def __post_init__(self, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() - {"name_or_path"}):
            raise ConfigurationError(
                f"PPlugConfig has no field {', '.join(unknown)}; its fields are {', '.join(_declared())}."
            )
        if self.projector_size is None:
            self.projector_size = self.hidden_size
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        if declared := _declared().get(name):
            value = checked(declared, value)
        elif name == "dtype" and isinstance(value, str) and value not in DTYPES:  # looked up in torch by this name
            raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}; got {shown(value)}.")
        super().__setattr__(name, value)

    def query_of(self, text: str) -> str:
        """Return what weights the history where no query is given: the part of a prompt that was the query in training.

        Args:
            text: the prompt; of a chat, the last text of the user.

        Returns:
            What stands between the two texts; the whole prompt where that is nothing.
        """
        return query_of(text, self.query_marker, self.query_end)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary, as read from a config.json of this or another version of the package.

        Renamed fields get their name of today. Unknown fields are left out, with one warning that names them.

        Args:
            config_dict: fields by name.
            **kwargs: fields to override. Other arguments that transformers' Auto classes pass (dtype, device_map,
                backbone, ...) are returned with `return_unused_kwargs=True`.

        Raises:
            ConfigurationError: a value that cannot work.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        own = {name: kwargs.pop(name) for name in (*choices(), "name_or_path") if name in kwargs}
        config = cls(**{**_current(config_dict), **own})
        unused = {name: value for name, value in kwargs.items() if name not in ("_from_auto", "_from_pipeline")}
        return (config, unused) if return_unused else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Self:
        """Read a configuration from a JSON file; see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, without attributes that other libraries have set on the object."""
        return {name: value for name, value in super().to_dict().items() if name in _declared().keys() | _INHERITED}

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
        """Number of soft tokens of a prompt: the instruction, if any, and K persona tokens."""
        return int(self.instruction) + self.num_persona_tokens

    @property
    def scale(self) -> float:
        """Root mean square component of a token embedding: the unit of the plug's output."""
        return self.embedding_norm / self.sizes[2] ** 0.5


@cache
def _declared() -> dict[str, Field]:
    """Return the fields of a plug by name."""
    return {f.name: f for f in fields(PPlugConfig) if f.name in PPlugConfig.__annotations__.keys() | choices()}


def _current(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the known fields by their names of today; warn about unknown ones and about a newer version."""
    version = values.get("config_version", 1)  # older plugs have no version
    if checked(_declared()["config_version"], version) > CONFIG_VERSION:
        logger.warning_once(
            f"This plug has config_version {version}, and pplug-hf {__version__} knows versions up to "
            f"{CONFIG_VERSION}: it may answer differently from what its author saw. Update pplug-hf."
        )
    renamed = {RENAMED[name]: value for name, value in values.items() if name in RENAMED}
    values = {**_BEFORE, **renamed, **{name: value for name, value in values.items() if name not in RENAMED}}
    known = _declared().keys() | _INHERITED
    if unknown := sorted(values.keys() - known - _OF_OTHERS):
        logger.warning_once(
            f"This plug's configuration has fields that pplug-hf {__version__} does not know and ignores: "
            f"{', '.join(map(shown, unknown[:10]))}{', ...' if len(unknown) > 10 else ''}."
        )
    current = {name: value for name, value in values.items() if name in known - {"model_type"}}
    return {**current, "config_version": CONFIG_VERSION}


def checked(field: Field, given: object) -> Any:
    """Return a value that a field may hold; a whole number is converted where a float is expected.

    Raises:
        ConfigurationError: the value has another type or is out of range.
    """
    name, value = field.name, _typed(field, given)
    if value is None:
        return None
    if name in _COUNTS and not 1 <= value <= _MAX:
        limit = "at least 1" if value < 1 else f"at most {_MAX}"
        raise ConfigurationError(f"{name} must be a whole number of {limit}, got {shown(value)}.")
    if name in _POSITIVE and not 0 < value < float("inf"):
        raise ConfigurationError(f"{name} must be a number greater than 0, got {shown(value)}.")
    if name == "aggregator" and not re.fullmatch(r"[\w-]{1,64}", value):  # the plug checks that it is registered
        raise ConfigurationError(f"aggregator must be a name, as in 'attention', got {shown(value)}.")
    if name == "placement" and value not in PLACEMENTS:
        raise ConfigurationError(f"placement must be one of {', '.join(PLACEMENTS)}; got {shown(value)}.")
    if name in _REVISIONS and (".." in value or not re.fullmatch(r"\w[\w./-]*", value)):
        raise ConfigurationError(f"{name} must be a commit, as in 'a0d99c2e', got {shown(value)}.")
    if name == "item_template":
        _check_template(name, value)
    return value


def _typed(field: Field, value: object) -> Any:
    kinds: Any = getattr(field.type, "__args__", (field.type,))
    if float in kinds and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if (type(value) is bool and bool not in kinds) or not isinstance(value, kinds):
        expected = " or ".join(_KINDS.get(kind, "nothing") for kind in kinds)
        raise ConfigurationError(f"{field.name} must be {expected}, got {shown(value)}.")
    return value


def _check_template(field: str, template: str) -> None:
    """Raise an error unless a template holds only text and names of fields in plain braces.

    Python's format strings can also reach into an object (`{text.__class__}`) and fill the memory
    (`{text:>999999999}`); the text of an item needs neither.
    """
    try:
        parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    except ValueError as error:
        raise _no_template(field, template, f"is not a valid format string ({error})") from None
    names = [name for _, name in parts if name is not None]
    if len(names) > _MAX_FIELDS:
        raise _no_template(field, template, f"has {len(names)} fields, more than {_MAX_FIELDS}")
    for name in names:
        if not name or name.isdigit() or set(name) & set(".[]{}"):
            raise _no_template(field, template, f"has {shown(name)} in braces, which is not the name of a field")
    literals = (literal.replace("{", "{{").replace("}", "}}") for literal, _ in parts)
    plain = (f"{{{name}}}" if name is not None else "" for _, name in parts)
    if "".join(map("".join, zip(literals, plain, strict=True))) != template:
        raise _no_template(field, template, "formats a field with ':' or '!'")


def _no_template(name: str, template: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is {shown(template)}: it {why}. Write each field's name in plain braces, as in "
        "'{tag}: {description}', and literal braces twice."
    )


def shown(value: object) -> str:
    """Return a value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return "a number too long to write"
    return text if len(text) <= 100 else f"{text[:100]}..."
