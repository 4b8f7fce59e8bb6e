"""Four numbers to set beside the ELBO. Each is a metric, with a result, a class and a function.

They are the importance-weighted bound, which rises from the ELBO to log p(x) with the number of draws; the values with
σ solved on the scored data; the sum of three entropies; the likelihood under probabilistic PCA.
"""

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import (
    Column,
    Estimate,
    EvaluationData,
    Metric,
    Record,
    Row,
    each_example,
    estimate_rows,
    number_rows,
    part,
)
from sigma_vae.evaluation.elbo import score
from sigma_vae.networks.principal import principal, sample_of
from sigma_vae.registry import register
from sigma_vae.types import Batch, DataDistribution, Inference, Likelihood, as_argument
from sigma_vae.vae import VAE, Scores, keyed_noise

Measure = Literal["iwae_nats", "iwae_post_hoc_nats", "iwae_bits_per_dim", "iwae_bits_per_dim_post_hoc"]
"""The observed quantity in nats, or the bins of the levels in bits; with the model's own σ, or the refitted one."""

FEATURES = 2**18
"""Features decoded together on a CPU, where one draw of the batch has fewer: temporaries should stay in the caches."""
GPU_FEATURES = 2**24
"""The same on a GPU, which needs larger pieces to be busy."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Iwae(Record):
    r"""Importance-weighted bounds of ``draws`` draws, densities in the data's own units.

    ``by_draws`` has the means after ``draws`` 1, 2, 4, ... k, which show whether a bound still rises.
    ``effective_sample_size`` is :math:`(\sum w)^2 / \sum w^2`, between 1 and k, as a mean over examples; near 1, one
    draw has almost all the weight, and more draws would raise the bound.
    """

    examples: int
    draws: int
    noise_seed: int
    iwae_nats: Estimate | None = None
    iwae_post_hoc_nats: Estimate | None = None
    iwae_bits_per_dim: Estimate | None = None
    iwae_bits_per_dim_post_hoc: Estimate | None = None
    effective_sample_size: dict[str, Estimate]
    by_draws: dict[str, list[int] | list[float]]


@register.metric("iwae")
@final
class IwaeMetric(Metric):
    """The importance-weighted bound of many draws per example."""

    result = Iwae

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """Importance weights need p(x|z)."""
        return (
            None if vae.likelihood.normalised else f"{vae.likelihood} is an objective of these data, and gives no probabilities"
        )

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Iwae:
        """With as many draws as the settings say."""
        return iwae(vae, data.held_out, settings.draws, settings.seed)

    def rows(self, result: Iwae) -> Iterator[Row]:
        """The bounds, each with its number of draws."""
        for row in number_rows(result):
            yield row._replace(name=f"{row.name}, {result.draws} draws")


class _Term(NamedTuple):
    """A log p(x|z): of the observed quantity or of the levels' bins; with the own σ or with the refitted one."""

    level: bool
    refitted: bool

    def __call__(self, likelihood: Likelihood, h: Tensor, target: Tensor) -> Tensor:
        if self.level:
            return likelihood.log_mass(h, target, refitted=self.refitted)
        return likelihood.distribution(h, refitted=self.refitted).log_prob(target)


@torch.no_grad()
def iwae(vae: VAE, batches: Batches, draws: int = 64, seed: int = 0, measures: Collection[Measure] | None = None) -> Iwae:
    r"""Compute the importance-weighted bound of k draws (Burda et al. 2016), which rises with k to log p(x).

    .. math::
        \log p(x) \ge E \log \tfrac1k \sum_{i=1}^k w_i, \qquad w_i = \frac{p(x|z_i)\, p(z_i)}{q(z_i|x)}, \quad
        z_i \sim q(z|x), \quad k = \text{draws}

    The first draw of each example is the one from which :func:`~sigma_vae.evaluation.elbo.elbo` computes the ELBO with
    this seed. The weights are summed in float64.

    By default all ``measures`` that the model has are computed; the bins of levels cost several times as much as
    densities. The other arguments are those of :func:`~sigma_vae.evaluation.elbo.elbo`.

    Raises:
        ValueError: the likelihood is an objective, draws is below 1, or the model does not have a measure.

    >>> from sigma_vae import VAE, Fixed, Gaussian, mlp
    >>> from sigma_vae.data import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Gaussian(1, Fixed(0.5), levels=None))
    >>> report = iwae(vae, Batches(InMemory(torch.rand(8, 1, 4, 4)), Scaling(), batch_size=4), draws=5, measures=["iwae_nats"])
    >>> report.by_draws["draws"], 1 <= report.effective_sample_size["iwae_nats"].mean <= 5
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
    last: dict[str, Estimate] = {}
    sizes: dict[str, Estimate] = {}
    by_draws: dict[str, list[int] | list[float]] = {"draws": at}
    for measure, term in terms.items():
        values = found[:, distinct.index(term)]
        bounds = values[:, :-2] - batches.log_volume_nats
        if "bits" in measure:
            bounds = -bounds / (values[:, -1:] * math.log(2))
        last[measure] = Estimate.of(bounds[:, -1])
        by_draws[measure] = bounds.mean(0).tolist()
        sizes[measure] = Estimate.of(values[:, -2])
    return Iwae(examples=len(found), draws=draws, noise_seed=seed, **last, effective_sample_size=sizes, by_draws=by_draws)


def _terms(likelihood: Likelihood, measures: Collection[Measure] | None) -> dict[Measure, _Term]:
    """The term of each measure; two measures have one term where the own σ is the refitted one."""
    if not likelihood.normalised:
        raise ValueError(
            f"{likelihood} is an objective, not a likelihood, of these data: importance weights need p(x|z), and without it they"
            " bound nothing; evaluate reports its objective_nats"
        )
    refitted, level = likelihood.has_post_hoc, likelihood.observes == "level"
    known: dict[Measure, _Term] = {"iwae_nats": _Term(level, False), "iwae_post_hoc_nats": _Term(level, refitted)}
    if likelihood.has_mass:
        known |= {"iwae_bits_per_dim": _Term(True, False), "iwae_bits_per_dim_post_hoc": _Term(True, refitted)}
    if measures is None:
        return known
    if not measures or not set(measures) <= set(known):
        why = "" if likelihood.has_mass else " (there are bits only of data with levels)"
        raise ValueError(f"measures of this model are one or more of {', '.join(known)}{why}; got {list(measures)}")
    return {measure: term for measure, term in known.items() if measure in measures}


def _summed_weights(
    vae: VAE, batch: Batch, terms: list[_Term], draws: int, seed: int, at: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds ``(terms, batch, at)``, effective sample sizes ``(terms, batch)``, numbers of values ``(batch,)``."""
    total = squares = torch.full((len(terms), len(batch.x)), -math.inf, dtype=torch.float64)
    bounds, done, dims = [], 0, torch.empty(0)
    for inference in inferences(vae, batch, draws, seed):
        h, target = inference.scored()
        log_weights = [inference.per_example(term(vae.likelihood, h, target)) + inference.log_ratio for term in terms]
        dims = inference.dims().reshape(-1, len(batch.x))[0].cpu().double()
        for each in torch.stack(log_weights).cpu().double().reshape(len(terms), -1, len(batch.x)).unbind(1):
            total, squares, done = torch.logaddexp(total, each), torch.logaddexp(squares, 2 * each), done + 1
            if done in at:
                bounds.append(total - math.log(done))
    return torch.stack(bounds, -1), torch.exp(2 * total - squares), dims


def inferences(vae: VAE, batch: Batch, draws: int, seed: int) -> Iterator[Inference]:
    """Posterior draws of a batch, one after the other; where the network can, many together, encoded once."""
    noise, given = keyed_noise(batch.positions, seed), as_argument(batch.condition)
    if not vae.network.has_draw:
        for _ in range(draws):
            yield vae.network.infer(batch.x, None, batch.mask, noise, *given)
        return
    posterior = vae.network.posterior(batch.x, *given)
    most, together = FEATURES if batch.x.device.type == "cpu" else GPU_FEATURES, 1
    while draws:
        unit = torch.stack([noise(posterior.loc.shape) for _ in range(min(together, draws))]).to(posterior.loc)
        inference = vae.network.draw(batch.x, posterior, unit, *given)
        yield inference
        draws -= len(unit)
        together = max(1, most * len(unit) // inference.h.numel())


# -- the gain from solving σ on the scored data: no bound, but the most that a choice of σ could give ------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Oracle(Record):
    """Values with σ solved on the scored examples.

    ``oracle_nats`` uses the σ that is best for the observed quantity, and ``leak_nats`` is its gain over the post-hoc
    value. Data with levels have ``oracle_level_nats`` and ``leak_level_nats``, of the log-probability of the levels'
    bins. ``leak_formula_nats`` and ``mse_over_variance``, r, are None where the formula does not apply to the
    likelihood, or where the solved σ lies at its floor.
    """

    examples: int
    noise_seed: int
    oracle_nats: Estimate
    leak_nats: Estimate
    oracle_level_nats: Estimate | None = None
    leak_level_nats: Estimate | None = None
    leak_formula_nats: float | None
    mse_over_variance: float | None


@register.metric("oracle")
@final
class OracleMetric(Metric):
    """Values with σ taken from the examples that are scored: no likelihood."""

    result = Oracle

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It solves σ."""
        return None if vae.likelihood.has_scale else f"{vae.likelihood} has no σ"

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Oracle:
        """On the held-out examples."""
        return oracle(vae, data.held_out, settings.seed)

    def rows(self, result: Oracle) -> Iterator[Row]:
        """All numbers, with a reminder."""
        for row in number_rows(result):
            yield row._replace(name=f"{row.name} (no likelihood)")


@torch.no_grad()
def oracle(vae: VAE, batches: Batches, seed: int = 0) -> Oracle:
    r"""Report what σ solved on the very examples that are scored would give.

    Evaluations print such values when they take σ from the batch at hand; here it is solved for all examples together.
    Where the refit is one σ of a Gaussian, the difference to the post-hoc value, the leak, is

    .. math:: \tfrac D2 (r - 1 - \ln r), \qquad r = \text{MSE}_\text{eval} / \sigma^2_\text{train}.

    The model is put into eval mode, and left with the σ that it has; the arguments are those of
    :func:`~sigma_vae.evaluation.elbo.elbo`.

    Raises:
        ValueError: the likelihood has no scale, or none is stored yet.
    """
    if not vae.likelihood.has_scale:
        raise ValueError(f"{vae.likelihood} has no σ to solve on the scored data; use a family with a scale, such as gaussian")
    vae.eval()
    solved = VAE(vae.network, copy.deepcopy(vae.likelihood))
    solved.calibrate(batches, seed)
    known, best = score(vae, batches, seed), score(solved.eval(), batches, seed)
    levels: dict[str, Any] = {}
    if known.log_mass_post_hoc is not None and best.log_mass_post_hoc is not None:
        levels = {
            "oracle_level_nats": Estimate.of(best.log_mass_post_hoc - known.rate),
            "leak_level_nats": Estimate.of(best.log_mass_post_hoc - known.log_mass_post_hoc),
        }
    formula, ratio = _leak_formula(vae.likelihood, solved.likelihood, known)
    return Oracle(
        examples=len(known.rate),
        noise_seed=seed,
        oracle_nats=Estimate.of(best.log_likelihood_post_hoc - known.rate),
        leak_nats=Estimate.of(best.log_likelihood_post_hoc - known.log_likelihood_post_hoc),
        **levels,
        leak_formula_nats=formula,
        mse_over_variance=ratio,
    )


def _leak_formula(likelihood: Likelihood, solved: Likelihood, scores: Scores) -> tuple[float | None, float | None]:
    """Leak by the formula, and r."""
    if not likelihood.sigma_is_rmse:
        return None, None
    best, fitted = (float(each.refitted_log_scales()["density"]) for each in (solved, likelihood))
    if best <= likelihood.log_floor + 1e-6:  # in float32; its square is not the mean squared error then
        return None, None
    log_ratio = 2 * (best - fitted)
    dims = float(scores.dims.mean())
    return 0.5 * dims * (math.expm1(log_ratio) - log_ratio), math.exp(log_ratio)


# -- ELBO against the sum of three entropies: has training converged? --------------------------------------------------

MOST_EXAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class EntropyIdentity(Record):
    """ELBO, sum of the entropies, and their difference per dimension of the data."""

    elbo_nats: float
    entropies_nats: float
    gap_nats_per_dim: float


@register.metric("entropy_identity")
@final
class EntropyIdentityMetric(Metric):
    """ELBO against the sum of three entropies on training data: a gap means that training has not converged."""

    result = EntropyIdentity
    measured = "always"

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It is about training data."""
        return "it is about training data, and none are given" if data.training is None else None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> EntropyIdentity | None:
        """Over the first 10 000 training examples."""
        assert data.training is not None
        few = len(data.training.store) <= MOST_EXAMPLES
        training = data.training if few else part(data.training, torch.arange(MOST_EXAMPLES))
        return entropy_identity(vae, training, settings.seed)

    def rows(self, result: EntropyIdentity) -> Iterator[Row]:
        """The gap."""
        yield Row("entropy gap, nats/dim", f"{result.gap_nats_per_dim:.4f}")


@torch.no_grad()
def entropy_identity(vae: VAE, batches: Batches, seed: int = 0) -> EntropyIdentity | None:
    r"""Compare the ELBO with the sum of three entropies, on *training* data.

    Damm et al. 2023, arXiv 2010.14860, theorem 2:

    .. math:: \text{ELBO} = \tfrac1N \sum_n H[q(z|x_n)] - H[p(z)] - \tfrac1N \sum_n H[p(x|z_n)]

    The identity holds at every stationary point of the objective, without weight decay, on the data that the model was
    trained on. A gap far from 0 means that training has not converged (or that σ does not fit these data).

    Returns:
        None where the identity does not apply: several layers of latents, a prior other than N(0, I), or a likelihood
        whose density is no exponential family (Student's t) or that has none.
    """
    vae.eval()
    network = vae.network
    if not (network.has_posterior and network.has_prior and network.prior.is_standard):
        return None
    x, _, _, condition = next(iter(batches)).to(vae.device)
    density = vae.likelihood.distribution(network.infer(x, None, None, torch.zeros, *as_argument(condition)).h, refitted=True)
    assert isinstance(density, DataDistribution)
    if not density.exponential_family:
        return None

    def rows(batch: Batch) -> Tensor:
        inference = vae.network.infer(batch.x, None, None, keyed_noise(batch.positions, seed), *as_argument(batch.condition))
        distribution = vae.likelihood.distribution(inference.h, refitted=True)
        elbo = distribution.log_prob(batch.x).cpu().double() - inference.kl.sum(-1).cpu().double()
        posterior: Tensor = vae.encode(batch.x, batch.condition).entropy().flatten(1).sum(-1)  # type: ignore[no-untyped-call]
        return torch.stack([elbo, (posterior - distribution.entropy()).cpu().double()], 1)

    elbo, entropies = each_example(vae, batches, rows).mean(0).tolist()
    elbo -= batches.log_volume_nats
    prior = 0.5 * sum(vae.network.latents.sizes) * math.log(2 * math.pi * math.e)
    entropies -= prior + batches.log_volume_nats
    return EntropyIdentity(elbo, entropies, gap_nats_per_dim=(elbo - entropies) / math.prod(batches.store.shape))


# -- likelihood under the best linear model, probabilistic PCA: a bound that every VAE should exceed -------------------

MOST_COMPONENTS = 256
QUICK_EXAMPLES = 2_000
"""Training examples for probabilistic PCA where few examples are evaluated, as after a short training."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearBound(Record):
    """Log-likelihood of held-out data under probabilistic PCA, which was fitted to training data.

    ``log_likelihood_nats`` is of the values, in the data's own units: it stands beside an ELBO of densities.
    ``bits_per_dim`` is of levels: it stands beside a VAE's bits per dimension. ``components`` counts the linear latents.
    """

    log_likelihood_nats: Estimate
    bits_per_dim: Estimate | None = None
    components: int
    training_examples: int


@register.metric("ppca")
@final
class PpcaMetric(Metric):
    """Likelihood under probabilistic PCA, the best linear VAE: a network that stays below it is under-trained."""

    result = LinearBound
    measured = "always"
    on_one_process = True
    columns = (
        Column("ppca.bits_per_dim", "bits/dim of probabilistic PCA", 4),
        Column("ppca.log_likelihood_nats", "log-likelihood of probabilistic PCA, nats", 1),
    )

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs whole training examples of one shape."""
        if data.training is None:
            return "it is fitted to training data, and none are given"
        if vae.network.reads_clips:
            return "it models examples of one shape, and these are clips"
        if data.training.scaling.counts:
            return "it models real values, and these are counts"
        if data.held_out.scaling.schema is not None:
            return "it models real values, and these rows have columns of all types"
        return "it is fitted to several training examples, and there is one" if len(data.training.store) < 2 else None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> LinearBound | None:
        """With as many components as the model has latents, at most 256."""
        assert data.training is not None
        components = min(sum(vae.network.latents.sizes), MOST_COMPONENTS)
        most = None if settings.examples is None else max(settings.examples, QUICK_EXAMPLES)
        return ppca(vae, data.training, data.held_out, components, most)

    def rows(self, result: LinearBound) -> Iterator[Row]:
        """The likelihood, in nats and in bits."""
        yield from estimate_rows(result, f" (pPCA, {result.components} latents)")

    def notes(self, result: LinearBound, report: Mapping[str, Any]) -> Iterator[str]:
        """Say so where the model is behind."""
        elbo, bits = report.get("elbo_post_hoc_nats"), report.get("bits_per_dim_post_hoc")
        if report["observes"] == "density" and elbo is not None:
            behind = result.log_likelihood_nats.mean - elbo.mean
        elif result.bits_per_dim is not None and bits is not None:
            behind = (bits.mean - result.bits_per_dim.mean) * report["dims"] * math.log(2)
        else:
            return
        if behind > 0:
            yield (
                f"The model is {behind:.1f} nats per example behind a linear one (probabilistic PCA with {result.components} latents):"
                " it is under-trained. Train it for longer: more --epochs."
            )


def ppca(vae: VAE, training: Batches, held_out: Batches, components: int, most: int | None = None) -> LinearBound | None:
    r"""Fit probabilistic PCA to training data, and compute the likelihood of held-out data.

    Of levels at a distance Δ, the bound is that of uniform dequantisation (Theis et al. 2016, arXiv 1511.01844),
    :math:`\log P(x) \ge \mathbb{E}_u \log p(x + u) + D \log Δ` with u uniform in ±Δ/2: for a Gaussian, its expectation
    is :math:`\log p(x) - \tfrac12 \operatorname{tr}(C^{-1}) Δ^2/12`.

    Args:
        vae: names the device, and the levels.
        training: at most 12 000 of its examples are used, and at most half a billion of its values.
        held_out: examples to score.
        components: number of linear latents; fewer where the data have fewer dimensions or examples.
        most: training examples to use, if fewer.

    Returns:
        None where the training data have no variance.
    """
    few = part(training, sample_of(len(training.store), training.store.shape)[:most].sort().values)
    fitted = principal(lambda: (batch.x.cpu() for batch in few), components)
    if fitted is None:
        return None
    dims, levels = len(fitted.mean), vae.likelihood.levels
    values = each_example(vae, held_out, lambda batch: fitted.log_prob(batch.x.cpu())) - held_out.log_volume_nats
    bits = None
    if levels is not None:
        distance = 1 / (levels - 1)
        noise = distance**2 / 12
        wide = fitted.widened(noise)
        masses = each_example(vae, held_out, lambda batch: wide.log_prob(batch.x.cpu()))
        masses = masses - 0.5 * noise * wide.trace_of_precision + dims * math.log(distance)
        bits = Estimate.of(-masses / (dims * math.log(2)))
    return LinearBound(
        log_likelihood_nats=Estimate.of(values),
        bits_per_dim=bits,
        components=len(fitted.variances),
        training_examples=len(few.store),
    )
