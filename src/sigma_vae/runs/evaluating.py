"""What is said of a finished run: numbers on its test split, and pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_vae import __version__, build
from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.pictures import pairs, save_clips, save_grid
from sigma_vae.evaluation.settings import EvaluationSettings
from sigma_vae.evaluation.shown import reconstructed, sampled
from sigma_vae.evaluation.standard_prior import has_fitted_prior, scores_under_standard_prior, standard_prior
from sigma_vae.networks import FlatNetwork, SequenceNetwork
from sigma_vae.runs.folder import Run, evaluation_batch, model_digest, open_run
from sigma_vae.runs.held import held
from sigma_vae.runs.measuring import SECTIONS, measured, page_path
from sigma_vae.runs.reports import read_json, write_json
from sigma_vae.runs.sigma import KEY as SIGMA_FITTED_ON
from sigma_vae.runs.sigma import fitted_on
from sigma_vae.training import resolve_device
from sigma_vae.training.processes import from_first, joined
from sigma_vae.training.shares import shared
from sigma_vae.vae import VAE

__all__ = ["draw", "evaluate_anew", "evaluate_run", "evaluation", "kept", "remove_page_of_others", "store"]

ENTROPY_EXAMPLES = 10_000
PICTURES = 64
CLIPS = 8
"""In a picture; each is a row of it."""


def evaluate_run(
    out: Path,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 (frozen)
    *,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate a finished run, and write ``evaluation.json`` (of the validation split: ``evaluation-validation.json``) anew.

    Every metric has its own section, which says how it was measured. Sections that are not asked for this time are kept, as long as
    they are of the same weights. Started by ``torchrun``, the processes share the work, all but ``quality`` and what is predicted of
    video: these the first one measures, while the others wait.

    Args:
        out: folder of the run.
        settings: what is measured beside the bounds, and how.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Raises:
        ValueError: there is no such run, a metric does not apply to it, or another process is at work in its folder.
        OSError: the folder cannot be written.
    """
    with joined(resolve_device(device)), held(out):
        return evaluate_anew(out, settings, device)


def evaluate_anew(out: Path, settings: EvaluationSettings, device: str) -> dict[str, Any]:
    """What :func:`evaluate_run` does, for those who hold the folder."""
    run = open_run(out, device)
    sections = measured(run.vae, run.data, settings, out)
    report = evaluation(out, run, settings)
    return from_first(lambda: _add(out, report, sections))


def _add(out: Path, report: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """Write the report with these sections, and those that are kept."""
    known = kept(out, report)
    if "quality" in known and "quality" in sections:
        sections["quality"] = known["quality"] | sections["quality"]
    report |= known | sections
    store(out, report)
    return report


def kept(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Sections that the run's folder has beside the same bounds: of the same weights, data and versions."""
    try:
        known = read_json(_path(out, report["split"]))
    except ValueError:  # there is none, or nothing that could be kept
        return {}
    return (
        {name: known[name] for name in SECTIONS if isinstance(known.get(name), dict)}
        if known.get("how") == report["how"]
        else {}
    )


def store(out: Path, report: dict[str, Any]) -> None:
    """Write the report."""
    write_json(_path(out, report["split"]), report)
    remove_page_of_others(out, report)


def remove_page_of_others(out: Path, report: dict[str, Any]) -> None:
    """Plots of a calibration that the report does not have are of other weights."""
    if "calibration" not in report:
        page_path(out, report["split"]).unlink(missing_ok=True)


def _path(out: Path, split: SplitName) -> Path:
    return out / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")


def evaluation(out: Path, run: Run, settings: EvaluationSettings = EvaluationSettings()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """The bounds of a run whose model is saved in this folder, with what has to be the same for them to be repeated."""
    config, vae, data = run
    device = next(vae.parameters()).device
    size = evaluation_batch(data)
    held_out = shared(data, settings.split, size, device)
    training = shared(data, "train", size, device, limit=min(ENTROPY_EXAMPLES, len(data.train)))
    about: dict[str, Any] = {
        "data": config.data.source,
        "split": settings.split,
        "network": config.model.network,
        "likelihood": config.model.likelihood,
    }
    if isinstance(vae.network, SequenceNetwork):
        about["context_frames"] = vae.network.context_frames
    report = about | evaluate(vae, held_out, training, settings.seed)
    if isinstance(vae.network, FlatNetwork):
        report["prior"] = build.prior_name(vae.network.prior)
    if has_fitted_prior(vae):
        report["standard_prior"] = scores_under_standard_prior(vae, held_out, settings.seed)
    fitted = fitted_on(out)
    if fitted is not None:
        report[SIGMA_FITTED_ON] = fitted
    report["how"] = {
        "sigma_vae": __version__,
        "torch": torch.__version__,
        "model_sha256": model_digest(out),
        "data_fingerprint": data.record["fingerprint"],
        "split_fingerprint": data.store(settings.split).fingerprint(),
        "preprocessing": data.record["preprocessing"],
    }
    return report


def draw(out: Path, vae: VAE, data: Splits) -> None:
    """Write pictures of samples and reconstructions; of clips also moving ones; where a prior was fitted, samples of N(0, I) as well."""
    vae.eval()
    device = next(vae.parameters()).device
    moving = data.frames is not None
    if has_fitted_prior(vae):
        with standard_prior(vae):
            save_grid(out / "samples-standard-prior.png", _samples(vae, data, PICTURES))
    samples = _samples(vae, data, CLIPS if moving else PICTURES)
    batch = next(iter(data.batches("test", CLIPS if moving else PICTURES // 2, device=device)))
    originals, again = map(data.scaling.undo, (batch.x, reconstructed(vae, batch)))
    if not moving:
        save_grid(out / "samples.png", samples)
        save_grid(out / "reconstructions.png", pairs(originals, again, columns=8), columns=8)
        return
    for ending, columns in ((".png", 1), (".gif", 8)):
        save_clips(out / f"samples{ending}", samples)
        save_clips(out / f"reconstructions{ending}", pairs(originals, again, columns), columns)


def _samples(vae: VAE, data: Splits, n: int) -> Tensor:
    generator = torch.Generator(next(vae.parameters()).device).manual_seed(0)
    return data.scaling.undo(sampled(vae, data, n, generator))
