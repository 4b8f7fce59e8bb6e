"""What is said of a finished run: numbers on its test split, and pictures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sigma_vae import build
from sigma_vae.config import RunConfig
from sigma_vae.data import Splits
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.pictures import pairs, save_clips, save_grid
from sigma_vae.evaluation.shown import reconstructed, sampled
from sigma_vae.evaluation.standard_prior import has_fitted_prior, scores_under_standard_prior, standard_prior
from sigma_vae.evaluation.video import predictions
from sigma_vae.networks import SequenceNetwork
from sigma_vae.runs.folder import evaluation_batch, open_run, write_json
from sigma_vae.vae import VAE

__all__ = ["draw", "evaluate_run", "evaluation"]

ENTROPY_EXAMPLES = 10_000
PICTURES = 64
CLIPS = 8
"""In a picture; each is a row of it."""


def evaluate_run(
    out: Path, *, device: str = "auto", seed: int = 0, best_of: int | None = None, batch_statistics: bool = False
) -> dict[str, Any]:
    """Evaluate a finished run on its test split, and write ``evaluation.json`` anew.

    Args:
        out: folder of the run.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: of the noise.
        best_of: of a video, also the PSNR and SSIM of the best of so many predictions of each clip.
        batch_statistics: make these with the batch's statistics, as SVG's own evaluation does.

    Raises:
        ValueError: there is no such run, or it predicts no frames, or the statistics are those of predictions that nobody asked for.
    """
    if batch_statistics and best_of is None:
        raise ValueError("batch_statistics is about predictions: say of how many the best is taken (best_of, SVG: 100)")
    run = open_run(out, device)
    extra = {}
    if best_of is not None:
        test = run.data.batches("test", evaluation_batch(run.data), device=next(run.vae.parameters()).device)
        extra["predictions"] = predictions(run.vae, test, best_of, seed, batch_statistics=batch_statistics)
    report = evaluation(run.vae, run.config, run.data, seed) | extra
    write_json(out / "evaluation.json", report)
    return report


def evaluation(vae: VAE, config: RunConfig, data: Splits, seed: int = 0) -> dict[str, Any]:
    """Of a model and its data: what :func:`evaluate_run` writes."""
    device = next(vae.parameters()).device
    size = evaluation_batch(data)
    test = data.batches("test", size, device=device)
    training = data.batches("train", size, device=device, limit=min(ENTROPY_EXAMPLES, len(data.train)))
    about: dict[str, Any] = {
        "data": config.data.source,
        "split": "test",
        "network": config.model.network,
        "likelihood": config.model.likelihood,
    }
    if isinstance(vae.network, SequenceNetwork):
        about["context_frames"] = vae.network.context_frames
    report = about | evaluate(vae, test, training, seed)
    if has_fitted_prior(vae):
        report["prior"] = build.prior_name(vae.flat_network.prior)
        report["standard_prior"] = scores_under_standard_prior(vae, test, seed)
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
