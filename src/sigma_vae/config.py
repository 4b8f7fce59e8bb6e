"""A run as frozen dataclasses: what the command line builds, what ``config.yaml`` holds, what replays a run.

The docstring under each field is its help on the command line.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

__all__ = ["DataConfig", "Layout", "ModelConfig", "RunConfig", "TrainingConfig", "parse", "read", "write"]

Layout = Literal["auto", "n-h-w", "n-h-w-c", "n-c-h-w", "n-c-t", "n-c"]


class _Strict:
    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class DataConfig(_Strict):
    """Which data, and how they are split."""

    source: str
    """Name of a data set (digits, mnist-5k, fashion-mnist) or path of a .npy or .npz file."""
    root: str | None = None
    """Folder that holds the data set's original files."""
    levels: int | None = None
    """How many values a datum can take; taken from the data unless given (256 for uint8)."""
    layout: Layout = "auto"
    """Axes of an array file: n examples, c channels, h rows, w columns, t times."""
    validation_fraction: float = 0.1
    """Share of the training examples held out for validation, where the data have no split of their own."""
    test_fraction: float = 0.1
    """Share of the examples held out for test, where the data have no split of their own."""
    split_seed: int = 0
    """Decides which examples are held out."""


@dataclass(frozen=True)
class ModelConfig(_Strict):
    """Network and likelihood, by name."""

    network: str = "residual"
    """residual (images and series), conv (the paper's, for images) or mlp (any shape)."""
    likelihood: str = "gaussian/optimal"
    """family/scale, or the family alone where it has no scale. Families: gaussian, laplace, logistic, student-t (or student-t:ν,
    :learned, :predicted). Scales: optimal, optimal-image, optimal-channel, optimal-pixel, shared, per-image, per-pixel,
    running-minimum, fixed:σ, beta:β. Without a scale: bernoulli, continuous-bernoulli, categorical, bitwise-categorical,
    logistic-mixture[:components]."""
    latent_dim: int = 20
    """Size of the latent code."""
    width: int | None = None
    """Channels of the first layer (residual: 16, conv: 32) or units of a hidden layer (mlp: 400)."""
    observes: Literal["density", "level"] = "density"
    """Train on the density of the values, or on the probability of their levels."""
    mean: Literal["unit", "identity"] = "unit"
    """From features to the mean: a sigmoid onto [0, 1], where data lie, or themselves."""


@dataclass(frozen=True)
class TrainingConfig(_Strict):
    """How the weights are found."""

    epochs: int = 20
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after so many steps, if that is sooner."""
    max_minutes: float | None = None
    """Stop after so many minutes, if that is sooner."""
    batch_size: int = 128
    """Examples a step."""
    learning_rate: float = 1e-3
    """Of Adam, after the warm-up."""
    scale_learning_rate_factor: float = 10.0
    """A learned shared σ (or ν) has this many times the learning rate: at 1 it lags its optimum threefold."""
    scale_start: Literal["data", "one"] = "data"
    """Where a learned shared σ starts: at the spread of the training data, or at 1."""
    kl_weight: float = 1.0
    """Weight of the KL in what is minimised, on top of the calibrated σ (Beta-Sigma VAE); other than 1 it is no bound."""
    beta_nll: float = 0.0
    """Weights each value's log-likelihood by its predicted σ to the power 2β (β-NLL, 0.5 say): steadies per-pixel scales."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); at 0 the optimiser is Adam."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or a cosine to 0 over the epochs (or max_steps)."""
    gradient_clip_norm: float | None = None
    """Largest norm of a gradient; gradients are in nats, thousands of them for an image."""
    ema_decay: float | None = None
    """Evaluate and export an exponential moving average of the weights (0.999, say)."""
    patience: int | None = None
    """Stop when the validation ELBO has not risen for so many validations."""
    validate_every: int | None = None
    """Steps between validations; once an epoch unless given."""
    log_every: int = 50
    """Steps between rows of the metrics."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        at_least_one = ("epochs", "max_steps", "batch_size", "patience", "validate_every", "log_every")
        above_zero = ("max_minutes", "scale_learning_rate_factor", "gradient_clip_norm")
        at_least_zero = ("learning_rate", "weight_decay", "warmup_steps")
        for names, least, says in (
            (at_least_one, 1, "at least 1"),
            (at_least_zero, 0, "at least 0"),
            (above_zero, 1e-300, "above 0"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise ValueError(f"{name} is {says}, got {value}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is the weight of the past, from 0 up to but not 1, got {self.ema_decay}")


@dataclass(frozen=True)
class RunConfig(_Strict):
    """Everything that a run is made of."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0
    """Of weights, order of the data and noise."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, or one of several: cuda:1."""

    def __post_init__(self) -> None:
        """Refuse a seed that no generator takes."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is a number from 0 to 2³² − 1, got {self.seed}")


Config = TypeVar("Config")


def read(path: Path, kind: type[Config]) -> Config:
    """Read a config of this kind from YAML, refusing unknown keys and wrong types.

    Raises:
        ValueError: the file is missing, no YAML, or holds something else than the config's fields.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    return parse(content, kind, str(path))


def parse(content: Any, kind: type[Config], where: str) -> Config:
    """Build a config of this kind from plain values.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise ValueError(f"{where} is not a {kind.__name__}: {problems}") from error


def write(path: Path, config: Any) -> None:
    """Write a config as YAML that :func:`read` takes back."""
    import yaml

    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
