"""`pplug-hf encode`: all histories of a data set into the vector store, ahead of training; or users into a persona store."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ..configuration.choices import choices
from ..configuration.pplug import checked
from ..data.examples import Source, has_split, is_one_split, read_examples
from ..data.item_log import find_files
from ..data.vectors import VectorStore
from ..errors import ConfigurationError
from ..modeling import Personalizer
from ..modeling.encoders import freeze_encoder, item_texts, length_notes, load_encoder
from ..serving.bulk import encode_items
from ..serving.open_store import open_store
from ..tasks.task import Task
from .generate import read_history
from .options import EncodeSettings

# The options of each use of the command.
_EVERY = ("encoder", "batch_size", "device")
_DATA = ("data", "task", "splits", "labelled_items", "item_template", "history_prompt", "vectors")
_ONE = ("plug", "history", "output")
_LOG = ("plug", "source", "store", "user", "item", "time", "fields", "bad_rows", "engine", "workers", "tenant")
_LOG += ("namespace", "dtype", "markers")


def encode(settings: EncodeSettings, task: Task | None = None, data: Source | None = None) -> None:
    """Fill the store and print how much was new; or write one persona; or encode a log of items into a persona store.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.

    Raises:
        PPlugError: settings or data that cannot be used; nothing is written then, but for the finished parts of a log.
    """
    if settings.source is not None or settings.store is not None:
        return _encode_log(settings, settings.source or [])
    if settings.plug is not None:
        return _encode_one(settings, settings.plug)
    source = settings.data if data is None else data
    if source is None or settings.encoder is None:
        raise ConfigurationError(
            "Give --data and --encoder, or --plug, --history and --output for one user, or --plug, --source and --store for "
            "a log."
        )
    _no_other(settings, "--data fills --vectors", _DATA)
    if settings.item_template is not None:
        if not settings.labelled_items:
            raise ConfigurationError("--item_template says which fields are read: leave out --labelled_items.")
        checked(choices()["item_template"], settings.item_template)
    splits = [split for split in settings.splits if has_split(source, split)]
    if is_one_split(source) or not splits:
        splits = settings.splits[:1]  # the only one, or one to say that it is missing
    texts: dict[str, None] = {}
    for split in splits:
        found, examples = read_examples(source, split, task or settings.task, require_outputs=False)
        usual = found.item_template if settings.labelled_items else found.item_template_unlabelled
        template = usual if settings.item_template is None else settings.item_template
        for example in examples:
            texts.update(dict.fromkeys(item_texts(example.history, template)))
    encoder = freeze_encoder(load_encoder(settings.encoder, device=settings.device))
    prompt = encoder.prompts.get("document") or "" if settings.history_prompt is None else settings.history_prompt
    for note in length_notes(encoder, texts, prompt):
        print(note)
    store = VectorStore(encoder, prompt, settings.vectors)
    store(list(texts), batch_size=settings.batch_size)
    print(f"{len(texts)} distinct items: {store.encoded} encoded now, {len(texts) - store.encoded} were in the store.")


def _encode_one(settings: EncodeSettings, plug: str) -> None:
    _all_of_three(settings, "--plug encodes the --history of one user into --output", _ONE)
    history = read_history(settings.history or "")
    personalizer = _load(settings, plug)
    persona = personalizer.encode(history, batch_size=settings.batch_size, show_progress=True)
    persona.save_pretrained(settings.output)
    N, D = persona.vectors.shape
    print(f"{N} items of {D} numbers each are in {settings.output}; their texts are not.")


def _encode_log(settings: EncodeSettings, source: list[str]) -> None:
    _all_of_three(settings, "--plug encodes a log, --source, into a --store", _LOG)
    assert settings.plug is not None and settings.store is not None
    columns: dict[str, str] = {}
    for pair in settings.fields or ():
        name, _, columns[name] = pair.partition("=")
        if not name or not columns[name]:
            raise ConfigurationError(f"--fields takes FIELD=COLUMN, got {pair!r}.")
    is_server = "://" in settings.store
    if is_server and settings.markers is None:
        raise ConfigurationError(
            "A store on a server has no folder for the names of finished parts: give --markers FOLDER."
        )
    find_files(source)  # raises, before a model is loaded
    personalizer = _load(settings, settings.plug)
    names = {"tenant": settings.tenant, "namespace": settings.namespace, "dtype": settings.dtype}
    with open_store(settings.store, personalizer.spec, **names) as store:
        report = encode_items(
            personalizer,
            store,
            source,
            user=settings.user,
            item=settings.item,
            time=settings.time,
            fields=columns,
            engine=settings.engine,
            workers=settings.workers,
            batch_size=settings.batch_size,
            bad_rows=settings.bad_rows,
            # In the folder of the namespace, and so dropped with it.
            markers=settings.markers or Path(settings.store) / store.namespace / "encoded",
        )
        stats = store.stats()
    print(report)
    print(f"The store holds {stats.items:,} items of {stats.users:,} users, {stats.size / 1e6:.1f} MB.")


def _all_of_three(settings: EncodeSettings, use: str, names: tuple[str, ...]) -> None:
    missing = [f"--{name}" for name in names[:3] if getattr(settings, name) is None]
    if missing:
        raise ConfigurationError(f"{use}: give all three ({' and '.join(missing)} missing).")
    _no_other(settings, use, names)


def _no_other(settings: EncodeSettings, use: str, names: tuple[str, ...]) -> None:
    """Raise if an option of another use of the command is given, which would do nothing."""
    usual = EncodeSettings()
    others = [f.name for f in fields(settings) if f.name not in (*_EVERY, *names)]
    if useless := [f"--{name}" for name in others if getattr(settings, name) != getattr(usual, name)]:
        raise ConfigurationError(f"{use}: leave out {' and '.join(useless)}, which another use of encode takes.")


def _load(settings: EncodeSettings, plug: str) -> Personalizer:
    return Personalizer.from_pretrained(plug, encoder=settings.encoder, encode_only=True, device=settings.device)
