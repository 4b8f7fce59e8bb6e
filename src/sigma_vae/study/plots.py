"""Pictures of a study: plots as SVG with one panel each, which fits a phone, and small copies of sample grids."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigma_vae.evaluation.plots import DASHES, MARKERS, OKABE_ITO, Plot, plot_in_words, svg
from sigma_vae.study.comparisons import ELBO, KINDS, Setting, frechet_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

__all__ = ["coverage", "curves", "frechet", "information", "rate_distortion", "small"]

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
