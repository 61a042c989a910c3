"""Accuracy and macro-F1 as in the LaMP benchmark, for the `evaluate` library."""

from pplug_hf.metrics import base
from pplug_hf.tasks.lamp_metrics import score_labels
from pplug_hf.tasks.task import get_task


class LampAccuracy(base.LampMetric):
    """Accuracy, and F1 averaged over all labels.

    Answers, without white space around them, must equal a label; anything else is wrong. F1 is the mean over all
    labels of the task, also those that nobody gave.
    """

    def _info(self):
        self._labels = () if self.config_name == "default" else get_task(self.config_name).labels
        return super()._info()

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions, references, labels=None
    ):
        """Return the scores of some answers.

        Args:
            predictions (list of str): the answers.
            references (list of str): the right labels.
            labels (list of str): all possible answers. Default: those of the task that was loaded
                (`evaluate.load(folder, "LaMP-2")`), else those among the references.

        Returns:
            accuracy, f1, and unparsed: the number of answers that are not a label.
        """
        return score_labels(predictions, references, self._labels if labels is None else tuple(labels))
