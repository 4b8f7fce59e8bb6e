"""Base classes of all likelihoods: with a scale (location-scale families), and without one."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor
from torch.distributions import constraints

from sigma_vae.likelihoods.residuals import Continuous, Discretized, ResidualDistribution, Shape
from sigma_vae.likelihoods.scales import LEVEL_FLOOR, LOG_RANGE, SPREAD_FLOOR, Fit, Optimal, Per, Scale
from sigma_vae.likelihoods.solve import Observed, Remade, best_batch_log_scale, best_log_scale
from sigma_vae.types import DataDistribution, Likelihood, MeanMap, Observes, at_least_float32

SMALLEST_MASS = 1e-12
"""Stands for the mass of a level whose distribution function rises by less than its rounding."""
SMALLEST_STD = 1e-37
"""Stands for the std of data that are constant."""


class Scaled(Likelihood):
    """A likelihood with a :class:`Scale`: the source of its σ, and the values that ``calibrate`` has stored."""

    takes_scale = True
    scale: Scale

    @property
    def has_scale(self) -> bool:
        """True."""
        return True

    @property
    def predicts_scale(self) -> bool:
        """Whether the scale reads decoder features."""
        return self.scale.predicted

    @property
    def has_post_hoc(self) -> bool:
        """True unless the scale itself is solved."""
        return not self.scale.solved

    @property
    def log_floor(self) -> float:
        """The scale's floor; for predicted scales, the least log factor."""
        return -LOG_RANGE if self.scale.predicted else self.scale.log_floor

    @torch.no_grad()
    def log_sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """Log σ in evaluation; None where the decoder predicts it.

        Raises:
            ValueError: no σ is known yet.
        """
        if self.scale.predicted:
            return None
        observes, raw = observes or self.observes, self.scale.density_log_scale.new_zeros(())
        return self.scale.refitted(raw, observes) if refitted else self.scale(raw, observes, None)

    def refitted_log_scales(self) -> dict[Observes, Tensor]:
        """The values that the scale has stored."""
        return self.scale.all_stored()

    def start(self, std: float) -> None:
        """Start a learned scale from the std of the data."""
        self.scale.start(std)

    def widen(self, ratio: float) -> None:
        """Train a solved σ with so many times the batch's."""
        self.scale.widen(ratio)

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}, scale={self.scale}"

    @property
    def _scale_channels(self) -> int:
        return self.channels * self.scale.extra_per_channel + self.scale.extra

    @property
    def _event_dims(self) -> int:
        return 1 + self.spatial_dims


class LocationScale(Scaled):
    """A likelihood whose residual x − mean follows one distribution at every scale.

    Args:
        channels: the data's channels.
        scale: where σ comes from; :class:`Optimal` unless given.
        spatial_dims: 0 for tables, 1 for series, 2 for images and clips.
        levels: how many values a datum can take, at k/(levels − 1); None for real-valued data, which have no
            ``log_mass``.
        mean: ``"identity"``: features are the mean; ``"unit"``: a sigmoid maps them onto [0, 1].
        observes: what is trained on: the ``"density"`` of the values or the probability of their ``"level"``.

    Shapes:
        h ``(*batch, in_channels, *space)``: the mean's channels, then the scale's, then the family's own; x ``(*batch,
        channels, *space)``.

    Raises:
        ValueError: an argument is out of range, or ``observes="level"`` without levels.
    """

    solves_rmse = False
    """Whether the best σ of any set of values is the root of their mean squared error."""

    def __init__(
        self,
        channels: int,
        scale: Scale | None = None,
        *,
        spatial_dims: int = 2,
        levels: int | None = 256,
        mean: MeanMap = "identity",
        observes: Observes = "density",
    ) -> None:
        super().__init__(channels, spatial_dims, levels)
        if mean not in ("identity", "unit"):
            raise ValueError(f'mean is "identity" or "unit", got {mean!r}')
        if observes not in ("density", "level"):
            raise ValueError(f'observes is "density" or "level", got {observes!r}')
        if observes == "level" and levels is None:
            raise ValueError('observes="level" needs to know how many levels the data have: pass levels=256 for 8-bit data')
        self.scale = Optimal() if scale is None else scale
        self.scale.spatial_dims = spatial_dims
        self.set_floor()
        self.mean: MeanMap = mean
        self.mean_map = mean
        self.observes: Observes = observes

    @abstractmethod
    def residual(self, own: Tensor) -> ResidualDistribution:
        """The residual's distribution at scale 1, given the family's own feature channels (most have none)."""

    @property
    def own_channels(self) -> int:
        """Feature channels from which the decoder shapes the residual distribution."""
        return 0

    @property
    def in_channels(self) -> int:
        """The mean's channels, the scale's and the family's own."""
        return self.channels + self._scale_channels + self.own_channels

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> Continuous | Discretized:
        """p(x|h); a training step solves an :class:`Optimal` scale for this x. See :meth:`Likelihood.distribution`."""
        observes = self.check_observes(observes)
        residual, loc, raw = self._split(h)
        fit = None
        if x is not None:
            observed = self._observed(residual, loc, x)
            self.check_data(observed.x, loc.shape, observes)
            if self.training and observes == self.observes and observed.x.numel():
                fit = self._fit(observed)
        log_scale = self.scale.refitted(raw, observes) if refitted else self.scale(raw, observes, fit)
        if observes == "density":
            return Continuous(residual, loc, log_scale, self._event_dims)
        assert self.levels is not None
        return Discretized(residual, loc, log_scale, self._event_dims, self.levels)

    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve σ exactly for the density, and for the bin probabilities where the data have levels; store both.

        An :class:`Optimal` scale reports with them from now on. The other scales keep their own σ, and hold these as
        *post-hoc* values (predicted scales: one factor on all predictions). Under ``torch.distributed``, every process
        must call this with its share of the data. ``pairs`` (h, x) are a list or a loader, not a generator: levels go
        through them several times.
        """
        self._solve(pairs, for_levels=self.levels is not None)

    def calibrate_observed(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """The same without the σ for levels where this is a density: its search takes several passes."""
        self._solve(pairs, for_levels=self.observes == "level")

    @torch.no_grad()
    def _solve(self, pairs: Iterable[tuple[Tensor, Tensor]], *, for_levels: bool) -> None:
        observed = Remade(self._of_pair, pairs)
        how = self.scale.refit_per, self._event_dims, self.log_floor
        density = best_log_scale(observed, *how, None)
        if not torch.isfinite(density).all():
            raise ValueError("calibrate found no finite σ: the decoder's features are not finite (have its weights diverged?)")
        level = best_log_scale(observed, *how, self.levels, start=density) if for_levels else None
        self.scale.store("density", density)
        if level is not None:
            self.scale.store("level", level)

    @property
    def sigma_is_rmse(self) -> bool:
        """Whether this is the density of a Gaussian with one σ."""
        one = not self.scale.predicted and self.scale.refit_per == "batch"
        return self.solves_rmse and one and self.observes == "density"

    def start_features(self, std: float) -> Tensor:
        """Mean 0, predicted scales at this std, and 0 for the family's own features."""
        features = torch.zeros(self.in_channels)
        features[self.channels : self.channels + self._scale_channels] = math.log(std)
        return features

    def set_floor(self, relative: float | None = None, std: float = 1.0) -> None:
        """Set the least σ, relative to the distance of two levels, or to the std of real values."""
        if self.levels is None:
            self.scale.set_floor((relative or SPREAD_FLOOR) * max(std, SMALLEST_STD))
        else:
            self.scale.set_floor((relative or LEVEL_FLOOR) / (self.levels - 1))

    def _fit(self, observed: Observed) -> Fit:
        levels = self.levels if self.observes == "level" else None

        def fit(per: Per) -> Tensor:
            return best_batch_log_scale(observed, per, self._event_dims, self.log_floor, levels)

        return fit

    def _split(self, h: Tensor) -> tuple[ResidualDistribution, Tensor, Tensor]:
        """Residual distribution, mean and scale features."""
        sizes = [self.channels, self._scale_channels, self.own_channels]
        loc, raw, own = torch.split(checked_features(self, h), sizes, dim=-self._event_dims)
        return self.residual(own), (torch.sigmoid(loc) if self.mean == "unit" else loc), raw

    def _observed(self, residual: ResidualDistribution, loc: Tensor, x: Tensor) -> Observed:
        return Observed(residual, loc.detach(), loc.new_zeros(()), at_least_float32(x).to(loc.dtype))

    def _of_pair(self, pair: tuple[Tensor, Tensor]) -> Observed:
        """A pair (h, x), checked, in the form that the solver reads."""
        residual, loc, raw = self._split(pair[0])
        observed = self._observed(residual, loc, pair[1])
        self.check_data(observed.x, loc.shape, "density")
        low, high = observed.x.aminmax()
        if not torch.isfinite(low + high):
            raise ValueError("calibrate was given data with NaN or infinite values; clean them first")
        if self.levels is not None and (low < -0.01 or high > 1.01):
            raise ValueError(
                f"calibrate expects the {self.levels} levels of the data in [0, 1], got values in [{float(low):.4g},"
                f" {float(high):.4g}]; scale them, or build the likelihood with levels=None for real-valued data"
            )
        return observed._replace(base=self.scale.base(raw))


class Unscaled(Likelihood):
    """A likelihood without a scale: a family gives features their meaning, for rows of flattened space.

    Arguments are those of :class:`LocationScale`.

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, channels, *space)``. A family's ``row_`` methods see h
        ``(rows, in_channels, n)`` and x ``(rows, channels, n)``, in float32 or float64.
    """

    has_row_rsample = False
    """Whether ``row_sample`` has a gradient to the features."""

    def __init__(self, channels: int, *, spatial_dims: int = 2, levels: int | None = 256) -> None:
        super().__init__(channels, spatial_dims, levels)

    @abstractmethod
    def row_log_prob(self, h: Tensor, x: Tensor, observes: Observes) -> Tensor:
        """Log-probability ``(rows,)`` of the data, or of their levels' bins, in nats."""

    @abstractmethod
    def row_cdf(self, h: Tensor, x: Tensor, observes: Observes) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x), ``(rows, channels, n)`` each."""

    @abstractmethod
    def row_mean(self, h: Tensor) -> Tensor:
        """Mean ``(rows, channels, n)``."""

    @abstractmethod
    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws ``(rows, channels, n)``."""

    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance, ``(rows, channels, n)`` each; None where costly."""
        return None

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> "FromFeatures":
        """p(x|h), the same when refitted: see :meth:`Likelihood.distribution`.

        Raises:
            ValueError: h has the wrong channels, x cannot be drawn, or the family has no such probabilities.
        """
        observes = self.check_observes(observes)
        if observes == "density" and self.observes == "level":
            raise ValueError(f'{self} is a distribution over levels and has no density; ask with observes="level"')
        distribution = FromFeatures(self, checked_features(self, h), observes)
        if x is not None:
            x = at_least_float32(x)
            self.check_data(x, distribution.batch_shape + distribution.event_shape, observes)
        return distribution


class Discrete(Unscaled):
    """An :class:`Unscaled` likelihood that draws only the levels k/(L − 1).

    Raises:
        ValueError: ``levels`` is None.
    """

    levels: int
    observes: Observes = "level"

    def __init__(self, channels: int, *, spatial_dims: int = 2, levels: int | None = 256) -> None:
        if levels is None:
            raise ValueError(
                f"{type(self).__name__} is a distribution over levels and needs to know how many the data have, got"
                " levels=None; pass levels=256 for 8-bit data, or take a continuous family for real-valued data"
            )
        super().__init__(channels, spatial_dims=spatial_dims, levels=levels)


@final
class FromFeatures(DataDistribution):
    """The distribution of an :class:`Unscaled` likelihood: batch ``(*batch,)``, event ``(channels, *space)``."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)
    support = constraints.unit_interval

    def __init__(self, likelihood: Unscaled, h: Tensor, observes: Observes) -> None:
        split = h.dim() - likelihood.spatial_dims - 1
        space = h.shape[split + 1 :]
        self._likelihood = likelihood
        self._observes: Observes = observes
        self._in_bins = observes == "level" and likelihood.observes == "density"
        self.has_rsample = likelihood.has_row_rsample and not self._in_bins
        self._h = h.reshape(*h.shape[: split + 1], math.prod(space))
        super().__init__(h.shape[:split], torch.Size((likelihood.channels, *space)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event, in nats."""
        h, x = self._rows(value)
        return self._likelihood.row_log_prob(h, x, self._observes).reshape(value.shape[: -len(self.event_shape)])

    def element_log_prob(self, value: Tensor) -> Tensor | None:
        """Log-mass of each element's level, given those before where they depend on each other; None for densities."""
        if self._observes != "level":
            return None
        below, upto = self.element_cdf(value.expand(self.batch_shape + self.event_shape))
        return (upto.double() - below.double()).clamp_min(SMALLEST_MASS).log().to(upto.dtype)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each element; of channels that depend on each other, given those before."""
        below, upto = self._likelihood.row_cdf(*self._rows(value), self._observes)
        return below.reshape(value.shape), upto.reshape(value.shape)

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        """Variance, and the squared distance from the mean; None where costly."""
        moments = self.moments()
        return None if moments is None else (moments[1], (value - moments[0]).square())

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of each element, of the data's shape; None where costly."""
        moments = None if self._in_bins else self._likelihood.row_moments(self._expanded(torch.Size()))
        if moments is None:
            return None
        mean, variance = (moment.reshape(self.batch_shape + self.event_shape) for moment in moments)
        return mean, variance

    @property
    def mean(self) -> Tensor:
        """Expectation, of the shape of the data."""
        h = self._expanded(torch.Size())
        mean = self._mean_of_bins(h) if self._in_bins else self._likelihood.row_mean(h)
        return mean.clamp(0, 1).reshape(self.batch_shape + self.event_shape)  # a sum of masses may be 1 + a rounding error

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws, in [0, 1]; levels where those are observed."""
        draws = self._draw(sample_shape, generator)
        return torch.round(draws * self._top) / self._top if self._in_bins else draws

    def rsample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """The draws of :meth:`sample`, with a gradient to the features.

        Raises:
            ValueError: the family's draws have none (``has_rsample`` says so).
        """
        if not self.has_rsample:
            raise ValueError(
                f"draws of {self._likelihood} are levels and have no gradient; take sample(), or a continuous family"
            )
        return self._draw(sample_shape, generator)

    @property
    def _top(self) -> int:
        """The highest level."""
        assert self._likelihood.levels is not None
        return self._likelihood.levels - 1

    def _mean_of_bins(self, h: Tensor) -> Tensor:
        """Σ k P(k)/(L−1), summed as the masses above each bin edge."""
        total = h.new_zeros(len(h), self._likelihood.channels, h.shape[-1])
        for k in range(self._top):
            total += 1 - self._likelihood.row_cdf(h, torch.full_like(total, k / self._top), "level")[1]
        return total / self._top

    def _draw(self, sample_shape: Shape, generator: torch.Generator | None) -> Tensor:
        if not self._h.isfinite().all():
            raise ValueError(
                f"{self._likelihood} cannot draw from features that are NaN or infinite (has the decoder diverged?)"
            )
        shape = torch.Size(sample_shape)
        draws = self._likelihood.row_sample(self._expanded(shape), generator)
        return draws.reshape(shape + self.batch_shape + self.event_shape)

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor]:
        extra = value.shape[: value.dim() - len(self.batch_shape) - len(self.event_shape)]
        x = at_least_float32(value).to(self._h.dtype).reshape(-1, self.event_shape[0], self._h.shape[-1])
        return self._expanded(extra), x

    def _expanded(self, extra: torch.Size) -> Tensor:
        """Features as rows, repeated for so many more leading axes."""
        return self._h.expand(extra + self._h.shape).reshape(-1, *self._h.shape[-2:])


def checked_features(likelihood: Likelihood, h: Tensor) -> Tensor:
    """Features of the right number of channels, in float32 at least."""
    axis = -1 - likelihood.spatial_dims
    if h.dim() <= likelihood.spatial_dims or h.shape[axis] != likelihood.in_channels:
        got = h.shape[axis] if h.dim() > likelihood.spatial_dims else tuple(h.shape)
        raise ValueError(
            f"{likelihood} reads {likelihood.in_channels} decoder channels, got {got}; size the decoder by"
            " `likelihood.in_channels`"
        )
    if 0 in h.shape[axis:]:
        raise ValueError(f"{likelihood} reads features of at least one value, got shape {tuple(h.shape)} with an empty axis")
    return at_least_float32(h)
