"""What happens around the steps: scales refitted before each validation, Ctrl-C, checkpoints that are whole or absent."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from sigma_vae.data import Batches
from sigma_vae.vae import VAE

__all__ = ["AtomicCheckpoints", "CalibrateBeforeValidation", "Resumable"]


class CalibrateBeforeValidation(pl.Callback):
    """Refit the scales on a fixed part of the training data, so that validation reports what an evaluation would."""

    def __init__(self, vae: VAE, part: Batches) -> None:
        self.vae = vae
        self.part = part
        self.validated_at = -1

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after the averaged weights, if any, are in place."""
        self.vae.calibrate(self.part)
        self.validated_at = trainer.global_step


class Resumable(pl.Callback):
    """Checkpoints hold the state of the noise and the position in the data, so that a resumed run does what the whole one would.

    The first Ctrl-C ends the step at hand, writes a checkpoint and stops; a second one stops at once.
    """

    def __init__(self, checkpoint: Path, training: Batches) -> None:
        self.checkpoint = checkpoint
        self.training = training
        self.asked = False
        self.previous: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Generators and data position; the engine keeps the latter in the middle of an epoch alone."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda, "training": self.training.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        torch.set_rng_state(state_dict["torch_rng"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in state_dict["cuda_rng"]])
        self.training.load_state_dict(state_dict["training"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signal (only the main thread may)."""
        try:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:
            self.previous = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop between two steps, where weights, optimiser and data position agree."""
        if self.asked:
            trainer.save_checkpoint(self.checkpoint)
            raise KeyboardInterrupt

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints are written aside and renamed: a name never points at half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write, then rename."""
        aside = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, aside, storage_options)
        os.replace(aside, path)
