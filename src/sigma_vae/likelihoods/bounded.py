"""Families on the unit interval."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sigma_vae.likelihoods.base import Unscaled
from sigma_vae.registry import register
from sigma_vae.types import MeanMap, Observes

__all__ = ["Bernoulli", "ContinuousBernoulli"]


@register.likelihood("bernoulli")
@final
class Bernoulli(Unscaled):
    r"""A coin for each value: a likelihood of binary data; of grey data an objective (as in the paper).

    .. math:: \log p(x \mid h) = \sum_i x_i \log \sigma(h_i) + (1 - x_i) \log \sigma(-h_i)

    For 0 < x < 1 this is a negative cross-entropy: it neither sums nor integrates to one, its "ELBO" bounds nothing,
    and ``log_mass`` raises. With ``levels=2`` it is a likelihood. :class:`ContinuousBernoulli` has the normaliser.

    Shapes:
        h and x ``(*batch, channels, *space)``.

    Raises:
        ValueError: x is outside [0, 1], h has the wrong channels, or a bin probability of grey data is asked for.

    >>> likelihood = Bernoulli(channels=1, levels=2)
    >>> likelihood(torch.zeros(2, 1, 2, 2)).log_prob(torch.ones(2, 1, 2, 2))  # four coins
    tensor([-2.7726, -2.7726])
    """

    unit_interval = True
    mean_map: MeanMap | None = "unit"

    def __init__(self, channels: int, *, spatial_dims: int = 2, levels: int | None = 256) -> None:
        super().__init__(channels, spatial_dims=spatial_dims, levels=levels)
        self.normalised = levels == 2
        self.observes = "level" if self.normalised else "density"

    @property
    def in_channels(self) -> int:
        """A logit for each channel."""
        return self.channels

    def row_log_prob(self, h: Tensor, x: Tensor, observes: Observes) -> Tensor:
        """Negative cross-entropy."""
        # Both terms are at most 0: where a logit is ±1e4 nothing large is subtracted from something large.
        return (x * logsigmoid(h) + (1 - x) * logsigmoid(-h)).sum((1, 2))

    def row_cdf(self, h: Tensor, x: Tensor, observes: Observes) -> tuple[Tensor, Tensor]:
        """Up to a zero there is its probability, up to a one everything."""
        if not self.normalised:
            raise ValueError(
                f"{self} is an objective, not a likelihood, of data with {self.levels} levels: it has no distribution function; build"
                " it with levels=2 for binary data, or take ContinuousBernoulli"
            )
        one, zero = x > 0.5, torch.sigmoid(-h)
        return torch.where(one, zero, 0), torch.where(one, 1, zero)

    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """A coin's p and p(1 − p)."""
        p = torch.sigmoid(h)
        return p, p * torch.sigmoid(-h)

    def row_mean(self, h: Tensor) -> Tensor:
        """The probability of a one."""
        return torch.sigmoid(h)

    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Zeros and ones."""
        return torch.bernoulli(torch.sigmoid(h), generator=generator)


@register.likelihood("continuous-bernoulli")
@final
class ContinuousBernoulli(Unscaled):
    r"""The density on [0, 1] that is log-linear in x: Bernoulli with its normaliser (Loaiza-Ganem & Cunningham 2019).

    .. math:: \log p(x \mid h) = \sum_i h_i x_i - \log \frac{e^{h_i} - 1}{h_i}

    In its logit h it is an exponential distribution cut to [0, 1], uniform at h = 0; only its digits need special care
    there. A bin's probability is the density over the bin, which at both ends has half the width:
    :math:`\log\int_a^b e^{hx}dx = ha + \log(b-a) + \log\frac{e^{h(b-a)}-1}{h(b-a)}`. Draws are :math:`\log(1 + u(e^h - 1))/h` of
    uniform u, with a gradient to h (``rsample``).

    Shapes:
        h and x ``(*batch, channels, *space)``.

    Raises:
        ValueError: x is outside [0, 1], h has the wrong channels, or a bin probability is asked for where there are no
            levels.

    >>> likelihood = ContinuousBernoulli(channels=1)
    >>> p = likelihood(torch.tensor([[0.0], [1e-4], [-1e4]])[..., None, None])
    >>> p.log_prob(torch.zeros(3, 1, 1, 1))  # the last density is 1e4 at 0
    tensor([-0.0000e+00, -5.0000e-05,  9.2103e+00])
    >>> p.mean.flatten()
    tensor([5.0000e-01, 5.0001e-01, 1.0000e-04])
    """

    unit_interval = True
    has_row_rsample = True

    @property
    def in_channels(self) -> int:
        """A logit for each channel."""
        return self.channels

    def row_log_prob(self, h: Tensor, x: Tensor, observes: Observes) -> Tensor:
        """Log-density, or the log of its integral over the bins."""
        if observes == "density":
            rate, x = _falling(h), torch.where(h > 0, 1 - x, x)  # mirrored, so that no large terms are subtracted
            return -(rate * x + _log_normaliser(rate)).sum((1, 2))
        level, top = self._levels(x)
        rate, level = _falling(h), torch.where(h > 0, top - level, level)
        start = (level - 0.5).clamp_min(0) / top
        width = ((level + 0.5).clamp_max(top) / top - start).clamp_max(1)
        log_integral = torch.log(width) + _log_normaliser(rate * width)
        return (log_integral - rate * start - _log_normaliser(rate)).sum((1, 2))

    def row_cdf(self, h: Tensor, x: Tensor, observes: Observes) -> tuple[Tensor, Tensor]:
        """F of the density: at x, or at both edges of its bin."""
        if observes == "density":
            cdf = _cdf(x, h)
            return cdf, cdf
        level, top = self._levels(x)
        return _cdf((level - 0.5).clamp_min(0) / top, h), _cdf((level + 0.5).clamp_max(top) / top, h)

    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the density."""
        return self.row_mean(h), _variance(_falling(h))

    def row_mean(self, h: Tensor) -> Tensor:
        """Mean of the density."""
        mean = _falling_mean(h.abs())
        return torch.where(h > 0, 1 - mean, mean)

    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """By the inverse of the cumulative distribution, with a gradient."""
        return _quantile(torch.rand(h.shape, dtype=h.dtype, device=h.device, generator=generator), h)

    def _levels(self, x: Tensor) -> tuple[Tensor, int]:
        """Numbers of the levels, and the highest."""
        assert self.levels is not None
        return torch.round(x * (self.levels - 1)), self.levels - 1


# With t = |h| and x mirrored where h > 0, all of it is the exponential distribution on [0, 1], p(x) = e^{-tx} / ∫ e^{-tx}dx.
# Near t = 0 the closed forms cancel (their gradients in float32 from t = 0.01 on); a power series keeps the digits.
SERIES_BELOW = 0.5
QUANTILE_SERIES_BELOW = 0.1


def _falling(h: Tensor) -> Tensor:
    """|h|, with a gradient at 0."""
    return torch.where(h > 0, h, -h)


def _log_normaliser(t: Tensor) -> Tensor:
    """Log of ∫ e^{-tx} dx = (1 - e^{-t})/t over [0, 1], for t ≥ 0."""
    small, large = t.clamp(max=SERIES_BELOW), t.clamp(min=SERIES_BELOW)
    s = small.square()
    series = s * (1 / 24 - s * (1 / 2880 - s * (1 / 181440 - s * (1 / 9676800 - s / 479001600)))) - small / 2
    return torch.where(t < SERIES_BELOW, series, torch.log(-torch.expm1(-large)) - torch.log(large))


def _falling_mean(t: Tensor) -> Tensor:
    """Mean of the density proportional to e^{-tx} on [0, 1], for t ≥ 0."""
    small, large = t.clamp(max=SERIES_BELOW), t.clamp(min=SERIES_BELOW)
    s = small.square()
    series = 0.5 - small * (1 / 12 - s * (1 / 720 - s * (1 / 30240 - s * (1 / 1209600 - s / 47900160))))
    return torch.where(t < SERIES_BELOW, series, 1 / large - 1 / torch.expm1(large))


def _variance(t: Tensor) -> Tensor:
    """Variance of the density proportional to e^{-tx} on [0, 1], for t ≥ 0: 1/t² − 1/(4 sinh²(t/2))."""
    small, large = t.clamp(max=SERIES_BELOW), t.clamp(min=SERIES_BELOW)
    s = small.square()
    series = 1 / 12 - s * (1 / 240 - s * (1 / 6048 - s * (1 / 172800 - s / 5322240)))
    gap = torch.expm1(-large)
    return torch.where(t < SERIES_BELOW, series, 1 / large.square() - torch.exp(-large) / gap.square())


def _cdf(x: Tensor, h: Tensor) -> Tensor:
    """Mass below x: (e^{hx} − 1)/(e^h − 1), from the end where the density is higher."""
    t, far = _falling(h), torch.where(h > 0, 1 - x, x)
    mass = far * torch.exp(_log_normaliser(t * far) - _log_normaliser(t))
    return torch.where(h > 0, 1 - mass, mass)


def _quantile(u: Tensor, h: Tensor) -> Tensor:
    """The x in [0, 1] below which a mass u lies: log(1 + u(e^h - 1))/h, monotone in u and in h.

    Its numerator is the cumulant generating function of a coin that shows 1 with probability u: near h = 0 the
    cumulants are the series.
    """
    small = h.clamp(-QUANTILE_SERIES_BELOW, QUANTILE_SERIES_BELOW)
    q, skew = u * (1 - u), 1 - 2 * u
    sixth, seventh = 1 - 30 * q * (1 - 4 * q), skew * (1 - 60 * q * (1 - 6 * q))
    high = small / 120 * (skew * (1 - 12 * q) + small / 6 * (sixth + small / 7 * seventh))
    series = u + q * small * (1 / 2 + small * (skew / 6 + small * ((1 - 6 * q) / 24 + high)))
    t = _falling(h).clamp_min(QUANTILE_SERIES_BELOW)
    mass = torch.where(h > 0, 1 - u, u).clamp_max(1 - torch.finfo(u.dtype).eps)  # at 1 the slope would be infinite
    falling = -torch.log1p(mass * torch.expm1(-t)) / t
    closed = torch.where(h > 0, 1 - falling, falling)
    return torch.where(h.abs() < QUANTILE_SERIES_BELOW, series, closed).clamp(0, 1)
