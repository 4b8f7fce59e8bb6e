"""Storage of a split's examples: in memory, in a mapped file, still encoded, or generated on demand."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch
from torch import Tensor

from sigma_vae.conditions import Conditions
from sigma_vae.data.levels import Array, Grid

CPU = torch.device("cpu")


class Store(ABC):
    """Examples by number, in their stored form: integer levels 0..levels−1, or float32 values."""

    conditions: Conditions | None = None
    """The variables of the examples' conditions, where they have any."""

    def condition(self, positions: Tensor) -> Tensor | None:
        """Conditions of these examples ``(n, variables)`` on the store's device; None where they have none."""
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(C, *space)``, or ``(T, C, *space)`` for clips."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Return these examples ``(n, *shape)`` on the store's device; the epoch matters only to generated data."""

    @abstractmethod
    def select(self, rows: Tensor) -> "Store":
        """Return a subset: its example i is example ``rows[i]`` of this store."""

    @abstractmethod
    def to(self, device: torch.device) -> "Store":
        """Return the same examples, delivered on that device."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the examples and their order."""


@final
@dataclass(frozen=True, eq=False)
class InMemory(Store):
    """A tensor of all examples; it moves to the device as a whole.

    >>> store = InMemory(torch.tensor([[1], [2], [3]], dtype=torch.uint8))
    >>> store.take(torch.tensor([2, 0])).flatten().tolist()
    [3, 1]
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Return these examples, the same in each epoch."""
        return self.values.index_select(0, positions.to(self.values.device))

    def select(self, rows: Tensor) -> "InMemory":
        """Copy a subset."""
        return InMemory(self.values[rows])

    def to(self, device: torch.device) -> "InMemory":
        """Move to the device; return the same object if it is there already."""
        return self if self.values.device == device else InMemory(self.values.to(device))

    def fingerprint(self) -> str:
        """SHA-256 of dtype, shape and content."""
        values = self.values.cpu().contiguous()
        digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().data)
        return digest.hexdigest()


class _OnHost(Store):
    """Examples that stay on the host: a subset is a list of ``rows`` (None: all), and batches move to ``device``."""

    rows: Tensor | None
    device: torch.device

    def __len__(self) -> int:
        return self._count() if self.rows is None else len(self.rows)

    def select(self, rows: Tensor) -> Self:
        """Return a subset without reading or making anything."""
        return replace(self, rows=self._rows_at(rows))  # type: ignore[type-var]  # subclasses are dataclasses

    def to(self, device: torch.device) -> Self:
        """Deliver batches on that device."""
        return replace(self, device=device)  # type: ignore[type-var]

    @abstractmethod
    def _count(self) -> int:
        """Number of all examples."""

    def _rows_at(self, positions: Tensor) -> Tensor:
        return positions if self.rows is None else self.rows[positions]

    def _row_bytes(self) -> bytes:
        return b"" if self.rows is None else self.rows.numpy().tobytes()


@final
@dataclass(frozen=True, eq=False)
class Mapped(_OnHost):
    """A file mapped into memory: a batch reads only its own examples, and the system may free them again.

    Args:
        array: the mapped array ``(N, *shape)``.
        digest: digest of its content.
        rows: the examples of this subset; default all.
        device: device of the batches; the file stays on the host.
        videos: the number of the video or file that each example of the array comes from ``(N,)``, where that matters.
        grid: the levels among the file's values, where they are not the values themselves.
    """

    array: Array
    digest: str
    rows: Tensor | None = None
    device: torch.device = CPU
    videos: Tensor | None = None
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.array.shape[1:])

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Copy these examples out of the file."""
        rows = self._rows_at(positions)
        values = np.ascontiguousarray(self.array[rows.numpy()])
        return torch.from_numpy(values if self.grid is None else self.grid.of(values)).to(self.device)

    def fingerprint(self) -> str:
        """SHA-256 of the content's digest and the rows."""
        words = self.digest if self.grid is None else f"{self.digest} {tuple(self.grid)}"
        return hashlib.sha256(words.encode() + self._row_bytes()).hexdigest()

    def _count(self) -> int:
        return len(self.array)


@final
@dataclass(frozen=True, eq=False)
class Generated(_OnHost):
    """Examples generated on demand, each from a random stream of its own.

    Example i of epoch e depends only on the seed, e and i: not on the batch, the process or earlier examples.

    Args:
        make: makes one example from a generator, always of the same shape and dtype.
        count: examples per epoch.
        seed: seed of all random numbers.
        identity: describes what ``make`` does, for the fingerprint.
        fresh: make new examples in each epoch; validation and test keep theirs.
        rows: the examples of this subset; default all.
        device: device of the batches.
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
        """Shape of one example."""
        return self._example(0, 0).shape

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Generate these examples of this epoch."""
        rows = self._rows_at(positions)
        made = np.stack([self._example(row, epoch if self.fresh else 0) for row in rows.tolist()])
        return torch.from_numpy(made).to(self.device)

    def fingerprint(self) -> str:
        """SHA-256 of the recipe and the count."""
        words = f"{self.identity} {self.count} {self.seed} {self.fresh}"
        return hashlib.sha256(words.encode() + self._row_bytes()).hexdigest()

    def _count(self) -> int:
        return self.count

    def _example(self, row: int, epoch: int) -> Array:
        return self.make(np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, row)))))


@final
@dataclass(frozen=True, eq=False)
class Labelled(Store):
    """Examples with a condition each, which goes with them into every subset.

    Args:
        examples: the examples.
        conditions: meaning of the conditions.
        rows: the conditions ``(N, variables)``.

    >>> store = Labelled(InMemory(torch.tensor([[1], [2], [3]])), Conditions.of({"label": [0, 1, 1]}), torch.tensor([[0.0], [1], [1]]))
    >>> store.select(torch.tensor([0, 2])).condition(torch.tensor([1]))
    tensor([[1.]])
    """

    examples: Store
    conditions: Conditions = field()  # not the base class's None
    rows: Tensor

    def __post_init__(self) -> None:
        """Refuse conditions of other examples."""
        if self.rows.shape != (len(self.examples), len(self.conditions.variables)):
            raise ValueError(
                f"{len(self.examples)} examples with the conditions {', '.join(self.conditions.names)} need a row each, got"
                f" {tuple(self.rows.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.examples.shape

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Return these examples."""
        return self.examples.take(positions, epoch)

    def condition(self, positions: Tensor) -> Tensor:
        """Return these examples' conditions."""
        return self.rows[positions.to(self.rows.device)]

    def select(self, rows: Tensor) -> "Labelled":
        """Return a subset."""
        return replace(self, examples=self.examples.select(rows), rows=self.rows[rows.to(self.rows.device)])

    def to(self, device: torch.device) -> "Labelled":
        """Deliver examples and conditions on that device."""
        return replace(self, examples=self.examples.to(device), rows=self.rows.to(device))

    def fingerprint(self) -> str:
        """SHA-256 of the examples' fingerprint, and of names and classes of the conditions and their rows."""
        digest = hashlib.sha256(self.examples.fingerprint().encode())
        digest.update(repr([(each.name, each.classes) for each in self.conditions.variables]).encode())
        digest.update(self.rows.cpu().contiguous().numpy().data)
        return digest.hexdigest()


@final
@dataclass(frozen=True, eq=False)
class Sparse(_OnHost):
    """Rows of a sparse matrix of SciPy; those of a batch alone are made dense.

    Args:
        matrix: compressed by rows (CSR), ``(N, C)``.
        rows: the examples of this subset; default all.
        device: device of the batches; the matrix stays on the host.
    """

    matrix: Any
    rows: Tensor | None = None
    device: torch.device = CPU

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (int(self.matrix.shape[1]),)

    def take(self, positions: Tensor, epoch: int = 0) -> Tensor:
        """Return these rows, dense: in float64 if the matrix is, else in float32."""
        rows = self._rows_at(positions)
        dense = self.matrix[rows.numpy()].toarray()
        return torch.from_numpy(dense if dense.dtype == np.float64 else dense.astype(np.float32)).to(self.device)

    def fingerprint(self) -> str:
        """SHA-256 of the matrix and the rows."""
        own = self.matrix
        digest = hashlib.sha256(f"{own.shape} {own.dtype}".encode())
        for part in (own.indptr, own.indices, own.data):
            digest.update(np.ascontiguousarray(part).data)
        digest.update(self._row_bytes())
        return digest.hexdigest()

    def _count(self) -> int:
        return int(self.matrix.shape[0])


class UnreadableError(ValueError):
    """One example cannot be decoded; the others may be fine."""


@final
@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples that are decoded once, into a cache that is mapped into memory from then on.

    Args:
        names: the examples' names for messages: file names, or numbers.
        shape: shape of each decoded example, ``(C, H, W)`` or ``(T, C, H, W)``.
        dtype: name of their NumPy dtype, ``"uint8"``, say.
        decode: decodes example i; called from several threads. Raises :class:`UnreadableError` if it is broken.
        identity: everything that decides the result, as plain values: the files (by
            :func:`~sigma_vae.data.cache.file_stamp`) and the preprocessing. The cache's key is its digest.
        home: the folder beside which the cache is kept.
        skip_unreadable: leave broken examples out, and report how many; otherwise they are an error.
        videos: the number of the video, or of the file of several, that each example comes from: whole ones are held out
            if there are enough.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    dtype: str
    decode: Callable[[int], Array]
    identity: Mapping[str, Any]
    home: Path
    skip_unreadable: bool = False
    videos: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.names)


Part = Array | Encoded | Generated | Mapped | Sparse
"""One split of a source, before its values are checked."""
