"""Does the style measure know an author? On titles whose author is known, against authors drawn by chance.

    python benchmarks/style_validation.py --lamp ../shared/lamp --task LaMP_4

Every author's titles, from the train histories, are put in order of date; the last fifth (20 at most) is held out and
scored against the styles of all authors, fitted on the others. Prints the mean score (0.5 is chance: the area under
the curve of own against other authors), how often the true author is the closest of all, and for control the scores
of the same titles with authors shuffled and in lower case, of another author's last title, and of one title for all.
Means are over authors, intervals 95 % of a bootstrap over them. Aggregates only.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from pplug_hf.data.lamp import read_lamp
from pplug_hf.evaluation.style import Style
from pplug_hf.evaluation.user_statistics import bootstrap_mean, user_means
from pplug_hf.tasks.task import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lamp", type=Path, default=Path("../shared/lamp"), help="folder of the tasks")
    parser.add_argument("--task", default="LaMP_4", help="a task with free-text answers")
    parser.add_argument("--split", default="train")
    parser.add_argument("--known", type=int, nargs="+", default=[0, 5, 20], help="texts per author (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    task = get_task(args.task)
    _, examples = read_lamp(args.lamp / args.task, args.split, task)
    dated: dict[str, dict[str, str]] = {}  # user -> text -> date
    for example in examples:
        for item in example.history:
            text = item[task.answer_field or task.query_field].strip()
            if text:
                dated.setdefault(example.user, {}).setdefault(text, item.get("date", ""))
    titles = {user: sorted(own, key=own.__getitem__) for user, own in dated.items() if len(own) >= 5}
    held = {user: min(20, max(1, len(own) // 5)) for user, own in titles.items()}
    users = [user for user in titles for _ in range(held[user])]
    texts = [text for user, own in titles.items() for text in own[-held[user] :]]
    print(json.dumps({"task": task.name, "split": args.split, "authors": len(titles), "held out": len(texts)}))

    rng = np.random.default_rng(args.seed)
    shuffled = [users[i] for i in rng.permutation(len(users))]
    names = sorted(titles)
    ring = dict(zip(names, [*names[1:], names[0]], strict=True))
    rows = {
        "true author": (texts, users),
        "authors shuffled": (texts, shuffled),
        "another author's titles": ([titles[ring[u]][-1] for u in users], users),
        "true titles in lower case": ([text.lower() for text in texts], users),
        "one title for all": ([texts[0]] * len(names), names),
    }
    for known in args.known:
        style = Style.fit({user: own[: -held[user]][-known:] for user, own in titles.items()})
        for name, (answers, owners) in rows.items():
            scores = style.score(answers, owners)
            closest = style.closeness(answers).argmax(axis=1) == [style.users[user] for user in owners]
            record = {"texts per author": known or "all", "row": name}
            for measure, values in (("score", scores), ("closest", closest.astype(float))):
                mean, low, high = bootstrap_mean(*user_means(values, owners), seed=args.seed)
                record[measure] = [round(mean, 4), round(low, 4), round(high, 4)]
            record["authors above 0.5"] = round(float(np.mean(user_means(scores, owners)[0] > 0.5)), 3)
            print(json.dumps(record))
        gaps = style.gaps([text.lower() for text in texts], users)
        print(json.dumps({"largest gaps in lower case": {k: round(v, 2) for k, v in list(gaps.items())[:5]}}))


if __name__ == "__main__":
    main()
