"""The start that is solved: its worth in nats against the random one, its seconds, its memory, its cost in a step.

    python -m benchmarks.start --out start.json                              # nats on mnist-5k, five seeds
    python -m benchmarks.start --figures --data cifar10_slice.npz --latent-dim 64 --network conv
    python -m benchmarks.start --figures --side 256 --network conv --steps 0

``--side`` makes a file of 2 000 smooth colour pictures with noise. The peak of memory is that of the whole process.
"""

import json
import resource
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
import tyro

from sigma_vae import VAE, models
from sigma_vae.config import DataConfig, EvaluationSettings, ModelConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.evaluation import evaluate
from sigma_vae.study.claims import signed
from sigma_vae.study.comparisons import mean_difference
from sigma_vae.training import fit
from sigma_vae.training.loop import _start_network
from sigma_vae.training.step import optimizer_for

PICTURES = 2_000
STARTS: tuple[Literal["random", "principal"], ...] = ("random", "principal")


def main(
    data: str = "mnist-5k",
    network: str = "mlp",
    latent_dim: int = 20,
    likelihoods: tuple[str, ...] = ("gaussian/optimal", "gaussian/beta:0.02"),
    train_steps: int = 2000,
    seeds: int = 5,
    out: Path | None = None,
    figures: bool = False,
    side: int | None = None,
    steps: int = 30,
) -> None:
    """Print a table of ELBOs, or the figures of one start.

    Args:
        data: name or file.
        network: by name.
        latent_dim: number of latents.
        likelihoods: by name.
        train_steps: of batches of 64.
        seeds: of each combination.
        out: JSON of the table.
        figures: seconds, memory and cost of a step, on one thread.
        side: make pictures of this size in place of the data.
        steps: to be timed before and after the start; 0: none.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = data if side is None else str(_pictures(side, Path(folder)))
        splits = models.data(DataConfig(source, layout="auto" if side is None else "n-h-w-c"))
        if figures:
            print(json.dumps(_figures(splits, network, latent_dim, steps)))
            return
        rows = []
        for likelihood, seed, start in product(likelihoods, range(seeds), STARTS):
            rows.append({"likelihood": likelihood, "start": start, "seed": seed})
            model = ModelConfig(network, likelihood, latent_dim)
            rows[-1]["elbo_post_hoc_nats"] = _trained(splits, model, start, train_steps, seed)
            print(rows[-1], flush=True)
            if out is not None:
                record = {"data": data, "network": network, "latent_dim": latent_dim, "steps": train_steps, "results": rows}
                out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print("\n".join(_table(rows)))


def _trained(data: Splits, model: ModelConfig, start: Literal["random", "principal"], steps: int, seed: int) -> float:
    """Train one model; its ELBO on test, with σ from validation data, in nats."""
    torch.manual_seed(seed)
    vae = models.vae(model, data.shape, data.scaling)
    config = TrainingConfig(start=start, max_steps=steps, batch_size=64)
    fit(vae, data, config, seed=seed, progress=False)
    return float(evaluate(vae, data, settings=EvaluationSettings(metrics=())).elbo_post_hoc_nats.mean)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean ± standard deviation over seeds, and the mean difference with its 95 % interval, as Markdown."""
    lines = ["| likelihood | random | principal | principal − random |", "| --- | --- | --- | --- |"]
    for likelihood in dict.fromkeys(row["likelihood"] for row in rows):
        cells, found = [], []
        for start in STARTS:
            values = [r["elbo_post_hoc_nats"] for r in rows if (r["likelihood"], r["start"]) == (likelihood, start)]
            cells.append(f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}")
            found.append(values)
        cells.append(signed(mean_difference([after - before for before, after in zip(*found, strict=True)])))
        lines.append(f"| `{likelihood}` | {' | '.join(cells)} |")
    return lines


def _figures(data: Splits, network: str, latent_dim: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    vae = models.vae(ModelConfig(network, latent_dim=latent_dim), data.shape, data.scaling).train()
    x = next(iter(data.batches("train", 64))).x
    before = 0.0
    if steps:
        vae.calibrate([x])
        before = _milliseconds_a_step(vae, x, steps)
    vae.calibrate([x[:2]])
    begin = time.process_time()
    start = _start_network(vae, data, TrainingConfig(), x[:2])
    seconds = time.process_time() - begin
    return {
        "start": start,
        "shape": list(data.shape),
        "network": network,
        "latent_dim": latent_dim,
        "training_examples": len(data.train),
        "start_cpu_seconds": round(seconds, 2),
        "step_ratio": round(_milliseconds_a_step(vae.train(), x, steps) / before, 3) if steps else None,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10,
    }


def _milliseconds_a_step(vae: VAE, x: torch.Tensor, steps: int) -> float:
    """Mean over some steps of Adam, after five."""
    optimizer, begin = optimizer_for(vae, TrainingConfig(), fused=True), 0.0
    for step in range(steps + 5 if steps else 0):
        begin = time.process_time() if step == 5 else begin
        optimizer.zero_grad()
        (-vae.elbo(x).total.mean()).backward()
        optimizer.step()
    return 1e3 * (time.process_time() - begin) / max(steps, 1)


def _pictures(side: int, folder: Path) -> Path:
    """Smooth random pictures with noise, in a file that is read from the disk."""
    random, at = np.random.default_rng(0), np.arange(side) / side
    path = folder / "pictures.npy"
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (PICTURES, side, side, 3))
    waves = np.stack([np.outer(np.sin(f * at), np.cos(g * at)) for f in range(1, 9) for g in range(8)])
    for start in range(0, PICTURES, 50):
        smooth = np.tensordot(random.standard_normal((50, 3, len(waves))) / 8, waves, 1).transpose(0, 2, 3, 1)
        file[start : start + 50] = (128 + 60 * smooth + 8 * random.standard_normal(smooth.shape)).clip(0, 255)
    file.flush()
    return path


if __name__ == "__main__":
    tyro.cli(main)
