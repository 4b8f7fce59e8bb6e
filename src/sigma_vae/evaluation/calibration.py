"""Whether a model's uncertainty is right: coverage, PIT, σ against error, and what is left in the residuals."""

import math
from typing import Any, final

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.residuals import AgainstError, Correlations, deciles
from sigma_vae.likelihoods import Optimal
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.distributions import Continuous, Discretized
from sigma_vae.types import Inference, Likelihood, Observes
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["INTERVALS", "PIT_BINS", "calibration"]

INTERVALS = (0.5, 0.8, 0.9, 0.95)
"""Nominal probability of the central intervals."""
PIT_BINS = 20
LEAST_TAIL = 1e-7
"""Beyond it a normal score (5.2) is rounding, or infinite."""


@torch.no_grad()
def calibration(vae: VAE, batches: Batches, seed: int = 0) -> dict[str, Any]:
    r"""How often held-out values lie where the model says, over posterior draws, in one pass.

    If x has the distribution function F that the model predicts for it, its probability integral transform u = F(x) is uniform
    (Dawid 1984; Gneiting, Balabdaoui & Raftery 2007). Levels have jumps in F: there u is drawn uniformly from
    :math:`[F(x^-), F(x)]` (the randomised PIT; Czado, Gneiting & Held 2009). The central interval of probability p holds x
    where :math:`|u - \tfrac12| \le \tfrac p2`. All draws belong to the example: no number depends on the batch size.

    Args:
        vae: calibrated on training data; put into eval mode.
        batches: held-out data; every example is counted once.
        seed: of the posterior's noise, and of the randomised PIT.

    Returns:
        Plain numbers. ``density`` (of a model that observes it, not randomised) and ``level`` (of data with levels) hold the
        ``coverage`` of the intervals (mean over values, with its standard error over examples), ``coverage_above_zero`` (of the
        values that are not the least level) and the ``pit``, shares of 20 bins; ``density_post_hoc`` and ``level_post_hoc`` the same
        with the σ that ``calibrate`` solved, where it is another one. What there is none of is None.

        ``sigma`` sets predicted variances against squared errors, in units of what the model reads, in up to ten bins of equal
        counts: ``per_value``, and ``per_example`` (means over each), with the correlation of their logarithms over examples (None
        where σ does not vary). A model that observes levels has errors σΦ⁻¹(u): those of x end where the levels end. None for a
        likelihood without a variance (an infinite one), or without a formula for it (the logistic mixture).

        ``residuals`` are (x − mean)/σ of a density, and of levels the normal scores Φ⁻¹(u) (Dunn & Smyth 1996). ``axes`` holds their
        ``autocorrelation`` at lags 0 to 8 along each axis with the number of ``pairs``, ``channels`` their correlation matrix.

    Raises:
        ValueError: the likelihood is an objective (Bernoulli on grey data), no σ is known yet, or features are not finite.

    >>> from sigma_vae import Fixed, Gaussian, mlp
    >>> from sigma_vae.data import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> vae = VAE(mlp((4,), out_channels=4, latent_dim=2), Gaussian(4, Fixed(50.0), spatial_dims=0, levels=None))
    >>> found = calibration(vae, Batches(InMemory(torch.randn(100, 4)), Scaling(), batch_size=32))
    >>> found["density"]["coverage"]["50"]["mean"]  # σ is far too wide
    1.0
    """
    if not vae.likelihood.normalised:
        raise ValueError(
            f"{vae.likelihood} is an objective, not a likelihood, of data with {vae.likelihood.levels} levels: it predicts no"
            " probabilities that could be right or wrong; take ContinuousBernoulli, or a family with a scale"
        )
    vae.eval()
    tallies = {name: _Pit() for name in _asked(vae.likelihood)}
    errors, correlations = _Errors(), Correlations(vae.likelihood.spatial_dims)
    device = next(vae.parameters()).device
    for batch in batches:
        noise, mask = keyed_noise(batch.positions, seed), None if batch.mask is None else batch.mask.to(device)
        inference = vae.network.infer(batch.x.to(device), mask=mask, noise=noise)
        uniform = torch.special.ndtr(noise(inference.target.shape).to(device))  # the same generators go on
        u = _pits(vae.likelihood, inference, uniform if inference.mask is None else uniform[inference.mask])
        for name, values in u.items():
            tallies[name].add(inference, values, vae.likelihood)
        h, target = inference.scored()
        distribution, scores = vae.likelihood(h), _normal_scores(u)
        errors.add(inference, distribution, target, scores, vae.likelihood)
        continuous = isinstance(distribution, Continuous)
        correlations.add((target - distribution.loc) / distribution.scale if continuous else scores)
    first = next(iter(tallies.values()))
    return {
        "examples": first.examples,
        "values": int(first.dims.sum()),
        "noise_seed": seed,
        **{name: tallies[name].report() if name in tallies else None for name in KINDS},
        "sigma": errors.report(),
        "residuals": correlations.report(),
    }


KINDS: dict[str, tuple[Observes, bool]] = {
    "density": ("density", False),
    "density_post_hoc": ("density", True),
    "level": ("level", False),
    "level_post_hoc": ("level", True),
}
"""Of what the coverage is, and whether with the refitted σ."""


def _asked(likelihood: Likelihood) -> list[str]:
    """The kinds that this likelihood has."""
    refitted = (
        isinstance(likelihood, LocationScale)
        and not isinstance(likelihood.scale, Optimal)
        and likelihood.scale.density_log_scale.numel() > 0
    )
    there = {"density": likelihood.observes == "density", "level": likelihood.levels is not None}
    return [name for name, (observes, post_hoc) in KINDS.items() if there[observes] and (refitted or not post_hoc)]


def _pits(likelihood: Likelihood, inference: Inference, uniform: Tensor) -> dict[str, Tensor]:
    """U of every value that is scored, for each kind."""
    h, target = inference.scored()
    found = {}
    for name in _asked(likelihood):
        observes, post_hoc = KINDS[name]
        below, upto = likelihood.element_cdf(h, target, observes, post_hoc=post_hoc)
        found[name] = upto if observes == "density" else below + uniform * (upto - below)
        if not found[name].isfinite().all():
            raise ValueError(
                "the decoder's features are not finite, so there is nothing to calibrate: have its weights diverged?"
            )
    return found


def _normal_scores(u: dict[str, Tensor]) -> Tensor:
    """Φ⁻¹(u) with the model's own σ: standard normal where the model is right, whatever its family (Dunn & Smyth 1996)."""
    own = u["level"] if "level" in u else u["density"]
    scores: Tensor = torch.special.ndtri(own.double().clamp(LEAST_TAIL, 1 - LEAST_TAIL))
    return scores


def _sums(inference: Inference, values: Tensor, likelihood: Likelihood) -> Tensor:
    """Over each example, ``(batch,)`` in float64 on the CPU."""
    return inference.per_example(values.double().flatten(-1 - likelihood.spatial_dims).sum(-1)).cpu()


@final
class _Pit:
    """Coverage and PIT histogram of one kind."""

    def __init__(self) -> None:
        self.histogram = torch.zeros(PIT_BINS, dtype=torch.int64)
        self.inside: list[Tensor] = []
        """For each batch, how many values of each example lie in each interval, ``(batch, intervals)``."""
        self.sizes: list[Tensor] = []
        self.above_zero = torch.zeros(1 + len(INTERVALS), dtype=torch.int64)
        """How many values are not the least level; of these, how many lie in each interval."""

    def add(self, inference: Inference, u: Tensor, likelihood: Likelihood) -> None:
        self.histogram += torch.bincount((u * PIT_BINS).long().clamp(0, PIT_BINS - 1).flatten(), minlength=PIT_BINS).cpu()
        probability = 2 * (u - 0.5).abs()  # of the smallest central interval that holds the value
        inside = [probability <= nominal for nominal in INTERVALS]
        self.inside.append(torch.stack([_sums(inference, one, likelihood) for one in inside], 1))
        self.sizes.append(inference.dims().cpu())
        if likelihood.levels is not None:
            above = inference.scored()[1] > 0.5 / (likelihood.levels - 1)
            self.above_zero += torch.stack([above.sum(), *((above & one).sum() for one in inside)]).cpu()

    @property
    def dims(self) -> Tensor:
        """Values of each example."""
        return torch.cat(self.sizes)

    @property
    def examples(self) -> int:
        return sum(map(len, self.sizes))

    def report(self) -> dict[str, Any]:
        inside, dims = torch.cat(self.inside), self.dims.double()[:, None]
        mean = inside.sum(0) / dims.sum()
        errors: list[Any] = [None] * len(INTERVALS)
        if len(dims) > 1:  # of a ratio, where clips differ in length
            errors = ((inside - mean * dims).std(0) / (dims.mean() * math.sqrt(len(dims)))).tolist()
        above, *held = self.above_zero.tolist()
        names = [f"{100 * nominal:g}" for nominal in INTERVALS]
        return {
            "coverage": {
                name: {"mean": m, "standard_error": e} for name, m, e in zip(names, mean.tolist(), errors, strict=True)
            },
            "coverage_above_zero": {name: n / above for name, n in zip(names, held, strict=True)} if above else None,
            "pit": (self.histogram.double() / self.histogram.sum()).tolist(),
        }


@final
class _Errors:
    """Predicted variance against squared error, of values and of examples."""

    def __init__(self) -> None:
        self.values = AgainstError()
        self.examples: list[Tensor] = []
        """Mean predicted variance and mean squared error of each example, ``(batch, 2)``."""
        self.known = True

    def add(self, inference: Inference, distribution: Any, x: Tensor, scores: Tensor, likelihood: Likelihood) -> None:
        pair = _variance_and_square(distribution, x, scores) if self.known else None
        if pair is None or not pair[0].isfinite().all():
            self.known = False
            return
        variance, square = pair[0].expand(x.shape), pair[1]
        self.values.add(variance, square)
        sums = torch.stack([_sums(inference, one, likelihood) for one in (variance, square)], 1)
        self.examples.append(sums / inference.dims().cpu()[:, None])

    def report(self) -> dict[str, Any] | None:
        if not self.known:
            return None
        variance, square = torch.cat(self.examples).unbind(1)
        return {
            "per_value": self.values.bins(),
            "per_example": deciles(variance, square),
            "correlation_of_logs": _correlation(variance.log(), square.log()),
        }


def _variance_and_square(distribution: Any, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is predicted, and what has the same mean where the prediction is right."""
    if isinstance(distribution, Continuous):
        return distribution.residual_variance, (x - distribution.loc).square()
    if isinstance(distribution, Discretized):  # x − loc is cut at the end levels, and less than σ says
        return distribution.residual_variance, distribution.residual_variance * scores.square()
    moments: tuple[Tensor, Tensor] | None = distribution.moments()
    return None if moments is None else (moments[1], (x - moments[0]).square())


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """None where one of them hardly varies, or is not finite (the logarithm of an error of 0)."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.square().mean().sqrt()), float(y.square().mean().sqrt())
    if not min(spread) > 1e-6 or not math.isfinite(sum(spread)):
        return None
    return float((x * y).mean()) / (spread[0] * spread[1])
