"""The baseline to beat where answers are labels: the backbone's probability, times how often the user gave each label.

    p(label | prompt, user)  ~  p_backbone(label | prompt)^a * frequency(label | user)^b

The frequencies are smoothed towards everybody's; a, b and the smoothing are fitted. It reads nothing of a history
but its labels, so what a plug gains over it comes from the texts of the items.

    log_probs = label_log_probs(backbone, processor, [example.prompt for example in train], task.labels)
    histories = [history_labels(example, task) for example in train]
    mixture = LabelMixture.fit(log_probs, histories, [example.target for example in train], task.labels)

`LabelFrequencies` is the method that does so, with the language model alone or with a plug in front.

n examples, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.histories import split_users
from ..data.lamp import Example
from ..errors import ConfigurationError, DataError, MismatchError
from ..storage.files import read_json_object
from ..storage.layout import TRAIN_SETTINGS
from ..tasks.metrics import get_metric
from ..tasks.task import Task, get_task
from .base import Method, Need
from .decoding import Answers
from .likelihood import label_log_probs, plug_label_log_probs
from .persona import Plug

if TYPE_CHECKING:
    from .resources import Resources

ALPHAS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
FEWEST = 50  # questions; three numbers fitted on fewer are mostly chance
_SPLIT = ("leave_out_users", "validation_users", "split_seed")  # by which `train` divides users


def history_labels(example: Example, task: Task | str) -> list[str]:
    """Return the labels a user gave to their history's items, oldest first; none for a task whose items carry no answer."""
    task = get_task(task)
    return [label for item in example.history if (label := task.item_label(item))]


@dataclass(frozen=True)
class LabelMixture:
    """The fitted mixture: numbers only, so `dataclasses.asdict` is all it takes to keep one."""

    labels: tuple[str, ...]
    prior: tuple[float, ...]  # how often users give each label, L numbers above 0 with sum 1
    alpha: float  # the prior counts as much as this many items
    backbone_weight: float  # a
    history_weight: float  # b

    @classmethod
    def fit(
        cls,
        log_probs: Tensor,
        histories_labels: Sequence[Sequence[str]],
        golds: Sequence[str],
        labels: Sequence[str],
        alphas: Sequence[float] = ALPHAS,
    ) -> LabelMixture:
        """Fit the weights and the smoothing that make the golds most likely.

        Args:
            log_probs: [n, L] from `label_log_probs`.
            histories_labels: n lists from `history_labels`; labels that are not among `labels` are ignored.
            golds: n right answers.
            labels: L distinct labels.
            alphas: The amounts of smoothing to try, all above 0.

        Returns:
            The fit with the lowest mean NLL. It depends on nothing but the arguments.

        Raises:
            MismatchError: Shapes do not fit each other, or a gold is not a label.
            DataError: There are no golds, labels repeat, or a log-probability is not finite.
            ConfigurationError: There are no alphas, or one is not above 0.
        """
        labels, golds = tuple(labels), [gold.strip() for gold in golds]
        number = {label: index for index, label in enumerate(labels)}
        if not golds or len(number) != len(labels):
            raise DataError(f"There are {len(golds)} golds and the labels {labels}; give some golds, each label once.")
        if wrong := sorted(set(golds) - set(labels)):
            raise MismatchError(f"Golds {wrong[:5]} are not labels; the labels are {', '.join(labels)}.")
        if len(golds) != len(log_probs):
            raise MismatchError(f"There are {len(golds)} golds for {len(log_probs)} rows of log_probs.")
        if not alphas or min(alphas) <= 0:
            raise ConfigurationError(f"alphas are {tuple(alphas)}; give at least one, all above 0.")
        targets = torch.tensor([number[gold] for gold in golds])
        counts = torch.bincount(targets, minlength=len(labels)) + 1.0  # one more each, so that none is impossible
        prior = tuple((counts.double() / counts.sum()).tolist())

        fits = []
        for alpha in alphas:
            nll, weights = _minimise(_features(log_probs, histories_labels, labels, prior, alpha), targets)
            fits.append((nll, cls(labels, prior, alpha, *weights)))
        return min(fits, key=lambda fit: fit[0])[1]

    def scores(self, log_probs: Tensor, histories_labels: Sequence[Sequence[str]]) -> Tensor:
        """Return log-probabilities of the labels, [n, L] in fp64. Arguments and errors as in `fit`."""
        features = _features(log_probs, histories_labels, self.labels, self.prior, self.alpha)
        return (features @ features.new_tensor([self.backbone_weight, self.history_weight])).log_softmax(dim=-1)

    def predict(
        self, log_probs: Tensor, histories_labels: Sequence[Sequence[str]], metric: str = "accuracy"
    ) -> list[str]:
        """Return the best label of each example under the mixture.

        Args:
            log_probs, histories_labels: as in `fit`, with its errors.
            metric: by its name; it says which label is the best (`Metric.best_labels`). For "mae" that is a median,
                often not the most likely label, which is the best one for accuracy.

        Returns:
            n labels; of equally good ones the first.

        Raises:
            MismatchError: the metric is "mae", and a label is not a number.
            ConfigurationError: there is no such metric.
        """
        scores = self.scores(log_probs, histories_labels).numpy()
        return [self.labels[best] for best in get_metric(metric).best_labels(scores, self.labels)]


@dataclass
class LabelFrequencies(Method):
    """Label probabilities of the language model, or of a plug, mixed with how often the user gave each label.

    Args:
        name: what the user calls the plug; "" for the language model alone.
        folder: of the plug.
        mixture: from `fit`.
    """

    takes_retrieval: ClassVar[bool] = False

    name: str = ""
    folder: str = ""
    mixture: LabelMixture | None = field(default=None, compare=False)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"training", "labels"})

    def fit(self, train: Sequence[Example], resources: Resources) -> None:
        if self.name:
            train = held_out(self.folder, train)
        golds = [str(e.target) for e in train]
        self.mixture = LabelMixture.fit(*self._log_probs(train, resources), golds, resources.task.labels)

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        if self.mixture is None:
            raise ConfigurationError("LabelFrequencies has to be fitted first: call fit with training examples.")
        return Answers(self.mixture.predict(*self._log_probs(examples, resources), resources.task.metric))

    def key(self, resources: Resources) -> dict[str, object]:
        # What says on which questions: the digest of a plug does not cover the settings of its training.
        return Plug(self.name, self.folder).key(resources) | {"fitted_on": _split_of(self.folder)} if self.name else {}

    def about(self, resources: Resources) -> dict[str, object]:
        return Plug(self.name, self.folder).about(resources) if self.name else {}

    def _log_probs(self, examples: Sequence[Example], resources: Resources) -> tuple[Tensor, list[list[str]]]:
        """Return log-probabilities [n, L] of the labels, and the labels in each history."""
        options = resources.task.labels, resources.batch_size, resources.decoding.max_length
        if self.name:
            inputs = Plug(self.name, self.folder).inputs(examples, resources)
            log_probs = plug_label_log_probs(resources.plug(self.folder), inputs, *options)
        else:
            prompts = [e.prompt for e in examples]
            log_probs = label_log_probs(resources.language_model, resources.processor, prompts, *options)
        return log_probs, [history_labels(e, resources.task) for e in examples]


def held_out(plug: str, train: Sequence[Example]) -> Sequence[Example]:
    """Return the questions of the users whom the training of a plug held out, by the settings that its folder keeps.

    A plug knows the answers that it was trained on, so its probabilities look better there than they are, and counts would
    weigh too little.

    Args:
        plug: its folder.
        train: questions of the train split; returned as they are if the folder does not say, or too few were held out to fit on.
    """
    parts = divided(plug, train)
    return train if parts is None or len(parts[1]) < FEWEST else parts[1]


def divided(plug: str, train: Sequence[Example]) -> tuple[list[Example], list[Example]] | None:
    """Return the questions of the users whom a plug was trained on, and of those whom its training held out.

    Args:
        plug: its folder.
        train: all questions of the train split.

    Returns:
        Both, without the users left out; None if the folder does not say.
    """
    if (known := _split_of(plug)) is None:
        return None
    left_out, share, seed = *known[:2], int(known[2])
    rest, _ = split_users(train, left_out, seed)
    return split_users(rest, share, seed + 1, nearest=True)


def _split_of(plug: str) -> Sequence[float] | None:
    """Return how the training of a plug divided the users, `_SPLIT`; None if its folder does not say."""
    settings: object = None
    with suppress(OSError, DataError):
        settings = read_json_object(Path(plug) / TRAIN_SETTINGS, "The settings of the training").get("settings")
    found = [settings.get(name) for name in _SPLIT] if isinstance(settings, Mapping) else []
    numbers = [value for value in found if isinstance(value, float | int)]
    return numbers if len(numbers) == len(_SPLIT) else None


def _features(
    log_probs: Tensor,
    histories_labels: Sequence[Sequence[str]],
    labels: Sequence[str],
    prior: Sequence[float],
    alpha: float,
) -> Tensor:
    """Return what the two weights multiply: log-probability and log-frequency of each label, [n, L, 2] in fp64."""
    if log_probs.shape != (len(histories_labels), len(labels)):
        raise MismatchError(
            f"log_probs must be [{len(histories_labels)}, {len(labels)}] for {len(histories_labels)} histories and "
            f"{len(labels)} labels, got {list(log_probs.shape)}."
        )
    if not log_probs.isfinite().all():
        raise DataError(f"{(~log_probs.isfinite()).sum()} of {log_probs.numel()} log-probabilities are not finite.")
    rows = [[count[label] for label in labels] for count in map(Counter, histories_labels)]
    counts = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(labels))
    smoothed = counts + alpha * torch.tensor(prior, dtype=torch.float64)
    frequency = smoothed / smoothed.sum(dim=1, keepdim=True)  # (count + alpha * prior) / (n + alpha)
    return torch.stack([log_probs.cpu().double(), frequency.log()], dim=-1)


def _minimise(features: Tensor, targets: Tensor) -> tuple[float, list[float]]:
    """Return mean NLL and the weights where it is lowest; it is convex in them. [n, L, 2] and [n]."""
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = F.cross_entropy(features @ weights, targets)
        nll.backward()
        return nll

    with torch.enable_grad():
        optimizer.step(closure)
        return closure().item(), weights.tolist()
