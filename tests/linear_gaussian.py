"""A linear-Gaussian model with encoders that are its exact posterior and ones that are not: what bounds are judged by.

p(z) = N(0, I), p(x|z) = N(Wz + b, σ²I): everything is known, here from NumPy and SciPy in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from sigma_vae import VAE, Fixed, FlatNetwork, Gaussian
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.types import Inference, Latents, Network, Noise, Prior, Temperature

DIM, LATENT, SIGMA = 6, 3, 0.5
WEIGHT = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, LATENT)))[0] * [1.5, 1.0, 0.4]
"""Its columns are orthogonal, so that the exact posterior is diagonal."""
OFFSET = np.linspace(-0.5, 0.5, DIM)


@final
class Affine(nn.Module):
    """An encoder or decoder in float64, whatever it is given; with log-variances, which do not depend on the input."""

    def __init__(self, weight: np.ndarray, offset: np.ndarray, deviation: np.ndarray | None = None) -> None:
        super().__init__()
        self.weight, self.offset = (nn.Parameter(torch.from_numpy(np.asarray(values)).double()) for values in (weight, offset))
        self.log_variance = None if deviation is None else nn.Parameter(2 * torch.from_numpy(np.asarray(deviation)).log())

    def forward(self, x: Tensor) -> Tensor:
        y = x.double() @ self.weight.T + self.offset
        return y if self.log_variance is None else torch.cat([y, self.log_variance.expand_as(y)], 1)


@dataclass(frozen=True)
class Proposal:
    """An encoder: the exact posterior, spread and shifted."""

    name: str
    spread: float = 1.0
    shift: float = 0.0
    """In posterior standard deviations."""

    @property
    def exact(self) -> bool:
        return (self.spread, self.shift) == (1.0, 0.0)

    def vae(self, scale: Scale | None = None, dim: int = DIM) -> VAE:
        weight, offset = WEIGHT[:dim], OFFSET[:dim]
        variance = 1 / (1 + np.square(WEIGHT).sum(0) / SIGMA**2)
        gain = variance[:, None] * WEIGHT.T / SIGMA**2
        encoder = Affine(gain, -gain @ OFFSET + self.shift * np.sqrt(variance), self.spread * np.sqrt(variance))
        network = FlatNetwork(encoder, Affine(weight, offset), LATENT)
        return VAE(network, Gaussian(dim, scale or Fixed(SIGMA), spatial_dims=0, levels=None)).double().eval()


EXACT = Proposal("exact")
PROPOSALS = (EXACT, Proposal("wide", spread=1.5), Proposal("narrow", spread=0.8), Proposal("shifted", shift=0.4))


def exact_log_likelihood(x: np.ndarray) -> np.ndarray:
    """Log p(x) of each row."""
    return np.atleast_1d(stats.multivariate_normal.logpdf(x, OFFSET, WEIGHT @ WEIGHT.T + SIGMA**2 * np.eye(DIM)))


def draw_data(n: int, seed: int = 0) -> Tensor:
    """From the model, in float32 as it is stored."""
    random = np.random.default_rng(seed)
    x = OFFSET + random.standard_normal((n, LATENT)) @ WEIGHT.T + SIGMA * random.standard_normal((n, DIM))
    return torch.from_numpy(x).float()


def batches_of(x: Tensor, size: int = 256, **arguments: int) -> Batches:
    """Real values as they are."""
    return Batches(InMemory(x), Scaling(), size, **arguments)


@final
class InDouble(Network):
    """Another network in float64, given the float32 that batches hold."""

    def __init__(self, inner: Network) -> None:
        super().__init__()
        self.inner = inner.double()

    @property
    def latents(self) -> Latents:
        return self.inner.latents

    def infer(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Inference:
        return self.inner.infer(x.double(), context, mask, noise)

    def generate(
        self,
        n: int,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: Temperature = 1.0,
    ) -> Tensor:
        return self.inner.generate(n, context, generator, temperature)


def encoder_vae(gain: np.ndarray, deviation: np.ndarray, prior: Prior | None = None) -> VAE:
    """q(z|x) = N(gain·x, deviation²); what is decoded does not matter."""
    latent_dim, dim = gain.shape
    encoder, decoder = Affine(gain, np.zeros(latent_dim), deviation), Affine(np.zeros((dim, latent_dim)), np.zeros(dim))
    return VAE(FlatNetwork(encoder, decoder, latent_dim, prior), Gaussian(dim, Fixed(1.0), spatial_dims=0, levels=None))


def numbers(report: object, path: str = "") -> dict[str, float]:
    """All numbers of a report, by their path in it."""
    if isinstance(report, Mapping):
        return {k: v for name, part in report.items() for k, v in numbers(part, f"{path}/{name}").items()}
    if isinstance(report, list | tuple):
        return {k: v for i, part in enumerate(report) for k, v in numbers(part, f"{path}/{i}").items()}
    return {path: float(report)} if isinstance(report, int | float) else {}
