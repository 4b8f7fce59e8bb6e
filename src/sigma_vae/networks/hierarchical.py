r"""A ladder of latents from coarse to fine, for images: Very Deep VAEs (Child 2021, arXiv 2011.10650), of any size and depth."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sigma_vae.networks.ladder import Diagonal, Draw, LadderLayer, bottleneck, conv_same, draw
from sigma_vae.networks.ladder_plan import LadderPlan
from sigma_vae.networks.temperature import per_layer
from sigma_vae.types import Inference, Network, Noise, Temperature

__all__ = ["HierarchicalNetwork", "check_plan", "hierarchical"]

CIFAR10 = "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3/1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
"""The published plan."""
INPUT_GAIN = 4.0
"""The input is (x − ½) times this: about unit variance for natural images."""
SMALLEST = 4


Choose = Callable[[LadderLayer, Tensor, Diagonal], Tensor]
"""Chooses a layer's latents, given the features above them and their prior."""


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

    ``tiny`` is for a CPU and images of any size: layers of latents for the image and for at most 8×8 places in it (each a square of
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
    (7, torch.Size([2, 1, 28, 28]))
    """
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the hierarchical network reads images (C, H, W) of at least {SMALLEST}×{SMALLEST}, got an example of shape"
            f" {tuple(shape)}; use the mlp network for tables, series and tiny images"
        )
    check_plan(plan)
    preset = PRESETS.get(plan, PRESETS["tiny"])
    return HierarchicalNetwork(
        shape,
        out_channels,
        preset.plan(max(shape[1:])) if plan in PRESETS else LadderPlan.parse(plan),
        preset.latent_dim if latent_dim is None else latent_dim,
        preset.width if width is None else width,
    )


def check_plan(plan: str) -> None:
    """Refuse what is no size or plan, whatever the image.

    Raises:
        ValueError: it is neither a name nor can be read.

    >>> check_plan("cifar10")
    """
    if plan in PRESETS:
        return
    if "/" not in plan:
        raise ValueError(f"a plan is one of {', '.join(PRESETS)}, or ENCODER/DECODER as in 14,14d14/1,14m1; got {plan!r}")
    LadderPlan.parse(plan)


def _tiny(size: int) -> LadderPlan:
    """Two resolutions: at most 8, where convolutions cost little, and 1."""
    top = -(-size // -(-size // 8))
    return LadderPlan.parse(f"{top}x2,{top}d{top},1/1,{top}m1,{top}x2")


PRESETS = {"tiny": _Preset(_tiny, 128, 8), "cifar10": _Preset(lambda size: LadderPlan.parse(CIFAR10), 384, 16)}


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
        self.stem = conv_same(channels * self.patch**2, width, kernel=3)
        self.encoder = nn.ModuleList(
            bottleneck(width, width, block.resolution, width, last_scale=1 / math.sqrt(len(plan.encoder)))
            for block in plan.encoder
        )
        self.decoder = nn.ModuleList(
            LadderLayer(block, width, latent_dim, plan.layers, lowest=number == 0) for number, block in enumerate(plan.decoder)
        )
        self.gain = nn.Parameter(torch.ones(1, width, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.head = conv_same(width, out_channels * self.patch**2)

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

    def latent_kl(self, x: Tensor, noise: Noise | None = None) -> list[Tensor]:
        """KL(q‖p) of each latent, given a draw of the layers above: ``(batch, latent_dim, rows, columns)`` each, in nats."""
        return [draw.latent_kl for draw in self._infer(x, noise)[1]]

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

    def _infer(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, list[Draw]]:
        features = self._encode(x)
        draws: list[Draw] = []

        def choose(layer: LadderLayer, state: Tensor, prior: Diagonal) -> Tensor:
            posterior = layer.posterior_of(state, features[layer.resolution])
            shape = posterior.mean.shape
            unit = torch.randn_like(posterior.mean) if noise is None else noise(shape).to(posterior.mean)
            draws.append(draw(posterior, prior, unit))
            return draws[-1].z

        return self._descend(len(x), choose), draws

    def _prior_draws(self, given: Sequence[Tensor], generator: torch.Generator | None, temperature: Temperature) -> Choose:
        known = iter(given)
        temperatures = iter(per_layer(temperature, self.plan.layers))

        def choose(layer: LadderLayer, state: Tensor, prior: Diagonal) -> Tensor:
            spread = next(temperatures)
            z = next(known, None)
            if z is not None:
                return z
            unit = torch.empty_like(prior.mean).normal_(generator=generator)
            return prior.mean + spread * prior.log_std.exp() * unit

        return choose

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

    def _descend(self, n: int, choose: Choose) -> Tensor:
        """The way down the ladder, which inference and generation share: they differ in how a layer's latents are chosen."""
        state: Tensor | None = None
        for layer in self.decoder:
            assert isinstance(layer, LadderLayer)
            state = layer.enter(state, n)
            prior, residual = layer.prior_of(state)
            z = choose(layer, state, prior)
            state = layer.leave(state + residual, z)
        assert state is not None
        features: Tensor = self.head(state * self.gain + self.offset)
        return functional.pixel_shuffle(features, self.patch)[..., : self.rows, : self.columns]


def _refuse(**given: Tensor | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} is for video networks; this one is for images and takes none")
