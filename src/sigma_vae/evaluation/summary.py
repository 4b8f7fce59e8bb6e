"""Means with their standard errors: how all parts of an evaluation write a number."""

import math

from torch import Tensor

__all__ = ["mean_and_error"]


def mean_and_error(values: Tensor) -> dict[str, float | None]:
    """Mean over examples ``(examples,)`` and its standard error, None of a single example.

    >>> import torch
    >>> mean_and_error(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    {'mean': 1.0, 'standard_error': 1.0}
    """
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}
