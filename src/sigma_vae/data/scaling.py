"""From what is stored to what a model reads, and back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sigma_vae.data.stores import Store

__all__ = ["Scaling", "standardisation"]

CHUNK = 2**22
"""Values looked at together, where an example has no more."""


@final
@dataclass(frozen=True)
class Scaling:
    r"""Levels k to k/(levels − 1) in [0, 1]; real values as they are, or standardised channel by channel.

    A density of standardised values is one of the data by the Jacobian of the map:
    :math:`\log p(x) = \log p(\tilde x) - \sum_i \log s_i`, where :math:`\tilde x_i = (x_i - m_i) / s_i`.

    Args:
        levels: how many values a datum can take; None for real values.
        mean: m of each channel, where values are standardised.
        deviation: s of each channel.

    >>> Scaling(levels=256)(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    >>> height_and_mass = Scaling(mean=(170.0, 70.0), deviation=(10.0, 5.0))
    >>> height_and_mass(torch.tensor([[180.0, 60.0]]))
    tensor([[ 1., -2.]])
    """

    levels: int | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    @property
    def standardised(self) -> bool:
        """Whether values are shifted and scaled to mean 0 and deviation 1."""
        return self.mean is not None

    def __call__(self, stored: Tensor) -> Tensor:
        """Float32 values, correctly rounded on every device; stored ``(n, [T,] C, *space)``."""
        if self.levels is not None:
            # A tensor on the device, not a Python number: CUDA multiplies by the reciprocal of a number, one ulp off for some levels.
            return stored.float() / torch.full((), self.levels - 1, dtype=torch.float32, device=stored.device)
        if self.mean is None or self.deviation is None:
            return stored.float()
        return (stored.float() - self._column(self.mean, stored)) / self._column(self.deviation, stored)

    def undo(self, x: Tensor) -> Tensor:
        """Standardised values in the data's own units; others as they are: in [0, 1] where there are levels."""
        if self.mean is None or self.deviation is None:
            return x
        return x * self._column(self.deviation, x) + self._column(self.mean, x)

    def log_volume_nats(self, shape: Sequence[int]) -> float:
        """Σ log s over an example of this shape ``(C, *space)``: what log-densities of the data are smaller by than the model's."""
        if self.deviation is None:
            return 0.0
        return math.prod(shape[1:]) * sum(math.log(s) for s in self.deviation)

    def _column(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device).reshape(-1, *[1] * (like.dim() - 2))


def standardisation(train: Store, name: str, columns: Sequence[str] = ()) -> Scaling:
    """Mean and deviation of each channel of the training examples.

    Raises:
        ValueError: a channel is constant.
    """
    first = train.take(torch.zeros(1, dtype=torch.int64)).double().transpose(0, 1).flatten(1)[:, :1]
    mean = first[:, 0] + _mean(train, lambda rows: rows - first)  # of a constant, exactly that
    deviation = _mean(train, lambda rows: (rows - mean[:, None]).square()).sqrt()
    if constant := torch.nonzero(deviation == 0).flatten().tolist():
        named = len(columns) == len(deviation)  # in a table of series, columns are times
        which = ", ".join(columns[i] if named else str(i) for i in constant) + ("" if named else ", counted from 0,")
        raise ValueError(
            f"{name}: channels (columns) {which} have the same value throughout the"
            " training split, so there is nothing to standardise by; leave them out"
        )
    return Scaling(mean=tuple(mean.tolist()), deviation=tuple(deviation.tolist()))


def _mean(train: Store, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over all values of each channel, in float64, a few examples at a time."""
    total = torch.zeros(train.shape[0], dtype=torch.float64)
    for positions in torch.split(torch.arange(len(train)), max(1, CHUNK // math.prod(train.shape))):
        total += of(train.take(positions).double().transpose(0, 1).flatten(1)).sum(1)
    return total / (len(train) * math.prod(train.shape[1:]))
