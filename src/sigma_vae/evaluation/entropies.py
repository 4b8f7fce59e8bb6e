"""At a stationary point of a Gaussian VAE the ELBO is a sum of three entropies: a convergence check that costs nothing."""

import math
from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.likelihoods.distributions import Continuous
from sigma_vae.networks import FlatNetwork
from sigma_vae.priors import StandardNormal
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
    if not isinstance(vae.network, FlatNetwork) or not isinstance(vae.network.prior, StandardNormal):
        return None
    vae.eval()
    elbo = entropies = 0.0
    examples = 0
    device = next(vae.parameters()).device
    for batch in batches:
        x = batch.x.to(device)
        inference = vae.network.infer(x, noise=keyed_noise(batch.positions, seed))
        distribution = vae.likelihood.post_hoc(inference.h)
        if not isinstance(distribution, Continuous) or not distribution.law.closed_form:
            return None
        log_likelihood = distribution.log_prob(x).double()
        elbo += float((log_likelihood - inference.kl.sum(-1)).sum())
        posterior: Tensor = vae.encode(x).entropy().sum(-1).double()  # type: ignore[no-untyped-call]
        entropies += float((posterior - distribution.entropy()).sum())
        examples += len(x)
    prior = 0.5 * vae.network.latent_dim * math.log(2 * math.pi * math.e)
    volume = batches.log_volume_nats
    elbo, entropies = elbo / examples - volume, entropies / examples - prior - volume
    return {
        "elbo_nats": elbo,
        "entropies_nats": entropies,
        "gap_nats_per_dim": (elbo - entropies) / math.prod(batches.store.shape),
    }
