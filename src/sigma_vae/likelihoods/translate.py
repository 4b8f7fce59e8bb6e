"""Translate a hand-tuned loss into a likelihood: its effective β, and the σ that it implies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Explanation", "Reduction", "explain"]

Reduction = Literal["sum", "batch-mean", "mean"]
"""``sum``: over everything; ``batch-mean``: a sum for each example, averaged over them; ``mean``: over everything."""


@dataclass(frozen=True)
class Explanation:
    """An objective as ‖x − x̂‖² + β·KL, each term summed for an example and averaged over examples."""

    effective_beta: float
    """Weight of the KL against the summed squared error."""
    implied_sigma: float
    """Std of the Gaussian decoder whose negative ELBO this objective is, up to a factor and a constant."""
    dims: int
    """Values in one example."""
    advice: str
    """Advice in words."""


def explain(
    shape: Sequence[int],
    beta: float = 1.0,
    reduction: Reduction = "mean",
    kl_reduction: Reduction = "batch-mean",
    *,
    half: bool = False,
    batch_size: int | None = None,
    latent_dim: int | None = None,
    value_range: float = 1.0,
) -> Explanation:
    r"""Translate ``reduction(squared error) + beta · kl_reduction(KL)``.

    With a factor a on the summed error and b on the KL, the objective is a multiple of :math:`\|x - \hat x\|^2 + (b/a)
    KL`, which is the negative ELBO of a Gaussian decoder with :math:`\sigma^2 = \beta/2`, up to a factor and a
    constant.

    Args:
        shape: of one example, as ``(3, 64, 64)``.
        beta: the weight on the KL as it stands in the code.
        reduction: of the squared error.
        kl_reduction: of the KL.
        half: the error carries a factor ½.
        batch_size: needed where exactly one of the two is summed over the batch.
        latent_dim: needed where the KL is a mean over latents.
        value_range: distance of the largest from the smallest value of the data (1 for [0, 1], 2 for [−1, 1]).

    Raises:
        ValueError: a number is missing or out of range.

    >>> explain((3, 64, 64), beta=0.00025).effective_beta
    3.072
    >>> round(explain((3, 64, 64), beta=0.00025).implied_sigma, 3)
    1.239
    """
    dims = math.prod(shape)
    sizes = [*shape, *(size for size in (batch_size, latent_dim) if size is not None)]
    if not shape or min(sizes) < 1 or not 0 < beta < math.inf or not value_range > 0:
        raise ValueError(
            f"expected sizes of at least 1, beta > 0 and a range > 0, got shape {tuple(shape)}, batch size {batch_size},"
            f" latent dimension {latent_dim}, beta {beta}, range {value_range}"
        )
    if (reduction == "sum") != (kl_reduction == "sum") and batch_size is None:
        raise ValueError(
            "one term is summed over the batch and the other is not, so the weight depends on it: pass the batch size (batch_size=,"
            " --batch-size)"
        )
    if kl_reduction == "mean" and latent_dim is None:
        raise ValueError(
            "a KL that is a mean over latents weighs less the more there are: pass the latent dimension (latent_dim=, --latent-dim)"
        )
    batch = batch_size or 1
    error_factor = {"sum": batch, "batch-mean": 1.0, "mean": 1 / dims}[reduction] * (0.5 if half else 1.0)
    kl_factor = {"sum": batch, "batch-mean": 1.0, "mean": 1 / (latent_dim or 1)}[kl_reduction]
    effective = beta * kl_factor / error_factor
    sigma = math.sqrt(effective / 2)
    return Explanation(effective, sigma, dims, _advice(effective, sigma, sigma / value_range))


def _advice(beta: float, sigma: float, relative: float) -> str:
    meaning = (
        f"The objective is ‖x − x̂‖² + {beta:.4g}·KL, which assumes a decoder noise std of σ = {sigma:.4g} per value,"
        f" {100 * relative:.3g} % of the data's range."
    )
    if relative > 0.2:
        verdict = (
            "The errors of trained networks on images are far smaller (3 to 15 %), so the KL outweighs detail:"
            " reconstructions blur, and latents collapse."
        )
    elif relative < 0.02:
        verdict = "Most networks have larger errors, so detail costs a high rate, and samples from the prior get worse."
    else:
        verdict = "Trained networks have errors in this range on images, but only the data give the right value."
    return f"{meaning} {verdict} With gaussian/optimal, σ is solved from the data, and there is no weight to choose."
