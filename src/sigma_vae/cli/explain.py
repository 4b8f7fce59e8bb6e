"""The subcommand that translates a hand-tuned loss."""

import json as json_module
from dataclasses import asdict

from sigma_vae.likelihoods.explain import Reduction
from sigma_vae.likelihoods.explain import explain as explain_loss

__all__ = ["explain"]


def explain(
    *,
    shape: str,
    beta: float = 1.0,
    reduction: Reduction = "mean",
    kl_reduction: Reduction = "batch-mean",
    half: bool = False,
    batch_size: int | None = None,
    latent_dim: int | None = None,
    value_range: float = 1.0,
    json: bool = False,
) -> None:
    """Say what a hand-tuned loss, reduction(squared error) + beta · kl_reduction(KL), means: its effective β, and the σ it implies.

    Args:
        shape: Of one example: 3,64,64.
        beta: Weight on the KL, as it stands in the code.
        reduction: Of the squared error: sum over all, batch-mean (a sum for each example, averaged), or mean over everything.
        kl_reduction: Of the KL, likewise.
        half: The squared error carries a factor ½.
        batch_size: Needed where exactly one of the terms is summed over the batch.
        latent_dim: Needed where the KL is a mean over latents.
        value_range: Largest less smallest value of the data: 1 for [0, 1], 2 for [-1, 1].
        json: Print JSON alone.
    """
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape takes sizes with commas between, as 3,64,64; got {shape!r}") from None
    result = explain_loss(
        sizes,
        beta,
        reduction,
        kl_reduction,
        half=half,
        batch_size=batch_size,
        latent_dim=latent_dim,
        value_range=value_range,
    )
    if json:
        print(json_module.dumps(asdict(result), ensure_ascii=False))
        return
    print(f"effective β   {result.effective_beta:.6g}   (of ‖x − x̂‖² + β·KL, summed over {result.dims} values)")
    print(f"implied σ     {result.implied_sigma:.6g}")
    print(result.advice)
