"""Sample quality: Fréchet and kernel distances, precision and recall, between features of samples and of real images."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.base import about, seeded, subset
from sigma_vae.evaluation.features import Extractor
from sigma_vae.evaluation.plots import drawable, in_unit_range
from sigma_vae.evaluation.suite import has_fitted_prior, standard_prior
from sigma_vae.networks import FlatNetwork
from sigma_vae.vae import VAE, keyed_noise

__all__ = [
    "NEIGHBOURS",
    "KernelDistance",
    "PrecisionRecall",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "quality",
    "radii",
]

NEIGHBOURS = 5
"""The k of precision, recall, density and coverage, as Naeem et al. (2020) set it."""
AT_ONCE = 2**22
"""Distances held together."""


class KernelDistance(NamedTuple):
    """The mean over subsets, how these differ, and how many of what size there were."""

    mean: float
    standard_deviation: float
    subsets: int
    subset_size: int


class PrecisionRecall(NamedTuple):
    """What share of samples lies among the data, and of data among the samples."""

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(x: Tensor, y: Tensor) -> float:
    r"""Fréchet distance (squared Wasserstein-2) of the Gaussians with the moments of two sets of features.

    .. math:: \|\mu_x - \mu_y\|^2 + \text{tr}(\Sigma_x + \Sigma_y - 2 (\Sigma_x \Sigma_y)^{1/2})

    Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6. With factors :math:`\Sigma = R^\top R` from a QR decomposition of the
    centred features, the trace of the root is the sum of the singular values of :math:`R_x R_y^\top`: what
    :math:`\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2}` has for eigenvalues are their squares, and the roots of those would turn rounding of
    1e-16 into 1e-8. Nothing is inverted, so sets of fewer examples than features have a distance too, but a strongly biased one.

    Shapes:
        x ``(n, d)``, y ``(m, d)``, of any floating dtype; covariances are unbiased.

    Raises:
        ValueError: the sets have features of other sizes, or fewer than two examples.

    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> frechet_distance(x, 2 * x + 1)     # means 1 apart in two directions; deviations √2 and 2√2 in one
    4.0
    """
    x, y = _checked(x, y, at_least=2)
    root_x, root_y = _root(x), _root(y)
    means = (x.mean(0) - y.mean(0)).square().sum()
    shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max(0.0, float(means + root_x.square().sum() + root_y.square().sum() - 2 * shared))


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    r"""Kernel distance (KID): squared maximum mean discrepancy with the kernel :math:`(x \cdot y / d + 1)^3`, averaged over subsets.

    Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4, as torchmetrics computes it. The estimate is unbiased, so it may be
    below 0, and does not depend on the number of examples but for its spread.

    Args:
        x: features ``(n, d)``.
        y: features ``(m, d)``.
        subsets: how many pairs of subsets are drawn; one, where that is all there is of both.
        subset_size: examples of each; of smaller sets, as many as both have.
        seed: of the choice of subsets.

    Raises:
        ValueError: the sets have features of other sizes, or fewer than two examples.

    >>> kernel_distance(torch.randn(50, 3), torch.randn(50, 3) + 4).mean > 10
    True
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = _checked(x, y, at_least=2)
    size = min(subset_size, len(x), len(y))
    count = 1 if size == len(x) == len(y) else subsets
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*save all extracted features in buffer")
        metric = KernelInceptionDistance(nn.Identity(), subsets=count, subset_size=size)
        metric.update(x, real=True)
        metric.update(y, real=False)
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return KernelDistance(float(mean), float(deviation), count, size)


def precision_recall(
    real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS, real_radii: Tensor | None = None
) -> PrecisionRecall:
    r"""Whether samples lie among the data, and data among the samples, told by balls to the k-th nearest neighbour.

    With :math:`B(x)` the ball around x that reaches its k-th nearest neighbour in its own set:

    * precision: the share of samples that lie in the ball of any datum; recall: of data that lie in that of any sample
      (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991);
    * density: in how many balls of data a sample lies, over k; coverage: the share of data with a sample in their ball (Naeem et al.
      2020, https://arxiv.org/abs/2002.09797). They mind outliers less. Density has no upper bound, and is 1 for equal distributions.

    Args:
        real: features of data ``(n, d)``.
        made: features of samples ``(m, d)``.
        neighbours: k.
        real_radii: :func:`radii` of the data, where they are known already.

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
    """Distance of each example to its k-th nearest neighbour in the set, ``(n,)`` in float64.

    >>> radii(torch.tensor([[0.0], [1.0], [3.0]]), neighbours=1)
    tensor([1., 1., 2.], dtype=torch.float64)
    """
    features, _ = _checked(features, features, at_least=neighbours + 1)
    rows = torch.split(features, max(1, AT_ONCE // len(features)))
    return torch.cat([torch.cdist(some, features).kthvalue(neighbours + 1).values for some in rows])  # the first is itself


def _root(features: Tensor) -> Tensor:
    """R with RᵀR the covariance: ``(min(n, d), d)``."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    root: Tensor = torch.linalg.qr(centred, mode="r").R
    return root


def _checked(x: Tensor, y: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"two sets of features (n, d) and (m, d) are compared, got {tuple(x.shape)} and {tuple(y.shape)}; take both from"
            " the same extractor"
        )
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"each set needs at least {at_least} examples, got {len(x)} and {len(y)}")
    return x.detach().cpu().double(), y.detach().cpu().double()


SAMPLES_AT_ONCE = 100
"""Whose random numbers are drawn together: fixed, so that no sample depends on how many are asked for."""


class _Reference(NamedTuple):
    """Features of real images, and what of them every comparison needs."""

    features: Tensor
    radii: Tensor
    seed: int

    def against(self, features: Tensor) -> dict[str, Any]:
        return {
            "frechet": frechet_distance(self.features, features),
            "kernel": kernel_distance(self.features, features, seed=self.seed)._asdict(),
            **precision_recall(self.features, features, NEIGHBOURS, self.radii)._asdict(),
        }


@torch.no_grad()
def quality(
    vae: VAE, data: Splits, extractor: Extractor, n: int = 10_000, seed: int = 0, split: SplitName = "test", batch: int = 256
) -> dict[str, Any]:
    """Fréchet and kernel distance, precision and recall of samples; Fréchet distance of reconstructions.

    All are against n images of a split, and all sets are of this size; where the split has fewer, that many. Distances of another n,
    split, extractor or size of images do not compare: these are part of the result.

    Args:
        vae: the model; put into eval mode.
        data: images of one or three channels with values in [0, 1].
        extractor: of features, as :func:`~sigma_vae.evaluation.features.load_extractor` gives it.
        n: how many images of each kind.
        seed: of the choice of images, of latents and of draws.
        split: what samples are compared with.
        batch: how many images are encoded together; no number depends on it.

    Returns:
        ``samples`` from the prior, shown as decoder ``means`` and as ``draws`` from p(x|z), each with ``frechet``, ``kernel`` (KID, with
        its deviation over subsets, their number and size), ``precision``, ``recall``, ``density`` and ``coverage``;
        ``samples_standard_prior``, the same with N(0, I), where the prior is a fitted one; the ``frechet`` distance of
        ``reconstructions``, means as well; the ``floor``: other real images, of the training split, in the place of samples; and how
        all this was made.
        ``rank_deficient`` says that there are no more images than features, where Fréchet distances are strongly biased upwards.

    Raises:
        ValueError: the data are no images, or not in [0, 1], there are too few of them, or the extractor does not fit them.
    """
    _check(data, n)
    vae.eval()
    device = next(vae.parameters()).device
    images = subset(data, split, n, batch, seed, device)
    count = len(images.store)
    reference = extractor.of(_pictures(images))
    compare = _Reference(reference, radii(reference), seed)
    other: SplitName = "test" if split == "train" else "train"
    floor = subset(data, other, count, batch, seed, device)
    report: dict[str, Any] = {
        "examples": count,
        "split": split,
        "seed": seed,
        "data": about(data),
        "extractor": extractor.record(data.shape, reference.shape[1]),
        "prior": type(vae.network.prior).__name__ if isinstance(vae.network, FlatNetwork) else None,
        "neighbours": NEIGHBOURS,
        "rank_deficient": count <= reference.shape[1],
        "floor": {"split": other, "examples": len(floor.store), **compare.against(extractor.of(_pictures(floor)))},
        "samples": _samples(vae, data, extractor, compare),
    }
    if has_fitted_prior(vae):
        with standard_prior(vae):
            report["samples_standard_prior"] = _samples(vae, data, extractor, compare)
    again = extractor.of(_reconstructions(vae, data, images, seed))
    return report | {"reconstructions": {"means": {"frechet": frechet_distance(reference, again)}}}


def _samples(vae: VAE, data: Splits, extractor: Extractor, compare: _Reference) -> dict[str, Any]:
    """Comparisons of decoder means, and of draws."""
    count = len(compare.features)
    pairs = [[extractor(data.scaling.undo(x)) for x in shown] for shown in _shown(vae, count, compare.seed)]
    means, draws = (torch.cat(features)[:count] for features in zip(*pairs, strict=True))
    return {"means": compare.against(means), "draws": compare.against(draws)}


def _shown(vae: VAE, n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and draw of p(x|z) for at least n latents, in chunks of one size with random numbers of their own."""
    device = next(vae.parameters()).device
    for start in range(0, n, SAMPLES_AT_ONCE):
        with seeded(seed, start, device):
            distribution = vae.likelihood(vae.network.generate(SAMPLES_AT_ONCE))
            shown = distribution.mean, distribution.sample()
        yield shown


def _reconstructions(vae: VAE, data: Splits, images: Batches, seed: int) -> Iterator[Tensor]:
    for batch in images:
        yield data.scaling.undo(vae.reconstruct(batch.x, noise=keyed_noise(batch.positions, seed)))


def _pictures(images: Batches) -> Iterator[Tensor]:
    for batch in images:
        yield in_unit_range(images.scaling.undo(batch.x))


def _check(data: Splits, n: int) -> None:
    if data.clips or not drawable(data.shape):
        kind = "clips" if data.clips else "examples"
        raise ValueError(
            f"sample quality looks at images with 1 or 3 channels, got {kind} of {data.name} with shape {data.shape};"
            " of clips, see video quality"
        )
    if n <= NEIGHBOURS:
        raise ValueError(f"n counts the images of each kind and is more than {NEIGHBOURS}, the neighbours looked at; got {n}")
