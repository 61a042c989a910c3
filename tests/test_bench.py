"""The bench: what every row shows the backbone, resuming, tables from predictions, and what it refuses."""

import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch

from pplug_hf import PPlugForConditionalGeneration, PPlugProcessor
from pplug_hf.cli import main
from pplug_hf.commands import bench as command
from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.configuration.tasks import TASKS, PromptFormat, Task
from pplug_hf.data.histories import newest
from pplug_hf.data.lamp import Example, read_lamp
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError
from pplug_hf.evaluation.answers import wrong_users
from pplug_hf.evaluation.bench import Bench, Decoding
from pplug_hf.evaluation.bootstrap import bootstrap_mean, paired_bootstrap
from pplug_hf.evaluation.metrics import per_example, score
from pplug_hf.evaluation.rows import parse_row
from pplug_hf.evaluation.style import Style, own_texts, user_means
from pplug_hf.evaluation.weights import weight_profile

USERS, SECRET = 5, "fortyseven"
SHELVES = Task(
    name="shelves",
    query_marker="book:",
    query_field="text",
    answer_field="tag",
    item_template="{tag} {text}",
    item_template_unlabelled="{text}",
    labels=("sea", "moon", "war"),
    metric="accuracy",
    max_new_tokens=3,
    prompt=PromptFormat(item="{text} in {tag}", cut="text", frame="{head}{items} and {input}"),
)
INPUTS = {
    "LaMP-2": "which tag is for it description: ",
    "LaMP-3": "what is it for review: ",
    "LaMP-4": "write a title for the article: ",
    "LaMP-6": "write a title for the letter: ",
    "LaMP-7": "write it like the user: ",
    "shelves": "what is best for the book: ",
}


def words(rng, n):
    return " ".join(rng.choice(tiny.WORDS) for _ in range(n))


def make_rows(task, seed, users=USERS):
    """Two questions of every user; user 0 has no history, the others up to 2 * users items."""
    rng = random.Random(seed)
    answer = (lambda: rng.choice(task.labels)) if task.labels else (lambda: words(rng, 4))
    questions, golds = [], []
    for user in range(users):
        history = []
        for number in range(2 * user):
            item = {name: words(rng, 6) for name in task.fields} | {"id": f"{user}-{number}", "date": f"20{number:02}"}
            if task.answer_field:
                item[task.answer_field] = answer()
            history.append(item)
        for question in range(2):
            id_ = f"{seed}{user}{question}"
            text = INPUTS[task.name] + words(rng, 5)
            questions.append({"id": id_, "user_id": f"u{user}", "input": text, "profile": history})
            golds.append({"id": id_, "output": answer()})
    return questions, golds


def write_data(folder, task, splits=("train", "dev"), **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(splits, 1):
        questions, golds = make_rows(task, number, **options)
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))
        outputs = {"task": task.name.replace("-", "_"), "golds": golds}
        (folder / f"{split}_outputs.json").write_text(json.dumps(outputs))
    return folder


def save_plug(places, folder, seed=0, family="t5", **choices):
    model = PPlugForConditionalGeneration.from_backbone(str(places / family), str(places / "encoder"), **choices)
    tiny.randomise(model.plug, seed)
    model.save_pretrained(folder)
    return str(folder)


def quietly(settings, **options):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        made = bench(settings, **options)
    return made, out.getvalue()


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    """Plugs of every kind on one t5, and a folder of data for each task."""
    root = tmp_path_factory.mktemp("bench")
    choices = {"item_template": "{tag} {text}", "attention_temperature": 0.2}
    for seed in range(2):
        save_plug(places, root / f"plug{seed}", seed, **choices)
    save_plug(places, root / "frozen", 2, train_input_encoder=False, **choices)
    save_plug(places, root / "mean", 3, aggregator="mean", **choices)
    save_plug(places, root / "gpt2", 4, family="gpt2", **choices)
    save_plug(places, root / "any", 5, item_template="{text}")
    write_data(root / "shelves", SHELVES)
    return root


def plugs_of(world):
    return [
        f"pplug={world / 'plug0'},{world / 'plug1'}",
        f"mean={world / 'mean'}",
        f"instruction-only={world / 'plug1'}",
    ]


def settings_for(world, output, *rows, **more):
    given = {"data": str(world / "shelves"), "plugs": plugs_of(world), "vectors": str(world / "vectors")}
    return BenchSettings(**{**given, "rows": list(rows) or None, "output": str(output), **more})


def predictions(folder):
    return {path.name: json.loads(path.read_text()) for path in (Path(folder) / "predictions").iterdir()}


# ---- what a row shows the backbone --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plug0", "frozen", "mean", "gpt2"])
def asked(request, world):
    """A bench on one plug, the plug, the examples."""
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    place = str(world / request.param)
    made = Bench(SHELVES, examples, {"pplug": [place]}, vectors=str(world / "vectors"), seed=3)
    return made, made.load(place), examples


def shown(asked, name):
    made, model, _ = asked
    row = parse_row(name, ["pplug", "instruction-only"])
    return made.inputs(row, model if row.plug else None)


def vectors_of(model, history):
    texts = [f"{item['tag']} {item['text']}" for item in history]
    return torch.stack([torch.tensor(model.history_encoder.encode(text)) for text in texts]) if texts else None


def expect_personas(asked, inputs, histories):
    _, model, _ = asked
    assert len(inputs.personas) == len(histories)
    for persona, history in zip(inputs.personas, histories, strict=True):
        assert len(persona) == len(history)
        if history:
            reference.close(persona.embeddings, vectors_of(model, history))


def test_without_a_persona_there_is_the_input_alone(asked):
    for name in ("no-persona", "pplug:no-history", "instruction-only"):
        assert shown(asked, name)[:4] == ([e.prompt for e in asked[2]], None, None, None)


def test_a_plug_sees_the_whole_history_and_the_request(asked):
    _, model, examples = asked
    inputs = shown(asked, "pplug")
    expect_personas(asked, inputs, [e.history for e in examples])
    texts = [e.prompt.split("book: ")[1] for e in examples]
    if model.config.aggregator == "mean":
        assert inputs.queries is None
    elif model.plug.input_encoder is None:
        expected = torch.stack([torch.tensor(model.history_encoder.encode(text)) for text in texts])
        reference.close(inputs.queries, expected)
    else:
        assert inputs.queries == texts


def test_another_users_history(asked):
    made, _, examples = asked
    others = wrong_users(examples, made.seed)
    expect_personas(asked, shown(asked, "pplug:wrong-user"), [examples[other].history for other in others])
    assert all(examples[other].user != e.user for other, e in zip(others, examples, strict=True))


def test_the_items_that_speak_loudest(asked):
    _, model, examples = asked
    histories = []
    for e in examples:
        if len(e.history) <= 3:
            histories.append(e.history)
            continue
        texts = [f"{item['tag']} {item['text']}" for item in e.history]
        query, items = reference.read(model, texts, e.query)
        if model.config.aggregator == "mean":
            query = torch.tensor(model.history_encoder.encode(e.query)).double()
            scores = [torch.dot(query, item).item() for item in items]
        else:
            scores = reference.weights(model.plug, query, items)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:3]
        histories.append([e.history[i] for i in sorted(best)])
    expect_personas(asked, shown(asked, "pplug:top-3"), histories)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_newest_items(asked, most):
    histories = [sorted(e.history, key=lambda item: item["date"])[-most:] for e in asked[2]]
    expect_personas(asked, shown(asked, f"pplug:last-{most}"), histories)


def by_okapi(example, k):
    """The benchmark's retrieval; of equals the newer first."""
    documents = [item["text"].split() for item in example.history]
    if not documents:
        return []
    scores = reference.okapi(documents, example.query.split())
    return [example.history[i] for i in sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:k]]


@pytest.mark.parametrize("k", [1, 2, 50])
def test_retrieved_items_stand_in_front_of_the_input(asked, k):
    _, _, examples = asked
    expected = []
    for e in examples:
        items = [f"{item['text']} in {item['tag']}" for item in by_okapi(e, k)]
        expected.append(", and ".join(items) + " and " + e.prompt if items else e.prompt)
    made = asked[0]
    made.decoding = Decoding(max_length=2000)
    try:
        for name in (f"bm25@{k}", f"pplug+bm25@{k}", f"pplug+bm25@{k}:paper-order"):
            inputs = shown(asked, name)
            assert inputs.prompts == expected
            found = sum(min(k, len(e.history)) for e in examples)
            assert inputs.counts == {"retrieved_items": found, "shown_items": found, "prompts_without_items": 2}
            if name.startswith("pplug"):
                expect_personas(asked, inputs, [e.history for e in examples])
                assert (inputs.positions is not None) == name.endswith("paper-order")
    finally:
        made.decoding = Decoding()
    if not asked[1].config.is_encoder_decoder:
        return
    own = [len(e.prompt.split()) for e in examples]
    total = [len(prompt.split()) for prompt in expected]
    assert inputs.positions.tolist() == [t - o for t, o in zip(total, own, strict=True)]


def test_dense_retrieval_uses_the_plugs_vectors(asked, world):
    _, model, examples = asked
    found = asked[0].retrieved("dense", 2)
    for e, items in zip(examples, found, strict=True):
        if e.history:
            scores = vectors_of(model, e.history) @ torch.tensor(model.history_encoder.encode(e.query))
            best = scores.argsort(descending=True)[:2].tolist()
            assert [item["id"] for item in items] == [e.history[i]["id"] for i in best]
    shown(asked, "pplug")
    stores = [store for store in asked[0]._stores.values() if store.prompt == ""]
    assert len(stores) == 1  # personas and retrieval share it
    assert len(asked[0]._encoders) <= 2 and len({id(e) for e in asked[0]._encoders.values()}) == 1


def test_random_items_are_the_seeds(asked, world):
    made, _, examples = asked
    other = Bench(SHELVES, examples, made.plugs, seed=4, vectors=made.vectors)
    assert made.retrieved("random", 4) != other.retrieved("random", 4)
    assert [items[:1] for items in made.retrieved("random", 4)] == made.retrieved("random", 1)


def test_answers_are_those_of_generate(asked):
    made, model, _ = asked
    processor = PPlugProcessor.from_model(model)
    for name in ("no-persona", "pplug:wrong-user", "pplug+bm25@1:paper-order"):
        row = parse_row(name, ["pplug"])
        (done,) = made.run([(row, 0)])
        inputs = shown(asked, name)
        generate = model.generate if row.plug else model.backbone.generate
        for i, text in enumerate(done.answers):
            batch = dict(processor(text=[inputs.prompts[i]], max_length=256))
            if row.plug:
                batch |= {"persona": [inputs.personas[i]]}
                batch |= {"query": inputs.queries[i : i + 1]} if inputs.queries is not None else {}
                batch |= {"persona_position": inputs.positions[i : i + 1]} if inputs.positions is not None else {}
            generated = generate(**batch, max_new_tokens=SHELVES.max_new_tokens, do_sample=False)
            assert processor.decode_answers(generated, batch["input_ids"].shape[1]) == [text]


def test_a_history_cut_to_its_newest_items():
    items = [{"text": t, "tag": "sea", "date": d} for t, d in (("b", "2002"), ("a", "2001"), ("c", "2003"))]
    example = Example("1", "u", "p", "q", "sea", items)
    assert [i["text"] for i in newest([example], 2)[0].history] == ["b", "c"]
    assert newest([example], 3)[0] is example and len(example.history) == 3


# ---- one folder -----------------------------------------------------------------------------------------------------

ROWS = ("no-persona", "frequencies", "bm25@4", "dense@1", "instruction-only", "mean", "pplug:wrong-user", "pplug")
FILES = {
    "no-persona.json",
    "frequencies.json",
    "bm25@4.json",
    "dense@1.json",
    "instruction-only,0.json",
    "mean,0.json",
    *(f"pplug{row},{run}.json" for row in ("", ",wrong-user") for run in (0, 1)),
}


@pytest.fixture(scope="module")
def finished(world):
    output = world / "finished"
    made, printed = quietly(settings_for(world, output, *ROWS, num_beams=2), task=SHELVES)
    return output, made, printed


def test_everything_is_in_one_folder(finished, world):
    output, _, printed = finished
    assert {path.name for path in output.iterdir()} == {
        "predictions",
        "results.json",
        "table.md",
        "rows.png",
        "history-length.png",
        "weights.png",
    }
    saved = predictions(output)
    assert set(saved) == FILES
    ids = [row["id"] for row in json.loads((world / "shelves" / "dev_questions.json").read_text())]
    assert all([gold["id"] for gold in content["golds"]] == ids for content in saved.values())
    assert {content["task"] for content in saved.values()} == {"shelves"}
    assert (output / "table.md").read_text() in printed
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.glob("*.png"))


def test_results_say_what_they_come_from(finished, world):
    output, made, _ = finished
    results = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)
    assert [record["row"] for record in results["rows"]] == list(ROWS) == list(made.predictions)
    assert results["reference"] == "pplug" and (results["examples"], results["users"]) == (2 * USERS, USERS)
    assert results["settings"]["num_beams"] == 2 and results["settings"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__ and "git_commit" in results
    assert [len(results["runs"][row]) for row in ROWS] == [1, 1, 1, 1, 1, 1, 2, 2]
    first, second = (run["key"] for run in results["runs"]["pplug"])
    assert first["plug"] != second["plug"] and first["backbone"] == second["backbone"]
    assert results["runs"]["bm25@4"][0]["about"]["prompts"]["prompts_without_items"] == 2
    assert sum(b["examples"] for b in results["by_history_length"]) == 2 * USERS
    assert results["style_of_golds"] is None and "style" not in results["rows"][0]


def test_the_numbers_are_those_of_the_predictions(finished, world):
    """Independent of the table: from the files and the golds alone."""
    output, _, _ = finished
    questions = json.loads((world / "shelves" / "dev_questions.json").read_text())
    golds = {g["id"]: g["output"] for g in json.loads((world / "shelves" / "dev_outputs.json").read_text())["golds"]}
    users = [q["user_id"] for q in questions]
    right, saved = {}, predictions(output)
    for row in ROWS:
        runs = [c for c in saved.values() if c["row"] == row]
        hits = [[float(g["output"].strip() == golds[g["id"]]) for g in run["golds"]] for run in runs]
        right[row] = np.mean(hits, axis=0)
        (record,) = [r for r in json.loads((output / "results.json").read_text())["rows"] if r["row"] == row]
        assert record["accuracy"] == pytest.approx(np.mean(hits)) and record["seeds"] == len(runs)
        if len(runs) > 1:
            assert record["accuracy_sd"] == pytest.approx(statistics.stdev(map(statistics.mean, hits)))
        assert record["interval"] == pytest.approx(bootstrap_mean(right[row], users)[1:])
    for record in json.loads((output / "results.json").read_text())["rows"]:
        if record["row"] == "pplug":
            assert "gain" not in record and "users" not in record
            continue
        assert record["gain"] == pytest.approx(list(paired_bootstrap(right["pplug"], right[record["row"]], users)))
        own = [
            sum((right["pplug"] - right[record["row"]])[[u == user for u in users]]) for user in dict.fromkeys(users)
        ]
        assert record["users"] == {
            "win": sum(v > 1e-9 for v in own),
            "tie": sum(abs(v) <= 1e-9 for v in own),
            "loss": sum(v < -1e-9 for v in own),
        }


def test_which_items_spoke(finished, world):
    """The profile of the plug's own row, from the model's weights; no other row has one."""
    output, made, _ = finished
    results = json.loads((output / "results.json").read_text())
    assert list(results["weights"]) == ["pplug"]
    asked = Bench(SHELVES, made.examples, {"a": [str(world / "plug0")]}, vectors=str(world / "vectors"))
    model = asked.load(str(world / "plug0"))
    weights = []
    for e in made.examples:
        if not e.history:
            weights.append(torch.zeros(0))
            continue
        query, items = reference.read(model, [f"{item['tag']} {item['text']}" for item in e.history], e.query)
        weights.append(torch.tensor(reference.weights(model.plug, query, items)))
    saved = predictions(output)["pplug,0.json"]["about"]["weights"]
    expected = weight_profile(weights, made.examples)
    for name in ("by_age", "by_rank"):
        for got, want in zip(saved[name], expected[name], strict=True):
            assert got["weight"] == pytest.approx(want["weight"], rel=1e-4)
    assert saved["effective_share"] == pytest.approx(expected["effective_share"], rel=1e-4)


def test_runs_say_what_plug_they_are_of(finished):
    output, _, _ = finished
    saved = predictions(output)
    assert saved["mean,0.json"]["about"]["plug"]["aggregator"] == "mean"
    assert saved["pplug,1.json"]["about"]["plug"]["attention_temperature"] == 0.2
    assert "plug" not in saved["bm25@4.json"]["about"]


def test_one_history_is_drawn_when_asked(world, tmp_path, monkeypatch):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", show_history="241")
    drawn = []
    monkeypatch.setattr(
        command, "plot_weights", lambda weights, texts, path, title: drawn.append((weights, texts, path))
    )
    made, printed = quietly(asked, task=SHELVES)
    ((weights, texts, path),) = drawn
    (example,) = [e for e in made.examples if e.id == "241"]
    assert texts == [f"{item['tag']} {item['text']}" for item in example.history]
    assert len(weights) == len(texts) and weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert path == tmp_path / "history-241.png" and "Private, with the user's texts" in printed
    for change, message in (
        ({"show_history": "no such"}, "There is no question with the id 'no such'"),
        ({"plugs": None, "backbone": "x"}, "show_history needs a plug"),
        ({"tables_only": True}, "show_history needs a plug"),
    ):
        with pytest.raises((ConfigurationError, DataError), match=message):
            quietly(replace(asked, **change), task=SHELVES)


def test_nothing_is_done_twice(finished, world, monkeypatch):
    output, _, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    table = (output / "table.md").read_text()
    monkeypatch.setattr(Bench, "answer", None)
    _, printed = quietly(settings_for(world, output, *ROWS, num_beams=2, batch_size=3), task=SHELVES)
    assert "10 of 10 runs are there already." in printed and (output / "table.md").read_text() == table
    assert {path.name: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()} == before


def test_the_tables_come_back_from_the_predictions_alone(finished, world, tmp_path, monkeypatch):
    output, _, _ = finished
    copy = tmp_path / "copy" / "predictions"
    copy.mkdir(parents=True)
    for path in (output / "predictions").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(Bench, "__init__", None)  # no model is loaded
    asked = settings_for(world, copy.parent, plugs=None, tables_only=True, num_beams=2)
    quietly(asked, task=SHELVES)
    assert (copy.parent / "table.md").read_text() == (output / "table.md").read_text()
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (output, copy.parent))
    assert {k: v for k, v in old.items() if k != "settings"} == {k: v for k, v in new.items() if k != "settings"}
    quietly(replace(asked, rows=["mean", "no-persona"], reference="no-persona"), task=SHELVES)
    results = json.loads((copy.parent / "results.json").read_text())
    assert [r["row"] for r in results["rows"]] == ["mean", "no-persona"] and results["reference"] == "no-persona"


def count_answers(monkeypatch, stop_after=None):
    """The rows that are answered from now on; with `stop_after`, an error behind so many."""
    done, real = [], Bench.answer

    def counted(self, row, model=None, title=""):
        if stop_after is not None and len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(str(row))
        return real(self, row, model, title)

    monkeypatch.setattr(Bench, "answer", counted)
    return done


def test_a_run_that_broke_goes_on(finished, world, tmp_path, monkeypatch):
    output, _, _ = finished
    asked = settings_for(world, tmp_path, *ROWS, num_beams=2)
    with monkeypatch.context() as patch:
        first = count_answers(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            quietly(asked, task=SHELVES)
    assert len(first) == len(predictions(tmp_path)) == 4 and not (tmp_path / "table.md").exists()
    second = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert "4 of 10 runs are there already." in printed and len(second) == 6
    assert (tmp_path / "table.md").read_text() == (output / "table.md").read_text()


@pytest.mark.parametrize(
    "change, again, says",
    [
        ({"num_beams": 1}, ["no-persona", "pplug", "pplug", "random@2"], "decoding.num_beams"),
        ({"seed": 5}, ["random@2"], "seed"),
        ({"max_items": 2}, ["no-persona", "pplug", "pplug", "random@2"], "data"),
        ({"rows": ["pplug", "bm25@1"]}, ["bm25@1"], None),
    ],
)
def test_what_changed_is_done_again(world, tmp_path, monkeypatch, change, again, says):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", "random@2", num_beams=2)
    quietly(asked, task=SHELVES)
    done = count_answers(monkeypatch)
    _, printed = quietly(replace(asked, **change), task=SHELVES)
    assert sorted(done) == sorted(again)
    assert (f"was made with another {says}." in printed) if says else ("not in the table" in printed)


def test_another_plug_in_the_same_folder_is_another_plug(world, places, tmp_path, monkeypatch):
    plug = save_plug(places, tmp_path / "plug", 7, item_template="{tag} {text}")
    asked = settings_for(world, tmp_path / "out", "no-persona", "a", plugs=[f"a={plug}"])
    quietly(asked, task=SHELVES)
    save_plug(places, plug, 8, item_template="{tag} {text}")
    done = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert done == ["a"] and "Again: a,0.json was made with another plug." in printed


def test_a_damaged_file_is_done_again(world, tmp_path, monkeypatch):
    asked = settings_for(world, tmp_path, "no-persona", "bm25@1")
    quietly(asked, task=SHELVES)
    (tmp_path / "predictions" / "bm25@1.json").write_text('{"task": "shel')
    done = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert done == ["bm25@1"] and "Passed over bm25@1.json" in printed


# ---- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LaMP-2", "LaMP-3", "LaMP-6", "LaMP-7"])
def test_every_kind_of_task(world, places, tmp_path, name):
    task = TASKS[name]
    data = write_data(tmp_path / "data", task)
    plug = save_plug(places, tmp_path / "plug", item_template=task.item_template)
    asked = settings_for(world, tmp_path / "out", data=str(data), plugs=[f"pplug={plug}"])
    made, _ = quietly(asked)
    names = ["no-persona", *(["frequencies"] if task.labels else [])]
    names += [f"{ranker}@{k}" for ranker in ("recency", "bm25", "dense") for k in (1, 4)]
    names += ["pplug:wrong-user", "pplug:no-history", "pplug:top-4", "pplug+bm25@1", "pplug"]
    assert list(made.predictions) == names
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    golds = [str(e.target) for e in made.examples]
    for record in results["rows"]:
        (answers,) = made.predictions[record["row"]]
        numbers = score(task, answers, golds)
        assert {k: record[k] for k in numbers} == pytest.approx(numbers)
        if task.metric == "rouge":
            users = [e.user for e in made.examples]
            styles = Style.fit(own_texts(made.examples, task)).score(answers, users)
            assert record["style"] == pytest.approx(list(bootstrap_mean(*user_means(styles, users))))
    for b in results["by_history_length"]:
        inside = [b["from"] <= len(e.history) <= b["to"] for e in made.examples]
        own = per_example(task, made.predictions["pplug"][0], golds)[inside]
        assert b["rows"]["pplug"] == pytest.approx(own.mean()) and b["examples"] == sum(inside)
    table = (tmp_path / "out" / "table.md").read_text()
    assert ("| style [95 %]" in table) == (task.metric == "rouge") == ("Style: the share" in table)
    assert "for users: better, equal, worse" in table


def test_constrained_answers_are_labels(world, tmp_path):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", "bm25@1", constrained=True)
    made, _ = quietly(asked, task=SHELVES)
    given = {text for runs in made.predictions.values() for run in runs for text in run}
    assert given <= set(SHELVES.labels) and all(record["unparsed"] == 0 for record in made.rows())


def test_a_task_of_ones_own_from_json_lines(world, tmp_path):
    questions, golds = make_rows(SHELVES, 9)
    lines = [{**q, "output": g["output"]} for q, g in zip(questions, golds, strict=True)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made, _ = quietly(settings_for(world, tmp_path / "out", data=str(tmp_path / "data")), task=SHELVES)
    assert "frequencies" not in made.predictions  # there is no train split to fit them on
    assert made.reference == "pplug" and len(made.examples) == len(lines)


def test_a_single_user_has_no_interval(world, tmp_path):
    data = write_data(tmp_path / "data", SHELVES, users=1)
    made, printed = quietly(settings_for(world, tmp_path / "out", data=str(data)), task=SHELVES)
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["rows"][0]["gain"][1:] == [None, None] and results["rows"][0]["interval"] == [None, None]
    assert "[?, ?]" in printed and "pplug:wrong-user" not in made.predictions


def test_no_text_of_a_history_is_written(world, tmp_path):
    data = write_data(tmp_path / "data", SHELVES)
    for path in data.glob("*_questions.json"):
        questions = json.loads(path.read_text())
        for question in questions:
            for item in question["profile"]:
                item["text"] = SECRET
        path.write_text(json.dumps(questions))
    asked = settings_for(world, tmp_path / "out", "bm25@1", "pplug+bm25@1", data=str(data))
    _, printed = quietly(asked, task=SHELVES)
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md"))
    assert SECRET not in written + printed


def test_inputs_longer_than_the_budget_are_counted(world, tmp_path):
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", max_length=6)
    _, printed = quietly(asked, task=SHELVES)
    assert "10 of 10 inputs have more than max_length=6 tokens and lose their end." in printed
    about = predictions(tmp_path)["bm25@4.json"]["about"]
    assert about["prompts"]["shown_items"] == 0 and about["prompts"]["retrieved_items"] > 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, error, message",
    [
        ({"rows": ["pplg"]}, ConfigurationError, "There is no row 'pplg'"),
        ({"rows": ["mean"], "reference": "pplug"}, ConfigurationError, "'pplug' is no row of this bench; it has mean"),
        ({"plugs": ["mean"]}, ConfigurationError, "write NAME=FOLDER"),
        ({"plugs": ["a=nowhere"]}, MissingFileError, "Cannot load config.json of the plug 'nowhere'"),
        ({"plugs": None, "rows": ["no-persona"]}, ConfigurationError, "No backbone: pass backbone"),
        ({"max_items": 0}, ConfigurationError, "max_items is 0"),
        ({"split": "test"}, MissingFileError, "it has the splits dev, train"),
        ({"rows": ["frequencies"], "leave_out_users": 1.0}, ConfigurationError, "fitted on the train split"),
        ({"rows": ["no-persona"], "tables_only": True}, MissingFileError, "no predictions of a bench in"),
        ({"rows": []}, ConfigurationError, "rows is empty"),
    ],
)
def test_settings_that_cannot_work(world, tmp_path, more, error, message):
    output = tmp_path / "out"
    with pytest.raises(error, match=message):
        quietly(replace(settings_for(world, output), **more), task=SHELVES)
    assert not output.exists()


def test_data_that_cannot_work(world, places, tmp_path):
    plain = write_data(tmp_path / "plain", TASKS["LaMP-4"], users=1)
    asked = settings_for(world, tmp_path / "out", data=str(plain), plugs=[f"pplug={world / 'any'}"])
    for more, error, message in (
        ({"rows": ["pplug:wrong-user"]}, DataError, "needs at least 2 users"),
        ({"constrained": True}, ConfigurationError, "constrained needs a task with a list of labels"),
        ({"rows": ["frequencies"]}, ConfigurationError, "LaMP-4 has none: leave it out"),
        ({"rows": ["dense@1"], "plugs": None, "backbone": str(places / "t5")}, ConfigurationError, "pass retriever"),
    ):
        with pytest.raises(error, match=message):
            quietly(replace(asked, **more))
    (plain / "dev_questions.json").write_text("[]")
    (plain / "dev_outputs.json").write_text('{"task": "LaMP_4", "golds": []}')
    with pytest.raises(DataError, match="holds no questions"):
        quietly(asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file: name a folder"):
        quietly(replace(asked, output=str(tmp_path / "file")))
    assert not (tmp_path / "out").exists()


def test_predictions_that_do_not_belong_together(world, finished, tmp_path):
    output, _, _ = finished
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", plugs=None, tables_only=True)
    folder = tmp_path / "predictions"
    folder.mkdir()
    for name in ("no-persona.json", "bm25@4.json"):
        (folder / name).write_bytes((output / "predictions" / name).read_bytes())
    content = json.loads((folder / "bm25@4.json").read_text())
    content["key"]["decoding"]["num_beams"] = 1
    (folder / "bm25@4.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=r"were made with different .*decoding.num_beams"):
        quietly(asked, task=SHELVES)
    with pytest.raises(MissingFileError, match=r"no predictions of the row 'mean'.*there are no-persona, bm25@4"):
        quietly(replace(asked, rows=["mean"]), task=SHELVES)
    with pytest.raises(MismatchError, match="10 of its ids are unknown, 10 are missing"):
        quietly(replace(asked, split="train"), task=SHELVES)
    with pytest.raises(MismatchError, match="other data under the same ids"):
        quietly(replace(asked, max_items=1), task=SHELVES)
    assert not (tmp_path / "table.md").exists()


def test_dense_retrieval_with_an_encoder_of_its_own(world, places, tmp_path):
    asked = settings_for(
        world,
        tmp_path,
        "no-persona",
        "dense@2",
        plugs=None,
        backbone=str(places / "gpt2"),
        retriever=str(places / "encoder"),
    )
    made, _ = quietly(asked, task=SHELVES)
    assert made.reference == "no-persona"
    (template, prompts) = (
        predictions(tmp_path)["dense@2.json"]["key"]["retriever"][k] for k in ("template", "prompts")
    )
    assert template is None and prompts == ["", ""]


def test_on_the_command_line(world, tmp_path, capsys):
    data = write_data(tmp_path / "data", TASKS["LaMP-4"])
    arguments = ["bench", "--data", data, "--output", tmp_path / "out", "--plugs", f"a={world / 'any'}"]
    arguments = [str(a) for a in [*arguments, "--vectors", tmp_path / "vectors"]]
    assert main([*arguments, "--rows", "no-persona", "a:last-2", "a"]) == 0
    assert "| a:last-2 " in capsys.readouterr().out
    assert main([*arguments, "--rows", "b"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("pplug-hf bench: There is no row 'b'")


def test_without_matplotlib_there_are_no_pictures(world, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, printed = quietly(settings_for(world, tmp_path, "no-persona"), task=SHELVES)
    assert "Pictures need matplotlib" in printed and (tmp_path / "table.md").is_file()


def test_the_commit_is_that_of_the_checkout():
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = done.stdout.strip() if done.returncode == 0 and (root / ".git").exists() else None
    assert (command.git_commit() or "").rstrip("+") == (expected or "")
