"""Steps on one GPU: the library's, eager and compiled, beside a plain loop and pythae, and what the card could do at most.

    python -m benchmarks.speed_gpu --out benchmarks/results/speed-gpu.json

On a CPU, `--device cpu --small` runs the same lines in a few seconds, so that they stay whole. No figures of a card are kept yet.

Data lie on the device as bytes. The limits of the card are measured on it: a large product of matrices in bfloat16 (its FLOP/s) and a
large copy (its bytes/s). An eager step's operations and the bytes that its operators read and write are counted; the shares say what
part of both limits a step reaches. A compiled step moves fewer bytes, so that its share may be above 1.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sigma_vae import VAE, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.training.hardware import Choices
from sigma_vae.training.step import Stepper
from sigma_vae.types import Batch
from sigma_vae.vae import keyed_noise

Figures = dict[str, float]
Step = Callable[[Batch], object]


@dataclass(frozen=True)
class Case:
    """A network, the shape of its examples (with frames where it reads clips), and a batch."""

    network: str
    shape: tuple[int, ...]
    batch: int
    precision: str = "bfloat16"

    def smaller(self) -> "Case":
        """Of the same kind, for a CPU."""
        size = min(self.shape[-1], 64 if len(self.shape) == 4 else 32)
        frames = (4,) if len(self.shape) == 4 else ()
        return replace(self, shape=(*frames, self.shape[-3], size, size), batch=2)


CASES = {
    "conv": Case("conv", (1, 28, 28), 128),
    "conv, float32": Case("conv", (1, 28, 28), 128, "float32"),
    "mlp": Case("mlp", (1, 28, 28), 128, "float32"),
    "residual": Case("residual", (3, 32, 32), 128),
    "hierarchical:cifar10": Case("hierarchical:cifar10", (3, 32, 32), 32),
    "sequence": Case("sequence", (12, 1, 64, 64), 16, "float32"),
    "autoencoder-kl": Case("autoencoder-kl", (3, 256, 256), 4),
}
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of a bound on the device from that on the CPU in float32, relative to it."""


def main(
    out: Path = Path("benchmarks/results/speed-gpu.json"),
    device: str = "cuda",
    cases: tuple[str, ...] = tuple(CASES),
    warmup: int = 10,
    steps: int = 50,
    small: bool = False,
    minutes: float = 8.0,
) -> None:
    """Measure, and write the results case by case.

    Args:
        out: file of the results.
        device: cuda, or cpu.
        cases: which.
        warmup: steps that compile and choose kernels, and are not timed.
        steps: timed steps.
        small: small shapes and batches, one step, nothing compiled.
        minutes: no case is begun after these.
    """
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here: nothing measured")
    began, where = time.monotonic(), torch.device(device)
    times = (1, 1) if small else (warmup, steps)
    name = torch.cuda.get_device_name() if where.type == "cuda" else "cpu"
    record: dict[str, Any] = {"device": name, "torch": torch.__version__, "limits": limits(where, small), "results": {}}
    for case in cases:
        if time.monotonic() - began > 60 * minutes:
            break
        chosen = CASES[case].smaller() if small else CASES[case]
        record["results"][case] = measured(chosen, where, times, record["limits"], compiles=not small)
        print(case, record["results"][case], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(record)))


def limits(device: torch.device, small: bool) -> Figures:
    """FLOP/s of a product of matrices in bfloat16, and bytes/s read and written by a copy."""
    side, size = (256, 2**16) if small else (8192, 2**28)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    b = torch.empty(size, device=device)
    c = torch.empty_like(b)
    return {
        "flops": 2 * side**3 / seconds(lambda: a @ a, 3, 10, device),
        "bytes": 8 * size / seconds(lambda: c.copy_(b), 3, 10, device),
    }


def measured(case: Case, device: torch.device, times: tuple[int, int], limit: Figures, *, compiles: bool) -> dict[str, Any]:
    """Every trainer on this case, the agreement with the CPU, and the shares of the limits."""
    batches = on_device(case, device)
    trainers: dict[str, Callable[[], Step]] = {
        "plain loop": lambda: plain(model(case, device)),
        "ours": lambda: ours(model(case, device), case, device),
        "ours, one process of a group": lambda: grouped(model(case, device), case, device),
    }
    if compiles:
        trainers["ours, compiled"] = lambda: ours(model(case, device), case, device, compiles=True)
    if case.network in ("conv", "mlp"):
        trainers["pythae"] = lambda: of_pythae(model(case, device), case)
    found: dict[str, Any] = {"batch": case.batch, "agreement": agreement(case, device)}
    with Cost() as cost:
        ours(model(case, device), case, device)(next(batches))
    found |= {"flops_of_a_step": cost.flops, "bytes_of_a_step": cost.bytes}
    for name, make in trainers.items():
        try:
            step = make()
        except ImportError:  # pythae is not installed
            continue
        took = seconds(lambda step=step: step(next(batches)), *times, device)  # type: ignore[misc]
        found[name] = {
            "milliseconds_a_step": 1000 * took,
            "examples_per_second": case.batch / took,
            "share_of_flops": cost.flops / took / limit["flops"],
            "share_of_bandwidth": cost.bytes / took / limit["bytes"],
        }
    return found


def model(case: Case, device: torch.device, likelihood: str = "gaussian/optimal") -> VAE:
    """The same weights each time."""
    torch.manual_seed(0)
    config = ModelConfig(case.network, likelihood, latent_dim=20)
    vae = models.vae(config, case.shape[-3:], Scaling(levels=256)).train().to(device)
    with torch.no_grad():  # averaged weights need every buffer in its final shape
        vae.elbo(torch.rand(2, *case.shape, device=device))
    return vae


def on_device(case: Case, device: torch.device) -> Iterator[Batch]:
    """Batches of random bytes, without end."""
    examples = 8 * case.batch
    generator = torch.Generator().manual_seed(0)
    store = InMemory(torch.randint(0, 256, (examples, *case.shape), dtype=torch.uint8, generator=generator)).to(device)
    return chain.from_iterable(repeat(Batches(store, Scaling(levels=256), case.batch, shuffle=True)))


def ours(vae: VAE, case: Case, device: torch.device, *, compiles: bool = False) -> Step:
    """A step of ``fit``."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    widths = [max(m.kernel_size) for m in vae.modules() if isinstance(m, nn.Conv2d)]
    wide = case.precision == "bfloat16" and max(widths, default=0) >= 5
    if wide:
        vae.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    choices = Choices(
        kind,
        "",
        case.precision,  # type: ignore[arg-type]
        "channels-last" if wide else "contiguous",
        fused_optimiser=True,
        allocator="default",
        compile=compiles,
        threads=torch.get_num_threads(),
        steps_per_call=1,
    )
    stepper, numbers = Stepper(vae, TrainingConfig(), choices, 10**6, 0.0), count(1)
    looks = count(1)

    def step(batch: Batch) -> None:
        stepper.step(batch, next(numbers))
        if next(looks) % 16 == 0:  # as `fit` looks at the losses of several steps together
            stepper.check()

    return step


def plain(vae: VAE) -> Step:
    """The usual loop on the same loss: float32, Adam, the loss read in each step."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss = -vae.elbo(batch.x).total.mean()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def grouped(vae: VAE, case: Case, device: torch.device) -> Step:
    """A step of a group of one process: what NCCL (gloo on a CPU) adds."""
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    wrapped = DistributedDataParallel(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            elbo = wrapped(batch.x)
        (-elbo.total.mean()).backward()
        optimizer.step()

    return step


def of_pythae(vae: VAE, case: Case) -> Step:
    """A step of pythae's VAE with the same encoder and decoder, with its own loss."""
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    network: Any = vae.network

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            mean, log_variance = network.encoder(x).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(network.decoder(z)))

    theirs = PythaeVAE(VAEConfig(input_dim=case.shape, latent_dim=20), Encoder(), Decoder()).to(vae.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss = theirs({"data": batch.x}).loss
        loss.backward()
        optimizer.step()
        loss.item()

    return step


@torch.no_grad()
def agreement(case: Case, device: torch.device) -> dict[str, Any]:
    """Largest relative difference of the bounds of two examples from the CPU's in float32, by precision."""
    x = next(on_device(replace(case, batch=2), torch.device("cpu"))).x
    noise, positions = keyed_noise, torch.arange(2)
    expected = model(case, torch.device("cpu"), "gaussian/fixed:0.1").eval().elbo(x, noise=noise(positions)).total
    vae, found = model(case, device, "gaussian/fixed:0.1").eval(), {}
    for precision, tolerance in TOLERANCES.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            got = vae.elbo(x.to(device), noise=noise(positions)).total.cpu()
        difference = float(((got - expected) / expected).abs().max())
        found[precision] = {"relative_difference": difference, "within": difference <= tolerance, "tolerance": tolerance}
    return found


class Cost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and bytes that operators read and write, of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (operations := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += operations(*args, **(kwargs or {}), out_val=result)
        if not func.is_view:
            tensors = [each for each in (*args, result) if isinstance(each, Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return result


def seconds(work: Callable[[], object], warmup: int, steps: int, device: torch.device) -> float:
    """Of one call, after those that compile and choose kernels."""
    for _ in range(warmup):
        work()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        work()
    wait(device)
    return (time.perf_counter() - start) / steps


def wait(device: torch.device) -> None:
    """For the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(record: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield f"{record['device']}: {record['limits']['flops'] / 1e12:.3g} TFLOP/s, {record['limits']['bytes'] / 1e9:.3g} GB/s\n"
    yield "| network | trainer | ms a step | examples a second | of the FLOP/s | of the bandwidth |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for case, found in record["results"].items():
        for name, row in found.items():
            if isinstance(row, dict) and "milliseconds_a_step" in row:
                shares = f"{row['share_of_flops']:.1%} | {row['share_of_bandwidth']:.1%}"
                yield f"| {case} | {name} | {row['milliseconds_a_step']:.3g} | {row['examples_per_second']:.4g} | {shares} |"
        differences = [each["relative_difference"] for each in found["agreement"].values()]
        assert all(map(math.isfinite, differences))


if __name__ == "__main__":
    tyro.cli(main)
