"""What an evaluation measures beside the bounds: one section of the report for each metric that is asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.bounds import iwae, oracle
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.calibration_page import save_page
from sigma_vae.evaluation.features import Extractor, load_clip_extractor, load_extractor
from sigma_vae.evaluation.frechet import NEIGHBOURS
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.pictures import drawable
from sigma_vae.evaluation.quality import quality
from sigma_vae.evaluation.settings import EvaluationSettings, Metric
from sigma_vae.evaluation.video import predictions
from sigma_vae.evaluation.video_quality import video_quality
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.networks import FlatNetwork, HierarchicalNetwork, SequenceNetwork
from sigma_vae.runs.folder import evaluation_batch
from sigma_vae.training.processes import from_first, processes
from sigma_vae.training.shares import shared
from sigma_vae.vae import VAE

__all__ = ["SECTIONS", "measured", "page_path"]

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
