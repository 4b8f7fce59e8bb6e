"""The distributions that location-scale likelihoods return: a residual law, moved, scaled, and perhaps put in bins."""

import math
from abc import abstractmethod
from typing import Protocol, final

import torch
from torch import Tensor
from torch.distributions import constraints

from sigma_vae.types import DataDistribution

__all__ = ["Continuous", "Discretized", "Law", "check_levels"]

Shape = torch.Size | list[int] | tuple[int, ...]


class Law(Protocol):
    r"""What a residual looks like at scale 1: a density symmetric about 0.

    ``statistic`` and ``power`` say how a scale is solved: at the best σ the mean of ``statistic(r/σ)`` is 1, and multiplying σ
    by :math:`\overline{\text{statistic}}^{1/\text{power}}` leads there where ``closed_form``. Where not, Newton's method does, for
    laws whose log-density is concave in log σ. ``name`` and ``parameters`` say which law it is: :data:`LAWS` makes it again of them.
    """

    name: str
    parameters: tuple[float | Tensor, ...]
    power: int
    closed_form: bool

    def log_prob(self, z: Tensor) -> Tensor:
        """Elementwise log-density."""
        ...

    def log_cdf(self, z: Tensor) -> Tensor:
        """Elementwise log of the mass below z."""
        ...

    def interval_log_prob(self, center: Tensor, width: Tensor) -> Tensor:
        """Elementwise log of the mass on center ± width/2."""
        ...

    def statistic(self, z: Tensor) -> Tensor:
        """Elementwise; its mean is 1 at the best scale."""
        ...

    def variance(self) -> float | Tensor:
        """Variance at scale 1; infinite where there is none."""
        ...

    def entropy(self) -> float | Tensor:
        """Differential entropy in nats, of one residual; a tensor broadcasts to the event."""
        ...

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the shape, type and device of ``like``."""
        ...


class _EventDistribution(DataDistribution):
    """Batch ``(*batch,)``, event ``(C, *space)``; nothing is validated a second time, the likelihood has done it."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)

    def __init__(self, law: Law, loc: Tensor, log_scale: Tensor, event_dims: int) -> None:
        missing = max(event_dims - log_scale.dim(), 0)
        self.law = law
        self.loc = loc
        self.log_scale = log_scale.reshape((1,) * missing + log_scale.shape)
        self._event_axes = tuple(range(-event_dims, 0))
        split = loc.dim() - event_dims
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=False)

    @property
    def scale(self) -> Tensor:
        """σ, broadcastable to the event."""
        return self.log_scale.exp()

    @abstractmethod
    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each element, of the data's shape."""

    @property
    def residual_variance(self) -> Tensor:
        """Variance of x − loc, broadcastable to the event; of levels, before they are put in bins and cut at the ends."""
        return torch.exp(2 * self.log_scale) * self.law.variance()

    def weighted_log_prob(self, value: Tensor, beta: float) -> Tensor:
        r"""The β-NLL objective (Seitzer et al. 2022), with its sign: :math:`\sum_i \sigma_i^{2\beta} \log p(x_i)`, weights detached.

        It lessens the pull of the elements that are predicted best, on which a predicted σ otherwise spends the training. An
        objective, not a likelihood, but for β = 0.
        """
        return self._sum(self.element_log_prob(value) * torch.exp(2 * beta * self.log_scale.detach()))

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
class Continuous(_EventDistribution):
    r"""A density over real values, independent given loc and scale.

    .. math:: \log p(x) = \sum_i \log f\left(\frac{x_i - \mu_i}{\sigma_i}\right) - \log \sigma_i

    Shapes:
        loc ``(*batch, C, *space)``, log_scale broadcastable to it, ``log_prob`` ``(*batch,)``.
    """

    support = constraints.real
    has_rsample = True

    @property
    def exponential_family(self) -> bool:  # type: ignore[override]
        """Whether the residual is normal or Laplace."""
        return self.law.closed_form

    def standardised(self, value: Tensor) -> Tensor:
        """(x − loc)/σ."""
        return (value - self.loc) / self.scale

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Variance, and the squared residual."""
        return self.residual_variance, (value - self.loc).square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the whole event, in nats."""
        return self._sum(self.law.log_prob(self._residual(value))) - self._sum(self.log_scale)

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of each element."""
        return self.law.log_prob(self._residual(value)) - self.log_scale

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F(x) of each element, twice: a single value has no mass.

        >>> from sigma_vae import Fixed, Laplace
        >>> p = Laplace(1, Fixed(0.5), spatial_dims=0)(torch.zeros(1, 1))
        >>> p.element_cdf(torch.full((1, 1), -0.5))  # e⁻¹/2
        (tensor([[0.1839]]), tensor([[0.1839]]))
        """
        cdf = self.law.log_cdf(self._residual(value)).exp()
        return cdf, cdf

    def _residual(self, value: Tensor) -> Tensor:
        self._check_event(value)
        return (value - self.loc) * torch.exp(-self.log_scale)

    @property
    def mean(self) -> Tensor:
        """The location: every law is symmetric."""
        return self.loc

    def entropy(self) -> Tensor:
        """Differential entropy of the whole event, in nats."""
        return self._sum(self.log_scale + self.law.entropy()).expand(self.batch_shape)

    def rsample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws with a gradient to loc and scale."""
        like = self.loc.expand(*sample_shape, *self.loc.shape)
        return like + self.scale * self.law.sample(like, generator)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws without a gradient."""
        return self.rsample(sample_shape, generator)


@final
class Discretized(_EventDistribution):
    r"""Probability masses of the levels k/(L−1): the law's mass on the bin around each, the end bins taking the tails.

    .. math:: P(k) = F\left(\frac{(k + ½)/(L-1) - \mu}{\sigma}\right) - F\left(\frac{(k - ½)/(L-1) - \mu}{\sigma}\right)

    Shapes:
        as :class:`Continuous`; values and samples are levels in [0, 1].
    """

    support = constraints.unit_interval

    def __init__(self, law: Law, loc: Tensor, log_scale: Tensor, event_dims: int, levels: int) -> None:
        super().__init__(law, loc, log_scale, event_dims)
        self.levels = levels

    def squared_errors(self, value: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Variance, and that times the squared score: x − loc is cut at the end levels, and less than σ says."""
        return self.residual_variance, self.residual_variance * scores.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-mass of the whole event, in nats."""
        return self._sum(self.element_log_prob(value))

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Log-mass of each element's bin."""
        self._check_event(value)
        top = self.levels - 1
        # In units of levels, so that the mean is rounded once for all bins: their masses then sum to one in float32 too.
        level, loc = torch.round(value * top), self.loc * top
        inverse_scale = torch.exp(-self.log_scale) / top
        inner = self.law.interval_log_prob((level - loc) * inverse_scale, inverse_scale)
        below, above = 0.5 - loc, loc - (top - 0.5)
        tail = self.law.log_cdf(torch.where(level <= 0, below, above) * inverse_scale)
        return torch.where((level <= 0) | (level >= top), tail, inner)

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Masses of the levels below each element's, and of those up to it: the law's F at both edges of the bin."""
        self._check_event(value)
        top = self.levels - 1
        level, loc = torch.round(value * top), self.loc * top
        inverse_scale = torch.exp(-self.log_scale) / top
        below, upto = (self.law.log_cdf((level + side - loc) * inverse_scale).exp() for side in (-0.5, 0.5))
        return below.masked_fill(level <= 0, 0), upto.masked_fill(level >= top, 1)

    @property
    def mean(self) -> Tensor:
        """Σ k P(k)/(L−1), summed as the masses above each bin edge."""
        total = torch.zeros_like(self.loc)
        for k in range(self.levels - 1):
            edge = (k + 0.5) / (self.levels - 1)
            total += self.law.log_cdf((self.loc - edge) / self.scale).exp()
        return total / (self.levels - 1)

    @torch.no_grad()
    def sample(self, sample_shape: Shape = torch.Size(), generator: torch.Generator | None = None) -> Tensor:  # noqa: B008
        """Draws of levels in [0, 1]."""
        like = self.loc.expand(*sample_shape, *self.loc.shape)
        top = self.levels - 1
        draw = like + self.scale * self.law.sample(like, generator)
        return torch.round(draw * top).clamp(0, top) / top


def check_levels(x: Tensor, levels: int) -> None:
    """Refuse values that are not levels k/(levels − 1): a mass of a bin between two levels would mean nothing.

    Raises:
        ValueError: a value lies off the levels by more than a hundredth of their distance, or outside [0, 1].
    """
    top = levels - 1
    off = (x * top - torch.round(x * top).clamp(0, top)).abs().max() if x.numel() else 0.0
    if not float(off) <= 0.01:
        low, high = (float(v) for v in x.aminmax())
        raise ValueError(
            f"log_mass expects levels k/{top} in [0, 1] (levels={levels}), got values in [{low:.4g}, {high:.4g}] that lie"
            f" {float(off):.3g} of a level off; scale {levels}-level data by 1/{top} and do not add noise,"
            " or build the likelihood with the data's own `levels`"
        )
