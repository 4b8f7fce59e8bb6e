"""The generative classifier of a model that is given classes: Bayes' rule on its bounds."""

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

MOST_CLASSES = 100
"""Classes of all labels beyond which the metric is not measured: each takes a pass over the data."""
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
    """Accuracy and calibration of the generative classifier, for models that are given class labels.

    Of several labels each is classified apart, with the other conditions at the example's own values.
    """

    result = Classification | dict[str, Classification]
    measured = "by default"
    on_one_process = True
    columns = (
        Column("classifier.accuracy", "accuracy of the generative classifier", 4),
        Column("classifier.calibration_error", "its calibration error", 4),
        Column("classifier.*.accuracy", "accuracy of the generative classifier of {}", 4),
        Column("classifier.*.calibration_error", "calibration error of the classifier of {}", 4),
    )

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs class labels, of the held-out examples too."""
        labels = labels_of(vae)
        if not labels:
            return "it is about models that are given a class label"
        if data.held_out.store.conditions is None:
            return "the examples have no labels"
        if (count := sum(len(label.classes or ()) for label in labels)) > MOST_CLASSES:
            return f"each class takes a pass over the data, and there are {count}, more than {MOST_CLASSES}"
        return None

    def measure(
        self, vae: VAE, data: EvaluationData, settings: EvaluationSettings
    ) -> Classification | dict[str, Classification] | None:
        """One pass over the held-out examples for each class, and one over the validation split."""
        found = {label.name: _measured(vae, label, data, settings) for label in labels_of(vae)}
        known = {name: each for name, each in found.items() if each is not None}
        return known or None if len(found) > 1 else next(iter(known.values()), None)

    def rows(self, result: Classification | dict[str, Classification]) -> Iterator[Row]:
        """All numbers."""
        for name, each in _by_label(result):
            yield from number_rows(each, f" ({name or 'classifier'})")

    def notes(self, result: Classification | dict[str, Classification], report: Mapping[str, Any]) -> Iterator[str]:
        """Say what the classifier is."""
        for name, each in _by_label(result):
            of = f" of {name}, given the other conditions," if name else ""
            yield (
                f"The classifier{of} picks the class with the largest p(c) p(x|c), by bounds on p(x|c); always guessing the"
                f" commonest of {each.classes} classes is right for {each.majority_share:.1%}."
            )


def _by_label(result: Classification | dict[str, Classification]) -> list[tuple[str, Classification]]:
    """Results with the name of their label; a single one has none."""
    return [("", result)] if isinstance(result, Classification) else list(result.items())


def _measured(vae: VAE, label: Variable, data: EvaluationData, settings: EvaluationSettings) -> Classification | None:
    bounds, classes = _known(*class_bounds(vae, data.held_out, settings.seed, label.name))
    if not len(classes):
        return None
    temperature = _temperature(vae, label, data, settings)
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


def labels_of(vae: VAE) -> list[Variable]:
    """The class labels that a model is given."""
    conditions = vae.network.conditions
    return [] if conditions is None else [each for each in conditions.variables if each.classes is not None]


def class_bounds(vae: VAE, batches: Batches, seed: int = 0, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Bounds on log p(x|c) for every class c, from the same noise, and the examples' own classes, NaN where unknown.

    Where the model is given more than the label ``name``, the others have the examples' own values. Bounds are those of the
    levels' probabilities where the data have levels, else those of densities, with the refitted σ.

    Shapes:
        bounds ``(examples, classes)`` in nats, classes ``(examples,)``, both in float64.

    Raises:
        ValueError: there is no such class label, or no name and not one label alone.
    """
    conditions, label = vae.network.conditions, _label(vae, name)
    assert conditions is not None
    place, count = conditions.names.index(label.name), len(label.classes or ())
    here = torch.arange(len(conditions.names)) == place
    vae.eval()

    def rows(batch: Batch) -> Tensor:
        own = batch.x.new_full((len(batch.x), len(here)), math.nan) if batch.condition is None else batch.condition
        bounds = [_bound(vae, batch, torch.where(here.to(own.device), number, own), seed) for number in range(count)]
        return torch.stack([*bounds, own[:, place].double()], 1)

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


def _temperature(vae: VAE, label: Variable, data: EvaluationData, settings: EvaluationSettings) -> float | None:
    """The best temperature on the validation split, where there is one that is not what is measured on."""
    if data.splits is None or settings.split == "validation":
        return None
    validation = data.splits.batches("validation", evaluation_batch(data.splits), device=vae.device)
    bounds, classes = _known(*class_bounds(vae, validation, settings.seed, label.name))
    return best_temperature(bounds, classes, label) if len(classes) else None


def _label(vae: VAE, name: str | None) -> Variable:
    found = [label for label in labels_of(vae) if name in (None, label.name)]
    if len(found) != 1:
        have = ", ".join(label.name for label in labels_of(vae)) or "none"
        raise ValueError(f"a generative classifier is of one class label, got {name or 'no name'}; the model is given: {have}")
    return found[0]


def _known(bounds: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    known = ~classes.isnan()
    return bounds[known], classes[known].long()


def _log_loss(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    return -log_probabilities.gather(1, classes[:, None])[:, 0]
