"""A mixture of Gaussians, fitted by expectation-maximisation."""

import math
import warnings
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.conditions import Conditions
from sigma_vae.priors.gaussian import ConditionalPrior, GaussianPrior, drawn_kl
from sigma_vae.progress import bar
from sigma_vae.registry import Argument, register
from sigma_vae.types import FittedPrior

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
        densities = _component_densities(z.reshape(-1, self.latent_dim), self.means, self.scale_trils)
        return torch.logsumexp(self.log_weights + densities, 1).reshape(z.shape[:-1])

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of the same moments as control variate."""
        return drawn_kl(self, self.moments, posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n components, and one latent vector of each; the temperature scales the Gaussians' spread."""
        self.require_fitted()
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        return _drawn(self.means[which], self.scale_trils[which], generator, temperature)

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


# -- a mixture for each class ------------------------------------------------------------------------------------------

NUMBERS_OF_A_CLASS = (1, 2, 5, 10)
"""Numbers of components for each class to try."""
MOST_OF_A_CLASS = 3_000
"""More latents of a class change its mixture little, and cost time in proportion."""


@register.prior("class-mixture", reads_condition=True, argument=Argument("components", read_components, "1", of=components_of))
@final
class ClassMixturePrior(ConditionalPrior):
    r"""A mixture of Gaussians for each class, with full covariances.

    .. math:: p(z|c) = \sum_k w_{ck} N(z; \mu_{ck}, \Sigma_{ck}), \qquad p(z) = \sum_c \pi_c\, p(z|c)

    where the class is unknown, with π the classes' shares of the latents. A class has few latents, so each covariance
    counts as many of the covariance within classes as there are dimensions. A class with too few latents for a Gaussian
    gets those of all classes.

    Args:
        latent_dim: size of z.
        conditions: a single class label.
        components: number of Gaussians for each class. None: :meth:`fit_given` raises it from 1 for as long as held-out
            latents gain, and sets it.

    Raises:
        ValueError: the condition is not one class label.

    >>> from sigma_vae.conditions import Variable
    >>> label = (torch.arange(400) % 2).float()[:, None]
    >>> latents = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + 10 * label
    >>> prior = ClassMixturePrior(2, Conditions((Variable("label", ("a", "b")),)), components=1)
    >>> prior.fit_given(latents, label)
    >>> prior.given(label[:2]).sample(2).mean(1).round(decimals=-1).abs()
    tensor([ 0., 10.])
    """

    log_weights: Tensor
    means: Tensor
    scale_trils: Tensor
    log_shares: Tensor

    def __init__(self, latent_dim: int, conditions: Conditions, components: int | None = None) -> None:
        super().__init__(latent_dim, least_latents=latent_dim + 1)
        label = conditions.only_classes
        if label is None or label.classes is None:
            raise ValueError(
                f"a mixture for each class needs one class label, got the condition {', '.join(conditions.names)};"
                " take mixture, or learned"
            )
        self.conditions = conditions
        self.components = self._asked = components
        self.moments = GaussianPrior(latent_dim)
        shape = (len(label.classes), components or 0)
        self.register_buffer("log_weights", torch.full(shape, math.nan))
        self.register_buffer("means", torch.full((*shape, latent_dim), math.nan))
        self.register_buffer("scale_trils", torch.full((*shape, latent_dim, latent_dim), math.nan))
        self.register_buffer("log_shares", torch.full(shape[:1], math.nan))

    def fit_given(
        self,
        latents: Tensor,
        condition: Tensor | None,
        held_out: Tensor | None = None,
        held_condition: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Fit each class by expectation-maximisation, to at most 3 000 of its latents; those of unknown class are left out.

        Raises:
            ValueError: the classes are missing, the latents are too few, not finite or of another size, or held-out ones
                are needed and missing.
        """
        if condition is None:
            raise ValueError("a mixture for each class needs the classes of the latents, and there are none; give condition")
        known = ~condition[:, 0].isnan().cpu()
        latents, classes = self.checked(latents)[known], condition[:, 0].cpu()[known].long()
        if len(latents) < self.least_latents:
            raise ValueError(f"{len(latents)} latents have a class, and {self.least_latents} are needed; give more examples")
        if self._asked is None and held_out is None:
            raise ValueError(
                "the number of components is chosen by held-out latents: give held_out (validation), or a number: class-mixture:1"
            )
        self.moments.fit(latents)
        shares = torch.bincount(classes, minlength=len(self.log_shares)).double() + 0.5
        self.log_shares.copy_((shares / shares.sum()).log())
        self._take(latents, classes, self._asked or NUMBERS_OF_A_CLASS[0], seed)
        if self._asked is None and held_out is not None:
            self._choose(latents, classes, self.checked(held_out, least=1), held_condition, seed)

    def _choose(self, latents: Tensor, classes: Tensor, held_out: Tensor, condition: Tensor | None, seed: int) -> None:
        """Raise the number of components for as long as held-out latents gain more than the standard error of that."""
        sizes = torch.bincount(classes)
        smallest = int(sizes[sizes > 0].min())
        density = self._density(held_out, condition)
        for components in NUMBERS_OF_A_CLASS[1:]:
            if components * (self.latent_dim + 1) > smallest:
                return
            before = {name: value.clone() for name, value in self.named_buffers()}
            self._take(latents, classes, components, seed)
            found = self._density(held_out, condition)
            gain = found - density
            if gain.mean() <= gain.std() / math.sqrt(len(gain)):
                self._put(before["log_weights"], before["means"], before["scale_trils"])
                return
            density = found

    def _density(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        return self.given(condition).log_prob(latents.to(self.means))

    def _take(self, latents: Tensor, classes: Tensor, components: int, seed: int) -> None:
        within = _within(latents, classes)
        parts = [self._fitted(latents, classes == c, components, within, seed) for c in range(len(self.log_shares))]
        weights, means, factors = (torch.stack(each) for each in zip(*parts, strict=True))
        self._put(weights.log(), means, factors)

    def _put(self, log_weights: Tensor, means: Tensor, scale_trils: Tensor) -> None:
        self.log_weights, self.means = log_weights.to(self.log_weights), means.to(self.means)
        self.scale_trils = scale_trils.to(self.scale_trils)
        self.components, self.fitted = log_weights.shape[1], True

    def _fitted(
        self, latents: Tensor, mine: Tensor, components: int, within: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and factors of one class."""
        enough = int(mine.sum()) >= max(self.least_latents, components)
        some = latents[mine] if enough else latents
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))[:MOST_OF_A_CLASS]
        found: Any = expectation_maximisation(some[order], components, seed)
        weights, means, covariances = (
            torch.from_numpy(np.asarray(each)) for each in (found.weights_, found.means_, found.covariances_)
        )
        counts = (weights * len(order))[:, None, None]
        shrunk = (counts * covariances + self.latent_dim * within) / (counts + self.latent_dim)
        return weights, means, torch.linalg.cholesky(shrunk)

    def log_prob_given(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Log-density of z, in nats."""
        classes = None if condition is None else condition[:, 0].expand(z.shape[:-1]).reshape(-1)
        flat = z.reshape(-1, self.latent_dim)
        densities = _component_densities(flat, self.means.flatten(0, 1), self.scale_trils.flatten(0, 1))
        return torch.logsumexp(densities + self._log_weights_of(classes, len(flat)), 1).reshape(z.shape[:-1])

    def sample_given(self, n: int, condition: Tensor | None, generator: torch.Generator | None, temperature: float) -> Tensor:
        """One draw for each class, by the classes' shares where unknown; the temperature scales the Gaussians' spread."""
        weights = self._log_weights_of(None if condition is None else condition[:, 0], n).exp()
        which = torch.multinomial(weights, 1, generator=generator)[:, 0]
        return _drawn(self.means.flatten(0, 1)[which], self.scale_trils.flatten(0, 1)[which], generator, temperature)

    def _log_weights_of(self, classes: Tensor | None, n: int) -> Tensor:
        """Log-weight of each component, ``(n, classes · components)``: −∞ for those of other classes."""
        joint = (self.log_shares[:, None] + self.log_weights).flatten().expand(n, -1)
        if classes is None:
            return joint
        own = classes[:, None] == torch.arange(len(self.log_shares), device=classes.device)
        masked = self.log_weights.expand(n, -1, -1).masked_fill(~own[..., None], -math.inf).flatten(1)
        return torch.where(classes.isnan()[:, None], joint, masked)


def _component_densities(z: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Log-density of z ``(n, latent_dim)`` under each of K Gaussians, ``(n, K)``."""
    centred = z - means[:, None]
    unit = torch.linalg.solve_triangular(factors.to(centred.dtype), centred.mT, upper=False)
    constants = -factors.diagonal(dim1=1, dim2=2).log().sum(-1) - 0.5 * math.log(2 * math.pi) * z.shape[1]
    densities: Tensor = constants[:, None] - 0.5 * unit.square().sum(1)
    return densities.T


def _drawn(means: Tensor, factors: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
    """A draw from each Gaussian; the temperature scales their spread."""
    unit = torch.empty_like(means).normal_(generator=generator)
    return means + temperature * (factors @ unit[..., None]).squeeze(-1)


def _within(latents: Tensor, classes: Tensor) -> Tensor:
    """Covariance of the latents within their classes."""
    counts = torch.bincount(classes).double().clamp_min(1)
    sums = torch.zeros(len(counts), latents.shape[1], dtype=latents.dtype).index_add_(0, classes, latents)
    centred = latents - (sums / counts[:, None])[classes]
    return centred.T @ centred / len(latents)
