"""A run as frozen dataclasses, and their YAML files.

The docstring under each field is its help text on the command line.
"""

import math
import os
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from sigma_vae.registry import Names, register

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "LARGEST_COUNT",
    "ClipConfig",
    "DataConfig",
    "EvaluationSettings",
    "HardwareConfig",
    "ImageConfig",
    "Layout",
    "LoggerName",
    "ModelConfig",
    "RenamedWarning",
    "RunConfig",
    "TrainingConfig",
    "check_seed",
    "parse",
    "read",
    "read_text",
    "replacing",
    "write",
    "write_whole",
]

Layout = Literal["auto", "n-h-w", "n-h-w-c", "n-c-h-w", "n-c-t", "n-t", "n-c", "n-t-c-h-w", "n-t-h-w-c", "n-t-h-w"]
"""Axes of an array: n examples, c channels, h × w pixels, t times or frames."""
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
"""Where the metrics of a training are written."""

MOST_MINUTES = 1e9
"""Largest time limit of a training: two thousand years, which clocks can count."""


LARGEST = 1e30
"""Largest real number that an option takes: tensors can hold it."""
LARGEST_COUNT = 10**15
"""Largest whole number that an option takes: tensors can hold it."""


USUAL_EPOCHS, LEAST_STEPS, MOST_STEPS = 20, 4_000, 20_000
"""Length of a training whose epochs are not given: small data need many passes, and large data not many."""
USUAL_BATCH, LEAST_BATCH, VALUES_PER_STEP = 128, 8, 2**20
"""Examples in a step where their number is not given: fewer where they have more values than these, which take memory."""
EMA_DECAY = 0.999


class RenamedWarning(DeprecationWarning):
    """An option or a key has a new name, or one of its values has; the old one works for one minor version."""


class _Strict:
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def _require(self, least: float, words: str, *names: str) -> None:
        """Refuse fields that are given and below the least value, or so large that tensors cannot hold them."""
        for name in names:
            value = getattr(self, name)
            if value == "auto":
                continue
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {words}, got {value}")
            most = LARGEST_COUNT if isinstance(value, int) else LARGEST
            if value is not None and value > most:
                raise ValueError(f"{name} is at most {most:g}, got {value}")


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator does not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is a number from 0 to 2³² − 1, got {seed}")


@dataclass(frozen=True)
class ImageConfig(_Strict):
    """Crop, size and colours that make arrays of one shape of pictures."""

    crop: int | None = None
    """Side of the square cut from the centre, in pixels, before resizing."""
    size: int | None = None
    """Side of the square that pictures are resized to, in pixels; for moving-mnist, side of the canvas."""
    fit: Literal["refuse", "crop", "stretch", "pad"] = "refuse"
    """Pictures that are not square, or not of one size: refuse them, cut the largest central square, stretch, or pad
    with black."""
    colour: Literal["auto", "grey", "rgb", "rgba"] = "auto"
    """Colour channels; auto keeps those that all pictures have."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Broken files: refuse the data set, or skip them; they are listed and counted either way."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        self._require(1, "at least 1", "crop", "size")


@dataclass(frozen=True)
class ClipConfig(_Strict):
    """Lengths and steps that make clips of one length of videos."""

    frames: int | None = None
    """Frames per clip in training and validation, the given (context) frames included; default 16 (bair 12,
    moving-mnist 15). With this option, GIFs and folders of pictures are read as videos."""
    test_frames: int | None = None
    """Frames per clip in test; default as in training (bair and moving-mnist: 30 if neither option is given)."""
    frame_step: int = 1
    """Keep every k-th frame."""

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        self._require(1, "at least 1", "frames", "test_frames", "frame_step")


@dataclass(frozen=True)
class DataConfig(_Strict):
    """The data set and its splits."""

    source: Annotated[str, Names("Name of a data set, or path of a file or folder.", register.source)]
    """Name of a data set, or path of a file or folder."""
    root: str | None = None
    """Folder with the data set's original files."""
    cache: str | None = None
    """Folder for decoded copies of pictures and videos; default: beside the data."""
    levels: int | None = None
    """Number of values that a datum can take; default: from the data (256 for uint8)."""
    levels_from: Literal["values", "dtype"] = "values"
    """Find the number of levels by the values where they leave no doubt (two values, floats k/255), or by the dtype alone."""
    layout: Layout = "auto"
    """Axes of an array file: n examples, c channels, h rows, w columns, t times."""
    columns: tuple[str, ...] = ()
    """Columns of a table to model (default: all numeric ones), key of an HDF5 file, or image column of a hub data
    set."""
    exclude: tuple[str, ...] = ()
    """Columns of a table to leave out."""
    decimal: Literal["auto", ".", ","] = "auto"
    """Decimal sign of a table's numbers; auto: found where it is sure (1,100 is not)."""
    missing: tuple[str, ...] = ()
    """Words for missing values in a table ('?' -999). Rows with one, or with an empty cell, are dropped and counted; by
    default they are an error."""
    window: int | None = None
    """Number of rows in a window of a series whose times are the rows of a table: examples are windows, and training,
    validation and test follow each other in time."""
    stride: int = 1
    """Rows from the start of one window to the start of the next."""
    mixed: bool = False
    """Read a table's columns of all types, missing values included, as the likelihood mixed needs them, which sets this."""
    families: tuple[str, ...] = ()
    """Families of a table's columns for the likelihood mixed, in place of the inferred ones (age=student-t visits=poisson):
    gaussian, laplace, student-t, poisson, negative-binomial, bernoulli, categorical."""
    unknown: Literal["error", "other"] = "error"
    """Categories in new data that the likelihood mixed has not seen: an error, or the column's "other" category (missing,
    where it has none)."""
    standardise: Literal["auto", "yes", "no"] = "auto"
    """Scale real values to mean 0 and std 1, channel by channel; auto: yes for tables (CSV, Parquet), no for others.
    Log-likelihoods are reported in the data's original units."""
    counts: bool = False
    """Read values as counts 0, 1, 2, ..., as they are; a likelihood of counts in the same command implies it."""
    layer: str | None = None
    """Layer of an .h5ad file to read, in place of its matrix X."""
    condition: tuple[str, ...] = ()
    """Labels or covariates that the model is given, as age,sex: the name of a column (of a table, a hub data set, an NPZ or HDF5 file),
    or label: the class of a named data set, or the subfolder of a picture. Words and counted integers are classes, other
    numbers covariates; NAME:class and NAME:number decide."""
    stratify: bool = False
    """Hold out validation and test examples in proportion to the classes of the condition."""
    images: ImageConfig = field(default_factory=ImageConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    validation_fraction: float = 0.1
    """Share of the training examples held out for validation, if the data have no validation split."""
    test_fraction: float = 0.1
    """Share of the examples held out for test, if the data have no test split."""
    split_seed: int = 0
    """Seed that decides which examples are held out, and the content of generated data."""

    def __post_init__(self) -> None:
        """Take the conditions apart that are written as one word, ``age,sex``, and refuse numbers below 1."""
        names = tuple(name for each in self.condition for name in each.split(",") if name)
        object.__setattr__(self, "condition", names)
        self._require(1, "at least 1", "window", "stride")

    @property
    def path(self) -> Path:
        """The file or folder that ``source`` names, inside ``root`` if that is given.

        Raises:
            ValueError: the source is an absolute path, so that the root has no meaning.
        """
        source = Path(self.source).expanduser()
        if self.root and source.is_absolute():
            raise ValueError(f"root says nothing about the absolute path {source}, got {self.root!r}; leave it out")
        return Path(self.root or ".").expanduser() / source


@dataclass(frozen=True)
class ModelConfig(_Strict):
    """Network and likelihood, by name."""

    network: Annotated[
        str,
        Names(
            "Name of the network, or auto: residual for images and series (for colour pictures from 48 pixels on, spatial:f8c4 of width 8"
            " with the prior flow-matching), mlp for tables and small images, sequence for clips.",
            register.network,
        ),
    ] = "auto"
    """Name of the network."""
    likelihood: Annotated[
        str,
        Names(
            "Name of the likelihood: family/scale, or the family alone where it has no scale; auto: what `inspect` suggests for the data.",
            register.likelihood,
            register.scale,
        ),
    ] = "gaussian/optimal"
    """Name of the likelihood."""
    latent_dim: int | Literal["auto"] | None = None
    """Number of latents: 20 unless given (sequence: 10 per frame). Hierarchical networks: channels of each layer of
    latents, by default those of the network's size. auto: as many as make validation data likeliest under probabilistic
    PCA, up to 128."""
    width: int | None = None
    """Channels of the first layer (default: residual 16, conv and spatial 32, sequence 64), channels between blocks (hierarchical:
    by its size), or units of a hidden layer (mlp: 400)."""
    context_frames: int = 2
    """Number of given frames at the start of a clip; the likelihood covers the frames after them."""
    observes: Literal["density", "level"] = "density"
    """Train on the density of the values, or on the bin probabilities of their levels."""
    mean: Literal["auto", "unit", "identity"] = "auto"
    """Map from features to the mean: unit is a sigmoid onto [0, 1], identity leaves them; auto takes identity for
    standardised data, else unit."""
    prior: Annotated[
        str,
        Names(
            "Name of the prior that samples are drawn from. Training uses standard; another one is fitted to the latents after training,"
            " for networks with one layer of flat latents. auto: the best of them on validation data.",
            register.prior,
        ),
    ] = "auto"
    """Name of the prior."""

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        self._require(1, "at least 1", "latent_dim", "width", "context_frames")


class _TrueIsYes:
    """Lets a file say yes and no, which are true and false in YAML."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(_in_words, handler(source))


def _in_words(choice: Any) -> Any:
    """True and False as yes and no."""
    return {True: "yes", False: "no"}[choice] if isinstance(choice, bool) else choice


Switch = Annotated[Literal["auto", "yes", "no"], _TrueIsYes()]


@dataclass(frozen=True)
class HardwareConfig(_Strict):
    """Hardware settings; auto picks what benchmarks favour. Training starts by printing the choices."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network's convolutions and matrix products in training; weights, KL, likelihood and every
    evaluation are float32. auto: bfloat16 where the hardware has it, the network is large enough to gain, and it is
    known to do no harm."""
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Memory format of images in the network; auto: channels last where convolutions are wide and in bfloat16."""
    fused_optimiser: Switch = "auto"
    """Update all weights in one kernel; auto: yes."""
    allocator: Literal["auto", "default", "retain", "patient"] = "auto"
    """retain: the process keeps freed memory, instead of asking the kernel for it in each step (glibc; until the
    process ends). auto: retain where training is on the CPU. (patient is the old word for retain.)"""
    compile: Switch = "auto"
    """Compile the step (torch.compile). auto: on a CPU, for a Gaussian with one σ, where the network has dense layers alone
    and the training is long enough to win the compilation back; not with max_minutes, nor in several processes."""
    threads: int | None = None
    """CPU threads; unless given, torch's number, but no more than the container's share of the processors."""
    steps_per_call: int | None = None
    """Steps between two looks at clock, interrupts and losses on a GPU; unless given, as many as take a small part of a
    second. No result depends on it."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        self._require(1, "at least 1", "threads", "steps_per_call")
        for name in ("fused_optimiser", "compile"):
            object.__setattr__(self, name, _in_words(getattr(self, name)))  # compile=True was the way to ask for it
        if self.allocator == "patient":
            warnings.warn("allocator='patient' is called 'retain' now; write that", RenamedWarning, stacklevel=3)
            object.__setattr__(self, "allocator", "retain")


@dataclass(frozen=True)
class TrainingConfig(_Strict):
    """Settings of the training."""

    start: Literal["auto", "principal", "random"] = "auto"
    """Weights that training starts from: principal adds the best linear VAE (probabilistic PCA) to the network and learns
    what it leaves; random does not. auto: principal where the network has one layer of latents and no condition."""
    epochs: int | None = None
    """Passes over the training split. Unless given, 20, but at least 4000 steps and at most 20000."""
    max_steps: int | None = None
    """Stop after this many steps, if that is sooner."""
    max_minutes: float | None = None
    """Stop after this many minutes, if that is sooner."""
    batch_size: int | None = None
    """Examples per step, of all processes together: results mean the same on any number of them. Unless given, 128, and
    fewer, down to 8, where these have more than a million values: clips and large images take much memory."""
    random_crop: int | None = None
    """Train on a random square of this size of each image, or a piece of each series (networks whose latents are maps);
    evaluation is on whole examples."""
    flip: bool = False
    """Mirror half of the training images, left to right."""
    accumulate: int = 1
    """Number of gradient-accumulation micro-batches per step, to need less memory; an optimal σ is then that of each
    micro-batch."""
    shard_weights: bool = False
    """Shard weights, gradients and optimizer state across processes (FSDP), for hierarchical networks that are too
    large for one GPU."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate, reached after warm-up."""
    scale_learning_rate_factor: float = 10.0
    """Learning rate of a learned shared σ (or ν), as a multiple of the others': at 1 it lags its optimum threefold."""
    scale_start: Literal["data", "one"] = "data"
    """Start of a learned shared σ: the spread of the training data, or 1."""
    sigma_from: Literal["held-out", "batch"] = "held-out"
    """A solved σ in training: that of the batch, times how much larger validation residuals are than training residuals
    (held-out; measured at each validation), or that of the batch alone, as in the paper."""
    scale_floor: float | None = None
    """Least σ, in distances of two levels (1/64 unless given), or for real values in units of their standard deviation
    (1e-6). It tells only where values are predicted exactly."""
    kl_weight: float = 1.0
    """Weight of the KL in the training loss, on top of the calibrated σ (Beta-Sigma VAE); if it is not 1, the loss is
    no bound."""
    beta_nll: float = 0.0
    """Weight each value's log-likelihood by its predicted σ to the power 2β (β-NLL, 0.5 say): steadies per-pixel
    scales."""
    free_bits_nats: float = 0.0
    """Least KL that each layer counts with (free bits), so that no layer is switched off early; above 0 the loss is no
    bound."""
    kl_balancing_steps: int = 0
    """Number of first steps in which layers with more KL for each latent pay more for it (as in NVAE's warm-up); the
    loss is no bound then."""
    condition_dropout: float = 0.0
    """Share of training examples whose condition is hidden (classifier-free): the model then also has one for unknown
    conditions."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); at 0 the optimiser is Adam."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine to 0 over the epochs (or max_steps)."""
    gradient_clip_norm: float | None = None
    """Largest norm of a gradient; gradients are in nats, thousands of them for an image."""
    skip_gradient_norm: float | None = None
    """Skip a step whose gradient norm, before clipping, reaches this or is not finite: a rare one can undo a deep
    network."""
    ema_decay: float | Literal["auto"] | None = "auto"
    """Evaluate and export an exponential moving average of the weights with this decay, after a warm-up. None: the
    weights themselves. auto: 0.999, unless weights are sharded."""
    patience: int | None = 10
    """Stop when the validation ELBO has not risen for this many validations; None: never."""
    validate_every: int | None = None
    """Steps between validations. Unless given, once an epoch where epochs are given, else 100 to 1000 steps."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is also written with each validation."""
    log_every: int = 50
    """Steps between rows of the metrics."""
    logger: tuple[LoggerName, ...] = ("csv", "tensorboard")
    """Loggers that write the metrics: csv, tensorboard, wandb, mlflow; several at once. The last two need the package of
    that name."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        counts = ("epochs", "max_steps", "batch_size", "random_crop", "accumulate", "patience", "validate_every", "log_every")
        self._require(1, "at least 1", *counts)
        weights = ("learning_rate", "weight_decay", "free_bits_nats", "checkpoint_minutes")
        self._require(0, "at least 0", *weights, "warmup_steps", "kl_balancing_steps")
        limits = ("max_minutes", "gradient_clip_norm", "skip_gradient_norm", "scale_floor")
        self._require(1e-300, "above 0", *limits, "scale_learning_rate_factor")
        if self.max_minutes is not None and not self.max_minutes <= MOST_MINUTES:
            raise ValueError(
                f"max_minutes is at most {MOST_MINUTES:g}, got {self.max_minutes}; leave it out to train all epochs"
            )
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight multiplies the KL and is at least 0 (1: the ELBO), got {self.kl_weight}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(
                f"condition_dropout is a share of the examples, from 0 up to but not 1, got {self.condition_dropout}"
            )
        if not 0 <= self.beta_nll <= 1:
            raise ValueError(f"beta_nll is from 0 (the likelihood) to 1 (all errors weigh the same), got {self.beta_nll}")
        if isinstance(self.ema_decay, float | int) and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is the weight of the past, from 0 up to but not 1, got {self.ema_decay}")

    @property
    def decay(self) -> float | None:
        """Decay of the averaged weights; None where they are not averaged."""
        return self.ema_decay if self.ema_decay != "auto" else None if self.shard_weights else EMA_DECAY

    def examples_per_step(self, values_per_example: int) -> int:
        """Number of examples in a step: as given, or a power of two by their size.

        >>> [TrainingConfig().examples_per_step(values) for values in (784, 3 * 64 * 64, 15 * 64 * 64, 3 * 512 * 512)]
        [128, 64, 16, 8]
        """
        affordable = 1 << (VALUES_PER_STEP // values_per_example).bit_length() >> 1  # the power of two below
        return self.batch_size or min(max(affordable, LEAST_BATCH), USUAL_BATCH)

    @property
    def weighted(self) -> bool:
        """Whether the objective differs from the negative ELBO."""
        return self.kl_weight != 1 or self.beta_nll != 0 or self.free_bits_nats != 0 or self.kl_balancing_steps != 0

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of steps: of the epochs that are given, or by the size of the data; at most ``max_steps``.

        >>> [TrainingConfig().total_steps(steps) for steps in (2, 423, 10_000)]     # small, middle and large data
        [4000, 8460, 20000]
        """
        by_size = min(max(USUAL_EPOCHS * steps_per_epoch, LEAST_STEPS), MOST_STEPS)
        steps = by_size if self.epochs is None else self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(self.max_steps, steps)

    def validation_interval(self, steps_per_epoch: int) -> int:
        """Steps between validations.

        >>> [TrainingConfig().validation_interval(steps) for steps in (2, 423, 10_000)]
        [100, 423, 1000]
        """
        by_size = min(max(steps_per_epoch, 100), 1000)
        return self.validate_every or (by_size if self.epochs is None else steps_per_epoch)


@dataclass(frozen=True)
class RunConfig(_Strict):
    """Everything that a run is made of."""

    data: DataConfig
    model: ModelConfig = field(default_factory=lambda: ModelConfig(likelihood="auto"))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0
    """Seed of the weights, the order of the data and the noise."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or one of several GPUs: cuda:1."""

    def __post_init__(self) -> None:
        """Refuse a seed that no generator takes."""
        check_seed(self.seed)


@dataclass(frozen=True)
class EvaluationSettings(_Strict):
    """Metrics of an evaluation, and how to measure them."""

    metrics: Annotated[
        tuple[str, ...] | None,
        Names(
            "Metrics to measure beside the single-sample bounds; default: information and calibration, where they apply.",
            register.metric,
        ),
    ] = None
    """Names of the metrics."""
    split: Literal["validation", "test"] = "test"
    """Split to evaluate."""
    examples: int | None = None
    """Most examples to evaluate, chosen at random; all unless given, or where no metrics are named an affordable number."""
    seed: int = 0
    """Seed of the noise. The noise is keyed by example, so no number depends on the batch size."""
    draws: int = 64
    """Number of importance samples per example (iwae)."""
    features: Annotated[
        tuple[str, ...],
        Names(
            "Feature extractors that compare images or clips (quality), or TorchScript files. Each has a section of its own.",
            register.features,
        ),
    ] = ("efficientnet",)
    """Names of the feature extractors."""
    samples: int = 10_000
    """Number of samples, compared with as many examples (quality)."""
    best_of: int | None = None
    """Number of predictions of each clip; PSNR and SSIM of the best are reported (predictions; SVG: 100)."""
    batch_statistics: bool = False
    """Use the batch's statistics in batch norm for these predictions, as SVG's own evaluation does."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be measured."""
        self._require(1, "at least 1", "examples", "draws", "samples", "best_of")
        check_seed(self.seed)
        if not self.features:
            raise ValueError("features names at least one extractor, got none; efficientnet is one")
        if self.batch_statistics and self.best_of is None:
            raise ValueError(
                "batch_statistics is about predictions; give best_of, the number of predictions to choose from (SVG: 100)"
            )


Config = TypeVar("Config")

CONFIG_BYTES = 2**17
"""Largest config that is read: enough for the names of thousands of columns; the parser takes seconds for a megabyte."""
NESTED = 20
"""Deepest nesting of a config; the parser's time grows with it."""
PROBLEMS = 10
"""Number of problems that are listed for one file."""


def read(path: Path, kind: type[Config]) -> Config:
    """Read a config of this kind from YAML, refusing unknown keys and wrong types.

    Raises:
        ValueError: the file is missing, is not YAML, or holds something other than the config's fields.
    """
    try:
        text = read_text(path, CONFIG_BYTES)
        _check_plain(text)
        content = _loader()(text).get_single_data()
    except Exception as error:  # on foreign bytes the reader raises nearly anything: YAMLError, KeyError, RecursionError, ...
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML ({type(error).__name__}): {reason}") from error
    return parse(content, kind, str(path))


def _loader() -> Any:
    """The safe loader of YAML, in C where it is compiled: it makes plain values alone."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_plain(text: str) -> None:
    """Refuse aliases and merges, with which a short text can stand for a very long one, and deep nesting."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > NESTED:
            raise ValueError(f"it nests deeper than {NESTED} levels, which no config needs")
        if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.anchor is not None):
            raise ValueError("it has an anchor or an alias (&name, *name), which no config needs; write its value out")
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and not event.style:
            raise ValueError("it merges mappings (<<), which no config needs; write them out")


def read_text(path: Path, limit: int = 2**26) -> str:
    """Read a text file, up to a limit of bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or has more bytes than the limit.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, which no run writes there")
    return content.decode("utf-8")


def parse(content: Any, kind: type[Config], where: str) -> Config:
    """Build a config of this kind from plain values.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    import pydantic

    try:
        validated: Config = _adapter(kind).validate_python(content)  # type: ignore[arg-type]  # types are hashable
        return validated
    except pydantic.ValidationError as error:
        # Values are shortened: they may be a file's whole content.
        shown = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {_shown(e['input'])})" for e in error.errors()]
        problems = "; ".join(shown[:PROBLEMS])
        raise ValueError(f"{where} is not a {getattr(kind, '__name__', kind)}: {problems}") from error


@cache
def _adapter(kind: type[Any]) -> "TypeAdapter[Any]":
    """Made once for each kind, as that takes a hundred times as long as to validate."""
    import pydantic

    return pydantic.TypeAdapter(kind)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with thousands of digits
        return f"a long {type(value).__name__}"


def write(path: Path, config: Any) -> None:
    """Write a config as YAML that :func:`read` takes back."""
    import yaml

    write_whole(path, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; the old one remains until the new one is whole and on the disk."""
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which replaces ``path`` when it is whole and on the disk.

    If the block fails, nothing of it remains: a full disk leaves the old file, or none.
    """
    aside = path.with_name(f"{path.stem}.new{path.suffix}")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
