"""Training with pytorch-lightning."""

from sigma_vae.training.fit import fit, resolve_device
from sigma_vae.training.module import NonFiniteLossError

__all__ = ["NonFiniteLossError", "fit", "resolve_device"]
