"""p(z): what the latents are drawn from. N(0, I) in training; fitted to the codes afterwards, where that is asked for."""

from sigma_vae.priors.fitted import FittedPrior
from sigma_vae.priors.flow import FlowPrior
from sigma_vae.priors.gaussian import GaussianPrior
from sigma_vae.priors.mixture import MixturePrior
from sigma_vae.priors.standard import StandardNormal

__all__ = ["FittedPrior", "FlowPrior", "GaussianPrior", "MixturePrior", "StandardNormal"]
