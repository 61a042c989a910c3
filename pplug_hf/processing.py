"""Prompts, histories, requests and answers to one model input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .errors import ConfigurationError, DataError, MismatchError, PPlugError
from .modeling.personalizer import histories_of
from .modeling.plug_folder import check_tokenizer, load_config, open_location
from .storage.layout import CONFIG, PROCESSOR_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES
from .storage.location import HUB_ARGUMENTS

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
        """The processor of a model.

        Args:
            model: what the inputs are for.
            tokenizer: of the backbone, if the model does not know it; it will from then on.

        Returns:
            The processor for the model's backbone.

        Raises:
            ConfigurationError: no tokenizer is known.
        """
        if tokenizer is not None:
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
        """The processor of a plug, or one saved alone.

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
        """What `from_pretrained` builds a processor of. A plug folder needs no processor files: its config says it."""
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
        """One batch for `model(**batch)` or `model.generate(**batch)`.

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
        if isinstance(persona, str):
            raise DataError("persona is a history, a list of texts; got a single str: pass [text].")
        rows = {
            "persona": None if persona is None else list(histories_of(persona)),
            "query": None if query is None else _rows(query, "query"),
            "labels": None if labels is None else _rows(labels, "labels"),
        }
        for name, values in rows.items():
            if values is not None and len(values) != len(prompts):
                raise MismatchError(f"Got {len(values)} of {name} for {len(prompts)} prompts: pass one per prompt.")
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

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the tokenizer's, plus `persona_position`: the persona goes right in front of the last user's text.

        Args:
            conversation: a list of messages, or a list of such lists.
            **kwargs: for the tokenizer's `apply_chat_template`. With `tokenize=True, return_dict=True` (the
                defaults here) the result also holds `persona_position` [B], to hand on to forward or generate.

        Raises:
            DataError: no user message with text.
        """
        kwargs.setdefault("tokenize", True)
        kwargs.setdefault("return_dict", True)
        if not kwargs["tokenize"] or not kwargs["return_dict"]:
            return self.tokenizer.apply_chat_template(conversation, **kwargs)
        single = not conversation or isinstance(conversation[0], dict)
        chats = [conversation] if single else conversation
        template = {k: kwargs[k] for k in _TEMPLATE_ARGUMENTS if k in kwargs}
        texts = [self.tokenizer.apply_chat_template(chat, tokenize=False, **template) for chat in chats]
        marked = [self.tokenizer.apply_chat_template(_mark(chat), tokenize=False, **template) for chat in chats]
        starts = [len(os.path.commonprefix(pair)) for pair in zip(texts, marked, strict=True)]  # noqa: RUF071
        # The template wrote BOS where it wants one; the tokenizer must not add another.
        encoded = [self.tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in texts]
        ids, mask = self._pad(
            [e["input_ids"] for e in encoded], self.tokenizer.pad_token_id, left=not self.is_encoder_decoder
        )
        position = [
            sum(end <= start for _, end in e["offset_mapping"]) for e, start in zip(encoded, starts, strict=True)
        ]
        batch = {"input_ids": ids, "attention_mask": mask, "persona_position": torch.tensor(position)}
        return BatchFeature(batch)

    def decode_answers(self, generated: Any, prompt_length: int | None = None) -> list[str]:
        """What `generate` returned, as texts.

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


# Arguments of apply_chat_template that change the rendered text.
_TEMPLATE_ARGUMENTS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "enable_thinking",
)


def _rows(texts: str | Sequence[str], name: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise DataError(f"{name} is empty: pass at least one text.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{name}[{i}] is a {type(text).__name__}, not a text.")
    return texts


def _mark(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a sentinel in front of the last user message's text."""
    for i in range(len(chat) - 1, -1, -1):
        if chat[i]["role"] == "user" and isinstance(chat[i]["content"], str):
            return [*chat[:i], {**chat[i], "content": _SENTINEL + chat[i]["content"]}, *chat[i + 1 :]]
    raise DataError(f"A persona goes in front of a user's text, and none of the {len(chat)} messages is a user's.")
