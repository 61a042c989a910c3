"""Your own task from your own rows: say what an item is, look at the histories, train, compare, answer somebody new.

A task is a small object: where the request stands in an input, what an item of a history says, how answers are judged. Rows
are anything with `input`, `output` and `profile` (and `user`, where one person asks several questions): a
`datasets.Dataset`, a list, or JSON lines on disk. The rows here are made from the synthetic readers that ship with the
package: a book club whose members file blurbs on shelves of their own naming.
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from datasets import Dataset, DatasetDict

from pplug_hf import PPlugProcessor, Task, read_lamp
from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.commands.train import TrainSettings, train
from pplug_hf.data.report import describe
from pplug_hf.data.tables import stream

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))

BOOK_CLUB = Task(
    name="book club",
    query_marker="book:",  # the request is what follows in an input
    query_field="blurb",  # the field of an item that plays the request's part ...
    answer_field="shelf",  # ... and the one with its answer: every item is an example to learn from, too
    item_template="{shelf}: {blurb}",  # what the encoder reads of an item
    item_template_unlabelled="{blurb}",
    metric="accuracy",
    max_new_tokens=6,
)


def rows(split):
    """Stands for reading your own database or files."""
    for e in read_lamp(ASSETS / "data", split)[1]:
        items = [{"id": item["id"], "blurb": item["text"], "shelf": item["tag"]} for item in e.history]
        yield {"id": e.id, "user": e.user, "input": e.prompt, "output": e.target, "profile": items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2, help="passes over the examples (default: %(default)s)")
    arguments = parser.parse_args()
    club = DatasetDict({split: Dataset.from_list(list(rows(split))) for split in ("train", "dev")})

    # Before anything is trained: is there something to learn from these histories?
    _, examples, repairs = stream(club["train"], task=BOOK_CLUB)
    print(describe(examples, BOOK_CLUB, repairs))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            data="the book club",  # the rows come as an object; the name is for messages
            backbone=str(ASSETS / "backbone"),
            encoder=str(ASSETS / "encoder"),
            output=f"{folder}/plug",
            vectors=f"{folder}/vectors",
            epochs=arguments.epochs,
            batch_size=64,
            learning_rate=2e-3,
        )
        choices = {"num_persona_tokens": 2, "attention_temperature": 0.1, "learn_temperature": True}
        model = train(settings, task=BOOK_CLUB, data=club, **choices)

        # The same rows as JSON lines: what the command line reads, with the task as a file (--task club.json).
        lines = Path(folder) / "dev.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows("dev")), encoding="utf-8")
        bench(
            BenchSettings(
                data=str(lines),
                output=f"{folder}/bench",
                plugs=[f"pplug={folder}/plug"],
                rows=["no-persona", "bm25@1", "pplug:wrong-user", "pplug"],
                vectors=f"{folder}/vectors",
            ),
            task=BOOK_CLUB,
        )

    # Somebody whom neither training nor the bench has met: three items are a history.
    member = [
        {"shelf": "mystery", "blurb": "the curious detective and the stolen necklace"},
        {"shelf": "mystery", "blurb": "letters from a famous coroner about the warehouse"},
        {"shelf": "adventure", "blurb": "how a golden smuggler capsized a lifeboat"},
    ]
    request = "a proud coroner and the clue in the warehouse"
    processor = PPlugProcessor.from_model(model)
    inputs = processor(text=f"Which shelf does this reader put the book on? book: {request}", persona=[member])
    weights = model.persona_weights(member, query=request)[0].tolist()  # [N]
    print(f"\n{request}\n  {processor.decode_answers(model.generate(**inputs, query=request))[0]}, because of")
    for weight, item in zip(weights, member, strict=True):
        print(f"  {weight:.2f}  {BOOK_CLUB.item_text(item)}")


if __name__ == "__main__":
    main()
