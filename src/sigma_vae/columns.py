"""Columns of a table: their families, the transforms of their values, and their places in a row of floats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

__all__ = ["COUNTS", "DF", "NUMBERS", "Cell", "Column", "Family", "Row", "Transform"]

Family = Literal["gaussian", "laplace", "student-t", "poisson", "negative-binomial", "bernoulli", "categorical"]
"""Distribution of a column given its features."""
Transform = Literal["identity", "log", "logit", "knots"]
"""Monotone map of a column of numbers before it is standardised."""
Cell = str | int | float | bool
"""A value of a category."""

NUMBERS: tuple[Family, ...] = ("gaussian", "laplace", "student-t")
"""Families of real values, which have a σ."""
COUNTS: tuple[Family, ...] = ("poisson", "negative-binomial")
"""Families of the integers 0, 1, 2, ..."""
DF = 4.0
"""Degrees of freedom of the Student-t family."""
LARGEST = 1e30


@final
@dataclass(frozen=True)
class Column:
    r"""A column of a table.

    A real value x is standardised after a monotone transform: :math:`y = (t(x) - m) / s`. The density of x is that of y
    times the slope :math:`t'(x) / s`. The transforms are ``identity``; ``log``, for x > 0; ``logit``, for 0 < x < 1;
    ``knots``, linear between pairs (x, t), and beyond the ends as between the last two. A count k is written as
    :math:`(\log(1 + k) - m) / s`.

    Args:
        name: of the column.
        family: distribution of its values, given the latents.
        dtype: pandas' name of its dtype.
        categories: values of a ``categorical`` or ``bernoulli`` column, in order.
        other: whether the last category stands for all values that are not named.
        ordered: whether the dtype is an ordered categorical.
        time: of points of time, the seconds that 1 stands for, from 1970 on; 0 for other values.
        transform: t.
        knots: of ``knots``: at least two pairs, both numbers increasing.
        shift: m.
        scale: s.
        low: the least value seen.
        high: the largest value seen.
        decimals: decimal places of the values; None where they are not rounded.
        missing: share of the values that are missing.

    Raises:
        ValueError: categories, knots or the scale do not fit the family.

    >>> column = Column("income", "gaussian", transform="log", shift=10.0, scale=2.0)
    >>> y = column.encode(torch.tensor([math.exp(12.0)]))
    >>> y, column.decode(y).log()
    (tensor([1.]), tensor([12.]))
    """

    name: str
    family: Family
    dtype: str = "float64"
    categories: tuple[Cell, ...] = ()
    other: bool = False
    ordered: bool = False
    time: float = 0.0
    transform: Transform = "identity"
    knots: tuple[tuple[float, float], ...] = ()
    shift: float = 0.0
    scale: float = 1.0
    low: float = -LARGEST
    high: float = LARGEST
    decimals: int | None = None
    missing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no column can be."""
        least = {"bernoulli": 2, "categorical": 2}.get(self.family, 0)
        most = {"bernoulli": 2, "categorical": math.inf}.get(self.family, 0)
        if not least <= len(self.categories) <= most:
            raise ValueError(f"column {self.name}: {self.family} got {len(self.categories)} categories, needs {least} or more")
        if not (0 < self.scale < math.inf and math.isfinite(self.shift)):
            raise ValueError(
                f"column {self.name} needs a finite shift and a finite scale above 0, got {self.shift}, {self.scale}"
            )
        rising = all(a < c and b < d for (a, b), (c, d) in zip(self.knots, self.knots[1:], strict=False))
        if (self.transform == "knots") != (len(self.knots) >= 2) or not rising:
            raise ValueError(
                f"column {self.name}: knots are two or more rising pairs, for the transform knots; got {self.knots[:3]}"
            )

    @property
    def width(self) -> int:
        """Number of floats that a value is written as, without its mask."""
        return len(self.categories) if self.family == "categorical" else 1

    @property
    def is_number(self) -> bool:
        """Whether values are real numbers, with a density."""
        return self.family in NUMBERS

    @property
    def is_discrete(self) -> bool:
        """Whether values have a probability, in nats or bits."""
        return not self.is_number

    def encode(self, x: Tensor) -> Tensor:
        """Standardised form of numbers or counts."""
        if self.family in COUNTS:
            t = torch.log1p(x)
        elif self.transform == "log":
            t = torch.log(x)
        elif self.transform == "logit":
            t = torch.logit(x)
        else:
            t = x if self.transform == "identity" else self._through(x, 0)
        return (t - self.shift) / self.scale

    def decode(self, y: Tensor) -> Tensor:
        """The numbers or counts that have this standardised form."""
        t = y * self.scale + self.shift
        if self.family in COUNTS:
            return torch.round(torch.expm1(t)).clamp_min(0)
        if self.transform == "log":
            return torch.exp(t)
        if self.transform == "logit":
            return torch.sigmoid(t)
        return t if self.transform == "identity" else self._through(t, 1)

    def _through(self, value: Tensor, given: int) -> Tensor:
        """Linear between knots, from the first numbers to the second or back."""
        table = torch.tensor(self.knots, dtype=value.dtype, device=value.device)
        source, target = table[:, given].contiguous(), table[:, 1 - given]
        piece = torch.bucketize(value.detach().contiguous(), source[1:-1])
        slope = (target[1:] - target[:-1]) / (source[1:] - source[:-1])
        return target[piece] + (value - source[piece]) * slope[piece]


@final
class Row:
    """Places of columns in a row of floats: real values, then counts, yes or no, one-hot categories, and all masks.

    A mask is 1 where the value is missing; the value's floats are then 0. The features that a decoder gives have the same
    order: a location for each real value, a log-mean for each count, a logit for each yes or no and for each category.

    >>> row = Row([Column("size", "gaussian"), Column("sex", "bernoulli", categories=("f", "m"))])
    >>> row.width, row.features, row.places
    (4, 2, (slice(0, 1, None), slice(1, 2, None)))
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        order: tuple[Family, ...] = (*NUMBERS, *COUNTS, "bernoulli", "categorical")
        blocks = [[i for i, column in enumerate(self.columns) if column.family == family] for family in order]
        self.numbers, self.counts = blocks[: len(NUMBERS)], blocks[len(NUMBERS) : -2]
        self.binaries, self.categories = blocks[-2:]
        places, at = {}, 0
        for i in (i for block in blocks for i in block):
            places[i] = slice(at, at + self.columns[i].width)
            at += self.columns[i].width
        self.places = tuple(places[i] for i in range(len(self.columns)))
        self.features = at
        self.owners = torch.tensor([i for i, place in places.items() for _ in range(place.stop - place.start)])
        """Number of the column that each float belongs to, but for the masks."""
        sizes = [self.columns[i].width for i in self.categories]
        self.most = max(sizes, default=0)
        """The largest number of categories."""
        filled = [torch.arange(size) + k * self.most for k, size in enumerate(sizes)]
        self.filled = torch.cat(filled) if filled else torch.zeros(0, dtype=torch.int64)
        """Places of the categories in a table of columns × the largest number of categories."""

    @property
    def width(self) -> int:
        """Number of floats in a row."""
        return self.features + len(self.columns)

    def log_slopes(self, y: Tensor) -> Tensor:
        r"""Log dy/dx of the real values, at y ``(..., numbers)``: added to the log-density of y it gives that of x.

        >>> row = Row([Column("income", "gaussian", transform="log", scale=2.0)])
        >>> row.log_slopes(torch.tensor([[6.0]]))          # x = e^12, dy/dx = 1 / 2x
        tensor([[-12.6931]])
        """
        scale, shift, log, logit, ends, slopes = (each.to(y.device) for each in self._tables)
        t = y.double() * scale + shift
        slope = torch.where(log, -t, torch.where(logit, softplus(t) + softplus(-t), 0.0)) - scale.log()
        piece = torch.searchsorted(ends, t.detach().reshape(-1, len(scale)).T.contiguous())
        return (slope + torch.gather(slopes, 1, piece).T.reshape(t.shape)).to(y.dtype)

    @cached_property
    def _tables(self) -> tuple[Tensor, ...]:
        """For columns of real values: s, m, whether the transform is log or logit, inner knots and log dt/dx between them."""
        chosen = [self.columns[i] for block in self.numbers for i in block]
        knots = [torch.tensor(column.knots or ((0.0, 0.0), (1.0, 1.0)), dtype=torch.float64) for column in chosen]
        steps = [(table[1:] - table[:-1]) for table in knots]
        most = max((len(each) for each in steps), default=1)
        ends = [pad(table[1:-1, 1], (0, most - len(table) + 1), value=math.inf) for table in knots]
        slopes = [pad((each[:, 1] / each[:, 0]).log(), (0, most - len(each))) for each in steps]
        return (
            torch.tensor([column.scale for column in chosen], dtype=torch.float64),
            torch.tensor([column.shift for column in chosen], dtype=torch.float64),
            torch.tensor([column.transform == "log" for column in chosen]),
            torch.tensor([column.transform == "logit" for column in chosen]),
            torch.stack(ends) if ends else torch.zeros(0, 0),
            torch.stack(slopes) if slopes else torch.zeros(0, 1),
        )

    def masks(self, x: Tensor) -> Tensor:
        """Whether each column's value is missing, ``(..., columns)``."""
        return x[..., self.features :] > 0.5
