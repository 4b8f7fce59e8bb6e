"""Distributions of location-scale likelihoods: a residual distribution, moved, scaled, and perhaps put in bins."""

import math
import warnings
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor
from torch.distributions import constraints

from sigma_vae.likelihoods.residuals import ResidualDistribution
from sigma_vae.types import DataDistribution, at_least_float32

Shape = torch.Size | list[int] | tuple[int, ...]


class _LocatedAndScaled(DataDistribution):
    """Batch ``(*batch,)``, event ``(C, *space)``; the likelihood has checked what it is made of."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)

    def __init__(self, residual: ResidualDistribution, loc: Tensor, log_scale: Tensor, event_dims: int) -> None:
        missing = max(event_dims - log_scale.dim(), 0)
        self.residual = residual
        self.loc = loc
        self.log_scale = log_scale.reshape((1,) * missing + log_scale.shape)
        self._event_axes = tuple(range(-event_dims, 0))
        split = loc.dim() - event_dims
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    @abstractmethod
    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each element, of the data's shape."""

    @property
    def scale(self) -> Tensor:
        """σ, broadcastable to the event."""
        return self.log_scale.exp()

    @property
    def law(self) -> ResidualDistribution:
        """Deprecated name of ``residual``."""
        warnings.warn("law is now residual", DeprecationWarning, stacklevel=2)
        return self.residual

    @property
    def residual_variance(self) -> Tensor:
        """Variance of x − loc, broadcastable to the event; of levels, before they are rounded and cut."""
        return torch.exp(2 * self.log_scale) * self.residual.variance()

    def weighted_log_prob(self, value: Tensor, beta: float) -> Tensor:
        r"""The β-NLL objective (Seitzer et al. 2022) :math:`\sum_i \sigma_i^{2\beta} \log p(x_i)`, weights detached.

        It lessens the pull of the best predicted elements. For β ≠ 0 it is no likelihood.
        """
        return self._sum(self.element_log_prob(value) * torch.exp(2 * beta * self.log_scale.detach()))

    def _draw(self, sample_shape: Shape, generator: torch.Generator | None) -> Tensor:
        like = self.loc.expand(*sample_shape, *self.loc.shape)
        return like + self.scale * self.residual.sample(like, generator)

    def _check_event(self, value: Tensor) -> None:
        event_dims = len(self._event_axes)
        if value.shape[-event_dims:] != self.event_shape:
            event = ", ".join(map(str, self.event_shape))
            raise ValueError(f"expected values of shape (..., {event}), got {tuple(value.shape)}: they would be broadcast")

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the event, counting a broadcast value once for each element it stands for."""
        size = math.prod([values.shape[axis] for axis in self._event_axes])  # no generator: torch.compile cannot trace one
        return values.sum(self._event_axes) * (self.event_shape.numel() / size)


@final
class Continuous(_LocatedAndScaled):
    r"""A density over real values, independent given loc and scale.

    .. math:: \log p(x) = \sum_i \log f\left(\frac{x_i - \mu_i}{\sigma_i}\right) - \log \sigma_i

    Shapes:
        loc ``(*batch, C, *space)``, log_scale broadcastable to it, ``log_prob`` ``(*batch,)``.
    """

    support = constraints.real
    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density of the whole event, in nats.

        Where the event has one σ, and the density is :math:`f(0) e^{-s(z)/k}` with a statistic of power k (normal, Laplace), the
        statistic of the residuals is summed first: half as many passes over the values, and half the gradient's.
        """
        residual, log_scale = self.residual, self.log_scale
        if not residual.closed_form or math.prod([log_scale.shape[axis] for axis in self._event_axes]) > 1:
            return self._sum(residual.log_prob(self._residual(value))) - self._sum(log_scale)
        self._check_event(value)
        total = residual.statistic(at_least_float32(value) - self.loc).sum(self._event_axes)
        one = log_scale.flatten(-len(self._event_axes)).squeeze(-1)
        at_zero = residual.log_prob(one.new_zeros(()))
        return self.event_shape.numel() * (at_zero - one) - total * (torch.exp(-residual.power * one) / residual.power)

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each element."""
        return self.residual.log_prob(self._residual(value)) - self.log_scale

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) of each element, twice: a single value has no mass.

        >>> from sigma_vae import Fixed, Laplace
        >>> p = Laplace(1, Fixed(0.5), spatial_dims=0)(torch.zeros(1, 1))
        >>> p.element_cdf(torch.full((1, 1), -0.5))  # e⁻¹/2
        (tensor([[0.1839]]), tensor([[0.1839]]))
        """
        cdf = self.residual.log_cdf(self._residual(value)).exp()
        return cdf, cdf

    @property
    def exponential_family(self) -> bool:  # type: ignore[override]
        """Whether σ has a closed form: normal and Laplace."""
        return self.residual.closed_form

    def standardised(self, value: Tensor) -> Tensor:
        """(x − loc)/σ."""
        return (at_least_float32(value) - self.loc) / self.scale

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Variance, and the squared residual."""
        return self.residual_variance, (at_least_float32(value) - self.loc).square()

    @property
    def mean(self) -> Tensor:
        """The location: every residual distribution is symmetric."""
        return self.loc

    def entropy(self) -> Tensor:
        """Differential entropy of the whole event, in nats."""
        return self._sum(self.log_scale + self.residual.entropy()).expand(self.batch_shape)

    def rsample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws with a gradient to loc and scale."""
        return self._draw(sample_shape, generator)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws without a gradient."""
        return self.rsample(sample_shape, generator)

    def _residual(self, value: Tensor) -> Tensor:
        self._check_event(value)
        return (at_least_float32(value) - self.loc) * torch.exp(-self.log_scale)


@final
class Discretized(_LocatedAndScaled):
    r"""Bin probabilities of the levels k/(L−1): the density's mass around each; the end bins take the tails.

    .. math:: P(k) = F\left(\frac{(k + ½)/(L-1) - \mu}{\sigma}\right) - F\left(\frac{(k - ½)/(L-1) - \mu}{\sigma}\right)

    Shapes:
        as :class:`Continuous`; values and samples are levels in [0, 1].
    """

    support = constraints.unit_interval

    def __init__(self, residual: ResidualDistribution, loc: Tensor, log_scale: Tensor, event_dims: int, levels: int) -> None:
        super().__init__(residual, loc, log_scale, event_dims)
        self.levels = levels

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the whole event's bins, in nats."""
        return self._sum(self.element_log_prob(value))

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each element's bin."""
        level, loc, inverse_scale, top = self._in_levels(value)
        inner = self.residual.interval_log_prob((level - loc) * inverse_scale, inverse_scale)
        below, above = 0.5 - loc, loc - (top - 0.5)
        tail = self.residual.log_cdf(torch.where(level <= 0, below, above) * inverse_scale)
        return torch.where((level <= 0) | (level >= top), tail, inner)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of the levels below each element's, and of those up to it: F at both edges of the bin."""
        level, loc, inverse_scale, top = self._in_levels(value)
        below, upto = (self.residual.log_cdf((level + side - loc) * inverse_scale).exp() for side in (-0.5, 0.5))
        return below.masked_fill(level <= 0, 0), upto.masked_fill(level >= top, 1)

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Variance, and that times the squared score: x − loc is cut at the end levels, and less than σ says."""
        return self.residual_variance, self.residual_variance * scores.square()

    @property
    def mean(self) -> Tensor:
        """Σ k P(k)/(L−1), summed as the masses above each bin edge."""
        total = torch.zeros_like(self.loc)
        for k in range(self.levels - 1):
            edge = (k + 0.5) / (self.levels - 1)
            total += self.residual.log_cdf((self.loc - edge) / self.scale).exp()
        return total / (self.levels - 1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws of levels in [0, 1]."""
        draw, top = self._draw(sample_shape, generator), self.levels - 1
        return torch.round(draw * top).clamp(0, top) / top

    def _in_levels(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Values, location and 1/σ in units of levels, and the highest level.

        The mean is rounded once for all bins, so that their probabilities sum to one in float32 too.
        """
        self._check_event(value)
        top = self.levels - 1
        return torch.round(at_least_float32(value) * top), self.loc * top, torch.exp(-self.log_scale) / top, top
