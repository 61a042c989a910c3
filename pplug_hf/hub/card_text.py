"""The text of a README.md: metadata, generated parts between markers, and text of a person, which is never touched.

    ---
    library_name: pplug-hf
    ---
    <!-- pplug-hf:begin use -->
    ## Use ...
    <!-- pplug-hf:end use -->
    ## My own chapter ...

To update a card is to fill the pairs of markers that it has. A text without any markers was written by hand.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import DataError, kind_of

# A part never contains the beginning of another one, which keeps the search linear.
_PART = re.compile(r"<!-- pplug-hf:begin (\w+) -->((?:(?!<!-- pplug-hf:).)*)<!-- pplug-hf:end \1 -->", re.DOTALL)
_DEPTH = 20  # levels of YAML; a model-index has about ten
_METADATA = "The metadata at the top of README.md, between the lines ---,"


class CardText:
    """A README.md, taken apart.

    Args:
        content: the bytes of the file; empty if there is none.

    Attributes:
        metadata: values by key.
        parts: generated texts by name.
        own_text: all other text, which a person wrote.
        is_by_hand: there is a text, and no part of it is generated.

    Raises:
        DataError: the file is not UTF-8, or its metadata cannot be read.
    """

    def __init__(self, content: bytes):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError("README.md is not UTF-8: save it as UTF-8, or remove it and it is made again.") from None
        self._mark, text = "\ufeff" * text.startswith("\ufeff"), text.removeprefix("\ufeff")
        self._newline = end = "\r\n" if "\r\n" in text else "\n"
        self._opening, self._yaml, self._closing, self._body = f"---{end}", "", f"{end}---{end}", f"{end}{text}"
        if found := REGEX_YAML_BLOCK.search(text):
            self._opening, self._yaml, self._closing = found.groups()[:3]
            self._body = text[found.end() :]
        self.metadata = _read_metadata(self._yaml)
        self.parts = {part[1]: part[2].replace("\r\n", "\n") for part in _PART.finditer(self._body)}
        self.own_text = _PART.sub("", self._body).strip()
        self.is_by_hand = bool(self.own_text) and not self.parts

    def updated(self, metadata: Mapping[str, Any], generated: str) -> bytes:
        """Return the file with other metadata and with its generated parts replaced.

        Args:
            metadata: all of it. The lines that are there stay as they are if keys are only added.
            generated: a complete card without metadata, which a file without text becomes.
        """
        generated = generated.replace("\n", self._newline)
        parts = {part[1]: part[0] for part in _PART.finditer(generated)}
        body = _PART.sub(lambda part: parts.get(part[1], part[0]), self._body)
        if not body.strip():
            body = self._newline * (2 - self._closing.endswith("\n")) + generated
        block = _merged(self._yaml, metadata)
        if block != self._yaml:
            block = block.replace("\r\n", "\n").replace("\n", self._newline)
        return f"{self._mark}{self._opening}{block}{self._closing}{body}".encode()


def _merged(block: str, metadata: Mapping[str, Any]) -> str:
    """Return YAML that says `metadata`: the block with lines added if that will do."""
    known = _read_metadata(block)
    added = {key: value for key, value in metadata.items() if key not in known}
    lines = "\n".join([block] * bool(block) + [_dump(added)] * bool(added))
    with contextlib.suppress(DataError):  # a mapping in braces takes no more lines
        if _read_metadata(lines) == metadata:
            return lines
    return _dump(metadata)


def _dump(values: Mapping[str, Any]) -> str:
    return yaml_dump(dict(values), sort_keys=False).rstrip("\n")


def _read_metadata(block: str) -> dict[str, Any]:
    """Return a block of YAML as a mapping, without following what takes parsers ages: aliases and deep nesting."""
    depth = 0
    try:
        for token in yaml.scan(block, Loader=yaml.SafeLoader):
            name = type(token).__name__
            depth += name.endswith("StartToken") - name.endswith("EndToken")
            if depth > _DEPTH or name == "AliasToken":
                raise DataError(f"{_METADATA} has a YAML alias (*name) or is nested more than {_DEPTH} levels deep.")
        values = yaml.safe_load(block) or {}
    except DataError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark else ""
        raise DataError(
            f"{_METADATA} is not valid YAML{line}: repair it, or remove it and it is made again."
        ) from None
    if not isinstance(values, dict):
        raise DataError(
            f"{_METADATA} is {kind_of(values)} and must be keys with values: repair it. If it is meant as text, "
            "put a title before it."
        )
    return values
