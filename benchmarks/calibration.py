"""Calibrated against unit variance on Fashion-MNIST: same network, budget and seeds.

The table of the README comes from here: ELBO with the σ refitted for it, bits/dim with the σ refitted for them, and how many
steps a likelihood takes to a validation ELBO of 400 nats. Run it as `make bench`.
"""

import csv
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import tyro

from sigma_vae import runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

STEPS = 4688  # 300 000 images in batches of 64
GOAL_NATS = 400
TRAINING = TrainingConfig(epochs=100, max_steps=STEPS, batch_size=64, learning_rate=1e-3, validate_every=250)


@dataclass(frozen=True)
class Case:
    likelihood: str
    training: TrainingConfig = TRAINING


CASES = {
    "gaussian/optimal": Case("gaussian/optimal"),
    "gaussian/shared": Case("gaussian/shared"),
    "gaussian/shared, σ from 1, one learning rate": Case(
        "gaussian/shared", replace(TRAINING, scale_start="one", scale_learning_rate_factor=1.0)
    ),
    "gaussian/fixed:1.0": Case("gaussian/fixed:1.0"),
}


def main(out: Path, seeds: int = 3, data: str = "fashion-mnist") -> None:
    """Run every case with every seed, write the results as JSON, print the table."""
    results = {name: [one(case, data, seed) for seed in range(seeds)] for name, case in CASES.items()}
    record = {"command": f"python -m benchmarks.calibration --data {data} --seeds {seeds}", "steps": STEPS, "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


def one(case: Case, data: str, seed: int) -> dict[str, float | None]:
    """Train and evaluate one model."""
    model = ModelConfig(network="mlp", likelihood=case.likelihood)
    config = RunConfig(DataConfig(data), model, case.training, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report = runs.train(config, run, progress=False)
        steps = steps_to_goal(run / "metrics.csv")
    print(case.likelihood, seed, report["elbo_post_hoc_nats"], steps, flush=True)
    return {
        "seed": seed,
        "elbo_nats": report["elbo_nats"]["mean"],
        "elbo_post_hoc_nats": report["elbo_post_hoc_nats"]["mean"],
        "bits_per_dim_post_hoc": report["bits_per_dim_post_hoc"]["mean"],
        "rate_nats": report["rate_nats"]["mean"],
        "steps_to_400_nats": steps,
    }


def steps_to_goal(metrics: Path) -> float | None:
    """The first validation, with the model's own σ, that reaches the goal."""
    with metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["validation/elbo_nats"] and float(row["validation/elbo_nats"]) >= GOAL_NATS:
                return int(row["step"]) + 1
    return None


def table(results: dict[str, list[dict[str, float | None]]]) -> Iterator[str]:
    """Mean ± standard deviation over seeds, as Markdown."""
    yield "| likelihood | ELBO, own σ (nats) | ELBO, σ refitted (nats) | bits/dim, σ refitted | rate (nats) | steps to 400 nats |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, rows in results.items():
        cells = [spread([row[key] for row in rows], digits) for key, digits in COLUMNS.items()]
        yield f"| `{name}` | " + " | ".join(cells) + " |"


COLUMNS = {"elbo_nats": 1, "elbo_post_hoc_nats": 1, "bits_per_dim_post_hoc": 3, "rate_nats": 1, "steps_to_400_nats": 0}


def spread(values: list[float | None], digits: int) -> str:
    """Mean ± standard deviation, or "never" where a seed did not get there."""
    if any(value is None for value in values):
        return "never"
    numbers = [value for value in values if value is not None]
    deviation = stdev(numbers) if len(numbers) > 1 else math.nan
    return f"{mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    tyro.cli(main)
