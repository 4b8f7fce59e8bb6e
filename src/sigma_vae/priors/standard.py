"""The prior that models are trained with."""

import math
from typing import final

import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.types import Prior

__all__ = ["StandardNormal"]


@final
class StandardNormal(Prior):
    """N(0, I) over latents ``(*batch, latent_dim)``.

    >>> prior = StandardNormal(latent_dim=2)
    >>> prior.kl(Normal(torch.ones(1, 2), torch.ones(1, 2)), torch.zeros(1, 2))
    tensor([1.])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    device_marker: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats."""
        return -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) * self.latent_dim

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) in closed form; the draw z is not needed."""
        mean, std = posterior.loc, posterior.scale
        return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n latents; the temperature scales their standard deviation."""
        z = torch.empty(n, self.latent_dim, device=self.device_marker.device, dtype=self.device_marker.dtype)
        return temperature * z.normal_(generator=generator)
