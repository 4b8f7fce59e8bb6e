"""Quality of samples (Fréchet and kernel distances, precision and recall of features), and of predicted clips."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.base import (
    Column,
    Estimate,
    EvaluationData,
    Metric,
    Record,
    Row,
    about,
    estimate_rows,
    seeded,
    subset,
)
from sigma_vae.evaluation.features import Extractor, load_clip_extractor, load_extractor, reads_clips
from sigma_vae.evaluation.plots import drawable, in_unit_range
from sigma_vae.progress import steps
from sigma_vae.registry import register
from sigma_vae.types import Noise
from sigma_vae.vae import VAE, Show, has_fitted_prior, keyed_noise, standard_prior

NEIGHBOURS = 5
"""The k of precision, recall, density and coverage, as Naeem et al. (2020) set it."""
AT_ONCE = 2**22
"""Distances kept together."""
SAMPLES_AT_ONCE, CLIPS_AT_ONCE = 100, 16
"""Examples whose random numbers are drawn together: fixed, so that no sample depends on how many are asked for."""


@dataclass(frozen=True, eq=False)
class KernelDistance(Record):
    """The mean over subsets, their std (None for a single one), their number and their size."""

    mean: float
    standard_deviation: float | None
    subsets: int
    subset_size: int


class PrecisionRecall(NamedTuple):
    """The shares of samples among the data, and of data among the samples."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison(Record):
    """Distances of images from the real ones."""

    frechet: float
    kernel: KernelDistance
    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Floor(Comparison):
    """Distances of other real images from the real ones."""

    split: str
    examples: int


@dataclass(frozen=True, eq=False)
class Samples(Record):
    """Distances of samples, shown as decoder means and as draws from p(x|z)."""

    means: Comparison
    draws: Comparison


@dataclass(frozen=True, eq=False)
class Frechet(Record):
    """A Fréchet distance alone."""

    frechet: float


@dataclass(frozen=True, eq=False)
class Reconstructions(Record):
    """Distance of reconstructions, shown as decoder means."""

    means: Frechet


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageQuality(Record):
    """Sample quality of images.

    ``samples`` come from the prior, ``samples_standard_prior`` from N(0, I), where the prior is a fitted one. ``floor``
    compares other real images, of the training split. ``rank_deficient`` says that there are no more images than
    features, where Fréchet distances are strongly biased upwards.
    """

    examples: int
    split: str
    seed: int
    data: dict[str, Any]
    extractor: dict[str, Any]
    prior: str | None
    neighbours: int
    rank_deficient: bool
    floor: Floor
    samples: Samples
    samples_standard_prior: Samples | None = None
    reconstructions: Reconstructions


@dataclass(frozen=True, eq=False, kw_only=True)
class Features(Record):
    """Fréchet distance of predictions, and what it was measured with."""

    frechet: float
    examples: int
    rank_deficient: bool
    extractor: dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoQuality(Record):
    """Quality of predicted frames: of whole clips, of single frames, or both."""

    split: str
    seed: int
    show: str
    context_frames: int
    predicted_frames: int
    data: dict[str, Any]
    clips: Features | None = None
    frames: Features | None = None

    @property
    def sections(self) -> dict[str, Features]:
        """The parts that were measured, by name."""
        known = {"clips": self.clips, "frames": self.frames}
        return {name: section for name, section in known.items() if section is not None}


Quality = ImageQuality | VideoQuality


@register.metric("quality")
@final
class QualityMetric(Metric):
    """Fréchet and kernel distance, precision and recall of samples; for video, Fréchet distance of predictions."""

    result = dict[str, Quality]
    on_one_process = True
    columns = (
        Column("quality.*.samples.means.frechet", "Fréchet distance ({})", 2),
        Column("quality.*.frames.frechet", "Fréchet distance ({})", 2),
        Column("quality.*.clips.frechet", "Fréchet distance ({})", 2),
    )

    def obstacle(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> str | None:
        """It compares pictures, and loads the networks that look at them before any long work."""
        if data.splits is None:
            return "it compares with training images, so it needs Splits or the name of a data set"
        shape, examples = data.splits.shape, len(data.held_out.store)
        if not drawable(shape):
            return f"{data.splits.name} has examples of shape {shape}, and images have 1 or 3 channels"
        if not data.splits.clips and min(settings.samples, examples) <= NEIGHBOURS:
            return f"it needs more than {NEIGHBOURS} samples and as many examples, got {settings.samples} and {examples}"
        try:
            _extractors(vae, settings)
        except ValueError as error:
            return str(error)
        return None

    def measure(self, vae: VAE, data: EvaluationData, settings: EvaluationSettings) -> dict[str, Quality]:
        """With each feature extractor of the settings."""
        assert data.splits is not None
        found: dict[str, Quality] = {}
        n, seed, split = settings.samples, settings.seed, settings.split
        for each in _extractors(vae, settings):
            if vae.network.reads_clips:
                clips, frames = (each, None) if each.of_clips else (None, each)
                found[each.name] = video_quality(vae, data.splits, clips=clips, frames=frames, n=n, seed=seed, split=split)
            else:
                found[each.name] = quality(vae, data.splits, each, n, seed, split)
        return found

    def rows(self, result: Mapping[str, Quality]) -> Iterator[Row]:
        """Distances, each with the images that it is about."""
        for features, part in result.items():
            yield from _image_rows(features, part) if isinstance(part, ImageQuality) else _video_rows(features, part)

    def notes(self, result: Mapping[str, Quality], report: Mapping[str, Any]) -> Iterator[str]:
        """Cuts and sizes of the images: distances compare only where they are the same."""
        for features, part in result.items():
            for section in (part,) if isinstance(part, ImageQuality) else part.sections.values():
                how = section.extractor
                size = "×".join(map(str, how["input"]))
                yield f"{features}: data {part.data['preprocessing']}; features of {size}, preprocessing {how['preprocessing']}"

    def compared(self, results: Sequence[Mapping[str, Quality] | None]) -> list[dict[str, Any]]:
        """Fréchet distances, each under a name that says what has to be the same for it to compare."""
        known = [result or {} for result in results]
        return [dict(_compared(result, known)) for result in known]


def _extractors(vae: VAE, settings: EvaluationSettings) -> list[Extractor]:
    """Load the feature extractors; those of whole clips are for networks that read clips."""
    made = [
        (load_clip_extractor if vae.network.reads_clips and reads_clips(source) else load_extractor)(source, vae.device)
        for source in settings.features
    ]
    names = [each.name for each in made]
    if len(set(names)) < len(names):
        raise ValueError(f"each of the features has a section of its name, got {', '.join(names)}; rename a file")
    return made


def _image_rows(features: str, part: ImageQuality) -> Iterator[Row]:
    how = f"{features}, {part.examples} of {part.split}"
    for name in ("samples", "samples_standard_prior"):
        for shown, numbers in part.get(name, {}).items():
            what = f"{name.replace('_', ' ')}, {shown} ({how})"
            yield Row(f"Fréchet distance, {what}", f"{numbers.frechet:.3f}")
            yield Row(f"kernel distance, {what}", f"{numbers.kernel.mean:.5f}")
            for pair in (("precision", "recall"), ("density", "coverage")):
                yield Row(f"{' / '.join(pair)}, {what}", " / ".join(f"{numbers[one]:.3f}" for one in pair))
    yield Row(f"Fréchet distance, reconstructions ({how})", f"{part.reconstructions.means.frechet:.3f}")
    floor = part.floor
    yield Row(f"Fréchet distance, floor ({features}, {floor.examples} of {floor.split})", f"{floor.frechet:.3f}")


def _video_rows(features: str, part: VideoQuality) -> Iterator[Row]:
    for name, section in part.sections.items():
        yield Row(f"Fréchet distance, {name} ({features}, {section.examples} of {part.split})", f"{section.frechet:.3f}")


def _compared(result: Mapping[str, Quality], every: Sequence[Mapping[str, Quality]]) -> Iterator[tuple[str, float]]:
    """Labels and distances of one run among several."""
    for name, part in result.items():
        others = [each[name] for each in every if name in each]
        digest = "" if len({_digest(other) for other in others}) == 1 else f" {_digest(part)[:8]}"
        if isinstance(part, VideoQuality):
            for kind, section in part.sections.items():
                yield f"frechet {name}{digest}, {section.examples} {kind}", section.frechet
            continue
        label = f"frechet {name}{digest}, {part.examples} images"
        yield label, part.samples.means.frechet
        if part.prior is not None and any("samples_standard_prior" in other for other in others):
            yield f"{label}, N(0, I)", (part.samples_standard_prior or part.samples).means.frechet


def _digest(part: Quality) -> str:
    """SHA-256 of the extractor's weights."""
    section = part if isinstance(part, ImageQuality) else next(iter(part.sections.values()), None)
    return "" if section is None else str(section.extractor["sha256"])


class _Reference(NamedTuple):
    """Features of real images, with their radii, which every comparison needs."""

    features: Tensor
    radii: Tensor
    seed: int

    def against(self, features: Tensor) -> dict[str, Any]:
        """Fields of a :class:`Comparison`."""
        return {
            "frechet": frechet_distance(self.features, features),
            "kernel": kernel_distance(self.features, features, seed=self.seed),
            **precision_recall(self.features, features, NEIGHBOURS, self.radii)._asdict(),
        }


@torch.no_grad()
def quality(
    vae: VAE, data: Splits, extractor: Extractor, n: int = 10_000, seed: int = 0, split: SplitName = "test", batch: int = 256
) -> ImageQuality:
    """Measure the quality of samples, and the Fréchet distance of reconstructions.

    All sets have n images and are compared with n images of a split; where the split has fewer, that many. Distances
    with another n, split, extractor or size of images do not compare: these are part of the result.

    Args:
        vae: the model; put into eval mode.
        data: images of one or three channels with values in [0, 1].
        extractor: feature extractor, from :func:`~sigma_vae.evaluation.features.load_extractor`.
        n: number of images of each kind.
        seed: seed of the choice of images, of latents and of draws.
        split: the split to compare samples with.
        batch: images encoded together; no number depends on it.

    Raises:
        ValueError: the data are no images, or not in [0, 1], there are too few of them, or the extractor does not fit
            them.
    """
    if data.clips or not drawable(data.shape):
        kind = "clips" if data.clips else "examples"
        raise ValueError(
            f"sample quality is about images with 1 or 3 channels, got {kind} of {data.name} with shape {data.shape};"
            " for clips, use video_quality"
        )
    if n <= NEIGHBOURS:
        raise ValueError(
            f"n counts the images of each kind and is more than {NEIGHBOURS}, the neighbours that are looked at; got {n}"
        )
    vae.eval()
    images = subset(data, split, n, batch, seed, vae.device)
    count = len(images.store)
    reference = _real(extractor, images)
    compare = _Reference(reference, radii(reference), seed)
    other: SplitName = "test" if split == "train" else "train"
    floor = subset(data, other, count, batch, seed, vae.device)
    compared_floor = compare.against(_real(extractor, floor))
    samples, standard = _samples(vae, data, extractor, compare), None
    if has_fitted_prior(vae):
        with standard_prior(vae):
            standard = _samples(vae, data, extractor, compare)
    again = extractor.of(
        data.scaling.undo(vae.reconstruct(batch.x, noise=keyed_noise(batch.positions, seed), condition=batch.condition))
        for batch in images
    )
    return ImageQuality(
        examples=count,
        split=split,
        seed=seed,
        data=about(data),
        extractor=extractor.record(data.shape, reference.shape[1]),
        prior=type(vae.network.prior).__name__ if vae.network.has_prior else None,
        neighbours=NEIGHBOURS,
        rank_deficient=count <= reference.shape[1],
        floor=Floor(split=other, examples=len(floor.store), **compared_floor),
        samples=samples,
        samples_standard_prior=standard,
        reconstructions=Reconstructions(Frechet(frechet_distance(reference, again))),
    )


def _real(extractor: Extractor, images: Batches) -> Tensor:
    return extractor.of(in_unit_range(images.scaling.undo(batch.x)) for batch in images)


def _samples(vae: VAE, data: Splits, extractor: Extractor, compare: _Reference) -> Samples:
    """Compare decoder means and draws of p(x|z), made in chunks of one size, each with a seed of its own."""
    means, draws = [], []
    count = len(compare.features)
    for start in steps("batches of samples", range(0, count, SAMPLES_AT_ONCE)):
        with seeded(compare.seed, start, vae.device):
            distribution = vae.likelihood.distribution(vae.network.generate(SAMPLES_AT_ONCE))
            mean, draw = distribution.mean, distribution.sample()
        means.append(extractor(data.scaling.undo(mean)))
        draws.append(extractor(data.scaling.undo(draw)))
    return Samples(*(Comparison(**compare.against(torch.cat(features)[:count])) for features in (means, draws)))


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
) -> VideoQuality:
    """Measure the Fréchet distance between predictions and what happened: of whole clips, and of single frames.

    Each clip is predicted once. ``clips`` sees whole clips, predicted and true, each with the frames that are given;
    ``frames`` sees every predicted frame, against the true frames of the same times: the FID of the paper's table for
    BAIR.

    Args:
        vae: the model; put into eval mode.
        data: clips of frames with one or three channels and values in [0, 1].
        clips: extractor for clips, from :func:`~sigma_vae.evaluation.features.load_clip_extractor`.
        frames: extractor for images, from :func:`~sigma_vae.evaluation.features.load_extractor`.
        n: number of clips; where the split has fewer, that many.
        seed: seed of the choice of clips, of latents and of draws.
        split: the split whose clips are continued.
        show: the mean of p(x|z), which is fed back as SVG does, or draws from it.
        context_frames: number of given frames; the network's own number by default.

    Raises:
        ValueError: there is no extractor, the data are no clips of images, or too short, or the network predicts no
            frames.
    """
    if not vae.network.reads_clips:
        raise ValueError(f"{type(vae.network).__name__} predicts no frames; use a network for video, such as sequence")
    past = vae.network.context_frames if context_frames is None else context_frames
    if show not in ("mean", "draw"):
        raise ValueError(f'show is "mean" or "draw", got {show!r}')
    if clips is None and frames is None:
        raise ValueError(
            "video quality needs an extractor, for clips or for frames, such as load_extractor('efficientnet') for frames"
        )
    if not data.clips or not drawable(data.shape):
        raise ValueError(
            f"video quality is about clips of images with 1 or 3 channels, got examples of {data.name} with shape {data.shape}"
        )
    length = data.store(split).shape[0]
    if not 0 < past < length:
        raise ValueError(f"at least one frame is given and one predicted; got {past} given of {length} frames")
    vae.eval()
    chosen = subset(data, split, n, CLIPS_AT_ONCE, seed, vae.device)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"clips": [], "frames": []}
    for number, batch in enumerate(chosen):
        with seeded(seed, number, vae.device):
            made = _predicted(vae, batch.x, past, show, keyed_noise(batch.positions, seed))
        true, made = (data.scaling.undo(x.flatten(0, 1)).reshape(x.shape) for x in (batch.x, made))
        in_unit_range(true)
        if clips is not None:
            found["clips"].append((clips(true), clips(torch.cat([true[:, :past], made], 1))))
        if frames is not None:
            found["frames"].append((frames(true[:, past:].flatten(0, 1)), frames(made.flatten(0, 1))))
    return VideoQuality(
        split=split,
        seed=seed,
        show=show,
        context_frames=past,
        predicted_frames=length - past,
        data=about(data),
        clips=None if clips is None else _features(found["clips"], clips, chosen.store.shape),
        frames=None if frames is None else _features(found["frames"], frames, data.shape),
    )


def _predicted(vae: VAE, x: Tensor, past: int, show: Show, noise: Noise) -> Tensor:
    def shown(h: Tensor) -> Tensor:
        distribution = vae.likelihood.distribution(h)
        values: Tensor = distribution.mean if show == "mean" else distribution.sample()
        return values

    return vae.network.predict(x[:, :past], x.shape[1] - past, shown, noise).frames


def _features(pairs: list[tuple[Tensor, Tensor]], extractor: Extractor, shape: tuple[int, ...]) -> Features:
    true, made = (torch.cat(features) for features in zip(*pairs, strict=True))
    examples, dim = true.shape
    return Features(
        frechet=frechet_distance(true, made),
        examples=examples,
        rank_deficient=examples <= dim,
        extractor=extractor.record(shape, dim),
    )


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""Compute the Fréchet distance (squared Wasserstein-2) of the Gaussians with the moments of two sets of features.

    .. math:: \|\mu_x - \mu_y\|^2 + \text{tr}(\Sigma_x + \Sigma_y - 2 (\Sigma_x \Sigma_y)^{1/2})

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6. With factors :math:`\Sigma = R^\top R` from a QR
    decomposition of the centred features, the trace of the root is the sum of the singular values of
    :math:`R_x R_y^\top`, which loses no digits to a matrix root. Nothing is inverted, so sets of fewer examples than
    features have a distance too, but a strongly biased one.

    Shapes:
        x ``(n, d)``, y ``(m, d)``, of any floating dtype; covariances are unbiased.

    Raises:
        ValueError: the sets have features of other sizes, or fewer than two examples.

    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> frechet_distance(x, 2 * x + 1)     # means 1 apart in two directions; stds √2 and 2√2 in one
    4.0
    """
    x, y = _checked(x, y, at_least=2)
    root_x, root_y = (torch.linalg.qr((each - each.mean(0)) / (len(each) - 1) ** 0.5, mode="r").R for each in (x, y))
    means = (x.mean(0) - y.mean(0)).square().sum()
    shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max(0.0, float(means + root_x.square().sum() + root_y.square().sum() - 2 * shared))


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    r"""Compute the kernel distance (KID), a mean over subsets.

    It is the squared maximum mean discrepancy with the kernel :math:`(x \cdot y / d + 1)^3`.
    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4. The estimate is unbiased, so it may be below 0,
    and only its spread depends on the number of examples.

    The features are ``(n, d)`` and ``(m, d)``. Smaller sets have subsets of as many examples as both have; there is one
    pair of subsets, where they are all of both sets.

    Raises:
        ValueError: the sets have features of other sizes, or fewer than two examples.

    >>> kernel_distance(torch.randn(50, 3), torch.randn(50, 3) + 4).mean > 10
    True
    """
    x, y = _checked(x, y, at_least=2)
    size = min(subset_size, len(x), len(y))
    count = 1 if size == len(x) == len(y) else subsets
    generator = torch.Generator().manual_seed(seed)
    chosen = [[torch.randperm(len(each), generator=generator)[:size] for each in (x, y)] for _ in range(count)]
    of_x, of_y = (torch.stack(parts) for parts in zip(*chosen, strict=True))
    # Unbiased for each pair of subsets (Gretton et al. 2012, equation 4): without the pairs of one and the same.
    own = _kernel_sums(x, x, of_x, of_x, same=True) + _kernel_sums(y, y, of_y, of_y, same=True)
    scores = own / (size * (size - 1)) - 2 * _kernel_sums(x, y, of_x, of_y) / size**2
    std = None if count == 1 else float(scores.std(correction=0))
    return KernelDistance(float(scores.mean()), std, count, size)


def _kernel_sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor, *, same: bool = False) -> Tensor:
    """Sums of the kernel over all pairs of a subset of x and one of y, for each pair of subsets (rows of indices)."""
    if len(of_x) * of_x.shape[1] ** 2 < len(x) * len(y):  # fewer pairs than all pairs of x and y
        pairs = ((x[rows], y[columns]) for rows, columns in zip(of_x, of_y, strict=True))
        return torch.stack([_kernel(some, others, same=same).sum() for some, others in pairs])
    in_x, in_y = (torch.zeros(len(of), len(all_), dtype=x.dtype).scatter_(1, of, 1.0) for of, all_ in ((of_x, x), (of_y, y)))
    total = torch.zeros(len(of_x), dtype=x.dtype)
    for rows in torch.split(torch.arange(len(x)), max(1, AT_ONCE // len(y))):
        kernel = _kernel(x[rows], y, same=same, first=int(rows[0]))
        total += (in_x[:, rows] @ kernel * in_y).sum(1)
    return total


def _kernel(x: Tensor, y: Tensor, *, same: bool, first: int = 0) -> Tensor:
    """The kernel of each pair; where x is y from row ``first`` on, 0 for the pairs of one and the same."""
    values = (x @ y.T * (1.0 / x.shape[1]) + 1) ** 3
    if same:
        values[torch.arange(len(x)), torch.arange(first, first + len(x))] = 0.0
    return values


def precision_recall(
    real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS, real_radii: Tensor | None = None
) -> PrecisionRecall:
    r"""Compute the shares of samples among the data, and of data among the samples.

    With :math:`B(x)` the ball around x that reaches its k-th nearest neighbour in its own set:

    * precision: the share of samples that lie in the ball of any datum; recall: of data that lie in that of any sample
      (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991);
    * density: in how many balls of data a sample lies, over k; coverage: the share of data with a sample in their ball
      (Naeem et al. 2020, https://arxiv.org/abs/2002.09797). They mind outliers less. Density has no upper bound, and is
      1 for equal distributions.

    The features are ``(n, d)`` and ``(m, d)``; ``real_radii`` are the :func:`radii` of the data, if already known.

    Raises:
        ValueError: the sets have features of other sizes, or no more than k examples.

    >>> data = torch.randn(40, 2)
    >>> precision, recall, _, _ = precision_recall(data, data[:10] / 100)     # samples in the middle alone
    >>> precision, recall
    (1.0, 0.0)
    """
    real, made = _checked(real, made, at_least=neighbours + 1)
    reach = radii(real, neighbours) if real_radii is None else real_radii
    made_reach = radii(made, neighbours)
    inside = torch.zeros(len(made), dtype=torch.int64)
    recalled = covered = 0
    for rows in torch.split(torch.arange(len(real)), max(1, AT_ONCE // len(made))):
        distances = torch.cdist(real[rows], made)
        within = distances <= reach[rows, None]
        inside += within.sum(0)
        covered += int(within.any(1).sum())
        recalled += int((distances <= made_reach).any(1).sum())
    return PrecisionRecall(
        precision=float((inside > 0).double().mean()),
        recall=recalled / len(real),
        density=float(inside.double().mean()) / neighbours,
        coverage=covered / len(real),
    )


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Compute the distance of each example to its k-th nearest neighbour in the set, ``(n,)`` in float64.

    >>> radii(torch.tensor([[0.0], [1.0], [3.0]]), neighbours=1)
    tensor([1., 1., 2.], dtype=torch.float64)
    """
    features, _ = _checked(features, features, at_least=neighbours + 1)
    rows = torch.split(features, max(1, AT_ONCE // len(features)))
    return torch.cat([torch.cdist(some, features).kthvalue(neighbours + 1).values for some in rows])  # the first is itself


def _checked(x: Tensor, y: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"two sets of features (n, d) and (m, d) are compared, got {tuple(x.shape)} and {tuple(y.shape)}; take both from"
            " the same extractor"
        )
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"each set needs at least {at_least} examples, got {len(x)} and {len(y)}")
    return x.detach().cpu().double(), y.detach().cpu().double()


# -- quality of predictions of clips -----------------------------------------------------------------------------------

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
