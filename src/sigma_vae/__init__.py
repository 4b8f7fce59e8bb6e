"""Variational autoencoders with calibrated decoders: no KL weight to tune.

Needs torch and numpy alone; data, training and the command line come with the extra ``full``. Each name is imported
when it is first used.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigma_vae.likelihoods import (
        Bernoulli,
        BitwiseCategorical,
        Categorical,
        ContinuousBernoulli,
        Fixed,
        Gaussian,
        Laplace,
        Logistic,
        LogisticMixture,
        Multinomial,
        NegativeBinomial,
        Optimal,
        PerImage,
        PerPixel,
        Poisson,
        RunningMinimum,
        Shared,
        StudentT,
        ZeroInflatedNegativeBinomial,
    )
    from sigma_vae.likelihoods.translate import explain
    from sigma_vae.networks.flat import FlatNetwork, conv, mlp, residual
    from sigma_vae.networks.hierarchical import HierarchicalNetwork, HierarchyPlan, hierarchical
    from sigma_vae.networks.sequence import SequenceNetwork, sequence
    from sigma_vae.networks.spatial import SpatialNetwork, spatial
    from sigma_vae.types import Elbo
    from sigma_vae.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Bernoulli",
    "BitwiseCategorical",
    "Categorical",
    "ContinuousBernoulli",
    "Elbo",
    "Fixed",
    "FlatNetwork",
    "Gaussian",
    "HierarchicalNetwork",
    "HierarchyPlan",
    "Laplace",
    "Logistic",
    "LogisticMixture",
    "Multinomial",
    "NegativeBinomial",
    "Optimal",
    "PerImage",
    "PerPixel",
    "Poisson",
    "RunningMinimum",
    "SequenceNetwork",
    "Shared",
    "SpatialNetwork",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "conv",
    "explain",
    "hierarchical",
    "mlp",
    "residual",
    "sequence",
    "spatial",
]

_HOMES = ("types", "likelihoods", "likelihoods.translate", "networks", "vae")
"""Modules that define these names, in the order of their layers."""


def __getattr__(name: str) -> Any:
    if name == "LadderPlan":
        warnings.warn("sigma_vae.LadderPlan is now sigma_vae.HierarchyPlan", DeprecationWarning, stacklevel=2)
        name = "HierarchyPlan"
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"{__name__}.{home}")
        if hasattr(module, name):
            return globals().setdefault(name, getattr(module, name))
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
