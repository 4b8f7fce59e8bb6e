"""Compare a calibrated decoder with one of unit variance on 5 000 digits, in a few minutes on two cores.

Both use the same network. Each is trained with N(0, I); then a mixture is fitted to its latents. Numbers and samples are
shown with both priors. `make demo` runs it, and writes the runs with their pictures into demo/.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from sigma_vae import runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.evaluation import Evaluation

LIKELIHOODS = ("gaussian/optimal", "gaussian/fixed:1.0")
TRAINING = TrainingConfig(epochs=18, batch_size=64, schedule="cosine")
PRIOR = "mixture"
BY_PRIOR = {
    "ELBO, nats": "elbo_post_hoc_nats",
    "bits/dim": "bits_per_dim_post_hoc",
    "rate, nats": "rate_nats",
}
"""Rows for N(0, I) and for the fitted prior; σ is refitted in both."""


def main(
    out: Path = Path("demo"), data: str = "mnist-5k", width: int = 16, latent_dim: int = 8, epochs: int = TRAINING.epochs
) -> None:
    """Train both models, print their numbers, and list the pictures."""
    folder = next(path for path in (out / str(i) for i in itertools.count(1)) if not path.exists())
    reports: dict[str, Evaluation] = {}
    for likelihood in LIKELIHOODS:
        model = ModelConfig("conv", likelihood, width=width, latent_dim=latent_dim, prior=PRIOR)
        config = RunConfig(DataConfig(data), model, replace(TRAINING, epochs=epochs))
        reports[likelihood] = runs.train(config, folder / likelihood.replace("/", "-").replace(":", ""))
    Console().print(table(reports))
    for picture in sorted(folder.glob("*/*.png")):
        print(picture)


def table(reports: dict[str, Evaluation]) -> Table:
    """The runs side by side."""
    examples = next(iter(reports.values()))["examples"]
    result = Table(title=f"mean ± standard error over {examples} test images, σ refitted")
    result.add_column("")
    for likelihood in reports:
        result.add_column(likelihood, justify="right")
    for label, key in BY_PRIOR.items():
        result.add_row(f"{label} · N(0, I)", *(with_error(r["standard_prior"][key]) for r in reports.values()))
        result.add_row(f"{label} · fitted prior", *(with_error(r[key]) for r in reports.values()))
    result.add_row("fitted prior", *(r["prior"] for r in reports.values()))
    result.add_row("distortion, nats · own σ", *(with_error(r["distortion_nats"]) for r in reports.values()))
    result.add_row("active units", *(f"{r['active_units']} of {r['latent_dim']}" for r in reports.values()))
    result.add_row("σ for the density", *(f"{r['sigma_post_hoc_density']:.4f}" for r in reports.values()))
    return result


def with_error(value: dict[str, float]) -> str:
    """A mean and its standard error."""
    return f"{value['mean']:.3f} ± {value['standard_error']:.3f}"


if __name__ == "__main__":
    tyro.cli(main)
