"""How good samples and reconstructions look to a network: distances between their features and those of real images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigma_vae.data import Batches, Splits
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.features import Extractor
from sigma_vae.evaluation.frechet import NEIGHBOURS, frechet_distance, kernel_distance, precision_recall, radii
from sigma_vae.evaluation.pictures import drawable, in_unit_range
from sigma_vae.evaluation.repeatable import about, seeded, subset
from sigma_vae.evaluation.standard_prior import has_fitted_prior, standard_prior
from sigma_vae.networks import FlatNetwork
from sigma_vae.vae import VAE, keyed_noise

__all__ = ["quality"]

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
