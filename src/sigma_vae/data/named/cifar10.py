"""CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), from its Python or binary version."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_record
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.named.official import Official, find, read_official
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.registry import register

__all__ = ["read_cifar10", "read_plain_pickle"]


def read_plain_pickle(content: bytes, name: str) -> Any:
    """Load a pickle of dicts, lists, strings, numbers and uint8 arrays; strings of Python 2 become ``bytes``.

    A pickle names functions that rebuild its objects. Here it may only name the three of a NumPy array, and gets
    stand-ins that can build nothing but an array of uint8.

    Raises:
        ValueError: it is no such pickle, names other functions, or is damaged.

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
        """Ignore byte order and the like, which single bytes do not have."""


class _Array:
    """Stands in for a NumPy array until its content arrives."""

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
    # pickle's documentation says to override this method to restrict names.
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return _ALLOWED[module, name]


def _finished(value: Any) -> Any:
    """Replace stand-ins by their arrays."""
    if isinstance(value, _Array):
        return value.values
    return {key: _finished(item) for key, item in value.items()} if isinstance(value, dict) else value


Images = npt.NDArray[np.uint8]
_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32
_COUNTS: dict[SplitName, int] = {"train": 50000, "test": 10000}
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_OFFICIAL_FILES = "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or the batches that they hold (data_batch_1[.bin] and so on)"
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", ".")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


@register.source("cifar10", options={"root", "cache"})
def read_cifar10(config: DataConfig) -> Raw:
    """Read the official 50 000 train and 10 000 test images ``(3, 32, 32)`` of CIFAR-10.

    Pickled batches are read without running any function that they name.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or not the published ones.
    """
    place = HubPlace("uoft-cs/cifar10", column="img")
    return read_official(Official("cifar10", _OFFICIAL_FILES, _COUNTS, (32, 32, "RGB"), place), config, _in_folder)


def _in_folder(folder: Path) -> Raw | None:
    for inner in (folder / name for name in _FOLDERS):
        for ending in ("", ".bin"):
            if found := {name: path for name in _BATCHES if (path := find(inner, name + ending))}:
                batches = {name: _batch(path.read_bytes(), path.name, str(path)) for name, path in found.items()}
                return _raw(batches, inner, found.values())
    if archive := find(folder, *_ARCHIVES):
        return _raw(_unpacked(archive), archive, [archive])
    return None


class _Batch(NamedTuple):
    """Images ``(n, 3, 32, 32)`` of one file, and the names of their classes, where the file has them."""

    images: Images
    labels: list[str]


def _raw(batches: Mapping[str, _Batch], where: Path, files: Iterable[Path]) -> Raw:
    if missing := [name for name in _BATCHES if name not in batches]:
        raise ValueError(f"cifar10 needs {', '.join(_BATCHES)} in {where}, got no {', '.join(missing)}; put all of them there")
    train = np.concatenate([batches[name].images for name in _BATCHES[:-1]])
    known = [label for name in _BATCHES[:-1] for label in batches[name].labels]
    test = batches[_BATCHES[-1]]
    records = [file_record(path) for path in files]
    words = ["official train and test images"]
    complete = len(known) == len(train) and len(test.labels) == len(test.images)
    labels: dict[SplitName, dict[str, list[str]]] = (
        {"train": {"label": known}, "test": {"label": test.labels}} if complete else {}
    )
    return Raw("cifar10", {"train": train, "test": test.images}, records, words, levels=256, labels=labels)


def _unpacked(archive: Path) -> dict[str, _Batch]:
    """Read the batches of an archive in turn, without unpacking it."""
    batches = {}
    try:
        with tarfile.open(archive, "r|*") as members:
            for member in members:
                name = member.name.rsplit("/", 1)[-1]
                if name.removesuffix(".bin") in _BATCHES and (content := members.extractfile(member)) is not None:
                    batches[name.removesuffix(".bin")] = _batch(content.read(), name, f"{archive} ({member.name})")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read: {type(error).__name__}: {error}; fetch the file again") from error
    return batches


def _batch(content: bytes, name: str, where: str) -> _Batch:
    images, numbers = _binary(content, where) if name.endswith(".bin") else _pickled(content, where)
    known = all(isinstance(number, int) and 0 <= number < len(_CLASSES) for number in numbers)
    return _Batch(images.reshape(-1, *_SHAPE), [_CLASSES[number] for number in numbers] if known else [])


def _binary(content: bytes, where: str) -> tuple[Images, list[int]]:
    """Parse records of a label and 3072 bytes: red, green, blue."""
    record = 1 + _VALUES
    if not content or len(content) % record:
        raise ValueError(f"{where} needs records of {record} bytes, got {len(content)} bytes; fetch the file again")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:], records[:, 0].tolist()


def _pickled(content: bytes, where: str) -> tuple[Images, list[int]]:
    batch = read_plain_pickle(content, where)
    images = (batch.get(b"data") if b"data" in batch else batch.get("data")) if isinstance(batch, dict) else None
    if not isinstance(images, np.ndarray) or images.shape[1:] != (_VALUES,):
        got = (
            f"shape {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images if isinstance(batch, dict) else batch).__name__
        )
        raise ValueError(f"{where} needs an array data of shape (images, {_VALUES}), got {got}; fetch the file again")
    labels = batch.get(b"labels", batch.get("labels", []))
    return images, labels if isinstance(labels, list) else []
