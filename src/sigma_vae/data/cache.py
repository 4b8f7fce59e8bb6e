"""Cache of decoded examples, one memory-mapped file: built once, whole or not at all, and verified at every opening."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sigma_vae.data.stores import Array, Encoded, Mapped, UnreadableError

FORMAT = 1
FOLDER = ".sigma-vae"
BLOCK = 2**24
"""Bytes per checksum: enough to keep a thread busy, few enough to locate damage."""
PIECE = 64
"""Examples that a thread decodes in one go; fewer if they are large."""
PIECE_BYTES = 2**26


def cached(encoded: Encoded, folder: Path | None = None) -> tuple[Mapped, list[str]]:
    """Return the decoded examples from the cache; if they are not in it yet, decode them into it first.

    The cache is beside the data, or in ``folder``. Its name is the digest of everything that decides its content; in
    ``folder``, which several data sets may share, that includes the place of the data. Only one process builds it while
    others wait. It is written aside and renamed when it is whole.

    Returns:
        The examples, and the names of unreadable ones that were left out.

    Raises:
        ValueError: the cache is damaged; or examples are unreadable and may not be skipped.
        OSError: it cannot be written: no permission, or no room.
    """
    identity, size = encoded.identity, len(encoded.names) * int(np.prod(encoded.shape)) * np.dtype(encoded.dtype).itemsize
    place = _entry(identity, encoded.home, folder, size, lambda path: _decode_all(encoded, path))
    array, digest, skipped = _open(place)
    if skipped and not encoded.skip_unreadable:  # by a run that allowed it
        raise ValueError(_unreadable(skipped, len(encoded.names), f"they were left out of {place}"))
    return Mapped(array, digest, videos=_videos(encoded, set(skipped))), skipped


def cached_rows(
    parts: Callable[[], Iterable[Array]],
    shape: tuple[int, ...],
    identity: Mapping[str, Any],
    home: Path,
    folder: Path | None = None,
) -> Mapped:
    """Return rows of float32 from the cache; if they are not in it yet, write them into it first, a part at a time.

    Args:
        parts: gives the rows in order, a part at a time; called only where they are not in the cache.
        shape: of all rows together, ``(N, *shape)``.
        identity: everything that decides the rows, as for :class:`~sigma_vae.data.stores.Encoded`.
        home: the folder beside which the cache is kept.
        folder: a folder for it, in place of that.

    Raises:
        ValueError: the cache is damaged.
        OSError: it cannot be written: no permission, or no room.
    """

    def write(path: Path) -> list[str]:
        with path.open("wb") as file:
            _write_header(file, np.dtype(np.float32), shape)
            for part in parts():
                file.write(np.ascontiguousarray(part, dtype=np.float32).data)
        return []

    array, digest, _ = _open(_entry(identity, home, folder, 4 * int(np.prod(shape)), write))
    return Mapped(array, digest)


def _entry(
    identity: Mapping[str, Any], beside: Path, folder: Path | None, size: int, write: Callable[[Path], list[str]]
) -> Path:
    """The folder of a cache entry, which ``write`` fills where it does not exist yet; ``size`` are its bytes."""
    from filelock import FileLock

    home = folder or beside / FOLDER
    key = key_of(identity, beside if folder else None)
    place = home / key
    if not place.exists():
        with _writing(home), FileLock(home / f"{key}.lock"):
            if not place.exists():  # no other process has built it in the meantime
                _check_room(home, size)
                _build(place, identity, write)
    return place


def key_of(identity: Mapping[str, Any], home: Path | None) -> str:
    """Return the name of a cache entry: a digest of what decides its content, and of the data's place if that is given.

    Without the place, two data sets with files of the same names, sizes and times would be confused.

    >>> key_of({"file": "a"}, None) == key_of({"file": "a"}, Path("/data"))
    False
    """
    whole = dict(identity) | ({} if home is None else {"home": str(home.resolve())})
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


def _videos(encoded: Encoded, skipped: set[str]) -> Tensor | None:
    """Return the video of each remaining clip."""
    if encoded.videos is None:
        return None
    return torch.tensor([video for name, video in zip(encoded.names, encoded.videos, strict=True) if name not in skipped])


def _build(place: Path, identity: Mapping[str, Any], write: Callable[[Path], list[str]]) -> None:
    """Write the examples, and a record with their checksums and the names of those that were left out."""
    aside = place.with_name(f"{place.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # left by a builder that was killed; the lock says that none is at work
    try:
        aside.mkdir()
        skipped = write(aside / "examples.npy")
        blocks = _digests(aside / "examples.npy")
        record = {"format": FORMAT, "identity": dict(identity), "skipped": skipped, "blocks": blocks}
        (aside / "cache.json").write_text(json.dumps(record), encoding="utf-8")
        aside.rename(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def piece_of(example_bytes: int) -> int:
    """Return the number of examples to decode together.

    >>> piece_of(1000), piece_of(10**9)
    (64, 1)
    """
    return max(1, min(PIECE, PIECE_BYTES // example_bytes))


def _decode_all(encoded: Encoded, path: Path) -> list[str]:
    """Write all readable examples in order, and return the names of the others. Decoders release the GIL: threads pay."""
    from rich.console import Console
    from rich.progress import Progress

    count, example = len(encoded.names), int(np.prod(encoded.shape)) * np.dtype(encoded.dtype).itemsize
    size = piece_of(example)
    with path.open("wb") as file, Progress(console=Console(stderr=True), transient=True) as progress:
        start = _write_header(file, np.dtype(encoded.dtype), (count, *encoded.shape))
        task, lock = progress.add_task("decoding, once", total=count), threading.Lock()

        def piece(first: int) -> dict[int, str]:
            broken = {}
            rows = np.zeros((min(size, count - first), *encoded.shape), encoded.dtype)
            for i, row in enumerate(rows, first):
                try:
                    row[...] = encoded.decode(i)
                except UnreadableError as error:
                    broken[i] = str(error)
            with lock:
                file.seek(start + first * example)
                file.write(rows.tobytes())
            progress.advance(task, len(rows))
            return broken

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            broken = dict(item for part in pool.map(piece, range(0, count, size)) for item in part.items())
    names = [encoded.names[i] for i in broken]
    if names and (not encoded.skip_unreadable or len(names) == count):
        raise ValueError(_unreadable(names, count, f"the first says: {next(iter(broken.values()))}"))
    if names:
        _close_gaps(path, encoded, list(broken))
    return names


def _unreadable(names: list[str], count: int, what: str) -> str:
    few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    remedy = "repair or remove them, or leave them out: --unreadable skip" if len(names) < count else "repair or convert them"
    return f"{len(names)} of {count} examples cannot be decoded ({few}); {what}; {remedy}"


def _write_header(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    return int(file.tell())


def _close_gaps(path: Path, encoded: Encoded, broken: list[int]) -> None:
    """Rewrite the file without the broken rows."""
    everything = np.load(path, mmap_mode="r")
    kept = np.setdiff1d(np.arange(len(everything)), broken)
    aside = path.with_suffix(".kept")
    with aside.open("wb") as file:
        _write_header(file, everything.dtype, (len(kept), *everything.shape[1:]))
        for first in range(0, len(kept), PIECE):
            file.write(everything[kept[first : first + PIECE]].tobytes())
    aside.replace(path)


def _digests(path: Path) -> list[str]:
    """Checksum each block of a file (xxHash, as fast as memory); several threads read it."""
    import xxhash

    def digest(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return str(xxhash.xxh3_128(file.read(BLOCK)).hexdigest())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, range(0, path.stat().st_size, BLOCK)))


def digest_of(path: Path) -> str:
    """SHA-256 of the checksums of a file's blocks."""
    return hashlib.sha256("".join(_digests(path)).encode()).hexdigest()


def _open(place: Path) -> tuple[Array, str, list[str]]:
    examples, remedy = place / "examples.npy", f"delete the folder {place}; it will be rebuilt from the data"
    try:
        record = json.loads((place / "cache.json").read_text(encoding="utf-8"))
        blocks, skipped = list(record["blocks"]), list(record["skipped"])
        found = _digests(examples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the cache {place} cannot be read ({type(error).__name__}: {error}); {remedy}") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"the cache {place} has format {record.get('format')!r}, this version reads {FORMAT}; {remedy}")
    if found != blocks:
        bad = sum(a != b for a, b in zip(found, blocks, strict=False)) + abs(len(found) - len(blocks))
        raise ValueError(
            f"the cache {place} is damaged: {bad} of {len(blocks)} blocks have changed since it was built; {remedy}"
        )
    digest = hashlib.sha256("".join(blocks).encode()).hexdigest()
    return np.load(examples, mmap_mode="r"), digest, skipped


def _check_room(home: Path, needed: int) -> None:
    if (free := shutil.disk_usage(home).free) < needed:
        raise OSError(f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")


@contextmanager
def _writing(home: Path) -> Iterator[None]:
    """Make the folder, and add the remedy to errors of writing."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        remedy = "give another folder for decoded copies: --cache FOLDER"
        raise OSError(f"decoded examples cannot be kept in {home}: {error}; {remedy}") from error


def remembered(home: Path, cache: str | None, identity: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """Return the result of ``find``, plain values for JSON, kept on disk as long as the files are the same.

    Args:
        home: the folder of the files.
        cache: the user's folder for results; default: a folder inside ``home``.
        identity: everything that decides the result, as plain values: files by :func:`file_stamp`.
        find: reads the files.

    >>> import tempfile
    >>> home = Path(tempfile.mkdtemp())
    >>> remembered(home, None, {"file": "a"}, lambda: [1, 2]), remembered(home, None, {"file": "a"}, lambda: 1 / 0)
    ([1, 2], [1, 2])
    """
    key = key_of(identity, home if cache else None)
    folder = Path(cache).expanduser() if cache else home / FOLDER
    path = folder / f"{key}.json"
    with suppress(OSError, ValueError):  # missing, or incomplete
        return json.loads(path.read_text(encoding="utf-8"))
    found = find()
    # A folder that cannot be written costs only time here; it is an error when decoded examples are to be written.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{key}.{os.getpid()}.part"
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(path)
    return found


def file_record(path: Path) -> dict[str, Any]:
    """Path and size of a file that data were read from."""
    return {"path": str(path.resolve()), "bytes": path.stat().st_size}


def file_stamp(path: Path) -> list[Any]:
    """Name, size and times of last change of content and of entry: they reveal a changed file without reading it.

    No copying tool can set back the time of the entry's change, so that other content of the same size and date is
    noticed.
    """
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
