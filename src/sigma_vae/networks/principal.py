"""Probabilistic PCA: the linear VAE, whose best weights have a closed form, and a network's linear path with them."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from sigma_vae.types import MeanMap, Network, at_least_float32, in_full_precision

__all__ = [
    "LinearDecoder",
    "LinearEncoder",
    "LinearPath",
    "MayStartLinear",
    "Principal",
    "best_components",
    "decoded_patches",
    "encoded_patches",
    "principal",
    "sample_of",
    "solved_path",
    "solved_path_of_patches",
]

EXACT_DIMS = 1024
"""Up to so many dimensions the whole covariance is decomposed; above, its leading part alone is sought."""
OVERSAMPLING = (20, 64)
"""Least and most directions that are sought beside the wanted ones; between them, as many as are wanted."""
ITERATIONS = 4
"""On CIFAR-10 the 20 and 64 leading variances are then right to 4e-4, and the log-likelihood to 0.1 of 2 772 nats."""

MOST_EXAMPLES, MOST_VALUES = 12_000, 2**29
"""Most examples, and most values, that directions are sought in."""
MARGIN = 0.02
"""Means nearer than this to 0 or 1 are bent, so that they stay between them."""

Passes = Callable[[], Iterable[Tensor]]
"""Gives the data in batches ``(batch, *shape)``, again at each call."""


class Principal(NamedTuple):
    r"""A Gaussian whose covariance is a low-rank part plus white noise, :math:`V(\Lambda - s^2)V^\top + s^2 I`.

    This is what the best VAE with a linear encoder and decoder of a single σ models: σ is s there, and its ELBO is this
    density (Tipping and Bishop 1999; Lucas et al. 2019, arXiv 1911.02469).

    Args:
        mean: of the data, ``(dims,)``.
        directions: V, orthonormal columns, ``(dims, latent_dim)``.
        variances: Λ, of the data along these directions, the largest first, ``(latent_dim,)``.
        noise_variance: s², mean of the variances in all other directions.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    noise_variance: float

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x ``(batch, *shape)`` in nats, ``(batch,)``, in float64."""
        dims, latent_dim = self.directions.shape
        centred = x.flatten(1).to(self.mean) - self.mean
        along = centred @ self.directions
        rest = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
        log_determinant = self.variances.log().sum() + (dims - latent_dim) * math.log(self.noise_variance)
        distance = (along.square() / self.variances).sum(1) + rest / self.noise_variance
        return -0.5 * (dims * math.log(2 * math.pi) + log_determinant + distance)

    @property
    def mean_log_prob(self) -> float:
        """Mean log-density in nats of the data that it was fitted to: their covariance has this trace and determinant."""
        dims, latent_dim = self.directions.shape
        log_determinant = float(self.variances.log().sum()) + (dims - latent_dim) * math.log(self.noise_variance)
        return -0.5 * (dims * math.log(2 * math.pi * math.e) + log_determinant)

    def widened(self, variance: float) -> "Principal":
        """The same with white noise of this variance added to the data."""
        return self._replace(variances=self.variances + variance, noise_variance=self.noise_variance + variance)

    @property
    def trace_of_precision(self) -> float:
        """Trace of the inverse covariance."""
        dims, latent_dim = self.directions.shape
        return float(self.variances.reciprocal().sum()) + (dims - latent_dim) / self.noise_variance


def principal(passes: Passes, latent_dim: int) -> Principal | None:
    """Fit probabilistic PCA to data that come in batches; they are passed through several times.

    The latents are at most one fewer than the dimensions, which fits a Gaussian of any covariance, and at most half as
    many as the examples.

    Memory holds one batch and a few matrices ``(dims, latent_dim)``, or ``(dims, dims)`` where dims is at most 1 024. Above
    that, the leading directions are found by subspace iteration (Halko et al. 2011), which needs six passes.

    Returns:
        None where there are fewer than two examples, or no variance.

    >>> x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([[3.0, 4.0]])
    >>> fitted = principal(lambda: [x], latent_dim=1)
    >>> [round(value, 6) for value in fitted.directions.abs().flatten().tolist()]     # the line that the data lie on
    [0.6, 0.8]
    """
    count, mean, total = _moments(passes())
    if count < 2 or not total > 0:
        return None
    dims = len(mean)
    latent_dim = min(latent_dim, dims - 1, count // 2)  # white noise needs a direction left, and its variance examples
    if dims <= EXACT_DIMS:
        covariance = sum(values.T @ values for values in (_centred(x, mean) for x in passes())) / count
        variances, directions = (each.flip(-1) for each in torch.linalg.eigh(covariance))
    else:
        beside = min(max(latent_dim, OVERSAMPLING[0]), OVERSAMPLING[1])
        variances, directions = _leading(passes, mean, count, min(latent_dim + beside, dims, count))
    variances, directions = variances[:latent_dim], directions[:, :latent_dim]
    rest = float(total - variances.sum()) / (dims - latent_dim)
    smallest = torch.finfo(torch.float32).eps ** 2 * float(total)
    return Principal(mean, directions, variances.clamp(min=smallest), max(rest, smallest))


def sample_of(count: int, shape: Sequence[int]) -> Tensor:
    """Positions of enough of so many examples of this shape, in random order."""
    most = min(MOST_EXAMPLES, max(MOST_VALUES // math.prod(shape), 2))
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]


def best_components(passes: Passes, held_out: Iterable[Tensor], most: int) -> int:
    """Number of linear latents, at most ``most``, under which held-out data are likeliest; 1 where data have no variance.

    >>> x = torch.randn(900, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 4.0, 3.0, 1.0, 1.0, 1.0])
    >>> best_components(lambda: [x[:600]], [x[600:]], most=5)
    3
    """
    fitted = principal(passes, most)
    if fitted is None:
        return 1
    dims, used = fitted.directions.shape
    left = torch.arange(dims, dims - used, -1) - 1
    above = fitted.variances.cumsum(0)
    noise = (above[-1] + fitted.noise_variance * (dims - used) - above) / left
    density = -0.5 * (fitted.variances.log().cumsum(0) + left * noise.log())
    count, along, squares = 0, torch.zeros_like(above), torch.zeros_like(above)
    for x in held_out:
        centred = _centred(x, fitted.mean)
        inside = (centred @ fitted.directions).square().sum(0)
        count, along, squares = count + len(x), along + inside, squares + centred.square().sum()
    distance = (along / fitted.variances).cumsum(0) + (squares - along.cumsum(0)).clamp(min=0) / noise
    return 1 + int((density - 0.5 * distance / count).argmax())


def _moments(batches: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number of examples, mean of each dimension, and the sum of all dimensions' variances."""
    count, mean, spread = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in batches:
        values = x.flatten(1).double()
        shift, size = values.mean(0) - mean, len(values)
        spread = spread + (values - values.mean(0)).square().sum() + shift.square().sum() * count * size / (count + size)
        mean = mean + shift * size / (count + size)
        count += size
    return count, mean, spread / count


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    return x.flatten(1).double() - mean


def _leading(passes: Passes, mean: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """The largest variances and their directions, by subspace iteration and a last rotation."""
    start = torch.randn(len(mean), rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    for number in range(ITERATIONS):
        precision = torch.float64 if number + 1 == ITERATIONS else torch.float32  # the last one removes what others rounded
        basis = torch.linalg.qr(_times_covariance(passes(), mean, basis, precision)).Q
    inner = basis.new_zeros(rank, rank)
    for x in passes():
        along = _centred(x, mean) @ basis
        inner.addmm_(along.T, along)
    inner /= count
    variances, rotation = (each.flip(-1) for each in torch.linalg.eigh(inner))
    return variances, basis @ rotation


def _times_covariance(batches: Iterable[Tensor], mean: Tensor, basis: Tensor, precision: torch.dtype) -> Tensor:
    """The covariance times the basis, but for a factor, computed in this precision."""
    factor = basis.to(precision)
    product = torch.zeros_like(factor)
    for x in batches:
        values = x.flatten(1).to(precision) - mean.to(precision)
        product.addmm_(values.T, values @ factor)
    return product.to(basis)


@final
class LinearEncoder(nn.Module):
    """Centre c, directions P ``(latent_dim, dims)``, gain g and log-variance l of a :class:`LinearPath`."""

    centre: Tensor
    directions: Tensor

    def __init__(self, centre: Tensor, directions: Tensor, gain: Tensor, log_variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("directions", directions)
        self.gain = nn.Parameter(gain)
        self.log_variance = nn.Parameter(log_variance)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(batch, latent_dim)`` and log-variance ``(latent_dim,)``, in float32 at least."""
        with in_full_precision(x.device.type):
            centred = at_least_float32(x).flatten(1).to(self.centre.dtype) - self.centre
            return self.gain * nn.functional.linear(centred, self.directions), self.log_variance


@final
class LinearDecoder(nn.Module):
    r"""Weight W ``(features, latent_dim)`` and bias b ``(in_channels, *space)`` of a :class:`LinearPath`.

    Args:
        weight: W.
        bias: b.
        unit_channels: ones ``(channels,)`` where a sigmoid maps the first so many channels to the mean: their features are
            the logit of Wz + b, continued by its tangents where that is nearer than 0.02 to 0 or 1, or beyond them.
    """

    unit_channels: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor, unit_channels: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.register_buffer("unit_channels", unit_channels)

    def forward(self, z: Tensor) -> Tensor:
        """Features ``(batch, in_channels, *space)``, in float32 at least."""
        with in_full_precision(z.device.type):
            flat = nn.functional.linear(z.to(self.weight.dtype), self.weight, self.bias.flatten())
            features = flat.reshape(-1, *self.bias.shape)
            if self.unit_channels is None:
                return features
            channels = len(self.unit_channels)
            if channels == features.shape[1]:
                return _logit(features)
            return torch.cat([_logit(features[:, :channels]), features[:, channels:]], 1)


def _logit(mean: Tensor) -> Tensor:
    """The logit, whose tangents continue it where the mean is nearer than the margin to 0 or 1, or beyond them."""
    beyond = nn.functional.softshrink(mean - 0.5, 0.5 - MARGIN)
    return torch.add(torch.logit(mean, MARGIN), beyond, alpha=1 / (MARGIN * (1 - MARGIN)))


@final
class LinearPath(nn.Module):
    r"""A linear encoder and decoder beside a network's own, whose outputs are added to them.

    .. math:: m(x) = g \odot P (x - c), \qquad \log v(x) = l, \qquad h(z) = W z + b

    The directions P and the centre c stay as they are; g, l, W and b are trained.
    """

    def __init__(self, encoder: LinearEncoder, decoder: LinearDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def shaped(cls, shapes: Mapping[str, Sequence[int]], latent_dim: int) -> "LinearPath":
        """A path whose tensors have these shapes, to load numbers into.

        Raises:
            RuntimeError: the shapes are not those of a path with so many latents.
        """
        one, dims, bias = (latent_dim,), math.prod(shapes.get("encoder.centre", ())), tuple(shapes.get("decoder.bias", ()))
        encoder = {"centre": (dims,), "directions": (latent_dim, dims), "gain": one, "log_variance": one}
        decoder = {"weight": (math.prod(bias), latent_dim), "bias": bias}
        if "decoder.unit_channels" in shapes:
            decoder["unit_channels"] = (min([*shapes["decoder.unit_channels"][:1], *bias[:1]], default=0),)
        expected = {f"encoder.{name}": shape for name, shape in encoder.items()}
        expected |= {f"decoder.{name}": shape for name, shape in decoder.items()}
        if {name: tuple(shape) for name, shape in shapes.items()} != expected:
            raise RuntimeError(f"a linear path of {latent_dim} latents has the shapes {expected}, got {dict(shapes)}")
        return cls(LinearEncoder(*map(torch.zeros, encoder.values())), LinearDecoder(*map(torch.zeros, decoder.values())))


def solved_path(passes: Passes, latent_dim: int, mean: MeanMap | None, bias: Callable[[float], Tensor]) -> "SolvedPath | None":
    r"""The linear path that makes a VAE whose other outputs are 0 the best linear one: probabilistic PCA.

    With the directions V, the variances λ and the white noise s² of the data, and :math:`v = \min(s^2/\lambda, 1)`,

    .. math:: P = \lambda^{-1/2} V^\top, \quad g = \sqrt{1 - v}, \quad l = \log v, \quad W = V \sqrt{\lambda - s^2}

    is exact where features are the mean (Lucas et al. 2019, arXiv 1911.02469). Where a sigmoid maps features to the
    mean, the path's features are the logit of that mean (see :class:`LinearDecoder`). Where features have another
    meaning, W is 0: only the encoder's part is solved.

    Args:
        passes: gives the data in batches, again at each call, in random order.
        latent_dim: number of latents; those beyond what probabilistic PCA can use start at the prior.
        mean: map from the first feature channels to the mean, ``"identity"`` or ``"unit"``, or None.
        bias: features ``(in_channels, *space)`` at which the residual's std is the given one.

    Returns:
        None where the data have no variance.
    """
    fitted = principal(passes, latent_dim)
    if fitted is None:
        return None
    centre, spread, noise = fitted.mean, fitted.variances, fitted.noise_variance
    variance = (noise / spread).clamp(max=1)
    used = len(spread)
    directions = torch.zeros(latent_dim, len(centre), dtype=torch.float64)
    directions[:used] = fitted.directions.T / spread.sqrt()[:, None]
    gain, log_variance = torch.zeros(2, latent_dim, dtype=torch.float64)
    gain[:used], log_variance[:used] = (1 - variance).sqrt(), variance.log()
    start = bias(math.sqrt(noise)).double()
    weight = torch.zeros(start.numel(), latent_dim, dtype=torch.float64)
    dims = len(centre)
    if mean is not None:  # the mean's channels are the first of the features
        weight[:dims, :used] = fitted.directions * (spread - noise).clamp(min=0).sqrt()
        start.view(-1)[:dims] = centre
    unit_channels = torch.ones(next(iter(passes())).shape[1]) if mean == "unit" else None
    path = LinearPath(LinearEncoder(centre, directions, gain, log_variance), LinearDecoder(weight, start, unit_channels))
    return SolvedPath(path, math.sqrt(noise), fitted.mean_log_prob / dims)


class SolvedPath(NamedTuple):
    """A path, the std of the residuals that it leaves, and the mean log-density of the data that it was solved from, in nats."""

    path: LinearPath
    residual_std: float
    log_likelihood_per_dim: float


class MayStartLinear(Network):
    """A network that :meth:`start_from` may add a linear path to. The path, or that there is none, is stored with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: LinearPath | None = None
        """A linear encoder and decoder whose outputs are added."""

    @abstractmethod
    def latents_of_path(self, features: Sequence[int]) -> int:
        """Number of latents of a path whose decoder gives these features, ``(in_channels, *space)``."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Whether there is a linear path, and its shapes, are part of what is stored: take them over before torch compares.
        start = f"{prefix}linear."
        shapes = {name.removeprefix(start): value.shape for name, value in state_dict.items() if name.startswith(start)}
        if not shapes:
            self.linear = None
        elif self.linear is None or self.linear.decoder.bias.shape != shapes.get("decoder.bias"):
            made = LinearPath.shaped(shapes, self.latents_of_path(shapes.get("decoder.bias", ())))
            self.linear = made.to(next(self.parameters()))
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -- Paths that encode and decode each patch of an image or a series by itself -----------------------------------------

MOST_PATCHES = 200_000
"""Patches from which a path is solved, about: a thousand for each of the 192 values of a colour patch of 8×8."""


def solved_path_of_patches(
    passes: Passes, side: int, latent_dim: int, mean: MeanMap | None, features: Callable[[float], Tensor]
) -> SolvedPath | None:
    """Solve the path for patches of ``side`` values a side; ``features`` are ``(in_channels,)``: see :func:`solved_path`."""

    def cut() -> Iterator[Tensor]:
        count = 0
        for batch in passes():
            yield (parts := patches(batch, side).flatten(0, batch.dim() - 2))
            if (count := count + len(parts)) >= MOST_PATCHES:
                return

    size = [side] * (next(iter(passes())).dim() - 2)
    return solved_path(
        cut, latent_dim, mean, lambda std: features(std).cpu().reshape(-1, *[1] * len(size)).expand(-1, *size).clone()
    )


def encoded_patches(path: LinearPath, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(batch, latent_dim, *size/side)`` and log-variances ``(latent_dim, 1, ...)`` of x ``(batch, C, *size)``."""
    parts = patches(x, path.decoder.bias.shape[-1])
    places = parts.shape[: x.dim() - 1]
    mean, log_variance = path.encoder(parts.flatten(0, x.dim() - 2))
    return mean.reshape(*places, -1).movedim(-1, 1), log_variance.reshape(-1, *[1] * (x.dim() - 2))


def decoded_patches(path: LinearPath, z: Tensor) -> Tensor:
    """Features ``(batch, in_channels, *size)`` of z ``(batch, latent_dim, *size/side)``."""
    vectors = z.movedim(1, -1)
    parts = path.decoder(vectors.flatten(0, -2))
    return unpatched(parts.reshape(*vectors.shape[:-1], *parts.shape[1:]))


def patches(x: Tensor, side: int) -> Tensor:
    """Cut x ``(batch, C, *size)`` into patches, ``(batch, *size/side, C, side, ...)``.

    >>> patches(torch.arange(6).reshape(1, 1, 6), 3)
    tensor([[[[0, 1, 2]],
    <BLANKLINE>
             [[3, 4, 5]]]])
    """
    axes = x.dim() - 2
    for axis in range(2, 2 + 2 * axes, 2):
        x = x.reshape(*x.shape[:axis], -1, side, *x.shape[axis + 1 :])
    return x.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))


def unpatched(parts: Tensor) -> Tensor:
    """Put :func:`patches` together again.

    >>> x = torch.rand(2, 3, 4, 6)
    >>> torch.equal(unpatched(patches(x, 2)), x)
    True
    """
    axes = (parts.dim() - 2) // 2
    pairs = ((1 + axis, 2 + axes + axis) for axis in range(axes))
    x = parts.permute(0, 1 + axes, *(axis for pair in pairs for axis in pair))
    for axis in range(2, 2 + axes):
        x = x.flatten(axis, axis + 1)
    return x
