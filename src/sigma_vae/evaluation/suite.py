"""Evaluate a model by every metric that applies, as one typed result."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, final

from sigma_vae.config import DataConfig, EvaluationSettings, parse
from sigma_vae.data import Batches, Scaling, Splits, as_batches, as_splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import bounds as _bounds
from sigma_vae.evaluation import elbo as _elbo
from sigma_vae.evaluation.base import (
    EVALUATION_BATCH,
    Column,
    EvaluationData,
    Metric,
    Result,
    Row,
    evaluation_batch,
    metrics,
    part,
    plain,
    spaced,
)
from sigma_vae.evaluation.elbo import Bounds, ElboResult
from sigma_vae.registry import register
from sigma_vae.vae import VAE, Scores

ABOUT = (
    *("data", "split", "network", "likelihood", "context_frames"),
    *("prior", "prior_held_out_nats", "prior_fitted_on", "sigma_fitted_on", "of_examples", "how"),
)
"""Keys of ``evaluation.json`` that say which run, data and versions it is about."""


@final
class Evaluation(Mapping[str, Any]):
    """The results of an evaluation: bounds, and a section for each further metric.

    Read it by attribute (``report.elbo_nats.mean``, ``report.iwae.iwae_nats.mean``) or by key
    (``report["elbo_nats"]["mean"]``). Its keys are those of ``evaluation.json``: the bounds at the top, each other
    result under the name of its metric.

    Args:
        results: results by the names of metrics; ``elbo`` is always there.
        about: the run, data and versions, by the keys of :data:`ABOUT`.
    """

    def __init__(self, results: Mapping[str, Result], about: Mapping[str, Any] | None = None) -> None:
        self.results = dict(results)
        self.about = dict(about or {})

    @property
    def bounds(self) -> ElboResult:
        """Result of the metric ``elbo``."""
        found = self.results["elbo"]
        assert isinstance(found, ElboResult)
        return found

    @property
    def sections(self) -> dict[str, Result]:
        """Results of all other metrics, by name."""
        return {name: result for name, result in self.results.items() if name != "elbo"}

    def updated(self, results: Mapping[str, Result]) -> "Evaluation":
        """Add results; a result with several names (``quality``) keeps those that it had under other names."""
        merged = dict(self.results)
        for name, result in results.items():
            before = merged.get(name)
            merged[name] = {**before, **result} if isinstance(before, dict) and isinstance(result, dict) else result
        return Evaluation(merged, self.about)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, words, lists and dictionaries, as ``evaluation.json`` has them."""
        return {name: plain(value) for name, value in self.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Evaluation":
        """Read what :meth:`to_json` gave; the sections of metrics that are not registered here stay dictionaries.

        Raises:
            ValueError: a result lacks a number, or has another type.
        """
        known = metrics()
        top = {*ABOUT, *Bounds.__dataclass_fields__, *ElboResult.__dataclass_fields__}
        results: dict[str, Any] = {"elbo": parse(dict(content), ElboResult, "the bounds")}
        for name, section in content.items():
            if name not in top | {"elbo"}:  # the bounds are not a section
                read = section is not None and name in known
                results[name] = parse(section, known[name].result, f"the section {name}") if read else section
        return cls(results, {name: content[name] for name in ABOUT if name in content})

    def _values(self) -> dict[str, Any]:
        return {**self.about, **self.bounds, **self.sections}

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("results", "about"):  # these are missing only while it is unpickled
            raise AttributeError(name)
        values = self._values()
        if name not in values:
            raise AttributeError(f"this evaluation has no {name!r}; it has {', '.join(values)}")
        return values[name]

    def __repr__(self) -> str:
        return f"Evaluation({self.to_json()})"

    def _repr_html_(self) -> str:

        return as_html(self)


def evaluate(
    vae: VAE,
    data: object,
    training: object = None,
    seed: int = 0,
    *,
    settings: EvaluationSettings | None = None,
    like: Splits | Scaling | None = None,
) -> Evaluation:
    """Evaluate a model on held-out data: the single-sample bounds, and the metrics that the settings name.

    Args:
        vae: calibrated on training data; put into eval mode.
        data: :class:`~sigma_vae.data.Splits`, or a data set's name or path, of which the split of the settings is used
            (test by default). Or held-out examples: an array, a tensor, a data frame, a torch or Hugging Face data set,
            a loader, or :class:`~sigma_vae.data.Batches`.
        training: training examples, in any of these forms, for metrics that need them; the training split of ``Splits``
            by default.
        seed: seed of the posterior's noise, which is keyed by example.
        settings: further metrics, and how to measure them; their own ``seed`` is used.
        like: the model's data, or their scaling, by which examples are scaled; by default, values are taken as they
            are, or as levels where the likelihood has levels.

    Raises:
        ValueError: the data do not fit the model, or a metric is named that does not apply.
    """
    settings = settings or EvaluationSettings(metrics=(), seed=seed)
    vae.eval()
    material = evaluation_data(vae, data, training, settings, like)
    return Evaluation(measure(vae, material, settings, chosen(vae, material, settings)))


def score(vae: VAE, data: object, seed: int = 0, *, like: Splits | Scaling | None = None) -> Scores:
    """Score every example, in the split's order and independent of the batch size, on the CPU in float64.

    Densities are those of the data in their own units: for standardised data, the model's plus the Jacobian's term.

    Of several processes, each calls this with its share of the split (``Batches(rank, world_size)``), and each gets all
    scores. The model is calibrated on training data and in eval mode; the arguments are those of :func:`evaluate`.

    Raises:
        ValueError: the data do not fit the model, or the batches are a share, and there is no group of as many
            processes.
    """
    return _elbo.score(vae, _batches(vae, data, "test", like), seed)


def calibrate(vae: VAE, data: object, seed: int = 0, *, like: Splits | Scaling | None = None) -> None:
    """Solve the likelihood's scales exactly on these data, with the weights as they are: see :meth:`VAE.calibrate`.

    The arguments are those of :func:`evaluate`; of ``Splits`` and names, the validation split is used: residuals of
    training examples are too small where a model overfits.
    """
    vae.calibrate(_batches(vae, data, "validation", like), seed)


def evaluation_data(
    vae: VAE, data: object, training: object, settings: EvaluationSettings, like: Splits | Scaling | None = None
) -> EvaluationData:
    """The examples to measure on, on the model's device; see :func:`evaluate`."""
    if isinstance(data, str | Path | DataConfig):
        data = as_splits(data)
    splits = data if isinstance(data, Splits) else None
    training = splits if training is None else training
    held_out = _batches(vae, data, settings.split, like)
    if settings.examples is not None and settings.examples < len(held_out.store):
        held_out = part(held_out, spaced(len(held_out.store), settings.examples))
    return EvaluationData(held_out, None if training is None else _batches(vae, training, "train", like), splits)


def _batches(vae: VAE, data: object, split: SplitName, like: Splits | Scaling | None) -> Batches:
    """Data of any kind in batches, on the model's device."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, str | Path | DataConfig):
        data = as_splits(data)
    if isinstance(data, Splits):
        return data.batches(split, evaluation_batch(data), device=vae.device)
    made = as_batches(data, like or _as_they_are(vae), EVALUATION_BATCH, split=split)
    frames = made.store.shape[0] if vae.network.reads_clips else 1
    return Batches(made.store.to(vae.device), made.scaling, max(1, EVALUATION_BATCH // frames))


def _as_they_are(vae: VAE) -> Scaling:
    """Levels where the likelihood has them; else real values of any range, as they are."""
    channels, levels = vae.likelihood.channels, vae.likelihood.levels
    return Scaling(levels) if levels is not None else Scaling(mean=(0.0,) * channels, deviation=(1.0,) * channels)


def chosen(vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> list[Metric]:
    """The metrics that the settings ask for, or by default those that cost little more than the bounds.

    Raises:
        ValueError: a metric is asked for that does not exist, or that cannot be measured of the model or on the data.
    """
    for name in settings.metrics or ():
        register.metric.entry(name)
    found = []
    for metric in metrics().values():
        asked = metric.is_asked_for(settings)
        if asked or metric.measured == "always" or (metric.measured == "by default" and settings.metrics is None):
            obstacle = metric.obstacle(vae, data, settings)
            if obstacle is not None and asked:
                raise ValueError(f"{metric.name} cannot be measured: {obstacle}; leave it out of the metrics")
            if obstacle is None:
                found.append(metric)
    return found


def measure(
    vae: VAE,
    data: EvaluationData,
    settings: EvaluationSettings,
    wanted: Iterable[Metric],
    from_first: Callable[[Callable[[], Result]], Result] = lambda make: make(),
) -> dict[str, Result]:
    """Measure metrics of a model in eval mode, by name: those that can, in the pass that scores the examples.

    Of several processes, each has its share of the data; ``from_first`` lets the first one measure, and hands its
    result to all.
    """
    wanted = list(wanted)
    watchers = {metric.name: each for metric in wanted if (each := metric.watcher(vae, settings)) is not None}
    scores, results = _elbo.score_watched(vae, data.held_out, settings.seed, list(watchers.values()))
    watched, data = dict(zip(watchers, results, strict=True)), replace(data, scores=scores)
    found: dict[str, Result] = {}
    for metric in wanted:
        if metric.name in watched:
            found[metric.name] = watched[metric.name]
        elif metric.on_one_process:
            found[metric.name] = from_first(partial(metric.measure, vae, data.on_one_process(), settings))
        else:
            found[metric.name] = metric.measure(vae, data, settings)
    return found


def columns(paths: Iterable[str]) -> dict[str, Column]:
    """The columns of a study's table for dotted places in ``evaluation.json``, in the order of the metrics.

    Each column has its own path and title; places that no metric has a column for are left out.

    >>> [column.title for column in columns(["examples", "rate_nats", "quality.mine.pt.clips.frechet"]).values()]
    ['rate, nats', 'Fréchet distance (mine.pt)']
    """
    paths = list(paths)
    return {
        path: Column(path, title, column.digits)
        for metric in metrics().values()
        for column in metric.columns
        for path in paths
        if (title := column.title_of(path)) is not None
    }


def __getattr__(name: str) -> Any:
    moved = {"entropy_identity": _bounds} | dict.fromkeys(
        ("scores_under_standard_prior", "has_fitted_prior", "standard_prior"), _elbo
    )
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {moved[name].__name__}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(moved[name], name)


# -- the numbers of an evaluation in words: for the terminal, pages and notebooks --------------------------------------

MEANINGS = {
    "elbo_nats": "Bound on the log-likelihood of a held-out example, with the model's own σ. Higher is better.",
    "elbo_post_hoc_nats": "The same with σ refitted on validation data: use it to compare models of different scales.",
    "objective_nats": "Training objective of a held-out example. It is not a likelihood of these data, and bounds nothing.",
    "objective_post_hoc_nats": "The same with σ refitted on validation data.",
    "rate_nats": "Information in the latents: the KL of the posterior from the prior.",
    "distortion_nats": "Negative log-likelihood of an example given its latents. Densities above 1 make it negative.",
    "bits_per_dim": "Bits needed to store a value of an example without loss. Lower is better; compares between all decoders.",
    "bits_per_dim_post_hoc": "The same with the σ that is best for the levels.",
    "sigma_post_hoc_density": "Noise of the decoder: the typical error of a value, where the data's range is 1 (or its std, if scaled).",
    "sigma_post_hoc_level": "The σ that fits the levels best.",
    "factor_post_hoc_density": "Factor by which the predicted σ should be multiplied. 1: they are right on average.",
    "factor_post_hoc_level": "The same for levels.",
    "kl_per_layer_nats": "Rate of each layer of latents, from the top down.",
    "mean_kl_nats": "Rate again: the information that latents have about their example, and the marginal KL.",
    "mutual_information": "Information that latents have about their example.",
    "marginal_kl": "KL of the latents of all examples together from the prior: what samples from the prior suffer from.",
    "active_channels": "Channels of the map of latents that the encoder uses.",
    "kl_per_channel_nats": "Rate of each channel of the map of latents.",
    "entropy gap": "Difference of the bound from a sum of three entropies, on training data: near 0 where training has converged.",
    "active_units": "Latents that the encoder uses: their mean varies between examples.",
    "log_likelihood_nats (pPCA": "Log-likelihood under the best linear model. A VAE below it is under-trained.",
    "bits_per_dim (pPCA": "Bits per value of that linear model.",
}
"""A sentence for each row of the table of a run's bounds, by the beginning of its name; the longest one that fits counts."""


def meaning(row: str) -> str:
    """A sentence for a row of the table of bounds.

    >>> meaning("rate_nats with N(0, I)")
    'Information in the latents: the KL of the posterior from the prior. With N(0, I) in place of the fitted prior.'
    """
    fitting = [name for name in MEANINGS if row.startswith(name)]
    words = MEANINGS[max(fitting, key=len)] if fitting else ""
    return f"{words} With N(0, I) in place of the fitted prior." if words and row.endswith("with N(0, I)") else words


def report_rows(report: Any) -> Iterator[Row]:
    """The rows of all metrics of an evaluation, the bounds first."""
    for name, metric in metrics().items():
        if report.results.get(name) is not None:
            yield from metric.rows(report.results[name])


def notes(report: Any) -> list[str]:
    """The remarks of the metrics on their results."""
    found = ((metric, report.results.get(name)) for name, metric in metrics().items())
    return [line for metric, result in found if result is not None for line in metric.notes(result, report)]


def as_html(report: Any) -> str:
    """The numbers of an evaluation as a table for notebooks."""
    about, examples = report.about, report.bounds.examples
    named = " · ".join(str(about[key]) for key in ("data", "network", "likelihood", "prior") if key in about)
    rows = {row.name: f"{row.value} ± {row.standard_error}" if row.standard_error else row.value for row in report_rows(report)}
    caption = f"{named + ': ' if named else ''}mean ± standard error over {examples} examples"
    return table(caption, rows, {name: meaning(name) for name in rows}) + "".join(
        f"<p>{escape(line)}</p>" for line in notes(report)
    )


def table(caption: str, rows: Mapping[str, str], meanings: Mapping[str, str] | None = None) -> str:
    """An HTML table of names and values, and of what they mean.

    >>> table("x", {"σ": "<0.1"})
    '<table><caption>x</caption><tr><th scope="row">σ</th><td>&lt;0.1</td></tr></table>'
    """
    cells = (
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td>'
        + (f"<td>{escape(meanings.get(name, ''))}</td>" if meanings else "")
        + "</tr>"
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(caption)}</caption>{''.join(cells)}</table>"
