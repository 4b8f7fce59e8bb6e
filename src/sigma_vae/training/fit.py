"""``fit``: train a VAE on data, calibrated at the end."""

import gc
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Batches, Splits
from sigma_vae.likelihoods import Shared
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import SequenceNetwork
from sigma_vae.training.bar import Bar
from sigma_vae.training.callbacks import AveragedWeights, CalibrateBeforeValidation, ValidationRow
from sigma_vae.training.calls import Calls
from sigma_vae.training.checkpoints import BestCheckpoint, SealedCheckpoints, newest, read_sealed, step_of
from sigma_vae.training.distributed import (
    from_first,
    global_statistics,
    joined,
    on_any,
    own_device,
    processes,
    shared,
    to_be_trained,
)
from sigma_vae.training.folder import check_name, exclusive
from sigma_vae.training.hardware import applied, choices_for
from sigma_vae.training.metrics import Events, MetricsTable, rows_before
from sigma_vae.training.module import NonFiniteLossError, TrainingModule
from sigma_vae.training.nonfinite import KeepsBrokenStep
from sigma_vae.training.objective import validated_total
from sigma_vae.training.resuming import Patience, Resumable, Terminated, ValidateAtEnd
from sigma_vae.training.together import OwnNoise, check_processes, environment, strategy
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

    Started by ``torchrun``, the processes train one model: each step's batch, validation and calibration are shared out, ``batch_size``
    counts the examples of all, and the first process writes the files. Every process must call this with the same arguments.

    Args:
        vae: the model.
        data: its splits; test is not touched.
        config: how to train.
        out: folder for ``metrics.csv``, TensorBoard events and ``checkpoints/``; nothing is kept unless given.
        seed: of the order of the data and the noise (that of the weights was decided when ``vae`` was made).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        resume: go on exactly where the newest whole checkpoint in ``out/checkpoints`` stands.
        progress: show a bar.

    Raises:
        ValueError: the device does not exist, there is nothing (or nothing whole) to resume, more epochs are over than ``config`` has,
            ``out`` has checkpoints that are not to be resumed or ``::`` in its name, or another process writes there; the network is not
            for clips and the data are, or the other way round.
        NonFiniteLossError: with step, term, σ and the batch's range; checkpoints stay.
        KeyboardInterrupt: after Ctrl-C, when the step was finished and a checkpoint written.
        Terminated: after SIGTERM, likewise; not caught, it ends the process with the exit code 143.
        OSError: a file cannot be written, for lack of room say; those written before are whole.
    """
    with joined(resolve_device(device)):
        _fit(vae, data, config, out, seed, resolve_device(device), resume=resume, progress=progress)
    gc.collect()  # the engine's objects refer to each other, and to weights, gradients and moments: many fits in one process would pile up


def _fit(
    vae: VAE,
    data: Splits,
    config: TrainingConfig,
    out: Path | None,
    seed: int,
    where: torch.device,
    *,
    resume: bool,
    progress: bool,
) -> None:
    check_processes(vae)
    check_name(out)
    _check_clips(vae, data)
    pl.seed_everything(seed, workers=True, verbose=False)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        folder = (out or Path(from_first(lambda: stack.enter_context(tempfile.TemporaryDirectory())))).absolute()
        last = folder / "checkpoints" / "last.ckpt"
        stack.enter_context(exclusive(last.parent))
        resumed = _resumed(last, resume=resume)
        vae.train()
        if not resume:
            _start(vae, data, config)
        model = to_be_trained(vae, config)
        us, choices = processes(), choices_for(model, data, config, where)
        training = data.batches(
            "train", config.batch_size, shuffle=True, seed=seed, device=where, rank=us.rank, world_size=us.world_size
        )
        if resumed is not None and step_of(resumed) > config.epochs * len(training):
            raise ValueError(f"{resumed} cannot be resumed up to {config.epochs} epochs, it has more of them behind it")
        loggers = [] if out is None or not us.first else _loggers(folder, resumed)
        validation = shared(data, "validation", _passing_batch(data), where)
        calls = Calls(training, choices.steps_per_call)
        module = TrainingModule(model, config, choices, calls, training.log_volume_nats)
        best = BestCheckpoint(last.with_name("best.ckpt"), validated_total(vae))
        kept = KeepsBrokenStep(folder, {"shape": list(data.shape), "scaling": asdict(data.scaling)})
        resumable = Resumable(last, training, config.checkpoint_minutes)
        part = shared(data, "train", _passing_batch(data), where, _part(data))
        between = _between(model, config, part)
        callbacks = [kept, *between, best, OwnNoise(seed, where), resumable]  # resumable after the best, which it refers to
        if progress and us.first:
            print(choices)
            callbacks.append(Bar(config.epochs, module.total_steps))
        trainer = _trainer(config, folder, where, loggers, callbacks, SealedCheckpoints(resumed))
        with _ends_as_ours(module, None if out is None else kept), applied(choices, model), global_statistics(model):
            trainer.fit(module, calls, validation, ckpt_path=resumed, weights_only=True)
        if on_any(resumable.asked is not None):  # when nothing was left but to come here
            resumable.stop()
        if best.best_model_score is not None or model is not vae:
            _load_weights(vae, last if best.best_model_score is None else best.path)
        vae.to(where).eval().calibrate(shared(data, "train", _passing_batch(data), where))


@contextmanager
def _ends_as_ours(module: TrainingModule, kept: KeepsBrokenStep | None) -> Iterator[None]:
    """Of a loss that is not finite tell what was kept of it; let a Ctrl-C be one, which the engine makes an exit of."""
    try:
        yield
    except Terminated:
        raise
    except NonFiniteLossError as error:
        raise (error if kept is None else kept.told(error, module.newest_step)) from error
    except SystemExit as stop:
        raise KeyboardInterrupt from stop


def _between(model: VAE, config: TrainingConfig, part: Batches) -> list[pl.Callback]:
    """What happens between steps and validations."""
    callbacks: list[pl.Callback] = []
    if config.ema_decay:
        callbacks.append(AveragedWeights(decay=config.ema_decay))
    callbacks.append(CalibrateBeforeValidation(model, part))  # after the averaged weights have been put in place
    callbacks.append(ValidationRow())
    if config.patience:
        callbacks.append(Patience(validated_total(model), config.patience))
    return [*callbacks, ValidateAtEnd()]


def resolve_device(device: str) -> torch.device:
    """The device that a word means: ``auto`` is a GPU where there is one.

    Raises:
        ValueError: the device is unknown or not there.
    """
    kind, _, number = device.partition(":")
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    have = [name for name, is_there in there.items() if is_there]
    if device == "auto":
        return own_device(torch.device(have[-1]))
    if kind not in there or (number and (kind != "cuda" or not number.isdigit())):
        raise ValueError(f"device is one of auto, cpu, cuda, cuda:N; got {device!r}")
    if not there[kind] or (number and int(number) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r} is not on this machine; there are: {', '.join(have)}")
    return own_device(torch.device(device))


def _check_clips(vae: VAE, data: Splits) -> None:
    if isinstance(vae.network, SequenceNetwork) != data.clips:
        have, need = ("clips", "a SequenceNetwork") if data.clips else ("no clips", "any other network")
        raise ValueError(f"{data.name} has {have} and needs {need}, got {type(vae.network).__name__}")


def _start(vae: VAE, data: Splits, config: TrainingConfig) -> None:
    """Give every scale a sane first value: a learned σ the data's spread, and the stored ones a first fit."""
    likelihood = vae.likelihood
    first = next(iter(data.batches("train", _passing_batch(data), limit=_part(data))))  # the same on every process
    if config.scale_start == "data" and isinstance(likelihood, LocationScale) and isinstance(likelihood.scale, Shared):
        likelihood.scale.start(float(first.x.std()))
    x = first.x.to(next(vae.parameters()).device)
    vae.calibrate([x])
    with torch.no_grad():  # a scale that remembers its batches remembers one: averaged weights need every buffer in its shape
        vae.elbo(x, noise=keyed_noise(first.positions))


def _part(data: Splits) -> int:
    """How many training examples scales are refitted on before a validation."""
    least = max(2, processes().world_size)
    return min(max(CALIBRATION_VALUES // (math.prod(data.shape) * (data.frames or 1)), least), len(data.train))


def _trainer(
    config: TrainingConfig,
    folder: Path,
    device: torch.device,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
    checkpoints: SealedCheckpoints,
) -> pl.Trainer:
    steps, us = config.validate_every, processes()
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=us.per_node if us.world_size > 1 else 1 if device.index is None else [device.index],
        num_nodes=us.world_size // us.per_node,
        strategy=strategy(config),
        max_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        max_time=None if config.max_minutes is None else timedelta(minutes=config.max_minutes),
        val_check_interval=steps,
        check_val_every_n_epoch=None if steps else 1,
        logger=loggers,
        log_every_n_steps=1,  # of what reaches the bar; the module itself logs every `log_every` steps
        callbacks=callbacks,
        plugins=[checkpoints, *environment()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,  # the refit before a validation differentiates
        default_root_dir=folder,
    )


def _passing_batch(data: Splits) -> int:
    return max(1, max(128, BATCH_VALUES // math.prod(data.shape)) // (data.frames or 1))


def _resumed(last: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; what a killed run left half written goes."""
    found = newest(last.parent) if resume or not last.exists() else last
    if resume and found is None:
        raise ValueError(f"{last} does not exist: there is nothing to resume; train anew into another folder")
    if found is not None and not resume:
        raise ValueError(f"{last.parent} has checkpoints of another training; resume it, or train into another folder")
    for half in last.parent.glob("*.part"):
        half.unlink(missing_ok=True)  # another process may have done it
    return found


def _loggers(folder: Path, resumed: Path | None) -> list[Logger]:
    """CSV and TensorBoard; a resumed run keeps the rows up to the step it resumes from."""
    table = folder / "metrics.csv"
    kept = [] if resumed is None else rows_before(table, step_of(resumed))
    return [MetricsTable(table, kept), Events(folder, kept)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the engine's advice on choices that are ours; errors and other warnings pass."""
    engine = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in engine]
    with warnings.catch_warnings():
        for logger in engine:
            logger.setLevel(logging.WARNING)
        for message in (
            r".*does not have many workers",
            r".*recommended to use `self.log",
            r".*[Cc]heckpoint directory .* exists",
            r".*LeafSpec",
            r"The `srun` command is available",
            r"You.re using the WeightAveraging callback with a model that overrides",  # not where weights are shared out
            r"FSDP2-wrapped module .* returned a view",  # which nothing changes
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(engine, levels, strict=True):
                logger.setLevel(level)


def _load_weights(vae: VAE, checkpoint: Path) -> None:
    state = from_first(lambda: read_sealed(checkpoint)["state_dict"])
    vae.load_state_dict({name.removeprefix("vae."): value for name, value in state.items()})
