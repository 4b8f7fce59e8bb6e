"""What the latents know, and what the intervals cover: claims 5 and 10."""

from collections.abc import Iterator
from typing import Any

from sigma_vae.study.claims.claim import OPTIMAL, Claim
from sigma_vae.study.comparisons import MARGINAL_KL, Setting
from sigma_vae.study.groupings import EVERY
from sigma_vae.study.judging import Verdict, above, below, both, lacking, signed
from sigma_vae.study.statistics import bootstrapped

__all__ = ["CLAIMS"]

COVERAGE = "calibration.density.coverage.90"
MUTUAL_INFORMATION = "information.mutual_information_at_most_nats"


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

    known = {arm: values for arm in setting.fixed if len(values := setting.values(arm, metric, setting.plain))}
    mine, grid = setting.values(ours, metric, setting.plain), pd.DataFrame(known).dropna()
    if grid.shape[1] < 4:
        return {}
    low, wide = grid.min(axis=1), grid.max(axis=1) - grid.min(axis=1)
    return {seed: float((mine[seed] - low[seed]) / wide[seed]) for seed in grid.index if seed in mine.index and wide[seed] > 0}


def _coverage(setting: Setting) -> Iterator[Verdict]:
    """Holds if the share of values in optimal's 90 % interval is nearer to 90 % than that of a fixed σ (the best on validation, and 1)."""
    ours, judged = setting.first(OPTIMAL), False
    for theirs in dict.fromkeys(arm for arm in (setting.tuned().arm, setting.unit) if arm is not None):
        mine, other = (setting.values(arm, COVERAGE, setting.plain) for arm in (ours, theirs))
        seeds = [seed for seed in mine.index if seed in other.index]
        if seeds:
            judged = True
            found = bootstrapped([100 * (abs(mine[seed] - 0.9) - abs(other[seed] - 0.9)) for seed in seeds])
            covers = f"optimal covers {100 * mine.mean():.2f} %, {theirs} {100 * other.mean():.2f} %"
            yield below(found, 0.0, f"{covers}; difference in the errors: {signed(found, 3, ' percentage points')}")
    if not judged:
        yield lacking(f"calibration of {OPTIMAL}, and of σ = 1 or three fixed σ")


CLAIMS = (
    Claim("5, information", "The calibrated model sits where the marginal KL begins to rise.", EVERY, _position),
    Claim(
        "10, coverage", "A 90 % interval with a calibrated σ covers nearer to 90 % than one with a fixed σ.", EVERY, _coverage
    ),
)
