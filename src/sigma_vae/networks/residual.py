"""A residual convolutional network for images and series, with most of its work at low resolution."""

import math
from collections.abc import Sequence
from itertools import pairwise
from types import EllipsisType
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sigma_vae.conditions import Conditions
from sigma_vae.networks.flat import FlatNetwork, Joined, Shifted, width_of
from sigma_vae.registry import register

SMALLEST = 4
COARSEST = 8
"""Sizes are halved until none is larger; dense layers follow."""
WIDEST = 8
"""Channels double from level to level, up to this multiple of ``width``."""
HIDDEN = 32
"""Units of the dense layers around the latents, as a multiple of ``width``."""
GAIN = 1.68
"""1 / √E[SiLU(u)²] for a standard normal u: makes up for the mean square that an activation loses."""
LAST_GAIN = 0.05
"""Gain of the last layer of encoder and decoder, so that posteriors and features start near 0."""

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED: dict[int, type[nn.ConvTranspose1d | nn.ConvTranspose2d]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
_Weighted = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.Linear


@register.network("residual", latents="flat", reads_clips=False, has_prior=True)
def residual(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 20,
    width: int = 16,
    conditions: Conditions | None = None,
) -> FlatNetwork:
    r"""Pre-activation residual blocks, most of them at low resolution, for images and series.

    The size is halved until it is at most 8, with residual blocks below the first level. Dense layers follow. The
    decoder mirrors it.

    A block adds two convolutions of its input to it, with activations a = SiLU before them (He et al. 2016, arXiv
    1603.05027, figure 1b):

    .. math:: x + W_2\, a(W_1\, a(x))

    There are no batch statistics. Instead, initial weights keep the mean square from layer to layer (He et al. 2015,
    arXiv 1502.01852, with the gain of SiLU). Those of :math:`W_2` are divided by the root of the number of blocks, so
    that activations do not grow with depth (in the manner of Zhang et al. 2019, arXiv 1901.09321). Those of the last
    layers are divided by twenty, so that an untrained decoder gives features near 0 for every z.

    Args:
        shape: of one example: an image ``(C, H, W)`` or a series ``(C, T)``.
        out_channels: ``likelihood.in_channels``.
        latent_dim: size of z.
        width: channels at half the data's size; they double with each level, up to eightfold. Dense layers have 32
            times as many units.
        conditions: labels and covariates to be given; their embedding is added to the channels of the first layer, and
            joined to the latents.

    Raises:
        ValueError: the data are neither images nor series, or an axis is shorter than 4.

    >>> sum(p.numel() for p in residual((1, 28, 28), out_channels=1).parameters())
    1689241
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
        nn.Linear(latent_dim + width_of(conditions), hidden),
        nn.SiLU(),
        nn.Linear(hidden, math.prod(coarsest)),
        nn.Unflatten(1, coarsest),
        *_up(dims, [out_channels, *widths], sizes),
    )
    for half in (encoder, decoder):
        _initialise(half, blocks=max(len(widths) - 1, 1))
    if conditions is None:
        return FlatNetwork(encoder, decoder, latent_dim)
    return FlatNetwork(Shifted(encoder[0], encoder[1:], width), Joined(decoder), latent_dim, conditions=conditions)


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
    """Layers from the data's level to the coarsest; stride 2 rounds odd sizes up."""
    layers: list[nn.Module] = []
    for level, (above, here) in enumerate(pairwise(channels)):
        halve = CONVOLUTIONS[dims](above, here, 3, stride=2, padding=1)
        layers += [*([nn.SiLU()] if level else []), halve, *_blocks(dims, channels, level)]
    return layers


def _up(dims: int, channels: list[int], sizes: list[tuple[int, ...]]) -> list[nn.Module]:
    """Layers from the coarsest level back to the data's."""
    layers: list[nn.Module] = []
    for level, (above, here) in enumerate(pairwise(channels)):
        layers = [*_blocks(dims, channels, level), nn.SiLU(), _Double(dims, here, above, sizes[level]), *layers]
    return layers


def _blocks(dims: int, channels: list[int], level: int) -> list[nn.Module]:
    """The level's block; none at the first of several levels, where it would cost most."""
    first_of_several = level == 0 and len(channels) > 2
    return [] if first_of_several else [_Block(dims, channels[level + 1])]


@torch.no_grad()
def _initialise(half: nn.Sequential, blocks: int) -> None:
    """Draw the initial weights of the encoder or decoder, which has this number of blocks."""
    layers = [module for module in half.modules() if isinstance(module, _Weighted)]
    for number, layer in enumerate(layers):
        gain = GAIN if number else 1.0  # data and latents come without an activation
        nn.init.normal_(layer.weight, std=gain / math.sqrt(_fan_in(layer)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for block in (module for module in half if isinstance(module, _Block)):
        block.second.weight.div_(math.sqrt(blocks))
    layers[-1].weight.mul_(LAST_GAIN)


def _fan_in(layer: _Weighted) -> int:
    """Number of products that each output value sums."""
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return layer.in_channels * math.prod(layer.kernel_size) // math.prod(layer.stride)
    return layer.weight[0].numel()


@final
class _Block(nn.Module):
    """Add two convolutions of x to x."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.first = CONVOLUTIONS[dims](channels, channels, 3, padding=1)
        self.second = CONVOLUTIONS[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(silu(self.first(silu(x))))
        return x + change


@final
class _Double(nn.Module):
    """Double the size, and crop to that of the level above, which may be odd."""

    def __init__(self, dims: int, channels: int, out_channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution = TRANSPOSED[dims](channels, out_channels, 4, stride=2, padding=1)
        self.crop: tuple[EllipsisType | slice, ...] = (..., *(slice(n) for n in size))

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.convolution(x)
        return doubled[self.crop]
