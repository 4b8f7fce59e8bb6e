"""How far from the prior's mean each layer of latents is drawn."""

import math
from collections.abc import Sequence

from sigma_vae.types import Temperature

__all__ = ["per_layer"]


def per_layer(temperature: Temperature, layers: int) -> list[float]:
    """One temperature for each layer, from one for all or from as many as there are.

    Raises:
        ValueError: one is below 0 or not finite, or their number is wrong.

    >>> per_layer(0.5, layers=2), per_layer([1.0, 0.0], layers=2)
    ([0.5, 0.5], [1.0, 0.0])
    """
    values = list(temperature) if isinstance(temperature, Sequence) else [temperature] * layers
    if len(values) != layers:
        raise ValueError(f"temperature is one number, or one for each of {layers} layers of latents; got {len(values)} of them")
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature scales the spread of latents and is at least 0, got {value}")
    return values
