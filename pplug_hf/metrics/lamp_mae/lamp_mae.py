"""MAE and RMSE as in the LaMP benchmark, for the `evaluate` library."""

from pplug_hf.metrics import base
from pplug_hf.tasks.lamp_metrics import Fallback, score_ratings
from pplug_hf.tasks.task import get_task


class LampMae(base.LampMetric):
    """Mean absolute error, and the root of the mean squared error.

    An answer is what float() reads; what it cannot read, and nan and inf, count as the end of the scale farthest
    from the right rating (LaMP's rule), or as the first digit in the answer, else the low end of the scale (the
    rule of PPlug's authors).
    """

    def _info(self):
        self._labels = get_task("LaMP-3" if self.config_name == "default" else self.config_name).labels
        return super()._info()

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions, references, fallback: Fallback = "farthest", labels=None
    ):
        """Return the scores of some answers.

        Args:
            predictions (list of str): the answers.
            references (list of str): the right ratings.
            fallback (str): "farthest" or "first-digit". Default: "farthest".
            labels (list of str): the scale. Default: that of the task that was loaded, which is LaMP-3 if none was.

        Returns:
            mae, rmse, and unparsed: the number of answers that are not a finite number.
        """
        scale = self._labels if labels is None else tuple(labels)
        return score_ratings(predictions, references, scale, fallback=fallback)
