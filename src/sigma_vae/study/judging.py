"""What makes a verdict: a whole interval on one side of a bar that was laid down before."""

from typing import Literal, NamedTuple

from sigma_vae.study.statistics import Difference

__all__ = ["SEEDS", "Verdict", "Word", "above", "below", "both", "lacking", "signed", "within"]

Word = Literal["holds", "does not", "not shown"]

SEEDS = 3
"""Fewer show nothing."""


class Verdict(NamedTuple):
    """A word, and the numbers that it rests on."""

    word: Word
    finding: str
    lacks: bool = False
    """The study has not measured what it takes."""


def signed(found: Difference, digits: int = 1, unit: str = "") -> str:
    """Mean, interval and pairs in words.

    >>> signed(Difference(-1.0, -2.0, 0.5, 3), 1, " nats")
    '−1.0 [−2.0, +0.5] nats, 3 seeds'
    """
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{ends}{unit}, {found.seeds}".replace("-", "−")


def lacking(what: str) -> Verdict:
    """Not shown, as the study has not measured what it takes."""
    return Verdict("not shown", f"takes {what}", lacks=True)


def above(found: Difference, bar: float, finding: str) -> Verdict:
    """Whether the whole interval is above the bar: holds; or below it: does not.

    >>> above(Difference(2.0, 1.0, 3.0, pairs=3), 0.0, "more").word, above(Difference(2.0, 1.0, 3.0, pairs=2), 0.0, "more").word
    ('holds', 'not shown')
    """
    if found.low is None or found.high is None or found.pairs < SEEDS:
        return Verdict("not shown", f"{finding}; a verdict takes {SEEDS} seeds")
    if found.low > bar:
        return Verdict("holds", finding)
    if found.high < bar:
        return Verdict("does not", finding)
    return Verdict("not shown", f"{finding}; the interval is on both sides of what would decide")


def below(found: Difference, bar: float, finding: str) -> Verdict:
    """Whether the whole interval is below the bar."""
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return above(Difference(-found.mean, low, high, found.pairs), -bar, finding)


def within(found: Difference, bar: float, finding: str) -> Verdict:
    """Whether the whole interval is nearer to zero than the bar: holds; or beyond it on one side: does not."""
    verdict = above(found, -bar, finding)
    return below(found, bar, finding) if verdict.word == "holds" else verdict


def both(first: Verdict, second: Verdict) -> Verdict:
    """Holds where both hold, does not where one does not."""
    words: set[Word] = {first.word, second.word}
    word: Word = "does not" if "does not" in words else "not shown" if "not shown" in words else "holds"
    return Verdict(word, f"{first.finding}; {second.finding}")
