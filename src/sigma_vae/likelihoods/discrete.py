"""Families over the levels themselves: a probability for each level, or for each bit."""

import math
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from sigma_vae.likelihoods.base import Discrete
from sigma_vae.likelihoods.densities import in_chunks
from sigma_vae.registry import register
from sigma_vae.types import Observes

__all__ = ["BitwiseCategorical", "Categorical"]

LOG2_E = 1 / math.log(2)


@register.likelihood("categorical")
@final
class Categorical(Discrete):
    r"""One probability for each level of each value: any shape, and no knowledge of the levels' order.

    .. math:: \log p(x \mid h) = \sum_i h_{i,k_i} - \log \sum_k e^{h_{i,k}}, \qquad x_i = k_i / (L-1)

    Shapes:
        h ``(*batch, channels * levels, *space)``: the logits of the first channel's levels, then the next channel's; x
        ``(*batch, channels, *space)``.

    Raises:
        ValueError: x is off the levels, or h has the wrong channels.

    >>> likelihood = Categorical(channels=1, levels=4)
    >>> p = likelihood(torch.zeros(2, 4, 3, 3))
    >>> p.log_prob(torch.ones(2, 1, 3, 3))  # 9 values, each of probability 1/4
    tensor([-12.4766, -12.4766])
    >>> p.mean.unique()
    tensor([0.5000])
    """

    @property
    def in_channels(self) -> int:
        """A logit for each level of each channel."""
        return self.channels * self.levels

    def row_log_prob(self, h: Tensor, x: Tensor, observes: Observes) -> Tensor:
        """Negative cross-entropy, channel by channel: each is a row of its own to keep the parts small."""
        return in_chunks(_class_log_mass, self._logits(h), self._classes(x), _class_gradient).reshape(x.shape[:2]).sum(-1)

    def row_cdf(self, h: Tensor, x: Tensor, observes: Observes) -> tuple[Tensor, Tensor]:
        """Cumulative sums of the classes' probabilities."""
        both = in_chunks(_class_cdf, self._logits(h), self._classes(x))
        below, upto = both.reshape(*x.shape[:2], 2, x.shape[-1]).unbind(2)
        return below, upto

    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Σ k P(k)/(L−1), and the variance about it."""
        logits = self._logits(h)
        mean, variance = in_chunks(_class_moments, logits, logits).unbind(1)
        shape = (len(h), self.channels, h.shape[-1])
        return mean.reshape(shape), variance.reshape(shape)

    def row_mean(self, h: Tensor) -> Tensor:
        """Σ k P(k)/(L−1)."""
        values = torch.linspace(0, 1, self.levels, dtype=h.dtype, device=h.device)
        return (self._masses(h) * values[:, None]).sum(2)

    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Levels, by their cumulative probabilities."""
        masses = self._masses(h).movedim(2, -1)
        k = torch.multinomial(masses.flatten(0, -2), 1, generator=generator)
        return k.reshape(masses.shape[:-1]).to(h.dtype) / (self.levels - 1)

    def _masses(self, h: Tensor) -> Tensor:
        return torch.softmax(h.reshape(len(h), self.channels, self.levels, h.shape[-1]), 2)

    def _logits(self, h: Tensor) -> Tensor:
        """One row a channel, ``(rows * channels, levels, n)``."""
        return h.reshape(-1, self.levels, h.shape[-1])

    def _classes(self, x: Tensor) -> Tensor:
        """The levels' numbers, ``(rows * channels, n)``."""
        return torch.round(x * (self.levels - 1)).long().reshape(-1, x.shape[-1])


def _class_log_mass(logits: Tensor, k: Tensor) -> Tensor:
    return -cross_entropy(logits, k, reduction="none").sum(-1)


def _class_cdf(logits: Tensor, k: Tensor) -> Tensor:
    """Masses below the class and up to it, ``(rows, 2, n)``."""
    masses, k = torch.softmax(logits, 1), k[:, None]
    total = masses.cumsum(1)
    upto = total.gather(1, k).masked_fill(k == logits.shape[1] - 1, 1)
    below = total.gather(1, (k - 1).clamp_min(0)).masked_fill(k == 0, 0)
    return torch.cat([below, upto], 1).clamp_max(1)  # a sum of masses may be 1 + a rounding error


def _class_moments(logits: Tensor, _: Tensor) -> Tensor:
    """Mean and variance, ``(rows, 2, n)``."""
    values = torch.linspace(0, 1, logits.shape[1], dtype=logits.dtype, device=logits.device)[:, None]
    masses = torch.softmax(logits, 1)
    mean = (masses * values).sum(1, keepdim=True)
    return torch.cat([mean, (masses * (values - mean).square()).sum(1, keepdim=True)], 1)


@torch.no_grad()
def _class_gradient(logits: Tensor, k: Tensor, out: Tensor) -> Tensor:
    """One where the class is, minus the softmax.

    In powers of two: torch takes three of them in the time of one power of e. The largest logit's rounding is the same
    for all classes, and cancels.
    """
    classes = k[:, None]
    largest = logits.amax(1, keepdim=True)
    torch.add(-LOG2_E * largest, logits, alpha=LOG2_E, out=out)
    chosen = out.gather(1, classes)
    total = out.exp2_().sum(1, keepdim=True)
    out.mul_(-1 / total).scatter_add_(1, classes, torch.ones_like(chosen))
    return (chosen - total.log2()).sum((1, 2)) / LOG2_E


@register.likelihood("bitwise-categorical")
@final
class BitwiseCategorical(Discrete):
    r"""A binary classifier for each bit of each value, most significant bit first: 8 logits in place of 256.

    .. math:: \log p(x \mid h) = \sum_i \sum_b \log \sigma\left((2 k_{i,b} - 1)\, h_{i,b}\right)

    The bits are independent given the features, so that P(127) and P(128), which share no bit, cannot both be large
    without other levels being so.

    Shapes:
        h ``(*batch, channels * log2(levels), *space)``: the bits of the first channel, then the next channel's; x
        ``(*batch, channels, *space)``.

    Raises:
        ValueError: ``levels`` is no power of two, x is off the levels, or h has the wrong channels.

    >>> likelihood = BitwiseCategorical(channels=1, levels=4)
    >>> p = likelihood(torch.tensor([[[[5.0]], [[0.0]]]]))  # surely the upper half, then anything
    >>> p.log_prob(torch.tensor([[[[2 / 3]]]])).exp()
    tensor([0.4967])
    """

    def __init__(self, channels: int, *, spatial_dims: int = 2, levels: int | None = 256) -> None:
        super().__init__(channels, spatial_dims=spatial_dims, levels=levels)
        if self.levels & (self.levels - 1):
            raise ValueError(
                f"BitwiseCategorical needs a power of two levels, as in 256, got {levels}: bits would make levels that no datum"
                " has; take Categorical, or rescale the data"
            )
        self.bits = self.levels.bit_length() - 1

    @property
    def in_channels(self) -> int:
        """A logit for each bit of each channel."""
        return self.channels * self.bits

    def row_log_prob(self, h: Tensor, x: Tensor, observes: Observes) -> Tensor:
        """All bits' log-probabilities together."""
        return in_chunks(self._bits_log_mass, h, x)

    def _bits_log_mass(self, h: Tensor, x: Tensor) -> Tensor:
        signs = 2 * self._bits(x).to(h.dtype) - 1
        return logsigmoid(signs * self._logits(h)).sum((1, 2, 3))

    def row_cdf(self, h: Tensor, x: Tensor, observes: Observes) -> tuple[Tensor, Tensor]:
        """A level is below another where it has a zero at the first bit in which they differ, and the other a one."""
        one, logits = self._bits(x).bool(), self._logits(h)
        alike = torch.sigmoid(torch.where(one, logits, -logits)).cumprod(2)  # the mass of the levels with the same first bits
        before = torch.cat([torch.ones_like(alike[:, :, :1]), alike[:, :, :-1]], 2)
        below = (before * torch.sigmoid(-logits) * one).sum(2)
        return below.clamp_max(1), (below + alike[:, :, -1]).clamp_max(1).masked_fill(one.all(2), 1)

    def row_moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the bits, which are independent."""
        p, worth = torch.sigmoid(self._logits(h)), self._worth(h)
        return (p * worth).sum(2), (p * torch.sigmoid(-self._logits(h)) * worth.square()).sum(2)

    def row_mean(self, h: Tensor) -> Tensor:
        """Each bit's probability times its value."""
        return (torch.sigmoid(self._logits(h)) * self._worth(h)).sum(2)

    def row_sample(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Levels, bit by bit."""
        bits = torch.bernoulli(torch.sigmoid(self._logits(h)), generator=generator).long()
        return (bits << self._places(h)).sum(2).to(h.dtype) / (self.levels - 1)

    def _logits(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), self.channels, self.bits, h.shape[-1])

    def _bits(self, x: Tensor) -> Tensor:
        return torch.round(x * (self.levels - 1)).long()[:, :, None] >> self._places(x) & 1

    def _worth(self, h: Tensor) -> Tensor:
        """The value of each bit that is one."""
        return (1 << self._places(h)).to(h.dtype) / (self.levels - 1)

    def _places(self, h: Tensor) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=h.device)[:, None]
