"""Bodies of requests: OpenAI's, with a persona."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .failures import ApiError

T = TypeVar("T")

UserId = Annotated[str, Field(min_length=1, max_length=256)]
Strength = Annotated[float, Field(ge=0, le=4, allow_inf_nan=False)]
# A body is checked between all other requests: one error ends it, and no list is longer than any request needs.
Listed = Annotated[list[T], Field(max_length=10_000, fail_fast=True)]

# Would change the answer and are not done here, so they are refused rather than ignored.
_REFUSED = [
    "add_generation_prompt",
    "allowed_token_ids",
    "audio",
    "bad_words",
    "best_of",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_stop_str_in_output",
    "length_penalty",
    "logit_bias",
    "logits_processors",
    "logprobs",
    "min_p",
    "min_tokens",
    "modalities",
    "prediction",
    "prompt_embeds",
    "prompt_logprobs",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "skip_special_tokens",
    "stop_token_ids",
    "structured_outputs",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
    "truncate_prompt_tokens",
    "typical_p",
    "use_beam_search",
    "verbosity",
    "web_search_options",
]
# Values that some clients send and that change nothing.
_NEUTRAL = {"best_of": 1, "length_penalty": 1, "repetition_penalty": 1, "typical_p": 1}
_NEUTRAL |= {"min_p": 0, "min_tokens": 0, "top_logprobs": 0}
_NEUTRAL |= {"add_generation_prompt": True, "skip_special_tokens": True}
# Nor does False, where True is not the neutral value. But not every 0, which is equal to it, is harmless: a `logprobs` of 0
# asks for the log probability of each token.
_HARMLESS = (None, "none", "auto", [], {}, {"type": "text"}, ["text"])


class _Exact(BaseModel):
    """Fields of these names alone. One that is not among them ends the check, where extra="forbid" would go through all."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: object) -> object:
        if isinstance(values, dict) and not values.keys() <= cls.model_fields.keys():
            raise PydanticCustomError(
                "extra_forbidden", "Its fields are {names}", {"names": ", ".join(cls.model_fields)}
            )
        return values


class PersonaChoice(_Exact):
    """Whose persona an answer is for.

    Args:
        user: id.
        query: what the items are weighted by (default: what the plug takes from the last text of the user).
        required: an unknown user is an error (default: they are answered without persona).
        strength: of the persona, 0 as for nobody, 1 as trained.
    """

    user: UserId
    query: str | None = None
    required: bool = False
    strength: Strength | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False


class AnswerBody(BaseModel):
    """Fields that chat and text completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Listed[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    persona: PersonaChoice | None = None
    persona_strength: Strength | None = None

    def check(self) -> None:
        """Refuse parameters of OpenAI's that are not done here.

        Raises:
            ApiError: one is given.
        """
        for name in _REFUSED:
            value, neutral = (self.model_extra or {}).get(name), _NEUTRAL.get(name)
            is_off = value is False and neutral is not True
            if not is_off and value not in _HARMLESS and value != neutral:
                raise ApiError(400, "unsupported_parameter", f"{name} is not supported: leave it out.", name)

    @property
    def strength(self) -> float:
        """The strength of the persona, wherever it is given."""
        inner = None if self.persona is None else self.persona.strength
        found = [value for value in (inner, self.persona_strength) if value is not None]
        return found[0] if found else 1.0


class ChatBody(AnswerBody):
    """Of `/v1/chat/completions`."""

    messages: Listed[dict[str, object]] = Field(min_length=1)


class CompletionBody(AnswerBody):
    """Of `/v1/completions`."""

    prompt: str | Listed[str]


class ItemBody(BaseModel):
    """An item of a history: its id, its text or the fields of the plug's item template, and its time."""

    model_config = ConfigDict(extra="allow")

    id: UserId
    text: str | None = None
    time: str | float | int | None = None


class ItemsBody(_Exact):
    """Of `/v1/personas/{user}/items`."""

    items: Listed[ItemBody]
