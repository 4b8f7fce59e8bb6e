"""ELBO against the sum of three entropies: has training converged?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import EvaluationData, Metric, Record, Row, each_example, part
from sigma_vae.registry import register
from sigma_vae.types import Batch, DataDistribution, as_argument
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["EntropyIdentity", "EntropyIdentityMetric", "entropy_identity"]

MOST_EXAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class EntropyIdentity(Record):
    """ELBO, sum of the entropies, and their difference per dimension of the data."""

    elbo_nats: float
    entropies_nats: float
    gap_nats_per_dim: float


@register.metric("entropy_identity")
@final
class EntropyIdentityMetric(Metric):
    """ELBO against the sum of three entropies on training data: a gap means that training has not converged."""

    result = EntropyIdentity
    measured = "always"

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It is about training data."""
        return "it is about training data, and none are given" if data.training is None else None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> EntropyIdentity | None:
        """Over the first 10 000 training examples."""
        assert data.training is not None
        few = len(data.training.store) <= MOST_EXAMPLES
        training = data.training if few else part(data.training, torch.arange(MOST_EXAMPLES))
        return entropy_identity(vae, training, settings.seed)

    def rows(self, result: EntropyIdentity) -> Iterator[Row]:
        """The gap."""
        yield Row("entropy gap, nats/dim", f"{result.gap_nats_per_dim:.4f}")


@torch.no_grad()
def entropy_identity(vae: VAE, batches: Batches, seed: int = 0) -> EntropyIdentity | None:
    r"""Compare the ELBO with the sum of three entropies, on *training* data.

    Damm et al. 2023, arXiv 2010.14860, theorem 2:

    .. math:: \text{ELBO} = \tfrac1N \sum_n H[q(z|x_n)] - H[p(z)] - \tfrac1N \sum_n H[p(x|z_n)]

    The identity holds at every stationary point of the objective, without weight decay, on the data that the model was
    trained on. A gap far from 0 means that training has not converged (or that σ does not fit these data).

    Returns:
        None where the identity does not apply: several layers of latents, a prior other than N(0, I), or a likelihood
        whose density is no exponential family (Student's t) or that has none.
    """
    vae.eval()
    network = vae.network
    if not (network.has_posterior and network.has_prior and network.prior.is_standard):
        return None
    x, _, _, condition = next(iter(batches)).to(vae.device)
    density = vae.likelihood.distribution(network.infer(x, None, None, torch.zeros, *as_argument(condition)).h, refitted=True)
    assert isinstance(density, DataDistribution)
    if not density.exponential_family:
        return None

    def rows(batch: Batch) -> Tensor:
        inference = vae.network.infer(batch.x, None, None, keyed_noise(batch.positions, seed), *as_argument(batch.condition))
        distribution = vae.likelihood.distribution(inference.h, refitted=True)
        elbo = distribution.log_prob(batch.x).cpu().double() - inference.kl.sum(-1).cpu().double()
        posterior: Tensor = vae.encode(batch.x, batch.condition).entropy().flatten(1).sum(-1)  # type: ignore[no-untyped-call]
        return torch.stack([elbo, (posterior - distribution.entropy()).cpu().double()], 1)

    elbo, entropies = each_example(vae, batches, rows).mean(0).tolist()
    elbo -= batches.log_volume_nats
    prior = 0.5 * sum(vae.network.latents.sizes) * math.log(2 * math.pi * math.e)
    entropies -= prior + batches.log_volume_nats
    return EntropyIdentity(elbo, entropies, gap_nats_per_dim=(elbo - entropies) / math.prod(batches.store.shape))
