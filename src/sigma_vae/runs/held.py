"""A finished run that one process changes at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sigma_vae.runs.folder import config_of
from sigma_vae.training.folder import exclusive, explained

__all__ = ["held"]


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's folder while this one does.

    Raises:
        ValueError: the folder holds no run, or another process is at work in it.
        OSError: the folder cannot be written.
    """
    config_of(out)  # where there is no run, no folder is made for one
    with explained(out, "do it again"), exclusive(out):
        yield
