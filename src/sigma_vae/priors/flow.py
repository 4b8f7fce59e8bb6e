"""Neural spline flows, of all latents and given a condition."""

import copy
import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from sigma_vae.conditions import Conditions
from sigma_vae.priors.gaussian import ConditionalPrior, GaussianPrior, drawn_kl
from sigma_vae.progress import steps as shown_steps
from sigma_vae.registry import register
from sigma_vae.types import FittedPrior

STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 256, 2e-3
PATIENCE = 5
"""Number of evaluations on held-out latents without a gain, after which the fit stops."""
LOOK_EVERY = 50
"""Steps between two evaluations on held-out latents."""
MOST_HELD_OUT = 2000
HELD_OUT_SHARE = 0.1
HIDDEN_SHARE = 0.1
"""Share of a batch's conditions that are hidden, so that the flow also learns p(z)."""


@register.prior("flow", sketches=False)  # zuko cannot build its layers on the meta device
@final
class FlowPrior(FittedPrior):
    r"""A neural spline flow (Durkan et al. 2019, arXiv 1906.04032) over whitened latents.

    .. math:: \log p(z) = \log N(f(u); 0, I) + \log \left| \det \frac{\partial f}{\partial u} \right| - \tfrac12 \log |\Sigma|,
        \qquad u = \Sigma^{-1/2} (z - \mu)

    with the moments μ, Σ of the latents, and f three autoregressive maps of monotonic rational-quadratic splines on
    [−5, 5], the identity outside. It has gradients only inside :meth:`fit`. KL(q‖p) has no closed form and is estimated
    from the draw z.

    Args:
        latent_dim: size of z.

    Shapes:
        z ``(*batch, latent_dim)``, log_prob and kl ``(*batch,)`` in nats.

    Raises:
        ModuleNotFoundError: zuko is not installed.

    >>> FlowPrior(latent_dim=2).sample(3)
    Traceback (most recent call last):
    ...
    ValueError: this FlowPrior is not fitted yet; fit it to latents: vae.fit_prior(loader, prior)
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim, least_latents=max(20, 2 * latent_dim))
        self.moments = GaussianPrior(latent_dim)
        self.transform = _transform(latent_dim, seed=0)

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Maximise the density of the latents by Adam, and keep the weights that are best for held-out ones.

        Without held-out latents, a tenth of the latents is held out.

        Raises:
            ValueError: the latents are too few, not finite, or of another size.
        """
        latents = self.checked(latents)
        held_out = None if held_out is None else self.checked(held_out, least=1)
        nothing = None if held_out is None else held_out.new_zeros(len(held_out), 0)
        _fit(self.moments, self.transform, latents, latents.new_zeros(len(latents), 0), held_out, nothing, seed)
        self.fitted = True

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats."""
        return _log_prob(self.transform(), self.moments.whiten(z)) - self.moments.log_determinant()

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of the same moments as control variate."""
        return drawn_kl(self, self.moments, posterior, z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n latents; the temperature scales the noise that goes through the flow."""
        self.require_fitted()
        mean = self.moments.mean
        noise = torch.empty(n, self.latent_dim, device=mean.device, dtype=mean.dtype).normal_(generator=generator)
        unit: Tensor = self.transform().inv(temperature * noise)
        return self.moments.colour(unit)


@register.prior("conditional-flow", reads_condition=True, sketches=False)
@final
class ConditionalFlowPrior(ConditionalPrior):
    r"""A neural spline flow given the condition: the splines of :class:`FlowPrior` also read c.

    .. math:: \log p(z|c) = \log N(f_c(u); 0, I) + \log \left| \det \frac{\partial f_c}{\partial u} \right|
        - \tfrac12 \log |\Sigma|, \qquad u = \Sigma^{-1/2} (z - \mu)

    with the moments μ, Σ of all latents. It takes classes, covariates and any mix. The fit hides a tenth of the
    conditions, so that p(z) is known too, where the condition is unknown.

    Args:
        latent_dim: size of z.
        conditions: the variables of the condition.

    Shapes:
        z ``(*draws, batch, latent_dim)``, condition ``(batch, variables)``, log_prob and kl ``(*draws, batch)`` in nats.

    Raises:
        ModuleNotFoundError: zuko is not installed.

    >>> from sigma_vae.conditions import Variable
    >>> ConditionalFlowPrior(2, Conditions((Variable("label", ("a", "b")),))).given(torch.tensor([[0.0]]))
    Traceback (most recent call last):
    ...
    ValueError: this ConditionalFlowPrior is not fitted yet; fit it to latents: vae.fit_prior(loader, prior)
    """

    def __init__(self, latent_dim: int, conditions: Conditions) -> None:
        super().__init__(latent_dim, least_latents=max(20, 2 * latent_dim))
        self.conditions = conditions
        self.moments = GaussianPrior(latent_dim)
        self.transform = _transform(latent_dim, 0, self._context_size)

    @property
    def _context_size(self) -> int:
        return self.conditions.size + len(self.conditions.variables)

    @property
    def _unknown(self) -> Tensor:
        return torch.full((1, len(self.conditions.variables)), math.nan)

    def fit_given(
        self,
        latents: Tensor,
        condition: Tensor | None,
        held_out: Tensor | None = None,
        held_condition: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        """Maximise the density of the latents given their conditions, as :meth:`FlowPrior.fit` does.

        Raises:
            ValueError: the conditions are missing, or the latents are too few, not finite, or of another size.
        """
        if condition is None:
            raise ValueError(
                "a flow given the condition needs the conditions of the latents, and there are none; give condition"
            )
        latents, context = self.checked(latents), self.context(condition).cpu()
        held_context = None if held_condition is None else self.context(held_condition).cpu()
        held_out = None if held_out is None or held_context is None else self.checked(held_out, least=1)
        _fit(self.moments, self.transform, latents, context, held_out, held_context, seed, self.context(self._unknown).cpu())
        self.fitted = True

    def context(self, condition: Tensor) -> Tensor:
        """Input of the splines, ``(n, features)``: the features of the conditions, and which conditions are missing."""
        self.conditions.check(condition)
        return torch.cat([self.conditions.features(condition), condition.isnan().to(condition.dtype)], 1).float()

    def log_prob_given(self, z: Tensor, condition: Tensor | None) -> Tensor:
        """Log-density of z, in nats."""
        transform = self.transform(self._context_of(condition))
        return _log_prob(transform, self.moments.whiten(z)) - self.moments.log_determinant()

    def sample_given(self, n: int, condition: Tensor | None, generator: torch.Generator | None, temperature: float) -> Tensor:
        """One draw for each condition; the temperature scales the noise that goes through the flow."""
        mean = self.moments.mean
        noise = torch.empty(n, self.latent_dim, device=mean.device, dtype=mean.dtype).normal_(generator=generator)
        unit: Tensor = self.transform(self._context_of(condition).expand(n, -1)).inv(temperature * noise)
        return self.moments.colour(unit)

    def _context_of(self, condition: Tensor | None) -> Tensor:
        return self.context(self._unknown if condition is None else condition).to(self.moments.mean)


def _fit(
    moments: GaussianPrior,
    transform: nn.Module,
    latents: Tensor,
    context: Tensor,
    held_out: Tensor | None,
    held_context: Tensor | None,
    seed: int,
    hidden: Tensor | None = None,
) -> None:
    """Fit moments and transform to latents and what the splines read beside them, which may have no columns.

    ``hidden`` is read in place of some of the contexts.
    """
    generator = torch.Generator().manual_seed(seed)
    if held_out is None or held_context is None:
        order = torch.randperm(len(latents), generator=generator)
        part = max(1, round(HELD_OUT_SHARE * len(latents)))
        (held_out, latents), (held_context, context) = ((x[order[:part]], x[order[part:]]) for x in (latents, context))
    exact = GaussianPrior(latents.shape[1]).double()
    exact.fit(latents)
    held_unit, held_context = exact.whiten(held_out[:MOST_HELD_OUT]).float(), held_context[:MOST_HELD_OUT]
    trained = _transform(latents.shape[1], seed, context.shape[1])
    unit, held_context = exact.whiten(latents).float(), held_context.float()
    with torch.enable_grad():
        _maximise(trained.requires_grad_(), unit, context.float(), held_unit, held_context, hidden, generator)
    transform.load_state_dict(trained.state_dict())
    moments.load_state_dict(exact.state_dict())


def _log_prob(transform: Any, unit: Tensor) -> Tensor:
    normal, log_volume = transform.call_and_ladj(unit)
    result: Tensor = log_volume - 0.5 * (normal.square() + math.log(2 * math.pi)).sum(-1)
    return result


def _read(context: Tensor) -> Tensor | None:
    """A context for zuko, which takes none where there are no columns."""
    return context if context.shape[1] else None


def _maximise(
    transform: nn.Module,
    latents: Tensor,
    context: Tensor,
    held_out: Tensor,
    held_context: Tensor,
    hidden: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Train the transform, and leave it with the weights that give held-out latents the highest density."""
    optimizer = torch.optim.Adam(transform.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, best_state, behind = -math.inf, copy.deepcopy(transform.state_dict()), 0
    for step in shown_steps("training the prior", range(1, STEPS + 1)):
        chosen = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        given = context[chosen]
        if hidden is not None:
            hide = torch.rand(len(given), 1, generator=generator) < HIDDEN_SHARE
            given = torch.where(hide, hidden, given)
        (-_log_prob(transform(_read(given)), latents[chosen]).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY:
            continue
        with torch.no_grad():
            density = float(_log_prob(transform(_read(held_context)), held_out).mean())
        behind += 1
        if density > best:
            best, best_state, behind = density, copy.deepcopy(transform.state_dict()), 0
        if behind == PATIENCE:
            break
    transform.load_state_dict(best_state)


def _transform(latent_dim: int, seed: int, context: int = 0) -> nn.Module:
    """Zuko's transform with seeded weights; keeps the global generator, and torch's checks, which zuko switches off."""
    checks = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
    try:
        from zuko.flows import NSF  # type: ignore[import-untyped]
    finally:
        Distribution._validate_args, Distribution.arg_constraints = checks  # type: ignore[method-assign]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transform: nn.Module = NSF(latent_dim, context, transforms=3, hidden_features=(64, 64)).transform
    return transform.requires_grad_(False)
