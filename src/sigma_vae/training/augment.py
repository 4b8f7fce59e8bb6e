"""Random crops and mirror images of training examples."""

import numpy as np
import torch
from torch import Tensor

from sigma_vae.config import TrainingConfig
from sigma_vae.data import Splits
from sigma_vae.types import Batch
from sigma_vae.vae import VAE

__all__ = ["augmented", "check_augmentation"]


def augmented(batch: Batch, config: TrainingConfig, seed: int, step: int) -> Batch:
    """Crop and mirror each example at random, as the config says; without either the batch is returned as it is.

    The choices depend on the seed, the step, and the example's position alone, so that a resumed run, or one on another
    number of processes, makes the same ones.

    >>> x = torch.arange(8.0).reshape(1, 1, 2, 4)
    >>> batch = Batch(x, torch.tensor([5]))
    >>> augmented(batch, TrainingConfig(random_crop=2), seed=0, step=3).x.shape
    torch.Size([1, 1, 2, 2])
    >>> augmented(batch, TrainingConfig(), seed=0, step=3) is batch
    True
    """
    if config.random_crop is None and not config.flip:
        return batch
    examples = [
        _augmented(x, config, np.random.default_rng((seed, step, position)))
        for x, position in zip(batch.x, batch.positions.tolist(), strict=True)
    ]
    return batch._replace(x=torch.stack(examples))


def _augmented(x: Tensor, config: TrainingConfig, random: np.random.Generator) -> Tensor:
    if config.random_crop is not None:
        for axis, size in enumerate(x.shape[1:], start=1):
            x = x.narrow(axis, int(random.integers(size - config.random_crop + 1)), config.random_crop)
    return x.flip(-1) if config.flip and random.random() < 0.5 else x


def check_augmentation(vae: VAE, data: Splits, config: TrainingConfig) -> None:
    """Refuse crops and mirror images that these data or this model cannot have.

    Raises:
        ValueError: the data are no images (for mirror images) or have clips, the crop is larger than they are, or the
            network reads one size alone, or another one, or σ has a value for each place.
    """
    if config.flip and (len(data.shape) != 3 or data.clips):
        raise ValueError(f"flip mirrors images (C, H, W), and {data.name} has examples of shape {data.shape}; leave it out")
    crop = config.random_crop
    if crop is None:
        return
    if data.clips or len(data.shape) == 1 or crop > min(data.shape[1:]):
        raise ValueError(
            f"random_crop={crop} cuts squares from images, or pieces from series, of at least that size; {data.name} has"
            f" {'clips of ' if data.clips else ''}examples of shape {data.shape}; take a smaller one, or leave it out"
        )
    if vae.network.latents.layers != 1 or len(vae.network.latents.shapes[0]) == 1:
        raise ValueError(
            f"random_crop changes the size of examples, and {type(vae.network).__name__} reads one size; take spatial or autoencoder-kl"
        )
    sigma = vae.likelihood.log_sigma()
    if sigma is not None and any(size > 1 for size in sigma.shape[-(len(data.shape) - 1) :]) and sigma.dim() >= len(data.shape):
        raise ValueError(f"random_crop moves places about, and {vae.likelihood} has a σ for each; take another scale")
    with torch.no_grad():
        vae.network.posterior(torch.zeros(1, data.shape[0], *[crop] * (len(data.shape) - 1), device=vae.device))
