"""Gaussian priors: N(0, I), and one with the moments of the latents."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sigma_vae.conditions import Conditions, Embedding
from sigma_vae.registry import register
from sigma_vae.types import FittedPrior, Prior, at_least_float32


@register.prior("standard")
@final
class StandardNormal(Prior):
    """N(0, I) over latents ``(*batch, latent_dim)``.

    >>> prior = StandardNormal(latent_dim=2)
    >>> prior.kl(Normal(torch.ones(1, 2), torch.ones(1, 2)), torch.zeros(1, 2))
    tensor([1.])
    """

    is_standard = True

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    device_marker: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats; also of vectors of another size, as maps of pictures of another size are."""
        return -0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[-1]

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) in closed form; the draw z is not needed."""
        mean, std = posterior.loc, posterior.scale
        return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n latents; the temperature scales their standard deviation."""
        z = torch.empty(n, self.latent_dim, device=self.device_marker.device, dtype=self.device_marker.dtype)
        return temperature * z.normal_(generator=generator)


@register.prior("gaussian")
@final
class GaussianPrior(FittedPrior):
    r"""N(μ, Σ) with full covariance: mean and covariance of the latents, which maximise their density.

    .. math:: KL(N(m, S) \| N(\mu, \Sigma))
        = \tfrac12 \left( \operatorname{tr} \Sigma^{-1} S + (m-\mu)^T \Sigma^{-1} (m-\mu) - d + \log |\Sigma| - \log |S|
        \right)

    Args:
        latent_dim: size of z.

    Shapes:
        z ``(*batch, latent_dim)``, log_prob and kl ``(*batch,)`` in nats.

    >>> prior = GaussianPrior(latent_dim=2)
    >>> prior.fit(torch.tensor([[3.0, 0.0], [5.0, 0.0], [4.0, -1.0], [4.0, 1.0]]))
    >>> prior.mean, prior.scale_tril
    (tensor([4., 0.]), tensor([[0.7071, 0.0000],
            [0.0000, 0.7071]]))
    >>> prior.kl(Normal(torch.tensor([4.0, 0.0]), 0.5**0.5 * torch.ones(2)), torch.zeros(2)).abs() < 1e-6
    tensor(True)
    """

    mean: Tensor
    scale_tril: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim, least_latents=latent_dim + 1)
        self.register_buffer("mean", torch.full((latent_dim,), math.nan))
        self.register_buffer("scale_tril", torch.full((latent_dim, latent_dim), math.nan))

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Take the latents' moments; ``held_out`` and ``seed`` are not used.

        Raises:
            ValueError: the latents are too few, not finite, of another size, or lie in a plane.
        """
        latents = self.checked(latents)
        mean = latents.mean(0)
        centred = latents - mean
        factor, failed = torch.linalg.cholesky_ex(centred.T @ centred / len(latents))
        if failed:
            raise ValueError(
                "the latents lie in a plane, so no Gaussian has a density there; are they draws from the posteriors?"
            )
        self.mean.copy_(mean)
        self.scale_tril.copy_(factor)
        self.fitted = True

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats."""
        unit = self.whiten(z)
        return -0.5 * unit.square().sum(-1) - 0.5 * math.log(2 * math.pi) * self.latent_dim - self.log_determinant()

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) in closed form; the draw z is not needed."""
        mean, std = posterior.loc, posterior.scale
        identity = torch.eye(self.latent_dim, dtype=self.mean.dtype, device=self.mean.device)
        precisions = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False).square().sum(0)
        trace = (precisions * std.square()).sum(-1)
        distance = self.whiten(mean).square().sum(-1)
        result: Tensor = 0.5 * (trace + distance - self.latent_dim) + self.log_determinant() - std.log().sum(-1)
        return result

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n latents; the temperature scales their spread about the mean."""
        self.require_fitted()
        unit = torch.empty(n, self.latent_dim, device=self.mean.device, dtype=self.mean.dtype).normal_(generator=generator)
        return self.colour(temperature * unit)

    def as_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Itself, as a mixture of one: see :meth:`Prior.as_mixture`."""
        self.require_fitted()
        return self.mean.new_zeros(1), self.mean[None], self.scale_tril[None]

    def whiten(self, z: Tensor) -> Tensor:
        """Map N(μ, Σ) to N(0, I)."""
        self.require_fitted()
        centred = z - self.mean
        flat = centred.reshape(-1, self.latent_dim)
        factor = self.scale_tril.to(flat.dtype)
        unit: Tensor = torch.linalg.solve_triangular(factor, flat.T, upper=False).T
        return unit.reshape(centred.shape)

    def colour(self, unit: Tensor) -> Tensor:
        """Map N(0, I) to N(μ, Σ)."""
        return self.mean + unit @ self.scale_tril.T

    def log_determinant(self) -> Tensor:
        """Log-determinant of :meth:`colour`: half that of Σ."""
        return self.scale_tril.diagonal().log().sum()


@torch.no_grad()
def best_prior(
    priors: Iterable[Prior], latents: Tensor, held_out: Tensor, condition: Tensor | None = None
) -> tuple[Prior, dict[str, float]]:
    """Compare fitted priors with N(0, I), and with a Gaussian fitted to the same latents, on held-out ones.

    ``condition`` are those of the held-out latents, for priors that depend on it.

    Returns:
        The best, and each one's mean log-density of the held-out latents in nats, by name, the best first.

    >>> latents = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    >>> wide = GaussianPrior(latent_dim=2)
    >>> wide.fit(3 * latents)
    >>> best, densities = best_prior([wide], latents[:300], latents[300:])
    >>> list(densities)
    ['N(0, I)', 'moments', 'GaussianPrior']
    """
    size = latents.shape[1]
    candidates: dict[str, Prior] = {type(prior).__name__: prior for prior in priors}
    candidates["N(0, I)"] = StandardNormal(size).to(latents)
    if size < len(latents):
        with suppress(ValueError):  # latents in a plane have no Gaussian
            moments = GaussianPrior(size).to(latents)
            moments.fit(latents)
            candidates["moments"] = moments
    found = {name: float(each.given(condition).log_prob(held_out).double().mean()) for name, each in candidates.items()}
    ranked = dict(sorted(found.items(), key=lambda item: -item[1] if item[1] == item[1] else math.inf))
    return candidates[next(iter(ranked))], ranked


def drawn_kl(prior: Prior, moments: GaussianPrior, posterior: Normal, z: Tensor) -> Tensor:
    r"""Estimate KL(q‖p) from the draw z ~ q, ``(*batch,)``, where it has no closed form.

    With a Gaussian G that is near p it is

    .. math:: KL(q \| G) + \log G(z) - \log p(z)

    Its expectation is the KL, like that of log q(z) − log p(z), but it lacks the noise of log q(z), about half a nat²
    per latent. Where p is G, it has no noise.
    """
    return moments.kl(posterior, z) + moments.log_prob(z) - prior.log_prob(z)


class ConditionalPrior(FittedPrior):
    """A density fitted to latents and their conditions: p(z|c), and p(z) where the condition is unknown.

    A subclass defines ``fit_given``, and density and draws given a condition. It sets ``moments``, those of all latents.
    """

    moments: GaussianPrior

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Refused: it needs the condition of each latent.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} needs the conditions of the latents; call fit_given(latents, condition)")

    @abstractmethod
    def log_prob_given(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Log-density of z ``(*draws, batch, latent_dim)`` given conditions ``(batch, variables)``, in nats."""

    @abstractmethod
    def sample_given(self, n: int, condition: Tensor | None, generator: torch.Generator | None, temperature: float) -> Tensor:
        """One draw for each of n conditions; the temperature scales their spread."""

    def given(self, condition: Tensor | None) -> Prior:
        """p(z|c) of these conditions; p(z) where there are none."""
        self.require_fitted()
        return _Given(self, condition)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z where no condition is known, in nats."""
        return self.given(None).log_prob(z)

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) where no condition is known, estimated from the draw z."""
        return self.given(None).kl(posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """N draws where no condition is known."""
        return self.given(None).sample(n, generator, temperature)


@final
class _Given(Prior):
    """The prior of examples with these conditions; None: all unknown."""

    prior: ConditionalPrior

    def __init__(self, prior: ConditionalPrior, condition: Tensor | None) -> None:
        super().__init__()
        self.condition = None if condition is None else condition.to(prior.moments.mean.device)
        object.__setattr__(self, "prior", prior)  # no submodule: it is not this one's to move

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z ``(*draws, batch, latent_dim)``, in nats."""
        return self.prior.log_prob_given(z, self.condition)

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of all latents' moments as control variate."""
        return drawn_kl(self, self.prior.moments, posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """One draw for each example; the temperature scales the spread."""
        return self.prior.sample_given(n, self.condition, generator, temperature)


# -- a Gaussian given the condition, trained with the network ----------------------------------------------------------


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
