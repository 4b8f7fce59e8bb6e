"""Training with pytorch-lightning."""

from sigma_vae.training.fit import check_device, fit
from sigma_vae.training.module import NonFiniteLossError

__all__ = ["NonFiniteLossError", "check_device", "fit"]
