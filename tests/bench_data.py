"""Made-up users, data folders and plugs for the tests of the bench."""

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import tiny

from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.tasks.task import PromptFormat, Task

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
            item = {name: words(rng, 6) for name in sorted(task.fields)} | {
                "id": f"{user}-{number}",
                "date": f"20{number:02}",
            }
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
    model = tiny.from_backbone(str(places / family), str(places / "encoder"), **choices)
    tiny.randomise(model.plug, seed)
    model.save_pretrained(folder)
    return str(folder)


def quietly(settings, command=bench, **options):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        made = command(settings, **options)
    return made, out.getvalue()


def make_world(places, root):
    """Plugs of every kind on one t5, and a folder of data for each task."""
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


def golden_settings(release, folder, rows, output="bench"):
    """The settings that the golden bench of a release was made with; its plug is copied, with its encoder's place."""
    plug = folder / "plug"
    if not plug.exists():
        shutil.copytree(release / "llama" / "plug", plug)
        config = json.loads((plug / "config.json").read_text())
        config |= {"encoder": str(release / "encoder"), "item_template": "{tag} {text}"}
        (plug / "config.json").write_text(json.dumps(config))
    return BenchSettings(
        data=str(release / "bench" / "data"),
        output=str(folder / output),
        rows=list(rows),
        plugs=[f"pplug={plug}", f"instruction-only={plug}"],
        backbone=str(release / "llama" / "backbone"),
        vectors=str(folder / "vectors"),
    )
