"""The user's own arrays: .npy and .npz files."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import digest_of
from sigma_vae.data.files.axes import CLIPS, channels_first, layout_of, parts_by_key
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import Part, Raw, file_record
from sigma_vae.data.splits import SplitName
from sigma_vae.data.stores import Mapped

__all__ = ["LARGE", "path_of", "read_arrays"]

LARGE = 2**28
"""Bytes from which on an array is left in its file, if its numbers can be used as they lie there."""


def path_of(config: DataConfig) -> Path:
    """The file or folder that a config names, inside its root where it has one.

    Raises:
        ValueError: it has a root that says nothing.
    """
    source = Path(config.source).expanduser()
    if config.root and source.is_absolute():
        raise ValueError(f"root says nothing about the absolute path {source}, got {config.root!r}; leave it out")
    return Path(config.root or ".").expanduser() / source


def read_arrays(config: DataConfig) -> Raw:
    """The arrays of a .npy or .npz file, channels first.

    A .npy file of 256 MiB and more of uint8 or uint16 is mapped into memory, not read.

    Raises:
        ValueError: the file is missing or unreadable, holds pickled objects, or its arrays do not fit together.
    """
    path = path_of(config)
    if not path.is_file():
        raise ValueError(f"expected a .npy or .npz file at {path}, got no such file; check the path")
    arrays, ignored = parts_by_key(_read(path, mapped=config.standardise != "yes"), path)
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{path} needs one dtype for all splits, got {dtypes}; save them alike")
    used = layout_of(arrays["train"].shape, config.layout, str(path))
    ordered = {name: channels_first(array, used, f"{path} ({name})") for name, array in arrays.items()}
    words = [f"axes read as {used}", *([f"ignored the arrays {', '.join(ignored)}"] if ignored else [])]
    parts: dict[SplitName, Part] = {name: _part(array, path, used) for name, array in ordered.items()}
    return Raw(str(path), parts, [file_record(path)], words, clips=used in CLIPS)


def _read(path: Path, mapped: bool) -> dict[str, Array]:
    try:
        if mapped and path.suffix.lower() == ".npy" and path.stat().st_size >= LARGE:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return {"train": array if _is_usable(array) else np.array(array)}
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"train": content}
        with content:
            return {key: content[key] for key in content.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as .npy or .npz of plain numbers: {error}; save it anew with numpy.save or "
            "numpy.savez (pickled objects are refused, as loading them runs code)"
        ) from error


def _is_usable(array: Array) -> bool:
    """Whether a batch can be cut out of the file as it is."""
    return array.dtype.name in ("uint8", "uint16") and array.dtype.isnative and array.flags.c_contiguous


def _part(array: Array, path: Path, layout: str) -> Part:
    if not _is_mapped(array):
        return array
    return Mapped(array, hashlib.sha256(f"{digest_of(path)} {layout}".encode()).hexdigest())


def _is_mapped(array: Array) -> bool:
    return isinstance(array, np.memmap)
