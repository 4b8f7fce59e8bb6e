"""What happens around the steps: averaged weights, scales refitted before each validation, and a row of what it found."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging

from sigma_vae.data import Batches
from sigma_vae.training.module import REMEDY, NonFiniteLossError, TrainingModule
from sigma_vae.vae import VAE

__all__ = ["AveragedWeights", "CalibrateBeforeValidation", "ValidationRow"]


class AveragedWeights(EMAWeightAveraging):
    """An exponential moving average of the weights, which stands still where a step is skipped."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Runs after each step, taken or skipped."""
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.just_skipped:
            super().on_train_batch_end(trainer, pl_module, *batch)


class CalibrateBeforeValidation(pl.Callback):
    """Refit the scales on a fixed part of the training data, so that validation reports what an evaluation would."""

    def __init__(self, vae: VAE, part: Batches) -> None:
        self.vae = vae
        self.part = part

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after the averaged weights, if any, are in place."""
        try:
            self.vae.calibrate(self.part)
        except ValueError as error:  # of data that trained before, so it is the weights that have become useless
            raise NonFiniteLossError(f"after step {trainer.global_step - 1}: {error}. {REMEDY}") from error


class ValidationRow(pl.Callback):
    """Writes what a validation found, as of the newest step.

    The engine would write it, too, but counts calls, of several steps each: a resumed run keeps the rows of the steps behind it.
    """

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs when the means are there, before a checkpoint is written."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("validation/")}
        for logger in trainer.loggers:
            logger.log_metrics(found | {"epoch": trainer.current_epoch}, trainer.global_step - 1)
