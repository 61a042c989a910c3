"""Reading LaMP files: what comes out of good ones, and what is said about bad ones."""

import gzip
import json
import os
from pathlib import Path

import pytest

from pplug_hf.data.lamp import read_lamp
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.tasks.task import TASKS

REAL = Path(os.environ.get("PPLUG_LAMP") or Path(__file__).resolve().parents[1] / ".." / "shared" / "lamp")
SECRET = "a line of a diary"  # must never be in a message


def item(id_="7", tag="comedy", description=SECRET, **more):
    return {"id": id_, "tag": tag, "description": description, "date": "2001", **more}


def question(id_="0", **more):
    return {"id": id_, "input": f"Which tag? description: film {id_}", "profile": [item()], **more}


def gold(id_="0", output="comedy"):
    return {"id": id_, "output": output}


def write(folder, questions, golds, task="LaMP_2", split="dev", packed=False):
    files = {f"{split}_questions.json": questions, f"{split}_outputs.json": {"task": task, "golds": golds}}
    for name, data in files.items():
        text = json.dumps(data).encode()
        (folder / f"{name}.gz").write_bytes(gzip.compress(text)) if packed else (folder / name).write_bytes(text)
    return folder


def message(folder, error=DataError, split="dev", **kwargs):
    with pytest.raises(error) as caught:
        read_lamp(folder, split, **kwargs)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # JSON errors carry the whole document
    return str(caught.value)


# What comes out


@pytest.mark.parametrize("packed", [False, True])
def test_reads_every_field(tmp_path, packed):
    rows = [question("0", user_id="u1", profile=[item("7"), item("8", "action")]), question("1", profile=[])]
    task, (first, second) = read_lamp(write(tmp_path, rows, [gold("1", "sci-fi "), gold("0")], packed=packed), "dev")
    assert task is TASKS["LaMP-2"]
    assert (first.id, first.user, first.query, first.target) == ("0", "u1", "film 0", "comedy")
    assert first.prompt == "Which tag? description: film 0"
    assert [entry["id"] for entry in first.history] == ["7", "8"]
    assert (second.user, second.target, list(second.history)) == ("1", "sci-fi", [])


def test_packed_file_without_its_ending_is_read(tmp_path):
    write(tmp_path, [question()], [gold()], packed=True)
    (tmp_path / "dev_questions.json.gz").rename(tmp_path / "dev_questions.json")
    assert len(read_lamp(tmp_path, "dev")[1]) == 1


def test_null_fields_are_empty_and_numbers_are_text(tmp_path):
    for blank in ("", "  "):
        (example,) = read_lamp(write(tmp_path, [question(0, user_id=blank, user="u2")], [gold(0)]), "dev")[1]
        assert (example.user, example.named) == ("u2", True)
        (example,) = read_lamp(write(tmp_path, [question(0, user_id=blank)], [gold(0)]), "dev")[1]
        assert (example.user, example.named) == ("0", False), "a stranger"
    row = question(0, user_id=None, profile=[item(tag=None, date=None), {"id": 3, "tag": 4, "description": None}])
    (example,) = read_lamp(write(tmp_path, [row], [gold(0)]), "dev")[1]
    assert (example.id, example.user) == ("0", "0")
    assert example.history[0]["tag"] == example.history[0]["date"] == ""
    assert example.history[1] == {"id": "3", "tag": "4", "description": ""}


def test_null_profile_and_input_are_empty(tmp_path):
    (example,) = read_lamp(write(tmp_path, [question(profile=None, input=None)], [gold()]), "dev")[1]
    assert (list(example.history), example.prompt, example.query) == ([], "", "")


def test_an_input_with_nothing_behind_its_marker_is_its_own_query(tmp_path):
    row = question(input="Which tag? description: ")
    (example,) = read_lamp(write(tmp_path, [row], [gold()]), "dev")[1]
    assert (example.prompt, example.query) == ("Which tag? description: ", "Which tag? description:")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (question(id=None), "row 0 has null for an id"),
        (question(input=[{"role": "user", "content": SECRET}]), "'input' of id '0' must be a text, not list"),
        (question(profile=[item(tag=[SECRET])]), "'tag' of id '0' must be a text, not list"),
        (question(profile=[item(description={"de": SECRET})]), "'description' of id '0' must be a text, not dict"),
        (question(profile=SECRET), "must be a list of objects, not str"),
        (question(profile=[SECRET]), "must be a list of objects, not one of other things"),
    ],
)
def test_what_is_no_text_is_refused_by_id(tmp_path, row, said):
    assert said in message(write(tmp_path, [row], [gold()]))


def test_byte_order_mark_and_unicode(tmp_path):
    folder = write(tmp_path, [], [gold()])
    text = json.dumps([question(user_id="Zoë")], ensure_ascii=False)
    (folder / "dev_questions.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_lamp(folder, "dev")[1][0].user == "Zoë"


def test_equal_items_are_one_object(tmp_path):
    rows = [question("0"), question("1"), question("2", profile=[item(tag="action")])]
    a, b, c = read_lamp(write(tmp_path, rows, [gold("0"), gold("1"), gold("2")]), "dev")[1]
    assert a.history[0] is b.history[0]
    assert a.history[0] is not c.history[0]


def test_input_without_marker_is_read(tmp_path):
    (example,) = read_lamp(write(tmp_path, [question("110", input="A film.")], [gold("110")]), "dev")[1]
    assert example.query == "A film."


@pytest.mark.parametrize("task", ["LaMP-2", "lamp_2", TASKS["LaMP-2"], None])
def test_task_may_be_given_or_not(tmp_path, task):
    assert read_lamp(write(tmp_path, [question()], [gold()]), "dev", task)[0] is TASKS["LaMP-2"]


def test_task_of_the_users_own(tmp_path):
    from dataclasses import replace

    mine = replace(TASKS["LaMP-2"], name="shows")
    assert read_lamp(write(tmp_path, [question()], [gold()], task="shows"), "dev", mine)[0] is mine


def test_outputs_may_be_withheld(tmp_path):
    write(tmp_path, [question()], [gold()])
    (tmp_path / "dev_outputs.json").unlink()
    _, (example,) = read_lamp(tmp_path, "dev", "LaMP-2", require_outputs=False)
    assert example.target is None
    assert "pass task=" in message(tmp_path, require_outputs=False)


# What is said about bad files


def test_missing_files_are_named(tmp_path):
    write(tmp_path, [question()], [gold()], split="train")
    text = message(tmp_path, MissingFileError)
    assert "dev_questions.json" in text and "dev_questions.json.gz" in text and "splits train" in text
    (tmp_path / "train_outputs.json").unlink()
    assert "train_outputs.json.gz" in message(tmp_path, FileNotFoundError, split="train")
    assert "no such folder" in message(tmp_path / "nowhere", MissingFileError)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html></html>", b"\n <html>"])
def test_web_page(tmp_path, page):
    write(tmp_path, [question()], [gold()])
    (tmp_path / "dev_questions.json").write_bytes(page)
    assert "web page" in message(tmp_path)


def test_web_page_with_a_gzip_ending(tmp_path):
    write(tmp_path, [question()], [gold()], packed=True)
    (tmp_path / "dev_outputs.json.gz").write_bytes(b"<html>")
    assert "dev_outputs.json.gz is a web page" in message(tmp_path)


def test_cut_off_json(tmp_path):
    path = write(tmp_path, [question()], [gold()]) / "dev_questions.json"
    path.write_bytes(path.read_bytes()[:-30])
    assert "cut off" in message(tmp_path)
    path.write_bytes(b"")
    assert "0 bytes" in message(tmp_path)
    path.write_bytes(b'["\xff"]')
    assert "UTF-8" in message(tmp_path)


@pytest.mark.parametrize("kept", [3, 15, 60, -4])
def test_cut_off_gzip(tmp_path, kept):
    path = write(tmp_path, [question()], [gold()], packed=True) / "dev_questions.json.gz"
    path.write_bytes(path.read_bytes()[:kept])
    assert "fetch it again" in message(tmp_path)


def test_damaged_gzip(tmp_path):
    path = write(tmp_path, [question()], [gold()], packed=True) / "dev_questions.json.gz"
    raw = bytearray(path.read_bytes())
    raw[20:40] = bytes(20)
    path.write_bytes(raw)
    assert "damaged" in message(tmp_path)


def test_repeated_ids_are_listed_up_to_five(tmp_path):
    ids = [str(number) for number in range(7)] * 2
    text = message(write(tmp_path, [question(id_) for id_ in ids], [gold(id_) for id_ in ids[:7]]))
    assert "'0', '1', '2', '3', '4', ... (7 in all)" in text and "'5'" not in text
    assert "outputs" in message(write(tmp_path, [question("0")], [gold("0"), gold("0")]))


def test_ids_that_differ_are_listed_on_both_sides(tmp_path):
    text = message(write(tmp_path, [question("0"), question("1")], [gold("1"), gold("2")]))
    assert "Only in the questions: '0'. Only in the outputs: '2'." in text


def test_gold_outside_the_labels(tmp_path):
    text = message(write(tmp_path, [question("0"), question("1")], [gold("0"), gold("1", "my illness")]))
    assert "those of these ids are not: '1'" in text and "sci-fi" in text and "illness" not in text


@pytest.mark.parametrize("output", [["a title", "another"], {"text": "a title"}])
def test_a_gold_that_is_no_text_is_refused(tmp_path, output):
    row = {"id": "0", "input": "article: x", "profile": []}
    text = message(write(tmp_path, [row], [gold(output=output)], task="LaMP_4"))
    assert f"golds: 'output' of id '0' must be a text, not {type(output).__name__}" in text and "title" not in text


def test_free_text_may_be_anything(tmp_path):
    row = {"id": "0", "input": "article: x", "profile": [{"id": "1", "text": "t", "title": "u"}]}
    task, (example,) = read_lamp(write(tmp_path, [row], [gold(output=None)], task="LaMP_4"), "dev")
    assert (task.name, example.target) == ("LaMP-4", "")


def test_news_categorisation_is_recognised(tmp_path):
    news = {"id": "1", "text": SECRET, "title": SECRET, "category": "politics"}
    text = message(write(tmp_path, [question(profile=[news])], [gold(output="politics")]))
    assert "LaMP_2/new" in text and "'category'" in text and "'description', 'tag'" in text


def test_wrong_task_names_fields_expected_and_found(tmp_path):
    text = message(write(tmp_path, [question()], [gold()], task="LaMP_3"))
    assert "['score', 'text']" in text and "['description', 'tag']" in text and "fit LaMP-2" in text


def test_task_that_the_outputs_contradict(tmp_path):
    rows = [{"id": "0", "input": "paper: x", "profile": [{"id": "1", "title": "t", "abstract": "a"}]}]
    text = message(write(tmp_path, rows, [gold(output="[1]")], task="LaMP_1"), task="LaMP-5")
    assert "'LaMP_1'" in text and "LaMP-5" in text


def test_unknown_task_lists_the_options(tmp_path):
    assert "LaMP-7" in message(write(tmp_path, [question()], [gold()], task="LaMP_9"), ConfigurationError)


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ({"0": 1}, "list of objects, not dict"),
        ([{"id": "0", "input": "x"}], "row 0 must have the keys"),
        (["x"], "found str"),
        ([{"id": "0", "input": "x", "profile": "x"}], "profile of id '0'"),
        ([{"id": "0", "input": "x", "profile": ["x"]}], "profile of id '0'"),
    ],
)
def test_other_layouts(tmp_path, questions, said):
    assert said in message(write(tmp_path, questions, [gold()]))


@pytest.mark.parametrize("outputs", [[], {"golds": {}}, {"task": "LaMP_2"}, {"task": 2, "golds": []}, "text"])
def test_other_layouts_of_outputs(tmp_path, outputs):
    write(tmp_path, [question()], [])
    (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
    assert "dev_outputs.json" in message(tmp_path)


# Real data


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_real_data(number):
    folder = REAL / f"LaMP_{number}"
    if not folder.is_dir():
        pytest.skip("no real data: set PPLUG_LAMP to a folder with LaMP_1 to LaMP_5")
    task, examples = read_lamp(folder, "dev")
    assert task.name == f"LaMP-{number}" and len(examples) == 400
    for example in examples:
        assert example.query and example.query in example.prompt and example.query != example.prompt
        assert example.target and task.fields <= example.history[0].keys()
