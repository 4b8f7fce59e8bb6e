"""The logistic family: in the bins of the levels, the discretized logistic of the literature."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.densities import log1mexp
from sigma_vae.likelihoods.distributions import Law

__all__ = ["Logistic"]


class _Logistic:
    power = 2
    closed_form = False

    @staticmethod
    def log_prob(z: Tensor) -> Tensor:
        size = z.abs()
        return -size - 2 * softplus(-size)

    @staticmethod
    def log_cdf(z: Tensor) -> Tensor:
        return logsigmoid(z)

    @staticmethod
    def interval_log_prob(center: Tensor, width: Tensor) -> Tensor:
        """σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l − u)): nothing cancels, wherever the interval lies."""
        center = -center.abs()
        return logsigmoid(center + 0.5 * width) + logsigmoid(0.5 * width - center) + log1mexp(width)

    @staticmethod
    def statistic(z: Tensor) -> Tensor:
        """Its mean is 1 at the best σ: z·tanh(z/2), a square near 0, |z| far away."""
        return z * torch.tanh(0.5 * z)

    @staticmethod
    def entropy() -> float:
        """2 nats."""
        return 2.0

    @staticmethod
    def sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Differences of two Gumbel draws."""
        waits = torch.empty(2, *like.shape, dtype=like.dtype, device=like.device).exponential_(generator=generator).log()
        return waits[0] - waits[1]


_LOGISTIC = _Logistic()


@final
class Logistic(LocationScale):
    r"""Logistic likelihood: tails like a Laplace law's, a round top like a Gaussian's.

    .. math:: \log p(x \mid h) = -\sum_i \left( z_i + 2 \log(1 + e^{-z_i}) + \log \sigma_i \right), \quad z_i = (x_i - \mu_i)/\sigma_i

    With ``observes="level"`` it is the discretized logistic of Kingma et al. (2016, arXiv 1606.04934) with exact end bins. The
    best shared σ solves :math:`\overline{z \tanh(z/2)} = 1`; the log-density is concave in log σ, so Newton's method finds it. (σ is the
    law's scale; its standard deviation is πσ/√3.)

    Shapes:
        h ``(*batch, in_channels, *space)``, x ``(*batch, C, *space)``, ``log_prob`` ``(*batch,)`` in nats.

    >>> from sigma_vae import Fixed
    >>> likelihood = Logistic(channels=1, scale=Fixed(0.1))
    >>> likelihood(torch.zeros(2, 1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 4))     # 16·(−2 log 2 − log 0.1)
    tensor([14.6607, 14.6607])
    """

    closed_form = False

    def law(self, own: Tensor) -> Law:
        """The standard logistic law."""
        return _LOGISTIC
