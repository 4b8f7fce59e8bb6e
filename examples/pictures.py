"""A folder of pictures, from Python: what `sigma-vae train FOLDER` does.

python -m examples.pictures FOLDER
"""

import sys
from pathlib import Path

from sigma_vae import runs
from sigma_vae.config import DataConfig, ImageConfig, ModelConfig, RunConfig, TrainingConfig


def main(folder: Path, out: Path = Path("runs/pictures"), size: int = 32, steps: int | None = None) -> Path:
    """Cut the largest square of each picture, resize it, train, and return the page of the run."""
    data = DataConfig(str(folder), images=ImageConfig(size=size, fit="crop"))
    config = RunConfig(data, ModelConfig(likelihood="auto"), TrainingConfig(max_steps=steps))
    report = runs.train(config, out, progress=False)
    print(f"{report.bits_per_dim.mean:.3f} bits per value; look at {out / 'report.html'}")
    return out / "report.html"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
