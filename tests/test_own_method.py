"""A method of one's own: one class in one file, registered, run by name, resumed and compared."""

import json
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint

import pytest
from bench_data import SHELVES, make_world, predictions, quietly, settings_for, write_data

from pplug_hf.cli import main
from pplug_hf.data.lamp import read_lamp
from pplug_hf.errors import ConfigurationError, MismatchError
from pplug_hf.evaluation.runner import Runner
from pplug_hf.methods import names
from pplug_hf.methods.artefacts import Draft
from pplug_hf.methods.base import Method, Plain, Retrieval, whole_cost
from pplug_hf.methods.decoding import Answers, ModelInputs
from pplug_hf.methods.names import method_of, methods_of, name_of, register_method
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Resources
from pplug_hf.tasks.task import TASKS


class Shout(Method):
    """The input in capitals."""

    prompts: list[str] = []  # noqa: RUF012 - for this test

    def inputs(self, examples, resources):
        self.prompts[:] = [e.prompt.upper() for e in examples]
        return ModelInputs(list(self.prompts))

    def key(self, resources):
        return {"volume": 11}


class Majority(Method):
    """The most frequent answer of the train split, for everybody."""

    @property
    def needs(self):
        return frozenset({"training"})

    def fit(self, train, resources):
        golds = [e.target for e in train]
        self.answer_to_all = max(sorted(set(golds)), key=golds.count)

    def answer(self, examples, resources):
        return Answers([self.answer_to_all] * len(examples))


def test_a_method_that_cannot_answer_is_refused_before_anything_is_loaded(world):
    class Silent(Method):
        """Neither inputs nor answer."""

    resources = Resources(SHELVES, backbone="no such folder")
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    with pytest.raises(ConfigurationError, match="row silent cannot answer: its class Silent has to define inputs or"):
        Runner(resources, examples).check({"silent": [Silent()]})


@dataclass
class Longest(Method):
    """The longer of two methods' answers."""

    one: Method
    other: Method

    def check(self, examples, resources):
        self.one.check(examples, resources)
        self.other.check(examples, resources)

    def answer(self, examples, resources):
        pairs = zip(self.one.answer(examples, resources)[0], self.other.answer(examples, resources)[0], strict=True)
        return Answers([max(pair, key=len) for pair in pairs])


@pytest.fixture(autouse=True)
def own_names(monkeypatch):
    monkeypatch.setattr(names, "METHODS", dict(names.METHODS))


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("own"))


def test_it_runs_by_name_on_the_command_line_and_is_not_answered_twice(world, tmp_path, capsys):
    register_method("shout", Shout)
    data, output = write_data(tmp_path / "data", TASKS["LaMP-4"]), tmp_path / "out"
    arguments = ["bench", "--data", data, "--output", output, "--plugs", f"pplug={world / 'any'}", "--vectors"]
    arguments = [str(a) for a in [*arguments, tmp_path / "vectors", "--rows", "shout", "pplug"]]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| shout " in printed and "| pplug " in printed
    questions = json.loads((data / "dev_questions.json").read_text())
    assert Shout.prompts == [question["input"].upper() for question in questions]
    saved = predictions(output)
    assert set(saved) == {"shout.json", "pplug,0.json"} and saved["shout.json"]["key"]["volume"] == 11
    results = json.loads((output / "results.json").read_text())
    assert [record["row"] for record in results["rows"]] == ["shout", "pplug"] and results["reference"] == "pplug"

    Shout.prompts.clear()
    assert main(arguments) == 0
    assert "2 of 2 runs are there already." in capsys.readouterr().out and Shout.prompts == []
    assert main([*arguments[: arguments.index("--rows")], "--tables_only", "True"]) == 0
    assert "| shout " in capsys.readouterr().out


def test_it_may_learn_from_the_train_split(world, tmp_path):
    register_method("majority", Majority)
    made, _ = quietly(settings_for(world, tmp_path / "out", "majority", "no-persona"), task=SHELVES)
    (answers,) = made.predictions["majority"]
    train = json.loads((world / "shelves" / "train_outputs.json").read_text())["golds"]
    golds = [gold["output"] for gold in train]
    assert set(answers) == {max(sorted(set(golds)), key=golds.count)}
    assert predictions(tmp_path / "out")["majority.json"]["key"]["training"]
    with pytest.raises(ConfigurationError, match="The row majority is fitted on the train split"):
        quietly(settings_for(world, tmp_path / "new", "majority", leave_out_users=1.0), task=SHELVES)


def test_it_may_be_made_of_other_methods(world, tmp_path):
    register_method("longest", lambda: Longest(Plug("pplug", str(world / "plug0")), Retrieval("bm25", 1)))
    made, _ = quietly(settings_for(world, tmp_path, "longest", "pplug", "bm25@1"), task=SHELVES)
    (chosen,), (one, _), (other,) = (made.predictions[row] for row in ("longest", "pplug", "bm25@1"))
    assert chosen == [max(pair, key=len) for pair in zip(one, other, strict=True)]


@dataclass
class Costly(Method):
    """A part that was trained, with parts of its own."""

    folder: str = ""
    cost: dict = field(default_factory=dict)
    inside: tuple = ()

    def about(self, resources):
        return {"cost": self.cost}

    def parts(self, resources):
        return self.inside


def test_its_cost_has_that_of_all_its_parts_each_once(world, tmp_path):
    ranker = Costly("ranker", {"trained_weights": 7, "language_model_passes": 100})
    plug = Costly("plug", {"trained_weights": 30, "bytes_per_user": 5}, (ranker,))
    alone, plain = Costly("plug", {"trained_weights": 30}), Costly("", {"seconds_per_user": 2})
    selector = Costly("own", {"trained_weights": 1000, "generations_per_question": 4}, (plug, ranker, alone, plain))
    assert whole_cost(selector, None, {"seconds_per_user": 1}) == {
        "trained_weights": 1037,
        "language_model_passes": 100,
        "bytes_per_user": 5,
        "seconds_per_user": 3,
        "generations_per_question": 4,
    }
    twice = Costly("", {}, (Costly("", {"generations_per_question": 2}),))
    assert whole_cost(twice, None, {}) == {"generations_per_question": 2}

    artefact = Draft.open(tmp_path / "r", "ranker", {}).finish({}, about={"cost": {"trained_weights": 7}})
    folder = str(artefact.folder)
    resources = Resources(SHELVES, {"pplug": [str(world / "plug0")]}, trained={"r": [folder]}, fuse=["bm25", "r"])
    weights = whole_cost(Plug("pplug", str(world / "plug0")), resources, {})["trained_weights"]
    for ranker in (Retrieval("r", 1, folder=folder), Retrieval("rrf", 1)):
        assert whole_cost(ranker, resources, {}) == {"trained_weights": 7}
        method = Plug("pplug", str(world / "plug0"), retrieval=ranker)
        assert whole_cost(method, resources, {})["trained_weights"] == weights + 7


def test_it_gives_one_answer_to_each_question(world, tmp_path):
    class Lazy(Method):
        def answer(self, examples, resources):
            return Answers(["sea"])

    register_method("lazy", Lazy)
    with pytest.raises(MismatchError, match="lazy gave 1 answers to 10 questions"):
        quietly(settings_for(world, tmp_path, "lazy"), task=SHELVES)


def test_a_package_registers_by_an_entry_point(monkeypatch):
    monkeypatch.setitem(names.METHODS, "shout", EntryPoint("shout", f"{__name__}:Shout", "pplug_hf.methods"))
    assert isinstance(method_of("shout"), Shout) and name_of(Shout()) == "shout"
    assert list(methods_of(["shout", "no-persona", "shout"])) == ["shout", "no-persona"]


@pytest.mark.parametrize("name", ["no-persona", "bm25", "a b", "a:b", ""])
def test_names_that_cannot_be_registered(name):
    with pytest.raises(ConfigurationError, match=r"register_method got the name .*none of no-persona, frequencies"):
        register_method(name, Shout)


def test_the_name_of_a_registered_method_is_in_messages_and_not_free_for_plugs():
    register_method("shout", Shout)
    with pytest.raises(ConfigurationError, match="Rows are no-persona, frequencies, shout, and RANKER@K"):
        method_of("whisper")
    with pytest.raises(ConfigurationError, match="--plugs got the name 'shout'"):
        names.parse_plugs(["shout=x"])


def test_a_method_without_inputs_and_answer_says_so():
    with pytest.raises(NotImplementedError, match="Method has to define inputs or answer"):
        Method().answer([], Resources(SHELVES))
    assert Plain() == Plain() and name_of(Method()) == "Method"
