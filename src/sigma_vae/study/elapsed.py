"""How long something has taken, over all attempts at it: a killed one counts as well."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from sigma_vae.configfile import write_whole

__all__ = ["counted", "seconds_in"]

EVERY_SECONDS = 10.0
"""What a killed attempt loses at most."""


def seconds_in(path: Path) -> float:
    """What the file says that was taken so far; 0 where there is none."""
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


@contextmanager
def counted(path: Path, before: float = 0.0) -> Iterator[None]:
    """Add the time that this takes to the seconds in a file: when it ends, however it does, and on the way.

    Args:
        path: of the file.
        before: seconds to begin with where there is no file yet.
    """
    spent, start, ended = seconds_in(path) or before, monotonic(), Event()

    def write() -> None:
        write_whole(path, f"{spent + monotonic() - start}\n")

    def write_meanwhile() -> None:
        while not ended.wait(EVERY_SECONDS):
            with suppress(OSError):  # the next, or the last, says what is wrong
                write()

    thread = Thread(target=write_meanwhile, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        write()
