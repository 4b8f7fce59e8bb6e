r"""A ladder of latents from coarse to fine, for images: Very Deep VAEs (Child 2021, arXiv 2011.10650), of any size and depth."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.networks.ladder_plan import DecoderBlock, EncoderBlock, LadderPlan
from sigma_vae.networks.temperature import per_layer
from sigma_vae.types import Inference, Network, Noise, Temperature

__all__ = ["HierarchicalNetwork", "hierarchical"]

CIFAR10 = "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3/1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
"""The published plan."""
BOTTLENECK = 0.25
"""Channels within a block, as a share of those between blocks (the published value)."""
INPUT_GAIN = 4.0
"""The input is (x − ½) times this: about unit variance for natural images."""
LARGEST_BIAS_MAP = 64
"""Resolutions above it have no bias of their own at each place, as published."""
SMALLEST = 4


class _Preset(NamedTuple):
    plan: Callable[[int], LadderPlan]
    """From the image's longer side."""
    width: int
    latent_dim: int


def hierarchical(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int | None = None,
    width: int | None = None,
    plan: str = "tiny",
) -> "HierarchicalNetwork":
    """A ladder network by the name of its size, or by its plan.

    ``tiny`` is for a CPU and images of any size: three resolutions, of which the highest has at most 16 places a side (each a patch of
    pixels). ``cifar10`` has the published sizes: 43 layers of latents, 39 million parameters. A plan of your own, such as
    ``28x2,28d4,7,7d7/1,7m1,7,28m7,28``, is read by :meth:`LadderPlan.parse`.

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: what the likelihood reads, ``likelihood.in_channels``.
        latent_dim: channels of each layer of latents; the preset's unless given (a plan of your own: that of tiny).
        width: channels between blocks, likewise.
        plan: tiny, cifar10, or ``ENCODER/DECODER``.

    Raises:
        ValueError: the data are no images or too small, the plan cannot be read, or does not fit the image.

    >>> network = hierarchical((1, 28, 28), out_channels=1)
    >>> network.plan.resolution, network.infer(torch.zeros(2, 1, 28, 28)).h.shape
    (14, torch.Size([2, 1, 28, 28]))
    """
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the hierarchical network reads images (C, H, W) of at least {SMALLEST}×{SMALLEST}, got an example of shape"
            f" {tuple(shape)}; use the mlp network for tables, series and tiny images"
        )
    if plan not in PRESETS and "/" not in plan:
        raise ValueError(f"a plan is one of {', '.join(PRESETS)}, or ENCODER/DECODER as in 14,14d14/1,14m1; got {plan!r}")
    preset = PRESETS.get(plan, PRESETS["tiny"])
    return HierarchicalNetwork(
        shape,
        out_channels,
        preset.plan(max(shape[1:])) if plan in PRESETS else LadderPlan.parse(plan),
        preset.latent_dim if latent_dim is None else latent_dim,
        preset.width if width is None else width,
    )


def _tiny(size: int) -> LadderPlan:
    """Three resolutions: at most 16, its half, and 1."""
    patch = -(-size // 16)
    half = -(-size // (2 * patch))
    top = 2 * half
    return LadderPlan.parse(f"{top}x2,{top}d2,{half}x2,{half}d{half},1/1x2,{half}m1,{half}x3,{top}m{half},{top}x3")


PRESETS = {"tiny": _Preset(_tiny, 64, 8), "cifar10": _Preset(lambda size: LadderPlan.parse(CIFAR10), 384, 16)}


@final
class HierarchicalNetwork(Network):
    r"""Bottom-up residual encoder, top-down layers of Gaussian latents, deterministic residuals between them.

    .. math:: p(z) = \prod_l p(z_l | z_{<l}), \qquad q(z|x) = \prod_l q(z_l | z_{<l}, x)

    Both are diagonal Gaussians over a map ``(latent_dim, resolution, resolution)``. At initialisation every prior is N(0, 1), and what a
    block adds is scaled by 1/√blocks, so that depth does not matter (Child 2021, section 3). Blocks are pre-activation bottlenecks
    with GELU and no batch statistics; where the highest resolution is a fraction of the image's, squares of pixels become channels.

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: what the likelihood reads, ``likelihood.in_channels``.
        plan: the blocks.
        latent_dim: channels of each layer of latents.
        width: channels between blocks.

    Raises:
        ValueError: the plan does not fit the image.

    >>> network = HierarchicalNetwork((1, 8, 8), 1, LadderPlan.parse("8,8d8/1,8m1"), latent_dim=2, width=8)
    >>> network.infer(torch.zeros(5, 1, 8, 8)).kl.shape
    torch.Size([5, 2])
    >>> latents = network.latents(torch.zeros(5, 1, 8, 8))
    >>> [tuple(z.shape) for z in latents], network.decode(latents).shape
    ([(5, 2, 1, 1), (5, 2, 8, 8)], torch.Size([5, 1, 8, 8]))
    """

    def __init__(self, shape: Sequence[int], out_channels: int, plan: LadderPlan, latent_dim: int, width: int) -> None:
        super().__init__()
        channels, self.rows, self.columns = shape
        self.channels = channels
        self.plan = plan
        self.latent_dim = latent_dim
        self.patch = plan.patch(self.rows, self.columns)
        self.stem = _conv(channels * self.patch**2, width, kernel=3)
        self.encoder = nn.ModuleList(_residual(block, width, len(plan.encoder)) for block in plan.encoder)
        self.decoder = nn.ModuleList(
            _Layer(block, width, latent_dim, plan.layers, lowest=number == 0) for number, block in enumerate(plan.decoder)
        )
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.head = _conv(width, out_channels * self.patch**2)

    @property
    def layer_shapes(self) -> list[tuple[int, int, int]]:
        """``(latent_dim, rows, columns)`` of each layer of latents."""
        return [(self.latent_dim, block.resolution, block.resolution) for block in self.plan.decoder]

    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        """One posterior draw of every layer, from the top down; KL in closed form, summed over each layer's map."""
        _refuse(context=context, mask=mask)
        h, draws = self._infer(x, noise)
        return Inference(
            h=h,
            target=x,
            kl=torch.stack([draw.kl for draw in draws], -1),
            log_ratio=torch.stack([draw.log_ratio for draw in draws], -1).sum(-1),
        )

    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """Features of n draws from the prior; a temperature of 0 takes each layer's mean."""
        _refuse(context=context)
        return self._descend(n, self._prior_draws([], generator, temperature))

    def latents(self, x: Tensor, noise: Noise | None = None) -> list[Tensor]:
        """One posterior draw of every layer, ``(batch, latent_dim, rows, columns)`` each, from the top down."""
        return [draw.z for draw in self._infer(x, noise)[1]]

    def decode(
        self, latents: Sequence[Tensor], generator: torch.Generator | None = None, temperature: Temperature = 1.0
    ) -> Tensor:
        """Features of latents; the layers below the last one given are drawn from their priors.

        Args:
            latents: of the top layer, or more, ``(batch, latent_dim, rows, columns)`` each.
            generator: of the layers that are drawn.
            temperature: of the layers that are drawn.

        Raises:
            ValueError: none or too many are given, or one has another shape than its layer.
        """
        shapes = [(len(latents[0]) if len(latents) else 0, *shape) for shape in self.layer_shapes]
        given = [tuple(z.shape) for z in latents]
        if not given or given != shapes[: len(given)]:
            raise ValueError(f"decode takes latents of the top layer or more, of shapes {shapes}; got {given}")
        return self._descend(len(latents[0]), self._prior_draws(latents, generator, temperature))

    def _infer(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, list["_Draw"]]:
        features = self._encode(x)
        draws: list[_Draw] = []

        def draw(layer: _Layer, state: Tensor, prior: _Gaussian) -> Tensor:
            posterior = layer.posterior_of(state, features[layer.resolution])
            shape = posterior.mean.shape
            unit = torch.randn_like(posterior.mean) if noise is None else noise(shape).to(posterior.mean)
            draws.append(_draw(posterior, prior, unit))
            return draws[-1].z

        return self._descend(len(x), draw), draws

    def _prior_draws(self, given: Sequence[Tensor], generator: torch.Generator | None, temperature: Temperature) -> "_Choose":
        known = iter(given)
        temperatures = iter(per_layer(temperature, self.plan.layers))

        def draw(layer: _Layer, state: Tensor, prior: _Gaussian) -> Tensor:
            spread = next(temperatures)
            z = next(known, None)
            if z is not None:
                return z
            unit = torch.empty_like(prior.mean).normal_(generator=generator)
            return prior.mean + spread * prior.log_std.exp() * unit

        return draw

    def _encode(self, x: Tensor) -> dict[int, Tensor]:
        """The last features of each resolution."""
        expected = (self.channels, self.rows, self.columns)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"this network was built for examples of shape {expected}, got a batch of shape {tuple(x.shape)}")
        side = self.patch * self.plan.resolution
        padded = functional.pad(x, (0, side - self.columns, 0, side - self.rows), mode="replicate")
        state = self.stem(functional.pixel_unshuffle(INPUT_GAIN * (padded - 0.5), self.patch))
        features = {self.plan.resolution: state}
        for block, residual in zip(self.plan.encoder, self.encoder, strict=True):
            state = state + residual(state)
            state = functional.avg_pool2d(state, block.pool) if block.pool > 1 else state
            features[state.shape[-1]] = state
        return features

    def _descend(self, n: int, choose: "_Choose") -> Tensor:
        """The way down the ladder, which inference and generation share: they differ in how a layer's latents are chosen."""
        state: Tensor | None = None
        for layer in self.decoder:
            assert isinstance(layer, _Layer)
            state = layer.enter(state, n)
            prior, residual = layer.prior_of(state)
            z = choose(layer, state, prior)
            state = layer.leave(state + residual, z)
        assert state is not None
        features: Tensor = self.head(state * self.gain + self.offset)
        return functional.pixel_shuffle(features, self.patch)[..., : self.rows, : self.columns]


class _Gaussian(NamedTuple):
    mean: Tensor
    log_std: Tensor


class _Draw(NamedTuple):
    """Latents ``(batch, latent_dim, rows, columns)``, and of each example KL(q‖p) and log p(z) − log q(z), in nats."""

    z: Tensor
    kl: Tensor
    log_ratio: Tensor


@final
class _Layer(nn.Module):
    """One layer of latents: its prior, its posterior, and what its draw does to the features."""

    def __init__(self, block: DecoderBlock, width: int, latent_dim: int, layers: int, *, lowest: bool) -> None:
        super().__init__()
        self.resolution = block.resolution
        self.latent_dim = latent_dim
        self.factor = 1 if block.mix_in is None else block.resolution // block.mix_in
        opens = lowest or (block.mix_in is not None and block.resolution <= LARGEST_BIAS_MAP)
        self.bias_map = nn.Parameter(torch.zeros(1, width, block.resolution, block.resolution)) if opens else None
        depth_scale = 1 / math.sqrt(layers)
        self.prior = _bottleneck(width, 2 * latent_dim + width, block.resolution, width, last_scale=0.0)
        self.posterior = _bottleneck(2 * width, 2 * latent_dim, block.resolution, width)
        self.project = _conv(latent_dim, width, scale=depth_scale)
        self.residual = _bottleneck(width, width, block.resolution, width, last_scale=depth_scale)

    def enter(self, state: Tensor | None, n: int) -> Tensor:
        """Features at this layer's resolution."""
        if state is not None and self.factor > 1:
            state = functional.interpolate(state, scale_factor=self.factor, mode="nearest")
        if self.bias_map is None:
            assert state is not None
            return state
        return self.bias_map.expand(n, -1, -1, -1) if state is None else state + self.bias_map

    def prior_of(self, state: Tensor) -> tuple[_Gaussian, Tensor]:
        """p(z_l | z_<l), and what the layer adds to the features whatever is drawn."""
        raw, residual = self.prior(state).split([2 * self.latent_dim, state.shape[1]], 1)
        return _gaussian(raw), residual

    def posterior_of(self, state: Tensor, features: Tensor) -> _Gaussian:
        """q(z_l | z_<l, x)."""
        return _gaussian(self.posterior(torch.cat([state, features], 1)))

    def leave(self, state: Tensor, z: Tensor) -> Tensor:
        """Features that know the draw."""
        state = state + self.project(z)
        mixed: Tensor = state + self.residual(state)
        return mixed


_Choose = Callable[[_Layer, Tensor, _Gaussian], Tensor]
"""Chooses a layer's latents, given the features above them and their prior."""


def _gaussian(raw: Tensor) -> _Gaussian:
    """Mean and log standard deviation, in float32 at least."""
    raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
    return _Gaussian(*raw.chunk(2, 1))


def _draw(posterior: _Gaussian, prior: _Gaussian, unit: Tensor) -> _Draw:
    """One draw; the KL is analytic, the log-ratio is of this draw."""
    z = posterior.mean + posterior.log_std.exp() * unit
    precision = (-2 * prior.log_std).exp()
    log_ratio_of_stds = posterior.log_std - prior.log_std
    kl = 0.5 * ((2 * log_ratio_of_stds).exp() + (posterior.mean - prior.mean).square() * precision - 1) - log_ratio_of_stds
    log_ratio = log_ratio_of_stds + 0.5 * (unit.square() - (z - prior.mean).square() * precision)
    return _Draw(z, kl.flatten(1).sum(1), log_ratio.flatten(1).sum(1))


def _residual(block: EncoderBlock, width: int, blocks: int) -> nn.Sequential:
    return _bottleneck(width, width, block.resolution, width, last_scale=1 / math.sqrt(blocks))


def _bottleneck(in_channels: int, out_channels: int, resolution: int, width: int, last_scale: float = 1.0) -> nn.Sequential:
    """Four convolutions, each after a GELU, through fewer channels; up to 2×2 places there is nothing for a 3×3 kernel to see."""
    within = max(int(width * BOTTLENECK), 1)
    kernel = 3 if resolution > 2 else 1
    return nn.Sequential(
        nn.GELU(),
        _conv(in_channels, within),
        nn.GELU(),
        _conv(within, within, kernel),
        nn.GELU(),
        _conv(within, within, kernel),
        nn.GELU(),
        _conv(within, out_channels, scale=last_scale),
    )


def _conv(in_channels: int, out_channels: int, kernel: int = 1, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the size, with torch's weights times the scale, and no bias at first."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    with torch.no_grad():
        conv.weight.mul_(scale)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _refuse(**given: Tensor | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is for video networks; this one is for images and takes none")
