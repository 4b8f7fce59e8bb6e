"""Likelihoods: a family (what the residual looks like) and a scale (where its σ comes from)."""

from sigma_vae.likelihoods.continuous import Gaussian, Laplace, StudentT
from sigma_vae.likelihoods.scales import Fixed, Optimal, PerImage, PerPixel, RunningMinimum, Scale, Shared

__all__ = [
    "Fixed",
    "Gaussian",
    "Laplace",
    "Optimal",
    "PerImage",
    "PerPixel",
    "RunningMinimum",
    "Scale",
    "Shared",
    "StudentT",
]
