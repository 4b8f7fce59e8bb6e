"""The report of a study as one HTML page and as Markdown: verdicts, tables, plots and samples."""

import io
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sigma_vae import __version__
from sigma_vae.config import write_whole
from sigma_vae.evaluation.plots import DASHES, MARKERS, OKABE_ITO, Plot, plot_in_words, svg
from sigma_vae.runs.page import Card, Picture, Section, Table, template
from sigma_vae.study.claims import CLAIMS, Word, diverges, signed
from sigma_vae.study.comparisons import (
    ARM,
    BITS,
    ELBO,
    KINDS,
    LEARNED,
    OPTIMAL,
    PLOTS,
    STANDARD,
    Setting,
    cost,
    failures,
    frechet_columns,
    how_far,
    results,
    settings,
)
from sigma_vae.study.grid import StudySpec, cells
from sigma_vae.study.runner import CELLS, PICTURE, SPEC, check_same, is_kept, spec_of, tabulate, write_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from PIL.Image import Image

SIGNS = {"holds": "✓", "does not": "✗", "indicated": "(✓)", "indicated against": "(✗)", "not shown": "?"}
"""Signs beside the words, so that nothing depends on colour alone."""


Draw = Callable[[Setting], Plot | None]
HOW = (
    "Brackets hold the 95 % interval (Student's t) of a mean of differences that are paired by seed. A claim holds where the whole"
    " interval satisfies the rule, and does not where the whole interval violates it: each word is wrong in at most 2.5 of 100 studies"
    " of normal differences. With fewer than five seeds the claim is at most indicated, or indicated against. Otherwise it is not shown."
)
"""Explanation above the verdicts."""


def judged(found: Sequence[Setting]) -> Section:
    """Judge each claim: a card where the study has the data, a row of one table where not."""
    cards, lacking = [], []
    for each in CLAIMS:
        verdicts = each.verdicts(found)
        there = tuple((verdict.word, _titled(words, verdict.finding)) for words, verdict in verdicts if not verdict.lacks)
        if there:
            cards.append(Card(each.name, each.sentence, there, each.rule))
        else:
            lacking.append((each.name, each.sentence, f"{verdicts[0][1].word}: {verdicts[0][1].finding}", each.rule))
    caption = "Claims that this study cannot judge"
    heads = ("claim", "statement", "verdict", "rule")
    other = (Table(caption, heads, tuple(lacking), folded=True),) if lacking else ()
    return Section("Verdicts", (HOW,), tuple(cards), other)


def _titled(setting: str, words: str) -> str:
    return f"{setting}: {words}" if setting else words


def ended(spec: StudySpec, rows: "pd.DataFrame", found: Sequence[Setting]) -> Section:
    """Count the cells that ended, list the errors of those that failed, and add up the cost."""
    tables = (*failures(spec, rows), _stability(found), _cost(found))
    return Section("Runs and their cost", (how_far(spec, rows),), tables=tables)


def _stability(found: Sequence[Setting]) -> Table:
    rows = []
    for setting in found:
        for arm in setting.arms:
            errors = [ended.error for ended in setting.of(arm) if ended.error is not None]
            diverged = sum(map(diverges, errors))
            counts = len(setting.of(arm)), diverged, len(errors) - diverged
            rows.append((_named(setting, arm), *map(str, counts)))
    return Table("Runs that ended", ("arm", "ended", "became non-finite", "failed otherwise"), tuple(rows))


def _named(setting: Setting, arm: str) -> str:
    return f"{setting.words}, {arm}" if setting.words else arm


def _cost(found: Sequence[Setting]) -> Table:
    """Cost of the study, and of the grid of fixed σ against the one calibrated run where a setting has both."""
    import pandas as pd

    whole = pd.concat([setting.table for setting in found])
    failed = ", failed runs included" if (whole["status"] != "done").any() else ""
    rows = [(f"the whole study{failed}", *_runs_and_hours(whole), "")]
    for setting in found:
        done = setting.table[setting.table["status"] == "done"]
        by_arm = {arm: cost(rows) for arm, rows in done.groupby(ARM, sort=False)}
        each = {str(arm): ended["core_hours"] / ended["runs"] for arm, ended in by_arm.items()}
        grid, one = [arm for arm in setting.fixed if arm in each], setting.first(OPTIMAL)
        if len(grid) > 1 and one in each:
            times = sum(each[arm] for arm in grid) / each[one] if each[one] else math.nan
            words = _named(setting, f"grid of {len(grid)} fixed σ")
            rows.append((words, *_runs_and_hours(done[done[ARM].isin(grid)]), f"{times:.1f}"))
            rows.append((_named(setting, OPTIMAL), *_runs_and_hours(done[done[ARM] == one]), "1"))
    caption = "Cost of training and evaluation, all attempts"
    return Table(caption, ("runs of", "runs", "core-hours", "per seed, relative to optimal"), tuple(rows))


def _runs_and_hours(table: "pd.DataFrame") -> tuple[str, str]:
    found = cost(table)
    return f"{found['runs']:.0f}", f"{found['core_hours']:.3f}"


def differences(found: Sequence[Setting]) -> Section:
    """Subtract every other arm from optimal, paired by seed; last the fixed σ that validation data choose."""
    tables = []
    for setting in found:
        ours, rows = setting.first(OPTIMAL), []
        best, left_out, _ = setting.tuned()
        others = [(arm, arm) for arm in setting.arms if arm != ours]
        others += [(f"best fixed σ on validation: {best}{left_out}", best)] if best is not None else []
        for words, arm in others:
            for prior in setting.priors:
                bits, nats = (setting.difference(metric, ours, arm, prior) for metric in (BITS, ELBO))
                same = ours is not None and setting.observes(ours) == setting.observes(arm)
                shown = ("" if bits is None else signed(bits, 4), signed(nats, 1) if same and nats is not None else "")
                if any(shown):
                    rows.append((words, prior, *shown))
        if rows:
            tables.append(
                Table(
                    _titled(setting.words, f"{ours} minus"),
                    ("other arm", "prior", "bits/dim, refitted σ", "ELBO, nats, refitted σ"),
                    tuple(rows),
                )
            )
    words = (
        "Paired by seed, test split, with 95 % intervals by Student's t. Bits below zero and nats above zero favour optimal."
    )
    return Section("Differences", (words,), tables=tuple(tables))


def figures(found: Sequence[Setting]) -> Section:
    """Draw the plots: of each kind one for each setting."""
    names = dict.fromkeys(name for setting in found for name in frechet_columns(setting.table))
    drawn: list[tuple[str, Draw, str]] = [
        ("curves-density", lambda setting: curves(setting, "density"), f"{CURVES} Likelihoods of densities."),
        ("curves-level", lambda setting: curves(setting, "level"), f"{CURVES} Likelihoods of levels."),
        ("plane-density", lambda setting: rate_distortion(setting, "density"), f"{PLANE} Likelihoods of densities."),
        ("plane-level", lambda setting: rate_distortion(setting, "level"), f"{PLANE} Likelihoods of levels."),
        ("information", information, INFORMATION),
        *((f"frechet-{i}", partial(frechet, features=name), FRECHET) for i, name in enumerate(names)),
        ("coverage", coverage, COVERS),
    ]
    pictures = []
    for name, draw, caption in drawn:
        for number, setting in enumerate(found):
            plot = draw(setting)
            if plot is not None:
                place = f"{PLOTS}/{name}-{number}.svg"
                pictures.append(Picture(place, plot.content, plot.alt, _titled(setting.words, caption)))
    return Section("Plots", pictures=tuple(pictures))


CURVES = (
    "Learning curves. Validation ELBO by step, with each arm's own σ: mean and range over seeds. Lines far below the others are"
    " cut off."
)
PLANE = "Rate and distortion on the test split, with refitted σ: a point for each seed, fixed σ joined by lines. Lower left is better."
INFORMATION = (
    "Information in the latents. Upper bound on the mutual information and lower bound on the marginal KL by the decoder's σ: mean"
    " ± std over seeds. Arms that find their own σ are drawn at that σ."
)
FRECHET = "Sample quality. Fréchet distance of samples (decoder means) by prior: mean ± std over seeds."
COVERS = (
    "Coverage. Share of test values inside central intervals by their nominal share, with each arm's own σ. The diagonal is perfect"
    " calibration."
)


def samples(found: Sequence[Setting], out: Path) -> Section:
    """Show small pictures of each arm's first finished run, those of one kind side by side."""
    pictures: list[Picture] = []
    for setting in found:
        for name, words in _kinds(setting).items():
            for arm, content, place in _pictures(setting, name, out):
                caption = f"{_named(setting, arm)}: {words}"
                pictures.append(Picture(place, content, f"Grid of {words}, {arm}", caption))
    return Section("Samples and reconstructions", ("From each arm's first finished run.",), pictures=tuple(pictures))


def _pictures(setting: Setting, name: str, out: Path) -> Iterator[tuple[str, bytes, str]]:
    """Arm, content and place: from the run's folder, or from the table of a kept study."""
    table, column = setting.table, f"{PICTURE}{name}"
    for arm in setting.arms:
        first = next((ended for ended in setting.of(arm) if ended.done), None)
        if first is None:
            continue
        place = f"{CELLS}/{first.cell.key}/run/{name}"
        if (out / place).is_file():
            yield arm, small(out / place), place
        elif column in table:
            kept = table.loc[table["key"] == first.cell.key, column].dropna()
            yield from ((arm, content, place) for content in kept)


def _kinds(setting: Setting) -> dict[str, str]:
    """Names of a run's pictures with their captions; samples are from the prior that was fitted last."""
    last = "N(0, I)" if setting.priors[-1] == STANDARD else setting.priors[-1]
    return {
        "samples-standard-prior.png": "samples, prior N(0, I)",
        "samples.png": f"samples, {LEARNED} prior" if setting.learns_prior else f"samples, prior {last}",
        "reconstructions.png": "test images above their reconstructions",
    }


def report(out: Path) -> None:
    """Write ``report.html``, a page in one file, and ``report.md`` with its plots under ``report-files``.

    They are made from ``study.yaml`` and the cells, or of a kept study from ``results.parquet``. The same data give the
    same bytes, except for the line with the date. Sections without data are left out. A kept study has no files of
    plots: its Markdown has their numbers in words.

    Args:
        out: the study's folder.

    Raises:
        ValueError: it is no study's folder, or no cell has ended.
    """
    spec = spec_of(out)
    found, rows = settings(spec, out), tabulate(cells(spec), out)
    parts = [
        judged(found),
        ended(spec, rows, found),
        results(spec, rows),
        differences(found),
        figures(found),
        samples(found, out),
    ]
    there = [part for part in parts if not part.empty]
    beside = not is_kept(out)
    plots = [picture for part in there for picture in part.pictures if beside and picture.place.startswith(PLOTS)]
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} by sigma-vae {__version__}."
    content = {"title": spec.title, "about": spec.about, "made": made, "sections": there, "signs": SIGNS}
    write_whole(out / "report.html", template("report.html.j2").render(content))
    if plots:
        (out / PLOTS).mkdir(exist_ok=True)
    for plot in plots:
        write_whole(out / plot.place, plot.content)
    write_whole(
        out / "report.md", template("report.md.j2", "sigma_vae.study", escape=False).render(content | {"beside": beside})
    )
    _remove_others(out / PLOTS, {plot.place.rpartition("/")[2] for plot in plots})


def keep(out: Path, to: Path) -> None:
    """Copy a study without its weights: ``results.parquet`` and the report.

    The table has, beside all numbers, the grid and small pictures of each arm's first finished run, so that the report
    can be made from it again. Other files in the folder stay.

    Args:
        out: the study's folder.
        to: a new folder, or one that the same study was copied to before.

    Raises:
        ValueError: ``out`` is no study's folder, no cell has ended, or ``to`` is the same folder, one with trained
            runs, which a copy without weights would replace, or has finished cells of another grid.
    """
    if to.resolve() == out.resolve():
        raise ValueError(f"a study is copied to another folder, got {to} twice")
    trained = [run for run in to.glob(f"{CELLS}/*/run") if (run / "model").exists() or (run / "checkpoints").exists()]
    if trained:
        raise ValueError(
            f"{to} holds the weights of {len(trained)} runs, which a copy without weights would replace; give another --to: a new"
            " folder, or one that this study was copied to before"
        )
    spec = spec_of(out)
    table = _with_pictures(tabulate(cells(spec), out), samples(settings(spec, out), out).pictures)
    check_same(spec, to)
    to.mkdir(parents=True, exist_ok=True)
    write_table(table, to, spec)
    (to / SPEC).unlink(missing_ok=True)
    shutil.rmtree(to / CELLS, ignore_errors=True)
    report(to)


def _with_pictures(table: "pd.DataFrame", pictures: Sequence[Picture]) -> "pd.DataFrame":
    """The table with a column for each kind of picture, filled in the first of a cell's rows."""
    import pandas as pd

    first = table.drop_duplicates("key").reset_index().set_index("key")["index"]
    columns: dict[str, dict[int, bytes]] = {}
    for picture in pictures:
        _, key, _, name = picture.place.split("/")
        columns.setdefault(f"{PICTURE}{name}", {})[first[key]] = picture.content
    numbers = table[[name for name in table.columns if not name.startswith(PICTURE)]]
    content = {name: pd.Series(found, dtype=object).reindex(table.index) for name, found in columns.items()}
    return numbers.assign(**{name: column.where(column.notna(), None) for name, column in content.items()})


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove plots of another grid."""
    for path in folder.glob("*"):
        if path.name not in names:
            path.unlink()
    if folder.is_dir() and not names:
        folder.rmdir()


class Found(NamedTuple):
    """A verdict with the study and the setting that it is from."""

    study: str
    setting: str
    word: Word
    finding: str

    @property
    def where(self) -> str:
        """The study, and its setting where it has several."""
        return f"{self.study} ({self.setting})" if self.setting else self.study


class Judged(NamedTuple):
    """A claim with the verdicts of all studies."""

    name: str
    sentence: str
    rule: str
    found: tuple[Found, ...]

    def among(self, word: str) -> list[str]:
        """Name the studies with this verdict, with their settings in brackets where they have several.

        >>> found = (Found("a", "small", "holds", ""), Found("a", "large", "holds", ""), Found("b", "", "does not", ""))
        >>> Judged("1", "", "", found).among("holds"), Judged("1", "", "", found).among("does not")
        (['a (small, large)'], ['b'])
        """
        settings: dict[str, list[str]] = {}
        for found in self.found:
            if found.word == word:
                settings.setdefault(found.study, []).append(found.setting)
        inside = {study: ", ".join(dict.fromkeys(filter(None, names))) for study, names in settings.items()}
        return [f"{study} ({names})" if names else study for study, names in inside.items()]


def _once(found: Iterable[Found], keys: Mapping[str, set[str]]) -> tuple[Found, ...]:
    """Leave out a finding that an earlier study has made of the same runs; ``keys`` has the runs of each study."""
    kept: list[Found] = []
    for one in found:
        same = (each for each in kept if each.finding == one.finding and each.study != one.study)
        if not any(keys[each.study] & keys[one.study] for each in same):
            kept.append(one)
    return tuple(kept)


def verdicts(studies: Sequence[Path]) -> str:
    """Write a page in Markdown: each claim with its rule, and the studies in which it holds, does not, or is not shown.

    The page is made from the same files as :func:`~sigma_vae.study.report`. Claims that no study has measured are
    listed at the end. Studies that share runs have a finding on them once, in the first study.

    Args:
        studies: folders of studies; the page uses the folders' names.

    Raises:
        ValueError: none is given, one is no study's folder, or of one no cell has ended.
    """
    if not studies:
        raise ValueError("no study is given; name the folders of some: sigma-vae study verdicts docs/studies/*")
    specs = {study: spec_of(study) for study in studies}
    measured = {study: settings(spec, study) for study, spec in specs.items()}
    keys = {study.name: {key for setting in found for key in setting.table["key"]} for study, found in measured.items()}
    judged = [
        Judged(
            claim.name,
            claim.sentence,
            claim.rule,
            _once(
                (
                    Found(study.name, setting, verdict.word, verdict.finding)
                    for study, found in measured.items()
                    for setting, verdict in claim.verdicts(found)
                    if not verdict.lacks
                ),
                keys,
            ),
        )
        for claim in CLAIMS
    ]
    return template("verdicts.md.j2", "sigma_vae.study", escape=False).render(
        studies={study.name: spec.title for study, spec in specs.items()},
        claims=[claim for claim in judged if claim.found],
        missing=[claim for claim in judged if not claim.found],
        signs=SIGNS,
        how=HOW,
    )


# -- plots with one panel each, which fits a phone, and small copies of sample grids -----------------------------------


LIGHTEST = 0.6
"""Lightest place in the palette with three times the contrast to white that lines need (WCAG 2.2, 1.4.11)."""
OWN = ("*", "P", "X", "D", "v", "^", "<", ">")
"""Markers of arms that find their own σ."""
NOMINAL = (50, 80, 90, 95)
THUMBNAIL, GREYS, COLOURS = 240, 16, 48
"""Largest number of pixels, grey levels and colours of small copies."""


def curves(setting: Setting, observes: str) -> Plot | None:
    """Plot validation ELBO by step, a line for each arm: mean and range over seeds, with the arm's own σ."""
    known = {arm: found for arm in setting.arms if setting.observes(arm) == observes and (found := _over_seeds(setting, arm))}
    if not known:
        return None

    def draw(axes: "Axes") -> None:
        for arm, rows in known.items():
            style = _style(setting, arm)
            steps, means = [row[0] for row in rows], [row[1] for row in rows]
            axes.plot(steps, means, label=arm, markersize=3.5, **style)
            axes.fill_between(
                steps, [row[2] for row in rows], [row[3] for row in rows], color=style["color"], alpha=0.2, linewidth=0
            )
        axes.set(
            xlabel="steps",
            ylabel="validation ELBO, nats (own σ)",
            ylim=_shown([row for rows in known.values() for row in rows]),
        )

    ends = (f"{arm} {rows[-1][1]:.1f}" for arm, rows in known.items())
    return Plot(svg(draw, len(known)), plot_in_words(f"Validation ELBO of {KINDS[observes]} at the last step, nats", ends))


def rate_distortion(setting: Setting, observes: str) -> Plot | None:
    """Plot distortion with refitted σ against rate, a point for each seed; fixed σ are joined by lines."""
    points = {arm: found for arm in setting.arms if setting.observes(arm) == observes and (found := _plane(setting, arm))}
    if not points:
        return None

    def draw(axes: "Axes") -> None:
        joined = [_middle(points[arm]) for arm in setting.fixed if arm in points]
        axes.plot([x for x, _ in joined], [y for _, y in joined], color="0.6", linewidth=0.8, zorder=1)
        for arm, found in points.items():
            style = _style(setting, arm) | {"linestyle": "none"}
            axes.plot([x for x, _ in found], [y for _, y in found], label=arm, **style)
        axes.set(xlabel="rate, nats", ylabel="distortion with refitted σ, nats")

    middles = {arm: _middle(found) for arm, found in points.items()}
    words = (f"{arm} {rate:.1f} and {distortion:.1f}" for arm, (rate, distortion) in middles.items())
    return Plot(svg(draw, len(points)), plot_in_words("Mean rate and distortion, nats", words))


def information(setting: Setting) -> Plot | None:
    """Plot bounds on mutual information and marginal KL against σ, with a marker for each arm that finds its own σ."""
    kinds = {
        "mutual_information_at_most_nats": "mutual information, at most",
        "marginal_kl_at_least_nats": "marginal KL, at least",
    }
    there = {
        (arm, kind): found for arm in setting.arms for kind in kinds if len(found := setting.values(arm, f"information.{kind}"))
    }
    places = {arm: sigma for arm, _ in there if (sigma := _sigma(setting, arm)) is not None}
    if len(places) < 2:
        return None
    own: dict[str, dict[str, Any]] = {
        arm: {"marker": marker, "markersize": 9, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}
        for arm, marker in zip((arm for arm in places if arm not in setting.fixed), OWN, strict=False)
    }

    def draw(axes: "Axes") -> None:
        for (kind, words), colour, marker in zip(kinds.items(), OKABE_ITO, MARKERS, strict=False):
            fixed = [(places[arm], there[arm, kind]) for arm in setting.fixed if (arm, kind) in there]
            means, spread = [values.mean() for _, values in fixed], [_std(values) for _, values in fixed]
            dash = "-" if marker == "o" else "--"
            axes.errorbar(
                [x for x, _ in fixed], means, spread, color=colour, marker=marker, linestyle=dash, capsize=3, label=words
            )
            for arm, shape in own.items():
                if (arm, kind) in there:
                    axes.plot([places[arm]], [there[arm, kind].mean()], color=colour, **shape)
        for arm, shape in own.items():
            axes.plot([], [], color="white", label=arm, **shape)
            axes.axvline(places[arm], color="0.5", linewidth=0.8, linestyle=":", zorder=1)
        axes.set(xscale="log", xlabel="σ of the decoder", ylabel="nats")

    words = (
        f"{words} of {arm} at σ {places[arm]:.3g} {there[arm, kind].mean():.2f}"
        for kind, words in kinds.items()
        for arm in places
    )
    return Plot(svg(draw, 2 + len(own)), plot_in_words("Nats", words))


def frechet(setting: Setting, features: str) -> Plot | None:
    """Plot the Fréchet distance of samples, a row for each arm, a marker for each prior: mean ± std over seeds."""
    metric = frechet_columns(setting.table)[features]
    there = {
        (arm, prior): found
        for arm in setting.arms
        for prior in setting.priors
        if len(found := setting.values(arm, metric, prior))
    }
    if not there:
        return None
    rows = [arm for arm in setting.arms if any(arm == known for known, _ in there)]

    def draw(axes: "Axes") -> None:
        for prior, colour, marker in zip(setting.priors, OKABE_ITO, MARKERS, strict=False):
            known = [(rows.index(arm), found) for (arm, of), found in there.items() if of == prior]
            means, spread = [found.mean() for _, found in known], [_std(found) for _, found in known]
            axes.errorbar(
                means,
                [y for y, _ in known],
                xerr=spread,
                linestyle="none",
                color=colour,
                marker=marker,
                capsize=3,
                label=setting.called(prior),
            )
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.grid(axis="y", color="0.9")
        axes.set(xscale="log", xlabel=f"Fréchet distance ({features}), less is better")

    words = (f"{arm}, prior {setting.called(prior)}, {found.mean():.2f}" for (arm, prior), found in there.items())
    return Plot(svg(draw, len(setting.priors), height=1.4 + 0.28 * len(rows)), plot_in_words("Mean Fréchet distance", words))


def coverage(setting: Setting) -> Plot | None:
    """Plot the share of test values inside central intervals against the nominal share, with each arm's own σ."""
    found = {
        arm: [setting.values(arm, f"calibration.{setting.observes(arm)}.coverage.{percent}") for percent in NOMINAL]
        for arm in setting.arms
    }
    there = {arm: values for arm, values in found.items() if all(map(len, values))}
    if not there:
        return None

    def draw(axes: "Axes") -> None:
        axes.plot([40, 100], [40, 100], color="0.5", linewidth=0.8)
        for arm, values in there.items():
            means, spread = [100 * each.mean() for each in values], [100 * _std(each) for each in values]
            axes.errorbar(NOMINAL, means, spread, capsize=3, label=arm, **_style(setting, arm))
        axes.set(xlabel="nominal, %", ylabel="values inside, %", ylim=(-2, 102))
        axes.set_xticks(NOMINAL)

    words = (f"{arm} {', '.join(f'{100 * each.mean():.1f}' for each in values)}" for arm, values in there.items())
    return Plot(svg(draw, len(there)), plot_in_words("Percent of values inside intervals of 50, 80, 90 and 95 percent", words))


def small(path: Path) -> bytes:
    """Shrink a picture to a PNG of a few kilobytes; one that is small already keeps its bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode == "P" and max(picture.size) <= THUMBNAIL:
            return path.read_bytes()
        copy = picture.convert("RGB")
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    colours = GREYS if _grey(copy) else COLOURS
    buffer = io.BytesIO()
    copy.quantize(colours, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _grey(picture: "Image") -> bool:
    """Whether all channels are equal."""
    red, *others = picture.split()
    return all(red.tobytes() == other.tobytes() for other in others)


def _style(setting: Setting, arm: str) -> dict[str, Any]:
    """Style of an arm: fixed σ from dark to light in cividis, others in Okabe and Ito's colours."""
    from matplotlib import colormaps

    order = list(setting.arms).index(arm)
    look = {"marker": MARKERS[order % len(MARKERS)], "linestyle": DASHES[order % len(DASHES)]}
    if arm in setting.fixed:
        share = list(setting.fixed).index(arm) / max(1, len(setting.fixed) - 1)
        return look | {"color": colormaps["cividis"](LIGHTEST * share), "linewidth": 1.0}
    others = [name for name in setting.arms if name not in setting.fixed]
    return look | {"color": OKABE_ITO[others.index(arm) % len(OKABE_ITO)], "linewidth": 1.8}


def _over_seeds(setting: Setting, arm: str) -> list[tuple[int, float, float, float]]:
    """Step, mean, lowest and highest, at the steps that all seeds have."""
    found = [dict(curve) for curve in setting.curves(arm).values()]
    if not found:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in found)))
    at = [[curve[step] for curve in found] for step in steps]
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in zip(steps, at, strict=True)]


def _shown(rows: list[tuple[int, float, float, float]]) -> tuple[float, float]:
    """Limits of the ELBO axis: from the best down to three times the distance of the median."""
    means = sorted(row[1] for row in rows)
    best, median = means[-1], means[len(means) // 2]
    low = max(min(row[2] for row in rows), best - 3 * (best - median))
    room = 0.05 * (max(row[3] for row in rows) - low) or 1.0
    return low - room, max(row[3] for row in rows) + room


def _plane(setting: Setting, arm: str) -> list[tuple[float, float]]:
    """Rate and distortion of each seed."""
    rate, elbo = (setting.values(arm, metric) for metric in ("rate_nats", ELBO))
    return [(float(rate[seed]), float(-elbo[seed] - rate[seed])) for seed in rate.index if seed in elbo.index]


def _middle(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _sigma(setting: Setting, arm: str) -> float | None:
    """The σ that the arm is given, or that it has found."""
    found = setting.values(arm, "sigma_post_hoc_density")
    return setting.fixed.get(arm, float(found.mean()) if len(found) else None)


def _std(values: Any) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
