"""What is told of a model while it trains."""

import torch
from torch import Tensor

from sigma_vae.likelihoods import Shared
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.vae import VAE

__all__ = ["current_sigma", "validated_total"]


def validated_total(vae: VAE) -> str:
    """The name under which a validation logs what is maximised: a bound, or where there is no likelihood (grey Bernoulli) an objective."""
    return "validation/elbo_nats" if vae.likelihood.normalised else "validation/objective_nats"


def current_sigma(vae: VAE) -> Tensor | None:
    """The σ that training uses (the geometric mean of several; the running one of an optimal scale), where there is one."""
    likelihood = vae.likelihood
    if not isinstance(likelihood, LocationScale) or likelihood.scale.predicted:
        return None
    if isinstance(likelihood.scale, Shared):
        return likelihood.scale.log_scale.detach().exp()
    own = likelihood.scale(torch.zeros((), device=likelihood.scale.density_log_scale.device), likelihood.observes, None)
    sigma: Tensor = own.mean().exp()
    return sigma
