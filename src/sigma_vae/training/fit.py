"""``fit``: train a VAE on data, calibrated at the end."""

import csv
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Batches, Splits
from sigma_vae.likelihoods import Shared
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import SequenceNetwork
from sigma_vae.training.bar import Bar
from sigma_vae.training.callbacks import AtomicCheckpoints, AveragedWeights, CalibrateBeforeValidation, Checkpoint, Resumable
from sigma_vae.training.calls import Calls
from sigma_vae.training.hardware import applied, choices_for
from sigma_vae.training.module import TrainingModule, validated_total
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["fit", "resolve_device"]

CALIBRATION_VALUES = 2**18
"""Numbers that the refit before a validation looks at: a fraction of a second's work, whatever the data."""
BATCH_VALUES = 2**17
"""Numbers in a batch where nothing is trained: enough to keep the cores busy, few enough to stay in the cache."""


def fit(
    vae: VAE,
    data: Splits,
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    *,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train in place, take the weights with the best validation ELBO, and calibrate them on the training data.

    The model is left on the device that it was trained on, in eval mode.

    Args:
        vae: the model.
        data: its splits; test is not touched.
        config: how to train.
        out: folder for ``metrics.csv``, TensorBoard events and ``checkpoints/``; nothing is kept unless given.
        seed: of the order of the data and the noise (that of the weights was decided when ``vae`` was made).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        resume: go on exactly where ``out/checkpoints/last.ckpt`` stands.
        progress: show a bar.

    Raises:
        ValueError: the device does not exist, there is nothing to resume, or more epochs are over than ``config`` has,
            or the network is not for clips and the data are, or the other way round.
        NonFiniteLossError: with step, term, σ and the batch's range; checkpoints stay.
        KeyboardInterrupt: after Ctrl-C, when the step was finished and a checkpoint written.
    """
    where = resolve_device(device)
    if isinstance(vae.network, SequenceNetwork) != data.clips:
        have, need = ("clips", "a SequenceNetwork") if data.clips else ("no clips", "any other network")
        raise ValueError(f"{data.name} has {have} and needs {need}, got {type(vae.network).__name__}")
    pl.seed_everything(seed, workers=True, verbose=False)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        last = folder / "checkpoints" / "last.ckpt"
        if resume and not last.exists():
            raise ValueError(f"{last} does not exist: there is nothing to resume; train anew into another folder")
        vae.train()
        if not resume:
            _start(vae, data, config)
        loggers = [] if out is None else _loggers(folder, last if resume else None)
        training = data.batches("train", config.batch_size, shuffle=True, seed=seed, device=where)
        validation = data.batches("validation", _passing_batch(data), device=where)
        calibration = CalibrateBeforeValidation(vae, _part(data, where))
        best = Checkpoint(last.with_name("best.ckpt"), best_of=validated_total(vae))
        callbacks = [
            *([AveragedWeights(decay=config.ema_decay)] if config.ema_decay else []),
            calibration,  # after the averaged weights have been put in place
            *([EarlyStopping(validated_total(vae), mode="max", patience=config.patience)] if config.patience else []),
            best,
            Checkpoint(last),
            Resumable(last, training, where),
        ]
        choices = choices_for(vae, data, config, where)
        calls = Calls(training, choices.steps_per_call)
        module = TrainingModule(vae, config, choices, calls, training.log_volume_nats)
        if progress:
            print(choices)
            callbacks.append(Bar(config.epochs, module.total_steps))
        trainer = _trainer(config, folder, where, loggers, callbacks)
        try:
            with applied(choices, vae):
                trainer.fit(module, calls, validation, ckpt_path=last if resume else None, weights_only=True)
        except SystemExit as stop:  # what the engine makes of a KeyboardInterrupt
            raise KeyboardInterrupt from stop
        except MisconfigurationException as error:
            raise ValueError(f"{last} cannot be resumed up to {config.epochs} epochs, it has more of them behind it") from error
        last_is_best = best.best_model_score is None
        if calibration.validated_at != trainer.global_step:
            last_is_best = _validate_last(trainer, module, validation, best)
            trainer.save_checkpoint(last)
        if not last_is_best:
            _load_weights(vae, best.path)
        vae.to(where).eval().calibrate(data.batches("train", _passing_batch(data), device=where))


def resolve_device(device: str) -> torch.device:
    """The device that a word means: ``auto`` is a GPU where there is one.

    Raises:
        ValueError: the device is unknown or not there.
    """
    kind, _, number = device.partition(":")
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    have = [name for name, is_there in there.items() if is_there]
    if device == "auto":
        return torch.device(have[-1])
    if kind not in there or (number and (kind != "cuda" or not number.isdigit())):
        raise ValueError(f"device is one of auto, cpu, cuda, cuda:N; got {device!r}")
    if not there[kind] or (number and int(number) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r} is not on this machine; there are: {', '.join(have)}")
    return torch.device(device)


def _start(vae: VAE, data: Splits, config: TrainingConfig) -> None:
    """Give every scale a sane first value: a learned σ the data's spread, and the stored ones a first fit."""
    likelihood = vae.likelihood
    first = next(iter(_part(data)))
    if config.scale_start == "data" and isinstance(likelihood, LocationScale) and isinstance(likelihood.scale, Shared):
        likelihood.scale.start(float(first.x.std()))
    x = first.x.to(next(vae.parameters()).device)
    vae.calibrate([x])
    with torch.no_grad():  # a scale that remembers its batches remembers one: averaged weights need every buffer in its shape
        vae.elbo(x, noise=keyed_noise(first.positions))


def _part(data: Splits, device: torch.device | str = "cpu") -> Batches:
    limit = max(CALIBRATION_VALUES // (math.prod(data.shape) * (data.frames or 1)), 2)
    return data.batches("train", _passing_batch(data), device=device, limit=min(limit, len(data.train)))


def _trainer(
    config: TrainingConfig,
    folder: Path,
    device: torch.device,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    steps = config.validate_every
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None else [device.index],
        max_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_time=None if config.max_minutes is None else timedelta(minutes=config.max_minutes),
        val_check_interval=steps,
        check_val_every_n_epoch=None if steps else 1,
        logger=loggers,
        log_every_n_steps=1,  # of what reaches the bar; the module itself logs every `log_every` steps
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,  # the refit before a validation differentiates
        default_root_dir=folder,
    )


def _passing_batch(data: Splits) -> int:
    return max(1, max(128, BATCH_VALUES // math.prod(data.shape)) // (data.frames or 1))


def _loggers(folder: Path, resumed_from: Path | None) -> list[Logger]:
    """CSV and TensorBoard; a resumed run keeps the rows up to the step it resumes from."""
    table = folder / "metrics.csv"
    kept: list[dict[str, Any]] = []
    if resumed_from is not None and table.exists():
        step = torch.load(resumed_from, map_location="cpu", weights_only=True)["global_step"]
        with table.open(newline="", encoding="utf-8") as file:
            rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
        kept = [row for row in rows if int(row["step"]) < step]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        writer = logger.experiment
    writer.metrics.extend(kept)
    writer.save()
    return [logger, TensorBoardLogger(folder, name="", version="tensorboard")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the engine's advice on choices that are ours; errors and other warnings pass."""
    engine = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in engine]
    with warnings.catch_warnings():
        for logger in engine:
            logger.setLevel(logging.WARNING)
        for message in (r".*does not have many workers", r".*[Cc]heckpoint directory .* exists", r".*LeafSpec"):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(engine, levels, strict=True):
                logger.setLevel(level)


def _validate_last(trainer: pl.Trainer, module: TrainingModule, validation: Batches, best: Checkpoint) -> bool:
    """Validate weights of a run that ended between two validations: whether they are the best."""
    score: float = trainer.validate(module, validation, verbose=False)[0][validated_total(module.vae)]
    return best.best_model_score is None or score > best.best_model_score.item()


def _load_weights(vae: VAE, checkpoint: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    vae.load_state_dict({name.removeprefix("vae."): value for name, value in state.items()})
