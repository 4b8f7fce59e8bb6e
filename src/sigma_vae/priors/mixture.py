"""A mixture of Gaussians, fitted by expectation-maximisation."""

import math
import warnings
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.priors.base import FittedPrior
from sigma_vae.priors.gaussian import GaussianPrior, drawn_kl
from sigma_vae.progress import bar
from sigma_vae.registry import Argument, register

__all__ = ["MixturePrior", "components_of", "expectation_maximisation", "read_components"]

NUMBERS = (1, 5, 10, 20, 50, 100)
"""Numbers of components to try."""
MOST_LATENTS = 12_000
"""More latents change the mixture little, and cost time in proportion."""
REGULARISATION = 1e-6
"""Added to the diagonals of the covariances, in units of the latents' mean variance."""
ITERATIONS = 100


def read_components(text: str) -> dict[str, int]:
    """Read a number of components."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"mixture takes a number of components, got {text!r}")
    return {"components": int(text)}


def components_of(prior: Any) -> str | None:
    """The number of components of a mixture, as text; None before it is known."""
    return None if prior.components is None else str(prior.components)


@register.prior("mixture", argument=Argument("components", read_components, "20", of=components_of))
@final
class MixturePrior(FittedPrior):
    r"""A mixture of Gaussians with full covariances.

    .. math:: \log p(z) = \log \sum_k w_k N(z; \mu_k, \Sigma_k)

    KL(q‖p) has no closed form and is estimated from the draw z.

    Args:
        latent_dim: size of z.
        components: number of Gaussians. None: :meth:`fit` raises it from 1 for as long as held-out latents gain, and
            sets it.

    Shapes:
        z ``(*batch, latent_dim)``, log_prob and kl ``(*batch,)`` in nats; log_weights ``(components,)``,
        means ``(components, latent_dim)``, scale_trils (Cholesky factors of the covariances) ``(components, latent_dim,
        latent_dim)``.

    >>> latents = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + 10 * (torch.arange(400) % 2)[:, None]
    >>> prior = MixturePrior(latent_dim=2)
    >>> prior.fit(latents[:300], held_out=latents[300:])
    >>> prior.components
    5
    >>> prior = MixturePrior(latent_dim=2, components=2)
    >>> prior.fit(latents)
    >>> prior.means.mean(1).sort().values.round().abs()
    tensor([ 0., 10.])
    """

    log_weights: Tensor
    means: Tensor
    scale_trils: Tensor

    def __init__(self, latent_dim: int, components: int | None = None) -> None:
        super().__init__(latent_dim, least_latents=max(latent_dim + 1, components or 1))
        if components is not None and components < 1:
            raise ValueError(
                f"components counts the Gaussians and is at least 1 (None: chosen by held-out latents), got {components}"
            )
        self.components = self._asked = components
        self.moments = GaussianPrior(latent_dim)
        count = components or 0
        self.register_buffer("log_weights", torch.full((count,), math.nan))
        self.register_buffer("means", torch.full((count, latent_dim), math.nan))
        self.register_buffer("scale_trils", torch.full((count, latent_dim, latent_dim), math.nan))

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Fit by expectation-maximisation from a k-means start, to at most 12 000 of the latents.

        Where the number of components is chosen, it rises for as long as the mean log-density of the held-out latents
        rises by more than the standard error of the gain.

        Raises:
            ValueError: the latents are too few, not finite or of another size, or held-out ones are needed and missing.
        """
        some = _some(self.checked(latents), seed)
        if self._asked is not None:
            fitted = expectation_maximisation(some, self._asked, seed)
        elif held_out is None:
            raise ValueError(
                "the number of components is chosen by held-out latents: give held_out (validation), or a number such as components=20"
            )
        else:
            fitted = _chosen(some, _some(self.checked(held_out, least=1), seed), seed)
        self.moments.fit(some)
        self.components = len(fitted.weights_)
        self.log_weights = torch.from_numpy(fitted.weights_).log().to(self.log_weights)
        self.means = torch.from_numpy(fitted.means_).to(self.means)
        self.scale_trils = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_)).to(self.scale_trils)
        self.fitted = True

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats."""
        self.require_fitted()
        centred = z.reshape(-1, self.latent_dim) - self.means[:, None]
        factors = self.scale_trils.to(centred.dtype)
        unit = torch.linalg.solve_triangular(factors, centred.mT, upper=False)
        constants = (
            self.log_weights - factors.diagonal(dim1=1, dim2=2).log().sum(-1) - 0.5 * math.log(2 * math.pi) * self.latent_dim
        )
        return torch.logsumexp(constants[:, None] - 0.5 * unit.square().sum(1), 0).reshape(z.shape[:-1])

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of the same moments as control variate."""
        return drawn_kl(self, self.moments, posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n components, and one latent vector of each; the temperature scales the Gaussians' spread."""
        self.require_fitted()
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        unit = torch.empty(n, self.latent_dim, device=self.means.device, dtype=self.means.dtype).normal_(generator=generator)
        return self.means[which] + temperature * (self.scale_trils[which] @ unit[..., None]).squeeze(-1)

    def as_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and Cholesky factors: see :meth:`Prior.as_mixture`."""
        self.require_fitted()
        return self.log_weights, self.means, self.scale_trils


def _some(latents: Tensor, seed: int) -> Tensor:
    return latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:MOST_LATENTS]]


def _chosen(latents: Tensor, held_out: Tensor, seed: int) -> Any:
    """The mixture with the largest number of components that held-out latents gained from."""
    best = expectation_maximisation(latents, NUMBERS[0], seed)
    density = best.score_samples(held_out.numpy())
    for components in NUMBERS[1:]:
        if components * (latents.shape[1] + 1) > len(latents):  # too few latents for so many covariances
            break
        richer = expectation_maximisation(latents, components, seed)
        gain = richer.score_samples(held_out.numpy()) - density
        if gain.mean() <= gain.std() / math.sqrt(len(gain)):
            break
        best, density = richer, density + gain
    return best


def expectation_maximisation(latents: Tensor, components: int, seed: int) -> Any:
    """Fit in float64: from float32 scikit-learn gets covariances that are not positive definite."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    floor = REGULARISATION * float(latents.var(0).mean())
    mixture = GaussianMixture(components, reg_covar=floor, max_iter=ITERATIONS, random_state=seed)
    with bar("fitting a mixture"), warnings.catch_warnings():  # held-out latents judge a mixture that has not converged
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(latents.numpy())
