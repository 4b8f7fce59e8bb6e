"""Statistics of a study's table: spread over seeds, paired differences, and the best of a grid by validation."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from sigma_vae.evaluation.base import Column
from sigma_vae.evaluation.suite import columns

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ELBO",
    "Chosen",
    "Difference",
    "chosen_on_validation",
    "cost",
    "mean_difference",
    "paired_difference",
    "shown",
    "summary",
]

ELBO = "elbo_post_hoc_nats"
KINDS = {"density": "densities", "level": "levels"}
"""The two kinds of ELBO, and their plurals."""
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """A mean over pairs with its 95 % interval (Student's t); the ends are None for a single pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def seeds(self) -> str:
        """The number of pairs, in words.

        >>> Difference(1.0, None, None, 1).seeds, Difference(1.0, 0.5, 1.5, 2).seeds
        ('1 seed', '2 seeds')
        """
        return f"{self.pairs} seed{'s' * (self.pairs != 1)}"


class Chosen(NamedTuple):
    """A place in a grid chosen by its mean on the validation split, with its numbers on the test split."""

    place: dict[str, Any]
    test: "pd.Series[float]"


def summary(table: "pd.DataFrame", by: Sequence[str]) -> "pd.DataFrame":
    """Format mean ± std over seeds on the test split, a row for each place of the grid and each prior.

    A place whose cells have all failed has one row without a prior. Bounds of densities and of levels do not compare,
    so they have columns of their own where a study has both.

    Args:
        table: of :func:`~sigma_vae.study.runner.collect`.
        by: the axes that make a place: all but the seed.

    Returns:
        Columns: the axes, ``prior``, ``seeds`` (how many are finished), ``failed`` (how many are
        not), and the columns of the metrics, in words.
    """
    import pandas as pd

    rows, metrics = [], shown((table := _observed_apart(table)).columns)
    for place, group in table.groupby(list(by), sort=False, dropna=False) if by else [((), table)]:
        about: dict[str, Any] = dict(zip(by, place, strict=True))
        failed = group.loc[group["status"] != "done", "key"].nunique()
        there = _test(group)
        for prior, ours in there.groupby("prior", sort=False) if len(there) else [("", there)]:
            counts = {"prior": prior, "seeds": len(ours), "failed": failed}
            rows.append(about | counts | {name: _spread(ours[name], column.digits) for name, column in metrics.items()})
    return pd.DataFrame(rows)


def shown(names: Iterable[str]) -> dict[str, Column]:
    """Select the columns that metrics show in studies, with the ELBO of densities and of levels apart.

    >>> [column.title for column in shown(["elbo_post_hoc_nats.density", "elbo_post_hoc_nats.level"]).values()]
    ['ELBO of densities, nats, refitted σ', 'ELBO of levels, nats, refitted σ']
    """
    names = list(names)
    apart = {f"{ELBO}.{kind}": plural for kind, plural in KINDS.items() if f"{ELBO}.{kind}" in names}
    found: dict[str, Column] = {}
    for path, column in columns([*names, ELBO] if apart else names).items():
        if path == ELBO and apart:
            titles = {name: column.title.replace("ELBO", f"ELBO of {plural}", 1) for name, plural in apart.items()}
            found |= {name: Column(name, title, column.digits) for name, title in titles.items()}
        else:
            found[path] = column
    return found


def _observed_apart(table: "pd.DataFrame") -> "pd.DataFrame":
    """Put the ELBO of densities and of levels in two columns, where there are both."""
    there = {ELBO, "observes"} <= set(table.columns)
    kinds: set[str] = set(table.loc[table[ELBO].notna(), "observes"]) if there else set()
    if len(kinds) < 2:
        return table
    apart = {f"{ELBO}.{kind}": table[ELBO].where(table["observes"] == kind) for kind in sorted(kinds)}
    return table.drop(columns=ELBO).assign(**apart)


def paired_difference(table: "pd.DataFrame", metric: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Difference:
    """Subtract theirs from ours on the test split, seed by seed, so that the effect of the seed cancels.

    Args:
        table: of :func:`~sigma_vae.study.runner.collect`.
        metric: a column.
        ours: which rows: columns and their values.
        theirs: which rows ours are compared with.

    Raises:
        ValueError: there are no pairs, or several rows of one seed.
    """
    both = _of(table, ours, metric).to_frame("ours").join(_of(table, theirs, metric).rename("theirs"), how="inner").dropna()
    if both.empty:
        raise ValueError(f"no seed has both {ours} and {theirs} with a number of {metric}")
    return mean_difference((both["ours"] - both["theirs"]).tolist())


def mean_difference(differences: Sequence[float]) -> Difference:
    """Compute the mean over pairs and its 95 % interval by Student's t.

    Of normal differences it contains the mean in 95 of 100 studies, whatever the number of pairs. (The percentile
    bootstrap of three pairs is their range, and contains it in 76.) So a rule that holds where the whole interval is on
    one side of a bar is wrong in 2.5 of 100 studies at most.

    >>> [round(number, 3) for number in mean_difference([1.0, 3.0, 2.0])]
    [2.0, -0.484, 4.484, 3]
    """
    values = np.asarray(differences, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Difference(mean, None, None, n)
    half = float(stats.t.ppf(0.5 + 0.5 * CONFIDENCE, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def chosen_on_validation(table: "pd.DataFrame", axis: str, candidates: Sequence[Any], metric: str, *, highest: bool) -> Chosen:
    """Choose the best of a grid as in tuning: by the mean over seeds on the validation split.

    Args:
        table: of :func:`~sigma_vae.study.runner.collect`, of one prior.
        axis: the axis that is tuned.
        candidates: its values.
        metric: a column that both splits have.
        highest: whether higher is better.

    Raises:
        ValueError: no candidate has a number on the validation split.
    """
    known = table[(table["status"] == "done") & table[axis].isin(list(candidates))]
    means = known[known["split"] == "validation"].groupby(axis, sort=False)[metric].mean().dropna()
    if means.empty:
        raise ValueError(f"none of {list(candidates)} has a number of {metric} on the validation split")
    best = means.idxmax() if highest else means.idxmin()
    test = _test(known[known[axis] == best])
    return Chosen({axis: best}, test.select_dtypes("number").mean())


def cost(table: "pd.DataFrame") -> dict[str, float]:
    """Count runs and core-hours of training and evaluation, failed runs included."""
    runs = table.drop_duplicates("key")
    return {"runs": len(runs), "core_hours": float(runs["core_seconds"].sum()) / 3600}


def _test(table: "pd.DataFrame") -> "pd.DataFrame":
    done = table[table["status"] == "done"]
    return done[done["split"] == "test"] if len(done) else done


def _of(table: "pd.DataFrame", where: dict[str, Any], metric: str) -> "pd.Series[float]":
    """The metric by seed."""
    rows = _test(table)
    for column, value in where.items():
        rows = rows[rows[column] == value]
    values = rows.set_index("seed")[metric]
    if values.index.has_duplicates:
        raise ValueError(f"{where} are several rows of one seed; say more: prior, and every axis")
    return values


def _spread(values: "pd.Series[float]", digits: int) -> str:
    known = values.dropna().to_numpy(dtype=float)
    if len(known) == 0:
        return ""
    std = known.std(ddof=1) if len(known) > 1 else math.nan
    return f"{known.mean():.{digits}f}" + (f" ± {std:.{digits}f}" if math.isfinite(std) else "")
