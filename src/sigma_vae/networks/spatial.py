"""Latents that are feature maps: networks for pictures and series of any size that their strides divide."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from sigma_vae.networks.flat import OneLayer
from sigma_vae.networks.principal import decoded_patches, encoded_patches, solved_path_of_patches
from sigma_vae.priors import StandardNormal
from sigma_vae.registry import Argument, register
from sigma_vae.types import Maps, MeanMap, Noise, Prior, at_least_float32

LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -30.0, 20.0
"""Limits of the posterior's log-variance, those of diffusers."""
PER_GROUP = 4
"""Channels that a group norm treats together in the first level."""
EPS = 1e-6
WIDTHS = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)}
"""Channels of each level in units of ``width``, by the factor between the sizes of data and maps."""
DEFAULT = "f4c3"

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


@final
class SpatialNetwork(OneLayer):
    r"""An encoder and a decoder with a feature map of latents between them, and a diagonal Gaussian posterior per place.

    .. math:: q(z|x) = \prod_{c, i} N(z_{ci}; \mu_{ci}(x), \sigma_{ci}^2(x))

    Where encoder and decoder are convolutional, data of any size that ``stride`` divides are encoded and decoded, also
    of another size than that of training. A prior sees the map as one vector, ``z.flatten(1)``; a prior that was fitted
    to latents knows maps of the training size alone. :meth:`resize` makes another size that of samples. Training starts
    with a linear encoder and decoder of patches beside these two (:meth:`start_from`).

    Args:
        encoder: x ``(batch, C, *size)`` to ``(batch, 2·channels, *space)``: means, then log-variances (clamped to
            [−30, 20]).
        decoder: z ``(batch, channels, *space)`` to features ``(batch, in_channels, *size)``.
        channels: channels of the map.
        space: size of the map for data of the training size.
        stride: factor between the sizes of data and map.
        prior: p(z) over vectors; N(0, I) unless given.
        picture_channels: C, where the data are pictures in [0, 1] and the halves work with [−1, 1]: the encoder is given
            2x − 1, and of the decoder's output the first C channels become (h + 1)/2. 0: nothing is mapped.

    Raises:
        ValueError: the encoder's output has another shape, or x a size that the stride does not divide.

    >>> halve, double = nn.Conv2d(1, 2 * 3, 2, stride=2), nn.ConvTranspose2d(3, 1, 2, stride=2)
    >>> network = SpatialNetwork(halve, double, channels=3, space=(4, 4), stride=2)
    >>> network.infer(torch.zeros(5, 1, 8, 8)).h.shape, network.posterior(torch.zeros(5, 1, 6, 10)).loc.shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5, 3, 3, 5]))
    """

    trains_in_bfloat16 = True

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        channels: int,
        space: Sequence[int],
        stride: int,
        prior: Prior | None = None,
        picture_channels: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.channels = channels
        self.space = tuple(space)
        self.stride = stride
        self.picture_channels = picture_channels
        self.keeps_layers = False
        """Whether nothing may be added to encoder and decoder, so that training starts at the weights that they have."""
        self.prior = StandardNormal(channels * math.prod(space)) if prior is None else prior

    @property
    def latents(self) -> Maps:
        """One map per example, of the size for training data."""
        return Maps(self.channels, *self.space)

    def resize(self, size: Sequence[int]) -> None:
        """Take examples of this size from now on, for samples too, with the prior N(0, I) where the size changes.

        Raises:
            ValueError: the stride does not divide it, or it has another number of axes.

        >>> network = spatial((3, 16, 16), out_channels=3, width=8)
        >>> network.resize((24, 40))
        >>> network.generate(2).shape
        torch.Size([2, 3, 24, 40])
        """
        if len(size) != len(self.space):
            raise ValueError(f"the network reads examples with {len(self.space)} axes of space, got the size {tuple(size)}")
        check_size(size, self.stride)
        space = tuple(n // self.stride for n in size)
        if space != self.space:
            self.space = space
            self.prior = StandardNormal(self.channels * math.prod(space)).to(next(self.parameters()))

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        """q(z|x), parameters ``(batch, channels, *space)``, in float32 at least."""
        self.refuse_unread(condition=condition)
        x = self.encoder_input(x)
        check_size(x.shape[-len(self.space) :], self.stride)
        moments = self.encoder(2 * x - 1 if self.picture_channels else x)
        expected = (len(x), 2 * self.channels, *(size // self.stride for size in x.shape[-len(self.space) :]))
        if moments.shape != torch.Size(expected):
            raise ValueError(f"the encoder gives means and log-variances of shape {expected}, got {tuple(moments.shape)}")
        mean, log_variance = at_least_float32(moments).chunk(2, dim=1)
        if self.linear is not None:
            linear_mean, linear_log_variance = encoded_patches(self.linear, x)
            mean, log_variance = mean + linear_mean, log_variance + linear_log_variance
        log_variance = log_variance.clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE)
        return Normal(mean, torch.exp(0.5 * log_variance), validate_args=False)

    def decode(self, z: Tensor | Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Features of z ``(batch, channels, *space)``, of any size."""
        self.refuse_unread(condition=condition)
        features: Tensor = self.decoder(z)
        if self.picture_channels:
            means, others = features.tensor_split([self.picture_channels], dim=1)
            middle = 0.5 if self.linear is None else 0.0  # the linear path has its own
            features = torch.cat([means / 2 + middle, others], 1)
        if self.linear is not None:
            assert isinstance(z, Tensor)
            features = features + decoded_patches(self.linear, z)
        return features

    @property
    def has_start(self) -> bool:
        """Whether :meth:`start_from` may add a linear path to the layers."""
        return not self.keeps_layers

    @torch.no_grad()
    def start_from(self, data: Iterable[Tensor], mean: MeanMap | None, features: Callable[[float], Tensor]) -> float | None:
        """Start at the best VAE that encodes and decodes each patch of ``stride`` values a side by itself, linearly.

        This is probabilistic PCA of patches, with a latent for each channel of the map: a linear encoder and decoder are
        added to the network's own, whose last layers are set to 0. See :meth:`Network.start_from`.

        Raises:
            ValueError: the network keeps its layers, or setting the last one with weights to 0 does not make the encoder's,
                or the decoder's, output 0.
        """
        if self.keeps_layers:
            raise ValueError(
                "the layers of this network are another library's, and get no linear path; train it with start=random"
            )
        x = self.encoder_input(next(iter(data))[:1].to(next(self.parameters())))
        z = torch.linspace(-1, 1, self.latents.sizes[0]).to(x).reshape(1, *self.latents.shapes[0])
        solved = solved_path_of_patches(
            lambda: (self.encoder_input(batch.cpu()) for batch in data), self.stride, self.channels, mean, features
        )
        if solved is None:
            return None
        self.silence((2 * x - 1 if self.picture_channels else x,), (z,))
        self.linear = solved.path.to(x)
        return solved.residual_std

    def latent_kl(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> list[Tensor]:
        """KL of each place and channel from N(0, 1), ``(batch, channels, *space)``, whatever prior was fitted."""
        self.refuse_unread(condition=condition)
        mean, std = (posterior := self.posterior(x)).loc, posterior.scale
        return [0.5 * (mean.square() + std.square() - 1) - std.log()]

    def check_latents(self, z: Tensor) -> None:
        """Refuse a map of another size than that of the latents that the prior was fitted to."""
        if self.prior.needs_fit and z.shape[-len(self.space) :].numel() != math.prod(self.space):
            trained = "×".join(str(self.stride * n) for n in self.space)
            raise ValueError(
                f"the {type(self.prior).__name__} was fitted to latents of examples of size {trained}, and knows no others;"
                f" give examples of that size, or take N(0, I) back: sigma-vae fit-prior RUN --prior standard"
            )


@dataclass(frozen=True)
class MapStatistics:
    """Moments of latent maps over examples, posterior draws and places."""

    mean: list[float]
    """Mean of each channel."""
    std: list[float]
    """Standard deviation of each channel."""
    excess_kurtosis: list[float]
    """Fourth standardised moment of each channel minus 3: 0 for a normal distribution."""
    shift_factor: float
    """Mean of all channels."""
    scaling_factor: float
    """1 over the standard deviation of all latents about their common mean."""
    examples: int

    def to_config(self) -> dict[str, Any]:
        """The entries of a configuration of diffusers."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": self.mean,
            "latents_std": self.std,
        }


@torch.no_grad()
def map_statistics(posteriors: Iterable[Normal]) -> MapStatistics:
    r"""Moments of the aggregate posterior q(z), from the moments of each Gaussian and without any draw.

    .. math:: E z = \overline{m}, \quad E z^2 = \overline{m^2 + s^2}, \quad E z^3 = \overline{m^3 + 3 m s^2}, \quad
        E z^4 = \overline{m^4 + 6 m^2 s^2 + 3 s^4}

    over examples and places. Sums are in float64.

    Shapes:
        parameters of each posterior ``(batch, channels, *space)``.

    Raises:
        ValueError: there is none.

    >>> unit = Normal(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    >>> found = map_statistics([unit])
    >>> found.std, found.excess_kurtosis, found.scaling_factor
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], 1.0)
    """
    sums, places, examples = torch.zeros(()), 0, 0
    for posterior in posteriors:
        m, v = posterior.loc.double(), posterior.scale.double().square()
        powers = (m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2)
        each = torch.stack([power.transpose(0, 1).flatten(1) for power in powers]).cpu()
        sums, places, examples = sums + each.sum(-1), places + each.shape[-1], examples + len(m)
    if not examples:
        raise ValueError("there are no examples to measure the latents of")
    first, second, third, fourth = sums / places
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    shift = float(first.mean())
    return MapStatistics(
        mean=first.tolist(),
        std=variance.sqrt().tolist(),
        excess_kurtosis=(central / variance**2 - 3).tolist(),
        shift_factor=shift,
        scaling_factor=float(second.mean() - shift**2) ** -0.5,
        examples=examples,
    )


def check_size(size: Sequence[int], stride: int) -> None:
    """Refuse a size that the strides do not divide: nothing is padded or cropped.

    Raises:
        ValueError: a side is no multiple of the stride.

    >>> check_size((30, 45), 4)
    Traceback (most recent call last):
    ...
    ValueError: the network shrinks each side by a factor of 4 and pads nothing, so it reads sizes that 4 divides, got 30×45;
    crop or resize to 28×44
    """
    if any(n % stride or n < stride for n in size):
        below = "×".join(str(max(n // stride, 1) * stride) for n in size)
        raise ValueError(
            f"the network shrinks each side by a factor of {stride} and pads nothing, so it reads sizes that {stride} divides,"
            f" got {'×'.join(map(str, size))}; crop or resize to {below}"
        )


def _plan(text: str) -> dict[str, str]:
    _read_plan(text)
    return {"plan": text}


def _read_plan(text: str) -> tuple[int, int]:
    """Factor and channels of a plan.

    >>> _read_plan("f8c16")
    (8, 16)
    """
    found = re.fullmatch(r"f(\d{1,2})c(\d{1,4})", text)
    factor, channels = (int(found[1]), int(found[2])) if found else (0, 0)
    if factor not in WIDTHS or channels < 1:
        raise ValueError(
            f"it takes fFcC: the factor F between the sizes of data and latents (one of {', '.join(map(str, WIDTHS))}), and the number C"
            f" of latent channels; got {text!r}"
        )
    return factor, channels


@register.network(
    "spatial", argument=Argument("fFcC", _plan, DEFAULT), latents="maps", reads_clips=False, has_prior=True, mean="identity"
)
def spatial(shape: Sequence[int], out_channels: int, width: int = 32, plan: str = DEFAULT) -> SpatialNetwork:
    """Convolutional autoencoder whose latents are a feature map, as in latent diffusion, for images and series.

    ``f8c4`` shrinks each side eightfold, to a map with 4 channels. Residual blocks with group norm lead to the lowest
    resolution and back, with one attention there (Rombach et al. 2022, arXiv 2112.10752, after Esser et al. 2021, arXiv
    2012.09841). For images, layers and their names are those of diffusers' ``AutoencoderKL`` with one block per level and
    without 1×1 convolutions around the latents, so that the weights can be exported.

    Args:
        shape: of one example: an image ``(C, H, W)`` or a series ``(C, T)``. Other sizes can be read afterwards.
        out_channels: ``likelihood.in_channels``.
        width: channels of the first level, a multiple of 4; deeper levels have up to four times as many.
        plan: ``fFcC``: the factor F between the sizes of data and map, and the channels C of the map.

    Raises:
        ValueError: the data are neither images nor series, F does not divide their size, or 4 does not divide the width.

    >>> network = spatial((3, 32, 32), out_channels=3, width=8, plan="f4c3")
    >>> network.latents.shapes, network.posterior(torch.zeros(1, 3, 24, 40)).loc.shape
    (((3, 8, 8),), torch.Size([1, 3, 6, 10]))
    >>> spatial((2, 1000), out_channels=2, width=8, plan="f8c4").generate(5).shape
    torch.Size([5, 2, 1000])
    """
    dims = len(shape) - 1
    if dims not in CONVOLUTIONS:
        raise ValueError(
            f"the spatial network reads images (C, H, W) and series (C, T), got an example of shape {tuple(shape)};"
            " use the mlp network for tables"
        )
    if width % PER_GROUP:
        raise ValueError(f"the width of the spatial network is a multiple of {PER_GROUP}, got {width}")
    factor, channels = _read_plan(plan)
    check_size(shape[1:], factor)
    widths = [width * times for times in WIDTHS[factor]]
    groups = math.gcd(width // PER_GROUP, 32)
    network = SpatialNetwork(
        _Encoder(dims, shape[0], widths, 2 * channels, groups),
        _Decoder(dims, channels, widths, out_channels, groups),
        channels,
        [size // factor for size in shape[1:]],
        factor,
        picture_channels=shape[0] if dims == 2 else 0,
    )
    if dims == 2:
        network.diffusers_config = _diffusers_config(shape, channels, widths, groups)
    return network


def _diffusers_config(shape: Sequence[int], channels: int, widths: Sequence[int], groups: int) -> dict[str, Any]:
    return {
        "in_channels": shape[0],
        "out_channels": shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": groups,
        "sample_size": max(shape[1:]),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


@final
class _Residual(nn.Module):
    """Two normalised convolutions, added to the input."""

    def __init__(self, dims: int, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims]
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = convolution(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = convolution(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = convolution(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        if self.conv_shortcut is None:
            return x + change
        # In one memory layout, else DistributedDataParallel warns of gradients in another one than their parameters'.
        shortcut: Tensor = self.conv_shortcut(x.contiguous() if self.training else x)
        return shortcut + change


@final
class _Attention(nn.Module):
    """Self-attention of all places with one head, added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x.flatten(2)).transpose(1, 2)
        query, key, value = (layer(places)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](scaled_dot_product_attention(query, key, value)[:, 0])
        result: Tensor = mixed.transpose(1, 2).reshape(x.shape) + x
        return result


@final
class _Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dims: int, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(channels, groups)])
        self.resnets = nn.ModuleList(_Residual(dims, channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return result


@final
class _Halve(nn.Module):
    """A convolution with stride 2, padded at the end of each axis."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, stride=2)
        self.padding = (0, 1) * dims

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(pad(x, self.padding))
        return result


@final
class _Double(nn.Module):
    """Repeat each value along each axis, then a convolution."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return result


@final
class _Down(nn.Module):
    """One residual block, and a halving unless the level is the last."""

    def __init__(self, dims: int, channels: int, out_channels: int, groups: int, *, halves: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Residual(dims, channels, out_channels, groups)])
        self.downsamplers = nn.ModuleList([_Halve(dims, out_channels)] if halves else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


@final
class _Up(nn.Module):
    """Two residual blocks, and a doubling unless the level is the last."""

    def __init__(self, dims: int, channels: int, out_channels: int, groups: int, *, doubles: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(dims, c, out_channels, groups) for c in (channels, out_channels))
        self.upsamplers = nn.ModuleList([_Double(dims, out_channels)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


@final
class _Encoder(nn.Module):
    """From data to a map, level by level."""

    def __init__(self, dims: int, channels: int, widths: Sequence[int], out_channels: int, groups: int) -> None:
        super().__init__()
        convolution, levels = CONVOLUTIONS[dims], len(widths)
        self.conv_in = convolution(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Down(dims, widths[max(i - 1, 0)], widths[i], groups, halves=i < levels - 1) for i in range(levels)
        )
        self.mid_block = _Middle(dims, widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = convolution(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        result: Tensor = self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))
        return result


@final
class _Decoder(nn.Module):
    """From a map to features, level by level."""

    def __init__(self, dims: int, channels: int, widths: Sequence[int], out_channels: int, groups: int) -> None:
        super().__init__()
        convolution, up = CONVOLUTIONS[dims], list(reversed(widths))
        self.conv_in = convolution(channels, up[0], 3, padding=1)
        self.mid_block = _Middle(dims, up[0], groups)
        self.up_blocks = nn.ModuleList(
            _Up(dims, up[max(i - 1, 0)], up[i], groups, doubles=i < len(up) - 1) for i in range(len(up))
        )
        self.conv_norm_out = nn.GroupNorm(groups, up[-1], EPS)
        self.conv_out = convolution(up[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        result: Tensor = self.conv_out(silu(self.conv_norm_out(z)))
        return result
