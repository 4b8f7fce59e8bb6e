"""Words about a finished run: what its numbers mean, what its curves and calibration show, and what to do next."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sigma_vae.config import RunConfig
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.suite import notes
from sigma_vae.training.metrics import rows_before

__all__ = ["Curves", "advice", "curves", "next_command", "shows"]

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


def curves(out: Path) -> Curves:
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
    """What the numbers and curves of a finished run suggest to do; empty where nothing is unusual.

    Args:
        out: folder of the run, for the commands.
        config: of the run.
        report: its evaluation.
        found: its curves.
    """
    return [*_of_latents(report), *notes(report), *_of_length(out, config, found)]


def _of_latents(report: Evaluation) -> Iterator[str]:
    rate, units, dim = report.bounds.rate_nats.mean, report.bounds.active_units, report.bounds.latent_dim
    if rate < UNUSED_NATS:
        yield (
            f"The latent is unused: its rate is {rate:.3g} nats, so all samples look alike. A small network trained for longer, or"
            " another seed, may find a use for it; a σ that the decoder predicts (per-image, per-pixel) can make latents unnecessary."
        )
    elif units is not None and dim is not None and units < dim:
        yield (
            f"{dim - units} of {dim} latents are unused. They do no harm: a calibrated decoder leaves those off that it does not need."
            f" --latent-dim {max(units, 1)} would do."
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
