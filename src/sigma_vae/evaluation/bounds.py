"""Bounds above and beside the ELBO: importance-weighted ones, and what σ chosen on the scored data would pretend."""

import copy
import math
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.base import each_example, mean_and_error
from sigma_vae.evaluation.suite import score
from sigma_vae.likelihoods import Gaussian
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.scales import Optimal
from sigma_vae.networks import FlatNetwork
from sigma_vae.types import Batch, Inference, Likelihood
from sigma_vae.vae import VAE, Scores, keyed_noise

__all__ = ["Measure", "iwae", "oracle"]

Measure = Literal["iwae_nats", "iwae_post_hoc_nats", "iwae_bits_per_dim", "iwae_bits_per_dim_post_hoc"]
"""What the likelihood observes, with its own σ and with the refitted one; the masses of the levels, likewise."""

FEATURES = 2**18
"""Decoded together, where one draw of the batch has fewer: on a CPU temporaries should stay in its caches."""
OTHER_FEATURES = 2**24
"""Of a GPU, which needs larger pieces to be busy."""


class _Term(NamedTuple):
    """A log p(x|z): of what is observed, or of the level masses; by the own σ, or by the refitted one."""

    level: bool
    post_hoc: bool

    def __call__(self, likelihood: Likelihood, h: Tensor, target: Tensor) -> Tensor:
        if self.level:
            return likelihood.log_mass(h, target, refitted=self.post_hoc)
        return (likelihood.distribution(h, refitted=True) if self.post_hoc else likelihood(h)).log_prob(target)


@torch.no_grad()
def iwae(
    vae: VAE, batches: Batches, draws: int = 64, seed: int = 0, measures: Collection[Measure] | None = None
) -> dict[str, Any]:
    r"""The importance-weighted bound of k draws (Burda et al. 2016), which rises from the ELBO to log p(x) with k.

    .. math::
        \log p(x) \ge E \log \tfrac1k \sum_{i=1}^k w_i, \qquad w_i = \frac{p(x|z_i)\, p(z_i)}{q(z_i|x)}, \quad z_i \sim q(z|x)

    The first draw of each example is the one from which :func:`evaluate` computes the ELBO with this seed. The weights are summed up
    as they come, in float64; all are of this draw: an analytic KL in place of the log-ratio would bound nothing.

    Args:
        vae: calibrated on training data; put into eval mode.
        batches: every example is counted once; on several processes, each gives its share.
        draws: k.
        seed: of the posterior's noise, which is keyed by example.
        measures: what is computed, all that there is unless given: the masses of levels cost several times the densities.

    Returns:
        For each measure its mean over examples and the standard error of it, densities in the data's own units. ``by_draws``: the means
        at ``draws`` 1, 2, 4, ... k, which show whether a bound still rises. ``effective_sample_size``: :math:`(\sum w)^2 / \sum w^2`,
        between 1 and k, mean over examples; where it is near 1 one draw has almost all the weight, and more draws would raise the bound.

    Raises:
        ValueError: the likelihood is an objective, draws is below 1, or a measure is none, or one that this model does not have.

    >>> from sigma_vae import VAE, Fixed, Gaussian, mlp
    >>> from sigma_vae.data import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5), levels=None))
    >>> report = iwae(vae, Batches(InMemory(torch.rand(8, 1, 4, 4)), Scaling(), batch_size=4), draws=5, measures=["iwae_nats"])
    >>> report["by_draws"]["draws"], 1 <= report["effective_sample_size"]["iwae_nats"]["mean"] <= 5
    ([1, 2, 4, 5], True)
    """
    if draws < 1:
        raise ValueError(f"draws counts the latents drawn for each example and is at least 1, got {draws}")
    vae.eval()
    terms = _terms(vae.likelihood, measures)
    distinct = list(dict.fromkeys(terms.values()))
    at = sorted({2**i for i in range(draws.bit_length())} | {draws})

    def rows(batch: Batch) -> Tensor:
        bounds, size, dims = _summed_weights(vae, batch, distinct, draws, seed, at)
        return torch.cat([bounds, size[..., None], dims.expand(len(distinct), -1)[..., None]], -1).transpose(0, 1)

    found = each_example(vae, batches, rows)  # (examples, terms, a column for each of `at`, size and dims)
    report: dict[str, Any] = {"examples": len(found), "draws": draws, "noise_seed": seed}
    by_draws: dict[str, list[float]] = {"draws": at}
    sizes = {}
    for measure, term in terms.items():
        values = found[:, distinct.index(term)]
        bounds = values[:, :-2] - batches.log_volume_nats
        if "bits" in measure:
            bounds = -bounds / (values[:, -1:] * math.log(2))
        report[measure] = mean_and_error(bounds[:, -1])
        by_draws[measure] = bounds.mean(0).tolist()
        sizes[measure] = mean_and_error(values[:, -2])
    return report | {"effective_sample_size": sizes, "by_draws": by_draws}


@torch.no_grad()
def oracle(vae: VAE, batches: Batches, seed: int = 0) -> dict[str, Any]:
    r"""What σ solved on the very examples that are scored would report: no bound, but the most that a choice of σ could give.

    It is what evaluations print that take σ from the batch at hand, here for all examples together; σ and each x then are not
    independent. Where the refit is one σ of a Gaussian, the difference to the post-hoc value, the leak, is

    .. math:: \tfrac D2 (r - 1 - \ln r), \qquad r = \text{MSE}_\text{eval} / \sigma^2_\text{train}.

    Args:
        vae: calibrated on training data; put into eval mode, and left with the σ that it has.
        batches: every example is counted once; on several processes, each gives its share.
        seed: of the posterior's noise, which is keyed by example.

    Returns:
        ``oracle_nats``, with the σ that is best for what the likelihood observes, and ``leak_nats``, what it is above the post-hoc value:
        means over examples with their standard errors; for data with levels ``oracle_level_nats`` and ``leak_level_nats``, of their
        log-mass. ``leak_formula_nats`` and ``mse_over_variance``, r, are None where the formula does not speak of the likelihood,
        or the σ that is solved lies at its floor.

    Raises:
        ValueError: the likelihood has no scale, or none is stored yet.
    """
    if not isinstance(vae.likelihood, LocationScale):
        raise ValueError(
            f"{vae.likelihood} has no σ, so there is none to solve on the scored data; this is for location-scale families"
        )
    vae.eval()
    solved = VAE(vae.network, copy.deepcopy(vae.likelihood))
    solved.calibrate(batches, seed)
    known, best = score(vae, batches, seed), score(solved.eval(), batches, seed)
    report: dict[str, Any] = {"examples": len(known.rate), "noise_seed": seed}
    report |= _compared("", best.log_likelihood_post_hoc, known.log_likelihood_post_hoc, known.rate)
    if known.log_mass_post_hoc is not None and best.log_mass_post_hoc is not None:
        report |= _compared("level_", best.log_mass_post_hoc, known.log_mass_post_hoc, known.rate)
    return report | _leak_formula(vae.likelihood, solved.likelihood, known)


def _compared(kind: str, best: Tensor, known: Tensor, rate: Tensor) -> dict[str, Any]:
    return {f"oracle_{kind}nats": mean_and_error(best - rate), f"leak_{kind}nats": mean_and_error(best - known)}


def _leak_formula(likelihood: LocationScale, solved: Likelihood, scores: Scores) -> dict[str, float | None]:
    assert isinstance(solved, LocationScale)
    scale = likelihood.scale
    if not isinstance(likelihood, Gaussian) or likelihood.observes == "level" or scale.predicted or scale.refit_per != "batch":
        return {"leak_formula_nats": None, "mse_over_variance": None}
    best = float(solved.scale.density_log_scale)
    if best <= scale.log_floor + 1e-6:  # in float32; its square is not the mean squared error then
        return {"leak_formula_nats": None, "mse_over_variance": None}
    log_ratio = 2 * (best - float(scale.density_log_scale))
    dims = float(scores.dims.mean())
    return {
        "leak_formula_nats": 0.5 * dims * (math.expm1(log_ratio) - log_ratio),
        "mse_over_variance": math.exp(log_ratio),
    }


def _terms(likelihood: Likelihood, measures: Collection[Measure] | None) -> dict[Measure, _Term]:
    """What each measure is made of; where the own σ is the refitted one, two are made of the same."""
    if not likelihood.normalised:
        raise ValueError(
            f"{likelihood} is an objective, not a likelihood, of these data: importance weights need p(x|z), and bound nothing without"
            " it; evaluate reports its objective_nats"
        )
    refitted = isinstance(likelihood, LocationScale) and not isinstance(likelihood.scale, Optimal)
    level = likelihood.observes == "level"
    known: dict[Measure, _Term] = {"iwae_nats": _Term(level, False), "iwae_post_hoc_nats": _Term(level, refitted)}
    if likelihood.levels is not None:
        known |= {"iwae_bits_per_dim": _Term(True, False), "iwae_bits_per_dim_post_hoc": _Term(True, refitted)}
    if measures is None:
        return known
    if not measures or not set(measures) <= set(known):
        some = "" if likelihood.levels is not None else " (there are bits only of data with levels)"
        raise ValueError(f"measures of this model are one or more of {', '.join(known)}{some}; got {list(measures)}")
    return {measure: term for measure, term in known.items() if measure in measures}


def _inferences(vae: VAE, batch: Batch, draws: int, seed: int) -> Iterator[Inference]:
    """One draw after the other; of flat latents many together, encoded once."""
    noise = keyed_noise(batch.positions, seed)
    if not isinstance(vae.network, FlatNetwork):
        for _ in range(draws):
            yield vae.network.infer(batch.x, mask=batch.mask, noise=noise)
        return
    posterior = vae.network.encode(batch.x)
    most, together = FEATURES if batch.x.device.type == "cpu" else OTHER_FEATURES, 1
    while draws:
        unit = torch.stack([noise(posterior.loc.shape) for _ in range(min(together, draws))]).to(posterior.loc)
        inference = vae.network.draw(batch.x, posterior, unit)
        yield inference
        draws -= len(unit)
        together = max(1, most * len(unit) // inference.h.numel())


def _summed_weights(
    vae: VAE, batch: Batch, terms: list[_Term], draws: int, seed: int, at: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds ``(terms, batch, at)`` after as many draws, effective sample sizes ``(terms, batch)``, and the values that are scored."""
    total = squares = torch.full((len(terms), len(batch.x)), -math.inf, dtype=torch.float64)
    bounds, done, dims = [], 0, torch.empty(0)
    for inference in _inferences(vae, batch, draws, seed):
        h, target = inference.scored()
        log_weights = [inference.per_example(term(vae.likelihood, h, target)) + inference.log_ratio for term in terms]
        dims = inference.dims().reshape(-1, len(batch.x))[0].cpu().double()
        for each in torch.stack(log_weights).cpu().double().reshape(len(terms), -1, len(batch.x)).unbind(1):
            total, squares, done = torch.logaddexp(total, each), torch.logaddexp(squares, 2 * each), done + 1
            if done in at:
                bounds.append(total - math.log(done))
    return torch.stack(bounds, -1), torch.exp(2 * total - squares), dims
