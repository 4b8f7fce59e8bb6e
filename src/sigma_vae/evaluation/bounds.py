"""The importance-weighted bound, which rises from the ELBO to log p(x) with the number of draws."""

import math
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import Estimate, EvaluationData, Metric, Record, Row, each_example, number_rows
from sigma_vae.registry import register
from sigma_vae.types import Batch, Inference, Likelihood, as_argument
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["Iwae", "IwaeMetric", "Measure", "inferences", "iwae"]

Measure = Literal["iwae_nats", "iwae_post_hoc_nats", "iwae_bits_per_dim", "iwae_bits_per_dim_post_hoc"]
"""The observed quantity in nats, or the bins of the levels in bits; with the model's own σ, or the refitted one."""

FEATURES = 2**18
"""Features decoded together on a CPU, where one draw of the batch has fewer: temporaries should stay in the caches."""
GPU_FEATURES = 2**24
"""The same on a GPU, which needs larger pieces to be busy."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Iwae(Record):
    r"""Importance-weighted bounds of ``draws`` draws, densities in the data's own units.

    ``by_draws`` has the means after ``draws`` 1, 2, 4, ... k, which show whether a bound still rises.
    ``effective_sample_size`` is :math:`(\sum w)^2 / \sum w^2`, between 1 and k, as a mean over examples; near 1, one
    draw has almost all the weight, and more draws would raise the bound.
    """

    examples: int
    draws: int
    noise_seed: int
    iwae_nats: Estimate | None = None
    iwae_post_hoc_nats: Estimate | None = None
    iwae_bits_per_dim: Estimate | None = None
    iwae_bits_per_dim_post_hoc: Estimate | None = None
    effective_sample_size: dict[str, Estimate]
    by_draws: dict[str, list[int] | list[float]]


@register.metric("iwae")
@final
class IwaeMetric(Metric):
    """The importance-weighted bound of many draws per example."""

    result = Iwae

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """Importance weights need p(x|z)."""
        return (
            None if vae.likelihood.normalised else f"{vae.likelihood} is an objective of these data, and gives no probabilities"
        )

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Iwae:
        """With as many draws as the settings say."""
        return iwae(vae, data.held_out, settings.draws, settings.seed)

    def rows(self, result: Iwae) -> Iterator[Row]:
        """The bounds, each with its number of draws."""
        for row in number_rows(result):
            yield row._replace(name=f"{row.name}, {result.draws} draws")


class _Term(NamedTuple):
    """A log p(x|z): of the observed quantity or of the levels' bins; with the own σ or with the refitted one."""

    level: bool
    refitted: bool

    def __call__(self, likelihood: Likelihood, h: Tensor, target: Tensor) -> Tensor:
        if self.level:
            return likelihood.log_mass(h, target, refitted=self.refitted)
        return likelihood.distribution(h, refitted=self.refitted).log_prob(target)


@torch.no_grad()
def iwae(vae: VAE, batches: Batches, draws: int = 64, seed: int = 0, measures: Collection[Measure] | None = None) -> Iwae:
    r"""Compute the importance-weighted bound of k draws (Burda et al. 2016), which rises with k to log p(x).

    .. math::
        \log p(x) \ge E \log \tfrac1k \sum_{i=1}^k w_i, \qquad w_i = \frac{p(x|z_i)\, p(z_i)}{q(z_i|x)}, \quad
        z_i \sim q(z|x), \quad k = \text{draws}

    The first draw of each example is the one from which :func:`~sigma_vae.evaluation.elbo.elbo` computes the ELBO with
    this seed. The weights are summed in float64.

    By default all ``measures`` that the model has are computed; the bins of levels cost several times as much as
    densities. The other arguments are those of :func:`~sigma_vae.evaluation.elbo.elbo`.

    Raises:
        ValueError: the likelihood is an objective, draws is below 1, or the model does not have a measure.

    >>> from sigma_vae import VAE, Fixed, Gaussian, mlp
    >>> from sigma_vae.data import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5), levels=None))
    >>> report = iwae(vae, Batches(InMemory(torch.rand(8, 1, 4, 4)), Scaling(), batch_size=4), draws=5, measures=["iwae_nats"])
    >>> report.by_draws["draws"], 1 <= report.effective_sample_size["iwae_nats"].mean <= 5
    ([1, 2, 4, 5], True)
    """
    if draws < 1:
        raise ValueError(f"draws counts the latents drawn for each example and is at least 1, got {draws}")
    vae.eval()
    terms = _terms(vae.likelihood, measures)
    distinct = list(dict.fromkeys(terms.values()))
    at = sorted({2**i for i in range(draws.bit_length())} | {draws})

    def rows(batch: Batch) -> Tensor:
        bounds, size, dims = _summed_weights(vae, batch, distinct, draws, seed, at)
        return torch.cat([bounds, size[..., None], dims.expand(len(distinct), -1)[..., None]], -1).transpose(0, 1)

    found = each_example(vae, batches, rows)  # (examples, terms, a column for each of `at`, size and dims)
    last: dict[str, Estimate] = {}
    sizes: dict[str, Estimate] = {}
    by_draws: dict[str, list[int] | list[float]] = {"draws": at}
    for measure, term in terms.items():
        values = found[:, distinct.index(term)]
        bounds = values[:, :-2] - batches.log_volume_nats
        if "bits" in measure:
            bounds = -bounds / (values[:, -1:] * math.log(2))
        last[measure] = Estimate.of(bounds[:, -1])
        by_draws[measure] = bounds.mean(0).tolist()
        sizes[measure] = Estimate.of(values[:, -2])
    return Iwae(examples=len(found), draws=draws, noise_seed=seed, **last, effective_sample_size=sizes, by_draws=by_draws)


def _terms(likelihood: Likelihood, measures: Collection[Measure] | None) -> dict[Measure, _Term]:
    """The term of each measure; two measures have one term where the own σ is the refitted one."""
    if not likelihood.normalised:
        raise ValueError(
            f"{likelihood} is an objective, not a likelihood, of these data: importance weights need p(x|z), and without it they"
            " bound nothing; evaluate reports its objective_nats"
        )
    refitted, level = likelihood.has_post_hoc, likelihood.observes == "level"
    known: dict[Measure, _Term] = {"iwae_nats": _Term(level, False), "iwae_post_hoc_nats": _Term(level, refitted)}
    if likelihood.has_mass:
        known |= {"iwae_bits_per_dim": _Term(True, False), "iwae_bits_per_dim_post_hoc": _Term(True, refitted)}
    if measures is None:
        return known
    if not measures or not set(measures) <= set(known):
        why = "" if likelihood.has_mass else " (there are bits only of data with levels)"
        raise ValueError(f"measures of this model are one or more of {', '.join(known)}{why}; got {list(measures)}")
    return {measure: term for measure, term in known.items() if measure in measures}


def _summed_weights(
    vae: VAE, batch: Batch, terms: list[_Term], draws: int, seed: int, at: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds ``(terms, batch, at)``, effective sample sizes ``(terms, batch)``, numbers of values ``(batch,)``."""
    total = squares = torch.full((len(terms), len(batch.x)), -math.inf, dtype=torch.float64)
    bounds, done, dims = [], 0, torch.empty(0)
    for inference in inferences(vae, batch, draws, seed):
        h, target = inference.scored()
        log_weights = [inference.per_example(term(vae.likelihood, h, target)) + inference.log_ratio for term in terms]
        dims = inference.dims().reshape(-1, len(batch.x))[0].cpu().double()
        for each in torch.stack(log_weights).cpu().double().reshape(len(terms), -1, len(batch.x)).unbind(1):
            total, squares, done = torch.logaddexp(total, each), torch.logaddexp(squares, 2 * each), done + 1
            if done in at:
                bounds.append(total - math.log(done))
    return torch.stack(bounds, -1), torch.exp(2 * total - squares), dims


def inferences(vae: VAE, batch: Batch, draws: int, seed: int) -> Iterator[Inference]:
    """Posterior draws of a batch, one after the other; where the network can, many together, encoded once."""
    noise, given = keyed_noise(batch.positions, seed), as_argument(batch.condition)
    if not vae.network.has_draw:
        for _ in range(draws):
            yield vae.network.infer(batch.x, None, batch.mask, noise, *given)
        return
    posterior = vae.network.posterior(batch.x, *given)
    most, together = FEATURES if batch.x.device.type == "cpu" else GPU_FEATURES, 1
    while draws:
        unit = torch.stack([noise(posterior.loc.shape) for _ in range(min(together, draws))]).to(posterior.loc)
        inference = vae.network.draw(batch.x, posterior, unit, *given)
        yield inference
        draws -= len(unit)
        together = max(1, most * len(unit) // inference.h.numel())


def __getattr__(name: str) -> Any:
    if name != "oracle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sigma_vae.evaluation import oracle

    warnings.warn(f"{__name__}.oracle is now {oracle.__name__}.oracle", DeprecationWarning, stacklevel=2)
    return oracle.oracle
