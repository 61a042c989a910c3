"""The defaults: a small plug whose attention tells items apart; presets by the size of the data; the paper's for old plugs."""

import json
from dataclasses import fields

import pytest
import tiny
from test_compatibility import GOLDEN, golden

from pplug_hf import (
    PPlugConfig,
    PPlugForConditionalGeneration,
    PPlugProcessor,
    PPlugTrainingArguments,
    TrainSettings,
    cli,
)
from pplug_hf.cli import main
from pplug_hf.commands import train as train_command
from pplug_hf.configuration.choices import choices
from pplug_hf.tasks.recipes import get_recipe

DEFAULTS = {
    "placement": "answer",
    "num_persona_tokens": 4,
    "projector_size": 256,
    "instruction": True,
    "aggregator": "attention",
    "attention_temperature": 0.1,
    "learn_temperature": True,
    "project_no_persona": False,
    "normalize": True,
    "train_input_encoder": False,
    "query_prompt": "",
    "history_prompt": "",
    "item_template": None,
    "output_init": 0.1,
}


def fresh(family="gpt2", encoder=None, **chosen):
    """A new plug with the defaults."""
    return PPlugForConditionalGeneration.from_backbone(
        tiny.backbone(family), encoder or tiny.shared_encoder(), tokenizer=tiny.tokenizer(family), **chosen
    )


# ---- a plug without choices -------------------------------------------------------------------------------------


def test_the_defaults_in_full():
    made = fresh().config
    assert {name: f.default for name, f in choices().items()} == DEFAULTS
    assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS
    rates = [{f.name: f.default for f in fields(kind)} for kind in (TrainSettings, PPlugTrainingArguments)]
    assert [rate["learning_rate"] for rate in rates] == [1e-2, 1e-2]


def test_a_default_plug_is_a_tenth_of_the_papers(tmp_path):
    """Which holds a copy of the encoder, here one of the width of all-MiniLM-L6-v2, with two of its six layers."""
    encoder = tiny.encoder(width=384)
    fresh(encoder=encoder).save_pretrained(tmp_path / "default")
    fresh(encoder=encoder, **tiny.PAPER).save_pretrained(tmp_path / "paper")
    default, paper = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("default", "paper"))
    assert default < 500_000 < 5_000_000 < paper


def test_a_fresh_attention_tells_items_apart():
    """At the paper's temperature, unit vectors get almost the same weight each."""
    default, paper = (
        fresh(**chosen).persona_weights(tiny.HISTORY, query="a film about the sea")[0] for chosen in ({}, tiny.PAPER)
    )
    assert default.argmax() == paper.argmax()
    assert default.max() > 1.5 * default.min() and paper.max() < 1.1 * paper.min()


def test_the_scale_is_that_of_the_place_where_the_soft_prompt_stands():
    """Behind what an encoder has read: that of its states, without a choice just as with one."""
    early, late = (fresh("t5", placement=placement).config.embedding_norm for placement in ("prompt", "answer"))
    assert fresh("t5").config.embedding_norm == late != early


# ---- plugs of earlier versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_plug_without_a_placement_keeps_its_own(folder, tmp_path):
    written = json.loads((folder / "plug" / "config.json").read_text())
    assert "placement" not in written
    model = golden(folder)
    assert model.config.placement == PPlugProcessor.from_pretrained(folder / "plug").placement == "prompt"
    assert all(getattr(model.config, name) == value for name, value in written.items() if name in choices())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["placement"] == "prompt"
    assert PPlugConfig.from_dict(written, placement="answer").placement == "answer"


# ---- presets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """What `train` is called with, by the options in front of it, instead of running."""
    calls = []
    monkeypatch.setattr(cli, "_check_places", lambda values: None)  # the data are not there
    monkeypatch.setattr(train_command, "train", lambda settings, **plug: calls.append((settings, plug)))

    def call(*options):
        assert main(["train", "--data", "d", "--output", "o", "--backbone", "b", "--encoder", "e", *options]) == 0
        return calls.pop()

    return call


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_preset_sets_what_its_recipe_says(trained, size):
    preset = get_recipe(f"preset/{size}")
    settings, plug = trained("--preset", size)
    assert settings == TrainSettings(data="d", output="o", backbone="b", encoder="e", **preset.training)
    config = PPlugConfig(**plug)
    assert all(getattr(config, name) == value for name, value in preset.plug.items())
    assert (settings, plug) == trained("--recipe", f"preset/{size}")


def test_the_presets():
    small, large = get_recipe("preset/small"), get_recipe("preset/large")
    assert small.plug.items() <= DEFAULTS.items() and small.training["learning_rate"] == 1e-2
    assert (small.training["history_dropout"], small.training["validation_users"]) == (0.5, 0.15)
    differing = {name: value for name, value in large.plug.items() if value != small.plug[name]}
    assert differing == {"num_persona_tokens": 8, "train_input_encoder": True}
    assert (large.training["learning_rate"], large.training["encoder_learning_rate"]) == (3e-3, 1e-4)
    assert large.training["epochs"] < small.training["epochs"]
    for preset in (small, large):
        assert preset.reasons.keys() == preset.training.keys() | preset.plug.keys()
    for unmeasured in ("learning_rate", "epochs", "train_input_encoder"):
        assert "Not measured" in large.reasons[unmeasured]


@pytest.mark.parametrize("where", ["first", "last"])
def test_options_override_a_preset(trained, where):
    own, named = ["--num_persona_tokens", "4", "--epochs", "7", "--projector_size", "none"], ["--preset=large"]
    settings, plug = trained(*(named + own if where == "first" else own + named))
    assert settings.epochs == 7 and settings.learning_rate == 3e-3
    assert plug == {"projector_size": None, "train_input_encoder": True}  # 4 tokens are the default


def test_a_preset_and_a_recipe_are_too_many(capsys):
    assert main(["train", "--preset", "small", "--recipe", "ours/lamp-2"]) == 1
    assert "--recipe ours/lamp-2 and --preset small contradict each other: pass one." in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [["--preset", "medium"], ["--preset"], ["--recipe"]])
def test_an_unknown_preset_names_the_options(capsys, mistake):
    needed = ["--data", "d", "--output", "o", "--backbone", "b", "--encoder", "e"]
    with pytest.raises(SystemExit) as left:
        main(["train", *needed, *mistake])
    said = capsys.readouterr().err
    assert left.value.code == 2 and len(said.splitlines()) == 1 and mistake[0] in said
    assert len(mistake) == 1 or ("small" in said and "large" in said)


def test_a_preset_is_shown_with_its_reasons(capsys):
    assert main(["recipes", "--name", "preset/small"]) == 0
    shown = capsys.readouterr().out
    assert "preset/small, for any task" in shown and "Reasons:" in shown and "evaluate, bench" not in shown
    assert all(why in shown for why in get_recipe("preset/small").reasons.values())
