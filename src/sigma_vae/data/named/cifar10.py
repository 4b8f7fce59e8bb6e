"""CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html): its Python and its binary version, unpacked or not."""

import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.files.old_pickle import read_plain_pickle
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.named.places import Official, find, read_official
from sigma_vae.data.raw import Raw, file_record
from sigma_vae.data.splits import SplitName

__all__ = ["read_cifar10"]

Images = npt.NDArray[np.uint8]
_SHAPE = (3, 32, 32)
_VALUES = 3 * 32 * 32
_COUNTS: dict[SplitName, int] = {"train": 50000, "test": 10000}
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_OFFICIAL_FILES = "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or the batches that they hold (data_batch_1[.bin] and so on)"
_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", ".")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


def read_cifar10(config: DataConfig) -> Raw:
    """The official 50 000 train and 10 000 test images ``(3, 32, 32)``.

    Pickled batches are read without running anything that they name.

    Raises:
        ValueError: the files are nowhere, incomplete, damaged, or not what was published.
    """
    place = HubPlace("uoft-cs/cifar10", column="img")
    return read_official(Official("cifar10", _OFFICIAL_FILES, _COUNTS, (32, 32, "RGB"), place), config, _in_folder)


def _in_folder(folder: Path) -> Raw | None:
    for inner in (folder / name for name in _FOLDERS):
        for ending in ("", ".bin"):
            if found := {name: path for name in _BATCHES if (path := find(inner, name + ending))}:
                return _raw(
                    {name: _batch(path.read_bytes(), path.name, str(path)) for name, path in found.items()}, inner, found
                )
    if archive := find(folder, *_ARCHIVES):
        return _raw(_unpacked(archive), archive, {"": archive})
    return None


def _raw(batches: Mapping[str, Images], where: Path, files: Mapping[str, Path]) -> Raw:
    if missing := [name for name in _BATCHES if name not in batches]:
        raise ValueError(f"cifar10 needs {', '.join(_BATCHES)} in {where}, got no {', '.join(missing)}; put all of them there")
    train = np.concatenate([batches[name] for name in _BATCHES[:-1]])
    records = [file_record(path) for path in files.values()]
    words = ["official train and test images"]
    return Raw("cifar10", {"train": train, "test": batches[_BATCHES[-1]]}, records, words, levels=256)


def _unpacked(archive: Path) -> dict[str, Images]:
    """The batches of an archive, read one after the other; nothing is written."""
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


def _batch(content: bytes, name: str, where: str) -> Images:
    images = _binary(content, where) if name.endswith(".bin") else _pickled(content, where)
    return images.reshape(-1, *_SHAPE)


def _binary(content: bytes, where: str) -> Images:
    """Records of a label and the image's 3072 bytes: red, green, blue."""
    record = 1 + _VALUES
    if not content or len(content) % record:
        raise ValueError(f"{where} needs records of {record} bytes, got {len(content)} bytes; fetch the file again")
    return np.frombuffer(content, np.uint8).reshape(-1, record)[:, 1:]


def _pickled(content: bytes, where: str) -> Images:
    batch = read_plain_pickle(content, where)
    images = (batch.get(b"data") if b"data" in batch else batch.get("data")) if isinstance(batch, dict) else None
    if not isinstance(images, np.ndarray) or images.shape[1:] != (_VALUES,):
        got = (
            f"shape {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images if isinstance(batch, dict) else batch).__name__
        )
        raise ValueError(f"{where} needs an array data of shape (images, {_VALUES}), got {got}; fetch the file again")
    return images
