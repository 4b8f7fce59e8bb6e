"""Translate a hand-tuned loss into a likelihood: its effective β, and the σ that it implies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Reduction = Literal["sum", "batch-mean", "mean"]
"""``sum``: over everything; ``batch-mean``: a sum for each example, averaged over them; ``mean``: over everything."""

Loss = Literal["squared", "absolute", "bce"]
"""Reconstruction error of a value: squared, absolute (L1), or binary cross-entropy."""

Convention = Literal["compvis", "diffusers"]
"""A code base whose loss is well known."""


class _Convention(NamedTuple):
    loss: Loss
    reduction: Reduction
    value_range: float
    perceptual_weight: float


CONVENTIONS: dict[Convention, _Convention] = {
    "compvis": _Convention("absolute", "batch-mean", 2.0, 1.0),
    "diffusers": _Convention("squared", "mean", 2.0, 0.0),
}
"""The autoencoder losses of CompVis' latent-diffusion (``LPIPSWithDiscriminator`` with ``logvar`` 0: absolute error and LPIPS,
summed over pixels and divided by the batch) and of diffusers' ``train_autoencoderkl.py`` (mean squared error; its LPIPS has no
gradient). The KL of both is summed over each example, and the discriminator is left out."""

NEGLIGIBLE = 1e-3
"""Scale, as a share of the data's range, below which a KL weight has no say: a quarter of an 8-bit level."""


@dataclass(frozen=True)
class Explanation:
    """An objective as error + β·KL, each term summed for an example and averaged over examples."""

    effective_beta: float
    """Weight of the KL against the summed error."""
    implied_sigma: float
    """Scale of the decoder whose negative ELBO this objective is, up to a factor and a constant: σ of a Gaussian for the
    squared error, b of a Laplace distribution for the absolute one, σ at mid-grey for the cross-entropy."""
    dims: int
    """Values in one example."""
    advice: str
    """Advice in words."""
    loss: Loss = "squared"
    """Error of a value."""


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
    loss: Loss = "squared",
    perceptual_weight: float = 0.0,
) -> Explanation:
    r"""Translate ``reduction(error) + beta · kl_reduction(KL)``.

    With a factor a on the summed error and b on the KL, the objective is a multiple of error + (b/a)·KL, which is the
    negative ELBO, up to a factor and a constant, of a Gaussian decoder with :math:`\sigma^2 = \beta/2` for the squared
    error, and of a Laplace decoder with scale :math:`\beta` for the absolute one, as :math:`-\log p = |x - \hat x| / b +
    \log 2b`. The cross-entropy is a likelihood of binary data where β is 1. Near its minimum it is
    :math:`(x - \hat x)^2 / (2 x (1 - x))`, so that on grey data β acts as :math:`\sigma^2 = \beta x (1 - x)`.

    Args:
        shape: of one example, as ``(3, 64, 64)``.
        beta: the weight on the KL as it stands in the code.
        reduction: of the error.
        kl_reduction: of the KL.
        half: the error carries a factor ½.
        batch_size: needed where exactly one of the two is summed over the batch.
        latent_dim: needed where the KL is a mean over latents.
        value_range: distance of the largest from the smallest value of the data (1 for [0, 1], 2 for [−1, 1]).
        loss: error of a value.
        perceptual_weight: weight of a perceptual distance (LPIPS) that is added to the error of every value.

    Raises:
        ValueError: a number is missing or out of range.

    >>> explain((3, 64, 64), beta=0.00025).effective_beta
    3.072
    >>> round(explain((3, 64, 64), beta=0.00025).implied_sigma, 3)
    1.239
    >>> explain((3, 256, 256), beta=1e-6, reduction="batch-mean", value_range=2, loss="absolute").implied_sigma
    1e-06
    """
    dims = math.prod(shape)
    sizes = [*shape, *(size for size in (batch_size, latent_dim) if size is not None)]
    if not shape or min(sizes) < 1 or not 0 < beta < math.inf or not value_range > 0:
        raise ValueError(
            f"expected sizes of at least 1, beta > 0 and a range > 0, got shape {tuple(shape)}, batch size {batch_size},"
            f" latent dimension {latent_dim}, beta {beta}, range {value_range}"
        )
    if not 0 <= perceptual_weight < math.inf or (perceptual_weight and loss == "bce"):
        raise ValueError(
            f"a perceptual weight is at least 0 and goes with squared or absolute errors, got {perceptual_weight} with {loss}"
        )
    if loss == "bce" and value_range != 1:
        raise ValueError(f"a cross-entropy is of values in [0, 1], whose range is 1, got {value_range}")
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
    scale = {"squared": math.sqrt(effective / 2), "absolute": effective, "bce": 0.5 * math.sqrt(effective)}[loss]
    words = _advice(effective, scale, scale / value_range, loss, perceptual_weight)
    return Explanation(effective, scale, dims, words, loss)


_TERM = {"squared": "‖x − x̂‖²", "absolute": "‖x − x̂‖₁", "bce": "BCE(x, x̂)"}
_ASSUMED = {
    "squared": "a decoder noise std of σ = {:.4g} per value",
    "absolute": "a Laplace decoder of scale b = {:.4g} per value (its mean absolute error)",
    "bce": "a noise std of σ = {:.4g} at mid-grey, less near black and white",
}


def _advice(beta: float, scale: float, relative: float, loss: Loss, perceptual_weight: float) -> str:
    perceptual = f" + {perceptual_weight:g}·LPIPS for each value" if perceptual_weight else ""
    meaning = (
        f"The objective is {_TERM[loss]}{perceptual} + {beta:.4g}·KL, which assumes {_ASSUMED[loss].format(scale)},"
        f" {100 * relative:.3g} % of the data's range."
    )
    if perceptual_weight:
        meaning += " The scale is that of both terms together, so the pixels alone have a smaller one."
    if loss == "bce":
        exact = "On binary data it is the ELBO." if beta == 1 else "With a weight of 1 it would be the ELBO of binary data."
        return (
            f"{meaning} {exact} On grey data cross-entropy is no likelihood: take gaussian/optimal, or categorical for levels."
        )
    if relative > 0.2:
        verdict = (
            "The errors of trained networks on images are far smaller (3 to 15 %), so the KL outweighs detail:"
            " reconstructions blur, and latents collapse."
        )
    elif relative < NEGLIGIBLE:
        verdict = (
            f"No network's errors are that small: one nat of KL is spent to lower an error by {100 * relative:.2g} % of the range in a"
            " single value. So the weight hardly limits the rate, and latents take any spread that helps the decoder: that is why a scaling"
            " factor has to be measured, and why samples from N(0, I) are no pictures."
        )
    elif relative < 0.02:
        verdict = "Most networks have larger errors, so detail costs a high rate, and samples from the prior get worse."
    else:
        verdict = "Trained networks have errors in this range on images, but only the data give the right value."
    optimal, scale_name = ("laplace/optimal", "b") if loss == "absolute" else ("gaussian/optimal", "σ")
    return f"{meaning} {verdict} With {optimal}, {scale_name} is solved from the data, and there is no weight to choose."
