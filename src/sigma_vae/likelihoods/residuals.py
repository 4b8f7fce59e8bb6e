"""Residual distributions at scale 1 (normal, Laplace, logistic, Student-t), and what likelihoods make of them."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, mse_loss, softplus

from sigma_vae.likelihoods.densities import (
    log1mexp,
    log_ndtr,
    normal_interval_log_prob,
    normal_log_prob,
    student_t_entropy,
    student_t_interval_log_prob,
    student_t_log_cdf,
    student_t_log_prob,
)
from sigma_vae.types import DataDistribution, at_least_float32


class ResidualDistribution(Protocol):
    r"""The distribution of a residual at scale 1: a density symmetric about 0.

    ``statistic`` and ``power`` say how a scale is solved. At the best σ the mean of ``statistic(r/σ)`` is 1. Where
    ``closed_form`` is true, multiplying σ by :math:`\overline{\text{statistic}}^{1/\text{power}}` leads there at once;
    elsewhere Newton's method does, which needs a log-density that is concave in log σ. :data:`RESIDUALS` makes the
    distribution again from ``name`` and ``parameters``.
    """

    name: str
    parameters: tuple[float | Tensor, ...]
    power: int
    closed_form: bool

    def log_prob(self, z: Tensor) -> Tensor:
        """Elementwise log-density."""

    def log_cdf(self, z: Tensor) -> Tensor:
        """Elementwise log of the mass below z."""

    def interval_log_prob(self, center: Tensor, width: Tensor) -> Tensor:
        """Elementwise log of the mass on center ± width/2."""

    def statistic(self, z: Tensor) -> Tensor:
        """Elementwise; its mean is 1 at the best scale."""

    def variance(self) -> float | Tensor:
        """Variance at scale 1; infinite where there is none."""

    def entropy(self) -> float | Tensor:
        """Differential entropy of one residual, in nats; a tensor broadcasts to the event."""

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the shape, type and device of ``like``."""


class _Normal:
    name = "normal"
    parameters: tuple[float | Tensor, ...] = ()
    power = 2
    closed_form = True
    log_prob = staticmethod(normal_log_prob)
    log_cdf = staticmethod(log_ndtr)
    interval_log_prob = staticmethod(normal_interval_log_prob)
    statistic = staticmethod(torch.square)

    @staticmethod
    def variance() -> float:
        return 1.0

    @staticmethod
    def entropy() -> float:
        return 0.5 * math.log(2 * math.pi * math.e)

    @staticmethod
    def sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format).normal_(generator=generator)


class _Laplace:
    name = "laplace"
    parameters: tuple[float | Tensor, ...] = ()
    power = 1
    closed_form = True
    statistic = staticmethod(torch.abs)

    @staticmethod
    def log_prob(z: Tensor) -> Tensor:
        return -z.abs() - math.log(2)

    @staticmethod
    def log_cdf(z: Tensor) -> Tensor:
        below = z.clamp(max=0) - math.log(2)
        above = torch.log1p(-0.5 * torch.exp(-z.clamp(min=0)))
        return torch.where(z < 0, below, above)

    @staticmethod
    def interval_log_prob(center: Tensor, width: Tensor) -> Tensor:
        """On one side of 0, cancellation depends on the width alone; across 0, the two masses are added."""
        upper, lower = center.abs() + 0.5 * width, center.abs() - 0.5 * width
        outside = -lower.clamp(min=0) - math.log(2) + log1mexp(width)
        across = torch.log(-0.5 * torch.expm1(-upper) - 0.5 * torch.expm1(lower.clamp(max=0)))
        return torch.where(lower >= 0, outside, across)

    @staticmethod
    def variance() -> float:
        return 2.0

    @staticmethod
    def entropy() -> float:
        return 1 + math.log(2)

    @staticmethod
    def sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Differences of two exponential draws."""
        waits = _exponentials(like, generator)
        return waits[0] - waits[1]


class _Logistic:
    name = "logistic"
    parameters: tuple[float | Tensor, ...] = ()
    power = 2
    closed_form = False
    log_cdf = staticmethod(logsigmoid)

    @staticmethod
    def log_prob(z: Tensor) -> Tensor:
        size = z.abs()
        return -size - 2 * softplus(-size)

    @staticmethod
    def interval_log_prob(center: Tensor, width: Tensor) -> Tensor:
        """σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l − u)): nothing cancels, wherever the interval lies."""
        center = -center.abs()
        return logsigmoid(center + 0.5 * width) + logsigmoid(0.5 * width - center) + log1mexp(width)

    @staticmethod
    def statistic(z: Tensor) -> Tensor:
        """z·tanh(z/2): a square near 0, |z| far away."""
        return z * torch.tanh(0.5 * z)

    @staticmethod
    def variance() -> float:
        return math.pi**2 / 3

    @staticmethod
    def entropy() -> float:
        return 2.0

    @staticmethod
    def sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Differences of two Gumbel draws."""
        waits = _exponentials(like, generator).log()
        return waits[0] - waits[1]


class _StudentT:
    name = "student-t"
    power = 2
    closed_form = False

    def __init__(self, df: float | Tensor) -> None:
        self.df = df
        self.parameters: tuple[float | Tensor, ...] = (df,)

    def log_prob(self, z: Tensor) -> Tensor:
        return student_t_log_prob(z, self.df)

    def log_cdf(self, z: Tensor) -> Tensor:
        return student_t_log_cdf(z, self.df)

    def interval_log_prob(self, center: Tensor, width: Tensor) -> Tensor:
        return student_t_interval_log_prob(center, width, self.df)

    def statistic(self, z: Tensor) -> Tensor:
        """(ν + 1) z² / (ν + z²), bounded by ν + 1: no residual outweighs the others."""
        square = z.square()
        return (self.df + 1) * square / (self.df + square)

    def variance(self) -> float | Tensor:
        """ν/(ν − 2); infinite up to ν = 2."""
        if isinstance(self.df, Tensor):
            return self.df / (self.df - 2).clamp_min(0)
        return self.df / (self.df - 2) if self.df > 2 else math.inf

    def entropy(self) -> float | Tensor:
        return student_t_entropy(self.df)

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Bailey's polar method (1994): √(ν (U^(−2/ν) − 1)) cos 2πV, differentiable in ν."""
        wait, turn = torch.empty(2, *like.shape, dtype=like.dtype, device=like.device)
        wait.exponential_(generator=generator)
        turn.uniform_(0, 2 * math.pi, generator=generator)
        draw: Tensor = (self.df * torch.expm1(2 * wait / self.df)).sqrt() * torch.cos(turn)
        return draw


def _exponentials(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Two standard exponential draws for each element, ``(2, *shape)``."""
    return torch.empty(2, *like.shape, dtype=like.dtype, device=like.device).exponential_(generator=generator)


NORMAL: ResidualDistribution = _Normal()
LAPLACE: ResidualDistribution = _Laplace()
LOGISTIC: ResidualDistribution = _Logistic()


def student_t(df: float | Tensor) -> ResidualDistribution:
    r"""Student's t with ν degrees of freedom: a number, or a tensor that broadcasts to the residuals.

    .. math:: \log f(z) = \log C_\nu - \tfrac{\nu + 1}{2} \log(1 + z^2/\nu)

    >>> student_t(4.0).log_prob(torch.zeros(1))  # log 3/8
    tensor([-0.9808])
    """
    return _StudentT(df)


RESIDUALS: dict[str, Callable[..., ResidualDistribution]] = {
    kind.name: kind for kind in (_Normal, _Laplace, _Logistic, _StudentT)
}
"""Classes by name: a compiled graph's solver makes the distribution again from name and parameters."""


# -- distributions of data: a residual, moved, scaled, and perhaps put in bins -----------------------------------------

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


def _statistic(residual: ResidualDistribution, value: Tensor, loc: Tensor) -> Tensor:
    """The statistic of value − loc. A square is computed in one pass over the values, and its gradient in another."""
    if residual.statistic is torch.square:
        loc, value = torch.broadcast_tensors(loc, value)  # type: ignore[no-untyped-call]
        return mse_loss(loc, value, reduction="none")
    return residual.statistic(value - loc)


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
        total = _statistic(residual, at_least_float32(value), self.loc).sum(self._event_axes)
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
