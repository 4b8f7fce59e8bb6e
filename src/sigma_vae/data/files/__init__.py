"""The user's own files: which reader a path is for."""

from collections.abc import Mapping
from pathlib import Path

from sigma_vae.config import DataConfig
from sigma_vae.data.files.arrays import read_arrays
from sigma_vae.data.raw import Source

__all__ = ["ENDINGS", "source_of"]

ENDINGS: Mapping[str, Source] = {
    ".npy": Source(read_arrays, {"layout"}),
    ".npz": Source(read_arrays, {"layout"}),
}
"""File ending to reader, with the options that it reads."""


def source_of(path: Path, config: DataConfig) -> Source | None:
    """The reader for a path; None where it is of no known kind."""
    return ENDINGS.get(path.suffix.lower())
