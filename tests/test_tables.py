"""Reading into tables: every format, what is repaired, what is refused, and memory that stays flat."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_lamp import REAL, SECRET, gold, item, message, question, write

from pplug_hf.data.examples import stream
from pplug_hf.data.histories import history_examples
from pplug_hf.data.lamp import read_lamp
from pplug_hf.data.records import REPAIRS, Repairs
from pplug_hf.data.report import describe
from pplug_hf.data.tables import examples, features, read_splits, read_table
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.modeling.encoders import item_texts
from pplug_hf.tasks.task import TASKS, Task, score

datasets = pytest.importorskip("datasets")
pytest.importorskip("ijson")

PLANTS = Task(
    name="plants",
    query_marker="plant:",
    query_field="look",
    answer_field="place",
    item_template="{place}: {look}",
    item_template_unlabelled="{look}",
    labels=("window", "shade"),
    metric="accuracy",
    max_new_tokens=4,
)


def plant(number=0, output="window", **more):
    profile = [{"id": "a", "look": SECRET, "place": "shade", "date": "2001"}]
    return {"id": f"p{number}", "user": "u", "input": f"Where? plant: fern {number}", "output": output} | (
        {"profile": profile} | more
    )


def lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def refused(source, *args, error=DataError, **kwargs):
    with pytest.raises(error) as caught:
        read_table(source, *args, **kwargs)
    assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    return str(caught.value)


# What comes out


@pytest.mark.parametrize("packed", [False, True])
def test_a_lamp_folder_is_what_read_lamp_reads(tmp_path, packed):
    profile = [
        item(date=None),
        item("8", None, score=3.5, date="2002-01-01"),
        {"id": 9, "tag": 1.50, "description": ""},
    ]
    write(
        tmp_path,
        [question("0", user_id="u", profile=profile), question("1", profile=[])],
        [gold("1"), gold("0")],
        packed=packed,
    )
    task, rows, repairs = read_table(tmp_path, "dev")
    assert task is TASKS["LaMP-2"] and rows.features == features(task)
    assert list(rows.features["profile"].feature) == ["id", "description", "tag", "date"]
    again, expected = read_lamp(tmp_path, "dev")
    assert again is task
    for row, example in zip(rows, expected, strict=True):
        assert [row[name] for name in ("id", "user", "input", "query", "output")] == [
            example.id, example.user, example.prompt, example.query, example.target
        ]  # fmt: skip
        wanted = [
            {name: entry.get(name, "") for name in ("id", "description", "tag", "date")} for entry in example.history
        ]
        assert row["profile"] == wanted
    assert [e.history for e in examples(rows)] == [row["profile"] for row in rows]
    assert repairs["extra_fields"].names == ["score"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json"])
def test_a_task_of_the_users_own_from_a_file(tmp_path, name):
    rows = [plant(0), plant(1, "shade", profile=[])]
    path = tmp_path / name
    path.write_text(json.dumps(rows)) if name == "x.json" else lines(path, rows)
    task, table, repairs = read_table(path, task=PLANTS)
    assert task is PLANTS and table["query"] == ["fern 0", "fern 1"] and table["output"] == ["window", "shade"]
    assert table[0]["profile"] == [{"id": "a", "look": SECRET, "place": "shade", "date": "2001"}]
    assert str(repairs).splitlines() == [
        "1 empty histories (id 'p1'): kept",
        "1 history items with a year for a date (id 'p0'): kept",
    ]


def test_a_split_in_a_folder_of_json_lines(tmp_path):
    lines(tmp_path / "dev.jsonl.gz", [plant()])
    assert len(read_table(tmp_path, "dev", PLANTS).rows) == 1
    assert "it has the splits dev" in refused(tmp_path, "test", PLANTS, error=MissingFileError)


def test_data_sets(tmp_path):
    rows = [plant(0), plant(1, None)]
    data = datasets.Dataset.from_list(rows)
    old = [dict(row, profile={"look": ["x", "y"], "place": ["shade", None]}) for row in rows]
    splits = datasets.DatasetDict(dev=data)
    for source, split in ((data, None), (data.to_iterable_dataset(), None), (rows, None), (splits, "dev")):
        table = read_table(source, split, PLANTS, require_outputs=False).rows
        assert table["output"] == ["window", None] and table[0]["profile"][0]["place"] == "shade"
    columns = read_table(old, task=PLANTS, require_outputs=False).rows[0]["profile"]
    assert [(entry["look"], entry["place"]) for entry in columns] == [("x", "shade"), ("y", "")]
    assert "one of dev" in refused(splits, "test", PLANTS, error=ConfigurationError)


def test_the_file_goes_where_it_is_wanted(tmp_path):
    table = read_table([plant()], task=PLANTS, folder=tmp_path / "new", split="mine").rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine.arrow"]
    assert table.cache_files[0]["filename"] == str(tmp_path / "new" / "mine.arrow")


def test_no_rows_make_an_empty_table():
    assert read_table([], task=PLANTS).rows.features == features(PLANTS)


def test_an_item_of_10_mb(tmp_path):
    look = "leaf " * 2_000_000
    path = lines(tmp_path / "x.jsonl", [plant(profile=[{"id": "1", "look": look, "place": "shade"}])])
    assert read_table(path, task=PLANTS).rows[0]["profile"][0]["look"] == look


def test_an_invented_task_goes_all_the_way(tmp_path):
    profile = [{"id": str(n), "look": f"fern {n}", "place": "shade"} for n in range(3)]
    path = lines(tmp_path / "plants.jsonl", [plant(n, "shade", profile=profile) for n in range(4, 6)])
    rows = list(examples(read_table(path, task=PLANTS).rows))
    made = history_examples(rows, PLANTS)
    assert [(e.prompt, e.target, len(e.history)) for e in made] == [
        (f"Where? plant: fern {n}", "shade", n) for n in range(3)
    ]
    assert describe(rows, PLANTS).labels.everybody == {"shade": 1.0}
    assert item_texts(rows[0].history, PLANTS.item_template)[0] == "shade: fern 0"
    assert score(PLANTS, ["shade", "window"], [e.target for e in rows])["accuracy"] == 0.5


# What is repaired, by id


def test_every_repair_is_said(tmp_path):
    no_marker = "A film."
    rows = [
        question("110", input=no_marker, profile=[item(tag=None, date=""), item(date="2001-05-01")]),
        question("1", profile=None, user_id=None),
        question("2", profile=[item(date="May 2001"), item(date="2003"), item(date="2002-01-01")]),
    ]
    write(tmp_path, rows, [gold("110"), gold("1"), gold("2")])
    repairs = read_table(tmp_path, "dev").repairs
    seen = {kind: (found.count, found.ids) for kind, found in repairs.items()}
    assert seen == {
        "no_user": (3, ["110", "1", "2"]),
        "no_marker": (1, ["110"]),
        "null": (2, ["110", "1"]),
        "empty_history": (1, ["1"]),
        "undated": (1, ["110"]),
        "year_only": (1, ["2"]),
        "odd_date": (1, ["2"]),
        "unordered": (1, ["2"]),
    }
    assert repairs["null"].names == ["tag", "profile"]
    assert "1 inputs without the text before the query (id '110'): the whole input is the query" in str(repairs)
    assert SECRET not in str(repairs) and no_marker not in str(repairs)


def test_a_year_and_a_day_in_it_are_in_order_either_way(tmp_path):
    for dates in (["2001", "2001-05-01", "2001"], ["", "2001-05-01", "2001-05-01"]):
        row = plant(profile=[{"look": "x", "place": "shade", "date": date} for date in dates])
        assert "unordered" not in read_table([row], task=PLANTS).repairs


def test_rows_without_ids_are_numbered():
    rows = [{key: value for key, value in plant(n).items() if key not in ("id", "user")} for n in range(2)]
    table = read_table(rows, task=PLANTS)
    assert table.rows["id"] == table.rows["user"] == ["0", "1"] and table.repairs["no_id"].count == 2


def test_missing_values_of_pandas_are_null(tmp_path):
    nan = float("nan")
    row = plant(0, nan, user=nan, profile=[{"id": "1", "look": nan, "place": "shade", "date": nan}])
    rows = [row, plant(1, nan, profile=nan)]
    for source in (rows, lines(tmp_path / "x.jsonl", rows)):
        table = read_table(source, task=PLANTS, require_outputs=False)
        assert (
            table.rows["output"] == [None, None]
            and table.rows["user"] == ["p0", "u"]
            and table.rows[1]["profile"] == []
        )
        assert table.rows[0]["profile"] == [{"id": "1", "look": "", "place": "shade", "date": ""}]
        assert table.repairs["null"].names == ["look", "profile"]


def test_histories_that_are_arrays_are_lists():
    rows = [plant(0), plant(1, profile=[])]
    expected = read_table(rows, task=PLANTS).rows[:]
    arrays = [
        {**row, "profile": np.array(row["profile"], dtype=object)} for row in rows
    ]  # parquet files, read by pandas
    assert read_table(arrays, task=PLANTS).rows[:] == expected
    assert read_table(datasets.Dataset.from_list(rows).with_format("numpy"), task=PLANTS).rows[:] == expected


def test_half_an_emoji_is_replaced_and_a_whole_one_is_not():
    row = json.loads('{"id": "1", "input": "plant: \\ud83d x \\ud83c\\udf3f", "output": "shade", "profile": []}')
    table = read_table([row], task=PLANTS)
    assert table.rows[0]["query"] == "\ufffd x \U0001f33f" and table.repairs["broken_text"].ids == ["1"]


def test_ids_that_two_splits_share(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path, [question("0"), question("1", user_id="u")], [gold("0"), gold("1")], split=split)
    tables = read_splits(tmp_path, ("train", "dev"))
    assert [tables[split].rows["user"] for split in tables] == [["train/0", "u"], ["dev/0", "u"]]
    assert "shared_id" not in tables["train"].repairs and tables["dev"].repairs["shared_id"].ids == ["0", "1"]


def test_at_most_five_ids_are_kept():
    repairs = Repairs()
    for number in range(7):
        repairs.add("undated", str(number), 2)
    assert str(repairs).startswith("14 history items without a date in 7 questions (id '0', '1', '2', '3', '4', ...)")
    assert str(Repairs()) == "nothing to repair"


def test_every_kind_of_repair_has_its_sentence():
    assert all(": " in sentence for sentence in REPAIRS.values())


# What is refused


def test_nothing_is_left_of_what_is_refused(tmp_path):
    refused([plant(0), plant(0)], task=PLANTS, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows, said",
    [
        ([plant(0), plant(1), plant(0)], "ids must occur once; these repeat: 'p0'"),
        ([plant(0, None), plant(1)], "these ids have none: 'p0'. Add the answers, or pass require_outputs=False"),
        ([plant(0, "cellar")], "must be one of window, shade; those of these ids are not: 'p0'"),
        (
            [plant(profile=[item()])],
            "need the fields ['look', 'place'], but one of id 'p0' has ['description', 'tag']",
        ),
        ([plant(profile=[SECRET])], "profile of id 'p0' must be a list of objects"),
        ([{"input": "x"}], "row 0 must have the keys ['input', 'profile']; found ['input']"),
        (["x"], "row 0 must have the keys"),
    ],
)
def test_rows_that_cannot_be_right(tmp_path, rows, said):
    assert said in refused(rows, task=PLANTS)
    assert said in refused(lines(tmp_path / "x.jsonl", rows), task=PLANTS)


def test_the_rules_of_lamp_files(tmp_path):
    news = {"id": "1", "text": SECRET, "title": SECRET, "category": "politics"}
    assert "LaMP_2/new" in refused(write(tmp_path, [question(profile=[news])], [gold(output="politics")]), "dev")
    write(tmp_path, [question("0"), question("1")], [gold("1"), gold("2")])
    assert "Only in the questions: '0'. Only in the outputs: '2'." in refused(tmp_path, "dev")
    assert "say which split" in refused(tmp_path, error=ConfigurationError)
    write(tmp_path, [question("0")], [gold("0")])
    assert "task='LaMP-4' was asked for" in refused(tmp_path, "dev", "LaMP-4")
    assert "There is no file or folder" in refused(tmp_path / "nowhere", "dev", error=MissingFileError)
    assert "pass task=" in refused([plant()])


def test_broken_files(tmp_path):
    path = write(tmp_path, [question(str(n)) for n in range(9)], [gold()]) / "dev_questions.json"
    whole = path.read_bytes()
    for content, said in (
        (whole[:-40], "cut off (after 8 whole rows)"),
        (b"", "after 0 whole rows"),
        (whole + b"]", "after 9 whole rows"),
        (b'["\xff"]', "not valid JSON"),
        (f'[{{"{SECRET}": "{SECRET}" "{SECRET}"]'.encode(), "not valid JSON"),
        (b'{"0": 1}', "list of objects, not dict"),
        (b" <html>", "web page"),
        (gzip.compress(whole)[:-9], "damaged or cut-off gzip"),
    ):
        path.write_bytes(content)
        assert said in refused(tmp_path, "dev")
    path.write_bytes(b"\xef\xbb\xbf" + whole[: whole.index(b"}, {") + 1] + b"]")
    assert [row["id"] for row in read_table(tmp_path, "dev").rows] == ["0"]


def test_broken_lines(tmp_path):
    path = lines(tmp_path / "x.jsonl", [plant(0)])
    for content, said in ((f'{{"input": "{SECRET}'.encode(), "line 3: "), (b'"\xff"', "line 3, is not UTF-8")):
        path.write_bytes(json.dumps(plant()).encode() + b"\n\n" + content)
        assert said in refused(path, task=PLANTS)


def test_numbers_that_are_not_json_and_deep_nesting(tmp_path):
    write(tmp_path, [], [gold()])
    row = json.dumps(question(profile=[{**item(), "note": "?"}]))
    table = tmp_path / "x.jsonl"
    for value, whole, streamed, in_lines in (
        ("NaN", "holds NaN, which is not JSON", "is not valid JSON", ""),
        ("-Infinity", "holds -Infinity", "is not valid JSON", "holds -Infinity"),
        ("[" * 150 + "]" * 150, "more than 100 deep", "more than 100 deep", "more than 100 deep"),
    ):
        (tmp_path / "dev_questions.json").write_text(f"[{row}]".replace('"?"', value))
        table.write_text(row.replace('"?"', value) + "\n")
        assert whole in message(tmp_path) and streamed in refused(tmp_path, "dev")
        if in_lines:
            assert in_lines in refused(table, task="LaMP-2")
        else:  # a missing value
            (read,) = stream(table, task="LaMP-2", require_outputs=False).examples
            assert read.history[0]["note"] == ""


def test_a_table_needs_its_packages(tmp_path, monkeypatch):
    write(tmp_path, [question()], [gold()])
    for name in ("ijson", "datasets"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(
                ConfigurationError, match=f"need.* {name}; install it with: pip install 'pplug-hf.train.'"
            ):
                read_table(tmp_path, "dev")


# Size


def test_a_stream_reads_no_further_than_it_must(tmp_path):
    path = lines(tmp_path / "x.jsonl", [plant(0)])
    with path.open("a") as file:
        file.write("{broken")
    assert next(stream(path, task=PLANTS).examples).id == "p0"


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory of a process")
def test_memory_is_flat():
    script = Path(__file__).parent.parent / "benchmarks" / "memory.py"
    peaks = []
    for size in ("20", "80"):
        command = [sys.executable, str(script), "--megabytes", size, "--json"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peaks.append(json.loads(done.stdout)["reading"]["growth_mb"])
    assert peaks[1] < peaks[0] + 25, peaks  # 60 MB more to read


# Real data


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_real_data(number, tmp_path):
    folder = REAL / f"LaMP_{number}"
    if not folder.is_dir():
        pytest.skip("no real data: set PPLUG_LAMP to a folder with LaMP_1 to LaMP_5")
    task, rows, repairs = read_table(folder, "dev", folder=tmp_path)
    assert rows.num_rows == 400 and set(repairs) <= {"unordered"}
    assert [(e.id, e.target, e.history) for e in examples(rows)] == [
        (e.id, e.target, list(e.history)) for e in read_lamp(folder, "dev", replace(task))[1]
    ]
