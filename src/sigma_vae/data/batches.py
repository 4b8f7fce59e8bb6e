"""Mini-batches of one split: shuffled, distributed over processes, and resumable in the middle of an epoch."""

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, final

import numpy as np
import torch
from torch import Tensor

from sigma_vae.data.schema import TableSchema
from sigma_vae.data.stores import Store
from sigma_vae.progress import steps
from sigma_vae.types import Batch

# -- scaling of data to the units that models work in ------------------------------------------------------------------

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


# -- batches -----------------------------------------------------------------------------------------------------------


class _Identity(TypedDict):
    examples: int
    batch_size: int
    shuffle: bool
    seed: int


class BatchState(_Identity):
    """The position of an iteration, and the settings that define the order of examples."""

    epoch: int
    position: int


@final
class Batches:
    """Iterate over stored examples in batches, any number of times.

    ``batch_size`` counts the examples of all processes together. Each global batch is split over ``world_size`` ranks
    as evenly as possible: every rank has the same number of batches, and the examples of a step do not depend on the
    number of processes. The last batch may be smaller; no batch is dropped, and no example is repeated.

    The order of an epoch depends only on ``(seed, epoch)``. An epoch ends with its last batch, or when a new iteration
    starts before that. ``state_dict`` gives the position of an iteration; after ``load_state_dict`` the next iteration
    starts with the next batch. The state is the same on every rank, and may be loaded by another number of processes.

    Shapes:
        x ``(n, C, *space)``, or ``(n, T, C, *space)`` for clips: float32 on the store's device; positions ``(n,)``
        int64 on the CPU.

    >>> from sigma_vae.data.stores import InMemory
    >>> batches = Batches(InMemory(torch.tensor([[0], [1], [2]], dtype=torch.uint8)), Scaling(levels=3), batch_size=2)
    >>> [batch.x.flatten().tolist() for batch in batches]
    [[0.0, 0.5], [1.0]]
    """

    def __init__(
        self,
        store: Store,
        scaling: Scaling,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check(len(store), batch_size, seed, rank, world_size)
        self.store = store
        self.scaling = scaling
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._position = 0
        self._resuming = False

    def __len__(self) -> int:
        return -(-len(self.store) // self.batch_size)

    @property
    def log_volume_nats(self) -> float:
        """Log-density of an example as a model reads it, minus that in the data's units; nats."""
        return self.scaling.log_volume_nats(self.store.shape)

    def __iter__(self) -> Iterator[Batch]:
        if self._position and not self._resuming:  # the last iteration stopped early: its epoch is over
            self._epoch, self._position = self._epoch + 1, 0
        return self._iterate(self._epoch, self._position)

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self._order(epoch)
        numbers: Sequence[int] = range(start, len(self))
        for number in numbers if self.shuffle else steps("examples", numbers, self._size):
            # Set before the yield: a caller that knows the length never reaches the end of the iteration.
            self._resuming = False
            self._epoch, self._position = (epoch, number + 1) if number + 1 < len(self) else (epoch + 1, 0)
            mine = self._share(number)
            # Generated examples change from epoch to epoch only in training: unshuffled passes, which measure, always see the same.
            x = self.scaling(self.store.take(order[mine], epoch if self.shuffle else 0))
            yield Batch(x, order[mine], condition=self.store.condition(order[mine]))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.store))
        seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]
        return torch.randperm(len(self.store), generator=torch.Generator().manual_seed(int(seed)))

    def _size(self, number: int) -> int:
        return min(self.batch_size, len(self.store) - number * self.batch_size)

    def _share(self, number: int) -> slice:
        start, size = number * self.batch_size, self._size(number)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def state_dict(self) -> BatchState:
        """Return epoch and number of the next batch."""
        return BatchState(epoch=self._epoch, position=self._position, **self._identity())

    def load_state_dict(self, state_dict: BatchState) -> None:
        """Continue the next iteration from a state of :meth:`state_dict`.

        Raises:
            ValueError: the state is in the middle of an epoch with other data, batch size, order or seed.
        """
        mine = self._identity()
        theirs = {key: state_dict.get(key) for key in mine}
        if state_dict["position"] and theirs != mine:
            raise ValueError(
                f"Batches cannot go on in the middle of an epoch of {theirs}, as these are {mine}; "
                "resume with the same data, batch_size, shuffle and seed, or from the end of an epoch"
            )
        self._epoch, self._position = state_dict["epoch"], state_dict["position"]
        self._resuming = True

    def _identity(self) -> _Identity:
        return _Identity(examples=len(self.store), batch_size=self.batch_size, shuffle=self.shuffle, seed=self.seed)


def _check(examples: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
    if examples < 1:
        raise ValueError("Batches needs at least one example, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size counts examples and is at least 1, got {batch_size}")
    if seed < 0:
        raise ValueError(f"the seed of the order is not negative, got {seed}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is one of 0..world_size-1, got rank {rank} of world_size {world_size}")
    if (tail := _tail(examples, batch_size)) < world_size:
        raise ValueError(
            f"every one of {world_size} processes needs an example of every batch, but {examples} examples in batches of "
            f"{batch_size} leave {tail} for the last one; {_remedy(examples, batch_size, world_size)}"
        )


def _tail(examples: int, batch_size: int) -> int:
    """Number of examples in the last batch."""
    return examples % batch_size or batch_size


def _remedy(examples: int, batch_size: int, world_size: int) -> str:
    if examples < world_size:
        return f"use at most {examples} processes"
    near = range(max(batch_size, world_size), examples + 1)  # a single batch of all examples always works
    return f"batch_size {next(size for size in near if _tail(examples, size) >= world_size)} would do"
