"""A multilayer perceptron, for data of any shape."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from sigma_vae.conditions import Conditions
from sigma_vae.networks.flat import FlatNetwork, Joined, width_of
from sigma_vae.registry import register

__all__ = ["mlp"]

START_LOG_VARIANCE = -4.0
"""The untrained posterior's log-variance: at 0 its noise hides every latent, while σ is still large."""


@register.network("mlp", latents="flat", reads_clips=False, has_prior=True)
def mlp(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 20,
    width: int = 400,
    conditions: Conditions | None = None,
) -> FlatNetwork:
    """A multilayer perceptron for data of any shape: two hidden layers each way, with ReLU.

    The untrained posterior is narrow, with a log-variance around −4. A solved or learned σ is large at first; latents
    that start as wide as the prior then go unused, and are seldom used again (``benchmarks/posterior_start.py``).

    Args:
        shape: of one example, ``(C, *space)``: a table's row, a series, an image.
        out_channels: ``likelihood.in_channels``.
        latent_dim: size of z.
        width: units of each hidden layer.
        conditions: labels and covariates to be given; their embedding is joined to the data, and to the latents.

    >>> network = mlp((1, 28, 28), out_channels=1)
    >>> network.generate(2).shape
    torch.Size([2, 1, 28, 28])
    """
    out_shape, extra = (out_channels, *shape[1:]), width_of(conditions)
    posterior = nn.Linear(width, 2 * latent_dim)
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape) + extra, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        posterior,
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim + extra, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, math.prod(out_shape)),
        nn.Unflatten(1, out_shape),
    )
    with torch.no_grad():
        posterior.bias[latent_dim:] += START_LOG_VARIANCE
    if conditions is None:
        return FlatNetwork(encoder, decoder, latent_dim)
    return FlatNetwork(Joined(encoder), Joined(decoder), latent_dim, conditions=conditions)
