"""What a training step makes of the hardware: a pure function of what is there, what is asked for, and what there is to do."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, final

import torch

from sigma_vae.config import TrainingConfig

__all__ = ["Choices", "Machine", "Work", "choose"]

LEAST_FLOPS_OF_BFLOAT16 = 6e7
"""Of a step's forward pass. Below, casting costs more than is won: an MLP on 28×28 breaks even at a width of 100 (docs/speed.md)."""
WIDE_KERNEL = 5
"""From here on channels last pay (docs/speed.md: the paper's network 1.2×); narrower kernels lose by them."""
FLOPS_OF_A_CALL = {"cpu": 2e9, "cuda": 1e12}
"""A few hundredths of a second of arithmetic, with the backward pass."""
MOST_STEPS_PER_CALL = 16
"""By then, what surrounds a call is a hundredth of the smallest network's steps."""


@final
@dataclass(frozen=True)
class Machine:
    """What a choice depends on: kind of device, bfloat16 instructions, glibc, torch's threads, share of processors."""

    device: Literal["cpu", "cuda"]
    name: str
    bfloat16: bool
    glibc: bool
    threads: int
    processors: float = math.inf


@final
@dataclass(frozen=True)
class Work:
    """What a step is made of: operations of its forward pass (a multiplication and an addition are two), and its widest kernel.

    ``measured`` is whether several seeds of this kind of network, on CPUs, ended at the same test ELBO in bfloat16 as in float32:
    `python -m benchmarks.speed --part precision`.
    """

    flops: float
    widest_kernel: int
    measured: bool = True


@final
@dataclass(frozen=True)
class Choices:
    """What a run trains with."""

    device: Literal["cpu", "cuda"]
    name: str
    precision: Literal["float32", "bfloat16"]
    memory_format: Literal["contiguous", "channels-last"]
    fused_optimiser: bool
    allocator: Literal["default", "patient"]
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


def choose(config: TrainingConfig, machine: Machine, work: Work) -> Choices:
    """What the config asks for, and for what it leaves open, what is best on this machine for this work.

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
    allocator = asked.allocator
    if allocator == "auto" or not machine.glibc:
        allocator = "patient" if machine.glibc and machine.device == "cpu" else "default"
    return Choices(
        device=machine.device,
        name=machine.name,
        precision=precision,
        memory_format=memory_format,
        fused_optimiser=asked.fused_optimiser != "no",
        allocator=allocator,
        compile=asked.compile,
        threads=asked.threads or max(1, math.ceil(min(machine.threads, machine.processors))),
        steps_per_call=asked.steps_per_call or _steps_per_call(config, machine, work),
    )


def _steps_per_call(config: TrainingConfig, machine: Machine, work: Work) -> int:
    """A power of two; one where something has to be done after each step, or after so many that they may be amid a call."""
    if config.validate_every is not None or config.ema_decay is not None:
        return 1
    affordable = FLOPS_OF_A_CALL[machine.device] / max(3 * work.flops, 1.0)
    return 1 << max(0, min(int(math.log2(MOST_STEPS_PER_CALL)), math.floor(math.log2(affordable))))
