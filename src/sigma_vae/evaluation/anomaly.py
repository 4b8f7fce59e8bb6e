"""Scores of how odd an example is: by its density, its bits, its rate, its reconstruction, or its rank among held-out ones."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sigma_vae.data import Batches
from sigma_vae.evaluation.base import each_example
from sigma_vae.evaluation.bounds import inferences
from sigma_vae.types import Batch, Likelihood
from sigma_vae.vae import VAE

__all__ = [
    "SCORES",
    "Anomalies",
    "Score",
    "anomalies",
    "check_scores",
    "complexity_bits",
    "element_nats",
    "p_values",
]

Score = Literal["density", "bits-minus-complexity", "rate", "reconstruction", "p-value"]
SCORES: tuple[Score, ...] = ("density", "bits-minus-complexity", "rate", "reconstruction", "p-value")
DRAWS = 16


@final
@dataclass(frozen=True, eq=False)
class Anomalies:
    r"""Scores of examples, ``(examples,)``, in float64; all are larger for odder examples.

    Args:
        density: :math:`-\log p(x)` in nats, by importance weights of K posterior draws (Burda et al. 2016); of what the
            likelihood observes: the density of values, or the mass of levels.
        rate: KL of the posterior from the prior, in nats.
        reconstruction: :math:`-E_{q(z|x)} \log p(x|z)` in nats, the mean over K draws: the reconstruction probability of An and
            Cho (2015, "Variational autoencoder based anomaly detection using reconstruction probability").
        bits: bits of the levels, :math:`-\log_2 P(x)`, likewise; None where the data have no levels.
        maps: the reconstruction of each value, of the data's shape, where they are asked for; their sum over an example is its
            ``reconstruction`` where densities are observed.
    """

    density: Tensor
    rate: Tensor
    reconstruction: Tensor
    bits: Tensor | None = None
    maps: Tensor | None = None


@torch.no_grad()
def anomalies(
    vae: VAE, batches: Batches, draws: int = DRAWS, seed: int = 0, *, maps: bool = False, bits: bool = True
) -> Anomalies:
    """Score every example, in the split's order; equal examples have equal scores.

    All examples share the noise of their posteriors' draws, so that no score depends on other examples or on the order.

    Args:
        vae: the model, put into eval mode.
        batches: the examples.
        draws: K.
        seed: of the noise: the same seed gives the same scores.
        maps: also score each value.
        bits: also compute the bits of levels, which cost several times as much as densities.

    Raises:
        ValueError: draws is below 1, the likelihood is an objective, or it has no scores of single values.
    """
    if draws < 1:
        raise ValueError(f"draws counts the latents drawn for each example and is at least 1, got {draws}")
    if not vae.likelihood.normalised:
        raise ValueError(f"{vae.likelihood} is an objective of these data and gives no probabilities; take another likelihood")
    vae.eval()
    likelihood, precision = vae.likelihood, next(vae.parameters()).dtype
    has_bits = bits and likelihood.levels is not None
    both = has_bits and likelihood.observes != "level"

    def rows(batch: Batch) -> Tensor:
        weights, rates, fits, masses, each = [], [], [], [], []
        batch = Batch(batch.x.to(precision), torch.zeros_like(batch.positions), batch.mask)
        for inference in inferences(vae, batch, draws, seed):
            h, target = inference.scored()
            log_prob = inference.per_example(likelihood(h).log_prob(target)).double()
            weights.append((log_prob + inference.log_ratio).reshape(-1, len(batch.x)))
            fits.append(log_prob.reshape(-1, len(batch.x)))
            rates.append(inference.kl.sum(-1).double().reshape(-1, len(batch.x)))
            if both:
                log_mass = inference.per_example(likelihood.log_mass(h, target)).double()
                masses.append((log_mass + inference.log_ratio).reshape(-1, len(batch.x)))
            if maps:
                each.append(element_nats(likelihood, h, target).reshape(-1, *batch.x.shape).double().sum(0))
        columns = [_bound(weights), torch.cat(rates).mean(0), -torch.cat(fits).mean(0)]
        columns += [_bound(masses)] if both else []
        found = torch.stack(columns, 1)
        return torch.cat([found, sum(each[1:], each[0]).flatten(1) / draws], 1) if maps else found

    found = each_example(vae, batches, rows)
    volume, count = batches.log_volume_nats, 3 + both
    density, rate, reconstruction = found[:, 0] + volume, found[:, 1], found[:, 2] + volume
    of_levels = found[:, 3] if both else density if has_bits else None
    shape = batches.store.shape
    return Anomalies(
        density,
        rate,
        reconstruction,
        None if of_levels is None else of_levels / np.log(2),
        found[:, count:].reshape(len(found), *shape) + _volume_map(batches, shape) if maps else None,
    )


def element_nats(likelihood: Likelihood, h: Tensor, x: Tensor) -> Tensor:
    """Negative log-probability of each value, of the data's shape.

    Raises:
        ValueError: the likelihood has no log-probabilities of single values.
    """
    found: Tensor | None = likelihood(h).element_log_prob(x)
    if found is None:
        raise ValueError(f"{likelihood} has no log-probabilities of single values, so there are no maps; leave them out")
    return -found


def _bound(log_weights: Sequence[Tensor]) -> Tensor:
    weights = torch.cat(list(log_weights))
    return math.log(len(weights)) - torch.logsumexp(weights, 0)


def _volume_map(batches: Batches, shape: tuple[int, ...]) -> Tensor:
    """Log std of each value's channel: what makes densities of standardised values those of the data."""
    deviation = batches.scaling.deviation
    if deviation is None:
        return torch.zeros(())
    return torch.tensor(deviation, dtype=torch.float64).log().reshape(-1, *[1] * (len(shape) - 1))


def p_values(scores: Tensor, reference: Tensor) -> Tensor:
    r"""Share of held-out examples that are at least as odd: :math:`(1 + \#\{r \ge s\}) / (1 + n)`.

    An example like the held-out ones has a p-value below α with a probability of at most α (conformal p-values; Vovk et al.
    2005, "Algorithmic Learning in a Random World"; Bates et al. 2023, arXiv 2104.08279). The reference must be no training
    examples, whose scores are too good.

    >>> p_values(torch.tensor([0.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([1.0000, 0.2500])
    """
    ordered = reference.sort().values
    at_least = len(ordered) - torch.searchsorted(ordered, scores)
    return (1 + at_least) / (1 + len(ordered))


def complexity_bits(stored: Tensor) -> Tensor:
    """Bits of each example under a general compressor, deflate at its highest level: ``(examples,)``.

    Subtracted from the bits of a model, they leave what is odd about an example beside its being simple or complex (Serrà et al.
    2020, arXiv 1909.11480).

    Args:
        stored: levels as integers ``(examples, ...)``.
    """
    values = stored.cpu().numpy()
    values = values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)
    return torch.tensor([8.0 * _deflated(example) for example in values], dtype=torch.float64)


def _deflated(example: npt.NDArray[np.generic]) -> int:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return len(packer.compress(np.ascontiguousarray(example).tobytes()) + packer.flush())


def check_scores(scores: Sequence[str]) -> tuple[Score, ...]:
    """The scores that are named; ``all`` names every one.

    Raises:
        ValueError: one does not exist.
    """
    if unknown := [score for score in scores if score not in (*SCORES, "all")]:
        raise ValueError(f"scores are {', '.join(SCORES)}, or all; got {unknown[0]!r}")
    return SCORES if "all" in scores else tuple(score for score in SCORES if score in scores)
