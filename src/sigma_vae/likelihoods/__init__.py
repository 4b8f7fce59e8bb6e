"""Likelihoods: a family (the shape of the residual), with a scale (the source of its σ) or without."""

from sigma_vae.likelihoods.bounded import Bernoulli, ContinuousBernoulli
from sigma_vae.likelihoods.continuous import Gaussian, Laplace, Logistic, StudentT
from sigma_vae.likelihoods.discrete import BitwiseCategorical, Categorical
from sigma_vae.likelihoods.logistic_mixture import LogisticMixture
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
    "Optimal",
    "PerImage",
    "PerPixel",
    "RunningMinimum",
    "Scale",
    "Shared",
    "StudentT",
]
