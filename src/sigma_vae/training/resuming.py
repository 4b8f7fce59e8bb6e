"""When checkpoints are written, and how a run ends before its time: so that one that goes on does what the whole one would."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from sigma_vae.data import Batches
from sigma_vae.training.distributed import on_any
from sigma_vae.training.module import REMEDY, NonFiniteLossError, TrainingModule

__all__ = ["Patience", "Resumable", "Terminated", "ValidateAtEnd"]


class Terminated(SystemExit):
    """SIGTERM came, as a cluster sends it before a job's time is over: the step was finished and a checkpoint written."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Resumable(pl.callbacks.Checkpoint):
    """Writes the checkpoint from which a run goes on: after each validation, and in between when the last one is old enough.

    It holds, beside what the engine and :class:`~sigma_vae.training.together.OwnNoise` keep, the position in the data. It is written
    where nothing of a step is open; a step that is the last of an epoch, or that a validation follows, is over after that. The first
    Ctrl-C, and SIGTERM, end the step at hand (and those of its call), write a checkpoint and stop; a second Ctrl-C stops at once.

    Args:
        checkpoint: its file.
        training: the batches.
        minutes: how old the last one may be.
    """

    def __init__(self, checkpoint: Path, training: Batches, minutes: float) -> None:
        self.checkpoint = checkpoint
        self.training = training
        self.seconds = 60 * minutes
        self.written = time.monotonic()
        self.asked: int | None = None
        self.previous: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The position; the engine keeps it in the middle of an epoch alone."""
        return {"training": self.training.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.training.load_state_dict(state_dict["training"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals (only the main thread may); the engine has taken them before."""
        self.written = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:
                return

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Write a checkpoint between two steps, where weights, optimiser and data position agree; stop if asked to."""
        stop = on_any(self.asked is not None)
        due = on_any(time.monotonic() - self.written >= self.seconds)
        if (stop or due) and _between_steps(trainer):
            self._write(trainer, pl_module)
            if stop:
                self.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint; stop if asked to."""
        if trainer.state.fn != "fit":
            return
        self._write(trainer, pl_module)
        if on_any(self.asked is not None):
            self.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back, before the engine does: it would be given its own again after that, and live on in them."""
        self._give_back()

    def stop(self) -> None:
        """Leave the training, in the way that the signal means: on all processes, whichever of them got it.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        raise KeyboardInterrupt if on_any(self.asked == signal.SIGINT) else Terminated

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if on_any(not all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())):
            raise NonFiniteLossError(f"after step {trainer.global_step - 1} weights are not finite. {REMEDY}")
        for logger in trainer.loggers:  # what is logged is on the disk before the state that comes after it
            logger.save()
        trainer.save_checkpoint(self.checkpoint)
        self.written = time.monotonic()

    def _give_back(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number


class ValidateAtEnd(pl.Callback):
    """A validation ends the run, wherever between two of them its last step lies: its weights have their chance to be the best.

    A run that goes on from a checkpoint written after a validation does not repeat it, whatever was the reason for it. The engine knows
    that of those alone that would be due again: so it is told that one is, until the next step begins.
    """

    def __init__(self) -> None:
        self.every: int | float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that has nothing left to do is stopped; one that goes on has its last validation behind it."""
        calls = trainer.fit_loop.epoch_loop
        if _is_last(trainer, pl_module):
            trainer.should_stop = True
        elif calls.restarting and calls.batch_progress.total.completed == calls.batch_progress.total.ready:
            self.every, trainer.val_check_batch = trainer.val_check_batch, 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """From here on validations are due as they always were."""
        self._give_back(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The engine validates before it stops for this reason."""
        if _is_last(trainer, pl_module):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on validations are due as they always were."""
        self._give_back(trainer)

    def _give_back(self, trainer: pl.Trainer) -> None:
        if self.every is not None:
            trainer.val_check_batch, self.every = self.every, None


class Patience(EarlyStopping):
    """Stops a run whose validations no longer improve, also one that is resumed when it has just been stopped so.

    Args:
        monitor: the metric; more is better.
        patience: how many validations may pass without a better one.
    """

    def __init__(self, monitor: str, patience: int) -> None:
        super().__init__(monitor, mode="max", patience=patience, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Patience that was over is over."""
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


def _is_last(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether no step is left: what the engine itself counts are calls, of several steps each."""
    assert isinstance(module, TrainingModule)
    return trainer.global_step >= module.total_steps


def _between_steps(trainer: pl.Trainer) -> bool:
    """Whether nothing is open: no validation that follows, no end of an epoch."""
    calls = trainer.fit_loop.epoch_loop
    follows: Callable[[Any], bool] = calls._should_check_val_fx
    return not (calls.batch_progress.is_last_batch or follows(trainer.fit_loop._data_fetcher))
