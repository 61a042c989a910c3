"""Items of many users, from files to a store: every item once, whatever kills the job, on every engine."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from datetime import date

import pytest
import tiny
import torch
from resp_server import resp_server

from pplug_hf import EncoderSpec, Personalizer
from pplug_hf.cli import main
from pplug_hf.data.item_log import read_parts
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError
from pplug_hf.serving import bulk
from pplug_hf.serving.bulk import encode_items
from pplug_hf.serving.open_store import open_store

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
SECRET = "my secret diary"


class MemoryStore:
    """As much of a store as the job uses."""

    namespace, tenant_name = "default", ""

    def __init__(self, spec, fail_at=None):
        self.spec, self.fail_at, self.appended = spec, fail_at, 0
        self.personas = {}

    def append(self, user, items):
        if self.appended == self.fail_at:
            raise OSError(28, "No space left on device")
        self.appended += 1
        known = self.personas.get(user)
        if known is not None:
            items = known + items.without(known.item_ids)
        self.personas[user] = items


def contents(store):
    return {user: (p.item_ids, p.timestamps, p.vectors) for user, p in store.personas.items()}


def assert_same(one, other, tolerance=0.0):
    one, other = contents(one), contents(other)
    assert sorted(one) == sorted(other)
    for user, (ids, times, vectors) in one.items():
        assert ids == other[user][0]
        assert (times is None) == (other[user][1] is None) and (times is None or torch.equal(times, other[user][1]))
        assert torch.allclose(vectors.float(), other[user][2].float(), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def personalizer(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plug")
    model = tiny.model("gpt2", item_template="{tag}: {text}")
    model.config.encoder = str(places / "encoder")
    model.save_pretrained(folder)
    made = Personalizer.from_pretrained(folder, encode_only=True)
    vars(made)["plug_folder"] = str(folder)
    return made


def make_log(users=7, items=60, seed=0):
    rng = random.Random(seed)
    return [
        {
            "user": f"u{rng.randrange(users)}",
            "id": f"i{number}",
            "date": f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
            "tag": rng.choice(tiny.WORDS),
            "text": " ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 12))),
        }
        for number in range(items)
    ]


LOG = make_log()


def log_of(user):
    return [row for row in LOG if row["user"] == user]


def write(path, rows=LOG):
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".jsonl"):
        path.write_text(text)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.name.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(path)
    else:
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return path


def run(personalizer, source, store=None, **options):
    store = store or MemoryStore(personalizer.spec)
    report = encode_items(personalizer, store, source, **{"show_progress": False, "part_size": 8, **options})
    return store, report


# ---- what is in the store ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz", "log.csv", "log.tsv", "log.csv.gz", "log.parquet"])
def test_the_store_holds_what_encode_gives_for_each_users_history(name, personalizer, tmp_path):
    store, report = run(personalizer, [write(tmp_path / name)], part_size=1000)
    histories = {}
    for row in sorted(LOG, key=lambda row: row["date"]):
        histories.setdefault(row["user"], []).append(row)
    assert store.personas.keys() == histories.keys()
    for user, history in histories.items():
        expected, got = personalizer.encode(history), store.personas[user]
        assert got.item_ids == expected.item_ids and torch.equal(got.timestamps, expected.timestamps)
        assert torch.allclose(got.vectors, expected.vectors, atol=1e-5)
    assert (report.encoded, report.done, report.faults.total()) == (60, 0, 0)


def test_a_user_may_be_spread_over_the_log_and_an_item_named_twice(personalizer, tmp_path):
    rows = [
        {"user": "a", "id": "3", "date": "2024-03-01", "tag": "x", "text": "moon"},
        {"user": "a", "id": "1", "date": "2024-01-01", "tag": "x", "text": "sun"},
        {"user": "b", "id": "1", "date": "2024-01-01", "tag": "x", "text": "sun"},
        {"user": "a", "id": "3", "date": "2023-01-01", "tag": "x", "text": "other"},
        {"user": "a", "id": "2", "date": "2024-02-01", "tag": "x", "text": "sea"},
        {"user": "a", "id": "1", "date": "2024-01-01", "tag": "x", "text": "sun"},
    ]
    store, report = run(personalizer, [write(tmp_path / "log.jsonl", rows)], part_size=4)
    persona = store.personas["a"]
    assert persona.item_ids == ("1", "3", "2")  # by time within a part, and parts as they come
    assert persona.last(2).item_ids == ("3", "2")
    assert torch.allclose(persona.vectors[1], personalizer.encode([rows[0]]).vectors[0], atol=1e-5)
    assert len(store.personas["b"]) == 1 and report.encoded == 6


def test_columns_may_have_other_names_and_ids_and_times_be_missing(personalizer, tmp_path):
    rows = [{"who": row["user"], "n": row["id"], "day": row["date"], "t": row["tag"], "x": row["text"]} for row in LOG]
    fields = {"tag": "t", "text": "x"}
    named = {"user": "who", "item": "n", "time": "day", "fields": fields}
    expected, _ = run(personalizer, [write(tmp_path / "log.jsonl")])
    store, _ = run(personalizer, [write(tmp_path / "other.parquet", rows)], **named)
    assert_same(store, expected)
    bare, _ = run(
        personalizer,
        [write(tmp_path / "bare.csv", [rows[0], rows[1], rows[0]])],
        user="who",
        fields=fields,
    )
    (persona,) = {rows[0]["who"]: bare.personas[rows[0]["who"]]}.values()
    assert persona.timestamps is None and len({*persona.item_ids}) == len(persona)
    assert sum(map(len, bare.personas.values())) == 2  # the same row twice is one item


def test_numbers_keep_their_digits_beside_missing_ones(personalizer, tmp_path):
    rows = [{"user": 2**60 + 1, "id": 7, "tag": 1, "text": "sea"}, {"user": None, "id": 8, "tag": None, "text": "sun"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "log.parquet")
    (part,) = read_parts(tmp_path / "log.parquet", "{tag}: {text}")
    assert part.rows[0][:4] == (str(2**60 + 1), "7", None, "1: sea") and part.rows[1].fault == "no user"


def test_a_row_without_an_id_is_the_same_item_in_every_format(tmp_path):
    rows = [
        {"user": "1", "date": "2024-05-31", "score": "5", "text": "sea"},
        {"user": "2", "date": "2024-06-01", "score": "", "text": "sun"},
    ]
    typed = [
        {
            **row,
            "user": int(row["user"]),
            "date": date.fromisoformat(row["date"]),
            "score": int(row["score"] or 0) or None,
        }
        for row in rows
    ]
    pandas.DataFrame(rows).to_csv(tmp_path / "log.csv", index=False)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), tmp_path / "log.parquet")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in typed))
    parts = [next(read_parts(path, "{score}: {text}")) for path in sorted(tmp_path.iterdir())]
    assert len(parts) == 3 and len({part.digest for part in parts}) == 1
    for row in rows:
        del row["date"], row["score"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (texts,) = read_parts(tmp_path / "texts.jsonl", "{text}")
    # As stores have them: no version changes what rows of texts alone are known by.
    for row, fields in (
        (parts[0].rows[0], "('date', '2024-05-31'), ('score', '5')"),
        (texts.rows[0], "('date', None)"),
    ):
        assert row.id == hashlib.sha256(f"[{fields}, ('text', 'sea')]".encode()).hexdigest()[:16]


def test_files_and_folders_are_read_in_order_one_part_at_a_time(personalizer, tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path / "log" / f"part-{number}.jsonl", LOG[number * 20 : number * 20 + 20])
    (tmp_path / "log" / "notes.md").write_text("not a table")
    expected, _ = run(personalizer, [write(tmp_path / "whole.jsonl")], part_size=20)
    store, _ = run(personalizer, [tmp_path / "log"], part_size=20)
    assert_same(store, expected)
    read = []

    def endless(path):
        for number in range(10**9):
            read.append(number)
            yield LOG[number % 60]

    monkeypatch.setattr("pplug_hf.data.sources.stream_rows", endless)
    parts = read_parts(tmp_path / "whole.jsonl", "{tag}: {text}", size=100)
    assert len(next(parts).rows) == len(next(parts).rows) == 100 and len(read) == 200


# ---- jobs that end early ----------------------------------------------------------------------------------------


def test_a_job_continues_after_a_full_disk(personalizer, tmp_path, monkeypatch):
    source, markers = [write(tmp_path / "log.jsonl")], tmp_path / "encoded"
    expected, _ = run(personalizer, source)
    encoded = []
    plain = bulk.embed
    monkeypatch.setattr(
        bulk,
        "embed",
        lambda encoder, texts, *args, **options: encoded.extend(texts) or plain(encoder, texts, *args, **options),
    )
    store = MemoryStore(personalizer.spec, fail_at=12)
    with pytest.raises(OSError, match="No space left"):
        run(personalizer, source, store, markers=markers)
    finished = len(list(markers.iterdir()))
    assert 0 < finished < 8
    encoded.clear()
    store.fail_at = None
    _, report = run(personalizer, source, store, markers=markers)
    assert_same(store, expected)
    assert (report.done, report.encoded, len(encoded)) == (8 * finished, 60 - 8 * finished, 60 - 8 * finished)
    assert SECRET not in str(list(markers.iterdir())) and not any(path.read_bytes() for path in markers.iterdir())


def test_rows_that_are_added_to_a_log_later_are_encoded_alone(personalizer, tmp_path):
    source, markers = tmp_path / "log.jsonl", tmp_path / "encoded"
    store, _ = run(personalizer, [write(source, LOG[:24])], markers=markers)
    _, report = run(personalizer, [write(source)], store, markers=markers)
    assert (report.done, report.encoded) == (24, 36)
    assert_same(store, run(personalizer, [source])[0])
    assert run(personalizer, [write(tmp_path / "copy.parquet")], store, markers=markers)[1].encoded == 0  # any file
    changed = [{**LOG[0], "text": "other"}, *LOG[1:]]
    assert run(personalizer, [write(source, changed)], store, markers=markers)[1].encoded == 8


KILLED = """
import itertools, os, sys
from pplug_hf import Personalizer
from pplug_hf.serving.bulk import encode_items
from pplug_hf.serving.open_store import open_store

plug, source, folder = sys.argv[1:]
personalizer = Personalizer.from_pretrained(plug, encode_only=True)
for last in (3, 40, 80):
    if not (child := os.fork()):
        with open_store(folder, personalizer.spec) as store:
            append, calls = store.append, itertools.count(1)
            store.append = lambda *items: os._exit(9) if next(calls) == last else append(*items)
            encode_items(personalizer, store, [source], markers=folder + "/encoded", part_size=8)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, len(os.listdir(folder + "/encoded")) if os.path.isdir(folder + "/encoded") else 0, flush=True)
"""


def stored(store, users=7):
    made = MemoryStore(store.spec)
    made.personas = {user: persona for user in (f"u{n}" for n in range(users)) if (persona := store.get(user))}
    return made


def test_a_job_that_is_killed_again_and_again_leaves_the_store_of_one_that_was_not(personalizer, tmp_path):
    source, folder = write(tmp_path / "log.jsonl", make_log(items=300)), tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, personalizer.plug_folder, source, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    ends = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [status for status, _ in ends] == [9, 9, 9], done.stderr
    with open_store(tmp_path / "whole", personalizer.spec) as store:
        run(personalizer, [source], store)
        expected = stored(store)
    with open_store(folder, personalizer.spec) as store:
        _, report = run(personalizer, [source], store, markers=folder / "encoded")
        assert_same(stored(store), expected)  # the same items, in the same order, bit for bit
    assert report.done == 8 * ends[-1][1] and report.encoded + report.done == 300


def test_tenants_and_namespaces_do_not_share_markers(personalizer, tmp_path):
    source, markers = [write(tmp_path / "log.jsonl")], tmp_path / "encoded"
    with open_store(tmp_path / "store", personalizer.spec) as store:
        for each in (store, store.tenant("acme"), open_store(tmp_path / "store", personalizer.spec, namespace="new")):
            assert run(personalizer, source, each, markers=markers)[1].encoded == 60
            assert each.stats().items == 60
        assert run(personalizer, source, store, markers=markers)[1].encoded == 0


def test_a_deleted_user_does_not_come_back_with_the_next_run(personalizer, tmp_path):
    source, markers = write(tmp_path / "log.jsonl"), tmp_path / "encoded"
    with open_store(tmp_path / "store", personalizer.spec) as store:
        run(personalizer, [source], store, markers=markers)
        store.delete_user("u1")
        run(personalizer, [write(source, [*LOG, *make_log(items=8, seed=1)])], store, markers=markers)
        assert store.get("u1") is None or not {*store.get("u1").item_ids} - {f"i{n}" for n in range(56, 60)} - {
            f"i{n}" for n in range(8)
        }


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_fills_a_store_and_says_how_much(personalizer, tmp_path, capsys):
    rows = [{**row, "shelf": row["tag"]} for row in LOG]
    source = write(tmp_path / "log.csv", [*rows, {**rows[0], "user": ""}])
    command = ["encode", "--source", source, "--plug", personalizer.plug_folder, "--store", tmp_path / "store"]
    command = [*map(str, command), "--fields", "tag=shelf"]
    assert main(command) == 1
    assert (
        "log.csv, row 61: no user. Mend the row, or leave such rows out with --bad_rows skip."
        in capsys.readouterr().err
    )
    assert main([*command, "--bad_rows", "skip"]) == 0
    printed = capsys.readouterr()
    assert "61 rows: 60 encoded now, 0 before.\n1 row left out (no user; first " in printed.out
    assert "The store holds 60 items of 7 users" in printed.out
    assert "Encoding items: 100%" in printed.err and " 61/61 [" in printed.err  # with the time left
    assert main([*command, "--bad_rows", "skip"]) == 0
    assert "61 rows: 0 encoded now, 61 before." in capsys.readouterr().out
    with open_store(tmp_path / "store", personalizer.spec) as store:
        persona = store.get("u3")
    assert len(persona) == len(log_of("u3"))
    assert torch.allclose(persona.vectors.float().sum(0), personalizer.encode(log_of("u3")).vectors.sum(0), atol=1e-2)


def test_the_command_fills_a_store_on_a_server(personalizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PPLUG_STORE_SECRET", "a secret of a test, and long enough")
    source = write(tmp_path / "log.jsonl")
    with resp_server(tmp_path / "server") as (_, url):
        command = ["encode", "--source", source, "--plug", personalizer.plug_folder, "--store", url]
        command = [str(part) for part in (*command, "--markers", tmp_path / "encoded")]
        assert main(command) == main(command) == 0
        printed = capsys.readouterr().out
        assert "60 rows: 60 encoded now" in printed and "60 rows: 0 encoded now, 60 before" in printed
        assert printed.count("The store holds 60 items of 7 users") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--source", "x.csv"], "give all three"),
        (["--source", "x.csv", "--plug", ".", "--store", "s", "--fields", "tag"], "takes FIELD=COLUMN, got 'tag'"),
        (["--source", "gone.csv", "--plug", ".", "--store", "s"], "no file 'gone.csv'"),
        (["--source", "x.csv", "--plug", ".", "--store", "redis://localhost"], "give --markers"),
        (["--source", "x.csv", "--workers", "0"], "--workers must be greater than 0"),
    ],
)
def test_what_the_command_needs(options, message, capsys):
    assert main(["encode", *options]) == 1
    assert message in capsys.readouterr().err


# ---- what cannot be right ---------------------------------------------------------------------------------------


BAD = {
    "no user": {"user": " "},
    "no item id": {"id": None},
    "no text": {"text": "", "tag": None},
    "not a date": {"date": "soon"},
    "no date": {"date": ""},
    "the field 'text' is a list, not a text": {"text": [SECRET]},
    "the user has more than 256 characters": {"user": "u" * 257},
    "the user is not a valid text": {"user": "\ud800"},
}


@pytest.mark.parametrize("name", ["id", "date"])
def test_an_id_or_a_date_that_the_first_row_lacks_is_not_lost(personalizer, tmp_path, name):
    first = {key: value for key, value in LOG[0].items() if key != name}
    source = [write(tmp_path / "log.jsonl", [first, {**LOG[1], name: None}, *LOG[2:]])]
    with pytest.raises(DataError, match=rf"row 3: '{name}' is not in the file's first row, .* write it there, too"):
        run(personalizer, source)


@pytest.mark.parametrize("fault, change", BAD.items(), ids=BAD)
def test_a_bad_row_is_named_or_counted(personalizer, tmp_path, fault, change):
    rows = [*LOG[:18], {**LOG[18], **change}, *LOG[19:]]
    source = [write(tmp_path / "log.jsonl", rows)]
    store = MemoryStore(personalizer.spec)
    with pytest.raises(DataError, match=rf"log\.jsonl, row 19: {fault}\. Mend the row, or leave") as error:
        run(personalizer, source, store, markers=tmp_path / "encoded")
    assert SECRET not in str(error.value)
    _, report = run(personalizer, source, store, markers=tmp_path / "encoded", bad_rows="skip")
    assert f"1 row left out ({fault}; first {tmp_path / 'log.jsonl'}, row 19)." in str(report)
    expected, _ = run(personalizer, [write(tmp_path / "good.jsonl", rows[:18] + rows[19:])])
    assert {u: sorted(p.item_ids) for u, p in store.personas.items()} == {
        u: sorted(p.item_ids) for u, p in expected.personas.items()
    }
    _, report = run(personalizer, source, store, markers=tmp_path / "encoded", bad_rows="skip")
    assert report.done == 60 and report.encoded == 0


@pytest.mark.parametrize(
    "columns, message",
    [
        (dict(user="who"), r"has no column 'who' \(user\); its columns are 'user', 'id', 'date', 'tag', 'text'"),
        (dict(time="when"), r"no column 'when' \(time\)"),
        (dict(fields={"text": "body"}), r"no column 'body' \(field text\)"),
        (dict(fields={"body": "text"}), "Items of this plug have no field 'body'; their fields are tag, text"),
    ],
)
def test_columns_that_are_not_there(personalizer, tmp_path, columns, message):
    for name in ("log.jsonl", "log.csv"):
        with pytest.raises(DataError, match=message):
            run(personalizer, [write(tmp_path / name)], **columns)


def test_stores_and_files_that_do_not_fit(personalizer, tmp_path):
    other = MemoryStore(EncoderSpec("other", 12))
    with pytest.raises(MismatchError, match=r"The store holds personas of .*open a store of this plug's own"):
        run(personalizer, [write(tmp_path / "log.jsonl")], other)
    with pytest.raises(MissingFileError, match=r"no file '.*gone\.csv'"):
        run(personalizer, [tmp_path / "gone.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"holds no \.parquet"):
        run(personalizer, [tmp_path / "empty"])
    (tmp_path / "log.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="unknown kind"):
        run(personalizer, [tmp_path / "log.xlsx"])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        run(personalizer, [tmp_path / "cut.parquet"])
    with pytest.raises(ConfigurationError, match="choose one of local, ray"):
        run(personalizer, [tmp_path / "log.jsonl"], engine="spark")
    with pytest.raises(ConfigurationError, match="give at least 1"):
        run(personalizer, [tmp_path / "log.jsonl"], workers=0)


# ---- engines ----------------------------------------------------------------------------------------------------


def test_two_processes_leave_the_same_store(personalizer, tmp_path):
    source = [write(tmp_path / "log.jsonl")]
    store, _ = run(personalizer, source, workers=2, part_size=20)
    assert_same(store, run(personalizer, source, part_size=20)[0], tolerance=1e-5)
