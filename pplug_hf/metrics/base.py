"""Base class of the modules that the `evaluate` library loads."""

import inspect

import datasets
import evaluate

_CITATION = """\
@inproceedings{salemi-etal-2024-lamp,
    title = "{L}a{MP}: When Large Language Models Meet Personalization",
    author = "Salemi, Alireza and Mysore, Sheshera and Bendersky, Michael and Zamani, Hamed",
    booktitle = "Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics",
    year = "2024"
}
"""


class LampMetric(evaluate.Metric):
    """A metric of texts against texts. The docstrings of a module's class and its `_compute` describe it."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=inspect.cleandoc(str(type(self).__doc__)),
            citation=_CITATION,
            inputs_description=inspect.cleandoc(str(type(self)._compute.__doc__)) + "\n",
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://lamp-benchmark.github.io"],
        )
