"""Which σ: solved or learned, of a pixel, of an image. Claims 3, 4 and 6."""

import math
from collections.abc import Iterator

from sigma_vae.study.claims.claim import OPTIMAL, PER_PIXEL, SHARED, Claim, compared, percent, worse_samples
from sigma_vae.study.comparisons import BITS, ELBO, MARGINAL_KL, Setting
from sigma_vae.study.groupings import EVERY
from sigma_vae.study.judging import Verdict, above, both, lacking, signed
from sigma_vae.study.statistics import bootstrapped

__all__ = ["CLAIMS"]

PER_IMAGE, OPTIMAL_IMAGE = "gaussian/per-image", "gaussian/optimal-image"
CLOSE, CLOSE_END = 0.05, 0.01
"""As shares of what is compared with: a price worth naming; no lower an end."""
FASTER = 1.05
"""Times the steps: less is not worth naming, and between the few validations of a run not known."""


def _speed(setting: Setting) -> Iterator[Verdict]:
    """Holds if learned σ takes over 5 % more steps than optimal to its own validation ELBO of half-way, and optimal ends at most 1 % below.

    What is judged is the geometric mean of the ratios of steps: it holds where its whole interval is above 1.05, and does not where all of
    it is below 1.05. Where optimal never has that ELBO, it counts as having it after twice its steps.
    """
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
    found, size = bootstrapped([*map(math.log, ratios)]), abs(float(setting.values(theirs, ELBO, setting.plain).mean()))
    ends = "" if found.low is None or found.high is None else f" [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]"
    steps = f"{theirs} takes {math.exp(found.mean):.3f}{ends} times the steps, {found.seeds}"
    ended = above(end, -CLOSE_END * size, f"end, {ours} − {theirs}: {signed(end, 1, ' nats')}")
    return both(above(found, math.log(FASTER), steps), ended)


def _ratio(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float | None:
    """Steps of theirs over steps of ours, to what theirs has reached half-way; None of too few validations."""
    if len(theirs) < 4:
        return None
    half = [point for point in theirs if point[0] <= theirs[-1][0] / 2] or theirs[:1]
    target = max(elbo for _, elbo in half)
    return _steps_to(theirs, target) / _steps_to(ours, target)


def _steps_to(curve: list[tuple[int, float]], target: float) -> float:
    """Where the curve first has the value, between its points by a straight line; twice its end where it never has."""
    before: tuple[int, float] | None = None
    for step, elbo in curve:
        if elbo >= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (target - before[1]) / (elbo - before[1])
        before = step, elbo
    return 2.0 * curve[-1][0]


def _pixel_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel minus optimal (shared where there is none), in post-hoc ELBO of densities on test, is above zero."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield compared(setting, ELBO, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}", " nats")


def _pixel_levels(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal (shared where there is none) minus per-pixel, in post-hoc bits per dimension on test, is above zero."""
    ours = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"levels, {PER_PIXEL}, and {OPTIMAL} or {SHARED}"
    yield compared(setting, BITS, ours, setting.first(PER_PIXEL), needs, " bits/dim")


def _pixel_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel has a larger Fréchet distance than optimal (shared where there is none), with N(0, I) or the learned prior."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield from worse_samples(setting, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}")


def _pixel_prior(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel minus optimal (shared where there is none), in the lower bound on the marginal KL, is above zero."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"information of {PER_PIXEL}, and of {OPTIMAL} or {SHARED}"
    yield compared(setting, MARGINAL_KL, setting.first(PER_PIXEL), theirs, needs, " nats")


def _image_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-image minus shared (optimal where there is none), in post-hoc ELBO on test, is above zero."""
    theirs = setting.first(SHARED) or setting.first(OPTIMAL)
    yield compared(setting, ELBO, setting.first(PER_IMAGE), theirs, f"{PER_IMAGE}, and {SHARED} or {OPTIMAL}", " nats")


def _image_training(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal-image minus optimal, both with one σ for all images refitted on training data, in ELBO on test, is above −5 %.

    With the σ of each image itself the number is no likelihood, and is not reported.
    """
    found = setting.difference(ELBO, setting.first(OPTIMAL_IMAGE), setting.first(OPTIMAL), setting.plain)
    if found is None:
        yield lacking(f"{OPTIMAL_IMAGE} and {OPTIMAL}")
        return
    size = abs(float(setting.values(setting.first(OPTIMAL), ELBO, setting.plain).mean()))
    finding = f"optimal-image − optimal: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it)"
    yield above(found, -CLOSE * size, finding)


def _image_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal-image has a smaller Fréchet distance with N(0, I), or the prior that the network learned, than optimal."""
    needs = f"{OPTIMAL_IMAGE} and {OPTIMAL}"
    yield from worse_samples(setting, setting.first(OPTIMAL), setting.first(OPTIMAL_IMAGE), needs)


CLAIMS = (
    Claim(
        "3, speed",
        "Solving σ learns faster than learning it, by more than 5 %, and ends within 1 % of it or above.",
        EVERY,
        _speed,
    ),
    Claim("4, likelihood", "A σ for each pixel has the better likelihood.", EVERY, _pixel_likelihood),
    Claim(
        "4, levels",
        "A σ for each pixel has the better likelihood also of the levels of the data, in bits per dimension.",
        EVERY,
        _pixel_levels,
    ),
    Claim("4, samples", "A σ for each pixel has worse samples.", EVERY, _pixel_samples),
    Claim("4, prior", "A σ for each pixel has codes farther from the prior.", EVERY, _pixel_prior),
    Claim("6, likelihood", "A σ predicted for each image has the better likelihood.", EVERY, _image_likelihood),
    Claim(
        "6, training",
        "Training with the best σ of each image costs at most 5 % of the ELBO with one σ.",
        EVERY,
        _image_training,
    ),
    Claim("6, samples", "Training with the best σ of each image has the better samples.", EVERY, _image_samples),
)
