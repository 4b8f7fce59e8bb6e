"""How good predictions look to a network: Fréchet distance of clips (FVD) and of single frames (FID)."""

from typing import Any

import torch
from torch import Tensor

from sigma_vae.data import Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.features import Extractor
from sigma_vae.evaluation.frechet import frechet_distance
from sigma_vae.evaluation.pictures import drawable, in_unit_range
from sigma_vae.evaluation.repeatable import about, seeded, subset
from sigma_vae.types import Noise
from sigma_vae.vae import VAE, Show, keyed_noise

__all__ = ["video_quality"]

CLIPS_AT_ONCE = 16
"""Fixed, as random numbers of draws are drawn for so many clips together."""


@torch.no_grad()
def video_quality(
    vae: VAE,
    data: Splits,
    *,
    clips: Extractor | None = None,
    frames: Extractor | None = None,
    n: int = 256,
    seed: int = 0,
    split: SplitName = "test",
    show: Show = "mean",
    context_frames: int | None = None,
) -> dict[str, Any]:
    """Fréchet distance between predictions and what happened: of whole clips, and of single frames.

    Each clip is predicted once. ``clips`` sees whole clips, predicted and true, each with the frames that are given; ``frames`` sees
    every predicted frame, against the true frames of the same times: the FID of the paper's table for BAIR.

    Args:
        vae: the model; put into eval mode.
        data: clips of frames with one or three channels and values in [0, 1].
        clips: of clips, as :func:`~sigma_vae.evaluation.features.load_clip_extractor` gives it.
        frames: of images, as :func:`~sigma_vae.evaluation.features.load_extractor` gives it.
        n: how many clips; where the split has fewer, that many.
        seed: of the choice of clips, of latents and of draws.
        split: whose clips are gone on with.
        show: the mean of p(x|z), which is fed back as SVG does, or draws from it.
        context_frames: how many frames are given; the network's own number unless said.

    Returns:
        ``clips`` and ``frames``, each with ``frechet``, how many ``examples`` it is of, the ``extractor``'s record, and
        ``rank_deficient`` where these are no more than its features; and how the predictions were made.

    Raises:
        ValueError: there is no extractor, the data are no clips of images, or too short, or the network predicts no frames.
    """
    past = vae.video_network.context_frames if context_frames is None else context_frames
    if show not in ("mean", "draw"):
        raise ValueError(f'show is "mean" or "draw", got {show!r}')
    _check(data, split, past, clips, frames)
    vae.eval()
    device = next(vae.parameters()).device
    chosen = subset(data, split, n, CLIPS_AT_ONCE, seed, device)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"clips": [], "frames": []}
    for number, batch in enumerate(chosen):
        with seeded(seed, number, device):
            made = _predicted(vae, batch.x, past, show, keyed_noise(batch.positions, seed))
        true, made = (data.scaling.undo(x.flatten(0, 1)).reshape(x.shape) for x in (batch.x, made))
        in_unit_range(true)
        if clips is not None:
            found["clips"].append((clips(true), clips(torch.cat([true[:, :past], made], 1))))
        if frames is not None:
            found["frames"].append((frames(true[:, past:].flatten(0, 1)), frames(made.flatten(0, 1))))
    report = {
        "split": split,
        "seed": seed,
        "show": show,
        "context_frames": past,
        "predicted_frames": chosen.store.shape[0] - past,
        "data": about(data),
    }
    for name, extractor, shape in (("clips", clips, chosen.store.shape), ("frames", frames, data.shape)):
        if extractor is not None:
            report[name] = _compared(found[name], extractor, shape)
    return report


def _predicted(vae: VAE, x: Tensor, past: int, show: Show, noise: Noise) -> Tensor:
    def shown(h: Tensor) -> Tensor:
        distribution = vae.likelihood(h)
        values: Tensor = distribution.mean if show == "mean" else distribution.sample()
        return values

    return vae.video_network.predict(x[:, :past], x.shape[1] - past, shown, noise).frames


def _compared(pairs: list[tuple[Tensor, Tensor]], extractor: Extractor, shape: tuple[int, ...]) -> dict[str, Any]:
    true, made = (torch.cat(features) for features in zip(*pairs, strict=True))
    examples, dim = true.shape
    return {
        "frechet": frechet_distance(true, made),
        "examples": examples,
        "rank_deficient": examples <= dim,
        "extractor": extractor.record(shape, dim),
    }


def _check(data: Splits, split: SplitName, past: int, clips: Extractor | None, frames: Extractor | None) -> None:
    if clips is None and frames is None:
        raise ValueError(
            "video quality needs an extractor, of clips or of frames; load_extractor('efficientnet') is one of frames"
        )
    if not data.clips or not drawable(data.shape):
        raise ValueError(
            f"video quality looks at clips of images with 1 or 3 channels, got examples of {data.name} with shape {data.shape}"
        )
    length = data.store(split).shape[0]
    if not 0 < past < length:
        raise ValueError(f"at least one frame is given and one predicted; got {past} given of {length} frames")
