"""Real-valued families."""

import math
from typing import final

import torch
from torch import Tensor

from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.densities import log_ndtr, normal_interval_log_prob, normal_log_prob
from sigma_vae.likelihoods.distributions import Law

__all__ = ["Gaussian"]


class _Normal:
    power = 2
    closed_form = True
    log_prob = staticmethod(normal_log_prob)
    log_cdf = staticmethod(log_ndtr)
    interval_log_prob = staticmethod(normal_interval_log_prob)
    statistic = staticmethod(torch.square)

    @staticmethod
    def entropy() -> float:
        """½ log 2πe."""
        return 0.5 * math.log(2 * math.pi * math.e)

    @staticmethod
    def sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Standard normal draws."""
        return torch.empty_like(like, memory_format=torch.contiguous_format).normal_(generator=generator)


_NORMAL = _Normal()


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

    def law(self) -> Law:
        """The standard normal."""
        return _NORMAL
