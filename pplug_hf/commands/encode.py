"""`pplug-hf encode`: all histories of a data set into the vector store, ahead of training."""

from __future__ import annotations

from ..data.examples import Source, has_split, is_one_split, read_examples
from ..data.vectors import VectorStore
from ..errors import ConfigurationError
from ..modeling import Personalizer
from ..modeling.encoders import freeze_encoder, load_encoder
from ..tasks.task import Task
from .data_warnings import warn_truncated_items
from .generate import read_history
from .options import EncodeSettings


def encode(settings: EncodeSettings, task: Task | None = None, data: Source | None = None) -> None:
    """Fill the store and say how much was new; or write one persona.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.

    Raises:
        PPlugError: settings or data that cannot be used; nothing is written then.
    """
    if settings.plug is not None:
        return _encode_one(settings, settings.plug)
    source = settings.data if data is None else data
    if source is None or settings.encoder is None:
        raise ConfigurationError("Give --data and --encoder, or --plug, --history and --output for one user.")
    splits = [split for split in settings.splits if has_split(source, split)]
    if is_one_split(source) or not splits:
        splits = settings.splits[:1]  # the only one, or one to say that it is missing
    texts: dict[str, None] = {}
    for split in splits:
        found, examples = read_examples(source, split, task or settings.task, require_outputs=False)
        for example in examples:
            texts.update(dict.fromkeys(found.item_text(item, settings.labelled_items) for item in example.history))
    encoder = freeze_encoder(load_encoder(settings.encoder))
    prompt = encoder.prompts.get("document") or "" if settings.history_prompt is None else settings.history_prompt
    warn_truncated_items(encoder, texts, prompt)
    store = VectorStore(encoder, prompt, settings.vectors)
    store(list(texts), batch_size=settings.batch_size)
    print(f"{len(texts)} distinct items: {store.encoded} encoded now, {len(texts) - store.encoded} were in the store.")


def _encode_one(settings: EncodeSettings, plug: str) -> None:
    if settings.history is None or settings.output is None:
        raise ConfigurationError("--plug encodes the --history of one user into --output: give all three.")
    history = read_history(settings.history)
    personalizer = Personalizer.from_pretrained(plug, encoder=settings.encoder, encode_only=True)
    persona = personalizer.encode(history, batch_size=settings.batch_size, show_progress=True)
    persona.save_pretrained(settings.output)
    N, D = persona.vectors.shape
    print(f"{N} items of {D} numbers each are in {settings.output}; their texts are not.")
