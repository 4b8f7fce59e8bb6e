"""What a source hands over: arrays as they were found, before levels are checked and splits are held out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigma_vae.data.levels import Array
from sigma_vae.data.splits import SplitName

__all__ = ["Raw", "file_record"]


@dataclass(frozen=True, eq=False)
class Raw:
    """Arrays ``(N, C, *space)`` of the splits that a source has itself (train at least), and where they come from."""

    name: str
    parts: Mapping[SplitName, Array]
    files: list[dict[str, Any]] = field(default_factory=list)
    preprocessing: list[str] = field(default_factory=list)
    levels: int | None = None
    """How many levels the source is known to have; None where the arrays tell."""


def file_record(path: Path) -> dict[str, Any]:
    """Path and size of a file that data were read from."""
    return {"path": str(path.resolve()), "bytes": path.stat().st_size}
