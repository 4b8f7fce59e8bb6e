"""The user's own HDF5 files."""

import threading
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sigma_vae.config import DataConfig, Layout
from sigma_vae.data.cache import piece_of
from sigma_vae.data.files.arrays import LARGE, path_of
from sigma_vae.data.files.axes import CLIPS, channels_first, layout_of, parts_by_key
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import Encoded, Part, Raw, UnreadableError, file_record, file_stamp
from sigma_vae.data.splits import SPLIT_WORDS, SplitName

__all__ = ["read_hdf5"]

_CHUNKS = 2**28
"""Bytes of decompressed chunks that HDF5 keeps: neighbouring blocks often lie in one."""


def read_hdf5(config: DataConfig) -> Raw:
    """Data sets of an HDF5 file, channels first.

    Without ``columns``, the keys train, validation (valid, val) and test are the splits, or the one data set that there is. With a
    key in ``columns`` (``group/name`` where it is nested), that data set, or those of this name in the groups train, validation and
    test. Data sets of 256 MiB and more of uint8 or uint16 are copied, a slice at a time, into the cache; others are read whole.

    Raises:
        ValueError: the file is missing, damaged or no HDF5; there is no such key; or the data sets do not fit together.
    """
    import h5py

    path = path_of(config)
    if not path.is_file():
        raise ValueError(f"expected an HDF5 file at {path}, got no such file; check the path")
    try:
        with h5py.File(path) as file:
            datasets = _datasets(file)
            chosen = _chosen(datasets, config.columns, path)
            found, _ = parts_by_key(chosen, path)
            ignored = sorted({*datasets} - {dataset.name.strip("/") for dataset in found.values()})
            _check_dtypes(found, path)
            used = layout_of(found["train"].shape, config.layout, str(path))
            parts = {split: _part(dataset, path, used, config) for split, dataset in found.items()}
    except (OSError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}; it may be cut short or of another kind") from error
    words = [f"axes read as {used}", *([f"ignored the data sets {', '.join(ignored)}"] if ignored else [])]
    return Raw(str(path), parts, [file_record(path)], words, clips=used in CLIPS)


def _datasets(file: Any) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}

    def note(name: str, thing: Any) -> None:
        if isinstance(thing, h5py.Dataset) and thing.shape is not None:
            found[name] = thing

    file.visititems(note)
    return found


def _chosen(datasets: Mapping[str, Any], columns: tuple[str, ...], path: Path) -> dict[str, Any]:
    if not columns:
        return dict(datasets)
    if len(columns) > 1:
        raise ValueError(f"{path}: columns gives one key of an HDF5 file, got {', '.join(columns)}; give one")
    key = columns[0].strip("/")
    if key in datasets:
        return {"train": datasets[key]}
    if nested := {word: datasets[f"{word}/{key}"] for word in SPLIT_WORDS if f"{word}/{key}" in datasets}:
        return nested
    raise ValueError(f"{path} has no data set {key}, only {', '.join(datasets) or 'none at all'}; give one of its keys")


def _check_dtypes(found: Mapping[SplitName, Any], path: Path) -> None:
    dtypes = {name: str(dataset.dtype) for name, dataset in found.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{path} needs one dtype for all splits, got {dtypes}; save them alike")


def _part(dataset: Any, path: Path, layout: Layout, config: DataConfig) -> Part:
    name = f"{path} ({dataset.name.strip('/')})"
    whole = np.broadcast_to(np.zeros((), np.uint8), dataset.shape or ())  # for the shape alone: nothing is read
    shape = channels_first(whole, layout, name).shape
    if dataset.nbytes < LARGE or dataset.dtype.name not in ("uint8", "uint16") or config.standardise == "yes":
        return channels_first(np.asarray(dataset[()]), layout, name)
    rows = _Rows(path, dataset.name, layout, piece_of(dataset.nbytes // shape[0]))
    identity = {"file": file_stamp(path), "key": dataset.name, "layout": layout}
    names = [f"{dataset.name.strip('/')}[{i}]" for i in range(shape[0])]
    return Encoded(names, shape[1:], dataset.dtype.name, rows.decode, identity, path.resolve().parent)


class _Rows:
    """Examples of a data set, read a block at a time; each thread keeps the block that it is in."""

    def __init__(self, path: Path, key: str, layout: Layout, block: int) -> None:
        self._path, self._key, self._layout, self._block = path, key, layout, block
        self._lock = threading.Lock()
        self._kept = threading.local()

    def decode(self, i: int) -> Array:
        number, row = divmod(i, self._block)
        if self._kept.__dict__.get("number") != number:
            self._kept.block, self._kept.number = self._read(number), number
        example: Array = self._kept.block[row]
        return example

    def _read(self, number: int) -> Array:
        try:
            with self._lock:
                block = self._dataset[number * self._block : (number + 1) * self._block]
        except (OSError, RuntimeError) as error:
            raise UnreadableError(f"{type(error).__name__}: {error}") from error
        return channels_first(block, self._layout, str(self._path))

    @cached_property
    def _dataset(self) -> Any:
        import h5py

        file = h5py.File(self._path, rdcc_nbytes=_CHUNKS)
        weakref.finalize(self, file.close)
        return file[self._key]
