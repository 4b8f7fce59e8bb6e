"""What a model makes of noise and of data, to look at: of clips together with the frames that they go on from."""

import torch
from torch import Tensor

from sigma_vae.data import Splits
from sigma_vae.networks import SequenceNetwork
from sigma_vae.networks.temperature import per_layer
from sigma_vae.types import Batch, Temperature
from sigma_vae.vae import VAE, Show, keyed_noise

__all__ = ["reconstructed", "sampled"]


@torch.no_grad()
def sampled(
    vae: VAE, data: Splits | None, n: int, generator: torch.Generator, show: Show = "mean", temperature: Temperature = 1.0
) -> Tensor:
    """N samples; of a video the first frames of its test clips, and what is predicted to follow, to the length of these clips.

    Args:
        vae: the model, in eval mode.
        data: only needed by a video's model; if it has fewer than n test clips, they come again.
        n: how many.
        generator: of the latents.
        show: the mean of p(x|z), or a draw from it.
        temperature: scales the spread of the latents: one number, or one for each layer.

    Raises:
        ValueError: the test clips are no longer than the frames that are given, or the temperature has too many numbers.
    """
    if not isinstance(vae.network, SequenceNetwork):
        return vae.sample(n, show, generator=generator, temperature=temperature)
    assert data is not None
    past, (single,) = vae.network.context_frames, per_layer(temperature, 1)
    clips = next(iter(data.batches("test", min(n, len(data.test)), device=generator.device))).x
    given = clips[torch.arange(n) % len(clips), :past]
    predicted = vae.predict(given, clips.shape[1] - past, 1, show, generator=generator, temperature=single)[0]
    return torch.cat([given, predicted], 1)


@torch.no_grad()
def reconstructed(vae: VAE, batch: Batch, show: Show = "mean", seed: int = 0) -> Tensor:
    """Reconstructions of the shape of the batch; the first frames of clips, which are given, as they are."""
    again = vae.reconstruct(batch.x, show, noise=keyed_noise(batch.positions, seed))
    if not isinstance(vae.network, SequenceNetwork):
        return again
    return torch.cat([batch.x[:, : vae.network.context_frames], again], 1)
