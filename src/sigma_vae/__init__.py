"""Variational autoencoders with calibrated decoders: no KL weight to tune.

Needs torch and numpy alone; data, training and the command line come with the extra ``full``.
"""

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
    Optimal,
    PerImage,
    PerPixel,
    RunningMinimum,
    Shared,
    StudentT,
)
from sigma_vae.networks import (
    FlatNetwork,
    HierarchicalNetwork,
    LadderPlan,
    SequenceNetwork,
    conv,
    hierarchical,
    mlp,
    residual,
    sequence,
)
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
    "LadderPlan",
    "Laplace",
    "Logistic",
    "LogisticMixture",
    "Optimal",
    "PerImage",
    "PerPixel",
    "RunningMinimum",
    "SequenceNetwork",
    "Shared",
    "StudentT",
    "conv",
    "hierarchical",
    "mlp",
    "residual",
    "sequence",
]
