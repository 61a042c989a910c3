"""Questions for LaMP_1's backbone: the real ones, and more that are made up of the authors' titles."""

import random
import re
from dataclasses import replace

from torch.nn import functional as F

from pplug_hf.data.examples import Example
from pplug_hf.data.histories import normal
from pplug_hf.modeling.encoders import embed, load_encoder
from pplug_hf.tasks.task import Task

CANDIDATES = re.compile(r'(?s)\[1\]: "(.*?)" \[2\]: "(.*)"')


def citation_pairs(
    questions: list[Example], task: Task, asked: list[Example], encoder: str, number: int, stage: int, seed: int
) -> list[Example]:
    """LaMP_1's questions, each in both orders of its candidates, and `number` about authors' other papers.

    There the right candidate is one of the ten titles that the sentence encoder finds nearest, the wrong one is not
    among the nearest three hundred. Whether one candidate is related is learned in a hundred steps, while which of two
    is the more related is not learned at all as long as nothing is known of either. So stage 1 shows a title and one
    candidate and nothing else, and stage 2 leaves the second candidate of half the made-up questions blank.
    """
    rng = random.Random(seed)
    closed = {normal(example.query) for example in asked}
    shown = {title for e in questions for title in (e.query, *CANDIDATES.findall(e.prompt)[0])}
    titles = sorted(shown | {item["title"] for e in questions for item in e.history})
    vectors = F.normalize(embed(load_encoder(encoder), titles), dim=-1)  # [N, D]
    pairs = [] if stage == 1 else [other for e in questions for other in (e, exchanged(e))]
    for made_up in range(number):
        like = rng.choice(questions)
        own = rng.choice(like.history)
        if normal(own["title"]) in closed:
            continue
        near = (vectors @ vectors[titles.index(own["title"])]).argsort(descending=True).tolist()
        right, wrong = titles[rng.choice(near[1:11])], titles[rng.choice(near[300:])]
        first = CANDIDATES.sub(lambda _: f'[1]: "{right}" [2]: "{wrong}"', like.prompt)  # noqa: B023
        made = replace(
            like,
            id=f"made-up/{made_up}",
            prompt=task.prompt_for(own, first),
            query=own["title"],
            target="[1]",
            history=[item for item in like.history if item is not own],
        )
        made = made if rng.random() < 0.5 else exchanged(made)
        if stage == 1:
            made = replace(made, prompt=f'"{made.query}" [1]: "{CANDIDATES.findall(made.prompt)[0][0]}"')
        elif stage == 2 and rng.random() < 0.5:
            made = replace(made, prompt=CANDIDATES.sub(r'[1]: "\1" [2]: ""', made.prompt))
        pairs.append(made)
    return pairs


def exchanged(example: Example) -> Example:
    """A question of LaMP_1 with its candidates the other way round."""
    prompt = CANDIDATES.sub(r'[1]: "\2" [2]: "\1"', example.prompt)
    return replace(example, prompt=prompt, target={"[1]": "[2]", "[2]": "[1]"}[str(example.target)])
