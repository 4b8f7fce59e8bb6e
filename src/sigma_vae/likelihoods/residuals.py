"""Residual distributions at scale 1: normal, Laplace, logistic, Student-t."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

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
