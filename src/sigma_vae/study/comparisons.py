"""A study as comparisons. Arms differ in their likelihood; settings differ in everything else but the seed."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from scipy import stats

from sigma_vae.evaluation.base import Column
from sigma_vae.evaluation.suite import columns
from sigma_vae.registry import register
from sigma_vae.runs.page import Section, Table
from sigma_vae.study.grid import Cell, StudySpec, cells, format_place, in_words
from sigma_vae.study.runner import tabulate

if TYPE_CHECKING:
    import pandas as pd

# -- statistics over seeds ---------------------------------------------------------------------------------------------


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


# -- arms and settings -------------------------------------------------------------------------------------------------

ARM = "arm"
"""Name of the column with the arm."""
BITS = "bits_per_dim_post_hoc"
MARGINAL_KL = "information.marginal_kl_at_least_nats"
PREDICTIONS = {"PSNR, dB": ("predictions.psnr_db", 2), "SSIM": ("predictions.ssim", 3)}
"""Quality of the best of several predictions of each clip: columns and decimal places."""
STANDARD, LEARNED = "standard", "learned"
OPTIMAL = "gaussian/optimal"
LIKELIHOOD = "model.likelihood"
LEAST_GRID = 3
"""Fewer fixed σ are no grid to tune over."""
OTHER_SEEDS = "chosen on the other seeds, as it was not measured on validation"
FIXED = re.compile(r"gaussian/(fixed|beta):(.+)")
FRECHET = re.compile(r"quality\.(.+)\.(samples\.means|frames|clips)\.frechet")


class Rival(NamedTuple):
    """The best of several arms, chosen without the numbers that it is compared by."""

    arm: str | None
    """None where there are too few to choose from; several names where the choice differs from seed to seed."""
    words: str = ""
    """The rule that chose it, and the arms that could not be chosen."""
    numbers: "pd.Series[float] | None" = None
    """Its metric on the test split, by seed."""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return math.nan if self.numbers is None else float(self.numbers.mean())


class Ended(NamedTuple):
    """A cell that has ended, in success or in failure."""

    cell: Cell
    error: str | None
    """None where it is done."""
    curve: list[tuple[int, float]]
    """Step and validation ELBO, with the cell's own σ."""

    @property
    def done(self) -> bool:
        """Whether it did not fail."""
        return self.error is None


def given_sigma(likelihood: str) -> float | None:
    """Return the σ that a Gaussian decoder is given; None where the decoder finds its own.

    >>> given_sigma("gaussian/fixed:0.5"), given_sigma("gaussian/beta:2"), given_sigma("gaussian/optimal")
    (0.5, 1.0, None)
    """
    found = FIXED.fullmatch(likelihood)
    if found is None:
        return None
    number = float(found[2])
    return number if found[1] == "fixed" else float((number / 2) ** 0.5)


def frechet_columns(table: "pd.DataFrame") -> dict[str, str]:
    """Find the column of the Fréchet distance of samples or predictions, for each set of features."""
    return {found[1]: found[0] for name in table.columns if (found := FRECHET.fullmatch(name))}


@final
@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the arm and the seed."""

    words: str
    """Its place in the grid, in words; empty where the study has one setting."""
    arms: dict[str, str]
    """The likelihood of each arm, by its label, in the order of the grid."""
    priors: tuple[str, ...]
    ended: dict[str, list[Ended]]
    """Ended cells by arm."""
    table: "pd.DataFrame"
    """Rows of :func:`~sigma_vae.study.runner.tabulate`, with the columns ``arm`` and ``seed``."""

    @property
    def plain(self) -> str:
        """The prior with which likelihoods are compared: N(0, I) where it was evaluated."""
        return STANDARD if STANDARD in self.priors else self.priors[0]

    @cached_property
    def fixed(self) -> dict[str, float]:
        """Arms with a given σ, in rising order."""
        given = {arm: sigma for arm, name in self.arms.items() if (sigma := given_sigma(name)) is not None}
        return dict(sorted(given.items(), key=lambda pair: pair[1]))

    def first(self, *likelihoods: str) -> str | None:
        """The first arm with the first of these likelihoods that the study has."""
        return next((arm for likelihood in likelihoods for arm, name in self.arms.items() if name == likelihood), None)

    @property
    def unit(self) -> str | None:
        """The arm with σ = 1."""
        return next((arm for arm, sigma in self.fixed.items() if sigma == 1), None)

    def values(self, arm: str | None, metric: str, prior: str | None = None, split: str = "test") -> "pd.Series[float]":
        """The metric by seed, with the plain prior unless given; empty where nothing is known."""
        rows = self.table
        if metric not in rows.columns:
            return rows.iloc[:0]["seed"].astype(float)
        chosen = rows[(rows[ARM] == arm) & (rows["prior"] == (prior or self.plain)) & (rows["split"] == split)]
        return chosen.set_index("seed")[metric].dropna()

    def mean(self, arm: str | None, metric: str, prior: str | None = None, split: str = "test") -> float:
        """The mean of the metric over seeds."""
        return float(self.values(arm, metric, prior, split).mean())

    def difference(self, metric: str, ours: str | None, theirs: str | None, prior: str | None = None) -> Difference | None:
        """Ours minus theirs, paired by seed, with the plain prior unless given; None where no seed has both."""
        prior = prior or self.plain
        both = (self.values(arm, metric, prior).index for arm in (ours, theirs))
        if not set.intersection(*map(set, both)):
            return None
        return paired_difference(self.table, metric, {ARM: ours, "prior": prior}, {ARM: theirs, "prior": prior})

    def complete(self, arms: Iterable[str], metric: str, prior: str, like: str | None, split: str = "test") -> list[str]:
        """Keep the arms that have a number for every seed of another arm; means over different seeds do not compare."""
        seeds = set(self.values(like, metric, prior, split).index)
        found = {arm: set(self.values(arm, metric, prior, split).index) for arm in arms}
        return [arm for arm, has in found.items() if has and has >= seeds]

    def tuned(self) -> Rival:
        """Choose the fixed σ, of three or more, with the highest ELBO."""
        return self.best(ELBO, self.plain, highest=True)

    def best(self, metric: str, prior: str, *, highest: bool) -> Rival:
        """Choose the fixed σ, of three or more, with the best metric."""
        return self.best_of(self.fixed, self.first(OPTIMAL), metric, prior, highest=highest, least=LEAST_GRID)

    def best_of(
        self, arms: Iterable[str], like: str | None, metric: str, prior: str, *, highest: bool, least: int = 1
    ) -> Rival:
        """Choose the arm with the best mean on the validation split, as in tuning, among those with all seeds of another.

        Where the metric was not measured there, the arm that each seed is compared with is chosen on the others.
        """
        arms = list(arms)
        tested = self.complete(arms, metric, prior, like)
        tuned = self.complete(tested, metric, prior, like, "validation")
        there = tuned if len(tuned) >= least else tested
        left_out = ", ".join(arm for arm in arms if arm not in there)
        words = f"; left out, as seeds are missing: {left_out}" if left_out else ""
        if len(there) < max(least, 1):
            return Rival(None, words)
        if there is tuned:
            sign = 1 if highest else -1
            best = max(there, key=lambda arm: sign * self.mean(arm, metric, prior, "validation"))
            return Rival(best, words, self.values(best, metric, prior))
        return self._best_on_other_seeds(there, metric, prior, highest, words)

    def _best_on_other_seeds(self, arms: Sequence[str], metric: str, prior: str, highest: bool, words: str) -> Rival:
        import pandas as pd

        table = pd.DataFrame({arm: self.values(arm, metric, prior) for arm in arms}).dropna()
        if len(table) < 2:
            return Rival(None, words)
        others = {seed: table.drop(index=seed).mean() for seed in table.index}
        chosen = {seed: str(means.idxmax() if highest else means.idxmin()) for seed, means in others.items()}
        numbers = pd.Series({seed: float(table.loc[seed, arm]) for seed, arm in chosen.items()})
        return Rival(" or ".join(arm for arm in arms if arm in chosen.values()), f"; {OTHER_SEEDS}{words}", numbers)

    def against(self, rival: Rival, metric: str, ours: str | None, prior: str | None = None) -> Difference | None:
        """Ours minus the rival's numbers, paired by seed; None where no seed has both."""
        mine = self.values(ours, metric, prior)
        pairs = [] if rival.numbers is None else (mine - rival.numbers).dropna().tolist()
        return mean_difference(pairs) if pairs else None

    @property
    def dims(self) -> float:
        """Number of dimensions of an example that the likelihood is over."""
        return float(self.table["dims"].dropna().iloc[0])

    def called(self, prior: str) -> str:
        """Name a prior; "standard" is called learned where the network learns its prior."""
        return LEARNED if prior == STANDARD and self.learns_prior else prior

    def curves(self, arm: str) -> dict[int, list[tuple[int, float]]]:
        """Step and validation ELBO of each seed."""
        return {ended.cell.config.seed: ended.curve for ended in self.of(arm) if ended.done and ended.curve}

    def observes(self, arm: str) -> str | None:
        """Whether the arm's ELBO is of a density or of levels; None where it has none."""
        known = self.values(arm, "observes")[self.values(arm, ELBO).index]
        return str(known.iloc[0]) if len(known) else None

    def of(self, arm: str) -> list[Ended]:
        """The arm's cells that have ended."""
        return self.ended.get(arm, [])

    @property
    def network(self) -> str:
        """Name of the network of the first run that has ended."""
        return next((done.cell.config.model.network for dones in self.ended.values() for done in dones), "")

    @property
    def is_flat(self) -> bool:
        """Whether the network has one layer of flat latents, as far as the registry knows."""
        return bool(register.network.fact(self.network, "latents", "flat") == "flat")

    @property
    def learns_prior(self) -> bool:
        """Whether the network learns its prior in training; an argument in its name may decide that."""
        if self.network not in register.network:
            return False
        chosen = inspect.signature(register.network.make(self.network)).parameters.get("learned_prior")
        return bool(register.network.fact(self.network, "learns_prior", False) if chosen is None else chosen.default)


def _label(cell: Cell, axis: str | None) -> str:
    """The arm of a cell."""
    return cell.config.model.likelihood if axis is None else in_words(cell.place[axis])


def settings(spec: StudySpec, out: Path) -> list[Setting]:
    """Read the study's settings, in the order of the grid, from the cells that have ended.

    Raises:
        ValueError: no cell has ended.
    """
    todo, axis = cells(spec), _axis(spec)
    table = tabulate(todo, out)
    if table.empty:
        raise ValueError(
            f"{out} has no cell of {spec.title!r} that has ended, so there is nothing to report; run the study first"
        )
    by_key = {cell.key: cell for cell in todo}
    ended = [_ended(by_key[row["key"]], row) for row in table.drop_duplicates("key").to_dict("records")]
    table[ARM] = [_label(by_key[key], axis) for key in table["key"]]
    table["seed"] = [by_key[key].config.seed for key in table["key"]]
    found = []
    for words in dict.fromkeys(_words(cell, axis) for cell in todo):
        arms = {_label(cell, axis): cell.config.model.likelihood for cell in todo if _words(cell, axis) == words}
        there = [done for done in ended if _words(done.cell, axis) == words]
        by_arm = {arm: [done for done in there if _label(done.cell, axis) == arm] for arm in arms}
        rows = table[table["key"].isin([done.cell.key for done in there])]
        found.append(Setting(words, arms, spec.priors, by_arm, rows))
    return found


def _ended(cell: Cell, row: Mapping[Any, Any]) -> Ended:
    """From the first of a cell's rows."""
    if row["status"] != "done":
        return Ended(cell, row["error"], [])
    points = row["curve"]
    return Ended(cell, None, [] if points is None else [(int(point["step"]), float(point["elbo_nats"])) for point in points])


def _words(cell: Cell, axis: str | None) -> str:
    return format_place({name: value for name, value in cell.place.items() if name not in (axis, "seed")})


def _axis(spec: StudySpec) -> str | None:
    """The last axis that sets the likelihood."""
    setting = [
        name
        for name, values in spec.axes.items()
        if name == LIKELIHOOD or (isinstance(values, dict) and any(LIKELIHOOD in settings for settings in values.values()))
    ]
    return setting[-1] if setting else None


# -- results of each place of a grid beside the paper's figures --------------------------------------------------------


PLOTS = "report-files"
"""Folder of the plots of a report in Markdown."""


def minus(number: str) -> str:
    """Write a true minus sign, which is as wide as a plus.

    >>> minus("-1.5 ± 0.1")
    '−1.5 ± 0.1'
    """
    return number.replace("-", "−")


PAPER = ("paper: ELBO, nats (it prints −ELBO)", "paper: FID")
LONGEST = 300
"""Characters of an error that a table shows; ``results.parquet`` has all of them."""


def how_far(spec: StudySpec, rows: "pd.DataFrame") -> str:
    """Count the cells that are done, failed, or have not ended.

    Args:
        spec: the grid.
        rows: of :func:`~sigma_vae.study.runner.tabulate`.
    """
    states = rows.drop_duplicates("key")["status"].tolist()
    done, failed, total = states.count("done"), states.count("failed"), len(cells(spec))
    return f"{done} of {total} cells are done, {failed} failed, {total - len(states)} have not ended."


def failures(spec: StudySpec, rows: "pd.DataFrame") -> tuple[Table, ...]:
    """List the cells that failed, with the error of each; nothing where none did."""
    place = {cell.key: format_place(cell.place) for cell in cells(spec)}
    failed = rows[rows["status"] == "failed"].to_dict("records")
    short = [f"{error[:LONGEST]} …" if len(error) > LONGEST else error for error in (row["error"] for row in failed)]
    lines = tuple((place[row["key"]], error, f"{row['failures']:.0f}") for row, error in zip(failed, short, strict=True))
    return (Table("Cells that failed", ("cell", "error", "times"), lines),) if lines else ()


def results(spec: StudySpec, rows: "pd.DataFrame") -> Section:
    """Show mean ± std over seeds for each place and prior, beside the paper's figures.

    Args:
        spec: the grid.
        rows: of :func:`~sigma_vae.study.runner.tabulate`.
    """
    by = [name for name in spec.axes if name != "seed"]
    found = summary(rows, by)
    titles = shown(found.columns)
    metrics = list(titles)
    published = spec.published.get("rows", {})
    heads = (*(name.rpartition(".")[2] for name in by), "prior", "seeds", *(titles[name].title for name in metrics))
    lines = []
    for line in found.to_dict("records"):
        failed = f", {line['failed']} failed" if line["failed"] else ""
        ours = (*(in_words(line[name]) for name in by), line["prior"], f"{line['seeds']}{failed}")
        lines.append((*ours, *(minus(line[name]) for name in metrics), *(_published(spec, line) if published else ())))
    words = "Test split, mean ± std over seeds. Fewer bits, a higher ELBO and smaller distances are better."
    if f"{ELBO}.level" in metrics:
        words += " The ELBO of densities and the ELBO of levels measure different things and do not compare."
    table = Table("Results", heads + (PAPER if published else ()), tuple(lines))
    return Section("Results of the runs", (words,), tables=(table, *_others(spec)), further=_about_published(spec))


def _about_published(spec: StudySpec) -> tuple[str, ...]:
    words = tuple(
        f"{name.capitalize()}: {str(spec.published[name]).rstrip('.')}."
        for name in ("source", "note", "claim")
        if name in spec.published
    )
    if "columns" in spec.published:
        words += (f"Where one row has several of the paper's figures, they are for {' / '.join(spec.published['columns'])}.",)
    if spec.published.get("rows"):
        words += ("The paper's figures are for its own data and networks: compare the order of the rows, not the numbers.",)
    return words


def _published(spec: StudySpec, line: Mapping[Any, Any]) -> tuple[str, str]:
    """The paper's figures for the row's likelihood; only beside N(0, I), which is the paper's prior."""
    known_rows = {str(name): row for name, row in spec.published["rows"].items()}
    row = next((known_rows[str(value)] for value in line.values() if str(value) in known_rows), None)
    if row is None or line["prior"] != STANDARD:
        return "", ""
    columns = spec.published.get("columns", [])
    return _figures(row, next((columns.index(value) for value in line.values() if value in columns), None))


def _figures(row: Mapping[str, Any], at: int | None) -> tuple[str, str]:
    """ELBO and FID from one of the paper's columns, or from all."""

    def words(value: Any, sign: int) -> str:
        if isinstance(value, list):
            return words(value[at], sign) if at is not None else " / ".join(words(each, sign) for each in value)
        return "–" if value is None else minus(f"{sign * value:g}")

    return words(row.get("negative_elbo_nats"), -1), words(row.get("fid"), 1)


def _others(spec: StudySpec) -> tuple[Table, ...]:
    """Rows of the paper that match no row of ours."""
    ours = {in_words(value) for values in spec.axes.values() for value in values} if STANDARD in spec.priors else set()
    others = {str(name): row for name, row in spec.published.get("rows", {}).items() if str(name) not in ours}
    noted = any("note" in row for row in others.values())
    notes = {name: (str(row.get("note", "")),) if noted else () for name, row in others.items()}
    rows = tuple((name, *_figures(row, None), *notes[name]) for name, row in others.items())
    heads = ("decoder", *PAPER, "note") if noted else ("decoder", *PAPER)
    return (Table("Rows of the paper without a match in this study", heads, rows),) if rows else ()
