"""Flows: neural splines over vectors of latents, also given a condition, and flow matching over maps."""

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.nn.functional import avg_pool1d, avg_pool2d, interpolate, silu
from torch.optim.lr_scheduler import CosineAnnealingLR

from sigma_vae.conditions import Conditions
from sigma_vae.optimisers import Adam
from sigma_vae.priors.gaussian import ConditionalPrior, GaussianPrior, drawn_kl
from sigma_vae.progress import steps as shown_steps
from sigma_vae.registry import Argument, register
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
    optimizer = Adam(transform.parameters(), lr=LEARNING_RATE)
    schedule = CosineAnnealingLR(optimizer, STEPS)
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


# -- a flow of latent maps ---------------------------------------------------------------------------------------------

MATCHING_STEPS, MATCHING_PASSES, MATCHING_BATCH_SIZE, MATCHING_RATE = 1000, 100, 128, 2e-3
WIDTH = 48
MATCHING_LOOK_EVERY = 100
"""Steps between two measurements on held-out latents."""
EMA_DECAY = 0.995
MOST_HELD_OUT_MAPS = 512
ODE_STEPS = 8
"""Runge-Kutta steps from noise to latents, and back."""
EXACT = 16
"""Up to so many latents the divergence is exact; above, it is estimated with one probe per evaluation."""
AT_ONCE = 128
"""Examples in one pass of the network, where no gradient is needed: as many as fit into the processor's cache."""
FREQUENCIES = 8
CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
POOLS: dict[int, Callable[..., Tensor]] = {1: avg_pool1d, 2: avg_pool2d}

Velocity = Callable[[Tensor, Tensor], Tensor]


def _steps(text: str) -> dict[str, int]:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"flow-matching takes a number of training steps, got {text!r}")
    return {"steps": int(text)}


def _steps_of(prior: "FlowMatchingPrior") -> str | None:
    return None if prior.steps is None else str(prior.steps)


@register.prior("flow-matching", argument=Argument("steps", _steps, "2000", of=_steps_of))
@final
class FlowMatchingPrior(FittedPrior):
    r"""A flow from noise to latent maps along straight lines, learned by regression (flow matching).

    See Lipman et al. 2023 (arXiv 2210.02747) and Liu et al. 2023 (arXiv 2209.03003). With noise ε ~ N(0, I), latents u in
    units of their mean and std, and :math:`u_t = (1 - t) ε + t u`, the network v
    minimises :math:`E \| v(u_t, t) - (u - ε) \|^2`. Draws solve du/dt = v(u, t) from noise at t = 0, by Runge-Kutta
    steps of fourth order. The density follows from the way back (Chen et al. 2018, arXiv 1806.07366):

    .. math:: \log p(u_1) = \log N(u_0; 0, I) - \int_0^1 \nabla \cdot v(u_t, t)\, dt

    Up to 16 latents the divergence is exact. Above, it is Hutchinson's estimate with one probe of random signs per
    evaluation (Grathwohl et al. 2019, arXiv 1810.01367), which is unbiased: an ELBO with this prior is a bound in
    expectation. Probes depend on the example alone (on the signs of its latents), so that no number depends on its
    batch. Before it learns anything, v is that of N(0, I), for which this is the Gaussian with the latents' means and
    variances.

    KL(q‖p) has no closed form and is estimated from the draw z, with that Gaussian as control variate.

    Args:
        latent_dim: size of z.
        shape: of the map that z is the flat form of, ``(C, *space)`` with one or two axes of space; ``(latent_dim,)``
            unless given.
        steps: of its training, with 128 latents each; unless given 1 000, but no more than 100 passes over the latents.

    Shapes:
        z ``(*batch, latent_dim)``, log_prob and kl ``(*batch,)`` in nats.

    Raises:
        ValueError: the shape does not have so many values.

    >>> FlowMatchingPrior(latent_dim=12, shape=(3, 2, 2)).sample(3)
    Traceback (most recent call last):
    ...
    ValueError: this FlowMatchingPrior is not fitted yet; fit it to latents: vae.fit_prior(loader, prior)
    """

    density_passes = 10
    mean: Tensor
    std: Tensor

    def __init__(self, latent_dim: int, shape: Sequence[int] | None = None, steps: int | None = None) -> None:
        super().__init__(latent_dim, least_latents=20)
        shape = (latent_dim,) if shape is None else tuple(shape)
        if math.prod(shape) != latent_dim or len(shape) > 3:
            raise ValueError(f"a map (C, *space) of {latent_dim} latents has one or two axes of space, got the shape {shape}")
        self.steps = steps
        self.shape = (*shape, 1) if len(shape) == 1 else shape
        self.register_buffer("mean", torch.full((latent_dim,), math.nan))
        self.register_buffer("std", torch.full((latent_dim,), math.nan))
        self.net = _Net(self.shape[0], len(self.shape) - 1).requires_grad_(False)
        self._last: tuple[Tensor, Tensor] | None = None

    def fit(self, latents: Tensor, held_out: Tensor | None = None, seed: int = 0) -> None:
        """Learn the velocity by Adam, and keep the averaged weights that are best for held-out latents.

        Without held-out latents, a tenth of the latents is held out. It is trained in float32 on the module's device.

        Raises:
            ValueError: the latents are too few, not finite, of another size, or one of them never changes.
        """
        generator = torch.Generator().manual_seed(seed)
        latents = self.checked(latents)
        if held_out is None:
            mixed = latents[torch.randperm(len(latents), generator=generator)]
            part = max(1, round(HELD_OUT_SHARE * len(latents)))
            held_out, latents = mixed[:part], mixed[part:]
        mean, std = latents.mean(0), latents.std(0, correction=0)
        if not bool((std > 0).all()):
            raise ValueError("one of the latents never changes, so it has no density; are they draws from the posteriors?")
        held_out = self.checked(held_out, least=1)[:MOST_HELD_OUT_MAPS]
        units, others = (((z - mean) / std).float().reshape(-1, *self.shape) for z in (latents, held_out))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            net = _Net(self.shape[0], len(self.shape) - 1).to(self.mean.device)
            usual = min(MATCHING_STEPS, MATCHING_PASSES * -(-len(units) // MATCHING_BATCH_SIZE))
            best = _learn(net, units, others, generator, self.steps or usual)
        self.net.load_state_dict(best)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.fitted, self._last = True, None

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z, in nats, by solving the ordinary differential equation back to noise."""
        self.require_fitted()
        if self._last is not None and self._last[0] is z:  # an inference asks for it and for the KL
            return self._last[1]
        unit = ((z - self.mean) / self.std).reshape(-1, *self.shape)
        if unit.dim() == 4:
            unit = unit.contiguous(memory_format=torch.channels_last)  # a tenth faster on a CPU
        parts = [self._back(part) for part in torch.split(unit, AT_ONCE)]
        found = torch.cat(parts).reshape(z.shape[:-1]) - self.std.log().sum()
        self._last = None if z.requires_grad else (z, found)
        return found

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        """KL(q‖p), estimated from the draw z with the Gaussian of the same means and variances as control variate."""
        ratio = posterior.scale / self.std
        distance = ((posterior.loc - self.mean) / self.std).square()
        to_gaussian = (0.5 * (ratio.square() + distance - 1) - ratio.log()).sum(-1)
        unit = (z - self.mean) / self.std
        under_gaussian = (-0.5 * unit.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return to_gaussian + under_gaussian - self.log_prob(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n latents; the temperature scales the noise that they start from."""
        self.require_fitted()
        noise = torch.empty(n, *self.shape, device=self.mean.device, dtype=self.mean.dtype).normal_(generator=generator)
        parts = [_solve(self._rates, temperature * part, 0.0, 1.0)[0] for part in torch.split(noise, AT_ONCE)]
        return self.mean + self.std * torch.cat(parts).flatten(1)

    def _velocity(self, u: Tensor, t: Tensor) -> Tensor:
        result: Tensor = _gaussian_velocity(u, t) + self.net(u, t)
        return result

    def _rates(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity alone, where nothing asks for its divergence."""
        return self._velocity(u, t), u.new_zeros(())

    def _back(self, unit: Tensor) -> Tensor:
        """Log-density of latents in their units ``(n, *shape)``."""
        exact = self.latent_dim <= EXACT
        rates = _exact_divergence if exact else partial(_probed_divergence, iter(_probes(unit)))
        noise, total = _solve(partial(rates, self._velocity), unit, 1.0, 0.0)
        normal: Tensor = (-0.5 * noise.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        return normal + total


def _probes(unit: Tensor) -> Tensor:
    """Random signs for each evaluation of each example, ``(evaluations, n, *shape)``.

    Their seed is made from the signs of the example's own latents: it is the same in every batch, and another for others.
    """
    flat = (unit.flatten(1) < 0).cpu().numpy()
    seeds = [zlib.crc32(np.packbits(row).tobytes()) for row in flat]
    size = (4 * ODE_STEPS, flat.shape[1])
    drawn = [torch.randint(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int8) for seed in seeds]
    return (2 * torch.stack(drawn, 1) - 1).to(unit).reshape(len(drawn[0]), *unit.shape)


def _gaussian_velocity(u: Tensor, t: Tensor) -> Tensor:
    """E[u − ε | u_t] where u ~ N(0, I): the velocity before anything is learned."""
    return u * (2 * t - 1) / (t**2 + (1 - t) ** 2)


Rates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Velocity at a place and a time, and its divergence for each example."""


def _solve(rates: Rates, u: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Classical Runge-Kutta steps from one time to another: where they lead, and the divergence's integral, ``(n,)``."""
    step, total = (end - start) / ODE_STEPS, u.new_zeros(len(u))
    for number in range(ODE_STEPS):
        t = u.new_tensor(start + number * step)
        first, a = rates(u, t)
        second, b = rates(u + 0.5 * step * first, t + 0.5 * step)
        third, c = rates(u + 0.5 * step * second, t + 0.5 * step)
        fourth, d = rates(u + step * third, t + step)
        u = u + step / 6 * (first + 2 * second + 2 * third + fourth)
        total = total + step / 6 * (a + 2 * b + 2 * c + d)
    return u, total


def _pulling(velocity: Velocity, u: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The velocity, and the map from w to wᵀ∂v/∂u: backwards costs half of what torch takes to differentiate forwards."""
    value, pull = torch.func.vjp(lambda each: velocity(each, t), u)  # type: ignore[misc]
    return value, lambda direction: pull(direction)[0]


def _probed_divergence(probes: Iterator[Tensor], velocity: Velocity, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    value, pull = _pulling(velocity, u, t)
    probe = next(probes)
    return value, (probe * pull(probe)).flatten(1).sum(1)


def _exact_divergence(velocity: Velocity, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    value, pull = _pulling(velocity, u, t)
    total = u.new_zeros(len(u))
    for index in range(u[0].numel()):
        unit = torch.zeros_like(u).flatten(1)
        unit[:, index] = 1
        total = total + pull(unit.reshape(u.shape)).flatten(1)[:, index]
    return value, total


def _learn(net: "_Net", latents: Tensor, held_out: Tensor, generator: torch.Generator, steps: int) -> dict[str, Tensor]:
    """Train the network, and return the averaged weights with the smallest loss on held-out latents."""
    average = copy.deepcopy(net)
    optimizer = Adam(net.parameters(), lr=MATCHING_RATE)
    schedule = CosineAnnealingLR(optimizer, steps)
    fixed = _noise_and_times(held_out, torch.Generator().manual_seed(0))
    best, best_state = math.inf, copy.deepcopy(net.state_dict())
    for step in shown_steps("training the prior", range(1, steps + 1)):
        chosen = latents[torch.randint(len(latents), (MATCHING_BATCH_SIZE,), generator=generator)]
        optimizer.zero_grad()
        _loss(net, chosen, *_noise_and_times(chosen, generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            weight = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), weight)
            if step % MATCHING_LOOK_EVERY and step != steps:
                continue
            loss = float(_loss(average, held_out, *fixed))
        if loss < best:
            best, best_state = loss, copy.deepcopy(average.state_dict())
    return best_state


def _noise_and_times(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(latents.shape, generator=generator)
    return noise, torch.rand(len(latents), *[1] * (latents.dim() - 1), generator=generator)


def _loss(net: "_Net", latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    device = next(net.parameters()).device
    latents, noise, t = latents.to(device), noise.to(device), t.to(device)
    u = (1 - t) * noise + t * latents
    errors: Tensor = _gaussian_velocity(u, t) + net(u, t) - (latents - noise)
    return errors.square().mean()


@final
class _Net(nn.Module):
    """Network for the difference of the velocity from a Gaussian's; two resolutions, attention at the lower; 0 at first."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims]
        self.dims = dims
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.enter = convolution(channels, WIDTH, 3, padding=1)
        self.before = _Block(dims, WIDTH)
        self.below = nn.ModuleList([_Block(dims, WIDTH), _Block(dims, WIDTH)])
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.after = _Block(dims, WIDTH)
        self.leave = convolution(WIDTH, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        """The addition for u ``(n, C, *space)`` at times t: one number, or ``(n, 1, ...)``."""
        times = t.reshape(-1, 1) * 2 ** torch.arange(FREQUENCIES, device=u.device, dtype=u.dtype) * math.pi / 2
        time = self.time(torch.cat([times.sin(), times.cos()], 1))
        h = self.before(self.enter(u), time)
        low = POOLS[self.dims](h, 2, ceil_mode=True) if max(h.shape[2:]) > 1 else h
        low = self._mix(self.below[0](low, time))
        low = self.below[1](low, time)
        h = h + (interpolate(low, size=h.shape[2:], mode="nearest") if low.shape != h.shape else low)
        result: Tensor = self.leave(silu(self.after(h, time)))
        return result

    def _mix(self, x: Tensor) -> Tensor:
        query, key, value = self.attend(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        weights = (query @ key.transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1)
        mixed: Tensor = self.attended(weights @ value)
        return x + mixed.transpose(1, 2).reshape(x.shape)


@final
class _Block(nn.Module):
    """Two convolutions with the time between them, added to the input."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, width)
        self.first = CONVOLUTIONS[dims](width, width, 3, padding=1)
        self.shift = nn.Linear(width, width)
        self.norm2 = nn.GroupNorm(4, width)
        self.second = CONVOLUTIONS[dims](width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift = self.shift(silu(time)).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))
        h = self.first(silu(self.norm1(x))) + shift
        result: Tensor = x + self.second(silu(self.norm2(h)))
        return result
