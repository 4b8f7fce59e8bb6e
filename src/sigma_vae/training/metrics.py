"""The run's metrics, as a table that no kill can tear, and as TensorBoard's events made of the same rows."""

import csv
import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from sigma_vae.config import write_whole

__all__ = ["Events", "MetricsTable", "rows_before"]

Row = Mapping[str, Any]


def rows_before(table: Path, step: int) -> list[dict[str, str]]:
    """The rows of the steps before this one; a row that was being written when the run was killed is of a later one.

    Raises:
        ValueError: it is no such table.
    """
    if not table.exists():
        return []
    try:
        whole, _, _ = table.read_bytes().rpartition(b"\n")
        rows = csv.DictReader(io.StringIO(whole.decode()), strict=True)
        named = [{name: value for name, value in row.items() if value != ""} for row in rows]
        return [row for row in named if int(row["step"]) < step]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{table} is no table of metrics ({type(error).__name__}: {error}); move it away to go on without what it said"
        ) from error


class MetricsTable(Logger):
    """``metrics.csv``: a row is added in one piece; where a row has new columns, the table is written anew beside the old one.

    Args:
        path: of the table.
        kept: rows to begin with; what the file had is replaced.
    """

    def __init__(self, path: Path, kept: Sequence[Row] = ()) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        self._replace(kept)

    @property
    def name(self) -> str:
        """None: its folder is the run's."""
        return ""

    @property
    def version(self) -> str:
        """None: its folder is the run's."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()} | {"step": step}
        if not row.keys() <= set(self.columns):
            self._replace([*self._rows(), row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config has them."""

    @rank_zero_only
    def save(self) -> None:
        """Force the rows to the disk."""
        if self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @rank_zero_only
    def _replace(self, rows: Sequence[Row]) -> None:
        self.columns = sorted({*self.columns, *(name for row in rows for name in row)})
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())


class Events(Logger):
    """TensorBoard's file of the same rows, each written when it is logged.

    TensorBoard's own writer does so later, in a thread: what it has not yet written is lost with a killed process, what it has stays
    when a run goes on from before it, and where there is no room the thread dies with a traceback.

    Args:
        folder: of the run; the file is made in a folder inside, where it replaces those that are there.
        kept: rows to begin with.
    """

    def __init__(self, folder: Path, kept: Sequence[Row] = ()) -> None:
        super().__init__()
        self.path = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._begin()
        for row in kept:
            self.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))

    @property
    def name(self) -> str:
        """None: its folder is the run's."""
        return ""

    @property
    def version(self) -> str:
        """What the engine's own writer of such files calls it."""
        return "tensorboard"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add an event with all values."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(step=step, summary=Summary(value=values))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config has them."""

    @rank_zero_only
    def _begin(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for old in self.path.parent.glob("events.out.tfevents.*"):
            old.unlink()
        self._write(file_version="brain.Event:2")

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self.path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())
