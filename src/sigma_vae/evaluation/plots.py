"""Pictures: grids of images as PNG, clips as PNG or GIF, single plots as SVG, and the page of calibration plots."""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sigma_vae.conditions import Given
from sigma_vae.config import replacing
from sigma_vae.data import Splits
from sigma_vae.types import Batch, Temperature, per_layer
from sigma_vae.vae import VAE, Show, in_eval_mode, keyed_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

AT_ONCE = 128
"""Pictures, or frames of clips, that are reconstructed together."""
WIDTH = 500
"""Approximate width of a grid of images, in pixels."""
MILLISECONDS = 250
"""Time that a GIF shows each frame."""
ROUNDING = 1e-6
UNDATED: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
"""Formats of the page, with metadata without a date: equal reports give equal files."""

# Okabe and Ito's palette; markers and dashes tell the lines apart without colour.
STYLES: dict[str, dict[str, Any]] = {
    "density": {"label": "density", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "density_post_hoc": {"label": "density, σ refitted", "color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "level": {"label": "levels", "color": "#D55E00", "marker": "^", "linestyle": "-"},
    "level_post_hoc": {"label": "levels, σ refitted", "color": "#E69F00", "marker": "v", "linestyle": "--"},
}
AXIS_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    {"color": "#009E73", "marker": "s", "linestyle": ":"},
)
BAND: dict[str, Any] = {"color": "0.75", "alpha": 0.6, "linewidth": 0}
TICKS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0,))
"""Ticks of each decade, on axes with one, two or more decades."""
PANEL = (4.6, 3.3)
"""Inches of a single plot; on a phone the text shrinks by only a fifth."""
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
CLIP_PATH = re.compile(rb'(?<=<clipPath id=")[^"]+')
Draw = Callable[["Axes"], None]
STDS = 2.58
"""Half the width of bands, in stds: they hold 99 % of what a calibrated model with independent values would show."""


class Plot(NamedTuple):
    """An SVG file with its numbers in words."""

    content: bytes
    alt: str


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether examples ``(C, H, W)`` can be shown: grey or red, green and blue."""
    return len(shape) == 3 and shape[0] in (1, 3)


def in_unit_range(x: Tensor) -> Tensor:
    """Check that values are in [0, 1] but for rounding, and return them.

    Raises:
        ValueError: they are not.

    >>> in_unit_range(torch.tensor([0.0, 255.0]))
    Traceback (most recent call last):
    ...
    ValueError: images are expected with values in [0, 1], got values from 0 to 255; rescale the data
    """
    low, high = float(x.min()), float(x.max())
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):
        raise ValueError(
            f"images are expected with values in [0, 1], got values from {low:.3g} to {high:.3g}; rescale the data"
        )
    return x


def pairs(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Arrange rows of originals above their reconstructions, for :func:`save_grid` with as many columns."""
    rows = zip(torch.split(originals, columns), torch.split(reconstructions, columns), strict=True)
    return torch.cat([image for row in rows for image in row])


def save_grid(path: Path, images: Tensor, columns: int | None = None, zoom: int | None = None) -> None:
    """Write images ``(n, C, H, W)`` with values in [0, 1] as one picture, row by row; values outside are clipped.

    Each pixel becomes zoom × zoom pixels; by default as many as make the picture about 500 wide.

    Raises:
        ValueError: the channels are neither 1 nor 3.
    """
    with replacing(path) as aside:
        _grid(images, columns, zoom).save(aside)


def save_clips(path: Path, clips: Tensor, columns: int | None = None) -> None:
    """Write clips ``(n, T, C, H, W)``: as a .png with one clip per row, or as a .gif, a moving grid of clips.

    Raises:
        ValueError: the channels are neither 1 nor 3.
    """
    if path.suffix != ".gif":
        save_grid(path, clips.flatten(0, 1), columns=clips.shape[1])
        return
    first, *rest = [_grid(frame, columns, None) for frame in clips.unbind(1)]
    with replacing(path) as aside:
        first.save(aside, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)


def png(images: Tensor, columns: int | None = None) -> bytes:
    """The picture of :func:`save_grid`, as the content of a PNG file.

    Raises:
        ValueError: the channels are neither 1 nor 3.
    """
    buffer = io.BytesIO()
    _grid(images, columns, None).save(buffer, format="PNG")
    return buffer.getvalue()


def _grid(images: Tensor, columns: int | None, zoom: int | None) -> "Image":
    from PIL import Image

    if images.dim() != 4 or not drawable(tuple(images.shape[1:])):
        raise ValueError(
            f"a picture shows images (n, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}; write .npz instead"
        )
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 1
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    values = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(values):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    zoom = zoom or max(1, round(WIDTH / picture.width))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


@torch.no_grad()
def sampled(
    vae: VAE,
    data: Splits | None,
    n: int,
    generator: torch.Generator,
    show: Show = "mean",
    temperature: Temperature = 1.0,
    condition: Given | None = None,
) -> Tensor:
    """Draw n samples; a video model continues the first frames of its test clips, to the length of these clips.

    Only a video model needs the data; if there are fewer than n test clips, they are repeated. ``show``,
    ``temperature`` and ``condition`` are those of :meth:`~sigma_vae.vae.VAE.sample`.

    Raises:
        ValueError: the test clips are no longer than the frames that are given, or the temperature has too many
            numbers.
    """
    if not vae.network.reads_clips:
        return vae.sample(n, show, generator=generator, temperature=temperature, condition=condition)
    assert data is not None
    past, (single,) = vae.network.context_frames, per_layer(temperature, 1)
    batch = next(iter(data.batches("test", min(n, len(data.test)), device=generator.device)))
    clips, chosen = batch.x, torch.arange(n) % len(batch.x)
    given = clips[chosen, :past]
    if condition is None and batch.condition is not None:
        condition = batch.condition[chosen]
    (predicted,) = vae.predict(
        given, clips.shape[1] - past, 1, show, generator=generator, temperature=single, condition=condition
    )
    return torch.cat([given, predicted], 1)


@torch.no_grad()
def sampled_per_class(
    vae: VAE,
    n: int,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    show: Show = "mean",
    temperature: Temperature = 1.0,
) -> Tensor:
    """Draw n samples of each class from the same random numbers: ``(classes · n, C, *space)``, class by class.

    With a prior that does not depend on the class, sample i of each class has the same latents. ``given`` are the other
    conditions.

    Raises:
        ValueError: the model has no class label, or several that are not given, or reads clips.
    """
    conditions, given = vae.network.conditions, dict(given or {})
    if conditions is None or vae.network.reads_clips:
        raise ValueError("samples of each class are made by models of single examples that are given a class label")
    label = conditions.class_to_vary(given)
    rows = []
    for name in label.classes or ():
        generator = torch.Generator(vae.device).manual_seed(seed)
        condition = given | {label.name: name}
        rows.append(vae.sample(n, show, generator=generator, temperature=temperature, condition=condition))
    return torch.cat(rows)


@torch.no_grad()
def traversals(
    vae: VAE, z: Tensor, latents: int, steps: int, reach: float = 2.0, given: Given | None = None
) -> tuple[Tensor, list[int]]:
    """Move one latent at a time from z ``(latent_dim,)``: a row of data for each latent, and the latents' numbers.

    Those are moved that change the decoder's mean most, the strongest first.

    Shapes:
        ``(latents, steps, C, *space)``.
    """
    eye = torch.eye(len(z), device=z.device)
    strength = (vae.decode(z + eye, condition=given) - vae.decode(z - eye, condition=given)).flatten(1).abs().mean(1)
    chosen = strength.argsort(descending=True)[:latents]
    moves = torch.linspace(-reach, reach, steps, device=z.device)
    moved = z.expand(len(chosen), steps, -1) + moves[:, None] * eye[chosen, None]
    decoded = vae.decode(moved.flatten(0, 1), condition=given)
    return decoded.reshape(len(chosen), steps, *decoded.shape[1:]), chosen.tolist()


@torch.no_grad()
def interpolations(
    vae: VAE, first: Tensor, last: Tensor, steps: int, conditions: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Decode the straight line between the posterior means of pairs ``(n, C, *space)``: ``(n, steps, C, *space)``.

    A conditional model decodes it with the conditions of the first ones.
    """
    of_first, of_last = conditions or (None, None)
    ends = vae.encode(first, of_first).loc, vae.encode(last, of_last).loc
    shares = torch.linspace(0, 1, steps, device=first.device).reshape(-1, *[1] * (ends[0].dim() - 1))  # latents may be maps
    between = ends[0][:, None] * (1 - shares) + ends[1][:, None] * shares
    given = None if of_first is None else of_first.repeat_interleave(steps, 0)
    decoded = vae.decode(between.flatten(0, 1), condition=given)
    return decoded.reshape(len(first), steps, *decoded.shape[1:])


@torch.no_grad()
def reconstructed(vae: VAE, batch: Batch, show: Show = "mean", seed: int = 0, shown_as: Given | None = None) -> Tensor:
    """Reconstruct a batch, in its own shape; the given first frames of clips stay as they are.

    ``shown_as`` is that of :meth:`~sigma_vae.vae.VAE.reconstruct`. Memory holds the activations of 128 pictures or frames.
    """
    clips = vae.network.reads_clips
    again = []
    for rows in torch.split(torch.arange(len(batch.x)), max(1, AT_ONCE // (batch.x.shape[1] if clips else 1))):
        x, noise = batch.x[rows], keyed_noise(batch.positions[rows], seed)
        condition = None if batch.condition is None else batch.condition[rows]
        other = shown_as[rows] if isinstance(shown_as, Tensor) and len(shown_as) == len(batch.x) else shown_as
        again.append(vae.reconstruct(x, show, noise=noise, condition=condition, shown_as=other))
    return torch.cat([batch.x[:, : vae.network.context_frames], torch.cat(again)], 1) if clips else torch.cat(again)


def figure_of_samples(vae: VAE, n: int, seed: int) -> "Figure":
    """A grid of samples, in eval mode."""
    with in_eval_mode(vae), torch.no_grad():
        return _shown(_grid(vae.sample(n, generator=torch.Generator(vae.device).manual_seed(seed)), None, None), "Samples")


def figure_of_reconstructions(vae: VAE, x: Tensor) -> "Figure":
    """Pictures above their reconstructions, with noise of seed 0."""
    columns = min(len(x), 8)
    with in_eval_mode(vae), torch.no_grad():
        again = vae.reconstruct(x.to(vae.device), noise=keyed_noise(torch.arange(len(x)))).cpu()
    return _shown(_grid(pairs(x.cpu(), again, columns), columns, None), "Originals above their reconstructions")


def figure_of_latents(vae: VAE, x: Tensor, colours: Sequence[float] | None) -> "Figure":
    """Posterior means in the two latents with the largest KL."""
    with in_eval_mode(vae), torch.no_grad():
        posterior = vae.encode(x.to(vae.device))
    mean, std = posterior.loc.cpu(), posterior.scale.cpu()
    first, second = (0.5 * (mean**2 + std**2 - 1) - std.log()).mean(0).topk(2).indices.tolist()
    figure = _figure(5, 5)
    axes = figure.subplots()
    axes.scatter(mean[:, first], mean[:, second], c=OKABE_ITO[0] if colours is None else colours, s=12)
    axes.set(xlabel=f"latent {first}", ylabel=f"latent {second}", title="Posterior means")
    return figure


def _shown(picture: "Image", title: str) -> "Figure":
    figure = _figure(picture.width / 100 + 0.2, picture.height / 100 + 0.5)
    axes = figure.subplots()
    axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def _figure(width: float, height: float) -> "Figure":
    """A figure that notebooks draw, without pyplot: the caller's figures and back end stay as they are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")

    def as_png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

    figure.__dict__["_repr_png_"] = as_png
    return figure


def save_page(path: Path, report: Mapping[str, Any], title: str = "") -> None:
    """Draw coverage, PIT histogram, σ against error and residual correlation on one page.

    Grey bands hold 99 % of what a calibrated model with independent values would show; error bars are two standard
    errors over examples, whose values depend on each other. The report is the result of
    :func:`sigma_vae.evaluation.calibration.calibration`, or its JSON.

    Raises:
        ValueError: the file is no .png, .pdf or .svg.
    """
    if path.suffix not in UNDATED:
        raise ValueError(f"{path} should end in .png, .pdf or .svg, which sets the format of the page")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")  # no pyplot: the caller's figures and back end stay as they are
    ((coverage, pit), (error, residuals)) = figure.subplots(2, 2)
    _coverage(coverage, report)
    _pit(pit, report)
    _error(error, report["sigma"])
    _residuals(residuals, report["residuals"])
    figure.suptitle(title or f"{report['values']} values of {report['examples']} examples")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=150, metadata=UNDATED[path.suffix])


def calibration_plots(report: Mapping[str, Any]) -> dict[str, Plot]:
    """The four plots of :func:`save_page`, each by itself: ``coverage``, ``pit``, ``error`` and ``residuals``."""
    own = next(iter(_kinds(report).values()))
    covered = (f"{percent} %: {100 * share['mean']:.1f}" for percent, share in own["coverage"].items())
    bars = (f"{share * len(own['pit']):.2f}" for share in own["pit"])
    axes = report["residuals"]["axes"] or {}
    lags = (f"{name} {', '.join(f'{value:.2f}' for value in axis['autocorrelation'])}" for name, axis in axes.items())
    bins = report["sigma"]["per_value"] if report["sigma"] is not None else {"predicted_variance": [], "mean_squared_error": []}
    pairs = zip(bins["predicted_variance"], bins["mean_squared_error"], strict=True)
    against = (f"{math.sqrt(variance):.3g} and {math.sqrt(error):.3g}" for variance, error in pairs)
    return {
        "coverage": Plot(svg(lambda axes: _coverage(axes, report), 0), plot_in_words("Percent of values inside", covered)),
        "pit": Plot(svg(lambda axes: _pit(axes, report), 0), plot_in_words("PIT histogram, densities", bars)),
        "error": Plot(svg(lambda axes: _error(axes, report["sigma"]), 0), plot_in_words("Predicted σ and error", against)),
        "residuals": Plot(
            svg(lambda axes: _residuals(axes, report["residuals"]), 0), plot_in_words("Correlation of errors by lag", lags)
        ),
    }


def _kinds(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: report[name] for name in STYLES if report[name] is not None}


def _coverage(axes: "Axes", report: Mapping[str, Any]) -> None:
    grid = np.arange(80, 201) / 200
    width = STDS * np.sqrt(grid * (1 - grid) / report["values"])
    axes.fill_between(grid, grid - width, grid + width, **BAND)
    axes.plot(grid, grid, color="0.4", linewidth=0.8)
    for name, kind in _kinds(report).items():
        nominal = [float(percent) / 100 for percent in kind["coverage"]]
        found = list(kind["coverage"].values())
        errors = [2 * (one["standard_error"] or 0.0) for one in found]
        axes.errorbar(nominal, [one["mean"] for one in found], errors, capsize=3, **STYLES[name])
    axes.set(title="Coverage of central intervals", xlabel="nominal, %", ylabel="share of values inside", xlim=(0.4, 1))
    axes.set_xticks([0.5, 0.8, 0.9, 0.95], ["50", "80", "90", "95"])
    axes.legend(loc="lower right", title="diagonal: calibrated", frameon=False)


def _pit(axes: "Axes", report: Mapping[str, Any]) -> None:
    bins = len(next(iter(_kinds(report).values()))["pit"])
    half = STDS * math.sqrt((bins - 1) / report["values"])
    axes.fill_between([0, 1], 1 - half, 1 + half, **BAND)
    axes.axhline(1, color="0.4", linewidth=0.8)
    edges = np.arange(bins + 1) / bins
    for name, kind in _kinds(report).items():
        style = {key: value for key, value in STYLES[name].items() if key != "marker"}
        axes.stairs([bins * share for share in kind["pit"]], edges, linewidth=1.5, baseline=None, **style)
    axes.set(title="PIT histogram", xlabel="u = F(x)", ylabel="density (1: calibrated)", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _error(axes: "Axes", sigma: Mapping[str, Any] | None) -> None:
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
        ticks = TICKS[min(int(math.log10(high / low)), 2)]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=ticks))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    correlation = sigma["correlation_of_logs"]
    words = "σ does not vary" if correlation is None else f"over examples, log σ and log error\ncorrelate by {correlation:.2f}"
    axes.legend(frameon=False, title=words, loc="upper left")


def _residuals(axes: "Axes", residuals: Mapping[str, Any]) -> None:
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
    half = STDS / np.sqrt(longest[1:])
    axes.fill_between(range(1, len(longest)), -half, half, **BAND)
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


def svg(draw: Draw, entries: int, height: float = PANEL[1]) -> bytes:
    """Draw an SVG; the same numbers give the same bytes, whatever the user's style."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(
        [
            "default",
            {
                "svg.hashsalt": "sigma-vae",
                "svg.fonttype": "none",
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
            },
        ]
    ):
        figure = Figure(figsize=(PANEL[0], height + 0.2 * math.ceil(entries / 2)), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if entries:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _with_plain_names(buffer.getvalue())


def _with_plain_names(svg: bytes) -> bytes:
    """Number the clip paths: matplotlib's names depend on the last bits of coordinates."""
    names = dict.fromkeys(CLIP_PATH.findall(svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"clip-%d" % number)
    return svg


def plot_in_words(what: str, numbers: Iterable[str]) -> str:
    """Alternative text of a plot: its numbers."""
    return f"Plot. {what}: {'; '.join(numbers)}."
