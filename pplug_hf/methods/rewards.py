"""Rewards: how well the frozen language model answers a question with one item of the user's history in its prompt.

    rewards = Rewards.of(resources, examples, candidates, "log_prob", folder)
    rewards.values[0]        one per candidate of the first question
    rewards.summary()        how often the candidates differ at all

Each (prompt, right answer) is asked once, ever: what is found lies in a folder per task, language model and decoding,
which all trainings share. A file there holds digests of the texts and numbers; no text is stored. A killed run loses at
most one file's worth.

n questions, l candidates of one of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from ..data.records import Example
from ..data.vectors import TextTable
from ..storage.files import write_text
from ..tasks.items import whole_texts
from ..tasks.metrics import get_metric
from ..tasks.task import Task, per_example
from .decoding import ModelInputs
from .digests import json_digest
from .likelihood import target_log_probs
from .prompts import retrieval_prompt, text_budget
from .resources import Resources

Reward = Literal["log_prob", "metric"]
_CHUNK = 1024  # prompts per file


class RewardTable(TextTable):
    """Table of what the language model made of prompts with known right answers, in memory and on disk.

    Args:
        resources: language model, task and decoding.
        reward: "log_prob" has [log-probability of the right answer, its tokens], "metric" the [metric] of the answer given.
        folder: of all tables.
    """

    def __init__(self, resources: Resources, reward: Reward, folder: str | Path):
        self.resources, self.reward = resources, reward
        decoding, processor = resources.decoding, resources.processor
        self.key: dict[str, object] = {
            "reward": reward,
            "task": resources.task.digest,
            "backbone": resources.backbone_digest,
            "chat": [processor.tokenizer.chat_template, processor.system] if processor.chat else None,
            "max_length": decoding.max_length,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if reward == "metric":
            own = {"max_new_tokens": decoding.max_new_tokens or resources.task.max_new_tokens}
            self.key["decoding"] = asdict(decoding) | own
        self._asked: dict[str, tuple[str, Example]] = {}
        super().__init__(Path(folder) / json_digest(self.key), 1 if reward == "metric" else 2, "Computing rewards")

    def of(self, prompts: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """Return what is known of each prompt and the right answer to its example, [n, 1] or [n, 2] in fp32.

        Args:
            prompts: n of them.
            examples: the question that each asks.
        """
        write_text(self.folder / "key.json", json.dumps(self.key, indent=2) + "\n")
        texts = whole_texts([f"{prompt}\0{e.target or ''}" for prompt, e in zip(prompts, examples, strict=True)])
        self._asked = dict(zip(texts, zip(prompts, examples, strict=True), strict=True))
        return self(texts, batch_size=self.resources.batch_size, chunk_size=_CHUNK)

    def compute(self, texts: list[str]) -> Tensor:
        prompts, examples = zip(*(self._asked[text] for text in texts), strict=True)
        resources, golds = self.resources, [e.target or "" for e in examples]
        if self.reward == "metric":
            answers = resources.generate(ModelInputs(list(prompts)), description="").texts
            scores = per_example(resources.task, answers, golds, extra=[e.extra for e in examples])
            return torch.from_numpy(scores).float()[:, None]
        model, processor = resources.language_model, resources.processor
        return torch.stack(target_log_probs(model, processor, prompts, golds, resources.decoding.max_length), dim=1)


@dataclass(frozen=True)
class Rewards:
    """Rewards of the candidates of n questions.

    Attributes:
        values: n vectors [l] in fp32; larger is better, and a metric lies between 0 and 1.
        kind: what they are.
        passes: distinct (prompt, right answer) among them: what the language model had to read.
        asked: how many of these were asked now; the others were in the table.
    """

    values: list[Tensor]
    kind: Reward
    passes: int = 0
    asked: int = 0

    @classmethod
    def of(
        cls,
        resources: Resources,
        examples: Sequence[Example],
        candidates: Sequence[Sequence[int]],
        kind: Reward,
        folder: str | Path,
    ) -> Rewards:
        """Return the rewards of candidates, asking the language model what the table does not have.

        Args:
            resources: language model, task and decoding.
            examples: n questions with right answers.
            candidates: positions in the history of each.
            kind: see above.
            folder: of the tables.
        """
        task, tokenizer = resources.task, resources.processor.tokenizer
        length = text_budget(resources.processor, resources.decoding.max_length)
        pairs = [(e, i) for e, positions in zip(examples, candidates, strict=True) for i in positions]
        prompts = [retrieval_prompt(task, e.prompt, [e.history[i]], tokenizer, length).text for e, i in pairs]
        table = RewardTable(resources, kind, folder)
        found = table.of(prompts, [e for e, _ in pairs])
        if kind == "metric":
            values = torch.from_numpy(
                normalised(task, found[:, 0].double().numpy(), [e.target or "" for e, _ in pairs])
            )
        else:  # per token for texts, or long answers would differ more than short ones
            values = found[:, 0] / found[:, 1] if task.is_free_text else found[:, 0]
        distinct = len({(prompt, e.target) for prompt, (e, _) in zip(prompts, pairs, strict=True)})
        split = list(values.float().split([len(positions) for positions in candidates]))
        return cls(split, kind, distinct, table.encoded)

    def summary(self) -> dict[str, float]:
        """Return shares of the questions, and means: what there is to learn from these rewards.

        `informative`: the candidates differ. `gain`: mean of the best minus the first. For a metric also `any_right` and
        `first_right`: a candidate, or the first one, has the full reward.
        """
        some = [value for value in self.values if len(value)]
        best = [float(value.max() - value[0]) for value in some]
        facts = {"informative": float(np.mean([is_informative(v) for v in some])), "gain": float(np.mean(best))}
        if self.kind == "metric":
            facts["any_right"] = float(np.mean([float(value.max()) == 1 for value in some]))
            facts["first_right"] = float(np.mean([float(value[0]) == 1 for value in some]))
        return facts


def is_informative(values: Tensor) -> bool:
    """Return true if the candidates of a question have different rewards."""
    return bool((values != values[:1]).any())


def normalised(task: Task, scores: np.ndarray, golds: Sequence[str]) -> np.ndarray:
    """Return scores of the task's metric as rewards [n]: larger is better.

    An error is subtracted from the largest that its gold allows, and divided by it, so it lies between 0 and 1.

    Args:
        task: their task.
        scores: [n], of `per_example`.
        golds: n right answers.
    """
    metric = get_metric(task.metric)
    if metric.higher_is_better:
        return scores
    if not metric.needs_numbers:
        return -scores
    numbers, low, high = np.array([float(gold) for gold in golds]), *_ends(task)
    widest = np.maximum(numbers - low, high - numbers)
    return np.clip((widest - scores) / np.maximum(widest, 1e-9), 0, 1)


def _ends(task: Task) -> tuple[float, float]:
    numbers = [float(label) for label in task.labels]
    return min(numbers), max(numbers)
