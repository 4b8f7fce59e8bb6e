"""Subcommands of ``sigma-vae study``: grids of runs, and what came of them."""

import json as json_module
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import tyro

from sigma_vae import study as studies
from sigma_vae.study import StudySpec, cells
from sigma_vae.study.cell import finished, running_since
from sigma_vae.study.grid import SHIPPED, format_place
from sigma_vae.study.outcomes import failures, how_far, results
from sigma_vae.study.runner import Backend

__all__ = ["STUDY", "Live", "live_or_lines", "study"]

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


Tell = Callable[[dict[str, Any], int, int], None]


@contextmanager
def live_or_lines(spec: StudySpec, out: Path, console: "Console") -> Iterator[Tell]:
    """What is called with each cell that ends: on a terminal it feeds a table that is shown meanwhile."""
    from rich import live

    if not console.is_terminal:
        yield lambda record, ended, of: print(_line(record, ended, of), flush=True)
        return
    shown = Live(spec, out)
    with live.Live(get_renderable=shown.table, console=console, refresh_per_second=1, transient=True):

        def tell(record: dict[str, Any], ended: int, of: int) -> None:
            shown.add(record)
            console.print(_line(record, ended, of), markup=False, highlight=False)

        yield tell


@final
class Live:
    """How far a study is: what has ended, what is running and since when, and how long the rest may take.

    Cells say themselves, by a file, that they are worked on, so that those on other machines are known as well.
    """

    def __init__(self, spec: StudySpec, out: Path) -> None:
        self.cells, self.out = cells(spec), out
        self.began = time.time()
        self.done = sum(finished(cell, out) for cell in self.cells)
        self.failed: set[str] = set()
        self.now = 0

    def add(self, record: dict[str, Any]) -> None:
        """A cell has ended."""
        done = record["status"] == "done"
        self.done, self.now = self.done + done, self.now + done
        (self.failed.discard if done else self.failed.add)(record["key"])

    def table(self) -> "Table":
        """As it is now."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        running = [(cell, since) for cell in self.cells if (since := running_since(cell, self.out) or 0) >= self.began - 1]
        shown = Table(box=None, show_header=False)
        left = len(self.cells) - self.done
        counts = f"{self.done} of {len(self.cells)} done, {len(self.failed)} failed, {len(running)} running"
        shown.add_row(ProgressBar(total=len(self.cells), completed=self.done, width=30), f"{counts}; {self._times(left)}")
        for cell, since in running:
            shown.add_row(f"for {_clock(time.time() - since)}", format_place(cell.place))
        return shown

    def _times(self, left: int) -> str:
        elapsed = time.time() - self.began
        rest = f", about {_clock(elapsed / self.now * left)} left" if self.now else ""
        return f"{_clock(elapsed)} elapsed{rest}"


def _line(record: dict[str, Any], ended: int, of: int) -> str:
    """Of a cell that has ended."""
    how = "" if record["status"] == "done" else f", failed: {record['error']}"
    return f"[{ended}/{of}] {format_place(record['place'])}: {record['seconds']:.0f} s{how}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
        tables = [*results(spec, rows).tables[:1], *failures(spec, rows)]
    for found in tables:
        printed = Table(title=f"{spec.title}: test split, mean ± standard deviation" if found is tables[0] else found.caption)
        for name in found.columns:
            printed.add_column(name, overflow="fold")
        for row in found.rows:
            printed.add_row(*map(Text, row))
        Console().print(printed)
    print(how_far(spec, rows))


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
