"""Networks: encoder, latents and decoder."""

from sigma_vae.networks.conv import conv
from sigma_vae.networks.flat import FlatNetwork
from sigma_vae.networks.hierarchical import HierarchicalNetwork, LadderPlan, hierarchical
from sigma_vae.networks.mlp import mlp
from sigma_vae.networks.residual import residual
from sigma_vae.networks.sequence import SequenceNetwork, sequence

__all__ = [
    "FlatNetwork",
    "HierarchicalNetwork",
    "LadderPlan",
    "SequenceNetwork",
    "conv",
    "hierarchical",
    "mlp",
    "residual",
    "sequence",
]
