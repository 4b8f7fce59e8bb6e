"""The page of a run: ``report.html``, one file with numbers in words, curves, pictures, calibration and advice."""

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sigma_vae import __version__, models
from sigma_vae.config import RunConfig, write_whole
from sigma_vae.data import Batches, Splits
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.base import each_example, evaluation_batch, part, spaced
from sigma_vae.evaluation.calibration import CalibrationWatcher
from sigma_vae.evaluation.elbo import score_watched
from sigma_vae.evaluation.plots import OKABE_ITO, Plot, calibration_plots, drawable, plot_in_words, png, svg
from sigma_vae.evaluation.suite import meaning, notes, report_rows
from sigma_vae.progress import bar
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.folder import Run, config_of, data_of, open_model, read_json
from sigma_vae.training.callbacks import rows_before
from sigma_vae.types import Batch
from sigma_vae.vae import VAE, Scores

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.axes import Axes

PAGE = "report.html"
EXAMPLES, VALUES = 5_000, 2**21
"""Most test examples, and most of their values, that the page measures calibration, latents and oddness on."""
EXTREMES = 8
"""Examples shown of the oddest, and of the most typical."""
CURVES = {
    "the bound, in nats": ("train/elbo_nats", "validation/elbo_nats", "validation/objective_nats"),
    "rate, in nats": ("train/rate_nats", "validation/rate_nats"),
    "σ that training solves or learns": ("train/sigma",),
    "bits per value of held-out data": ("validation/bits_per_dim",),
}
"""Plots of metrics over the steps: what they show, and the metrics."""
PICTURES = {
    "samples-standard-prior.png": "Samples, latents drawn from N(0, I).",
    "samples.png": "Samples, latents drawn from the prior {prior}.",
    "reconstructions.png": "Test examples, each above its reconstruction.",
}
CALIBRATION = (
    "A calibrated model's uncertainty is right: its intervals hold as many values as they say. Grey bands hold 99 % of what such a model"
    " with independent errors would show."
)
Facts = tuple[tuple[str, str], ...]


# -- sections: tables, pictures and words, and the templates that set them in one HTML file ----------------------------


class Card(NamedTuple):
    """A claim with its verdicts, each a word and a finding."""

    name: str
    sentence: str
    verdicts: tuple[tuple[str, str], ...]
    rule: str


class Table(NamedTuple):
    """A table of words; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether HTML shows it only on demand."""
    stacks: bool = False
    """Whether a narrow screen shows the cells of a row below each other."""


class Picture(NamedTuple):
    """A picture with its alternative text and caption."""

    place: str
    """Path relative to the folder of the study or run, of a plot or a picture."""
    content: bytes
    alt: str
    caption: str

    @property
    def kind(self) -> str:
        """Its media type."""
        return "image/svg+xml" if self.is_plot else "image/png"

    @property
    def is_plot(self) -> bool:
        """Whether it is drawn from numbers, which its alternative text has."""
        return self.place.endswith(".svg")


class Section(NamedTuple):
    """A heading with its content."""

    title: str
    words: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    further: tuple[str, ...] = ()
    """Paragraphs at the end."""
    points: tuple[str, ...] = ()
    """A list at the beginning."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.cards or self.tables or self.pictures)


def template(name: str, package: str = "sigma_vae.runs", *, escape: bool = True) -> "Template":
    """Load a template of a package, this one unless given; ``escape`` is for HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"base64": _base64, "line": _line, "code": _code}
    return environment.from_string(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _code(words: str) -> str:
    """Set what stands between backticks as code that is not broken."""
    from markupsafe import Markup, escape

    parts = str(escape(words)).split("`")
    return Markup("").join(Markup(f"<code>{part}</code>" if i % 2 else part) for i, part in enumerate(parts))


def _line(words: str) -> str:
    """Escape a text for one line of Markdown."""
    for sign in ("\\", "`", "*", "|", "[", "_", "~"):
        words = words.replace(sign, "\\" + sign)
    return " ".join(words.replace("&", "&amp;").replace("<", "&lt;").split())


# -- curves of a run, for advice ---------------------------------------------------------------------------------------

UNUSED_NATS = 0.1
"""Rate below which the latents say nothing of the data."""
RISING, FALLEN = 0.01, 0.02
"""Shares of the gain of a whole training: what its last fifth should not add, and what is a fall after the best."""
EARLY = 0.6
"""Part of the training before which a best validation is early."""
FEWEST = 5
"""Validations from which a curve is judged."""
OFF, SLANT = 0.02, 0.1
"""Differences of coverage, and of shares of a histogram, that are remarked upon."""
CORRELATED = 0.1


class Curves(NamedTuple):
    """The metrics of a run by name: their steps (from 0) and values."""

    rows: Mapping[str, list[tuple[int, float]]]

    def of(self, name: str) -> list[tuple[int, float]]:
        """Steps and values; empty where it was not logged."""
        return self.rows.get(name, [])

    @property
    def score(self) -> list[tuple[int, float]]:
        """The validation ELBO, or the objective of a likelihood that has none."""
        return self.of("validation/elbo_nats") or self.of("validation/objective_nats")


def read_curves(out: Path) -> Curves:
    """Read ``metrics.csv`` of a run; no curves where another logger was chosen.

    Raises:
        ValueError: the file is no table of metrics.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows_before(out / "metrics.csv", 2**62):
        for name, value in row.items():
            if name != "step" and math.isfinite(number := float(value)):
                found.setdefault(name, []).append((int(row["step"]), number))
    return Curves(found)


# -- advice ------------------------------------------------------------------------------------------------------------


def advice(out: Path, config: RunConfig, report: Evaluation, found: Curves) -> list[str]:
    """Suggest what to do, by the numbers and curves of a finished run; empty where nothing is unusual.

    Args:
        out: folder of the run, for the commands.
        config: of the run.
        report: its evaluation.
        found: its curves.
    """
    return [*_of_latents(config, report), *notes(report), *_of_length(out, config, found)]


def _of_latents(config: RunConfig, report: Evaluation) -> Iterator[str]:
    rate, units, dim = report.bounds.rate_nats.mean, report.bounds.active_units, report.bounds.latent_dim
    if rate < UNUSED_NATS:
        yield (
            f"The latent is unused: its rate is {rate:.3g} nats, so all samples look alike. A small network trained for longer, or"
            " another seed, may find a use for it; a σ that the decoder predicts (per-image, per-pixel) can make latents unnecessary."
        )
    elif units is not None and dim is not None and units < dim:
        yield (
            f"{dim - units} of {dim} latents are unused. They do no harm: a calibrated decoder leaves those off that it does not need."
            + (f" --latent-dim {max(units, 1)} would do." if models.has_size(config.model.network, "latent_dim") else "")
        )


def _of_length(out: Path, config: RunConfig, found: Curves) -> Iterator[str]:
    score, epochs = found.score, dict(found.of("epoch"))
    if len(score) < FEWEST:
        return
    best_step, best = max(score, key=lambda point: point[1])
    (first_step, first), (last_step, last) = score[0], score[-1]
    gain = max(best - first, 1e-9)
    before = [value for step, value in score if step <= last_step - (last_step - first_step) / 5]
    risen = last - max(before, default=first)
    if best_step == last_step and risen > RISING * gain:
        share = f"by {risen:.2g} nats in the last fifth of the steps"
        yield f"Validation was still rising at the end ({share}): train longer. {_longer(out, config, epochs, last_step)}"
    elif best_step < EARLY * last_step and best - last > FALLEN * gain:
        when = _when(best_step, last_step, epochs)
        yield (
            f"Validation was best at {when}, and {best - last:.2g} nats lower at the end, while training went on: the model has the"
            " weights of the best. More data, a smaller network (--width) or earlier stop (--patience) fit these data better."
        )


def _when(best: int, last: int, epochs: Mapping[int, float]) -> str:
    if best < 0:
        return "the start, before the first step"
    if best in epochs and last in epochs and epochs[last] > epochs[best]:
        return f"epoch {epochs[best] + 1:.0f} of {epochs[last] + 1:.0f}"
    return f"step {best + 1} of {last + 1}"


def _longer(out: Path, config: RunConfig, epochs: Mapping[int, float], last: int) -> str:
    if config.training.max_steps is not None or config.training.max_minutes is not None:
        limit = "--max-steps" if config.training.max_steps is not None else "--max-minutes"
        return f"Train again with a larger {limit}."
    return f"Continue it: `sigma-vae resume {out} --epochs {2 * (int(epochs.get(last, 0)) + 1)}`"


def next_command(out: Path, report: Evaluation) -> str:
    """The command that most would run next."""
    if report.results.get("information") is None and report.results.get("calibration") is None:
        return f"sigma-vae evaluate {out}"
    return f"sigma-vae sample {out} --n 100"


# -- what the plots of calibration show --------------------------------------------------------------------------------


def shows(result: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each plot of calibration on what this one shows, by the plot's name."""
    kind = next(result[name] for name in ("density", "level") if result[name] is not None)
    sentences: dict[str, Callable[[], str]] = {
        "coverage": lambda: _coverage_shows(kind["coverage"]),
        "pit": lambda: _pit_shows(kind["pit"]),
        "error": lambda: _error_shows(result["sigma"]),
        "residuals": lambda: _residuals_show(result["residuals"]),
    }
    return {name: sentence() for name, sentence in sentences.items()}


def _coverage_shows(coverage: Mapping[str, Any]) -> str:
    off = {percent: share["mean"] - float(percent) / 100 for percent, share in coverage.items()}
    allowed = {percent: OFF if float(percent) < 90 else OFF / 2 for percent in off}
    percent = "90" if "90" in off else max(off, key=lambda name: abs(off[name]))
    said = f"The {percent} % intervals hold {coverage[percent]['mean']:.1%} of the values."
    if all(abs(each) <= allowed[percent] for percent, each in off.items()):
        return f"{said} All intervals hold about as many values as they should."
    if all(each >= -allowed[percent] for percent, each in off.items()):
        return f"{said} Intervals are too wide: the model is less sure than it could be."
    if all(each <= allowed[percent] for percent, each in off.items()):
        return f"{said} Intervals are too narrow: the model is surer than it should be."
    return (
        f"{said} Narrow intervals hold too many values and wide ones too few: errors have heavier tails than the likelihood,"
        " as with one σ for easy and hard values. laplace, student-t or a predicted σ (per-image, per-pixel) allow for that."
        if off[min(off, key=float)] > 0
        else f"{said} Narrow intervals hold too few values and wide ones too many: errors have lighter tails than the likelihood."
    )


def _pit_shows(shares: Sequence[float]) -> str:
    n = len(shares)
    ends, middle = (shares[0] + shares[-1]) * n / 2 - 1, sum(shares[n // 4 : n - n // 4]) * 2 - 1
    slant = (sum(shares[n // 2 + 1 :]) - sum(shares[: n // 2 - 1])) / 2
    words = []
    if abs(slant) > SLANT:
        words.append(f"It leans to the {'right: predictions are too low' if slant > 0 else 'left: predictions are too high'}.")
    if middle > SLANT:
        words.append("There are too many values in the middle: most errors are smaller than the model expects.")
    elif middle < -SLANT:
        words.append("There are too few values in the middle: most errors are larger than the model expects.")
    if ends > SLANT and middle > -SLANT:
        words.append("The outermost bars are high: some errors are much larger than expected.")
    return " ".join(words) or "It is about flat: values fall where the model says."


def _error_shows(sigma: Mapping[str, Any] | None) -> str:
    if sigma is None:
        return "This likelihood has no variance to compare with errors."
    found = sigma["per_value"]
    weights = found["count"]
    predicted, error = (
        math.sqrt(sum(w * v for w, v in zip(weights, found[name], strict=True)) / sum(weights))
        for name in ("predicted_variance", "mean_squared_error")
    )
    ratio = error / predicted if predicted else math.inf
    sizes = (
        f"Errors are {ratio:.2f} times the predicted σ" if abs(ratio - 1) > OFF else "Errors are as large as the predicted σ"
    )
    correlation = sigma["correlation_of_logs"]
    if correlation is None:
        return f"{sizes}, over all values. σ is the same for all examples, so easy and hard ones are not told apart."
    return f"{sizes}, over all values. Over examples, σ and error correlate by {correlation:.2f} (of their logarithms)."


def _residuals_show(residuals: Mapping[str, Any]) -> str:
    axes = residuals["axes"] or {}
    first = {name: axis["autocorrelation"][1] for name, axis in axes.items() if len(axis["autocorrelation"]) > 1}
    if not first:
        return _columns_show(residuals["channels"])
    name = max(first, key=lambda each: abs(first[each]))
    said = f"Errors of neighbours along the {name} correlate by {first[name]:.2f}."
    if abs(first[name]) <= CORRELATED:
        return f"{said} They are about independent, as the likelihood says."
    return (
        f"{said} The likelihood takes them as independent: draws from p(x|z) look grainier than the data, and what is missing in the"
        " reconstructions has structure that more latents or a larger network could explain."
    )


def _columns_show(correlations: Sequence[Sequence[float]] | None) -> str:
    between = [abs(row[other]) for i, row in enumerate(correlations or ()) for other in range(i)]
    if not between:
        return "There are no other values whose errors could be compared."
    said = f"Errors of two columns correlate by at most {max(between):.2f}."
    if max(between) <= 2 * CORRELATED:
        return f"{said} They are about independent, as the likelihood says."
    return f"{said} What these columns have in common is not all in the latents: more of them may help."


# -- the page of a run -------------------------------------------------------------------------------------------------


def report(out: Path, device: str = "auto") -> Path:
    """Write the page of a finished run anew, and return its path.

    Without the run's data, the parts that need them are left out.

    Raises:
        ValueError: there is no finished run.
        OSError: the folder cannot be written.
    """
    config, saved = config_of(out), open_model(out, device)
    try:
        data, missing = data_of(out, config), ""
    except (ValueError, OSError) as error:
        data, missing = None, f"Calibration, latents and examples are left out, as the data cannot be read: {error}"
    with bar("writing the page"):
        return _write(_Material(out, config, saved.vae, data, read_evaluation(out)), missing)


def write_page(out: Path, run: Run, found: Evaluation) -> None:
    """Write the page of a run that has just ended."""
    with bar("writing the page"):
        _write(_Material(out, run.config, run.vae, run.data, found), "")


class _Material(NamedTuple):
    """The run, its data and its results, for a page."""

    out: Path
    config: Any
    vae: VAE
    data: Splits | None
    evaluation: Evaluation

    @property
    def test(self) -> Batches | None:
        """Some test examples, on the model's device."""
        if self.data is None:
            return None
        whole = self.data.batches("test", evaluation_batch(self.data), device=self.vae.device)
        return part(whole, self.shown)

    @property
    def shown(self) -> Tensor:
        """Places of those examples: no more than the evaluation looked at, as each costs as much again."""
        assert self.data is not None
        affordable = max(VALUES // math.prod(self.data.test.shape), 2 * EXTREMES)
        return spaced(len(self.data.test), min(EXAMPLES, affordable, self.evaluation.bounds.examples))


def _write(made: _Material, missing: str) -> Path:
    made.vae.eval()
    curves = read_curves(made.out)
    test = made.test
    parts = [
        _advised(made, curves, missing),
        _what(made),
        _numbers(made),
        _training(curves),
        _pictures(made),
        *([] if test is None else _of_examples(made, test)),
    ]
    about = made.evaluation.about
    content = {
        "title": f"{Path(about['data']).name} · {made.config.model.network} · {made.config.model.likelihood}",
        "about": f"A variational autoencoder with a calibrated decoder, in the folder {made.out.name}.",
        "made": f"Made on {datetime.now(UTC):%Y-%m-%d} by sigma-vae {__version__}.",
        "sections": [each for each in parts if each is not None],
        "signs": {},
    }
    write_whole(made.out / PAGE, template("report.html.j2").render(content))
    return made.out / PAGE


def _advised(made: _Material, curves: Curves, missing: str) -> Section:
    found = advice(made.out, made.config, made.evaluation, curves)
    if missing:
        found.append(missing)
    return Section("What to do", points=tuple(found) or ("Nothing: the curves and numbers show nothing unusual.",))


def _what(made: _Material) -> Section:
    facts = (("what", "value"), *_facts(made))
    return Section(
        "What was trained on what", tables=(Table("The run", facts[0], facts[1:], stacks=True),), further=(_replay(made),)
    )


def _facts(made: _Material) -> Iterator[tuple[str, str]]:
    known = read_json(made.out / "environment.json")
    data = known.get("data") if isinstance(known.get("data"), dict) else {}
    assert isinstance(data, dict)
    yield "data", str(made.config.data.source)
    if isinstance(counts := data.get("counts"), dict):
        yield "examples", ", ".join(f"{split} {count}" for split, count in counts.items())
    yield "preprocessing", str(data.get("preprocessing", "unknown"))
    yield "network", f"{made.config.model.network}, {sum(p.numel() for p in made.vae.parameters()):,} weights"
    yield "latents", " + ".join(str(size) for size in made.vae.network.latents.sizes)
    yield "likelihood", f"{made.config.model.likelihood}, observes the {made.vae.likelihood.observes}"
    yield "prior", str(made.evaluation.about.get("prior", "learned with the network"))
    yield "seed", str(made.config.seed)
    choices = known.get("choices") if isinstance(known.get("choices"), dict) else {}
    assert isinstance(choices, dict)
    yield "hardware", ", ".join(str(choices[name]) for name in ("name", "precision") if name in choices)
    yield "versions", ", ".join(f"{name} {known[name]}" for name in ("sigma_vae", "torch", "python") if name in known)


def _replay(made: _Material) -> str:
    return f"Train it again: `sigma-vae replay {made.out}/config.yaml --out NEW_FOLDER`"


def _numbers(made: _Material) -> Section:
    rows = tuple(
        (row.name, f"{row.value} ± {row.standard_error}" if row.standard_error else row.value, meaning(row.name))
        for row in report_rows(made.evaluation)
    )
    examples = f"Mean ± standard error over {made.evaluation.bounds.examples} test examples"
    return Section("Numbers", tables=(Table(examples, ("number", "value", "meaning"), rows, stacks=True),))


def _training(curves: Curves) -> Section | None:
    rows = dict(curves.rows)
    rows["train/elbo_nats"] = [(step, -value) for step, value in rows.get("train/loss_nats", [])]
    plots = ((words, _curve({name: rows[name] for name in names if rows.get(name)})) for words, names in CURVES.items())
    pictures = tuple(
        Picture(f"{words}.svg", plot.content, plot.alt, f"Curve of {words}.") for words, plot in plots if plot is not None
    )
    return Section("Training", pictures=pictures) if pictures else None


def _curve(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Plot | None:
    if not lines:
        return None

    def draw(axes: "Axes") -> None:
        for number, (name, points) in enumerate(lines.items()):
            steps, values = [step + 1 for step, _ in points], [value for _, value in points]
            kind, marker = name.partition("/")[0], "o" if len(points) < 30 else ""
            colour = OKABE_ITO[number]
            axes.plot(steps, values, ("--", "-")[number % 2], label=kind, marker=marker, markersize=3, color=colour)
        axes.set(xlabel="steps", ylim=_limits([value for points in lines.values() for _, value in points]))

    ends = (f"{name.replace('/', ' ')} {points[0][1]:.4g} first, {points[-1][1]:.4g} last" for name, points in lines.items())
    return Plot(svg(draw, len(lines)), plot_in_words("Values over the steps", ends))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that leave out the lowest and highest hundredth: the first steps would flatten the rest."""
    low, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.02, 0.98], dtype=torch.float64)
    ).tolist()
    room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _pictures(made: _Material) -> Section | None:
    prior = made.evaluation.about.get("prior", "of the network")
    there = [(made.out / name, words.format(prior=prior)) for name, words in PICTURES.items() if (made.out / name).is_file()]
    pictures = tuple(Picture(path.name, path.read_bytes(), f"Grid. {words}", words) for path, words in there)
    return Section("Samples and reconstructions", pictures=pictures) if pictures else None


def _of_examples(made: _Material, test: Batches) -> Iterator[Section | None]:
    """Sections that are measured on test examples, in one pass but for the latents."""
    found = made.evaluation.results.get("calibration")
    asked = made.vae.likelihood.normalised and not isinstance(found, Mapping)
    scores, measured = score_watched(made.vae, test, 0, [CalibrationWatcher(made.vae, 0)] if asked else [])
    known = measured[0] if asked else found
    yield _calibration(known) if isinstance(known, Mapping) and made.vae.likelihood.normalised else None
    yield _latents(made, test)
    yield _examples(made, test, scores)


def _calibration(result: Mapping[str, Any]) -> Section:
    said = shows(result)
    plots = calibration_plots(result)
    pictures = tuple(Picture(f"{name}.svg", plot.content, plot.alt, said[name]) for name, plot in plots.items())
    return Section("Calibration", (CALIBRATION,), pictures=pictures)


def _latents(made: _Material, test: Batches) -> Section | None:
    layers = made.evaluation.bounds.kl_per_layer_nats
    if layers is not None:
        return _bars(list(enumerate(layers, 1)), "layer, from the top down", "Rate of each layer of latents")
    if not (made.vae.network.has_posterior and made.vae.network.has_prior):
        return None
    kl = each_example(made.vae, test, lambda batch: _kl(made.vae, batch)).mean(0)
    noun = "latent" if kl.dim() == 1 else "channel"
    kl = kl.flatten(1).sum(1) if kl.dim() > 1 else kl
    order = kl.argsort(descending=True).tolist()
    return _bars([(place, float(kl[place])) for place in order], noun, f"KL of each {noun} from N(0, 1), largest first")


def _kl(vae: VAE, batch: Batch) -> Tensor:
    posterior = vae.encode(batch.x, batch.condition)
    return 0.5 * (posterior.loc.square() + posterior.scale.square() - 1) - posterior.scale.log()


def _bars(numbers: Sequence[tuple[int, float]], axis: str, title: str) -> Section:
    def draw(axes: "Axes") -> None:
        axes.bar(range(len(numbers)), [value for _, value in numbers], color=OKABE_ITO[0])
        axes.set(xlabel=axis, ylabel="nats")
        if len(numbers) <= 32:
            axes.set_xticks(range(len(numbers)), [str(place) for place, _ in numbers], fontsize=7)

    alt = plot_in_words(f"{title}, nats", (f"{place}: {value:.2f}" for place, value in numbers))
    return Section("Latents", pictures=(Picture("latents.svg", svg(draw, 0), alt, f"{title}."),))


def _examples(made: _Material, test: Batches, scores: Scores) -> Section:
    """The test examples with the lowest and highest bound."""
    assert made.data is not None
    bound = scores.log_likelihood - scores.rate
    order = bound.argsort()
    n = min(EXTREMES, len(order) // 2 or 1)
    chosen = {"oddest": order[:n], "most typical": order.flip(0)[:n]}
    names = made.data.names["test"][made.shown.numpy()]
    rows = tuple(
        (kind, str(names[place]), f"{bound[place]:.2f}") for kind, places in chosen.items() for place in places.tolist()
    )
    table = Table("Examples with the lowest and the highest bound", ("kind", "example", "bound, nats"), rows, folded=True)
    words = f"Of {len(order)} test examples, by the bound on their log-likelihood. Odd examples are rare ones, or errors in the data."
    pictures = tuple(_shown(made, test, kind, places) for kind, places in chosen.items()) if drawable(made.data.shape) else ()
    return Section("Oddest and most typical examples", (words,), tables=(table,), pictures=pictures)


def _shown(made: _Material, test: Batches, kind: str, places: Tensor) -> Picture:
    batch = next(iter(part(test, places)))
    examples = test.scaling.undo(batch.x)
    moving = made.vae.network.reads_clips
    content = png(examples.flatten(0, 1), examples.shape[1]) if moving else png(examples, len(places))
    words = f"The {len(places)} {kind}" + (", a clip in each row." if moving else ", the first one first.")
    return Picture(f"{kind}.png", content, words, words)
