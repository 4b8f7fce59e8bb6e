"""What the hardware is, what a step costs on it, and the choices put into effect."""

import ctypes
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.networks import FlatNetwork
from sigma_vae.passes import in_eval_mode
from sigma_vae.training.choices import Choices, Machine, Work, choose
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["applied", "choices_for", "keep_freed_memory", "machine_of", "work_of"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of glibc's ``mallopt``."""


def choices_for(vae: VAE, data: Splits, config: TrainingConfig, device: torch.device) -> Choices:
    """What :func:`sigma_vae.training.fit` trains with."""
    return choose(config, machine_of(device), work_of(vae, data, config.batch_size))


def machine_of(device: torch.device) -> Machine:
    """The machine that this runs on."""
    return Machine(
        device="cuda" if device.type == "cuda" else "cpu",
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        bfloat16=_has_bfloat16(device),
        glibc=platform.libc_ver()[0] == "glibc",
        threads=torch.get_num_threads(),
        processors=_share_of_processors(),
    )


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def _share_of_processors() -> float:
    """What the control group allows of the processors that a container sees."""
    quota, _, period = next(iter(_lines("/sys/fs/cgroup/cpu.max")), "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


@torch.no_grad()
def work_of(vae: VAE, data: Splits, batch_size: int) -> Work:
    """What the forward pass of a step costs, counted on one example (or clip) for each of the batch."""
    device = next(vae.parameters()).device
    example = next(iter(data.batches("train", 1, limit=1)))
    mask = None if example.mask is None else example.mask.to(device)
    with in_eval_mode(vae), _Flops() as counted:
        vae.network.infer(example.x.to(device), mask=mask, noise=keyed_noise(example.positions))
    kernels = [max(m.kernel_size) for m in vae.network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return Work(
        flops=float(counted.total) * batch_size,
        widest_kernel=max(kernels, default=0),
        measured=isinstance(vae.network, FlatNetwork),
    )


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as torch's own counter does, which also follows modules and stumbles over those that are recomputed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def applied(choices: Choices, vae: VAE) -> Iterator[None]:
    """Threads and memory format for as long as the context lasts, and an allocator for as long as the process does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(choices.threads)
    if choices.allocator == "patient":
        keep_freed_memory()
    if choices.memory_format == "channels-last":
        _arrange(vae, torch.channels_last)
    try:
        yield
    finally:
        _arrange(vae, torch.contiguous_format)
        torch.set_num_threads(threads)


def _arrange(vae: VAE, memory_format: torch.memory_format) -> None:
    for parameter in vae.network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def keep_freed_memory() -> None:
    """Tell glibc to give nothing back to the kernel, and to take no large block apart from the rest: faulting pages in costs more.

    Large blocks that come and go in each step are otherwise new pages each time. Measured: docs/speed.md.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_TOP_PAD, 1 << 28)
