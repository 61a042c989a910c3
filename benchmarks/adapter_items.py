"""History items that weights of single users may be trained on, in data of LaMP's format, and a check that nothing leaks.

python benchmarks/adapter_items.py --lamp ../shared/lamp
"""

import argparse
from pathlib import Path

from pplug_hf.data.examples import read_examples
from pplug_hf.methods.user_pairs import Asked, questions_by_user, user_pairs
from pplug_hf.tasks.items import item_id, normalise


def count(folder: Path, split: str) -> dict:
    """Return counts of one data set, and of leaks, which must be none with the rule `common`."""
    task, examples = read_examples(folder, split)
    asked, by_user = Asked.of(examples, task), questions_by_user(examples)
    pairs = {user: user_pairs(own, task, asked) for user, own in by_user.items()}
    later = same = shown = 0
    for user, own in by_user.items():
        queries = {normalise(e.query) for e in own}
        histories = [{item_id(item) for item in e.history} for e in own]
        earliest = [item_id(item) for item in min(own, key=lambda e: len(e.history)).history]
        for pair in pairs[user]:
            name = item_id(pair.item)
            later += not all(name in history for history in histories)
            same += normalise(pair.example.query) in queries
            before = set(earliest[: earliest.index(name)])
            shown += not {item_id(item) for item in pair.example.history} <= before
    union = sum(len(user_pairs(own, task, asked, "union")) for own in by_user.values())
    return {
        "questions": len(examples),
        "users": len(by_user),
        "without items": sum(not found for found in pairs.values()),
        "common": sum(map(len, pairs.values())),
        "union": union,
        "later than a question": later,
        "asked themselves": same,
        "shown at or after their own place": shown,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lamp", type=Path, default=Path("../shared/lamp"), help="folder of the tasks")
    parser.add_argument("--split", default="dev")
    options = parser.parse_args()
    for folder in sorted(options.lamp.glob("LaMP_*")):
        counts = count(folder, options.split)
        print(f"{folder.name}: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))
        assert not any(counts[leak] for leak in list(counts)[-3:])


if __name__ == "__main__":
    main()
