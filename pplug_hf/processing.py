"""Prompts, histories, queries and answers to one model input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .errors import ConfigurationError, DataError, MismatchError, PPlugError
from .modeling.backbone import checked_tokenizer
from .modeling.personalizer import histories_of
from .modeling.plug_folder import check_tokenizer, load_config, open_location
from .storage.layout import CONFIG, PROCESSOR_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES
from .storage.location import HUB_ARGUMENTS
from .tasks.items import whole_texts

if TYPE_CHECKING:
    from .modeling import PPlugForConditionalGeneration

logger = logging.get_logger(__name__)

_SENTINEL = "\ue000persona\ue000"  # private use characters: no text of a user holds them


class PPlugProcessor(ProcessorMixin):
    """Makes the inputs of [`PPlugForConditionalGeneration`].

    Prompts and answers are tokenised for the backbone. Histories and requests stay what they are (texts, task items
    or finished [`Persona`]s), because only the encoder itself applies its prompts and templates exactly.

    Args:
        tokenizer: of the backbone.
        is_encoder_decoder: kind of backbone; a causal one gets prompt and answer in one sequence.
        chat_template: of chat models (default: the tokenizer's).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool = False, chat_template: Any = None
    ):
        self.is_encoder_decoder = is_encoder_decoder
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    @classmethod
    def from_model(
        cls, model: PPlugForConditionalGeneration, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> PPlugProcessor:
        """Create the processor of a model.

        Args:
            model: what the inputs are for.
            tokenizer: of the backbone, if the model does not know it; it will from then on.

        Returns:
            The processor for the model's backbone.

        Raises:
            ConfigurationError: no tokenizer is known.
        """
        if not hasattr(model, "plug") or not hasattr(model, "tokenizer"):
            raise ConfigurationError(
                f"PPlugProcessor.from_model takes a plug, got {type(model).__name__}: make one with "
                "PPlugForConditionalGeneration.from_backbone, or use PPlugProcessor(tokenizer, is_encoder_decoder)."
            )
        if checked_tokenizer(tokenizer) is not None:
            model.tokenizer = tokenizer
        if model.tokenizer is None:
            raise ConfigurationError(
                f"No tokenizer was found beside the backbone {model.config.backbone!r}: pass "
                "PPlugProcessor.from_model(model, tokenizer=...)."
            )
        return cls(model.tokenizer, is_encoder_decoder=model.config.is_encoder_decoder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> PPlugProcessor:
        """Load the processor of a plug, or one saved alone.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            **kwargs: where it is (revision, subfolder, token, cache_dir, local_files_only, force_download), and fields of
                the processor.

        Returns:
            The processor, all of whose files come from one commit.

        Raises:
            MissingFileError: there is none.
            HubError: the Hub refuses, or fails.
        """
        location = open_location(
            pretrained_model_name_or_path, **{k: kwargs.pop(k) for k in HUB_ARGUMENTS if k in kwargs}
        )
        check_tokenizer(location)
        try:
            return super().from_pretrained(location.folder((CONFIG, PROCESSOR_CONFIG, *TOKENIZER_FILES)), **kwargs)
        except PPlugError:
            raise
        except OSError as error:
            raise location.load_error(error, TOKENIZER_CONFIG) from error
        except Exception as error:  # tokenizers raises nothing more special
            raise DataError(
                f"The processor of {location.name!r} is damaged ({type(error).__name__}: {error}): download or save it again."
            ) from error

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings to build a processor from. A plug folder needs no processor files: its configuration has them."""
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "is_encoder_decoder" not in values:
            values["is_encoder_decoder"] = load_config(pretrained_model_name_or_path).is_encoder_decoder
        return values, unused

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        persona: Any = None,
        query: str | Sequence[str] | None = None,
        labels: str | Sequence[str] | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make one batch for `model(**batch)` or `model.generate(**batch)`.

        Args:
            text: prompts.
            persona: one history or [`Persona`] per prompt (a bare history for a single prompt).
            query: one request per prompt that weights the history (default: the model takes the prompt).
            labels: one answer per prompt. Causal models then get prompt + answer + EOS as `input_ids`.
            max_length: cut prompts to this many tokens.
            max_target_length: cut answers to this many tokens.
            return_tensors: "pt".

        Returns:
            `input_ids`, `attention_mask` [B, T] (causal: padded left; encoder-decoder: right), `labels` with -100
            where nothing is predicted, and `persona`, `query` as given, one per row.

        Raises:
            DataError: something that is no text, or a text where a history belongs.
            MismatchError: counts differ.
            ConfigurationError: rows of different lengths and a vocabulary without pad token.
        """
        if return_tensors != "pt":
            raise ConfigurationError(f"return_tensors must be 'pt', got {return_tensors!r}.")
        prompts = _rows(text, "text")
        rows = _rows_of(len(prompts), "prompts", persona=persona, query=query, labels=labels)
        prompt_ids = self._ids(prompts, max_length)
        answers = rows.pop("labels")
        batch: dict[str, Any] = {}
        if answers is not None:
            answer_ids = self._answer_ids(answers, max_target_length)
            if self.is_encoder_decoder:
                batch["labels"] = self._pad(answer_ids, -100, left=False)[0]
            else:
                ignored = [[-100] * len(p) for p in prompt_ids]
                batch["labels"] = self._pad(
                    [i + a for i, a in zip(ignored, answer_ids, strict=True)], -100, left=True
                )[0]
                prompt_ids = [p + a for p, a in zip(prompt_ids, answer_ids, strict=True)]
        ids, mask = self._pad(prompt_ids, self.tokenizer.pad_token_id, left=not self.is_encoder_decoder)
        batch = {"input_ids": ids, "attention_mask": mask, **batch}
        return BatchFeature(batch | {name: values for name, values in rows.items() if values is not None})

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        *,
        persona: Any = None,
        query: str | Sequence[str] | None = None,
        labels: bool | str | Sequence[str] | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        truncation: bool = False,
        max_length: int | None = None,
        padding: bool | str = True,
        **kwargs: Any,
    ) -> Any:
        """Apply the tokenizer's template, and add `persona_position`: the persona goes right in front of the last user's text.

        A batch to answer, and a batch to train on, whose chats end with the assistant's message:

            model.generate(**processor.apply_chat_template(chats, persona=histories, add_generation_prompt=True))
            model(**processor.apply_chat_template(chats, persona=histories, query=queries, labels=True)).loss

        The template alone writes special tokens such as BOS, as everywhere in transformers.

        Args:
            conversation: a list of messages, or a list of such lists. Contents are texts, or lists of text parts.
            persona: one history or [`Persona`] per chat (a bare history for a single chat).
            query: one text per chat that weights the history (default: the model takes the prompt).
            labels: True to train on the last message of each chat, which is the assistant's; or one answer per chat,
                which becomes that message. Its tokens and the end of the turn are the labels; where the template marks
                no end, EOS follows.
            tokenize, return_dict: both True for a batch; otherwise the result is the tokenizer's own.
            return_tensors: "pt".
            truncation, max_length: cut chats to this many tokens, as the tokenizer cuts.
            padding: to the longest chat.
            **kwargs: for the template: `add_generation_prompt`, `continue_final_message`, `tools`, `documents`,
                `chat_template`, and any variable of its own.

        Returns:
            `input_ids`, `attention_mask` [B, T], `persona_position` [B], and what was asked for of `labels`, `persona`,
            `query`, as of [`__call__`].

        Raises:
            DataError: no user message with text, contents that are no text, or no assistant's message to train on.
            MismatchError: counts differ.
            ConfigurationError: an option that does not go with the others, or a tokenizer that tells no offsets.
        """
        if not tokenize or not return_dict:
            if persona is not None or query is not None or labels:
                raise ConfigurationError("persona, query and labels make a batch: leave out tokenize and return_dict.")
            given = {
                "truncation": truncation,
                "max_length": max_length,
                "tokenize": tokenize,
                "return_dict": return_dict,
            }
            given |= {} if return_tensors == "pt" else {"return_tensors": return_tensors}
            given |= {} if padding is True else {"padding": padding}
            return self.tokenizer.apply_chat_template(conversation, **given, **kwargs)
        self._check_chat_options(return_tensors, padding, labels, kwargs)
        chats = _chats(conversation)
        rows = _rows_of(
            len(chats), "chats", persona=persona, query=query, labels=None if isinstance(labels, bool) else labels
        )
        answers = rows.pop("labels")
        if answers is not None:
            chats = [
                [*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, answers, strict=True)
            ]
        learn = labels is True or answers is not None
        rendered = [self._render(chat, learn, kwargs) for chat in chats]
        encoded = [
            self.tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                truncation=truncation or max_length is not None,
                max_length=max_length,
            )
            for text, *_ in rendered
        ]
        ids = [e["input_ids"] for e in encoded]
        offsets = [e["offset_mapping"] for e in encoded]
        position = [sum(end <= at for _, end in o) for o, (_, at, _) in zip(offsets, rendered, strict=True)]
        batch: dict[str, Any] = {}
        if learn and self.is_encoder_decoder:
            texts = [_text_of(chat[-1]) for chat in chats]
            batch["labels"] = self._pad(self._answer_ids(texts, None), -100, left=False)[0]
        elif learn:
            learnt = [
                [i if end > start else -100 for i, (_, end) in zip(row, o, strict=True)]
                for row, o, (_, _, start) in zip(ids, offsets, rendered, strict=True)
            ]
            for i, (text, *_) in enumerate(rendered):
                if not self._ends_turn(text) and self.tokenizer.eos_token_id is not None:
                    ids[i], learnt[i] = (
                        [*ids[i], self.tokenizer.eos_token_id],
                        [*learnt[i], self.tokenizer.eos_token_id],
                    )
                if set(learnt[i]) == {-100}:
                    raise DataError(
                        f"Nothing of the answer of chat {i} is left within max_length={max_length} tokens."
                    )
            batch["labels"] = self._pad(learnt, -100, left=True)[0]
        padded, mask = self._pad(ids, self.tokenizer.pad_token_id, left=not self.is_encoder_decoder)
        batch = {"input_ids": padded, "attention_mask": mask, "persona_position": torch.tensor(position), **batch}
        return BatchFeature(batch | {name: values for name, values in rows.items() if values is not None})

    def _check_chat_options(self, return_tensors: Any, padding: Any, labels: Any, kwargs: dict[str, Any]) -> None:
        if return_tensors not in ("pt", None) or padding not in (True, False, "longest"):
            raise ConfigurationError(
                f"A batch is return_tensors='pt', padded to its longest chat, got {return_tensors!r} and "
                f"padding={padding!r}; with return_dict=False the tokenizer's other forms are there."
            )
        for name in ("return_assistant_tokens_mask", "tokenizer_kwargs"):
            if kwargs.pop(name, None):
                raise ConfigurationError(
                    f"{name} is not supported: use labels=True, max_length= or return_dict=False."
                )
        if labels and kwargs.get("continue_final_message"):
            raise ConfigurationError("labels are the whole last message: leave out continue_final_message.")
        if not self.tokenizer.is_fast:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} does not say where its tokens are in a text, which tells the persona's "
                "position: load the fast tokenizer of this model."
            )

    def _render(self, chat: Any, learn: bool, template: dict[str, Any]) -> tuple[str, int, int]:
        """Return a chat as text, and the characters at which the last user's text and the labels begin."""

        def render(messages: Any, **options: Any) -> str:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **template | options)

        if not learn:
            text = render(chat)
            return text, _start(text, render(_mark(chat, "user"))), len(text)
        if not chat or chat[-1].get("role") != "assistant":
            raise DataError("labels=True trains on the last message of a chat, which must be the assistant's.")
        prompt, text = render(chat[:-1], add_generation_prompt=True), render(chat, add_generation_prompt=False)
        if not text.startswith(
            prompt
        ):  # e.g. a prompt that opens a thought, and a template that drops it from answers
            marked = render(_mark(chat, "assistant"), add_generation_prompt=False)
            text = prompt + text[_start(text, marked) :]
        start = len(prompt)
        at = _start(prompt, render(_mark(chat[:-1], "user"), add_generation_prompt=True))
        return (prompt if self.is_encoder_decoder else text), at, start

    def _ends_turn(self, text: str) -> bool:
        """Return true if a special token, and then at most white space, ends a chat: a model must learn to stop."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return text.rstrip().endswith((*special, *self.tokenizer.all_special_tokens))

    def decode_answers(self, generated: Any, prompt_length: int | None = None) -> list[str]:
        """Decode the output of `generate`.

        Args:
            generated: [B, L] token ids; -100 counts as padding.
            prompt_length: T of the `input_ids` given to a causal model, whose prompts `generate` repeats; 0 for answers
                alone, as of `Trainer.predict`.

        Returns:
            B texts, without special tokens and without a causal model's prompt.

        Raises:
            ConfigurationError: no `prompt_length` for a causal model.
        """
        if prompt_length is None and not self.is_encoder_decoder:
            raise ConfigurationError(
                "generate repeats the prompt of a causal model: pass prompt_length=inputs['input_ids'].shape[1], or 0 if "
                "these are answers alone."
            )
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        skip = 0 if self.is_encoder_decoder else prompt_length
        return [
            self.tokenizer.decode([pad if i < 0 else i for i in row[skip:]], skip_special_tokens=True).strip()
            for row in generated.tolist()
        ]

    def _ids(self, texts: list[str], max_length: int | None, **kwargs: Any) -> list[list[int]]:
        if max_length is None:
            return self.tokenizer(texts, **kwargs)["input_ids"]
        ids = self.tokenizer(texts, truncation=True, max_length=max_length + 1, **kwargs)["input_ids"]
        if all(len(row) <= max_length for row in ids):
            return ids
        logger.warning_once(
            f"A text is longer than max_length={max_length} tokens and loses its end: raise max_length, or put the question "
            "and the instruction first."
        )
        return self.tokenizer(texts, truncation=True, max_length=max_length, **kwargs)["input_ids"]

    def _answer_ids(self, answers: list[str], max_length: int | None) -> list[list[int]]:
        answers = whole_texts(answers)
        if self.is_encoder_decoder:
            encoded = self.tokenizer(text_target=answers, truncation=max_length is not None, max_length=max_length)
            return encoded["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        limit = None if max_length is None else max_length - len(end)
        return [ids + end for ids in self._ids(answers, limit, add_special_tokens=False)]

    def _pad(self, rows: list[list[int]], value: int | None, left: bool) -> tuple[Tensor, Tensor]:
        """Rows of token ids to [B, T] ids and mask."""
        width = max(map(len, rows))
        if value is None and any(len(row) < width for row in rows):
            raise ConfigurationError(
                "Prompts of different lengths need padding, and this vocabulary has no pad token: set one, e.g. "
                "processor.tokenizer.pad_token = processor.tokenizer.eos_token."
            )
        fill = [[value] * (width - len(row)) for row in rows]
        ids = [f + row if left else row + f for row, f in zip(rows, fill, strict=True)]
        mask = [
            [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
            for row, f in zip(rows, fill, strict=True)
        ]
        return torch.tensor(ids), torch.tensor(mask)


def _rows(texts: str | Sequence[str], name: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise DataError(f"{name} is empty: pass at least one text.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{name}[{i}] is a {type(text).__name__}, not a text.")
    return whole_texts(texts)


def _rows_of(count: int, prompts: str, *, persona: Any, query: Any, labels: Any) -> dict[str, Any]:
    """Return what goes with prompts, one of each per prompt, or None."""
    if isinstance(persona, str):
        raise DataError("persona is a history, a list of texts; got a single str: pass [text].")
    rows = {
        "persona": None if persona is None else list(histories_of(persona)),
        "query": None if query is None else _rows(query, "query"),
        "labels": None if labels is None else _rows(labels, "labels"),
    }
    for name, values in rows.items():
        if values is not None and len(values) != count:
            raise MismatchError(f"Got {len(values)} of {name} for {count} {prompts}: pass one per prompt.")
    return rows


def _chats(conversation: Any) -> list[list[dict[str, Any]]]:
    """Return a chat, or a list of chats, as a list of lists of messages whose texts are whole."""
    given = getattr(conversation, "messages", conversation)  # transformers' own Chat
    if isinstance(given, list | tuple) and given:
        chats = [given] if isinstance(given[0], Mapping) else [getattr(chat, "messages", chat) for chat in given]
        if all(isinstance(c, list | tuple) and all(isinstance(m, Mapping) for m in c) for c in chats):
            return [[_whole_message(message) for message in chat] for chat in chats]
    raise DataError(
        "A chat is a list of messages such as {'role': 'user', 'content': 'text'}, and a batch is a list of chats; got "
        f"a {type(conversation).__name__}{' that is empty' if isinstance(given, list) and not given else ''}."
    )


def _whole_message(message: Mapping[str, Any]) -> dict[str, Any]:
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


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _mark(chat: Sequence[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """Return the conversation with a sentinel in front of the text of the last message of a role."""
    for i in range(len(chat) - 1, -1, -1):
        content = chat[i].get("content")
        if chat[i].get("role") == role and content:
            if isinstance(content, str):
                marked: Any = _SENTINEL + content
            else:
                marked = [{**content[0], "text": _SENTINEL + content[0]["text"]}, *content[1:]]
            return [*chat[:i], {**chat[i], "content": marked}, *chat[i + 1 :]]
    raise DataError(f"A persona goes in front of a user's text, and none of the {len(chat)} messages is a user's.")


def _start(text: str, marked: str) -> int:
    """Return the character of a rendered chat at which its marked text begins."""
    if _SENTINEL not in marked:
        raise DataError(
            "The chat template does not write the last user's text, in front of which the persona goes: pass another "
            "chat_template=, or end the chat with the user's message."
        )
    return len(os.path.commonprefix([text, marked]))  # noqa: RUF071
