"""A neural spline flow."""

import copy
import math
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from sigma_vae.priors.base import FittedPrior
from sigma_vae.priors.gaussian import GaussianPrior, drawn_kl
from sigma_vae.progress import steps as shown_steps
from sigma_vae.registry import register

__all__ = ["FlowPrior"]

STEPS, BATCH_SIZE, LEARNING_RATE = 1500, 256, 2e-3
PATIENCE = 5
"""Number of evaluations on held-out latents without a gain, after which the fit stops."""
LOOK_EVERY = 50
"""Steps between two evaluations on held-out latents."""
MOST_HELD_OUT = 2000
HELD_OUT_SHARE = 0.1


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
        generator = torch.Generator().manual_seed(seed)
        latents = self.checked(latents)
        if held_out is None:
            mixed = latents[torch.randperm(len(latents), generator=generator)]
            part = max(1, round(HELD_OUT_SHARE * len(latents)))
            held_out, latents = mixed[:part], mixed[part:]
        moments = GaussianPrior(self.latent_dim).double()
        moments.fit(latents)
        units = moments.whiten(latents).float(), moments.whiten(self.checked(held_out, least=1)[:MOST_HELD_OUT]).float()
        transform = _transform(self.latent_dim, seed)
        with torch.enable_grad():
            _maximise(transform.requires_grad_(), *units, generator)
        self.transform.load_state_dict(transform.state_dict())
        self.moments.load_state_dict(moments.state_dict())
        self.fitted = True

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats."""
        return _log_prob(self.transform, self.moments.whiten(z)) - self.moments.log_determinant()

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


def _log_prob(transform: nn.Module, unit: Tensor) -> Tensor:
    normal, log_volume = transform().call_and_ladj(unit)
    result: Tensor = log_volume - 0.5 * (normal.square() + math.log(2 * math.pi)).sum(-1)
    return result


def _maximise(transform: nn.Module, latents: Tensor, held_out: Tensor, generator: torch.Generator) -> None:
    """Train the transform, and leave it with the weights that give held-out latents the highest density."""
    optimizer = torch.optim.Adam(transform.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, best_state, behind = -math.inf, copy.deepcopy(transform.state_dict()), 0
    for step in shown_steps("training the prior", range(1, STEPS + 1)):
        chosen = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        (-_log_prob(transform, latents[chosen]).mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY:
            continue
        with torch.no_grad():
            density = float(_log_prob(transform, held_out).mean())
        behind += 1
        if density > best:
            best, best_state, behind = density, copy.deepcopy(transform.state_dict()), 0
        if behind == PATIENCE:
            break
    transform.load_state_dict(best_state)


def _transform(latent_dim: int, seed: int) -> nn.Module:
    """Zuko's transform with seeded weights; keeps the global generator, and torch's checks, which zuko switches off."""
    checks = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
    try:
        from zuko.flows import NSF  # type: ignore[import-untyped]
    finally:
        Distribution._validate_args, Distribution.arg_constraints = checks  # type: ignore[method-assign]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        transform: nn.Module = NSF(latent_dim, transforms=3, hidden_features=(64, 64)).transform
    return transform.requires_grad_(False)
