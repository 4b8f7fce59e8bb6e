"""What an evaluation measures beside the bounds: one section of the report for each metric that is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sigma_vae.data import Splits
from sigma_vae.evaluation.bounds import iwae, oracle
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.calibration_page import save_page
from sigma_vae.evaluation.features import load_clip_extractor, load_extractor
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.quality import quality
from sigma_vae.evaluation.settings import EvaluationSettings, Metric
from sigma_vae.evaluation.video import predictions
from sigma_vae.evaluation.video_quality import video_quality
from sigma_vae.networks import FlatNetwork, HierarchicalNetwork, SequenceNetwork
from sigma_vae.runs.folder import evaluation_batch
from sigma_vae.vae import VAE

__all__ = ["SECTIONS", "measured"]

SECTIONS = ("iwae", "oracle", "information", "calibration", "quality", "predictions")
"""What a report may have beside the bounds."""

CLIP_RECIPES = ("i3d:",)


def measured(vae: VAE, data: Splits, settings: EvaluationSettings, out: Path) -> dict[str, Any]:
    """A section for each metric; the page of plots goes into the run's folder.

    Raises:
        ValueError: a metric is asked for that does not apply to the model or to the data.
    """
    metrics = _that_apply(vae) if settings.metrics is None else settings.metrics
    sections: dict[str, Any] = {metric: MEASURE[metric](vae, data, settings) for metric in metrics}
    if "calibration" in sections:
        save_page(out / "calibration.png", sections["calibration"])
    if settings.best_of is not None:
        test = data.batches(settings.split, evaluation_batch(data), device=_device(vae))
        sections["predictions"] = predictions(
            vae, test, settings.best_of, settings.seed, batch_statistics=settings.batch_statistics
        )
    return sections


def _that_apply(vae: VAE) -> list[Metric]:
    """The metrics that cost little more than the bounds."""
    apply: list[Metric] = []
    if isinstance(vae.network, FlatNetwork | HierarchicalNetwork):
        apply.append("information")
    if vae.likelihood.normalised:
        apply.append("calibration")
    return apply


def _iwae(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return iwae(vae, data.batches(settings.split, evaluation_batch(data), device=_device(vae)), settings.draws, settings.seed)


def _oracle(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return oracle(vae, data.batches(settings.split, evaluation_batch(data), device=_device(vae)), settings.seed)


def _information(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    size, device = evaluation_batch(data), _device(vae)
    return information(
        vae, data.batches(settings.split, size, device=device), data.batches("train", size, device=device), settings.seed
    )


def _calibration(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    return calibration(vae, data.batches(settings.split, evaluation_batch(data), device=_device(vae)), settings.seed)


def _quality(vae: VAE, data: Splits, settings: EvaluationSettings) -> dict[str, Any]:
    """By extractor: of a video, of clips or of single frames."""
    device = _device(vae)
    sections: dict[str, Any] = {}
    for name in settings.features:
        moving, of_clips = isinstance(vae.network, SequenceNetwork), name.startswith(CLIP_RECIPES)
        if not moving:
            sections[name] = quality(vae, data, load_extractor(name, device), settings.samples, settings.seed, settings.split)
        elif of_clips:
            clips = load_clip_extractor(name, device)
            sections[name] = video_quality(vae, data, clips=clips, n=settings.samples, seed=settings.seed, split=settings.split)
        else:
            frames = load_extractor(name, device)
            sections[name] = video_quality(
                vae, data, frames=frames, n=settings.samples, seed=settings.seed, split=settings.split
            )
    return sections


MEASURE: dict[Metric, Callable[[VAE, Splits, EvaluationSettings], dict[str, Any]]] = {
    "iwae": _iwae,
    "oracle": _oracle,
    "information": _information,
    "calibration": _calibration,
    "quality": _quality,
}


def _device(vae: VAE) -> torch.device:
    return next(vae.parameters()).device
