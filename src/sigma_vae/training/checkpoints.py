"""Checkpoint files that are whole or refused, the best weights, and the folder that one process writes at a time."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, final

import torch

from sigma_vae.training.distributed import from_first

FORMAT = "sigma-vae training 1"
"""Value of ``format`` in checkpoints of this version."""
SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64
BEFORE = {"last.ckpt": "previous.ckpt", "best.ckpt": "best-before.ckpt"}
"""New name of a file when another replaces it."""
LOCK = ".lock"
"""Name of the locked file. It stays in the folder; only its lock means something."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}

log = logging.getLogger(__name__)


# -- the training's checkpoints ----------------------------------------------------------------------------------------


@final
class Checkpoints:
    """The checkpoints of one training: ``last.ckpt`` to go on from, ``previous.ckpt`` before it, and the best weights.

    Every process calls the methods; the first one writes. If ``resumed``, the file that a training goes on from, is not
    ``last.ckpt``, that one is damaged, and is kept as ``last.ckpt.damaged`` in place of becoming ``previous.ckpt``.
    """

    def __init__(self, folder: Path, resumed: Path | None) -> None:
        self.last = folder / "last.ckpt"
        self.resumed = resumed
        self.best = BestWeights(folder / "best.ckpt")
        self._damaged = resumed is not None and resumed != self.last

    def write(self, state: dict[str, Any]) -> None:
        """Write ``last.ckpt``; the one that had the name becomes ``previous.ckpt``."""
        before = self.last.with_name(f"{self.last.name}.damaged" if self._damaged else BEFORE[self.last.name])
        content = {"format": FORMAT, **state}
        from_first(lambda: write_sealed(content | {"best": self.best.state_dict()}, self.last, before))
        self._damaged = False

    def newest_weights(self) -> dict[str, torch.Tensor]:
        """The best weights, or where none were found, those of ``last.ckpt``; the same on every process."""
        path = self.last if self.best.step is None else self.best.path
        weights: dict[str, torch.Tensor] = from_first(lambda: read_checkpoint(path)["model"])
        return weights


@final
class BestWeights:
    """The weights with the best validation so far, in a file of their own.

    A checkpoint names that file by its seal: a training that goes on from an older checkpoint takes the weights that
    were best then, not those found after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.score: float | None = None
        self.step: int | None = None

    def offer(self, score: float, step: int, weights: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Keep these weights if their score is the highest."""
        if self.score is not None and not score > self.score:
            return
        content = {"format": FORMAT, "step": step, "score": score, "model": weights()}
        from_first(lambda: write_sealed(content, self.path, self.path.with_name(BEFORE[self.path.name])))
        self.score, self.step = score, step

    def state_dict(self) -> dict[str, Any]:
        """The score, and the seal of the file with the weights."""
        return {"score": self.score, "step": self.step, "seal": None if self.step is None else _seal(self.path)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, if the weights are still there."""
        if state["step"] is not None and from_first(lambda: self._find(state["seal"])):
            self.score, self.step = state["score"], state["step"]

    def _find(self, seal: str) -> bool:
        """Whether an undamaged file with this seal is there; give it its name back."""
        for path in (self.path, self.path.with_name(BEFORE[self.path.name])):
            if path.exists() and _seal(path) == seal and damage(path) is None:
                if path != self.path:
                    os.replace(path, self.path)
                return True
        log.warning("%s is lost or damaged: the weights found best from here on count", self.path)
        return False


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if any; where the last one is damaged, log that and take the one before.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    problems: list[str] = []
    for path in (folder / "last.ckpt", folder / "previous.ckpt"):
        if not path.exists():
            continue
        problem = damage(path)
        if problem is None:
            for text in problems:
                log.warning("%s; going on from %s, the one before: the steps that it lacks are repeated exactly", text, path)
            return path
        problems.append(f"{path} {problem}")
    if problems:
        remedy = f"delete the folder {folder} to train again from the beginning, with the same result"
        raise ValueError(f"there is no whole checkpoint to go on from: {'; '.join(problems)}; {remedy}")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values, no code is run.

    Raises:
        ValueError: it is missing or damaged, or another version or program wrote it.
    """
    content = read_sealed(path)
    _check_format(content, path)
    return content


def step_of(path: Path) -> int:
    """The number of steps before a checkpoint, without reading its tensors.

    Raises:
        ValueError: it is no checkpoint of this version.
    """
    content = _unpickled(path, mmap=True)
    _check_format(content, path)
    step = content.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path} is no checkpoint of a training: it has {step!r} steps behind it")
    return step


def _check_format(content: dict[str, Any], path: Path) -> None:
    if "pytorch-lightning_version" in content:
        raise ValueError(
            f"{path} was written by an earlier version of sigma-vae, whose checkpoints this one cannot go on from; train anew into"
            " another folder, or go on with the version that wrote it"
        )
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version: its format is {content.get('format')!r}, not {FORMAT!r}")


# -- sealed files ------------------------------------------------------------------------------------------------------


def write_sealed(content: dict[str, Any], path: Path, before: Path | None = None) -> None:
    """Write tensors and plain values so that, whenever the process is killed, a whole file is left.

    The file is written aside, forced to the disk, and renamed; the one it replaces gets the name ``before``. Its seal, a
    SHA-256 digest of all bytes before it, is the comment at the end of the zip archive: :func:`torch.load` and
    ``unzip`` still read the file.

    Raises:
        OSError: it cannot be written, for lack of space say; the files that were there are unchanged.
    """
    aside = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(content, aside)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"the checkpoint cannot be written ({error.strerror}), those before are whole", str(path)
        ) from error
    if before is not None and path.exists():
        os.replace(path, before)
    os.replace(aside, path)
    _force_to_disk(path.parent)


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed file: tensors and plain values, no code is run.

    Raises:
        ValueError: it is missing, damaged, or no such file.
    """
    problem = damage(path)
    if problem is not None:
        raise ValueError(f"{path} {problem}; it is not read")
    return _unpickled(path)


def damage(path: Path) -> str | None:
    """Say how a sealed file is damaged (cut off, or changed since it was written); None if it is whole."""
    try:
        with path.open("rb") as file:
            sealed = file.seek(0, os.SEEK_END) - SEAL_BYTES
            if sealed <= 0 or _seal(path) is None:
                return "ends without the digest that checkpoints end with: it was cut off, or another program wrote it"
            file.seek(0)
            return None if _digest(file, sealed) == _seal(path) else "has changed since it was written (its digest differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


class _Recorder:
    """A file that remembers why it could not be written, since torch raises an error of its own instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(content: dict[str, Any], path: Path) -> None:
    with path.open("w+b") as file:
        recorder = _Recorder(file)
        try:
            torch.save(content, recorder)  # type: ignore[arg-type]  # it calls only write and flush
        except RuntimeError:
            if recorder.error is not None:
                raise recorder.error from None
            raise
        size = file.seek(-2, os.SEEK_END) + 2
        assert file.read(2) == b"\0\0"  # the length of the archive's comment
        file.seek(size - 2)
        file.write(SEAL_BYTES.to_bytes(2, "little"))
        file.seek(0)
        digest = _digest(file, size)
        file.seek(size)
        file.write(SEAL + digest.encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _seal(path: Path) -> str | None:
    """The digest that a file ends with."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - SEAL_BYTES, 0))
        end = file.read()
    return end.removeprefix(SEAL).decode("ascii", "replace") if end.startswith(SEAL) else None


def _force_to_disk(folder: Path) -> None:
    """Force the names in a folder to the disk, if the system can, so that they survive a loss of power."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unpickled(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # on foreign bytes the reader raises nearly anything
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} holds something else than tensors and plain values, and is not read: {first}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no checkpoint, but {type(content).__name__}")
    return content


# -- the folder --------------------------------------------------------------------------------------------------------


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder, and lock it against other processes; a killed process's lock ends with it.

    If several processes train together, the first one holds the lock.

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
def with_remedy(folder: Path, remedy: str) -> Iterator[None]:
    """Add what to do to the :class:`OSError` of a file in this folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            says = f"there is no room for the files of {folder}; files written before are whole"
            raise OSError(f"{says}; make room, then {remedy} ({error})") from error
        file = None if error.filename is None else Path(error.filename).absolute()
        if error.errno in FORBIDDEN and (file is None or file.is_relative_to(folder.absolute())):
            raise OSError(f"{folder} cannot be written ({error}); take a folder that can, then {remedy}") from error
        raise
