"""Model cards: their content, the text of a person in them, and those in model_cards/."""

import contextlib
import importlib.util
import io
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pplug_hf import PPlugForConditionalGeneration, PPlugModel
from pplug_hf.cli import main
from pplug_hf.configuration import PPlugConfig
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.hub.card_text import CardText, _merged
from pplug_hf.hub.cards import card_options, write_card
from pplug_hf.methods.persona import plug_digest

COMMIT = "7bcac572ce56db69c1ea7c8af255c5d7c9672fc2"
SECRET = "my secret diary"
PARTS = ["title", "use", "architecture", "training", "results", "limits", "privacy"]


def config(**changes):
    on_hub = {"backbone": "google/flan-t5-base", "backbone_revision": COMMIT}
    on_hub |= {"encoder": "BAAI/bge-base-en-v1.5", "encoder_revision": COMMIT[::-1]}
    prints = {
        "backbone_fingerprint": {"model_type": "t5", "vocab_size": 32128},
        "encoder_fingerprint": {"model_type": "bert", "digest": "0123456789abcdef"},
    }
    sizes = {"hidden_size": 768, "encoder_size": 384}
    return tiny.config(
        **{**on_hub, **prints, **sizes, "item_template": "{tag}: {description}", "placement": "answer", **changes}
    )


def row(name, accuracy, gain=None, seeds=1, **more):
    record = {"row": name, "seeds": seeds, "accuracy": accuracy, "f1": accuracy - 0.1, "unparsed": 2.0}
    record |= {"accuracy_sd": 0.012} if seeds > 1 else {}
    record |= {"interval": [accuracy - 0.05, accuracy + 0.05]}
    return record | ({"gain": gain, "users": {"win": 1, "tie": 2, "loss": 3}} if gain else {}) | more


def bench(**changes):
    """A results.json as `pplug-hf bench` writes it."""
    rows = [
        row("no-persona", 0.44, [-0.018, -0.055, 0.019]),
        row("bm25@4", 0.318, [0.104, 0.057, 0.161]),
        row("pplug:wrong-user", 0.349, [0.072, 0.041, 0.104], seeds=3),
        row("pplug", 0.4219, seeds=3),
    ]
    settings = {"data": f"/home/alice/{SECRET}", "split": "dev", "plugs": ["pplug=/home/alice/a,/home/alice/b"]}
    settings |= {"num_beams": 4, "max_length": 192, "max_new_tokens": None, "vectors": "/home/alice/vectors"}
    counts = {"task": "LaMP-2", "examples": 1400, "users": 140, "reference": "pplug"}
    return {**counts, "rows": rows, "settings": settings, "git_commit": "abc+", **changes}


@pytest.fixture
def folder(tmp_path):
    """A plug folder as far as a card looks at it."""
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1_234_567)
    return tmp_path


def write(folder, config_=None, trainable=123_456, **options):
    """The card's text."""
    if isinstance(published := options.get("published"), str):
        options["published"] = published.encode()
    write_card(folder, config_ or config(), trainable=trainable, **options)
    return (folder / "README.md").read_bytes().decode()


def parts(text):
    """The generated parts by name."""
    return CardText(text.encode()).parts


def with_results(folder, content=None):
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "bench" / "results.json").write_text(json.dumps(content or bench()))
    return folder / "bench"


def retrained(folder):
    (folder / "model.safetensors").write_bytes(b"y" * 1_234_567)


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def edit(folder, old, new):
    text = (folder / "README.md").read_bytes().decode()
    assert old in text
    (folder / "README.md").write_bytes(text.replace(old, new).encode())


# ---- what it says -----------------------------------------------------------------------------------------------


def test_metadata_is_what_the_hub_knows(folder):
    text = write(
        folder, repo_id="me/plug", results=with_results(folder), license="mit", datasets=["a/b"], language=["en"]
    )
    data = ModelCard(text).data.to_dict()
    assert data.pop("model-index") == metadata(text)["model-index"]
    assert data == {
        "library_name": "pplug-hf",
        "base_model": "google/flan-t5-base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["pplug", "personalization", "soft-prompt", "persona"],
        "license": "mit",
        "datasets": ["a/b"],
        "language": "en",
    }
    assert ModelCard.load(folder / "README.md").data.to_dict() == ModelCard(text).data.to_dict()
    assert str(ModelCard(text)) == text, "the Hub's client writes it as we do"


def test_model_index_holds_the_plugs_own_row(folder):
    text = write(folder, repo_id="me/plug", results=with_results(folder))
    name, results = model_index_to_eval_results(metadata(text)["model-index"])
    assert name == "plug"
    assert {r.metric_type: r.metric_value for r in results} == {"accuracy": 0.4219, "f1": 0.3219}
    assert {(r.dataset_name, r.dataset_type, r.dataset_split, r.task_type) for r in results} == {
        ("LaMP-2", "lamp-2", "dev", "text-generation")
    }
    text = write(folder, results=with_results(folder), datasets=["me/tags"])
    assert metadata(text)["model-index"][0]["results"][0]["dataset"]["type"] == "me/tags"


def test_the_table_has_intervals_and_controls_beside_the_plug(folder):
    text = write(folder, results=with_results(folder))
    lines = [line for line in parts(text)["results"].splitlines() if line.startswith("|")]
    assert lines[0] == "| row | accuracy [95 %] | macro-F1 | unparsed | pplug is better by [95 %] |"
    assert lines[2] == "| **pplug** (3 seeds) | 0.422 ± 0.012 [0.372, 0.472] | 0.322 | 2 |  |"
    assert lines[3] == "| no-persona | 0.440 [0.390, 0.490] | 0.340 | 2 | -0.018 [-0.055, +0.019] |"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["pplug:wrong-user (3 seeds)", "bm25@4"]
    assert "LaMP-2, dev split: 1,400 questions of 140 users, 4 beams, prompts of at most 192 tokens" in text
    assert "lacks instruction-only, so it cannot tell" in text
    assert "the mean over 3 plugs that differ in their seed" in text


def test_results_of_evaluate_do_too(folder):
    rows = [row("no-persona", 0.3, [0.6, 0.5, 0.7]), row("instruction-only", 0.3, [0.6, None, None])]
    rows += [row("PPlug:wrong-user", 0.3, [0.6, 0.5, 0.7]), row("PPlug", 0.9)]
    for record in rows:
        del record["interval"]
    settings = {"plug": ["/home/alice/plug"], "split": "test", "num_beams": 1}
    content = {"task": "demo", "examples": 4, "users": 2, "reference": "PPlug", "rows": rows, "settings": settings}
    text = write(folder, results=with_results(folder, content))
    assert "| **PPlug** | 0.900 | 0.800 | 2 |  |" in text and "+0.600 [?, ?]" in text
    assert "lacks" not in text and "greedy decoding" in text
    assert "So few users are too few to conclude" in text


def test_rows_that_evaluate_names_today(folder):
    rows = [row(name, 0.3) for name in ("no-persona", "instruction-only", "PPlug:wrong-user")] + [row("PPlug", 0.9)]
    settings = {"plug": ["/home/alice/plug"], "split": "test", "num_beams": 1}
    content = {"task": "demo", "examples": 40, "users": 20, "reference": "PPlug", "rows": rows, "settings": settings}
    text = write(folder, results=with_results(folder, content))
    assert "lacks" not in text and "too few to conclude" not in text
    assert "lacks instruction-only" in write(
        folder, results=with_results(folder, {**content, "rows": [rows[0], *rows[2:]]})
    )


@pytest.mark.parametrize(
    "broken, error, message",
    [
        (lambda c: c.pop("rows"), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(accuracy=SECRET), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(row=f"<b>{SECRET}</b>\n"), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(gain=[float("nan")] * 3), DataError, "not what pplug-hf bench writes"),
        (lambda c: c.update(examples=[]), DataError, "not what pplug-hf bench writes"),
        (lambda c: c.update(users=10**400), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"].pop(), ConfigurationError, "No row of these results is a plug's own"),
        (lambda c: c["settings"].update(split=SECRET * 9), DataError, "not what pplug-hf bench writes"),
    ],
)
def test_results_that_are_none(folder, broken, error, message):
    content = bench()
    broken(content)
    with pytest.raises(error, match=message) as caught:
        write(folder, results=with_results(folder, content))
    assert SECRET not in str(caught.value) and not (folder / "README.md").exists()
    with pytest.raises(MissingFileError, match="no results in"):
        write(folder, results=folder / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_results_that_are_no_json(folder, content):
    place = with_results(folder)
    (place / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"is damaged .*: run the bench again"):
        write(folder, results=place)


def settings_of(text):
    return re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, re.MULTILINE)


def test_settings_that_are_not_the_defaults(folder):
    assert "The settings were not recorded." in write(folder)
    values = {"learning_rate": 0.002, "epochs": 10, "bf16": True, "warmup": 0.05, "lr_scheduler_type": "cosine"}
    defaults = {"learning_rate": 0.001, "epochs": 10.0, "bf16": False, "warmup": 0, "lr_scheduler_type": "linear"}
    values |= {"max_items": 8, "output_dir": "/home/alice/x", "data": SECRET, SECRET: 1}
    recorded = {"task": "LaMP-2", "settings": values, "defaults": defaults | {"max_items": None, "data": SECRET}}
    (folder / "train_settings.json").write_text(json.dumps(recorded))
    text = write(folder)
    assert settings_of(text) == [
        ("learning_rate", "0.002", "0.001"),
        ("bf16", "yes", "no"),
        ("warmup", "0.05", "0"),
        ("lr_scheduler_type", "cosine", "linear"),
        ("max_items", "8", ""),
    ]
    assert "Task: LaMP-2." in text and "alice" not in text and SECRET not in text
    (folder / "train_settings.json").write_text(json.dumps({"settings": {"epochs": 3}, "defaults": {"epochs": 3}}))
    assert "All settings are the defaults." in write(folder)


def test_a_card_names_the_data_that_training_knew(folder):
    assert "This card does not name the data." in write(folder)
    known = {"name": "LaMP_2", "examples": 3820, "users": 1200, "digest": "0123abcd"}
    recorded = {"task": "LaMP-2", "settings": {"epochs": None}, "defaults": {"epochs": 3}}
    (folder / "train_settings.json").write_text(json.dumps({**recorded, "data": known}))
    text = write(folder)
    assert "Data: `LaMP_2`, which is not on the Hub.\n3,820 examples of 1,200 users, digest `0123abcd`." in text
    assert settings_of(text) == [("epochs", "none", "3")] and "does not name the data" not in text
    linked = write(folder, datasets=["me/lamp"])
    assert "datasets/me/lamp)" in linked and "not on the Hub" not in linked and "3,820 examples" in linked
    for bad in ({"name": f"/home/{SECRET}", "examples": "3", "users": True, "digest": SECRET + "!"}, SECRET, [1]):
        (folder / "train_settings.json").write_text(json.dumps({**recorded, "data": bad}))
        (folder / "README.md").unlink()
        assert "This card does not name the data." in (text := write(folder)) and SECRET not in text


def test_a_card_says_which_choices_of_the_plug_are_not_the_defaults(folder):
    (folder / "train_settings.json").write_text(json.dumps({"settings": {}, "defaults": {}}))
    text = write(folder, config(normalize=False, output_init=0.5, query_prompt=f"{SECRET}: ", placement="prompt"))
    assert "prepends the result to the prompt" in text and "appends the result to the prompt" in write(folder)
    assert {
        ("placement", "prompt", "answer"),
        ("normalize", "no", "yes"),
        ("output_init", "0.5", "0.1"),
        ("query_prompt", "a text", ""),
    } <= {*settings_of(text)}
    assert SECRET not in text


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "{", "[" * 100_000, "\xff"),
        *('{"settings": 3}', '{"settings": {"a": 1}}', '{"settings": {"a": 1}, "defaults": [2]}'),
    ],
)
def test_settings_that_cannot_be_read_do_no_harm(folder, content):
    (folder / "train_settings.json").write_bytes(content.encode("latin-1"))
    assert "The settings were not recorded." in write(folder)


PRIVATE = [
    *("/home/alice/model", "./runs/model", "../model", "~/model", "C:\\Users\\alice\\model", "runs/alice"),
    *("//host/share", "alice's model", "file:///home/alice", "a/b/c"),
]


@pytest.mark.parametrize("place", PRIVATE)
def test_a_place_on_a_machine_is_told_to_nobody(folder, place):
    local = config(backbone=place, backbone_revision=None, encoder=place, encoder_revision=None)
    text = write(folder, local, repo_id="me/plug")
    assert place not in text and "alice" not in text
    assert "base_model" not in metadata(text) and "base_model_relation" not in metadata(text)
    assert "a local t5 of width 768, vocabulary 32,128" in text
    assert "a local bert of width 384, fingerprint `0123456789abcdef`" in text
    assert 'backbone="path/to/backbone",' in text and 'encoder="path/to/encoder",' in text


def test_nothing_of_a_history_gets_in(folder):
    odd = {"item_template": "one wrote: " + SECRET + " {tag} {a}", "query_prompt": SECRET, "history_prompt": SECRET}
    for kind in ("backbone", "encoder"):
        odd[f"{kind}_fingerprint"] = {"model_type": f"{SECRET}`|", "digest": SECRET + "\n", "history_prompt": SECRET}
    names = {"learning_rate": SECRET + "|", "seed": [SECRET], "use_history": {SECRET: SECRET}, SECRET: 1}
    recorded = {"task": SECRET + "!", "settings": names, "defaults": {"learning_rate": SECRET, "seed": 1}, SECRET: 1}
    (folder / "train_settings.json").write_text(json.dumps(recorded))
    content = bench()
    content |= {"by_history_length": [{"rows": {SECRET: 1}}], SECRET: SECRET}
    content["rows"][0] |= {"style_gaps": {SECRET: 1.0}, SECRET: 1.0}
    text = write(folder, config(**odd), results=with_results(folder, content))
    assert SECRET not in text and "`tag`, `a`" in text


@pytest.mark.parametrize("name", ["", "a/b/c", "/home/alice", "a b", "-a", "x" * 99])
def test_names_that_the_hub_does_not_take(folder, name):
    for options in ({"repo_id": name}, {"datasets": [name]}):
        with pytest.raises(ConfigurationError, match="is not a Hub id"):
            write(folder, **options)


def test_one_text_is_as_good_as_a_list(folder):
    said = metadata(write(folder, language="en", tags="news", datasets="me/films"))
    assert said["language"] == "en" and said["tags"][-1] == "news" and said["datasets"] == ["me/films"]
    lists = metadata(write(folder, language=("en", "de"), tags=["news"], datasets=("me/films",)))
    assert lists == {**said, "language": ["en", "de"]}


def test_what_the_scripts_of_transformers_say_about_a_card():
    given = {"finetuned_from": "gpt2", "tasks": "summarization", "model_name": "x", "license": None, "language": "en"}
    given |= {"dataset_tags": "me/films", "dataset_args": "main", "dataset": "me/films main"}
    assert card_options(given) == {"language": "en", "datasets": ["me/films"]}
    assert card_options({"datasets": ["me/a"], "dataset_tags": ["me/b"]}) == {"datasets": ["me/a", "me/b"]}
    with pytest.raises(ConfigurationError, match="A card has no option licence; options are results, license"):
        card_options({"licence": "mit"})
    with pytest.raises(ConfigurationError, match="is not a Hub id"):
        card_options({"datasets": "no id"})


def test_sizes(folder):
    text = write(folder, config(num_persona_tokens=4))
    assert "| trained parameters | 123,456 (input encoder included) |" in text
    assert "| aggregator | attention, temperature 1 |" in text
    assert "| size of the plug | 1.2 MB |" in text and "| projector | 384 → 768 → 4 x 768 |" in text
    assert "| soft prompt | 5 tokens of width 768: instruction and 4 of the persona |" in text
    text = write(folder, config(learn_temperature=True, attention_temperature=0.1))
    assert "| aggregator | attention, temperature learned from 0.1 |" in text
    text = write(folder, config(instruction=False, aggregator="mean"))
    assert "| soft prompt | 1 token of width 768: 1 of the persona |" in text and "| aggregator | mean |" in text
    assert "input encoder included" not in text


# ---- text of a person --------------------------------------------------------------------------------------------


def test_twice_is_once(folder):
    options = {"repo_id": "me/plug", "results": with_results(folder), "license": "mit", "datasets": ["a/b"]}
    first = write(folder, **options)
    assert list(parts(first)) == PARTS
    assert write(folder, **options) == first
    assert write(folder) == first, "repository, results, licence and data are remembered"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_parts_are_made_again_and_the_text_outside_of_them_stays(folder):
    write(folder)
    edit(folder, "## Intended use and limits", "## Limits, as I see them")
    edit(folder, "<!-- pplug-hf:end title -->\n", "<!-- pplug-hf:end title -->\n\nFor my two cats.  \n\x0b\n")
    with (folder / "README.md").open("a", encoding="utf-8", newline="") as file:
        file.write("\n\n## Mine\n<!-- mine -->\n")
    text = write(folder, trainable=7)
    assert "## Intended use" in text and "as I see them" not in text and "| trained parameters | 7 " in text
    assert "<!-- pplug-hf:end title -->\n\nFor my two cats.  \n\x0b\n\n<!-- pplug-hf:begin use -->" in text
    assert text.endswith("<!-- pplug-hf:end privacy -->\n\n\n## Mine\n<!-- mine -->\n")
    assert write(folder, trainable=7) == text


def test_a_part_that_was_removed_is_not_put_back_until_its_markers_are(folder):
    text = write(folder)
    begin, end = "<!-- pplug-hf:begin privacy -->", "<!-- pplug-hf:end privacy -->"
    (folder / "README.md").write_text(re.sub(f"{begin}.*{end}", "My own words.", text, flags=re.DOTALL))
    for _ in range(2):
        text = write(folder)
        assert "## Privacy" not in text and "My own words." in text and list(parts(text)) == PARTS[:-1]
    edit(folder, "My own words.", f"{begin}{end}")
    assert "## Privacy" in write(folder)


def test_markers_that_were_removed_make_the_text_a_persons(folder):
    text = write(folder)
    mine = text.replace("<!-- pplug-hf:begin limits -->", "").replace("## Intended use", "## My use")
    (folder / "README.md").write_text(mine)
    text = write(folder, trainable=7)
    assert "## My use" in text and "| trained parameters | 7 " in text
    bare = re.sub("<!-- pplug-hf:.*-->\n", "", text)
    (folder / "README.md").write_text(bare)
    assert write(folder, trainable=8) == bare, "without markers it is a card by hand"


def test_metadata_that_are_there_stay_except_those_of_the_plug(folder):
    write(folder)
    edit(folder, "- persona\n", "- persona\n- cats\n")
    edit(folder, "pipeline_tag: text-generation", "pipeline_tag: summarization\nthumbnail: cat.png")
    edit(folder, "library_name: pplug-hf\n", "")
    edit(folder, "base_model: google/flan-t5-base\n", "base_model: google/flan-t5-xl\n")
    text = write(folder, config(backbone="google/flan-t5-small"))
    data = metadata(text)
    assert data["tags"][-1] == "cats" and data["base_model"] == "google/flan-t5-small"
    assert (data["pipeline_tag"], data["thumbnail"], data["library_name"]) == ("summarization", "cat.png", "pplug-hf")
    text = write(folder, config(backbone="/home/alice/t5"))
    assert not {"base_model", "base_model_relation"} & set(metadata(text)) and metadata(text)["thumbnail"] == "cat.png"


def test_what_is_asked_for_now_wins_over_both(folder):
    write(folder, license="mit")
    edit(folder, "license: mit", "license: cc0-1.0")
    assert metadata(write(folder))["license"] == "cc0-1.0"
    assert metadata(write(folder, license="apache-2.0", tags=["cats"]))["license"] == "apache-2.0"
    data = metadata(write(folder))
    assert data["license"] == "apache-2.0" and data["tags"] == [
        "pplug",
        "personalization",
        "soft-prompt",
        "persona",
        "cats",
    ]


def test_results_go_with_their_weights(folder):
    text = write(folder, results=with_results(folder))
    assert write(folder) == text
    retrained(folder)
    text = write(folder)
    assert "None for these weights yet." in text and "model-index" not in metadata(text)


def test_settings_go_with_their_weights(folder):
    (folder / "train_settings.json").write_text(json.dumps({"settings": {"epochs": 3}, "defaults": {"epochs": 1}}))
    text = write(folder)
    (folder / "train_settings.json").unlink()
    assert "| `epochs` | 3 | 1 |" in text and write(folder) == text
    retrained(folder)
    assert "The settings were not recorded." in write(folder)


def test_a_card_written_by_hand_gets_only_the_metadata_it_lacks(folder):
    body = "\n# Mine\r\n\nAll by hand.  \n\n---\n\nwith *everything* — 猫\n"
    before = "---\nlicense: mit # as agreed\ntags: [cats]\nbase_model: me/copy\n\n# a comment\n---\n" + body
    (folder / "README.md").write_bytes(before.encode())
    text = write(folder, repo_id="me/plug")
    assert text.endswith("---\n" + body)
    assert text.replace("\r\n", "\n").startswith(before.split("\n---\n")[0] + "\nlibrary_name: pplug-hf\n")
    assert metadata(text)["base_model"] == "me/copy" and "model-index" not in text
    assert write(folder, repo_id="me/plug") == text
    text = write(folder, results=with_results(folder))
    assert "model-index" in metadata(text) and text.endswith("---\n" + body)
    retrained(folder)
    assert write(folder) == text, "by hand, so the results are, too"


def test_a_card_without_metadata_gets_it(folder):
    (folder / "README.md").write_text("# Mine\n\nBy hand.\n")
    text = write(folder)
    assert text.startswith("---\nlibrary_name: pplug-hf\n") and text.endswith("\n---\n\n# Mine\n\nBy hand.\n")
    assert write(folder) == text


@pytest.mark.parametrize(
    "text", ["", "\n\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "---\r\nlicense: mit\r\n---"]
)
def test_a_file_without_text_is_no_card_yet(folder, text):
    (folder / "README.md").write_bytes(text.encode())
    card = write(folder)
    assert list(parts(card)) == PARTS and write(folder) == card
    assert metadata(card).get("license") == ("mit" if "mit" in text else None)


def test_line_ends_stay(folder):
    text = write(folder, results=with_results(folder))
    edit(folder, "\n", "\r\n")
    again = write(folder)
    assert again == text.replace("\n", "\r\n")
    edit(folder, "<!-- pplug-hf:begin privacy", "Mine.\r\n<!-- pplug-hf:begin privacy")
    again = write(folder, trainable=7)
    assert "\n" not in again.replace("\r\n", "") and "| trained parameters | 7 " in again and "Mine.\r\n<!--" in again


@pytest.mark.parametrize("text", ["\ufeff---\nlicense: mit\n---\n# Mine\n", "\ufeff# Mine\n"])
def test_a_byte_order_mark_stays(folder, text):
    (folder / "README.md").write_text(text, encoding="utf-8")
    again = write(folder)
    assert (
        again.startswith("\ufeff---\n")
        and again.count("\ufeff") == 1
        and again.endswith("---\n# Mine\n") is ("license" in text)
    )
    assert metadata(again)["library_name"] == "pplug-hf" and write(folder) == again


@pytest.mark.parametrize(
    "text, message",
    [
        ("---\nlicense: [mit\n---\n# A\n", "is not valid YAML, line"),
        ("---\na: b: c\n---\n", "is not valid YAML, line 2"),
        ("---\njust words\n---\n# A\n", "is a str and must be keys"),
        ("---\n- a\n- b\n---\n# A\n", "is a list and must be keys"),
        ("---\na: &x [1]\nb: *x\n---\n", "has a YAML alias"),
        ("---\na: !!python/object:os.system x\n---\n", "is not valid YAML"),
        ("---\na: " + "[" * 100_000 + "\n---\n", "nested more than 20 levels"),
        ("---\na: 2020-99-99\n---\n", "is not valid YAML"),
        (b"---\nlicense: mit\n---\n\xff\xfe caf\xe9", "is not UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_as_it_is(folder, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "README.md").write_bytes(content)
    with pytest.raises(DataError, match=message):
        write(folder)
    assert (folder / "README.md").read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.replace("<!-- pplug-hf:end use -->", ""),
        lambda t: t.replace("<!-- pplug-hf:begin use", "<!-- pplug-hf:begin use <!-- "),
        lambda t: t.replace("begin use", "begin ../../use").replace("end use", "end ../../use"),
        lambda t: t.replace("begin use", "begin unknown").replace("end use", "end unknown"),
        lambda t: re.sub("weights [0-9a-f]+", "weights <!--", t),
        lambda t: t.replace('from_pretrained("me/plug', 'from_pretrained("../../etc/'),
        lambda t: t + t.split("---", 2)[2],
    ],
)
def test_damaged_markers_do_no_harm(folder, damage):
    write(folder, repo_id="me/plug")
    text = damage((folder / "README.md").read_text())
    (folder / "README.md").write_text(text)
    text = write(folder)
    assert (
        "## Use" in text
        and ModelCard(text).data.library_name == "pplug-hf"
        and "/etc" not in parts(text).get("use", "")
    )
    assert write(folder) == text


def test_ten_megabytes_of_markers_are_read_at_once(folder):
    (folder / "README.md").write_text("<!-- pplug-hf:begin use -->" * 400_000)
    assert write(folder).endswith("begin use -->")


def test_a_killed_write_leaves_the_old_card(folder, monkeypatch):
    text = write(folder)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(folder, trainable=7)
    assert (folder / "README.md").read_bytes().decode() == text
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]


# ---- two cards: the folder's, and the published one --------------------------------------------------------------

MINE = "<!-- pplug-hf:end title -->", "<!-- pplug-hf:end title -->\n\nMine, all mine.\n"


def test_the_published_card_is_brought_up_to_date(folder):
    published = write(folder, license="mit").replace(*MINE)
    (folder / "README.md").unlink()
    text = write(folder, trainable=7, published=published)
    assert "Mine, all mine." in text and "| trained parameters | 7 " in text and metadata(text)["license"] == "mit"


def test_of_two_cards_the_one_with_text_of_a_person_counts(folder, caplog):
    old = write(folder)
    here = write(folder, results=with_results(folder), license="mit")
    published = old.replace(*MINE)
    text = write(folder, published=published)
    assert "Mine, all mine." in text and metadata(text)["license"] == "mit"
    assert "**pplug**" in text and "model-index" in metadata(text), "results of the same weights come along"

    (folder / "README.md").write_text(here.replace(MINE[0], MINE[0] + "\nThe folder's.\n"))
    text = write(folder, published=old)
    assert "The folder's." in text and not caplog.records
    text = write(folder, published=published)
    assert "The folder's." in text and "Mine, all mine." not in text
    assert "differs in folder and repository (text): the folder's is kept" in caplog.text

    (folder / "README.md").write_text(old)
    text = write(folder, published=here)
    assert "**pplug**" in text and metadata(text)["license"] == "mit"


def test_metadata_that_differ_are_named(folder, caplog):
    published = write(folder, license="mit", datasets=["a/b"])
    edit(folder, "license: mit", "license: cc0-1.0")
    text = write(folder, published=published)
    assert metadata(text)["license"] == "mit" and "(license): the repository's is kept" in caplog.text
    caplog.clear()
    edit(folder, "license: mit", "license: cc0-1.0")
    text = write(folder, published=published, license="apache-2.0")
    assert metadata(text)["license"] == "apache-2.0" and not caplog.records


def test_text_of_a_person_counts_after_the_next_push_too(folder):
    generated = write(folder)
    published = generated.replace(*MINE)
    for _ in range(2):
        (folder / "README.md").write_text(generated)
        published = write(folder, published=published)
        assert "Mine, all mine." in published


# ---- metadata as lines -------------------------------------------------------------------------------------------

# PyYAML itself does not bring back every line separator that it writes.
TEXT = st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=8)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXT, st.floats(allow_nan=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.text(alphabet="abcé-_猫 ", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=3), st.booleans())
def test_metadata_are_merged_to_what_is_asked_for(old, changes, flow):
    block = yaml.safe_dump(old, sort_keys=False, allow_unicode=True, default_flow_style=flow or None)
    assert (yaml.safe_load(_merged(block, {**old, **changes})) or {}) == {**old, **changes}
    assert (yaml.safe_load(_merged(block, changes)) or {}) == changes


def test_other_lines_of_the_metadata_stay_where_keys_are_added():
    block = "# mine\nlicense:   mit # ok\n\ntags:\n  - a  # one\n  - b\n# of the tags\nx: |\n  a\n\n  b\ny: 1"
    old = yaml.safe_load(block)
    assert _merged(block, old) == block
    assert _merged(block, {**old, "z": 3}) == block + "\nz: 3"


# ---- the snippet, and the command --------------------------------------------------------------------------------


def run_snippet(text, stand_ins):
    """Execute a card's Python, with places that exist for the names in it; what it printed, and its names."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for name, place in stand_ins.items():
        assert code.count(f'"{name}"') == 1, name
        code = code.replace(f'"{name}"', repr(str(place)))
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    return printed.getvalue(), names


@pytest.mark.parametrize("family, template", [("t5", "{tag}: {text}"), ("gpt2", None)])
def test_the_snippet_runs(places, tmp_path, family, template):

    model = tiny.from_backbone(str(places / family), str(places / "encoder"), item_template=template)
    tiny.randomise(model.plug)
    model.save_pretrained(tmp_path)
    local = write(tmp_path, model.config, repo_id="me/plug")
    stand_ins = {"path/to/backbone": places / family, "path/to/encoder": places / "encoder", "me/plug": tmp_path}
    printed, names = run_snippet(local, stand_ins)
    assert printed.endswith("\n") and len(names["persona"]) == 2
    assert isinstance(names["history"][0], dict) == (template is not None)

    on_hub = write(tmp_path, config(item_template=template), repo_id="me/plug")
    assert "path/to" not in on_hub
    assert run_snippet(on_hub, {"me/plug": tmp_path})[0] == printed


@pytest.mark.parametrize("on_hub", [True, False])
def test_the_snippet_names_the_subfolder(folder, on_hub):
    place = config() if on_hub else config(backbone=None, encoder=None)
    text = write(folder, place, repo_id="me/plug", subfolder="tasks/two")
    (code,) = re.findall(r"from_pretrained\((.*?)\n?\)\n", parts(text)["use"], re.DOTALL)
    local = [] if on_hub else ['backbone="path/to/backbone"', 'encoder="path/to/encoder"']
    assert re.split(r",\s*", code.strip(" ,\n")) == ['"me/plug"', 'subfolder="tasks/two"', *local]
    assert write(folder, place) == text
    text = write(folder, place, repo_id="me/plug", subfolder='x", evil("')
    assert "evil" not in text and "subfolder=" not in text


def test_the_command(places, tmp_path, capsys):

    model = tiny.from_backbone(str(places / "t5"), str(places / "encoder"))
    plug = tmp_path / "plug"
    model.save_pretrained(plug)
    capsys.readouterr()
    assert main(["card", "--plug", str(plug), "--repo", "me/plug", "--datasets", "a/b", "c/d"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"Card written: {plug / 'README.md'}" in printed
        and "No licence given: others may not use the plug. Pass --license." in printed
    )
    data = ModelCard.load(plug / "README.md").data
    assert data.datasets == ["a/b", "c/d"]
    trained = sum(p.numel() for p in model.plug.parameters() if p.requires_grad)
    assert f"| trained parameters | {trained:,} " in (plug / "README.md").read_text(encoding="utf-8")

    edit(plug, MINE[0], MINE[1])
    arguments = ["--results", str(with_results(tmp_path)), "--license", "mit", "--language", "en"]
    assert main(["card", "--plug", str(plug), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Mine, all mine." in (plug / "README.md").read_text(encoding="utf-8")
    assert "licence" not in printed and "Look again" not in printed
    for digest, warned in ((plug_digest(str(plug), PPlugConfig.from_pretrained(plug)), False), ("0" * 16, True)):
        runs = {"pplug": [{"key": {"plug": digest}}], "no-persona": [{"key": {}}]}
        assert main(["card", "--plug", str(plug), "--results", str(with_results(tmp_path, bench(runs=runs)))]) == 0
        assert ("Look again" in capsys.readouterr().out) == warned
    assert ModelCard.load(plug / "README.md").data.eval_results[0].metric_value == 0.4219
    assert PPlugModel.from_pretrained(plug).config.model_type == "pplug", "a card beside it changes nothing"

    for arguments in (["--plug", str(tmp_path / "none")], ["--plug", str(plug), "--results", str(tmp_path / "none")]):
        assert main(["card", *arguments]) == 1
        assert re.search("pplug-hf card: (There |Cannot load .*: there is no such folder)", capsys.readouterr().err)


# ---- the committed cards -----------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
CARDS = sorted(path for path in (ROOT / "model_cards").glob("pplug-*.md"))
# What the Hub's validator asks of a model card's metadata, as far as ours has it.
TYPES = {
    "library_name": str,
    "license": str,
    "language": (str, list),
    "base_model": str,
    "base_model_relation": str,
    "pipeline_tag": str,
    "tags": list,
    "model-index": list,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_model_cards", ROOT / "scripts" / "make_model_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_card_for_the_demo_and_every_task():
    assert [path.stem for path in CARDS] == ["pplug-demo", *(f"pplug-lamp-{n}" for n in range(1, 8))]
    readme = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}]({path.name})" in readme for path in CARDS)


def test_there_is_one_template():
    link = ROOT / "model_cards" / "template.md"
    assert link.is_symlink() and link.resolve() == ROOT / "pplug_hf" / "hub" / "model_card.md"


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_committed_cards_are_what_the_hub_reads(path):
    text = path.read_text(encoding="utf-8")
    data = ModelCard.load(path).data.to_dict()
    assert all(isinstance(value, TYPES[key]) for key, value in data.items())
    assert data["library_name"] == "pplug-hf" and data["license"] == "apache-2.0" and data["language"] == "en"
    assert data["pipeline_tag"] == "text-generation" and "pplug" in data["tags"]
    assert data.get("base_model_relation") == ("adapter" if "base_model" in data else None)
    assert list(parts(text)) == PARTS and str(ModelCard(text)) == text
    for result in model_index_to_eval_results(data["model-index"])[1] if "model-index" in data else ():
        # Four digits there and three in the table, both rounded from what was measured.
        shown = [float(number) for number in re.findall(r"\d\.\d{3}\b", parts(text)["results"])]
        assert 0 < result.metric_value < 5 and min(abs(result.metric_value - x) for x in shown) < 0.00056
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("n", range(1, 8))
def test_committed_examples_are_what_the_script_makes(script, n):
    committed = (ROOT / "model_cards" / f"pplug-lamp-{n}.md").read_text(encoding="utf-8")
    assert committed == script.lamp_card(f"lamp-{n}"), "run scripts/make_model_cards.py"


def test_the_demos_card_is_of_the_demos_plug(script, tmp_path):
    from pplug_hf.commands.demo import PLUG
    from pplug_hf.tasks.task import TASKS

    assets = files("pplug_hf.demo") / "assets"
    frozen = {kind: str(assets / kind) for kind in ("backbone", "encoder")}
    template = TASKS["demo"].item_template
    model = PPlugForConditionalGeneration.from_backbone(**frozen, item_template=template, **PLUG)
    model.save_pretrained(tmp_path / "plug")
    committed = (ROOT / "model_cards" / "pplug-demo.md").read_text(encoding="utf-8")
    made = parts(script.demo_card(tmp_path))  # untrained, so without settings and results
    same = [part for part in PARTS if part not in ("training", "results")]
    assert {part: parts(committed)[part] for part in same} == {part: made[part] for part in same}
    assert script.DEMO_NOTE in committed and "| **PPlug** |" in committed and "| `epochs` | 3 | 10 |" in committed
    printed, names = run_snippet(
        committed,
        {"me/pplug-demo": tmp_path / "plug"} | {f"path/to/{kind}": place for kind, place in frozen.items()},
    )
    assert printed.strip() and len(names["persona"]) == 2
