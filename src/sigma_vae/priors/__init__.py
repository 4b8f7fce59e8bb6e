"""p(z): what the latents are drawn from. N(0, I) in training; fitted to the codes afterwards, where that is asked for."""

from sigma_vae.priors.base import FittedPrior
from sigma_vae.priors.flow import FlowPrior
from sigma_vae.priors.gaussian import GaussianPrior, StandardNormal
from sigma_vae.priors.mixture import MixturePrior

__all__ = ["FittedPrior", "FlowPrior", "GaussianPrior", "MixturePrior", "StandardNormal"]
