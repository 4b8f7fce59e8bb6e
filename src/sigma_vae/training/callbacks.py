"""What happens around the steps: averaged weights, and scales refitted before each validation."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging

from sigma_vae.data import Batches
from sigma_vae.training.module import REMEDY, NonFiniteLossError, TrainingModule
from sigma_vae.vae import VAE

__all__ = ["AveragedWeights", "CalibrateBeforeValidation"]


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
