"""Shared types and abstract interfaces: batches, ELBO terms, and the contracts of network, likelihood and prior."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["Batch", "Elbo", "Inference", "Likelihood", "Network", "Noise", "Observes", "Prior", "Temperature", "per_layer"]

Noise = Callable[[torch.Size], Tensor]
"""Draws standard normal numbers of the given shape, whose leading axes are the batch."""

Temperature = float | Sequence[float]
"""Scales the spread of latents drawn from the prior: one number, or one for each layer, from the top down."""

Observes = Literal["density", "level"]
"""Which probability: of the real value (a density), or of the observed level (the mass of its bin)."""


class Batch(NamedTuple):
    """Examples and their positions in the split they come from; clips of unequal lengths with the mask of their valid frames."""

    x: Tensor
    positions: Tensor
    mask: Tensor | None = None


class Inference(NamedTuple):
    """What a network says of a batch.

    Shapes:
        h ``(*batch, in_channels, *space)``, target ``(*batch, C, *space)``, kl ``(*batch, layers)`` in nats,
        log_ratio ``(*batch,)``: log p(z) − log q(z|x) at the draw that gave h. Of a video the batch is that of its clips, h and target
        are ``(*batch, frames, ...)``, and mask ``(*batch, frames)`` says which frames are valid, where not all of them are.
    """

    h: Tensor
    target: Tensor
    kl: Tensor
    log_ratio: Tensor
    mask: Tensor | None = None

    def scored(self) -> tuple[Tensor, Tensor]:
        """Features and target of what the likelihood is asked about: all there is, or of all clips the valid frames, in one row."""
        return (self.h, self.target) if self.mask is None else (self.h[self.mask], self.target[self.mask])

    def per_example(self, log_likelihood: Tensor) -> Tensor:
        """Sum the likelihood of what is :meth:`scored` over each example, ``(*batch,)``: over the valid frames of a clip."""
        if self.mask is not None:
            frames = log_likelihood.new_zeros(self.mask.shape)
            return frames.index_put((self.mask,), log_likelihood).sum(-1)
        batch_axes = self.kl.dim() - 1
        return log_likelihood.flatten(batch_axes).sum(-1) if log_likelihood.dim() > batch_axes else log_likelihood

    def dims(self) -> Tensor:
        """How many values are scored in each example, ``(*batch,)``: what a number per dimension is divided by."""
        batch = self.kl.shape[:-1]
        values = self.target.shape[len(batch) :].numel()
        if self.mask is None:
            return torch.full(batch, values, device=self.target.device)
        return self.mask.sum(-1) * (values // self.mask.shape[-1])


class Elbo(NamedTuple):
    r"""The evidence lower bound of each example, in nats: :math:`\log p(x|z) - \sum_l KL_l`.

    Shapes:
        log_likelihood ``(*batch,)``, kl ``(*batch, layers)``; every property ``(*batch,)``.

    >>> elbo = Elbo(torch.tensor([-10.0]), torch.tensor([[1.0, 2.0]]))
    >>> elbo.total, elbo.rate, elbo.distortion
    (tensor([-13.]), tensor([3.]), tensor([10.]))
    """

    log_likelihood: Tensor
    kl: Tensor

    @property
    def rate(self) -> Tensor:
        """KL of all stochastic layers together."""
        return self.kl.sum(-1)

    @property
    def distortion(self) -> Tensor:
        """Negative log-likelihood of the data given the latents."""
        return -self.log_likelihood

    @property
    def total(self) -> Tensor:
        """The bound itself: higher is better."""
        return self.log_likelihood - self.rate


class Prior(nn.Module, ABC):
    """p(z) over flat latents ``(*batch, latent_dim)``."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, ``(*batch,)``, in nats."""

    @abstractmethod
    def kl(self, posterior: torch.distributions.Normal, z: Tensor) -> Tensor:
        """KL(q‖p), ``(*batch,)``: analytic where it can be, else from the draw z."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """N draws ``(n, latent_dim)``; the temperature scales their spread."""


class Network(nn.Module, ABC):
    """Encoder, latents and decoder; knows nothing of likelihoods."""

    @abstractmethod
    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        """Features, target and KL of a batch, with one posterior draw."""

    @abstractmethod
    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        """Features ``(n, in_channels, *space)`` of n draws from the prior."""


class Likelihood(nn.Module, ABC):
    """p(x|z): from decoder features to a distribution over data.

    A subclass says how many feature channels it reads (``in_channels``) and turns features into a distribution. Families
    with a scale also refit it in ``calibrate``.
    """

    observes: Observes = "density"
    """What ``log_prob`` is of: the density of the values, or the mass of their level."""
    normalised: bool = True
    """Whether ``log_prob`` is the logarithm of a probability; where not, it is an objective, and there is no ``log_mass``."""

    def __init__(self, channels: int, spatial_dims: int, levels: int | None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels counts the data's channels and is at least 1, got {channels}")
        if spatial_dims < 0:
            raise ValueError(f"spatial_dims is 0 for tables, 1 for series, 2 for images, got {spatial_dims}")
        if levels is not None and levels < 2:
            raise ValueError(f"levels counts the values a datum can take: at least 2, or None for real data, got {levels}")
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.levels = levels

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Feature channels that the decoder must give."""

    @abstractmethod
    def forward(self, h: Tensor, x: Tensor | None = None) -> Distribution:
        """The distribution p(x|h): batch ``(*batch,)``, event ``(C, *space)``; x is looked at in training alone."""

    @abstractmethod
    def log_mass(self, h: Tensor, x: Tensor, *, post_hoc: bool = False) -> Tensor:
        """Log-probability ``(*batch,)``, in nats, of the observed levels: the mass of the bins around x."""

    @abstractmethod
    def element_cdf(self, h: Tensor, x: Tensor, observes: Observes, *, post_hoc: bool = False) -> tuple[Tensor, Tensor]:
        """F(x−) and F(x) of each value, of the data's shape: the probability of less than x, and of x or less.

        Of a density both are the same. Where values are not independent given h, F is that of each given those before it.
        """

    @abstractmethod
    def post_hoc(self, h: Tensor) -> Distribution:
        """p(x|h) with the scale that ``calibrate`` refitted; families without a scale give ``self(h)``."""

    @abstractmethod
    def calibrate(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fit the stored scales on pairs (h, x); ``pairs`` is gone through more than once, so no generator."""


def per_layer(temperature: Temperature, layers: int) -> list[float]:
    """One temperature for each layer, from one for all or from as many as there are.

    Raises:
        ValueError: one is below 0 or not finite, or their number is wrong.

    >>> per_layer(0.5, layers=2), per_layer([1.0, 0.0], layers=2)
    ([0.5, 0.5], [1.0, 0.0])
    """
    values = list(temperature) if isinstance(temperature, Sequence) else [temperature] * layers
    if len(values) != layers:
        raise ValueError(f"temperature is one number, or one for each of {layers} layers of latents; got {len(values)} of them")
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature scales the spread of latents and is at least 0, got {value}")
    return values
