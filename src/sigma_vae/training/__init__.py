"""Training: one loop with exact resumption, several processes (on Lightning Fabric), callbacks and loggers."""

from sigma_vae.registry import needed_by

with needed_by("sigma_vae.training"):
    from sigma_vae.training.callbacks import Callback, Context, make_loggers
    from sigma_vae.training.loop import FitResult, Terminated, fit, held_out_examples, resolve_device
    from sigma_vae.training.objective import NonFiniteLossError

__all__ = [
    "Callback",
    "Context",
    "FitResult",
    "NonFiniteLossError",
    "Terminated",
    "fit",
    "held_out_examples",
    "make_loggers",
    "resolve_device",
]
