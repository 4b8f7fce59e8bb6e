"""What is minimised: the negative ELBO, or a weighted objective, which is never called one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import HierarchicalNetwork
from sigma_vae.passes import in_full_precision
from sigma_vae.training.shares import mean_over_all
from sigma_vae.types import Batch, Elbo, Inference
from sigma_vae.vae import VAE

__all__ = ["Losses", "balance", "check_weights", "is_weighted", "losses"]

NO_KL = 1e-9
"""Nats a latent that count as none."""


class Losses(NamedTuple):
    """The true bound of each example, and what is minimised of it, ``(*batch,)`` in nats."""

    elbo: Elbo
    minimised: Tensor


def is_weighted(config: TrainingConfig) -> bool:
    """Whether what is minimised differs from the negative ELBO."""
    return config.kl_weight != 1 or config.beta_nll != 0 or config.free_bits_nats != 0 or config.kl_balancing_steps != 0


def check_weights(vae: VAE, config: TrainingConfig) -> None:
    """Refuse weights that mean nothing to this model.

    Raises:
        ValueError: β-NLL is asked for where no σ is predicted, or a balance where there is one layer.
    """
    predicted = isinstance(vae.likelihood, LocationScale) and vae.likelihood.scale.predicted
    if config.beta_nll and not predicted:
        raise ValueError(
            f"beta_nll weights each value by the σ predicted for it, which {vae.likelihood} does not predict; use a per-pixel or"
            " per-image scale, or beta_nll=0"
        )
    if config.kl_balancing_steps and not isinstance(vae.network, HierarchicalNetwork):
        raise ValueError(
            f"kl_balancing_steps balances the layers of a hierarchical network, got {type(vae.network).__name__}; use one, or 0 steps"
        )


def losses(vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None) -> Losses:
    r"""ELBO and objective of one batch, from one posterior draw.

    .. math:: -\sum_i \sigma_i^{2 \beta} \log p(x_i|z) + w \sum_l \gamma_l \max(\lambda, KL_l)

    with σ to the power 2β detached (Seitzer et al. 2022, β-NLL), w the ``kl_weight`` (Beta-Sigma VAE, arXiv 2409.09361, which puts
    it on an optimal σ), λ the ``free_bits_nats`` (Kingma et al. 2016, arXiv 1606.04934, section 2.4: the batch's mean of
    KL_l is what is compared, over all processes) and γ the balance over layers while ``step`` is below ``kl_balancing_steps``. With
    β = λ = 0, w = 1 and no balance it is the negative ELBO, ``vae.elbo`` or a compiled ``elbo_of``. Under autocast the network alone is
    in half precision.
    """
    if not is_weighted(config):
        elbo = (elbo_of or vae.elbo)(batch.x, mask=batch.mask)
        return Losses(elbo, -elbo.total)
    inference = vae.network.infer(batch.x, mask=batch.mask)
    with in_full_precision(batch.x.device.type):
        return _weighted(vae, inference, config, step)


def _weighted(vae: VAE, inference: Inference, config: TrainingConfig, step: int) -> Losses:
    h, target = inference.scored()
    distribution = vae.likelihood(h, target)
    elbo = Elbo(inference.per_example(distribution.log_prob(target)), inference.kl)
    log_likelihood = elbo.log_likelihood
    if config.beta_nll:
        log_likelihood = inference.per_example(distribution.weighted_log_prob(target, config.beta_nll))
    kl = elbo.kl
    if config.free_bits_nats:
        heard = mean_over_all(kl.flatten(0, -2)) >= config.free_bits_nats
        kl = torch.where(heard, kl, config.free_bits_nats)
    if step < config.kl_balancing_steps:
        kl = kl * balance(elbo.kl, [math.prod(shape) for shape in _hierarchical_network(vae).layer_shapes])
    return Losses(elbo, config.kl_weight * kl.sum(-1) - log_likelihood)


def balance(kl_nats: Tensor, latents: Sequence[int]) -> Tensor:
    r"""Weights of the layers' KL that let every layer learn to be used, ``(layers,)``, detached.

    .. math:: \gamma_l \propto \overline{KL}_l / d_l, \qquad \sum_l \gamma_l = L

    where :math:`\overline{KL}_l` is the mean over the batch of all processes and :math:`d_l` the layer's number of
    latents: a layer that uses each of its latents more than others do pays more for it, one that is switched off is nearly free (the
    warm-up of NVAE, Vahdat and Kautz 2020, arXiv 2007.03898, appendix A; its released code has :math:`d_l` as the area of the layer's
    map).

    Args:
        kl_nats: ``(*batch, layers)``.
        latents: of each layer.

    >>> balance(torch.tensor([[1.0, 8.0], [3.0, 8.0]]), latents=[1, 4])
    tensor([1., 1.])
    """
    density = mean_over_all(kl_nats.flatten(0, -2)) / torch.tensor(latents).to(kl_nats)
    density = density.clamp_min(0) + NO_KL  # without KL anywhere all weigh the same
    return density / density.mean()


def _hierarchical_network(vae: VAE) -> HierarchicalNetwork:
    """The network that ``check_weights`` found to be hierarchical."""
    assert isinstance(vae.network, HierarchicalNetwork)
    return vae.network
