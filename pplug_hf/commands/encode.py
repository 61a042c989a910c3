"""`pplug-hf encode`: all histories of a folder into the vector store, ahead of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.lamp import read_lamp
from ..data.vectors import DEFAULT_FOLDER, VectorStore
from ..errors import ConfigurationError, MissingFileError
from ..modeling import PersonaEncoder
from ..modeling.encoders import freeze_encoder, load_encoder
from .generate import read_history


@dataclass
class EncodeSettings:
    """Encode the history items of a folder in LaMP's format, each distinct text once; or one history of one user."""

    data: str | None = field(default=None, metadata={"help": "Folder with {train,dev,test}_questions.json[.gz]."})
    encoder: str | None = field(default=None, metadata={"help": "Frozen sentence encoder: Hub id or local folder."})
    plug: str | None = field(
        default=None, metadata={"help": "Encode one --history into --output as this plug does; needs no backbone."}
    )
    history: str | None = field(
        default=None, metadata={"help": "JSON list of texts or items, or text file with one item per line."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder, or .safetensors file, for the vectors."})
    task: str | None = field(default=None, metadata={"help": "Task (default: what the outputs file says)."})
    splits: list[str] = field(default_factory=lambda: ["train", "dev", "test"], metadata={"help": "Which splits."})
    labelled_items: bool = field(default=True, metadata={"help": "With the user's own tag, score or title."})
    history_prompt: str | None = field(default=None, metadata={"help": "Put in front of items (default: encoder's)."})
    batch_size: int = field(default=64, metadata={"help": "Texts per forward pass."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})


def encode(settings: EncodeSettings) -> None:
    """Fill the store and say how much was new; or write one persona."""
    if settings.plug is not None:
        return _encode_one(settings)
    if settings.data is None or settings.encoder is None:
        raise ConfigurationError("Give --data and --encoder, or --plug, --history and --output for one user.")
    texts: dict[str, None] = {}
    missing = []
    for split in settings.splits:
        try:
            task, examples = read_lamp(settings.data, split, settings.task, require_outputs=False)
        except MissingFileError as error:
            missing.append(error)
            continue
        for example in examples:
            texts.update(dict.fromkeys(task.item_text(item, settings.labelled_items) for item in example.history))
    if len(missing) == len(settings.splits):
        raise missing[0]
    encoder = freeze_encoder(load_encoder(settings.encoder))
    prompt = encoder.prompts.get("document") or "" if settings.history_prompt is None else settings.history_prompt
    store = VectorStore(encoder, prompt, settings.vectors)
    store(list(texts), batch_size=settings.batch_size)
    print(f"{len(texts)} distinct items: {store.encoded} encoded now, {len(texts) - store.encoded} were in the store.")


def _encode_one(settings: EncodeSettings) -> None:
    if settings.history is None or settings.output is None:
        raise ConfigurationError("--plug encodes the --history of one user into --output: give all three.")
    history = read_history(settings.history)
    encoder = PersonaEncoder.from_pretrained(settings.plug, encoder=settings.encoder)
    persona = encoder.encode(history, batch_size=settings.batch_size, show_progress=True)
    persona.save_pretrained(settings.output)
    N, D = persona.embeddings.shape
    print(f"{N} items of {D} numbers each are in {settings.output}; their texts are not.")
