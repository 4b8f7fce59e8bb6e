"""A Gaussian prior given the condition, trained with the network."""

from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sigma_vae.conditions import Conditions, Embedding
from sigma_vae.registry import register
from sigma_vae.types import Prior, at_least_float32

__all__ = ["LearnedPrior"]


@register.prior("learned", reads_condition=True)
@final
class LearnedPrior(Prior):
    r"""A diagonal Gaussian given the condition, trained with the network.

    .. math:: p(z|c) = N(A e(c) + a, \operatorname{diag} \exp(B e(c) + b))

    with e the embedding of the condition (Sohn, Lee & Yan 2015, *Learning Structured Output Representation using Deep
    Conditional Generative Models*). It starts at N(0, I).

    Args:
        latent_dim: size of z.
        conditions: the variables of the condition.

    >>> from sigma_vae.conditions import Variable
    >>> prior = LearnedPrior(2, Conditions((Variable("label", ("a", "b")),))).given(torch.tensor([[0.0], [1.0]]))
    >>> prior.kl(Normal(torch.ones(2, 2), torch.ones(2, 2)), torch.zeros(2, 2))
    tensor([1., 1.], grad_fn=<SumBackward1>)
    """

    is_learned = True

    def __init__(self, latent_dim: int, conditions: Conditions) -> None:
        super().__init__()
        self.embedding = Embedding(conditions)
        self.linear = nn.Linear(self.embedding.size, 2 * latent_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def given(self, condition: Tensor | None) -> Prior:
        """p(z|c), a Gaussian for each condition."""
        mean, log_variance = at_least_float32(self.linear(self.embedding(condition))).chunk(2, -1)
        return _Gaussians(mean, (0.5 * log_variance).exp())

    def log_prob(self, z: Tensor) -> Tensor:
        """Refused: it depends on the condition."""
        raise ValueError("this prior is p(z|c), which depends on the condition; write prior.given(condition).log_prob(z)")

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """Refused: it depends on the condition."""
        raise ValueError("this prior is p(z|c), which depends on the condition; write prior.given(condition).kl(q, z)")

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Refused: it depends on the condition."""
        raise ValueError("this prior is p(z|c), which depends on the condition; write prior.given(condition).sample(n)")


@final
class _Gaussians(Prior):
    """A diagonal Gaussian for each example of a batch, ``(batch, latent_dim)``."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.gaussian = Normal(mean, std, validate_args=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z ``(*draws, batch, latent_dim)``, in nats."""
        density: Tensor = self.gaussian.log_prob(z).sum(-1)  # type: ignore[no-untyped-call]
        return density

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) in closed form; the draw z is not needed."""
        return kl_divergence(posterior, self.gaussian).sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """One draw for each example; the temperature scales the spread."""
        unit = torch.empty_like(self.gaussian.loc).normal_(generator=generator)
        return self.gaussian.loc + temperature * self.gaussian.scale * unit
