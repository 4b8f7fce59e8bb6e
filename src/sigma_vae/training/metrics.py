"""Loggers of metrics: a CSV table that no kill can tear, TensorBoard's events, Weights & Biases, MLflow."""

import csv
import importlib
import io
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from sigma_vae.config import LoggerName, write_whole

__all__ = ["Events", "MLflow", "MetricsTable", "TrainingLogger", "WeightsAndBiases", "make_loggers", "rows_before"]

Row = Mapping[str, Any]


class TrainingLogger(Protocol):
    """Any logger of Lightning Fabric or pytorch-lightning."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""

    def save(self) -> None:
        """Write the rows to where they are kept."""

    def finalize(self, status: str) -> None:
        """End, with the status ``success`` or ``failed``."""


def make_loggers(names: Sequence[LoggerName], folder: Path, kept_rows: Sequence[Row] = ()) -> list[TrainingLogger]:
    """Loggers by name, for the run in this folder.

    Args:
        names: ``csv``, ``tensorboard``, ``wandb``, ``mlflow``.
        folder: run folder.
        kept_rows: rows of the steps before a resumption; they replace those in the folder's files.

    Raises:
        ValueError: a name is not known, or what it needs is not installed.
    """
    known: dict[str, Callable[[], TrainingLogger]] = {
        "csv": lambda: MetricsTable(folder / "metrics.csv", kept_rows),
        "tensorboard": lambda: Events(folder, kept_rows),
        "wandb": lambda: WeightsAndBiases(folder),
        "mlflow": lambda: MLflow(folder),
    }
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"a logger is one of {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name]() for name in dict.fromkeys(names)]


def rows_before(table: Path, step: int) -> list[dict[str, str]]:
    """The rows of the steps before this one; a row half-written when the run was killed belongs to a later step.

    Raises:
        ValueError: the file is no such table.
    """
    if not table.exists():
        return []
    try:
        whole, _, _ = table.read_bytes().rpartition(b"\n")
        rows = csv.DictReader(io.StringIO(whole.decode()), strict=True)
        named = [{name: value for name, value in row.items() if value != ""} for row in rows]
        kept = [row for row in named if int(row["step"]) < step]
        _ = [float(value) for row in kept for value in row.values()]  # a comma too many gives a list
        return kept
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{table} is no table of metrics ({type(error).__name__}: {error}); move it away to go on without its rows"
        ) from error


class _RunLogger(TrainingLogger):
    """A logger in the run folder, whose rows are kept as soon as they are logged."""

    def save(self) -> None:
        """Do nothing."""

    def finalize(self, status: str) -> None:
        """Do nothing."""


@final
class MetricsTable(_RunLogger):
    """``metrics.csv``: each row is added in one piece; a row with new columns replaces the whole file by a new one.

    The table begins with the rows ``kept``; older content of the file is replaced.
    """

    def __init__(self, path: Path, kept: Sequence[Row] = ()) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        self._replace(kept)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row = {**metrics, "step": step}
        if not row.keys() <= set(self.columns):
            self._replace([*self._rows(), row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

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


@final
class Events(_RunLogger):
    """TensorBoard's file of the same rows, each written when it is logged; it replaces the files of earlier sessions.

    TensorBoard's own writer works in a thread: a killed process loses rows, a resumed run keeps rows of later steps,
    and a full disk ends the thread with a traceback.
    """

    def __init__(self, folder: Path, kept: Sequence[Row] = ()) -> None:
        super().__init__()
        self.path = folder / "tensorboard" / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for old in self.path.parent.glob("events.out.tfevents.*"):
            old.unlink()
        self._write(file_version="brain.Event:2")
        for row in kept:
            self.log_metrics({name: float(value) for name, value in row.items() if name != "step"}, int(row["step"]))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add an event with all values."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        with self.path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())


PROJECT = "sigma-vae"
"""Weights & Biases project and MLflow experiment, unless their environment variables name another."""


@final
class WeightsAndBiases(_RunLogger):
    """A run of Weights & Biases, named after the run folder; a resumed training continues it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        wandb = _installed("wandb")
        project, known = os.environ.get("WANDB_PROJECT", PROJECT), _kept_id(folder, "wandb")
        self.run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known, resume="allow")
        self.run.define_metric("*", step_metric="step")  # W&B's own step cannot go back, as a resumed training may
        _keep_id(folder, "wandb", self.run.id)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send a row."""
        self.run.log({**metrics, "step": step})

    def finalize(self, status: str) -> None:
        """End the run."""
        self.run.finish(exit_code=0 if status == "success" else 1)


@final
class MLflow(_RunLogger):
    """A run of MLflow (at ``MLFLOW_TRACKING_URI``), named after the run folder; a resumed training continues it.

    MLflow 3.17 refuses a plain folder there: take ``sqlite:///mlflow.db``, or set ``MLFLOW_ALLOW_FILE_STORE=true``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        mlflow = _installed("mlflow")
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        known = _kept_id(folder, "mlflow")
        self.client = mlflow.MlflowClient()
        self.id: str = mlflow.start_run(run_id=known, run_name=None if known else folder.name).info.run_id
        mlflow.end_run()
        self.client.update_run(self.id, status="RUNNING")
        _keep_id(folder, "mlflow", self.id)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send a row."""
        for name, value in metrics.items():
            self.client.log_metric(self.id, name, float(value), step=step)

    def finalize(self, status: str) -> None:
        """End the run."""
        self.client.set_terminated(self.id, status="FINISHED" if status == "success" else "FAILED")


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"the logger {package} needs a package that is not installed: pip install {package}") from error


def _kept_id(folder: Path, service: str) -> str | None:
    file = folder / f"{service}-run.txt"
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _keep_id(folder: Path, service: str, run_id: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{service}-run.txt", f"{run_id}\n")
