"""A residual convolutional network for images and series, with little work at full resolution."""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import EllipsisType
from typing import final

import torch
from torch import Tensor, nn

from sigma_vae.networks.flat import FlatNetwork

__all__ = ["residual"]

SMALLEST = 4
COARSEST = 8
"""Sizes are halved until none is larger; dense layers see the whole from there."""
WIDEST = 8
"""Channels double from level to level, up to so many times ``width``."""
HIDDEN = 32
"""Units of the dense layers around the latents, for each of ``width``."""

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def residual(shape: Sequence[int], out_channels: int, latent_dim: int = 20, width: int = 16) -> FlatNetwork:
    r"""Halve the size until it is at most 8, with residual blocks below the first level; then dense layers; the same back.

    A block adds to its input what two convolutions make of it, with activations before them (He et al. 2016, arXiv 1603.05027,
    figure 1b; a is SiLU):

    .. math:: x + W_2\, a(W_1\, a(x))

    There are no batch statistics. Instead the initial :math:`W_2` is smaller by the root of the number of blocks, which keeps the
    variance of the sum whatever their number (in the manner of Zhang et al. 2019, arXiv 1901.09321). An untrained decoder gives nearly
    the same features, near 0, for every z.

    Args:
        shape: of one example: an image ``(C, H, W)`` or a series ``(C, T)``.
        out_channels: what the likelihood reads, ``likelihood.in_channels``.
        latent_dim: size of z.
        width: channels of the first level, at half the data's size. They double from level to level, up to eightfold; the dense layers
            have 32 times as many units.

    Raises:
        ValueError: the data are neither images nor series, or shorter than 4 along an axis.

    >>> residual((3, 28, 45), out_channels=3).generate(2).shape
    torch.Size([2, 3, 28, 45])
    >>> residual((2, 1000), out_channels=2).generate(5).shape
    torch.Size([5, 2, 1000])
    """
    dims = len(shape) - 1
    if dims not in CONVOLUTIONS or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the residual network reads images (C, H, W) and series (C, T) of at least {SMALLEST} along each axis, got an example"
            f" of shape {tuple(shape)}; use the mlp network for tables and tiny data"
        )
    sizes = _halvings(tuple(shape[1:]))
    widths = [width * min(2**level, WIDEST) for level in range(len(sizes) - 1)]
    coarsest = (widths[-1], *sizes[-1])
    hidden = HIDDEN * width
    encoder = nn.Sequential(
        *_down(dims, [shape[0], *widths]),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(math.prod(coarsest), hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, hidden),
        nn.SiLU(),
        nn.Linear(hidden, math.prod(coarsest)),
        nn.Unflatten(1, coarsest),
        *_up(dims, [out_channels, *widths], sizes),
    )
    return FlatNetwork(encoder, decoder, latent_dim)


def _halvings(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes of all levels, the data's own first; at least one halving.

    >>> _halvings((28, 45))
    [(28, 45), (14, 23), (7, 12), (4, 6)]
    """
    sizes = [size]
    while len(sizes) == 1 or max(sizes[-1]) > COARSEST:
        sizes.append(tuple(-(-n // 2) for n in sizes[-1]))
    return sizes


def _down(dims: int, channels: list[int]) -> list[nn.Module]:
    """From the data's level to the coarsest; stride 2 rounds odd sizes up."""
    layers: list[nn.Module] = []
    for level, (above, here) in enumerate(pairwise(channels)):
        halve = CONVOLUTIONS[dims](above, here, 3, stride=2, padding=1)
        layers += [*([nn.SiLU()] if level else []), halve, *_blocks(dims, channels, level)]
    return layers


def _up(dims: int, channels: list[int], sizes: list[tuple[int, ...]]) -> list[nn.Module]:
    """From the coarsest level back to the data's."""
    layers: list[nn.Module] = []
    for level, (above, here) in enumerate(pairwise(channels)):
        layers = [*_blocks(dims, channels, level), nn.SiLU(), _Double(dims, here, above, sizes[level]), *layers]
    return layers


def _blocks(dims: int, channels: list[int], level: int) -> list[nn.Module]:
    """None at the first of several levels: with the most pixels it would cost the most."""
    levels = len(channels) - 1
    blocks = max(levels - 1, 1)
    return [_Block(dims, channels[level + 1], blocks)] if level or levels == 1 else []


@final
class _Block(nn.Module):
    """What two convolutions make of x, added to x."""

    def __init__(self, dims: int, channels: int, blocks: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims]
        self.branch = nn.Sequential(
            nn.SiLU(),
            convolution(channels, channels, 3, padding=1),
            nn.SiLU(),
            convolution(channels, channels, 3, padding=1),
        )
        with torch.no_grad():
            for parameter in self.branch[-1].parameters():
                parameter.div_(math.sqrt(blocks))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.branch(x)
        return x + change


@final
class _Double(nn.Module):
    """Twice the size, cropped to that of the level above, which may be odd."""

    def __init__(self, dims: int, channels: int, out_channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution = TRANSPOSED[dims](channels, out_channels, 4, stride=2, padding=1)
        self.crop: tuple[EllipsisType | slice, ...] = (..., *(slice(n) for n in size))

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.convolution(x)
        return doubled[self.crop]
