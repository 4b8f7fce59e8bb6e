"""What :func:`calibration` found, on one page of plots."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_page"]

ENDINGS = (".png", ".pdf", ".svg")

# Okabe and Ito's palette; markers and dashes say the same where there is no colour.
STYLES: dict[str, dict[str, Any]] = {
    "density": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "density_post_hoc": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "level": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "level_post_hoc": {"color": "#E69F00", "marker": "v", "linestyle": "--"},
}
WORDS = {
    "density": "density",
    "density_post_hoc": "density, σ refitted",
    "level": "levels",
    "level_post_hoc": "levels, σ refitted",
}
AXIS_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    {"color": "#009E73", "marker": "s", "linestyle": ":"},
)
BAND: dict[str, Any] = {"color": "0.75", "alpha": 0.6, "linewidth": 0}
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
DEVIATIONS = 2.58
"""Half the width of bands: 99 % of what a calibrated model with independent values would show."""


def save_page(path: Path, report: dict[str, Any], title: str = "") -> None:
    """Write coverage, PIT histogram, σ against error and residual correlation as one page.

    Grey bands hold 99 % of what a calibrated model with independent values would show; error bars are two standard errors over
    examples, whose values depend on each other.

    Args:
        path: a .png, .pdf or .svg file.
        report: of :func:`sigma_vae.evaluation.calibration.calibration`, or what JSON keeps of it.
        title: above the plots.

    Raises:
        ValueError: the file's ending is none of these.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path} should end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, which says how the page is written")
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(10, 8.5), layout="constrained"
    )  # no pyplot: nothing of the caller's figures or back end is touched
    ((coverage, pit), (error, residuals)) = figure.subplots(2, 2)
    _coverage(coverage, report)
    _pit(pit, report)
    _error(error, report["sigma"])
    _residuals(residuals, report["residuals"])
    figure.suptitle(title or f"{report['values']} values of {report['examples']} examples")
    figure.savefig(
        path, dpi=150, metadata={} if path.suffix == ".png" else {"CreationDate" if path.suffix == ".pdf" else "Date": None}
    )


def _kinds(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: report[name] for name in STYLES if report[name] is not None}


def _coverage(axes: "Axes", report: dict[str, Any]) -> None:
    grid = [i / 200 for i in range(80, 201)]
    width = [DEVIATIONS * math.sqrt(p * (1 - p) / report["values"]) for p in grid]
    axes.fill_between(
        grid, [p - w for p, w in zip(grid, width, strict=True)], [p + w for p, w in zip(grid, width, strict=True)], **BAND
    )
    axes.plot(grid, grid, color="0.4", linewidth=0.8)
    for name, kind in _kinds(report).items():
        nominal = [float(percent) / 100 for percent in kind["coverage"]]
        found = list(kind["coverage"].values())
        errors = [2 * (one["standard_error"] or 0.0) for one in found]
        axes.errorbar(nominal, [one["mean"] for one in found], errors, capsize=3, label=WORDS[name], **STYLES[name])
    axes.set(title="Coverage of central intervals", xlabel="nominal, %", ylabel="share of values inside", xlim=(0.4, 1))
    axes.set_xticks([0.5, 0.8, 0.9, 0.95], ["50", "80", "90", "95"])
    axes.legend(loc="lower right", title="diagonal: calibrated", frameon=False)


def _pit(axes: "Axes", report: dict[str, Any]) -> None:
    bins = len(next(iter(_kinds(report).values()))["pit"])
    half = DEVIATIONS * math.sqrt((bins - 1) / report["values"])
    axes.fill_between([0, 1], 1 - half, 1 + half, **BAND)
    axes.axhline(1, color="0.4", linewidth=0.8)
    edges = [i / bins for i in range(bins + 1)]
    for name, kind in _kinds(report).items():
        style = {key: value for key, value in STYLES[name].items() if key != "marker"}
        axes.stairs([bins * share for share in kind["pit"]], edges, label=WORDS[name], linewidth=1.5, baseline=None, **style)
    axes.set(title="PIT histogram", xlabel="u = F(x)", ylabel="density (1: calibrated)", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _error(axes: "Axes", sigma: dict[str, Any] | None) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(title="Predicted σ against error", xlabel="predicted standard deviation", ylabel="root mean squared error")
    if sigma is None:
        _say(axes, "this likelihood has no variance to compare")
        return
    every: list[float] = []
    for name, words, style in (("per_value", "values", AXIS_STYLES[0]), ("per_example", "examples", AXIS_STYLES[1])):
        pairs = zip(sigma[name]["predicted_variance"], sigma[name]["mean_squared_error"], strict=True)
        points = [(math.sqrt(v), math.sqrt(e)) for v, e in pairs if v > 0 and e > 0]
        axes.plot([x for x, _ in points], [y for _, y in points], label=f"{words}, binned by σ", **style)
        every += [value for point in points for value in point]
    if every:
        low, high = min(every) / 1.3, max(every) * 1.3
        axes.plot([low, high], [low, high], color="0.4", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=TICKS))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    correlation = sigma["correlation_of_logs"]
    words = "σ does not vary" if correlation is None else f"over examples, log σ and log error\ncorrelate by {correlation:.2f}"
    axes.legend(frameon=False, title=words, loc="upper left")


def _residuals(axes: "Axes", residuals: dict[str, Any]) -> None:
    along, channels = residuals["axes"], residuals["channels"]
    if along is None and channels is None:
        axes.set(title="Correlation of residuals")
        _say(axes, "no neighbours, one channel")
        return
    if along is None:
        axes.set(title="Correlation of residuals between columns")
        shown = axes.imshow(channels, cmap="PuOr", vmin=-1, vmax=1)
        axes.figure.colorbar(shown, ax=axes)
        return
    longest = max(along.values(), key=lambda axis: len(axis["pairs"]))["pairs"]
    half = [DEVIATIONS / math.sqrt(pairs) for pairs in longest[1:]]
    axes.fill_between(range(1, len(longest)), [-value for value in half], half, **BAND)
    axes.axhline(0, color="0.4", linewidth=0.8)
    for (name, axis), style in zip(along.items(), AXIS_STYLES, strict=False):
        axes.plot(range(len(axis["autocorrelation"])), axis["autocorrelation"], label=f"along {name}", **style)
    lowest = min(min(axis["autocorrelation"]) for axis in along.values())
    axes.set(title="Autocorrelation of residuals (0: independent)", xlabel="lag", ylim=(min(-0.25, lowest - 0.05), 1.05))
    words = None
    if channels is not None:
        between = [channels[i][j] for i in range(len(channels)) for j in range(i)]
        words = f"between channels {min(between):.2f} to {max(between):.2f}"
    axes.legend(frameon=False, title=words)


def _say(axes: "Axes", words: str) -> None:
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="0.4")
