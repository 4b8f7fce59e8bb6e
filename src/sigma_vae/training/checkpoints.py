"""Checkpoint files that are whole or refused: written aside, forced to the disk, renamed; sealed with a digest; the one before is kept."""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins.io import CheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from sigma_vae.training.distributed import processes

__all__ = ["BestCheckpoint", "SealedCheckpoints", "damage", "newest", "read_sealed", "step_of", "write_sealed"]

SEAL = b"sha256:"
SEAL_BYTES = len(SEAL) + 64
BEFORE = {"last.ckpt": "previous.ckpt", "best.ckpt": "best-before.ckpt"}
"""What a file is called when another takes its name."""

log = logging.getLogger(__name__)


def write_sealed(checkpoint: dict[str, Any], path: Path, before: Path | None = None) -> None:
    """Write a checkpoint so that at any moment, whatever is killed or switched off, a whole one bears its name or that of the one before.

    The seal, a SHA-256 digest of all bytes before it, is the comment with which a zip archive may end: :func:`torch.load` and
    ``unzip`` read the file as they read any other.

    Args:
        checkpoint: tensors and plain values.
        path: where to; its folder is made.
        before: what a file that has this name is called from now on.

    Raises:
        OSError: it cannot be written, no room say; the files that were there are as they were.
    """
    aside = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(checkpoint, aside)
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
    """Read a checkpoint: tensors and plain values, no code is run.

    Raises:
        ValueError: it is missing, damaged, or something else.
    """
    problem = damage(path)
    if problem is not None:
        raise ValueError(f"{path} {problem}; it is not read")
    return _unpickled(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file: cut off, or changed since it was written; None of a whole one."""
    try:
        with path.open("rb") as file:
            sealed = file.seek(0, os.SEEK_END) - SEAL_BYTES
            if sealed <= 0 or _seal(path) is None:
                return "ends without the digest that checkpoints end with: it was cut off, or is none of this version"
            file.seek(0)
            return None if _digest(file, sealed) == _seal(path) else "has changed since it was written (its digest differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint to go on from; where the last one is damaged, it says so and takes the one before.

    Returns:
        None where there is none.

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
                log.warning("%s; going on from %s, the one before: what it lacks is trained again, the same way", text, path)
            return path
        problems.append(f"{path} {problem}")
    if problems:
        remedy = f"delete the folder {folder} to train again from the beginning, the same way"
        raise ValueError(f"there is no whole checkpoint to go on from: {'; '.join(problems)}; {remedy}")
    return None


def step_of(path: Path) -> int:
    """How many steps lie behind a checkpoint; its tensors are not read.

    Raises:
        ValueError: it does not say.
    """
    step = _unpickled(path, mmap=True).get("global_step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path} is no checkpoint of a training: it has {step!r} steps behind it")
    return step


class SealedCheckpoints(CheckpointIO):
    """How the engine writes and reads checkpoints.

    Args:
        resumed_from: the file that a resumed run goes on from. Where that is not the last one, the last one is damaged, and is never
            given the name of a whole one.
    """

    def __init__(self, resumed_from: Path | None = None) -> None:
        self.damaged = resumed_from is not None and resumed_from.name in BEFORE.values()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it; the one that had the name is the one before, if it is whole."""
        path = Path(path)
        before = BEFORE.get(path.name)
        if path.name == "last.ckpt" and self.damaged:
            before, self.damaged = f"{path.name}.damaged", False
        write_sealed(checkpoint, path, None if before is None else path.with_name(before))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it, if it is whole; never more than tensors and plain values, onto the CPU."""
        return read_sealed(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete it."""
        Path(path).unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """The weights that a monitored metric finds best so far, in a file of their own.

    Checkpoints say by the seal which file that is: a run that goes on from an older one takes the weights that were best then, not
    those found after it. The run folder may be moved between sessions.
    """

    def __init__(self, path: Path, monitor: str) -> None:
        self.path = path
        super().__init__(
            path.parent, path.stem, monitor, mode="max", save_on_train_epoch_end=False, enable_version_counter=False
        )

    def state_dict(self) -> dict[str, Any]:
        """The score, and which file has it."""
        seal = _seal(self.path) if self.best_model_score is not None and self.path.exists() else None
        return super().state_dict() | {"seal": seal}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score over, with the file that it belongs to and the paths of today."""
        known = state_dict["best_model_score"] is not None and self._find(state_dict["seal"])
        here = str(self.path) if known else ""
        scores = {here: state_dict["best_model_score"]} if known else {}
        score = state_dict["best_model_score"] if known else None
        paths = {"dirpath": self.dirpath, "best_model_path": here, "kth_best_model_path": here, "best_k_models": scores}
        super().load_state_dict(state_dict | paths | {"best_model_score": score})

    def _find(self, seal: str | None) -> bool:
        """Whether there is the file with this seal; it is given its name back."""
        for path in (self.path, self.path.with_name(BEFORE[self.path.name])):
            if path.exists() and _seal(path) == seal and damage(path) is None:
                if path != self.path and processes().first:
                    os.replace(path, self.path)
                return True
        log.warning("%s is lost or damaged: the weights found best from here on count", self.path)
        return False


class _Told:
    """A file that remembers why it could not be written: torch tells of it in words of its own."""

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


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("w+b") as file:
        told = _Told(file)
        try:
            torch.save(checkpoint, told)  # type: ignore[arg-type]  # what it needs of a file
        except RuntimeError:
            if told.error is not None:
                raise told.error from None
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
    """Names are the folder's content, and survive a loss of power when that is on the disk; not every system can be told."""
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
