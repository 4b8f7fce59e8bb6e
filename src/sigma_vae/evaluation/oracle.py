"""The gain from solving σ on the scored data: no bound, but the most that a choice of σ could give."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import Estimate, EvaluationData, Metric, Record, Row, number_rows
from sigma_vae.evaluation.elbo import score
from sigma_vae.registry import register
from sigma_vae.types import Likelihood
from sigma_vae.vae import VAE, Scores

__all__ = ["Oracle", "OracleMetric", "oracle"]


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
