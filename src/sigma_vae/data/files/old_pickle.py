"""Pickles of plain values and byte arrays, as Python 2 wrote them, read without running anything that they name."""

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = ["read_plain_pickle"]


def read_plain_pickle(content: bytes, name: str) -> Any:
    """Dicts, lists, strings, numbers, and numpy arrays of bytes; strings of Python 2 come back as ``bytes``.

    A pickle names functions that rebuild its objects. Here it can name only the three of a numpy array, and gets stand-ins for
    them that build nothing but an array of uint8.

    Raises:
        ValueError: it is no such pickle, names anything else, or is damaged.

    >>> read_plain_pickle(pickle.dumps({"a": [1, 2]}), "example")
    {'a': [1, 2]}
    >>> read_plain_pickle(pickle.dumps(print), "example")
    Traceback (most recent call last):
    ...
    ValueError: example needs to be a pickle of plain values and byte arrays, got UnpicklingError: it names builtins.print, which is not
    run; fetch the file again from where it was published
    """
    try:
        return _finished(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        raise ValueError(
            f"{name} needs to be a pickle of plain values and byte arrays, got {type(error).__name__}: {error}; "
            "fetch the file again from where it was published"
        ) from error


class _ByteType:
    """Stands in for ``numpy.dtype('u1')``."""

    def __init__(self, code: bytes | str, *flags: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, not of bytes (u1)")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like say nothing about single bytes."""


class _Array:
    """Stands in for a numpy array until its content has come."""

    values: npt.NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _ByteType, bool, bytes]) -> None:
        _, shape, kind, columns_first, content = state
        if not isinstance(kind, _ByteType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it has an array of something else than bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C")


def _reconstruct(*arguments: object) -> _Array:
    return _Array()


def _no_call(*arguments: object) -> None:
    raise pickle.UnpicklingError("it calls numpy.ndarray, which is not run")


_ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _no_call,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _ByteType,
}


@final
class _Unpickler(pickle.Unpickler):
    # The one method that pickle's documentation tells to override, to say which names may be used.
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return _ALLOWED[module, name]


def _finished(value: Any) -> Any:
    """With arrays in the place of their stand-ins."""
    if isinstance(value, _Array):
        return value.values
    return {key: _finished(item) for key, item in value.items()} if isinstance(value, dict) else value
