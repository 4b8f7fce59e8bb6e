"""Scaling from stored values to a model's input, and back."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sigma_vae.data.schema import TableSchema
from sigma_vae.data.stores import Store

__all__ = ["Scaling", "chunks", "standardisation"]

CHUNK = 2**22
"""Values processed together, unless an example has more; several float64 copies of them exist."""


@final
@dataclass(frozen=True)
class Scaling:
    r"""Map levels k to k/(levels − 1) in [0, 1]; keep real values, or standardise them channel by channel.

    The Jacobian of the standardisation relates the densities of data and model input:
    :math:`\log p(x) = \log p(\tilde x) - \sum_i \log s_i`, where :math:`\tilde x_i = (x_i - m_i) / s_i`.

    Args:
        levels: number of values that a datum can take; None for real values.
        mean: mean m of each channel, if values are standardised.
        deviation: std s of each channel.
        counts: whether values are counts, which stay as they are.
        schema: columns of a table whose rows are stored as the model reads them; the likelihood counts their Jacobians.

    >>> Scaling(levels=256)(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    >>> height_and_mass = Scaling(mean=(170.0, 70.0), deviation=(10.0, 5.0))
    >>> height_and_mass(torch.tensor([[180.0, 60.0]]))
    tensor([[ 1., -2.]])
    """

    levels: int | None = None
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None
    counts: bool = False
    schema: TableSchema | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be scaled by."""
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"a scaling has at least 2 levels, got {self.levels}")
        mean, deviation = (self.mean or ()), (self.deviation or ())
        if (
            len(mean) != len(deviation)
            or not all(math.isfinite(m) for m in mean)
            or not all(0 < s < math.inf for s in deviation)
        ):
            raise ValueError(
                f"a scaling needs a finite mean and a finite std above 0 for each channel, got {mean} and {deviation}"
            )

    @property
    def standardised(self) -> bool:
        """Whether values are shifted and scaled to mean 0 and std 1."""
        return self.mean is not None

    @property
    def discrete(self) -> bool:
        """Whether values are levels or counts."""
        return self.counts or self.levels is not None

    def __call__(self, stored: Tensor) -> Tensor:
        """Scale stored values ``(n, [T,] C, *space)`` to float32, correctly rounded on every device."""
        if self.levels is not None:
            # Divide by a tensor on the device: for a Python number, CUDA multiplies by the reciprocal, one ulp off for some levels.
            return stored.float() / torch.full((), self.levels - 1, dtype=torch.float32, device=stored.device)
        if self.counts:
            return stored.float()
        if not stored.is_floating_point():
            raise ValueError(
                f"a model of real values needs floats, got {stored.dtype}; save the data as floats, like those of the model"
            )
        if self.mean is None or self.deviation is None:
            return stored.float()
        values = stored.double()  # in float32, the rounded mean shifts values far from 0
        return ((values - self._column(self.mean, values)) / self._column(self.deviation, values)).float()

    def undo(self, x: Tensor) -> Tensor:
        """Return standardised values to the data's units, in float64; others stay as they are (levels in [0, 1])."""
        if self.mean is None or self.deviation is None:
            return x
        return x.double() * self._column(self.deviation, x.double()) + self._column(self.mean, x.double())

    def log_volume_nats(self, shape: Sequence[int]) -> float:
        """Return Σ log s over an example ``(C, *space)``: log-density of the model's input minus that of the data."""
        if self.deviation is None:
            return 0.0
        return math.prod(shape[1:]) * sum(math.log(s) for s in self.deviation)

    def _column(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def standardisation(train: Store, name: str, columns: Sequence[str] = ()) -> Scaling:
    """Compute mean and std of each channel over the training examples.

    Raises:
        ValueError: a channel is constant.
    """
    first = train.take(torch.zeros(1, dtype=torch.int64)).double().transpose(0, 1).flatten(1)[:, :1]
    mean = first[:, 0] + _mean(train, lambda rows: rows - first)  # exact for constant channels
    scale = _largest(train, lambda rows: (rows - mean[:, None]).abs()).clamp_min(5e-324)  # squares of any units stay in range
    deviation = scale * _mean(train, lambda rows: ((rows - mean[:, None]) / scale[:, None]).square()).sqrt()
    if constant := torch.nonzero(deviation == 0).flatten().tolist():
        named = len(columns) == len(deviation)  # for a table of series, columns are times
        which = ", ".join(columns[i] if named else str(i) for i in constant) + ("" if named else ", counted from 0,")
        remedy = f": --exclude {' '.join(shlex.quote(columns[i]) for i in constant)}" if named else ""
        raise ValueError(
            f"{name}: channels (columns) {which} have the same value throughout the"
            f" training split, so there is nothing to standardise by; leave them out{remedy}"
        )
    return Scaling(mean=tuple(mean.tolist()), deviation=tuple(deviation.tolist()))


def _mean(train: Store, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Average over all values of each channel, in float64, a few examples at a time."""
    total = torch.zeros(train.shape[0], dtype=torch.float64)
    for stored in chunks(train):
        total += of(stored.double().transpose(0, 1).flatten(1)).sum(1)
    return total / (len(train) * math.prod(train.shape[1:]))


def _largest(train: Store, of: Callable[[Tensor], Tensor]) -> Tensor:
    found = [of(stored.double().transpose(0, 1).flatten(1)).amax(1) for stored in chunks(train)]
    return torch.stack(found).amax(0)


def chunks(store: Store) -> Iterator[Tensor]:
    """Yield all examples in stored form and in order, a few at a time."""
    for positions in torch.split(torch.arange(len(store)), max(1, CHUNK // math.prod(store.shape))):
        yield store.take(positions)
