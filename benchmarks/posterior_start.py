"""How narrow the untrained posterior of the MLP should be: a solved σ against a grid of fixed ones, from each start.

docs/networks.md tells what came of it. The slice of CIFAR-10 is a file with the arrays ``train`` and ``test``.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from torch import nn

from sigma_vae import VAE, models
from sigma_vae.config import DataConfig, ModelConfig, TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.networks import FlatNetwork
from sigma_vae.networks.mlp import START_LOG_VARIANCE
from sigma_vae.training import fit
from sigma_vae.vae import keyed_noise

LATENTS = 20
STEPS = {"fashion-mnist": 4688, "mnist-5k": 1875}
"""Of batches of 64; of any other data as many as of mnist-5k."""


def main(
    out: Path,
    data: tuple[str, ...] = ("fashion-mnist", "mnist-5k", "cifar10_slice.npz"),
    starts: tuple[float, ...] = (0.0, -4.0),
    likelihoods: tuple[str, ...] = ("gaussian/optimal", "gaussian/beta:0.02"),
    seeds: int = 3,
) -> None:
    """Train every combination, write the bounds on test as JSON as they come, print the table.

    Args:
        out: the results.
        data: names or files.
        starts: log-variances of the untrained posterior.
        likelihoods: by name.
        seeds: of each.
    """
    rows: list[dict[str, Any]] = []
    for name in data:
        splits = models.data(DataConfig(name))
        for seed, start, likelihood in product(range(seeds), starts, likelihoods):
            place = {"data": name, "start_log_variance": start, "likelihood": likelihood, "seed": seed}
            found = one(splits, STEPS.get(name, STEPS["mnist-5k"]), start, likelihood, seed)
            rows.append(place | {"elbo_post_hoc_nats": found})
            print(rows[-1], flush=True)
            record = {"command": f"python -m benchmarks.posterior_start --data {' '.join(data)}", "results": rows}
            out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(rows)))


def one(data: Splits, steps: int, start: float, likelihood: str, seed: int) -> float:
    """Train one model; its mean ELBO on test with σ refitted on the training data, in nats."""
    torch.manual_seed(seed)
    vae = models.vae(ModelConfig(network="mlp", likelihood=likelihood), data.shape, data.scaling)
    begin(vae, start)
    fit(
        vae,
        data,
        TrainingConfig(epochs=1000, max_steps=steps, batch_size=64, validate_every=steps // 4),
        seed=seed,
        progress=False,
    )
    scores = [vae.score(batch.x, noise=keyed_noise(batch.positions)) for batch in data.batches("test", 1000)]
    return float(torch.cat([found.log_likelihood_post_hoc - found.rate for found in scores]).mean())


@torch.no_grad()
def begin(vae: VAE, log_variance: float) -> None:
    """Move the posterior's start."""
    assert isinstance(vae.network, FlatNetwork)
    assert isinstance(vae.network.encoder, nn.Sequential)
    last = vae.network.encoder[-1]
    assert isinstance(last, nn.Linear)
    last.bias[LATENTS:] += log_variance - START_LOG_VARIANCE


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Mean ± standard deviation over seeds, as Markdown."""
    lines = ["| data | start | " + " | ".join(f"`{name}`" for name in dict.fromkeys(row["likelihood"] for row in rows)) + " |"]
    lines.append("| --- " * (lines[0].count("|") - 1) + "|")
    for place in dict.fromkeys((row["data"], row["start_log_variance"]) for row in rows):
        there = [row for row in rows if (row["data"], row["start_log_variance"]) == place]
        cells = []
        for name in dict.fromkeys(row["likelihood"] for row in there):
            values = [row["elbo_post_hoc_nats"] for row in there if row["likelihood"] == name]
            cells.append(f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}")
        lines.append(f"| {place[0]} | {place[1]:g} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    tyro.cli(main)
