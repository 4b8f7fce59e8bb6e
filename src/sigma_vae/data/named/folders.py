"""Where the files of a data set are looked for."""

import os
from pathlib import Path

__all__ = ["VARIABLE", "folders"]

VARIABLE = "SIGMA_VAE_DATA"


def folders(name: str, root: str | None) -> list[Path]:
    """``root`` alone if that is given; else the folder of that name in the one that SIGMA_VAE_DATA names, and that one itself."""
    if root:
        return [Path(root).expanduser()]
    named = os.environ.get(VARIABLE)
    return [Path(named).expanduser() / name, Path(named).expanduser()] if named else []
