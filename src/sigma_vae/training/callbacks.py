"""Hooks into a training: the interface for your own, the progress bar, and early stopping."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from sigma_vae.config import TrainingConfig
from sigma_vae.progress import SECONDS_BETWEEN, SECONDS_BETWEEN_LINES
from sigma_vae.training.metrics import TrainingLogger
from sigma_vae.vae import VAE

__all__ = ["Bar", "Callback", "Context", "Lines", "Patience", "progress_of"]

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
