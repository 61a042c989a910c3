"""`pplug-hf encode`: all histories of a folder into the vector store, ahead of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.lamp import read_lamp
from ..data.vectors import DEFAULT_FOLDER, VectorStore
from ..errors import MissingFileError
from ..modeling.encoders import freeze_encoder, load_encoder


@dataclass
class EncodeSettings:
    """Encode the history items of a folder in LaMP's format; each distinct text once, and never again."""

    data: str = field(metadata={"help": "Folder with {train,dev,test}_questions.json[.gz]."})
    encoder: str = field(metadata={"help": "Frozen sentence encoder: Hub id or local folder."})
    task: str | None = field(default=None, metadata={"help": "Task (default: what the outputs file says)."})
    splits: list[str] = field(default_factory=lambda: ["train", "dev", "test"], metadata={"help": "Which splits."})
    labelled_items: bool = field(default=True, metadata={"help": "With the user's own tag, score or title."})
    history_prompt: str | None = field(default=None, metadata={"help": "Put in front of items (default: encoder's)."})
    batch_size: int = field(default=64, metadata={"help": "Texts per forward pass."})
    vectors: str = field(default=DEFAULT_FOLDER, metadata={"help": "Folder of the vector store."})


def encode(settings: EncodeSettings) -> None:
    """Fill the store and say how much was new."""
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
