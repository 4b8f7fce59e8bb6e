"""Deprecated name of :mod:`sigma_vae.models`."""

import warnings
from typing import Any

from sigma_vae import models

MOVED = ("Saved", "check_network", "data", "likelihood", "load", "network", "prior", "prior_name", "save", "sized", "vae")


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"sigma_vae.build.{name} is now sigma_vae.models.{name}", DeprecationWarning, stacklevel=2)
    return getattr(models, name)
