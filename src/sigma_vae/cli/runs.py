"""Subcommands that make runs, evaluate, refit and compare them."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from sigma_vae import runs
from sigma_vae.cli.outputs import Split
from sigma_vae.cli.tables import print_comparison, print_evaluation
from sigma_vae.config import EvaluationSettings, RunConfig, read
from sigma_vae.evaluation import Evaluation

__all__ = ["calibrate", "compare", "evaluate", "fit_prior", "replay", "rerun", "resume", "train"]


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


def _print_evaluation(report: Evaluation, as_json: bool) -> None:
    if as_json:
        print(json_module.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_evaluation(report)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text)


def calibrate(
    run: tyro.conf.Positional[str],
    *,
    data: str | None = None,
    split: Split = "train",
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Refit σ of a finished run, β-VAEs included, and evaluate it anew: likelihoods of different scales then compare.

    Fixed, shared, running and predicted scales keep their own σ, and what is reported with it; their post-hoc values change. An
    optimal scale's own σ is the refitted one, so there all numbers change. The weights stay as they are. Fitting on the run's own
    training split again gives back what training left.

    Args:
        run: Folder of the run.
        data: Fit on these data, a name or a path, in place of the run's own; read with the same options (a .yaml file: with those of
            its own data section), and scaled as the run's own are.
        split: Whose examples: train, or validation where the training set is small. σ of test has seen what it is evaluated on.
        seed: Of the posterior's noise.
        device: auto, cpu, cuda, cuda:1.
        json: Print JSON alone.
    """
    result = runs.calibrate_run(Path(run), data, split, device=device, seed=seed)
    if json:
        print(json_module.dumps(result, ensure_ascii=False))
        return
    kind = "sigma_post_hoc" if "sigma_post_hoc" in result else "factor_post_hoc"
    for name, value in result[kind].items():
        if value["after"] is not None:
            before = "none" if value["before"] is None else f"{value['before']:.5f}"
            print(f"{kind}_{name:<8} {before} -> {value['after']:.5f}")
    fitted = result["sigma_fitted_on"]
    print(f"fitted on {fitted['examples']} examples of {fitted['data']} ({fitted['split']})")
    if split == "test" and data is None:
        print("the evaluation is of the same examples: its post-hoc numbers are no held-out ones")
    print(f"evaluated anew: {Path(run) / 'evaluation.json'}")


def fit_prior(run: tyro.conf.Positional[str], *, prior: str = "mixture", device: str = "auto", json: bool = False) -> None:
    """Fit a prior to the codes of a finished run's training split, put it into the model, and evaluate and draw anew.

    All else of the model stays as it is. The run's config.yaml names the new prior, so that a replay gives the same.

    Args:
        run: Folder of the run.
        prior: mixture (of Gaussians, as many as validation data are worth), mixture:20, gaussian or flow; standard goes back to N(0, I).
        device: auto, cpu, cuda, cuda:1.
        json: Print the evaluation as JSON alone.
    """
    report = runs.fit_prior(Path(run), prior, device=device)
    if json:
        print(json_module.dumps(report.to_json(), ensure_ascii=False))
    else:
        _print_side_by_side(report)


def _print_side_by_side(report: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    standard = report.get("standard_prior", report)
    columns = {"N(0, I)": standard} | ({report["prior"]: report} if "standard_prior" in report else {})
    table = Table("", title=f"mean ± standard error over {report['examples']} test examples")
    for name in columns:
        table.add_column(name, justify="right")
    for key in ("elbo_nats", "elbo_post_hoc_nats", "objective_nats", "rate_nats", "bits_per_dim", "bits_per_dim_post_hoc"):
        if key in standard:
            table.add_row(key, *(_with_error(values[key]) for values in columns.values()))
    Console().print(table)


def _with_error(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" if error is None else f"{value['mean']:.4f} ± {error:.4f}"


def compare(
    folders: tyro.conf.Positional[tuple[str, ...]], *, paired: bool = False, device: str = "auto", json: bool = False
) -> None:
    """Set finished runs of the same data side by side, from their evaluations.

    Bits per dimension compare between all decoders; nats are left out where some runs observe levels and others do not.

    Args:
        folders: Folders of the runs, the one to compare with first.
        paired: Score every test example of each run anew, and give mean differences to the first run with their own standard error.
        device: auto, cpu, cuda, cuda:1; of the scoring.
        json: Print JSON alone.
    """
    rows = runs.compare([Path(run) for run in folders], paired=paired, device=device)
    if json:
        print(json_module.dumps(rows, ensure_ascii=False))
    else:
        print_comparison(rows)
