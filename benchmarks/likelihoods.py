"""Forward and backward pass of each likelihood, beside the usual eager implementation: processor time and peak extra memory.

Each number comes from a fresh process of one thread, with glibc's allocator as it is and with ``retain`` (which keeps freed
memory). "Extra" is the peak resident memory above what the features and data take, the gradient of the features included. Run
it as `python -m benchmarks.likelihoods --out benchmarks/results/likelihoods.json`.
"""

import ctypes
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from sigma_vae import models

GAUSSIANS = ("gaussian/optimal", "gaussian/shared", "gaussian/per-image", "gaussian/per-pixel")
OTHERS = ("laplace/optimal", "logistic/optimal", "student-t/optimal", "student-t:learned/optimal", "gaussian/running-minimum")
BY_LEVEL = ("gaussian/optimal@level", "logistic/optimal@level")
"""Trained on the levels' bin probabilities: ``observes="level"``."""
UNSCALED = ("bernoulli", "continuous-bernoulli", "bitwise-categorical", "categorical", "logistic-mixture:10")
USUAL = ("usual gaussian", "usual categorical", "usual logistic-mixture:10")
MODES = ("eager", "compiled")
ALLOCATORS = ("default", "retain")
SIDE, CHANNELS, LEVELS = 64, 3, 256


def main(
    out: Path | None = None,
    batch: int = 128,
    repeats: int = 5,
    rounds: int = 1,
    names: tuple[str, ...] = (*USUAL, *GAUSSIANS, *OTHERS, *BY_LEVEL, *UNSCALED),
    modes: tuple[str, ...] = MODES,
    allocators: tuple[str, ...] = ALLOCATORS,
) -> None:
    """Measure all in each round, one process after the other; print a table of medians over rounds, write JSON."""
    rows = []
    for turn, name in itertools.product(range(rounds), names):
        for mode in modes if not name.startswith("usual") else ("eager",):
            for allocator in allocators:
                rows.append({"round": turn, **in_fresh_process(name, mode, allocator, batch, repeats)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if out is not None:
        rows = keep_run(out, shlex.join(["python", "-m", "benchmarks.likelihoods", *sys.argv[1:]]), rows)
    print("\n".join([*table(rows), "", *quotients(rows)]))


def keep_run(out: Path, command: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add a run to those in the file, in place of older measurements of the same names; return the rows of all."""
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    names = {row["name"] for row in rows}
    older = [run | {"rows": [row for row in run["rows"] if row["name"] not in names]} for run in runs]
    runs = [*(run for run in older if run["rows"]), {"command": command, "rows": rows}]
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return [row for run in runs for row in run["rows"]]


def in_fresh_process(name: str, mode: str, allocator: str, batch: int, repeats: int) -> dict[str, Any]:
    code = f"from benchmarks.likelihoods import one; one({name!r}, {mode!r}, {allocator!r}, {batch}, {repeats})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"name": name, "mode": mode, "allocator": allocator, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, mode: str, allocator: str, batch: int, repeats: int) -> None:
    """Measure one case in this process and print it as JSON."""
    torch.set_num_threads(1)
    if allocator == "retain":
        keep_freed_memory()
    loss, in_channels = usual(name) if name.startswith("usual") else ours(name)
    torch.manual_seed(0)
    x = torch.randint(0, LEVELS, (batch, CHANNELS, SIDE, SIDE)) / (LEVELS - 1)
    h = torch.randn(batch, in_channels, SIDE, SIDE).requires_grad_()
    if name == "bernoulli":
        x = x.round()
    if mode == "compiled":
        loss = torch.compile(loss, fullgraph=True)
    step(loss, h[:2].detach().requires_grad_(), x[:2])  # loads what is loaded once; also compiles
    if mode == "compiled":
        step(loss, h, x)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times = [step(loss, h, x) for _ in range(repeats)]
    peak = resident("VmHWM") - before
    print(json.dumps({"name": name, "mode": mode, "allocator": allocator, "ms": round(1000 * median(times), 1),
                      "least_ms": round(1000 * min(times), 1), "extra_mib": round(peak / 1024, 1)}))  # fmt: skip


def step(loss: Callable[[Tensor, Tensor], Tensor], h: Tensor, x: Tensor) -> float:
    """Seconds of the processor for a forward and a backward pass: other work on the machine does not count."""
    start = time.process_time()
    torch.autograd.grad(loss(h, x).mean(), h)
    return time.process_time() - start


def keep_freed_memory() -> None:
    """Set glibc's allocator to keep freed memory: no separate block for large requests, nothing returned to the kernel."""
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(top_pad, 1 << 28)


def resident(kind: str) -> int:
    """Memory of this process, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])


def ours(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    name, _, observes = name.partition("@")
    levels = 2 if name == "bernoulli" else LEVELS
    likelihood = models.likelihood(name, CHANNELS, levels=levels, mean="identity", observes=observes or "density")
    likelihood.train()
    return lambda h, x: -likelihood(h, x).log_prob(x), likelihood.in_channels


def usual(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """A loss as usually written in public repositories, and the channels that it reads."""
    return {
        "usual gaussian": (usual_gaussian, CHANNELS),
        "usual categorical": (usual_categorical, CHANNELS * LEVELS),
        "usual logistic-mixture:10": (usual_mixture, 100),
    }[name]


def usual_gaussian(h: Tensor, x: Tensor) -> Tensor:
    """Elementwise, with σ from the batch."""
    log_sigma = (x - h).square().mean().sqrt().log()
    return (0.5 * ((x - h) / log_sigma.exp()).square() + log_sigma + 0.9189385).sum((1, 2, 3))


def usual_categorical(h: Tensor, x: Tensor) -> Tensor:
    """``cross_entropy`` on all logits."""
    logits = h.reshape(len(h), CHANNELS, LEVELS, SIDE, SIDE).transpose(1, 2)
    return functional.cross_entropy(logits, torch.round(x * 255).long(), reduction="none").sum((1, 2, 3))


def usual_mixture(h: Tensor, x: Tensor) -> Tensor:
    """The discretized logistic mixture as written for PixelCNN++ and copied since: channels last, three cases, where."""
    k, h, x = 10, h.permute(0, 2, 3, 1), (2 * x - 1).permute(0, 2, 3, 1)
    shape = (*x.shape, k)
    logits, rest = h[..., :k], h[..., k:].reshape(*x.shape, 3 * k)
    means, log_scales, coefficients = rest[..., :k], rest[..., k : 2 * k].clamp(min=-7.0), torch.tanh(rest[..., 2 * k :])
    x = x[..., None] + torch.zeros(shape)
    green = means[..., 1:2, :] + coefficients[..., 0:1, :] * x[..., 0:1, :]
    blue = means[..., 2:3, :] + coefficients[..., 1:2, :] * x[..., 0:1, :] + coefficients[..., 2:3, :] * x[..., 1:2, :]
    centered = x - torch.cat([means[..., 0:1, :], green, blue], dim=3)
    inverse = torch.exp(-log_scales)
    upper, lower = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
    delta = torch.sigmoid(upper) - torch.sigmoid(lower)
    first, last = upper - functional.softplus(upper), -functional.softplus(lower)
    middle = inverse * centered
    density = middle - log_scales - 2 * functional.softplus(middle) - 4.8481164  # log 127.5
    inner = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density)
    masses = torch.where(x < -0.999, first, torch.where(x > 0.999, last, inner))
    joint = masses.sum(3) + functional.log_softmax(logits, dim=-1)
    return -torch.logsumexp(joint, dim=-1).sum((1, 2))


def quotients(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Time (median and fastest) and memory of the heavy families over the usual implementation's, eager, within a round."""
    eager = {(row["name"], row["allocator"], row["round"]): row for row in rows if row["mode"] == "eager" and "ms" in row}
    pairs = defaultdict(list)
    for (name, allocator, turn), own in eager.items():
        if usual := eager.get((f"usual {name}", allocator, turn)):
            pairs[name, allocator].append((own, usual))
    for (name, allocator), both in pairs.items():
        parts = (f"{what} {spread([own[key] / usual[key] for own, usual in both])}" for what, key in QUOTIENTS.items())
        yield f"{name}, {allocator} allocator, of the usual: {', '.join(parts)}"


def spread(ratios: list[float]) -> str:
    """The median, and the range of several."""
    return f"{median(ratios):.2f}" + (f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else "")


QUOTIENTS = {"median time": "ms", "fastest": "least_ms", "memory": "extra_mib"}
COLUMNS = ("ms", "extra_mib")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a line for each likelihood and mode."""
    yield "| likelihood | | ms | ms, retain | extra MiB | extra MiB, retain |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, mode in dict.fromkeys((row["name"], row["mode"]) for row in rows):
        cells = [row for row in rows if (row["name"], row["mode"]) == (name, mode)]
        measured = ([row[key] for row in cells if row["allocator"] == a and key in row] for key in COLUMNS for a in ALLOCATORS)
        numbers = [f"{median(values):.1f}" if values else "-" for values in measured]
        yield f"| `{name}` | {mode} | " + " | ".join(numbers) + " |"


if __name__ == "__main__":
    tyro.cli(main)
