"""Model cards: what they say, what a person edited in them, and the ones in model_cards/."""

import contextlib
import importlib.util
import io
import json
import re
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pplug_hf import PPlugModel
from pplug_hf.cli import main
from pplug_hf.configuration import PPlugConfig
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.hub.card_edits import Card, edit_metadata
from pplug_hf.hub.cards import FILES_OF_SETTINGS, write_card
from pplug_hf.methods.persona import plug_digest

COMMIT = "7bcac572ce56db69c1ea7c8af255c5d7c9672fc2"
SECRET = "my secret diary"
PARTS = ["title", "use", "parts", "training", "results", "limits", "privacy"]


def config(**changes):
    on_hub = {"backbone": "google/flan-t5-base", "backbone_revision": COMMIT}
    on_hub |= {"encoder": "BAAI/bge-base-en-v1.5", "encoder_revision": COMMIT[::-1]}
    prints = {
        "backbone_fingerprint": {"model_type": "t5", "vocab_size": 32128},
        "encoder_fingerprint": {"model_type": "bert", "digest": "0123456789abcdef"},
    }
    sizes = {"hidden_size": 768, "encoder_size": 384}
    return PPlugConfig(**{**on_hub, **prints, **sizes, "item_template": "{tag}: {description}", **changes})


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
    """(the card's text, what was left as it was edited)."""
    edited = write_card(folder, config_ or config(), trainable=trainable, **options)
    return (folder / "README.md").read_bytes().decode(), edited


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
    text, _ = write(
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
    text, _ = write(folder, repo_id="me/plug", results=with_results(folder))
    name, results = model_index_to_eval_results(metadata(text)["model-index"])
    assert name == "plug"
    assert {r.metric_type: r.metric_value for r in results} == {"accuracy": 0.4219, "f1": 0.3219}
    assert {(r.dataset_name, r.dataset_type, r.dataset_split, r.task_type) for r in results} == {
        ("LaMP-2", "lamp-2", "dev", "text-generation")
    }
    text, _ = write(folder, results=with_results(folder), datasets=["me/tags"])
    assert metadata(text)["model-index"][0]["results"][0]["dataset"]["type"] == "me/tags"


def test_the_table_has_intervals_and_controls_beside_the_plug(folder):
    text, _ = write(folder, results=with_results(folder))
    lines = [line for line in Card(text).parts["results"].splitlines() if line.startswith("|")]
    assert lines[0] == "| row | accuracy [95 %] | macro-F1 | unparsed | pplug is better by [95 %] |"
    assert lines[2] == "| **pplug** (3 seeds) | 0.422 ± 0.012 [0.372, 0.472] | 0.322 | 2 |  |"
    assert lines[3] == "| no-persona | 0.440 [0.390, 0.490] | 0.340 | 2 | -0.018 [-0.055, +0.019] |"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["pplug:wrong-user (3 seeds)", "bm25@4"]
    assert "LaMP-2, dev split: 1,400 questions of 140 users, 4 beams, prompts of at most 192 tokens" in text
    assert "lacks instruction-only, so it cannot tell" in text
    assert "the mean over 3 plugs that differ in their seed" in text


def test_results_of_evaluate_do_too(folder):
    rows = [row("no persona", 0.3, [0.6, 0.5, 0.7]), row("instruction only", 0.3, [0.6, None, None])]
    rows += [row("wrong user's history", 0.3, [0.6, 0.5, 0.7]), row("PPlug", 0.9)]
    for record in rows:
        del record["interval"]
    settings = {"plug": ["/home/alice/plug"], "split": "test", "num_beams": 1}
    content = {"task": "demo", "examples": 4, "users": 2, "reference": "PPlug", "rows": rows, "settings": settings}
    text, _ = write(folder, results=with_results(folder, content))
    assert "| **PPlug** | 0.900 | 0.800 | 2 |  |" in text and "+0.600 [?, ?]" in text
    assert "lacks" not in text and "greedy decoding" in text


@pytest.mark.parametrize(
    "broken, error, message",
    [
        (lambda c: c.pop("rows"), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(accuracy=SECRET), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(row=f"<b>{SECRET}</b>\n"), DataError, "not what pplug-hf bench writes"),
        (lambda c: c["rows"][0].update(gain=[float("nan")] * 3), DataError, "not what pplug-hf bench writes"),
        (lambda c: c.update(examples=[]), DataError, "not what pplug-hf bench writes"),
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


def test_settings_that_are_not_the_defaults(folder):
    assert "The settings were not recorded." in write(folder)[0]
    arguments = {"learning_rate": 0.002, "num_train_epochs": 3, "bf16": True, "warmup_steps": 0.05}
    arguments |= {
        "lr_scheduler_type": "cosine",
        "output_dir": "/home/alice/x",
        "hub_token": "hf_abc",
        "run_name": "al",
    }
    (folder / "training_args.json").write_text(json.dumps(arguments))
    (folder / "train_settings.json").write_text(json.dumps({"task": "LaMP-2", "use_history": False, "data": SECRET}))
    text, _ = write(folder)
    table = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert table == [
        ("learning_rate", "0.002", "0.001"),
        ("lr_scheduler_type", "cosine", "linear"),
        ("warmup_steps", "0.05", "0"),
        ("bf16", "yes", "no"),
        ("use_history", "no", "yes"),
    ]
    assert "Task: LaMP-2." in text
    (folder / "training_args.json").write_text("{}")
    (folder / "train_settings.json").write_text(json.dumps({"use_history": True}))
    assert "All settings are the defaults" in write(folder)[0]


def test_the_defaults_are_those_of_the_classes(tmp_path):
    from pplug_hf.commands.train import TrainSettings
    from pplug_hf.training import PPlugTrainingArguments

    arguments = PPlugTrainingArguments(output_dir=str(tmp_path)).to_dict()
    expected = FILES_OF_SETTINGS["training_args.json"]
    assert {name: arguments[name] for name in expected} == expected
    defaults = {f.name: f.default for f in fields(TrainSettings)}
    expected = FILES_OF_SETTINGS["train_settings.json"]
    assert {name: defaults[name] for name in expected} == expected


PRIVATE = [
    *("/home/alice/model", "./runs/model", "../model", "~/model", "C:\\Users\\alice\\model", "runs/alice"),
    *("//host/share", "alice's model", "file:///home/alice", "a/b/c"),
]


@pytest.mark.parametrize("place", PRIVATE)
def test_a_place_on_a_machine_is_told_to_nobody(folder, place):
    local = config(backbone=place, backbone_revision=None, encoder=place, encoder_revision=None)
    text, _ = write(folder, local, repo_id="me/plug")
    assert place not in text and "alice" not in text
    assert "base_model" not in metadata(text) and "base_model_relation" not in metadata(text)
    assert "a local t5 of width 768, vocabulary 32,128" in text
    assert "a local bert of width 384, fingerprint `0123456789abcdef`" in text
    assert 'backbone="path/to/backbone",' in text and 'encoder="path/to/encoder",' in text


def test_nothing_of_a_history_gets_in(folder):
    odd = {"item_template": "one wrote: " + SECRET + " {tag} {a}", "query_prompt": SECRET, "history_prompt": SECRET}
    for kind in ("backbone", "encoder"):
        odd[f"{kind}_fingerprint"] = {"model_type": f"{SECRET}`|", "digest": SECRET + "\n", "history_prompt": SECRET}
    names = {name: SECRET + "|" for file in FILES_OF_SETTINGS.values() for name in file}
    for file in FILES_OF_SETTINGS:
        (folder / file).write_text(json.dumps({**names, "task": SECRET + "!", SECRET: 1}))
    content = bench()
    content |= {"by_history_length": [{"rows": {SECRET: 1}}], SECRET: SECRET}
    content["rows"][0] |= {"style_gaps": {SECRET: 1.0}, SECRET: 1.0}
    text, _ = write(folder, config(**odd), results=with_results(folder, content))
    assert SECRET not in text and "`tag`, `a`" in text


@pytest.mark.parametrize("name", ["", "a/b/c", "/home/alice", "a b", "-a", "x" * 99])
def test_names_that_the_hub_does_not_take(folder, name):
    for options in ({"repo_id": name}, {"datasets": [name]}):
        with pytest.raises(ConfigurationError, match="is no Hub id"):
            write(folder, **options)


def test_sizes(folder):
    text, _ = write(folder, config(num_persona_tokens=4))
    assert "| trained parameters | 123,456 (input encoder included) |" in text
    assert "| reads items by | attention, temperature 1 |" in text
    assert "| size of the plug | 1.2 MB |" in text and "| projector | 384 → 768 → 4 x 768 |" in text
    assert "| soft prompt | 5 tokens of width 768: instruction and 4 of the persona |" in text
    text, _ = write(folder, config(learn_temperature=True, attention_temperature=0.1))
    assert "| reads items by | attention, temperature learned from 0.1 |" in text
    text, _ = write(folder, config(instruction=False, aggregator="mean"))
    assert "| soft prompt | 1 token of width 768: 1 of the persona |" in text and "| reads items by | mean |" in text
    assert "input encoder included" not in text


# ---- what a person edits ----------------------------------------------------------------------------------------


def test_twice_is_once(folder):
    options = {"repo_id": "me/plug", "results": with_results(folder), "license": "mit", "datasets": ["a/b"]}
    first, edited = write(folder, **options)
    assert edited == [] and list(Card(first).parts) == PARTS
    assert write(folder, **options) == (first, [])
    assert write(folder) == (first, []), "repository, results, licence and data are remembered"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_an_edited_part_stays_and_the_others_follow(folder):
    write(folder)
    edit(folder, "## Intended use and limits", "## Limits, as I see them")
    text, edited = write(folder, trainable=7)
    assert edited == ["limits"]
    assert "## Limits, as I see them" in text and "## Intended use" not in text and "| trained parameters | 7 " in text


def test_text_between_parts_stays_in_its_place(folder):
    write(folder)
    edit(folder, "<!-- /pplug-hf:title -->\n", "<!-- /pplug-hf:title -->\n\nFor my two cats.\n")
    text, edited = write(folder, trainable=7)
    assert edited == [] and "<!-- /pplug-hf:title -->\n\nFor my two cats.\n\n<!-- pplug-hf:use" in text
    assert write(folder, trainable=7) == (text, [])


def test_what_was_removed_is_not_put_back(folder):
    text, _ = write(folder)
    without = re.sub(r"<!-- pplug-hf:privacy .*?<!-- /pplug-hf:privacy -->", "", text, flags=re.DOTALL)
    without = without.replace("pipeline_tag: text-generation\n", "")
    (folder / "README.md").write_text(without)
    for _ in range(2):
        text, edited = write(folder)
        assert set(edited) == {"privacy", "pipeline_tag"}
        assert "## Privacy" not in text and "pipeline_tag" not in metadata(text)


def test_metadata_that_a_person_set_wins(folder):
    write(folder)
    edit(folder, "- persona\n", "- persona\n- cats\n")
    edit(folder, "pipeline_tag: text-generation", "pipeline_tag: summarization  # mine\nthumbnail: cat.png")
    other = config(backbone="google/flan-t5-small")
    text, edited = write(folder, other)
    assert set(edited) == {"tags", "pipeline_tag"}
    assert metadata(text)["tags"][-1] == "cats" and metadata(text)["base_model"] == "google/flan-t5-small"
    assert "pipeline_tag: summarization  # mine\nthumbnail: cat.png\n" in text
    text, _ = write(folder, config(backbone="/home/alice/t5"))
    assert "base_model" not in metadata(text) and metadata(text)["thumbnail"] == "cat.png"


def test_what_is_asked_for_now_wins_over_both(folder):
    write(folder, license="mit")
    edit(folder, "license: mit", "license: cc0-1.0")
    assert metadata(write(folder)[0])["license"] == "cc0-1.0"
    assert metadata(write(folder, license="apache-2.0", tags=["cats"])[0])["license"] == "apache-2.0"
    data = metadata(write(folder)[0])
    assert data["license"] == "apache-2.0" and data["tags"] == [*metadata(write(folder)[0])["tags"][:-1], "cats"]


def test_results_go_with_their_weights(folder):
    text, _ = write(folder, results=with_results(folder))
    assert write(folder)[0] == text
    retrained(folder)
    text, _ = write(folder)
    assert "None for these weights yet." in text and "model-index" not in metadata(text)


def test_results_that_a_person_wrote_stay_with_any_weights(folder):
    write(folder, results=with_results(folder))
    edit(folder, "A gain over the bare backbone", "Look at the wrong user! A gain over the bare backbone")
    edit(folder, "value: 0.4219", "value: 0.42")
    retrained(folder)
    text, edited = write(folder)
    assert edited == ["results"] and "Look at the wrong user!" in text and "value: 0.42\n" in text


def test_a_card_written_by_hand_gets_only_the_metadata_it_lacks(folder):
    body = "\n# Mine\r\n\nAll by hand.  \n\n---\n\nwith *everything* — 猫\n"
    before = "---\nlicense: mit # as agreed\ntags: [cats]\n\n# a comment\n---\n" + body
    (folder / "README.md").write_bytes(before.encode())
    text, edited = write(folder, repo_id="me/plug")
    assert edited == ["tags"] and text.endswith("---\n" + body)
    assert text.startswith("---\nlicense: mit # as agreed\ntags: [cats]\n\n# a comment\nlibrary_name: pplug-hf\n")
    assert metadata(text)["base_model"] == "google/flan-t5-base" and "model-index" not in text
    assert write(folder, repo_id="me/plug")[0] == text
    assert "model-index" in write(folder, results=with_results(folder))[0]


def test_a_card_without_metadata_gets_it(folder):
    (folder / "README.md").write_text("# Mine\n\nBy hand.\n")
    text, _ = write(folder)
    assert text.startswith("---\nlibrary_name: pplug-hf\n") and text.endswith("\n---\n\n# Mine\n\nBy hand.\n")
    assert write(folder) == (text, [])


@pytest.mark.parametrize("text", ["", "\n\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---"])
def test_a_file_without_text_is_no_card_yet(folder, text):
    (folder / "README.md").write_text(text)
    card, _ = write(folder)
    assert list(Card(card).parts) == PARTS and write(folder) == (card, [])
    assert metadata(card).get("license") == ("mit" if "mit" in text else None)


def test_line_ends_stay(folder):
    text, _ = write(folder)
    edit(folder, "\n", "\r\n")
    again, edited = write(folder)
    assert edited == [] and again == text.replace("\n", "\r\n")
    edit(folder, "## Privacy\r\n", "## Mine\r\n")
    again, edited = write(folder, trainable=7)
    assert edited == ["privacy"] and "\n" not in again.replace("\r\n", "") and "| trained parameters | 7 " in again


def test_a_byte_order_mark_and_spaces_at_line_ends_are_no_edits(folder):
    text, _ = write(folder)
    (folder / "README.md").write_text("\ufeff" + text.replace("## Use\n", "## Use  \n"), encoding="utf-8")
    assert write(folder) == (text, [])


@pytest.mark.parametrize(
    "text, message",
    [
        ("---\nlicense: [mit\n---\n# A\n", "is no YAML, line"),
        ("---\na: b: c\n---\n", "is no YAML, line 2"),
        ("---\njust words\n---\n# A\n", "is a str and must be keys"),
        ("---\n- a\n- b\n---\n# A\n", "is a list and must be keys"),
        ("---\na: &x [1]\nb: *x\n---\n", "has a YAML alias"),
        ("---\na: !!python/object:os.system x\n---\n", "is no YAML"),
        ("---\na: " + "[" * 100_000 + "\n---\n", "nested more than 20 levels"),
        ("---\na: 2020-99-99\n---\n", "is no YAML"),
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
        lambda t: t.replace("<!-- /pplug-hf:use -->", ""),
        lambda t: t.replace("<!-- pplug-hf:use", "<!-- pplug-hf:use <!-- "),
        lambda t: re.sub(r"<!-- pplug-hf:card .*-->", "", t),
        lambda t: re.sub(r"<!-- pplug-hf:card .*-->", "<!-- pplug-hf:card {not json} -->", t),
        lambda t: re.sub(r"<!-- pplug-hf:card .*-->", '<!-- pplug-hf:card {"parts": {}, "metadata": [1]} -->', t),
        lambda t: re.sub(r"<!-- pplug-hf:card .*-->", '<!-- pplug-hf:card {"repo": "../../etc", "weights": 3} -->', t),
        lambda t: t + t.split("---", 2)[2],
    ],
)
def test_damaged_markers_do_no_harm(folder, damage):
    text, _ = write(folder)
    (folder / "README.md").write_text(damage(text))
    text, _ = write(folder)
    assert "## Use" in text and ModelCard(text).data.library_name == "pplug-hf" and "etc" not in text
    assert write(folder)[0] == text


def test_a_killed_write_leaves_the_old_card(folder, monkeypatch):
    text, _ = write(folder)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(folder, trainable=7)
    assert (folder / "README.md").read_bytes().decode() == text
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.safetensors"]


# ---- two cards: the folder's, and the published one --------------------------------------------------------------


def test_the_published_card_is_brought_up_to_date(folder):
    published = write(folder, license="mit")[0].replace("## Privacy", "## Mine")
    (folder / "README.md").unlink()
    text, edited = write(folder, trainable=7, published=published.encode())
    assert edited == ["privacy"] and "## Mine" in text and "| trained parameters | 7 " in text
    assert metadata(text)["license"] == "mit"


def test_of_two_cards_the_edited_one_counts(folder, caplog):
    old, _ = write(folder)
    here, _ = write(folder, results=with_results(folder), license="mit")
    published = old.replace("## Privacy", "## Mine")
    text, edited = write(folder, published=published)
    assert edited == ["privacy"] and "## Mine" in text
    assert "**pplug**" in text and "model-index" in metadata(text), "results of the same weights come along"

    (folder / "README.md").write_text(here.replace("## Use", "## How"))
    text, edited = write(folder, published=old)
    assert edited == ["use"] and "## How" in text and not caplog.records
    text, _ = write(folder, published=published)
    assert "## How" in text and "## Mine" not in text and "edited in the folder and in the repo" in caplog.text

    (folder / "README.md").write_text(old)
    text, edited = write(folder, published=here)
    assert edited == [] and "**pplug**" in text and metadata(text)["license"] == "mit"


def test_an_edit_counts_after_the_next_push_too(folder):
    generated, _ = write(folder)
    published = generated.replace("## Privacy", "## Mine")
    for _ in range(2):
        (folder / "README.md").write_text(generated)
        published, edited = write(folder, published=published)
        assert edited == ["privacy"] and "## Mine" in published


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
def test_metadata_is_set_and_removed_and_nothing_else(old, changes, flow):
    block = yaml.safe_dump(old, sort_keys=False, allow_unicode=True, default_flow_style=flow or None)
    new = yaml.safe_load(edit_metadata(block, changes)) or {}
    expected = {key: value for key, value in {**old, **changes}.items() if changes.get(key, "") is not None}
    assert new == expected


def test_other_lines_of_the_metadata_stay():
    block = "# mine\nlicense:   mit # ok\n\ntags:\n  - a  # one\n  - b\n# of the tags\nx: |\n  a\n\n  b\ny: 1"
    assert edit_metadata(block, {"x": "2"}).startswith(block.split("x: |")[0] + "x: '2'\ny: 1")
    assert edit_metadata(block, {"tags": ["c"]}) == block.replace("  - a  # one\n  - b\n", "- c\n")
    assert edit_metadata(block, {"license": "mit"}) == block
    assert edit_metadata(block, {"license": None, "z": 3}) == block.replace("license:   mit # ok\n", "") + "\nz: 3"


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
    from pplug_hf import PPlugForConditionalGeneration

    model = PPlugForConditionalGeneration.from_backbone(
        str(places / family), str(places / "encoder"), item_template=template
    )
    tiny.randomise(model.plug)
    model.save_pretrained(tmp_path)
    local, _ = write(tmp_path, model.config, repo_id="me/plug")
    stand_ins = {"path/to/backbone": places / family, "path/to/encoder": places / "encoder", "me/plug": tmp_path}
    printed, names = run_snippet(local, stand_ins)
    assert printed.endswith("\n") and len(names["persona"]) == 2
    assert isinstance(names["history"][0], dict) == (template is not None)

    on_hub, _ = write(tmp_path, config(item_template=template), repo_id="me/plug")
    assert "path/to" not in on_hub
    assert run_snippet(on_hub, {"me/plug": tmp_path})[0] == printed


@pytest.mark.parametrize("on_hub", [True, False])
def test_the_snippet_names_the_subfolder(folder, on_hub):
    place = config() if on_hub else config(backbone=None, encoder=None)
    text, _ = write(folder, place, repo_id="me/plug", subfolder="tasks/two")
    (code,) = re.findall(r"from_pretrained\((.*?)\n?\)\n", Card(text).parts["use"], re.DOTALL)
    local = [] if on_hub else ['backbone="path/to/backbone"', 'encoder="path/to/encoder"']
    assert re.split(r",\s*", code.strip(" ,\n")) == ['"me/plug"', 'subfolder="tasks/two"', *local]
    assert write(folder, place)[0] == text
    text, _ = write(folder, place, repo_id="me/plug", subfolder='x", evil("')
    assert "evil" not in text and "subfolder=" not in text


def test_the_command(places, tmp_path, capsys):
    from pplug_hf import PPlugForConditionalGeneration

    model = PPlugForConditionalGeneration.from_backbone(str(places / "t5"), str(places / "encoder"))
    plug = tmp_path / "plug"
    model.save_pretrained(plug)
    capsys.readouterr()
    assert main(["card", "--plug", str(plug), "--repo", "me/plug", "--datasets", "a/b", "c/d"]) == 0
    printed = capsys.readouterr().out
    assert f"Card written: {plug / 'README.md'}" in printed and "It names no licence" in printed
    data = ModelCard.load(plug / "README.md").data
    assert data.datasets == ["a/b", "c/d"]
    trained = sum(p.numel() for p in model.plug.parameters() if p.requires_grad)
    assert f"| trained parameters | {trained:,} " in (plug / "README.md").read_text(encoding="utf-8")

    edit(plug, "## Privacy", "## Mine")
    arguments = ["--results", str(with_results(tmp_path)), "--license", "mit", "--language", "en"]
    assert main(["card", "--plug", str(plug), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Left as you edited them: privacy." in printed and "licence" not in printed and "Look again" not in printed
    for digest, warned in ((plug_digest(str(plug), PPlugConfig.from_pretrained(plug)), False), ("0" * 16, True)):
        runs = {"pplug": [{"key": {"plug": digest}}], "no-persona": [{"key": {}}]}
        assert main(["card", "--plug", str(plug), "--results", str(with_results(tmp_path, bench(runs=runs)))]) == 0
        assert ("Look again" in capsys.readouterr().out) == warned
    assert ModelCard.load(plug / "README.md").data.eval_results[0].metric_value == 0.4219
    assert PPlugModel.from_pretrained(plug).config.model_type == "pplug", "a card beside it changes nothing"

    for arguments in (["--plug", str(tmp_path / "none")], ["--plug", str(plug), "--results", str(tmp_path / "none")]):
        assert main(["card", *arguments]) == 1
        assert "pplug-hf card: There " in capsys.readouterr().err


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
    card = Card(text)
    assert list(card.parts) == PARTS and str(ModelCard(text)) == text
    for result in model_index_to_eval_results(data["model-index"])[1] if "model-index" in data else ():
        # Four digits there and three in the table, both rounded from what was measured.
        shown = [float(number) for number in re.findall(r"\d\.\d{3}\b", card.parts["results"])]
        assert 0 < result.metric_value < 5 and min(abs(result.metric_value - x) for x in shown) < 0.00056
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("n", range(1, 8))
def test_committed_examples_are_what_the_script_makes(script, n):
    committed = (ROOT / "model_cards" / f"pplug-lamp-{n}.md").read_text(encoding="utf-8")
    assert committed == script.lamp_card(f"lamp-{n}"), "run scripts/make_model_cards.py"


def test_the_demos_card_is_of_the_demos_plug(script, tmp_path):
    from pplug_hf import PPlugForConditionalGeneration
    from pplug_hf.commands.demo import PLUG
    from pplug_hf.tasks.task import TASKS

    assets = files("pplug_hf.demo") / "assets"
    parts = {kind: str(assets / kind) for kind in ("backbone", "encoder")}
    template = TASKS["demo"].item_template
    model = PPlugForConditionalGeneration.from_backbone(**parts, item_template=template, **PLUG)
    model.save_pretrained(tmp_path / "plug")
    committed = (ROOT / "model_cards" / "pplug-demo.md").read_text(encoding="utf-8")
    made = Card(script.demo_card(tmp_path))  # untrained, so without settings and results
    same = [part for part in PARTS if part not in ("training", "results")]
    assert {part: Card(committed).parts[part] for part in same} == {part: made.parts[part] for part in same}
    assert script.DEMO_NOTE in committed and "| **PPlug** |" in committed and "`num_train_epochs`" not in committed
    printed, names = run_snippet(
        committed,
        {"me/pplug-demo": tmp_path / "plug"} | {f"path/to/{kind}": place for kind, place in parts.items()},
    )
    assert printed.strip() and len(names["persona"]) == 2
