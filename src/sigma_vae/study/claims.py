"""Claims and the rules that judge them. Each rule was written before the numbers were known."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sigma_vae.config import RunConfig
from sigma_vae.study.comparisons import (
    ARM,
    BITS,
    ELBO,
    LEARNED,
    MARGINAL_KL,
    OPTIMAL,
    PREDICTIONS,
    STANDARD,
    Ended,
    Setting,
    frechet_columns,
)
from sigma_vae.study.grid import format_place
from sigma_vae.study.statistics import Difference, bootstrapped

__all__ = [
    "BATCH_SIZES",
    "CLAIMS",
    "DISCRETE_CLAIMS",
    "EVERY",
    "FLAT",
    "INFORMATION_CLAIMS",
    "KL_WEIGHTS",
    "OPTIMAL",
    "OTHER_NETWORKS",
    "OTHER_TUNING_CLAIMS",
    "PER_PIXEL",
    "SCALE_CLAIMS",
    "SEEDS",
    "SHARED",
    "TRAINING_CLAIMS",
    "TUNING_CLAIMS",
    "Among",
    "Claim",
    "Verdict",
    "Word",
    "above",
    "batch_arm",
    "below",
    "both",
    "compared",
    "diverges",
    "lacking",
    "percent",
    "signed",
    "weight_arm",
    "within",
    "worse_samples",
]

Word = Literal["holds", "does not", "not shown"]

SEEDS = 3
"""With fewer seeds, nothing is shown."""


class Verdict(NamedTuple):
    """A word, and the numbers behind it."""

    word: Word
    finding: str
    lacks: bool = False
    """Whether the study has not measured what the rule needs."""


def signed(found: Difference, digits: int = 1, unit: str = "") -> str:
    """Format a mean with its interval and number of pairs.

    >>> signed(Difference(-1.0, -2.0, 0.5, 3), 1, " nats")
    '−1.0 [−2.0, +0.5] nats, 3 seeds'
    """
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{ends}{unit}, {found.seeds}".replace("-", "−")


def lacking(what: str) -> Verdict:
    """Return "not shown": the study has not measured what the rule needs."""
    return Verdict("not shown", f"needs {what}", lacks=True)


def above(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is above the bar (holds) or below it (does not).

    >>> above(Difference(2.0, 1.0, 3.0, pairs=3), 0.0, "more").word, above(Difference(2.0, 1.0, 3.0, pairs=2), 0.0, "more").word
    ('holds', 'not shown')
    """
    if found.low is None or found.high is None or found.pairs < SEEDS:
        return Verdict("not shown", f"{finding}; a verdict needs {SEEDS} seeds")
    if found.low > bar:
        return Verdict("holds", finding)
    if found.high < bar:
        return Verdict("does not", finding)
    return Verdict("not shown", f"{finding}; the interval contains the threshold")


def below(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is below the bar."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return above(Difference(-found.mean, low, high, found.pairs), -bar, finding)


def within(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is closer to zero than the bar (holds) or beyond it on one side (does not)."""
    verdict = above(found, -bar, finding)
    return below(found, bar, finding) if verdict.word == "holds" else verdict


def both(first: Verdict, second: Verdict) -> Verdict:
    """Combine two verdicts: holds where both hold, does not where one does not."""
    words: set[Word] = {first.word, second.word}
    word: Word = "does not" if "does not" in words else "not shown" if "not shown" in words else "holds"
    return Verdict(word, f"{first.finding}; {second.finding}")


CALIBRATED = ("gaussian/optimal", "gaussian/shared")


class Among(NamedTuple):
    """A choice of settings, and what a study needs to have some."""

    needs: str
    chosen: Callable[[Sequence[Setting]], Sequence[Setting]]


def weight_arm(kl_weight: float) -> str:
    """Name the arm of a KL weight."""
    return f"KL weight {kl_weight:g}"


def batch_arm(likelihood: str, batch_size: int) -> str:
    """Name the arm of a batch size."""
    return f"{likelihood}, {batch_size}"


def _other_networks(found: Sequence[Setting]) -> Sequence[Setting]:
    return [replace(s, words=", ".join(filter(None, (s.words, s.network)))) for s in found if not s.is_flat]


def _by_weight(found: Sequence[Setting]) -> Sequence[Setting]:
    def same(config: RunConfig) -> Hashable:
        return replace(config, seed=0, training=replace(config.training, kl_weight=1.0))

    return _grouped(found, same, lambda config: weight_arm(config.training.kl_weight))


def _by_batch_size(found: Sequence[Setting]) -> Sequence[Setting]:
    """Group runs that saw equally many images: steps times batch size, or epochs."""

    def same(config: RunConfig) -> Hashable:
        training, model = config.training, replace(config.model, likelihood=CALIBRATED[0])
        if training.max_steps is not None:
            training = replace(training, max_steps=training.max_steps * training.batch_size, epochs=1)
        return replace(config, seed=0, model=model, training=replace(training, batch_size=1, validate_every=None))

    return _grouped(found, same, lambda config: batch_arm(config.model.likelihood, config.training.batch_size))


def _grouped(
    found: Sequence[Setting], same: Callable[[RunConfig], Hashable], arm_of: Callable[[RunConfig], str]
) -> Sequence[Setting]:
    """Group runs with a calibrated σ by what they share, where a group has more than one arm."""
    import pandas as pd

    groups: dict[Hashable, list[Ended]] = {}
    for done in (done for setting in found for arm in setting.arms for done in setting.of(arm)):
        if done.cell.config.model.likelihood in CALIBRATED:
            groups.setdefault(same(done.cell.config), []).append(done)
    together = []
    for group in groups.values():
        ended: dict[str, list[Ended]] = {}
        for done in group:
            ended.setdefault(arm_of(done.cell.config), []).append(done)
        if len(ended) > 1:
            arms = {arm: dones[0].cell.config.model.likelihood for arm, dones in ended.items()}
            by_key = {done.cell.key: arm for arm, dones in ended.items() for done in dones}
            table = pd.concat([setting.table for setting in found])
            table = table[table["key"].isin(list(by_key))]
            table = table.assign(**{ARM: [by_key[key] for key in table["key"]]})
            together.append(Setting(_words(group, list(groups.values())), arms, found[0].priors, ended, table))
    return together


def _words(group: Sequence[Ended], groups: Sequence[Sequence[Ended]]) -> str:
    """The part of the place that this group shares and other groups do not."""
    common = {name: value for name, value in group[0].cell.place.items() if all(d.cell.place[name] == value for d in group)}
    everywhere = [name for name, value in common.items() if all(d.cell.place[name] == value for other in groups for d in other)]
    return format_place({name: value for name, value in common.items() if name not in (*everywhere, "seed")})


EVERY = Among("finished runs", lambda found: found)
FLAT = Among("a network with one layer of latents", lambda found: [setting for setting in found if setting.is_flat])
OTHER_NETWORKS = Among("hierarchical latents, or a model of video", _other_networks)
KL_WEIGHTS = Among("runs with a calibrated σ that differ in their KL weight", _by_weight)
BATCH_SIZES = Among("runs with a calibrated σ that saw equally many images in batches of different sizes", _by_batch_size)


SHARED, PER_PIXEL = "gaussian/shared", "gaussian/per-pixel"


class Claim(NamedTuple):
    """A claim, the runs that it is about, and the rule that judges it in a setting; the rule's docstring is printed."""

    name: str
    sentence: str
    among: Among
    judge: Callable[[Setting], Iterator[Verdict]]

    @property
    def rule(self) -> str:
        """The rule in words."""
        return " ".join((self.judge.__doc__ or "").split())

    def verdicts(self, found: Sequence[Setting]) -> list[tuple[str, Verdict]]:
        """Judge each of a study's settings: its name and the verdict."""
        chosen = self.among.chosen(found)
        there = [(setting.words, verdict) for setting in chosen for verdict in self.judge(setting)]
        return there or [("", lacking(self.among.needs))]


def compared(setting: Setting, metric: str, ours: str | None, theirs: str | None, needs: str, unit: str) -> Verdict:
    """Judge whether ours is above theirs."""
    found = setting.difference(metric, ours, theirs, setting.plain)
    if found is None:
        return lacking(needs)
    return above(found, 0.0, f"{ours} − {theirs}: {signed(found, 3 if metric == BITS else 1, unit)}")


def worse_samples(setting: Setting, worse: str | None, better: str | None, needs: str) -> Iterator[Verdict]:
    """Judge whether the first has worse samples from the training prior, for each set of features."""
    columns = frechet_columns(setting.table) if STANDARD in setting.priors else {}
    differences = {features: setting.difference(metric, worse, better, STANDARD) for features, metric in columns.items()}
    found = {features: difference for features, difference in differences.items() if difference is not None}
    how = f"{LEARNED} prior, " if setting.learns_prior else ""
    for features, difference in found.items():
        yield above(difference, 0.0, f"{how}{features}: {worse} − {better}: {signed(difference, 2)}")
    if not found:
        yield lacking(f"Fréchet distances of {needs}")


def percent(share: float) -> str:
    """Format a share in percent, with its sign.

    >>> percent(-0.05)
    '−5.0 %'
    """
    return f"{100 * share:+.1f} %".replace("-", "−")


CATEGORICAL, BITWISE = "categorical", "bitwise-categorical"
DISCRETE = (CATEGORICAL, BITWISE, "logistic-mixture")
CLOSE_BITS = 0.15
"""Bits per dimension that a model of independent bits may cost."""


def _levels(setting: Setting) -> Iterator[Verdict]:
    """Holds if a Gaussian with one σ (optimal, else shared), refitted to the bins, needs more bits on test than the decoder."""
    gaussian = setting.first(OPTIMAL) or setting.first(SHARED)
    judged = False
    for arm in (arm for arm, name in setting.arms.items() if name.partition(":")[0] in DISCRETE):
        found = setting.difference(BITS, gaussian, arm, setting.plain)
        if found is not None:
            judged = True
            yield above(found, 0.0, f"{gaussian} − {arm}: {signed(found, 3, ' bits/dim')}")
    if not judged:
        yield lacking(f"{OPTIMAL} or {SHARED}, and one of {', '.join(DISCRETE)}")


def _bitwise(setting: Setting) -> Iterator[Verdict]:
    """Holds if bitwise minus categorical, in bits per dimension on test, is below 0.15."""
    found = setting.difference(BITS, setting.first(BITWISE), setting.first(CATEGORICAL), setting.plain)
    if found is None:
        yield lacking(f"{BITWISE} and {CATEGORICAL}")
        return
    yield below(found, CLOSE_BITS, f"{BITWISE} − {CATEGORICAL}: {signed(found, 3, ' bits/dim')}")


def _bitwise_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if bitwise has a smaller Fréchet distance than categorical, with N(0, I) or the prior that the network learned."""
    yield from worse_samples(setting, setting.first(CATEGORICAL), setting.first(BITWISE), f"{BITWISE} and {CATEGORICAL}")


DISCRETE_CLAIMS = (
    Claim("7, levels", "A decoder of discrete levels needs fewer bits than a Gaussian with one calibrated σ.", EVERY, _levels),
    Claim(
        "7, bitwise",
        "The bitwise decoder needs at most 0.15 bits per dimension more than the categorical one.",
        EVERY,
        _bitwise,
    ),
    Claim("7, bitwise samples", "The bitwise decoder has better samples than the categorical one.", EVERY, _bitwise_samples),
)


COVERAGE = "calibration.density.coverage.90"
MUTUAL_INFORMATION = "information.mutual_information_at_most_nats"


def _position(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal is in the lowest quarter of the marginal KL, and higher in mutual information, over 4 or more fixed σ.

    Both positions are shares of the range that the fixed σ span.
    """
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
    finding += f"share of the grid's range: marginal KL {signed(kl, 2)}"
    further = f"mutual information minus marginal KL {signed(more, 2)}"
    yield both(below(kl, 0.25, finding), above(more, 0.0, further))


def _share(setting: Setting, ours: str | None, metric: str) -> dict[Any, float]:
    """Position of ours between the lowest and the highest of the fixed σ, for each seed; empty with fewer than four."""
    import pandas as pd

    known = {arm: values for arm in setting.fixed if len(values := setting.values(arm, metric, setting.plain))}
    mine, grid = setting.values(ours, metric, setting.plain), pd.DataFrame(known).dropna()
    if grid.shape[1] < 4:
        return {}
    low, wide = grid.min(axis=1), grid.max(axis=1) - grid.min(axis=1)
    return {seed: float((mine[seed] - low[seed]) / wide[seed]) for seed in grid.index if seed in mine.index and wide[seed] > 0}


def _coverage(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's 90 % interval covers closer to 90 % than that of a fixed σ (the best on validation, and σ = 1)."""
    ours, judged = setting.first(OPTIMAL), False
    for theirs in dict.fromkeys(arm for arm in (setting.tuned().arm, setting.unit) if arm is not None):
        mine, other = (setting.values(arm, COVERAGE, setting.plain) for arm in (ours, theirs))
        seeds = [seed for seed in mine.index if seed in other.index]
        if seeds:
            judged = True
            found = bootstrapped([100 * (abs(mine[seed] - 0.9) - abs(other[seed] - 0.9)) for seed in seeds])
            covers = f"optimal covers {100 * mine.mean():.2f} %, {theirs} {100 * other.mean():.2f} %"
            yield below(found, 0.0, f"{covers}; difference of the errors: {signed(found, 3, ' percentage points')}")
    if not judged:
        yield lacking(f"calibration of {OPTIMAL}, and of σ = 1 or three fixed σ")


INFORMATION_CLAIMS = (
    Claim("5, information", "The calibrated model is where the marginal KL begins to rise.", EVERY, _position),
    Claim(
        "10, coverage", "A 90 % interval with a calibrated σ covers closer to 90 % than one with a fixed σ.", EVERY, _coverage
    ),
)


PER_IMAGE, OPTIMAL_IMAGE = "gaussian/per-image", "gaussian/optimal-image"
CLOSE, CLOSE_END = 0.05, 0.01
"""Shares of the reference: a loss that counts, and a final ELBO that counts as equal."""
FASTER = 1.05
"""Ratio of steps that counts; smaller ones cannot be seen between the few validations of a run."""


def _speed(setting: Setting) -> Iterator[Verdict]:
    """Holds if learned σ takes over 5 % more steps than optimal to learned σ's half-way ELBO, and optimal ends at most 1 % lower.

    The half-way ELBO is the best validation ELBO in the first half of training. The rule judges the geometric mean of
    the ratios of steps: it holds where the whole interval is above 1.05, and does not where all of it is below. If
    optimal never reaches that ELBO, it counts as reaching it after twice its steps.
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
    ended = above(end, -CLOSE_END * size, f"final ELBO, {ours} − {theirs}: {signed(end, 1, ' nats')}")
    return both(above(found, math.log(FASTER), steps), ended)


def _ratio(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float | None:
    """Steps of theirs over steps of ours to the ELBO that theirs has half-way; None with too few validations."""
    if len(theirs) < 4:
        return None
    half = [point for point in theirs if point[0] <= theirs[-1][0] / 2] or theirs[:1]
    target = max(elbo for _, elbo in half)
    return _steps_to(theirs, target) / _steps_to(ours, target)


def _steps_to(curve: list[tuple[int, float]], target: float) -> float:
    """Step at which the curve first has the value, interpolated linearly; twice the last step where it never has."""
    before: tuple[int, float] | None = None
    for step, elbo in curve:
        if elbo >= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (target - before[1]) / (elbo - before[1])
        before = step, elbo
    return 2.0 * curve[-1][0]


def _pixel_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel has a higher ELBO of densities on test, with refitted σ, than optimal (else shared)."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield compared(setting, ELBO, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}", " nats")


def _pixel_levels(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel needs fewer bits per dimension on test, with refitted σ, than optimal (else shared)."""
    ours = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"levels, {PER_PIXEL}, and {OPTIMAL} or {SHARED}"
    yield compared(setting, BITS, ours, setting.first(PER_PIXEL), needs, " bits/dim")


def _pixel_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel has a larger Fréchet distance than optimal (else shared), with N(0, I) or the learned prior."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    yield from worse_samples(setting, setting.first(PER_PIXEL), theirs, f"{PER_PIXEL}, and {OPTIMAL} or {SHARED}")


def _pixel_prior(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-pixel has a higher lower bound on the marginal KL than optimal (else shared)."""
    theirs = setting.first(OPTIMAL) or setting.first(SHARED)
    needs = f"information of {PER_PIXEL}, and of {OPTIMAL} or {SHARED}"
    yield compared(setting, MARGINAL_KL, setting.first(PER_PIXEL), theirs, needs, " nats")


def _image_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if per-image has a higher ELBO on test, with refitted σ, than shared (else optimal)."""
    theirs = setting.first(SHARED) or setting.first(OPTIMAL)
    yield compared(setting, ELBO, setting.first(PER_IMAGE), theirs, f"{PER_IMAGE}, and {SHARED} or {OPTIMAL}", " nats")


def _image_training(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal-image has an ELBO on test less than 5 % below that of optimal, both with one refitted σ for all images.

    With each image's own σ the number would be no likelihood, and it is not reported.
    """
    found = setting.difference(ELBO, setting.first(OPTIMAL_IMAGE), setting.first(OPTIMAL), setting.plain)
    if found is None:
        yield lacking(f"{OPTIMAL_IMAGE} and {OPTIMAL}")
        return
    size = abs(float(setting.values(setting.first(OPTIMAL), ELBO, setting.plain).mean()))
    finding = f"optimal-image − optimal: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it)"
    yield above(found, -CLOSE * size, finding)


def _image_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal-image has a smaller Fréchet distance than optimal, with N(0, I) or the prior that the network learned."""
    needs = f"{OPTIMAL_IMAGE} and {OPTIMAL}"
    yield from worse_samples(setting, setting.first(OPTIMAL), setting.first(OPTIMAL_IMAGE), needs)


SCALE_CLAIMS = (
    Claim(
        "3, speed",
        "Training with the solved σ is faster than with a learned σ by more than 5 %, and ends at most 1 % lower.",
        EVERY,
        _speed,
    ),
    Claim("4, likelihood", "A σ for each pixel has a better likelihood.", EVERY, _pixel_likelihood),
    Claim(
        "4, levels",
        "A σ for each pixel also has a better likelihood of the data's levels, in bits per dimension.",
        EVERY,
        _pixel_levels,
    ),
    Claim("4, samples", "A σ for each pixel has worse samples.", EVERY, _pixel_samples),
    Claim("4, prior", "A σ for each pixel has latents farther from the prior.", EVERY, _pixel_prior),
    Claim("6, likelihood", "A σ predicted for each image has a better likelihood.", EVERY, _image_likelihood),
    Claim(
        "6, training",
        "Training with the best σ of each image costs at most 5 % of the ELBO with one σ.",
        EVERY,
        _image_training,
    ),
    Claim("6, samples", "Training with the best σ of each image has better samples.", EVERY, _image_samples),
)


if TYPE_CHECKING:
    import pandas as pd


ONE = weight_arm(1.0)


def _stability(setting: Setting) -> Iterator[Verdict]:
    """Holds if 3 or more runs with a shared or optimal σ ended and none failed. Does not if one became non-finite."""
    there = [done for arm, name in setting.arms.items() if name in (OPTIMAL, SHARED) for done in setting.of(arm)]
    failed = [done for done in there if not done.done]
    diverged = [done for done in failed if diverges(done.error or "")]
    if not there:
        yield lacking(f"{OPTIMAL} or {SHARED}")
        return
    finding = f"{len(there)} runs with a calibrated σ, {len(diverged)} became non-finite, {len(failed) - len(diverged)} failed otherwise"
    enough = len(there) >= SEEDS and not failed
    yield Verdict("does not" if diverged else "holds" if enough else "not shown", finding)


def diverges(error: str) -> bool:
    """Whether an error is about numbers that are not finite."""
    return "NonFinite" in error or "not finite" in error or "Out of range float" in error


def _weight_bound(setting: Setting) -> Iterator[Verdict]:
    """Holds if a KL weight of 1 has a higher ELBO, with refitted σ, than the best other weight (chosen on test, in its favour)."""
    yield _best_weight(setting, ELBO, setting.plain, highest=True, how="")


def _weight_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if the best other weight (chosen on test, in its favour) has a larger Fréchet distance than a KL weight of 1.

    Samples are from N(0, I), or from the prior that the network learned.
    """
    yield from _weights_by_samples(setting, [STANDARD] if STANDARD in setting.priors else [])


def _weight_fitted(setting: Setting) -> Iterator[Verdict]:
    """Holds if the best other weight (chosen on test) has a larger Fréchet distance with a fitted prior than a KL weight of 1."""
    yield from _weights_by_samples(setting, [prior for prior in setting.priors if prior != STANDARD])


def _weights_by_samples(setting: Setting, priors: list[str]) -> Iterator[Verdict]:
    """Judge each prior and set of features."""
    columns = [(prior, features, metric) for features, metric in frechet_columns(setting.table).items() for prior in priors]
    for prior, features, metric in columns:
        yield _best_weight(setting, metric, prior, highest=False, how=f"prior {setting.called(prior)}, {features}: ")
    if not columns:
        yield lacking("Fréchet distances of several KL weights with such a prior")


def _best_weight(setting: Setting, metric: str, prior: str, *, highest: bool, how: str) -> Verdict:
    """Judge whether a weight of 1 is better than the best other one."""
    best, left_out = setting.best_of([arm for arm in setting.arms if arm != ONE], ONE, metric, prior, highest=highest)
    better, worse = (ONE, best) if highest else (best, ONE)
    found = setting.difference(metric, better, worse, prior)
    if found is None:
        return lacking("runs with a KL weight of 1 and with another, with the same calibrated σ")
    if highest:
        return above(found, 0.0, f"{how}{ONE} − {best}: {signed(found, 1, ' nats')}{left_out}")
    return above(found, 0.0, f"{how}{best} − {ONE}: {signed(found, 2)}{left_out}")


def _batch_size(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's ELBO on test differs by less than 5 % between the smallest and the largest batch, at equally many images.

    The same difference of shared, where it was run, is subtracted: it is what the batch size does to any training.
    """
    sizes = sorted({done.cell.config.training.batch_size for arms in setting.ended.values() for done in arms})
    means = {size: float(values.mean()) for size in sizes if len(values := _bound(setting, OPTIMAL, size))}
    if len(means) < 2:
        yield lacking(f"{OPTIMAL} with several batch sizes and equally many images")
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
    by_size = ", ".join(f"{batch}: {mean:.1f}" for batch, mean in means.items())
    what = "minus that of shared" if controlled else "without shared to compare with"
    finding = f"ELBO by batch size {by_size}; {small} − {large}, {what}: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it)"
    yield within(found, CLOSE * size, finding)


def _bound(setting: Setting, likelihood: str, batch_size: int) -> "pd.Series[float]":
    return setting.values(batch_arm(likelihood, batch_size), ELBO, setting.plain)


TRAINING_CLAIMS = (
    Claim("11, stability", "No run with a calibrated σ diverged.", EVERY, _stability),
    Claim("12, bound", "With a calibrated σ, a KL weight of 1 has the best ELBO.", KL_WEIGHTS, _weight_bound),
    Claim(
        "12, samples",
        "With a calibrated σ, a KL weight of 1 has the best samples from the prior used in training.",
        KL_WEIGHTS,
        _weight_samples,
    ),
    Claim(
        "12, fitted prior",
        "With a calibrated σ, a KL weight of 1 has the best samples with a fitted prior.",
        KL_WEIGHTS,
        _weight_fitted,
    ),
    Claim("13, batch size", "The batch size does not matter for a σ that is solved for each batch.", BATCH_SIZES, _batch_size),
)


CLOSE_TO_TUNED = {ELBO: 0.05, "frechet": 0.10, "predictions": 0.05}
"""Shares of the best β that still count as equal: in ELBO, in samples, in predictions."""


def _tuned_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's ELBO on test, with refitted σ, is less than 5 % below the best of 3 or more fixed σ (by validation)."""
    ours, (best, left_out) = setting.first(OPTIMAL), setting.tuned()
    found = setting.difference(ELBO, ours, best, setting.plain)
    if found is None or best is None:
        yield lacking(f"{OPTIMAL} and three fixed σ")
        return
    size = abs(float(setting.values(best, ELBO, setting.plain).mean()))
    finding = f"optimal − {best}: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it){_end(setting, best)}"
    if found.low is not None and found.high is not None and found.low <= 0:
        finding += "; it is below the best fixed σ" if found.high < 0 else "; which is higher is not shown"
    yield above(found, -CLOSE_TO_TUNED[ELBO] * size, finding + left_out)


def _end(setting: Setting, arm: str) -> str:
    ends = next(iter(setting.fixed)), next(reversed(setting.fixed))
    return ", at the end of the grid, so a better one may lie beyond" if arm in ends else ""


def _tuned_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance with N(0, I) is less than 10 % above the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [STANDARD] if STANDARD in setting.priors else [], CLOSE_TO_TUNED["frechet"])


def _fitted_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if, with the same fitted prior, optimal's Fréchet distance is below the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [prior for prior in setting.priors if prior != STANDARD], 0.0)


def _samples(setting: Setting, priors: list[str], close: float) -> Iterator[Verdict]:
    """Compare optimal with the best of the grid, for each prior and set of features."""
    judged = False
    for features, metric in frechet_columns(setting.table).items():
        for prior in priors:
            best, left_out = setting.best(metric, prior, highest=False)
            found = setting.difference(metric, setting.first(OPTIMAL), best, prior)
            if found is not None:
                judged, size = True, float(setting.values(best, metric, prior).mean())
                how = f"prior {setting.called(prior)}, {features}: optimal − {best}"
                finding = f"{how}: {signed(found, 2)} ({percent(found.mean / size)} of its {size:.2f})"
                yield below(found, close * size, finding + left_out)
    if not judged:
        yield lacking(
            f"Fréchet distances of {OPTIMAL} and of three fixed σ, with {'such a prior' if priors else 'another prior'}"
        )


def _unit_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if one calibrated σ (shared, else optimal) has a higher ELBO on test, with refitted σ, than σ = 1."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield compared(setting, ELBO, ours, setting.unit, f"{SHARED} or {OPTIMAL}, and σ = 1", " nats")


def _unit_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if one calibrated σ (shared, else optimal) has a smaller Fréchet distance with N(0, I) than σ = 1."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield from worse_samples(setting, setting.unit, ours, f"{SHARED} or {OPTIMAL}, and σ = 1")


def _other_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance is less than 10 % above the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [setting.plain], CLOSE_TO_TUNED["frechet"])


def _predictions(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's best predictions have a PSNR and SSIM less than 5 % below the best of 3 or more fixed σ (on test)."""
    judged = False
    for name, (metric, digits) in PREDICTIONS.items():
        best, left_out = setting.best(metric, setting.plain, highest=True)
        found = setting.difference(metric, setting.first(OPTIMAL), best, setting.plain)
        if found is not None:
            judged, size = True, float(setting.values(best, metric, setting.plain).mean())
            finding = (
                f"{name}: optimal − {best}: {signed(found, digits)} ({percent(found.mean / size)} of its {size:.{digits}f})"
            )
            yield above(found, -CLOSE_TO_TUNED["predictions"] * abs(size), finding + left_out)
    if not judged:
        yield lacking(f"predictions of {OPTIMAL} and of three fixed σ")


TUNING_CLAIMS = (
    Claim("1, likelihood", "A calibrated σ has a likelihood at most 5 % below the best tuned β.", FLAT, _tuned_likelihood),
    Claim("1, samples", "A calibrated σ has samples from N(0, I) at most 10 % worse than the best β.", FLAT, _tuned_samples),
    Claim("2, likelihood", "One calibrated σ has a better likelihood than unit variance.", FLAT, _unit_likelihood),
    Claim("2, samples", "One calibrated σ has better samples from N(0, I) than unit variance.", FLAT, _unit_samples),
    Claim(
        "9, fitted prior",
        "With a fitted prior, one calibrated run has better samples than the best of the β grid.",
        FLAT,
        _fitted_samples,
    ),
)

OTHER_TUNING_CLAIMS = (
    Claim(
        "8, likelihood",
        "With hierarchical latents and on video, a calibrated σ has a likelihood at most 5 % below the best tuned β.",
        OTHER_NETWORKS,
        _tuned_likelihood,
    ),
    Claim(
        "8, unit variance",
        "With hierarchical latents and on video, one calibrated σ has a better likelihood than unit variance.",
        OTHER_NETWORKS,
        _unit_likelihood,
    ),
    Claim(
        "8, samples",
        "With hierarchical latents and on video, a calibrated σ has samples at most 10 % worse than the best β.",
        OTHER_NETWORKS,
        _other_samples,
    ),
    Claim("8, predictions", "On video, predictions are as good as with the best fixed σ.", OTHER_NETWORKS, _predictions),
)


CLAIMS = tuple(
    sorted(
        (*TUNING_CLAIMS, *OTHER_TUNING_CLAIMS, *SCALE_CLAIMS, *DISCRETE_CLAIMS, *INFORMATION_CLAIMS, *TRAINING_CLAIMS),
        key=lambda claim: int(claim.name.partition(",")[0]),
    )
)
"""All claims, in the order of the reports."""
