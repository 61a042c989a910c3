"""Requests as token ids, written as the plug's training wrote them; the same for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from ..chats import chats_of, last_user_text, text_of
from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError
from ..modeling import Persona, Personalizer
from ..modeling.encoders import check_finite
from ..modeling.persona import check_spec
from ..modeling.prefix import default_position
from ..processing import PPlugProcessor, Row
from ..tasks.items import whole_texts
from .engine import Request, Sampling

_CHARACTERS = 32  # of a token at most


def prompt_row(
    processor: PPlugProcessor, backbone: PreTrainedConfig, prompt: str | Sequence[Mapping[str, str]]
) -> Row:
    """Return a prompt as tokens, with the place of its soft prompt.

    Messages get the plug's system text unless they bring one. A plug that writes no chats reads them as lines.

    Args:
        processor: of the plug.
        backbone: configuration of the language model.
        prompt: text or messages.

    Raises:
        DataError: it is not a chat, or the chat template refuses it.
    """
    if isinstance(prompt, str):
        text = prompt
    else:
        (chat,) = chats_of(list(prompt))
        if processor.chat:
            batch = processor.apply_chat_template(processor.with_system(chat), add_generation_prompt=True)
            return Row(batch["input_ids"][0].tolist(), int(batch["persona_position"][0]), [])
        text = "\n".join(map(text_of, chat))
    (row,) = processor.rows(whole_texts([text]))
    if processor.chat or not row.ids:
        return row
    ids = torch.tensor([row.ids])
    behind = processor.placement == "answer" and not backbone.is_encoder_decoder
    place = len(row.ids) if behind else int(default_position(backbone, ids, torch.ones_like(ids)))
    return row._replace(position=place)


def query_of(request: Request, config: PPlugConfig) -> str:
    """Return what weights the items of a request: its query, or the one in its prompt or in the last text of the user.

    Args:
        request: to a plug.
        config: of the plug.
    """
    if request.query:
        return request.query
    return config.query_of(request.prompt if isinstance(request.prompt, str) else last_user_text(request.prompt))


def check_size(request: Request, max_tokens: int) -> None:
    """Refuse a prompt that is far too long before it is read, which would take long.

    Args:
        request: with the prompt.
        max_tokens: that are taken of a prompt.

    Raises:
        DataError: it has more characters than so many tokens ever have.
    """
    if (size := len(str(request.prompt))) > _CHARACTERS * max_tokens:
        raise DataError(f"The prompt has {size} characters, and at most {max_tokens} tokens are taken.")


def check_persona(request: Request, personalizer: Personalizer) -> None:
    """Refuse a persona that a plug cannot read.

    Args:
        request: with a persona.
        personalizer: the plug.

    Raises:
        DataError: it is no [`Persona`], it holds NaN or infinity, or there is no query to weight it by.
        MismatchError: it is of another encoder.
    """
    if not isinstance(request.persona, Persona):
        got = type(request.persona).__name__
        raise DataError(f"A request's persona is a Persona, got {got}: encode the history.")
    check_spec(request.persona, personalizer.spec)
    check_finite(request.persona.vectors)
    if not query_of(request, personalizer.config).strip():
        raise DataError("The query is empty, and the persona is weighted by it: pass query=<text>.")


def check_sampling(chosen: Sampling) -> None:
    """Refuse settings that mean nothing.

    Args:
        chosen: of a request.

    Raises:
        ConfigurationError: names the setting.
    """
    for name, value, is_right, wanted in (
        ("max_new_tokens", chosen.max_new_tokens, chosen.max_new_tokens >= 1, "at least 1"),
        ("temperature", chosen.temperature, 0 <= chosen.temperature < float("inf"), "at least 0"),
        ("top_p", chosen.top_p, 0 < chosen.top_p <= 1, "above 0 and at most 1"),
        ("top_k", chosen.top_k, chosen.top_k >= 0, "at least 0"),
        ("repetition_penalty", chosen.repetition_penalty, chosen.repetition_penalty > 0, "above 0"),
        ("stop", chosen.stop, all(chosen.stop) and not isinstance(chosen.stop, str), "texts that are not empty"),
    ):
        if not is_right:
            raise ConfigurationError(f"{name} must be {wanted}, got {value!r}.")
