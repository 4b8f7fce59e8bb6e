"""The table of cases: every likelihood as family × scale × what it observes, and NumPy's word on what each must say.

A new family is one row of ``FAMILIES``; all laws that parametrise over ``CASES`` then run for it. Nothing here calls the library
but to build the likelihood under test: the references are scipy's and NumPy's, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from sigma_vae import Fixed, Gaussian, Laplace, Logistic, Optimal, PerImage, PerPixel, Shared, StudentT
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.scales import Scale

SIGMA = 0.3
"""Of the scales that are told their σ."""
FLOOR = -6.0
"""Log of the floor that the table's scales are given; the tests of floors have the default ones."""
LEAST_SIGMA = float(np.exp(FLOOR))


@dataclass(frozen=True)
class Family:
    """A residual law, and scipy's counterpart of it."""

    name: str
    likelihood: Callable[..., LocationScale]
    law: Any
    """scipy's law at scale 1: ``logpdf(x, loc, scale)`` and so on."""
    power: int
    """log σ̂ = log(mean |r|^power) / power where the best scale has a closed form; 0 where it has none."""
    statistic: Callable[[np.ndarray], np.ndarray] | None = None
    """Where there is none: at the best σ its mean over r/σ is 1 (the likelihood equation)."""

    def best_log_scale(self, residual: np.ndarray) -> float:
        """Log of the scale under which these residuals have the highest density."""
        if self.power:
            return float(np.log(np.mean(np.abs(residual) ** self.power)) / self.power)
        assert self.statistic is not None
        return float(optimize.brentq(lambda log: np.mean(self.statistic(residual * np.exp(-log))) - 1, -30, 30, xtol=1e-13))


@dataclass(frozen=True)
class ScaleRow:
    """Where σ comes from."""

    name: str
    make: Callable[..., Scale]
    extra: Callable[[int], int]
    """Feature channels beyond the mean's, for so many data channels."""
    per: str = "batch"
    """What has a stored σ of its own in eval mode, or of a refit."""
    kind: str = "own"
    """"own": known without data; "predicted": from the features; "optimal": solved."""


DF = 4.0
STUDENT_T = SimpleNamespace(
    **{name: partial(getattr(stats.t, name), df=DF) for name in ("logpdf", "cdf", "logcdf", "entropy", "var")},
)


def student_t_statistic(z: np.ndarray) -> np.ndarray:
    """From s² = mean((ν + 1) r² / (ν + r²/s²))."""
    return (DF + 1) * np.clip(z, -1e150, 1e150) ** 2 / (DF + np.clip(z, -1e150, 1e150) ** 2)


def laplace_log_cdf(z: np.ndarray) -> np.ndarray:
    """scipy's underflows below −745."""
    return np.where(z < 0, z - np.log(2), np.log1p(-0.5 * np.exp(-np.maximum(z, 0))))


LAPLACE = SimpleNamespace(
    **{name: getattr(stats.laplace, name) for name in ("logpdf", "cdf", "entropy", "var")}, logcdf=laplace_log_cdf
)

FAMILIES = (
    Family("gaussian", Gaussian, stats.norm, power=2),
    Family("laplace", Laplace, LAPLACE, power=1),
    Family("logistic", Logistic, stats.logistic, power=0, statistic=lambda z: z * np.tanh(z / 2)),
    Family("student-t", StudentT, STUDENT_T, power=0, statistic=student_t_statistic),
)

SCALES = (
    ScaleRow("fixed", lambda: Fixed(SIGMA), lambda channels: 0),
    ScaleRow("shared", lambda: Shared(SIGMA, LEAST_SIGMA), lambda channels: 0),
    ScaleRow("per-image", lambda: PerImage(LEAST_SIGMA), lambda channels: 1, kind="predicted"),
    ScaleRow("per-pixel", lambda: PerPixel(LEAST_SIGMA), lambda channels: channels, kind="predicted"),
    ScaleRow("optimal", lambda: Optimal(floor=LEAST_SIGMA), lambda channels: 0, kind="optimal"),
    ScaleRow("optimal-image", lambda: Optimal(per="image", floor=LEAST_SIGMA), lambda channels: 0, kind="optimal"),
    ScaleRow(
        "optimal-channel", lambda: Optimal(per="channel", floor=LEAST_SIGMA), lambda channels: 0, per="channel", kind="optimal"
    ),
    ScaleRow("optimal-pixel", lambda: Optimal(per="pixel", floor=LEAST_SIGMA), lambda channels: 0, per="pixel", kind="optimal"),
)


@dataclass(frozen=True)
class Case:
    """One likelihood."""

    family: Family
    scale: ScaleRow
    observes: str

    @property
    def name(self) -> str:
        return f"{self.family.name}/{self.scale.name}/{self.observes}"

    def make(self, channels: int = 1, spatial_dims: int = 2, levels: int | None = 256, mean: str = "identity") -> LocationScale:
        """The likelihood under test, fresh."""
        return self.family.likelihood(
            channels, self.scale.make(), spatial_dims=spatial_dims, levels=levels, mean=mean, observes=self.observes
        )

    def stored_shape(self, event: tuple[int, ...]) -> tuple[int, ...]:
        """Of a stored σ, for data of this shape."""
        ones = (1,) * len(event)
        return {"batch": ones, "channel": (event[0], *ones[1:]), "pixel": event}[self.scale.per]

    def settled(self, event: tuple[int, ...], **arguments: Any) -> LocationScale:
        """In eval mode and float64, with other stored values for density and level, no two of which are equal."""
        likelihood = self.make(channels=event[0], spatial_dims=len(event) - 1, **arguments).double().eval()
        for parameter in likelihood.parameters():
            parameter.data.fill_(np.log(SIGMA))  # again: it was rounded to float32
        for observes, log_scale in self.stored(event).items():
            likelihood.scale.store(observes, torch.from_numpy(log_scale))
        return likelihood

    def stored(self, event: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Log σ that :meth:`settled` stores."""
        shape = self.stored_shape(event)
        spread = np.linspace(-0.4, 0.4, int(np.prod(shape))).reshape(shape)
        return {"density": -1.3 + spread, "level": -0.9 - spread}

    def log_scale(self, raw: np.ndarray, spatial_dims: int, stored: np.ndarray) -> np.ndarray:
        """Log σ in eval mode, broadcastable to the data."""
        if self.scale.kind == "own":
            return np.log(SIGMA)
        return self.base(raw, spatial_dims) if self.scale.kind == "predicted" else stored

    def base(self, raw: np.ndarray, spatial_dims: int) -> np.ndarray:
        """What a refitted log σ is added to: the prediction, or 0."""
        if self.scale.kind != "predicted":
            return np.zeros(())
        space = tuple(range(raw.ndim - spatial_dims, raw.ndim))
        return soft_clip(raw.mean(space, keepdims=True) if self.scale.name == "per-image" else raw)


CASES = tuple(Case(family, scale, observes) for family in FAMILIES for scale in SCALES for observes in ("density", "level"))
OPTIMAL_CASES = tuple(case for case in CASES if case.scale.kind == "optimal")
NAMES = {"ids": lambda row: row.name if hasattr(row, "name") else str(row)}

SHAPES = {"table": ((5,), (3,)), "series": ((5,), (2, 7)), "image": ((4,), (3, 4, 5)), "clip": ((2, 3), (1, 4, 4))}
"""Batch and event of each kind of data."""


def features_and_data(
    case: Case, batch: tuple[int, ...], event: tuple[int, ...], levels: int = 256, noise: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features whose mean lies near the data, and data on the levels, in float64, both end levels among them."""
    random = np.random.default_rng(seed)
    x = random.integers(0, levels, (*batch, *event)) / (levels - 1)
    x.flat[:2] = 0, 1
    loc = x + noise * random.standard_normal(x.shape)
    raw = -1 + 0.5 * random.standard_normal((*batch, case.scale.extra(event[0]), *event[1:]))
    return torch.from_numpy(np.concatenate([loc, raw], axis=len(batch))), torch.from_numpy(x)


def soft_clip(x: np.ndarray) -> np.ndarray:
    """The paper's two-sided soft clip (Chua et al. 2018), from the floor up to e²⁰ times it."""
    ceiling = FLOOR + 20
    x = ceiling - np.logaddexp(0, ceiling - x)
    return FLOOR + np.logaddexp(0, x - FLOOR)


def log_density(law: Any, x: np.ndarray, loc: np.ndarray, log_scale: np.ndarray) -> np.ndarray:
    """scipy's elementwise log-density."""
    return law.logpdf(x, loc=loc, scale=np.exp(log_scale))


def log_mass(law: Any, x: np.ndarray, loc: np.ndarray, log_scale: np.ndarray, levels: int) -> np.ndarray:
    """Elementwise log-mass of the level's bin, from the tail that is nearer: there scipy's difference keeps its digits."""
    level, top, scale = np.round(x * (levels - 1)), levels - 1, np.exp(log_scale)
    lower, upper = (((level + side) / top - loc) / scale for side in (-0.5, 0.5))
    lower, upper = np.where(level == 0, -np.inf, lower), np.where(level == top, np.inf, upper)
    # All laws are symmetric: mirror whatever lies above 0, so that "far" is always below.
    mirrored = lower + upper > 0
    lower, upper = np.where(mirrored, -upper, lower), np.where(mirrored, -lower, upper)
    far, near = law.logcdf(lower), law.logcdf(upper)
    return near + np.log1p(-np.exp(far - near))


def cdfs(law: Any, x: np.ndarray, loc: np.ndarray, log_scale: np.ndarray, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """scipy's elementwise F(x−) and F(x), of the density or of the levels' bins."""
    scale = np.exp(log_scale)
    if levels is None:
        return law.cdf((x - loc) / scale), law.cdf((x - loc) / scale)
    level, top = np.round(x * (levels - 1)), levels - 1
    lower, upper = (((level + side) / top - loc) / scale for side in (-0.5, 0.5))
    return law.cdf(np.where(level == 0, -np.inf, lower)), law.cdf(np.where(level == top, np.inf, upper))


def minimum(loss: Callable[[float], float], low: float = -8.0, high: float = 4.0) -> float:
    """Where a smooth function of log σ is least."""
    grid = np.linspace(low, high, 49)
    best = int(np.argmin([loss(value) for value in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
