"""`pipeline("personalized-text-generation", model=plug)`: prompts and histories in, texts out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModel, GenerationConfig, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .chats import last_user_text, text_of
from .errors import ConfigurationError, DataError, MismatchError, kind_of

if TYPE_CHECKING:
    from .modeling import PPlugForConditionalGeneration
    from .processing import PPlugProcessor

TASK = "personalized-text-generation"
_UNSET = ...  # None is a choice of its own: an answer without any plug


@dataclass
class _Request:
    """A prompt and its user, on their way through the pipeline."""

    prompt: Any  # a text, or the messages of a chat
    persona: object
    query: str | None
    plug: object
    strength: float | None
    writer: str  # the plug whose tokenizer wrote the prompt and reads the answer, and whose end tokens end it


class PersonalizedTextGenerationPipeline(Pipeline):
    """A pipeline that answers prompts, each for its own user.

    Made by `pipeline("personalized-text-generation", model=...)` from a plug folder, a Hub id or a loaded
    [`PPlugForConditionalGeneration`]; see [`__call__`]. Everything that `__call__` takes by name can also be given here,
    as the default of all calls: `persona=history` makes a pipeline for one user.
    """

    model: PPlugForConditionalGeneration
    tokenizer: Any  # a PreTrainedTokenizerBase, whose `decode` gives a text or a list by its argument
    processor: PPlugProcessor

    _pipeline_calls_generate = True
    # The model has its tokenizer, and the processor is made from it.
    _load_tokenizer = _load_processor = False
    _load_image_processor = _load_video_processor = _load_feature_extractor = False
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(
        self,
        model: object,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: PPlugProcessor | None = None,
        device: int | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        from .modeling import PPlugForConditionalGeneration
        from .processing import PPlugProcessor

        if not isinstance(model, PPlugForConditionalGeneration):
            raise ConfigurationError(
                f"{TASK!r} needs a plug, got {kind_of(model)}: put one on it with "
                "PPlugForConditionalGeneration.from_backbone."
            )
        if kwargs.get("assistant_model") is not None:
            raise ConfigurationError("An assistant_model would draft without the persona: leave it out.")
        if processor is None:
            processor = PPlugProcessor.from_model(model, tokenizer)
        self._served = model.active_plug  # whose the processor is
        placed = getattr(model.backbone, "hf_device_map", None) is not None  # by accelerate
        if device is None and placed and not hasattr(model, "hf_device_map"):  # a map says it to transformers itself
            device = model.device
        super().__init__(model, tokenizer=processor.tokenizer, processor=processor, device=device, **kwargs)

    def __call__(self, text_inputs: object, **kwargs: Any) -> Any:  # type: ignore[override]
        """Answer prompts.

        Args:
            text_inputs: a prompt, a chat (list of messages), or a list, generator or data set of them. A prompt may
                also be a mapping `{"text": ..., "persona": ..., "query": ..., "plug": ..., "persona_strength": ...}`. A
                chat gets the plug's system text unless it brings one.
            persona: a history or [`Persona`] for all prompts (encoded once), or a list with one of them or None per
                prompt. None is a user without history.
            query: one text, or one per prompt, that decides which history items matter. Default: what the plug takes
                from the prompt (of a chat, from the last user's text).
            plug: name of a loaded plug (default: the active one), or a list with a name or None per prompt. None in a list
                means an answer without any plug.
            persona_strength: a number for all prompts, or a list with one per prompt: 0 is nobody, 1 (the default) as
                trained, more exaggerates the user.
            batch_size: prompts per pass (default: 1).
            return_full_text: include the prompt, as the text-generation pipeline does (default: yes where the answer
                continues it, which it does neither in an encoder-decoder model nor in a chat). A text that the plug writes
                as a chat is then given as this chat.
            skip_special_tokens: leave special tokens out of the answer (default: yes).
            stop_sequence: text, or texts, after which an answer ends.
            tokenizer_encode_kwargs: for the processor, e.g. `{"max_length": 256}`; for a chat, for its
                `apply_chat_template`.
            **kwargs: for `generate`: max_new_tokens (default: 256), num_beams, num_return_sequences, streamer, prompt_cache, ...

        Returns:
            `[{"generated_text": ...}, ...]`, one per returned sequence; a list of such lists for a list of prompts; an
            iterator of them for a generator or data set. The generated text of a chat is the chat and its answer; that of
            a text which the plug writes as a chat is the answer alone.

        Raises:
            MismatchError: the number of personas, queries, plugs or strengths is not the number of prompts.
            ConfigurationError: no plug of that name is loaded.
            DataError: something is not a prompt, a history or a strength.
        """
        from .modeling.personalizer import is_one_user, listed

        single = isinstance(text_inputs, str | Mapping) or _is_chat(text_inputs)
        rows: Any = [text_inputs] if single else text_inputs
        if not hasattr(rows, "__iter__") and not hasattr(rows, "__getitem__"):
            raise DataError(
                f"A prompt is a text, a chat, or a mapping with one of them under 'text'; got {kind_of(rows)}."
            )
        if hasattr(kwargs.get("persona"), "__len__"):  # a generator may give one history per prompt, as they come
            kwargs["persona"] = listed(kwargs["persona"])
        if "persona" in kwargs and not is_one_user(kwargs["persona"]):
            rows = _with(rows, "persona", kwargs.pop("persona"))
        for name in ("query", "plug", "persona_strength"):
            if name in kwargs and not isinstance(kwargs[name], str | float | int | None):
                rows = _with(rows, name, kwargs.pop(name))
        if single:
            return super().__call__(rows[0], **kwargs)
        if isinstance(rows, list | tuple):
            return super().__call__(list(rows), **kwargs) if rows else []
        return super().__call__((row for row in rows), **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        before = _taken(parameters, "persona", "query", "persona_strength", "tokenizer_encode_kwargs")
        before |= {"plug": parameters["plug"]} if "plug" in parameters else {}
        after = _taken(parameters, "return_full_text", "skip_special_tokens")
        specs = {personalizer.spec for personalizer in self.model.personalizers.values()}
        if before.get("persona") is not None and len(specs) == 1:  # otherwise each plug encodes it by itself
            before["persona"] = self.model.encode_persona(before["persona"])
        if after.get("return_full_text") and self.model.config.is_encoder_decoder:
            raise ConfigurationError(
                "return_full_text=True is for causal backbones, whose answers continue the prompt; this one is "
                "encoder-decoder: leave it out."
            )
        if stop := parameters.pop("stop_sequence", None):
            parameters |= {"stop_strings": stop, "tokenizer": self.tokenizer}
        return before, parameters, after

    def preprocess(  # type: ignore[override]
        self,
        row: object,
        persona: object = None,
        query: str | None = None,
        persona_strength: float | None = None,
        tokenizer_encode_kwargs: Mapping[str, Any] | None = None,
        plug: str | None = None,
    ) -> dict[str, object]:
        """Return the tensors [1, T] of one prompt, with its user, query and strength."""
        of_row: object = _UNSET
        if isinstance(row, Mapping):
            if "text" not in row:
                raise DataError(f"A prompt that is a mapping needs a 'text', got {sorted(map(str, row))}.")
            prompt, persona, query = row["text"], row.get("persona", persona), row.get("query", query)
            of_row, persona_strength = row.get("plug", _UNSET), row.get("persona_strength", persona_strength)
        else:
            prompt = row
        prompt: Any = prompt.messages if isinstance(prompt, Chat) else prompt
        writer = self._writer(plug if of_row is _UNSET else of_row)
        options, processor = tokenizer_encode_kwargs or {}, self._processor_of(writer)
        if _is_chat(prompt):
            goes_on = _goes_on(prompt)
            chat = processor.with_system(prompt) if processor.chat else prompt
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=not goes_on, continue_final_message=goes_on, **options
            )
        else:
            chats = any(config.chat for config in self.model.plugs.values())  # their rows say where the persona stands
            inputs = processor([prompt], persona_offset=[None] if chats and not processor.chat else None, **options)
        if query is None and _is_chat(prompt):
            query = processor.query_of(last_user_text(prompt))
        elif query is None:
            tokenizer: Any = processor.tokenizer
            is_text = processor.chat or processor.query_marker
            decoded = prompt if is_text else tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
            query = inputs.pop("query", None) or processor.query_of(decoded)
        inputs.pop("query_mask", None)  # the query is known, and other plugs' prompts of the batch have none
        return {**inputs, "request": _Request(prompt, persona, query, of_row, persona_strength, writer)}

    def _writer(self, plug: object) -> str:
        """Return the name of the plug that writes a prompt: the active one, if a row has none or names one that is not there."""
        return plug if isinstance(plug, str) and plug in self.model.plugs else self.model.active_plug

    def _processor_of(self, name: str) -> PPlugProcessor:
        """Return the processor of a plug: each writes prompts, and stands in them, as its training did."""
        from .processing import PPlugProcessor

        if name == self._served:
            return self.processor
        loaded = self.model._loaded(name)
        return PPlugProcessor.from_config(loaded.personalizer.config, loaded.tokenizer or self.tokenizer)

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        request = model_inputs.pop("request")
        requests = request if isinstance(request, list) else [request]  # a batch, or a prompt alone
        plug = generate_kwargs.pop("plug", None)
        parts = []
        for rows, ends in self._by_ends(requests, generate_kwargs):
            inputs = {name: tensor[rows] for name, tensor in model_inputs.items()}
            parts.append((rows, self._answers(inputs, [requests[i] for i in rows], plug, {**generate_kwargs, **ends})))
        return {"sequences": _in_order(parts, self.tokenizer.pad_token_id), "request": request}

    def _by_ends(
        self, requests: Sequence[_Request], given: Mapping[str, Any]
    ) -> list[tuple[list[int], dict[str, object]]]:
        """Return the rows that end at the same tokens, with these: the caller's choice, or those of each row's plug."""
        chosen = {**getattr(self, "_generate_kwargs", {}), **given}
        if "eos_token_id" in chosen or getattr(chosen.get("generation_config"), "eos_token_id", None) is not None:
            return [([*range(len(requests))], {})]
        ends = [self.model._loaded(one.writer).generation_config.eos_token_id for one in requests]
        distinct = [end for i, end in enumerate(ends) if end not in ends[:i]]
        return [([i for i, own in enumerate(ends) if own == end], {"eos_token_id": end}) for end in distinct]

    def _answers(
        self, model_inputs: dict[str, Any], requests: Sequence[Any], plug: Any, generate_kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the sequences [B, n, L] of rows that end at the same tokens."""
        B, T = model_inputs["input_ids"].shape
        if any(one.plug is not _UNSET for one in requests):
            default = plug or self.model.active_plug
            plug = [default if one.plug is _UNSET else one.plug for one in requests]
        strengths = [1.0 if one.strength is None else one.strength for one in requests]
        output = self.model.generate(
            **model_inputs,
            persona=[one.persona for one in requests],
            query=[one.query for one in requests],
            plug=plug,
            persona_strength=strengths,
            **self._generation_options(generate_kwargs),
        )
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        if not self.model.config.is_encoder_decoder:
            sequences = sequences[:, T:]
        return sequences.view(B, len(sequences) // B, sequences.shape[1])

    def _generation_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of one call on top of the pipeline's own."""
        if hasattr(self, "_prepare_generate_kwargs"):
            return self._prepare_generate_kwargs(given)
        own: Any = self  # of transformers 5.19
        return {"generation_config": own.generation_config, **given}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], return_full_text: bool | None = None, skip_special_tokens: bool = True
    ) -> list[dict[str, object]]:
        """Return the texts of one prompt's sequences [1, n, L]."""
        prompt, processor = model_outputs["request"].prompt, self._processor_of(model_outputs["request"].writer)
        is_turn = processor.chat and isinstance(prompt, str)
        if return_full_text is None:
            return_full_text = not self.model.config.is_encoder_decoder and not is_turn
        prompt = [{"role": "user", "content": prompt}] if is_turn else prompt
        tokenizer: Any = processor.tokenizer
        answers = [
            tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in model_outputs["sequences"][0]
        ]
        return [{"generated_text": _joined(prompt, text) if return_full_text else text.strip()} for text in answers]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the model's plug folder and the processor's files, without the code that other pipelines also write."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the model. See its `push_to_hub`."""
        return self.model.push_to_hub(*args, **kwargs)


def _taken(parameters: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: parameters.pop(name) for name in names if name in parameters}


def _is_chat(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and is_valid_message(value[0])


def _goes_on(messages: Sequence[Mapping[str, str]]) -> bool:
    """Return whether an answer continues the last message rather than being a new one."""
    return messages[-1]["role"] == "assistant"


def _joined(prompt: str | Sequence[Mapping[str, str]], answer: str) -> str | list[Mapping[str, str]]:
    """Return prompt and answer together: a text, or a chat."""
    if isinstance(prompt, str):
        return prompt + answer
    if _goes_on(prompt):
        return [*prompt[:-1], {**prompt[-1], "content": text_of(prompt[-1]) + answer}]
    return [*prompt, {"role": "assistant", "content": answer}]


def _in_order(parts: Sequence[tuple[list[int], Tensor]], pad: int | None) -> Tensor:
    """Return the sequences [b, n, L] of parts of a batch as those of the whole batch, the shorter ones padded behind."""
    B, L = sum(len(rows) for rows, _ in parts), max(part.shape[2] for _, part in parts)
    _, first = parts[0]
    joined = first.new_full((B, first.shape[1], L), pad or 0)
    for rows, part in parts:
        joined[rows, :, : part.shape[2]] = part
    return joined


def _with(rows: Iterable[object], name: str, values: object) -> Any:
    """Return prompts as mappings with one of the values each; lazily, if the prompts come one by one."""
    if isinstance(values, str | Mapping | Tensor) or not isinstance(values, Iterable):
        raise DataError(f"{name} must be one for all prompts or a list with one per prompt, got {kind_of(values)}.")
    if isinstance(rows, list | tuple) and len(rows) != len(values := list(values)):
        raise MismatchError(
            f"Got {len(values)} for {name} and {len(rows)} prompts: pass one for all, or a list with one per prompt."
        )
    pairs = _pairs(rows, name, values)
    joined = ({**(row if isinstance(row, Mapping) else {"text": row}), name: value} for row, value in pairs)
    return list(joined) if isinstance(rows, list | tuple) else joined


def _pairs(rows: Iterable[object], name: str, values: Iterable[object]) -> Iterator[tuple[object, object]]:
    for row, value in zip_longest(rows, values, fillvalue=_UNSET):
        if row is _UNSET or value is _UNSET:
            which = "fewer" if value is _UNSET else "more"
            raise MismatchError(f"There are {which} for {name} than prompts: pass one for all, or one per prompt.")
        yield row, value


PIPELINE_REGISTRY.register_pipeline(TASK, PersonalizedTextGenerationPipeline, pt_model=AutoModel, type="text")
