"""Prompts, histories, queries and answers to one model input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .chats import ChatTemplate, Message, Rendered, chats_of, last_user_text, text_of
from .configuration import PPlugConfig
from .configuration.queries import query_of
from .errors import ConfigurationError, DataError, MismatchError, PPlugError, kind_of
from .modeling.backbone import checked_tokenizer
from .modeling.persona import Personas
from .modeling.personalizer import histories_of
from .modeling.plug_folder import check_tokenizer, join_chat_templates, load_config, open_location
from .modeling.saving import save_options
from .storage.layout import CONFIG, PROCESSOR_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES
from .storage.location import HUB_ARGUMENTS
from .storage.replace import replacing
from .tasks.items import whole_texts

if TYPE_CHECKING:
    from .modeling import PPlugForConditionalGeneration

logger = logging.get_logger(__name__)

# Fields of the configuration that a processor needs.
_OF_PLUG = ("is_encoder_decoder", "placement", "chat", "system", "query_marker", "query_end")


class Row(NamedTuple):
    """A prompt as tokens."""

    ids: list[int]
    position: int  # tokens in front of the soft prompt
    answer: list[int]  # tokens to learn; a causal model reads them behind the prompt
    text: tuple[int, int] = (0, 0)  # where in it the user's text begins and ends


class PPlugProcessor(ProcessorMixin):
    """Makes the inputs of [`PPlugForConditionalGeneration`].

    Prompts and answers are tokenised for the backbone. Histories and requests stay what they are (texts, task items
    or finished [`Persona`]s), because only the encoder itself applies its prompts and templates exactly.

    Args:
        tokenizer: of the backbone.
        is_encoder_decoder: kind of backbone; a causal one gets prompt and answer in one sequence.
        chat_template: of chat models (default: the tokenizer's).
        placement: of the plug: where the soft prompt stands, "prompt" or "answer".
        chat: whether prompts are written as a user's turn of the chat template.
        system: system text of these chats (default: what the template does without one).
        query_marker, query_end: of the plug: texts of a prompt between which its query stands.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool = False,
        chat_template: str | dict[str, str] | None = None,
        placement: str = "prompt",
        chat: bool = False,
        system: str | None = None,
        query_marker: str = "",
        query_end: str = "",
    ):
        self.is_encoder_decoder, self.placement = is_encoder_decoder, placement
        self.chat, self.system = chat, system
        self.query_marker, self.query_end = query_marker, query_end
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
                f"No tokenizer was found beside the backbone {model.config.backbone!r}, or it is code of its repository, which is "
                "not run: pass PPlugProcessor.from_model(model, tokenizer=...)."
            )
        return cls.from_config(model.config, model.tokenizer)

    @classmethod
    def from_config(cls, config: PPlugConfig, tokenizer: PreTrainedTokenizerBase) -> PPlugProcessor:
        """Create the processor of a plug, which writes prompts as its training did.

        Args:
            config: of the plug.
            tokenizer: of its backbone.

        Returns:
            The processor.
        """
        return cls(tokenizer, **{name: getattr(config, name) for name in _OF_PLUG})

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
        if any(name not in values for name in _OF_PLUG):
            config = load_config(pretrained_model_name_or_path)
            values = {**{name: getattr(config, name) for name in _OF_PLUG}, **values}
        return values, unused

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the processor's files, as a rule into the folder of a plug.

        The folder holds the old files or the new ones, also if the process is killed meanwhile.

        Args:
            save_directory: a new folder, one of a plug, or one of a processor alone.
            push_to_hub: upload them afterwards; `kwargs` then go to `push_to_hub`, `repo_id` by default is the folder's name.
            **kwargs: options of `push_to_hub`.

        Returns:
            The path of the processor's settings, as in transformers.

        Raises:
            ConfigurationError: the folder holds another kind of model, or an option is unknown.
        """
        options = save_options(kwargs, self.push_to_hub)
        with replacing(save_directory) as staging:
            super().save_pretrained(staging)
            join_chat_templates(Path(staging))
        if push_to_hub:
            self.push_to_hub(options.pop("repo_id", os.path.basename(os.path.abspath(save_directory))), **options)
        return [os.path.join(save_directory, PROCESSOR_CONFIG)]

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        persona: Personas | EllipsisType = ...,
        query: str | Sequence[str] | None = None,
        labels: str | Sequence[str] | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
        persona_offset: Sequence[int | None] | None = None,
        turns: Sequence[Sequence[tuple[str, str]]] | None = None,
        return_tensors: str | None = "pt",
        truncation: bool = False,
        padding: bool | str = True,
    ) -> BatchFeature:
        """Make one batch for `model(**batch)` or `model.generate(**batch)`.

        Args:
            text: prompts. Where the processor writes chats, each is the text of a user's turn.
            persona: one history or [`Persona`] per prompt (a bare history for a single prompt); None for nobody. Leave it out
                to give it to the model with the batch, `model.generate(**batch, persona=...)`.
            query: one request per prompt that weights the history (default: what the plug takes from the prompt).
            labels: one answer per prompt. Causal models then get prompt + answer + end as `input_ids`.
            max_length: most tokens of a prompt, its chat template included. A longer one loses the middle of its text, with
                a warning.
            max_target_length: most tokens of an answer, its end included. A longer one loses what comes before its end,
                with a warning.
            persona_offset: number of characters of each prompt in front of the soft prompt (default, and None for a prompt:
                what the plug's placement says).
            turns: earlier turns of each chat, the user's text and the answer of each.
            return_tensors: "pt".
            truncation: without a max_length, take what the tokenizer knows of the model.
            padding: to the longest row.

        Returns:
            `input_ids`, `attention_mask` [B, T] (causal: padded left; encoder-decoder: right), `labels` with -100
            where nothing is predicted, and `persona`, `query` as given, one per row; in chats, or with offsets,
            `persona_position` [B], too, and if no persona is given, `query_mask` [B, T], ones at the user's text.

        Raises:
            DataError: something that is not a text, a text where a history belongs, or a template that has no room for a
                text within max_length.
            MismatchError: counts differ.
            ConfigurationError: rows of different lengths and a vocabulary without pad token, a tokenizer that does not
                tell where its tokens are in a text, which chats and offsets need, or another form of batch.
        """
        _check_form(return_tensors, padding)
        prompts = _rows(text, "text")
        later = persona is ...
        given = _rows_of(len(prompts), "prompts", persona=None if later else persona, query=query, labels=labels)
        answers = given.pop("labels")
        if self.chat and given["persona"] is not None and query is None:
            given["query"] = list(map(self.query_of, prompts))  # not in the whole chat
        if truncation and max_length is None:
            max_length = self.tokenizer.model_max_length
        rows = self.rows(prompts, answers, persona_offset, turns, max_length, max_target_length)
        positions = self.chat or persona_offset is not None
        return self._batch(rows, answers is not None, given, positions, texts=positions and later and query is None)

    def room(self, max_length: int) -> int:
        """Return how many tokens of a text a prompt has room for, besides special tokens and the template of a chat.

        Args:
            max_length: most tokens of the prompt.
        """
        return (
            max_length - len(self.rows(["?"])[0].ids) + len(self.tokenizer("?", add_special_tokens=False)["input_ids"])
        )

    def length_notes(
        self,
        prompts: Sequence[str],
        max_length: int,
        answers: Sequence[str] = (),
        max_target_length: int | None = None,
    ) -> list[str]:
        """Return a sentence about prompts, and one about answers, that are longer than their budget and are cut.

        Args:
            prompts: n of them.
            max_length: tokens of a prompt, the template of a chat included.
            answers: to learn from; any number.
            max_target_length: tokens of an answer, its end included.
        """
        notes = []
        if cut := self._longer(prompts, self.room(max_length)):
            notes.append(
                f"{cut} of {len(prompts)} prompts have more than max_length={max_length} tokens and lose the middle of "
                "their text."
            )
        if max_target_length is None or not answers:
            return notes
        around = len(self.answer_ids(["?"])[0]) - len(self.tokenizer("?", add_special_tokens=False)["input_ids"])
        if cut := self._longer(answers, max_target_length - around):
            notes.append(
                f"{cut} of {len(answers)} answers have more than max_target_length={max_target_length} tokens and are "
                "learned as if they ended there."
            )
        return notes

    def _longer(self, texts: Sequence[str], limit: int) -> int:
        """Return how many texts have more tokens than that."""
        given = {"add_special_tokens": False, "truncation": True, "max_length": max(limit, 0) + 1}
        return sum(len(ids) > limit for ids in self.tokenizer(whole_texts([*texts]), **given)["input_ids"])

    def rows(
        self,
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        persona_offset: Sequence[int | None] | None = None,
        turns: Sequence[Sequence[tuple[str, str]]] | None = None,
        max_length: int | None = None,
        max_target_length: int | None = None,
    ) -> list[Row]:
        """Return each prompt as tokens. Arguments and errors as in [`__call__`]."""
        _check_lengths(max_length=max_length, max_target_length=max_target_length)
        for name, values in (("persona_offset", persona_offset), ("turns", turns)):
            if values is not None and len(values) != len(prompts):
                raise MismatchError(f"Got {len(values)} of {name} for {len(prompts)} prompts: pass one per prompt.")
        given = [None] * len(prompts) if persona_offset is None else persona_offset
        offsets = [None if offset is None else int(offset) for offset in given]
        if self.chat:
            chats = [self._chat(text, past) for text, past in zip(prompts, turns or [()] * len(prompts), strict=True)]
            if answers is not None:
                chats = [[*chat, _answered(text)] for chat, text in zip(chats, answers, strict=True)]
            template = self._template(add_generation_prompt=True)
            return self._chat_rows(chats, answers is not None, template, offsets, max_length, max_target_length)
        if turns is not None:
            raise ConfigurationError(
                "turns are earlier turns of a chat, and this processor writes none: leave them out."
            )
        if getattr(self.tokenizer, "chat_template", None):
            logger.warning_once(
                "This language model has a chat template and is given texts without it, which it was hardly trained on: "
                "make the plug with chat='auto', or use processor.apply_chat_template."
            )
        answer_ids = [[]] * len(prompts) if answers is None else self._answer_ids([*answers], max_target_length)
        if persona_offset is not None:
            usual = [len(text) if self.placement == "answer" else 0 for text in prompts]
            offsets = [place if offset is None else offset for offset, place in zip(offsets, usual, strict=True)]
        return self._prompt_rows([*prompts], answer_ids, offsets, max_length)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: object,
        *,
        persona: Personas | EllipsisType = ...,
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
        """Apply the tokenizer's template, and add `persona_position`: in front of the last user's text, or behind it.

        A batch to answer, and a batch to train on, whose chats end with the assistant's message:

            model.generate(**processor.apply_chat_template(chats, persona=histories, add_generation_prompt=True))
            model(**processor.apply_chat_template(chats, persona=histories, query=queries, labels=True)).loss

        The template alone writes special tokens such as BOS, as everywhere in transformers. In a conversation of several
        turns the soft prompt stands with the last user's text alone, so nothing of the earlier turns depends on it.

        Args:
            conversation: a list of messages, or a list of such lists. Contents are texts, or lists of text parts.
            persona: one history or [`Persona`] per chat (a bare history for a single chat), None or left out, as of
                [`__call__`].
            query: one text per chat that weights the history (default: what the plug takes from the last user's text).
            labels: True to train on the last message of each chat, which is the assistant's; or one answer per chat,
                which becomes that message. Its tokens and the end of the turn are the labels; where the template marks
                no end, EOS follows.
            tokenize, return_dict: both True for a batch; otherwise the result is the tokenizer's own.
            return_tensors: "pt".
            truncation, max_length: most tokens of a chat (with truncation alone: what the tokenizer knows of the model). In a
                longer one the last user's text loses its middle, with a warning.
            padding: to the longest chat.
            **kwargs: for the template: `add_generation_prompt`, `continue_final_message`, `tools`, `documents`,
                `chat_template`, and any variable of its own.

        Returns:
            `input_ids`, `attention_mask` [B, T], `persona_position` [B], and what was asked for of `labels`, `persona`,
            `query`, or `query_mask`, as of [`__call__`].

        Raises:
            DataError: no user message with text, contents that are not text, no assistant's message to train on, a template
                that refuses the chat, or no room within max_length.
            MismatchError: counts differ.
            ConfigurationError: an option that does not go with the others, or a tokenizer that tells no offsets.
        """
        later = persona is ...
        persona = None if later else persona
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
        _check_form(return_tensors, padding, " With return_dict=False the tokenizer's other forms are there.")
        _check_lengths(max_length=max_length)
        _check_chat_options(labels, kwargs)
        chats = chats_of(conversation)
        given = _rows_of(
            len(chats), "chats", persona=persona, query=query, labels=None if isinstance(labels, bool) else labels
        )
        answers = given.pop("labels")
        learn = labels is True or answers is not None
        if persona is not None and query is None:
            given["query"] = [self.query_of(last_user_text(chat)) for chat in chats]
        if answers is not None:
            chats = [[*chat, _answered(text)] for chat, text in zip(chats, answers, strict=True)]
        if truncation and max_length is None:
            max_length = self.tokenizer.model_max_length
        rows = self._chat_rows(chats, learn, self._template(**kwargs), [None] * len(chats), max_length)
        return self._batch(rows, learn, given, positions=True, texts=later and query is None)

    def query_of(self, text: str) -> str:
        """Return what weights the history where no query is given, see [`PPlugConfig`].

        Args:
            text: the prompt; of a chat, the last text of the user.
        """
        return query_of(text, self.query_marker, self.query_end)

    def with_system(self, chat: Sequence[Message]) -> list[Message]:
        """Return a chat with the processor's system text, as training wrote it, unless it brings a system text of its own.

        Args:
            chat: messages, at least one. Where the template has no system turn, the first user's turn takes the text in.
        """
        if chat[0].get("role") in ("system", "developer"):
            return [*chat]
        return self._template(add_generation_prompt=True).with_system(chat, self.system)

    # ---- the steps -----------------------------------------------------------------------------------------

    def _template(self, **options: Any) -> ChatTemplate:
        own = {"chat_template": self.chat_template} if isinstance(self.chat_template, str) else {}
        return ChatTemplate(self.tokenizer, **own | options)

    def _chat(self, text: str, turns: Sequence[tuple[str, str]] = ()) -> list[Message]:
        """Return a prompt as a chat: the system text, earlier turns, then the prompt as the user's text."""
        said = [m for question, answer in turns for m in ({"role": "user", "content": question}, _answered(answer))]
        return self.with_system([*said, {"role": "user", "content": text}])

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the tokens of answers as a model learns to write them, with their end.

        Args:
            answers: texts.
        """
        if not self.chat or self.is_encoder_decoder:
            return self._answer_ids(list(answers), None)
        chats = [[*self._chat("?"), _answered(answer)] for answer in answers]
        template = self._template(add_generation_prompt=True)
        return [row.answer for row in self._chat_rows(chats, True, template, [None] * len(chats))]

    def _chat_rows(
        self,
        chats: Sequence[Sequence[Message]],
        learn: bool,
        template: ChatTemplate,
        offsets: Sequence[int | None],
        max_length: int | None = None,
        max_target_length: int | None = None,
    ) -> list[Row]:
        """Return chats as tokens, of which the last user's text is cut if they are too long."""
        self._check_offsets()
        rendered = [template.lesson(chat) if learn else template.prompt(chat) for chat in chats]
        texts = [r.text[: r.answer] for r in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = []
        for i, (r, ids, spans) in enumerate(
            zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            start = sum(end <= r.user[0] for _, end in spans)
            stop = max(start, sum(begin < r.user[1] for begin, _ in spans))
            place = {"prompt": start, "answer": stop}[self.placement]
            if (offset := offsets[i]) is not None:
                place = sum(end <= r.user[0] + offset for _, end in spans)
            answer = []
            if learn and self.is_encoder_decoder:
                answer = self._answer_ids([text_of(chats[i][-1])], max_target_length)[0]
            elif learn:
                answer = self._behind(ids, r)
                ended = template.ends_turn(r.text) or self.tokenizer.eos_token_id is None
                answer = answer if ended else [*answer, self.tokenizer.eos_token_id]
                answer = _cut_answer(answer, 1, max_target_length)
            kept, place = self._cut(ids, place, (start, stop), max_length)
            rows.append(Row(kept, place, answer, (start, stop - len(ids) + len(kept))))
        return rows

    def _behind(self, prompt: list[int], lesson: Rendered) -> list[int]:
        """Return the tokens of the answer in a lesson, as a model writes them behind the tokens of its prompt."""
        whole = self.tokenizer(lesson.text, add_special_tokens=False, verbose=False)["input_ids"]
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # A token across the border, as of a prompt that ends with a space: the model would be asked without it.
        return self.tokenizer(lesson.text[lesson.answer :], add_special_tokens=False, verbose=False)["input_ids"]

    def _prompt_rows(
        self, prompts: list[str], answers: list[list[int]], offsets: Sequence[int | None], max_length: int | None
    ) -> list[Row]:
        """Return prompts as tokens, without the middle of those that are too long."""
        placed = any(offset is not None for offset in offsets)
        if placed:
            self._check_offsets()
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if placed else {}
        encoded = self.tokenizer(prompts, verbose=False, **options)
        rows = []
        for i, (ids, answer) in enumerate(zip(encoded["input_ids"], answers, strict=True)):
            place = 0
            if (offset := offsets[i]) is not None and (
                offset or not self.is_encoder_decoder
            ):  # 0: in front of its BOS
                words = [at for at, special in enumerate(encoded["special_tokens_mask"][i]) if not special]
                behind = [at for at in words if encoded["offset_mapping"][i][at][1] > offset]
                place = behind[0] if behind else words[-1] + 1 if words else len(ids)
            kept, place = self._cut(ids, place, (0, len(ids)), max_length)
            rows.append(Row(kept, place, answer, (0, len(kept))))
        return rows

    def _cut(self, ids: list[int], place: int, text: tuple[int, int], max_length: int | None) -> tuple[list[int], int]:
        """Return a prompt without the middle of its text, and the place in it of a place in the whole.

        A prompt begins with its instruction and ends with its question, as a rule; what it can spare is in between.
        """
        if max_length is None or (excess := len(ids) - max_length) <= 0:
            return ids, place
        room = text[1] - text[0] - excess
        if room < 1:
            raise DataError(
                f"The chat template needs {len(ids) - text[1] + text[0]} tokens around the user's text, which leaves none "
                f"within max_length={max_length}: raise max_length."
            )
        logger.warning_once(
            f"A prompt is longer than max_length={max_length} tokens and loses the middle of its text: raise max_length, or "
            "shorten the prompts."
        )
        at = text[0] + (room + 1) // 2
        return ids[:at] + ids[at + excess :], place if place <= at else max(at, place - excess)

    def _batch(
        self, rows: list[Row], learn: bool, given: Mapping[str, object], positions: bool, texts: bool
    ) -> BatchFeature:
        """Return rows as one batch with what goes with them."""
        batch: dict[str, object] = {}
        prompts = [row.ids for row in rows]
        if learn and self.is_encoder_decoder:
            batch["labels"] = self._pad([row.answer for row in rows], -100, left=False)[0]
        elif learn:
            batch["labels"] = self._pad([[-100] * len(r.ids) + r.answer for r in rows], -100, left=True)[0]
            prompts = [row.ids + row.answer for row in rows]
        if positions:
            batch["persona_position"] = torch.tensor([row.position for row in rows])
        left = not self.is_encoder_decoder
        if texts:
            spans = [(*row.text, len(ids)) for row, ids in zip(rows, prompts, strict=True)]
            asked = [[0] * start + [1] * (stop - start) + [0] * (length - stop) for start, stop, length in spans]
            batch["query_mask"] = self._pad(asked, 0, left)[0]
        ids, mask = self._pad(prompts, self.tokenizer.pad_token_id, left)
        batch = {"input_ids": ids, "attention_mask": mask, **batch}
        return BatchFeature(batch | {name: values for name, values in given.items() if values is not None})

    def _check_offsets(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigurationError(
                f"{type(self.tokenizer).__name__} does not say where its tokens are in a text, which tells the persona's "
                "position: load the fast tokenizer of this model."
            )

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
            DataError: something else than rows of token ids.
        """
        if prompt_length is None and not self.is_encoder_decoder:
            raise ConfigurationError(
                "generate repeats the prompt of a causal model: pass prompt_length=inputs['input_ids'].shape[1], or 0 if "
                "these are answers alone."
            )
        generated = getattr(generated, "sequences", generated)  # of a ModelOutput
        rows = generated.tolist() if hasattr(generated, "tolist") else generated
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise DataError(f"generated must be token ids [B, L], as generate returns them, got {kind_of(generated)}.")
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        skip = 0 if self.is_encoder_decoder else prompt_length
        return [
            self.tokenizer.decode([pad if i < 0 else i for i in row[skip:]], skip_special_tokens=True).strip()
            for row in rows
        ]

    def _answer_ids(self, answers: list[str], max_length: int | None) -> list[list[int]]:
        answers = whole_texts(answers)
        if self.is_encoder_decoder:
            encoded = self.tokenizer(text_target=answers, verbose=False)["input_ids"]
            if max_length is None or all(len(ids) <= max_length for ids in encoded):
                return encoded
            _warn_of_cut_answer(max_length)
            return self.tokenizer(text_target=answers, truncation=True, max_length=max_length)["input_ids"]
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
        return [_cut_answer(ids + end, len(end), max_length) for ids in encoded]

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
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise DataError(f"{name} must be a text or a list of texts, got {kind_of(texts)}.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise DataError(f"{name} is empty: pass at least one text.")
    for i, text in enumerate(texts):
        messages = text if isinstance(text, list | tuple) else [text]
        if name == "text" and messages and isinstance(messages[0], Mapping) and "role" in messages[0]:
            raise DataError(f"text[{i}] belongs to a chat: use processor.apply_chat_template(chat, persona=..., ...).")
        if not isinstance(text, str):
            raise DataError(f"{name}[{i}] is {kind_of(text)}, not a text.")
    return whole_texts(texts)


def _rows_of(
    count: int, prompts: str, *, persona: object, query: str | Sequence[str] | None, labels: str | Sequence[str] | None
) -> dict[str, Any]:
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


def _cut_answer(ids: list[int], end: int, max_length: int | None) -> list[int]:
    """Return an answer without the tokens that are too many, which stand before its end of 0 or 1 token."""
    if max_length is None or len(ids) <= max_length:
        return ids
    _warn_of_cut_answer(max_length)
    return [*ids[: max_length - end], *ids[len(ids) - end :]]


def _warn_of_cut_answer(max_length: int) -> None:
    logger.warning_once(
        f"An answer is longer than max_target_length={max_length} tokens and is learned as if it ended there: raise "
        "max_target_length, or shorten the answers."
    )


def _answered(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _check_form(return_tensors: str | None, padding: bool | str, remedy: str = "") -> None:
    if return_tensors not in ("pt", None) or padding not in (True, False, "longest"):
        raise ConfigurationError(
            f"A batch is return_tensors='pt', padded to its longest row, got {return_tensors!r} and padding={padding!r}."
            f"{remedy}"
        )


def _check_lengths(**lengths: int | None) -> None:
    for name, length in lengths.items():
        if length is not None and length < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {length}.")


def _check_chat_options(labels: object, kwargs: dict[str, object]) -> None:
    for name in ("return_assistant_tokens_mask", "tokenizer_kwargs"):
        if kwargs.pop(name, None):
            raise ConfigurationError(f"{name} is not supported: use labels=True, max_length= or return_dict=False.")
    if labels and kwargs.get("continue_final_message"):
        raise ConfigurationError("labels are the whole last message: leave out continue_final_message.")
