"""What a source hands over: examples as they were found, before levels are checked and splits are held out."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigma_vae.config import DataConfig
from sigma_vae.data.levels import Array
from sigma_vae.data.splits import SplitName
from sigma_vae.data.stores import Generated, Mapped

__all__ = ["Encoded", "Part", "Raw", "Source", "UnreadableError", "file_record", "file_stamp"]


class UnreadableError(ValueError):
    """One example cannot be decoded; the others may well be."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples that have to be decoded: it is done once, into a cache that is mapped from then on.

    Args:
        names: of the examples, for messages: file names, or numbers.
        shape: of each decoded example, ``(C, H, W)`` or ``(T, C, H, W)``.
        dtype: ``"uint8"`` or ``"uint16"``.
        decode: example i; called from several threads. Raises :class:`UnreadableError` where it is broken.
        identity: everything that decides the result, as plain values: files with :func:`file_stamp`, and the preprocessing. The
            cache's key is their digest.
        home: folder beside which the cache is kept.
        skip_unreadable: leave broken examples out, and say how many; otherwise they are an error.
        videos: number of the one that each example is a clip of: what is held out are whole videos, where there are enough of them.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    dtype: str
    decode: Callable[[int], Array]
    identity: Mapping[str, Any]
    home: Path
    skip_unreadable: bool = False
    videos: Sequence[int] | None = None


Part = Array | Encoded | Generated | Mapped


@dataclass(frozen=True, eq=False)
class Raw:
    """The splits that a source has itself (train at least), and where they come from.

    Arrays are ``(N, C, *space)``, or ``(N, T, C, *space)`` where the examples are clips.
    """

    name: str
    parts: Mapping[SplitName, Part]
    files: list[dict[str, Any]] = field(default_factory=list)
    preprocessing: list[str] = field(default_factory=list)
    levels: int | None = None
    """How many levels the source is known to have; None where the arrays tell."""
    clips: bool = False
    standardise: bool = False
    """Whether real values are standardised unless the user says otherwise: of tables, whose columns have units of their own."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns, in order."""


@dataclass(frozen=True)
class Source:
    """A reader, and the options of :class:`~sigma_vae.config.DataConfig` that it reads beyond those that all data have."""

    read: Callable[[DataConfig], Raw]
    options: Set[str] = frozenset()


def file_record(path: Path) -> dict[str, Any]:
    """Path and size of a file that data were read from."""
    return {"path": str(path.resolve()), "bytes": path.stat().st_size}


def file_stamp(path: Path) -> list[Any]:
    """What tells that a file has changed, without reading it: name, size, and when content and entry last changed.

    The latter no copying tool can set back, so that other content of the same size and date is noticed.
    """
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
