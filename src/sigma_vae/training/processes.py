"""Several processes that train or measure one model together, as ``torchrun`` starts them: who they are, and what they agree on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

__all__ = ["ElsewhereError", "Processes", "first_of_node_first", "from_first", "joined", "own_device", "processes"]

Made = TypeVar("Made")

PATIENCE = timedelta(days=1)
"""How long a process waits for others, one of which may be measuring what only one can measure. Where one has died, none waits."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)


class ElsewhereError(RuntimeError):
    """The first process failed at what all of them need; it says why."""


class Processes(NamedTuple):
    """This process among those that work together; alone where nothing else is known."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    per_node: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0


def processes() -> Processes:
    """Who works together now: the members of torch's default group, or this process alone.

    >>> processes()
    Processes(rank=0, world_size=1, local_rank=0, per_node=1)
    """
    if _alone.get() or not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    rank, count = distributed.get_rank(), distributed.get_world_size()
    environment = os.environ
    return Processes(rank, count, int(environment.get("LOCAL_RANK", rank)), int(environment.get("LOCAL_WORLD_SIZE", count)))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Form a group with the processes that ``torchrun`` has started, and leave it at the end.

    Where there are no others, or a group is there already, nothing is formed and nothing is left.

    Args:
        device: what this process computes on: on GPUs they talk by NCCL, else by gloo.

    >>> with joined(torch.device("cpu")) as us:
    ...     us.world_size
    1
    """
    if not _launched() or distributed.is_initialized():
        yield processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=device)
    else:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield processes()
    finally:
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Which of a machine's GPUs is this process's, where ``torchrun`` has started several.

    Raises:
        ValueError: one GPU is asked for by all of them, or there are fewer GPUs than processes.
    """
    if device.type != "cuda" or not _launched():
        return device
    mine, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(f"each process takes a GPU of its own, got device {str(device)!r} for all of them; ask for cuda")
    if mine >= there:
        raise ValueError(f"each process takes a GPU of its own, and this machine has {there}; start as many processes")
    return torch.device("cuda", mine)


def from_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, on every process; meanwhile it is alone, and the others wait.

    For what is not shared out: files, and metrics of one process.

    Raises:
        ElsewhereError: on the others, where it fails.

    >>> from_first(lambda: 1 + 1)
    2
    """
    us = processes()
    if us.world_size == 1:
        return make()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if us.first:
        token = _alone.set(True)
        try:
            message[0] = make()
        except BaseException as error:
            failure, message[1] = error, f"{type(error).__name__}: {error}"
        finally:
            _alone.reset(token)
    distributed.broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise ElsewhereError(f"the first process stopped: {message[1]}")
    made: Made = message[0]
    return made


@contextmanager
def first_of_node_first() -> Iterator[None]:
    """Let one process of each machine do it before the others: it fills the caches on disk that they read."""
    us = processes()
    if us.local_rank:
        distributed.barrier()
    try:
        yield
    finally:
        if us.world_size > 1 and not us.local_rank:
            distributed.barrier()


def _launched() -> bool:
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return needed <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1
