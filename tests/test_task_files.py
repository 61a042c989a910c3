"""Tasks in JSON files: what is read is the task that was written, and what cannot be says so."""

import json
from dataclasses import asdict, replace

import pytest

from pplug_hf.errors import ConfigurationError, DataError, MissingFileError, PPlugError
from pplug_hf.tasks.task import TASKS, get_task
from pplug_hf.tasks.task_files import find_task, read_task

SHELVES = {
    "name": "shelves",
    "query_marker": "book:",
    "query_field": "text",
    "answer_field": "tag",
    "item_template": "{tag}: {text}",
    "item_template_unlabelled": "{text}",
    "labels": ["sea", "moon"],
    "metric": "accuracy",
    "max_new_tokens": 4,
}


def written(folder, content):
    path = folder / "task.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_survives_a_file(name, tmp_path):
    assert read_task(written(tmp_path, asdict(TASKS[name]))) == TASKS[name]


def test_what_is_left_out_has_its_default(tmp_path):
    task = read_task(written(tmp_path, SHELVES))
    assert task.labels == ("sea", "moon") and task.prompt is None and task.query_end == ""
    assert task == replace(task, retrieval_template="")


def test_an_option_is_a_name_a_file_a_task_or_nothing(tmp_path):
    path = written(tmp_path, SHELVES)
    assert find_task(path) == read_task(path) and find_task("LaMP_2") is TASKS["LaMP-2"]
    assert find_task(TASKS["LaMP-2"]) is TASKS["LaMP-2"] and find_task(None) is None
    with pytest.raises(ConfigurationError, match="There is no task 'LaMP-9'"):
        find_task("LaMP-9")


def test_a_name_in_a_data_file_opens_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="There is no task"):
        get_task(written(tmp_path, SHELVES))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"metrics": "rouge"}, DataError, r"unknown field 'metrics' \(did you mean 'metric'\?\); fields are name"),
        ({"metric": "bleu"}, DataError, "field 'metric', is 'bleu'; choose one of accuracy, mae, rouge"),
        ({"max_new_tokens": "4"}, DataError, "field 'max_new_tokens', must be a whole number, not a text"),
        ({"max_new_tokens": True}, DataError, "must be a whole number, not true or false"),
        ({"labels": "sea"}, DataError, "field 'labels', must be a list of texts, not a text"),
        ({"labels": [1, 2]}, DataError, "field 'labels', must be a list of texts"),
        ({"name": None}, DataError, "field 'name', must be a text, not null"),
        ({"prompt": "x"}, DataError, "field 'prompt', must hold a JSON object, not a text"),
        ({"prompt": {"item": "{text}"}}, DataError, "field 'prompt', lacks fields. 'cut': Field of an item"),
        ({"prompt": {"item": "{tag}", "cut": "text"}}, ConfigurationError, "A prompt format's item is"),
        ({"query_marker": ""}, ConfigurationError, "query_marker is empty"),
    ],
)
def test_files_that_are_no_task(change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_task(written(tmp_path, SHELVES | change))


@pytest.mark.parametrize(
    "content, message",
    [("[", "not valid JSON"), ("[]", "must hold a JSON object, not a list"), ("{}", "lacks fields. 'name': Name of")],
)
def test_other_files(content, message, tmp_path):
    with pytest.raises(PPlugError, match=message):
        read_task(written(tmp_path, content))
    (tmp_path / "task.json").write_bytes(b'{"name": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_task(tmp_path / "task.json")
    with pytest.raises(MissingFileError, match="There is no task file"):
        find_task(str(tmp_path / "none.json"))
