"""What the training does to a calibrated σ: claims 11, 12 and 13."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sigma_vae.study.claims.claim import OPTIMAL, SHARED, Claim, percent
from sigma_vae.study.comparisons import ELBO, STANDARD, Setting, frechet_columns
from sigma_vae.study.groupings import BATCH_SIZES, EVERY, KL_WEIGHTS, batch_arm, weight_arm
from sigma_vae.study.judging import SEEDS, Verdict, above, lacking, signed, within
from sigma_vae.study.statistics import bootstrapped

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CLAIMS", "diverges"]

CLOSE = 0.05
"""As a share of the ELBO."""
ONE = weight_arm(1.0)


def _stability(setting: Setting) -> Iterator[Verdict]:
    """Holds if 3 or more runs with a shared or optimal σ ended and none failed; does not if one became non-finite."""
    there = [done for arm, name in setting.arms.items() if name in (OPTIMAL, SHARED) for done in setting.of(arm)]
    failed = [done for done in there if not done.finished]
    diverged = [done for done in failed if diverges(done.record["error"])]
    if not there:
        yield lacking(f"{OPTIMAL} or {SHARED}")
        return
    finding = f"{len(there)} runs with a calibrated σ, {len(diverged)} became non-finite, {len(failed) - len(diverged)} failed otherwise"
    enough = len(there) >= SEEDS and not failed
    yield Verdict("does not" if diverged else "holds" if enough else "not shown", finding)


def diverges(error: str) -> bool:
    """Whether an error says that numbers were not finite."""
    return "NonFinite" in error or "not finite" in error or "Out of range float" in error


def _weight_bound(setting: Setting) -> Iterator[Verdict]:
    """Holds if a KL weight of 1 minus the best other weight (chosen on test, in its favour), in post-hoc ELBO, is above zero."""
    yield _best_weight(setting, ELBO, setting.plain, highest=True, how="")


def _weight_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if the best other weight (chosen on test, in its favour) has a larger Fréchet distance than a KL weight of 1.

    Samples are from N(0, I), or from the prior that the network learned.
    """
    yield from _weights_by_samples(setting, [STANDARD] if STANDARD in setting.priors else [])


def _weight_fitted(setting: Setting) -> Iterator[Verdict]:
    """Holds if the best other weight (on test, in its favour) has a larger Fréchet distance with a fitted prior than a KL weight of 1."""
    yield from _weights_by_samples(setting, [prior for prior in setting.priors if prior != STANDARD])


def _weights_by_samples(setting: Setting, priors: list[str]) -> Iterator[Verdict]:
    """For each prior and set of features."""
    columns = [(prior, features, metric) for features, metric in frechet_columns(setting.table).items() for prior in priors]
    for prior, features, metric in columns:
        yield _best_weight(setting, metric, prior, highest=False, how=f"prior {setting.called(prior)}, {features}: ")
    if not columns:
        yield lacking("Fréchet distances with such a prior, of several KL weights")


def _best_weight(setting: Setting, metric: str, prior: str, *, highest: bool, how: str) -> Verdict:
    """Whether 1 is better than the best other."""
    best, left_out = setting.best_of([arm for arm in setting.arms if arm != ONE], ONE, metric, prior, highest=highest)
    better, worse = (ONE, best) if highest else (best, ONE)
    found = setting.difference(metric, better, worse, prior)
    if found is None:
        return lacking("runs with a KL weight of 1 and with another, with the same calibrated σ")
    if highest:
        return above(found, 0.0, f"{how}{ONE} − {best}: {signed(found, 1, ' nats')}{left_out}")
    return above(found, 0.0, f"{how}{best} − {ONE}: {signed(found, 2)}{left_out}")


def _batch_size(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal with the smallest batch minus with the largest, at as many images, in post-hoc ELBO on test, is within ±5 % of it.

    From it the same difference of shared is taken, where there is one: what the batch size does to any training.
    """
    sizes = sorted({done.cell.config.training.batch_size for arms in setting.ended.values() for done in arms})
    means = {size: float(values.mean()) for size in sizes if len(values := _bound(setting, OPTIMAL, size))}
    if len(means) < 2:
        yield lacking(f"{OPTIMAL} with several batch sizes and as many images each")
        return
    small, large = min(means), max(means)
    change = _bound(setting, OPTIMAL, small) - _bound(setting, OPTIMAL, large)
    control = _bound(setting, SHARED, small) - _bound(setting, SHARED, large)
    controlled = len(control.dropna()) > 0
    differences = (change - control if controlled else change).dropna().tolist()
    if not differences:
        yield lacking("seeds that the smallest and the largest batch share")
        return
    found, size = bootstrapped(differences), max(map(abs, means.values()))
    told = ", ".join(f"{batch}: {mean:.1f}" for batch, mean in means.items())
    what = "less that of shared" if controlled else "with no control by shared"
    finding = f"ELBO by batch size {told}; {small} − {large}, {what}: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it)"
    yield within(found, CLOSE * size, finding)


def _bound(setting: Setting, likelihood: str, batch_size: int) -> "pd.Series[float]":
    return setting.values(batch_arm(likelihood, batch_size), ELBO, setting.plain)


CLAIMS = (
    Claim("11, stability", "No run with a calibrated σ diverged.", EVERY, _stability),
    Claim("12, bound", "On a calibrated σ a KL weight of 1 has the best bound.", KL_WEIGHTS, _weight_bound),
    Claim(
        "12, samples",
        "On a calibrated σ a KL weight of 1 has the best samples from the prior that it was trained with.",
        KL_WEIGHTS,
        _weight_samples,
    ),
    Claim(
        "12, fitted prior",
        "On a calibrated σ a KL weight of 1 has the best samples with a fitted prior.",
        KL_WEIGHTS,
        _weight_fitted,
    ),
    Claim("13, batch size", "The batch size does not matter to a batch-optimal σ.", BATCH_SIZES, _batch_size),
)
