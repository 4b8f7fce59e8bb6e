"""Types of a table's columns: found in a data frame, kept with the model, and used to write rows as floats and back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, final

import numpy as np
import numpy.typing as npt
import torch

from sigma_vae.columns import COUNTS, DF, Cell, Column, Family, Row, Transform

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableSchema", "Unknown"]

Unknown = Literal["error", "other"]
"""How to read a value that the model has no category for: as an error, or a column's other category or a missing value."""
Numbers = npt.NDArray[np.float64]

MOST_CATEGORIES = 60
"""Categories of a column; rarer ones than the first 59 become "other"."""
FEW_INTEGERS = 10
"""Integers with so few different values are categories."""
MOST_COUNT = 1000
"""Largest value of a column that may be counts."""
KNOTS = (5, 9, 17, 33)
"""Numbers of knots that are tried."""
LEAST_PER_KNOT = 8
MOST_DECIMALS = 6
TIME_UNITS = (86_400.0, 3_600.0, 60.0, 1.0)
"""Seconds in a day, an hour and a minute: times are counted in the largest that all are whole numbers of."""
OTHER = "other"


@final
@dataclass(frozen=True)
class TableSchema:
    """Columns of a table, and what was left out.

    Rows are written as floats by :meth:`encode`, which :class:`~sigma_vae.likelihoods.mixed.Mixed` reads, and turned back
    into a data frame of the same dtypes by :meth:`decode`.

    Args:
        columns: in the order of the data frame.
        left_out: names of the other columns, and why.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"size": [1.5, 2.5, None, 4.0] * 10, "sex": ["f", "m", "m", "f"] * 10, "unit": ["cm"] * 40})
    >>> schema = TableSchema.infer(frame)
    >>> [(column.name, column.family) for column in schema.columns], schema.left_out
    ([('size', 'gaussian'), ('sex', 'bernoulli')], {'unit': 'constant'})
    >>> schema.decode(schema.encode(frame), missing=True).equals(frame[["size", "sex"]])
    True
    """

    columns: tuple[Column, ...]
    left_out: dict[str, str]

    @classmethod
    def infer(
        cls,
        frame: "pd.DataFrame",
        rows: npt.NDArray[np.int64] | None = None,
        *,
        families: Mapping[str, Family] | None = None,
        exclude: Sequence[str] = (),
    ) -> "TableSchema":
        """Find the columns' families.

        Text, categoricals and booleans are categories (two of them: Bernoulli), and so are integers with ten values or
        fewer. Dates are numbers, in seconds. The transform of a number, and whether integers from 0 are counts, is what
        makes held-out values of the column likeliest, by two-fold cross-validation of its distribution alone. Constant
        columns and identifiers (text or integers that differ in every row) are left out.

        Args:
            frame: the data.
            rows: numbers of the training rows, from which transforms are found; categories are found in all rows.
            families: families of columns, in place of the inferred ones: a column that would be left out is kept.
            exclude: names of columns to leave out.

        Raises:
            ValueError: a name does not exist, a column does not fit its family, or no column is left.
        """
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        return cls.of_columns(frame.columns.tolist(), frame.__getitem__, rows, families=families, exclude=exclude)

    @classmethod
    def of_columns(
        cls,
        names: Sequence[str],
        read: Callable[[str], "pd.Series"],
        rows: npt.NDArray[np.int64] | None = None,
        *,
        families: Mapping[str, Family] | None = None,
        exclude: Sequence[str] = (),
    ) -> "TableSchema":
        """Find the families of columns that are read one after the other, as :meth:`infer` does.

        Args:
            names: of all columns.
            read: gives the values of a column; called once for each, but for those that are excluded.
            rows: see :meth:`infer`, as for the rest.
            families: likewise.
            exclude: likewise.

        Raises:
            ValueError: as for :meth:`infer`.
        """
        families = dict(families or {})
        if unknown := [name for name in (*families, *exclude) if name not in names]:
            raise ValueError(f"there is no column {unknown[0]!r}; the columns are {', '.join(names)}")
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"a table needs a name of its own for each column, got {twice[0]!r} twice; rename one")
        columns, left_out = [], {}
        for name in names:
            if name in exclude:
                left_out[name] = "excluded"
                continue
            values = read(name)
            if (why := None if name in families else _useless(values)) is not None:
                left_out[name] = why
                continue
            columns.append(_column(name, values, rows, families.get(name)))
        if not columns:
            told = ", ".join(f"{name} ({why})" for name, why in left_out.items())
            raise ValueError(f"a table needs a column that varies, got {told or 'none'}; name families of those to keep")
        return cls(tuple(columns), left_out)

    @property
    def row(self) -> Row:
        """Places of the columns in a row of floats."""
        return Row(self.columns)

    def words(self) -> str:
        """The columns by family, and those that were left out."""
        families = dict.fromkeys(column.family for column in self.columns)
        told = [f"{family}: {', '.join(c.name for c in self.columns if c.family == family)}" for family in families]
        told += [f"left out: {', '.join(f'{name} ({why})' for name, why in self.left_out.items())}"] if self.left_out else []
        return "; ".join(told)

    def encode(
        self, frame: "pd.DataFrame", *, unknown: Unknown = "error", columns: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Rows as float32 ``(n, row.width)``; missing values are 0, with their mask 1.

        Args:
            frame: data with these columns, in any order, and perhaps others.
            unknown: of a value without a category: an error; or the column's "other" category, a missing value where it
                has none.
            columns: names of the columns to read; the others are missing. All unless given.

        Raises:
            ValueError: a column is missing, has another dtype, or a value without a category.
        """
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        row = self.row
        x = torch.zeros(len(frame), row.width)
        for i, (column, place) in enumerate(zip(self.columns, row.places, strict=True)):
            if columns is not None and column.name not in columns:
                x[:, row.features + i] = 1
                continue
            if column.name not in frame.columns:
                raise ValueError(f"the data need the column {column.name!r}, got {', '.join(frame.columns)}; add it")
            values, missing = _written(column, frame[column.name], unknown)
            x[:, place] = values
            x[:, row.features + i] = missing
        return x

    def decode(self, x: torch.Tensor, *, missing: bool = False) -> "pd.DataFrame":
        """A data frame of rows ``(n, row.width)``: in the dtypes, decimals and ranges of the data.

        Args:
            x: rows; of categories the largest counts.
            missing: leave values missing whose mask is 1.
        """
        import pandas as pd

        row, x = self.row, x.detach().cpu()
        masks = row.masks(x).numpy() if missing else np.zeros((len(x), len(self.columns)), dtype=bool)
        read = zip(self.columns, row.places, masks.T, strict=True)
        return pd.DataFrame({column.name: _read(column, x[:, place], mask) for column, place, mask in read})

    def with_missing(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same rows, each column with values missing at random, as often as in the data."""
        row, x = self.row, x.clone()
        rates = torch.tensor([column.missing for column in self.columns])
        x[:, row.features :] = (torch.rand(len(x), len(rates), generator=generator) < rates).to(x)
        return x


def _useless(values: "pd.Series") -> str | None:
    """Why a column is left out, if it is."""
    present = values.dropna()
    different = present.nunique()
    if different < 2:
        return "constant" if different else "empty"
    kind = _kind(values)
    if kind == "category" and different > MOST_CATEGORIES and different > 0.5 * len(present):
        return "identifier or text"
    if kind == "integer" and len(present) > 2 and different == len(present):
        steps = np.diff(np.sort(present.to_numpy(np.float64)))
        if steps.max() == steps.min():
            return "identifier"
    return None


def _kind(values: "pd.Series") -> Literal["category", "time", "integer", "number"]:
    import pandas as pd
    from pandas.api import types

    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype) or types.is_bool_dtype(dtype):
        return "category"
    if types.is_datetime64_any_dtype(dtype):
        return "time"
    if types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
        present = values.dropna().to_numpy(np.float64)
        whole = bool(np.isfinite(present).all() and (present == np.round(present)).all())
        return "integer" if whole and len(present) else "number"
    return "category"


def _column(name: str, values: "pd.Series", rows: npt.NDArray[np.int64] | None, family: Family | None) -> Column:
    """A column with the given family, or the one that suits its values."""
    missing = float(values.isna().mean())
    kind = _kind(values)
    few = kind == "integer" and values.nunique() <= FEW_INTEGERS
    few = few and not (family is None and _are_counts(values))
    if family in ("categorical", "bernoulli") or (family is None and (kind == "category" or few)):
        return _category(name, values, missing)
    if kind == "category":
        raise ValueError(f"column {name}: {family} needs numbers, got {values.dtype}; take categorical")
    train = (values if rows is None else values.iloc[rows]).dropna()
    every: Numbers = _seconds(values.dropna()) if kind == "time" else np.asarray(values.dropna(), dtype=np.float64)
    unit = next((unit for unit in TIME_UNITS if not np.any(every % unit)), TIME_UNITS[-1]) if kind == "time" else 0.0
    numbers: Numbers = _seconds(train) / unit if kind == "time" else np.asarray(train, dtype=np.float64)
    every = every / unit if unit else every
    if not np.isfinite(every).all():
        raise ValueError(f"column {name} needs finite numbers, got infinite ones; make them missing")
    if len(numbers) < 2 or numbers.min() == numbers.max():
        raise ValueError(f"column {name} is constant in the training rows; leave it out")
    column = Column(
        name,
        family or "gaussian",
        dtype=str(values.dtype),
        time=unit,
        low=float(every.min()),
        high=float(every.max()),
        decimals=_decimals(every),
        missing=missing,
    )
    return _fitted(column, numbers, chosen=family is not None)


def _are_counts(values: "pd.Series") -> bool:
    """Whether held-out integers are likelier as counts than as categories."""
    numbers: Numbers = np.asarray(values.dropna(), dtype=np.float64)
    if numbers.min() != 0 or numbers.max() < 3:
        return False
    halves = _halves(numbers)
    column = Column("count", "poisson")

    def of_categories(train: Numbers, test: Numbers) -> float:
        counts = np.bincount(train.astype(int), minlength=int(numbers.max()) + 1) + 0.5
        return float(np.log(counts / counts.sum())[test.astype(int)].sum())

    as_counts = [sum(_held_out(replace(column, family=family), *pair) for pair in (halves, halves[::-1])) for family in COUNTS]
    return max(as_counts) > sum(of_categories(*pair) for pair in (halves, halves[::-1]))


def _category(name: str, values: "pd.Series", missing: float) -> Column:
    import pandas as pd

    dtype = values.dtype
    counts = values.value_counts()
    counts = counts[counts > 0]
    ordered = False
    if isinstance(dtype, pd.CategoricalDtype):
        named, ordered, word = [each for each in dtype.categories if each in counts.index], bool(dtype.ordered), "category"
    else:
        named, word = sorted(counts.index.tolist(), key=lambda each: (str(type(each)), each)), str(dtype)
    other = len(named) > MOST_CATEGORIES
    if other:
        kept = set(counts.index[: MOST_CATEGORIES - 1])
        named = [each for each in named if each in kept]
    cells = tuple(_cell(name, each) for each in named)
    if len(cells) + other < 2:
        raise ValueError(f"column {name} needs two categories, got {len(cells)}; leave it out")
    family: Family = "bernoulli" if len(cells) == 2 and not other else "categorical"
    return Column(
        name, family, dtype=word, categories=cells + ((OTHER,) if other else ()), other=other, ordered=ordered, missing=missing
    )


def _cell(name: str, value: Any) -> Cell:
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"column {name} needs text, numbers or yes and no as categories, got {value!r}; write it as text")
    return value


def _seconds(values: "pd.Series") -> Numbers:
    """Points of time as seconds since 1970."""
    import pandas as pd

    zoned = getattr(values.dt, "tz", None) is not None
    plain = values.dt.tz_convert("UTC").dt.tz_localize(None) if zoned else values
    found: Any = ((plain - pd.Timestamp(0)) / pd.Timedelta(seconds=1)).to_numpy(np.float64)
    return cast(Numbers, found)


def _decimals(values: Numbers) -> int | None:
    """The fewest decimal places in which the values are exact; None for more than six."""
    for places in range(MOST_DECIMALS + 1):
        if np.allclose(values, np.round(values, places), rtol=1e-12, atol=1e-9 * 10.0**-places):
            return places
    return None


def _fitted(column: Column, values: Numbers, *, chosen: bool) -> Column:
    """The column with the transform, and where it is open the family, under which held-out values are likeliest."""
    candidates = list(_candidates(column, values, chosen=chosen))
    if len(candidates) == 1 or len(values) < 20:
        return _standardised(candidates[0], values)
    halves = _halves(values)
    scores = [sum(_held_out(each, *pair) for pair in (halves, halves[::-1])) for each in candidates]
    best = int(np.argmax(scores))
    return _standardised(candidates[best], values)


def _halves(values: Numbers) -> tuple[Numbers, Numbers]:
    """Two halves at random, of at most 20 000 values."""
    order = np.random.RandomState(0).permutation(len(values))[:20_000]
    return values[order[::2]], values[order[1::2]]


def _candidates(column: Column, values: Numbers, *, chosen: bool) -> list[Column]:
    """Columns to choose from, not yet standardised."""
    if column.family in COUNTS:
        if values.min() < 0 or column.decimals != 0:
            raise ValueError(
                f"column {column.name}: {column.family} needs counts 0, 1, 2, ..., got values like {values.min():g}"
            )
        return [column]
    found = [column]
    if values.min() > 0:
        transforms: tuple[Transform, ...] = ("log", "logit") if values.max() < 1 else ("log",)
        found += [replace(column, transform=each) for each in transforms]
    found += [_with_knots(column, values, n) for n in KNOTS if len(values) >= LEAST_PER_KNOT * n]
    if not chosen and not column.time and column.decimals == 0 and values.min() >= 0 and values.max() <= MOST_COUNT:
        found += [replace(column, family=family) for family in COUNTS]
    return [each for i, each in enumerate(found) if each not in found[:i]]


def _with_knots(column: Column, values: Numbers, knots: int) -> Column:
    """Knots at quantiles, from x to the normal score of its rank; between two values that can be told apart."""
    from scipy.special import ndtri

    step = 0.0 if column.decimals is None else 10.0**-column.decimals
    ordered = np.sort(values)
    at = np.quantile(ordered, np.linspace(0, 1, knots)[1:-1])
    at = (np.floor(np.round(at / step, 6)) + 0.5) * step if step else at
    margin = step / 2 or (ordered[-1] - ordered[0]) * 1e-3
    at = np.unique(np.concatenate([[ordered[0] - margin], at, [ordered[-1] + margin]]))
    rank = np.searchsorted(ordered, at, side="right")
    score = ndtri((rank + 0.5) / (len(values) + 1))
    kept = np.concatenate([[True], np.diff(score) > 1e-9]) & np.concatenate([[True], np.diff(at) > 1e-9 * np.abs(at[1:])])
    if kept.sum() < 2:
        return column
    pairs = tuple((float(a), float(s)) for a, s in zip(at[kept], score[kept], strict=True))
    return replace(column, transform="knots", knots=pairs)


def _held_out(column: Column, train: Numbers, test: Numbers) -> float:
    """Log-probability of held-out values under the column's distribution alone, fitted to others; nats."""
    from scipy import stats

    if column.family in COUNTS:
        mean, variance = max(float(train.mean()), 1e-3), float(train.var())
        if column.family == "poisson" or variance <= mean:
            return float(stats.poisson.logpmf(test, mean).sum())
        r = mean**2 / (variance - mean)
        return float(stats.nbinom.logpmf(test, r, r / (r + mean)).sum())
    if column.transform == "knots":
        column = _with_knots(replace(column, transform="identity", knots=()), train, len(column.knots))
    if train.min() == train.max():
        return -math.inf
    fitted = _standardised(column, train)
    y = fitted.encode(torch.tensor(test))
    laws: dict[Family, Any] = {"laplace": stats.laplace.logpdf, "student-t": lambda y: stats.t.logpdf(y, DF)}
    of_standardised = torch.from_numpy(laws.get(column.family, stats.norm.logpdf)(y.numpy()))
    density = of_standardised + Row([fitted]).log_slopes(y[:, None])[:, 0]
    if column.decimals is not None:  # as the probability of a rounded value, which is at most 1
        density = (density - column.decimals * math.log(10)).clamp(max=0)
    return float(density.sum())


def _standardised(column: Column, values: Numbers) -> Column:
    """The column with mean and std of its transformed values."""
    raw = replace(column, shift=0.0, scale=1.0).encode(torch.tensor(values))
    scale = float(raw.std(correction=0))
    return replace(column, shift=float(raw.mean()), scale=scale if scale > 0 else 1.0)


def _written(column: Column, values: "pd.Series", unknown: Unknown) -> tuple[torch.Tensor, torch.Tensor]:
    """A column's floats ``(n, width)``, and whether each value is missing ``(n,)``."""
    if column.categories:
        codes = _codes(column, values, unknown)
        missing = torch.from_numpy(codes < 0)
        known = torch.from_numpy(np.maximum(codes, 0))
        if column.family == "bernoulli":
            return known[:, None].float() * ~missing[:, None], missing
        return torch.nn.functional.one_hot(known, column.width).float() * ~missing[:, None], missing
    numbers = _as_numbers(column, values)
    missing = torch.from_numpy(np.isnan(numbers))
    x = torch.tensor(np.nan_to_num(numbers, nan=1.0))
    if column.family in COUNTS and bool((((x < 0) | (x != x.round())) & ~missing).any()):
        raise ValueError(f"column {column.name} needs counts 0, 1, 2, ..., got {float(x[(x < 0) | (x != x.round())][0]):g}")
    if column.transform in ("log", "logit"):  # a value outside of the domain is taken to its border
        tiny = 1e-3 * column.low
        x = x.clamp(min=tiny, max=1 - tiny if column.transform == "logit" else None)
    return column.encode(x).float().masked_fill(missing, 0)[:, None], missing


def _codes(column: Column, values: "pd.Series", unknown: Unknown) -> npt.NDArray[np.int64]:
    """Numbers of the categories, −1 where missing."""
    import pandas as pd

    named = column.categories[:-1] if column.other else column.categories
    numbers = {each: i for i, each in enumerate(named)}
    others = len(named) if column.other else -1
    places, different = pd.factorize(values)
    codes = np.full(len(different) + 1, -1, dtype=np.int64)  # the last one is of missing values
    for i, value in enumerate(different.tolist()):
        code = numbers.get(value, _code_of_text(numbers, value))
        if code is None and unknown == "error" and not column.other:
            known = ", ".join(map(str, named[:10])) + (" ..." if len(named) > 10 else "")
            raise ValueError(
                f"column {column.name} has the categories {known}, got {value!r} in row {int(np.argmax(places == i))}; correct it, or"
                ' read such values as other or missing: unknown="other"'
            )
        codes[i] = others if code is None else code
    found: npt.NDArray[np.int64] = codes[places]
    return found


def _code_of_text(numbers: Mapping[Cell, int], value: object) -> int | None:
    """Categories that a file wrote in another way: 1.0 for 1, "True" for yes."""
    texts = {str(each): code for each, code in numbers.items()}
    if isinstance(value, float) and value.is_integer() and str(int(value)) in texts:
        return texts[str(int(value))]
    return texts.get(str(value))


def _as_numbers(column: Column, values: "pd.Series") -> Numbers:
    import pandas as pd

    if column.time:
        try:
            return np.asarray(_seconds(pd.to_datetime(values)) / column.time, dtype=np.float64)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"column {column.name} needs points of time, got {values.dtype}: {error}") from error
    found = pd.to_numeric(values, errors="coerce")
    if bad := values[found.isna() & values.notna()].tolist():
        raise ValueError(f"column {column.name} needs numbers, got {bad[0]!r} ({values.dtype}); correct it")
    numbers = found.astype("Float64").to_numpy(np.float64, na_value=np.nan)
    if np.isinf(numbers).any():
        raise ValueError(f"column {column.name} needs finite numbers, got infinite ones; make them missing")
    return cast(Numbers, numbers)


def _read(column: Column, x: torch.Tensor, missing: npt.NDArray[np.bool_]) -> "pd.Series":
    """A column of a data frame, of its own dtype."""
    import pandas as pd

    if column.categories:
        codes = (x[:, 0] > 0.5).long() if column.family == "bernoulli" else x.argmax(1)
        cells = np.empty(len(column.categories), dtype=object)
        cells[:] = column.categories
        plain = pd.Series(cells[codes.numpy()], dtype=object).mask(missing)
        if column.dtype == "category":
            return plain.astype(pd.CategoricalDtype(list(column.categories), ordered=column.ordered))
        return _cast(plain, column.dtype)
    numbers = column.decode(x[:, 0].double()).numpy().clip(column.low, column.high)
    numbers = numbers if column.decimals is None else np.round(numbers, column.decimals)
    if column.time:
        times = pd.to_datetime(pd.Series(np.round(numbers * column.time * 1e6), dtype="float64").astype("int64"), unit="us")
        zoned = times.dt.tz_localize("UTC") if "," in column.dtype else times
        return _cast(zoned.mask(missing), column.dtype)
    return _cast(pd.Series(numbers).mask(missing), column.dtype)


def _cast(values: "pd.Series", dtype: str) -> "pd.Series":
    """The values in a dtype; in one that holds missing values where some are, and this one does not."""
    if values.isna().any() and dtype.startswith(("int", "uint")):
        dtype = dtype.replace("uint", "UInt").replace("int", "Int")
    plain: Any = values if values.isna().any() and dtype == "bool" else values.astype(cast(Any, dtype))
    return cast("pd.Series", plain)
