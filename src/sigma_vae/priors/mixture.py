"""A mixture of Gaussians, fitted by expectation-maximisation."""

import math
import warnings
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.conditions import Conditions
from sigma_vae.priors.gaussian import GaussianPrior, drawn_kl
from sigma_vae.progress import bar
from sigma_vae.registry import Argument, register
from sigma_vae.types import FittedPrior, Prior

__all__ = ["ClassMixturePrior", "MixturePrior", "components_of", "expectation_maximisation", "read_components"]

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


# -- a mixture for each class ------------------------------------------------------------------------------------------

NUMBERS_OF_A_CLASS = (1, 2, 5, 10)
"""Numbers of components for each class to try."""
MOST_OF_A_CLASS = 3_000
"""More latents of a class change its mixture little, and cost time in proportion."""


@register.prior("class-mixture", reads_condition=True, argument=Argument("components", read_components, "1", of=components_of))
@final
class ClassMixturePrior(FittedPrior):
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

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Refused: it needs the class of each latent.

        Raises:
            ValueError: always.
        """
        raise ValueError("a mixture for each class needs the classes of the latents; call fit_given(latents, condition)")

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
        weights, means, covariances = (torch.from_numpy(np.asarray(each)) for each in _parameters(found))
        counts = (weights * len(order))[:, None, None]
        shrunk = (counts * covariances + self.latent_dim * within) / (counts + self.latent_dim)
        return weights, means, torch.linalg.cholesky(shrunk)

    def given(self, condition: Tensor | None) -> Prior:
        """p(z|c) of these classes; p(z) where there is none."""
        self.require_fitted()
        return _OfClasses(self, None if condition is None else condition[:, 0])

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z where no class is known, in nats."""
        return self.given(None).log_prob(z)

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p) where no class is known, estimated from the draw z."""
        return self.given(None).kl(posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """N draws, of classes by their shares."""
        return self.given(None).sample(n, generator, temperature)

    def component_densities(self, z: Tensor) -> Tensor:
        """Log-density of z ``(n, latent_dim)`` under each component, ``(n, classes · components)``."""
        means, factors = self.means.flatten(0, 1), self.scale_trils.flatten(0, 1)
        centred = z - means[:, None].to(z.dtype)
        unit = torch.linalg.solve_triangular(factors.to(z.dtype), centred.mT, upper=False)
        constants = -factors.diagonal(dim1=1, dim2=2).log().sum(-1) - 0.5 * math.log(2 * math.pi) * self.latent_dim
        densities: Tensor = constants[:, None] - 0.5 * unit.square().sum(1)
        return densities.T

    def log_weights_of(self, classes: Tensor | None, n: int) -> Tensor:
        """Log-weight of each component, ``(n, classes · components)``: −∞ for those of other classes."""
        joint = (self.log_shares[:, None] + self.log_weights).flatten().expand(n, -1)
        if classes is None:
            return joint
        own = classes[:, None] == torch.arange(len(self.log_shares), device=classes.device)
        masked = self.log_weights.expand(n, -1, -1).masked_fill(~own[..., None], -math.inf).flatten(1)
        return torch.where(classes.isnan()[:, None], joint, masked)


@final
class _OfClasses(Prior):
    """The prior of examples with these classes ``(batch,)``, NaN where unknown; None: all unknown."""

    def __init__(self, prior: ClassMixturePrior, classes: Tensor | None) -> None:
        super().__init__()
        self.classes = None if classes is None else classes.to(prior.means.device)
        object.__setattr__(self, "prior", prior)  # no submodule: it is not this one's to move

    prior: ClassMixturePrior

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z ``(*draws, batch, latent_dim)``, in nats."""
        n = z[..., 0].numel()
        classes = self.classes
        if classes is not None:
            classes = classes.expand(z.shape[:-1]).reshape(-1)
        densities = self.prior.component_densities(z.reshape(-1, self.prior.latent_dim))
        return torch.logsumexp(densities + self.prior.log_weights_of(classes, n), 1).reshape(z.shape[:-1])

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of all latents' moments as control variate."""
        return drawn_kl(self, self.prior.moments, posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """One draw for each example; the temperature scales the Gaussians' spread."""
        weights = self.prior.log_weights_of(self.classes, n).exp()
        which = torch.multinomial(weights, 1, generator=generator)[:, 0]
        means, factors = self.prior.means.flatten(0, 1), self.prior.scale_trils.flatten(0, 1)
        unit = torch.empty(n, means.shape[1], device=means.device, dtype=means.dtype).normal_(generator=generator)
        return means[which] + temperature * (factors[which] @ unit[..., None]).squeeze(-1)


def _within(latents: Tensor, classes: Tensor) -> Tensor:
    """Covariance of the latents within their classes."""
    counts = torch.bincount(classes).double().clamp_min(1)
    sums = torch.zeros(len(counts), latents.shape[1], dtype=latents.dtype).index_add_(0, classes, latents)
    centred = latents - (sums / counts[:, None])[classes]
    return centred.T @ centred / len(latents)


def _parameters(mixture: Any) -> tuple[Any, Any, Any]:
    return mixture.weights_, mixture.means_, mixture.covariances_
