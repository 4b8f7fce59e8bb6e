"""Inspection of a data set: sizes, ranges, constant values, duplicates, and a suggested likelihood."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sigma_vae.data.batches import chunks
from sigma_vae.data.splits import SPLITS, SplitName, Splits, counted

HEAVY_TAILS = 6.0
"""Excess kurtosis above which residuals probably have heavy tails too: twice that of a Laplace distribution."""
MANY_AT_THE_ENDS = 0.2
FEW_LEVELS = 32
WIDE_COUNTS = 10
ENOUGH_FOR_A_CATEGORICAL = 1_000
"""Examples per level below which a categorical likelihood learns badly."""
LOOKED_AT = 2**24
"""Values of a large training split that a suggestion alone looks at: a second or two."""
SMALL = 20_000
"""Training examples below which σ from training data is too small for new data."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of one channel over the training split, in the data's units (levels: in [0, 1])."""

    mean: float
    deviation: float
    least: float
    largest: float
    excess_kurtosis: float


@dataclass(frozen=True)
class Duplicates:
    """Examples of one split that occur, value for value, in another split, or again in the same one.

    Clips are compared by their first frames, as many as the shortest clips have.
    """

    split: SplitName
    among: SplitName
    count: int


@dataclass(frozen=True)
class Inspection:
    """The result of :func:`inspect`, as plain values."""

    name: str
    counts: dict[str, int]
    shape: tuple[int, ...]
    frames: dict[str, int] | None
    levels: int | None
    levels_used: int | None
    standardised: bool
    preprocessing: str
    channels: tuple[ChannelStatistics, ...]
    columns: tuple[str, ...]
    """Names of a table's channels; empty for other data."""
    share_at_least_level: float | None
    share_at_largest_level: float | None
    constant_values: int
    duplicates: tuple[Duplicates, ...]
    likelihood: str
    reasons: tuple[str, ...]


def inspect(data: Splits) -> Inspection:
    """Inspect a whole data set, a few examples at a time.

    >>> from sigma_vae.data.batches import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> coins = [InMemory(torch.randint(0, 2, (n, 1, 4, 4), dtype=torch.uint8)) for n in (50, 5, 5)]
    >>> inspect(Splits("coins", *coins, Scaling(levels=2), record={"preprocessing": ""})).likelihood
    'bernoulli'
    """
    passed = _Pass(data)
    for stored in chunks(data.train):
        passed.add(stored)
    scaling = data.scaling
    channels = passed.channels()
    names = tuple(data.record.get("columns", ()))
    likelihood, reasons = _suggestion(data, channels, passed)
    ends = passed.ends() if scaling.levels else (None, None)
    return Inspection(
        name=data.name,
        counts={split: len(data.store(split)) for split in SPLITS},
        shape=data.shape,
        frames={split: data.store(split).shape[0] for split in SPLITS} if data.clips else None,
        levels=scaling.levels,
        levels_used=passed.levels_used(),
        standardised=scaling.standardised,
        preprocessing=str(data.record["preprocessing"]),
        channels=channels,
        columns=names if len(names) == len(channels) else (),  # in a table of series, columns are times
        share_at_least_level=ends[0],
        share_at_largest_level=ends[1],
        constant_values=passed.constant_values(),
        duplicates=_duplicates(data),
        likelihood=likelihood,
        reasons=reasons,
    )


def suggested(data: Splits) -> tuple[str, str]:
    """The likelihood that :func:`inspect` suggests, and why; of a large training split it looks at a part, evenly spaced.

    >>> from sigma_vae.data.batches import Scaling
    >>> from sigma_vae.data.stores import InMemory
    >>> columns = [InMemory(torch.randn(n, 3)) for n in (50, 5, 5)]
    >>> suggested(Splits("a table", *columns, Scaling(), record={}))[0]
    'gaussian/optimal-channel'
    """
    size = data.values_per_example
    n = min(len(data.train), max(LOOKED_AT // size, 1))
    looked_at = replace(data, train=data.train.select(torch.arange(n) * len(data.train) // n))
    passed = _Pass(looked_at)
    for stored in chunks(looked_at.train):
        passed.add(stored)
    likelihood, reasons = _suggestion(data, passed.channels(), passed)
    return likelihood, reasons[0]


class _Pass:
    """Counts of the levels of a training split, or sums over its real values in float64, channel by channel."""

    def __init__(self, data: Splits) -> None:
        self.data = data
        channels = data.shape[0]
        self.used = torch.zeros(channels, data.levels or 0, dtype=torch.int64)
        self.count = 0
        self.whole = True
        self.shift: Tensor | None = None
        self.powers = torch.zeros(4, channels, dtype=torch.float64)
        self.least = torch.full((channels,), math.inf, dtype=torch.float64)
        self.largest = torch.full((channels,), -math.inf, dtype=torch.float64)
        self.first: Tensor | None = None
        self.changes: Tensor | None = None

    def add(self, stored: Tensor) -> None:
        """Add a few examples in stored form."""
        examples = stored.flatten(0, 1) if self.data.clips else stored
        if self.first is None or self.changes is None:
            self.first, self.changes = examples[0].clone(), torch.zeros(examples.shape[1:], dtype=torch.bool)
        self.changes |= (examples != self.first).any(0)
        rows = examples.transpose(0, 1).flatten(1)
        if self.data.levels is None:
            self._add_real(rows.double())
        else:
            self.used += torch.stack([torch.bincount(row, minlength=self.data.levels) for row in rows])

    def _add_real(self, rows: Tensor) -> None:
        self.whole = self.whole and bool(((rows >= 0) & (rows == rows.round())).all())
        if self.shift is None:
            self.shift = rows.mean(1)
        self.least = torch.minimum(self.least, rows.amin(1))
        self.largest = torch.maximum(self.largest, rows.amax(1))
        centred = rows - self.shift[:, None]  # near the mean, so that fourth powers keep their digits
        squares = centred.square()
        self.powers += torch.stack([centred.sum(1), squares.sum(1), (squares * centred).sum(1), squares.square().sum(1)])
        self.count += rows.shape[1]

    def channels(self) -> tuple[ChannelStatistics, ...]:
        """The statistics of each channel."""
        if self.data.levels is None:
            assert self.shift is not None
            m1, m2, m3, m4 = self.powers / self.count
            mean, variance = self.shift + m1, (m2 - m1**2).clamp_min(0)
            fourth, least, largest = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4, self.least, self.largest
        else:
            levels = torch.arange(self.data.levels, dtype=torch.float64) / (self.data.levels - 1)
            share = self.used.double() / self.used.sum(1, keepdim=True)
            mean = share @ levels
            variance, fourth = ((share * (levels - mean[:, None]) ** k).sum(1) for k in (2, 4))
            least, largest = (torch.where(self.used > 0, levels, end) for end in (math.inf, -math.inf))
            least, largest = least.amin(1), largest.amax(1)
        kurtosis = torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300) - 3, 0.0)
        columns = (mean, variance.sqrt(), least, largest, kurtosis)
        return tuple(ChannelStatistics(*row) for row in torch.stack(columns, 1).tolist())

    def constant_values(self) -> int:
        assert self.changes is not None
        return int((~self.changes).sum())

    def levels_used(self) -> int | None:
        return None if self.data.levels is None else int((self.used.sum(0) > 0).sum())

    def ends(self) -> tuple[float, float]:
        share = self.used.sum(0) / self.used.sum()
        return float(share[0]), float(share[-1])


def _duplicates(data: Splits) -> tuple[Duplicates, ...]:
    """Count duplicates by digests, so that only these are kept in memory."""
    frames = min(data.store(split).shape[0] for split in SPLITS) if data.clips else None
    digests: dict[SplitName, list[bytes]] = {
        split: [
            hashlib.blake2b(example[:frames].numpy().tobytes(), digest_size=16).digest()
            for chunk in chunks(data.store(split))
            for example in chunk
        ]
        for split in SPLITS
    }
    known = {split: set(own) for split, own in digests.items()}
    found = [Duplicates(split, split, len(digests[split]) - len(known[split])) for split in SPLITS]
    pairs: tuple[tuple[SplitName, SplitName], ...] = (("validation", "train"), ("test", "train"), ("test", "validation"))
    for split, among in pairs:
        found.append(Duplicates(split, among, sum(digest in known[among] for digest in digests[split])))
    return tuple(one for one in found if one.count)


def _suggestion(data: Splits, channels: tuple[ChannelStatistics, ...], passed: _Pass) -> tuple[str, tuple[str, ...]]:
    """Suggest a likelihood, with reasons and warnings."""
    levels, used = data.levels, passed.levels_used()
    warnings = list(_warnings(data, passed))
    if data.scaling.counts or _look_like_counts(data, channels, passed):
        return "negative-binomial/optimal", (
            "all values are whole numbers from 0 up, as of counts: with this likelihood they are read as such",
            *warnings,
        )
    if levels == 2:
        return "bernoulli", ("there are two levels: Bernoulli is an exact likelihood", *warnings)
    if levels is not None and used is not None and used <= FEW_LEVELS and len(data.train) >= ENOUGH_FOR_A_CATEGORICAL * used:
        return "categorical", (f"{used} levels occur, and there are enough examples to learn each of them", *warnings)
    if len(data.shape) == 1 and len(channels) > 1:
        return "gaussian/optimal-channel", ("each column of a table has its own noise: one solved σ per column", *warnings)
    if levels is None and max(channel.excess_kurtosis for channel in channels) > HEAVY_TAILS:
        return "student-t/optimal", (
            "some values are extreme (excess kurtosis above 6): they should not decide the scale",
            *warnings,
        )
    return "gaussian/optimal", ("one σ for all values, solved exactly, is a good start", *warnings)


def _look_like_counts(data: Splits, channels: tuple[ChannelStatistics, ...], passed: _Pass) -> bool:
    """Whether a table of real values has whole numbers alone, from 0 up to ten or more in most columns."""
    wide = [channel for channel in channels if channel.least == 0 and channel.largest >= WIDE_COUNTS]
    return data.levels is None and len(data.shape) == 1 and passed.whole and 2 * len(wide) > len(channels)


def _warnings(data: Splits, passed: _Pass) -> Iterator[str]:
    if data.levels is not None and sum(passed.ends()) > MANY_AT_THE_ENDS:
        yield (
            f"{sum(passed.ends()):.0%} of the values are at an end of the range: compare decoders by bits/dim, not by density;"
            " --observes level or logistic-mixture gives these values their probability"
        )
    if constant := passed.constant_values():
        yield (
            f"{counted(constant, 'value')} never change{'s' * (constant == 1)}: scales per pixel (optimal-pixel, per-pixel) shrink"
            " to the floor there and"
            " inflate the density"
        )
    if len(data.train) < SMALL:
        some = f"{counted(len(data.train), 'training example')} {'is' if len(data.train) == 1 else 'are'} few"
        yield f"{some}: stop by validation (--patience); a σ from training data is too small"
