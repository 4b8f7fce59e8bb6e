"""Folders and archives of many small files, read in place."""

import gzip
import os
import shutil
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, final

from sigma_vae.data.cache import file_stamp, remembered

__all__ = ["ARCHIVES", "DAMAGED", "Container", "Folder", "Tar", "Zip", "container"]

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""What reading a damaged file raises."""


class Container(ABC):
    """Files by their names within: relative, with slashes. Hidden files are left out."""

    path: Path

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Of all files, sorted folder by folder."""

    @abstractmethod
    def read(self, name: str, most: int = -1) -> bytes:
        """The first ``most`` bytes of a file, or all of them; called from several threads. Raises OSError, or what the archive says."""

    @abstractmethod
    def stamp(self, names: list[str]) -> Any:
        """What tells that one of these files has changed, as plain values."""


@final
class Folder(Container):
    """A folder, with all folders in it; links are followed.

    >>> folder = Folder(Path(tempfile.mkdtemp()))
    >>> _ = (folder.path / "b").write_bytes(b"123"), (folder.path / ".hidden").write_bytes(b"")
    >>> folder.names, folder.read("b", 2)
    (['b'], b'12')
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def names(self) -> list[str]:
        """Of all files, dangling links among them."""
        return sorted((os.path.relpath(path, self.path) for path in _walk(self.path, frozenset())), key=_by_folder)

    def read(self, name: str, most: int = -1) -> bytes:
        """Of one file."""
        with (self.path / name).open("rb") as file:
            return file.read(most)

    def stamp(self, names: list[str]) -> Any:
        """Size and time of each; None for dangling links."""
        return [[name, *_stamp(self.path / name)] for name in names]


@final
class Zip(Container):
    """A zip archive.

    Args:
        path: of the archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> list[str]:
        """Of all files in it."""
        names = [info.filename for info in self._archive.infolist() if not info.is_dir()]
        return sorted((name for name in names if not _is_hidden(name)), key=_by_folder)

    def read(self, name: str, most: int = -1) -> bytes:
        """Of one file; its checksum is verified where it is read whole."""
        with self._lock, self._archive.open(name) as file:  # several threads would move one file's position
            return file.read(most)

    def stamp(self, names: list[str]) -> Any:
        """The archive's."""
        return file_stamp(self.path)

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        archive = zipfile.ZipFile(self.path)
        weakref.finalize(self, archive.close)
        return archive


@final
class Tar(Container):
    """A tar archive: its files are found once, then read where they lie.

    A gzipped one is unpacked into a temporary file first, as it can be read from the start alone.

    Args:
        path: of the archive.
        room: folder for the temporary file.
    """

    def __init__(self, path: Path, room: Path) -> None:
        self.path = path
        self._room = room
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> list[str]:
        """Of all files in it; links and devices are left out."""
        return sorted((name for name in self._places if not _is_hidden(name)), key=_by_folder)

    def read(self, name: str, most: int = -1) -> bytes:
        """Of one file."""
        with self._lock:
            start, size = self._places[name]
            descriptor = self._file.fileno()
        wanted = size if most < 0 else min(most, size)
        content = os.pread(descriptor, wanted, start)
        if len(content) < wanted:
            raise EOFError(f"the archive ends within {name}")
        return content

    def stamp(self, names: list[str]) -> Any:
        """The archive's."""
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
                with gzip.open(self.path) as packed:
                    shutil.copyfileobj(packed, file, 2**20)
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
        """Start and size of each file in it: remembered, as all headers have to be read, one after the other, to find them."""
        identity = {"places in": file_stamp(self.path)}
        places: dict[str, tuple[int, int]] = remembered(self.path.resolve().parent, str(self._room), identity, self._found)
        return places

    def _found(self) -> dict[str, tuple[int, int]]:
        self._file.seek(0)
        with tarfile.open(fileobj=self._file, mode="r:") as archive:
            plain = [member for member in archive if member.isreg() and not member.sparse]
            # A damaged header, or the end of the file, is as good an end to tarfile as the block of zeros that every archive has.
            self._file.seek(archive.offset)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"after {len(plain)} files, neither another nor the mark of its end")
        return {member.name: (member.offset_data, member.size) for member in plain}


def container(path: Path, room: Path) -> Container:
    """The container at a path, by its kind; ``room`` is where a gzipped one is unpacked.

    Raises:
        ValueError: an archive is damaged or missing.
    """
    if path.is_dir():
        return Folder(path)
    found: Container = Zip(path) if path.suffix.lower() == ".zip" else Tar(path, room)
    try:
        assert found.names is not None  # which reads the table of contents
    except DAMAGED as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix[1:]} archive ({type(error).__name__}: {error}); fetch or make it anew"
        ) from error
    return found


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[str]:
    real = folder.resolve()
    if real in above:  # a link to a folder that this one lies in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), above | {real})
            else:
                yield entry.path


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _by_folder(name: str) -> list[str]:
    return name.split("/")


def _stamp(path: Path) -> list[Any]:
    try:
        return file_stamp(path)[1:]
    except OSError:
        return [None]
