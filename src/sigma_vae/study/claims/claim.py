"""A claim and its rule, and what several rules share."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sigma_vae.study.comparisons import BITS, LEARNED, OPTIMAL, STANDARD, Setting, frechet_columns
from sigma_vae.study.groupings import Among
from sigma_vae.study.judging import Verdict, above, lacking, signed

__all__ = ["OPTIMAL", "PER_PIXEL", "SHARED", "Claim", "compared", "percent", "worse_samples"]

SHARED, PER_PIXEL = "gaussian/shared", "gaussian/per-pixel"


class Claim(NamedTuple):
    """What is claimed, which runs it is about, and the rule that judges it in a setting; the rule's docstring says what counts."""

    name: str
    sentence: str
    among: Among
    judge: Callable[[Setting], Iterator[Verdict]]

    @property
    def rule(self) -> str:
        """What counts."""
        return " ".join((self.judge.__doc__ or "").split())

    def verdicts(self, found: Sequence[Setting]) -> list[tuple[str, Verdict]]:
        """Of a study's settings: where each was found, in words, and the verdict."""
        chosen = self.among.chosen(found)
        there = [(setting.words, verdict) for setting in chosen for verdict in self.judge(setting)]
        return there or [("", lacking(self.among.needs))]


def compared(setting: Setting, metric: str, ours: str | None, theirs: str | None, needs: str, unit: str) -> Verdict:
    """Whether ours is above theirs."""
    found = setting.difference(metric, ours, theirs, setting.plain)
    if found is None:
        return lacking(needs)
    return above(found, 0.0, f"{ours} − {theirs}: {signed(found, 3 if metric == BITS else 1, unit)}")


def worse_samples(setting: Setting, worse: str | None, better: str | None, needs: str) -> Iterator[Verdict]:
    """Whether samples of the first, with the prior of the training, are farther from the data: for each set of features."""
    columns = frechet_columns(setting.table) if STANDARD in setting.priors else {}
    differences = {features: setting.difference(metric, worse, better, STANDARD) for features, metric in columns.items()}
    found = {features: difference for features, difference in differences.items() if difference is not None}
    how = f"{LEARNED} prior, " if setting.learns_prior else ""
    for features, difference in found.items():
        yield above(difference, 0.0, f"{how}{features}: {worse} − {better}: {signed(difference, 2)}")
    if not found:
        yield lacking(f"Fréchet distances of {needs}")


def percent(share: float) -> str:
    """With its sign.

    >>> percent(-0.05)
    '−5.0 %'
    """
    return f"{100 * share:+.1f} %".replace("-", "−")
