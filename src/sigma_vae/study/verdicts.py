"""Verdicts on the paper's claims: each has a rule, laid down here before the numbers are there, and printed beside them."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sigma_vae.study.comparisons import BITS, ELBO, STANDARD, Setting, frechet_columns
from sigma_vae.study.judging import SEEDS, Verdict, above, below, both, lacking, signed
from sigma_vae.study.statistics import bootstrapped

__all__ = ["CLAIMS", "Claim", "diverges"]

OPTIMAL, SHARED, PER_PIXEL = "gaussian/optimal", "gaussian/shared", "gaussian/per-pixel"
CLOSE = {ELBO: 0.05, "frechet": 0.10, "end": 0.01}
"""As shares of what is compared with: as good as the best β; no worse samples; no lower an end."""
COVERAGE = "calibration.density.coverage.90"
MARGINAL_KL = "information.marginal_kl_at_least_nats"
MUTUAL_INFORMATION = "information.mutual_information_at_most_nats"


class Claim(NamedTuple):
    """What is claimed, and the rule that judges it in a setting; the rule's docstring says what counts."""

    name: str
    sentence: str
    judge: Callable[[Setting], Iterator[Verdict]]

    @property
    def rule(self) -> str:
        """What counts."""
        return " ".join((self.judge.__doc__ or "").split())


def _tuned_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal minus the best of 3 or more fixed σ (chosen on validation), in post-hoc ELBO on test, is above −5 % of it."""
    ours, best = setting.first(OPTIMAL), setting.tuned()
    found = setting.difference(ELBO, ours, best, setting.plain)
    if found is None or best is None:
        yield lacking(f"{OPTIMAL} and three fixed σ")
        return
    size = abs(float(setting.values(best, ELBO, setting.plain).mean()))
    finding = f"optimal − {best}: {signed(found, 1, ' nats')} ({_percent(found.mean / size)} of it){_end(setting, best)}"
    if found.low is not None and found.high is not None and found.low <= 0:
        finding += "; it is below the best" if found.high < 0 else "; neither is shown to be above the other"
    yield above(found, -CLOSE[ELBO] * size, finding)


def _end(setting: Setting, arm: str) -> str:
    ends = next(iter(setting.fixed)), next(reversed(setting.fixed))
    return ", which is at the end of the grid: a better one may lie beyond" if arm in ends else ""


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def _tuned_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance with N(0, I) is less than 10 % above that of the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [STANDARD] if STANDARD in setting.priors else [], CLOSE["frechet"])


def _fitted_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance is below that of the best of 3 or more fixed σ (chosen on test), with the same fitted prior."""
    yield from _samples(setting, [prior for prior in setting.priors if prior != STANDARD], 0.0)


def _samples(setting: Setting, priors: list[str], close: float) -> Iterator[Verdict]:
    """Optimal against the best of the grid, for each prior and set of features."""
    judged = False
    for features, metric in frechet_columns(setting.table).items():
        for prior in priors:
            best = setting.lowest(metric, prior)
            found = setting.difference(metric, setting.first(OPTIMAL), best, prior)
            if found is not None:
                judged, size = True, float(setting.values(best, metric, prior).mean())
                how = f"prior {prior}, {features}: optimal − {best}"
                finding = f"{how}: {signed(found, 2)} ({_percent(found.mean / size)} of its {size:.2f})"
                yield below(found, close * size, finding)
    if not judged:
        yield lacking(
            f"Fréchet distances of {OPTIMAL} and of three fixed σ, with {'such a prior' if priors else 'another prior'}"
        )


def _unit_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if one σ (shared where there is such a run, else optimal) minus σ = 1, in post-hoc ELBO on test, is above zero."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield _difference(setting, ELBO, ours, setting.unit, f"{SHARED} or {OPTIMAL}, and σ = 1", " nats")


def _unit_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if one σ (shared where there is such a run, else optimal) has a smaller Fréchet distance with N(0, I) than σ = 1."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield from _worse_samples(setting, setting.unit, ours, f"{SHARED} or {OPTIMAL}, and σ = 1")


def _difference(setting: Setting, metric: str, ours: str | None, theirs: str | None, needs: str, unit: str) -> Verdict:
    """Whether ours is above theirs."""
    found = setting.difference(metric, ours, theirs, setting.plain)
    if found is None:
        return lacking(needs)
    return above(found, 0.0, f"{ours} − {theirs}: {signed(found, 3 if metric == BITS else 1, unit)}")


def _worse_samples(setting: Setting, worse: str | None, better: str | None, needs: str) -> Iterator[Verdict]:
    """Whether samples of the first are farther from the data, in each set of features."""
    columns = frechet_columns(setting.table) if STANDARD in setting.priors else {}
    for features, metric in columns.items():
        found = setting.difference(metric, worse, better, STANDARD)
        if found is not None:
            yield above(found, 0.0, f"{features}: {worse} − {better}: {signed(found, 2)}")
            return
    yield lacking(f"Fréchet distances of {needs}")


def _speed(setting: Setting) -> Iterator[Verdict]:
    """Holds if learned σ takes more steps than optimal to its own validation ELBO of half-way, and optimal ends at most 1 % below it."""
    ours, learned = setting.first(OPTIMAL), [arm for arm, name in setting.arms.items() if name == SHARED]
    if ours is None or not learned:
        yield lacking(f"{OPTIMAL} and {SHARED}")
        return
    for theirs in learned:
        yield _faster(setting, ours, theirs)


def _faster(setting: Setting, ours: str, theirs: str) -> Verdict:
    mine, others = setting.curves(ours), setting.curves(theirs)
    ratios = [ratio for seed in mine if seed in others and (ratio := _ratio(mine[seed], others[seed])) is not None]
    end = setting.difference(ELBO, ours, theirs, setting.plain)
    if not ratios or end is None:
        return lacking(f"four validations or more of {OPTIMAL} and {SHARED}")
    found, size = bootstrapped(ratios), abs(float(setting.values(theirs, ELBO, setting.plain).mean()))
    ends = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    steps = f"{theirs} takes {found.mean:.2f}{ends} times the steps, {found.pairs} seeds"
    ended = above(end, -CLOSE["end"] * size, f"end, {ours} − {theirs}: {signed(end, 1, ' nats')}")
    return both(above(found, 1.0, steps), ended)


def _ratio(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float | None:
    """Steps of theirs over steps of ours, to what theirs has reached half-way; 0 where ours never does, None of too few validations."""
    if len(theirs) < 4:
        return None
    half = [point for point in theirs if point[0] <= theirs[-1][0] / 2] or theirs[:1]
    target = max(elbo for _, elbo in half)
    return _steps_to(theirs, target) / _steps_to(ours, target)


def _steps_to(curve: list[tuple[int, float]], target: float) -> float:
    """Where the curve first has the value, between its points by a straight line; infinite where it never has."""
    before: tuple[int, float] | None = None
    for step, elbo in curve:
        if elbo >= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (target - before[1]) / (elbo - before[1])
        before = step, elbo
    return math.inf


def _pixel_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel minus optimal (shared where there is none), in post-hoc ELBO of densities on test, is above zero."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield _difference(setting, ELBO, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}", " nats")


def _pixel_levels(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal (shared where there is none) minus per-pixel, in post-hoc bits per dimension on test, is above zero."""
    ours = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"levels, {PER_PIXEL}, and {OPTIMAL} or {SHARED}"
    yield _difference(setting, BITS, ours, setting.first(PER_PIXEL), needs, " bits/dim")


def _pixel_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel has a larger Fréchet distance with N(0, I) than optimal (shared where there is none)."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield from _worse_samples(setting, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}")


def _pixel_prior(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel minus optimal (shared where there is none), in the lower bound on the marginal KL, is above zero."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"information of {PER_PIXEL}, and of {OPTIMAL} or {SHARED}"
    yield _difference(setting, MARGINAL_KL, setting.first(PER_PIXEL), theirs, needs, " nats")


def _position(setting: Setting) -> Iterator[Verdict]:
    """Holds if, of the ranges of 4 or more fixed σ, optimal has at most ¼ of marginal KL and a larger share of mutual information."""
    ours = setting.first(OPTIMAL)
    shares = [_share(setting, ours, metric) for metric in (MARGINAL_KL, MUTUAL_INFORMATION)]
    seeds = sorted(set(shares[0]) & set(shares[1]))
    if not seeds:
        yield lacking(f"information of {OPTIMAL} and of four fixed σ")
        return
    kl = bootstrapped([shares[0][seed] for seed in seeds])
    more = bootstrapped([shares[1][seed] - shares[0][seed] for seed in seeds])
    where = setting.values(ours, "sigma_post_hoc_density", setting.plain)
    finding = f"σ = {where.mean():.3g}: " if len(where) else ""
    finding += f"share of the grid's range of marginal KL {signed(kl, 2)}"
    further = f"share of the range of mutual information less that {signed(more, 2)}"
    yield both(below(kl, 0.25, finding), above(more, 0.0, further))


def _share(setting: Setting, ours: str | None, metric: str) -> dict[Any, float]:
    """Where ours is between the least and the most of the fixed σ, for each seed that has four of them or more."""
    import pandas as pd

    grid = pd.DataFrame({arm: setting.values(arm, metric, setting.plain) for arm in setting.fixed}).dropna()
    mine = setting.values(ours, metric, setting.plain)
    if grid.shape[1] < 4:
        return {}
    low, wide = grid.min(axis=1), grid.max(axis=1) - grid.min(axis=1)
    return {seed: float((mine[seed] - low[seed]) / wide[seed]) for seed in grid.index if seed in mine.index and wide[seed] > 0}


def _coverage(setting: Setting) -> Iterator[Verdict]:
    """Holds if the share of values in optimal's 90 % interval is nearer to 90 % than that of a fixed σ (the best on validation, and 1)."""
    ours, judged = setting.first(OPTIMAL), False
    for theirs in dict.fromkeys(arm for arm in (setting.tuned(), setting.unit) if arm is not None):
        mine, other = (setting.values(arm, COVERAGE, setting.plain) for arm in (ours, theirs))
        seeds = [seed for seed in mine.index if seed in other.index]
        if seeds:
            judged = True
            found = bootstrapped([abs(mine[seed] - 0.9) - abs(other[seed] - 0.9) for seed in seeds])
            covers = f"optimal covers {100 * mine.mean():.1f} %, {theirs} {100 * other.mean():.1f} %"
            yield below(found, 0.0, f"{covers}; difference in the errors: {signed(found, 3)}")
    if not judged:
        yield lacking(f"calibration of {OPTIMAL}, and of σ = 1 or three fixed σ")


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


CLAIMS = (
    Claim("1, likelihood", "A calibrated σ is within 5 % of the best tuned β or above it, in likelihood.", _tuned_likelihood),
    Claim("1, samples", "A calibrated σ is within 10 % of the best β or better, in samples from N(0, I).", _tuned_samples),
    Claim("2, likelihood", "One calibrated σ beats unit variance, in likelihood.", _unit_likelihood),
    Claim("2, samples", "One calibrated σ beats unit variance, in samples from N(0, I).", _unit_samples),
    Claim("3, speed", "Solving σ learns faster than learning it, and ends within 1 % of it or above.", _speed),
    Claim("4, likelihood", "A σ for each pixel has the better likelihood.", _pixel_likelihood),
    Claim(
        "4, levels",
        "A σ for each pixel has the better likelihood also of the levels of the data, in bits per dimension.",
        _pixel_levels,
    ),
    Claim("4, samples", "A σ for each pixel has worse samples.", _pixel_samples),
    Claim("4, prior", "A σ for each pixel has codes farther from the prior.", _pixel_prior),
    Claim("5, information", "The calibrated model sits where the marginal KL begins to rise.", _position),
    Claim(
        "9, fitted prior",
        "With a fitted prior, one calibrated run has better samples than the best of the β grid.",
        _fitted_samples,
    ),
    Claim("10, coverage", "A 90 % interval with a calibrated σ covers nearer to 90 % than one with a fixed σ.", _coverage),
    Claim("11, stability", "No run with a calibrated σ diverged.", _stability),
)
"""In the order in which they are reported."""
