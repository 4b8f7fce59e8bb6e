"""A network of your own, by its name: it works on the command line, in studies and in saved models.

python -m examples.own_network

In a package, an entry point makes the name known wherever the package is installed (pyproject.toml)::

    [project.entry-points."sigma_vae.networks"]
    small-conv = "my_package.networks:small_conv"
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sigma_vae import FlatNetwork, models
from sigma_vae.config import ModelConfig, TrainingConfig
from sigma_vae.registry import register
from sigma_vae.training import fit


@register.network("small-conv", latents="flat", reads_clips=False, has_prior=True)
def small_conv(shape: Sequence[int], out_channels: int, latent_dim: int = 8, width: int = 8) -> FlatNetwork:
    """Two convolutions and their mirror image, for small pictures."""
    channels, height, rows = shape
    small = (2 * width, height // 4, rows // 4)
    flat = 2 * width * (height // 4) * (rows // 4)
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(flat, 2 * latent_dim)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_dim, flat), nn.ReLU(), nn.Unflatten(1, small)),
        *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, out_channels, 4, 2, 1)),
    )
    return FlatNetwork(encoder, decoder, latent_dim)


def main(out: Path = Path("own-network"), steps: int = 500) -> torch.Tensor:
    """Train by the name, open the model from disk, and return samples."""
    data = models.data("digits")
    vae = models.vae(ModelConfig("small-conv", "gaussian/optimal", latent_dim=8), data.shape, data.scaling)
    fit(vae, data, TrainingConfig(max_steps=steps), out=out, progress=False)
    again = models.load(out).vae
    print(f"opened {out}: {type(again.network).__name__} with σ {float(again.likelihood.sigma()):.4f}")
    return again.sample(16)


if __name__ == "__main__":
    main()
