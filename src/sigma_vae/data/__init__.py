"""Data with true splits: data sets by name, files by path, and objects from Python."""

import warnings
from typing import Any

from sigma_vae.data.batches import Batches, Scaling
from sigma_vae.data.load import load, names
from sigma_vae.data.objects import as_batches, as_splits
from sigma_vae.data.splits import Splits

__all__ = ["Batches", "Scaling", "Splits", "as_batches", "as_splits", "load", "names"]


def __getattr__(name: str) -> Any:
    if name == "NAMES":
        warnings.warn("sigma_vae.data.NAMES is deprecated; call sigma_vae.data.names()", DeprecationWarning, stacklevel=2)
        return names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
