"""The logistic family: in the bins of the levels, the discretized logistic of the literature."""

from typing import final

from torch import Tensor

from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.distributions import Law
from sigma_vae.likelihoods.laws import LOGISTIC

__all__ = ["Logistic"]


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

    def law(self, own: Tensor) -> Law:
        """The standard logistic law."""
        return LOGISTIC
