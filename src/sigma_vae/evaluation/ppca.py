"""Likelihood of the data under the best linear model, probabilistic PCA: a bound that every VAE should exceed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

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
    estimate_rows,
    part,
)
from sigma_vae.networks.principal import principal, sample_of
from sigma_vae.registry import register
from sigma_vae.vae import VAE

__all__ = ["LinearBound", "PpcaMetric", "ppca"]

MOST_COMPONENTS = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearBound(Record):
    """Log-likelihood of held-out data under probabilistic PCA, which was fitted to training data.

    ``log_likelihood_nats`` is of the values, in the data's own units: it stands beside an ELBO of densities.
    ``bits_per_dim`` is of levels: it stands beside a VAE's bits per dimension. ``components`` counts the linear latents.
    """

    log_likelihood_nats: Estimate
    bits_per_dim: Estimate | None = None
    components: int
    training_examples: int


@register.metric("ppca")
@final
class PpcaMetric(Metric):
    """Likelihood under probabilistic PCA, the best linear VAE: a network that stays below it is under-trained."""

    result = LinearBound
    measured = "always"
    on_one_process = True
    columns = (
        Column("ppca.bits_per_dim", "bits/dim of probabilistic PCA", 4),
        Column("ppca.log_likelihood_nats", "log-likelihood of probabilistic PCA, nats", 1),
    )

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs whole training examples of one shape."""
        if data.training is None:
            return "it is fitted to training data, and none are given"
        if vae.network.reads_clips:
            return "it models examples of one shape, and these are clips"
        if data.training.scaling.counts:
            return "it models real values, and these are counts"
        if data.held_out.scaling.schema is not None:
            return "it models real values, and these rows have columns of all types"
        return "it is fitted to several training examples, and there is one" if len(data.training.store) < 2 else None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> LinearBound | None:
        """With as many components as the model has latents, at most 256."""
        assert data.training is not None
        return ppca(vae, data.training, data.held_out, min(sum(vae.network.latents.sizes), MOST_COMPONENTS))

    def rows(self, result: LinearBound) -> Iterator[Row]:
        """The likelihood, in nats and in bits."""
        yield from estimate_rows(result, f" (pPCA, {result.components} latents)")

    def notes(self, result: LinearBound, report: Mapping[str, Any]) -> Iterator[str]:
        """Say so where the model is behind."""
        elbo, bits = report.get("elbo_post_hoc_nats"), report.get("bits_per_dim_post_hoc")
        if report["observes"] == "density" and elbo is not None:
            behind = result.log_likelihood_nats.mean - elbo.mean
        elif result.bits_per_dim is not None and bits is not None:
            behind = (bits.mean - result.bits_per_dim.mean) * report["dims"] * math.log(2)
        else:
            return
        if behind > 0:
            yield (
                f"The model is {behind:.1f} nats per example behind a linear one (probabilistic PCA with {result.components} latents):"
                " it is under-trained. Train it for longer: more --epochs."
            )


def ppca(vae: VAE, training: Batches, held_out: Batches, components: int) -> LinearBound | None:
    r"""Fit probabilistic PCA to training data, and compute the likelihood of held-out data.

    Of levels at a distance Δ, the bound is that of uniform dequantisation (Theis et al. 2016, arXiv 1511.01844),
    :math:`\log P(x) \ge \mathbb{E}_u \log p(x + u) + D \log Δ` with u uniform in ±Δ/2: for a Gaussian, its expectation
    is :math:`\log p(x) - \tfrac12 \operatorname{tr}(C^{-1}) Δ^2/12`.

    Args:
        vae: names the device, and the levels.
        training: at most 12 000 of its examples are used, and at most half a billion of its values.
        held_out: examples to score.
        components: number of linear latents; fewer where the data have fewer dimensions or examples.

    Returns:
        None where the training data have no variance.
    """
    few = part(training, sample_of(len(training.store), training.store.shape).sort().values)
    fitted = principal(lambda: (batch.x.cpu() for batch in few), components)
    if fitted is None:
        return None
    dims, levels = len(fitted.mean), vae.likelihood.levels
    values = each_example(vae, held_out, lambda batch: fitted.log_prob(batch.x.cpu())) - held_out.log_volume_nats
    bits = None
    if levels is not None:
        distance = 1 / (levels - 1)
        noise = distance**2 / 12
        wide = fitted.widened(noise)
        masses = each_example(vae, held_out, lambda batch: wide.log_prob(batch.x.cpu()))
        masses = masses - 0.5 * noise * wide.trace_of_precision + dims * math.log(distance)
        bits = Estimate.of(-masses / (dims * math.log(2)))
    return LinearBound(
        log_likelihood_nats=Estimate.of(values),
        bits_per_dim=bits,
        components=len(fitted.variances),
        training_examples=len(few.store),
    )
