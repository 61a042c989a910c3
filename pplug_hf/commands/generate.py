"""`pplug-hf generate`: one answer for one user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import TextStreamer

from ..data import sources
from ..errors import ConfigurationError, DataError, MissingFileError
from ..evaluation.plots import plot_weights
from ..methods.decoding import answer
from ..modeling import Persona, PPlugForConditionalGeneration, PPlugModel
from ..modeling.backbone import writes_chats
from ..modeling.device import checked_device
from ..modeling.encoders import History, item_texts
from ..modeling.strength import checked_strength
from ..processing import PPlugProcessor
from .options import GenerateSettings


def generate(settings: GenerateSettings) -> str:
    """Print the answer, and return it.

    Raises:
        PPlugError: settings, a plug or a history that cannot be used; nothing is loaded for settings alone.
    """
    _check(settings)
    device = checked_device(settings.device)
    history = [] if settings.history is None else read_history(settings.history)
    saved = None if settings.persona is None else Persona.from_pretrained(settings.persona)
    model = PPlugModel.from_pretrained(settings.plug, backbone=settings.backbone, encoder=settings.encoder)
    if model.device.type != device.type or device.index is not None:
        model.to(device)
    processor = PPlugProcessor.from_model(model)
    if settings.chat is not None:
        processor.chat = writes_chats(processor.tokenizer, settings.chat)
    if settings.system is not None:
        processor.system = settings.system
    persona = model.encode_persona(history if saved is None else saved)
    query = settings.query or model.config.query_of(settings.prompt)
    text = _answer(settings, model, processor, persona, query)
    if not settings.stream:
        print(text)
    if settings.picture and len(persona):
        Path(settings.picture).parent.mkdir(parents=True, exist_ok=True)
        weights = model.persona_weights(persona, query=query)[0]
        texts = item_texts(history, model.config.item_template) or [f"item {i + 1}" for i in range(len(persona))]
        dates = [str(item.get("date") or "")[:10] if isinstance(item, Mapping) else "" for item in history]
        title = f"Weights of history items for: {query}"
        plot_weights(weights, texts, title, dates=dates, answer=text).savefig(settings.picture)
    return text


def _check(settings: GenerateSettings) -> None:
    """Raise for settings that cannot be meant."""
    if not settings.prompt.strip():
        raise ConfigurationError("--prompt is empty: write what to answer.")
    if settings.history is not None and settings.persona is not None:
        raise ConfigurationError("--history and --persona are two forms of one thing: give one of them.")
    if settings.picture and settings.history is None and settings.persona is None:
        raise ConfigurationError("--picture draws the items of a user: give --history or --persona, too.")
    checked_strength(settings.persona_strength, rows=1)
    if settings.top_p is not None and settings.top_p > 1:
        raise ConfigurationError(f"--top_p is a probability, at most 1, got {settings.top_p}.")
    if settings.labels and (settings.stream or settings.temperature or settings.top_p):
        raise ConfigurationError("--labels are chosen by likelihood: leave out --stream, --temperature and --top_p.")
    if settings.stream and settings.num_beams > 1:
        raise ConfigurationError(
            "--stream prints every token as it comes, and beams are compared at the end: leave out one."
        )


def _answer(
    settings: GenerateSettings,
    model: PPlugForConditionalGeneration,
    processor: PPlugProcessor,
    persona: Persona,
    query: str,
) -> str:
    """Return the answer, printed already if it is streamed."""
    if settings.labels:
        options = {
            "max_new_tokens": settings.max_new_tokens,
            "num_beams": settings.num_beams,
            "labels": settings.labels,
            "persona_strength": settings.persona_strength,
        }
        personas, queries = [persona], [query]
        prompts = [settings.prompt]
        return answer(
            model.generate, processor, prompts, personas=personas, queries=queries, max_length=None, **options
        )[0]
    chosen = {"temperature": settings.temperature, "top_p": settings.top_p}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options |= {"do_sample": bool(options), "num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}
    if settings.stream:
        options["streamer"] = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options["persona_strength"] = settings.persona_strength
    batch = processor(text=[settings.prompt], persona=[persona], query=[query]).to(model.device)
    ids = model.generate(**batch, **options)
    return processor.decode_answers(ids, prompt_length=batch["input_ids"].shape[1])[0]


def read_history(path: str) -> History:
    """Read a history from a JSON list, from JSON Lines, or from the lines of a text file.

    Raises:
        MissingFileError: no such file.
        DataError: a file of another kind, not UTF-8, damaged, or JSON that is not a list.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"There is no history file {path!r}.")
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        return cast(History, list(sources.stream_lines(file)))
    if kind == ".json":
        history = sources.load(file)
        if not isinstance(history, list):
            raise DataError(f"The history file {path!r} holds a JSON {type(history).__name__}, not a list of items.")
        return history
    if file.suffix.lower() not in (".txt", ""):
        raise DataError(
            f"The history file {path!r} is of an unknown kind: give .json, .jsonl (both also .gz) or .txt, one item per line."
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The history file {path!r} is not UTF-8 text (byte {error.start}).") from None
    return [line for line in content.split("\n") if line.strip()]  # not splitlines: an item may have U+2028
