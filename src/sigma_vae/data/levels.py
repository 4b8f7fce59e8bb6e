"""Conversion of arrays to their stored form, levels or float32, with checks of the values."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "encode", "native_levels", "real_values"]

Array = npt.NDArray[np.generic]

_NATIVE = {"bool": 2, "uint8": 256, "uint16": 65536}
_MAX_LEVELS = 2**24  # float32 cannot tell more levels apart
_TOLERANCE = 0.01  # in steps between two levels


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
    raise ValueError(f"{name} has dtype {array.dtype}, which does not imply a number of levels; {_found(array)}: give --levels")


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
            return _tensor(array, np.float32)
        array = _to_levels(array, levels, name)
    assert levels is not None
    _check_levels(array, levels, name)
    return _tensor(array, _storage(levels))


def real_values(array: Array, name: str) -> Tensor:
    """Convert an array to float32 values of any finite size.

    Raises:
        ValueError: a value is not a number, or not finite.
    """
    _check_kind(array, name)
    _check_finite(array, name)
    return _tensor(array, np.float32)


def _tensor(array: Array, dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _storage(levels: int) -> npt.DTypeLike:
    return np.uint8 if levels <= 256 else np.int16 if levels <= 2**15 else np.int32


def _found(array: Array) -> str:
    return f"its values go from {array.min()} to {array.max()}"


def _check_kind(array: Array, name: str) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} needs numbers (bool, integers or floats), got dtype {array.dtype}; save it as such")


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
            f"{name} needs floats in [0, 1], but {_found(array)}; divide by the largest possible value, "
            "save 8-bit data as uint8, or model real values: --standardise yes"
        )


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
