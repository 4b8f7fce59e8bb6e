"""What is minimised: the negative ELBO, or a weighted objective, which is never called one."""

import math
from typing import NamedTuple

from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.types import Elbo
from sigma_vae.vae import VAE

__all__ = ["Losses", "check_weights", "is_weighted", "losses"]


class Losses(NamedTuple):
    """The true bound of each example, and what is minimised of it, ``(*batch,)`` in nats."""

    elbo: Elbo
    minimised: Tensor


def is_weighted(config: TrainingConfig) -> bool:
    """Whether what is minimised differs from the negative ELBO."""
    return config.kl_weight != 1 or config.beta_nll != 0


def check_weights(vae: VAE, config: TrainingConfig) -> None:
    """Refuse weights that mean nothing.

    Raises:
        ValueError: a weight is out of range, or β-NLL is asked for where no σ is predicted.
    """
    if not 0 <= config.kl_weight < math.inf:
        raise ValueError(f"kl_weight multiplies the KL and is at least 0 (1: the ELBO), got {config.kl_weight}")
    if not 0 <= config.beta_nll <= 1:
        raise ValueError(f"beta_nll is from 0 (the likelihood) to 1 (all errors weigh the same), got {config.beta_nll}")
    predicted = isinstance(vae.likelihood, LocationScale) and vae.likelihood.scale.predicted
    if config.beta_nll and not predicted:
        raise ValueError(
            f"beta_nll weights each value by the σ predicted for it, which {vae.likelihood} does not predict; use a per-pixel or"
            " per-image scale, or beta_nll=0"
        )


def losses(vae: VAE, x: Tensor, config: TrainingConfig, mask: Tensor | None = None) -> Losses:
    r"""ELBO and objective of one batch, from one posterior draw.

    .. math:: -\sum_i \sigma_i^{2 \beta} \log p(x_i|z) + w\,KL

    with σ to the power 2β detached (Seitzer et al. 2022, β-NLL) and w the ``kl_weight`` (Beta-Sigma VAE, arXiv 2409.09361, which puts
    it on an optimal σ). With β = 0 and w = 1 it is the negative ELBO.
    """
    if not is_weighted(config):
        elbo: Elbo = vae.elbo(x, mask=mask)
        return Losses(elbo, -elbo.total)
    inference = vae.network.infer(x, mask=mask)
    h, target = inference.scored()
    distribution = vae.likelihood(h, target)
    elbo = Elbo(inference.per_example(distribution.log_prob(target)), inference.kl)
    log_likelihood = elbo.log_likelihood
    if config.beta_nll:
        log_likelihood = inference.per_example(distribution.weighted_log_prob(target, config.beta_nll))
    return Losses(elbo, config.kl_weight * elbo.rate - log_likelihood)
