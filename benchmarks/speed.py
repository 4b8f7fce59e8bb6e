"""Speed on Fashion-MNIST: images a second beside other trainers, and seconds to a test ELBO.

python -m benchmarks.speed --part plain      # 40 minutes on a core: what the usual loop reaches in 10 epochs
"""

from pathlib import Path
from typing import Literal

import tyro

from benchmarks.plain import plain
from sigma_vae import build
from sigma_vae.config import DataConfig

RESULTS = Path("benchmarks/results")


def main(part: Literal["plain"], out: Path = RESULTS, epochs: int = 10, seed: int = 0, data: str = "fashion-mnist") -> None:
    """Measure one part, and write it as ``OUT/speed-PART.json``."""
    splits = build.data(DataConfig(data))
    plain(out / "speed-plain.json", splits, epochs, seed)


if __name__ == "__main__":
    tyro.cli(main)
