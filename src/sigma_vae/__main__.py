"""``python -m sigma_vae`` and ``sigma-vae``: the command line."""

import sys

from sigma_vae.cli import main as run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(run())
