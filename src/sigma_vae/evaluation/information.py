"""What the latents know of the data, and how far their distribution is from the prior: the two parts of the rate."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.base import each_example, mean_and_error, sum_over_examples
from sigma_vae.networks import FlatNetwork, HierarchicalNetwork
from sigma_vae.priors import MixturePrior, StandardNormal
from sigma_vae.types import Batch
from sigma_vae.vae import APART, VAE, keyed_noise

__all__ = ["ACTIVE_KL_NATS", "ACTIVE_VARIANCE", "active_units", "information"]

ACTIVE_VARIANCE = 0.01
"""A latent is active where its posterior mean varies more than this over the data (Burda et al. 2016)."""
ACTIVE_KL_NATS = 0.01
"""A latent of a layer among several is active where its mean KL is more than this."""
MOST_CODES = 10_000
"""Of the test examples, for the log-sum-exp pair: its cost is their square."""
COMPONENTS = 20
"""Of the mixture that is fitted to training codes, at most."""
MOST_TRAINING_CODES = 12_000
"""For that; more change it little."""
CHUNK = 2**21
"""Log-densities held together: 16 MB."""


class _Codes(NamedTuple):
    """Posterior mean and deviation, the standard normal numbers and the draw that they give, each ``(n, latent_dim)``, in float64."""

    mean: Tensor
    deviation: Tensor
    unit: Tensor
    z: Tensor
    kl: Tensor
    """KL(q(z|x)‖p), ``(n,)``."""
    log_prior: Tensor
    """log p(z), ``(n,)``."""


@torch.no_grad()
def information(vae: VAE, test: Batches, training: Batches, seed: int = 0) -> dict[str, Any]:
    r"""Split the rate into what the latents know of the data and what the prior misses (Hoffman and Johnson 2016).

    .. math:: E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z)), \qquad q(z) = E_x\, q(z|x)

    q(z) can only be estimated. Putting the mean over N codes in its place, by a log-sum-exp, gives a bracket: with z's own example
    among them the information is bounded from below, and can be no more than log N; without it from above. Of good models the bracket
    says nothing (with 10 000 examples every one "has" 9.21 nats). Of use is what any density h says, as
    :math:`KL(q(z) \| p) \ge E_{q(z)} [\log h(z) - \log p(z)]`: here that of a mixture of at most 20 Gaussians fitted to *training*
    codes, on test codes; and where p is N(0, I), of the Gaussian g with the moments of the training codes, in closed form: where test
    codes have the same moments it is KL(g‖p). (With g's moments from the test codes it would bound nothing: d latents of N examples
    overfit them by about d(d + 3)/4N nats.)

    Args:
        vae: the model; put into eval mode.
        test: what is reported on, on at most 10 000 examples, evenly spaced.
        training: gives the codes that the two densities are fitted to, of at most 12 000 examples, evenly spaced.
        seed: of the posterior's noise, which is keyed by example.

    Returns:
        Of a network with flat latents: ``mean_kl_nats`` with its standard error; ``marginal_kl_at_least_nats``, the larger of the two
        bounds and of 0, and ``mutual_information_at_most_nats``, the rest of the mean KL; ``marginal_kl_moments_nats`` and
        ``marginal_kl_held_out_nats``, the two bounds (None where there is none: another prior; too few training codes);
        ``log_sum_exp``, the bracket, with its cap ``log_n_nats``; ``active_units``. Of a ladder: ``mean_kl_nats``, and from the top
        layer down ``kl_per_layer_nats``, ``latents_per_layer`` and how many of them have a mean KL above 0.01 nats,
        ``active_latents_per_layer``.

    Raises:
        ValueError: the network has neither flat latents nor a ladder of them, or there is one test example only.
    """
    vae.eval()
    if isinstance(vae.network, HierarchicalNetwork):
        return _of_layers(vae, vae.network, test, seed)
    if not isinstance(vae.network, FlatNetwork):
        raise ValueError(
            f"the information in latents is computed for FlatNetwork and, layer by layer, for HierarchicalNetwork; the latents of"
            f" {type(vae.network).__name__} have neither form"
        )
    whole = _codes(vae, vae.network, test, seed)
    if len(whole.z) < 2:
        raise ValueError("information is about the spread of codes and needs at least two test examples, got one")
    codes = _evenly(whole, MOST_CODES)
    mean_kl = float(codes.kl.mean())
    fitted_to = _codes(vae, vae.network, _part(training, MOST_TRAINING_CODES), seed + APART)
    held_out = _held_out(codes, fitted_to.z, seed)
    moments = _moment_bound(codes, fitted_to) if isinstance(vae.network.prior, StandardNormal) else None
    bounds = [moments, None if held_out is None else held_out["mean"]]
    marginal = max([0.0, *(bound for bound in bounds if bound is not None)])
    return {
        "examples": len(codes.z),
        "noise_seed": seed,
        "latent_dim": vae.network.latent_dim,
        "active_units": _active(whole.mean),
        "mean_kl_nats": mean_and_error(codes.kl),
        "marginal_kl_at_least_nats": marginal,
        "mutual_information_at_most_nats": mean_kl - marginal,
        "marginal_kl_moments_nats": moments,
        "marginal_kl_held_out_nats": held_out,
        "log_sum_exp": _bracket(codes, mean_kl),
    }


def active_units(vae: VAE, batches: Batches) -> int:
    """How many flat latents have a posterior mean whose variance over the data is above 0.01 (Burda et al. 2016).

    Raises:
        ValueError: the network has no flat latents.
    """
    return _active(each_example(vae, batches, lambda batch: vae.encode(batch.x).loc))


def _active(means: Tensor) -> int:
    return int((means.var(0, correction=0) > ACTIVE_VARIANCE).sum())


def _codes(vae: VAE, network: FlatNetwork, batches: Batches, seed: int) -> _Codes:
    """Of every example, the draw from which the ELBO is computed with this seed."""

    def rows(batch: Batch) -> Tensor:
        posterior = network.encode(batch.x)
        unit = keyed_noise(batch.positions, seed)(posterior.loc.shape).to(posterior.loc)
        z = posterior.loc + posterior.scale * unit
        single = network.prior.kl(posterior, z), network.prior.log_prob(z)
        return torch.cat([posterior.loc, posterior.scale, unit, z, *(column[:, None] for column in single)], 1)

    found = each_example(vae, batches, rows)
    mean, deviation, unit, z = found[:, :-2].chunk(4, 1)
    return _Codes(mean, deviation, unit, z, kl=found[:, -2], log_prior=found[:, -1])


def _evenly(codes: _Codes, most: int) -> _Codes:
    chosen = _spaced(len(codes.z), most)
    return _Codes(*(values[chosen] for values in codes))


def _part(batches: Batches, most: int) -> Batches:
    """At most so many examples of a split."""
    if len(batches.store) <= most:
        return batches
    world, sizes = batches.world_size, range(min(batches.batch_size, most), most + 1)
    size = next(
        size for size in sizes if most % size == 0 or most % size >= world
    )  # each process has a share of the last batch, too
    chosen = batches.store.select(_spaced(len(batches.store), most))
    return Batches(chosen, batches.scaling, size, rank=batches.rank, world_size=world)


def _spaced(n: int, most: int) -> Tensor:
    """At most so many of n rows, evenly spaced: data sets may be sorted."""
    return torch.arange(n) if n <= most else torch.arange(most) * n // most


def _bracket(codes: _Codes, mean_kl: float) -> dict[str, float]:
    """Information and marginal KL with the mean over all codes, or over all others, in place of q(z)."""
    own, others = _log_densities(codes)
    n = len(own)
    at_least = own - torch.logaddexp(own, others) + math.log(n)
    at_most = own - others + math.log(n - 1)
    information = {"at_least": float(at_least.mean()), "at_most": float(at_most.mean())}
    return {
        "log_n_nats": math.log(n),
        "mutual_information_at_least_nats": information["at_least"],
        "mutual_information_at_most_nats": information["at_most"],
        "marginal_kl_at_least_nats": mean_kl - information["at_most"],
        "marginal_kl_at_most_nats": mean_kl - information["at_least"],
    }


def _log_densities(codes: _Codes) -> tuple[Tensor, Tensor]:
    r"""Of each draw log q(z|x) of its own example, and :math:`\log \sum q(z|x')` over the others, each ``(n,)``.

    The squares are expanded, so that all pairs are one product of matrices.
    """
    constant = 0.5 * math.log(2 * math.pi) * codes.z.shape[1]
    own = -0.5 * codes.unit.square().sum(1) - codes.deviation.log().sum(1) - constant
    center = codes.mean.mean(0)  # smaller squares lose fewer digits
    mean, z, precision = codes.mean - center, codes.z - center, codes.deviation.pow(-2)
    weights = torch.cat([mean * precision, -0.5 * precision], 1).T.contiguous()
    offsets = -(0.5 * mean.square() * precision + codes.deviation.log()).sum(1) - constant
    features = torch.cat([z, z.square()], 1)
    others = []
    for rows in torch.split(torch.arange(len(z)), max(1, CHUNK // len(z))):
        pairs = torch.addmm(offsets, features[rows], weights)
        pairs[torch.arange(len(rows)), rows] = -math.inf
        others.append(pairs.logsumexp(1))
    return own, torch.cat(others)


def _moment_bound(codes: _Codes, training: _Codes) -> float:
    """E log g(z) − log N(z; 0, I) over the test posteriors, where g has mean and covariance of the mixture of the training ones."""
    mean = training.mean.mean(0)
    covariance = _second_moment(training, mean)
    quadratic = torch.linalg.solve(covariance, _second_moment(codes, mean)).trace()
    under_prior = _second_moment(codes, torch.zeros_like(mean)).trace()
    return float(0.5 * (under_prior - quadratic - torch.linalg.slogdet(covariance).logabsdet))


def _second_moment(codes: _Codes, center: Tensor) -> Tensor:
    """Of the mixture of all posteriors about a point, ``(latent_dim, latent_dim)``."""
    centered = codes.mean - center
    return centered.T @ centered / len(centered) + torch.diag(codes.deviation.square().mean(0))


def _held_out(codes: _Codes, training: Tensor, seed: int) -> dict[str, float | None] | None:
    """Mean over test codes of log h(z) − log p(z), for a mixture h fitted to training codes; None where these are too few."""
    latent_dim = training.shape[1]
    components = min(COMPONENTS, len(training) // (latent_dim + 1))
    if components < 1:
        return None
    density = MixturePrior(latent_dim, components).double()
    density.fit(training, seed=seed)
    return mean_and_error(density.log_prob(codes.z) - codes.log_prior)


def _of_layers(vae: VAE, network: HierarchicalNetwork, test: Batches, seed: int) -> dict[str, Any]:
    def rows(batch: Batch) -> Tensor:
        maps = network.latent_kl(batch.x, keyed_noise(batch.positions, seed))
        return torch.cat([layer.flatten(1) for layer in maps], 1)

    examples = len(test.store)
    sizes = [math.prod(shape) for shape in network.layer_shapes]
    layers = torch.split(sum_over_examples(vae, test, rows) / examples, sizes)
    return {
        "examples": examples,
        "noise_seed": seed,
        "mean_kl_nats": float(sum(layer.sum() for layer in layers)),
        "kl_per_layer_nats": [float(layer.sum()) for layer in layers],
        "latents_per_layer": sizes,
        "active_latents_per_layer": [int((layer > ACTIVE_KL_NATS).sum()) for layer in layers],
    }
