"""A bench folder of a released version: its files stay valid, and its answers are those of today."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from bench_data import SHELVES, golden_settings, predictions, quietly

from pplug_hf.evaluation import predictions as keys_module
from pplug_hf.methods import resources as resources_module
from pplug_hf.modeling import backbone as backbones

RELEASES = [path.parent for path in sorted((Path(__file__).parent / "golden").glob("*/bench"))]


def rows_of(release):
    """In the table's order."""
    return [record["row"] for record in json.loads((release / "bench" / "results.json").read_text())["rows"]]


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request, monkeypatch):
    """As if torch, transformers and the serialised backbone were what they were then: only our own part may differ."""
    (key, *_) = [made["key"] for made in predictions(request.param / "bench").values()]
    monkeypatch.setattr(keys_module, "versions", lambda _: key["versions"])
    monkeypatch.setattr(keys_module, "__version__", key["versions"]["pplug-hf"])
    monkeypatch.setattr(resources_module, "backbone_digest", lambda *_: key["backbone"])
    return request.param


def test_a_bench_of_a_release_is_continued_and_not_answered_anew(release, tmp_path):
    there, output = predictions(release / "bench"), tmp_path / "bench"
    shutil.copytree(release / "bench" / "predictions", output / "predictions")
    _, printed = quietly(golden_settings(release, tmp_path, rows_of(release)), task=SHELVES)
    assert f"{len(there)} of {len(there)} runs are there already" in printed
    assert "Again" not in printed and predictions(output) == there


def test_its_answers_and_keys_are_made_again_to_the_letter(release, tmp_path):
    there = predictions(release / "bench")
    quietly(golden_settings(release, tmp_path, rows_of(release)), task=SHELVES)
    made = predictions(tmp_path / "bench")
    assert made.keys() == there.keys()
    for name, content in made.items():
        assert content["golds"] == there[name]["golds"], name
        assert {part: content[part] for part in ("row", "run", "key")} == {
            part: there[name][part] for part in ("row", "run", "key")
        }, name


def test_its_results_are_written_again_to_the_letter(release, tmp_path):
    there = json.loads((release / "bench" / "results.json").read_text())
    shutil.copytree(release / "bench" / "predictions", tmp_path / "bench" / "predictions")
    quietly(golden_settings(release, tmp_path, rows_of(release)), task=SHELVES)
    made = json.loads((tmp_path / "bench" / "results.json").read_text())
    for part in (
        "task",
        "examples",
        "users",
        "reference",
        "rows",
        "by_history_length",
        "style_of_golds",
        "weights",
        "runs",
    ):
        assert made[part] == there[part], part
    assert made.keys() == there.keys() | {"per_user"}, "which came later"


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_key_of_a_backbone_does_not_depend_on_what_was_tokenised_before(family):
    backbone, tokenizer = tiny.backbone(family), tiny.tokenizer(family)
    fresh = backbones.backbone_digest(backbone, tokenizer)
    tokenizer(["the sea", "a"], padding=True, truncation=True, max_length=3, return_tensors="pt")
    assert tokenizer.backend_tokenizer.padding and tokenizer.backend_tokenizer.truncation, "which it keeps"
    kept = tokenizer.backend_tokenizer.to_str()
    assert backbones.backbone_digest(backbone, tokenizer) == fresh
    assert tokenizer.backend_tokenizer.to_str() == kept, "the caller's tokenizer is not changed"
    tokenizer.add_tokens(["castle"])
    assert backbones.backbone_digest(backbone, tokenizer) != fresh


def test_keys_made_with_a_tokenizer_that_was_never_called_stay_the_same():
    for family in ("t5", "llama"):
        tokenizer = tiny.tokenizer(family)
        assert backbones._tokenizer_state(tokenizer) == tokenizer.backend_tokenizer.to_str()
