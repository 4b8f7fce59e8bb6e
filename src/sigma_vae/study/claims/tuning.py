"""One calibrated run against a tuned β and against unit variance: claims 1, 2 and 9, and 8, the same with other networks."""

from collections.abc import Iterator

from sigma_vae.study.claims.claim import OPTIMAL, SHARED, Claim, compared, percent, worse_samples
from sigma_vae.study.comparisons import ELBO, PREDICTIONS, STANDARD, Setting, frechet_columns
from sigma_vae.study.groupings import FLAT, OTHER_NETWORKS
from sigma_vae.study.judging import Verdict, above, below, lacking, signed

__all__ = ["CLAIMS", "OTHERS"]

CLOSE = {ELBO: 0.05, "frechet": 0.10, "predictions": 0.05}
"""As shares of what is compared with: as good as the best β; no worse samples; no worse predictions."""


def _tuned_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal minus the best of 3 or more fixed σ (chosen on validation), in post-hoc ELBO on test, is above −5 % of it."""
    ours, (best, left_out) = setting.first(OPTIMAL), setting.tuned()
    found = setting.difference(ELBO, ours, best, setting.plain)
    if found is None or best is None:
        yield lacking(f"{OPTIMAL} and three fixed σ")
        return
    size = abs(float(setting.values(best, ELBO, setting.plain).mean()))
    finding = f"optimal − {best}: {signed(found, 1, ' nats')} ({percent(found.mean / size)} of it){_end(setting, best)}"
    if found.low is not None and found.high is not None and found.low <= 0:
        finding += "; it is below the best" if found.high < 0 else "; neither is shown to be above the other"
    yield above(found, -CLOSE[ELBO] * size, finding + left_out)


def _end(setting: Setting, arm: str) -> str:
    ends = next(iter(setting.fixed)), next(reversed(setting.fixed))
    return ", which is at the end of the grid: a better one may lie beyond" if arm in ends else ""


def _tuned_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance with N(0, I) is less than 10 % above that of the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [STANDARD] if STANDARD in setting.priors else [], CLOSE["frechet"])


def _fitted_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance is below that of the best of 3 or more fixed σ (chosen on test), with the same fitted prior."""
    yield from _samples(setting, [prior for prior in setting.priors if prior != STANDARD], 0.0)


def _samples(setting: Setting, priors: list[str], close: float) -> Iterator[Verdict]:
    """Optimal against the best of the grid, for each prior and set of features."""
    judged = False
    for features, metric in frechet_columns(setting.table).items():
        for prior in priors:
            best, left_out = setting.best(metric, prior, highest=False)
            found = setting.difference(metric, setting.first(OPTIMAL), best, prior)
            if found is not None:
                judged, size = True, float(setting.values(best, metric, prior).mean())
                how = f"prior {setting.called(prior)}, {features}: optimal − {best}"
                finding = f"{how}: {signed(found, 2)} ({percent(found.mean / size)} of its {size:.2f})"
                yield below(found, close * size, finding + left_out)
    if not judged:
        yield lacking(
            f"Fréchet distances of {OPTIMAL} and of three fixed σ, with {'such a prior' if priors else 'another prior'}"
        )


def _unit_likelihood(setting: Setting) -> Iterator[Verdict]:
    """Holds if one σ (shared where there is such a run, else optimal) minus σ = 1, in post-hoc ELBO on test, is above zero."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield compared(setting, ELBO, ours, setting.unit, f"{SHARED} or {OPTIMAL}, and σ = 1", " nats")


def _unit_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if one σ (shared where there is such a run, else optimal) has a smaller Fréchet distance with N(0, I) than σ = 1."""
    ours = setting.first(SHARED) or setting.first(OPTIMAL)
    yield from worse_samples(setting, setting.unit, ours, f"{SHARED} or {OPTIMAL}, and σ = 1")


def _other_samples(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's Fréchet distance is less than 10 % above that of the best of 3 or more fixed σ (chosen on test)."""
    yield from _samples(setting, [setting.plain], CLOSE["frechet"])


def _predictions(setting: Setting) -> Iterator[Verdict]:
    """Holds if optimal's PSNR, and SSIM, of the best predictions is above that of the best of 3 or more fixed σ (on test) less 5 %."""
    judged = False
    for name, (metric, digits) in PREDICTIONS.items():
        best, left_out = setting.best(metric, setting.plain, highest=True)
        found = setting.difference(metric, setting.first(OPTIMAL), best, setting.plain)
        if found is not None:
            judged, size = True, float(setting.values(best, metric, setting.plain).mean())
            finding = (
                f"{name}: optimal − {best}: {signed(found, digits)} ({percent(found.mean / size)} of its {size:.{digits}f})"
            )
            yield above(found, -CLOSE["predictions"] * abs(size), finding + left_out)
    if not judged:
        yield lacking(f"predictions of {OPTIMAL} and of three fixed σ")


CLAIMS = (
    Claim(
        "1, likelihood", "A calibrated σ is within 5 % of the best tuned β or above it, in likelihood.", FLAT, _tuned_likelihood
    ),
    Claim(
        "1, samples", "A calibrated σ is within 10 % of the best β or better, in samples from N(0, I).", FLAT, _tuned_samples
    ),
    Claim("2, likelihood", "One calibrated σ beats unit variance, in likelihood.", FLAT, _unit_likelihood),
    Claim("2, samples", "One calibrated σ beats unit variance, in samples from N(0, I).", FLAT, _unit_samples),
    Claim(
        "9, fitted prior",
        "With a fitted prior, one calibrated run has better samples than the best of the β grid.",
        FLAT,
        _fitted_samples,
    ),
)

OTHERS = (
    Claim(
        "8, likelihood",
        "With a ladder of latents, and on video, a calibrated σ is within 5 % of the best tuned β or above it, in likelihood.",
        OTHER_NETWORKS,
        _tuned_likelihood,
    ),
    Claim(
        "8, unit variance",
        "With a ladder of latents, and on video, one calibrated σ beats unit variance, in likelihood.",
        OTHER_NETWORKS,
        _unit_likelihood,
    ),
    Claim(
        "8, samples",
        "With a ladder of latents, and on video, a calibrated σ is within 10 % of the best β or better, in samples.",
        OTHER_NETWORKS,
        _other_samples,
    ),
    Claim("8, predictions", "On video, predictions are as good as with the best fixed σ.", OTHER_NETWORKS, _predictions),
)
