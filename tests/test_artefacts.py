"""Trained artefacts: whole or not at all, continued after a kill, refused where they do not belong; and their names."""

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from bench_data import SHELVES, make_world, predictions, quietly, settings_for
from safetensors.torch import load_file, save_file

from pplug_hf.commands.fit import split
from pplug_hf.commands.options import FitSettings
from pplug_hf.data.histories import split_users, three_way_split
from pplug_hf.data.lamp import read_lamp
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError
from pplug_hf.methods import artefacts
from pplug_hf.methods.artefacts import Draft, class_of, read_artefact, register_kind
from pplug_hf.methods.base import Retrieval, Trained
from pplug_hf.methods.decoding import Answers
from pplug_hf.methods.names import canonical, default_rows, method_of, methods_of, name_of, parse_trained, read_name
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Resources
from pplug_hf.methods.retrievers import RecencyRanker
from pplug_hf.tasks.task import TASKS

RUN = {"method": "x", "options": {"epochs": 3, "loss": "paper"}, "data": "1f"}
TASK = {"task": {"name": "shelves", "digest": SHELVES.digest}}


@dataclass(frozen=True)
class Parrot(Trained):
    """An answer that was learned; its change says it twice."""

    changes: ClassVar = ("twice", "wrong-user")
    takes_retrieval: ClassVar = True

    def answer(self, examples, resources):
        text = resources.artefact(self.folder).file("answer.txt").read_text()
        return Answers([text * (1 + (self.change == "twice"))] * len(examples))


class Backwards(RecencyRanker):
    """Oldest first."""

    @staticmethod
    def load(artefact, resources):
        return Backwards(resources.task)

    def rank(self, example):
        return super().rank(example)[::-1]


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(artefacts, "KINDS", dict(artefacts.KINDS))
    register_kind("parrot", Parrot)
    register_kind("backwards", Backwards)


def make(folder, kind="parrot", answer="moon", settings=TASK, run=RUN):
    draft = Draft.open(folder, kind, run)
    (draft.folder / "answer.txt").write_text(answer)
    (draft.folder / "users").mkdir()
    save_file({"a": torch.arange(3.0)}, draft.folder / "users" / "w.safetensors")
    return draft.finish(settings, {"curve": [0.5]})


# ---- folders ----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_read_and_a_copy_is_the_same(tmp_path):
    made = make(tmp_path / "a")
    content = json.loads((tmp_path / "a" / "method.json").read_text())
    assert (content["format"], content["kind"], content["run"]) == (1, "parrot", RUN)
    assert sorted(content["files"]) == ["answer.txt", "users/w.safetensors"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = read_artefact(tmp_path / "b", "parrot")
    assert copy.digest == made.digest and copy.about == {"curve": [0.5]}
    assert load_file(copy.file("users/w.safetensors"))["a"].tolist() == [0, 1, 2]
    assert copy.folder_of("users") == tmp_path / "b" / "users"
    assert make(tmp_path / "c", answer="sea").digest != made.digest
    assert make(tmp_path / "d", settings={}).digest != made.digest


def test_a_training_is_continued_and_a_finished_one_is_not_made_again(tmp_path):
    draft = Draft.open(tmp_path / "a", "parrot", RUN)
    (draft.folder / "part").write_text("1")
    with pytest.raises(DataError, match="not complete: run the same `pplug-hf fit` again"):
        read_artefact(tmp_path / "a")
    again = Draft.open(tmp_path / "a", "parrot", RUN)
    assert again.finished is None and (again.folder / "part").read_text() == "1"
    made = again.finish({})
    assert Draft.open(tmp_path / "a", "parrot", RUN).finished == made
    other = RUN | {"options": {"epochs": 4, "loss": "paper"}}
    with pytest.raises(ConfigurationError, match=r"another training; these differ: options.epochs. .*resume=False"):
        Draft.open(tmp_path / "a", "parrot", other)
    with pytest.raises(ConfigurationError, match="these differ: kind"):
        Draft.open(tmp_path / "a", "backwards", RUN)
    anew = Draft.open(tmp_path / "a", "parrot", other, resume=False)
    assert [path.name for path in anew.folder.iterdir()] == ["unfinished.json"]
    assert Draft.open(tmp_path / "a", "parrot", RUN).run == RUN, "where nothing was made yet, anything can begin"
    anew = Draft.open(tmp_path / "a", "parrot", other)
    (anew.folder / "part").touch()
    with pytest.raises(ConfigurationError, match=r"these differ: options\.epochs"):
        Draft.open(tmp_path / "a", "parrot", RUN)
    assert Draft.open(tmp_path / "a", "parrot", RUN, resume=False).run == RUN


def test_nothing_else_is_overwritten(tmp_path, places):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    (tmp_path / "file").touch()
    plug = tmp_path / "plug"
    tiny.from_backbone(str(places / "t5"), str(places / "encoder")).save_pretrained(plug)
    make(tmp_path / "mixed")
    (tmp_path / "mixed" / "notes").touch()
    for folder, resume, message in (
        ("full", True, "is not empty and holds no artefact"),
        ("full", False, "is not empty and holds no artefact"),
        ("file", True, "is a file; an artefact is saved as a folder"),
        ("plug", True, "is in the plug 'plug'"),
        ("plug/inner/most", True, "is in the plug 'plug'"),
        ("mixed", False, r"holds other files besides the artefact \('notes'\)"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Draft.open(tmp_path / folder, "parrot", RUN, resume)
    assert read_artefact(tmp_path / "mixed").kind == "parrot"


def test_what_is_not_an_artefact_says_what_it_is(tmp_path, places):
    tiny.from_backbone(str(places / "t5"), str(places / "encoder")).save_pretrained(tmp_path / "plug")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "a")
    for folder, error, message in (
        ("none", MissingFileError, "no folder .*none"),
        ("empty", ConfigurationError, "no method.json, .*: name the output of `pplug-hf fit`"),
        ("plug", ConfigurationError, "no method.json, .*: it is a plug, which --plugs takes"),
    ):
        with pytest.raises(error, match=message):
            read_artefact(tmp_path / folder)
    with pytest.raises(MismatchError, match="of kind 'parrot', not 'ranker'"):
        read_artefact(tmp_path / "a", "ranker")
    for text, error, message in (
        ("{", DataError, "method.json of .* is damaged"),
        ('{"format": 2}', DataError, "has the format 2, and this version reads 1"),
        ('{"format": 1, "kind": "parrot"}', DataError, "a part is missing"),
    ):
        (tmp_path / "a" / "method.json").write_text(text)
        with pytest.raises(error, match=message):
            read_artefact(tmp_path / "a")


def test_a_file_that_is_missing_or_damaged_is_noticed_when_it_is_used(tmp_path):
    made = make(tmp_path / "a")
    (tmp_path / "a" / "users" / "w.safetensors").write_bytes(b"half")
    (tmp_path / "a" / "answer.txt").unlink()
    for call in (made.file, lambda name: made.folder_of(name.split("/")[0])):
        with pytest.raises(DataError, match=r"'users/w.safetensors' of the artefact .* is damaged: copy"):
            call("users/w.safetensors")
    with pytest.raises(DataError, match=r"'answer.txt' .* is missing"):
        made.file("answer.txt")
    with pytest.raises(DataError, match="has no file 'unknown'"):
        made.file("unknown")
    with pytest.raises(DataError, match="has no file 'other/'"):
        made.folder_of("other")


def test_a_kind_is_a_class_or_its_place(monkeypatch):
    register_kind("lazy", "collections:Counter")
    assert class_of("lazy") is class_of("lazy") and class_of("lazy").__name__ == "Counter"
    with pytest.raises(ConfigurationError, match=r"There is no kind .*'nonsense'; choose one of .*parrot"):
        class_of("nonsense")
    with pytest.raises(ConfigurationError, match="a kind of artefact 'parrot' already"):
        register_kind("parrot", Parrot)


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    for seed in range(2):
        make(tmp_path / f"p{seed}", answer=SHELVES.labels[seed])
        make(tmp_path / f"r{seed}", "backwards", answer=str(seed))
    return parse_trained([f"poll={tmp_path / 'p0'},{tmp_path / 'p1'}", f"back={tmp_path / 'r0'},{tmp_path / 'r1'}"])


PLUGS = {"pplug": ["runs/a", "runs/b"], "one": ["runs/c"], "three": ["x", "y", "z"]}


def test_what_the_names_of_trained_methods_mean(trained):
    p, r = trained["poll"], trained["back"]
    meanings = {
        "back@4": [Retrieval("back", 4, folder=folder) for folder in r],
        "back@1:wrong-user": [Retrieval("back", 1, wrong_user=True, folder=folder) for folder in r],
        "back@1:turns": [Retrieval("back", 1, turns=True, folder=folder) for folder in r],
        "bm25@4:wrong-user": [Retrieval("bm25", 4, wrong_user=True)],
        "rrf@4": [Retrieval("rrf", 4)],
        "poll": [Parrot("poll", folder) for folder in p],
        "poll:twice": [Parrot("poll", folder, "twice") for folder in p],
        "poll:twice+bm25@1": [Parrot("poll", folder, "twice", Retrieval("bm25", 1)) for folder in p],
        "poll+back@2": [Parrot("poll", p[i], "", Retrieval("back", 2, folder=r[i])) for i in range(2)],
        "pplug+back@2:paper-order": [
            Plug("pplug", PLUGS["pplug"][i], retrieval=Retrieval("back", 2, folder=r[i]), paper_order=True)
            for i in range(2)
        ],
        "one+back@2": [Plug("one", "runs/c", retrieval=Retrieval("back", 2, folder=folder)) for folder in r],
        "one+bm25@1:wrong-user": [Plug("one", "runs/c", retrieval=Retrieval("bm25", 1, wrong_user=True))],
    }
    assert methods_of(meanings, PLUGS, trained) == meanings
    for name, (first, *_) in meanings.items():
        assert name_of(first) == name and method_of(name, PLUGS, trained) == first


@pytest.mark.parametrize(
    "text, message",
    [
        ("poll:other", "'other': a parrot takes twice, wrong-user here"),
        ("back", "'back': this is a ranker; write back@4"),
        ("pplug+poll@1", "'poll': rankers are random, .*, rrf, back"),
        ("poll+back@2:paper-order", "'paper-order': turns may stand here"),
        ("three+back@1", "has 3 seeds of three and 2 of back"),
        ("nothing", "no plug has this name.*of what else is trained: poll"),
    ],
)
def test_trained_names_that_mean_nothing(trained, text, message):
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        methods_of([text], PLUGS, trained)


def test_a_method_without_retrieval_refuses_it(trained, monkeypatch):
    monkeypatch.setattr(Parrot, "takes_retrieval", False)
    with pytest.raises(ConfigurationError, match="'bm25@1': poll takes no retrieved items"):
        method_of("poll+bm25@1", PLUGS, trained)


def test_a_name_exists_once_and_seeds_are_of_one_kind(tmp_path):
    make(tmp_path / "p")
    make(tmp_path / "r", "backwards")
    for texts, error, message in (
        ([f"pplug={tmp_path / 'p'}"], ConfigurationError, "--trained got the name 'pplug', which --plugs has"),
        ([f"bm25={tmp_path / 'p'}"], ConfigurationError, "--trained got the name 'bm25'"),
        (["poll"], ConfigurationError, "--trained got 'poll': write NAME=FOLDER"),
        ([f"x={tmp_path / 'p'},{tmp_path / 'r'}"], MismatchError, "of kind 'backwards', not 'parrot'"),
        ([f"x={tmp_path / 'none'}"], MissingFileError, "no folder"),
    ):
        with pytest.raises(error, match=message):
            parse_trained(texts, PLUGS)


def test_names_in_files_are_read_without_knowing_what_was_trained():
    assert read_name("ropg-kd@4") == Retrieval("ropg-kd", 4)
    assert read_name("a:top-2+ropg-kd@1") == Plug("a", history="top", items=2, retrieval=Retrieval("ropg-kd", 1))
    assert read_name("ftp:unheard-of") is None
    rows = ["pplug", "zeta@4", "bm25@4", "alpha@4", "no-persona", "bm25@1"]
    assert canonical(rows) == ["no-persona", "bm25@1", "bm25@4", "alpha@4", "zeta@4", "pplug"]


def test_the_usual_rows_have_what_was_trained(trained):
    def rows(users):
        return default_rows(TASKS["LaMP-4"], (), users=users, frequencies=False, dense=False, trained=trained)

    assert rows(2)[5:] == ["poll:twice", "poll:wrong-user", "poll", "back@1", "back@4"]
    assert rows(1)[5:] == ["poll:twice", "poll", "back@1", "back@4"]


# ---- in a bench -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("world"))


def test_a_bench_answers_with_artefacts_and_asks_again_if_they_change(world, trained, tmp_path):
    given = [f"{name}={','.join(folders)}" for name, folders in trained.items()]
    rows = ["no-persona", "poll", "poll:twice", "back@1", "bm25@1", "bm25@1:wrong-user", "rrf@1", "pplug+back@1"]

    def run():
        settings = settings_for(world, tmp_path / "out", *rows, trained=given, fuse=["bm25", "back"])
        return quietly(settings, task=SHELVES)[1]

    assert "| poll:twice" in run()
    made = predictions(tmp_path / "out")
    assert {"back@1,1.json", "poll,0.json", "bm25@1,wrong-user.json", "rrf@1.json", "pplug+back@1,1.json"} <= set(made)
    assert {gold["output"] for gold in made["poll,1.json"]["golds"]} == {"moon"}
    retriever = made["back@1,0.json"]["key"]["retriever"]
    assert made["rrf@1.json"]["key"]["fused"] == {"bm25": {}, "back": {"retriever": retriever}}
    assert made["rrf@1.json"]["key"]["c"] == 60
    assert made["bm25@1,wrong-user.json"]["key"]["seed"] == 0
    assert "12 of 12 runs are there already" in run()
    shutil.rmtree(trained["poll"][0])
    make(trained["poll"][0], answer="war")
    printed = run()
    assert "10 of 12 runs are there already" in printed and "another artefact" in printed


def test_another_task_is_refused(world, tmp_path):
    make(tmp_path / "p", settings={"task": {"name": "LaMP-2", "digest": "0"}})
    make(tmp_path / "r", "backwards", settings={"task": {"name": "LaMP-2", "digest": "0"}})
    for row in ("a", "b@1"):
        given = [f"a={tmp_path / 'p'}", f"b={tmp_path / 'r'}"]
        with pytest.raises(MismatchError, match="trained on the task 'LaMP-2' and cannot answer 'shelves'"):
            quietly(settings_for(world, tmp_path / "out", row, trained=given), task=SHELVES)


def test_wrong_users_items_are_another_users(world):
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    resources = Resources(SHELVES, backbone="unused")
    own = Retrieval("bm25", 2).items(examples, resources)
    found = Retrieval("bm25", 2, wrong_user=True).items(examples, resources)
    owner = {item["id"]: e.user for e in examples for item in e.history}
    for e, mine, items in zip(examples, own, found, strict=True):
        assert items and all(owner[item["id"]] != e.user for item in items)
        assert all(owner[item["id"]] == e.user for item in mine)


@pytest.mark.parametrize(
    "fuse, message",
    [
        (["bm25", "nothing"], "fuse names 'nothing'; choose among random, recency, bm25, bm25s, dense"),
        (["rrf"], "fuse names 'rrf'"),
        (["dense"], "The ranker dense needs a sentence encoder"),
    ],
)
def test_rankers_that_cannot_be_fused(world, fuse, message):
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    with pytest.raises(ConfigurationError, match=message):
        Retrieval("rrf", 1).check(examples, Resources(SHELVES, backbone="unused", fuse=fuse))


# ---- who trains what --------------------------------------------------------------------------------------------


def test_users_are_divided_once_for_all_methods(world):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)
    parts = three_way_split(examples, 0.4, 0.2, seed=3)
    users = [{e.user for e in part} for part in parts]
    assert [len(part) for part in users] == [2, 2, 1] and len(set.union(*users)) == 5
    assert three_way_split(examples[::-1], 0.4, 0.2, seed=3).held == parts.held[::-1]
    assert parts.held == split_users(examples, 0.2, 4, nearest=True)[1]  # whom `pplug-hf train` validates on
    assert parts.fit == split_users(examples, 0.6, 4, nearest=True)[0]  # on whom it trains with both shares
    for shares in ((-0.1, 0.2), (0.5, 0.5)):
        with pytest.raises(ConfigurationError, match="give shares of the users with a sum below 1"):
            three_way_split(examples, *shares)


def test_the_split_of_a_training(world):
    _, examples = read_lamp(world / "shelves", "train", SHELVES)

    def parts(**options):
        given = {"method": "m", "data": "d", "output": "o", "backbone": "b"}
        return split(FitSettings(**given, **options), examples)

    whole = parts(select_users=0.2, held_users=0.2)
    assert [len(part) for part in whole] == [6, 2, 2]
    few = parts(select_users=0.2, held_users=0.2, max_questions=3)
    assert len(few.fit) == 3 and few.held == whole.held and all(e in whole.fit for e in few.fit)
    assert all(len(e.history) <= 1 for part in parts(max_items=1) for e in part)
    with pytest.raises(DataError, match="0 questions to train on"):
        parts(leave_out_users=1.0)
