"""Checks of the fields of a configuration. It may come from a stranger's plug, so every value is checked.

Types come from the declarations of the fields. A message names the field, the value and what was expected.
"""

import re
from dataclasses import Field
from string import Formatter
from typing import Any

from ..errors import ConfigurationError

DTYPES = ("float32", "bfloat16", "float16", "float64")

_COUNTS = ("config_version", "num_persona_tokens", "projector_size", "hidden_size", "encoder_size")
_MAX = 2**20  # above every width in use
_POSITIVE = ("attention_temperature", "embedding_norm", "output_init")
_REVISIONS = ("backbone_revision", "encoder_revision")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
_MAX_FIELDS = 100  # an item's text is at most so many times its longest field


def checked(field: Field, value: Any) -> Any:
    """Return a value that a field may hold; a whole number is converted where a float is expected.

    Raises:
        ConfigurationError: the value has another type or is out of range.
    """
    name, value = field.name, _typed(field, value)
    if value is None:
        return None
    if name in _COUNTS and not 1 <= value <= _MAX:
        limit = "at least 1" if value < 1 else f"at most {_MAX}"
        raise ConfigurationError(f"{name} must be a whole number of {limit}, got {shown(value)}.")
    if name in _POSITIVE and not 0 < value < float("inf"):
        raise ConfigurationError(f"{name} must be a number greater than 0, got {shown(value)}.")
    if name == "aggregator" and not re.fullmatch(r"[\w-]{1,64}", value):  # the plug checks that it is registered
        raise ConfigurationError(f"aggregator must be a name, as in 'attention', got {shown(value)}.")
    if name in _REVISIONS and (".." in value or not re.fullmatch(r"\w[\w./-]*", value)):
        raise ConfigurationError(f"{name} must be a commit, as in 'a0d99c2e', got {shown(value)}.")
    if name == "item_template":
        _check_template(name, value)
    return value


def _typed(field: Field, value: Any) -> Any:
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
        raise _no_template(field, template, f"is no format string ({error})") from None
    names = [name for _, name in parts if name is not None]
    if len(names) > _MAX_FIELDS:
        raise _no_template(field, template, f"has {len(names)} fields, more than {_MAX_FIELDS}")
    for name in names:
        if not name or name.isdigit() or set(name) & set(".[]{}"):
            raise _no_template(field, template, f"has {shown(name)} in braces, which is no name of a field")
    literals = (literal.replace("{", "{{").replace("}", "}}") for literal, _ in parts)
    plain = (f"{{{name}}}" if name is not None else "" for _, name in parts)
    if "".join(map("".join, zip(literals, plain, strict=True))) != template:
        raise _no_template(field, template, "formats a field with ':' or '!'")


def _no_template(name: str, template: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is {shown(template)}: it {why}. Write each field's name in plain braces, as in "
        "'{tag}: {description}', and literal braces twice."
    )


def shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return "a number too long to write"
    return text if len(text) <= 100 else f"{text[:100]}..."
