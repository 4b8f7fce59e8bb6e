"""Whether a model's uncertainty is right: coverage, PIT, σ against error, and what is left in the residuals."""

import math
from typing import Any, final

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.base import add_up, each_example, mean_and_error
from sigma_vae.likelihoods import Optimal
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.distributions import Continuous, Discretized
from sigma_vae.types import Batch, Inference, Likelihood, Observes
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["INTERVALS", "PIT_BINS", "AgainstError", "Correlations", "calibration", "deciles"]

BINS = 10
LAGS = 8
LARGEST_MATRIX = 16
"""Channels (columns) up to which their correlations are told one by one."""

ROUNDING = 1e-12
"""A variance that is no larger a part of the mean square is what rounding leaves of a constant's."""

FINE_BINS, WIDEST = 2**14, 20.0
"""Of log σ: so many between −20 and 20, which are joined to ten of about equal counts in the end."""

AXES = {0: (), 1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@final
class AgainstError:
    """Predicted variance and squared error of all values, binned by the prediction, in memory that does not grow with them.

    >>> values = AgainstError()
    >>> values.add(torch.tensor([1.0, 4.0, 4.0]), torch.tensor([2.0, 3.0, 5.0]))
    >>> values.bins()
    {'predicted_variance': [1.0, 4.0], 'mean_squared_error': [2.0, 4.0], 'count': [1, 2]}
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(3, FINE_BINS, dtype=torch.float64)
        """For each fine bin: how many values, the sum of their predicted variances, of their squared errors."""

    def add(self, variance: Tensor, square: Tensor) -> None:
        """Count values of one shape."""
        variance, square = variance.double().flatten(), square.double().flatten()
        position = (0.5 * variance.log() + WIDEST) * (FINE_BINS / (2 * WIDEST))
        fine = position.clamp(0, FINE_BINS - 1).long()
        for row, weights in zip(self.totals, (None, variance, square), strict=True):
            row += torch.bincount(fine, weights, FINE_BINS).cpu()

    def bins(self) -> dict[str, list[float]]:
        """Means in bins of about equal counts, by growing prediction; fewer than ten where many predictions are the same."""
        counts = self.totals[0]
        middle = counts.cumsum(0) - 0.5 * counts
        which = (middle * (BINS / counts.sum())).long().clamp_max(BINS - 1)
        joined = torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, which, self.totals)
        return _means(*joined[:, joined[0] > 0])


def deciles(variance: Tensor, square: Tensor) -> dict[str, list[float]]:
    """The same bins of values ``(n,)`` that are all at hand.

    >>> deciles(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, 0.0]))
    {'predicted_variance': [1.0], 'mean_squared_error': [1.0], 'count': [3]}
    """
    if float(variance.max() - variance.min()) <= 1e-6 * float(variance.max()):  # all the same, but for rounding
        return _means(torch.tensor([len(variance)]), variance.sum().reshape(1), square.sum().reshape(1))
    parts = [part for part in torch.tensor_split(variance.argsort(), BINS) if len(part)]
    sums = [torch.stack([values[part].sum() for part in parts]) for values in (variance, square)]
    return _means(torch.tensor([len(part) for part in parts]), *sums)


def _means(counts: Tensor, variance: Tensor, square: Tensor) -> dict[str, list[float]]:
    return {
        "predicted_variance": (variance / counts).tolist(),
        "mean_squared_error": (square / counts).tolist(),
        "count": counts.long().tolist(),
    }


@final
class Correlations:
    r"""Correlation of residuals with those k places further along each axis, and between channels.

    .. math:: \hat\rho_k = \frac{\overline{(r_i - m)(r_{i+k} - m)}}{\overline{(r_i - m)^2}}

    with the mean m of all residuals, over all pairs of all examples and channels. Axes are named length (series), height and width
    (images), and time (frames of clips).

    >>> correlations = Correlations(spatial_dims=1)
    >>> correlations.add(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]))
    >>> correlations.along_axes()
    {'length': {'autocorrelation': [1.0, -1.0, 1.0, -1.0], 'pairs': [4, 3, 2, 1]}}
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims
        self.one = torch.zeros(3, dtype=torch.float64)
        """How many residuals, their sum, that of their squares."""
        self.pairs: dict[str, Tensor] = {}
        """For each axis and lag: how many pairs, the sums of first and second, of their products."""
        self.channels: list[Tensor] = []
        """Sums over everything else: (1,), of each channel, of each pair of channels."""

    def add(self, residuals: Tensor) -> None:
        """Count residuals ``(batch, [time,] C, *space)``."""
        r = residuals.double()
        self.one += torch.stack([_count(r), r.sum().cpu(), r.square().sum().cpu()])
        names = AXES[self.spatial_dims]
        axes = dict(zip(names, range(-len(names), 0), strict=True))
        if r.dim() > self.spatial_dims + 2:
            axes["time"] = -self.spatial_dims - 2
        for name, axis in axes.items():
            self.pairs[name] = self.pairs.get(name, 0) + _pairs(r, axis)
        values = r.movedim(-1 - self.spatial_dims, 0).flatten(1)
        if 1 < len(values) <= LARGEST_MATRIX:
            sums = [_count(values[0]), values.sum(1).cpu(), (values @ values.T).cpu()]
            self.channels = [old + new for old, new in zip(self.channels, sums, strict=True)] if self.channels else sums

    @property
    def sums(self) -> list[Tensor]:
        """What is added up over examples."""
        return [self.one, *self.pairs.values(), *self.channels]

    def along_axes(self) -> dict[str, dict[str, list[float]]] | None:
        """For each axis the correlations at lags 0, 1, ..., at most 8, and how many pairs each comes from.

        None where residuals do not vary, or have no axis.
        """
        count, total, squares = self.one.tolist()
        mean = total / count
        variance = squares / count - mean**2
        if not self.pairs or variance <= ROUNDING * squares / count:
            return None
        found = {}
        for name, (n, first, second, products) in self.pairs.items():
            covariance = (products - mean * (first + second)) / n + mean**2
            pairs = [int(count), *n.long().tolist()]
            found[name] = {"autocorrelation": [1.0, *(covariance / variance).tolist()], "pairs": pairs}
        return found

    def between_channels(self) -> list[list[float]] | None:
        """The correlation matrix; None for one channel, for more than 16, or where one does not vary."""
        if not self.channels:
            return None
        count, sums, products = self.channels
        covariance = products / count - torch.outer(sums, sums) / count**2
        variance = covariance.diagonal()
        if not (variance > ROUNDING * products.diagonal() / count).all():
            return None
        deviation = variance.sqrt()
        matrix: list[list[float]] = (covariance / torch.outer(deviation, deviation)).tolist()
        return matrix

    def report(self) -> dict[str, Any]:
        """Both, with the number of residuals that they come from."""
        return {"axes": self.along_axes(), "channels": self.between_channels(), "count": int(self.one[0])}


def _count(values: Tensor) -> Tensor:
    return torch.tensor(values.numel(), dtype=torch.float64)


def _pairs(r: Tensor, axis: int) -> Tensor:
    """Count, sums and sum of products of all pairs at each lag, ``(4, lags)``."""
    size = r.shape[axis]
    columns = []
    for lag in range(1, min(LAGS, size - 1) + 1):
        first, second = r.narrow(axis, 0, size - lag), r.narrow(axis, lag, size - lag)
        sums = [first.sum(), second.sum(), (first * second).sum()]
        columns.append(torch.stack([_count(first), *(total.cpu() for total in sums)]))
    return torch.stack(columns, 1) if columns else torch.zeros(4, 0, dtype=torch.float64)


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
        batches: held-out data; every example is counted once; on several processes, each gives its share.
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
        ValueError: the likelihood is an objective (Bernoulli on grey data), no σ is known yet, features are not finite, or the
            batches are a share, and no group of as many processes is there.

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

    def rows(batch: Batch) -> Tensor:
        noise = keyed_noise(batch.positions, seed)
        inference = vae.network.infer(batch.x, mask=batch.mask, noise=noise)
        uniform = torch.special.ndtr(noise(inference.target.shape).to(inference.target.device))  # the same generators go on
        u = _pits(vae.likelihood, inference, uniform if inference.mask is None else uniform[inference.mask])
        h, target = inference.scored()
        distribution, scores = vae.likelihood(h), _normal_scores(u)
        continuous = isinstance(distribution, Continuous)
        correlations.add((target - distribution.loc) / distribution.scale if continuous else scores)
        of_errors = errors.add(inference, distribution, target, scores, vae.likelihood)
        inside = [tallies[name].add(inference, values, vae.likelihood) for name, values in u.items()]
        return torch.cat([inference.dims().cpu().double()[:, None], of_errors, *inside], 1)

    found = each_example(vae, batches, rows)  # (examples, values of each, two columns of errors, for each kind one an interval)
    sums = [errors.values.totals, *correlations.sums, *(total for tally in tallies.values() for total in tally.sums)]
    add_up(vae, batches, sums)
    dims, inside = found[:, 0], dict(zip(tallies, torch.split(found[:, 3:], len(INTERVALS), 1), strict=True))
    return {
        "examples": len(found),
        "values": int(dims.sum()),
        "noise_seed": seed,
        **{name: tallies[name].report(inside[name], dims) if name in tallies else None for name in KINDS},
        "sigma": errors.report(found[:, 1:3]),
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
        below, upto = likelihood.element_cdf(h, target, observes, refitted=post_hoc)
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
        self.above_zero = torch.zeros(1 + len(INTERVALS), dtype=torch.int64)
        """How many values are not the least level; of these, how many lie in each interval."""

    @property
    def sums(self) -> list[Tensor]:
        """What is added up over examples."""
        return [self.histogram, self.above_zero]

    def add(self, inference: Inference, u: Tensor, likelihood: Likelihood) -> Tensor:
        """How many values of each example lie in each interval, ``(batch, intervals)``."""
        self.histogram += torch.bincount((u * PIT_BINS).long().clamp(0, PIT_BINS - 1).flatten(), minlength=PIT_BINS).cpu()
        probability = 2 * (u - 0.5).abs()  # of the smallest central interval that holds the value
        inside = [probability <= nominal for nominal in INTERVALS]
        if likelihood.levels is not None:
            above = inference.scored()[1] > 0.5 / (likelihood.levels - 1)
            self.above_zero += torch.stack([above.sum(), *((above & one).sum() for one in inside)]).cpu()
        return torch.stack([_sums(inference, one, likelihood) for one in inside], 1)

    def report(self, inside: Tensor, dims: Tensor) -> dict[str, Any]:
        """Of what ``add`` said of all examples ``(examples, intervals)``, and how many values each has."""
        mean = inside.sum(0) / dims.sum()
        around = (inside - mean * dims[:, None]) / dims.mean()  # of a ratio, where clips differ in length
        above, *held = self.above_zero.tolist()
        names = [f"{100 * nominal:g}" for nominal in INTERVALS]
        return {
            "coverage": {
                name: {"mean": m, "standard_error": mean_and_error(of_examples)["standard_error"]}
                for name, m, of_examples in zip(names, mean.tolist(), around.unbind(1), strict=True)
            },
            "coverage_above_zero": {name: n / above for name, n in zip(names, held, strict=True)} if above else None,
            "pit": (self.histogram.double() / self.histogram.sum()).tolist(),
        }


@final
class _Errors:
    """Predicted variance against squared error, of values and of examples."""

    def __init__(self) -> None:
        self.values = AgainstError()

    def add(self, inference: Inference, distribution: Any, x: Tensor, scores: Tensor, likelihood: Likelihood) -> Tensor:
        """Mean predicted variance and mean squared error of each example, ``(batch, 2)``; NaN where there is no variance."""
        pair = _variance_and_square(distribution, x, scores)
        if pair is None or not pair[0].isfinite().all():
            return torch.full((len(inference.kl), 2), math.nan, dtype=torch.float64)
        variance, square = pair[0].expand(x.shape), pair[1]
        self.values.add(variance, square)
        sums = torch.stack([_sums(inference, one, likelihood) for one in (variance, square)], 1)
        return sums / inference.dims().cpu()[:, None]

    def report(self, of_examples: Tensor) -> dict[str, Any] | None:
        """Of what ``add`` said of all examples."""
        if not of_examples.isfinite().all():
            return None
        variance, square = of_examples.unbind(1)
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
