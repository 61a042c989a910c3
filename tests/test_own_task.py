"""A task that is registered here is one entry: every command, reader and list knows it by its name, like LaMP's own."""

import json
from dataclasses import replace

import pytest
from test_cli import BACKBONE, ENCODER
from test_own_data import SPLITS, TASK, run, write_lines

from pplug_hf import cli
from pplug_hf.cli import main
from pplug_hf.commands import train as train_command
from pplug_hf.commands.train import TrainSettings, choose_examples
from pplug_hf.data.examples import read_examples
from pplug_hf.data.histories import history_examples
from pplug_hf.data.lamp import read_lamp
from pplug_hf.data.records import Example
from pplug_hf.data.synthetic import synthetic_examples
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.tasks.lamp.settings import our_recipe, paper_recipe
from pplug_hf.tasks.recipes import FIT_RECIPES, RECIPES, Recipe, get_recipe, register_recipe
from pplug_hf.tasks.task import TASKS, Task, get_task, register_task
from pplug_hf.tasks.task_files import find_task

LAMP_8 = replace(TASK, name="LaMP-8")
SMALL = ["--epochs", "1", "--validation_users", "0.3"]


@pytest.fixture(params=["with recipes", "without recipes"])
def recipes(request):
    paper = paper_recipe(LAMP_8, {"epochs": 3})
    ours = our_recipe(LAMP_8, paper, {"epochs": (5, "It is small.")}, {"item_template": ("{tag}", "It is short.")})
    made = (paper, ours) if request.param == "with recipes" else ()
    register_task(LAMP_8, made)
    yield made
    del TASKS["LaMP-8"]
    for recipe in made:
        del RECIPES[recipe.name]


@pytest.fixture
def folder(tmp_path):
    """The same questions as JSON lines and as LaMP's files."""
    for split, rows in SPLITS.items():
        write_lines(tmp_path / "lines" / f"{split}.jsonl", rows)
        (tmp_path / "lamp").mkdir(exist_ok=True)
        golds = [{"id": row["id"], "output": row["output"]} for row in rows]
        (tmp_path / "lamp" / f"{split}_questions.json").write_text(json.dumps(rows))
        (tmp_path / "lamp" / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_8", "golds": golds}))
    return tmp_path


def test_it_is_found_by_name_and_read(recipes, folder):
    assert get_task("lamp_8") is find_task("LaMP-8") is LAMP_8 and list(TASKS)[-1] == "LaMP-8"
    assert read_lamp(folder / "lamp", "dev")[0] is LAMP_8  # the outputs file names it
    assert read_examples(folder / "lines", "dev", "lamp-8")[0] is LAMP_8
    with pytest.raises(DataError, match=r"They fit .*LaMP-8"):
        read_examples(SPLITS["dev"], "dev", "LaMP-2")


def test_commands_take_its_name(recipes, folder):
    named = ["--task", "LaMP-8", "--data", folder / "lines"]
    kept = ["--vectors", folder / "vectors"]
    settings = TrainSettings(data=str(folder / "lines"), output="x", backbone="x", encoder="x", task="lamp_8")
    assert choose_examples(replace(settings, validation_users=0.3))[0] is LAMP_8
    parts = ["--backbone", BACKBONE, "--encoder", ENCODER]
    run("train", *named, *kept, *parts, *SMALL, "--output", folder / "plug")
    assert json.loads((folder / "plug" / "config.json").read_text())["item_template"] == LAMP_8.item_template
    rows = ["--rows", "no-persona", "frequencies", "bm25@1", "pplug", "--plugs", f"pplug={folder / 'plug'}"]
    printed = run("bench", *named, *kept, *rows, "--output", folder / "bench")
    assert "# LaMP-8, dev: 4 questions of 4 users" in printed
    assert "LaMP-8" in run("report", *named)
    golds = folder / "lamp" / "dev_outputs.json"
    assert json.loads(run("score", "--golds", golds, "--predictions", golds))["task"] == "LaMP-8"


def test_its_recipes_are_listed_and_used(recipes, folder, monkeypatch):
    listed = [line.split()[0] for line in run("recipes").splitlines()]
    assert listed == [*RECIPES, *FIT_RECIPES] and [name for name in listed if "lamp-8" in name] == [
        r.name for r in recipes
    ]
    calls = []
    monkeypatch.setattr(cli, "_check_places", lambda values: None)  # the data are not there
    monkeypatch.setattr(train_command, "train", lambda settings, **plug: calls.append((settings, plug)))
    arguments = ["train", "--recipe", "ours/LaMP_8", "--data", "d", "--output", "o"]
    assert main(arguments) == (0 if recipes else 1)
    if recipes:
        ((settings, plug),) = calls
        assert (settings.task, settings.epochs, plug["item_template"]) == ("LaMP-8", 5, "{tag}")
        assert "item_template           It is short." in run("recipes", "--name", "ours/lamp-8")


def test_names_are_taken_once(recipes):
    with pytest.raises(ConfigurationError, match="There is a task 'LaMP-8' already: pass exist_ok=True"):
        register_task(replace(TASK, name="lamp_8"))
    register_task(LAMP_8, recipes, exist_ok=True)
    assert get_task("LaMP-8") is LAMP_8
    with pytest.raises(ConfigurationError, match="There is a recipe 'ours/LaMP_2' already"):
        register_recipe(replace(get_recipe("ours/lamp-2"), name="ours/LaMP_2"))


def test_a_recipe_needs_no_backbone():
    recipe = Recipe(name="Mine/Own_1", task="demo", training={"epochs": 1}, plug={}, answering={})
    register_recipe(recipe)
    try:
        assert get_recipe("mine/own-1") is recipe
        assert run("recipes").splitlines()[: len(RECIPES)][-1].strip() == "Mine/Own_1"
    finally:
        del RECIPES["mine/own-1"]


# ---- prompts made of history items ------------------------------------------------------------------------------

ABSTRACTS = Task(
    name="abstracts",
    query_marker='the title "',
    query_end='" using',
    query_field="title",
    answer_field="abstract",
    item_template="{title}: {abstract}",
    item_template_unlabelled="{title}: {abstract}",
    metric="rouge",
    max_new_tokens=8,
    history_prompt_template='Generate an abstract for the title "{title}" using the following items: {keywords}',
)
PAPERS = [
    {"id": "1", "title": "On cats", "abstract": "Cats sleep.", "keywords": "cats, sleep"},
    {"id": "2", "title": 'On "big" dogs', "abstract": "Dogs {run}.", "keywords": "dogs"},
    {"id": "3", "title": " ", "abstract": "Nothing.", "keywords": "none"},
]
ASKED = 'Generate an abstract for the title "On fish" using the following items: fish, sea'


def paper_row(history=PAPERS, query="On fish", user="u"):
    return Example("q", user, ASKED.replace("On fish", query), query, "Fish swim.", list(history))


def test_an_abstract_is_asked_for_with_the_items_own_keywords():
    made = history_examples([paper_row()], ABSTRACTS)
    assert [(e.query, e.prompt, e.target) for e in made] == [
        ("On cats", ASKED.replace("On fish", "On cats").replace("fish, sea", "cats, sleep"), "Cats sleep."),
        ('On "big" dogs', ASKED.replace("On fish", 'On "big" dogs').replace("fish, sea", "dogs"), "Dogs {run}."),
    ]
    plain = history_examples([paper_row()], replace(ABSTRACTS, history_prompt_template=""))
    assert plain[0].prompt == ASKED.replace("On fish", "On cats")  # with the keywords of another paper


def test_no_question_of_the_evaluation_enters():
    assert [e.id for e in history_examples([paper_row()], ABSTRACTS, [paper_row(query="on  CATS", user="v")])] == [
        "u/2"
    ]


REVIEWS = Task(
    name="reviews",
    query_marker='a rating of "',
    query_field="description",
    answer_field="stars",
    item_template="{stars}: {description}",
    item_template_unlabelled="{description}",
    labels=("good", "bad"),
    metric="accuracy",
    max_new_tokens=8,
    history_prompt_template='Judge the review with a rating of "{rating}" for a product with description "{description}".',
)


def test_a_review_is_asked_for_with_its_rating_and_product():
    items = [
        {"id": str(n), "stars": label, "description": f"a lamp {n}", "rating": str(n)}
        for n, label in enumerate(["good", "bad", "good"])
    ]
    like = 'Judge the review with a rating of "5" for a product with description "a chair".'
    row = Example("q", "u", like, REVIEWS.query(like), "good", items)
    asked = {
        f'Judge the review with a rating of "{n}" for a product with description "a lamp {n}".': (n, label)
        for n, label in enumerate(["good", "bad", "good"])
    }
    made = history_examples([row], REVIEWS) + synthetic_examples([row], REVIEWS, 20)
    assert {e.prompt for e in made} == asked.keys()
    for e in made:
        number, label = asked[e.prompt]
        assert e.query == REVIEWS.query(e.prompt) and e.target == label
        assert items[number] not in e.history
    held = replace(row, query=REVIEWS.query(made[1].prompt))
    assert made[1].prompt not in {e.prompt for e in synthetic_examples([row], REVIEWS, 50, exclude=[held])}


def test_items_without_a_field_of_the_template_are_refused():
    with pytest.raises(DataError, match="has no field 'keywords'"):
        history_examples([paper_row([{"id": "1", "title": "x", "abstract": "y"}])], ABSTRACTS)
    row = {"input": ASKED, "output": "x", "profile": [{"title": "x", "abstract": "y"}]}
    with pytest.raises(DataError, match=r"need the fields \['abstract', 'keywords', 'title'\]"):
        read_examples([row], "dev", ABSTRACTS)


@pytest.mark.parametrize("template", ["{keywords}", "no field", 'the title "{abstract}" using', 'title "{title}"'])
def test_templates_that_cannot_work_are_refused(template):
    with pytest.raises(ConfigurationError, match=r"history_prompt_template is .* must hold the query_marker"):
        replace(ABSTRACTS, history_prompt_template=template)


def test_the_template_tells_tasks_apart_and_old_tasks_keep_their_identity():
    plain = replace(ABSTRACTS, history_prompt_template="")
    assert plain.identity == repr(plain) and plain.identity != ABSTRACTS.identity
    assert plain.identity.endswith("metric='rouge', max_new_tokens=8)")
