"""A multilayer perceptron, for data of any shape."""

import math
from collections.abc import Sequence

from torch import nn

from sigma_vae.networks.flat import FlatNetwork

__all__ = ["mlp"]


def mlp(shape: Sequence[int], out_channels: int, latent_dim: int = 20, width: int = 400) -> FlatNetwork:
    """Two hidden layers each way, ReLU between them.

    Args:
        shape: of one example, ``(C, *space)``: a table's row, a series, an image.
        out_channels: what the likelihood reads, ``likelihood.in_channels``.
        latent_dim: size of z.
        width: units of each hidden layer.

    >>> network = mlp((1, 28, 28), out_channels=1)
    >>> network.generate(2).shape
    torch.Size([2, 1, 28, 28])
    """
    out_shape = (out_channels, *shape[1:])
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, math.prod(out_shape)),
        nn.Unflatten(1, out_shape),
    )
    return FlatNetwork(encoder, decoder, latent_dim)
