"""Real-valued families: Gaussian, Laplace, logistic, Student-t."""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from sigma_vae.likelihoods.base import LocationScale, Unscaled
from sigma_vae.likelihoods.densities import soft_clip
from sigma_vae.likelihoods.residuals import LAPLACE, LOGISTIC, NORMAL, ResidualDistribution, student_t
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.registry import Argument, number_above_zero, register
from sigma_vae.types import MeanMap, Observes

DegreesOfFreedom = float | Literal["learned", "predicted"]
"""A number; one parameter; or decoder channels, one for each data channel."""

DEFAULT_DF = 4.0
LEAST_DF, LARGEST_DF = 1.0, 1000.0
"""From a Cauchy distribution to one that no data can tell from a Gaussian."""


@register.likelihood("gaussian")
@final
class Gaussian(LocationScale):
    r"""Gaussian likelihood: the paper's decoder.

    .. math:: \log p(x \mid h) = -\sum_i \left( \frac{(x_i - \mu_i)^2}{2 \sigma_i^2} + \log \sigma_i + \tfrac12 \log 2\pi \right)

    Over any set of values the best shared σ² is their mean squared error, so with :class:`Optimal` the objective is
    :math:`\tfrac D2 \log \text{MSE} + KL` up to a constant (Rybkin et al. 2021, equations 4 and 5; the square is missing in the
    printed equation 5).

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, C, *space)``, ``log_prob`` ``(*batch,)`` in nats.

    >>> likelihood = Gaussian(channels=1)                         # σ is solved, not tuned
    >>> x_hat, x = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)
    >>> likelihood(x_hat, x).log_prob(x)                          # 16·(−½ − log 0.1 − ½ log 2π)
    tensor([14.1383, 14.1383])
    """

    solves_rmse = True

    def residual(self, own: Tensor) -> ResidualDistribution:
        """The standard normal."""
        return NORMAL


@register.likelihood("laplace")
@final
class Laplace(LocationScale):
    r"""Laplace likelihood, less sensitive than a Gaussian to outlying pixels.

    .. math:: \log p(x \mid h) = -\sum_i \left( |x_i - \mu_i| / \sigma_i + \log 2 \sigma_i \right)

    Over any set of values the best shared σ is their mean absolute error. (σ is the scale parameter; the std is √2 σ.)

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, C, *space)``, ``log_prob`` ``(*batch,)`` in nats.

    >>> likelihood = Laplace(channels=1)
    >>> x_hat, x = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)
    >>> likelihood(x_hat, x).log_prob(x)                          # −16·(1 + log 0.2)
    tensor([9.7510, 9.7510])
    """

    def residual(self, own: Tensor) -> ResidualDistribution:
        """The standard Laplace distribution."""
        return LAPLACE


def _degrees_of_freedom(text: str) -> dict[str, Any]:
    if text in ("learned", "predicted"):
        return {"df": text}
    return number_above_zero("df", "its degrees of freedom, learned or predicted")(text)


@register.likelihood("student-t", argument=Argument("ν|learned|predicted", _degrees_of_freedom, "3"))
@final
class StudentT(LocationScale):
    r"""Student-t likelihood: a Gaussian whose precision is unknown and integrated out (Takahashi et al. 2018).

    .. math:: \log p(x \mid h) = \sum_i \log C_\nu - \log \sigma_i - \frac{\nu + 1}{2} \log\left(1 + \frac{z_i^2}{\nu}\right),
        \quad z_i = \frac{x_i - \mu_i}{\sigma_i}

    Over any set of values the best shared σ solves :math:`\sigma^2 = \overline{(\nu + 1) r^2 / (\nu + r^2/\sigma^2)}`;
    the log-density is concave in log σ, so there is one such σ, and Newton's method finds it. With :class:`PerPixel`
    and ``df="predicted"`` this is the decoder of Takahashi et al. ("Student-t variational autoencoder for robust
    density estimation", IJCAI 2018).

    The degrees of freedom ν, ``df``, are a number from 1 to 1000; ``"learned"``, one parameter; or ``"predicted"`` by
    the decoder for each value. The other arguments are those of :class:`LocationScale`.

    Shapes:
        h ``(*batch, in_channels, *space)``: the mean's channels, the scale's, those of predicted ν; x ``(*batch, C,
        *space)``, ``log_prob`` ``(*batch,)`` in nats.

    Raises:
        ValueError: df is out of range, or is not a number where the level is observed (the Student-t distribution
            function has no gradient in ν).

    >>> likelihood = StudentT(channels=1, df=3)
    >>> x_hat, x = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1)
    >>> likelihood(x_hat, x).log_prob(x)                          # σ = 0.1: 16·(log C₃ − log 0.1 − 2 log 4/3)
    tensor([11.6213, 11.6213])
    """

    def __init__(
        self,
        channels: int,
        scale: Scale | None = None,
        *,
        df: DegreesOfFreedom = DEFAULT_DF,
        spatial_dims: int = 2,
        levels: int | None = 256,
        mean: MeanMap = "identity",
        observes: Observes = "density",
    ) -> None:
        super().__init__(channels, scale, spatial_dims=spatial_dims, levels=levels, mean=mean, observes=observes)
        if df not in ("learned", "predicted") and not (isinstance(df, int | float) and LEAST_DF <= df <= LARGEST_DF):
            raise ValueError(f'df is a number from 1 (Cauchy) to 1000 (nearly Gaussian), "learned" or "predicted", got {df!r}')
        if observes == "level" and isinstance(df, str):
            raise ValueError(
                f'observes="level" with df="{df}" would need the gradient of the Student-t distribution function in its degrees of'
                ' freedom, which has none; pass a number, or train with observes="density"'
            )
        self.df: DegreesOfFreedom = df if isinstance(df, str) else float(df)
        if df == "learned":
            self.log_df = nn.Parameter(torch.tensor(math.log(DEFAULT_DF)))

    @property
    def own_channels(self) -> int:
        """One for each data channel where ν is predicted."""
        return self.channels if self.df == "predicted" else 0

    def residual(self, own: Tensor) -> ResidualDistribution:
        """Student's t with the given, learned or predicted ν."""
        low, high = math.log(LEAST_DF), math.log(LARGEST_DF)
        if self.df == "predicted":
            return student_t(soft_clip(own + math.log(DEFAULT_DF), low, high).exp())
        if self.df == "learned":
            if self.training:
                with torch.no_grad():  # put back where a step left the range: a clamp of the value would cut its gradient
                    self.log_df.clamp_(low, high)
            return student_t(self.log_df.to(own.dtype).exp().reshape((1,) * self._event_dims))
        assert isinstance(self.df, float)
        return student_t(self.df)


@register.likelihood("logistic")
@final
class Logistic(LocationScale):
    r"""Logistic likelihood: tails like a Laplace distribution's, a round top like a Gaussian's.

    .. math:: \log p(x \mid h) = -\sum_i \left( z_i + 2 \log(1 + e^{-z_i}) + \log \sigma_i \right), \quad z_i = (x_i - \mu_i)/\sigma_i

    With ``observes="level"`` it is the discretized logistic of Kingma et al. (2016, arXiv 1606.04934) with exact end
    bins. The best shared σ solves :math:`\overline{z \tanh(z/2)} = 1`; the log-density is concave in log σ, so Newton's
    method finds it. (σ is the scale parameter; the std is πσ/√3.)

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, C, *space)``, ``log_prob`` ``(*batch,)`` in nats.

    >>> from sigma_vae import Fixed
    >>> likelihood = Logistic(channels=1, scale=Fixed(0.1))
    >>> likelihood(torch.zeros(2, 1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 4))     # 16·(−2 log 2 − log 0.1)
    tensor([14.6607, 14.6607])
    """

    def residual(self, own: Tensor) -> ResidualDistribution:
        """The standard logistic distribution."""
        return LOGISTIC


# -- values in [0, 1]: Bernoulli and continuous Bernoulli --------------------------------------------------------------


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
