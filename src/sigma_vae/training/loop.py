"""``fit``: train a VAE on data, from the first line to the last."""

import math
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, repeat
from operator import index
from pathlib import Path
from types import FrameType
from typing import Any, final

import numpy as np
import torch

from sigma_vae import models
from sigma_vae.config import LoggerName, TrainingConfig
from sigma_vae.data import Batches, Splits, as_splits
from sigma_vae.data.splits import SplitName
from sigma_vae.networks.principal import sample_of
from sigma_vae.progress import hidden
from sigma_vae.registry import needed_by
from sigma_vae.training.callbacks import Callback, Context, Patience, TrainingLogger, make_loggers, progress_of, rows_before
from sigma_vae.training.checkpoints import Checkpoints, exclusive, newest, read_checkpoint, step_of
from sigma_vae.training.distributed import (
    check_processes,
    each_on_any,
    first_of_node_first,
    from_first,
    global_statistics,
    joined,
    noise_states,
    on_any,
    own_device,
    processes,
    set_noise,
    shared,
    to_be_trained,
)
from sigma_vae.training.hardware import Choices, applied, choices_for
from sigma_vae.training.objective import (
    REMEDY,
    NonFiniteLossError,
    check_weights,
    keep_broken_step,
    validated_total,
    with_saved_step,
)
from sigma_vae.training.step import Stepper, Validation, augmented, check_augmentation, endless_skipping
from sigma_vae.types import Batch, Observes
from sigma_vae.vae import VAE, in_eval_mode, keyed_noise

CALIBRATION_VALUES = 2**20
"""Values in the refit before a validation, and in that on training data: a second's work, whatever the data."""
START_VALUES = 2**22
"""Values in a batch from which the start is solved, in float64."""
SOLVED = "principal"
"""A start at the best linear VAE, in words."""
NOT_FOR_DIFFUSERS = " (an AutoencoderKL has no layers for it: to export one, train with --start random)"
BATCH_VALUES = 2**17
"""Values in a batch where nothing is trained: enough to keep the cores busy, few enough to stay in the cache."""


@final
@dataclass(frozen=True)
class FitResult:
    """The outcome of :func:`fit`.

    Args:
        steps: number of optimiser steps, those before a resumption included.
        history: the metrics of each validation, with ``step`` (the last one before it, from 0) and ``epoch``. A start
            that is solved is validated too, as step −1, where the loss is the negative ELBO.
        best_step: step of the weights that the model has now, −1 for the start; None where there was no validation.
        best_score: their validation ELBO (or objective), in nats.
        folder: run folder with metrics and checkpoints; None where nothing is kept.
        skipped_steps: number of steps that were skipped, of ``skip_gradient_norm``.
        training_sigma: refitted σ (or factor on predicted σ) on some training data, for density and level. The model has
            that of validation data; if it is much larger, the model overfits.
    """

    steps: int
    history: tuple[Mapping[str, float], ...]
    best_step: int | None
    best_score: float | None
    folder: Path | None
    skipped_steps: int = 0
    training_sigma: Mapping[Observes, float] = field(default_factory=dict)


class Terminated(SystemExit):
    """SIGTERM came, as clusters send it before a job's end; a checkpoint of the finished step was written."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@needed_by("fit")
def fit(
    vae: VAE,
    data: object,
    config: TrainingConfig = TrainingConfig(),  # noqa: B008 (frozen)
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerName | TrainingLogger] | None = None,
    save: bool = True,
    condition: object = (),
) -> FitResult:
    """Train in place, take the weights with the best validation ELBO, and solve σ on the validation data.

    Where the network can, training starts at the best linear VAE of the training data (``config.start``). Residuals of
    training examples are too small where a model overfits, so σ, and the bound that chooses the weights, come from
    validation data. The model is left on the device that it was trained on, in eval mode.

    Processes started by ``torchrun`` train one model together: they share each step's batch (``batch_size`` examples in
    all), validation and calibration, and the first one writes the files. Call this with the same arguments on each.

    Args:
        vae: model to train.
        data: splits, or anything that :func:`sigma_vae.data.as_splits` reads; the test split is not used.
        config: training settings.
        out: folder for the model, ``metrics.csv``, TensorBoard events and ``checkpoints/``; without it nothing is kept.
            ``models.load(out)`` opens the model; a network or likelihood of your own is given to it
            (``models.load(out, network=mine)``), unless it was made by its registered name.
        seed: seed of the data's order and of the noise. The weights were drawn when ``vae`` was made.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        resume: continue exactly from the newest undamaged checkpoint in ``out/checkpoints``.
        progress: show a progress bar, or where output is redirected a line a minute.
        callbacks: hooks; see :class:`Callback`.
        loggers: ``csv``, ``tensorboard``, ``wandb``, ``mlflow`` (these write where ``out`` is given), or loggers of
            Lightning Fabric or pytorch-lightning. Default: ``config.logger``.
        save: write the model into ``out/model``.
        condition: labels and covariates of the data, as :func:`sigma_vae.data.as_splits` takes them.

    Raises:
        ValueError: the device does not exist; there is nothing undamaged to resume, or more epochs are over than
            ``config`` has; ``out`` has checkpoints although ``resume`` is off, or another process writes there; the
            network reads clips and the data have none, or the other way round; the model cannot be saved.
        NonFiniteLossError: the loss is NaN or infinite; the error names step, term, σ and the batch's range.
        KeyboardInterrupt: Ctrl-C, after the step was finished and a checkpoint written.
        Terminated: SIGTERM, likewise; if not caught, it ends the process with exit code 143.
        OSError: a file cannot be written (a full disk, say); those written before are whole.
    """
    where = resolve_device(device)
    with joined(where) as us, ExitStack() as stack:
        shown = [progress_of()] if progress and us.first else []  # now, as what it needs may not be installed
        with first_of_node_first():
            splits = as_splits(data, condition=condition)
        _check(vae, splits, config)
        seed_generators(seed)
        origin = vae.origin = models.Origin.of(vae, splits)
        models.check_savable(vae, origin if out is not None and save else None)
        folder = Path(out or from_first(lambda: stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        stack.enter_context(exclusive(folder / "checkpoints"))
        resumed = _resumed(folder / "checkpoints", resume=resume)
        vae.train()
        state = None if resumed is None else read_checkpoint(resumed)
        if state is None:
            start = _start(vae, splits, config)
        else:
            with _fitting(resumed):
                vae.load_state_dict(state["model"])  # which may have a linear path
            start = "resumed"
        check_augmentation(vae, splits, config)
        model = to_be_trained(vae, config)
        size = config.examples_per_step(splits.values_per_example)
        batches = splits.batches("train", size, shuffle=True, seed=seed, device=where, rank=us.rank, world_size=us.world_size)
        total_steps = _total_steps(config, len(batches), resumed)
        choices = choices_for(model, splits, config, where)
        if progress and us.first:
            not_theirs = start == SOLVED and vae.network.diffusers_config is not None
            print(f"{choices}; batches of {size}; start: {start}{NOT_FOR_DIFFUSERS if not_theirs else ''}")
        kept = None if out is None else folder
        named = config.logger if loggers is None else loggers
        context = Context(model, config, kept, total_steps, _loggers(named, kept, resumed) if us.first else [])
        checkpoints = Checkpoints(folder / "checkpoints", resumed)
        training = _Training(context, splits, batches, checkpoints, choices, where, [*callbacks, *shown], state)
        del state
        with applied(choices, model), global_statistics(model):
            training.run(judging_start=start == SOLVED and not config.weighted)
        if checkpoints.best.step is not None or model is not vae:
            vae.load_state_dict(checkpoints.newest_weights())
        vae.to(where).eval()
        training_sigma = _calibrated(vae, _sample(splits, "train", where))
        _calibrated(vae, _passing(splits, "validation", held_out_examples(config, splits, context.step), where))
        if kept is not None and save:
            from_first(lambda: models.save(kept / models.MODEL, vae, *origin))
        return training.result(kept, training_sigma)


@final
class _Training:
    """A training, from its first step (or the one that it is resumed at) to its last."""

    def __init__(
        self,
        context: Context,
        data: Splits,
        batches: Batches,
        checkpoints: Checkpoints,
        choices: Choices,
        where: torch.device,
        callbacks: Sequence[Callback],
        state: dict[str, Any] | None,
    ) -> None:
        self.context = context
        self.state = state
        self.vae, self.config = context.vae, context.config
        self.batches = batches
        self.checkpoints = checkpoints
        self.choices = choices
        self.where = where
        self.about = {"shape": list(data.shape), "scaling": asdict(data.scaling), "choices": asdict(choices)}
        if self.vae.network.conditions is not None:
            self.about["conditions"] = asdict(self.vae.network.conditions)
        self.part = _sample(data, "validation", where)
        self.trained_part = _sample(data, "train", where)
        interval = min(self.config.validation_interval(len(batches)), context.total_steps)
        held_out = _passing(data, "validation", held_out_examples(self.config, data, interval), where)
        self.validation = Validation(self.vae, held_out, batches.log_volume_nats)
        self.history: list[dict[str, float]] = []
        self.seconds_before = 0.0
        patience = self.config.patience
        early = [] if patience is None else [Patience(validated_total(self.vae), patience)]
        self.callbacks = [*early, *callbacks]
        self.after_steps = [c for c in self.callbacks if type(c).on_step is not Callback.on_step]

    def run(self, *, judging_start: bool) -> None:
        """Train, validate and write checkpoints until the last step, or until something ends it before."""
        self.vae.to(self.where)
        if self.where.type == "cuda":
            torch.cuda.set_device(self.where.index or 0)
        context = self.context
        self.stepper = Stepper(self.vae, self.config, self.choices, context.total_steps, self.batches.log_volume_nats)
        self._restore()
        status = "failed"
        with _Interrupts() as self.interrupts, self._keeping_broken_steps(), hidden():  # callbacks show the progress
            try:
                for callback in self.callbacks:
                    callback.on_fit_start(context)
                if judging_start:  # training on few data may never find better weights
                    self._validate()
                self._steps()
                if 0 < self.stepper.skipped_steps == context.step:
                    raise endless_skipping(f"the {context.step} steps of this training", self.config)
                status = "success"
            finally:
                for callback in self.callbacks:
                    callback.on_fit_end(context)
                for logger in context.loggers:
                    logger.finalize(status)
        self.interrupts.check()

    def result(self, kept: Path | None, training_sigma: Mapping[Observes, float]) -> FitResult:
        """The outcome, after the last step."""
        best, skipped = self.checkpoints.best, self.stepper.skipped_steps
        return FitResult(self.context.step, tuple(self.history), best.step, best.score, kept, skipped, training_sigma)

    def _steps(self) -> None:
        self.began = self.written = time.monotonic()
        context, batches = self.context, chain.from_iterable(repeat(self.batches))
        context.stopping = on_any(context.stopping or self._time_is_over())
        while context.step < context.total_steps and not context.stopping:
            for batch in islice(batches, self._steps_until_look()):
                self._step(batch)
            self.stepper.check()
            self._look()

    def _steps_until_look(self) -> int:
        """Steps before the next look at clock, interrupts and whether a validation is due."""
        every, step = self.config.validation_interval(len(self.batches)), self.context.step
        return min(self.choices.steps_per_call, every - step % every, self.context.total_steps - step)

    def _step(self, batch: Batch) -> None:
        context = self.context
        row = self.stepper.step(augmented(batch, self.config, self.batches.seed, context.step), context.step)
        context.step += 1
        if row is not None:
            context.epoch = self._epoch()
            context.log(row)
        for callback in self.after_steps:
            callback.on_step(context)

    def _epoch(self) -> int:
        """The epoch of the newest step."""
        state = self.batches.state_dict()
        return state["epoch"] - (state["position"] == 0)

    def _look(self) -> None:
        """Validate and write a checkpoint where they are due or an interrupt came, and stop after an interrupt."""
        context = self.context
        old = time.monotonic() - self.written >= 60 * self.config.checkpoint_minutes
        stopping = context.stopping or self._time_is_over()
        context.stopping, asked, old = each_on_any(stopping, self.interrupts.asked is not None, old)
        if self._validation_is_due():
            self._validate()
        elif not (asked or old):
            return
        self._write_checkpoint()
        self.interrupts.check()

    def _validation_is_due(self) -> bool:
        """The last step is always followed by a validation: its weights have their chance to be the best."""
        context = self.context
        return context.stopping or context.step >= context.total_steps or self._interval_is_over()

    def _interval_is_over(self) -> bool:
        return self.context.step % self.config.validation_interval(len(self.batches)) == 0

    def _validate(self) -> None:
        """Refit the scales on a fixed part of the validation data, measure the bound, and keep the best weights."""
        context, average = self.context, self.stepper.average
        context.epoch = self._epoch()
        with average.in_place_of(self.vae) if average else nullcontext():
            try:
                ratio = self._refit()
            except ValueError as error:  # the same data trained before, so it is the weights that have become useless
                raise NonFiniteLossError(f"after step {context.step - 1}: {error}. {REMEDY}") from error
            with in_eval_mode(self.vae):
                found = self.validation.measure(context.step)
            row = found | {"epoch": context.epoch}
            context.log(row)
            self.history.append({"step": context.step - 1, **row})
            for callback in self.callbacks:
                callback.on_validation(context)
        if self._interval_is_over():  # a validation at the end of training must not tell a resumed one from a longer one
            self.vae.likelihood.widen(ratio)
        score = found[validated_total(self.vae)]
        self.checkpoints.best.offer(score, context.step - 1, self.stepper.weights)

    def _refit(self) -> float:
        """Solve σ on part of the validation data; return how many times that of training data it is, where training asks."""
        likelihood = self.vae.likelihood
        if likelihood.has_post_hoc:  # the bound is that of the likelihood's own σ
            return 1.0
        asked = self.config.sigma_from == "held-out" and likelihood.has_scale
        training = _calibrated(self.vae, self.trained_part, only_observed=True) if asked else {}
        held_out = _calibrated(self.vae, self.part)
        return held_out[likelihood.observes] / training[likelihood.observes] if asked else 1.0

    def _write_checkpoint(self) -> None:
        """Write the state after a finished step, from which a run goes on."""
        if on_any(not all(bool(torch.isfinite(p).all()) for p in self.stepper.parameters)):
            raise NonFiniteLossError(f"after step {self.context.step - 1} weights are not finite. {REMEDY}")
        for logger in self.context.loggers:  # rows are on the disk before the state that comes after them
            logger.save()
        state = self.stepper.state_dict() | {
            "step": self.context.step,
            "data": dict(self.batches.state_dict()),
            "noise": noise_states(self.where),
            "seconds": self._seconds(),
            "history": self.history,
            "callbacks": {name: callback.state_dict() for name, callback in self._named_callbacks().items()},
        }
        self.checkpoints.write(state)
        self.written = time.monotonic()

    def _restore(self) -> None:
        """Take back the state of the checkpoint that training is resumed from, the noise last."""
        state, self.state = self.state, None
        if state is None:
            return set_noise(None, self.batches.seed, 0, self.where)
        with _fitting(self.checkpoints.resumed):
            self._take(state)

    def _take(self, state: dict[str, Any]) -> None:
        self.stepper.load_state_dict(state)
        self.batches.load_state_dict(state["data"])
        self.checkpoints.best.load_state_dict(state["best"])
        self.history, self.seconds_before = [dict(row) for row in state["history"]], math.fsum([state["seconds"]])
        self.context.step = index(state["step"])
        self.context.epoch = self._epoch()
        for name, callback in self._named_callbacks().items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        set_noise(state["noise"], self.batches.seed, state["step"], self.where)

    @contextmanager
    def _keeping_broken_steps(self) -> Iterator[None]:
        """Keep the step whose loss is not finite, and say in the error where it is."""
        try:
            yield
        except NonFiniteLossError as error:
            folder = self.context.folder
            if folder is None:
                raise
            about = self.about | {"diagnosis": str(error)}
            problem = keep_broken_step(folder, self.vae, error.suspect or self.stepper.suspect, about)
            step = self.context.step if error.suspect is None else error.suspect.step
            raise with_saved_step(error, folder, step, problem) from error

    def _seconds(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self.seconds_before + time.monotonic() - self.began

    def _time_is_over(self) -> bool:
        minutes = self.config.max_minutes
        return minutes is not None and self._seconds() >= 60 * minutes

    def _named_callbacks(self) -> dict[str, Callback]:
        """Callbacks by the names of their states in a checkpoint: the class, and a number within the class."""
        found: dict[str, Callback] = {}
        for callback in self.callbacks:
            same = sum(type(other) is type(callback) for other in found.values())
            found[f"{type(callback).__qualname__} {same}"] = callback
        return found


@contextmanager
def _fitting(path: Path | None) -> Iterator[None]:
    """Name the checkpoint in the error of a state that does not fit the model or the training."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the weights of this model, and of this training: has its config.yaml changed? {error}"
        ) from error


@final
class _Interrupts:
    """Turns the first Ctrl-C, and SIGTERM, into a request to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:  # only the main thread may
                break
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def check(self) -> None:
        """Stop all processes if one of them got a signal.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        asked, by_ctrl_c = each_on_any(self.asked is not None, self.asked == signal.SIGINT)
        if asked:
            raise KeyboardInterrupt if by_ctrl_c else Terminated

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number


def resolve_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is a GPU where there is one.

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


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _check(vae: VAE, data: Splits, config: TrainingConfig) -> None:
    """Refuse a model that cannot be trained in this way, or on these data."""
    check_processes(vae)
    check_weights(vae, config)
    _check_clips(vae, data)
    _check_conditions(vae, data)


def _check_clips(vae: VAE, data: Splits) -> None:
    if vae.network.reads_clips != data.clips:
        have, reads = ("clips", "clips") if data.clips else ("no clips", "single examples")
        raise ValueError(f"{data.name} has {have} and needs a network that reads {reads}, got {type(vae.network).__name__}")


def _check_conditions(vae: VAE, data: Splits) -> None:
    reads = vae.network.conditions
    if (reads is None) != (data.conditions is None) or (reads is not None and not reads.means_the_same(data.conditions)):
        has, wanted = (
            "no condition" if each is None else f"the condition {', '.join(each.names)}" for each in (data.conditions, reads)
        )
        raise ValueError(
            f"{data.name} has {has}, and the network reads {wanted}, perhaps with other classes; make the network with"
            " conditions=data.conditions"
        )


def _total_steps(config: TrainingConfig, steps_per_epoch: int, resumed: Path | None) -> int:
    if resumed is not None and config.epochs is not None and step_of(resumed) > config.epochs * steps_per_epoch:
        raise ValueError(f"{resumed} cannot be resumed up to {config.epochs} epochs, it has more of them behind it")
    return config.total_steps(steps_per_epoch)


def _resumed(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any; half-written files of a killed run are removed."""
    last = folder / "last.ckpt"
    found = newest(folder) if resume or not last.exists() else last
    if resume and found is None:
        raise ValueError(f"{last} does not exist: there is nothing to resume; train anew into another folder")
    if found is not None and not resume:
        raise ValueError(f"{folder} has checkpoints of another training; resume it, or train into another folder")
    for half in folder.glob("*.part"):
        half.unlink(missing_ok=True)  # another process may have done it
    return found


def _loggers(wanted: Sequence[LoggerName | TrainingLogger], folder: Path | None, resumed: Path | None) -> list[TrainingLogger]:
    """Make the loggers given by name, if there is a folder; a resumed run keeps the rows of the steps before it."""
    names = [logger for logger in wanted if isinstance(logger, str)]
    given = [logger for logger in wanted if not isinstance(logger, str)]
    if folder is None:
        return given
    kept = [] if resumed is None else rows_before(folder / "metrics.csv", step_of(resumed))
    return [*make_loggers(names, folder, kept), *given]


def _start(vae: VAE, data: Splits, config: TrainingConfig) -> str:
    """Start the network, start a learned σ at the spread of what it leaves, and solve the stored scales a first time."""
    limit = min(_calibrated_examples(data), len(data.train))
    first = next(iter(data.batches("train", _passing_batch(data), limit=limit)))  # the same on every process
    std = float(first.x.std())
    vae.likelihood.set_floor(config.scale_floor, std)
    residual_std, start = _start_network(vae, data, config, first)
    if config.scale_start == "data":
        vae.likelihood.start(std if residual_std is None else residual_std)
    first = first.to(vae.device)
    if residual_std is None:
        vae.calibrate([first])
    with torch.no_grad():  # averaged weights need every buffer in its final shape, a running scale's too
        vae.elbo(first.x, noise=keyed_noise(first.positions), condition=first.condition)
    return start


def _start_network(vae: VAE, data: Splits, config: TrainingConfig, first: Batch) -> tuple[float | None, str]:
    """Start at the best linear VAE where that is asked for and possible, with σ solved on these examples.

    Returns:
        The residuals' std, None where the start is random; and the start in words.
    """
    conditional = vae.network.conditions is not None  # a linear VAE of all classes keeps the class in its latents
    takes_it = vae.network.has_start and vae.network.starts_solved and not conditional
    if config.start == "random" or (config.start == "auto" and not takes_it):
        return None, "random"
    chosen = sample_of(len(data.train), data.shape)
    size = min(256, max(START_VALUES // math.prod(data.shape), 1))
    sample = Batches(data.train.select(chosen), data.scaling, size)

    before = {name: value.clone() for name, value in vae.state_dict().items()}

    def solved() -> tuple[float | None, dict[str, torch.Tensor], str | None]:
        try:
            return vae.start_from(sample), vae.state_dict(), None
        except ValueError as error:
            return None, before, str(error)  # a value, as every process has to know

    residual_std, weights, problem = from_first(solved)
    vae.load_state_dict(weights)
    try:
        vae.calibrate([first.to(vae.device)])  # which fails where values are too large for their squares
    except ValueError as error:
        vae.load_state_dict(before)
        problem = problem or str(error)
    if problem is not None and config.start == "principal":
        raise ValueError(problem)
    if problem is not None:
        return None, f"random, as {problem}"
    return residual_std, "random, as the data have no variance" if residual_std is None else SOLVED


def _calibrated(vae: VAE, batches: Batches, *, only_observed: bool = False) -> dict[Observes, float]:
    """Solve σ on these data; the geometric mean for each of its uses."""
    vae.calibrate(batches, only_observed=only_observed)
    return {name: float(value.mean().exp()) for name, value in vae.likelihood.refitted_log_scales().items()}


def _calibrated_examples(data: Splits) -> int:
    """Number of examples in a quick refit."""
    return max(CALIBRATION_VALUES // data.values_per_example, 2, processes().world_size)


def held_out_examples(config: TrainingConfig, data: Splits, steps: int) -> int:
    """Most examples that may be looked at beside so many steps: an eighth of those that these train on, or a quick look's.

    Validation, calibration and evaluation go over them about six times, each at a third to a half of a step's cost:
    altogether half as much as the training, at most.
    """
    return max(_calibrated_examples(data), steps * config.examples_per_step(data.values_per_example) // 8)


def _sample(data: Splits, split: SplitName, where: torch.device | str = "cpu") -> Batches:
    """This process's share of some examples of a split: a quick look."""
    return _passing(data, split, _calibrated_examples(data), where)


def _passing(data: Splits, split: SplitName, count: int, where: torch.device | str) -> Batches:
    """This process's share of at most so many examples of a split, where nothing is trained."""
    return shared(data.sampled(split, count), split, _passing_batch(data), where)


def _passing_batch(data: Splits) -> int:
    """Examples in a batch where nothing is trained."""
    return max(1, max(128, BATCH_VALUES // math.prod(data.shape)) // (data.frames or 1))
