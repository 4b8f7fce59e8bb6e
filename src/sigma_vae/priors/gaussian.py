"""Gaussian priors: N(0, I), one with the moments of the latents, one given a condition, and mixtures."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sigma_vae.conditions import Conditions, Embedding
from sigma_vae.progress import bar
from sigma_vae.registry import Argument, register
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


# -- mixtures of Gaussians ---------------------------------------------------------------------------------------------

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
