"""Hierarchical latents for images, from coarse to fine: Very Deep VAEs (Child 2021, arXiv 2011.10650)."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from sigma_vae.conditions import WIDTH, Conditions, Embedding
from sigma_vae.networks.principal import (
    MayStartLinear,
    SolvedPath,
    decoded_patches,
    encoded_patches,
    solved_path_of_patches,
)
from sigma_vae.registry import Argument, register
from sigma_vae.types import (
    ChooseLatents,
    Hierarchy,
    Inference,
    MeanMap,
    Noise,
    Temperature,
    at_least_float32,
    per_layer,
    standard_normal,
)

CIFAR10 = "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3/1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
"""The published plan."""
INPUT_GAIN = 4.0
"""The network reads (x − ½) times this: about unit variance for natural images."""
SMALLEST = 4
BOTTLENECK = 0.25
"""Channels within a block, as a share of those between blocks (the published value)."""
LARGEST_BIAS_MAP = 64
"""Layers at higher resolutions have no bias map, as published."""
LARGEST_PLAN = 1000
"""Most blocks on each side; the largest published plans have about 70."""
LARGEST_PADDING = 0.25
"""Most padding, as a share of the image's longer side."""


class EncoderBlock(NamedTuple):
    """A residual block at this resolution, and the average pooling after it."""

    resolution: int
    pool: int = 1


class DecoderBlock(NamedTuple):
    """A layer of latents at this resolution; the first layer of a resolution mixes in the features of the lower one."""

    resolution: int
    mix_in: int | None = None


@final
@dataclass(frozen=True)
class HierarchyPlan:
    """The blocks of a hierarchical network, in the order in which data pass through them.

    The notation is that of Very Deep VAEs (Child 2021, arXiv 2011.10650). Encoder tokens are ``32x11`` (eleven blocks
    at 32×32), ``32d2`` (one block there, then average pooling by 2) and ``32`` (one block). Decoder tokens are ``8x5``
    (five layers of latents at 8×8), ``8m4`` (one layer, the first at 8×8, which mixes in the 4×4 features) and ``8``
    (one layer).

    Args:
        encoder: blocks from the image down.
        decoder: layers from the lowest resolution up to the encoder's highest.

    Raises:
        ValueError: the blocks do not fit each other, or the two halves do not meet.

    >>> plan = HierarchyPlan.parse("8x2,8d2,4,4d4/1x2,4m1,8m4,8x2")
    >>> plan.resolution, plan.layers
    (8, 6)
    >>> plan.encoder[2:4], plan.decoder[2]
    ((EncoderBlock(resolution=8, pool=2), EncoderBlock(resolution=4, pool=1)), DecoderBlock(resolution=4, mix_in=1))
    >>> str(plan)
    '8x2,8d2,4,4d4/1x2,4m1,8m4,8x2'
    """

    encoder: tuple[EncoderBlock, ...]
    decoder: tuple[DecoderBlock, ...]

    def __post_init__(self) -> None:
        """Refuse blocks that do not fit each other."""
        _check_encoder(self.encoder)
        _check_decoder(self.decoder, self.encoder)

    @classmethod
    def parse(cls, text: str) -> "HierarchyPlan":
        """Read ``encoder/decoder``.

        Raises:
            ValueError: a token cannot be read, or the blocks do not fit each other.
        """
        encoder, slash, decoder = text.partition("/")
        if not slash:
            raise ValueError(f"a plan is ENCODER/DECODER, as in 14x2,14d14/1,14m1,14; got {text!r}, which has no slash")
        down = tuple(EncoderBlock(size, number or 1) for size, number in _tokens(encoder, "d", "14x2, 14d2 or 14"))
        up = tuple(DecoderBlock(size, number) for size, number in _tokens(decoder, "m", "14x2, 14m7 or 14"))
        return cls(down, up)

    def __str__(self) -> str:
        down = _written((block.resolution, "" if block.pool == 1 else f"d{block.pool}") for block in self.encoder)
        up = _written((block.resolution, "" if block.mix_in is None else f"m{block.mix_in}") for block in self.decoder)
        return f"{down}/{up}"

    @property
    def resolution(self) -> int:
        """The highest resolution."""
        return self.encoder[0].resolution

    @property
    def layers(self) -> int:
        """Number of layers of latents."""
        return len(self.decoder)

    def patch(self, rows: int, columns: int) -> int:
        """Side of the square of pixels that becomes one position at the highest resolution.

        The image is padded to a square of side ``resolution · patch``.

        Raises:
            ValueError: more than a quarter of the longer side would be padding.

        >>> HierarchyPlan.parse("14,14d14/1,14m1").patch(28, 28)
        2
        """
        longer = max(rows, columns)
        patch = -(-longer // self.resolution)
        if patch * self.resolution > (1 + LARGEST_PADDING) * longer:
            raise ValueError(
                f"the plan's highest resolution {self.resolution}, or a multiple of it, has to be the image's longer side or at most a"
                f" quarter more, but the image has {rows}×{columns} pixels; begin the plan with {longer} or half of it"
            )
        return patch


def _tokens(text: str, letter: str, examples: str) -> Iterator[tuple[int, int | None]]:
    """Yield the resolution of each block, and the number after its letter."""
    left = LARGEST_PLAN
    for token in text.split(","):
        match = re.fullmatch(rf"([1-9]\d*)(?:([x{letter}])([1-9]\d*))?", token.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"{token!r} in {text!r} is not a block; write a block as {examples}")
        resolution, kind, number = int(match[1]), match[2], int(match[3] or 1)
        left -= 1 if kind == letter else number
        if left < 0:
            raise ValueError(f"a plan has at most {LARGEST_PLAN} blocks on each side, got more with {token!r}")
        if kind == letter:
            yield resolution, number
        else:
            yield from [(resolution, None)] * number


def _written(blocks: Iterable[tuple[int, str]]) -> str:
    """Write blocks, given as resolution and suffix, as the shortest tokens."""
    tokens: list[str] = []
    for (resolution, suffix), same in groupby(blocks):
        count = len(list(same))
        if suffix:
            tokens += [f"{resolution}{suffix}"] * count
        else:
            tokens.append(f"{resolution}x{count}" if count > 1 else f"{resolution}")
    return ",".join(tokens)


def _check_encoder(blocks: tuple[EncoderBlock, ...]) -> None:
    resolution = blocks[0].resolution
    for block in blocks:
        if block.resolution != resolution:
            raise ValueError(
                f"the encoder's block at {block.resolution} gets features of resolution {resolution}; pool before it, as in"
                f" {resolution}d2"
            )
        if resolution % block.pool:
            raise ValueError(
                f"{resolution}d{block.pool} pools {resolution} by a number that does not divide it; give a divisor"
            )
        resolution //= block.pool


def _check_decoder(blocks: tuple[DecoderBlock, ...], encoder: tuple[EncoderBlock, ...]) -> None:
    has = {encoder[0].resolution, *(block.resolution // block.pool for block in encoder)}
    resolution = blocks[0].resolution
    if resolution != min(has) or blocks[0].mix_in is not None:
        raise ValueError(
            f"the decoder begins at the lowest resolution of the encoder, {min(has)}, with nothing to mix in; got {blocks[0]}"
        )
    for block in blocks[1:]:
        expected = resolution if block.resolution != resolution else None
        if block.mix_in != expected:
            raise ValueError(
                f"the decoder's first block at a resolution, and no other, mixes in the one before: {block.resolution} after"
                f" {resolution} is written {block.resolution}{'' if expected is None else f'm{expected}'}; got {block}"
            )
        if block.resolution not in has:
            raise ValueError(
                f"the decoder works at {block.resolution}, where the encoder has no features: it has {sorted(has)}"
            )
        if block.resolution % resolution:
            raise ValueError(
                f"{block.resolution}m{resolution} cannot be upsampled by a whole factor; let each resolution be a multiple of"
                " the last"
            )
        resolution = block.resolution
    if resolution != max(has):
        raise ValueError(
            f"the decoder ends at the encoder's highest resolution, {max(has)}, got {resolution}; add {max(has)}m…"
        )


class Diagonal(NamedTuple):
    """A diagonal Gaussian over a map ``(batch, latent_dim, rows, columns)``."""

    mean: Tensor
    log_std: Tensor


class Draw(NamedTuple):
    """Latents and KL(q‖p) ``(batch, latent_dim, rows, columns)``; log p(z) − log q(z) of each example; in nats."""

    z: Tensor
    latent_kl: Tensor
    log_ratio: Tensor

    @property
    def kl(self) -> Tensor:
        """KL(q‖p) of each example."""
        return self.latent_kl.flatten(1).sum(1)


@final
class HierarchyLayer(nn.Module):
    """One layer of latents: its prior, its posterior, and the effect of a draw on the features."""

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
        if state is None:
            assert self.bias_map is not None
            return self.bias_map.expand(n, -1, -1, -1)
        if self.factor > 1:
            state = functional.interpolate(state, scale_factor=self.factor, mode="nearest")
        return state if self.bias_map is None else state + self.bias_map

    def prior_of(self, state: Tensor) -> tuple[Diagonal, Tensor]:
        """p(z_l | z_<l), and the features that the layer adds independently of the draw."""
        raw, residual = self.prior(state).split([2 * self.latent_dim, state.shape[1]], 1)
        return _diagonal(raw), residual

    def posterior_of(self, state: Tensor, features: Tensor) -> Diagonal:
        """q(z_l | z_<l, x)."""
        return _diagonal(self.posterior(torch.cat([state, features], 1)))

    def leave(self, state: Tensor, z: Tensor) -> Tensor:
        """Add the draw to the features."""
        state = state + self.project(z.to(state.dtype))
        mixed: Tensor = state + self.residual(state)
        return mixed


def _diagonal(raw: Tensor) -> Diagonal:
    return Diagonal(*at_least_float32(raw).chunk(2, 1))


def _normal(diagonal: Diagonal) -> Normal:
    return Normal(diagonal.mean, diagonal.log_std.exp(), validate_args=False)


def draw(posterior: Diagonal, prior: Diagonal, unit: Tensor) -> Draw:
    """Draw latents; the KL is in closed form, the log-ratio is that of this draw."""
    z = posterior.mean + posterior.log_std.exp() * unit
    precision = (-2 * prior.log_std).exp()
    log_ratio_of_stds = posterior.log_std - prior.log_std
    kl = 0.5 * ((2 * log_ratio_of_stds).exp() + (posterior.mean - prior.mean).square() * precision - 1) - log_ratio_of_stds
    log_ratio = log_ratio_of_stds + 0.5 * (unit.square() - (z - prior.mean).square() * precision)
    return Draw(z, kl, log_ratio.flatten(1).sum(1))


def bottleneck(in_channels: int, out_channels: int, resolution: int, width: int, last_scale: float = 1.0) -> nn.Sequential:
    """Four convolutions, each after a GELU, through fewer channels; at resolutions 1 and 2 the kernels are 1×1."""
    within = max(int(width * BOTTLENECK), 1)
    kernel = 3 if resolution > 2 else 1
    convolutions = (
        conv_same(in_channels, within),
        conv_same(within, within, kernel),
        conv_same(within, within, kernel),
        conv_same(within, out_channels, scale=last_scale),
    )
    return nn.Sequential(*(module for convolution in convolutions for module in (nn.GELU(), convolution)))


def conv_same(in_channels: int, out_channels: int, kernel: int = 1, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the size; its initial weights are torch's times the scale, its bias starts at 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    with torch.no_grad():
        conv.weight.mul_(scale)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


Choose = Callable[[HierarchyLayer, Tensor, Diagonal], Tensor]
"""Chooses a layer's latents, given the features above them and their prior."""
Infer = Callable[[HierarchyLayer, Tensor], Diagonal]
"""Posterior of a layer's latents, given the features above them."""


@final
class HierarchicalNetwork(MayStartLinear):
    r"""Bottom-up residual encoder, top-down layers of Gaussian latents, deterministic residuals between them.

    .. math:: p(z) = \prod_l p(z_l | z_{<l}), \qquad q(z|x) = \prod_l q(z_l | z_{<l}, x)

    Both are diagonal Gaussians over a map ``(latent_dim, resolution, resolution)``. At initialisation every prior is
    N(0, 1), and the output of a block is scaled by 1/√blocks, so that depth does not matter (Child 2021, section 3).
    Blocks are pre-activation bottlenecks with GELU and no batch statistics. Where the highest resolution is a fraction
    of the image's, squares of pixels become channels. With ``start="principal"``, training starts with a linear encoder
    and decoder of patches beside the layers of one resolution (:meth:`start_from`).

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: ``likelihood.in_channels``.
        plan: the blocks.
        latent_dim: channels of each layer of latents.
        width: channels between blocks.
        conditions: labels and covariates to be given: a linear map of their embedding is added to the channels that enter
            the encoder and each resolution of the decoder. Every layer's prior is then p(z_l | z_<l, c).

    Raises:
        ValueError: the plan does not fit the image.

    >>> network = HierarchicalNetwork((1, 8, 8), 1, HierarchyPlan.parse("8,8d8/1,8m1"), latent_dim=2, width=8)
    >>> network.infer(torch.zeros(5, 1, 8, 8)).kl.shape
    torch.Size([5, 2])
    >>> latents = network.draw_latents(torch.zeros(5, 1, 8, 8))
    >>> [tuple(z.shape) for z in latents], network.decode(latents).shape
    ([(5, 2, 1, 1), (5, 2, 8, 8)], torch.Size([5, 1, 8, 8]))
    """

    starts_solved = False  # photographs need fewer bits with it, grey pictures on black more, and samples are farther

    def __init__(
        self,
        shape: Sequence[int],
        out_channels: int,
        plan: HierarchyPlan,
        latent_dim: int,
        width: int,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        channels, self.rows, self.columns = shape
        self.channels = channels
        self.plan = plan
        self.latent_dim = latent_dim
        self.patch = plan.patch(self.rows, self.columns)
        self.side = self.patch * plan.resolution
        self.stem = conv_same(channels * self.patch**2, width, kernel=3)
        self.encoder = nn.ModuleList(
            bottleneck(width, width, block.resolution, width, last_scale=1 / math.sqrt(len(plan.encoder)))
            for block in plan.encoder
        )
        self.decoder = nn.ModuleList(
            HierarchyLayer(block, width, latent_dim, plan.layers, lowest=number == 0)
            for number, block in enumerate(plan.decoder)
        )
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.head = conv_same(width, out_channels * self.patch**2)
        self.conditions = conditions
        self.reads_condition = conditions is not None
        self.embedding = None if conditions is None else Embedding(conditions)
        opening = [number for number, block in enumerate(plan.decoder) if number == 0 or block.mix_in is not None]
        self.shifts = nn.ModuleDict(
            {name: nn.Linear(WIDTH, width, bias=False) for name in ("stem", *map(str, opening))}
            if conditions is not None
            else {}
        )

    @property
    def latents(self) -> Hierarchy:
        """A map of latents for each layer, from the top down."""
        return Hierarchy(tuple((self.latent_dim, block.resolution, block.resolution) for block in self.plan.decoder))

    def infer(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        condition: Tensor | None = None,
    ) -> Inference:
        """Decode one posterior draw of every layer, from the top down; KL in closed form, summed over each layer."""
        self.refuse_unread(context, mask, condition)
        h, draws = self._infer(x, noise, condition)
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
        condition: Tensor | None = None,
    ) -> Tensor:
        """Features of n draws from the prior; temperature 0 gives each layer's mean."""
        self.refuse_unread(context, condition=condition)
        if self.conditions is not None and condition is None:
            condition = self.conditions.draw(n, generator)
        return self._descend(n, self._prior_draws([], generator, temperature), self._shifts(condition))

    def draw_latents(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> list[Tensor]:
        """One posterior draw of every layer, ``(batch, latent_dim, rows, columns)`` each, from the top down."""
        return [draw.z for draw in self._infer(x, noise, condition)[1]]

    def latent_kl(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> list[Tensor]:
        """KL(q‖p) of each latent, given a draw of the layers above: ``(batch, latent_dim, rows, columns)`` each."""
        return [draw.latent_kl for draw in self._infer(x, noise, condition)[1]]

    def decode(
        self,
        z: Tensor | Sequence[Tensor],
        condition: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """Features of latents; the layers below the last one given are drawn from their priors.

        ``z`` are those of the top layer or more, ``(batch, latent_dim, rows, columns)`` each.

        Raises:
            ValueError: none or too many are given, or one does not have its layer's shape.
        """
        self.refuse_unread(condition=condition)
        latents = list(z)
        shapes = [(len(latents[0]) if latents else 0, *shape) for shape in self.latents.shapes]
        given = [tuple(z.shape) for z in latents]
        if not given or given != shapes[: len(given)]:
            raise ValueError(f"decode takes latents of the top layer or more, of shapes {shapes}; got {given}")
        return self._descend(len(latents[0]), self._prior_draws(latents, generator, temperature), self._shifts(condition))

    def descend(self, choose: ChooseLatents, x: Tensor | None = None) -> Tensor:
        """Features of one example whose latents are chosen layer by layer: see :meth:`Network.descend`."""
        shifts = self._shifts(None)
        posterior = None if x is None else self._posterior(x, shifts)

        def chosen(layer: HierarchyLayer, state: Tensor, prior: Diagonal) -> Tensor:
            return choose(_normal(prior), None if posterior is None else _normal(posterior(layer, state)))

        return self._descend(1, chosen, shifts)

    def latents_of_path(self, features: Sequence[int]) -> int:
        """Those of all layers at the resolution whose places are patches of this size; 0 where there are none."""
        at = [block for block in self.plan.decoder if tuple(features[1:]) == (self.side // block.resolution,) * 2]
        return self.latent_dim * len(at)

    @torch.no_grad()
    def start_from(self, data: Iterable[Tensor], mean: MeanMap | None, features: Callable[[float], Tensor]) -> float | None:
        """Start at the best VAE that encodes and decodes each patch by itself, linearly, in the layers of one resolution.

        This is probabilistic PCA of patches, with as many latents for each as the layers of that resolution have together;
        it is the resolution at which the data are likeliest. A linear encoder and decoder are added to the network's own,
        whose posteriors, priors and head are set to 0: each layer's posterior beside the path is its prior, N(0, I). See
        :meth:`Network.start_from`.
        """
        example = next(self.parameters())
        sizes = {self.side // block.resolution for block in self.plan.decoder}

        def padded() -> Iterable[Tensor]:
            return (self._padded(x.to(example).cpu()) for x in data)

        def solved(size: int) -> SolvedPath | None:
            latents = self.latents_of_path((self.channels, size, size))
            return solved_path_of_patches(padded, size, latents, mean, features)

        found = [path for path in map(solved, sorted(sizes)) if path is not None]
        if not found:
            return None
        best = max(found, key=lambda path: path.log_likelihood_per_dim)
        for layer in self.decoder:
            assert isinstance(layer, HierarchyLayer)
            for half in (layer.prior, layer.posterior):
                _silence(half[-1])
        _silence(self.head)
        self.linear = best.path.to(example)
        return best.residual_std

    def shards(self) -> list[nn.Module]:
        """Every residual block: each is whole only while it computes."""
        return [module for module in self.modules() if isinstance(module, nn.Sequential)]

    def _shifts(self, condition: Tensor | None) -> Mapping[str, Tensor]:
        """Shifts of the channels of the stem, and of the decoder's layers by their number; none without conditions."""
        self.refuse_unread(condition=condition)
        if self.embedding is None:
            return {}
        embedded = self.embedding(condition)
        return {name: linear(embedded)[..., None, None] for name, linear in self.shifts.items()}

    def _infer(self, x: Tensor, noise: Noise | None, condition: Tensor | None) -> tuple[Tensor, list[Draw]]:
        shifts = self._shifts(condition)
        infer = self._posterior(x, shifts)
        draws: list[Draw] = []

        def choose(layer: HierarchyLayer, state: Tensor, prior: Diagonal) -> Tensor:
            posterior = infer(layer, state)
            draws.append(draw(posterior, prior, standard_normal(posterior.mean, noise)))
            return draws[-1].z

        return self._descend(len(x), choose, shifts), draws

    def _prior_draws(self, given: Sequence[Tensor], generator: torch.Generator | None, temperature: Temperature) -> Choose:
        known = iter(given)
        temperatures = iter(per_layer(temperature, self.plan.layers))

        def choose(layer: HierarchyLayer, state: Tensor, prior: Diagonal) -> Tensor:
            spread = next(temperatures)
            z = next(known, None)
            if z is not None:
                return z
            unit = torch.empty_like(prior.mean).normal_(generator=generator)
            return prior.mean + spread * prior.log_std.exp() * unit

        return choose

    def _padded(self, x: Tensor) -> Tensor:
        """The encoder's input, padded to a square that the plan divides."""
        x = self.encoder_input(x)
        expected = (self.channels, self.rows, self.columns)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"this network was built for examples of shape {expected}, got a batch of shape {tuple(x.shape)}")
        return functional.pad(x, (0, self.side - self.columns, 0, self.side - self.rows), mode="replicate")

    def _posterior(self, x: Tensor, shifts: Mapping[str, Tensor]) -> Infer:
        """q(z_l | z_<l, x) of each layer, to be asked for from the top down."""
        padded = self._padded(x)
        features = self._encode(padded, shifts)
        if self.linear is None:
            return lambda layer, state: layer.posterior_of(state, features[layer.resolution])
        mean, log_variance = encoded_patches(self.linear, padded)
        shares = zip(
            mean.chunk(mean.shape[1] // self.latent_dim, 1),
            log_variance.chunk(len(log_variance) // self.latent_dim),
            strict=True,
        )

        def posterior(layer: HierarchyLayer, state: Tensor) -> Diagonal:
            found = layer.posterior_of(state, features[layer.resolution])
            if layer.resolution != mean.shape[-1]:
                return found
            linear_mean, linear_log_variance = next(shares)
            return Diagonal(found.mean + linear_mean, found.log_std + 0.5 * linear_log_variance)

        return posterior

    def _encode(self, padded: Tensor, shifts: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The last features at each resolution."""
        state = self.stem(functional.pixel_unshuffle(INPUT_GAIN * (padded - 0.5), self.patch))
        if "stem" in shifts:
            state = state + shifts["stem"].to(state.dtype)
        features = {self.plan.resolution: state}
        for block, residual in zip(self.plan.encoder, self.encoder, strict=True):
            state = state + residual(state)
            state = functional.avg_pool2d(state, block.pool) if block.pool > 1 else state
            features[state.shape[-1]] = state
        return features

    def _descend(self, n: int, choose: Choose, shifts: Mapping[str, Tensor]) -> Tensor:
        """Go through the layers from the top down."""
        state: Tensor | None = None
        drawn: list[tuple[int, Tensor]] = []
        for number, layer in enumerate(self.decoder):
            assert isinstance(layer, HierarchyLayer)
            state = layer.enter(state, n)
            if str(number) in shifts:
                state = state + shifts[str(number)].to(state.dtype)
            prior, residual = layer.prior_of(state)
            z = choose(layer, state, prior)
            drawn.append((layer.resolution, z))
            state = layer.leave(state + residual, z)
        assert state is not None
        features: Tensor = functional.pixel_shuffle(self.head(state * self.gain + self.offset), self.patch)
        if self.linear is not None:
            resolution = self.side // self.linear.decoder.bias.shape[-1]
            features = features + decoded_patches(self.linear, torch.cat([z for at, z in drawn if at == resolution], 1))
        return features[..., : self.rows, : self.columns]


def _silence(convolution: nn.Module) -> None:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)


def _plan_of(text: str, size: int) -> HierarchyPlan:
    """The plan that a preset's name or a text stands for, where images have this longer side."""
    if text == "tiny":  # two resolutions: 1, and at most 8, where convolutions cost little
        top = -(-size // -(-size // 8))
        return HierarchyPlan.parse(f"{top}x2,{top}d{top},1/1,{top}m1,{top}x2")
    if text == "cifar10":
        return HierarchyPlan.parse(CIFAR10)
    if "/" not in text:
        raise ValueError(f"a plan is one of tiny, cifar10, or ENCODER/DECODER as in 14,14d14/1,14m1; got {text!r}")
    return HierarchyPlan.parse(text)


def _checked_plan(text: str) -> dict[str, str]:
    _plan_of(text, SMALLEST)
    return {"plan": text}


@register.network(
    "hierarchical",
    argument=Argument("plan", _checked_plan, "tiny"),
    latents="hierarchical",
    reads_clips=False,
    has_prior=False,
    learns_prior=True,
)
def hierarchical(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int | None = None,
    width: int | None = None,
    plan: str = "tiny",
    conditions: Conditions | None = None,
) -> HierarchicalNetwork:
    """Layers of latents from coarse to fine (VDVAE): by a preset (tiny, cifar10), or by a plan.

    ``tiny`` runs on a CPU, for images of any size: it has layers of latents at 1×1 and at most 8×8. ``cifar10`` has the
    published sizes: 43 layers of latents, 39 million parameters. A plan of your own, such as
    ``28x2,28d4,7,7d7/1,7m1,7,28m7,28``, is read by :meth:`HierarchyPlan.parse`.

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: ``likelihood.in_channels``.
        latent_dim: channels of each layer of latents; 16 for cifar10, else 8, unless given.
        width: channels between blocks; 384 for cifar10, else 128, unless given.
        plan: tiny, cifar10, or ``ENCODER/DECODER``.
        conditions: labels and covariates to be given.

    Raises:
        ValueError: the data are not images or too small, or the plan cannot be read or does not fit the image.

    >>> network = hierarchical((1, 28, 28), out_channels=1)
    >>> network.latents.shapes[-1], network.infer(torch.zeros(2, 1, 28, 28)).h.shape
    ((8, 7, 7), torch.Size([2, 1, 28, 28]))
    """
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the hierarchical network reads images (C, H, W) of at least {SMALLEST}×{SMALLEST}, got an example of shape"
            f" {tuple(shape)}; use the mlp network for tables, series and tiny images"
        )
    default_latents, default_width = (16, 384) if plan == "cifar10" else (8, 128)
    return HierarchicalNetwork(
        shape,
        out_channels,
        _plan_of(plan, max(shape[1:])),
        default_latents if latent_dim is None else latent_dim,
        default_width if width is None else width,
        conditions,
    )
