"""`pplug-hf generate`: one answer for one user."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, MissingFileError
from ..evaluation.plots import plot_weights
from ..methods.decoding import answer
from ..modeling import Persona, PPlugModel
from ..modeling.backbone import writes_chats
from ..modeling.encoders import item_texts
from ..processing import PPlugProcessor
from .options import Chat, option, required


@dataclass
class GenerateSettings:
    """Answer a prompt for the user of a history."""

    plug: str = required("Plug folder or Hub id.")
    prompt: str = required("What to answer.")
    history: str | None = option(None, "JSON list of texts or items, or text file with one item per line.")
    persona: str | None = option(None, "Folder or file of an encoded history, in the place of --history.")
    query: str | None = option(None, "Query that weights the history items (default: the prompt).")
    backbone: str | None = option(None, "Use the backbone at this place.")
    encoder: str | None = option(None, "Use the encoder at this place.")
    chat: Chat | None = option(
        None, "Write the prompt in the chat template, or not (default: as the plug was trained)."
    )
    system: str | None = option(None, "System text of the chat (default: as the plug was trained).")
    max_new_tokens: int = option(64, "Tokens of the answer at most.")
    num_beams: int = option(1, "Beams.")
    labels: list[str] | None = option(None, "Answer with one of these (default: anything).")
    picture: str | None = option(None, "PNG file for the weights of the history items.")


def generate(settings: GenerateSettings) -> str:
    """Print the answer, and return it."""
    if settings.history is not None and settings.persona is not None:
        raise ConfigurationError("--history and --persona are two forms of one thing: give one of them.")
    history = [] if settings.history is None else read_history(settings.history)
    saved = None if settings.persona is None else Persona.from_pretrained(settings.persona)
    model = PPlugModel.from_pretrained(settings.plug, backbone=settings.backbone, encoder=settings.encoder)
    processor = PPlugProcessor.from_model(model)
    if settings.chat is not None:
        processor.chat = writes_chats(processor.tokenizer, settings.chat)
    if settings.system is not None:
        processor.system = settings.system
    persona = model.encode_persona(history if saved is None else saved)
    query = settings.query or settings.prompt
    text = answer(
        model.generate,
        processor,
        [settings.prompt],
        personas=[persona],
        queries=[query],
        max_length=None,
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        labels=settings.labels,
    )[0]
    print(text)
    if settings.picture and len(persona):
        Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
        weights = model.persona_weights(persona, query=query)[0]
        texts = item_texts(history, model.config.item_template) or [f"item {i + 1}" for i in range(len(persona))]
        plot_weights(weights, texts, title=f"Weights of history items for: {query}").savefig(settings.picture)
    return text


def read_history(path: str) -> list[Any]:
    """Read a history from a JSON list or from the lines of a text file.

    Raises:
        MissingFileError: no such file.
        DataError: not UTF-8, or JSON that is not a list.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"There is no history file {path!r}.")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The history file {path!r} is not UTF-8 text (byte {error.start}).") from None
    if file.suffix != ".json":
        return [line for line in content.splitlines() if line.strip()]
    try:
        history = json.loads(content)
    except ValueError as error:
        raise DataError(f"The history file {path!r} is not valid JSON: {error}.") from None
    if not isinstance(history, list):
        raise DataError(f"The history file {path!r} holds a JSON {type(history).__name__}, not a list of items.")
    return history
