"""Decoders of levels against the masses of a Gaussian, and against each other: claim 7."""

from collections.abc import Iterator

from sigma_vae.study.claims.claim import OPTIMAL, SHARED, Claim, worse_samples
from sigma_vae.study.comparisons import BITS, Setting
from sigma_vae.study.groupings import EVERY
from sigma_vae.study.judging import Verdict, above, below, lacking, signed

__all__ = ["CLAIMS"]

CATEGORICAL, BITWISE = "categorical", "bitwise-categorical"
DISCRETE = (CATEGORICAL, BITWISE, "logistic-mixture")
CLOSE_BITS = 0.15
"""Per dimension: what bits that know nothing of each other may cost."""


def _levels(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal (shared where there is none), with σ refitted to the masses of levels, takes more bits on test than the decoder."""
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
    """Holds if bitwise has a smaller Fréchet distance with N(0, I), or the prior that the network learned, than categorical."""
    yield from worse_samples(setting, setting.first(CATEGORICAL), setting.first(BITWISE), f"{BITWISE} and {CATEGORICAL}")


CLAIMS = (
    Claim("7, levels", "A decoder of levels takes fewer bits than a Gaussian with one calibrated σ.", EVERY, _levels),
    Claim("7, bitwise", "Bit by bit takes at most 0.15 bits per dimension more than one of 256.", EVERY, _bitwise),
    Claim("7, bitwise samples", "Bit by bit has better samples than one of 256.", EVERY, _bitwise_samples),
)
