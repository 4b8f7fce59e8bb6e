"""Networks: encoder, latents and decoder."""

import warnings

from sigma_vae.networks.flat import FlatNetwork, conv, mlp, residual
from sigma_vae.networks.hierarchical import HierarchicalNetwork, HierarchyPlan, hierarchical
from sigma_vae.networks.sequence import SequenceNetwork, sequence
from sigma_vae.networks.spatial import SpatialNetwork, spatial

__all__ = [
    "FlatNetwork",
    "HierarchicalNetwork",
    "HierarchyPlan",
    "SequenceNetwork",
    "SpatialNetwork",
    "conv",
    "hierarchical",
    "mlp",
    "residual",
    "sequence",
    "spatial",
]


def __getattr__(name: str) -> type[HierarchyPlan]:
    if name == "LadderPlan":
        warnings.warn("LadderPlan is now HierarchyPlan", DeprecationWarning, stacklevel=2)
        return HierarchyPlan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
