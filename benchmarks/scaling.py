"""What a step costs on one process and on two, and how cost grows with image size, batch, latents, data, columns and frames.

Every measurement has a process of its own, with one thread; memory is the rise of its resident set. A step is forward pass, σ, backward
pass, gradients shared over processes, and Adam: what the trainer adds is not in it. Two processes need two idle cores:
`OMP_NUM_THREADS=1 python -m benchmarks.scaling --out benchmarks/results/scaling.json` takes about four minutes.
"""

import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, distributed, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from sigma_vae import VAE, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.training.objective import step_loss
from sigma_vae.types import Batch

SIDE, BATCH, LATENTS = 32, 64, 20
PASSING = 128
"""Examples in a batch of a pass over the data."""
EXPECTED = {
    "image side": (2, 2),
    "batch size": (1, 1),
    "latent size": (0, 0),
    "data size": (1, 0),
    "columns": (1, 1),
    "frames": (1, 1),
}
"""Exponents of time and memory. Latents touch two layers of many; beside the data, which take a byte a value, a pass over them holds one
batch. Columns are those of a table, under ``mlp``; frames those of clips, under ``sequence``; the others are of ``conv``."""
CLIP_SIDE, CLIPS, ROWS = 64, 4, 256

Case = dict[str, int]


def main(
    out: Path,
    sides: tuple[int, ...] = (32, 64, 128),
    batches: tuple[int, ...] = (32, 64, 128, 256),
    latents: tuple[int, ...] = (8, 32, 128, 512),
    examples: tuple[int, ...] = (2000, 4000, 8000, 16000),
    columns: tuple[int, ...] = (1000, 2000, 4000, 8000),
    frames: tuple[int, ...] = (4, 8, 16),
    steps: int = 7,
    only: tuple[str, ...] = (),
) -> None:
    """Measure, write the results as JSON, print the tables. With ``only`` measure these, and keep the others of the file."""
    sweeps: dict[str, tuple[tuple[int, ...], Callable[[int], Case]]] = {
        "image side": (sides, lambda side: {"side": side, "batch": 16}),
        "batch size": (batches, lambda batch: {"batch": batch}),
        "latent size": (latents, lambda latent: {"latents": latent}),
        "data size": (examples, lambda n: {"examples": n}),
        "columns": (columns, lambda n: {"columns": n, "batch": ROWS}),
        "frames": (frames, lambda n: {"frames": n, "side": CLIP_SIDE, "batch": CLIPS}),
    }
    results: dict[str, Any] = (
        json.loads(out.read_text(encoding="utf-8"))["results"] if only else {"processes": processes(steps)}
    )
    for name, (sizes, case) in sweeps.items():
        if only and name not in only:
            continue
        rows = [{"size": size, **measured(1, case(size), steps)} for size in sizes]
        results[name] = {"rows": rows, **exponents(name, rows)}
        print(name, results[name], flush=True)
    record = {
        "command": f"python -m benchmarks.scaling --sides {words(sides)} --batches {words(batches)} --latents {words(latents)}"
        f" --examples {words(examples)} --columns {words(columns)} --frames {words(frames)} --steps {steps}",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


def words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def processes(steps: int) -> list[dict[str, float]]:
    """The same global batch on two processes, and twice the batch."""
    cases = ((1, 2 * BATCH), (2, 2 * BATCH), (2, 4 * BATCH))
    rows = [{"processes": count, "batch_size": batch, **measured(count, {"batch": batch}, 2 * steps)} for count, batch in cases]
    for row in rows:
        row["images_per_second"] = row["batch_size"] / row["seconds"]
        print(row, flush=True)
    return rows


def measured(count: int, case: Case, steps: int) -> dict[str, float]:
    """Median seconds and memory of the first process: seconds of the processor, or of the wall where two work together."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(one, (count, folder, case, steps), count, start_method="spawn")
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    return found


def one(rank: int, count: int, folder: str, case: Case, steps: int) -> None:
    """One process: time its steps, or its passes over the data."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if count > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    side = case.get("side", SIDE)
    scaling = Scaling(levels=256)
    network = "mlp" if "columns" in case else "sequence" if "frames" in case else "conv"
    shape = (case["columns"],) if "columns" in case else (1, side, side)
    vae = models.vae(ModelConfig(network, latent_dim=case.get("latents", LATENTS)), shape, scaling)
    example = (case["frames"], *shape) if "frames" in case else shape
    if "examples" in case:
        work = passing(vae, scaling, case["examples"])
        before, steps = memory(), 1  # the data are there
    else:
        step = stepping(vae, parallel=count > 1)
        step(torch.rand(2, *example))  # gradients and moments, whatever the batch
        before, x = memory(), torch.rand(case.get("batch", BATCH) // count, *example)
        work = partial(step, x)
        work()
    clock = time.process_time if count == 1 else time.perf_counter
    seconds = [timed(work, clock) for _ in range(steps)]
    if rank == 0:
        found = {"seconds": median(seconds), "megabytes": (memory() - before) / 1024}
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if count > 1:
        distributed.destroy_process_group()


class Step(nn.Module):
    """What data parallelism wraps."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        return step_loss(self.vae, Batch(x, torch.arange(len(x))), TrainingConfig()).loss


def stepping(vae: VAE, *, parallel: bool) -> Callable[[Tensor], None]:
    vae.train()
    step: nn.Module = Step(vae)
    model = DistributedDataParallel(step) if parallel else step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def work(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    return work


def passing(vae: VAE, scaling: Scaling, examples: int) -> Callable[[], None]:
    """Encode, decode and add up errors, as a calibration of the density does in its pass."""
    data = torch.randint(0, 256, (examples, 1, SIDE, SIDE), dtype=torch.uint8)

    def work() -> None:
        with torch.no_grad():
            for batch in Batches(InMemory(data), scaling, PASSING):
                vae.likelihood.train()(vae.network.infer(batch.x).h, batch.x)

    return work


def timed(work: Callable[[], None], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin


def memory() -> float:
    """Largest resident set so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def exponents(name: str, rows: list[dict[str, float]]) -> dict[str, float]:
    """Slopes of the logarithms."""
    expected = dict(zip(("seconds", "megabytes"), EXPECTED[name], strict=True))
    found = {f"exponent_of_{key}": slope([row["size"] for row in rows], [row[key] for row in rows]) for key in expected}
    return found | {f"expected_of_{key}": float(value) for key, value in expected.items()}


def slope(sizes: list[float], values: list[float]) -> float:
    """Least squares of log value on log size.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    logs = [math.log(max(value, 1e-9)) for value in values]
    return float(np.polyfit([math.log(size) for size in sizes], logs, 1)[0])


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| processes | batch size, all together | seconds a step | images/s | memory of one (MB) |"
    yield "| --- | --- | --- | --- | --- |"
    for row in results["processes"]:
        yield (
            f"| {row['processes']} | {row['batch_size']} | {row['seconds']:.3f} | {row['images_per_second']:.0f} |"
            f" {row['megabytes']:.0f} |"
        )
    yield ""
    yield "| cost against | sizes | seconds | exponent | expected | memory (MB) | exponent | expected |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, found in results.items():
        if name == "processes":
            continue
        cells = [", ".join(f"{row['size']}" for row in found["rows"])]
        for key, digits in (("seconds", 3), ("megabytes", 0)):
            cells += [", ".join(f"{row[key]:.{digits}f}" for row in found["rows"])]
            cells += [f"{found[f'exponent_of_{key}']:.2f}", f"{found[f'expected_of_{key}']:g}"]
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    tyro.cli(main)
