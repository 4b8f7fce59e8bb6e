"""Compare finished runs on the same examples."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sigma_vae.evaluation import score
from sigma_vae.evaluation.base import mean_and_error
from sigma_vae.runs.folder import evaluation_batch, model_digest, open_run, read_json
from sigma_vae.vae import Scores

__all__ = ["compare"]

SAME = ("data", "split", "examples", "levels", "dims")
"""What must agree for numbers to be of the same thing, and so must the fingerprint of the split."""


def compare(outs: Sequence[Path], *, paired: bool = False, device: str = "auto") -> list[dict[str, Any]]:
    """A row for each run, from its ``evaluation.json``: what they were made of, and the numbers that compare.

    Bits per dimension compare between all decoders; nats of a density do not compare with nats of levels, and are None unless all runs
    observe the same. The means of two runs are of the same examples, so the standard error of each says little about their difference:
    ``paired`` scores every example of each run anew, under noise of the example, and gives the mean difference to the first run, with
    its own standard error. Fréchet distances are of decoder means, of different numbers of images in different rows; where a run has a
    fitted prior, those of N(0, I) stand beside them.

    Args:
        outs: folders of finished runs.
        paired: whether examples are scored anew, for differences.
        device: of the scoring.

    Raises:
        ValueError: fewer than two runs, one that has no evaluation or one of other weights, or evaluations of different examples.
    """
    if len(outs) < 2:
        raise ValueError(f"compare sets runs side by side and needs at least 2, got {len(outs)}")
    reports = [_report(out) for out in outs]
    try:
        rows, same_measure = _rows(outs, reports)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"an evaluation.json does not hold what an evaluation writes ({type(error).__name__}: {error}); evaluate the runs anew"
        ) from error
    if paired:
        for row, differences in zip(rows, _differences(outs, device, same_measure), strict=True):
            row |= differences
    return rows


def _rows(outs: Sequence[Path], reports: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """What is told of each run, and whether all of them are of one measure."""
    for name in SAME:
        _check_same(name, outs, [report.get(name) for report in reports])
    _check_same("examples (by their fingerprint)", outs, [report["how"]["split_fingerprint"] for report in reports])
    same_measure = len({report["observes"] for report in reports}) == 1
    rows = [
        {"run": str(out), **_made_of(report), **_numbers(report, same_measure), **_frechet(report, reports)}
        for out, report in zip(outs, reports, strict=True)
    ]
    return rows, same_measure


def _report(out: Path) -> dict[str, Any]:
    """The evaluation of the weights that the run has."""
    if not (out / "evaluation.json").exists():
        raise ValueError(f"{out} has no evaluation; make one: sigma-vae evaluate {out}")
    report = read_json(out / "evaluation.json")
    how = report.get("how")
    if not isinstance(how, dict) or "split_fingerprint" not in how or how.get("model_sha256") != model_digest(out):
        raise ValueError(
            f"{out / 'evaluation.json'} is of other weights than the run has now, or of an older version; evaluate it anew:"
            f" sigma-vae evaluate {out}"
        )
    return report


def _check_same(name: str, outs: Sequence[Path], known: list[Any]) -> None:
    if any(value != known[0] for value in known):
        told = ", ".join(f"{out}: {value}" for out, value in zip(outs, known, strict=True))
        raise ValueError(f"the runs were evaluated on different {name}, so their numbers do not compare ({told})")


def _made_of(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report.get(name) for name in ("network", "likelihood", "prior")}


def _numbers(report: dict[str, Any], same_measure: bool) -> dict[str, Any]:
    nats = report.get("elbo_post_hoc_nats") if same_measure else None
    coverage = (report.get("calibration", {}).get("density") or {}).get("coverage", {}).get("90")
    return {
        "bits_per_dim_post_hoc": report.get("bits_per_dim_post_hoc"),
        "elbo_post_hoc_nats": nats,
        "rate_nats": report["rate_nats"],
        "coverage_90": coverage,
    }


def _frechet(report: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, float]:
    """Fréchet distances, each under a name that says what has to be the same for it to compare."""
    found = {}
    for name, section in report.get("quality", {}).items():
        others = [each["quality"][name] for each in reports if name in each.get("quality", {})]
        digest = "" if len({_digest(other) for other in others}) == 1 else f" {_digest(section)[:8]}"
        for kind in ("clips", "frames"):
            if kind in section:
                found[f"frechet {name}{digest}, {section[kind]['examples']} {kind}"] = section[kind]["frechet"]
        if "samples" in section:
            label = f"frechet {name}{digest}, {section['examples']} images"
            found[label] = section["samples"]["means"]["frechet"]
            fitted = any("samples_standard_prior" in other for other in others)
            if fitted and section["prior"] is not None:
                standard = section.get("samples_standard_prior", section["samples"])
                found[f"{label}, N(0, I)"] = standard["means"]["frechet"]
    return found


def _digest(section: dict[str, Any]) -> str:
    """Of the extractor's weights."""
    return str((section.get("clips") or section.get("frames") or section)["extractor"]["sha256"])


def _differences(outs: Sequence[Path], device: str, same_measure: bool) -> Iterator[dict[str, Any]]:
    """Of each run to the first: None of the first itself."""
    first: tuple[Tensor | None, Tensor | None] | None = None
    for out in outs:
        run = open_run(out, device)
        where = next(run.vae.parameters()).device
        scores = score(run.vae, run.data.batches("test", evaluation_batch(run.data), device=where))
        bound = same_measure and run.vae.likelihood.normalised  # an objective bounds nothing
        values = _bits(scores), scores.log_likelihood_post_hoc - scores.rate if bound else None
        bits, nats = (None, None) if first is None else map(_difference, values, first)
        first = values if first is None else first
        yield {"bits_per_dim_post_hoc - first": bits, "elbo_post_hoc_nats - first": nats}


def _difference(values: Tensor | None, first: Tensor | None) -> dict[str, float | None] | None:
    return None if values is None or first is None else mean_and_error(values - first)


def _bits(scores: Scores) -> Tensor | None:
    """Bits per dimension of each example, post hoc."""
    mass = scores.log_mass_post_hoc
    return None if mass is None else (scores.rate - mass) / (scores.dims * math.log(2))
