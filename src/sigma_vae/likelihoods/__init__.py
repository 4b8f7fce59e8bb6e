"""Likelihoods: a family (the shape of the residual), with a scale (the source of its σ) or without.

Each name is imported when it is first used, so that ``translate`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigma_vae.likelihoods.continuous import (
        Bernoulli,
        ContinuousBernoulli,
        Gaussian,
        Laplace,
        Logistic,
        Perceptual,
        StudentT,
    )
    from sigma_vae.likelihoods.counts import Multinomial, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
    from sigma_vae.likelihoods.discrete import BitwiseCategorical, Categorical, LogisticMixture
    from sigma_vae.likelihoods.scales import Fixed, Optimal, PerImage, PerPixel, RunningMinimum, Scale, Shared

__all__ = [
    "Bernoulli",
    "BitwiseCategorical",
    "Categorical",
    "ContinuousBernoulli",
    "Fixed",
    "Gaussian",
    "Laplace",
    "Logistic",
    "LogisticMixture",
    "Multinomial",
    "NegativeBinomial",
    "Optimal",
    "PerImage",
    "PerPixel",
    "Perceptual",
    "Poisson",
    "RunningMinimum",
    "Scale",
    "Shared",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]

_HOMES = ("continuous", "counts", "discrete", "scales")


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"{__name__}.{home}")
        if hasattr(module, name):
            return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
