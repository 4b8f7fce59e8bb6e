"""Functions on processes of their own: on several that know of each other what ``torchrun`` tells them, or on one that may die."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

PRELOADED = ["sigma_vae.training", "sigma_vae.runs", "sigma_vae.cli"]
"""Imported once, and not in each process."""


def on_processes(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on each; an error of one of them is raised here."""
    _preloaded()
    start_processes(_one, (count, _free_port(), function, arguments), count, start_method="forkserver")


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
    torch.set_num_threads(1)
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in known.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)


def _kept(rank: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    torch.save(function(folder, *arguments), folder / f"rank{rank}-of-{os.environ['WORLD_SIZE']}.pt")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
