"""MAE and RMSE as in the LaMP benchmark, for the `evaluate` library."""

import datasets
import evaluate

from pplug_hf.tasks.lamp_metrics import Fallback, score_ratings
from pplug_hf.tasks.task import get_task

_DESCRIPTION = """\
An answer is what float() reads; what it cannot read, and nan and inf, count as the end of the scale farthest from the
right rating (LaMP's rule), or as the first digit in the answer, else the low end of the scale (the rule of PPlug's
authors).
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
    references (list of str): the right ratings.
    fallback (str): "farthest" or "first-digit". Default: "farthest".
    labels (list of str): the scale. Default: that of the task that was loaded, which is LaMP-3 if none was.
Returns:
    mae, rmse, and unparsed: how many answers are no finite number.
"""


class LampMae(evaluate.Metric):
    def _info(self):
        self._labels = get_task("LaMP-3" if self.config_name == "default" else self.config_name).labels
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=features,
            reference_urls=["https://lamp-benchmark.github.io"],
        )

    def _compute(self, predictions, references, fallback: Fallback = "farthest", labels=None):
        scale = self._labels if labels is None else tuple(labels)
        return score_ratings(predictions, references, scale, fallback=fallback)
