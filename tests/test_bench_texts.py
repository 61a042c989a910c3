"""E-mail subjects and tweets, whose corpora are not here, through the whole bench: on made-up files in the benchmark's
layout, scored again by `score`, tables made again from predictions, killed and gone on with."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from rouge_score.rouge_scorer import RougeScorer

from pplug_hf.cli import main
from pplug_hf.tasks.task import TASKS

ROWS = ["no-persona", "bm25@1", "pplug:wrong-user", "pplug"]
INPUTS = {
    "LaMP-6": "Generate a subject for the following email: {}",
    "LaMP-7": "Paraphrase the following tweet without any explanation before or after it: {}",
}
ROOT = Path(__file__).parent.parent


def words(rng, n):
    return " ".join(rng.choices(tiny.WORDS, k=n))


def write_official(folder, name, users=6, questions=2, seed=0):
    """{dev}_questions.json and {dev}_outputs.json as the benchmark writes them."""
    rng = random.Random(seed)
    rows, golds = [], []
    for user in range(users):
        profile = []
        for i in range(1 + 2 * user):
            item = {"id": f"{user}{i:02}", "text": words(rng, 8), "date": f"2010-01-{i + 1:02}"}
            profile.append(item | ({"title": words(rng, 3)} if name == "LaMP-6" else {}))
        for question in range(questions):
            id_ = f"{user}{question}"
            rows.append({"id": id_, "input": INPUTS[name].format(words(rng, 8)), "profile": profile, "user_id": user})
            golds.append({"id": id_, "output": words(rng, 4)})
    folder.mkdir(parents=True)
    (folder / "dev_questions.json").write_text(json.dumps(rows))
    (folder / "dev_outputs.json").write_text(json.dumps({"task": name.replace("-", "_"), "golds": golds}))
    return {gold["id"]: gold["output"] for gold in golds}


def run(arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


def bench_arguments(place, data, output, *more):
    common = ["bench", "--data", data, "--plugs", f"pplug={place / 'plug'}", "--vectors", place / "vectors"]
    return [*common, "--output", output, *more]


@pytest.fixture(scope="module", params=["LaMP-6", "LaMP-7"])
def finished(request, places, tmp_path_factory):
    """(name of the task, folder, golds) of a bench that is done."""
    place = tmp_path_factory.mktemp(request.param)
    golds = write_official(place / "data", request.param)
    model = tiny.from_backbone(
        str(places / "t5"), str(places / "encoder"), item_template=TASKS[request.param].item_template
    )
    tiny.randomise(model.plug, 0)
    model.save_pretrained(place / "plug")
    run(bench_arguments(place, place / "data", place / "out", "--rows", *ROWS))
    return request.param, place, golds


def records(folder):
    return {r["row"]: r for r in json.loads((folder / "results.json").read_text())["rows"]}


def files(folder):
    return {
        content["row"]: path
        for path in (folder / "predictions").glob("*.json")
        for content in [json.loads(path.read_text())]
    }


def test_the_files_are_official_and_scored_as_rouge_score_does(finished):
    name, place, golds = finished
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    assert set(files(place / "out")) == set(ROWS)
    for row, path in files(place / "out").items():
        content = json.loads(path.read_text())
        assert content["task"] == name.replace("-", "_")
        assert {g["id"] for g in content["golds"]} == set(golds) and all(
            set(g) == {"id", "output"} for g in content["golds"]
        )
        scores = [scorer.score(golds[g["id"]], g["output"]) for g in content["golds"]]
        record = records(place / "out")[row]
        for ours, theirs in (("rouge-1", "rouge1"), ("rouge-L", "rougeL")):
            assert record[ours] == pytest.approx(sum(s[theirs].fmeasure for s in scores) / len(scores))


def test_score_gives_the_numbers_of_the_table(finished):
    name, place, _ = finished
    table = (place / "out" / "table.md").read_text()
    for row, path in files(place / "out").items():
        golds = place / "data" / "dev_outputs.json"
        numbers = json.loads(run(["score", "--task", name, "--golds", golds, "--predictions", path]))
        record = records(place / "out")[row]
        assert {k: numbers[k] for k in ("rouge-1", "rouge-L", "unparsed")} == {
            k: record[k] for k in ("rouge-1", "rouge-L", "unparsed")
        }
        # The other tables have differences, costs and history lengths.
        first = table[table.index("| row") :].split("\n\n")[0]
        (line,) = [line for line in first.splitlines() if line.startswith(f"| {row} ")]
        assert [cell.strip() for cell in line.split("|")[2:4]] == [f"{numbers[k]:.3f}" for k in ("rouge-1", "rouge-L")]


def test_tables_come_back_from_the_predictions(finished, tmp_path):
    _, place, _ = finished
    (tmp_path / "predictions").mkdir()
    for path in files(place / "out").values():
        (tmp_path / "predictions" / path.name).write_bytes(path.read_bytes())
    run(["bench", "--data", place / "data", "--output", tmp_path, "--tables_only"])
    assert (tmp_path / "table.md").read_text() == (place / "out" / "table.md").read_text()
    assert records(tmp_path) == records(place / "out")


def test_killed_in_the_middle_and_gone_on_with(finished):
    """SIGKILL behind the first finished rows. Those are not touched again, and the end is that of an unbroken run."""
    name, place, _ = finished
    if name == "LaMP-6":
        pytest.skip("once is enough: the process takes a while to start")
    data, output = place / "many", place / "killed"
    write_official(data, name, users=10, seed=1)
    rows = [*ROWS[:1], "random@1", "random@4", "recency@1", "recency@4", "bm25@4", *ROWS[1:]]
    slow = ["--batch_size", 1, "--max_new_tokens", 16, "--rows", *rows]
    arguments = [str(a) for a in bench_arguments(place, data, output, *slow)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "pplug_hf", *arguments], env=environment, cwd=ROOT, **quiet)
    folder, deadline = output / "predictions", time.monotonic() + 240
    while process.poll() is None and len(list(folder.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()

    there = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.json")}
    assert 2 <= len(there) < len(rows) and not (output / "table.md").exists()
    printed = run(arguments)
    assert f"{len(there)} of {len(rows)} runs are there already." in printed
    for file, (content, time_) in there.items():
        assert (folder / file).stat().st_mtime_ns == time_ and (folder / file).read_bytes() == content
    assert len(list(folder.glob("*.json"))) == len(rows)
    run(bench_arguments(place, data, place / "unbroken", *slow))
    assert (place / "unbroken" / "table.md").read_text() == (output / "table.md").read_text()
