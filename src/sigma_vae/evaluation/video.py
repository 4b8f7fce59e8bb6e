"""Predictions of video: PSNR and SSIM of the best of many samples."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches
from sigma_vae.evaluation.base import Column, Estimate, EvaluationData, Metric, Record, Row, estimate_rows
from sigma_vae.evaluation.plots import in_unit_range
from sigma_vae.registry import register
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["ClipEstimate", "Predictions", "PredictionsMetric", "mean_over_clips", "predictions", "psnr", "ssim"]

WINDOW = 7
K1, K2 = 0.01, 0.03
LEAST_MSE = 1e-10
NORMAL_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, eq=False)
class ClipEstimate(Estimate):
    """A mean over clips, its standard error, and its normal 95 % interval; the ends are None for a single clip."""

    interval_95: list[float | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions(Record):
    """PSNR and SSIM of each clip's best sample, the one with the highest SSIM averaged over time.

    ``psnr_db`` and ``ssim`` are means over time and clips; ``..._average_sample`` is the same for the average sample,
    and ``..._per_frame`` has the best samples' means frame by frame.
    """

    samples: int
    noise_seed: int
    clips: int
    frames: int
    context_frames: int
    ssim_range: float
    batch_statistics: bool
    psnr_db: ClipEstimate
    ssim: ClipEstimate
    psnr_db_average_sample: ClipEstimate
    ssim_average_sample: ClipEstimate
    psnr_db_per_frame: list[float]
    psnr_db_per_frame_standard_error: list[float | None]
    psnr_db_per_frame_interval_95: list[list[float | None]]
    ssim_per_frame: list[float]
    ssim_per_frame_standard_error: list[float | None]
    ssim_per_frame_interval_95: list[list[float | None]]


@register.metric("predictions")
@final
class PredictionsMetric(Metric):
    """PSNR and SSIM of the best of several predictions of each clip."""

    result = Predictions
    on_one_process = True
    columns = (
        Column("predictions.psnr_db", "PSNR of the best prediction, dB", 2),
        Column("predictions.ssim", "SSIM of the best prediction", 3),
    )

    def is_asked_for(self, settings: EvaluationSettings) -> bool:
        """Whether the settings name it, or say how many predictions to choose from."""
        return settings.best_of is not None or self.name in (settings.metrics or ())

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It needs a network that predicts, and the number of predictions."""
        if not vae.network.reads_clips:
            return f"{type(vae.network).__name__} predicts no frames"
        return "best_of has to say how many predictions to choose from (SVG: 100)" if settings.best_of is None else None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> Predictions:
        """On the held-out clips."""
        assert settings.best_of is not None
        return predictions(vae, data.held_out, settings.best_of, settings.seed, batch_statistics=settings.batch_statistics)

    def rows(self, result: Predictions) -> Iterator[Row]:
        """The means."""
        yield from estimate_rows(result)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    r"""Compute the peak signal-to-noise ratio in dB, averaged over channels: :math:`-10 \log_{10} \text{MSE}`, at most 100.

    Shapes:
        x, y ``(*batch, C, H, W)`` with values in [0, 1], result ``(*batch,)`` in float64.

    >>> psnr(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1))
    tensor(20.0000, dtype=torch.float64)
    """
    mse = (x.double() - y.double()).square().mean((-2, -1))
    return -10 * torch.log10(mse.clamp_min(LEAST_MSE)).mean(-1)


def ssim(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    r"""Compute the structural similarity (Wang et al. 2004) with uniform windows of 7×7; 1 for equal images.

    .. math::
        \frac{(2 \mu_x \mu_y + C_1)(2 \sigma_{xy} + C_2)}{(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)},
        \quad C_i = (K_i R)^2

    with K = 0.01 and 0.03, R the ``data_range`` and unbiased (co)variances, averaged over all windows that lie in the
    image, and over channels. SVG's evaluation left R to scikit-image, which took 2 for floats: give 2 to compare with
    its numbers (they are nearer to 1).

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


def mean_over_clips(values: Tensor) -> ClipEstimate:
    r"""Estimate the mean m over clips ``(clips,)``, its standard error s, and the interval :math:`m \pm 1.96 s`.

    >>> [round(end, 3) for end in mean_over_clips(torch.tensor([1.0, 3.0])).interval_95]
    [0.04, 3.96]
    """
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return ClipEstimate(mean, None, [None, None])
    error = float(values.std()) / math.sqrt(n)
    return ClipEstimate(mean, error, [mean - NORMAL_95 * error, mean + NORMAL_95 * error])


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
) -> Predictions:
    """Measure PSNR and SSIM of predictions, for the best of several samples of each clip.

    Means of the likelihood are predicted and fed back, as in SVG, whose protocol on BAIR is 100 samples, 256 clips and
    28 frames after 2.

    Args:
        vae: the model; put into eval mode.
        batches: clips; the frames after the conditioning ones are predicted.
        samples: number of predictions of each clip to choose the best from.
        seed: seed of their latents, which belong to the clip: no number depends on the batch size.
        context_frames: number of given frames; the network's own number by default.
        ssim_range: see :func:`ssim`.
        batch_statistics: use the batch's statistics in batch norm, as the published evaluation does; numbers then
            depend on the batch.

    Raises:
        ValueError: the network predicts no frames, the clips are too short or not in [0, 1], or there is no sample to
            choose from.
    """
    if not vae.network.reads_clips:
        raise ValueError(f"{type(vae.network).__name__} predicts no frames; use a network for video, such as sequence")
    vae.eval()
    past = vae.network.context_frames if context_frames is None else context_frames
    length = batches.store.shape[0]
    if samples < 1 or not 0 < past < length:
        raise ValueError(
            f"the best of at least 1 sample is taken, of clips longer than the frames that are given; got {samples} samples and"
            f" {past} of {length} frames"
        )

    def mean(h: Tensor) -> Tensor:
        return vae.likelihood.distribution(h).mean

    found: list[Tensor] = []
    for batch in batches:
        x = in_unit_range(batch.x.to(vae.device))
        each = []
        for sample in range(samples):
            noise = keyed_noise(batch.positions, seed * samples + sample)
            shown = vae.network.predict(x[:, :past], length - past, mean, noise, batch_statistics=batch_statistics).frames
            each.append(torch.stack([psnr(shown, x[:, past:]), ssim(shown, x[:, past:], ssim_range)]).cpu())
        found.append(torch.stack(each, 2))
    values = torch.cat(found, 1)  # (2, clips, samples, frames)
    best = values[1].mean(-1).argmax(-1)
    chosen = values[:, torch.arange(len(best)), best]
    return Predictions(
        samples=samples,
        noise_seed=seed,
        clips=len(best),
        frames=length - past,
        context_frames=past,
        ssim_range=ssim_range,
        batch_statistics=batch_statistics,
        psnr_db=mean_over_clips(chosen[0].mean(-1)),
        ssim=mean_over_clips(chosen[1].mean(-1)),
        psnr_db_average_sample=mean_over_clips(values[0].mean((-2, -1))),
        ssim_average_sample=mean_over_clips(values[1].mean((-2, -1))),
        **_per_frame("psnr_db", chosen[0]),
        **_per_frame("ssim", chosen[1]),
    )


def _windows(x: Tensor) -> Tensor:
    """Mean over each window."""
    means = functional.avg_pool2d(x.reshape(-1, *x.shape[-3:]), WINDOW, stride=1)
    return means.reshape(*x.shape[:-2], *means.shape[-2:])


def _per_frame(kind: str, values: Tensor) -> dict[str, Any]:
    """Estimates frame by frame, from values ``(clips, frames)``."""
    frames = [mean_over_clips(value) for value in values.unbind(1)]
    return {
        f"{kind}_per_frame": [frame.mean for frame in frames],
        f"{kind}_per_frame_standard_error": [frame.standard_error for frame in frames],
        f"{kind}_per_frame_interval_95": [frame.interval_95 for frame in frames],
    }


def __getattr__(name: str) -> Any:
    if name != "video_quality":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sigma_vae.evaluation import quality

    warnings.warn(f"{__name__}.video_quality is now {quality.__name__}.video_quality", DeprecationWarning, stacklevel=2)
    return quality.video_quality
