"""Your own task on your own data: describe the items, look at the histories, train, compare, answer for somebody new.

A task is a small object: where the query is in an input, what the text of a history item is, how answers are judged. Records
are anything with `input`, `output` and `profile` (and `user`, if one person asks several questions): a `datasets.Dataset`, a
list, or JSON lines on disk. The records here are made from the synthetic readers that ship with the package: a book club
whose members put blurbs on shelves that they name themselves.
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from datasets import Dataset, DatasetDict

from pplug_hf import BenchSettings, PPlugProcessor, Task, TrainSettings, bench, describe, read_lamp, stream, train

ASSETS = Path(str(files("pplug_hf.demo") / "assets"))

BOOK_CLUB = Task(
    name="book club",
    query_marker="book:",  # the query is the text after this in an input
    query_field="blurb",  # the field of an item that corresponds to the query ...
    answer_field="shelf",  # ... and the one with its answer: items are training examples, too
    item_template="{shelf}: {blurb}",  # the text of an item for the encoder
    item_template_unlabelled="{blurb}",
    metric="accuracy",
    max_new_tokens=6,
)


def records(split):
    """Yield records, where you would read your own database or files."""
    for e in read_lamp(ASSETS / "data", split)[1]:
        items = [{"id": item["id"], "blurb": item["text"], "shelf": item["tag"]} for item in e.history]
        yield {"id": e.id, "user": e.user, "input": e.prompt, "output": e.target, "profile": items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2, help="passes over the examples (default: %(default)s)")
    arguments = parser.parse_args()
    club = DatasetDict({split: Dataset.from_list(list(records(split))) for split in ("train", "dev")})

    # Before training: is there something to learn from these histories?
    _, examples, repairs = stream(club["train"], task=BOOK_CLUB)
    print(describe(examples, BOOK_CLUB, repairs))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(
            data="the book club",  # the records are passed as an object; the name is for messages
            backbone=str(ASSETS / "backbone"),
            encoder=str(ASSETS / "encoder"),
            output=f"{folder}/plug",
            vectors=f"{folder}/vectors",
            epochs=arguments.epochs,
            batch_size=64,
        )
        model = train(settings, task=BOOK_CLUB, data=club)

        # The same records as JSON lines, which the command line reads, with the task as a file (--task club.json).
        lines = Path(folder) / "dev.jsonl"
        lines.write_text("".join(json.dumps(record) + "\n" for record in records("dev")), encoding="utf-8")
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

    # Somebody who was not in the data: three items are a history.
    member = [
        {"shelf": "mystery", "blurb": "the curious detective and the stolen necklace"},
        {"shelf": "mystery", "blurb": "letters from a famous coroner about the warehouse"},
        {"shelf": "adventure", "blurb": "how a golden smuggler capsized a lifeboat"},
    ]
    query = "a proud coroner and the clue in the warehouse"
    processor = PPlugProcessor.from_model(model)
    inputs = processor(text=f"Which shelf does this reader put the book on? book: {query}", persona=[member])
    weights = model.persona_weights(member, query=query)[0].tolist()  # [N]
    print(f"\n{query}\n  {processor.decode_answers(model.generate(**inputs, query=query))[0]}, because of")
    for weight, item in zip(weights, member, strict=True):
        print(f"  {weight:.2f}  {BOOK_CLUB.item_text(item)}")


if __name__ == "__main__":
    main()
