"""Evaluate a finished run: numbers on its test split, and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_vae import __version__, models
from sigma_vae.config import EvaluationSettings, Metric
from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.bounds import iwae, oracle
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.features import Extractor, load_clip_extractor, load_extractor
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.plots import drawable, pairs, reconstructed, sampled, save_clips, save_grid, save_page
from sigma_vae.evaluation.quality import NEIGHBOURS, quality
from sigma_vae.evaluation.suite import has_fitted_prior, scores_under_standard_prior, standard_prior
from sigma_vae.evaluation.video import predictions, video_quality
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import FlatNetwork, HierarchicalNetwork, SequenceNetwork
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
from sigma_vae.training.distributed import from_first, joined, processes, shared
from sigma_vae.vae import VAE

__all__ = [
    "SECTIONS",
    "draw",
    "evaluate_anew",
    "evaluate_run",
    "evaluation",
    "kept",
    "measured",
    "page_path",
    "remove_page_of_others",
    "store",
]

USUAL: tuple[Metric, ...] = ("information", "calibration")

SECTIONS = ("iwae", "oracle", "information", "calibration", "quality", "predictions")
"""What a report may have beside the bounds."""

CLIP_RECIPES = ("i3d:",)


def measured(vae: VAE, data: Splits, settings: EvaluationSettings, out: Path) -> dict[str, Any]:
    """A section for each metric; the page of plots goes into the run's folder.

    Raises:
        ValueError: a metric is asked for that does not apply to the model or to the data; this is found before the long work.
    """
    metrics = _metrics(vae, data, settings)
    extractors = _extractors(vae, settings) if "quality" in metrics else []
    sections: dict[str, Any] = {metric: MEASURE[metric](vae, data, settings) for metric in metrics if metric != "quality"}
    if extractors:
        sections["quality"] = from_first(
            lambda: {made.name: _quality(vae, data, settings, made, clips) for made, clips in extractors}
        )
    if "calibration" in sections and processes().first:
        save_page(page_path(out, settings.split), sections["calibration"], data.name)
    if settings.best_of is not None:
        sections["predictions"] = from_first(lambda: _predictions(vae, data, settings))
    return sections


def _predictions(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    assert settings.best_of is not None
    test = shared(data, settings.split, evaluation_batch(data), _device(vae))
    return predictions(vae, test, settings.best_of, settings.seed, batch_statistics=settings.batch_statistics)


def page_path(out: Path, split: SplitName) -> Path:
    """Where the page of plots is drawn."""
    return out / ("calibration.png" if split == "test" else f"calibration-{split}.png")


def _metrics(vae: VAE, data: Splits, settings: EvaluationSettings) -> Sequence[Metric]:
    """What is asked for, or what applies of the metrics that cost little more than the bounds."""
    if settings.best_of is not None:
        vae.video_network  # noqa: B018 (it says what is wrong)
    if settings.metrics is None:
        return [metric for metric in USUAL if _obstacle(metric, vae, data, settings) is None]
    for metric in settings.metrics:
        if obstacle := _obstacle(metric, vae, data, settings):
            raise ValueError(f"{metric} cannot be measured of this run: {obstacle}; leave it out of the metrics")
    return settings.metrics


def _obstacle(metric: Metric, vae: VAE, data: Splits, settings: EvaluationSettings) -> str | None:
    """Why a metric does not apply."""
    examples, flat = len(data.store(settings.split)), isinstance(vae.network, FlatNetwork)
    match metric:
        case "iwae" | "calibration" if not vae.likelihood.normalised:
            return f"{vae.likelihood} is an objective of these data, and gives no probabilities"
        case "oracle" if not isinstance(vae.likelihood, LocationScale):
            return f"{vae.likelihood} has no σ"
        case "information" if not flat and not isinstance(vae.network, HierarchicalNetwork):
            return f"the latents of {type(vae.network).__name__} are neither flat nor a ladder"
        case "information" if flat and examples < 2:
            return "it is about the spread of codes, and there is one example"
        case "quality" if not drawable(data.shape):
            return f"{data.name} has examples of shape {data.shape}, and images have 1 or 3 channels"
        case "quality" if not data.clips and min(settings.samples, examples) <= NEIGHBOURS:
            return f"it needs more than {NEIGHBOURS} samples and as many examples, got {settings.samples} and {examples}"
    return None


def _iwae(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return iwae(vae, shared(data, settings.split, evaluation_batch(data), _device(vae)), settings.draws, settings.seed)


def _oracle(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return oracle(vae, shared(data, settings.split, evaluation_batch(data), _device(vae)), settings.seed)


def _information(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    size, device = evaluation_batch(data), _device(vae)
    return information(vae, shared(data, settings.split, size, device), shared(data, "train", size, device), settings.seed)


def _calibration(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return calibration(vae, shared(data, settings.split, evaluation_batch(data), _device(vae)), settings.seed)


def _extractors(vae: VAE, settings: EvaluationSettings) -> list[tuple[Extractor, bool]]:
    """What is asked for, and whether it looks at whole clips."""
    moving = isinstance(vae.network, SequenceNetwork)
    of_clips = [moving and name.startswith(CLIP_RECIPES) for name in settings.features]
    loaded = [
        ((load_clip_extractor if clips else load_extractor)(name, _device(vae)), clips)
        for name, clips in zip(settings.features, of_clips, strict=True)
    ]
    names = [made.name for made, _ in loaded]
    if len(set(names)) < len(names):
        raise ValueError(f"each of the features has a section of its name, got {', '.join(names)}; rename a file")
    return loaded


def _quality(vae: VAE, data: Splits, settings: EvaluationSettings, extractor: Extractor, of_clips: bool) -> dict[str, Any]:
    """Of images, of clips, or of the frames of clips."""
    if not isinstance(vae.network, SequenceNetwork):
        return quality(vae, data, extractor, settings.samples, settings.seed, settings.split)
    clips, frames = (extractor, None) if of_clips else (None, extractor)
    return video_quality(vae, data, clips=clips, frames=frames, n=settings.samples, seed=settings.seed, split=settings.split)


MEASURE: dict[Metric, Callable[[VAE, Splits, EvaluationSettings], dict[str, Any]]] = {
    "iwae": _iwae,
    "oracle": _oracle,
    "information": _information,
    "calibration": _calibration,
}


def _device(vae: VAE) -> torch.device:
    return next(vae.parameters()).device


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
    with joined(resolve_device(device)), lock_run(out):
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
        report["prior"] = models.prior_name(vae.network.prior)
    if has_fitted_prior(vae):
        report["standard_prior"] = scores_under_standard_prior(vae, held_out, settings.seed)
    fitted = sigma_fitted_on(out)
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
