"""Networks with one layer of flat latents: of any encoder and decoder, and mlp, conv and residual."""

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from types import EllipsisType
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import conv2d, pad, silu

from sigma_vae.conditions import WIDTH, Conditions, Embedding
from sigma_vae.networks.principal import MayStartLinear, solved_path
from sigma_vae.priors import StandardNormal
from sigma_vae.registry import register
from sigma_vae.types import (
    Flat,
    Inference,
    MeanMap,
    Noise,
    Prior,
    Temperature,
    at_least_float32,
    per_layer,
    standard_normal,
)

__all__ = ["FlatNetwork", "Joined", "Shifted", "conv", "mlp", "width_of"]


class OneLayer(MayStartLinear):
    """A network with one layer of latents, whose prior can be replaced, and a diagonal Gaussian posterior.

    A subclass defines ``latents``, ``posterior`` and ``decode``. A prior sees latents of any shape as one vector.
    """

    encoder: nn.Module
    decoder: nn.Module

    @abstractmethod
    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        """q(z|x), parameters of the shape of z."""

    @abstractmethod
    def decode(self, z: Tensor | Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Features of z."""

    def infer(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        condition: Tensor | None = None,
    ) -> Inference:
        """Decode one posterior draw; the KL is that of the whole layer, ``(batch, 1)``."""
        self.refuse_unread(context, mask, condition)
        posterior = self.posterior(x, condition)
        return self.draw(x, posterior, standard_normal(posterior.loc, noise), condition)

    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Features of n draws from the prior."""
        self.refuse_unread(context, condition=condition)
        if self.conditions is not None and condition is None:
            condition = self.conditions.draw(n, generator)
        z = self.prior.given(condition).sample(n, generator, per_layer(temperature, 1)[0])
        return self.decode(z.reshape(n, *self.latents.shapes[0]), condition)

    def latents_of_path(self, features: Sequence[int]) -> int:
        """Every latent, or channel of a map."""
        return self.latents.shapes[0][0]

    def silence(self, encoder_input: tuple[Tensor, ...], decoder_input: tuple[Tensor, ...]) -> None:
        """Make encoder and decoder give 0, and see that they do for these inputs.

        Raises:
            ValueError: one does not give 0 when its last layer with weights is 0; nothing is changed then.
        """
        before = copy.deepcopy(self.encoder.state_dict())
        _silence(self.encoder, encoder_input, "encoder")
        try:
            _silence(self.decoder, decoder_input, "decoder")
        except ValueError:
            self.encoder.load_state_dict(before)
            raise

    def check_latents(self, z: Tensor) -> None:
        """Refuse latents that the prior does not know; there are none where all examples have one size."""

    def draw_latents(self, x: Tensor, noise: Noise | None = None, condition: Tensor | None = None) -> Tensor:
        """One posterior draw, ``(batch, *shape of z)``."""
        posterior = self.posterior(x, condition)
        return posterior.loc + posterior.scale * standard_normal(posterior.loc, noise)

    def draw(self, x: Tensor, posterior: Normal, unit: Tensor, condition: Tensor | None = None) -> Inference:
        """Do what :meth:`infer` does, for given standard normal numbers ``(*draws, batch, *shape of z)``."""
        axes = posterior.loc.dim() - 1
        draws = unit.shape[:-axes]
        z = posterior.loc + posterior.scale * unit
        self.check_latents(z)
        many = None if condition is None else condition.expand(*draws, -1).reshape(-1, condition.shape[-1])
        h = self.decode(z.reshape(-1, *z.shape[-axes:]).to(x.dtype), many)
        prior, vectors, log_posterior = self.prior.given(condition), z, _log_density(unit, posterior.scale)
        if axes > 1:
            vectors, log_posterior = z.flatten(-axes), log_posterior.flatten(-axes)
            posterior = Normal(posterior.loc.flatten(1), posterior.scale.flatten(1), validate_args=False)
        return Inference(
            h=h.reshape(*draws, *h.shape[1:]),
            target=x.expand(*draws[:-1], *x.shape) if len(draws) > 1 else x,
            kl=prior.kl(posterior, vectors).expand(draws).unsqueeze(-1),
            log_ratio=prior.log_prob(vectors) - log_posterior.sum(-1),
        )


def _log_density(unit: Tensor, std: Tensor) -> Tensor:
    """Log-density of each latent, that many std away from its mean."""
    return -0.5 * unit.square() - std.log() - 0.5 * math.log(2 * math.pi)


@final
class FlatNetwork(OneLayer):
    r"""A user's own encoder and decoder, with a diagonal Gaussian posterior between them.

    Args:
        encoder: x ``(batch, C, *space)`` to ``(batch, 2·latent_dim)``: the posterior's mean, then its log-variance.
        decoder: z ``(batch, latent_dim)`` to features ``(batch, in_channels, *space)``; the likelihood says how many
            channels.
        latent_dim: size of z.
        prior: p(z); N(0, I) unless given.
        conditions: labels and covariates that the network is given. Encoder and decoder are then called with a second
            argument, the embedding of the condition ``(batch, WIDTH)``; see :mod:`sigma_vae.networks.flat`.

    Raises:
        ValueError: the encoder's output does not have ``2·latent_dim`` numbers per example.

    >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 2 * 3))
    >>> decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    >>> network = FlatNetwork(encoder, decoder, latent_dim=3)     # the one line
    >>> network.infer(torch.zeros(5, 1, 4, 4)).h.shape
    torch.Size([5, 1, 4, 4])
    """

    trains_in_bfloat16 = True

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        prior: Prior | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.prior = StandardNormal(latent_dim) if prior is None else prior
        self.conditions = conditions
        self.reads_condition = conditions is not None
        self.embedding = None if conditions is None else Embedding(conditions)

    @property
    def latents(self) -> Flat:
        """One vector per example."""
        return Flat(self.latent_dim)

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        """q(z|x), parameters ``(batch, latent_dim)``, in float32 at least."""
        seen = self.encoder_input(x)
        raw = self.encoder(seen, *self._embedded(condition))
        if raw.dim() != 2 or raw.shape[-1] != 2 * self.latent_dim:
            raise ValueError(
                f"the encoder gives mean and log-variance of {self.latent_dim} latents, {2 * self.latent_dim} numbers per example;"
                f" got {tuple(raw.shape)}"
            )
        mean, log_variance = at_least_float32(raw).chunk(2, dim=-1)
        if self.linear is not None:
            linear_mean, linear_log_variance = self.linear.encoder(seen)
            mean, log_variance = mean + linear_mean, log_variance + linear_log_variance
        return Normal(mean, torch.exp(0.5 * log_variance), validate_args=False)

    def encode(self, x: Tensor) -> Normal:
        """Deprecated name of :meth:`posterior`."""
        warnings.warn("FlatNetwork.encode(x) is now posterior(x)", DeprecationWarning, stacklevel=2)
        return self.posterior(x)

    def decode(self, z: Tensor | Sequence[Tensor], condition: Tensor | None = None) -> Tensor:
        """Features of z."""
        features: Tensor = self.decoder(z, *self._embedded(condition))
        if self.linear is not None:
            assert isinstance(z, Tensor)
            features = features + self.linear.decoder(z)
        return features

    @torch.no_grad()
    def start_from(self, data: Iterable[Tensor], mean: MeanMap | None, features: Callable[[float], Tensor]) -> float | None:
        """Start at the best linear VAE of these data (see :func:`~sigma_vae.networks.principal.solved_path`).

        A linear encoder and decoder are added to the network's own, whose last layers are set to 0: the network learns
        what they leave. See :meth:`Network.start_from`.

        Raises:
            ValueError: setting the last layer with weights to 0 does not make the encoder's, or the decoder's, output 0.
        """
        example = self.encoder_input(next(iter(data))[:1].to(next(self.parameters())))
        embedded = self._embedded(None if self.conditions is None else self.conditions.rows({}, 1))
        h = self.decoder(example.new_zeros(1, self.latent_dim), *embedded)
        solved = solved_path(
            lambda: (self.encoder_input(x.cpu()) for x in data),
            self.latent_dim,
            mean,
            lambda std: features(std).cpu().reshape(-1, *[1] * (h.dim() - 2)).expand(h.shape[1:]).clone(),
        )
        if solved is None:
            return None
        self.silence((example, *embedded), (torch.linspace(-1, 1, self.latent_dim).to(example)[None], *embedded))
        self.linear = solved.path.to(example)
        return solved.residual_std

    def _embedded(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """The condition as a second argument of encoder and decoder; none where it is not read."""
        self.refuse_unread(condition=condition)
        return () if self.embedding is None else (self.embedding(condition),)


def _silence(half: nn.Module, example: tuple[Tensor, ...], name: str) -> None:
    """Set the last layer with weights to 0, so that the output is 0 until training changes it."""
    layers = [module for module in half.modules() if any(True for _ in module.parameters(recurse=False))]
    before = [p.clone() for p in layers[-1].parameters(recurse=False)] if layers else []
    for parameter in layers[-1].parameters(recurse=False) if layers else ():
        parameter.zero_()
    if half(*example).count_nonzero():
        for parameter, value in zip(layers[-1].parameters(recurse=False), before, strict=True) if layers else ():
            parameter.copy_(value)
        raise ValueError(
            f"the {name} does not give 0 when its last layer with weights is 0, so it cannot start from the best linear VAE; end it"
            " with a linear layer or a convolution, or train with start=random"
        )


# -- layers that read the embedding of a condition ---------------------------------------------------------------------


def width_of(conditions: Conditions | None) -> int:
    """Size of the conditions' embedding; 0 where there are none."""
    return 0 if conditions is None else WIDTH


@final
class Joined(nn.Module):
    """Concatenate the input, as a vector, with the embedding.

    Shapes:
        x ``(batch, *shape)``, embedding ``(batch, size)``; the module reads ``(batch, values + size)``.

    >>> Joined(nn.Linear(16 + 32, 5))(torch.zeros(2, 1, 4, 4), torch.zeros(2, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Output of the module."""
        joined: Tensor = self.module(torch.cat([x.flatten(1), embedding.to(x.dtype)], 1))
        return joined


@final
class Shifted(nn.Module):
    """Add a linear map of the embedding to the channels between two parts of a network.

    Args:
        first: from the input to ``(batch, channels, *space)``.
        rest: from there on.
        channels: number of channels between them.

    >>> encoder = Shifted(nn.Conv2d(1, 8, 3), nn.Flatten(), channels=8)
    >>> encoder(torch.zeros(2, 1, 4, 4), torch.zeros(2, 32)).shape
    torch.Size([2, 32])
    """

    def __init__(self, first: nn.Module, rest: nn.Module, channels: int) -> None:
        super().__init__()
        self.first = first
        self.shift = nn.Linear(WIDTH, channels, bias=False)
        self.rest = rest

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Output of the last part."""
        features: Tensor = self.first(x)
        shift = self.shift(embedding)
        output: Tensor = self.rest(features + shift.reshape(*shift.shape, *[1] * (features.dim() - 2)))
        return output


# -- layers for any shape ----------------------------------------------------------------------------------------------

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


# -- the paper's convolutional network ---------------------------------------------------------------------------------

SMALLEST = 4


@register.network("conv", latents="flat", reads_clips=False, has_prior=True)
def conv(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 20,
    width: int = 32,
    conditions: Conditions | None = None,
) -> FlatNetwork:
    """The paper's released network for SVHN: three convolutions down to a quarter of the size, and three back.

    With 28×28×1 data, 20 latents and width 32 it has the reference's 990 249 parameters. Where 4 does not divide a
    size, the decoder's output is cropped from the next multiple.

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: ``likelihood.in_channels``.
        latent_dim: size of z.
        width: channels of the first layer.
        conditions: labels and covariates to be given; their embedding is added to the channels of the first layer, and
            joined to the latents.

    Raises:
        ValueError: the data are not images, or smaller than 4×4.

    >>> sum(p.numel() for p in conv((1, 28, 28), out_channels=1).parameters())
    990249
    """
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the conv network reads images (C, H, W) of at least {SMALLEST}×{SMALLEST}, got an example of shape {tuple(shape)};"
            " use the mlp network for tables, series and tiny images"
        )
    channels, rows, columns = shape
    small = (4 * width, -(-rows // 4), -(-columns // 4))
    flat = small[0] * small[1] * small[2]
    odd = (0, columns % 2, 0, rows % 2)
    encoder = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.ZeroPad2d(odd) if any(odd) else nn.Identity(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim + width_of(conditions), flat),
        nn.Unflatten(1, small),
        _Transposed(4 * width, 2 * width, 6, stride=2, padding=2),
        nn.ReLU(),
        _Transposed(2 * width, width, 6, stride=2, padding=2),
        nn.ReLU(),
        _Transposed(width, out_channels, 5, padding=2),
        _Crop(rows, columns),
    )
    if conditions is None:
        return FlatNetwork(encoder, decoder, latent_dim)
    return FlatNetwork(Shifted(encoder[0], encoder[1:], width), Joined(decoder), latent_dim, conditions=conditions)


@final
class _Transposed(nn.ConvTranspose2d):
    """torch's transposed convolution, computed by ordinary ones, which CPUs do faster; function and parameters are the same.

    For a square kernel that is an odd multiple of the stride, and padded by half of what is more than a stride: as many
    pixels come out of each as the stride has places. On CPUs a step of :func:`conv` is shorter by it (docs/speed.md: `conv`
    and `usual conv`); elsewhere torch's own is called.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not input.is_cpu:
            return super().forward(input, output_size)
        return self._rows_of_sums(input) if self.stride[0] == 1 else self._all_places(input)

    def _all_places(self, x: Tensor) -> Tensor:
        """One convolution whose channels are those of all places within a stride, which are laid out afterwards."""
        stride, taps = self.stride[0], self.kernel_size[0] // self.stride[0]
        kernel = self.weight.to(x.dtype).reshape(*self.weight.shape[:2], taps, stride, taps, stride)
        kernel = kernel.permute(3, 5, 1, 2, 4, 0).flip(3, 4).reshape(-1, taps, taps, self.in_channels).permute(0, 3, 1, 2)
        bias = None if self.bias is None else self.bias.repeat(stride**2)
        y = conv2d(x, kernel, bias, padding=taps // 2).permute(0, 2, 3, 1)
        examples, rows, columns, _ = y.shape
        y = y.reshape(examples, rows, columns, stride, -1).transpose(2, 3)
        return y.reshape(examples, rows * stride, columns * stride, -1).permute(0, 3, 1, 2)

    def _rows_of_sums(self, x: Tensor) -> Tensor:
        """A convolution for each row of the kernel, in one; their results are added, each a row further down."""
        taps, channels = self.kernel_size[0], self.out_channels
        kernel = self.weight.flip(2, 3).permute(2, 1, 0, 3).reshape(taps * channels, self.in_channels, 1, taps)
        across, below = (0, taps // 2), (0, 0, taps // 2, taps // 2)
        sums = conv2d(x, kernel, padding=across)
        y = pad(at_least_float32(sums), below)
        rows = [y[:, row * channels : (row + 1) * channels, row : row + x.shape[2]] for row in range(taps)]
        total = sum(rows[1:], rows[0] if self.bias is None else rows[0] + self.bias[:, None, None])
        return total.to(sums.dtype)


@final
class _Crop(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns

    def forward(self, image: Tensor) -> Tensor:
        return image[..., : self.rows, : self.columns]


# -- a residual convolutional network ----------------------------------------------------------------------------------

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
