"""ROUGE-1 and ROUGE-L as in the LaMP benchmark, for the `evaluate` library."""

from pplug_hf.metrics import base
from pplug_hf.tasks.lamp_metrics import score_texts


class LampRouge(base.LampMetric):
    """ROUGE-1 and ROUGE-L.

    F-measure of ROUGE-1 and ROUGE-L by rouge-score, without stemming, mean over examples. Its tokens are made of
    a-z and 0-9, so texts in other scripts score 0, as in the benchmark; a warning says how many golds have none.
    """

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions, references
    ):
        """Return the scores of some answers.

        Args:
            predictions (list of str): the answers.
            references (list of str): the right texts.

        Returns:
            rouge-1, rouge-L, and unparsed: the number of answers without a token, which are empty or in another
            script.
        """
        return score_texts(predictions, references)
