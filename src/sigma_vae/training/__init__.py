"""Training with pytorch-lightning."""

from sigma_vae.training.fit import fit, resolve_device
from sigma_vae.training.module import NonFiniteLossError
from sigma_vae.training.resuming import Terminated

__all__ = ["NonFiniteLossError", "Terminated", "fit", "resolve_device"]
