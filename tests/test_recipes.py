"""Recipes: every setting exists, the paper's are the paper's, the command line wins, and one trains."""

import json
from dataclasses import MISSING, fields

import pytest
from test_cli import BACKBONE, ENCODER, as_movies, movie_tag, quietly, write_data

from pplug_hf import PPlugModel, cli
from pplug_hf.cli import main
from pplug_hf.commands import bench as bench_command
from pplug_hf.commands import train as train_command
from pplug_hf.commands.bench import BenchSettings
from pplug_hf.commands.evaluate import EvaluateSettings
from pplug_hf.commands.options import FitSettings
from pplug_hf.commands.train import TrainSettings
from pplug_hf.configuration.pplug import PPlugConfig, choices
from pplug_hf.errors import ConfigurationError
from pplug_hf.methods.fit_options import options_of
from pplug_hf.tasks.recipes import FIT_RECIPES, RECIPES, get_recipe
from pplug_hf.tasks.task import TASKS

NAMES = [f"{whose}/lamp-{number}" for whose in ("paper", "ours", "release") for number in range(1, 8)]
PRESETS = ["preset/small", "preset/large"]


def names_of(settings):
    return {f.name for f in fields(settings)}


def test_there_is_one_of_each_for_each_task():
    assert list(RECIPES) == [*NAMES, *PRESETS]
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    assert all(RECIPES[name].task in TASKS for name in NAMES) and not any(RECIPES[name].task for name in PRESETS)


@pytest.mark.parametrize("name", [*NAMES, *PRESETS])
def test_every_setting_exists_and_can_work(name):
    recipe = RECIPES[name]
    settings = TrainSettings(**{"backbone": "x", "encoder": "x"} | dict(recipe.training), data="x", output="x")
    assert settings.task == recipe.task
    PPlugConfig(hidden_size=8, encoder_size=8, **recipe.plug)
    assert set(recipe.plug) <= set(choices())
    for kind in (EvaluateSettings, BenchSettings):
        given = {f.name: "x" for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        kind(**given | dict(recipe.answering))
    assert not set(recipe.training) & set(recipe.plug)


@pytest.mark.parametrize("name", FIT_RECIPES)
def test_a_recipe_of_a_baseline_names_its_method_and_options(name):
    recipe = get_recipe(name.upper())
    options = dict(recipe.training)
    own = names_of(options_of(options["method"]))
    assert own.isdisjoint(names_of(FitSettings)) and recipe.name == name and not recipe.plug and not recipe.answering
    needed = {"data": "x", "output": "x", "backbone": "x"}
    FitSettings(**needed | {key: value for key, value in options.items() if key not in own})
    places = {name: "x" for name in ("encoder", "plug") if name in own}
    options_of(options["method"])(**places | {key: value for key, value in options.items() if key in own})
    assert set(recipe.reasons) <= {*own, *names_of(FitSettings)} and all(
        why.endswith(".") for why in recipe.reasons.values()
    )


@pytest.mark.parametrize("method", [name.partition("/")[2] for name in FIT_RECIPES if name.startswith("ours/")])
def test_ours_of_a_baseline_differs_from_the_papers_only_with_a_reason(method):
    ours, paper = (get_recipe(f"{whose}/{method}") for whose in ("ours", "paper"))
    usual = {f.name: f.default for f in fields(options_of(method))}
    differs = {name for name in usual if {**usual, **ours.training}[name] != {**usual, **paper.training}[name]}
    assert differs - {"encoder"} <= ours.reasons.keys()


def test_how_much_faster_users_weights_learn_than_the_papers_is_true():
    for method, words, times in (("ftp", "Twenty times the paper's", 20), ("oppu", "Five times the authors'", 5)):
        ours, paper = (get_recipe(f"{whose}/{method}").training for whose in ("ours", "paper"))
        assert ours["learning_rate"] == pytest.approx(times * paper["learning_rate"])
        assert get_recipe(f"ours/{method}").reasons["learning_rate"].startswith(words)


def test_a_recipe_of_another_command_is_refused(capsys):
    assert main(["fit", "--recipe", "paper/lamp-4"]) == 1 and main(["train", "--recipe", "ours/ropg-kd"]) == 1
    said = capsys.readouterr().err
    assert "'paper/lamp-4' is not one of fit" in said and "'ours/ropg-kd' is not one of train" in said
    assert main(["fit", "--method", "ftp", "--recipe", "ours/ropg-kd"]) == 1
    assert "is one of --method ropg-kd, not of ftp" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(1, 8))
def test_ours_differs_only_with_a_reason(number):
    paper, ours = RECIPES[f"paper/lamp-{number}"], RECIPES[f"ours/lamp-{number}"]
    for part in ("training", "plug", "answering"):
        a, b = getattr(paper, part), getattr(ours, part)
        differs = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
        assert differs <= ours.reasons.keys()
    named = {**ours.training, **ours.plug}
    before = {**paper.training, **paper.plug}
    assert all(named.get(name) != before.get(name) for name in ours.reasons if name not in ("history_repeats",))
    assert all(why.endswith(".") for why in ours.reasons.values()) and not paper.reasons


def test_the_papers_numbers():
    for number in range(1, 8):
        recipe = RECIPES[f"paper/lamp-{number}"]
        training, plug = recipe.training, recipe.plug
        assert (training["learning_rate"], training["weight_decay"], training["warmup"]) == (1e-4, 1e-4, 0.05)
        assert (training["batch_size"], training["epochs"]) == (64, 1 if number == 3 else 2)
        assert (training["max_length"], training["max_items"], training["history_repeats"]) == (256, 512, 10)
        assert training.get("labelled_items", True) and not training["train_on_histories"]
        assert (plug["num_persona_tokens"], plug["attention_temperature"]) == (1, 1.0) and plug["train_input_encoder"]
        assert plug["query_prompt"].startswith("Represent this sentence") and plug["history_prompt"] == ""
        assert (training["backbone"], training["encoder"]) == ("google/flan-t5-xxl", "BAAI/bge-base-en-v1.5")
        assert (recipe.answering["num_beams"], recipe.answering["max_new_tokens"]) == (4, 10 if number == 3 else 128)
        assert any("539.9738" in line for line in recipe.not_reproduced)


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("whose", ["paper", "release"])
def test_what_the_papers_recipes_train_in_full(seen, whose, number):
    """Through the command line, whatever the defaults are."""
    assert main(["train", "--recipe", f"{whose}/lamp-{number}", "--data", "d", "--output", "o"]) == 0
    ((settings, plug),) = seen
    config = PPlugConfig(hidden_size=4096, encoder_size=768, **plug)
    titles = {1: "{title} {abstract}", 4: "{text} {title}", 5: "{title} {abstract}"}
    assert {name: getattr(config, name) for name in choices()} == {
        "placement": "prompt",
        "num_persona_tokens": 1,
        "projector_size": 4096,
        "instruction": True,
        "aggregator": "attention",
        "attention_temperature": 1.0,
        "learn_temperature": False,
        "project_no_persona": False,
        "normalize": True,
        "train_input_encoder": True,
        "query_prompt": "Represent this sentence for searching relevant passages: ",
        "history_prompt": "",
        "item_template": titles.get(number),  # the others take the task's
        "output_init": 0.1,
    }
    assert "projector_size" in plug and plug["projector_size"] is None
    others = ("data", "output", "vectors", "device", "resume", "logging_steps", "report_to", "prompt_cache")
    assert {name: value for name, value in vars(settings).items() if name not in others} == {
        "backbone": "google/flan-t5-xxl",
        "encoder": "BAAI/bge-base-en-v1.5",
        "task": f"LaMP-{number}",
        "train_on_histories": False,
        "synthetic_users": 0,
        "labelled_items": whose == "paper" or number not in (2, 3),
        "use_history": True,
        "new_users": 0.0,
        "max_items": 512,
        "history_dropout": 0.5,
        "history_repeats": 10,
        "leave_out_users": 0.0,
        "split_seed": 0,
        "validation_users": 0.1,
        "epochs": 1 if number == 3 else 2,
        "max_steps": None,
        "patience": 100,
        "evaluations_per_epoch": 1,
        "batch_size": 64,
        "gradient_accumulation": 1,
        "learning_rate": 1e-4,
        "encoder_learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "warmup": 0.05,
        "gradient_checkpointing": False,
        "max_length": 256,
        "max_target_length": 128,
        "seed": 0,
        "backbone_dtype": "bfloat16",
        "chat": "auto",
        "system": None,
    }


@pytest.mark.parametrize("number", range(1, 8))
def test_ours_stands_where_the_answer_begins(number):
    ours = RECIPES[f"ours/lamp-{number}"]
    assert ours.plug["placement"] == "answer" and ours.training["learning_rate"] == 1e-2
    assert (
        "0.866" in ours.reasons["placement"] and "benchmarks/results were made in front" in ours.reasons["placement"]
    )
    stated = (
        "num_persona_tokens",
        "projector_size",
        "attention_temperature",
        "learn_temperature",
        "train_input_encoder",
    )
    assert [ours.plug[name] for name in stated] == [4, 256, 0.1, True, False]


@pytest.mark.parametrize("number", range(1, 8))
def test_the_release_leaves_tags_and_scores_out_and_is_else_the_paper(number):
    paper, release = RECIPES[f"paper/lamp-{number}"], RECIPES[f"release/lamp-{number}"]
    unlabelled = {"labelled_items": False} if number in (2, 3) else {}
    assert release.training == {**paper.training, **unlabelled} and release.reasons.keys() == unlabelled.keys()
    assert (release.plug, release.answering) == (paper.plug, paper.answering)
    assert release.not_reproduced == paper.not_reproduced


def test_the_papers_item_texts():
    item = {"title": "T", "abstract": "A", "text": "X", "description": "D", "tag": "comedy", "score": "4"}
    expected = ["T A", "comedy: D", "rated 4 of 5: X", "X T", "T A", "T: X", "X"]
    unlabelled = ["T A", "D", "X", "X T", "T A", "T: X", "X"]
    for whose, texts in (("paper", expected), ("release", unlabelled)):
        for number, text in enumerate(texts, 1):
            recipe, task = RECIPES[f"{whose}/lamp-{number}"], TASKS[f"LaMP-{number}"]
            labelled = recipe.training.get("labelled_items", True)
            template = task.item_template if labelled else task.item_template_unlabelled
            assert recipe.plug.get("item_template", template).format(**item) == text


def test_what_is_not_reproduced_is_said():
    said = " ".join(RECIPES["paper/lamp-3"].not_reproduced)
    words = (
        "presumably, dropout stays on, by length, sub-histories, last 512 items, query is cut, encoded, unused rows"
    )
    for fact in (*words.split(", "), "clip gradients", "DeepSpeed"):
        assert fact in said, fact


@pytest.mark.parametrize("name", ["paper/lamp-4", "paper/LaMP-4", " PAPER/lamp_4 "])
def test_usual_spellings(name):
    assert get_recipe(name) is RECIPES["paper/lamp-4"]


def test_an_unknown_recipe_lists_the_options(capsys):
    with pytest.raises(ConfigurationError, match="no recipe 'help'; choose one of paper/lamp-1, "):
        get_recipe("help")
    assert main(["train", "--recipe", "help"]) == 1
    assert "choose one of paper/lamp-1" in capsys.readouterr().err
    assert main(["recipes", "--name", "mine"]) == 1


def test_the_list_and_one_recipe(capsys):
    assert main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*NAMES, *PRESETS, *FIT_RECIPES]
    for name in ("paper/lamp-6", "ours/lamp-2"):
        assert main(["recipes", "--name", name]) == 0
        shown = capsys.readouterr().out
        recipe = RECIPES[name]
        assert all(f"--{setting}" in shown for setting in (*recipe.training, *recipe.plug, *recipe.answering))
        assert all(why in shown for why in (*recipe.reasons.values(), *recipe.not_reproduced))


# ---- on the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What `train` and `bench` are called with, instead of running."""
    calls = []
    monkeypatch.setattr(cli, "_check_places", lambda values: None)  # the data are not there
    for module, name in ((train_command, "train"), (bench_command, "bench")):
        monkeypatch.setattr(module, name, lambda settings, **plug: calls.append((settings, plug)))
    return calls


@pytest.mark.parametrize("where", ["first", "last"])
def test_what_is_given_explicitly_wins(seen, where):
    recipe = RECIPES["release/lamp-2"]
    own = ["--data", "d", "--output", "o", "--learning_rate", "0.5", "--task", "mine.json", "--query_prompt", ""]
    own += ["--num_persona_tokens", "3", "--labelled_items", "True", "--backbone=mine"]
    named = ["--recipe", "release/lamp-2"]
    assert main(["train", *(named + own if where == "first" else own + named)]) == 0
    ((settings, plug),) = seen
    assert (settings.learning_rate, settings.task, settings.backbone) == (0.5, "mine.json", "mine")
    assert settings.labelled_items is True
    others = {
        k: v for k, v in recipe.training.items() if k not in ("learning_rate", "task", "backbone", "labelled_items")
    }
    assert all(getattr(settings, name) == value for name, value in others.items())
    assert (
        plug["num_persona_tokens"] == 3
        and plug["placement"] == "prompt"
        and plug["query_prompt"] == ""
        and plug["history_prompt"] == ""
    )


def test_without_a_recipe_nothing_changes(seen):
    assert main(["train", "--data", "d", "--output", "o", "--backbone", "b", "--encoder", "e"]) == 0
    assert seen == [(TrainSettings(data="d", output="o", backbone="b", encoder="e"), {})]


def test_a_choice_of_ours_can_be_taken_back(seen):
    arguments = ["train", "--recipe=ours/lamp-4", "--data", "d", "--output", "o", "--num_persona_tokens", "1"]
    assert main(arguments) == 0
    ((settings, plug),) = seen
    assert plug == {"num_persona_tokens": 1} and PPlugConfig(**plug).projector_size == 256  # as the defaults are
    assert settings.encoder_learning_rate is None and settings.max_items is None


@pytest.mark.parametrize(
    "frozen", [["--train_input_encoder", "False"], ["--no-train-input-encoder"], ["--aggregator=mean"]]
)
def test_a_recipes_rate_of_an_encoder_that_the_user_freezes_goes(seen, frozen):
    arguments = ["train", "--preset=large", "--data=d", "--output=o", "--backbone=b", "--encoder=e", *frozen]
    for own, expected in ([], None), (["--encoder_learning_rate=0.1"], 0.1):
        assert main([*arguments, *own]) == 0
        settings, _ = seen.pop()
        assert settings.encoder_learning_rate == expected and settings.learning_rate == 3e-3


def test_the_bench_takes_what_concerns_answers(seen):
    assert main(["bench", "--recipe", "paper/lamp-3", "--data", "d", "--output", "o", "--num_beams", "2"]) == 0
    ((settings, plug),) = seen
    expected = BenchSettings(
        data="d", output="o", task="LaMP-3", num_beams=2, max_new_tokens=10, max_items=512, backbone_dtype="bfloat16"
    )
    assert settings == expected and plug == {}


def test_a_recipe_trains(tmp_path):
    """The paper's for movie tags, on a handful of the demo's readers as movies, with small stand-ins."""
    data, plug = tmp_path / "data", tmp_path / "plug"
    write_data(data, "LaMP_2", as_movies, movie_tag)
    common = ["--recipe", "paper/lamp-2", "--data", data, "--vectors", tmp_path / "vectors"]
    small = ["--backbone", BACKBONE, "--encoder", ENCODER, "--history_repeats", 1, "--validation_users", 0.3]
    quietly("train", *common, *small, "--max_items", 5, "--output", plug)
    config = PPlugModel.from_pretrained(plug).config
    assert config.item_template == "{tag}: {description}" and config.query_prompt.startswith("Represent this sentence")
    assert config.num_persona_tokens == 1 and config.train_input_encoder and config.placement == "prompt"
    assert config.projector_size == config.hidden_size == 96
    arguments = json.loads((plug / "training_args.json").read_text())
    assert arguments["learning_rate"] == arguments["encoder_learning_rate"] == 1e-4
    assert arguments["num_train_epochs"] == 2 and arguments["per_device_train_batch_size"] == 64
    printed = quietly("bench", *common, "--plugs", f"pplug={plug}", "--rows", "pplug", "--output", tmp_path / "bench")
    assert "| pplug" in printed
