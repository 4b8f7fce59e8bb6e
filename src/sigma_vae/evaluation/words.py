"""What the numbers of an evaluation mean, in words: for the terminal, pages and notebooks."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from sigma_vae.evaluation.base import Row, metrics

__all__ = ["as_html", "meaning", "notes", "number_rows", "table"]

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


def number_rows(report: Any) -> Iterator[Row]:
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
    rows = {row.name: f"{row.value} ± {row.standard_error}" if row.standard_error else row.value for row in number_rows(report)}
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
