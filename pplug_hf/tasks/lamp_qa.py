"""LaMP-QA (arXiv 2506.00137): personalised answers to questions, judged by what the asker wants to see in them.

Rows as the data set alireza7/LaMP-QA on the Hub has them: `id`, `question`, `narrative`, `category`, `rubric_aspects`
(`aspect`, `reason`, `evidence`) and a `profile` of earlier posts (`id`, `category`, `text`). There are no right answers, so
nothing can be trained on these rows, and a judge of yours, usually a language model, scores the answers:

    class Judge(RubricJudge):
        def judge(self, answer, aspect, extra):
            return my_model(extra["question"], aspect["aspect"], aspect["reason"], answer)  # 0 to 1

    register_metric(Judge(), exist_ok=True)
    bench(BenchSettings(task="LaMP-QA", ...))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from ..errors import ConfigurationError
from .metrics import Judged, Metric, Options, Texts, register_metric
from .task import PromptFormat, Task


class RubricJudge(Metric):
    """The mean score of the aspects that the asker wants to see; a subclass scores one aspect."""

    name, main = "rubric", "rubric"
    titles = (("rubric", "rubric score", ""),)
    fields = ("question", "narrative", "category", "rubric_aspects")
    needs_golds = False

    def judge(self, answer: str, aspect: Mapping[str, object], extra: Mapping[str, object]) -> float:
        """Return how well an answer covers one aspect.

        Args:
            answer: the answer.
            aspect: `aspect`, `reason` and `evidence`.
            extra: further fields of the row: `question`, `narrative`, `category` and all `rubric_aspects`.

        Returns:
            0 to 1. LaMP-QA's own judge gives 0, 1 or 2, halved.
        """
        # Abstract: `check` refuses a judge without it before anything is answered.
        raise NotImplementedError(f"{type(self).__name__} has to define judge.")

    def check(self) -> None:
        if type(self).judge is RubricJudge.judge:
            raise ConfigurationError(
                "LaMP-QA's answers need a judge of yours: subclass pplug_hf.tasks.lamp_qa.RubricJudge with a method judge, "
                "and register_metric(YourJudge(), exist_ok=True) before you score."
            )

    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        self.check()
        scores = []
        for answer, extra in zip(predictions, options.get("extra", ()), strict=True):
            aspects = _aspects(extra.get("rubric_aspects"))
            scores.append(np.mean([self.judge(answer, aspect, extra) for aspect in aspects]) if aspects else 0.0)
        return np.array(scores, dtype=np.float64)


def _aspects(value: Any) -> list[Mapping[str, object]]:
    """Return aspects as a list; `datasets` may hand them over as a dict of columns."""
    if isinstance(value, Mapping):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value) if value is not None else []


register_metric(RubricJudge())

TASK = Task(
    name="LaMP-QA",
    input_template="Answer the question for the person who asks it. question: {question}",
    query_marker="question:",
    query_field="text",
    item_template="{text}",
    item_template_unlabelled="{text}",
    prompt=PromptFormat(
        item="{text}",
        cut="text",
        join="\n\n",
        frame="{head}# Past post questions and detailed descriptions of these questions:\n{items}\n"
        "# Current post question:\n{input}",
        reserved="# Past post questions and detailed descriptions of these questions: # Current post question:",
    ),
    metric="rubric",
    max_new_tokens=1024,
)
