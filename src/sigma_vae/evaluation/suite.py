"""One pass over held-out data: bounds in nats and bits, with their standard errors."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.base import each_example, mean_and_error
from sigma_vae.evaluation.information import active_units
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.distributions import Continuous
from sigma_vae.networks import FlatNetwork
from sigma_vae.priors import StandardNormal
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, Scores, keyed_noise

__all__ = [
    "bounds_of",
    "entropy_identity",
    "evaluate",
    "has_fitted_prior",
    "score",
    "scores_under_standard_prior",
    "standard_prior",
]


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
        distribution = vae.likelihood.distribution(inference.h, refitted=True)
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
    distribution = vae.likelihood.distribution(vae.network.infer(x, noise=torch.zeros).h, refitted=True)
    return isinstance(distribution, Continuous) and distribution.law.closed_form


def score(vae: VAE, batches: Batches, seed: int = 0) -> Scores:
    """Scores of every example, in the split's order and independent of the batch size, on the CPU in float64.

    Densities are those of the data in their own units: of standardised data, smaller than the model's by the Jacobian.

    On several processes each calls this with its share of the split (``Batches(rank, world_size)``), and each gets the scores of all.

    Raises:
        ValueError: the batches are a share, and no group of as many processes is there.
    """

    def rows(batch: Batch) -> Tensor:
        return _columns(vae.score(batch.x, keyed_noise(batch.positions, seed), batch.mask))

    columns = each_example(vae, batches, rows)
    rate, log_likelihood, post_hoc, dims, log_ratio = columns[:, :5].unbind(1)
    masses = vae.likelihood.levels is not None and vae.likelihood.normalised
    return Scores(
        rate=rate,
        log_likelihood=log_likelihood - batches.log_volume_nats,
        log_likelihood_post_hoc=post_hoc - batches.log_volume_nats,
        log_mass=columns[:, 5] if masses else None,
        log_mass_post_hoc=columns[:, 6] if masses else None,
        kl=columns[:, 7 if masses else 5 :],
        dims=dims,
        log_ratio=log_ratio,
    )


def _columns(scores: Scores) -> Tensor:
    """All that is scored ``(batch, columns)`` in float64: five columns, the masses where there are any, the layers' KL."""
    known = [mass for mass in (scores.log_mass, scores.log_mass_post_hoc) if mass is not None]
    single = (scores.rate, scores.log_likelihood, scores.log_likelihood_post_hoc, scores.dims, scores.log_ratio, *known)
    return torch.cat([torch.stack([column.cpu().double() for column in single], 1), scores.kl.cpu().double()], 1)


def evaluate(vae: VAE, test: Batches, training: Batches | None = None, seed: int = 0) -> dict[str, Any]:
    """Single-sample bounds on held-out data, and what explains them.

    Args:
        vae: calibrated on training data; put into eval mode.
        test: every example is counted once.
        training: where given, the entropy identity is checked on it.
        seed: of the posterior's noise, which is keyed by example.

    Returns:
        Plain numbers. ``elbo_nats`` is the bound on what the likelihood ``observes`` (the log-density of the values, or the log-mass of
        their levels: never compare the two) with the model's own σ, ``elbo_post_hoc_nats`` with the σ refitted
        on training data (the same for optimal scales), ``bits_per_dim`` and ``bits_per_dim_post_hoc`` the bound on the log-mass of the
        levels; each a mean over examples with its standard error. ``dims`` counts the values that are scored: of clips, those of the
        predicted frames. An objective that is no likelihood (Bernoulli on grey data) bounds nothing: it has ``objective_nats`` in place
        of ``elbo_nats``, and no bits. Networks with several layers of latents have ``kl_per_layer_nats``, means from the top layer down,
        whose sum is the rate.
    """
    vae.eval()
    scores = score(vae, test, seed)
    report: dict[str, Any] = {
        "examples": len(scores.rate),
        "dims": _number(scores.dims),
        "levels": vae.likelihood.levels,
        "observes": vae.likelihood.observes,
        "noise_seed": seed,
        **bounds_of(vae, scores),
        "distortion_nats": mean_and_error(-scores.log_likelihood),
    }
    if scores.kl.shape[-1] > 1:
        report["kl_per_layer_nats"] = scores.kl.mean(0).tolist()
    report |= _scales(vae)
    if isinstance(vae.network, FlatNetwork):
        report["latent_dim"] = vae.network.latent_dim
        report["active_units"] = active_units(vae, test)
    if training is not None:
        report["entropy_identity"] = entropy_identity(vae, training, seed)
    return report


def bounds_of(vae: VAE, scores: Scores) -> dict[str, Any]:
    """What :func:`evaluate` reports of the scores: the bounds in nats and bits, and the rate."""
    name = "elbo" if vae.likelihood.normalised else "objective"
    report = {
        f"{name}_nats": mean_and_error(scores.log_likelihood - scores.rate),
        f"{name}_post_hoc_nats": mean_and_error(scores.log_likelihood_post_hoc - scores.rate),
        "rate_nats": mean_and_error(scores.rate),
    }
    for name, mass in (("bits_per_dim", scores.log_mass), ("bits_per_dim_post_hoc", scores.log_mass_post_hoc)):
        if mass is not None:
            report[name] = mean_and_error((scores.rate - mass) / (scores.dims * math.log(2)))
    return report


def _number(counts: Tensor) -> float:
    """The count of every example, or of clips of unequal lengths their mean."""
    mean = float(counts.mean())
    return int(mean) if mean.is_integer() else mean


def _scales(vae: VAE) -> dict[str, float]:
    """The refitted σ of each measure, as their geometric mean where there are many."""
    if not isinstance(vae.likelihood, LocationScale):
        return {}
    stored = {"density": vae.likelihood.scale.density_log_scale, "level": vae.likelihood.scale.level_log_scale}
    kind = "factor" if vae.likelihood.scale.predicted else "sigma"
    return {f"{kind}_post_hoc_{name}": float(value.mean().exp()) for name, value in stored.items() if value.numel()}


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
