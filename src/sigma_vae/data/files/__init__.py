"""The user's own files: which reader a path is for."""

import os
from collections.abc import Mapping
from pathlib import Path

from sigma_vae.config import DataConfig
from sigma_vae.data.files.arrays import read_arrays
from sigma_vae.data.files.containers import ARCHIVES
from sigma_vae.data.files.folders import is_glob, read_pictures
from sigma_vae.data.files.hdf5 import read_hdf5
from sigma_vae.data.files.tables import TABLES, holds_tables, read_tables
from sigma_vae.data.files.videos import ENDINGS as VIDEO_ENDINGS
from sigma_vae.data.files.videos import OPTIONS, holds_videos, read_videos
from sigma_vae.data.raw import Source

__all__ = ["ENDINGS", "source_of"]

_ARRAYS = Source(read_arrays, {"layout"})
_HDF5 = Source(read_hdf5, {"layout", "columns", "cache"})
_TABLES = Source(read_tables, {"layout", "columns"})
_VIDEOS = Source(read_videos, OPTIONS)
_PICTURES = Source(read_pictures, {"cache", "crop", "size", "fit", "colour", "unreadable"})

ENDINGS: Mapping[str, Source] = {
    ".npy": _ARRAYS,
    ".npz": _ARRAYS,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    **dict.fromkeys(TABLES, _TABLES),
    **dict.fromkeys(ARCHIVES, _PICTURES),
    **dict.fromkeys(VIDEO_ENDINGS, _VIDEOS),
}
"""File ending to reader, with the options that it reads."""


def source_of(path: Path, config: DataConfig) -> Source | None:
    """The reader for a path; None where it is of no known kind.

    A folder is for tables where one is called train (train.csv, say), for videos where it holds some, else for pictures.

    Raises:
        ValueError: the path is a link to nothing.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; mend the link, or give another path")
    if path.is_dir():
        return _TABLES if holds_tables(path) else _VIDEOS if holds_videos(path, config.clips) else _PICTURES
    if is_glob(path):
        return _PICTURES
    return next((source for ending, source in ENDINGS.items() if path.name.lower().endswith(ending)), None)
