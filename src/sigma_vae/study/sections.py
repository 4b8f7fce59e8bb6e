"""The sections of a study's report: each takes what the study has found, and has nothing in it where that was not measured."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigma_vae.study import plots
from sigma_vae.study.cell import folder_of, known
from sigma_vae.study.claims import CLAIMS, OPTIMAL, diverges
from sigma_vae.study.comparisons import ARM, BITS, ELBO, STANDARD, Done, Setting, frechet_columns
from sigma_vae.study.grid import StudySpec, cells
from sigma_vae.study.judging import Verdict, signed
from sigma_vae.study.pieces import PLOTS, Card, Picture, Section, Table, minus
from sigma_vae.study.statistics import cost, summary
from sigma_vae.study.words import told

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HOW", "differences", "ended", "figures", "judged", "samples", "table"]

Draw = Callable[[Setting], plots.Plot | None]
COLUMNS = {
    BITS: "bits/dim, refitted σ",
    ELBO: "ELBO, nats, refitted σ",
    "rate_nats": "rate, nats",
    "calibration.density.coverage.90": "90 % interval covers",
    "predictions.psnr_db": "PSNR of the best prediction, dB",
    "predictions.ssim": "SSIM of the best prediction",
}
HOW = (
    "An interval in brackets is the 95 % bootstrap interval of a mean of differences, which are paired by seed. A rule that compares holds"
    " where the whole interval does as the rule says, does not where none of it does, and else is not shown, as with fewer than three"
    " seeds. Of three seeds such an interval is the range of the three differences, and has the mean of normal ones in it in three cases"
    " of four: a verdict on three seeds is an indication."
)
"""Said above verdicts."""


def judged(found: Sequence[Setting]) -> Section:
    """A card for each claim that the study's data speak of; the others in one table."""
    cards, lacking = [], []
    for claim in CLAIMS:
        verdicts = claim.verdicts(found)
        there = tuple((verdict.word, _finding(words, verdict)) for words, verdict in verdicts if not verdict.lacks)
        if there:
            cards.append(Card(claim.name, claim.sentence, there, claim.rule))
        else:
            lacking.append((claim.name, claim.sentence, f"{verdicts[0][1].word}: {verdicts[0][1].finding}", claim.rule))
    caption = "Claims that this study cannot judge"
    other = (Table(caption, ("claim", "what is claimed", "verdict", "rule"), tuple(lacking)),) if lacking else ()
    return Section("Verdicts", (HOW,), tuple(cards), other)


def _finding(words: str, verdict: Verdict) -> str:
    return f"{words}: {verdict.finding}" if words else verdict.finding


def ended(spec: StudySpec, out: Path, found: Sequence[Setting]) -> Section:
    """How many cells are done, which failed with what error, and what it cost."""
    todo = cells(spec)
    records = [(cell, known(cell, out)) for cell in todo]
    failed = [(cell, record) for cell, record in records if record is not None and record["status"] != "done"]
    done = sum(record is not None and record["status"] == "done" for _, record in records)
    words = f"{done} of {len(todo)} cells are done, {len(failed)} failed, {len(todo) - done - len(failed)} have not ended."
    tables = [_stability(found), _cost(found)]
    if failed:
        rows = tuple((told(cell.place), record["error"], str(record["failures"])) for cell, record in failed)
        tables.insert(0, Table("Cells that failed", ("cell", "error", "times"), rows))
    return Section("Runs and their cost", (words,), tables=tuple(tables))


def _stability(found: Sequence[Setting]) -> Table:
    rows = []
    for setting in found:
        for arm in setting.arms:
            errors = [done.record["error"] for done in setting.of(arm) if not done.finished]
            diverged = sum(map(diverges, errors))
            counts = len(setting.of(arm)), diverged, len(errors) - diverged
            rows.append((_named(setting, arm), *map(str, counts)))
    return Table("Runs that ended", ("arm", "ended", "became non-finite", "failed otherwise"), tuple(rows))


def _named(setting: Setting, arm: str) -> str:
    return f"{setting.words}, {arm}" if setting.words else arm


def _cost(found: Sequence[Setting]) -> Table:
    """Of the study; and per seed of the grid of fixed σ against the one calibrated run, where a setting has both."""
    import pandas as pd

    whole = cost(pd.concat([setting.table for setting in found]))
    rows = [("the whole study", f"{whole['runs']:.0f}", f"{whole['core_hours']:.3f}", "")]
    for setting in found:
        grid = cost(setting.table[setting.table[ARM].isin(list(setting.fixed))])
        one = cost(setting.table[setting.table[ARM] == setting.first(OPTIMAL)])
        if len(setting.fixed) > 1 and grid["runs"] and one["runs"]:
            per_seed = grid["core_hours"] / one["core_hours"] if one["core_hours"] else math.nan
            rows += [
                (
                    _named(setting, f"grid of {len(setting.fixed)} fixed σ"),
                    f"{grid['runs']:.0f}",
                    f"{grid['core_hours']:.3f}",
                    f"{per_seed:.1f}",
                ),
                (_named(setting, OPTIMAL), f"{one['runs']:.0f}", f"{one['core_hours']:.3f}", "1"),
            ]
    return Table("Cost, training and evaluation together", ("what", "runs", "core-hours", "these, times optimal"), tuple(rows))


def table(spec: StudySpec, rows: "pd.DataFrame") -> Section:
    """Mean ± standard deviation over seeds for each place and prior, the paper's figures beside."""
    by = [name for name in spec.axes if name != "seed"]
    found = summary(rows, by)
    metrics = [name for name in found.columns if name not in (*by, "prior", "seeds")]
    published = spec.published.get("rows", {})
    heads = (*(name.rpartition(".")[2] for name in by), "prior", "seeds", *(_head(found, name) for name in metrics))
    lines = []
    for line in found.to_dict("records"):
        ours = (*(str(line[name]) for name in (*by, "prior", "seeds")), *(minus(str(line[name])) for name in metrics))
        lines.append(ours + (_published(spec, line) if published else ()))
    if published:
        heads += ("paper: −ELBO, nats", "paper: FID")
    words = "Test split, mean ± standard deviation over seeds. Fewer bits, more ELBO and smaller distances are better."
    told = tuple(
        f"{name.capitalize()}: {str(spec.published[name]).rstrip('.')}."
        for name in ("source", "note", "claim")
        if name in spec.published
    )
    if "columns" in spec.published:
        told += (f"Where the paper's figures stand in one row, they are of {' / '.join(spec.published['columns'])}.",)
    if published:
        told += ("The paper's figures are of its own data and networks: compare the order of rows, not numbers.",)
    return Section("What each run reached", (words,), tables=(Table("Results", heads, tuple(lines)),), further=told)


def _head(found: "pd.DataFrame", name: str) -> str:
    features = {column: kind for kind, column in frechet_columns(found).items()}
    return COLUMNS[name] if name in COLUMNS else f"Fréchet distance ({features[name]})"


def _published(spec: StudySpec, line: dict[Any, Any]) -> tuple[str, str]:
    """Of the row's likelihood, beside N(0, I) alone, which is the paper's prior."""
    known_rows = {str(name): row for name, row in spec.published["rows"].items()}
    row = next((known_rows[str(value)] for value in line.values() if str(value) in known_rows), None)
    if row is None or line["prior"] != STANDARD:
        return "", ""
    columns = spec.published.get("columns", [])
    at = next((columns.index(value) for value in line.values() if value in columns), None)

    def words(value: Any) -> str:
        if isinstance(value, list):
            return words(value[at]) if at is not None else " / ".join(words(each) for each in value)
        return "–" if value is None else minus(f"{value:g}")

    return words(row.get("negative_elbo_nats")), words(row.get("fid"))


def differences(found: Sequence[Setting]) -> Section:
    """Optimal minus every other arm, paired by seed; last the fixed σ that validation data choose."""
    tables = []
    for setting in found:
        ours, rows = setting.first(OPTIMAL), []
        best = setting.tuned()
        others = [(arm, arm) for arm in setting.arms if arm != ours]
        others += [(f"best fixed σ on validation: {best}", best)] if best is not None else []
        for words, arm in others:
            for prior in setting.priors:
                bits, nats = (setting.difference(metric, ours, arm, prior) for metric in (BITS, ELBO))
                same = ours is not None and setting.observes(ours) == setting.observes(arm)
                shown = ("" if bits is None else signed(bits, 4), signed(nats, 1) if same and nats is not None else "")
                if any(shown):
                    rows.append((words, prior, *shown))
        if rows:
            caption = f"{setting.words}: {ours} minus" if setting.words else f"{ours} minus"
            tables.append(Table(caption, ("the other", "prior", "bits/dim, refitted σ", "ELBO, nats, refitted σ"), tuple(rows)))
    words = "Paired by seed, test split, with 95 % bootstrap intervals. Bits below zero and nats above zero speak for optimal."
    return Section("Differences", (words,), tables=tuple(tables))


def figures(found: Sequence[Setting]) -> Section:
    """Plots of what was measured, of each kind one for each setting."""
    names = dict.fromkeys(name for setting in found for name in frechet_columns(setting.table))
    drawn: list[tuple[str, Draw, str]] = [
        ("curves", plots.curves, CURVES),
        ("plane-density", lambda setting: plots.rate_distortion(setting, "density"), f"{PLANE} Likelihoods of densities."),
        ("plane-level", lambda setting: plots.rate_distortion(setting, "level"), f"{PLANE} Likelihoods of levels."),
        ("information", plots.information, INFORMATION),
        *((f"frechet-{i}", partial(plots.frechet, features=name), FRECHET) for i, name in enumerate(names)),
        ("coverage", plots.coverage, COVERS),
    ]
    pictures = []
    for name, draw, caption in drawn:
        for number, setting in enumerate(found):
            plot = draw(setting)
            if plot is not None:
                words = f"{setting.words}: {caption}" if setting.words else caption
                pictures.append(Picture(f"{PLOTS}/{name}-{number}.svg", plot.content, plot.alt, words))
    return Section("Plots", pictures=tuple(pictures))


CURVES = (
    "Learning curves. Validation ELBO over steps, with each arm's own σ: mean and range over seeds. Lines far below the others are"
    " cut off."
)
PLANE = (
    "Rate and distortion on the test split, the latter with the refitted σ: a point for each seed, fixed σ joined. Lower and left is"
    " better."
)
INFORMATION = (
    "Information in the latents. Upper bound on the mutual information and lower bound on the marginal KL along the decoder's σ, mean"
    " ± deviation over seeds; arms that find their own σ where they have it."
)
FRECHET = "Sample quality. Fréchet distance of samples, decoder means, by prior: mean ± deviation over seeds."
COVERS = (
    "Coverage. Share of test values inside central intervals against their nominal share, with each arm's own σ. On the diagonal:"
    " calibrated."
)


def samples(found: Sequence[Setting], out: Path) -> Section:
    """Pictures of the first seed of each arm, small, those of one kind side by side."""
    pictures: list[Picture] = []
    for setting in found:
        runs = [(arm, done) for arm in setting.arms for done in _first(setting, arm)]
        for name, words in _kinds(setting).items():
            for arm, done in runs:
                path = folder_of(done.cell, out) / "run" / name
                if path.is_file():
                    place, caption = path.relative_to(out).as_posix(), f"{_named(setting, arm)}: {words}"
                    pictures.append(Picture(place, plots.small(path), f"Grid of {words}, {arm}", caption))
    return Section("Samples and reconstructions", ("Of the first seed of each.",), pictures=tuple(pictures))


def _kinds(setting: Setting) -> dict[str, str]:
    """What a run draws; the prior of its samples is the one that was fitted last."""
    last = setting.priors[-1]
    return {
        "samples-standard-prior.png": "samples, prior N(0, I)",
        "samples.png": f"samples, prior {'N(0, I)' if last == STANDARD else last}",
        "reconstructions.png": "test images above their reconstructions",
    }


def _first(setting: Setting, arm: str) -> list[Done]:
    return [done for done in setting.of(arm) if done.finished][:1]
