"""Accuracy and macro-F1 as in the LaMP benchmark, for the `evaluate` library."""

import datasets
import evaluate

from pplug_hf.tasks.lamp_metrics import score_labels
from pplug_hf.tasks.task import get_task

_DESCRIPTION = """\
Answers, without white space around them, must equal a label; anything else is wrong. F1 is the mean over all labels of
the task, also those that nobody gave.
"""
_CITATION = """\
@inproceedings{salemi-etal-2024-lamp,
    title = "{L}a{MP}: When Large Language Models Meet Personalization",
    author = "Salemi, Alireza and Mysore, Sheshera and Bendersky, Michael and Zamani, Hamed",
    booktitle = "Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics",
    year = "2024"
}
"""
_INPUTS = """
Args:
    predictions (list of str): the answers.
    references (list of str): the right labels.
    labels (list of str): all possible answers. Default: those of the task that was loaded
        (`evaluate.load(folder, "LaMP-2")`), else those among the references.
Returns:
    accuracy, f1, and unparsed: how many answers are no label.
"""


class LampAccuracy(evaluate.Metric):
    def _info(self):
        self._labels = () if self.config_name == "default" else get_task(self.config_name).labels
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=features,
            reference_urls=["https://lamp-benchmark.github.io"],
        )

    def _compute(self, predictions, references, labels=None):
        return score_labels(predictions, references, self._labels if labels is None else tuple(labels))
