"""The subcommand that gives a finished run another prior."""

import json as json_module
from pathlib import Path
from typing import Any

import tyro

from sigma_vae import runs

__all__ = ["fit_prior"]


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
        print(json_module.dumps(report, ensure_ascii=False))
    else:
        _print_side_by_side(report)


def _print_side_by_side(report: dict[str, Any]) -> None:
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


def _with_error(value: dict[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" if error is None else f"{value['mean']:.4f} ± {error:.4f}"
