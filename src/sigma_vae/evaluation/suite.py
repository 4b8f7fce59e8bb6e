"""One pass over held-out data: bounds in nats and bits, with their standard errors."""

import math
from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.entropies import entropy_identity
from sigma_vae.evaluation.gathering import each_example
from sigma_vae.evaluation.information import active_units
from sigma_vae.evaluation.summary import mean_and_error
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import FlatNetwork
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, Scores, keyed_noise

__all__ = ["bounds_of", "evaluate", "score"]


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
