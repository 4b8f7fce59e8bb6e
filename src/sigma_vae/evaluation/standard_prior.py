"""The same model with N(0, I) in place of its fitted prior: what the fitted one is worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sigma_vae.data import Batches
from sigma_vae.evaluation.suite import bounds_of, score
from sigma_vae.networks import FlatNetwork
from sigma_vae.priors import StandardNormal
from sigma_vae.vae import VAE

__all__ = ["has_fitted_prior", "scores_under_standard_prior", "standard_prior"]


def has_fitted_prior(vae: VAE) -> bool:
    """Whether its latents are flat and have another prior than N(0, I)."""
    return isinstance(vae.network, FlatNetwork) and not isinstance(vae.network.prior, StandardNormal)


@contextmanager
def standard_prior(vae: VAE) -> Iterator[None]:
    """Give the model N(0, I) for a while; a model that has no other is left as it is."""
    if not has_fitted_prior(vae):
        yield
        return
    network = vae.flat_network
    fitted = network.prior
    network.prior = StandardNormal(network.latent_dim).to(next(vae.parameters()))
    try:
        yield
    finally:
        network.prior = fitted


@torch.no_grad()
def scores_under_standard_prior(vae: VAE, test: Batches, seed: int = 0) -> dict[str, Any]:
    """Bounds on held-out data with N(0, I), from the posterior draws that :func:`evaluate` takes with this seed.

    Returns:
        ``elbo_nats``, ``elbo_post_hoc_nats``, ``rate_nats``, ``bits_per_dim`` and ``bits_per_dim_post_hoc`` as :func:`evaluate` has
        them, each a mean over examples with its standard error; ``objective_nats`` in place of ``elbo_nats``, and no bits, where the
        likelihood is none.
    """
    vae.eval()
    with standard_prior(vae):
        return bounds_of(vae, score(vae, test, seed))
