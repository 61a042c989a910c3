"""A card that people edit: what they changed stays, what was generated and left alone is brought up to date.

A generated part stands between two comments, the first with a digest of the text in between. A last comment is the
record: which parts and which metadata were generated, so that what a person removed is not put back.

    <!-- pplug-hf:use 8f14e45fceea -->
    ## Use ...
    <!-- /pplug-hf:use -->
    <!-- pplug-hf:card {"parts": ["use"], "metadata": {"library_name": "45c48cce2e2d"}} -->
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import DataError

# No part holds the beginning of another one, which also keeps the search linear.
_PART = re.compile(
    r"<!-- pplug-hf:([a-z-]+) ([0-9a-f]{12}) -->((?:(?!<!-- pplug-hf:).)*?)<!-- /pplug-hf:\1 -->", re.DOTALL
)
_DEPTH = 20  # a model-index has about ten
_RECORD = re.compile(r"<!-- pplug-hf:card (\{.*\}) -->")


class Card:
    """The text of a README.md, taken apart.

    Args:
        text: of the file; "" if there is none.

    Raises:
        DataError: its metadata block is not what the Hub reads.
    """

    def __init__(self, text: str):
        self.newline = "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"
        block = REGEX_YAML_BLOCK.search(text)
        self._before, self._yaml, self._after = (
            (text[: block.start(2)], block[2], text[block.end(2) : block.end()]) if block else ("", "", "")
        )
        self._body = text[block.end() :] if block else text
        self.metadata = _read_metadata(self._yaml)
        self.record = _read_record(self._body)
        self.parts = {part[1]: _plain(part[3]) for part in _PART.finditer(self._body)}
        self._text = _plain(_RECORD.sub("", text))
        self.is_empty = not text.strip()

    @property
    def by_hand(self) -> bool:
        """Whether a person wrote it from scratch: there is a text, and no part of it was generated."""
        return bool(self._body.strip()) and not self.parts and not self.record

    @property
    def generated(self) -> set[str]:
        """Names of all parts and metadata that were generated, also of those that a person removed."""
        return {*self.record.get("parts", ()), *self.record.get("metadata", ())}

    @property
    def untouched(self) -> bool:
        """Whether it is, to the letter, what `update` gave, and nothing in it was ever a person's."""
        return self.record.get("text") == digest(self._text)

    def update(
        self,
        metadata: Mapping[str, Any],
        parts: Mapping[str, str],
        *,
        stated: Mapping[str, Any],
        keep: Collection[str] = (),
        **record: Any,
    ) -> tuple[str, list[str]]:
        """The text with everything generated brought up to date.

        Args:
            metadata: generated values by key.
            parts: generated texts by name, in the order of a new card.
            stated: metadata that a person asks for now, whatever was there.
            keep: names of metadata and parts that stay as they were, if they were generated before.
            **record: more to find in `record` next time; JSON.

        Returns:
            (text, names of what a person edited or removed and is therefore left as it is).
        """
        known: dict[str, str] = self.record.get("metadata", {})
        keep = {name for name in keep if name in known or name in self.parts}
        metadata = {key: value for key, value in metadata.items() if key not in keep and key not in stated}
        changes, edited = self._changes(metadata, known, keep)
        if self.by_hand:
            return self._joined({**changes, **stated}, self._body), edited

        parts = {name: text for name, text in parts.items() if name not in keep}
        body, edited_parts = self._refreshed(parts)
        made = {key: digest(value) for key, value in metadata.items()}
        known = {key: value for key, value in {**known, **made}.items() if key in made or key in keep}
        names = dict.fromkeys([*self.record.get("parts", ()), *self.parts, *parts])
        record |= {"parts": list(names), "metadata": known}
        text = self._joined({**changes, **stated}, self._appended(body, ""))
        if self.is_empty or self.untouched:
            record["text"] = digest(_plain(text))
        line = json.dumps(record).replace(">", "\\u003e")
        return f"{text}<!-- pplug-hf:card {line} -->{self.newline}", edited + edited_parts

    def _changes(
        self, metadata: Mapping[str, Any], known: Mapping[str, str], keep: Collection[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """(metadata to set, or to remove where None; keys that are a person's)."""
        changes: dict[str, Any] = {}
        edited = []
        for key, value in metadata.items():
            if (key not in self.metadata) if key not in known else self._is_generated(key, known):
                changes[key] = value
            elif self.metadata.get(key) != value:
                edited.append(key)
        for key in known:
            if key not in metadata and key not in keep and self._is_generated(key, known):
                changes[key] = None
        return changes, edited

    def _is_generated(self, key: str, known: Mapping[str, str]) -> bool:
        return key in self.metadata and digest(self.metadata[key]) == known[key]

    def _refreshed(self, parts: Mapping[str, str]) -> tuple[str, list[str]]:
        """The body with its untouched parts replaced and new ones behind them, and the names of the others."""
        edited = [name for name in self.record.get("parts", ()) if name in parts and name not in self.parts]

        def replaced(part: re.Match[str]) -> str:
            name, made, text = part.groups()
            if name not in parts:
                return part[0]
            if digest(_plain(text)) != made:
                edited.append(name)
                return part[0]
            return self._marked(name, parts[name])

        body = _PART.sub(replaced, self._body)
        new = [name for name in parts if name not in self.parts and name not in edited]
        for name in new:
            body = self._appended(body, self._marked(name, parts[name]))
        return body, list(dict.fromkeys(edited))

    def _marked(self, name: str, text: str) -> str:
        text = _plain(text)
        marked = f"<!-- pplug-hf:{name} {digest(text)} -->\n\n{text}\n\n<!-- /pplug-hf:{name} -->"
        return marked.replace("\n", self.newline)

    def _appended(self, body: str, text: str) -> str:
        body = _RECORD.sub("", body).rstrip()
        return (body + 2 * self.newline if body else self.newline) + text

    def _joined(self, changes: Mapping[str, Any], body: str) -> str:
        # The long one last.
        block = edit_metadata(self._yaml, dict(sorted(changes.items(), key=lambda change: change[0] == "model-index")))
        if block != self._yaml:
            block = block.replace("\r\n", "\n").replace("\n", self.newline)
        if self._before:
            return self._before + block + self._after + body
        gap = "" if body.startswith(("\n", "\r")) else self.newline
        return self.newline.join(["---", block, "---", gap]) + body


def edit_metadata(block: str, changes: Mapping[str, Any]) -> str:
    """A YAML mapping with some top-level keys set, or removed where None; the other lines stay as they are.

    Args:
        block: its text, without the lines of dashes.
        changes: new values by key.
    """
    old = _read_metadata(block)
    new = {key: value for key, value in {**old, **changes}.items() if changes.get(key, "") is not None}
    if new == old:
        return block
    lines = block.splitlines()
    try:
        for key, value in changes.items():
            start, end = _lines_of(key, "\n".join(lines))
            lines[start:end] = [] if value is None else _dump({key: value}).splitlines()
        edited = "\n".join(lines)
        if _read_metadata(edited) == new:
            return edited
    except (DataError, yaml.YAMLError):
        pass  # e.g. a mapping in braces has no line for each key
    return _dump(new)


def digest(value: Any) -> str:
    """A short fingerprint of a text or of a value of the metadata."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _plain(text: str) -> str:
    """A text as editors leave it alone: line ends and spaces in front of them do not count."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _dump(values: Mapping[str, Any]) -> str:
    return yaml_dump(dict(values), sort_keys=False).rstrip("\n")


def _lines_of(key: str, block: str) -> tuple[int, int]:
    """The lines [start, end) of a top-level key, without blank lines and comments behind it; the end if it is not there."""
    lines = block.splitlines()
    node = yaml.compose(block, Loader=yaml.SafeLoader)
    keys = [(name.value, name.start_mark.line) for name, _ in node.value] if node is not None else []
    for i, (name, start) in enumerate(keys):
        if name == key:
            end = keys[i + 1][1] if i + 1 < len(keys) else len(lines)
            while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
                end -= 1
            return start, end
    return len(lines), len(lines)


def _read_metadata(block: str) -> dict[str, Any]:
    try:
        _check_tokens(block)
        values = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark is not None else ""
        raise DataError(
            f"The metadata at the top of README.md, between the lines ---, is no YAML{where}: repair it, or remove it "
            "and it is made again."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DataError(
            f"The metadata at the top of README.md, between the lines ---, is a {type(values).__name__} and must be "
            "keys with values: repair it, or put a blank line and a title in front if it is meant as text."
        )
    return values


def _check_tokens(block: str) -> None:
    """Raise a `DataError` for what takes parsers ages: aliases, which can stand for a huge tree, and deep nesting."""
    depth = 0
    for token in yaml.scan(block, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise DataError("The metadata of README.md has a YAML alias (*name): write its value out.")
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if depth > _DEPTH:
            raise DataError(f"The metadata of README.md is nested more than {_DEPTH} levels deep: make it flat.")


def _read_record(body: str) -> dict[str, Any]:
    """The record; empty if there is none, or none of ours."""
    found = _RECORD.findall(body)
    try:
        record = json.loads(found[-1]) if found else {}
    except ValueError:
        return {}
    parts, metadata = record.get("parts", []), record.get("metadata", {})
    texts = isinstance(parts, list) and isinstance(metadata, dict) and [*parts, *metadata.values()]
    return record if texts is not False and all(isinstance(text, str) for text in texts) else {}
