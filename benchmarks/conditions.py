"""What a label is worth: bits per dimension with and without it, and the generative classifier that comes with it.

    python -m benchmarks.conditions [--root FOLDER of Fashion-MNIST] [--data digits fashion-mnist] [--seeds 0 1 2]

It trains the mlp network on digits and Fashion-MNIST, with and without the label, with the default settings but for the
number of steps and a random start. It writes ``results/conditions.json``, and pictures of samples per class into
``docs/pictures``. Runs that are finished are kept in ``--runs`` and not trained again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigma_vae import runs
from sigma_vae.config import DataConfig, EvaluationSettings, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.evaluation.elbo import standard_prior
from sigma_vae.evaluation.plots import sampled_per_class, save_grid

RESULTS = Path(__file__).parent / "results" / "conditions.json"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
ARMS = {"without": (), "with": ("label",)}
STEPS = {"digits": 2000, "fashion-mnist": 2000}
COLUMNS = 10
NUMBERS = ("bits_per_dim_post_hoc", "elbo_post_hoc_nats", "rate_nats")
CLASSIFIER = ("accuracy", "log_loss_nats", "calibration_error", "temperature", "log_loss_at_1_nats", "calibration_error_at_1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the official files of Fashion-MNIST")
    parser.add_argument("--data", nargs="+", default=list(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/conditions"))
    parser.add_argument("--steps", type=int, help="in place of the usual number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for data in options.data:
        rows = {arm: [measured(options, data, arm, seed) for seed in options.seeds] for arm in ARMS}
        found[data] = {"steps": options.steps or STEPS[data], "seeds": options.seeds} | {
            arm: {name: spread([row[name] for row in each]) for name in each[0]} for arm, each in rows.items()
        }
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
        draw(options.runs / f"{data}-with-{options.seeds[0]}", PICTURES / f"conditions-{data}")
    print(json.dumps(found, indent=2))


def measured(options: argparse.Namespace, data: str, arm: str, seed: int) -> dict[str, float]:
    """Train a run, unless it is there, and read its numbers."""
    out = options.runs / f"{data}-{arm}-{seed}"
    if not (out / "evaluation.json").exists():
        config = RunConfig(
            DataConfig(data, root=options.root if data == "fashion-mnist" else None, condition=ARMS[arm]),
            ModelConfig(network="mlp"),
            TrainingConfig(max_steps=options.steps or STEPS[data], start="random"),
            seed=seed,
            device="cpu",
        )
        runs.train(config, out, progress=False)
        runs.evaluate_run(out, EvaluationSettings(metrics=("classifier",) if ARMS[arm] else ()), device="cpu")
    report = json.loads((out / "evaluation.json").read_text())
    standard = report.get("standard_prior", report)
    numbers = {f"{name} with N(0, I)": standard[name]["mean"] for name in NUMBERS} | {n: report[n]["mean"] for n in NUMBERS}
    return numbers | {name: value_of(report["classifier"][name]) for name in CLASSIFIER if ARMS[arm]}


def value_of(number: Any) -> float:
    """The number, or the mean of an estimate."""
    return float(number["mean"] if isinstance(number, dict) else number)


def spread(values: list[float]) -> dict[str, float]:
    """Mean over seeds, and their standard deviation."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def draw(out: Path, path: Path) -> None:
    """Samples of each class, a row each, from the same random numbers in a column: with N(0, I), and with the run's prior."""
    saved = runs.open_model(out, "cpu")
    save_grid(path.with_name(f"{path.name}-fitted.png"), saved.scaling.undo(sampled_per_class(saved.vae, COLUMNS)), COLUMNS)
    with standard_prior(saved.vae):
        save_grid(path.with_name(f"{path.name}.png"), saved.scaling.undo(sampled_per_class(saved.vae, COLUMNS)), COLUMNS)


if __name__ == "__main__":
    main()
