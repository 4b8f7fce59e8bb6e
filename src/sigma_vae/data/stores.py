"""Stored form of data: levels or real values of arrays, with checks; and stores of a split's examples."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sigma_vae.conditions import Conditions

Array = npt.NDArray[np.generic]

_NATIVE = {"bool": 2, "uint8": 256, "uint16": 65536}
_MAX_LEVELS = 2**24  # float32 cannot tell more levels apart
_TOLERANCE = 0.01  # in steps between two levels
_ROUNDING = 1e-6  # of values that are levels, though nobody has said how many there are
_EIGHT_BITS_IN_SIXTEEN = 257
_CHUNK = 2**24  # values counted at a time
_MOST_DISTINCT = 1024
_FEW_DISTINCT = 8  # so many values are counted, to find those that are mistakes
_RARE = 1e-3  # part of the values that mistakes are at most
_ROWS_PER_VALUE = 20  # from which a column is taken for discrete
_SOME_ROWS = 10_000
_FLOAT32_STEPS = 1000  # between two values a std apart: fewer would be rounding that one can see


class Grid(NamedTuple):
    """The levels among integers: level k is the value lowest + k·step. Among floats it is k/(levels − 1)."""

    levels: int
    lowest: int = 0
    step: int = 1

    @property
    def largest(self) -> int:
        """The value of the highest level."""
        return self.lowest + (self.levels - 1) * self.step

    def of(self, values: Array) -> Array:
        """The levels of values on the grid."""
        if values.dtype.kind == "f":
            return np.rint(values.astype(np.float64) * (self.levels - 1)).astype(_storage(self.levels))
        if (self.lowest, self.step) == (0, 1):
            return values
        return ((values.astype(np.int64) - self.lowest) // self.step).astype(_storage(self.levels))


def find_grid(arrays: Mapping[Any, Array], name: str) -> tuple[Grid | None, str]:
    """Find the levels that data of one dtype use, in all splits, where their values leave no doubt.

    These are two values, 0 and another, 8-bit values stored in 16 bits as 257·k, and floats k/255, or 0 and 1. Otherwise the
    dtype decides.

    Returns:
        The levels, None for real values, and a remark: what was found, the first value of another split that lies between
        the levels of train, or the option that would be right. It is empty where there is nothing to say.

    >>> find_grid({"train": np.array([0, 255, 255], dtype=np.uint8)}, "mask")
    (Grid(levels=2, lowest=0, step=255), 'two values, 0 and 255: two levels')
    """
    grid, remark = _grid_of(list(arrays.values()), name)
    alone, _ = _grid_of([arrays["train"]], name) if "train" in arrays and len(arrays) > 1 else (None, "")
    if alone is None or (grid is not None and grid.levels <= alone.levels):
        return grid, remark
    split, value = next((split, value) for split, array in arrays.items() for value in _off(array, alone))
    used = "real values" if grid is None else f"{grid.levels} levels"
    return grid, f"{split} has the value {value}, which is none of the {alone.levels} levels of train: read as {used}"


def _grid_of(arrays: Sequence[Array], name: str) -> tuple[Grid | None, str]:
    native = native_levels(arrays[0], name)
    if native is None:
        return _grid_of_floats(arrays)
    values = np.arange(2) if native == 2 else _distinct(arrays)
    if len(values) < 2 or native == 2:
        return Grid(native), ""
    lowest, largest = int(values[0]), int(values[-1])
    if len(values) == 2 and lowest:
        return Grid(native), f"two values, {lowest} and {largest}: --levels 2 would read them as levels 0 and 1"
    if len(values) == 2:
        return Grid(2, 0, largest), f"two values, 0 and {largest}: two levels"
    step = int(np.gcd.reduce(values))
    if native == _NATIVE["uint16"] and step % _EIGHT_BITS_IN_SIXTEEN == 0:
        return Grid(256, 0, _EIGHT_BITS_IN_SIXTEEN), "all values are multiples of 257: 8-bit levels stored in 16 bits"
    if 2 ** largest.bit_length() < native and native > 256:
        return Grid(native), f"16-bit values up to {largest}: --levels {2 ** largest.bit_length()} would be enough for them"
    if step > 1:
        return Grid(native), f"all values are multiples of {step}: --levels {largest // step + 1} counts these alone"
    return Grid(native), _nearly_two(arrays, values)


def _nearly_two(arrays: Sequence[Array], values: Array) -> str:
    """Say that all values but a few are two, as in masks with an odd pixel."""
    if len(values) > _FEW_DISTINCT:
        return ""
    counts = np.array([sum(int((part == value).sum()) for array in arrays for part in _parts(array)) for value in values])
    *odd, second, first = np.argsort(counts, kind="stable")
    rare, total = int(counts[odd].sum()), int(counts.sum())
    if rare > _RARE * total:
        return ""
    low, high = sorted((int(values[first]), int(values[second])))
    few = ", ".join(str(int(values[each])) for each in odd)
    return (
        f"all but {rare} of {total} values are {low} or {high}; repair the others ({few}) if they are mistakes, and two"
        " levels are read"
    )


def given_grid(arrays: Mapping[Any, Array], levels: int, name: str) -> Grid:
    """The grid of integers that a number of levels means: 0..levels−1, or as many values further apart.

    Raises:
        ValueError: only the values of train lie on such a grid.

    >>> given_grid({"train": np.array([0, 2, 254], dtype=np.uint8)}, 128, "even")
    Grid(levels=128, lowest=0, step=2)
    """
    if (grid := _given_grid(list(arrays.values()), levels)) is not None or "train" not in arrays:
        return grid or Grid(levels)
    alone = _given_grid([arrays["train"]], levels)
    if alone is not None:
        split, value = next((split, value) for split, array in arrays.items() for value in _off(array, alone))
        raise ValueError(
            f"{name} ({split}) needs the {levels} levels of train, {alone.lowest} to {alone.largest} in steps of {alone.step}, got the"
            f" value {value}; repair or leave out such examples, or leave --levels out"
        )
    return Grid(levels)


def _given_grid(arrays: Sequence[Array], levels: int) -> Grid | None:
    if arrays[0].dtype.kind not in "iu" or all(array.size == 0 or array.max() < levels for array in arrays):
        return Grid(levels)
    values = _distinct(arrays)
    lowest, largest = int(values[0]), int(values[-1])
    if levels == len(values) == 2:
        return Grid(2, lowest, largest - lowest)
    whole = _NATIVE.get(arrays[0].dtype.name, 0) - 1
    steps = [whole // (levels - 1)] if whole > 0 and levels > 1 and whole % (levels - 1) == 0 else []
    for step in [*steps, int(np.gcd.reduce(values))]:
        if step > 1 and largest // step < levels and not (values % step).any():
            return Grid(levels, 0, step)
    return None


def _distinct(arrays: Sequence[Array]) -> Array:
    """All values that occur, in order."""
    if arrays[0].dtype.name not in _NATIVE:
        return np.unique(np.concatenate([np.unique(array) for array in arrays]))
    occurs = np.zeros(_NATIVE[arrays[0].dtype.name], dtype=bool)
    for part in (part for array in arrays for part in _parts(array)):
        occurs[part.reshape(-1)] = True
        if occurs.all():  # as with most pictures, after a few of them
            break
    return np.flatnonzero(occurs)


def _parts(array: Array) -> Iterator[Array]:
    """A few examples at a time."""
    rows = max(1, _CHUNK // max(1, math.prod(array.shape[1:])))
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _grid_of_floats(arrays: Sequence[Array]) -> tuple[Grid | None, str]:
    if arrays[0].dtype.itemsize < 4 or not all(array.size and 0 <= array.min() and array.max() <= 1 for array in arrays):
        return None, ""
    some = np.unique(np.concatenate([np.unique(array.reshape(-1)[:_CHUNK]) for array in arrays]))
    if set(some.tolist()) == {0.0, 1.0} and all(_lies_on(array, 2) for array in arrays):
        return Grid(2), "two values, 0 and 1: two levels"
    if len(some) > 2 and all(_lies_on(array, 256) for array in arrays):
        return Grid(256), "all values are k/255: 8-bit levels"
    if 2 < len(some) <= _MOST_DISTINCT:
        levels = round(1 / float(np.diff(some).min())) + 1
        if levels <= _NATIVE["uint16"] and all(_lies_on(array, levels) for array in arrays):
            return None, f"all values are k/{levels - 1}: --levels {levels} would model them as levels"
    return None, ""


def _lies_on(array: Array, levels: int) -> bool:
    """Whether all values are k/(levels − 1)."""
    return next(_off(array, Grid(levels)), None) is None


def _off(array: Array, grid: Grid) -> Iterator[Any]:
    """The first value, in each few examples, that is none of the levels."""
    for part in _parts(array):
        if array.dtype.kind == "f":
            values = part.astype(np.float64)
            nearest = np.clip(np.rint(values * (grid.levels - 1)), 0, grid.levels - 1) / (grid.levels - 1)
            off = ~np.isclose(values, nearest, rtol=_ROUNDING, atol=0)
        else:
            level, rest = np.divmod(part.astype(np.int64) - grid.lowest, grid.step)
            off = (rest != 0) | (level < 0) | (level >= grid.levels)
        if off.any():
            yield part[off][0].item()


def discrete_columns(rows: Array) -> list[int]:
    """Numbers of the columns with two values, or with few for their rows.

    >>> discrete_columns(np.array([[0.0, 0.1], [1.0, 0.2], [0.0, 0.3]]))
    [0]
    """
    return [i for i in range(rows.shape[1]) if _is_discrete(rows[:, i])]


def _is_discrete(column: Array) -> bool:
    most = max(2, len(column) // _ROWS_PER_VALUE)
    if len(np.unique(column[:_SOME_ROWS])) > most:
        return False
    return 2 <= len(np.unique(column)) <= most


def native_levels(array: Array, name: str) -> int | None:
    """Return the number of levels that an array's dtype implies; None for floats.

    >>> native_levels(np.zeros(3, dtype=np.uint8), "zeros")
    256
    """
    check_kind(array.dtype, name)
    if array.dtype.kind == "f":
        return None
    if array.dtype.name in _NATIVE:
        return _NATIVE[array.dtype.name]
    raise ValueError(
        f"{name} has dtype {array.dtype}, which does not imply a number of levels; {_found(array)}:"
        f" model real values with --standardise yes{_or_levels(array)}"
    )


def encode(array: Array, levels: int | None, name: str) -> Tensor:
    """Convert an array to stored form: levels 0..levels−1, or float32 values in [0, 1] if ``levels`` is None.

    Integers are levels; floats are values k/(levels − 1).

    >>> encode(np.array([0.0, 0.5, 1.0]), 3, "thirds")
    tensor([0, 1, 2], dtype=torch.uint8)

    Raises:
        ValueError: a value is not finite, out of range, or (for floats) between two levels.
    """
    if levels is not None and not 2 <= levels <= _MAX_LEVELS:
        raise ValueError(f"levels is the number of values that a datum can take, 2 to {_MAX_LEVELS}, got {levels}")
    check_kind(array.dtype, name)
    if array.dtype.kind == "f":
        _check_finite(array, name)
        _check_unit(array, name)
        if levels is None and _float32_merges(array):
            raise ValueError(
                f"{name} has values whose spread float32 cannot hold, {_found(array)}; standardise them: --standardise yes"
            )
        if levels is None:
            return _tensor(array, np.float32)
        array = _to_levels(array, levels, name)
    assert levels is not None
    _check_levels(array, levels, name)
    return _tensor(array, _storage(levels))


def real_values(array: Array, name: str) -> Tensor:
    """Convert an array ``(N, C, ...)`` to real values of any finite size, in float32 unless that would merge them.

    Raises:
        ValueError: a value is not a number, or not finite.
    """
    check_kind(array.dtype, name)
    _check_finite(array, name)
    return _tensor(array, np.float64 if _float32_merges(array) else np.float32)


def _float32_merges(array: Array) -> bool:
    """Whether float32 has too few steps between the values of a channel, or no such values."""
    if array.dtype.kind == "b" or (array.dtype.kind in "iu" and array.dtype.itemsize < 4) or array.dtype.itemsize < 4:
        return False
    if array.dtype == np.float32 or array.size == 0:
        return False
    channels = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1) if array.ndim > 1 else array[None]
    with np.errstate(over="ignore", invalid="ignore"):
        for channel in channels:
            values = channel.astype(np.float64)
            largest, std = np.abs(values).max(), (values - values[0]).std()
            step = np.spacing(np.float32(largest))
            if std > 0 and not (step * _FLOAT32_STEPS <= std < np.finfo(np.float32).max and std > np.finfo(np.float32).tiny):
                return True
    return False


def _tensor(array: Array, dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _storage(levels: int) -> npt.DTypeLike:
    return np.uint8 if levels <= 256 else np.int16 if levels <= 2**15 else np.int32


def _found(array: Array) -> str:
    return f"its values go from {array.min()} to {array.max()}"


def _or_levels(array: Array) -> str:
    fits = array.min() >= 0 and array.max() < 2**16
    return f", or levels from 0 on with --levels {max(2, int(array.max()) + 1)}" if fits else ""


def check_kind(dtype: "np.dtype[Any]", name: str) -> None:
    """Refuse what is no number.

    Raises:
        ValueError: the dtype is complex, text, of records or of Python objects.
    """
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} needs numbers (bool, integers or floats), got dtype {dtype}; {_into_numbers(dtype)}")


def _into_numbers(dtype: "np.dtype[Any]") -> str:
    if dtype.kind == "c":
        return "take real and imaginary part as two channels"
    if dtype.kind == "O":
        return (
            "examples of different lengths must be cut or padded to one, and saved as one array: numpy.stack(examples)"
            " (pickled objects are refused, as loading them runs code)"
        )
    if dtype.names:
        return "save its fields as columns: numpy.lib.recfunctions.structured_to_unstructured(array)"
    return "write its values as numbers"


def _check_finite(array: Array, name: str) -> None:
    bad = ~np.isfinite(array)
    if count := int(bad.sum()):
        first = tuple(int(axis) for axis in np.unravel_index(int(bad.argmax()), bad.shape))
        raise ValueError(
            f"{name} needs finite values, got {count} that are NaN or infinite, the first at {first}; "
            "repair or leave out such examples"
        )


def _check_unit(array: Array, name: str) -> None:
    if array.min() < 0 or array.max() > 1:
        raise ValueError(
            f"{name} needs floats in [0, 1], but {_found(array)}; {_into_unit(array)}, or model real values: --standardise yes"
        )


def _into_unit(array: Array) -> str:
    if array.min() >= -1 and array.max() <= 1:
        return "bring values in [-1, 1] there by (x + 1) / 2"
    return "divide by the largest possible value, save 8-bit data as uint8"


def _check_levels(array: Array, levels: int, name: str) -> None:
    if array.min() < 0 or array.max() > levels - 1:
        raise ValueError(
            f"{name} needs integers in 0..{levels - 1} for levels={levels}, but {_found(array)}; "
            "give the right --levels or rescale"
        )


def _to_levels(array: Array, levels: int, name: str) -> Array:
    position = array.astype(np.float64) * (levels - 1)
    nearest = np.rint(position)
    off = float(np.abs(position - nearest).max())
    if off > _TOLERANCE:
        raise ValueError(
            f"{name} needs values k/{levels - 1} for levels={levels}, got one {off:.3g} of a step from the nearest "
            f"(at most {_TOLERANCE}); give the right --levels, or none for real values"
        )
    return nearest


# -- storage of examples -----------------------------------------------------------------------------------------------

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
