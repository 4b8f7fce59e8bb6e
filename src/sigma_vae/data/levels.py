"""Conversion of arrays to their stored form, levels or float32, with checks of the values."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "encode", "levels_used", "native_levels", "real_values"]

Array = npt.NDArray[np.generic]

_NATIVE = {"bool": 2, "uint8": 256, "uint16": 65536}
_MAX_LEVELS = 2**24  # float32 cannot tell more levels apart
_TOLERANCE = 0.01  # in steps between two levels
_ROUNDING = 1e-3  # largest error of rounding to float32, in units of a channel's std
_CHUNK = 2**22  # values looked at together


def native_levels(array: Array, name: str) -> int | None:
    """Return the number of levels that an array's dtype implies; None for floats.

    >>> native_levels(np.zeros(3, dtype=np.uint8), "zeros")
    256
    """
    _check_kind(array, name)
    if array.dtype.kind == "f":
        return None
    if array.dtype.name in _NATIVE:
        return _NATIVE[array.dtype.name]
    raise ValueError(
        f"{name} has dtype {array.dtype}, which does not imply a number of levels; {_found(array)}:"
        f" model real values with --standardise yes{_or_levels(array)}"
    )


def levels_used(arrays: Sequence[Array]) -> tuple[int | None, str]:
    """Return the levels that all values lie on where this is sure and not what the dtype implies; and a remark if it is not.

    Sure are two values (0 and 1, or the ends of the dtype's range), uint16 values 257·k, and floats k/255.

    >>> levels_used([np.array([0, 255, 255], dtype=np.uint8)]), levels_used([np.array([0, 0.2, 0.4])])
    ((2, ''), (6, ''))
    >>> levels_used([np.arange(9, dtype=np.uint8)])
    (None, 'its values are 0..8: --levels 9')
    """
    kinds = {array.dtype.name for array in arrays}
    if len(kinds) > 1 or not kinds <= {"uint8", "uint16", "float32", "float64"}:
        return None, ""
    ends = _NATIVE.get(kinds.pop(), 256) - 1
    used = np.empty(0, np.int64)
    for part in (part for array in arrays for part in _parts(array)):
        if (found := _positions(part)) is None:
            return None, ""
        used = np.union1d(used, found)
        if part.dtype.kind == "u" and np.gcd.reduce(used) == 1 and used[-1] >= max(2, ends // 4):
            return None, ""  # no later value changes that
    if len(used) < 2:
        return None, ""
    largest = int(used[-1])
    levels = ends // int(np.gcd.reduce([*used, ends])) + 1
    if arrays[0].dtype.kind == "f" or (levels in (2, 256) and levels <= ends):
        return levels, ""
    if largest == 1:
        return 2, ""
    step = int(np.gcd.reduce(used))
    if step > 1:
        return None, f"its values are multiples of {step}: divide them by it and give --levels {largest // step + 1}"
    return None, f"its values are 0..{largest}: --levels {largest + 1}" if largest < ends // 4 else ""


def _parts(array: Array) -> Iterator[Array]:
    """Views of a few examples at a time."""
    rows = max(1, _CHUNK // max(1, math.prod(array.shape[1:])))
    return (array[start : start + rows] for start in range(0, len(array), rows))


def _positions(part: Array) -> Array | None:
    """Distinct levels of integers, or of floats k/255; None for other floats."""
    if part.dtype.kind == "u":
        return np.unique(part).astype(np.int64)
    if not (np.isfinite(part).all() and part.min() >= 0 and part.max() <= 1):
        return None
    nearest = np.rint(part.astype(np.float64) * 255)
    close = np.allclose(part.astype(np.float64), nearest / 255, rtol=1e-6, atol=0)
    return np.unique(nearest).astype(np.int64) if close else None


def _on_scale(array: Array, levels: int) -> bool:
    """Whether unsigned integers lie on levels that divide the dtype's range evenly: 0 and 255, or 257·k."""
    step, rest = divmod(_NATIVE.get(array.dtype.name, 2) - 1, levels - 1)
    return rest == 0 and not (array % step).any()


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
    _check_kind(array, name)
    if array.dtype.kind == "f":
        _check_finite(array, name)
        _check_unit(array, name)
        if levels is None:
            if _is_rounded(array.reshape(-1, 1)):
                raise ValueError(
                    f"{name} has values whose spread float32 cannot hold, {_found(array)}; standardise them: --standardise yes"
                )
            return _tensor(array, np.float32)
        array = _to_levels(array, levels, name)
    assert levels is not None
    if array.dtype.name in ("uint8", "uint16") and array.max() > levels - 1 and _on_scale(array, levels):
        array = array // ((_NATIVE[array.dtype.name] - 1) // (levels - 1))
    _check_levels(array, levels, name)
    return _tensor(array, _storage(levels))


def real_values(array: Array, name: str) -> Tensor:
    """Convert an array ``(N, C, *space)`` to float32; to float64 where float32 would round the spread of a channel away.

    Raises:
        ValueError: a value is not a number, or not finite.
    """
    _check_kind(array, name)
    _check_finite(array, name)
    return _tensor(array, np.float64 if _is_rounded(array) else np.float32)


def _is_rounded(array: Array) -> bool:
    """Whether float32 loses the values' digits: they are far from 0 for their spread, or beyond its range."""
    if array.dtype.itemsize < 4 or array.dtype == np.float32:
        return False
    axes = (0, *range(2, array.ndim))
    least, largest = (each.astype(np.float64) for each in (array.min(axes), array.max(axes)))
    size = np.maximum(np.abs(least), np.abs(largest))
    with np.errstate(over="ignore", invalid="ignore"):
        step = np.spacing(size.astype(np.float32)).astype(np.float64)
        shift = array.mean(axes, dtype=np.float64, keepdims=True)
        scale = np.maximum(largest / 2 - least / 2, np.finfo(np.float64).tiny)
        spread = scale * np.sqrt(_mean_square(array, shift, scale, axes))
    return bool((~(step <= _ROUNDING * spread) & (largest > least) | ~np.isfinite(step)).any())


def _mean_square(array: Array, shift: Any, scale: Any, axes: tuple[int, ...]) -> Any:
    """Mean square of the values, shifted and scaled channel by channel, a few examples at a time."""
    column = scale.reshape(shift.shape)
    total = sum((((part.astype(np.float64) - shift) / column) ** 2).sum(axes) for part in _parts(array))
    return total / (array.size / scale.size)


def _tensor(array: Array, dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _storage(levels: int) -> npt.DTypeLike:
    return np.uint8 if levels <= 256 else np.int16 if levels <= 2**15 else np.int32


def _found(array: Array) -> str:
    return f"its values go from {array.min()} to {array.max()}"


def _or_levels(array: Array) -> str:
    fits = array.min() >= 0 and array.max() < 2**16
    return f", or levels from 0 on with --levels {max(2, int(array.max()) + 1)}" if fits else ""


def _check_kind(array: Array, name: str) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} needs numbers (bool, integers or floats), got dtype {array.dtype}; {_into_numbers(array)}")


def _into_numbers(array: Array) -> str:
    if array.dtype.kind == "c":
        return "take real and imaginary part as two channels"
    if array.dtype.kind == "O":
        return "examples of different lengths must be cut or padded to one"
    return "save it as such"


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
