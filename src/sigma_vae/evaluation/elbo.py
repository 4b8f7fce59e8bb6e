"""The single-sample bound (ELBO) in nats and in bits, and the numbers that explain it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import (
    Column,
    Estimate,
    EvaluationData,
    Metric,
    Record,
    Row,
    Watcher,
    each_example,
    estimate_rows,
)
from sigma_vae.evaluation.information import active
from sigma_vae.priors import StandardNormal
from sigma_vae.registry import register
from sigma_vae.types import Batch, Likelihood, as_argument
from sigma_vae.vae import VAE, Scores, has_fitted_prior, keyed_noise, standard_prior

OVERFITTING = 1.1
"""Ratio of σ of held-out data to σ of training data above which an evaluation speaks of overfitting."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Bounds(Record):
    """Bounds on held-out data.

    ``elbo_nats`` bounds the quantity that the likelihood ``observes`` (the log-density of the values, or the
    log-probability of their levels' bins: never compare the two) with the model's own σ. ``elbo_post_hoc_nats`` uses
    the σ refitted on validation data (the same for optimal scales). ``bits_per_dim`` and ``bits_per_dim_post_hoc`` bound
    the log-probability of the bins. An objective that is no likelihood (Bernoulli on grey data) bounds nothing: it has
    ``objective_nats`` in place of ``elbo_nats``, and no bits.
    """

    elbo_nats: Estimate | None = None
    elbo_post_hoc_nats: Estimate | None = None
    objective_nats: Estimate | None = None
    objective_post_hoc_nats: Estimate | None = None
    rate_nats: Estimate
    bits_per_dim: Estimate | None = None
    bits_per_dim_post_hoc: Estimate | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ElboResult(Bounds):
    """Bounds on held-out data, and the numbers that explain them.

    ``dims`` counts the values that are scored: for clips, those of the predicted frames, averaged over clips of unequal
    lengths. ``kl_per_layer_nats`` has the mean KL of each layer, from the top down; its sum is the rate.
    ``sigma_post_hoc_...`` is the refitted σ, as a geometric mean where there are many; ``factor_post_hoc_...`` the
    factor on predicted σ. ``sigma_on_floor_share`` is the share of refitted σ that lie on the floor ``sigma_floor``;
    both are left out where none does. ``condition`` has the names of what the model is given: bounds are then on log p(x|c).
    ``standard_prior`` has the bounds with N(0, I), from the same posterior draws, where the
    prior is a fitted one.
    """

    examples: int
    dims: int | float
    levels: int | None
    observes: str
    noise_seed: int
    distortion_nats: Estimate
    kl_per_layer_nats: list[float] | None = None
    sigma_post_hoc_density: float | None = None
    sigma_post_hoc_level: float | None = None
    factor_post_hoc_density: float | None = None
    factor_post_hoc_level: float | None = None
    sigma_floor: float | None = None
    sigma_on_floor_share: float | None = None
    latent_dim: int | None = None
    active_units: int | None = None
    standard_prior: Bounds | None = None
    condition: list[str] | None = None


@register.metric("elbo")
@final
class ElboMetric(Metric):
    """The single-sample bound (ELBO) in nats and in bits per dimension, with its rate and distortion."""

    result = ElboResult
    measured = "always"
    columns = (
        Column("bits_per_dim_post_hoc", "bits/dim, refitted σ", 4),
        Column("elbo_post_hoc_nats", "ELBO, nats, refitted σ", 1),
        Column("rate_nats", "rate, nats", 2),
    )

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> ElboResult:
        """Two passes over the held-out examples, one of them through the encoder alone."""
        return elbo(vae, data.held_out, settings.seed, data.scores)

    def rows(self, result: ElboResult) -> Iterator[Row]:
        """The bounds, the refitted σ, the latents."""
        yield from estimate_rows(result)
        if result.standard_prior is not None:
            yield from estimate_rows(result.standard_prior, " with N(0, I)")
        for name, value in result.items():
            if name.startswith(("sigma_post_hoc", "factor_post_hoc")):
                yield Row(name, f"{value:.5f}")
        if result.kl_per_layer_nats is not None:
            yield Row("kl_per_layer_nats", " ".join(f"{nats:.2f}" for nats in result.kl_per_layer_nats))
        if result.active_units is not None:
            yield Row("active_units", f"{result.active_units} of {result.latent_dim}")

    def notes(self, result: ElboResult, report: Mapping[str, Any]) -> Iterator[str]:
        """Say what is given, how far σ of validation data is from that of training data, and which σ lie on their floor."""
        if result.condition is not None:
            yield f"The model is given {', '.join(result.condition)}: bounds are on log p(x | {', '.join(result.condition)})."
        known = (report.get("sigma_fitted_on") or {}).get("training_sigma", {}).get("density")
        if known and result.sigma_post_hoc_density and (ratio := result.sigma_post_hoc_density / known) > OVERFITTING:
            yield (
                f"Residuals of held-out data are {ratio:.2f} times those of training data (by σ): the model overfits. What is reported"
                " uses the σ of held-out data. More data, a smaller network or weight decay may help."
            )
        if result.sigma_on_floor_share is not None:
            values = result.sigma_on_floor_share * result.dims
            yield (
                f"{result.sigma_on_floor_share:.1%} of σ lie on the floor, {result.sigma_floor:.3g}: these values are predicted"
                f" exactly, and their density has no upper bound. Half the floor (--scale-floor) would add up to"
                f" {values * math.log(2):.1f} nats to an ELBO of densities, so compare bits per dimension."
            )

    def compared(self, results: Sequence[ElboResult]) -> list[dict[str, Any]]:
        """Bits compare between all decoders; nats only where all runs observe the same quantity."""
        same_quantity = len({result.observes for result in results}) == 1
        return [
            {
                "bits_per_dim_post_hoc": result.bits_per_dim_post_hoc,
                "elbo_post_hoc_nats": result.elbo_post_hoc_nats if same_quantity else None,
                "rate_nats": result.rate_nats,
            }
            for result in results
        ]


@torch.no_grad()
def elbo(vae: VAE, batches: Batches, seed: int = 0, scores: Scores | None = None) -> ElboResult:
    """Compute single-sample bounds on held-out data, and the numbers that explain them.

    The model, calibrated on training data, is put into eval mode. Of several processes, each gives its share of the
    examples. The seed is that of the posterior's noise, which is keyed by example; ``scores`` are those of this seed,
    where they are known.
    """
    vae.eval()
    scores, latents = score(vae, batches, seed) if scores is None else scores, vae.network.latents
    encoded = _encoded(vae, batches) if vae.network.has_posterior else None
    kind = "factor_post_hoc" if vae.likelihood.predicts_scale else "sigma_post_hoc"
    refitted: dict[str, Any] = {f"{kind}_{name}": value for name, value in refitted_scales(vae.likelihood).items()}
    dims = float(scores.dims.mean())  # all equal, but for clips of unequal lengths
    return ElboResult(
        **_bounds(vae, scores),
        examples=len(scores.rate),
        dims=int(dims) if dims.is_integer() else dims,
        levels=vae.likelihood.levels,
        observes=vae.likelihood.observes,
        noise_seed=seed,
        distortion_nats=Estimate.of(-scores.log_likelihood),
        kl_per_layer_nats=scores.kl.mean(0).tolist() if scores.kl.shape[-1] > 1 else None,
        **_on_floor(vae.likelihood),
        latent_dim=sum(latents.sizes) if vae.network.has_posterior else None,
        active_units=None if encoded is None else active(encoded[:, 1:]),
        **refitted,
        condition=None if vae.network.conditions is None else list(vae.network.conditions.names),
        standard_prior=None if encoded is None else _under_standard_prior(vae, scores, encoded[:, 0]),
    )


def _encoded(vae: VAE, batches: Batches) -> Tensor:
    """KL of each example's posterior from N(0, I), and its means, ``(examples, 1 + latents)``."""

    def rows(batch: Batch) -> Tensor:
        posterior = vae.encode(batch.x, batch.condition)
        mean, std = posterior.loc.flatten(1), posterior.scale.flatten(1)
        kl = StandardNormal(mean.shape[1]).kl(Normal(mean, std, validate_args=False), mean)
        return torch.cat([kl[:, None], mean], 1)

    return each_example(vae, batches, rows)


def _under_standard_prior(vae: VAE, scores: Scores, kl: Tensor) -> Bounds | None:
    """The bounds of the same draws with this KL from N(0, I), where the prior is a fitted one."""
    return Bounds(**_bounds(vae, scores._replace(rate=kl))) if has_fitted_prior(vae) else None


def score(vae: VAE, batches: Batches, seed: int = 0) -> Scores:
    """Score every example, in the split's order and independent of the batch size, on the CPU in float64.

    See :func:`sigma_vae.evaluation.score`, which takes data of any kind.
    """
    return score_watched(vae, batches, seed)[0]


def score_watched(vae: VAE, batches: Batches, seed: int, watchers: Sequence[Watcher] = ()) -> tuple[Scores, list[Any]]:
    """Score every example, and let watchers measure in the same pass: the scores, and the watchers' results."""
    widths: list[int] = []

    def rows(batch: Batch) -> Tensor:
        noise = keyed_noise(batch.positions, seed)
        inference = vae.network.infer(batch.x, None, batch.mask, noise, *as_argument(batch.condition))
        parts = [_columns(vae.scores_of(inference)), *(each.rows(inference, noise) for each in watchers)]
        widths[:] = [part.shape[1] for part in parts]
        return torch.cat([part.cpu().double() for part in parts], 1)

    found = each_example(vae, batches, rows)
    columns, *watched = torch.split(found, widths, 1)
    results = [each.result(vae, batches, part) for each, part in zip(watchers, watched, strict=True)]
    return _scores(vae, batches, columns), results


def _columns(scores: Scores) -> Tensor:
    columns = [scores.rate, scores.log_likelihood, scores.log_likelihood_post_hoc, scores.dims, scores.log_ratio]
    columns += [mass for mass in (scores.log_mass, scores.log_mass_post_hoc) if mass is not None]
    return torch.cat([torch.stack([each.cpu().double() for each in columns], 1), scores.kl.cpu().double()], 1)


def _scores(vae: VAE, batches: Batches, columns: Tensor) -> Scores:
    """Scores in the data's own units, from the columns of all examples."""
    masses = vae.likelihood.has_mass
    rate, log_likelihood, post_hoc, dims, log_ratio = columns[:, :5].unbind(1)
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


def _bounds(vae: VAE, scores: Scores) -> dict[str, Any]:
    """Fields of :class:`Bounds`."""
    name = "elbo" if vae.likelihood.normalised else "objective"
    found = {
        f"{name}_nats": Estimate.of(scores.log_likelihood - scores.rate),
        f"{name}_post_hoc_nats": Estimate.of(scores.log_likelihood_post_hoc - scores.rate),
        "rate_nats": Estimate.of(scores.rate),
    }
    for name, mass in (("bits_per_dim", scores.log_mass), ("bits_per_dim_post_hoc", scores.log_mass_post_hoc)):
        if mass is not None:
            found[name] = Estimate.of((scores.rate - mass) / (scores.dims * math.log(2)))
    return found


def refitted_scales(likelihood: Likelihood) -> dict[str, float]:
    """The refitted σ (or factor on predicted σ) for density and levels; the geometric mean where there are many."""
    return {name: float(value.mean().exp()) for name, value in likelihood.refitted_log_scales().items()}


def _on_floor(likelihood: Likelihood) -> dict[str, Any]:
    """Floor of σ, and the share of σ for densities that lie on it; nothing where none does."""
    found = likelihood.refitted_log_scales().get("density")
    if found is None or not bool((on_floor := found <= likelihood.log_floor + 1e-4).any()):
        return {}
    return {"sigma_floor": math.exp(likelihood.log_floor), "sigma_on_floor_share": float(on_floor.double().mean())}


@torch.no_grad()
def scores_under_standard_prior(vae: VAE, batches: Batches, seed: int = 0) -> Bounds:
    """Compute bounds on held-out data with N(0, I), from the posterior draws that :func:`elbo` takes with this seed."""
    vae.eval()
    with standard_prior(vae):
        return Bounds(**_bounds(vae, score(vae, batches, seed)))
