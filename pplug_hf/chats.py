"""Conversations in a tokenizer's chat template: their text, the persona's place in it, and where the answer begins.

The persona belongs to the last user's turn: in front of its text (placement "prompt") or behind it (placement "answer"), so
that earlier turns never depend on it. Where that is in a rendered chat is found by rendering it once more with a mark.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .errors import DataError, PPlugError, kind_of
from .tasks.items import whole_texts

_SENTINEL = "\ue000persona\ue000"  # private use characters: no text of a user holds them

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """A chat as text; places in it are characters."""

    text: str
    user: tuple[int, int]  # the last user's text
    answer: int  # where the answer to learn begins; the end if there is none


class ChatTemplate:
    """The chat template of a tokenizer, with what a call says about it.

    Args:
        tokenizer: whose template it is.
        **options: for `apply_chat_template`: `add_generation_prompt`, `tools`, any variable of the template.
    """

    def __init__(self, tokenizer: Any, **options: Any):
        self.tokenizer, self.options = tokenizer, options

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Return a chat as text. A template that reads texts alone gets the text parts of a message joined.

        Raises:
            DataError: the template refuses it.
        """
        if any(map(_in_parts, messages)) and not self._reads_parts:
            messages = [{**m, "content": text_of(m)} if _in_parts(m) else m for m in messages]
        return self._render(messages, **options)

    @cached_property
    def _reads_parts(self) -> bool:
        """Return true if the template writes the text of parts, not Python's form of a list, where the sentinel is escaped."""
        try:
            return _SENTINEL in self._render([{"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}])
        except DataError:
            return False

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options | options)
        except PPlugError:
            raise
        except Exception as error:  # a template is a program of its own, and may raise anything
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(
                f"The chat template of this tokenizer refuses the chat of the roles {roles} ({error}): pass other "
                "messages or another chat_template=, or leave the template out (chat='never')."
            ) from error

    def prompt(self, chat: Sequence[Message]) -> Rendered:
        """Return a chat to answer.

        Raises:
            DataError: it has no user's text, or the template leaves it out or refuses the chat.
        """
        text = self.render(chat)
        return Rendered(text, self._user(chat, text), len(text))

    def lesson(self, chat: Sequence[Message]) -> Rendered:
        """Return a chat to learn from, whose last message is the answer.

        Raises:
            DataError: as `prompt`; or the last message is not the assistant's.
        """
        if not chat or chat[-1].get("role") != "assistant":
            raise DataError("labels=True trains on the last message of a chat, which must be the assistant's.")
        prompt = self.render(chat[:-1], add_generation_prompt=True)
        text = self.render(chat, add_generation_prompt=False)
        if not text.startswith(
            prompt
        ):  # e.g. a prompt that opens a thought, and a template that drops it from answers
            text = prompt + text[_start(text, self.render(_mark(chat, "assistant"), add_generation_prompt=False)) :]
        text = text.rstrip() if self.ends_turn(text) else text  # nothing is learnt behind the end of the turn
        return Rendered(text, self._user(chat[:-1], prompt, add_generation_prompt=True), len(prompt))

    def _user(self, chat: Sequence[Message], text: str, **options: Any) -> tuple[int, int]:
        """Return the characters at which the last user's text begins and ends."""
        start = _start(text, self.render(_mark(chat, "user"), **options))
        behind = self.render(_mark(chat, "user", behind=True), **options)
        return start, max(start, len(text) - _start(text[::-1], behind[::-1], _SENTINEL[::-1]))

    def with_system(self, chat: Sequence[Message], system: str | None) -> list[Message]:
        """Return a chat with a system text in front, inside the first user's turn if the template has no system's turn."""
        if system is None:
            return [*chat]
        try:
            if _SENTINEL in self.render([{"role": "system", "content": system + _SENTINEL}, *chat]):
                return [{"role": "system", "content": system}, *chat]
        except DataError:
            pass
        if not system:
            return [*chat]
        first = next((i for i, message in enumerate(chat) if message.get("role") == "user"), 0)
        joined = {**chat[first], "content": f"{system}\n\n{text_of(chat[first])}"}
        return [*chat[:first], joined, *chat[first + 1 :]]

    def ends_turn(self, text: str) -> bool:
        """Return true if a special token, and then at most white space, ends a chat: a model must learn to stop."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return text.rstrip().endswith((*special, *self.tokenizer.all_special_tokens))


def chats_of(conversation: object) -> list[list[dict[str, object]]]:
    """Return a chat, or a list of chats, as a list of lists of messages whose texts are whole.

    Raises:
        DataError: something else, or messages with other parts than texts.
    """
    given = getattr(conversation, "messages", conversation)  # transformers' own Chat
    if isinstance(given, list | tuple) and given:
        chats = [given] if isinstance(given[0], Mapping) else [getattr(chat, "messages", chat) for chat in given]
        if all(isinstance(c, list | tuple) and all(isinstance(m, Mapping) for m in c) for c in chats):
            return [[_whole_message(message) for message in chat] for chat in chats]
    raise DataError(
        "A chat is a list of messages such as {'role': 'user', 'content': 'text'}, and a batch is a list of chats; got "
        f"{kind_of(conversation)}{' that is empty' if isinstance(given, list) and not given else ''}."
    )


def text_of(message: Message) -> str:
    """Return the text of a message, whose content may be parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _in_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list)


def last_user_text(chat: Sequence[Message]) -> str:
    """Return the text of the last user's message."""
    return next((text_of(message) for message in reversed(chat) if message.get("role") == "user"), "")


def _whole_message(message: Message) -> dict[str, object]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": whole_texts([content])[0]}
    if content is None:  # a call of a tool
        return dict(message)
    parts = list(content) if isinstance(content, list | tuple) else []
    for part in parts or [content]:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", "mapping") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f"The content of a message is a text or a list of parts {{'type': 'text', 'text': ...}}, got a part of "
                f"type {kind!r}: a persona stands among texts alone, so leave it out."
            )
    return {**message, "content": [{**part, "text": whole_texts([part["text"]])[0]} for part in parts]}


def _mark(chat: Sequence[Message], role: str, behind: bool = False) -> list[Message]:
    """Return the conversation with a sentinel in front of the text of the last message of a role, or behind it."""

    def marked(text: str) -> str:
        # Templates strip white space, also in front of what they add themselves.
        return text.rstrip() + _SENTINEL if behind else _SENTINEL + text

    for i in range(len(chat) - 1, -1, -1):
        content = chat[i].get("content")
        if chat[i].get("role") == role and content:
            if isinstance(content, str):
                return [*chat[:i], {**chat[i], "content": marked(content)}, *chat[i + 1 :]]
            at = -1 if behind else 0
            parts = [*content]
            parts[at] = {**parts[at], "text": marked(parts[at]["text"])}
            return [*chat[:i], {**chat[i], "content": parts}, *chat[i + 1 :]]
    raise DataError(f"A persona goes in front of a user's text, and none of the {len(chat)} messages is a user's.")


def _start(text: str, marked: str, sentinel: str = _SENTINEL) -> int:
    """Return the character of a rendered chat at which its marked text begins."""
    if sentinel not in marked:
        raise DataError(
            "The chat template does not write the last user's text, in front of which the persona goes: pass another "
            "chat_template=, or end the chat with the user's message."
        )
    return len(os.path.commonprefix([text, marked]))  # noqa: RUF071
