"""Likelihoods: a family (what the residual looks like) and a scale (where its σ comes from)."""

from sigma_vae.likelihoods.continuous import Gaussian
from sigma_vae.likelihoods.scales import Fixed, Optimal, PerImage, PerPixel, Scale, Shared

__all__ = ["Fixed", "Gaussian", "Optimal", "PerImage", "PerPixel", "Scale", "Shared"]
