"""Subcommands that make runs and judge them."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from sigma_vae import runs
from sigma_vae.cli.tables import print_evaluation
from sigma_vae.config import RunConfig
from sigma_vae.configfile import read
from sigma_vae.evaluation.settings import EvaluationSettings

__all__ = ["evaluate", "replay", "rerun", "resume", "train"]


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


def rerun(run: tyro.conf.Positional[str], *, json: bool = False) -> None:
    """Do the step again that stopped a run because its loss was not finite, and say in which layer that begins.

    Args:
        run: Folder of the run.
        json: Print JSON alone.
    """
    report = runs.rerun(Path(run))
    if json:
        print(json_module.dumps(report, ensure_ascii=False))
        return
    print(report["diagnosis"])
    for place in report["begins_in"] or ["nowhere: done again, everything is finite"]:
        print(f"not finite: {place}")


def evaluate(run: tyro.conf.Positional[str], settings: EvaluationSettings, *, device: str = "auto", json: bool = False) -> None:
    """Bounds of a finished run on held-out data, in nats and bits per dimension, and whatever else is asked for.

    Args:
        run: Folder of the run.
        settings: What is measured.
        device: auto, cpu, cuda, cuda:1.
        json: Print JSON alone.
    """
    _print_evaluation(runs.evaluate_run(Path(run), settings, device=device), json)


def _print_evaluation(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(report, ensure_ascii=False))
    else:
        print_evaluation(report)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text)
