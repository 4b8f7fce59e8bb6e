"""Quality of predicted frames: PSNR and SSIM of the best of many samples, Fréchet distance of clips."""

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.base import about, seeded, subset
from sigma_vae.evaluation.features import Extractor
from sigma_vae.evaluation.plots import drawable, in_unit_range
from sigma_vae.evaluation.quality import frechet_distance
from sigma_vae.types import Noise
from sigma_vae.vae import VAE, Show, keyed_noise

__all__ = ["mean_over_clips", "predictions", "psnr", "ssim", "video_quality"]

WINDOW = 7
K1, K2 = 0.01, 0.03
LEAST_MSE = 1e-10
NORMAL_95 = NormalDist().inv_cdf(0.975)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio in dB, :math:`-10 \log_{10} \text{MSE}` of each channel, averaged over channels; at most 100.

    Shapes:
        x, y ``(*batch, C, H, W)`` with values in [0, 1], result ``(*batch,)`` in float64.

    >>> psnr(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1))
    tensor(20.0000, dtype=torch.float64)
    """
    mse = (x.double() - y.double()).square().mean((-2, -1))
    return -10 * torch.log10(mse.clamp_min(LEAST_MSE)).mean(-1)


def ssim(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    r"""Structural similarity (Wang et al. 2004) with uniform windows of 7×7, as scikit-image has it; 1 for equal images.

    .. math::
        \frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}{(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)},
        \quad C_i = (K_i R)^2

    with K = 0.01 and 0.03 and unbiased (co)variances, averaged over all windows that lie in the image, and over channels.

    Args:
        x: images.
        y: images.
        data_range: R, the range of the data. SVG's evaluation left it to scikit-image, which took 2 for floats: give 2 to compare with
            numbers that were computed in that way (they are nearer to 1).

    Shapes:
        x, y ``(*batch, C, H, W)``, result ``(*batch,)`` in float64.

    Raises:
        ValueError: the images are smaller than a window.

    >>> x = torch.rand(2, 3, 8, 8)
    >>> ssim(x, x)
    tensor([1., 1.], dtype=torch.float64)
    """
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM looks at windows of {WINDOW}×{WINDOW} and needs images of that size, got {tuple(x.shape)}")
    x, y = x.double(), y.double()
    mean_x, mean_y = _windows(x), _windows(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variance_x, variance_y = (unbiased * (_windows(v.square()) - m.square()) for v, m in ((x, mean_x), (y, mean_y)))
    covariance = unbiased * (_windows(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return (above / below).mean((-3, -2, -1))


def mean_over_clips(values: Tensor) -> dict[str, Any]:
    r"""Mean m, its standard error s over clips ``(clips,)``, and the normal 95 % interval :math:`m \pm 1.96 s`.

    >>> [round(end, 3) for end in mean_over_clips(torch.tensor([1.0, 3.0]))["interval_95"]]
    [0.04, 3.96]
    """
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"mean": mean, "standard_error": None, "interval_95": [None, None]}
    error = float(values.std()) / math.sqrt(n)
    return {"mean": mean, "standard_error": error, "interval_95": [mean - NORMAL_95 * error, mean + NORMAL_95 * error]}


@torch.no_grad()
def predictions(
    vae: VAE,
    batches: Batches,
    samples: int = 100,
    seed: int = 0,
    *,
    context_frames: int | None = None,
    ssim_range: float = 1.0,
    batch_statistics: bool = False,
) -> dict[str, Any]:
    """PSNR and SSIM of predictions: for each clip, those of its best sample, the one with the highest SSIM averaged over time.

    Means of the likelihood are predicted and fed back, as in SVG, whose protocol on BAIR is 100 samples, 256 clips and 28 frames
    after 2.

    Args:
        vae: the model; put into eval mode.
        batches: clips; what follows the conditioning frames is predicted.
        samples: predictions of each clip to choose the best from.
        seed: of their latents, which belong to the clip: no number depends on the batch size.
        context_frames: how many frames are given; the network's own number unless said.
        ssim_range: see :func:`ssim`.
        batch_statistics: batch norm as in the published evaluation; numbers then do depend on the batch.

    Returns:
        ``psnr_db`` and ``ssim`` of the best samples: the mean over time and clips with its standard error over clips and
        ``interval_95``, the normal 95 % interval of the mean (ends None for a single clip); the same for the average sample; the best
        samples' means frame by frame, ``..._per_frame``, with ``..._per_frame_standard_error`` and ``..._per_frame_interval_95``;
        and how they were made.

    Raises:
        ValueError: the network predicts no frames, the clips are too short or not in [0, 1], or there is no sample to choose from.
    """
    vae.eval()
    past = vae.video_network.context_frames if context_frames is None else context_frames
    length = batches.store.shape[0]
    if samples < 1 or not 0 < past < length:
        raise ValueError(
            f"the best of at least 1 sample is taken, of clips longer than the frames that are given; got {samples} samples and"
            f" {past} of {length} frames"
        )
    device = next(vae.parameters()).device
    found: list[Tensor] = []
    for batch in batches:
        x = in_unit_range(batch.x.to(device))
        each = []
        for sample in range(samples):
            noise = keyed_noise(batch.positions, seed * samples + sample)
            shown = vae.video_network.predict(
                x[:, :past],
                length - past,
                lambda h: vae.likelihood(h).mean,
                noise,
                batch_statistics=batch_statistics,
            ).frames
            each.append(torch.stack([psnr(shown, x[:, past:]), ssim(shown, x[:, past:], ssim_range)]).cpu())
        found.append(torch.stack(each, 2))
    values = torch.cat(found, 1)  # (2, clips, samples, frames)
    best = values[1].mean(-1).argmax(-1)
    chosen = values[:, torch.arange(len(best)), best]
    return {
        "samples": samples,
        "noise_seed": seed,
        "clips": len(best),
        "frames": length - past,
        "context_frames": past,
        "ssim_range": ssim_range,
        "batch_statistics": batch_statistics,
        **_both("", chosen.mean(-1)),
        **_both("_average_sample", values.mean((-2, -1))),
        **_per_frame("psnr_db", chosen[0]),
        **_per_frame("ssim", chosen[1]),
    }


def _windows(x: Tensor) -> Tensor:
    """Mean over each window."""
    means = functional.avg_pool2d(x.reshape(-1, *x.shape[-3:]), WINDOW, stride=1)
    return means.reshape(*x.shape[:-2], *means.shape[-2:])


def _both(name: str, values: Tensor) -> dict[str, Any]:
    """Of values ``(2, clips)``."""
    return {f"{kind}{name}": mean_over_clips(value) for kind, value in zip(("psnr_db", "ssim"), values, strict=True)}


def _per_frame(kind: str, values: Tensor) -> dict[str, Any]:
    """Of values ``(clips, frames)``, frame by frame."""
    frames = [mean_over_clips(value) for value in values.unbind(1)]
    return {
        f"{kind}_per_frame": [frame["mean"] for frame in frames],
        f"{kind}_per_frame_standard_error": [frame["standard_error"] for frame in frames],
        f"{kind}_per_frame_interval_95": [frame["interval_95"] for frame in frames],
    }


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
