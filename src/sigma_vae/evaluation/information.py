"""Information in the latents, and the distance of their distribution from the prior: the two parts of the rate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import Normal

from sigma_vae.conditions import Conditions
from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import (
    Estimate,
    EvaluationData,
    Metric,
    Record,
    Row,
    each_example,
    number_rows,
    part,
    spaced,
    sum_over_examples,
)
from sigma_vae.priors import ClassMixturePrior, MixturePrior
from sigma_vae.registry import register
from sigma_vae.types import Batch, Prior
from sigma_vae.vae import SEED_OFFSET, VAE, Scores, keyed_noise

ACTIVE_VARIANCE = 0.01
"""A latent is active where its posterior mean varies more than this over the data (Burda et al. 2016)."""
ACTIVE_KL_NATS = 0.01
"""A latent of one of several layers is active where its mean KL is more than this."""
MOST_LATENTS = 10_000
"""Test examples used at most: the cost of the log-sum-exp pair is their square."""
COMPONENTS = 20
"""Components, at most, of the mixture that is fitted to training latents."""
LATENTS_PER_DIMENSION = 8
"""Training latents of a component, at least, for each of its dimensions: with fewer, its covariance fits them alone."""
MOST_TRAINING_LATENTS = 12_000
"""Training latents used at most; more change the mixture little."""
MOST_VALUES = 2**25
"""Numbers in a table of latents, examples × latents, used at most: 256 MB."""
MOST_DIMENSIONS = 1_000
"""A mixture with full covariances is fitted to no more latents than these: the time is their cube."""
CHUNK = 2**21
"""Log-densities kept together: 16 MB."""


@dataclass(frozen=True, eq=False)
class LogSumExp(Record):
    """Both parts, bracketed with the mean over all latents, or over all others, as q(z); it saturates at log N.

    Where the model is given class labels, the latents are those of the same classes, and log N is a mean. All four are
    bounds in expectation; their standard errors are over examples.
    """

    log_n_nats: float
    mutual_information_at_least_nats: float
    mutual_information_at_most_nats: float
    marginal_kl_at_least_nats: float
    marginal_kl_at_most_nats: float
    standard_errors: dict[str, float | None] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Information(Record):
    """The parts of the rate of a network with one layer of latents.

    ``marginal_kl_at_least_nats`` is the largest of its two bounds and of 0, and ``mutual_information_at_most_nats`` the
    rest of the mean KL. The two bounds are ``marginal_kl_moments_nats`` (None where the prior is not N(0, I)) and
    ``marginal_kl_held_out_nats`` (None where there are too few training latents, or more than 1 000 latents in each).
    They are estimates: bounds in expectation over test examples, with standard errors. Where the model is given a
    condition, they are of q(z|c) and p(z|c), and the information is that beyond the condition, I(x; z | c).
    """

    examples: int
    noise_seed: int
    latent_dim: int
    active_units: int
    mean_kl_nats: Estimate
    marginal_kl_at_least_nats: float
    mutual_information_at_most_nats: float
    marginal_kl_moments_nats: float | None
    marginal_kl_held_out_nats: Estimate | None
    log_sum_exp: LogSumExp | None = None
    """None where the model is given a covariate: no two examples have the same, so q(z|c) has no other examples."""
    kl_per_channel_nats: list[float] | None = None
    """Mean KL of each channel from N(0, I), summed over places, where latents are maps."""
    active_channels: int | None = None
    """Channels with an active latent."""
    standard_errors: dict[str, float | None] | None = None
    """Standard errors of the plain numbers above, by name; None for a bound that is 0."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerInformation(Record):
    """The rate of several layers of latents, from the top down; a latent with a mean KL above 0.01 nats is active."""

    examples: int
    noise_seed: int
    mean_kl_nats: float
    kl_per_layer_nats: list[float]
    latents_per_layer: list[int]
    active_latents_per_layer: list[int]


@register.metric("information")
@final
class InformationMetric(Metric):
    """Mutual information of data and latents, marginal KL of the latents from the prior, and active units."""

    result = Information | LayerInformation
    measured = "by default"

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs a posterior and training latents, or the KL of each latent."""
        if vae.network.has_posterior:
            if len(data.held_out.store) < 2:
                return "it is about the spread of latents, and there is one example"
            return "it fits densities to training latents, and no training data are given" if data.training is None else None
        return None if vae.network.has_latent_kl else _lacks_latents(vae)

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Information | LayerInformation:
        """On the held-out examples, with densities fitted to training latents."""
        return information(vae, data.held_out, data.training or data.held_out, settings.seed, data.scores)

    def rows(self, result: Information | LayerInformation) -> Iterator[Row]:
        """All estimates and single numbers; of a bound, the words say how it holds."""
        errors = result.get("standard_errors") or {}
        for row in number_rows(result):
            words = " (in expectation)" if "_at_" in row.name else ""
            error = errors.get(row.name)
            yield Row(row.name + words, row.value, row.standard_error if error is None else f"{error:.4f}")
        if channels := result.get("kl_per_channel_nats"):
            active = f"{result['active_channels']} of {len(channels)}"
            yield Row("active_channels", active)
            yield Row("kl_per_channel_nats", ", ".join(f"{nats:.3g}" for nats in channels))


def _lacks_latents(vae: VAE) -> str:
    return f"{type(vae.network).__name__} defines neither posterior(x) and decode(z) nor latent_kl(x)"


class _Latents(NamedTuple):
    """Posterior mean and std, standard normal numbers and the draw they give, each ``(n, latent_dim)``, in float64."""

    mean: Tensor
    std: Tensor
    unit: Tensor
    z: Tensor
    kl: Tensor
    """KL(q(z|x)‖p), ``(n,)``."""
    log_prior: Tensor
    """log p(z|c), ``(n,)``."""
    condition: Tensor
    """``(n, variables)``, with no columns where the model is given no condition."""


@torch.no_grad()
def information(
    vae: VAE, test: Batches, training: Batches, seed: int = 0, scores: Scores | None = None
) -> Information | LayerInformation:
    r"""Split the rate into what the latents know of the data and what the prior misses (Hoffman and Johnson 2016).

    .. math:: E_x KL(q(z|x) \| p(z)) = I_q(x; z) + KL(q(z) \| p(z)), \qquad q(z) = E_x\, q(z|x)

    q(z) can only be estimated. The mean over N latents in its place, by a log-sum-exp, gives a bracket: with z's own
    example among them it bounds the information from below, by log N at most; without it, from above. For good models
    it says little (with 10 000 examples every one "has" 9.21 nats). Any density h says more, as
    :math:`KL(q(z) \| p) \ge E_{q(z)} [\log h(z) - \log p(z)]`. Two are used: a mixture of at most 20 Gaussians fitted
    to *training* latents, evaluated on test latents; and where p is N(0, I), the Gaussian with the moments of the
    training latents, in closed form. (Moments of the test latents would overfit them.)

    A model that is given a condition has the same split for each condition, and its mean is reported:

    .. math:: E_{x,c} KL(q(z|x,c) \| p(z|c)) = I_q(x; z \mid c) + E_c KL(q(z|c) \| p(z|c))

    The densities h may ignore c: the bound holds as it is. Given one class label, the fitted mixture is one for each
    class; the log-sum-exp is over examples of the same classes, and is left out where there are covariates.

    At most 10 000 test examples are used, and 12 000 training examples for the two densities, evenly spaced. A network
    with several layers of latents reports the KL of each layer instead. The model is put into eval mode. ``scores`` are
    those of the test examples with this seed, where they are known: their KL and log p(z) are not computed again.

    Raises:
        ValueError: the network has neither a posterior of one layer nor the KL of each latent, or there is only one
            test example.
    """
    vae.eval()
    if not vae.network.has_posterior:
        if not vae.network.has_latent_kl:
            raise ValueError(f"there is no information to measure: {_lacks_latents(vae)}")
        return _of_layers(vae, test, seed)
    dims = sum(vae.network.latents.sizes)
    whole = _latents(vae, test, seed, scores=scores)
    if len(whole.z) < 2:
        raise ValueError("information is about the spread of latents and needs at least two test examples, got one")
    latents = _Latents(*(values[spaced(len(whole.z), min(MOST_LATENTS, MOST_VALUES // dims))] for values in whole))
    n, most = len(training.store), min(MOST_TRAINING_LATENTS, MOST_VALUES // dims)
    few = training if n <= most else part(training, spaced(n, most))
    fitted_to = _latents(vae, few, seed + SEED_OFFSET, under_prior=False)
    held_out = _held_out(vae, latents, fitted_to, seed)
    standard = vae.network.has_prior and vae.network.prior.is_standard
    moments = _moment_bound(latents, fitted_to) if standard else None
    bounds = [torch.zeros_like(latents.kl), *(bound for bound in (moments, held_out) if bound is not None)]
    marginal = max(bounds, key=lambda bound: float(bound.mean()))
    numbers = {"marginal_kl_at_least_nats": marginal, "mutual_information_at_most_nats": latents.kl - marginal}
    numbers |= {} if moments is None else {"marginal_kl_moments_nats": moments}
    means, errors = _means(numbers)
    return Information(
        examples=len(latents.z),
        noise_seed=seed,
        latent_dim=latents.z.shape[1],
        active_units=active(whole.mean),
        mean_kl_nats=Estimate.of(latents.kl),
        marginal_kl_at_least_nats=means["marginal_kl_at_least_nats"],
        mutual_information_at_most_nats=means["mutual_information_at_most_nats"],
        marginal_kl_moments_nats=means.get("marginal_kl_moments_nats"),
        marginal_kl_held_out_nats=None if held_out is None else Estimate.of(held_out),
        log_sum_exp=_bracket(latents, vae.network.conditions),
        **_of_channels(vae, whole),
        standard_errors=errors,
    )


def _means(numbers: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Means over examples, and their standard errors; None for a number that is the same for all examples."""
    found = {name: Estimate.of(values) for name, values in numbers.items()}
    return {name: each.mean for name, each in found.items()}, {
        name: each.standard_error or None for name, each in found.items()
    }


def active_units(vae: VAE, batches: Batches) -> int:
    """Count the latents whose posterior mean has a variance above 0.01 over the data (Burda et al. 2016).

    Raises:
        ValueError: the network has no posterior of one layer of latents.
    """
    return active(each_example(vae, batches, lambda batch: vae.encode(batch.x, batch.condition).loc.flatten(1)))


def active(means: Tensor) -> int:
    """Count the active latents, given the posterior means of all examples ``(examples, latents)``."""
    return int(_varies(means).sum())


def _varies(means: Tensor) -> Tensor:
    return means.var(0, correction=0) > ACTIVE_VARIANCE


def _of_channels(vae: VAE, latents: _Latents) -> dict[str, Any]:
    """KL from N(0, I), and activity, of each channel of a map; nothing for vectors."""
    (shape,) = vae.network.latents.shapes
    if len(shape) == 1:
        return {}
    kl = 0.5 * (latents.mean.square() + latents.std.square() - 1) - latents.std.log()
    channels = kl.mean(0).reshape(shape[0], -1).sum(1)
    active = _varies(latents.mean).reshape(shape[0], -1).any(1)
    return {"kl_per_channel_nats": channels.tolist(), "active_channels": int(active.sum())}


def _latents(vae: VAE, batches: Batches, seed: int, *, under_prior: bool = True, scores: Scores | None = None) -> _Latents:
    """The draw of every example from which the ELBO is computed with this seed; its KL and log p(z) unless left out (0).

    Both follow from the example's scores, where these are known.
    """
    computed = under_prior and scores is None

    def rows(batch: Batch) -> Tensor:
        posterior = vae.encode(batch.x, batch.condition)
        unit = keyed_noise(batch.positions, seed)(posterior.loc.shape).to(posterior.loc)
        z = posterior.loc + posterior.scale * unit
        wide = [values.flatten(1) for values in (posterior.loc, posterior.scale, unit, z)]
        nothing = z.new_zeros(len(z))  # a prior that solves a differential equation takes its time
        columns = _kl_and_log_prior(vae, batch, posterior, unit, z) if computed else (nothing, nothing)
        given = z.new_zeros(len(z), 0) if batch.condition is None else batch.condition.to(z)
        return torch.cat([*wide, given, *(column[:, None] for column in columns)], 1)

    found = each_example(vae, batches, rows)
    dims = 4 * sum(vae.network.latents.sizes)
    mean, std, unit, z = found[:, :dims].chunk(4, 1)
    kl, log_prior = found[:, -2], found[:, -1]
    if scores is not None:
        log_posterior = -(0.5 * unit.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)
        kl, log_prior = scores.rate, scores.log_ratio + log_posterior
    return _Latents(mean, std, unit, z, kl, log_prior, condition=found[:, dims:-2])


def _kl_and_log_prior(vae: VAE, batch: Batch, posterior: Normal, unit: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q(z|x)‖p) and log p(z), from the prior, or from the network's own draw under the same noise."""
    if vae.network.has_prior:
        flat, vectors = Normal(posterior.loc.flatten(1), posterior.scale.flatten(1), validate_args=False), z.flatten(1)
        prior = vae.network.prior.given(batch.condition)
        return prior.kl(flat, vectors), prior.log_prob(vectors)
    inference = vae.network.infer(batch.x, noise=lambda shape: unit.reshape(shape), condition=batch.condition)
    log_q: Tensor = posterior.log_prob(z)  # type: ignore[no-untyped-call]
    return inference.kl.sum(-1), inference.log_ratio + log_q.flatten(1).sum(-1)


def _bracket(latents: _Latents, conditions: Conditions | None) -> LogSumExp | None:
    """Both parts with the mean over all latents of the same classes, or over all others of them, in place of q(z|c).

    Examples whose classes no other one has are left out; None where there are no others, or covariates.
    """
    if conditions is not None and any(each.classes is None for each in conditions.variables):
        return None
    each = latents.condition.nan_to_num(-1).tolist()  # unknown classes are a class of their own
    members: dict[tuple[float, ...], list[int]] = {}
    for number, row in enumerate(each):
        members.setdefault(tuple(row), []).append(number)
    groups = [_Latents(*(values[numbers] for values in latents)) for numbers in members.values() if len(numbers) > 1]
    if not groups:
        return None
    found = [(len(group.z), group.kl, *_log_densities(group)) for group in groups]
    at_least = torch.cat([own - torch.logaddexp(own, others) + math.log(n) for n, _, own, others in found])
    at_most = torch.cat([own - others + math.log(n - 1) for n, _, own, others in found])
    kl = torch.cat([kl for _, kl, _, _ in found])
    numbers = {"mutual_information_at_least_nats": at_least, "mutual_information_at_most_nats": at_most}
    numbers |= {"marginal_kl_at_least_nats": kl - at_most, "marginal_kl_at_most_nats": kl - at_least}
    means, errors = _means(numbers)
    log_n = sum(n * math.log(n) for n, *_ in found) / len(kl)
    return LogSumExp(log_n, **means, standard_errors=errors)


def _log_densities(latents: _Latents) -> tuple[Tensor, Tensor]:
    r"""For each draw, log q(z|x) of its own example, and :math:`\log \sum q(z|x')` over the others, each ``(n,)``.

    The squares are expanded, so that all pairs are one product of matrices.
    """
    constant = 0.5 * math.log(2 * math.pi) * latents.z.shape[1]
    own = -0.5 * latents.unit.square().sum(1) - latents.std.log().sum(1) - constant
    center = latents.mean.mean(0)  # smaller squares lose fewer digits
    mean, z, precision = latents.mean - center, latents.z - center, latents.std.pow(-2)
    weights = torch.cat([mean * precision, -0.5 * precision], 1).T.contiguous()
    offsets = -(0.5 * mean.square() * precision + latents.std.log()).sum(1) - constant
    features = torch.cat([z, z.square()], 1)
    others = []
    for rows in torch.split(torch.arange(len(z)), max(1, CHUNK // len(z))):
        pairs = torch.addmm(offsets, features[rows], weights)
        pairs[torch.arange(len(rows)), rows] = -math.inf
        others.append(pairs.logsumexp(1))
    return own, torch.cat(others)


def _moment_bound(latents: _Latents, training: _Latents) -> Tensor:
    """E log g(z) − log N(z; 0, I) over each test posterior; g has the moments of the mixture of training posteriors."""
    mean = training.mean.mean(0)
    centered = training.mean - mean
    covariance = centered.T @ centered / len(centered) + torch.diag(training.std.square().mean(0))
    precision = torch.linalg.inv(covariance)
    variance, away = latents.std.square(), latents.mean - mean
    quadratic = ((away @ precision) * away).sum(1) + variance @ precision.diagonal()
    under_prior = (latents.mean.square() + variance).sum(1)
    log_ratio: Tensor = under_prior - quadratic - torch.linalg.slogdet(covariance).logabsdet
    return 0.5 * log_ratio


def _held_out(vae: VAE, latents: _Latents, training: _Latents, seed: int) -> Tensor | None:
    """Compute log h(z|c) − log p(z|c) of each test latent; None if there are few training latents.

    h is a mixture fitted to training latents, or, given one class label, one for each class.
    """
    count, latent_dim = training.z.shape
    components = min(COMPONENTS, max(1, count // (LATENTS_PER_DIMENSION * (latent_dim + 1))))
    if count <= latent_dim or latent_dim > MOST_DIMENSIONS:
        return None
    conditions = vae.network.conditions
    label = None if conditions is None else conditions.only_classes
    if conditions is None or label is None or label.classes is None or training.condition.isnan().any():
        density: Prior = MixturePrior(latent_dim, components).double()
    else:
        density = ClassMixturePrior(latent_dim, conditions, max(1, components // len(label.classes))).double()
    density.fit_given(training.z, training.condition, seed=seed)
    return density.given(latents.condition).log_prob(latents.z) - latents.log_prior


def _of_layers(vae: VAE, test: Batches, seed: int) -> LayerInformation:
    def rows(batch: Batch) -> Tensor:
        given = () if batch.condition is None else (batch.condition,)
        maps = vae.network.latent_kl(batch.x, keyed_noise(batch.positions, seed), *given)
        return torch.cat([layer.flatten(1) for layer in maps], 1)

    examples, sizes = len(test.store), list(vae.network.latents.sizes)
    layers = torch.split(sum_over_examples(vae, test, rows) / examples, sizes)
    return LayerInformation(
        examples=examples,
        noise_seed=seed,
        mean_kl_nats=float(sum(layer.sum() for layer in layers)),
        kl_per_layer_nats=[float(layer.sum()) for layer in layers],
        latents_per_layer=sizes,
        active_latents_per_layer=[int((layer > ACTIVE_KL_NATS).sum()) for layer in layers],
    )
