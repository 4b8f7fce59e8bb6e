"""Subcommands that make runs and judge them."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from sigma_vae import runs
from sigma_vae.config import RunConfig
from sigma_vae.configfile import read

__all__ = ["evaluate", "replay", "resume", "train"]


def train(
    config: Annotated[RunConfig, tyro.conf.PositionalRequiredArgs], *, out: str | None = None, json: bool = False
) -> None:
    """Train a VAE on DATA, calibrate it, evaluate it on the test split, draw pictures; all of it into a new run folder.

    Args:
        config: The run.
        out: Folder of the run; runs/DATA-NETWORK-LIKELIHOOD-SEED unless given (without NETWORK where it is auto). Never overwritten.
        json: Print the evaluation as JSON alone.
    """
    network = "" if config.model.network == "auto" else f"-{config.model.network}"
    name = f"{Path(config.data.source).stem}{network}-{config.model.likelihood}-{config.seed}"
    folder = Path(out) if out is not None else Path("runs") / name.replace("/", "-").replace(":", "")
    _print_evaluation(runs.train(config, folder, progress=not json), json)
    _say(f"run folder: {folder}", json)


def replay(config: tyro.conf.Positional[str], *, out: str, json: bool = False) -> None:
    """Train again, into a new folder, what a config.yaml describes.

    Args:
        config: The config.yaml of a run, or one written by hand.
        out: Folder of the new run. Never overwritten.
        json: Print the evaluation as JSON alone.
    """
    _print_evaluation(runs.train(read(Path(config), RunConfig), Path(out), progress=not json), json)


def resume(run: tyro.conf.Positional[str], *, epochs: int | None = None, json: bool = False) -> None:
    """Go on exactly where a run stopped; finish, calibrate and evaluate it.

    Args:
        run: Folder of the run.
        epochs: Train up to so many epochs, instead of what the run was given.
        json: Print the evaluation as JSON alone.
    """
    _print_evaluation(runs.resume(Path(run), epochs=epochs, progress=not json), json)


def evaluate(
    run: tyro.conf.Positional[str],
    *,
    device: str = "auto",
    seed: int = 0,
    best_of: int | None = None,
    batch_statistics: bool = False,
    json: bool = False,
) -> None:
    """Bounds of a finished run on its test split, in nats and bits per dimension, with standard errors.

    Args:
        run: Folder of the run.
        device: auto, cpu, cuda, cuda:1.
        seed: Of the posterior's noise, which belongs to each example: no number depends on the batch size.
        best_of: Of a video, also the PSNR and SSIM of the best of so many predictions of each clip (SVG: 100).
        batch_statistics: Make these predictions with the batch's statistics in batch norm, as SVG's own evaluation does.
        json: Print JSON alone.
    """
    report = runs.evaluate_run(Path(run), device=device, seed=seed, best_of=best_of, batch_statistics=batch_statistics)
    _print_evaluation(report, json)


def _print_evaluation(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['data']} · {report['network']} · {report['likelihood']} · {report['examples']} test examples")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± s.e.", justify="right")
    for name, value in (report | report.get("predictions", {})).items():
        if isinstance(value, dict) and "mean" in value:
            error = value["standard_error"]
            table.add_row(name, f"{value['mean']:.4f}", "" if error is None else f"{error:.4f}")
        elif name.startswith(("sigma", "factor")):
            table.add_row(name, f"{value:.5f}", "")
    if "kl_per_layer_nats" in report:
        table.add_row("kl_per_layer_nats", " ".join(f"{nats:.2f}" for nats in report["kl_per_layer_nats"]), "")
    if "active_units" in report:
        table.add_row("active_units", f"{report['active_units']} of {report['latent_dim']}", "")
    if report.get("entropy_identity"):
        table.add_row("entropy gap, nats/dim", f"{report['entropy_identity']['gap_nats_per_dim']:.4f}", "")
    Console().print(table)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text)
