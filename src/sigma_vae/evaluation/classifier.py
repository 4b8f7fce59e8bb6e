"""The generative classifier of a model that is given a class: Bayes' rule on its bounds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sigma_vae.conditions import Variable
from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import (
    Column,
    Estimate,
    EvaluationData,
    Metric,
    Record,
    Row,
    each_example,
    evaluation_batch,
    number_rows,
)
from sigma_vae.registry import register
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, keyed_noise

__all__ = [
    "MOST_CLASSES",
    "Classification",
    "ClassifierMetric",
    "best_temperature",
    "calibration_error",
    "class_bounds",
    "log_probabilities",
]

MOST_CLASSES = 100
"""Classes beyond which the metric is not measured: each takes a pass over the data."""
BINS = 15
"""Bins of the calibration error, as usual."""
COLDEST, HOTTEST = 1e-2, 1e5
STEPS = 80


@dataclass(frozen=True, eq=False, kw_only=True)
class Classification(Record):
    """Accuracy and log-loss of p(c|x) ∝ p(c) p(x|c) on held-out examples, with bounds in place of p(x|c).

    ``majority_share`` is the accuracy of the commonest class. ``log_loss_nats`` is the mean of −log p(c|x) of the true
    class; ``calibration_error`` the expected calibration error of the largest probability, in 15 bins. Both are with
    bounds divided by the ``temperature`` that is best on the validation split; the numbers at temperature 1 are beside
    them, and alone where there is no validation split.
    """

    accuracy: Estimate
    majority_share: float
    log_loss_nats: Estimate | None = None
    calibration_error: float | None = None
    temperature: float | None = None
    log_loss_at_1_nats: Estimate
    calibration_error_at_1: float
    classes: int
    examples: int


@register.metric("classifier")
@final
class ClassifierMetric(Metric):
    """Accuracy and calibration of the generative classifier, for models that are given a class label."""

    result = Classification
    measured = "by default"
    on_one_process = True
    columns = (
        Column("classifier.accuracy", "accuracy of the generative classifier", 4),
        Column("classifier.calibration_error", "its calibration error", 4),
    )

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs one class label, of the held-out examples too."""
        label = None if vae.network.conditions is None else vae.network.conditions.only_classes
        if label is None or label.classes is None:
            return "it is about models that are given one class label and nothing else"
        if data.held_out.store.conditions is None:
            return "the examples have no labels"
        if len(label.classes) > MOST_CLASSES:
            return f"each class takes a pass over the data, and there are {len(label.classes)}, more than {MOST_CLASSES}"
        return None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Classification | None:
        """One pass over the held-out examples for each class, and one over the validation split."""
        label = _label(vae)
        bounds, classes = _known(*class_bounds(vae, data.held_out, settings.seed))
        if not len(classes):
            return None
        temperature = _temperature(vae, data, settings)
        cold = log_probabilities(bounds, label)
        found: dict[str, Any] = {}
        if temperature is not None:
            calibrated = log_probabilities(bounds, label, temperature)
            found = {
                "log_loss_nats": Estimate.of(_log_loss(calibrated, classes)),
                "calibration_error": calibration_error(calibrated, classes),
                "temperature": temperature,
            }
        return Classification(
            accuracy=Estimate.of((cold.argmax(1) == classes).double()),
            majority_share=float((classes == classes.mode().values).double().mean()),
            log_loss_at_1_nats=Estimate.of(_log_loss(cold, classes)),
            calibration_error_at_1=calibration_error(cold, classes),
            classes=bounds.shape[1],
            examples=len(classes),
            **found,
        )

    def rows(self, result: Classification) -> Iterator[Row]:
        """All numbers."""
        yield from number_rows(result, " (classifier)")

    def notes(self, result: Classification, report: Mapping[str, Any]) -> Iterator[str]:
        """Say what the classifier is."""
        yield (
            f"The classifier picks the class with the largest p(c) p(x|c), by bounds on p(x|c); always guessing the commonest of"
            f" {result.classes} classes is right for {result.majority_share:.1%}."
        )


def class_bounds(vae: VAE, batches: Batches, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bounds on log p(x|c) for every class c, from the same noise, and the examples' own classes, NaN where unknown.

    Bounds are those of the levels' probabilities where the data have levels, else those of densities, with the refitted σ.

    Shapes:
        bounds ``(examples, classes)`` in nats, classes ``(examples,)``, both in float64.
    """
    label = _label(vae)
    count = len(label.classes or ())
    vae.eval()

    def rows(batch: Batch) -> Tensor:
        own = batch.x.new_full((len(batch.x), 1), math.nan) if batch.condition is None else batch.condition
        bounds = [_bound(vae, batch, torch.full_like(own, number), seed) for number in range(count)]
        return torch.stack([*bounds, own[:, 0].double()], 1)

    found = each_example(vae, batches, rows)
    return found[:, :-1], found[:, -1]


def _bound(vae: VAE, batch: Batch, condition: Tensor, seed: int) -> Tensor:
    scores = vae.score(batch.x, keyed_noise(batch.positions, seed), batch.mask, condition)
    fit = scores.log_likelihood_post_hoc if scores.log_mass_post_hoc is None else scores.log_mass_post_hoc
    return fit.double() - scores.rate.double()


def log_probabilities(bounds: Tensor, label: Variable, temperature: float = 1.0) -> Tensor:
    r"""Log-probabilities of the classes, ``(examples, classes)``, by Bayes' rule.

    .. math:: \log p(c|x) = \log p(c) + \tfrac1T \log p(x|c) + \text{const}

    with the classes' frequencies p(c) in the training data, and a temperature T for bounds whose differences are too sure.

    >>> label = Variable("label", ("a", "b"), frequencies=(0.25, 0.75))
    >>> log_probabilities(torch.tensor([[0.0, 0.0]]), label).exp()
    tensor([[0.2500, 0.7500]])
    """
    count = bounds.shape[1]
    shares = torch.tensor(label.frequencies or (1 / count,) * count, dtype=torch.float64)
    return (bounds / temperature + shares.log().to(bounds)).log_softmax(1)


def best_temperature(bounds: Tensor, classes: Tensor, label: Variable) -> float:
    """The temperature with the least mean −log p(c|x) of these examples, by a golden-section search of its logarithm."""

    def loss(log_temperature: float) -> float:
        return float(_log_loss(log_probabilities(bounds, label, math.exp(log_temperature)), classes).mean())

    low, high, ratio = math.log(COLDEST), math.log(HOTTEST), (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(log_probabilities: Tensor, classes: Tensor, bins: int = BINS) -> float:
    r"""Expected calibration error of the largest probability (Guo et al. 2017, arXiv 1706.04599).

    .. math:: \sum_b \frac{n_b}{n} \left| \text{accuracy}_b - \text{confidence}_b \right|

    over bins of equal width of the largest probability.

    >>> sure = torch.tensor([[0.8, 0.2]] * 5, dtype=torch.float64).log()
    >>> round(calibration_error(sure, torch.tensor([0, 0, 0, 0, 1])), 12)
    0.0
    """
    sureness, chosen = log_probabilities.exp().max(1)
    place = (sureness * bins).long().clamp(max=bins - 1)
    gaps = (chosen == classes).double() - sureness.double()
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gaps).abs().sum() / len(classes))


def _temperature(vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> float | None:
    """The best temperature on the validation split, where there is one that is not what is measured on."""
    if data.splits is None or settings.split == "validation":
        return None
    validation = data.splits.batches("validation", evaluation_batch(data.splits), device=vae.device)
    bounds, classes = _known(*class_bounds(vae, validation, settings.seed))
    return best_temperature(bounds, classes, _label(vae)) if len(classes) else None


def _label(vae: VAE) -> Variable:
    label = None if vae.network.conditions is None else vae.network.conditions.only_classes
    if label is None:
        raise ValueError("a generative classifier needs a model that is given one class label and nothing else")
    return label


def _known(bounds: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    known = ~classes.isnan()
    return bounds[known], classes[known].long()


def _log_loss(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    return -log_probabilities.gather(1, classes[:, None])[:, 0]
