"""A bar over the steps of a training, drawn a few times a second."""

import time
from typing import Any, final

import pytorch_lightning as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Bar"]

SECONDS_BETWEEN = 0.25
"""Drawing takes milliseconds: more often, it would slow the steps of small networks."""


@final
class Bar(pl.Callback):
    """Epoch, steps, time left, and what the last validation found.

    Args:
        epochs: of the training.
        steps: of the training.
    """

    def __init__(self, epochs: int, steps: int) -> None:
        self.epochs = epochs
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), auto_refresh=False)
        self.task = self.progress.add_task("", total=steps, numbers="")
        self.drawn_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed training goes on where the bar stood."""
        self.progress.start()
        self._draw(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Draw, unless it was done just now."""
        if time.monotonic() - self.drawn_at > SECONDS_BETWEEN:
            self._draw(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what was found."""
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave it as it is: what is said of the exception comes below."""
        self.progress.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave it as it is."""
        self.progress.stop()

    def _draw(self, trainer: pl.Trainer) -> None:
        values = trainer.progress_bar_metrics
        numbers = " ".join(f"{name.removeprefix('validation/')} {value:.5g}" for name, value in values.items())
        epoch = min(trainer.current_epoch + 1, self.epochs)
        self.progress.update(
            self.task, description=f"epoch {epoch}/{self.epochs}", completed=trainer.global_step, numbers=numbers
        )
        self.progress.refresh()
        self.drawn_at = time.monotonic()
