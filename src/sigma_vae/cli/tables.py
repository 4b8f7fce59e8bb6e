"""Reports as tables in the terminal."""

from collections.abc import Sequence
from typing import Any

from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.base import metrics

__all__ = ["print_comparison", "print_evaluation"]


def print_evaluation(report: Evaluation) -> None:
    """Print the bounds, then the section of each further metric, and the notes below."""
    from rich.console import Console
    from rich.table import Table

    about = report.about
    prior = "" if about.get("prior", "standard") == "standard" else f" · prior {about['prior']}"
    examples = f"{report.bounds.examples} {about['split']} examples"
    table = Table(title=f"{about['data']} · {about['network']} · {about['likelihood']}{prior} · {examples}")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("± s.e.", justify="right")
    notes: list[str] = []
    for name, metric in metrics().items():
        result = report.results.get(name)
        if result is None:
            continue
        if metric.measured != "always":
            table.add_section()
        for row in metric.rows(result):
            table.add_row(*row)
        notes += metric.notes(result)
    console = Console(markup=False, emoji=False)  # names of files may look like either
    console.print(table)
    for line in notes:
        console.print(line)


def print_comparison(rows: Sequence[dict[str, Any]]) -> None:
    """Print a column for each run, and a row for each number that any of them has."""
    from rich.console import Console
    from rich.table import Table

    table = Table("")
    for row in rows:
        table.add_column(row["run"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for row in rows for name in row):
        if name != "run" and any(row.get(name) is not None for row in rows):
            table.add_row(name, *(_cell(row.get(name)) for row in rows))
    Console(markup=False, emoji=False).print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case {"mean": mean, "standard_error": error}:
            return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
        case float():
            return f"{value:.4f}"
        case _:
            return str(value)
