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
from codecs import BOM_UTF8
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
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError("README.md is not UTF-8: save it as UTF-8, or remove it and it is made again.") from None
        self._encoding = "utf-8-sig" if content.startswith(BOM_UTF8) else "utf-8"
        self._newline = end = "\r\n" if "\r\n" in text else "\n"
        if not REGEX_YAML_BLOCK.search(text):
            text = f"---{end}{end}---{end}{end}{text}"
        _, self._opening, self._yaml, self._closing, _, self._body = REGEX_YAML_BLOCK.split(text, 1)
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
        block = _merged(self._yaml, metadata, self._newline)
        return f"{self._opening}{block}{self._closing}{body}".encode(self._encoding)


def _merged(block: str, metadata: Mapping[str, Any], newline: str = "\n") -> str:
    """Return YAML that says `metadata`: the block with lines added if that will do."""
    known = _read_metadata(block)
    added = _dump({key: value for key, value in metadata.items() if key not in known}, newline)
    lines = newline.join(filter(None, (block, added)))
    with contextlib.suppress(DataError):  # a mapping in braces takes no more lines
        if _read_metadata(lines) == metadata:
            return lines
    return _dump(metadata, newline)


def _dump(values: Mapping[str, Any], newline: str) -> str:
    return yaml_dump(dict(values), sort_keys=False).rstrip("\n").replace("\n", newline) if values else ""


def _read_metadata(block: str) -> dict[str, Any]:
    """Return a block of YAML as a mapping, without following what takes parsers ages: aliases and deep nesting."""
    depth = 0
    with contextlib.suppress(yaml.YAMLError):  # the parser says where
        for token in yaml.scan(block, Loader=yaml.SafeLoader):
            name = type(token).__name__
            depth += name.endswith("StartToken") - name.endswith("EndToken")
            if depth > _DEPTH or name == "AliasToken":
                raise DataError(f"{_METADATA} has a YAML alias (*name) or is nested more than {_DEPTH} levels deep.")
    try:
        values = yaml.safe_load(block) or {}
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark else ""
        raise DataError(f"{_METADATA} is not valid YAML{line}: repair it, or remove it for a new one.") from None
    if not isinstance(values, dict):
        raise DataError(
            f"{_METADATA} is {kind_of(values)} and must be keys with values: repair it. If it is meant as text, "
            "put a title before it."
        )
    return values
