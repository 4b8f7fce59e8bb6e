"""Evaluate a finished run: numbers on its test split, and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_vae import __version__, models
from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import Evaluation, EvaluationData
from sigma_vae.evaluation.base import metrics
from sigma_vae.evaluation.elbo import has_fitted_prior, standard_prior
from sigma_vae.evaluation.plots import pairs, reconstructed, sampled, save_clips, save_grid
from sigma_vae.evaluation.suite import chosen, measure
from sigma_vae.runs.folder import (
    SIGMA_FITTED_ON,
    Run,
    evaluation_batch,
    lock_run,
    model_digest,
    open_run,
    read_json,
    sigma_fitted_on,
    write_json,
)
from sigma_vae.training import resolve_device
from sigma_vae.training.distributed import from_first, joined, shared
from sigma_vae.vae import VAE

__all__ = [
    "draw",
    "evaluate_anew",
    "evaluate_run",
    "evaluation",
    "priors_of",
    "read_evaluation",
    "remove_stale_pages",
    "store",
    "with_kept",
]

BOUNDS_ALONE = EvaluationSettings(metrics=())
PICTURES = 64
CLIPS = 8
"""Clips in a picture, one per row."""


def evaluate_run(
    out: Path,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 (frozen)
    *,
    device: str = "auto",
) -> Evaluation:
    """Evaluate a finished run on a device, and write ``evaluation.json`` (or ``evaluation-validation.json``).

    Each metric has its own section, which says how it was measured. Sections that are not asked for this time are kept,
    as long as they are about the same weights. Under ``torchrun`` the processes share the work; some metrics
    (``quality``, ``predictions``) are measured by the first one, while the others wait.

    Raises:
        ValueError: there is no such run, a metric does not apply to it, or another process is working in its folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), lock_run(out):
        return evaluate_anew(out, settings, device)


def evaluate_anew(
    out: Path, settings: EvaluationSettings, device: str, priors: Mapping[str, float] | None = None
) -> Evaluation:
    """Do what :func:`evaluate_run` does, where the folder is already locked; ``priors`` as in :func:`evaluation`."""
    run = open_run(out, device)
    report = evaluation(out, run, settings, priors)
    return from_first(lambda: _store_with_pages(out, report, run.data.name))


def _store_with_pages(out: Path, report: Evaluation, title: str) -> Evaluation:
    for name, metric in metrics().items():
        if metric.draws_page and name in report.results:
            metric.draw_page(report.results[name], _file(out, name, ".png", report.about["split"]), title)
    return store(out, report)


def evaluation(
    out: Path, run: Run, settings: EvaluationSettings = BOUNDS_ALONE, priors: Mapping[str, float] | None = None
) -> Evaluation:
    """Evaluate a run whose model is saved in this folder, and record the weights, data and versions.

    ``priors`` is what :meth:`VAE.fit_prior` found.
    """
    config, vae, data = run
    size = evaluation_batch(data)
    held_out, training = (shared(data, split, size, vae.device) for split in (settings.split, "train"))
    examples = EvaluationData(held_out, training, data)
    vae.eval()
    wanted = chosen(vae, examples, settings)
    about: dict[str, Any] = {
        "data": config.data.source,
        "split": settings.split,
        "network": config.model.network,
        "likelihood": config.model.likelihood,
    }
    if vae.network.reads_clips:
        about["context_frames"] = vae.network.context_frames
    if vae.network.has_prior:
        about["prior"] = models.prior_name(vae.network.prior)
    if priors:
        about["prior_held_out_nats"] = dict(priors)
    fitted = sigma_fitted_on(out)
    if fitted is not None:
        about[SIGMA_FITTED_ON] = fitted
    about["how"] = {
        "sigma_vae": __version__,
        "torch": torch.__version__,
        "model_sha256": model_digest(out),
        "data_fingerprint": data.record["fingerprint"],
        "split_fingerprint": data.store(settings.split).fingerprint(),
        "preprocessing": data.record["preprocessing"],
    }
    return Evaluation(measure(vae, examples, settings, wanted, from_first), about)


def store(out: Path, report: Evaluation) -> Evaluation:
    """Write the report, with the sections that are kept, and return the whole."""
    report = with_kept(out, report)
    write_json(_file(out, "evaluation", ".json", report.about["split"]), report.to_json())
    remove_stale_pages(out, report)
    return report


def with_kept(out: Path, report: Evaluation) -> Evaluation:
    """Add the sections that the folder's report has beside bounds of the same weights, data and versions."""
    try:
        known = read_evaluation(out, report.about["split"])
    except ValueError:  # there is none, or it is broken
        return report
    if known.about.get("how") != report.about["how"]:
        return report
    priors = {key: known.about[key] for key in ("prior_held_out_nats",) if key in known.about}
    return Evaluation(known.sections, priors | report.about).updated(report.results)


def priors_of(out: Path) -> dict[str, float]:
    """What the folder's report says that :meth:`VAE.fit_prior` found."""
    try:
        return dict(read_evaluation(out).about.get("prior_held_out_nats", {}))
    except ValueError:  # there is none, or it is broken
        return {}


def remove_stale_pages(out: Path, report: Evaluation) -> None:
    """Remove pages of results that the report does not have: they are about other weights."""
    for name, metric in metrics().items():
        if metric.draws_page and name not in report.results:
            _file(out, name, ".png", report.about["split"]).unlink(missing_ok=True)


def read_evaluation(out: Path, split: SplitName = "test") -> Evaluation:
    """Read the report of a run.

    Raises:
        ValueError: it is missing or broken.
    """
    path = _file(out, "evaluation", ".json", split)
    try:
        return Evaluation.from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} does not hold what an evaluation writes ({error}); evaluate the run anew") from error


def _file(out: Path, name: str, ending: str, split: SplitName) -> Path:
    return out / (name + ("" if split == "test" else f"-{split}") + ending)


def draw(out: Path, vae: VAE, data: Splits) -> None:
    """Write pictures of samples and reconstructions, moving for clips; for a fitted prior, also samples of N(0, I)."""
    vae.eval()
    moving = data.frames is not None
    if has_fitted_prior(vae):
        with standard_prior(vae):
            save_grid(out / "samples-standard-prior.png", _samples(vae, data, PICTURES))
    samples = _samples(vae, data, CLIPS if moving else PICTURES)
    batch = next(iter(data.batches("test", CLIPS if moving else PICTURES // 2, device=vae.device)))
    originals, again = map(data.scaling.undo, (batch.x, reconstructed(vae, batch)))
    if not moving:
        save_grid(out / "samples.png", samples)
        save_grid(out / "reconstructions.png", pairs(originals, again, columns=8), columns=8)
        return
    for ending, columns in ((".png", 1), (".gif", 8)):
        save_clips(out / f"samples{ending}", samples)
        save_clips(out / f"reconstructions{ending}", pairs(originals, again, columns), columns)


def _samples(vae: VAE, data: Splits, n: int) -> Tensor:
    generator = torch.Generator(vae.device).manual_seed(0)
    return data.scaling.undo(sampled(vae, data, n, generator))
