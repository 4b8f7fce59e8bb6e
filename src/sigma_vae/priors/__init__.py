"""Priors p(z) over latents: N(0, I) in training; afterwards, on request, one that is fitted to the latents."""

from sigma_vae.priors.flow import ConditionalFlowPrior, FlowMatchingPrior, FlowPrior
from sigma_vae.priors.gaussian import ClassMixturePrior, GaussianPrior, LearnedPrior, MixturePrior, StandardNormal
from sigma_vae.types import FittedPrior

__all__ = [
    "ClassMixturePrior",
    "ConditionalFlowPrior",
    "FittedPrior",
    "FlowMatchingPrior",
    "FlowPrior",
    "GaussianPrior",
    "LearnedPrior",
    "MixturePrior",
    "StandardNormal",
]
