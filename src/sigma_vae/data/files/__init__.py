"""The user's own files: which reader a path is for."""

from collections.abc import Mapping
from pathlib import Path

from sigma_vae.config import DataConfig
from sigma_vae.data.files.arrays import read_arrays
from sigma_vae.data.files.videos import ENDINGS as VIDEO_ENDINGS
from sigma_vae.data.files.videos import OPTIONS, holds_videos, read_videos
from sigma_vae.data.raw import Source

__all__ = ["ENDINGS", "source_of"]

_VIDEOS = Source(read_videos, OPTIONS)

ENDINGS: Mapping[str, Source] = {
    ".npy": Source(read_arrays, {"layout"}),
    ".npz": Source(read_arrays, {"layout"}),
    **dict.fromkeys(VIDEO_ENDINGS, _VIDEOS),
}
"""File ending to reader, with the options that it reads."""


def source_of(path: Path, config: DataConfig) -> Source | None:
    """The reader for a path; None where it is of no known kind."""
    if path.is_dir():
        return _VIDEOS if holds_videos(path, config.clips) else None
    return ENDINGS.get(path.suffix.lower())
