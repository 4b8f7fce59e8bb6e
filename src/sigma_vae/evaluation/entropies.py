"""At a stationary point of a Gaussian VAE the ELBO is a sum of three entropies: a convergence check that costs nothing."""

import math
from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.gathering import each_example
from sigma_vae.likelihoods.distributions import Continuous
from sigma_vae.networks import FlatNetwork
from sigma_vae.priors import StandardNormal
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["entropy_identity"]


@torch.no_grad()
def entropy_identity(vae: VAE, batches: Batches, seed: int = 0) -> dict[str, Any] | None:
    r"""ELBO against the sum of three entropies, on *training* data (Damm et al. 2023, arXiv 2010.14860, theorem 2).

    .. math:: \text{ELBO} = \tfrac1N \sum_n H[q(z|x_n)] - H[p(z)] - \tfrac1N \sum_n H[p(x|z_n)]

    It holds at every stationary point of the objective, without weight decay, on the data that the model was trained on. A gap far
    from 0 says that training has not converged (or that σ does not fit these data).

    Returns:
        ``elbo_nats``, ``entropies_nats`` and ``gap_nats_per_dim`` (their difference for each dimension of the data); None where the
        identity does not speak of the model: no flat latents, a fitted prior, no density, or one (Student's) that is no
        exponential family.
    """
    vae.eval()
    if not _is_spoken_of(vae, batches):
        return None

    def rows(batch: Batch) -> Tensor:
        inference = vae.network.infer(batch.x, noise=keyed_noise(batch.positions, seed))
        distribution = vae.likelihood.post_hoc(inference.h)
        elbo = distribution.log_prob(batch.x).cpu().double() - inference.kl.sum(-1).cpu().double()
        posterior: Tensor = vae.encode(batch.x).entropy().sum(-1)  # type: ignore[no-untyped-call]
        return torch.stack([elbo, (posterior - distribution.entropy()).cpu().double()], 1)

    elbo, entropies = each_example(vae, batches, rows).mean(0).tolist()
    elbo -= batches.log_volume_nats
    prior = 0.5 * vae.flat_network.latent_dim * math.log(2 * math.pi * math.e)
    entropies -= prior + batches.log_volume_nats
    return {
        "elbo_nats": elbo,
        "entropies_nats": entropies,
        "gap_nats_per_dim": (elbo - entropies) / math.prod(batches.store.shape),
    }


def _is_spoken_of(vae: VAE, batches: Batches) -> bool:
    """Flat latents, N(0, I), and a density of an exponential family: what a first batch shows."""
    if not isinstance(vae.network, FlatNetwork) or not isinstance(vae.network.prior, StandardNormal):
        return False
    x = next(iter(batches)).x[:1].to(next(vae.parameters()).device)
    distribution = vae.likelihood.post_hoc(vae.network.infer(x, noise=torch.zeros).h)
    return isinstance(distribution, Continuous) and distribution.law.closed_form
