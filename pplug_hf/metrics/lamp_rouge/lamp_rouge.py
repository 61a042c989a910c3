"""ROUGE-1 and ROUGE-L as in the LaMP benchmark, for the `evaluate` library."""

import datasets
import evaluate

from pplug_hf.tasks.lamp_metrics import score_texts

_DESCRIPTION = """\
F-measure of ROUGE-1 and ROUGE-L by rouge-score, without stemming, mean over examples. Its tokens are made of a-z and
0-9, so texts in other scripts score 0, as in the benchmark.
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
    references (list of str): the right texts.
Returns:
    rouge-1, rouge-L, and unparsed: how many answers are empty.
"""


class LampRouge(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=features,
            reference_urls=["https://lamp-benchmark.github.io"],
        )

    def _compute(self, predictions, references):
        return score_texts(predictions, references)
