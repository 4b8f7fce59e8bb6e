"""Networks at equal training time: same batches and minutes; only the network, the learning rate that suits it, and the likelihood differ.

The networks take turns, so that a machine that slows down slows all of them. Time is the wall's, training with its validations; a run
takes a few minutes more, to calibrate and to evaluate. Run it on an idle machine:
`OMP_NUM_THREADS=1 python -m benchmarks.networks --out benchmarks/results/networks.json`; docs/networks.md also has
`--networks hierarchical:tiny --likelihoods gaussian/optimal logistic-mixture --data cifar10_slice.npz`.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from benchmarks.priors import spread
from sigma_vae import models, runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

BATCH_SIZE = 64
LEARNING_RATES = {"hierarchical:tiny": 3e-3}
"""Chosen on validation data with another seed; the other networks take 1e-3 (conv is as good with 3e-3)."""
MANY_EPOCHS = 10_000
"""The minutes end the training before."""


def main(
    out: Path,
    networks: tuple[str, ...] = ("conv", "residual", "mlp", "hierarchical:tiny"),
    likelihoods: tuple[str, ...] = ("gaussian/optimal",),
    minutes: float = 2.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    data: str = "fashion-mnist",
) -> None:
    """Run every network and likelihood with every seed, write the results as JSON, print the table."""
    cases = {
        network if len(likelihoods) == 1 else f"{network}, {likelihood}": (network, likelihood)
        for network, likelihood in itertools.product(networks, likelihoods)
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    record = {
        "command": f"python -m benchmarks.networks --networks {' '.join(networks)} --likelihoods {' '.join(likelihoods)}"
        f" --minutes {minutes} --seeds {' '.join(map(str, seeds))} --data {Path(data).name}",
        "likelihoods": likelihoods,
        "threads": torch.get_num_threads(),
        "minutes": minutes,
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed, (name, (network, likelihood)) in itertools.product(seeds, cases.items()):
        results[name].append(one(network, likelihood, minutes, data, seed))
        print(name, results[name][-1], flush=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


def one(network: str, likelihood: str, minutes: float, data: str, seed: int) -> dict[str, float]:
    """Train and evaluate one model."""
    rate = LEARNING_RATES.get(network, 1e-3)
    training = TrainingConfig(epochs=MANY_EPOCHS, max_minutes=minutes, batch_size=BATCH_SIZE, learning_rate=rate)
    config = RunConfig(DataConfig(data), ModelConfig(network=network, likelihood=likelihood), training, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report = runs.train(config, run, progress=False)
        steps = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["global_step"]
        parameters = sum(p.numel() for p in runs.open_model(run).vae.network.parameters())
    images = images_seen(steps, len(models.data(config.data).train))
    return {
        "seed": seed,
        "bits_per_dim_post_hoc": report["bits_per_dim_post_hoc"]["mean"],
        "elbo_post_hoc_nats": report["elbo_post_hoc_nats"]["mean"],
        "rate_nats": report["rate_nats"]["mean"],
        "thousand_images": images / 1000,
        "images_per_second": images / (60 * minutes),
        "parameters": parameters,
    }


def images_seen(steps: int, examples: int) -> int:
    """In so many steps; the last batch of an epoch may be smaller."""
    epochs, steps_of_the_last = divmod(steps, -(-examples // BATCH_SIZE))
    return epochs * examples + steps_of_the_last * BATCH_SIZE


def table(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, as Markdown."""
    yield "| network | bits/dim, σ refitted | ELBO, σ refitted (nats) | rate (nats) | images seen (thousands) | images/s | parameters |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, rows in results.items():
        cells = [spread([row[key] for row in rows], digits) for key, digits in COLUMNS.items()]
        yield f"| `{name}` | " + " | ".join(cells) + f" | {rows[0]['parameters']} |"


COLUMNS = {
    "bits_per_dim_post_hoc": 3,
    "elbo_post_hoc_nats": 1,
    "rate_nats": 1,
    "thousand_images": 0,
    "images_per_second": 0,
}

if __name__ == "__main__":
    tyro.cli(main)
