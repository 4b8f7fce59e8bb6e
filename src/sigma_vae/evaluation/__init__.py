"""What a trained model is worth, in numbers and pictures."""

from sigma_vae.evaluation.suite import evaluate, score

__all__ = ["evaluate", "score"]
