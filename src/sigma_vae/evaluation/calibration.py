"""Whether a model's uncertainty is right: coverage, PIT, σ against error, and what is left in the residuals."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import Column, Estimate, EvaluationData, Metric, Record, Row, add_up, each_example, estimate_rows
from sigma_vae.evaluation.plots import save_page
from sigma_vae.registry import register
from sigma_vae.types import Batch, DataDistribution, Inference, Likelihood, Noise, Observes, as_argument
from sigma_vae.vae import VAE, keyed_noise, standard_prior

INTERVALS = (0.5, 0.8, 0.9, 0.95)
"""Nominal probability of the central intervals."""
PIT_BINS = 20
LEAST_TAIL = 1e-7
"""Beyond it a normal score (5.2) is rounding, or infinite."""
BINS, LAGS = 10, 8
LARGEST_MATRIX = 16
"""Number of channels (columns) up to which all their correlations are reported."""
ROUNDING = 1e-12
"""A variance below this part of the mean square is the rounding error of a constant."""
FINE_BINS, WIDEST = 2**14, 20.0
"""Bins of log σ between −20 and 20, joined to ten of about equal counts in the end."""

AXES = {0: (), 1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}

KINDS: dict[str, tuple[Observes, bool]] = {
    "density": ("density", False),
    "density_post_hoc": ("density", True),
    "level": ("level", False),
    "level_post_hoc": ("level", True),
}
"""The quantity that coverage is about, and whether σ is the refitted one."""


@dataclass(frozen=True, eq=False)
class Coverage(Record):
    """Coverage of the central intervals, by their nominal percentage, and PIT histogram.

    ``coverage`` is a mean over values, with its standard error over examples; ``coverage_above_zero`` is about the
    values that are not the least level. ``pit`` has the shares of 20 bins.
    """

    coverage: dict[str, Estimate]
    coverage_above_zero: dict[str, float] | None
    pit: list[float]


@dataclass(frozen=True, eq=False)
class Bins(Record):
    """Means in bins of about equal counts, by growing prediction."""

    predicted_variance: list[float]
    mean_squared_error: list[float]
    count: list[int]


@dataclass(frozen=True, eq=False)
class SigmaErrors(Record):
    """Predicted variances against squared errors, in units of the data that the model reads.

    ``correlation_of_logs`` is taken over examples; None where σ does not vary.
    """

    per_value: Bins
    per_example: Bins
    correlation_of_logs: float | None


@dataclass(frozen=True, eq=False)
class Autocorrelation(Record):
    """Correlations at lags 0, 1, ..., at most 8, and the number of pairs that each comes from."""

    autocorrelation: list[float]
    pairs: list[int]


@dataclass(frozen=True, eq=False)
class Residuals(Record):
    """Correlations of residuals: along each axis, and between channels; None where there are none."""

    axes: dict[str, Autocorrelation] | None
    channels: list[list[float]] | None
    count: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration(Record):
    """Share of held-out values that lie where the model says.

    ``density`` (of a model that observes it; not randomised) and ``level`` (of data with levels) use the model's own σ;
    ``density_post_hoc`` and ``level_post_hoc`` the refitted σ, where it is another one. ``sigma`` is None for a
    likelihood with an infinite variance, or without a formula for it (the logistic mixture).
    """

    examples: int
    values: int  # type: ignore[assignment]  # the name in its JSON; go over its keys by items()
    noise_seed: int
    density: Coverage | None
    density_post_hoc: Coverage | None
    level: Coverage | None
    level_post_hoc: Coverage | None
    sigma: SigmaErrors | None
    residuals: Residuals


@register.metric("calibration")
@final
class CalibrationMetric(Metric):
    """Coverage of intervals, PIT histogram, σ against error and correlation of residuals, with a page of plots."""

    result = Calibration
    measured = "by default"
    draws_page = True
    columns = (Column("calibration.density.coverage.90", "90 % interval covers", 3),)

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It compares with predicted probabilities."""
        return (
            None if vae.likelihood.normalised else f"{vae.likelihood} is an objective of these data, and gives no probabilities"
        )

    def watcher(self, vae: VAE, settings: EvaluationSettings) -> "CalibrationWatcher":
        """In the bounds' own pass."""
        return CalibrationWatcher(vae, settings.seed)

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Calibration:
        """On the held-out examples."""
        return calibration(vae, data.held_out, settings.seed)

    def rows(self, result: Calibration) -> Iterator[Row]:
        """Coverage of each interval."""
        for name in KINDS:
            found = result[name]
            for percent, share in {} if found is None else found.coverage.items():
                yield from (row._replace(name=f"{percent} % interval covers, {name}") for row in estimate_rows({"": share}))

    def compared(self, results: Sequence[Calibration | None]) -> list[dict[str, Any]]:
        """Coverage of the 90 % interval."""
        densities = [None if result is None else result.density for result in results]
        return [{"coverage_90": None if density is None else density.coverage.get("90")} for density in densities]

    def draw_page(self, result: Calibration, path: Path, title: str) -> None:
        """Coverage, PIT, σ against error, residuals."""
        save_page(path, result, title)


@torch.no_grad()
def calibration(vae: VAE, batches: Batches, seed: int = 0) -> Calibration:
    r"""Measure how often held-out values lie where the model says, over posterior draws, in one pass.

    If x has the distribution function F that the model predicts for it, its probability integral transform u = F(x) is
    uniform (Dawid 1984; Gneiting, Balabdaoui & Raftery 2007). Levels have jumps in F: there u is drawn uniformly from
    :math:`[F(x^-), F(x)]` (the randomised PIT; Czado, Gneiting & Held 2009). The central interval of probability p
    holds x where :math:`|u - \tfrac12| \le \tfrac p2`. All draws belong to the example: no number depends on the batch
    size.

    Predicted variances are set against squared errors in up to ten bins of equal counts. A model that observes levels
    has errors σΦ⁻¹(u), as those of x end where the levels end. Residuals are (x − mean)/σ for a density, and the normal
    scores Φ⁻¹(u) for levels (Dunn & Smyth 1996).

    The arguments are those of :func:`~sigma_vae.evaluation.elbo.elbo`; the seed is also that of the randomised PIT.

    Raises:
        ValueError: the likelihood is an objective (Bernoulli on grey data), no σ is known yet, features are not finite,
            or the batches are a share, and there is no group of as many processes.

    >>> from sigma_vae import Fixed, Gaussian, mlp
    >>> from sigma_vae.data import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> vae = VAE(mlp((4,), out_channels=4, latent_dim=2), Gaussian(4, Fixed(50.0), spatial_dims=0, levels=None))
    >>> found = calibration(vae, Batches(InMemory(torch.randn(100, 4)), Scaling(), batch_size=32))
    >>> found.density.coverage["50"].mean  # σ is far too wide
    1.0
    """
    if not vae.likelihood.normalised:
        raise ValueError(
            f"{vae.likelihood} is an objective, not a likelihood, of data with {vae.likelihood.levels} levels: it predicts no"
            " probabilities that could be right or wrong; take ContinuousBernoulli, or a family with a scale"
        )
    vae.eval()
    watcher = CalibrationWatcher(vae, seed)

    def rows(batch: Batch) -> Tensor:
        noise = keyed_noise(batch.positions, seed)
        inference = vae.network.infer(batch.x, None, batch.mask, noise, *as_argument(batch.condition))
        return watcher.rows(inference, noise)

    with standard_prior(vae):
        found = each_example(vae, batches, rows)
    return watcher.result(vae, batches, found)


@final
class CalibrationWatcher:
    """Measures what :func:`calibration` does, in a pass that others take.

    Args:
        vae: calibrated, in eval mode; its likelihood is normalised.
        seed: of the noise in that pass, for the report.
    """

    def __init__(self, vae: VAE, seed: int) -> None:
        self.likelihood = vae.likelihood
        self.seed = seed
        self.tallies = {name: _Pit() for name in _asked(vae.likelihood)}
        self.errors = AgainstError()
        self.correlations = Correlations(vae.likelihood.spatial_dims)

    def rows(self, inference: Inference, noise: Noise) -> Tensor:
        """Count values; two means of errors, and numbers of values in each interval, of each example."""
        likelihood = self.likelihood
        uniform = torch.special.ndtr(noise(inference.target.shape).to(inference.target.device))  # the same generators go on
        u = _pits(likelihood, inference, uniform if inference.mask is None else uniform[inference.mask])
        h, target = inference.scored()
        distribution = likelihood.distribution(h)
        assert isinstance(distribution, DataDistribution)
        own = u["level"] if "level" in u else u["density"]
        scores: Tensor = torch.special.ndtri(own.double().clamp(LEAST_TAIL, 1 - LEAST_TAIL))
        residuals = distribution.standardised(target)
        self.correlations.add(scores if residuals is None else residuals)
        of_errors = _errors(self.errors, inference, distribution.squared_errors(target, scores), likelihood)
        inside = [self.tallies[name].add(inference, values, likelihood) for name, values in u.items()]
        return torch.cat([inference.dims().cpu().double()[:, None], of_errors, *inside], 1)

    def result(self, vae: VAE, batches: Batches, rows: Tensor) -> Calibration:
        """Summarise the numbers of all examples; of several processes, each adds its sums."""
        tallies = self.tallies
        add_up(
            vae,
            batches,
            [self.errors.totals, *self.correlations.sums, *(total for tally in tallies.values() for total in tally.sums)],
        )
        dims, inside = rows[:, 0], dict(zip(tallies, torch.split(rows[:, 3:], len(INTERVALS), 1), strict=True))
        coverage = {name: tallies[name].report(inside[name], dims) if name in tallies else None for name in KINDS}
        return Calibration(
            examples=len(rows),
            values=int(dims.sum()),
            noise_seed=self.seed,
            **coverage,
            sigma=_sigma_errors(self.errors, *rows[:, 1:3].unbind(1)),
            residuals=self.correlations.report(),
        )


def _asked(likelihood: Likelihood) -> list[str]:
    """The kinds that this likelihood has."""
    refitted = likelihood.has_post_hoc and bool(likelihood.refitted_log_scales())
    there = {"density": likelihood.observes == "density", "level": likelihood.has_mass}
    return [name for name, (observes, post_hoc) in KINDS.items() if there[observes] and (refitted or not post_hoc)]


def _pits(likelihood: Likelihood, inference: Inference, uniform: Tensor) -> dict[str, Tensor]:
    """U of every value that is scored, for each kind."""
    h, target = inference.scored()
    found = {}
    for name in _asked(likelihood):
        observes, refitted = KINDS[name]
        below, upto = likelihood.element_cdf(h, target, observes, refitted=refitted)
        found[name] = upto if observes == "density" else below + uniform * (upto - below)
        if not found[name].isfinite().all():
            raise ValueError(
                "the decoder's features are not finite, so there is nothing to calibrate; have its weights diverged?"
            )
    return found


def _sums(inference: Inference, values: Tensor, likelihood: Likelihood) -> Tensor:
    """Sum values over each example, ``(batch,)`` in float64 on the CPU."""
    return inference.per_example(values.double().flatten(-1 - likelihood.spatial_dims).sum(-1)).cpu()


@final
class _Pit:
    """Coverage and PIT histogram of one kind."""

    def __init__(self) -> None:
        self.histogram = torch.zeros(PIT_BINS, dtype=torch.int64)
        self.above_zero = torch.zeros(1 + len(INTERVALS), dtype=torch.int64)
        """Number of values above the least level, and of these the number in each interval."""
        self.sums = [self.histogram, self.above_zero]

    def add(self, inference: Inference, u: Tensor, likelihood: Likelihood) -> Tensor:
        """Number of values of each example in each interval, ``(batch, intervals)``."""
        self.histogram += torch.bincount((u * PIT_BINS).long().clamp(0, PIT_BINS - 1).flatten(), minlength=PIT_BINS).cpu()
        probability = 2 * (u - 0.5).abs()  # of the smallest central interval that holds the value
        inside = [probability <= nominal for nominal in INTERVALS]
        if likelihood.has_mass:
            above = inference.scored()[1] > 0.5 / ((likelihood.levels or 2) - 1)  # counts are a whole number apart
            self.above_zero += torch.stack([above.sum(), *((above & one).sum() for one in inside)]).cpu()
        return torch.stack([_sums(inference, one, likelihood) for one in inside], 1)

    def report(self, inside: Tensor, dims: Tensor) -> Coverage:
        """Summarise the counts of all examples ``(examples, intervals)``, given how many values each has."""
        mean = inside.sum(0) / dims.sum()
        around = (inside - mean * dims[:, None]) / dims.mean()  # of a ratio, where clips differ in length
        above, *held = self.above_zero.tolist()
        names = [f"{100 * nominal:g}" for nominal in INTERVALS]
        return Coverage(
            coverage={
                name: Estimate(m, Estimate.of(of_examples).standard_error)
                for name, m, of_examples in zip(names, mean.tolist(), around.unbind(1), strict=True)
            },
            coverage_above_zero={name: n / above for name, n in zip(names, held, strict=True)} if above else None,
            pit=(self.histogram.double() / self.histogram.sum()).tolist(),
        )


def _errors(values: "AgainstError", inference: Inference, pair: tuple[Tensor, Tensor] | None, likelihood: Likelihood) -> Tensor:
    """Count a batch's predicted variances and squared errors; their means in each example ``(batch, 2)``, or NaN."""
    if pair is None or not pair[0].isfinite().all():
        return torch.full((len(inference.kl), 2), math.nan, dtype=torch.float64)
    variance, square = pair[0].expand(pair[1].shape), pair[1]
    values.add(variance, square)
    sums = torch.stack([_sums(inference, one, likelihood) for one in (variance, square)], 1)
    return sums / inference.dims().cpu()[:, None]


def _sigma_errors(values: "AgainstError", variance: Tensor, square: Tensor) -> SigmaErrors | None:
    """Summarise predicted variances and squared errors, given the means of all examples."""
    if not (variance.isfinite() & square.isfinite()).all():
        return None
    return SigmaErrors(values.bins(), deciles(variance, square), _correlation(variance.log(), square.log()))


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """None where one of them hardly varies, or is not finite (the logarithm of an error of 0)."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.square().mean().sqrt()), float(y.square().mean().sqrt())
    if not min(spread) > 1e-6 or not math.isfinite(sum(spread)):
        return None
    return float((x * y).mean()) / (spread[0] * spread[1])


@final
class AgainstError:
    """Predicted variance and squared error of all values, binned by the prediction, in constant memory.

    >>> values = AgainstError()
    >>> values.add(torch.tensor([1.0, 4.0, 4.0]), torch.tensor([2.0, 3.0, 5.0]))
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

    def bins(self) -> Bins:
        """Means in bins of about equal counts, by growing prediction; fewer than ten if many predictions are equal."""
        counts = self.totals[0]
        middle = counts.cumsum(0) - 0.5 * counts
        which = (middle * (BINS / counts.sum())).long().clamp_max(BINS - 1)
        joined = torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, which, self.totals)
        return _means(*joined[:, joined[0] > 0])


def deciles(variance: Tensor, square: Tensor) -> Bins:
    """Compute the same bins for values ``(n,)`` that are all in memory.

    >>> deciles(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, 0.0]))
    Bins(predicted_variance=[1.0], mean_squared_error=[1.0], count=[3])
    """
    if float(variance.max() - variance.min()) <= 1e-6 * float(variance.max()):  # all equal, but for rounding
        return _means(torch.tensor([len(variance)]), variance.sum().reshape(1), square.sum().reshape(1))
    parts = [part for part in torch.tensor_split(variance.argsort(), BINS) if len(part)]
    sums = [torch.stack([values[part].sum() for part in parts]) for values in (variance, square)]
    return _means(torch.tensor([len(part) for part in parts]), *sums)


def _means(counts: Tensor, variance: Tensor, square: Tensor) -> Bins:
    return Bins((variance / counts).tolist(), (square / counts).tolist(), counts.long().tolist())


@final
class Correlations:
    r"""Correlation of residuals with those k places further along each axis, and between channels.

    .. math:: \hat\rho_k = \frac{\overline{(r_i - m)(r_{i+k} - m)}}{\overline{(r_i - m)^2}}

    with the mean m of all residuals, over all pairs of all examples and channels. Axes are named length (series),
    height and width (images), and time (frames of clips).

    >>> correlations = Correlations(spatial_dims=1)
    >>> correlations.add(torch.tensor([[[1.0, -1.0, 1.0, -1.0]]]))
    >>> correlations.along_axes()
    {'length': Autocorrelation(autocorrelation=[1.0, -1.0, 1.0, -1.0], pairs=[4, 3, 2, 1])}
    """

    def __init__(self, spatial_dims: int) -> None:
        self.spatial_dims = spatial_dims
        self.one = torch.zeros(3, dtype=torch.float64)
        """Number of residuals, their sum, and the sum of their squares."""
        self.pairs: dict[str, Tensor] = {}
        """For each axis and lag: how many pairs, the sums of first and second, of their products."""
        self.channels: list[Tensor] = []
        """Sums over everything else: (1,), of each channel, of each pair of channels."""

    def add(self, residuals: Tensor) -> None:
        """Count residuals ``(batch, [time,] C, *space)``."""
        r = residuals.double()
        self.one += torch.tensor([r.numel(), r.sum(), r.square().sum()], dtype=torch.float64)
        names = AXES[self.spatial_dims]
        axes = dict(zip(names, range(-len(names), 0), strict=True))
        if r.dim() > self.spatial_dims + 2:
            axes["time"] = -self.spatial_dims - 2
        for name, axis in axes.items():
            self.pairs[name] = self.pairs.get(name, 0) + _pairs(r, axis)
        values = r.movedim(-1 - self.spatial_dims, 0).flatten(1)
        if 1 < len(values) <= LARGEST_MATRIX:
            count = torch.tensor(values.shape[1], dtype=torch.float64)
            sums = [count, values.sum(1).cpu(), (values @ values.T).cpu()]
            self.channels = [old + new for old, new in zip(self.channels, sums, strict=True)] if self.channels else sums

    @property
    def sums(self) -> list[Tensor]:
        """The running sums over examples."""
        return [self.one, *self.pairs.values(), *self.channels]

    def along_axes(self) -> dict[str, Autocorrelation] | None:
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
            found[name] = Autocorrelation([1.0, *(covariance / variance).tolist()], [int(count), *n.long().tolist()])
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
        std = variance.sqrt()
        matrix: list[list[float]] = (covariance / torch.outer(std, std)).tolist()
        return matrix

    def report(self) -> Residuals:
        """Both, with the number of residuals that they come from."""
        return Residuals(self.along_axes(), self.between_channels(), int(self.one[0]))


def _pairs(r: Tensor, axis: int) -> Tensor:
    """Count, sums and sum of products of all pairs at each lag, ``(4, lags)``."""
    size = r.shape[axis]
    columns = []
    for lag in range(1, min(LAGS, size - 1) + 1):
        first, second = r.narrow(axis, 0, size - lag), r.narrow(axis, lag, size - lag)
        sums = [first.numel(), first.sum(), second.sum(), (first * second).sum()]
        columns.append(torch.tensor(sums, dtype=torch.float64))
    return torch.stack(columns, 1) if columns else torch.zeros(4, 0, dtype=torch.float64)
