"""What a ladder network is made of: a layer of latents, and the convolutions around it (Child 2021, arXiv 2011.10650)."""

import math
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.networks.ladder_plan import DecoderBlock

__all__ = ["Diagonal", "Draw", "LadderLayer", "bottleneck", "conv_same", "draw"]

BOTTLENECK = 0.25
"""Channels within a block, as a share of those between blocks (the published value)."""
LARGEST_BIAS_MAP = 64
"""Resolutions above it have no bias of their own at each place, as published."""


class Diagonal(NamedTuple):
    """A Gaussian over a map ``(batch, latent_dim, rows, columns)``, independent from value to value."""

    mean: Tensor
    log_std: Tensor


class Draw(NamedTuple):
    """Latents, KL(q‖p) of each ``(batch, latent_dim, rows, columns)``, and log p(z) − log q(z) of each example, in nats."""

    z: Tensor
    latent_kl: Tensor
    log_ratio: Tensor

    @property
    def kl(self) -> Tensor:
        """KL(q‖p) of each example."""
        return self.latent_kl.flatten(1).sum(1)


@final
class LadderLayer(nn.Module):
    """One layer of latents: its prior, its posterior, and what its draw does to the features."""

    def __init__(self, block: DecoderBlock, width: int, latent_dim: int, layers: int, *, lowest: bool) -> None:
        super().__init__()
        self.resolution = block.resolution
        self.latent_dim = latent_dim
        self.factor = 1 if block.mix_in is None else block.resolution // block.mix_in
        opens = lowest or (block.mix_in is not None and block.resolution <= LARGEST_BIAS_MAP)
        self.bias_map = nn.Parameter(torch.zeros(1, width, block.resolution, block.resolution)) if opens else None
        depth_scale = 1 / math.sqrt(layers)
        self.prior = bottleneck(width, 2 * latent_dim + width, block.resolution, width, last_scale=0.0)
        self.posterior = bottleneck(2 * width, 2 * latent_dim, block.resolution, width)
        self.project = conv_same(latent_dim, width, scale=depth_scale)
        self.residual = bottleneck(width, width, block.resolution, width, last_scale=depth_scale)

    def enter(self, state: Tensor | None, n: int) -> Tensor:
        """Features at this layer's resolution."""
        if state is not None and self.factor > 1:
            state = functional.interpolate(state, scale_factor=self.factor, mode="nearest")
        if self.bias_map is None:
            assert state is not None
            return state
        return self.bias_map.expand(n, -1, -1, -1) if state is None else state + self.bias_map

    def prior_of(self, state: Tensor) -> tuple[Diagonal, Tensor]:
        """p(z_l | z_<l), and what the layer adds to the features whatever is drawn."""
        raw, residual = self.prior(state).split([2 * self.latent_dim, state.shape[1]], 1)
        return _diagonal(raw), residual

    def posterior_of(self, state: Tensor, features: Tensor) -> Diagonal:
        """q(z_l | z_<l, x)."""
        return _diagonal(self.posterior(torch.cat([state, features], 1)))

    def leave(self, state: Tensor, z: Tensor) -> Tensor:
        """Features that know the draw."""
        state = state + self.project(z.to(state.dtype))
        mixed: Tensor = state + self.residual(state)
        return mixed


def _diagonal(raw: Tensor) -> Diagonal:
    """Mean and log standard deviation, in float32 at least."""
    raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
    return Diagonal(*raw.chunk(2, 1))


def draw(posterior: Diagonal, prior: Diagonal, unit: Tensor) -> Draw:
    """One draw; the KL is analytic, the log-ratio is of this draw."""
    z = posterior.mean + posterior.log_std.exp() * unit
    precision = (-2 * prior.log_std).exp()
    log_ratio_of_stds = posterior.log_std - prior.log_std
    kl = 0.5 * ((2 * log_ratio_of_stds).exp() + (posterior.mean - prior.mean).square() * precision - 1) - log_ratio_of_stds
    log_ratio = log_ratio_of_stds + 0.5 * (unit.square() - (z - prior.mean).square() * precision)
    return Draw(z, kl, log_ratio.flatten(1).sum(1))


def bottleneck(in_channels: int, out_channels: int, resolution: int, width: int, last_scale: float = 1.0) -> nn.Sequential:
    """Four convolutions, each after a GELU, through fewer channels; up to 2×2 places there is nothing for a 3×3 kernel to see."""
    within = max(int(width * BOTTLENECK), 1)
    kernel = 3 if resolution > 2 else 1
    return nn.Sequential(
        nn.GELU(),
        conv_same(in_channels, within),
        nn.GELU(),
        conv_same(within, within, kernel),
        nn.GELU(),
        conv_same(within, within, kernel),
        nn.GELU(),
        conv_same(within, out_channels, scale=last_scale),
    )


def conv_same(in_channels: int, out_channels: int, kernel: int = 1, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the size, with torch's weights times the scale, and no bias at first."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    with torch.no_grad():
        conv.weight.mul_(scale)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
