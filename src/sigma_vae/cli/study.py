"""Commands of ``sigma-vae study``: train a grid of runs, and report on it."""

import json as json_module
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import tyro

from sigma_vae import study as studies
from sigma_vae.progress import hidden
from sigma_vae.study import StudySpec, cells
from sigma_vae.study.comparisons import failures, how_far, results
from sigma_vae.study.grid import SHIPPED, format_place
from sigma_vae.study.runner import Backend, finished, running_since

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


StudyFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
Tell = Callable[[dict[str, Any], int, int], None]


@contextmanager
def live_or_lines(spec: StudySpec, out: Path, console: "Console") -> Iterator[Tell]:
    """Yield a function to call with each cell that ends; on a terminal a table shows the progress meanwhile."""
    from rich import live

    if not console.is_terminal:
        yield lambda record, ended, of: print(_line(record, ended, of), flush=True)
        return
    shown = Live(spec, out)
    with hidden(), live.Live(get_renderable=shown.table, console=console, refresh_per_second=1, transient=True):

        def tell(record: dict[str, Any], ended: int, of: int) -> None:
            shown.add(record)
            console.print(_line(record, ended, of), markup=False, highlight=False)

        yield tell


@final
class Live:
    """Progress of a study: finished and running cells, and the time that the rest may take.

    A running cell has a file that says so, so cells that run on other machines are known as well.
    """

    def __init__(self, spec: StudySpec, out: Path) -> None:
        self.cells, self.out = cells(spec), out
        self.began = time.time()
        self.done = sum(finished(cell, out) for cell in self.cells)
        self.failed: set[str] = set()
        self.now = 0

    def add(self, record: dict[str, Any]) -> None:
        """Count a cell that has ended."""
        done = record["status"] == "done"
        self.done, self.now = self.done + done, self.now + done
        (self.failed.discard if done else self.failed.add)(record["key"])

    def table(self) -> "Table":
        """The progress so far."""
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
    """One line about a cell that has ended."""
    how = "" if record["status"] == "done" else f", failed: {record['error']}"
    return f"[{ended}/{of}] {format_place(record['place'])}: {record['seconds']:.0f} s{how}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def run(
    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")],
    *,
    out: str,
    size: str | None = None,
    backend: Backend = "loky",
    workers: int | None = None,
    address: str | None = None,
    retries: int = 1,
    json: bool = False,
) -> None:
    """Train all unfinished runs of a study, and write its report.

    A study that was stopped or killed continues with the same command.

    Args:
        spec: Name of a study that comes with the package, or path of a YAML file or of a kept study's results.parquet.
        out: Folder of the study; on a cluster, one that all workers can write to.
        size: Size of the study, where it has several; cpu is for two cores.
        backend: Where the runs are trained: loky (processes on this machine), dask or ray.
        workers: Number of runs at once on this machine; one per core unless given.
        address: Address of a Dask scheduler or a Ray cluster; a local one is started unless given.
        retries: Number of further attempts at a run that fails.
        json: Print the records of all runs as JSON only.
    """
    from rich.console import Console

    grid = studies.read_spec(spec, size)
    with nullcontext() if json else live_or_lines(grid, Path(out), Console()) as tell:
        records = studies.run(grid, Path(out), backend=backend, workers=workers, address=address, retries=retries, tell=tell)
    failed = [record for record in records if record["status"] != "done"]
    if records:
        studies.report(Path(out))
    if json:
        print(json_module.dumps(records))
    elif records:
        _print_summary(Path(out))
        print(f"table: {Path(out) / 'results.parquet'}; report: {Path(out) / 'report.html'}")
    if failed:
        errors = "; ".join(dict.fromkeys(record["error"] for record in failed))
        runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
        raise ValueError(f"{runs} failed; the same command tries again: {errors}")


def _print_summary(out: Path) -> None:
    """Print the main table of the report, the failed runs, and how many runs are missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    spec, tables = studies.spec_of(out), []
    rows = studies.collect(studies.cells(spec), out)
    if len(rows):
        tables = [*results(spec, rows).tables[:1], *failures(spec, rows)]
    for found in tables:
        printed = Table(title=f"{spec.title}: test split, mean ± std over seeds" if found is tables[0] else found.caption)
        for name in found.columns:
            printed.add_column(name, overflow="fold")
        for row in found.rows:
            printed.add_row(*map(Text, row))
        Console().print(printed)
    print(how_far(spec, rows))


def table(study: StudyFolder) -> None:
    """Print the results so far: mean ± std over seeds, on the test split.

    Args:
        study: Folder of the study.
    """
    _print_summary(Path(study))


def report(study: StudyFolder) -> None:
    """Write the results so far as report.html and report.md.

    The report has verdicts, tables, plots and samples.

    Args:
        study: Folder of the study.
    """
    studies.report(Path(study))
    print(Path(study) / "report.html")


def keep(study: StudyFolder, *, to: str) -> None:
    """Copy a study without its weights.

    The copy has the numbers of all runs, a few small pictures, and the report, which can be made again from them.

    Args:
        study: Folder of the study.
        to: Folder to write: a new one, or an earlier copy of this study.
    """
    studies.keep(Path(study), Path(to))
    print(Path(to) / "report.html")


def verdicts(folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY [STUDY ...]")]) -> None:
    """Print what several studies say about each claim, as Markdown.

    For each claim: where it holds, where it does not, where the studies do not decide, and the numbers.

    Args:
        folders: Folders of the studies.
    """
    print(studies.verdicts([Path(folder) for folder in folders]), end="")


def names() -> None:
    """List the studies that come with the package."""
    for name in SHIPPED:
        spec = studies.read_spec(name)
        sizes = f" [{', '.join(spec.sizes)}]" if spec.sizes else ""
        print(f"{name}{sizes}: {spec.title}, {len(studies.cells(spec))} runs. {spec.about}")
