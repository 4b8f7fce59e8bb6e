"""What is told while a study runs: a live table on a terminal, a line for each cell elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from sigma_vae.study import StudySpec, cells
from sigma_vae.study.cell import finished, running_since
from sigma_vae.study.words import told

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Live", "live_or_lines"]

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
            shown.add_row(f"for {_clock(time.time() - since)}", told(cell.place))
        return shown

    def _times(self, left: int) -> str:
        elapsed = time.time() - self.began
        rest = f", about {_clock(elapsed / self.now * left)} left" if self.now else ""
        return f"{_clock(elapsed)} elapsed{rest}"


def _line(record: dict[str, Any], ended: int, of: int) -> str:
    """Of a cell that has ended."""
    how = "" if record["status"] == "done" else f", failed: {record['error']}"
    return f"[{ended}/{of}] {told(record['place'])}: {record['seconds']:.0f} s{how}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
