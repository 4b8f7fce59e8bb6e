"""Where the examples of a split lie: in memory, in a mapped file, or nowhere until they are asked for."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from sigma_vae.data.levels import Array

__all__ = ["Generated", "InMemory", "Mapped", "Store"]

CPU = torch.device("cpu")


class Store(ABC):
    """Examples by their number, as they are stored: levels 0..levels−1 as integers, or float32 values."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one example: ``(C, *space)``, or ``(T, C, *space)`` for clips."""

    @abstractmethod
    def __len__(self) -> int:
        """How many examples there are."""

    @abstractmethod
    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """These examples ``(n, *shape)``, on the store's device; the epoch matters where they are made anew in each."""

    @abstractmethod
    def select(self, rows: Tensor) -> "Store":
        """A part: example i of it is example ``rows[i]`` of this one."""

    @abstractmethod
    def to(self, device: torch.device) -> "Store":
        """The same examples, handed out on that device."""

    @abstractmethod
    def fingerprint(self) -> str:
        """The same for the same examples in the same order alone."""


@final
@dataclass(frozen=True, eq=False)
class InMemory(Store):
    """A tensor of all examples, moved to the device whole.

    >>> store = InMemory(torch.tensor([[1], [2], [3]], dtype=torch.uint8))
    >>> store.take(torch.tensor([2, 0])).flatten().tolist()
    [3, 1]
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """These examples; the same in each epoch."""
        return self.values.index_select(0, positions.to(self.values.device))

    def select(self, rows: Tensor) -> "InMemory":
        """A copy of a part."""
        return InMemory(self.values[rows])

    def to(self, device: torch.device) -> "InMemory":
        """On the device; the same object where it is there already."""
        return self if self.values.device == device else InMemory(self.values.to(device))

    def fingerprint(self) -> str:
        """SHA-256 over dtype, shape and content."""
        values = self.values.cpu().contiguous()
        digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().data)
        return digest.hexdigest()


@final
@dataclass(frozen=True, eq=False)
class Mapped(Store):
    """A file mapped into memory: only what a batch asks for is read, and the system may drop it again.

    Args:
        array: the mapped array ``(N, *shape)``, uint8 or uint16.
        digest: of its content.
        rows: the examples that belong to this part, all unless given.
        device: where batches are handed out; the file stays on the host.
        videos: number of the one that each example of the array is a clip of ``(N,)``.
    """

    array: Array
    digest: str
    rows: Tensor | None = None
    device: torch.device = CPU
    videos: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """These examples, copied out of the file."""
        rows = positions if self.rows is None else self.rows[positions]
        return torch.from_numpy(np.ascontiguousarray(self.array[rows.numpy()])).to(self.device)

    def select(self, rows: Tensor) -> "Mapped":
        """The rows of a part; nothing is read."""
        return Mapped(self.array, self.digest, rows if self.rows is None else self.rows[rows], self.device, self.videos)

    def to(self, device: torch.device) -> "Mapped":
        """Batches go to that device."""
        return Mapped(self.array, self.digest, self.rows, device, self.videos)

    def fingerprint(self) -> str:
        """SHA-256 over the content's digest and the rows."""
        rows = b"" if self.rows is None else self.rows.numpy().tobytes()
        return hashlib.sha256(self.digest.encode() + rows).hexdigest()


@final
@dataclass(frozen=True, eq=False)
class Generated(Store):
    """Examples made when they are asked for, each from random numbers of its own.

    What example i of epoch e is depends on the seed, e and i alone: not on the batch, the process or what came before.

    Args:
        make: one example from a generator, always of the same shape and dtype.
        count: examples in an epoch.
        seed: of all random numbers.
        identity: names what ``make`` does, for the fingerprint.
        fresh: other examples in each epoch; where not (for validation and test), the same.
        rows: the numbers of the examples of this part.
        device: where batches are handed out.
    """

    make: Callable[[np.random.Generator], Array]
    count: int
    seed: int
    identity: str
    fresh: bool = False
    rows: Tensor | None = None
    device: torch.device = CPU

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self._example(0, 0).shape

    def __len__(self) -> int:
        return self.count if self.rows is None else len(self.rows)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Make these examples of this epoch."""
        rows = positions if self.rows is None else self.rows[positions]
        made = np.stack([self._example(row, epoch if self.fresh else 0) for row in rows.tolist()])
        return torch.from_numpy(made).to(self.device)

    def select(self, rows: Tensor) -> "Generated":
        """A part; nothing is made."""
        chosen = rows if self.rows is None else self.rows[rows]
        return Generated(self.make, self.count, self.seed, self.identity, self.fresh, chosen, self.device)

    def to(self, device: torch.device) -> "Generated":
        """Batches go to that device."""
        return Generated(self.make, self.count, self.seed, self.identity, self.fresh, self.rows, device)

    def fingerprint(self) -> str:
        """SHA-256 over what is made, and how many."""
        rows = b"" if self.rows is None else self.rows.numpy().tobytes()
        words = f"{self.identity} {self.count} {self.seed} {self.fresh}"
        return hashlib.sha256(words.encode() + rows).hexdigest()

    def _example(self, row: int, epoch: int) -> Array:
        return self.make(np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, row)))))
