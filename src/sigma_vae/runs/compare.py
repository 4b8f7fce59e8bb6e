"""Compare finished runs on the same examples."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sigma_vae.evaluation import Estimate, Evaluation, score
from sigma_vae.evaluation.base import metrics, plain
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.folder import evaluation_batch, model_digest, open_run
from sigma_vae.vae import Scores

__all__ = ["compare"]

SAME = ("data", "split", "examples", "levels", "dims")
"""Keys that must agree for numbers to be about the same thing, and so must the fingerprint of the split."""


def compare(outs: Sequence[Path], *, paired: bool = False, device: str = "auto") -> list[dict[str, Any]]:
    """Set finished runs side by side: a row for each run, with the numbers that its metrics compare.

    Bits per dimension compare between all decoders; nats of a density do not compare with nats of levels, and are None
    unless all runs observe the same. The means of runs are over the same examples, so their standard errors say little
    about their difference: ``paired`` scores every example of each run anew, on the device, and gives the mean
    difference to the first run, with its own standard error. Fréchet distances are those of decoder means; where a run
    has a fitted prior, those of N(0, I) stand beside them.

    Raises:
        ValueError: fewer than two runs, one that has no evaluation or one of other weights, or evaluations of different
            examples.
    """
    if len(outs) < 2:
        raise ValueError(f"compare sets runs side by side and needs at least 2, got {len(outs)}")
    reports = [_report(out) for out in outs]
    for name in SAME:
        _check_same(name, outs, [report.get(name) for report in reports])
    _check_same("examples (by their fingerprint)", outs, [report.about["how"]["split_fingerprint"] for report in reports])
    rows = [
        {"run": str(out), **{name: report.about.get(name) for name in ("network", "likelihood", "prior")}}
        for out, report in zip(outs, reports, strict=True)
    ]
    for name, metric in metrics().items():
        for row, numbers in zip(rows, metric.compared([report.results.get(name) for report in reports]), strict=True):
            row |= plain(numbers)
    if paired:
        same_quantity = len({report.bounds.observes for report in reports}) == 1
        for row, differences in zip(rows, _differences(outs, device, same_quantity), strict=True):
            row |= plain(differences)
    return rows


def _report(out: Path) -> Evaluation:
    """The evaluation of the weights that the run has now."""
    if not (out / "evaluation.json").exists():
        raise ValueError(f"{out} has no evaluation; make one: sigma-vae evaluate {out}")
    report = read_evaluation(out)
    how = report.about.get("how")
    if not isinstance(how, dict) or "split_fingerprint" not in how or how.get("model_sha256") != model_digest(out):
        raise ValueError(
            f"{out / 'evaluation.json'} is about other weights than the run has now, or from an older version; evaluate it anew:"
            f" sigma-vae evaluate {out}"
        )
    return report


def _check_same(name: str, outs: Sequence[Path], known: list[Any]) -> None:
    if any(value != known[0] for value in known):
        found = ", ".join(f"{out}: {value}" for out, value in zip(outs, known, strict=True))
        raise ValueError(f"the runs were evaluated on different {name}, so their numbers do not compare ({found})")


def _differences(outs: Sequence[Path], device: str, same_quantity: bool) -> Iterator[dict[str, Any]]:
    """Mean differences of each run to the first; None for the first itself."""
    first: tuple[Tensor | None, Tensor | None] | None = None
    for out in outs:
        run = open_run(out, device)
        scores = score(run.vae, run.data.batches("test", evaluation_batch(run.data), device=run.vae.device))
        bound = same_quantity and run.vae.likelihood.normalised  # an objective bounds nothing
        values = _bits(scores), scores.log_likelihood_post_hoc - scores.rate if bound else None
        bits, nats = (None, None) if first is None else map(_difference, values, first)
        first = values if first is None else first
        yield {"bits_per_dim_post_hoc - first": bits, "elbo_post_hoc_nats - first": nats}


def _difference(values: Tensor | None, first: Tensor | None) -> Estimate | None:
    return None if values is None or first is None else Estimate.of(values - first)


def _bits(scores: Scores) -> Tensor | None:
    """Bits per dimension of each example, with the refitted σ."""
    mass = scores.log_mass_post_hoc
    return None if mass is None else (scores.rate - mass) / (scores.dims * math.log(2))
