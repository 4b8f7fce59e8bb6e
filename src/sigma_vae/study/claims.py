"""Claims and the rules that judge them.

Each rule was written before the numbers were known, but for the bars in nats per dimension, in dB and in SSIM: they took
the place of shares of an ELBO or a PSNR, which change with the units and vanish at zero.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

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
    Difference,
    Ended,
    Setting,
    frechet_columns,
    mean_difference,
)
from sigma_vae.study.grid import format_place

Word = Literal["holds", "does not", "indicated", "indicated against", "not shown"]

SEEDS = 5
"""With fewer seeds, something is at most indicated."""


class Verdict(NamedTuple):
    """A word, and the numbers behind it."""

    word: Word
    finding: str
    lacks: bool = False
    """Whether the study has not measured what the rule needs."""


class Among(NamedTuple):
    """A choice of settings, and what a study needs to have some."""

    needs: str
    chosen: Callable[[Sequence[Setting]], Sequence[Setting]]


class Claim(NamedTuple):
    """A claim, its rule in words, the runs that it is about, and the function that judges it in a setting."""

    name: str
    sentence: str
    rule: str
    among: Among
    judge: Callable[[Setting], list[Verdict]]

    def verdicts(self, found: Sequence[Setting]) -> list[tuple[str, Verdict]]:
        """Judge each of a study's settings: its name and the verdict."""
        there = [(setting.words, verdict) for setting in self.among.chosen(found) for verdict in self.judge(setting)]
        return there or [("", _lacking(self.among.needs))]


def signed(found: Difference, digits: int = 1, unit: str = "") -> str:
    """Format a mean with its interval and number of pairs.

    >>> signed(Difference(-1.0, -2.0, 0.5, 3), 1, " nats")
    '−1.0 [−2.0, +0.5] nats, 3 seeds'
    """
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{ends}{unit}, {found.seeds}".replace("-", "−")


def _nats(found: Difference, dims: float) -> str:
    """Format a difference of two ELBOs, also for each dimension."""
    per_dim = f"{found.mean / dims:+.3f}".replace("-", "−")
    return f"{signed(found, 1, ' nats')} ({per_dim} nats/dim)"


def percent(share: float) -> str:
    """Format a share in percent, with its sign.

    >>> percent(-0.05)
    '−5.0 %'
    """
    return f"{100 * share:+.1f} %".replace("-", "−")


def above(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is above the bar (holds) or below it (does not); few seeds only indicate that.

    >>> [above(Difference(2.0, 1.0, 3.0, pairs), 0.0, "more").word for pairs in (5, 3)]
    ['holds', 'indicated']
    """
    if found.low is None or found.high is None:
        return Verdict("not shown", f"{finding}; a verdict needs {SEEDS} seeds")
    if found.low <= bar <= found.high:
        return Verdict("not shown", f"{finding}; the interval contains the threshold")
    holds = found.low > bar
    if found.pairs < SEEDS:
        return Verdict("indicated" if holds else "indicated against", f"{finding}; a verdict needs {SEEDS} seeds")
    return Verdict("holds" if holds else "does not", finding)


def below(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is below the bar."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return above(Difference(-found.mean, low, high, found.pairs), -bar, finding)


def _within(found: Difference, bar: float, finding: str) -> Verdict:
    """Judge whether the whole interval is closer to zero than the bar (holds) or beyond it on one side (does not)."""
    verdict = above(found, -bar, finding)
    return below(found, bar, finding) if verdict.word in ("holds", "indicated") else verdict


def _both(first: Verdict, second: Verdict) -> Verdict:
    """Combine two verdicts: holds where both hold, does not where one does not."""
    order: tuple[Word, ...] = ("does not", "indicated against", "not shown", "indicated", "holds")
    word = min(first.word, second.word, key=order.index)
    return Verdict(word, f"{first.finding}; {second.finding}")


def _lacking(what: str) -> Verdict:
    """Return "not shown": the study has not measured what the rule needs."""
    return Verdict("not shown", f"needs {what}", lacks=True)


SHARED, PER_PIXEL, PER_IMAGE = "gaussian/shared", "gaussian/per-pixel", "gaussian/per-image"
OPTIMAL_IMAGE = "gaussian/optimal-image"
CATEGORICAL, BITWISE = "categorical", "bitwise-categorical"
DISCRETE = (CATEGORICAL, BITWISE, "logistic-mixture")
CALIBRATED = (OPTIMAL, SHARED)
EITHER = f"{OPTIMAL} or {SHARED}"
OF_EITHER = f", and {EITHER}"


def _flat(found: Sequence[Setting]) -> Sequence[Setting]:
    return [setting for setting in found if setting.is_flat]


def _other_networks(found: Sequence[Setting]) -> Sequence[Setting]:
    return [replace(s, words=", ".join(filter(None, (s.words, s.network)))) for s in found if not s.is_flat]


def _by_weight(found: Sequence[Setting]) -> Sequence[Setting]:
    def same(config: RunConfig) -> Hashable:
        return replace(config, seed=0, training=replace(config.training, kl_weight=1.0))

    return _grouped(found, same, lambda config: f"KL weight {config.training.kl_weight:g}")


def _by_batch_size(found: Sequence[Setting]) -> Sequence[Setting]:
    """Group runs that saw equally many images: steps times batch size, or epochs."""

    def same(config: RunConfig) -> Hashable:
        training, model = config.training, replace(config.model, likelihood=OPTIMAL)
        if training.max_steps is not None and training.batch_size is not None:
            training = replace(training, max_steps=training.max_steps * training.batch_size, epochs=1)
        return replace(config, seed=0, model=model, training=replace(training, batch_size=1, validate_every=None))

    return _grouped(found, same, lambda config: _batch_arm(config.model.likelihood, config.training.batch_size))


def _batch_arm(likelihood: str, batch_size: int | None) -> str:
    return f"{likelihood}, {batch_size}"


def _grouped(
    found: Sequence[Setting], same: Callable[[RunConfig], Hashable], arm_of: Callable[[RunConfig], str]
) -> Sequence[Setting]:
    """Group runs with a calibrated σ by what they share, where a group has more than one arm."""
    import pandas as pd

    groups: dict[Hashable, list[Ended]] = defaultdict(list)
    for done in (done for setting in found for arm in setting.arms for done in setting.of(arm)):
        if done.cell.config.model.likelihood in CALIBRATED:
            groups[same(done.cell.config)].append(done)
    together = []
    for group in groups.values():
        ended: dict[str, list[Ended]] = defaultdict(list)
        for done in group:
            ended[arm_of(done.cell.config)].append(done)
        if len(ended) > 1:
            arms = {arm: dones[0].cell.config.model.likelihood for arm, dones in ended.items()}
            arm_by_key = {done.cell.key: arm for arm, dones in ended.items() for done in dones}
            table = pd.concat([setting.table for setting in found])
            table = table[table["key"].isin(list(arm_by_key))]
            table = table.assign(**{ARM: table["key"].map(arm_by_key)})
            together.append(Setting(_shared_place(group, groups.values()), arms, found[0].priors, dict(ended), table))
    return together


def _shared_place(group: Sequence[Ended], groups: Iterable[Sequence[Ended]]) -> str:
    """The part of the place that this group shares and other groups do not."""
    everyone = [done for other in groups for done in other]

    def is_shared(name: str, value: Any) -> bool:
        return all(done.cell.place[name] == value for done in group) and any(
            done.cell.place[name] != value for done in everyone
        )

    place = group[0].cell.place.items()
    return format_place({name: value for name, value in place if name != "seed" and is_shared(name, value)})


EVERY = Among("finished runs", lambda found: found)
FLAT = Among("a network with one layer of latents", _flat)
OTHER_NETWORKS = Among("hierarchical latents, or a model of video", _other_networks)
KL_WEIGHTS = Among("runs with a calibrated σ that differ in their KL weight", _by_weight)
BATCH_SIZES = Among("runs with a calibrated σ that saw equally many images in batches of different sizes", _by_batch_size)


CLOSE = 0.01
"""Nats per dimension that still count as equal in likelihood: 0.014 bits, or what errors that are 1 % larger cost."""
CLOSE_SAMPLES = 0.10
"""Share of a Fréchet distance that still counts as equal."""
CLOSE_PREDICTIONS = {"PSNR, dB": 0.5, "SSIM": 0.02}
"""Differences of predictions that still count as equal."""
CLOSE_BITS = 0.15
"""Bits per dimension that a model of independent bits may cost."""
FASTER = 1.05
"""Ratio of steps that counts; smaller ones cannot be seen between the few validations of a run."""


def _compared(setting: Setting, metric: str, ours: str | None, theirs: str | None, needs: str) -> list[Verdict]:
    """Judge whether ours is above theirs."""
    found = setting.difference(metric, ours, theirs)
    if found is None:
        return [_lacking(needs)]
    numbers = signed(found, 3, " bits/dim") if metric == BITS else signed(found, 1, " nats")
    return [above(found, 0.0, f"{ours} − {theirs}: {numbers}")]


def _higher(setting: Setting, *, metric: str, ours: tuple[str, ...], theirs: tuple[str, ...], needs: str) -> list[Verdict]:
    """Judge whether ours is above theirs: of the likelihoods in each, the first that the study has."""
    return _compared(setting, metric, setting.first(*ours), setting.first(*theirs), needs)


def _worse_samples(setting: Setting, worse: str | None, better: str | None, needs: str) -> list[Verdict]:
    """Judge whether the first has worse samples from the training prior, for each set of features."""
    columns = frechet_columns(setting.table) if STANDARD in setting.priors else {}
    differences = {features: setting.difference(metric, worse, better, STANDARD) for features, metric in columns.items()}
    how = f"{LEARNED} prior, " if setting.learns_prior else ""
    return [
        above(found, 0.0, f"{how}{features}: {worse} − {better}: {signed(found, 2)}")
        for features, found in differences.items()
        if found is not None
    ] or [_lacking(f"Fréchet distances of {needs}")]


def _further(setting: Setting, *, worse: str, better: tuple[str, ...], needs: str) -> list[Verdict]:
    """Judge whether a likelihood has worse samples than another: the first of several that the study has."""
    return _worse_samples(setting, setting.first(worse), setting.first(*better), needs)


def _tuned_likelihood(setting: Setting) -> list[Verdict]:
    rival = setting.tuned()
    best = rival.arm
    found = setting.against(rival, ELBO, setting.first(OPTIMAL))
    if found is None:
        return [_lacking(f"{OPTIMAL} and three fixed σ")]
    finding = f"optimal − {best}: {_nats(found, setting.dims)}"
    if best in (next(iter(setting.fixed)), next(reversed(setting.fixed))):
        finding += ", at the end of the grid, so a better one may lie beyond"
    if found.low is not None and found.high is not None and found.low <= 0:
        finding += "; it is below the best fixed σ" if found.high < 0 else "; which is higher is not shown"
    return [above(found, -CLOSE * setting.dims, finding + rival.words)]


def _tuned_samples(setting: Setting) -> list[Verdict]:
    return _samples(setting, [STANDARD] if STANDARD in setting.priors else [], CLOSE_SAMPLES)


def _fitted_samples(setting: Setting) -> list[Verdict]:
    return _samples(setting, [prior for prior in setting.priors if prior != STANDARD], 0.0)


def _other_samples(setting: Setting) -> list[Verdict]:
    return _samples(setting, [setting.plain], CLOSE_SAMPLES)


def _samples(setting: Setting, priors: list[str], close: float) -> list[Verdict]:
    """Compare optimal with the best of the grid, for each set of features and prior."""
    verdicts = []
    for features, metric in frechet_columns(setting.table).items():
        for prior in priors:
            rival = setting.best(metric, prior, highest=False)
            found = setting.against(rival, metric, setting.first(OPTIMAL), prior)
            if found is not None:
                size = rival.mean
                how = f"prior {setting.called(prior)}, {features}: optimal − {rival.arm}"
                finding = f"{how}: {signed(found, 2)} ({percent(found.mean / size)} of its {size:.2f})"
                verdicts.append(below(found, close * size, finding + rival.words))
    which = "such a prior" if priors else "another prior"
    return verdicts or [_lacking(f"Fréchet distances of {OPTIMAL} and of three fixed σ, with {which}")]


def _unit_likelihood(setting: Setting) -> list[Verdict]:
    ours = setting.first(SHARED, OPTIMAL)
    return _compared(setting, ELBO, ours, setting.unit, f"{SHARED} or {OPTIMAL}, and σ = 1")


def _unit_samples(setting: Setting) -> list[Verdict]:
    return _worse_samples(setting, setting.unit, setting.first(SHARED, OPTIMAL), f"{SHARED} or {OPTIMAL}, and σ = 1")


def _speed(setting: Setting) -> list[Verdict]:
    ours, learned = setting.first(OPTIMAL), [arm for arm, name in setting.arms.items() if name == SHARED]
    if ours is None or not learned:
        return [_lacking(f"{OPTIMAL} and {SHARED}")]
    return [_faster(setting, ours, theirs) for theirs in learned]


def _faster(setting: Setting, ours: str, theirs: str) -> Verdict:
    mine, others = setting.curves(ours), setting.curves(theirs)
    ratios = [ratio for seed in mine if seed in others and (ratio := _ratio(mine[seed], others[seed])) is not None]
    end = setting.difference(ELBO, ours, theirs)
    if not ratios or end is None:
        return _lacking(f"four validations or more of {OPTIMAL} and {SHARED}")
    found = mean_difference([*map(math.log, ratios)])
    ends = "" if found.low is None or found.high is None else f" [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]"
    steps = f"{theirs} takes {math.exp(found.mean):.3f}{ends} times the steps, {found.seeds}"
    ended = above(end, -CLOSE * setting.dims, f"final ELBO, {ours} − {theirs}: {_nats(end, setting.dims)}")
    return _both(above(found, math.log(FASTER), steps), ended)


def _ratio(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> float | None:
    """Steps of theirs over steps of ours to the ELBO that theirs has half-way; None with too few validations."""
    if len(theirs) < 4:
        return None
    ours, theirs = ([(max(step, 1), elbo) for step, elbo in curve] for curve in (ours, theirs))  # a start, −1, counts as one
    half = [point for point in theirs if point[0] <= theirs[-1][0] / 2] or theirs[:1]
    target = max(elbo for _, elbo in half)
    return _steps_to(theirs, target) / _steps_to(ours, target)


def _steps_to(curve: list[tuple[int, float]], target: float) -> float:
    """Steps until the curve first has the value, interpolated linearly; twice the last where it never has."""
    before: tuple[int, float] | None = None
    for step, elbo in curve:
        if elbo >= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (target - before[1]) / (elbo - before[1])
        before = step, elbo
    return 2.0 * curve[-1][0]


def _position(setting: Setting) -> list[Verdict]:
    ours = setting.first(OPTIMAL)
    kl_shares, information_shares = (_share(setting, ours, metric) for metric in (MARGINAL_KL, MUTUAL_INFORMATION))
    seeds = sorted(set(kl_shares) & set(information_shares))
    if not seeds:
        return [_lacking(f"information of {OPTIMAL} and of four fixed σ")]
    kl = mean_difference([kl_shares[seed] for seed in seeds])
    more = mean_difference([information_shares[seed] - kl_shares[seed] for seed in seeds])
    sigma = setting.values(ours, "sigma_post_hoc_density")
    finding = f"σ = {sigma.mean():.3g}: " if len(sigma) else ""
    finding += f"share of the grid's range: marginal KL {signed(kl, 2)}"
    further = f"mutual information minus marginal KL {signed(more, 2)}"
    return [_both(below(kl, 0.25, finding), above(more, 0.0, further))]


def _share(setting: Setting, ours: str | None, metric: str) -> dict[Any, float]:
    """Position of ours between the lowest and the highest of the fixed σ, for each seed; empty with fewer than four."""
    import pandas as pd

    grid = pd.DataFrame({arm: found for arm in setting.fixed if len(found := setting.values(arm, metric))}).dropna()
    if grid.shape[1] < 4:
        return {}
    mine, low = setting.values(ours, metric), grid.min(axis=1)
    width = grid.max(axis=1) - low
    return {
        seed: float((mine[seed] - low[seed]) / width[seed]) for seed in grid.index if seed in mine.index and width[seed] > 0
    }


MUTUAL_INFORMATION = "information.mutual_information_at_most_nats"
COVERAGE = "calibration.density.coverage.90"


def _coverage(setting: Setting) -> list[Verdict]:
    mine, verdicts = setting.values(setting.first(OPTIMAL), COVERAGE), []
    for theirs in dict.fromkeys(arm for arm in (setting.tuned().arm, setting.unit) if arm is not None):
        other = setting.values(theirs, COVERAGE)
        seeds = [seed for seed in mine.index if seed in other.index]
        if seeds:
            found = mean_difference([100 * (abs(mine[seed] - 0.9) - abs(other[seed] - 0.9)) for seed in seeds])
            covers = f"optimal covers {100 * mine.mean():.2f} %, {theirs} {100 * other.mean():.2f} %"
            numbers = signed(found, 3, " percentage points")
            verdicts.append(below(found, 0.0, f"{covers}; difference of the errors: {numbers}"))
    return verdicts or [_lacking(f"calibration of {OPTIMAL}, and of σ = 1 or three fixed σ")]


def _image_training(setting: Setting) -> list[Verdict]:
    optimal = setting.first(OPTIMAL)
    found = setting.difference(ELBO, setting.first(OPTIMAL_IMAGE), optimal)
    if found is None:
        return [_lacking(f"{OPTIMAL_IMAGE} and {OPTIMAL}")]
    return [above(found, -CLOSE * setting.dims, f"optimal-image − optimal: {_nats(found, setting.dims)}")]


def _levels(setting: Setting) -> list[Verdict]:
    gaussian = setting.first(*CALIBRATED)
    arms = [arm for arm, name in setting.arms.items() if name.partition(":")[0] in DISCRETE]
    differences = {arm: setting.difference(BITS, gaussian, arm) for arm in arms}
    return [
        above(found, 0.0, f"{gaussian} − {arm}: {signed(found, 3, ' bits/dim')}")
        for arm, found in differences.items()
        if found is not None
    ] or [_lacking(f"{EITHER}, and one of {', '.join(DISCRETE)}")]


def _bitwise(setting: Setting) -> list[Verdict]:
    found = setting.difference(BITS, setting.first(BITWISE), setting.first(CATEGORICAL))
    if found is None:
        return [_lacking(f"{BITWISE} and {CATEGORICAL}")]
    return [below(found, CLOSE_BITS, f"{BITWISE} − {CATEGORICAL}: {signed(found, 3, ' bits/dim')}")]


def _predictions(setting: Setting) -> list[Verdict]:
    verdicts = []
    for name, (metric, digits) in PREDICTIONS.items():
        rival = setting.best(metric, setting.plain, highest=True)
        found = setting.against(rival, metric, setting.first(OPTIMAL))
        if found is not None:
            finding = f"{name}: optimal − {rival.arm}: {signed(found, digits)}, against {rival.mean:.{digits}f}{rival.words}"
            verdicts.append(above(found, -CLOSE_PREDICTIONS[name], finding))
    return verdicts or [_lacking(f"predictions of {OPTIMAL} and of three fixed σ")]


def _stability(setting: Setting) -> list[Verdict]:
    there = [done for arm, name in setting.arms.items() if name in CALIBRATED for done in setting.of(arm)]
    if not there:
        return [_lacking(EITHER)]
    errors = [done.error for done in there if done.error is not None]
    diverged = sum(map(diverges, errors))
    others = len(errors) - diverged
    finding = f"{len(there)} runs with a calibrated σ, {diverged} became non-finite, {others} failed otherwise"
    without: Word = "not shown" if errors or not there else "holds" if len(there) >= SEEDS else "indicated"
    return [Verdict("does not" if diverged else without, finding)]


def diverges(error: str) -> bool:
    """Whether an error is about numbers that are not finite."""
    return "NonFinite" in error or "not finite" in error or "Out of range float" in error


ONE = "KL weight 1"


def _weight_bound(setting: Setting) -> list[Verdict]:
    return [_best_weight(setting, ELBO, setting.plain, highest=True, how="")]


def _weight_samples(setting: Setting, *, fitted: bool) -> list[Verdict]:
    """Judge each set of features, and N(0, I) or each fitted prior."""
    priors = [prior for prior in setting.priors if (prior != STANDARD) == fitted]
    columns = [(prior, features, metric) for features, metric in frechet_columns(setting.table).items() for prior in priors]
    return [
        _best_weight(setting, metric, prior, highest=False, how=f"prior {setting.called(prior)}, {features}: ")
        for prior, features, metric in columns
    ] or [_lacking("Fréchet distances of several KL weights with such a prior")]


def _best_weight(setting: Setting, metric: str, prior: str, *, highest: bool, how: str) -> Verdict:
    """Judge whether a weight of 1 is better than the best other one."""
    rival = setting.best_of([arm for arm in setting.arms if arm != ONE], ONE, metric, prior, highest=highest)
    found = setting.against(rival, metric, ONE, prior)
    if found is None:
        return _lacking("runs with a KL weight of 1 and with another, with the same calibrated σ")
    numbers = signed(found, 1, " nats") if highest else signed(found, 2)
    return (above if highest else below)(found, 0.0, f"{how}{ONE} − {rival.arm}: {numbers}{rival.words}")


def _batch_size(setting: Setting) -> list[Verdict]:
    def bound(likelihood: str, batch_size: int) -> Any:
        return setting.values(_batch_arm(likelihood, batch_size), ELBO)

    given = {done.cell.config.training.batch_size for arms in setting.ended.values() for done in arms}
    sizes = sorted(size for size in given if size is not None)
    means = {size: float(values.mean()) for size in sizes if len(values := bound(OPTIMAL, size))}
    if len(means) < 2:
        return [_lacking(f"{OPTIMAL} with several batch sizes and equally many images")]
    small, large = min(means), max(means)
    change, control = (bound(likelihood, small) - bound(likelihood, large) for likelihood in (OPTIMAL, SHARED))
    controlled = len(control.dropna()) > 0
    differences = (change - control if controlled else change).dropna().tolist()
    if not differences:
        return [_lacking("seeds that the smallest and the largest batch share")]
    found = mean_difference(differences)
    by_size = ", ".join(f"{batch}: {mean:.1f}" for batch, mean in means.items())
    what = "minus that of shared" if controlled else "without shared to compare with"
    finding = f"ELBO by batch size {by_size}; {small} − {large}, {what}: {_nats(found, setting.dims)}"
    return [_within(found, CLOSE * setting.dims, finding)]


CHOSEN = "chosen on validation, or where it was not measured there, for each seed on the others"
TUNED_RULE = (
    "Holds if optimal's ELBO on test, with refitted σ, is less than 0.01 nats per dimension below the best of 3 or more fixed σ (by "
    "validation)."
)
UNIT_RULE = "Holds if one calibrated σ (shared, else optimal) has a higher ELBO on test, with refitted σ, than σ = 1."

CLAIMS = (
    Claim(
        "1, likelihood",
        "A calibrated σ has a likelihood at most 0.01 nats per dimension below the best tuned β.",
        TUNED_RULE,
        FLAT,
        _tuned_likelihood,
    ),
    Claim(
        "1, samples",
        "A calibrated σ has samples from N(0, I) at most 10 % worse than the best β.",
        f"Holds if optimal's Fréchet distance with N(0, I) is less than 10 % above the best of 3 or more fixed σ ({CHOSEN}).",
        FLAT,
        _tuned_samples,
    ),
    Claim(
        "2, likelihood",
        "One calibrated σ has a better likelihood than unit variance.",
        UNIT_RULE,
        FLAT,
        _unit_likelihood,
    ),
    Claim(
        "2, samples",
        "One calibrated σ has better samples from N(0, I) than unit variance.",
        "Holds if one calibrated σ (shared, else optimal) has a smaller Fréchet distance with N(0, I) than σ = 1.",
        FLAT,
        _unit_samples,
    ),
    Claim(
        "3, speed",
        "Training with the solved σ is faster than with a learned σ by more than 5 %, and ends at most 0.01 nats per dimension lower.",
        "Holds if learned σ takes over 5 % more steps than optimal to learned σ's half-way ELBO, and optimal ends "
        "at most 0.01 nats per dimension lower. The half-way ELBO is the best validation ELBO in the first half of training. The rule "
        "judges the geometric mean of the ratios of steps: it holds where the whole interval is above 1.05, and "
        "does not where all of it is below. If optimal never reaches that ELBO, it counts as reaching it after "
        "twice its steps.",
        EVERY,
        _speed,
    ),
    Claim(
        "4, likelihood",
        "A σ for each pixel has a better likelihood.",
        "Holds if per-pixel has a higher ELBO of densities on test, with refitted σ, than optimal (else shared).",
        EVERY,
        partial(_higher, metric=ELBO, ours=(PER_PIXEL,), theirs=CALIBRATED, needs=PER_PIXEL + OF_EITHER),
    ),
    Claim(
        "4, levels",
        "A σ for each pixel also has a better likelihood of the data's levels, in bits per dimension.",
        "Holds if per-pixel needs fewer bits per dimension on test, with refitted σ, than optimal (else shared).",
        EVERY,
        partial(_higher, metric=BITS, ours=CALIBRATED, theirs=(PER_PIXEL,), needs=f"levels, {PER_PIXEL}{OF_EITHER}"),
    ),
    Claim(
        "4, samples",
        "A σ for each pixel has worse samples.",
        "Holds if per-pixel has a larger Fréchet distance than optimal (else shared), with N(0, I) or the learned prior.",
        EVERY,
        partial(_further, worse=PER_PIXEL, better=CALIBRATED, needs=PER_PIXEL + OF_EITHER),
    ),
    Claim(
        "4, prior",
        "A σ for each pixel has latents farther from the prior.",
        "Holds if per-pixel has a higher lower bound on the marginal KL than optimal (else shared).",
        EVERY,
        partial(
            _higher,
            metric=MARGINAL_KL,
            ours=(PER_PIXEL,),
            theirs=CALIBRATED,
            needs=f"information of {PER_PIXEL}, and of {EITHER}",
        ),
    ),
    Claim(
        "5, information",
        "The calibrated model is where the marginal KL begins to rise.",
        "Holds if optimal is in the lowest quarter of the marginal KL, and higher in mutual information, over 4 "
        "or more fixed σ. Both positions are shares of the range that the fixed σ span.",
        EVERY,
        _position,
    ),
    Claim(
        "6, likelihood",
        "A σ predicted for each image has a better likelihood.",
        "Holds if per-image has a higher ELBO on test, with refitted σ, than shared (else optimal).",
        EVERY,
        partial(
            _higher, metric=ELBO, ours=(PER_IMAGE,), theirs=(SHARED, OPTIMAL), needs=f"{PER_IMAGE}, and {SHARED} or {OPTIMAL}"
        ),
    ),
    Claim(
        "6, training",
        "Training with the best σ of each image costs at most 0.01 nats per dimension of the ELBO with one σ.",
        "Holds if optimal-image has an ELBO on test less than 0.01 nats per dimension below that of optimal, both with one refitted σ "
        "for all images. With each image's own σ the number would be no likelihood, and it is not reported.",
        EVERY,
        _image_training,
    ),
    Claim(
        "6, samples",
        "Training with the best σ of each image has better samples.",
        "Holds if optimal-image has a smaller Fréchet distance than optimal, with N(0, I) or the prior that the "
        "network learned.",
        EVERY,
        partial(_further, worse=OPTIMAL, better=(OPTIMAL_IMAGE,), needs=f"{OPTIMAL_IMAGE} and {OPTIMAL}"),
    ),
    Claim(
        "7, levels",
        "A decoder of discrete levels needs fewer bits than a Gaussian with one calibrated σ.",
        "Holds if a Gaussian with one σ (optimal, else shared), refitted to the bins, needs more bits on test "
        "than the decoder.",
        EVERY,
        _levels,
    ),
    Claim(
        "7, bitwise",
        "The bitwise decoder needs at most 0.15 bits per dimension more than the categorical one.",
        "Holds if bitwise minus categorical, in bits per dimension on test, is below 0.15.",
        EVERY,
        _bitwise,
    ),
    Claim(
        "7, bitwise samples",
        "The bitwise decoder has better samples than the categorical one.",
        "Holds if bitwise has a smaller Fréchet distance than categorical, with N(0, I) or the prior that the network learned.",
        EVERY,
        partial(_further, worse=CATEGORICAL, better=(BITWISE,), needs=f"{BITWISE} and {CATEGORICAL}"),
    ),
    Claim(
        "8, likelihood",
        "With hierarchical latents and on video, a calibrated σ has a likelihood at most 0.01 nats per dimension below the best tuned β.",
        TUNED_RULE,
        OTHER_NETWORKS,
        _tuned_likelihood,
    ),
    Claim(
        "8, unit variance",
        "With hierarchical latents and on video, one calibrated σ has a better likelihood than unit variance.",
        UNIT_RULE,
        OTHER_NETWORKS,
        _unit_likelihood,
    ),
    Claim(
        "8, samples",
        "With hierarchical latents and on video, a calibrated σ has samples at most 10 % worse than the best β.",
        f"Holds if optimal's Fréchet distance is less than 10 % above the best of 3 or more fixed σ ({CHOSEN}).",
        OTHER_NETWORKS,
        _other_samples,
    ),
    Claim(
        "8, predictions",
        "On video, predictions are as good as with the best fixed σ.",
        f"Holds if optimal's best predictions have a PSNR less than 0.5 dB, and an SSIM less than 0.02, below the best of 3 or more "
        f"fixed σ ({CHOSEN}).",
        OTHER_NETWORKS,
        _predictions,
    ),
    Claim(
        "9, fitted prior",
        "With a fitted prior, one calibrated run has better samples than the best of the β grid.",
        f"Holds if, with the same fitted prior, optimal's Fréchet distance is below the best of 3 or more fixed σ ({CHOSEN}).",
        FLAT,
        _fitted_samples,
    ),
    Claim(
        "10, coverage",
        "A 90 % interval with a calibrated σ covers closer to 90 % than one with a fixed σ.",
        "Holds if optimal's 90 % interval covers closer to 90 % than that of a fixed σ (the best on validation, and σ = 1).",
        EVERY,
        _coverage,
    ),
    Claim(
        "11, stability",
        "No run with a calibrated σ diverged.",
        "Holds if 3 or more runs with a shared or optimal σ ended and none failed. Does not if one became non-finite.",
        EVERY,
        _stability,
    ),
    Claim(
        "12, bound",
        "With a calibrated σ, a KL weight of 1 has the best ELBO.",
        "Holds if a KL weight of 1 has a higher ELBO, with refitted σ, than the best other weight (by validation).",
        KL_WEIGHTS,
        _weight_bound,
    ),
    Claim(
        "12, samples",
        "With a calibrated σ, a KL weight of 1 has the best samples from the prior used in training.",
        f"Holds if the best other weight ({CHOSEN}) has a larger Fréchet distance than a KL "
        "weight of 1. Samples are from N(0, I), or from the prior that the network learned.",
        KL_WEIGHTS,
        partial(_weight_samples, fitted=False),
    ),
    Claim(
        "12, fitted prior",
        "With a calibrated σ, a KL weight of 1 has the best samples with a fitted prior.",
        f"Holds if the best other weight ({CHOSEN}) has a larger Fréchet distance with a fitted prior than a KL weight of 1.",
        KL_WEIGHTS,
        partial(_weight_samples, fitted=True),
    ),
    Claim(
        "13, batch size",
        "The batch size does not matter for a σ that is solved for each batch.",
        "Holds if optimal's ELBO on test differs by less than 0.01 nats per dimension between the smallest and the largest batch, at "
        "equally many images. The same difference of shared, where it was run, is subtracted: it is what the "
        "batch size does to any training.",
        BATCH_SIZES,
        _batch_size,
    ),
)
"""All claims, in the order of the reports."""
