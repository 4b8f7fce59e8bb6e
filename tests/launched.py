"""Functions on processes of their own: on several that know of each other what ``torchrun`` tells them, or on one that may die."""

import faulthandler
import multiprocessing
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from sigma_vae.training import distributed

PRELOADED = [
    *("sigma_vae.training", "sigma_vae.runs", "sigma_vae.cli"),
    *("lightning_fabric", "torch._dynamo", "torch.utils.tensorboard"),
    *("matplotlib.backends.backend_svg", "pandas", "pydantic", "sklearn.datasets", "sklearn.linear_model", "tyro"),
]
"""Imported once, and not in each process: ours, and what trainings and commands import where they need it, which takes seconds."""

DEADLINE = 140.0
"""Seconds that processes may take together; they need 5 to 40, also beside other tests."""


def on_processes(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on each; an error of one of them is raised here.

    Processes that do not end by the deadline print their stacks, are killed and are started once more: a machine can lose a
    process between its start and its first word. Those that wait for each other do so again, and fail.
    """
    if not _in_time(count, function, *arguments):
        print(f"{count} processes did not end in {DEADLINE:.0f} s; they are started once more", file=sys.__stderr__)
        assert _in_time(count, function, *arguments), f"{count} processes did not end in {DEADLINE:.0f} s, twice"


def _in_time(count: int, function: Callable[..., Any], *arguments: Any) -> bool:
    _preloaded()
    given = (count, _free_port(), function, arguments)
    context = start_processes(_one, given, count, join=False, start_method="forkserver")
    assert context is not None
    began = time.monotonic()
    while not context.join(timeout=1):
        if time.monotonic() - began > DEADLINE:
            for process in context.processes:
                process.kill()
                process.join()
            return False
    return True


def results_of(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(folder, *arguments)`` returns on each process: tensors, numbers and plain containers of them."""
    on_processes(count, _kept, function, folder, *arguments)
    return [torch.load(folder / f"rank{rank}-of-{count}.pt") for rank in range(count)]


def started(told: Path, task: Callable[..., int | None], *arguments: Any) -> ForkServerProcess:
    """Run a task in a process of its own, whose exit code is what it returns; what it says goes into the file ``told``.

    The process is a copy of a clean one. A copy of this one could wait forever for a thread that earlier tests left here, and that
    is not copied.
    """
    process = _preloaded().Process(target=_telling, args=(told, task, arguments), daemon=True)
    process.start()
    return process


def executed(code: str, paths: list[str], folder: Path) -> None:
    """Run code in a folder, where packages in these other folders are installed."""
    sys.path[:0] = paths
    os.chdir(folder)
    exec(code, {})


def ended(process: ForkServerProcess) -> int | None:
    """The exit code of a process, negative where a signal killed it."""
    process.join()
    return process.exitcode


def _preloaded() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _telling(told: Path, task: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(task(*arguments))


def _one(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(DEADLINE - 10)
    distributed.PATIENCE = timedelta(seconds=DEADLINE)
    torch.set_num_threads(1)
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in known.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)


def _kept(rank: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    torch.save(function(folder, *arguments), folder / f"rank{rank}-of-{os.environ['WORLD_SIZE']}.pt")


def _free_port() -> int:
    """A free port outside of the range from which the system takes ports for outgoing connections, so that none takes it first.

    Chosen by the system's own randomness: trainings seed Python's, and tests that run beside each other would choose the same.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
