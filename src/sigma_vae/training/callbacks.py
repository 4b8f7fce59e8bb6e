"""Loggers of the metrics of a training, and hooks into it: the interface for your own, the progress bar, early stopping."""

import csv
import importlib
import io
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from sigma_vae.config import LoggerName, TrainingConfig, write_whole
from sigma_vae.progress import SECONDS_BETWEEN, SECONDS_BETWEEN_LINES
from sigma_vae.vae import VAE

# -- loggers -----------------------------------------------------------------------------------------------------------

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


# -- callbacks ---------------------------------------------------------------------------------------------------------

BAR_WIDTH = 4
"""With it, a line has 80 columns."""
SHOWN = {
    "train/loss_nats": "loss {}",
    "validation/elbo_nats": "validation {} nats",
    "validation/objective_nats": "validation {} nats",
    "validation/bits_per_dim": "{} bits/dim",
}
"""The values beside the bar, and how they are written there; bits per dimension are those of validation data."""


@dataclass
class Context:
    """The state of a training, as callbacks see it.

    Args:
        vae: the model; during ``on_validation`` with the weights that were validated (the averaged ones, with
            ``ema_decay``).
        config: training settings.
        folder: run folder; None where nothing is kept.
        total_steps: number of steps of the whole training, unless it is stopped before.
        loggers: receive the rows of metrics; empty on processes other than the first.
        step: number of steps taken.
        epoch: current epoch, counted from 0.
        metrics: newest value of everything that was logged.
        stopping: whether the training ends after the next validation.
    """

    vae: VAE
    config: TrainingConfig
    folder: Path | None
    total_steps: int
    loggers: Sequence[TrainingLogger]
    step: int = 0
    epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    stopping: bool = False

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write values to the loggers, in the row of the newest step; call it after the first step."""
        self.metrics.update(metrics)
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), self.step - 1)

    def stop(self) -> None:
        """End the training soon, after a last validation; a call on one process ends all."""
        self.stopping = True


class Callback:
    """Base of hooks into :func:`sigma_vae.training.fit`. Override what you need.

    If several processes train, each calls its own copy.

    >>> class StopWhenGood(Callback):
    ...     def on_validation(self, context: Context) -> None:
    ...         if context.metrics["validation/elbo_nats"] > -80:
    ...             context.stop()
    """

    def on_fit_start(self, context: Context) -> None:
        """Runs before the first step, also of a resumed training."""

    def on_step(self, context: Context) -> None:
        """Runs after each step. Keep it short: small networks take many hundred steps a second."""

    def on_validation(self, context: Context) -> None:
        """Runs after each validation, before the checkpoint is written."""

    def on_fit_end(self, context: Context) -> None:
        """Runs when the training has ended, also by an error or an interrupt."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed training needs: tensors and plain values; it is kept in each checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""


@final
class Patience(Callback):
    """Stop a training after ``patience`` validations without an improvement; more of ``metric`` is better."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric = metric
        self.patience = patience
        self.best = -math.inf
        self.waited = 0

    def on_fit_start(self, context: Context) -> None:
        """Stop at once if patience had run out before resuming."""
        context.stopping = context.stopping or self.waited >= self.patience

    def on_validation(self, context: Context) -> None:
        """Compare with the best so far."""
        score = context.metrics[self.metric]
        self.best, self.waited = (score, 0) if score > self.best else (self.best, self.waited + 1)
        if self.waited >= self.patience:
            context.stop()

    def state_dict(self) -> dict[str, Any]:
        """Best score and number of validations since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.best, self.waited = state["best"], state["waited"]


@final
class Bar(Callback):
    """Draw epoch, steps, time left, and the newest values, a few times a second."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        columns = (
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        numbers = TextColumn("{task.fields[numbers]}", table_column=Column())  # alone it may wrap, in a narrow terminal
        self.progress = Progress(*columns, numbers, auto_refresh=False)
        self.task = self.progress.add_task("", numbers="")
        self.drawn_at = 0.0

    def on_fit_start(self, context: Context) -> None:
        """Begin where a resumed training stands."""
        self.progress.update(self.task, total=context.total_steps)
        self.progress.start()
        self._draw(context)

    def on_step(self, context: Context) -> None:
        """Draw, unless it was done just now."""
        if time.monotonic() - self.drawn_at > SECONDS_BETWEEN:
            self._draw(context)

    def on_validation(self, context: Context) -> None:
        """Show the new values."""
        self._draw(context)

    def on_fit_end(self, context: Context) -> None:
        """Leave the bar as it is."""
        self.progress.stop()

    def _draw(self, context: Context) -> None:
        description, numbers = f"epoch {context.epoch + 1}", _numbers(context)
        self.progress.update(self.task, description=description, completed=context.step, numbers=numbers)
        self.progress.refresh()
        self.drawn_at = time.monotonic()


@final
class Lines(Callback):
    """Print a line a minute, and one at the end: progress where output goes to a file."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.seconds = seconds
        self.began = self.said = time.monotonic()
        self.first = 0

    def on_fit_start(self, context: Context) -> None:
        """Begin to count."""
        self.began = self.said = time.monotonic()
        self.first = context.step

    def on_step(self, context: Context) -> None:
        """Print, if it is time."""
        if time.monotonic() - self.said >= self.seconds:
            self._say(context)

    def on_fit_end(self, context: Context) -> None:
        """Print how far it came."""
        if context.step > self.first:
            self._say(context)

    def _say(self, context: Context) -> None:
        self.said = time.monotonic()
        left = (self.said - self.began) / max(context.step - self.first, 1) * (context.total_steps - context.step)
        rest = (
            f", at most {math.ceil(left / 60)} min left" if context.step < context.total_steps and not context.stopping else ""
        )
        print(f"epoch {_epoch(context)}, step {context.step} of {context.total_steps}{rest}: {_numbers(context)}", flush=True)


def progress_of() -> Callback:
    """A bar in a terminal or notebook, else a line a minute."""
    from rich import get_console

    console = get_console()
    return Bar() if console.is_terminal or console.is_jupyter else Lines()


def _epoch(context: Context) -> str:
    epoch, epochs = context.epoch + 1, context.config.epochs
    return str(epoch) if epochs is None else f"{min(epoch, epochs)}/{epochs}"


def _numbers(context: Context) -> str:
    """The newest values."""
    return " ".join(words.format(_number(context.metrics[name])) for name, words in SHOWN.items() if name in context.metrics)


def _number(value: float) -> str:
    """A number in few digits.

    >>> _number(-1234.5), _number(41.769), _number(2.4635)
    ('-1234', '41.8', '2.46')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
