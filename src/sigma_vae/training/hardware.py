"""Hardware settings of a training step: precision, memory format, allocator, compilation."""

import ctypes
import math
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeVar, final

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.training.distributed import processes
from sigma_vae.types import as_argument
from sigma_vae.vae import VAE, in_eval_mode, keyed_noise

LEAST_FLOPS_OF_BFLOAT16 = 6e7
"""bfloat16 pays from this many operations in a step's forward pass; an MLP on 28×28 breaks even at a width of 100."""
WIDE_KERNEL = 5
"""Channels last pays from this kernel size (docs/speed.md: the paper's network 1.2×)."""
FLOPS_OF_A_CALL = {"cpu": 2e9, "cuda": 1e12}
"""Operations between two looks at the loss, backward passes included: a few hundredths of a second."""
MOST_STEPS_PER_CALL = 16
"""More would save nothing: a look then costs a hundredth of the smallest network's steps."""
STEPS_TO_WIN_COMPILATION = ((6e7, 9_000), (0.0, 18_000))
"""Operations of a step's forward pass, and steps that win back a machine's first compilation of such (docs/speed.md)."""
Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of glibc's ``mallopt``."""


@final
@dataclass(frozen=True)
class Machine:
    """The machine that the choices depend on: device, bfloat16 instructions, glibc, torch's threads, processors allowed.

    ``compiles``: it has what torch compiles with, a C++ compiler and the headers of Python.
    """

    device: Literal["cpu", "cuda"]
    name: str
    bfloat16: bool
    glibc: bool
    threads: int
    processors: float = math.inf
    compiles: bool = False


@final
@dataclass(frozen=True)
class Work:
    """Operations of a step's forward pass (a multiplication and an addition are two), and its widest kernel.

    ``measured``: this kind of network reached the same test ELBO in bfloat16 as in float32, over several seeds on CPUs
    (`python -m benchmarks.speed --part precision`). ``gains_compiled``: dense layers alone, and a Gaussian with
    one σ, whose steps are shorter when compiled (`--part compile`); others were not all.
    """

    flops: float
    widest_kernel: int
    measured: bool = True
    gains_compiled: bool = False


@final
@dataclass(frozen=True)
class Choices:
    """The hardware settings that a run trains with."""

    device: Literal["cpu", "cuda"]
    name: str
    precision: Literal["float32", "bfloat16"]
    memory_format: Literal["contiguous", "channels-last"]
    fused_optimiser: bool
    allocator: Literal["default", "retain"]
    compile: bool
    threads: int
    steps_per_call: int

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a training step's network."""
        return torch.autocast(self.device, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def __str__(self) -> str:
        """One line."""
        parts = [
            f"network in {self.precision}, likelihood in float32",
            self.memory_format.replace("-", " "),
            "fused optimiser" if self.fused_optimiser else "optimiser not fused",
            "compiled" if self.compile else "not compiled",
            f"{self.allocator} allocator",
            f"{self.threads} thread{'s' if self.threads > 1 else ''}",
            f"{self.steps_per_call} step{'s' if self.steps_per_call > 1 else ''} a call",
        ]
        return f"{self.name}: {', '.join(parts)}"


def choose(config: TrainingConfig, machine: Machine, work: Work, steps: int = 0) -> Choices:
    """Choose hardware settings: the config's; where it says auto, the best for this machine, this work and so many steps.

    >>> machine = Machine("cpu", "a processor", bfloat16=True, glibc=True, threads=8, processors=2.0)
    >>> choices = choose(TrainingConfig(), machine, Work(flops=1e6, widest_kernel=0))
    >>> choices.threads, choices.precision, choices.steps_per_call
    (2, 'float32', 16)
    """
    asked = config.hardware
    harmless = work.measured and machine.device == "cpu"
    gains = machine.bfloat16 and work.flops >= LEAST_FLOPS_OF_BFLOAT16
    precision = asked.precision
    if precision == "auto":
        precision = "bfloat16" if harmless and gains else "float32"
    memory_format = asked.memory_format
    if memory_format == "auto":
        wide = precision == "bfloat16" and work.widest_kernel >= WIDE_KERNEL
        memory_format = "channels-last" if wide else "contiguous"
    retains = machine.glibc and (asked.allocator == "retain" or (asked.allocator == "auto" and machine.device == "cpu"))
    return Choices(
        device=machine.device,
        name=machine.name,
        precision=precision,
        memory_format=memory_format,
        fused_optimiser=asked.fused_optimiser != "no",
        allocator="retain" if retains else "default",
        compile=asked.compile == "yes" or (asked.compile == "auto" and _wins_compiled(config, machine, work, steps)),
        threads=asked.threads or max(1, math.ceil(min(machine.threads, machine.processors))),
        steps_per_call=asked.steps_per_call or _steps_per_call(machine, work),
    )


def _wins_compiled(config: TrainingConfig, machine: Machine, work: Work, steps: int) -> bool:
    """Whether so many steps win back what a first compilation costs; for a training of some minutes they are not known."""
    alone = processes().world_size == 1
    could = machine.device == "cpu" and machine.compiles and work.gains_compiled and work.measured
    return (
        could
        and alone
        and not config.weighted
        and config.max_minutes is None
        and steps >= next(least for flops, least in STEPS_TO_WIN_COMPILATION if work.flops >= flops)
    )


def _steps_per_call(machine: Machine, work: Work) -> int:
    """The largest power of two that is affordable."""
    affordable = FLOPS_OF_A_CALL[machine.device] / max(3 * work.flops, 1.0)
    return 1 << math.floor(math.log2(min(max(affordable, 1), MOST_STEPS_PER_CALL)))


def choices_for(vae: VAE, data: Splits, config: TrainingConfig, device: torch.device) -> Choices:
    """The settings that :func:`sigma_vae.training.fit` trains with."""
    size = config.examples_per_step(data.values_per_example)
    steps = config.total_steps(-(-len(data.train) // size))
    return choose(config, machine_of(device), work_of(vae, data, size), steps)


def machine_of(device: torch.device) -> Machine:
    """The machine that this runs on."""
    return Machine(
        device="cuda" if device.type == "cuda" else "cpu",
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        bfloat16=_has_bfloat16(device),
        glibc=platform.libc_ver()[0] == "glibc",
        threads=torch.get_num_threads(),
        processors=_share_of_processors(),
        compiles=_has_compiler(),
    )


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def _has_compiler() -> bool:
    """Whether torch will find a compiler of C++ and the headers of Python; on Linux, where it is known what it looks for."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return sys.platform == "linux" and headers.exists() and any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def _share_of_processors() -> float:
    """The number of processors that the control group allows this container."""
    quota, _, period = next(iter(_lines("/sys/fs/cgroup/cpu.max")), "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


@torch.no_grad()
def work_of(vae: VAE, data: Splits, batch_size: int) -> Work:
    """Count the cost of a step's forward pass on one example (or clip), times those of the batch."""
    device = next(vae.parameters()).device
    example = next(iter(data.batches("train", 1, limit=1))).to(device)
    with in_eval_mode(vae), _Flops() as counted:
        noise = keyed_noise(example.positions)
        vae.network.infer(example.x, None, example.mask, noise, *as_argument(example.condition))
    convolutions = [m for m in vae.network.modules() if isinstance(m, _ConvNd)]
    kernels = [max(m.kernel_size) for m in convolutions if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    return Work(
        flops=float(counted.total) * batch_size,
        widest_kernel=max(kernels, default=0),
        measured=vae.network.trains_in_bfloat16 and not data.scaling.counts,
        gains_compiled=not convolutions and vae.likelihood.sigma_is_rmse,
    )


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations as torch's own counter does, which also tracks modules and fails on recomputed ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to skip the compiler, torch would import it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def applied(choices: Choices, vae: VAE) -> Iterator[None]:
    """Set threads and memory format for as long as the context lasts, and the allocator for the rest of the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(choices.threads)
    if choices.allocator == "retain":
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
        if parameter.dim() == 4:  # empty_like gives strides of the format to a single channel too, contiguous() does not
            parameter.data = torch.empty_like(parameter, memory_format=memory_format).copy_(parameter.data)


def compiled(function: Callable[..., Result], *, needed: bool, ragged: bool = False) -> Callable[..., Result]:
    """The function, compiled by torch at its first call, with the noise that it has otherwise.

    Each size of a batch has a graph of its own, so that no number depends on the sizes that came before (a resumed
    training has seen others); not where examples are ``ragged``, of many sizes.

    Where compilation fails, the function itself is called from then on, unless compilation is needed: not every machine has
    what torch wants. The compiler is imported in a thread, as its import leaves cycles that hold the frames that it was
    called from.
    """

    def compiler() -> None:
        with suppress(ImportError):  # it is raised again where torch needs it
            import torch._dynamo  # noqa: F401

    thread = Thread(target=compiler)
    thread.start()
    thread.join()
    made = torch.compile(function, dynamic=None if ragged else False, options={"fallback_random": True})
    return made if needed else _or_else(made, function)


def _or_else(made: Callable[..., Result], given: Callable[..., Result]) -> Callable[..., Result]:
    """The compiled function until it fails, and from then on the given one."""
    chosen = made

    def called(*arguments: Any, **named: Any) -> Result:
        nonlocal chosen
        try:
            return chosen(*arguments, **named)
        except RuntimeError as error:  # as all errors of torch's compiler are
            if chosen is given:
                raise
            chosen = given
            warnings.warn(f"the step is not compiled, torch cannot do it here: {str(error).splitlines()[0]}", stacklevel=2)
            return given(*arguments, **named)

    return called


def keep_freed_memory() -> None:
    """Tell glibc to give no memory back to the kernel, which costs new pages in each step (docs/speed.md)."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_TOP_PAD, 1 << 28)
