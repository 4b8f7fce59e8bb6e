"""A study as comparisons. Arms differ in their likelihood; settings differ in everything else but the seed."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

from sigma_vae.registry import register
from sigma_vae.study.grid import Cell, StudySpec, cells, format_place, in_words, network_facts
from sigma_vae.study.results import tabulate
from sigma_vae.study.statistics import ELBO, Difference, chosen_on_validation, paired_difference

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ARM",
    "BITS",
    "ELBO",
    "LEARNED",
    "MARGINAL_KL",
    "OPTIMAL",
    "PREDICTIONS",
    "STANDARD",
    "Ended",
    "Setting",
    "frechet_columns",
    "settings",
]

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
FIXED = re.compile(r"gaussian/(fixed|beta):(.+)")
FRECHET = re.compile(r"quality\.(.+)\.(samples\.means|frames|clips)\.frechet")


class Choice(NamedTuple):
    """The best of several arms."""

    arm: str | None
    """None where there are too few to choose from."""
    left_out: str
    """Words about the arms that could not be chosen."""


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
    """Rows of :func:`~sigma_vae.study.results.tabulate`, with the columns ``arm`` and ``seed``."""

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

    def mean(self, arm: str | None, metric: str, prior: str | None = None) -> float:
        """The mean of the metric over seeds, on the test split."""
        return float(self.values(arm, metric, prior).mean())

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

    def tuned(self) -> Choice:
        """Choose the fixed σ, of three or more, with the highest ELBO on validation data, as in tuning."""
        there = self.complete(self.fixed, ELBO, self.plain, self.first(OPTIMAL), "validation")
        if len(there) < LEAST_GRID:
            return Choice(None, "")
        rows = self.table[self.table["prior"] == self.plain]
        return _choice(str(chosen_on_validation(rows, ARM, there, ELBO, highest=True).place[ARM]), self.fixed, there)

    def best(self, metric: str, prior: str, *, highest: bool) -> Choice:
        """Choose the fixed σ, of three or more, with the best mean of a metric on the test split itself."""
        found = self.best_of(self.fixed, self.first(OPTIMAL), metric, prior, highest=highest)
        return found if len(self.complete(self.fixed, metric, prior, self.first(OPTIMAL))) >= LEAST_GRID else Choice(None, "")

    def best_of(self, arms: Iterable[str], like: str | None, metric: str, prior: str, *, highest: bool) -> Choice:
        """Choose the arm with the best mean on the test split, among those with all seeds of another arm."""
        arms = list(arms)
        there = self.complete(arms, metric, prior, like)
        choose = max if highest else min
        best = choose(there, key=lambda arm: self.mean(arm, metric, prior)) if there else None
        return _choice(best, arms, there)

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
        return bool(network_facts(self.network).get("latents", "flat") == "flat")

    @property
    def learns_prior(self) -> bool:
        """Whether the network learns its prior in training; an argument in its name may decide that."""
        if self.network not in register.network:
            return False
        chosen = inspect.signature(register.network.make(self.network)).parameters.get("learned_prior")
        return bool(network_facts(self.network).get("learns_prior", False) if chosen is None else chosen.default)


def _choice(arm: str | None, of: Iterable[str], there: Sequence[str]) -> Choice:
    left_out = ", ".join(name for name in of if name not in there)
    return Choice(arm, f"; left out, as seeds are missing: {left_out}" if left_out else "")


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
