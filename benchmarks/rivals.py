"""One run of ours, one of pythae's, one of the paper's code, and a grid of β in the usual loop: same network, same number of steps.

    pip install --no-deps pythae==0.1.2    # with cloudpickle, imageio, pydantic, scikit-learn, scipy and tqdm
    python -m benchmarks.rivals --out benchmarks/results/rivals.json

The network is ``mlp`` with 20 latents, batches hold 128 examples. pythae has its own trainer and VAE (unit variance). The paper's code
solves σ and clips it softly; the usual loop has σ² = β/2, and its best β is chosen on validation data. Both end with their last weights
and begin with random ones. Every model is judged alike: σ of validation data, test ELBO in nats, from N(0, I) and with the prior that is
fitted afterwards. A run that was stopped goes on with the same command.
"""

import json
import math
import time
from itertools import islice, repeat
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro

from benchmarks.never_worse import BETAS, shown
from benchmarks.plain import BATCH, LATENTS, PlainLoop, images_of
from benchmarks.trainers import pythae
from sigma_vae import VAE, Gaussian, models
from sigma_vae.config import EvaluationSettings, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.evaluation import evaluate
from sigma_vae.networks import mlp
from sigma_vae.runs.evaluate import take_prior
from sigma_vae.training import fit

EPOCHS = {"fashion-mnist": 5, "mnist-5k": 60}
OURS, PYTHAE, PAPER = "sigma-vae, defaults", "pythae", "the paper's code"


def main(out: Path, seeds: int = 5) -> None:
    """Train all, write each result at once, and print the table.

    Args:
        out: JSON of all runs.
        seeds: of each trainer; the grid of β is tried with the first, and its best has all.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []

    def run(data: str, trainer: str, seed: int) -> dict[str, Any]:
        place = {"data": data, "trainer": trainer, "seed": seed}
        known = [row for row in rows if place.items() <= row.items()]
        if not known:
            rows.append(place | trained(data, trainer, seed))
            print(rows[-1], flush=True)
            out.write_text(json.dumps({"results": rows}, indent=1) + "\n", encoding="utf-8")
        return (known or rows[-1:])[0]

    for data in EPOCHS:
        grid = {trainer: run(data, trainer, 0)["validation_nats"] for trainer in map(beta_loop, BETAS)}
        for seed in range(seeds):
            for trainer in (OURS, PYTHAE, PAPER, beta_loop(1.0), max(grid, key=grid.__getitem__)):
                run(data, trainer, seed)
    print("\n".join(table(rows)))


def beta_loop(beta: float) -> str:
    """The name of a usual loop."""
    return f"usual loop, β = {beta}"


def trained(data: str, trainer: str, seed: int) -> dict[str, Any]:
    """Train one network by one trainer, and judge it."""
    splits = models.data(data)
    torch.manual_seed(seed)
    network = mlp(splits.shape, splits.shape[0], latent_dim=LATENTS)
    steps = EPOCHS[data] * -(-len(splits.train) // BATCH)
    vae = VAE(network, Gaussian(splits.shape[0], mean="unit"))
    began = time.process_time()
    if trainer == OURS:
        fit(vae, splits, TrainingConfig(max_steps=steps, batch_size=BATCH), seed=seed, progress=False)
    elif trainer == PYTHAE:
        pythae(network, splits, steps)
    else:
        loop = PlainLoop(network.encoder, network.decoder, soft_clip=-6.0)
        if trainer != PAPER:
            loop = PlainLoop(network.encoder, network.decoder, math.sqrt(float(trainer.rpartition(" ")[2]) / 2))
        for x in islice((x for epoch in repeat(images_of(splits)) for x in epoch), steps):
            loop.step(x)
    seconds = time.process_time() - began
    vae.calibrate(splits.batches("validation", 250))
    return {"steps": steps, "training_cpu_seconds": round(seconds, 1), **judged(vae, splits, seed)}


def judged(vae: VAE, splits: Splits, seed: int) -> dict[str, float]:
    """Bounds in nats; the prior is fitted in between."""

    def bound(split: str) -> float:
        return float(evaluate(vae, splits, settings=EvaluationSettings(metrics=(), split=split)).elbo_nats.mean)

    found = {"validation_nats": bound("validation"), "test_nats": bound("test")}
    take_prior("auto", vae, splits, seed)
    return found | {"fitted_prior_test_nats": bound("test")}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means ± standard deviations over seeds, as Markdown."""
    lines = [
        "| data | trainer | runs | test ELBO, nats | with a fitted prior | CPU seconds a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for data in EPOCHS:
        for trainer in dict.fromkeys(row["trainer"] for row in rows if row["data"] == data and row["seed"]):
            found = [row for row in rows if (row["data"], row["trainer"]) == (data, trainer)]
            nats, fitted = ([row[name] for row in found] for name in ("test_nats", "fitted_prior_test_nats"))
            runs = len(BETAS) if trainer not in {OURS, PYTHAE, PAPER, beta_loop(1.0)} else 1
            seconds = mean(row["training_cpu_seconds"] for row in found)
            lines.append(f"| {data} | {trainer} | {runs} | {shown(nats)} | {shown(fitted)} | {seconds:.0f} |")
    return lines


if __name__ == "__main__":
    tyro.cli(main)
