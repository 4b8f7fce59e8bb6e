"""Containers of many small files, read in place: folders, zip and tar archives."""

import gzip
import os
import struct
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, final

from sigma_vae.data.cache import file_stamp, remembered

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
DAMAGED = (
    OSError, EOFError, LookupError, UnicodeError, NotImplementedError, RuntimeError, struct.error, zlib.error, tarfile.TarError,
    zipfile.BadZipFile,
)  # fmt: skip
"""Errors that reading a damaged file raises."""


SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "lost+found"))
"""Folders that systems and network stores add, with thumbnails and deleted files; they are left out like hidden files."""
LARGEST_MEMBER = 2**30
"""Bytes of the largest file in an archive that is read whole: a small archive can claim any size."""
MOST_TIMES = 500
"""Largest ratio of content above 1 GiB to its file: dSprites unpacks to 120 times, zeros to 1000 times."""


class Container(ABC):
    """Files by name, relative to the container, with slashes. Hidden files are left out."""

    path: Path

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of all files, sorted folder by folder."""

    @property
    def hidden(self) -> list[str]:
        """Names of the files that are left out: hidden ones, and those in folders of systems."""
        return []

    @abstractmethod
    def read(self, name: str, most: int = -1) -> bytes:
        """Read the first ``most`` bytes of a file, or all; safe in several threads.

        Raises:
            DAMAGED: one of these errors, for a broken file.
        """

    @abstractmethod
    def stamp(self, names: list[str]) -> Any:
        """Return plain values that change when one of these files does."""


@final
class Folder(Container):
    """A folder with all its subfolders; links are followed.

    >>> folder = Folder(Path(tempfile.mkdtemp()))
    >>> _ = (folder.path / "b").write_bytes(b"123"), (folder.path / ".hidden").write_bytes(b"")
    >>> folder.names, folder.read("b", 2)
    (['b'], b'12')
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """Names of all files, dangling links included."""
        return _visible(os.path.relpath(path, self.path) for path in _walk(self.path, frozenset()))

    @property
    def hidden(self) -> list[str]:
        """Names of the files that are left out."""
        found = (os.path.relpath(Path(place, name), self.path) for place, _, files in os.walk(self.path) for name in files)
        return [name for name in found if _is_hidden(name)]

    def read(self, name: str, most: int = -1) -> bytes:
        """Read one file."""
        with (self.path / name).open("rb") as file:
            return file.read(most)

    def stamp(self, names: list[str]) -> Any:
        """Size and times of each file; None for dangling links."""
        return [[name, *_stamp(self.path / name)] for name in names]


@final
class Zip(Container):
    """A zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> list[str]:
        """Names of all files in it."""
        return _visible(info.filename for info in self._archive.infolist() if not info.is_dir())

    @property
    def hidden(self) -> list[str]:
        """Names of the files that are left out."""
        return [info.filename for info in self._archive.infolist() if not info.is_dir() and _is_hidden(info.filename)]

    def read(self, name: str, most: int = -1) -> bytes:
        """Read one file; reading it whole verifies its checksum."""
        with self._lock, self._archive.open(name) as file:  # several threads would move one file's position
            _check_size(name, self._archive.getinfo(name).file_size, most)
            return file.read(most)

    def stamp(self, names: list[str]) -> Any:
        """The archive's own stamp."""
        return file_stamp(self.path)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        archive = zipfile.ZipFile(self.path)
        weakref.finalize(self, archive.close)
        return archive


@final
class Tar(Container):
    """A tar archive, whose files are located once, then read in place.

    A gzipped one is unpacked into a temporary file in ``room`` first, as gzip can only be read from the start.
    """

    def __init__(self, path: Path, room: Path) -> None:
        self.path = path
        self._room = room
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> list[str]:
        """Names of all files in it, without links and devices."""
        return _visible(self._places)

    @property
    def hidden(self) -> list[str]:
        """Names of the files that are left out."""
        return [name for name in self._places if _is_hidden(name)]

    def read(self, name: str, most: int = -1) -> bytes:
        """Read one file."""
        with self._lock:
            start, size = self._places[name]
            _check_size(name, size, most)
            wanted = size if most < 0 else min(most, size)
            self._file.seek(start)
            content = self._file.read(wanted)
        if len(content) < wanted:
            raise EOFError(f"the archive ends within {name}")
        return content

    def stamp(self, names: list[str]) -> Any:
        """The archive's own stamp."""
        return file_stamp(self.path)

    @cached_property
    def _file(self) -> IO[bytes]:
        file: IO[bytes] = self.path.open("rb") if self.path.suffix == ".tar" else self._unpacked()
        weakref.finalize(self, file.close)
        return file

    def _unpacked(self) -> IO[bytes]:
        with ExitStack() as unless_it_succeeds:
            try:
                self._room.mkdir(parents=True, exist_ok=True)
                file = unless_it_succeeds.enter_context(tempfile.TemporaryFile(dir=self._room))
                for block in gunzipped(self.path):
                    file.write(block)
            except gzip.BadGzipFile:
                raise
            except OSError as error:
                raise ValueError(
                    f"{self.path} cannot be unpacked in {self._room}: {error}; give another folder: --cache FOLDER"
                ) from error
            unless_it_succeeds.pop_all()
        return file

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Start and size of each file, kept for the next time: finding them takes reading all headers in turn."""
        identity = {"places in": file_stamp(self.path)}
        places: dict[str, tuple[int, int]] = remembered(self.path.resolve().parent, str(self._room), identity, self._found)
        return places

    def _found(self) -> dict[str, tuple[int, int]]:
        self._file.seek(0)
        with tarfile.open(fileobj=self._file, mode="r:") as archive:
            plain = dict[str, tuple[int, int]]()
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all that it has read
                if member.isreg() and not member.sparse:
                    plain[member.name] = (member.offset_data, member.size)
            # To tarfile, a damaged header or the end of the file ends an archive as well as the block of zeros that belongs there.
            self._file.seek(archive.offset)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"after {len(plain)} files comes neither another one nor the end mark")
        return plain


def container(path: Path, room: Path) -> Container:
    """Open the container at a path; a gzipped tar is unpacked in the folder ``room``.

    Raises:
        ValueError: an archive is damaged or missing.
    """
    if path.is_dir():
        return Folder(path)
    found: Container = Zip(path) if path.suffix.lower() == ".zip" else Tar(path, room)
    try:
        assert found.names is not None  # reads the table of contents
    except DAMAGED as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix[1:]} archive ({type(error).__name__}: {error}); fetch or make it anew"
        ) from error
    return found


def check_unpacked(name: str, size: int, packed: int, remedy: str = "save it without compression") -> None:
    """Refuse a small file that unpacks to so much that it would fill the memory or the disk.

    Raises:
        ValueError: it has more than 1 GiB, and more than 500 times its packed size.
    """
    if size > LARGEST_MEMBER and size > MOST_TIMES * packed:
        raise ValueError(
            f"{name} has {packed} bytes and unpacks to {size} or more, over {MOST_TIMES} times as many, so it holds hardly anything;"
            f" check where it is from, or if that is meant, {remedy}"
        )


def gunzipped(path: Path) -> Iterator[bytes]:
    """Yield the content of a gzipped file, 1 MiB at a time.

    Raises:
        ValueError: it unpacks to too much, see :func:`check_unpacked`.
        OSError: it is damaged.
    """
    total, packed = 0, path.stat().st_size
    with gzip.open(path) as file:
        while block := file.read(2**20):
            total += len(block)
            check_unpacked(str(path), total, packed)
            yield block


def _check_size(name: str, size: int, most: int) -> None:
    if most < 0 and size > LARGEST_MEMBER:
        raise EOFError(f"{name} has {size} bytes, more than a picture has (at most {LARGEST_MEMBER})")


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[str]:
    real = folder.resolve()
    if real in above:  # a link to a folder above
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if os.path.isdir(entry.path):
                yield from _walk(Path(entry.path), above | {real})
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path):  # no pipe, socket or device
                yield entry.path


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in PurePosixPath(name).parts)


def _visible(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if not _is_hidden(name)), key=lambda name: name.split("/"))


def _stamp(path: Path) -> list[Any]:
    try:
        return file_stamp(path)[1:]
    except OSError:
        return [None]
