"""`encode_items`: the items of millions of users, from files to personas in a store.

    report = encode_items(personalizer, store, ["items.parquet"], markers="personas/encoded")
    print(report)

A log is encoded in parts of some thousand rows. A part is marked as done when all of its items are in the store, so a job
that was killed continues where it was, and the store keeps an item once, whatever is encoded again. Parts are written in
the order of the log, and each user's items within a part by time: every engine leaves the same store.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from ..data.item_log import PART, Columns, ItemRow, Part, find_files, read_parts
from ..data.sources import count_rows
from ..errors import ConfigurationError, MismatchError
from ..modeling import EncoderSpec, Persona, Personalizer
from ..modeling.encoders import embed
from ..storage.files import write_text
from .bulk_ray import Encode, Read, encoded_parts
from .store import PersonaStore

BadRows: TypeAlias = Literal["refuse", "skip"]
EngineName: TypeAlias = Literal["local", "ray"]


@dataclass
class BulkReport:
    """Result of a bulk encoding, in rows of the log.

    Args:
        encoded: in this run; an item that the store had already counts, too.
        done: left out, because an earlier run had finished them.
        faults: reason -> number of rows that were left out.
        places: reason -> file and number of the first such row.
    """

    encoded: int = 0
    done: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.encoded + self.done + self.faults.total():,} rows: {self.encoded:,} encoded now, {self.done:,} before."
        ]
        lines += [
            f"{count:,} row{'s' * (count != 1)} left out ({why}; first {self.places[why]})."
            for why, count in self.faults.items()
        ]
        return "\n".join(lines)


def encode_items(
    personalizer: Personalizer,
    store: PersonaStore,
    source: Sequence[str | os.PathLike],
    *,
    user: str = "user",
    item: str | None = None,
    time: str | None = None,
    fields: Mapping[str, str] | None = None,
    engine: EngineName = "local",
    workers: int = 1,
    batch_size: int = 64,
    bad_rows: BadRows = "refuse",
    markers: str | os.PathLike | None = None,
    part_size: int = PART,
    show_progress: bool = True,
) -> BulkReport:
    """Encode the items of a log and append them to the personas of their users.

    A user's items may be spread over the log. In the store they are in the order of the log's parts, and by time within a
    part; what reads times, such as `Persona.last`, does not depend on it.

    Args:
        personalizer: of the plug; `encode_only` suffices.
        store: of the personas.
        source: files and folders of .parquet, .jsonl, .csv and .tsv files, also gzipped.
        user: column with the user.
        item: column with the item's id (default: "id" if there is one, else a fingerprint of the row's fields).
        time: column with a date or a time (default: "date" if there is one, else items have no times).
        fields: field of the plug's item template -> column, for columns of another name. The field of a plug without a
            template is "text".
        engine: "local" encodes on this machine, "ray" on a Ray cluster (or a local one, without RAY_ADDRESS).
        workers: processes, or actors, that encode. One local worker is this process.
        batch_size: texts per forward pass.
        bad_rows: "skip" leaves out rows without a user or a text and the like, and counts them; "refuse" raises.
        markers: folder for the names of finished parts; a new store needs a new one, and so does one that was restored from
            a backup. None keeps no record: another run encodes everything again.
        part_size: rows of a part, which are in memory together, and the most that a killed run encodes again.
        show_progress: show a progress bar with the time left.

    Returns:
        The counts.

    Raises:
        ConfigurationError: an engine, a number of workers or a choice of bad rows that cannot be, or a cluster that is too
            small.
        MismatchError: the store is of another encoder.
        MissingFileError: a file is not there.
        DataError: a file cannot be read, lacks a column, or has a bad row, whose number is named. What was finished
            before it stays in the store.
        MissingPackageError: a package for the engine or the files is not installed.
    """
    spec, encoder = personalizer.spec, personalizer.history_encoder
    if not store.spec.fits(spec):
        raise MismatchError(
            f"The store holds personas of {store.spec}, and this plug reads {spec}: open a store of this plug's own."
        )
    if engine not in get_args(EngineName) or bad_rows not in get_args(BadRows):
        raise ConfigurationError(
            f"engine is {engine!r} and bad_rows is {bad_rows!r}; choose one of {', '.join(get_args(EngineName))}, and one of "
            f"{', '.join(get_args(BadRows))}."
        )
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}; give at least 1.")
    files = find_files(source)
    done = _Markers(markers)
    identity = json.dumps([spec.to_dict(), store.namespace, store.tenant_name], sort_keys=True)
    columns = Columns(user, item, time, fields or {})
    read: Read = partial(
        read_parts,
        template=spec.item_template,
        columns=columns,
        identity=identity,
        done=done.names,
        refuse=bad_rows == "refuse",
        size=part_size,
    )
    encode = partial(encode_texts, encoder, spec.prompt, batch_size)
    if engine == "ray":
        made = encoded_parts(files, read, encode, workers)
    else:
        made = _encoded_parts(chain.from_iterable(map(read, files)), encode, encoder, workers)
    report = BulkReport()
    total = sum(map(count_rows, files)) if show_progress else None
    with (
        tqdm(total=total, desc="Encoding items", unit="item", disable=not show_progress) as bar,
        ThreadPoolExecutor(1) as writer,  # the next part is encoded while one is written
    ):
        writing = None
        for part, vectors in made:
            _count(part, report)
            if writing is not None:
                writing.result()
            if part.rows:
                writing = writer.submit(_write, part, vectors, store, spec, done)
            if bar.total:  # what is done already says nothing of the time left
                bar.total = max(0, bar.total - part.done)
            bar.update(len(part.rows))
        if writing is not None:
            writing.result()
    return report


def encode_texts(
    encoder: SentenceTransformer, prompt: str, batch_size: int, texts: list[str], pool: dict | None = None
) -> Tensor:
    """Return the vectors [len(texts), D] in fp32, on the CPU; texts of like length share a batch.

    Args:
        encoder: frozen.
        prompt: put in front of every text.
        batch_size: texts per forward pass.
        texts: in any order.
        pool: of processes.
    """
    if not texts:
        return torch.zeros(0, 0)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)  # a pool gets even shares
    vectors = embed(encoder, [texts[i] for i in order], prompt, batch_size, pool=pool).cpu()
    return vectors[torch.tensor(order).argsort()]


def _encoded_parts(
    parts: Iterable[Part], encode: Encode, encoder: SentenceTransformer, workers: int
) -> Iterator[tuple[Part, Tensor]]:
    """Yield parts with the vectors of their usable rows, encoded on this machine."""
    with _pool(encoder, workers) as pool:
        for part in parts:
            yield part, encode(part.texts, pool=pool)


@contextmanager
def _pool(encoder: SentenceTransformer, workers: int) -> Iterator[dict | None]:
    """Start processes that encode, unless there is one alone: one per GPU, or as many as are asked for."""
    if workers == 1:
        yield None
        return
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())][:workers] or ["cpu"] * workers
    pool = encoder.start_multi_process_pool(devices)
    try:
        yield pool
    finally:
        encoder.stop_multi_process_pool(pool)


def _count(part: Part, report: BulkReport) -> None:
    report.done += part.done
    for number, row in enumerate(part.rows, part.first):
        if row.fault is None:
            report.encoded += 1
        else:
            report.faults[row.fault] += 1
            report.places.setdefault(row.fault, f"{part.file}, row {number}")


def _write(part: Part, vectors: Tensor, store: PersonaStore, spec: EncoderSpec, done: _Markers) -> None:
    """Append the items of a part to their users, then mark it as done."""
    users: dict[str, dict[str, tuple[ItemRow, int]]] = {}  # user -> id -> row and its vector
    for i, row in enumerate(row for row in part.rows if row.fault is None):
        users.setdefault(row.user, {}).setdefault(row.id, (row, i))
    for user, items in users.items():
        found = list(items.values())
        timed = all(row.time is not None for row, _ in found)
        if timed:
            found.sort(key=lambda pair: pair[0].time or 0.0)
        times = torch.tensor([row.time for row, _ in found], dtype=torch.float64) if timed else None
        ids = tuple(row.id for row, _ in found)
        store.append(user, Persona(vectors[[i for _, i in found]], spec, ids, times))
    done.add(part.digest)


class _Markers:
    """Digests of finished parts, each an empty file of that name."""

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = None if folder is None else Path(folder)
        self.names = frozenset(os.listdir(self.folder)) if self.folder and self.folder.is_dir() else frozenset()

    def add(self, digest: str) -> None:
        if self.folder is not None:
            write_text(self.folder / digest, "")
