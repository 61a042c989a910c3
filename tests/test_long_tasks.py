"""LongLaMP and LaMP-QA: rows as their data sets have them, made up here."""

import json
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from test_cli import BACKBONE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.data.examples import read_examples
from pplug_hf.data.histories import history_examples
from pplug_hf.data.tables import examples as rows_of_table
from pplug_hf.data.tables import read_table
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.methods.prompts import retrieval_prompt
from pplug_hf.methods.retrievers import get_ranker
from pplug_hf.tasks.lamp_qa import RubricJudge
from pplug_hf.tasks.metrics import METRICS, register_metric
from pplug_hf.tasks.task import TASKS, Task, get_task, main_metric, score

ROWS = {
    "LongLaMP-abstract": {
        "name": "Ann Author",
        "input": 'Generate an abstract for the title "On "good" seas" using the following items: 1. tides\n2. "ships"',
        "output": "We sail.",
        "profile": [
            {"id": "7", "title": "On rain", "abstract": "It rains. We measure it.", "year": 2001},
            {"id": "8", "title": "On snow", "abstract": "It snows.", "year": 2003},
        ],
    },
    "LongLaMP-review": {
        "reviewerId": "A1",
        "input": "Generate the review text written by a reviewer who has a given an overall rating of "
        '"5.0" for a product with description "A sharp knife". The summary of the review text is "it cuts".',
        "output": "I cut bread with it.",
        "profile": [
            {"overall": "1.0", "summary": "no", "description": "A dull knife", "reviewText": "It does not cut."},
            {"overall": "4.0", "summary": "warm", "description": "A red hat", "reviewText": "My ears are warm."},
        ],
    },
    "LongLaMP-topic": {
        "author": "u1",
        "input": "Generate the content for a reddit post TL;DR my dog ate a book",
        "output": "So my dog ...",
        "profile": [
            {"author": "u1", "id": "a", "summary": "cats are late", "content": "Yesterday my cats came late."},
            {"author": "u1", "id": "b", "summary": "a post: on posts", "content": "I post a lot."},
        ],
    },
    "LongLaMP-email": {
        "user": "e1",
        "input": "Generate an email with the subject: lunch",
        "output": "Shall we eat?",
        "profile": [
            {"id": "1", "title": "Re: dinner", "text": "Yes, at eight."},
            {"id": "2", "title": "x", "text": "y"},
        ],
    },
}
QUERIES = {
    "LongLaMP-abstract": 'On "good" seas',
    "LongLaMP-review": "A sharp knife",
    "LongLaMP-topic": "TL;DR my dog ate a book",
    "LongLaMP-email": "lunch",
}
OWN = {  # the question that the first item of a history becomes
    "LongLaMP-abstract": 'Generate an abstract for the title "On rain" using the following items: On rain',
    "LongLaMP-review": "Generate the review text written by a reviewer who has a given an overall rating of "
    '"1.0" for a product with description "A dull knife". The summary of the review text is "no".',
    "LongLaMP-topic": "Generate the content for a reddit post cats are late",
    "LongLaMP-email": "Generate an email with the subject: Re: dinner",
}
PROMPTS = {  # with one retrieved item, worded as in the benchmark's code
    "LongLaMP-abstract": '"It rains. We measure it." is the abstract for the title "On rain". Use the above abstracts as '
    "context to understand the style and language of the user and, ",
    "LongLaMP-review": '"1.0" is a rating for the product with description "A dull knife". "no" is summary for "It does '
    'not cut." . Following the given patterns ',
    "LongLaMP-topic": '"cats are late" is a summary for "Yesterday my cats came late." . Following the given patterns, ',
    "LongLaMP-email": '"Re: dinner" is the title for "Yes, at eight." . ',
}
ASPECTS = [
    {"aspect": "price", "reason": "money is short", "evidence": "cheap"},
    {"aspect": "time", "reason": "in a hurry", "evidence": "quick"},
]
QUESTION = {
    "id": "q1",
    "question": "How do I bake bread?",
    "narrative": "I have no oven and little money.",
    "category": "cooking",
    "rubric_aspects": ASPECTS,
    "profile": [{"id": "p1", "category": "cooking", "text": "What is yeast?\n\nI bake a lot."}],
}


def characters():
    """A tokenizer of bytes, which loses nothing."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokens = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


@pytest.mark.parametrize("name", ROWS)
def test_rows_read_as_the_data_set_has_them(name):
    row, task = ROWS[name], get_task(name)
    _, (read,) = read_examples([row], "test", name)
    assert read.user == next(row[field] for field in ("name", "reviewerId", "author", "user") if field in row)
    assert (read.prompt, read.query, read.target) == (row["input"], QUERIES[name], row["output"])
    assert read.history == [{key: str(value) for key, value in item.items()} for item in row["profile"]]
    assert main_metric(task) == "meteor" and task.is_free_text and not task.has_labelled_items


@pytest.mark.parametrize("name", ROWS)
def test_items_of_a_history_become_questions_of_their_own(name):
    task = get_task(name)
    _, (read,) = read_examples([ROWS[name]], "test", name)
    made = history_examples([read], task)
    assert [len(example.history) for example in made] == [0, 1]
    first, item = made[0], ROWS[name]["profile"][0]
    assert first.prompt == OWN[name] and first.target == item[task.answer_field]
    assert first.query == item[task.query_field] == task.query(first.prompt)
    assert item[task.answer_field] not in first.prompt and QUERIES[name] not in first.prompt
    if name == "LongLaMP-abstract":
        assert "tides" not in first.prompt, "keywords of another paper"


@pytest.mark.parametrize("name", ROWS)
def test_prompts_with_retrieved_items_are_the_benchmarks(name):
    _, (read,) = read_examples([ROWS[name]], "test", name)
    prompt = retrieval_prompt(get_task(name), read.prompt, read.history[:1], characters(), 4000)
    assert prompt.text == PROMPTS[name] + read.prompt
    assert sorted(get_ranker("bm25", get_task(name)).rank(read)) == [0, 1]
    for items, budget in (([], 4000), (read.history, 1)):  # nothing to show, or no room
        assert retrieval_prompt(get_task(name), read.prompt, items, characters(), budget).text == read.prompt
    long = {**read.history[0], get_task(name).prompt_format.cut: "x" * 9000}
    made = retrieval_prompt(get_task(name), read.prompt, [long], characters(), 1000)
    assert made.items == 1 and len(made.text) <= 1000 and made.text.endswith(read.prompt)


def test_reviews_are_looked_for_by_the_whole_input():
    asked = ROWS["LongLaMP-review"]["input"]
    assert get_task("LongLaMP-review").retrieval_query(asked) == asked


def test_longlamp_is_judged_by_three_scores():
    result = score("LongLaMP-topic", ["the dogs slept"], ["the dog slept"])
    assert list(result) == ["meteor", "rouge-1", "rouge-L", "unparsed"]
    assert result["meteor"] > result["rouge-1"] == pytest.approx(2 / 3)


def test_tasks_without_the_new_fields_keep_their_identity():
    for name in list(TASKS)[:8]:
        assert TASKS[name].identity == repr(TASKS[name]) and "input_template" not in repr(TASKS[name])
    assert get_task("LongLaMP-topic").identity != repr(get_task("LongLaMP-topic"))


# ---- LaMP-QA --------------------------------------------------------------------------------------------------------


class Judge(RubricJudge):
    """One point for an aspect that the answer names, half a point for its category."""

    def judge(self, answer, aspect, extra):
        return 1.0 if aspect["aspect"] in answer else 0.5 if extra["category"] in answer else 0.0


@pytest.fixture
def judge():
    before = METRICS["rubric"]
    register_metric(Judge(), exist_ok=True)
    yield
    METRICS["rubric"] = before


def test_a_question_and_its_rubric_are_read():
    task, (read,) = read_examples([QUESTION], "test", "LaMP-QA")
    assert read.prompt == "Answer the question for the person who asks it. question: How do I bake bread?"
    assert (read.query, read.target, read.user) == ("How do I bake bread?", None, "q1")
    assert read.extra == {name: QUESTION[name] for name in ("question", "narrative", "category", "rubric_aspects")}
    assert "narrative" not in read.prompt and "oven" not in read.prompt and "price" not in read.prompt
    assert task.item_text(read.history[0]) == "What is yeast?\n\nI bake a lot."
    assert history_examples([read], task) == []
    with pytest.raises(DataError, match=r"must have the keys \['profile', 'question'\]; found \['input', 'profile'\]"):
        read_examples([{"input": "x", "profile": []}], "test", "LaMP-QA")


def test_without_a_judge_it_says_so_before_anything_is_answered():
    task, asked = read_examples([QUESTION], "test", "LaMP-QA")
    for judging in (
        lambda: Comparison(task, asked, ""),
        lambda: score(task, ["x"], [""], extra=[asked[0].extra]),
    ):
        with pytest.raises(ConfigurationError, match="need a judge of yours: subclass"):
            judging()


def test_a_judge_scores_the_aspects(judge):
    task, asked = read_examples([QUESTION, {**QUESTION, "id": "q2", "rubric_aspects": []}], "test", "LaMP-QA")
    extra = [e.extra for e in asked]
    assert score(task, ["price and cooking", "x"], ["", ""], extra=extra) == {"rubric": 0.375, "unparsed": 0}
    columns = {name: [each[name] for each in ASPECTS] for name in ASPECTS[0]}  # as datasets.Sequence has them
    assert score(task, ["time"], [""], extra=[{**extra[0], "rubric_aspects": columns}])["rubric"] == 0.5


def test_the_bench_judges_it(judge, tmp_path):
    rows = [{**QUESTION, "id": f"q{i}", "user_id": f"u{i % 2}"} for i in range(4)]
    options = {"backbone": BACKBONE, "output": str(tmp_path / "out"), "vectors": str(tmp_path / "vectors")}
    made = bench(
        BenchSettings(data="", task="LaMP-QA", max_new_tokens=4, rows=["no-persona", "bm25@1"], **options), data=rows
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ["no-persona", "bm25@1"]
    assert all(0 <= row["rubric"] <= 1 for row in results["rows"]) and made.task.name == "LaMP-QA"
    with pytest.raises(ConfigurationError, match="need a judge"):
        METRICS["rubric"] = RubricJudge()
        bench(BenchSettings(data="", task="LaMP-QA", **{**options, "output": str(tmp_path / "no")}), data=rows)
    assert not list((tmp_path / "no").glob("predictions/*"))


def test_tables_keep_the_further_fields(tmp_path):
    row = {
        **QUESTION,
        "rubric_aspects": [{**ASPECTS[0], "weight": Decimal("0.5"), "n": np.int64(2)}],
        "narrative": "\ud83d",
    }
    _, table, _ = read_table([row], task="LaMP-QA", require_outputs=False, folder=tmp_path)
    (back,) = rows_of_table(table)
    assert back.extra["rubric_aspects"] == [{**ASPECTS[0], "weight": 0.5, "n": 2}]
    assert back.extra["question"] == QUESTION["question"] and back.extra["narrative"] == "\ud83d"
    assert back.prompt.endswith("question: How do I bake bread?") and back.target is None
    plain = replace(get_task("LongLaMP-topic"), name="plain")
    _, table, _ = read_table([ROWS["LongLaMP-topic"]], task=plain)
    assert "extra" not in table.column_names and next(rows_of_table(table)).extra == {}


def test_a_task_may_name_its_input_and_its_user(tmp_path):
    own = {"name": "own", "query_marker": "x:", "query_field": "text", "item_template": "{text}", "metric": "rouge"}
    own |= {"item_template_unlabelled": "{text}", "max_new_tokens": 3}
    with pytest.raises(ConfigurationError, match=r"input_template is '\{q\}'; it must hold the query_marker 'x:'"):
        Task(**own, input_template="{q}")
    (tmp_path / "task.json").write_text(json.dumps({**own, "input_template": "x: {q} {n}", "user_field": "who"}))
    row = {"q": "why", "n": 5.0, "who": "me", "output": "so", "profile": []}
    _, (read,) = read_examples([row], "dev", str(tmp_path / "task.json"))
    assert (read.prompt, read.query, read.user) == ("x: why 5", "why 5", "me")
