"""Videos: learn clips of a moving square, and continue new ones.

python -m examples.video
"""

import numpy as np
import torch

from sigma_vae import models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.data.arrays import arranged
from sigma_vae.data.objects import as_splits
from sigma_vae.training import fit


def clips(n: int, frames: int = 8, side: int = 16) -> np.ndarray:
    """Squares that move at one speed each, ``(n, frames, 1, side, side)`` in uint8."""
    rng = np.random.default_rng(0)
    place, speed = rng.integers(0, side, (n, 2)), rng.integers(-2, 3, (n, 2))
    at = (place[:, None] + speed[:, None] * np.arange(frames)[:, None]) % side
    grid = np.arange(side)
    rows, columns = ((grid - at[..., axis, None]) % side < 4 for axis in (0, 1))
    return (255 * (rows[..., :, None] & columns[..., None, :])).astype(np.uint8)[:, :, None]


def main(steps: int = 300, width: int = 16) -> torch.Tensor:
    """Train on clips, and return three continuations of each of four clips."""
    ordered, _ = arranged({"train": clips(400)}, "n-t-c-h-w", "squares")
    data = as_splits(ordered["train"])
    config = ModelConfig("sequence", "gaussian/optimal", latent_dim=4, width=width, context_frames=2)
    vae = models.vae(config, data.shape, data.scaling, clips=True)
    fit(vae, data, TrainingConfig(max_steps=steps, batch_size=16), progress=False)
    given = next(iter(data.batches("test", 4))).x[:, :2]
    with torch.no_grad():
        predicted = vae.predict(given, frames=6, samples=3)
    print(f"predicted frames: {tuple(predicted.shape)} (samples, clips, frames, channels, height, width)")
    return predicted


if __name__ == "__main__":
    main()
