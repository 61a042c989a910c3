"""A log of events becomes a data set and a task: what is before what, who is held out, and how it is stored."""

import contextlib
import datetime
import gzip
import io
import itertools
import json
import random
import re
from importlib.resources import files

import pytest

from pplug_hf import ConfigurationError, DataError, MissingFileError, from_events
from pplug_hf.cli import main
from pplug_hf.data import events, records, sources
from pplug_hf.data.events import read_stored
from pplug_hf.data.examples import read_examples, stream
from pplug_hf.data.histories import nearest_users
from pplug_hf.tasks.items import parse_date
from pplug_hf.tasks.task_files import read_task

pandas = pytest.importorskip("pandas")
ASSETS = files("pplug_hf.demo") / "assets"
SECRET = "my secret diary"
COLUMNS = {"user": "customer_id", "text": "story_text", "answer": "shelf", "time": "published_at"}
OPTIONS = [text for role, column in COLUMNS.items() for text in (f"--{role}", column)]


def make_log(users=12, seed=0):
    rng = random.Random(seed)
    words = ["a", "castle", "letters", "prophet", "sea", "wanda"]
    log = [
        {
            "customer_id": f"c{user}",
            "story_text": " ".join(rng.choices(words, k=4)),
            "shelf": rng.choice(["epic", "cosy", "dark"]),
            "published_at": f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        }
        for user in range(users)
        for _ in range(4 + user % 5)
    ]
    rng.shuffle(log)
    return log


LOG = make_log()


def make(rows, **options):
    return from_events(rows, **{"user": "u", "text": "t", "answer": "a", "time": "d", "dev": 0, "test": 0, **options})


def event(user, text, day, answer="x"):
    return {"u": user, "t": text, "a": answer, "d": day}


def asked(made, split="train"):
    """text -> texts of its history"""
    return {
        row["input"].removeprefix(f"{made.task.query_marker} "): [item["text"] for item in row["profile"]]
        for row in made.splits[split]
    }


# ---- what is before what ----------------------------------------------------------------------------------------


def test_a_history_is_what_its_user_did_strictly_before():
    rows = [
        event("b", "b2", "2024-01-02"),
        event("a", "a3", "2024-03-01T10:00:00"),
        event("a", "a1", "2024-01-31"),
        event("a", "a2, first of two", "2024-02-01"),
        event("b", "b1", "2024-01-01"),
        event("a", "a2, second of two", "2024-02-01"),
    ]
    two = ["a1", "a2, first of two", "a2, second of two"]
    assert asked(make(rows, min_history=0)) == {
        **{"b1": [], "b2": ["b1"], "a1": []},
        **{"a2, first of two": ["a1"], "a2, second of two": ["a1"], "a3": two},
    }
    assert asked(make(rows)).keys() == {"b2", "a2, first of two", "a2, second of two", "a3"}
    assert asked(make(rows, min_history=2)) == {"a3": two}
    assert asked(make(rows, questions_per_user=1)) == {"b2": ["b1"], "a3": two}


def test_times_are_dates_numbers_or_the_order_of_the_rows():
    texts = ["c", "a", "b"]
    times = {
        "dates": ["2024-01-10", "2023-12-31", "2024-01-09"],
        "times of day in other zones": ["2024-01-01T12:00:00+00:00", "2024-01-01T12:00+02:00", "2024-01-01T11:00Z"],
        "numbers": [10, 8, 9],  # 10 < 8 as texts
        "seconds": [1_700_000_010, 1_700_000_008, 1_700_000_009],
        "dates of Python": [datetime.date(2024, 1, 10), datetime.date(2023, 12, 31), datetime.date(2024, 1, 9)],
    }
    for name, days in times.items():
        rows = [event("a", *pair) for pair in zip(texts, days, strict=True)]
        assert asked(make(rows)) == {"b": ["a"], "c": ["a", "b"]}, name
        table = pandas.DataFrame(rows)
        if name == "dates":
            table["d"] = pandas.to_datetime(table["d"])
        assert asked(make(table)) == {"b": ["a"], "c": ["a", "b"]}, name
    german = [
        event("a", text, day) for text, day in zip(texts, ["10.01.2024", "31.12.2023", "09.01.2024"], strict=True)
    ]
    made = make(german, time_format="%d.%m.%Y")
    assert asked(made) == {"b": ["a"], "c": ["a", "b"]}
    assert [item["date"] for item in made.splits["train"].items["a"]] == ["2023-12-31", "2024-01-09", "2024-01-10"]
    assert asked(make(german, time=None)) == {"a": ["c"], "b": ["c", "a"]}
    with pytest.raises(
        DataError, match=r"3 of 3 values of the column 'd' are not dates \(first in event 0\).*time_format"
    ):
        make(german)


@pytest.mark.parametrize(
    "times, dates, said",
    [
        (
            [1_700_000_008, 1_700_000_009],
            ["2023-11-14T22:13:28", "2023-11-14T22:13:29"],
            "times since 1970, from 2023-11-14T",
        ),
        ([1_700_000_008_000, 1_700_000_009_000], ["2023-11-14T22:13:28", "2023-11-14T22:13:29"], "since 1970"),
        ([1_700_000_008_000_000, 1_700_000_008_000_001], ["2023-11-14T22:13:28"] * 2, "since 1970"),
        (["1700000008.25", "1700000009"], ["2023-11-14T22:13:28", "2023-11-14T22:13:29"], "since 1970"),
        ([2018, 2020], ["2018", "2020"], "taken for years or .* from 2018 to 2020"),
        ([8, 9], [None, None], "they order the events, and items have no dates. If .* time_format='%Y%m%d'"),
        ([20240531123000, 20240531123001], [None, None], "they order the events"),
        (["2018-03", "2018-04"], ["2018-03", "2018-04"], ""),
        (["2018-03-09 10:00 UTC", "2018-03-10"], ["2018-03-09T10:00:00", "2018-03-10"], ""),
        (["20180309T100000", "2018/03/10"], ["2018-03-09T10:00:00", "2018-03-10T00:00:00"], ""),
    ],
)
def test_numbers_and_dates_are_read_as_in_items(times, dates, said):
    made = make([event("a", "second", times[1]), event("a", "first", times[0])])
    assert asked(made) == {"second": ["first"]}
    assert [item.get("date") for item in made.splits["train"].items["a"]] == dates
    assert [parse_date(date)[:1] for date in dates if date] == [(int(date[:4]),) for date in dates if date]
    assert re.search(said, str(made)) and ("holds numbers" in str(made)) == bool(said)


def test_numbers_are_dates_in_the_format_that_is_given():
    made = make(
        [event("a", "second", 20240531123001), event("a", "first", 20240531123000)], time_format="%Y%m%d%H%M%S"
    )
    assert [item["date"] for item in made.splits["train"].items["a"]] == ["2024-05-31T12:30:00", "2024-05-31T12:30:01"]


# ---- who is held out --------------------------------------------------------------------------------------------


def users(made, split):
    return {row["user"] for row in made.splits[split]}


def test_held_out_users_are_the_nearest_number_and_the_same_whatever_the_order():
    made = from_events(LOG, **COLUMNS)
    assert [len(users(made, split)) for split in ("train", "dev", "test")] == [8, 2, 2]
    assert not users(made, "train") & (users(made, "dev") | users(made, "test"))
    again = from_events(sorted(LOG, key=str), **COLUMNS)
    assert [users(again, split) for split in again.splits] == [users(made, split) for split in made.splits]
    other = [from_events(LOG, **COLUMNS, seed=seed) for seed in range(4)]
    assert len({frozenset(users(each, "test")) for each in other}) > 1


@pytest.mark.parametrize("split", ["per-user", "global"])
def test_a_split_by_time_asks_later_questions(split):
    made = from_events(LOG, **COLUMNS, split=split, dev=0.2, test=0.2)
    when = {item["id"]: item["date"] for items in made.splits["train"].items.values() for item in items}
    found = {name: [(row["user"], when[row["id"]]) for row in rows] for name, rows in made.splits.items()}
    groups = users(made, "train") if split == "per-user" else [None]
    for group in groups:
        days = [[day for user, day in found[name] if group in (None, user)] for name in ("train", "dev", "test")]
        days = [each for each in days if each]
        assert all(max(one) < min(other) for one, other in itertools.pairwise(days))
    sizes = [len(found[name]) for name in ("train", "dev", "test")]
    assert sum(sizes) == len(LOG) - 12 and min(sizes) >= 8


def test_nearest_users():
    names = [f"u{number}" for number in range(32)]
    assert {len(nearest_users(names, 0.1, seed)) for seed in range(12)} == {3}
    assert [len(nearest_users(names[:n], 0.1)) for n in (0, 1, 2, 4)] == [0, 0, 1, 1]
    assert [len(nearest_users(names, share)) for share in (0, 0.99, 1)] == [0, 31, 32]


# ---- answers ----------------------------------------------------------------------------------------------------


def rows_with(answers):
    return [event(f"u{i % 3}", f"text {i}", i, answer) for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    "answers, options, labels, metric",
    [
        (["yes", "no"] * 6, {}, ("no", "yes"), "accuracy"),
        (["NA", "10", "9"] * 6, {}, ("10", "9", "NA"), "accuracy"),
        ([10, 9, 3] * 6, {}, ("3", "9", "10"), "mae"),
        ([4.0, 3.5, None, 2.0] * 6, {}, ("2", "3.5", "4"), "mae"),
        ([4, 3, 2] * 6, {"metric": "accuracy"}, ("2", "3", "4"), "accuracy"),
        ([f"tale {i}" for i in range(12)], {}, (), "rouge"),
        ([f"tale {i % 4}" for i in range(12)], {}, (), "rouge"),  # few, but not repeated
        (
            [f"tale {i % 4}" for i in range(12)],
            {"answers": "labels"},
            ("tale 0", "tale 1", "tale 2", "tale 3"),
            "accuracy",
        ),
        (["yes", "no"] * 6, {"answers": "text"}, (), "rouge"),
        (["a long sentence about the sea and the moon above"] * 12, {}, (), "rouge"),
    ],
)
def test_few_and_repeated_answers_are_labels(answers, options, labels, metric):
    made = make(rows_with(answers), **options)
    assert (made.task.labels, made.task.metric) == (labels, metric)
    assert ("labels (" in str(made)) == bool(labels) and ("set answers to" in str(made))


def test_an_instruction_or_a_question_of_its_own_is_asked_before_the_text():
    rows = [{**event("a", f"text {i}", i), "q": f"Question\n\n {i}?"} for i in range(3)]
    made = make(rows, instruction="Which {shelf}?")
    (first, _) = made.splits["train"]
    assert first["input"] == "Which {shelf}? text 1" and made.task.query(first["input"]) == "text 1"
    made = make(rows, question="q")
    (first, _) = made.splits["train"]
    assert made.task.query(first["input"]) == "text 1" and first["input"].startswith("Question 1?")
    assert made.task.question(first["profile"][0], "like") == ("Question 0?\n\ntext 0", "text 0")
    assert "every input begins with 'Give the a of this t:'" in str(make(rows))


# ---- sources and the folder -------------------------------------------------------------------------------------


def plain(data, split="train"):
    return [(e.user, e.prompt, e.query, e.target, e.history) for e in read_examples(data, split)[1]]


def test_every_source_gives_the_same_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = pandas.DataFrame(LOG)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "b.csv.gz", index=False, sep=";")
    table.to_csv(tmp_path / "c.tsv", index=False, sep="\t", encoding="utf-8-sig")
    table.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, LOG)).encode()))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 5
    tables = [table, datasets.Dataset.from_list(LOG), iter(LOG), [dict(row) for row in LOG]]
    first: dict[str, bytes] = {}
    for source in (*paths, *map(str, paths), *tables, datasets.Dataset.from_list(LOG).to_iterable_dataset()):
        from_events(source, **COLUMNS, name="shelves").save(tmp_path / "out")
        made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert made.keys() == {"task.json", "items.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl"}
        first = first or made
        assert made == first, source


def test_a_folder_holds_every_event_once_and_reads_like_the_rows(tmp_path):
    log = [{"u": "a", "t": f"{i} " + "castle " * 20, "a": "xy"[i % 2], "d": i} for i in range(300)]
    made = make(log, split="per-user", dev=0.1, test=0.1, name="shelves")
    made.save(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 4 * len(json.dumps(log)) and size * 20 < len(json.dumps([*made.splits["train"]]))
    task, examples = read_examples(tmp_path, "train")
    assert task == made.task == read_task(tmp_path / "task.json")
    assert [[item["text"] for item in e.history] for e in examples] == [
        [item["text"] for item in row["profile"]] for row in made.splits["train"]
    ]
    for split in ("train", "dev", "test"):
        assert plain(tmp_path, split) == [
            (e.user, e.prompt, e.query, e.target, e.history) for e in read_examples(made.splits, split, task)[1]
        ]
    assert [e.id for e in examples] == [e.id for e in read_examples(tmp_path / "train.jsonl", "train")[1]]


def test_each_item_of_a_folder_is_looked_at_once(tmp_path, monkeypatch):
    """Not by every later question of its user, or time would grow with the square."""
    make([{"u": f"u{i % 2}", "t": f"t{i}", "a": "xy"[i % 3 == 0], "d": i} for i in range(40)]).save(tmp_path)
    looked = []
    check = records._check_fields
    monkeypatch.setattr(records, "_check_fields", lambda item, *rest: looked.append(item["id"]) or check(item, *rest))
    for read_all in (read_examples, stream):
        read = list(read_all(tmp_path, "train")[1])
        assert len(read) == 38 and len({id(item) for e in read for item in e.history}) == 38
        assert len(looked) == len(set(looked)) == 38
        looked.clear()


def test_what_is_noted_of_a_folder_is_noted_of_each_question(tmp_path):
    make([event("a", f"t{i}", i, "xy"[i % 2]) for i in range(8)], answers="labels").save(tmp_path)
    path = tmp_path / "items.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    items[2] |= {"answer": "other", "date": "soon"}
    items[4] |= {"answer": None, "date": "2001"}
    items[5] |= {"date": "2000"}
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    stored = stream(tmp_path, "train")
    plain = stream(
        [
            {**row, "profile": list(row["profile"])}
            for row in read_stored(
                [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()], path, "the rows"
            )
        ],
        task=stored.task,
    )
    assert list(stored.examples) == list(plain.examples)
    assert stored.repairs == plain.repairs and {"null", "unordered", "foreign_label"} <= stored.repairs.keys()
    assert (stored.repairs["foreign_label"].count, stored.repairs["foreign_label"].questions) == (5, 5)


def test_a_folder_is_made_again_but_nothing_else_is_overwritten(tmp_path):
    from_events(LOG, **COLUMNS).save(tmp_path / "data")
    from_events(LOG, **COLUMNS, test=0).save(tmp_path / "data")
    assert not (tmp_path / "data" / "test.jsonl").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text(SECRET)
    with pytest.raises(ConfigurationError, match="holds something else: name a new folder"):
        from_events(LOG, **COLUMNS).save(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]


def test_items_that_are_gone_are_missed(tmp_path):
    from_events(LOG, **COLUMNS).save(tmp_path)
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    (tmp_path / "items.jsonl").write_text("\n".join(lines[:9]))
    with pytest.raises(DataError, match=r"has a history of . items, but items\.jsonl has 0 of this user"):
        read_examples(tmp_path, "train")
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(DataError, match="must be a list of objects"):
        read_examples(tmp_path, "train")


@pytest.mark.parametrize("before", [True, False])
def test_a_killed_save_leaves_nothing_that_reads_and_can_be_repeated(tmp_path, monkeypatch, before):
    class Killed(BaseException):
        pass

    folder, real = tmp_path / "data", events.write_text
    if before:
        from_events([{**row, "story_text": "old"} for row in LOG], **COLUMNS).save(folder)
    for kill_at in range(5):
        left = kill_at

        def write_text(path, text):
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            real(path, text)

        monkeypatch.setattr(events, "write_text", write_text)
        with pytest.raises(Killed):
            from_events(LOG, **COLUMNS).save(folder)
        with pytest.raises((DataError, MissingFileError)):
            read_examples(folder, "train")
    monkeypatch.setattr(events, "write_text", real)
    made = from_events(LOG, **COLUMNS)
    made.save(folder)
    assert plain(folder) == [
        (e.user, e.prompt, e.query, e.target, e.history) for e in read_examples(made.splits, "train", made.task)[1]
    ]


@pytest.mark.parametrize(
    "text", ["тёмное и странное", "ความรักและเวลา", "海边的一个夜晚", "a dark and strange story", "🌊🌊"]
)
def test_an_answer_has_room_for_all_its_tokens_in_any_script(text):
    rows = [event("a", f"t{i}", f"2024-01-{i + 1:02}", text if i % 2 else "x") for i in range(12)]
    task = make(rows, answers="labels").task
    least = len(text) // 3 if text.isascii() else len(text.encode()) - text.count(" ")  # a byte-level tokenizer's most
    assert task.max_new_tokens > least


def test_half_an_emoji_and_missing_values_of_nullable_columns(tmp_path):
    rows = [event("a", f"t{i}\ud83d", f"2024-01-{i + 1:02}", "y\ud83d") for i in range(4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (rows, tmp_path / "log.jsonl"):
        made = make(source, answers="text")
        assert [item["text"] for item in made.splits["train"].items["a"]] == [f"t{i}\ufffd" for i in range(4)]
    frame = pandas.DataFrame({"u": ["a"] * 3, "t": ["t0", "t1", "t2"], "a": [1, 2, None], "d": [1, 2, 3]})
    for kind in ("Int64", "Float64", "string"):
        made = make(frame.astype({"a": kind}), answers="text", min_history=0)
        assert [item["text"] for item in made.splits["train"].items["a"]] == ["t0", "t1"]
        assert "1 of 3 events without 'a' are left out." in made.notes


def test_users_with_long_numbers_stay_apart_beside_a_missing_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = [1234567890123456789 + i for i in range(3)]
    rows = [event(user, f"t{i}", f"2024-01-0{i}") for user in numbers for i in (1, 2)] + [
        event(None, "t", "2024-01-01")
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "log.parquet")
    nullable = pandas.DataFrame(rows).assign(u=pandas.array([*numbers, None], "Int64")[[0, 0, 1, 1, 2, 2, 3]])
    stored = datasets.Dataset.from_list([*rows, event(7, "t", "2024-01-01")])
    for source in (
        *(rows, tmp_path / "log.jsonl", tmp_path / "log.parquet", table, nullable),
        *(stored.select(range(7)), stored.select(range(7)).to_iterable_dataset()),
    ):
        made = make(source)
        assert list(made.splits["train"].items) == [str(number) for number in numbers], source
        assert "1 of 7 events without 'u' are left out." in made.notes
    rounded = pandas.DataFrame({**pandas.DataFrame(rows), "u": [float(row["u"] or 5) for row in rows]})
    with pytest.raises(DataError, match=r"column 'u' holds whole numbers as floats.*dtype='Int64'") as raised:
        make(rounded)
    assert "12345678" not in str(raised.value)
    row = {"input": "book: x", "user": float(numbers[0]), "output": "epic", "profile": []}
    with pytest.raises(DataError, match="user of id '0' is a float"):
        read_examples([row], "train", "demo")


@pytest.mark.parametrize("rows", ["a,t1,x,1,\na,t2,y,2,", "a,t1,x,1\na,t2,y,2,5", "a,t1,x,1,5\na,t2,y,2"])
def test_rows_of_a_csv_file_that_are_longer_than_its_header_are_refused(tmp_path, rows):
    (tmp_path / "log.csv").write_text(f"u,t,a,d\n{rows}\n")
    for read in (make, lambda path: list(sources.stream_rows(path))):
        with pytest.raises(DataError, match=r"more fields than its header|cannot be read as csv"):
            read(tmp_path / "log.csv")


# ---- what cannot be right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, options, error, message",
    [
        (
            LOG,
            {"user": "customer"},
            DataError,
            r"no column 'customer' \(user\); the columns are 'customer_id', 'story_text'",
        ),
        (
            LOG,
            {"text": "x", "answer": "y"},
            DataError,
            r"no column 'x' \(text\), 'y' \(answer\); the columns are 'customer_id'",
        ),
        ([{**row, "shelf": [SECRET]} for row in LOG], {}, DataError, "'shelf' holds lists or objects"),
        ([], {"time": None}, DataError, "no column .*; the columns are"),
        (
            [{**row, "shelf": None} for row in LOG],
            {},
            DataError,
            r"Every event lacks one of its fields\. 69 of 69 .* 'shelf'",
        ),
        ([SECRET], {}, DataError, "must be a mapping of columns to values, not a str"),
        (3, {}, DataError, "not an int"),
        ("nowhere.csv", {}, MissingFileError, "no file 'nowhere.csv'"),
        (LOG, {"dev": 0.5, "test": 0.5}, ConfigurationError, "leave some for train"),
        (LOG, {"time": None, "time_format": "%d.%m.%Y"}, ConfigurationError, "no column holds times: name it as time"),
        (
            LOG,
            {"min_history": 99},
            DataError,
            "No question is left to train on: of 69 events of 12 users, 0 have at least 99",
        ),
        (LOG, {"split": "random"}, ConfigurationError, "one of users, per-user, global"),
    ],
)
def test_logs_that_cannot_be_used(rows, options, error, message):
    with pytest.raises(error, match=message) as raised:
        from_events(rows, **{**COLUMNS, **options})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("log.xlsx", b"PK", "unknown kind: give a .csv, .tsv, .parquet or .jsonl file"),
        ("log.csv", b"", r"cannot be read as csv \(EmptyDataError\)"),
        ("log.csv", b"a,b\n\xff,1", "is not UTF-8 text"),
        ("log.parquet", b"PAR", r"cannot be read as parquet \(ArrowInvalid\)"),
        ("log.jsonl", b'{"a": 1}\n{"a', "line 2"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        from_events(tmp_path / name, **COLUMNS)


def test_events_without_a_field_are_left_out_and_counted():
    rows = [*LOG, {**LOG[0], "shelf": " "}, {**LOG[0], "published_at": None}]
    made = from_events(rows, **COLUMNS)
    assert made.splits["train"].items == from_events(LOG, **COLUMNS).splits["train"].items
    assert "1 of 71 events without 'shelf' are left out." in made.notes
    assert "1 of 71 events without 'published_at' are left out." in made.notes


# ---- all of it --------------------------------------------------------------------------------------------------


def test_from_a_csv_to_results(tmp_path, capsys, monkeypatch):
    """Every command finds the task by itself."""
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame(LOG).to_csv("events.csv", index=False)
    store = ["--data", "shop", "--vectors", "vectors"]
    parts = ["--backbone", str(ASSETS / "backbone"), "--encoder", str(ASSETS / "encoder")]
    commands = [
        ["prepare", "--source", "events.csv", *OPTIONS, "--instruction", "Which shelf?", "--output", "shop"],
        ["report", "--data", "shop", "--split", "train"],
        ["encode", *store, *parts[2:]],
        ["train", *store, *parts, "--output", "plug", "--epochs", "1"],
        ["evaluate", *store, "--plug", "plug"],
        ["bench", *store, "--plugs", "mine=plug", "--rows", "bm25@1", "mine", "--output", "bench"],
    ]
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()):
            assert main(command) == 0, command
    printed = capsys.readouterr().out
    assert "Data set and task are in shop. Next: pplug-hf train --data shop" in printed
    assert re.search(
        "shop: .* questions and 7 history items of 7 users to train on, . questions of 1 other users", printed
    )
    assert "shop, dev: " in printed and "| bm25@1" in printed
    assert main(["prepare", "--source", "events.csv", *OPTIONS[2:], "--user", "who", "--output", "new"]) == 1
    assert capsys.readouterr().err.startswith(
        "pplug-hf prepare: There is no column 'who' (user); the columns are 'customer_id'"
    )
    assert not (tmp_path / "new").exists()
