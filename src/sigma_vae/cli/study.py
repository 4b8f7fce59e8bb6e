"""Subcommands of ``sigma-vae study``: grids of runs, and what came of them."""

import json as json_module
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import tyro

from sigma_vae import study as studies
from sigma_vae.cli.progress import live_or_lines
from sigma_vae.study.grid import SHIPPED
from sigma_vae.study.outcomes import failures, how_far, results
from sigma_vae.study.runner import Backend

__all__ = ["STUDY", "study"]


def run(
    spec: tyro.conf.Positional[str],
    *,
    out: str,
    size: str | None = None,
    backend: Backend = "loky",
    workers: int | None = None,
    address: str | None = None,
    retries: int = 1,
    json: bool = False,
) -> None:
    """Do every run of a study that is not finished, and write its report; stopped or killed, the same command goes on.

    Args:
        spec: Name of a study that comes with the library, or path of a YAML file.
        out: Folder of the study; on a cluster, one that all workers see.
        size: Of the study, where it has several: cpu is for two cores.
        backend: Where the runs are done: loky (processes on this machine), dask or ray.
        workers: How many are done at once (on this machine); as many as there are cores unless given.
        address: Of a Dask scheduler or a Ray cluster; a local one is started unless given.
        retries: How often a run that fails is tried again.
        json: Print the records of all cells as JSON alone.
    """
    from rich.console import Console

    grid = studies.read_spec(spec, size)
    with nullcontext() if json else live_or_lines(grid, Path(out), Console()) as tell:
        records = studies.run(grid, Path(out), backend=backend, workers=workers, address=address, retries=retries, tell=tell)
    failed = [record for record in records if record["status"] != "done"]
    if records:
        studies.report(Path(out))
    if json:
        print(json_module.dumps(records, ensure_ascii=False))
    elif records:
        _print_summary(Path(out))
        print(f"table: {Path(out) / 'results.parquet'}; report: {Path(out) / 'report.html'}")
    if failed:
        told = "; ".join(dict.fromkeys(record["error"] for record in failed))
        raise ValueError(f"{len(failed)} cells failed and are tried again when the study is run again: {told}")


def _print_summary(out: Path) -> None:
    """Mean ± standard deviation over seeds, of the test split, with the report's words; which cells failed, and how many are missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    spec, tables = studies.spec_of(out), []
    rows = studies.collect(studies.cells(spec), out)
    if len(rows):
        tables = [*results(spec, rows).tables[:1], *failures(spec, out)]
    for found in tables:
        printed = Table(title=f"{spec.title}: test split, mean ± standard deviation" if found is tables[0] else found.caption)
        for name in found.columns:
            printed.add_column(name, overflow="fold")
        for row in found.rows:
            printed.add_row(*map(Text, row))
        Console().print(printed)
    print(how_far(spec, out))


def table(study: tyro.conf.Positional[str]) -> None:
    """Print what a study has found so far: mean ± standard deviation over seeds, on the test split.

    Args:
        study: Folder of the study.
    """
    _print_summary(Path(study))


def report(study: tyro.conf.Positional[str]) -> None:
    """Write what a study has found so far: verdicts, tables, plots and samples, as report.html and as report.md.

    Args:
        study: Folder of the study.
    """
    studies.report(Path(study))
    print(Path(study) / "report.html")


def keep(study: tyro.conf.Positional[str], *, to: str) -> None:
    """Copy a study without its weights: the numbers of all runs, a few small pictures, and the report, which can be made from them again.

    Args:
        study: Folder of the study.
        to: The other folder: a new one, or one that this study was copied to before.
    """
    studies.keep(Path(study), Path(to))
    print(Path(to) / "report.html")


def verdicts(folders: tyro.conf.Positional[tuple[str, ...]]) -> None:
    """Print what several studies say of each claim, on one page in Markdown: where it holds, does not, or is not shown, and the numbers.

    Args:
        folders: Of the studies.
    """
    print(studies.verdicts([Path(folder) for folder in folders]), end="")


def names() -> None:
    """List the studies that come with the library, with their sizes."""
    for name in SHIPPED:
        spec = studies.read_spec(name)
        sizes = f" [{', '.join(spec.sizes)}]" if spec.sizes else ""
        print(f"{name}{sizes}: {spec.title}, {len(studies.cells(spec))} runs. {spec.about}")


def study() -> None:
    """Grids of runs, of which `run`, `table`, `report`, `keep`, `verdicts` and `list` are the subcommands."""
    raise ValueError(f"say what to do with a study: sigma-vae study {' | '.join(STUDY)}")


STUDY: dict[str, Callable[..., None]] = {
    "run": run,
    "table": table,
    "report": report,
    "keep": keep,
    "verdicts": verdicts,
    "list": names,
}
