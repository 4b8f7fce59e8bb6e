"""What happens around the steps: scales refitted before each validation, Ctrl-C, checkpoints that are whole or absent."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from sigma_vae.data import Batches
from sigma_vae.training.module import REMEDY, NonFiniteLossError, TrainingModule
from sigma_vae.training.shares import on_any
from sigma_vae.vae import VAE

__all__ = ["AtomicCheckpoints", "AveragedWeights", "CalibrateBeforeValidation", "Checkpoint", "Resumable"]


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
        self.validated_at = -1

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after the averaged weights, if any, are in place."""
        try:
            self.vae.calibrate(self.part)
        except ValueError as error:  # of data that trained before, so it is the weights that have become useless
            raise NonFiniteLossError(f"after step {trainer.global_step - 1}: {error}. {REMEDY}") from error
        self.validated_at = trainer.global_step


class Resumable(pl.Callback):
    """Checkpoints hold the state of the noise and the position in the data, so that a resumed run does what the whole one would.

    The first Ctrl-C ends the step at hand, writes a checkpoint and stops; a second one stops at once.
    """

    def __init__(self, checkpoint: Path, training: Batches, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.training = training
        self.device = device
        self.asked = False
        self.previous: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Generators and data position; the engine keeps the latter in the middle of an epoch alone."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"torch_rng": torch.get_rng_state(), "cuda_rng": cuda, "training": self.training.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        torch.set_rng_state(state_dict["torch_rng"].cpu())
        if self.device.type == "cuda" and state_dict["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state_dict["cuda_rng"].cpu(), self.device)
        self.training.load_state_dict(state_dict["training"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signal (only the main thread may)."""
        try:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        except ValueError:
            self.previous = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop between two steps, where weights, optimiser and data position agree."""
        if on_any(self.asked):
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


class Checkpoint(ModelCheckpoint):
    """One file: of the newest weights, or of those that a monitored metric finds best; the run folder may be moved between sessions."""

    def __init__(self, path: Path, best_of: str | None = None) -> None:
        self.path = path
        on_epoch_end = None if best_of is None else False
        super().__init__(
            path.parent,
            path.stem,
            best_of,
            mode="max",
            save_on_train_epoch_end=on_epoch_end,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score over, with the paths of today."""
        here = str(self.path)
        scores = {here: state_dict["best_model_score"]} if state_dict["best_k_models"] else {}
        paths = {"dirpath": self.dirpath, "best_model_path": here, "kth_best_model_path": here, "best_k_models": scores}
        super().load_state_dict(state_dict | paths)


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints are written aside and renamed: a name never points at half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write, then rename."""
        aside = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, aside, storage_options)
        os.replace(aside, path)
