"""Likelihoods: a family (what the residual looks like) and a scale (where its σ comes from), or a family that needs no scale."""

from sigma_vae.likelihoods.bounded import Bernoulli, ContinuousBernoulli
from sigma_vae.likelihoods.continuous import Gaussian
from sigma_vae.likelihoods.discrete import BitwiseCategorical, Categorical
from sigma_vae.likelihoods.logistic_mixture import LogisticMixture
from sigma_vae.likelihoods.scales import Fixed, Optimal, PerImage, PerPixel, Scale, Shared

__all__ = [
    "Bernoulli",
    "BitwiseCategorical",
    "Categorical",
    "ContinuousBernoulli",
    "Fixed",
    "Gaussian",
    "LogisticMixture",
    "Optimal",
    "PerImage",
    "PerPixel",
    "Scale",
    "Shared",
]
