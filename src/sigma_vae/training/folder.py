"""A folder that one process writes at a time, and what is said when it cannot be written any more."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sigma_vae.training.distributed import from_first

__all__ = ["LOCK", "check_name", "exclusive", "explained"]

LOCK = ".lock"
"""Name of the file that is locked; it stays, and says nothing by being there."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


def check_name(folder: Path | None) -> None:
    """Refuse a folder that the engine would take for a chain of remote file systems.

    Raises:
        ValueError: there is a ``::`` in its path.
    """
    if folder is not None and "::" in str(folder.absolute()):
        raise ValueError(
            f"{folder.absolute()} has :: in its name, by which remote file systems are chained; take another folder"
        )


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing into it; a killed one keeps nobody out, for the system ends its lock.

    Of several processes that train together, the first one holds the lock.

    Raises:
        ValueError: another process is at work there.
        OSError: the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            says = f"another process is writing into {folder}; wait for it or stop it, or take another folder"
            raise ValueError(says) from error

    from_first(acquire)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained(folder: Path, remedy: str) -> Iterator[None]:
    """Say what to do where files of this folder cannot be written.

    Raises:
        OSError: as it came, with the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            what = f"there is no room for the files of {folder}; what was written before is whole"
            raise OSError(f"{what}; make room, then {remedy} ({error})") from error
        if error.errno in FORBIDDEN and (error.filename is None or _lies_in(folder, error.filename)):
            raise OSError(f"{folder} cannot be written ({error}); take a folder that can, then {remedy}") from error
        raise


def _lies_in(folder: Path, file: str) -> bool:
    return folder.absolute() in [path := Path(file).absolute(), *path.parents]
