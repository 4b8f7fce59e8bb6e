"""The training loss: the negative ELBO, or a weighted objective, which is never called one."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.training.distributed import mean_over_all, processes, sum_over_all
from sigma_vae.types import Batch, Elbo, Inference, as_argument, in_full_precision
from sigma_vae.vae import VAE

NO_KL = 1e-9
"""KL in nats per latent that counts as none."""


def validated_total(vae: VAE) -> str:
    """Name of the metric that is maximised: the ELBO, or an objective where there is no likelihood (grey Bernoulli)."""
    return "validation/elbo_nats" if vae.likelihood.normalised else "validation/objective_nats"


def current_sigma(vae: VAE) -> Tensor | None:
    """The σ that training uses, if any: the geometric mean of several, or an optimal scale's running one."""
    log_sigma = vae.likelihood.log_sigma()
    return None if log_sigma is None else log_sigma.detach().mean().exp()


class Losses(NamedTuple):
    """The ELBO of each example, and the objective to minimise, ``(*batch,)`` in nats."""

    elbo: Elbo
    minimised: Tensor


def is_weighted(config: TrainingConfig) -> bool:
    """Whether the objective differs from the negative ELBO."""
    return config.kl_weight != 1 or config.beta_nll != 0 or config.free_bits_nats != 0 or config.kl_balancing_steps != 0


def check_weights(vae: VAE, config: TrainingConfig) -> None:
    """Refuse weights of the objective that do not apply to this model.

    Raises:
        ValueError: β-NLL is asked for where no σ is predicted, or a balance where there is one layer.
    """
    if config.beta_nll and not vae.likelihood.predicts_scale:
        raise ValueError(
            f"beta_nll weights each value by the σ predicted for it, which {vae.likelihood} does not predict; use a per-pixel or"
            " per-image scale, or beta_nll=0"
        )
    if config.condition_dropout and vae.network.conditions is None:
        raise ValueError(
            "condition_dropout hides conditions, and this network reads none; give the data's condition, or condition_dropout=0"
        )
    if config.kl_balancing_steps and vae.network.latents.layers == 1:
        raise ValueError(
            f"kl_balancing_steps balances several layers of latents, and {type(vae.network).__name__} has one; use a hierarchical"
            " network, or 0 steps"
        )


def losses(vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None) -> Losses:
    r"""ELBO and objective of one batch, from one posterior draw.

    .. math:: -\sum_i \sigma_i^{2 \beta} \log p(x_i|z) + w \sum_l \gamma_l \max(\lambda, KL_l)

    with σ to the power 2β detached (Seitzer et al. 2022, β-NLL), w the ``kl_weight`` (Beta-Sigma VAE, arXiv 2409.09361,
    which puts it on an optimal σ), λ the ``free_bits_nats`` (Kingma et al. 2016, arXiv 1606.04934, section 2.4: the
    mean of KL_l over the batch of all processes is compared) and γ the balance over layers while ``step`` is below
    ``kl_balancing_steps``. With β = λ = 0, w = 1 and no balance it is the negative ELBO, ``vae.elbo`` or a compiled
    ``elbo_of``. Under autocast the network alone is in half precision.
    """
    condition = _partly_hidden(batch.condition, config.condition_dropout)
    if not is_weighted(config):
        elbo = (elbo_of or vae.elbo)(batch.x, mask=batch.mask, condition=condition)
        return Losses(elbo, -elbo.total)
    inference = vae.network.infer(batch.x, None, batch.mask, None, *as_argument(condition))
    with in_full_precision(batch.x.device.type):
        return _weighted(vae, inference, config, step)


def _partly_hidden(condition: Tensor | None, share: float) -> Tensor | None:
    """The conditions, with a share of the examples' hidden at random (Ho and Salimans 2022, arXiv 2207.12598)."""
    if condition is None or not share:
        return condition
    hidden = torch.rand(len(condition), 1, device=condition.device) < share
    return condition.masked_fill(hidden, math.nan)


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
        kl = kl * balance(elbo.kl, vae.network.latents.sizes)
    return Losses(elbo, config.kl_weight * kl.sum(-1) - log_likelihood)


def balance(kl_nats: Tensor, latents: Sequence[int]) -> Tensor:
    r"""Weights of the layers' KL that let every layer learn to be used, ``(layers,)``, detached.

    .. math:: \gamma_l \propto \overline{KL}_l / d_l, \qquad \sum_l \gamma_l = L

    where :math:`\overline{KL}_l` is the mean over the batch of all processes and :math:`d_l` the layer's number of
    latents. A layer with more KL per latent than others pays more for it; one that is switched off is nearly free (the
    warm-up of NVAE, Vahdat and Kautz 2020, arXiv 2007.03898, appendix A; in its released code :math:`d_l` is the area
    of the layer's map).

    Shapes:
        kl_nats ``(*batch, layers)``; latents: the number of each layer's.

    >>> balance(torch.tensor([[1.0, 8.0], [3.0, 8.0]]), latents=[1, 4])
    tensor([1., 1.])
    """
    density = mean_over_all(kl_nats.flatten(0, -2)) / torch.tensor(latents).to(kl_nats)
    density = density.clamp_min(0) + NO_KL  # without KL anywhere all weigh the same
    return density / density.mean()


class StepLoss(NamedTuple):
    """The bound of each of this process's examples, and the mean objective of all processes' examples, in nats."""

    elbo: Elbo
    loss: Tensor


def step_loss(
    vae: VAE, batch: Batch, config: TrainingConfig, step: int = 0, elbo_of: Callable[..., Elbo] | None = None
) -> StepLoss:
    r"""Loss of a step on this process's share of the global batch, in ``config.accumulate`` micro-batches.

    With :math:`n_i` of all n examples in micro-batch i,

    .. math:: \text{loss} = \sum_i \frac{n_i}{n}\, L_i(\sigma_i), \qquad L_i = \text{mean over the micro-batch's examples}

    An optimal σ is solved for each micro-batch (over all processes), and so are the batch means of free bits and KL
    balancing. Where σ is fixed, learned or predicted, the gradient is that of the whole batch. Where it is optimal, the
    loss lies below the whole batch's, as the mean of :math:`\log \sigma_i` lies below the logarithm of the root mean
    square, and the gradient is that of this mean.

    All micro-batches but the last are differentiated here, which adds to the gradients; the loss returned has the
    gradient of the last one. Gradients are scaled by the number of processes, as data parallelism averages them over
    processes. There are never more micro-batches than each process has examples, which is at least one.

    >>> from sigma_vae import Fixed, Gaussian, mlp
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5)))
    >>> batch = Batch(torch.rand(6, 1, 4, 4), torch.arange(6))
    >>> elbo, loss = step_loss(vae, batch, TrainingConfig(accumulate=3))
    >>> bool(torch.isclose(loss, -elbo.total.mean()))
    True
    """
    us = processes()
    if us.world_size == 1 and config.accumulate == 1:
        elbo, minimised = losses(vae, batch, config, step, elbo_of)
        return StepLoss(elbo, minimised.mean())
    examples = int(sum_over_all(torch.tensor(len(batch.x))))
    parts = max(1, min(config.accumulate, examples // us.world_size))
    found: list[Elbo] = []
    total = torch.zeros((), dtype=torch.float64, device=batch.x.device)
    for number, part in enumerate(_split(batch, parts), start=1):
        elbo, minimised = losses(vae, part, config, step, elbo_of)
        found.append(elbo)
        total += minimised.detach().sum()
        mine = minimised.sum() * (us.world_size / examples)
        if number < parts:
            with torch.autocast(mine.device.type, enabled=False):
                mine.backward()  # type: ignore[no-untyped-call]
    mean = (sum_over_all(total) / examples).to(mine.dtype)
    whole = Elbo(*(torch.cat([terms.detach() for terms in column]) for column in zip(*found, strict=True)))
    return StepLoss(whole, mine + (mean - mine.detach()))


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    columns = ([None] * parts if each is None else each.tensor_split(parts) for each in batch)
    return (Batch(*part) for part in zip(*columns, strict=True))
