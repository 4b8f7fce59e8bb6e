"""The template of all location-scale likelihoods: a residual law, a scale, and the map from features to the mean."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from sigma_vae.likelihoods.densities import at_least_float32
from sigma_vae.likelihoods.distributions import Continuous, Discretized, Law, check_levels
from sigma_vae.likelihoods.scales import Optimal, Per, Scale
from sigma_vae.likelihoods.solve import Observed, best_log_scale
from sigma_vae.likelihoods.solve_in_graph import best_batch_log_scale
from sigma_vae.types import Likelihood, Observes

__all__ = ["LocationScale", "MeanMap"]

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
                    return best_batch_log_scale(
                        observed, per, self._event_dims, self._log_floor, self._levels_of(self.observes)
                    )

        return self._distribution(law, loc, self.scale(raw, self.observes, fit), self.observes)

    def log_mass(self, h: Tensor, x: Tensor, *, post_hoc: bool = False) -> Tensor:
        """Log-probability ``(*batch,)`` of the observed levels, in nats: each family's comparable number.

        Raises:
            ValueError: the data have no levels, x is off them, or no σ is known yet.
        """
        distribution, x = self._given(h, x, "level", post_hoc)
        log_prob: Tensor = distribution.log_prob(x)
        return log_prob

    def element_cdf(self, h: Tensor, x: Tensor, observes: Observes, *, post_hoc: bool = False) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape: of the density (both the same), or of the levels' masses.

        Raises:
            ValueError: levels are asked for and the data have none, x is off them, or no σ is known yet.

        >>> from sigma_vae import Fixed, Gaussian
        >>> likelihood = Gaussian(1, Fixed(0.5), spatial_dims=0, levels=3)
        >>> likelihood.element_cdf(torch.full((1, 1), 0.5), torch.full((1, 1), 0.5), "level")  # Φ(∓½)
        (tensor([[0.3085]]), tensor([[0.6915]]))
        """
        distribution, x = self._given(h, x, observes, post_hoc)
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
        density = best_log_scale(observed, per, self._event_dims, self._log_floor, None)
        if not torch.isfinite(density).all():
            raise ValueError("calibrate found no finite σ: the decoder's features are not finite (have its weights diverged?)")
        level = None
        if self.levels is not None:
            level = best_log_scale(observed, per, self._event_dims, self._log_floor, self.levels, start=density)
        self.scale.store("density", density)
        if level is not None:
            self.scale.store("level", level)

    def _check_levels(self, x: Tensor) -> None:
        assert self.levels is not None
        if not torch.compiler.is_compiling():  # it reads a value off the device
            check_levels(x, self.levels)

    @property
    def _log_floor(self) -> float:
        return LEAST_LOG_FACTOR if self.scale.predicted else self.scale.log_floor

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
