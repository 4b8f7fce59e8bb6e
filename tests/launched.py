"""Functions on several processes, which know of each other what ``torchrun`` tells them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

PRELOADED = ["pytorch_lightning", "sigma_vae.runs", "sigma_vae.cli"]
"""Imported once, and not in each process."""


def on_processes(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on each; an error of one of them is raised here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    start_processes(_one, (count, _free_port(), function, arguments), count, start_method="forkserver")


def results_of(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(folder, *arguments)`` returns on each process: tensors, numbers and plain containers of them."""
    on_processes(count, _kept, function, folder, *arguments)
    return [torch.load(folder / f"rank{rank}-of-{count}.pt") for rank in range(count)]


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
