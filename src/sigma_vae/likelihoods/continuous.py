"""Real-valued families: Gaussian, Laplace, logistic, Student-t."""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.densities import soft_clip
from sigma_vae.likelihoods.residuals import LAPLACE, LOGISTIC, NORMAL, ResidualDistribution, student_t
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.registry import Argument, number_above_zero, register
from sigma_vae.types import MeanMap, Observes

__all__ = ["DegreesOfFreedom", "Gaussian", "Laplace", "Logistic", "StudentT"]

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
