"""The network that suits data of a shape."""

from collections.abc import Sequence

from sigma_vae.networks.residual import SMALLEST

__all__ = ["default_network"]


def default_network(shape: Sequence[int], *, clips: bool = False) -> str:
    """The name of the network that ``auto`` means for examples, or frames of clips, of this shape.

    >>> default_network((3, 32, 32)), default_network((12,)), default_network((1, 64, 64), clips=True)
    ('residual', 'mlp', 'sequence')
    """
    if clips:
        return "sequence"
    return "residual" if len(shape) in (2, 3) and min(shape[1:]) >= SMALLEST else "mlp"
