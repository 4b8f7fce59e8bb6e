"""Verdicts on claims, the paper's and ours: each has a rule, laid down here before the numbers are there, and printed beside them."""

from sigma_vae.study.claims import discrete, information, scales, training, tuning
from sigma_vae.study.claims.claim import OPTIMAL, Claim
from sigma_vae.study.claims.training import diverges

__all__ = ["CLAIMS", "OPTIMAL", "Claim", "diverges"]

CLAIMS = tuple(
    sorted(
        (*tuning.CLAIMS, *tuning.OTHERS, *scales.CLAIMS, *discrete.CLAIMS, *information.CLAIMS, *training.CLAIMS),
        key=lambda claim: int(claim.name.partition(",")[0]),
    )
)
"""In the order in which they are reported."""
