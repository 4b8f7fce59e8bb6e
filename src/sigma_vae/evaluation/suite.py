"""One pass over held-out data: bounds in nats and bits, with their standard errors."""

import math
from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.entropies import entropy_identity
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import FlatNetwork
from sigma_vae.vae import VAE, Scores, keyed_noise

__all__ = ["ACTIVE_VARIANCE", "evaluate", "score"]

ACTIVE_VARIANCE = 0.01
"""A latent is active where its posterior mean varies more than this over the data (Burda et al. 2016)."""


@torch.no_grad()
def score(vae: VAE, batches: Batches, seed: int = 0) -> Scores:
    """Scores of every example, in the data's order and independent of the batch size, on the CPU in float64.

    Densities are those of the data in their own units: of standardised data, smaller than the model's by the Jacobian.
    """
    device = next(vae.parameters()).device
    parts = [
        vae.score(batch.x.to(device), keyed_noise(batch.positions, seed), None if batch.mask is None else batch.mask.to(device))
        for batch in batches
    ]

    def gather(values: list[Tensor]) -> Tensor:
        return torch.cat(values).cpu().double()

    def gather_known(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return gather(known) if known else None

    log_volume = batches.log_volume_nats
    return Scores(
        rate=gather([part.rate for part in parts]),
        log_likelihood=gather([part.log_likelihood for part in parts]) - log_volume,
        log_likelihood_post_hoc=gather([part.log_likelihood_post_hoc for part in parts]) - log_volume,
        log_mass=gather_known([part.log_mass for part in parts]),
        log_mass_post_hoc=gather_known([part.log_mass_post_hoc for part in parts]),
        kl=gather([part.kl for part in parts]),
        dims=gather([part.dims for part in parts]),
    )


@torch.no_grad()
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
    name = "elbo" if vae.likelihood.normalised else "objective"
    report: dict[str, Any] = {
        "examples": len(scores.rate),
        "dims": _number(scores.dims),
        "levels": vae.likelihood.levels,
        "observes": vae.likelihood.observes,
        "noise_seed": seed,
        f"{name}_nats": _mean(scores.log_likelihood - scores.rate),
        f"{name}_post_hoc_nats": _mean(scores.log_likelihood_post_hoc - scores.rate),
        "rate_nats": _mean(scores.rate),
        "distortion_nats": _mean(-scores.log_likelihood),
    }
    if scores.kl.shape[-1] > 1:
        report["kl_per_layer_nats"] = scores.kl.flatten(0, -2).mean(0).tolist()
    for name, mass in (("bits_per_dim", scores.log_mass), ("bits_per_dim_post_hoc", scores.log_mass_post_hoc)):
        if mass is not None:
            report[name] = _mean((scores.rate - mass) / (scores.dims * math.log(2)))
    report |= _scales(vae)
    if isinstance(vae.network, FlatNetwork):
        report["latent_dim"] = vae.network.latent_dim
        report["active_units"] = _active_units(vae, test)
    if training is not None:
        report["entropy_identity"] = entropy_identity(vae, training, seed)
    return report


def _mean(values: Tensor) -> dict[str, float | None]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


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


def _active_units(vae: VAE, batches: Batches) -> int:
    device = next(vae.parameters()).device
    means = torch.cat([vae.encode(batch.x.to(device)).loc.cpu().double() for batch in batches])
    return int((means.var(0, correction=0) > ACTIVE_VARIANCE).sum())
