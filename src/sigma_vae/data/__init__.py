"""Data with true splits: bundled and official data sets by name, and the user's own arrays by path."""

from sigma_vae.data.batches import Batches
from sigma_vae.data.scaling import Scaling
from sigma_vae.data.sources import NAMES, load
from sigma_vae.data.splits import Splits

__all__ = ["NAMES", "Batches", "Scaling", "Splits", "load"]
