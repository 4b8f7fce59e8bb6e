"""Base classes of all likelihoods: with a scale (location-scale families), and without one."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from sigma_vae.likelihoods.densities import at_least_float32
from sigma_vae.likelihoods.distributions import Continuous, Discretized, Law, Shape, check_levels
from sigma_vae.likelihoods.scales import Optimal, Per, Scale
from sigma_vae.likelihoods.solve import Observed, best_batch_log_scale, best_log_scale
from sigma_vae.types import DataDistribution, Likelihood, Observes

__all__ = ["Discrete", "FromFeatures", "LocationScale", "MeanMap", "Unscaled"]


class Unscaled(Likelihood):
    """A likelihood whose features are all that it needs; a family says what they mean, for rows of flattened space.

    ``calibrate`` has nothing to fit, and the post-hoc distribution is the likelihood's own.

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, channels, *space)``. The hooks of a family see h
        ``(rows, in_channels, n)`` and x ``(rows, channels, n)``, in float32 or float64.
    """

    has_row_rsample = False
    """Whether ``row_sample`` has a gradient to the features."""

    @abstractmethod
    def row_log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """Log-probability ``(rows,)`` of the data, in nats."""

    @abstractmethod
    def row_log_mass(self, h: Tensor, x: Tensor) -> Tensor:
        """Log-probability ``(rows,)`` of the levels of the data, in nats."""

    @abstractmethod
    def row_cdf(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of what ``row_log_prob`` is of, ``(rows, channels, n)`` each."""

    @abstractmethod
    def row_level_cdf(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of the levels, ``(rows, channels, n)`` each."""

    @abstractmethod
    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and variance, ``(rows, channels, n)`` each; None where no formula is worth its time."""

    @abstractmethod
    def row_mean(self, h: Tensor) -> Tensor:
        """Mean ``(rows, channels, n)``."""

    @abstractmethod
    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws ``(rows, channels, n)``."""

    @abstractmethod
    def check(self, x: Tensor) -> None:
        """Refuse data that the family cannot have drawn."""

    def forward(self, h: Tensor, x: Tensor | None = None) -> "FromFeatures":
        """p(x|h).

        Raises:
            ValueError: h has not ``in_channels`` channels, or x is nothing that the family can draw.
        """
        distribution = FromFeatures(self, self._features(h), self.channels)
        if x is not None:
            self._check(x, distribution)
        return distribution

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> "FromFeatures":
        """p(x|h): see :meth:`Likelihood.distribution`."""
        return self.forward(h, x)

    def log_mass(self, h: Tensor, x: Tensor, *, refitted: bool = False, post_hoc: bool = False) -> Tensor:
        """Log-probability ``(*batch,)`` of the observed levels, in nats; the same post hoc.

        Raises:
            ValueError: the data have no levels, x is off them, or the family is no likelihood of these data.
        """
        return self._on_levels(h, x).log_mass(x)

    def element_cdf(
        self, h: Tensor, x: Tensor, observes: Observes, *, refitted: bool = False, post_hoc: bool = False
    ) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape; the same post hoc.

        Raises:
            ValueError: x is nothing that the family can draw, a density is asked for that it does not have, or levels that the data
                do not have.
        """
        if observes == "level":
            return self._on_levels(h, x).element_level_cdf(x)
        if self.observes == "level":
            raise ValueError(f'{self} is a distribution over levels and has no density; ask with observes="level"')
        return self.forward(h, x).element_cdf(x)

    def _on_levels(self, h: Tensor, x: Tensor) -> "FromFeatures":
        """p(x|h), where x is on the levels that it gives probabilities to."""
        if self.levels is None:
            raise ValueError(
                f"{self} models real-valued data (levels=None), which have no probability of a level;"
                " report `forward(h).log_prob(x)`, or say how many levels the data have"
            )
        distribution = self.forward(h)
        self._check(x, distribution)
        if not torch.compiler.is_compiling():  # it reads a value off the device
            check_levels(x, self.levels)
        return distribution

    def post_hoc(self, h: Tensor) -> "FromFeatures":
        """p(x|h): there is no scale to refit."""
        return self.forward(h)

    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Do nothing: there is no scale to fit."""

    def _features(self, h: Tensor) -> Tensor:
        """h, in float32 at least."""
        axis = -1 - self.spatial_dims
        if h.dim() <= self.spatial_dims or h.shape[axis] != self.in_channels:
            got = h.shape[axis] if h.dim() > self.spatial_dims else tuple(h.shape)
            raise ValueError(
                f"{self} reads {self.in_channels} decoder channels, got {got}; size the decoder by `likelihood.in_channels`"
            )
        return at_least_float32(h)

    def _check(self, x: Tensor, distribution: Distribution) -> None:
        expected = distribution.batch_shape + distribution.event_shape
        if x.shape != expected:
            raise ValueError(f"{self} was given data of shape {tuple(x.shape)} for features of {tuple(expected)}")
        if not torch.compiler.is_compiling():  # it reads a value off the device
            self.check(x)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        return [f"channels={self.channels}", *([] if self.levels == 256 else [f"levels={self.levels}"])]


class Discrete(Unscaled):
    """An :class:`Unscaled` likelihood over the levels k/(L − 1): ``log_prob`` is ``log_mass``, samples are levels.

    Raises:
        ValueError: ``levels`` is None, or x is off the levels.
    """

    levels: int
    observes: Observes = "level"

    def __init__(self, channels: int, *, spatial_dims: int = 2, levels: int | None = 256) -> None:
        if levels is None:
            raise ValueError(
                f"{type(self).__name__} is a distribution over levels and needs to know how many the data have, got"
                " levels=None; pass levels=256 for 8-bit data, or take a continuous family for real-valued data"
            )
        super().__init__(channels, spatial_dims, levels)

    def row_log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """The mass of the levels."""
        return self.row_log_mass(h, x)

    def row_cdf(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the levels."""
        return self.row_level_cdf(h, x)

    def check(self, x: Tensor) -> None:
        """Refuse values between the levels."""
        check_levels(x, self.levels)


@final
class FromFeatures(DataDistribution):
    """What an :class:`Unscaled` likelihood returns: batch ``(*batch,)``, event ``(channels, *space)``."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)
    support = constraints.unit_interval

    def __init__(self, likelihood: Unscaled, h: Tensor, channels: int) -> None:
        split = h.dim() - likelihood.spatial_dims - 1
        space = h.shape[split + 1 :]
        self._likelihood = likelihood
        self.has_rsample = likelihood.has_row_rsample
        self._h = h.reshape(*h.shape[: split + 1], math.prod(space))
        super().__init__(h.shape[:split], torch.Size((channels, *space)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event, in nats."""
        h, x = self._rows(value)
        return self._likelihood.row_log_prob(h, x).reshape(value.shape[: -len(self.event_shape)])

    def log_mass(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event's levels, in nats."""
        h, x = self._rows(value)
        return self._likelihood.row_log_mass(h, x).reshape(value.shape[: -len(self.event_shape)])

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each element: the same for a density; of channels that depend on each other, given those before."""
        below, upto = self._likelihood.row_cdf(*self._rows(value))
        return below.reshape(value.shape), upto.reshape(value.shape)

    def element_level_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Masses of the levels below each element's, and of those up to it."""
        below, upto = self._likelihood.row_level_cdf(*self._rows(value))
        return below.reshape(value.shape), upto.reshape(value.shape)

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
        """Variance, and the squared distance from the mean; None where the family has no formula that is worth its time."""
        moments = self.moments()
        return None if moments is None else (moments[1], (value - moments[0]).square())

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of each element, of the shape of the data; None where the family has no formula that is worth its time."""
        moments = self._likelihood.row_moments(self._expanded(torch.Size()))
        if moments is None:
            return None
        mean, variance = (moment.reshape(self.batch_shape + self.event_shape) for moment in moments)
        return mean, variance

    @property
    def mean(self) -> Tensor:
        """Expectation, of the shape of the data."""
        mean = self._likelihood.row_mean(self._expanded(torch.Size()))
        return mean.clamp(0, 1).reshape(self.batch_shape + self.event_shape)  # a sum of masses may be 1 + a rounding error

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws, in [0, 1]."""
        return self._draw(sample_shape, generator)

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

    def _draw(self, sample_shape: Shape, generator: torch.Generator | None) -> Tensor:
        shape = torch.Size(sample_shape)
        draws = self._likelihood.row_sample(self._expanded(shape), generator)
        return draws.reshape(shape + self.batch_shape + self.event_shape)

    def _rows(self, value: Tensor) -> tuple[Tensor, Tensor]:
        extra = value.shape[: value.dim() - len(self.batch_shape) - len(self.event_shape)]
        x = value.to(self._h.dtype).reshape(-1, self.event_shape[0], self._h.shape[-1])
        return self._expanded(extra), x

    def _expanded(self, extra: torch.Size) -> Tensor:
        """Features as rows, repeated for so many more leading axes."""
        return self._h.expand(extra + self._h.shape).reshape(-1, *self._h.shape[-2:])


MeanMap = Literal["identity", "unit"]
"""From features to the mean: themselves, or a sigmoid onto [0, 1]."""

LEAST_LOG_FACTOR = -12.0
"""Where predictions are perfect, no factor on their σ is small enough."""


class LocationScale(Likelihood):
    """A likelihood whose residual x − mean follows one law at every scale.

    Args:
        channels: the data's channels.
        scale: where σ comes from; :class:`Optimal` unless given.
        spatial_dims: 0 for tables, 1 for series, 2 for images and clips.
        levels: how many values a datum can take, at k/(levels − 1); None for real-valued data, which have no ``log_mass``.
        mean: ``"identity"``: features are the mean; ``"unit"``: a sigmoid maps them onto [0, 1].
        observes: what is trained on: the ``"density"`` of the values or the mass of their ``"level"``.

    Shapes:
        h ``(*batch, in_channels, *space)``: the mean's channels, then the scale's, then the family's own; x ``(*batch, channels, *space)``.

    Raises:
        ValueError: an argument is out of range, or ``observes="level"`` without levels.
    """

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
        self.mean: MeanMap = mean
        self.observes: Observes = observes

    solves_rmse: bool = False
    """Whether the best σ of any set of values is the root of their mean squared error."""

    @abstractmethod
    def law(self, own: Tensor) -> Law:
        """What the residual looks like at scale 1, given the family's own feature channels (most have none)."""

    @property
    def own_channels(self) -> int:
        """Feature channels from which the decoder shapes the residual law."""
        return 0

    @property
    def in_channels(self) -> int:
        """The mean's channels, the scale's and the family's own."""
        return self.channels + self._scale_channels + self.own_channels

    @property
    def _scale_channels(self) -> int:
        return self.channels * self.scale.extra_per_channel + self.scale.extra

    @property
    def _event_dims(self) -> int:
        return 1 + self.spatial_dims

    @property
    def has_scale(self) -> bool:
        """True: σ is what these likelihoods are about."""
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
    def sigma_is_rmse(self) -> bool:
        """Whether this is the density of a Gaussian with one σ."""
        one = not self.scale.predicted and self.scale.refit_per == "batch"
        return self.solves_rmse and one and self.observes == "density"

    @property
    def log_floor(self) -> float:
        """The scale's floor; for predicted scales, the least log factor."""
        return LEAST_LOG_FACTOR if self.scale.predicted else self.scale.log_floor

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
        """What the scale has stored."""
        return self.scale.all_stored()

    def start(self, std: float) -> None:
        """Start a learned scale from the std of the data."""
        self.scale.start(std)

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> Continuous | Discretized:
        """p(x|h): see :meth:`Likelihood.distribution`."""
        if x is not None and not refitted and observes in (None, self.observes):
            return self.forward(h, x)
        law, loc, raw = self._split(h)
        wanted = observes or self.observes
        log_scale = self.scale.refitted(raw, wanted) if refitted else self.scale(raw, wanted, None)
        return self._distribution(law, loc, log_scale, wanted)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Continuous | Discretized:
        """p(x|h); in training an :class:`Optimal` scale is solved for this x."""
        law, loc, raw = self._split(h)
        fit = None
        if x is not None:
            observed = self._observed(law, loc, x)
            if self.observes == "level":
                self._check_levels(observed.x)
            if self.training:

                def fit(per: Per) -> Tensor:
                    return best_batch_log_scale(observed, per, self._event_dims, self.log_floor, self._levels_of(self.observes))

        return self._distribution(law, loc, self.scale(raw, self.observes, fit), self.observes)

    def log_mass(self, h: Tensor, x: Tensor, *, refitted: bool = False, post_hoc: bool = False) -> Tensor:
        """Log-probability ``(*batch,)`` of the observed levels, in nats: each family's comparable number.

        Raises:
            ValueError: the data have no levels, x is off them, or no σ is known yet.
        """
        distribution, x = self._given(h, x, "level", refitted or post_hoc)
        log_prob: Tensor = distribution.log_prob(x)
        return log_prob

    def element_cdf(
        self, h: Tensor, x: Tensor, observes: Observes, *, refitted: bool = False, post_hoc: bool = False
    ) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape: of the density (both the same), or of the levels' masses.

        Raises:
            ValueError: levels are asked for and the data have none, x is off them, or no σ is known yet.

        >>> from sigma_vae import Fixed, Gaussian
        >>> likelihood = Gaussian(1, Fixed(0.5), spatial_dims=0, levels=3)
        >>> likelihood.element_cdf(torch.full((1, 1), 0.5), torch.full((1, 1), 0.5), "level")  # Φ(∓½)
        (tensor([[0.3085]]), tensor([[0.6915]]))
        """
        distribution, x = self._given(h, x, observes, refitted or post_hoc)
        return distribution.element_cdf(x)

    def _given(self, h: Tensor, x: Tensor, observes: Observes, post_hoc: bool) -> tuple[Continuous | Discretized, Tensor]:
        """The distribution of what is observed, in eval mode or after the fact, and x as it reads it."""
        if observes == "level" and self.levels is None:
            raise ValueError(
                f"{self} models real-valued data (levels=None), which have a density but no probability of a level;"
                " report `forward(h).log_prob(x)`, or say how many levels the data have"
            )
        law, loc, raw = self._split(h)
        observed = self._observed(law, loc, x)
        if observes == "level":
            self._check_levels(observed.x)
        log_scale = self.scale.refitted(raw, observes) if post_hoc else self.scale(raw, observes, None)
        return self._distribution(law, loc, log_scale, observes), observed.x

    def post_hoc(self, h: Tensor) -> Continuous | Discretized:
        """p(x|h) with the σ that :meth:`calibrate` solved, whatever the scale: what makes runs of different σ comparable."""
        law, loc, raw = self._split(h)
        return self._distribution(law, loc, self.scale.refitted(raw, self.observes), self.observes)

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve σ exactly for the density, and for the level masses where the data have levels; store both.

        An :class:`Optimal` scale reports with them from now on. The other scales keep their own σ, and hold these as *post-hoc*
        values (predicted scales: one factor on all predictions). Under ``torch.distributed``, every process must call this with
        its share of the data.

        Args:
            pairs: (h, x), gone through once for a closed form, and several times for the levels: a list, not a generator.
        """
        observed = _Reiterable(self, pairs)
        per = self.scale.refit_per
        density = best_log_scale(observed, per, self._event_dims, self.log_floor, None)
        if not torch.isfinite(density).all():
            raise ValueError("calibrate found no finite σ: the decoder's features are not finite (have its weights diverged?)")
        level = None
        if self.levels is not None:
            level = best_log_scale(observed, per, self._event_dims, self.log_floor, self.levels, start=density)
        self.scale.store("density", density)
        if level is not None:
            self.scale.store("level", level)

    def _check_levels(self, x: Tensor) -> None:
        assert self.levels is not None
        if not torch.compiler.is_compiling():  # it reads a value off the device
            check_levels(x, self.levels)

    def _levels_of(self, observes: Observes) -> int | None:
        """None where the density is observed."""
        return self.levels if observes == "level" else None

    def _distribution(self, law: Law, loc: Tensor, log_scale: Tensor, observes: Observes) -> Continuous | Discretized:
        if observes == "density":
            return Continuous(law, loc, log_scale, self._event_dims)
        assert self.levels is not None
        return Discretized(law, loc, log_scale, self._event_dims, self.levels)

    def _split(self, h: Tensor) -> tuple[Law, Tensor, Tensor]:
        """Law, mean and scale features."""
        axis = -self._event_dims
        if h.dim() < self._event_dims or h.shape[axis] != self.in_channels:
            got = h.shape[axis] if h.dim() >= self._event_dims else tuple(h.shape)
            raise ValueError(
                f"{self} reads {self.in_channels} decoder channels, got {got}; size the decoder by `likelihood.in_channels`"
            )
        loc, raw, own = torch.split(at_least_float32(h), [self.channels, self._scale_channels, self.own_channels], dim=axis)
        return self.law(own), (torch.sigmoid(loc) if self.mean == "unit" else loc), raw

    def _observed(self, law: Law, loc: Tensor, x: Tensor) -> Observed:
        if x.shape != loc.shape:
            raise ValueError(f"{self} was given data of shape {tuple(x.shape)} for a mean of shape {tuple(loc.shape)}")
        return Observed(law, loc.detach(), loc.new_zeros(()), x.to(loc.dtype))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(channels={self.channels}, scale={self.scale})"


class _Reiterable:
    """Pairs (h, x) as what the solver reads, one at a time."""

    def __init__(self, likelihood: LocationScale, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        if isinstance(pairs, Iterator):
            raise ValueError("calibrate goes through its data more than once: pass a list or a loader, not a generator")
        self.likelihood = likelihood
        self.pairs = pairs

    def __iter__(self) -> Iterator[Observed]:
        for h, x in self.pairs:
            law, loc, raw = self.likelihood._split(h)
            observed = self.likelihood._observed(law, loc, x)
            self._check(observed.x)
            yield observed._replace(base=self.likelihood.scale.base(raw))

    def _check(self, x: Tensor) -> None:
        low, high = x.aminmax()
        if not torch.isfinite(low + high):
            raise ValueError("calibrate was given data with NaN or infinite values; clean them first")
        if self.likelihood.levels is not None and (low < -0.01 or high > 1.01):
            raise ValueError(
                f"calibrate expects the {self.likelihood.levels} levels of the data in [0, 1], got values in [{float(low):.4g},"
                f" {float(high):.4g}]; scale them, or build the likelihood with levels=None for real-valued data"
            )
