"""Networks: encoder, latents and decoder."""

from sigma_vae.networks.conv import conv
from sigma_vae.networks.flat import FlatNetwork
from sigma_vae.networks.mlp import mlp
from sigma_vae.networks.residual import residual

__all__ = ["FlatNetwork", "conv", "mlp", "residual"]
