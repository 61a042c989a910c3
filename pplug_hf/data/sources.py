"""Readers of files, whole or row by row, with clear errors for broken ones.

Files may be gzipped, whatever their ending. NaN and infinity are not JSON and refused, but in JSON lines NaN is null, because
programs write it there for a missing value. Lists and objects that are nested more than 100 deep are refused, too. No message
repeats the parser's own, which quotes the document.
"""

from __future__ import annotations

import gzip
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pplug_hf.errors import DataError, MissingFileError, kind_of
from pplug_hf.optional import require
from pplug_hf.tasks.items import whole_fields

if TYPE_CHECKING:
    from pandas import DataFrame

ITEMS = "items.jsonl"  # history items that the rows of a folder share, see `events.py`
TASK = "task.json"  # the task of a folder's rows

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 8192  # rows of a table that are read at once
_LINES = ("jsonl", "ndjson")
_TABLES = ("csv", "tsv", "txt")
_DEPTH = 100  # of lists and objects
_BROKEN = "{path} is not valid JSON, or is cut off ({where}); fetch it again."


def find(folder: Path, *names: str) -> Path:
    """Return the first of some files that is in a folder, plain or with the ending .gz.

    Raises:
        MissingFileError: None of them is there.
    """
    if found := next(filter(None, (find_packed(folder / name) for name in names)), None):
        return found
    splits = split_names(folder, "_questions.json", *(".jsonl" for name in names if name.endswith(".jsonl")))
    there = f"it has the splits {', '.join(splits)}" if splits else "it has no questions files at all"
    wanted = [ending for name in names for ending in (name, f"{name}.gz")]
    raise MissingFileError(
        f"Neither {' nor '.join(wanted)} is in {folder}: {there if folder.is_dir() else 'no such folder'}. "
        "Check the folder and the split's name."
    )


def split_names(folder: Path, *endings: str) -> list[str]:
    """Return what stands before one of these endings in the names of a folder's files, plain or with the ending .gz."""
    names = [path.name.removesuffix(".gz") for path in folder.glob("*") if path.is_file()]
    found = {name.removesuffix(ending) for ending in endings for name in names if name.endswith(ending)}
    return sorted(found - {ITEMS.removesuffix(".jsonl")})


def find_packed(path: Path) -> Path | None:
    """Return a file, plain or with the ending .gz; None if there is neither."""
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def load(path: Path) -> object:
    """Return the content of a JSON file.

    Raises:
        DataError: It is a web page, damaged, not UTF-8 or no JSON, or is nested too deeply.
    """
    with _opened(path) as file:
        raw = file.read()
    # `from None` here and below: these errors carry the document itself.
    try:
        return _parsed(raw, f"{path}", _refused)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); fetch it again.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}, line {error.lineno}, column {error.colno}, {len(raw):,} bytes read"
        raise DataError(_BROKEN.format(path=path, where=where)) from None


def stream_array(path: Path) -> Iterator[object]:
    """Yield the elements of a JSON array; only one is in memory at a time.

    Raises:
        MissingPackageError: ijson is not installed.
        DataError: As in `load`, or the file holds no array. It comes when the reader gets there.
    """
    ijson = require("ijson", "train", "Reading a JSON file row by row")
    count = 0
    with _opened(path) as file:
        start = _start(file)
        if start not in (b"[", b""):
            kind = "dict" if start == b"{" else "something else"
            raise DataError(f"{path} must hold a list of objects, not {kind}.")
        elements = iter(ijson.items(file, "item"))
        while True:
            try:
                element = next(elements, file)
            except ijson.JSONError:
                raise DataError(_BROKEN.format(path=path, where=f"after {count:,} whole rows")) from None
            if element is file:
                return
            with _rules(f"{path}, row {count + 1},"):
                _shallow(element)
            count += 1
            yield element


def stream_lines(path: Path) -> Iterator[object]:
    """Yield the content of each line of a JSON Lines file; empty lines are skipped.

    Raises:
        DataError: As in `load`, and it names the line. It comes when the reader gets there.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line, f"{path}, line {number},", _null)
            except UnicodeDecodeError:
                raise DataError(f"{path}, line {number}, is not UTF-8 text; save the file as UTF-8.") from None
            except json.JSONDecodeError as error:
                where = f"line {number}: {error.msg}, column {error.colno}"
                raise DataError(
                    f"{path} is not valid JSON Lines, or is cut off ({where}); each line must be one JSON object."
                ) from None
            yield row


def read_frame(path: Path) -> DataFrame:
    """Return a CSV, TSV, Parquet or JSON Lines file as a pandas table.

    Raises:
        MissingFileError: There is no such file.
        DataError: It is of another kind, or cannot be read as one of its kind.
        MissingPackageError: pandas is not installed.
    """
    pandas = require("pandas", "train", "A log of events")
    kind = table_kind(path)
    if kind in _LINES:
        return frame_of(stream_rows(path))
    with _readable(path, kind):
        if kind == "parquet":
            return pandas.read_parquet(path, dtype_backend="pyarrow")
        return pandas.concat(list(_csv_chunks(path)), ignore_index=True)


def frame_of(rows: Iterable[Mapping[str, object]]) -> DataFrame:
    """Return mappings of columns to values as a pandas table, which takes only texts that are whole.

    Its columns hold the values as they are: beside a missing one, pandas would make a float of a whole number.
    """
    return require("pandas", "train", "A log of events").DataFrame(map(whole_fields, rows), dtype=object)


def stream_rows(path: Path) -> Iterator[Mapping[str, object]]:
    """Yield the rows of the same files one at a time, as mappings of columns to values; values of a CSV file are texts.

    Numbers keep all their digits, also beside missing ones. Errors are those of `read_frame`.
    """
    kind = table_kind(path)
    if kind in _LINES:
        for row in stream_lines(path):
            if not isinstance(row, Mapping):
                raise DataError(f"Every line of {path} must be a JSON object, not {kind_of(row)}.")
            yield row
        return
    with _readable(path, kind):
        if kind == "parquet":
            parquet = require("pyarrow.parquet", "train", "Reading a Parquet file")
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_CHUNK):
                    yield from batch.to_pylist()
        else:
            for chunk in _csv_chunks(path):
                yield from chunk.to_dict("records")


def count_rows(path: Path) -> int:
    """Count the rows of such a file without reading their values; line breaks in values of a CSV file count as rows."""
    kind = table_kind(path)
    if kind == "parquet":
        with _readable(path, kind):
            return require("pyarrow.parquet", "train", "Reading a Parquet file").read_metadata(path).num_rows
    with _opened(path) as file:
        ends = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return max(0, ends - (kind in _TABLES))


def table_kind(path: Path) -> str:
    """Return the kind of a table by its name's ending: jsonl, ndjson, parquet, csv, tsv or txt.

    Raises:
        MissingFileError: There is no such file.
        DataError: It has another ending.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no file {str(path)!r}: check the path.")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in (*_LINES, *_TABLES, "parquet"):
        raise DataError(f"{str(path)!r} is of an unknown kind: give a .csv, .tsv, .parquet or .jsonl file (also .gz).")
    return kind


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except DataError:
        raise
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # pandas' own, and pyarrow's
        raise DataError(
            f"{path} cannot be read as {kind} ({type(error).__name__}); check that it opens elsewhere."
        ) from None


def _csv_chunks(path: Path) -> Iterator[DataFrame]:
    pandas = require("pandas", "train", "Reading a CSV file")
    # "NA" and "007" stay, and the first column is no index.
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "index_col": False}
    header = ",".join(pandas.read_csv(path, nrows=0, **options).columns)
    with pandas.read_csv(path, chunksize=_CHUNK, sep=max(",;\t|", key=header.count), **options) as chunks:
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)
                try:
                    chunk = next(chunks, None)
                except pandas.errors.ParserWarning:  # pandas would cut the rows
                    raise DataError(
                        f"{path} has rows with more fields than its header has names: name every column in the header, "
                        "and leave out a delimiter at the end of the rows."
                    ) from None
            if chunk is None:
                return
            yield chunk


def _parsed(raw: bytes, where: str, constant: Callable[[str], None]) -> object:
    text = raw.decode("utf-8")
    with _rules(where):
        return _shallow(json.loads(text, parse_constant=constant))


@contextmanager
def _rules(where: str) -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise DataError(f"{where} holds {error}, which is not JSON; write null for it.") from None
    except RecursionError:
        raise DataError(f"{where} nests lists or objects more than {_DEPTH} deep; leave out what is nested.") from None


def _refused(constant: str) -> None:
    raise OverflowError(constant)


def _null(constant: str) -> None:
    if constant != "NaN":
        _refused(constant)


def _shallow(value: Any, left: int = _DEPTH) -> Any:
    """Return a value; a `RecursionError` if it is nested too deeply."""
    if not left:
        raise RecursionError
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(part, dict | list):
            _shallow(part, left - 1)
    return value


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked and after its byte-order mark."""
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        file = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)) if packed else raw
        try:
            file.seek(len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0)
            if _start(file) == b"<":
                raise DataError(
                    f"{path} is a web page, not JSON: a server often answers a wrong address with one. Check the "
                    "address it was fetched from."
                )
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a damaged or cut-off gzip file ({error}); fetch it again.") from None


def _start(file: BinaryIO) -> bytes:
    """Return the first byte that is not white space, without moving in the file."""
    place = file.tell()
    start = b""
    while not start and (part := file.read(4096)):
        start = part.lstrip()[:1]
    file.seek(place)
    return start
