"""The page of a run: ``report.html``, one file with numbers in words, curves, pictures, calibration and advice."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sigma_vae import __version__
from sigma_vae.config import write_whole
from sigma_vae.data import Batches, Splits
from sigma_vae.evaluation import Evaluation, score, words
from sigma_vae.evaluation.base import each_example, evaluation_batch, part, spaced
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.plots import OKABE_ITO, Plot, calibration_plots, drawable, plot_in_words, png, svg
from sigma_vae.progress import bar
from sigma_vae.runs import advice
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.folder import Run, config_of, data_of, open_model, read_json
from sigma_vae.runs.sections import Picture, Section, Table, template
from sigma_vae.types import Batch
from sigma_vae.vae import VAE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PAGE", "report", "write_page"]

PAGE = "report.html"
EXAMPLES = 5_000
"""Most test examples that the page measures calibration, latents and oddness on, evenly spaced."""
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
        return part(whole, spaced(len(self.data.test), EXAMPLES))


def _write(made: _Material, missing: str) -> Path:
    made.vae.eval()
    curves = advice.curves(made.out)
    test = made.test
    parts = [
        _advised(made, curves, missing),
        _what(made),
        _numbers(made),
        _training(curves),
        _pictures(made),
        *([] if test is None else [_calibration(made, test), _latents(made, test), _examples(made, test)]),
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


def _advised(made: _Material, curves: advice.Curves, missing: str) -> Section:
    found = advice.advice(made.out, made.config, made.evaluation, curves)
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
        (row.name, f"{row.value} ± {row.standard_error}" if row.standard_error else row.value, words.meaning(row.name))
        for row in words.number_rows(made.evaluation)
    )
    examples = f"Mean ± standard error over {made.evaluation.bounds.examples} test examples"
    return Section("Numbers", tables=(Table(examples, ("number", "value", "meaning"), rows, stacks=True),))


def _training(curves: advice.Curves) -> Section | None:
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


def _calibration(made: _Material, test: Batches) -> Section | None:
    if not made.vae.likelihood.normalised:
        return None
    found = made.evaluation.results.get("calibration")
    result = calibration(made.vae, test) if not isinstance(found, Mapping) else found
    said = advice.shows(result)
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


def _examples(made: _Material, test: Batches) -> Section:
    """The test examples with the lowest and highest bound."""
    assert made.data is not None
    scores = score(made.vae, test)
    bound = scores.log_likelihood - scores.rate
    order = bound.argsort()
    n = min(EXTREMES, len(order) // 2 or 1)
    chosen = {"oddest": order[:n], "most typical": order.flip(0)[:n]}
    names = made.data.names["test"][spaced(len(made.data.test), EXAMPLES).numpy()]
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
