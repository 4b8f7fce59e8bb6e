"""The paper's released convolutional network for SVHN, for images of any size."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from sigma_vae.conditions import Conditions
from sigma_vae.networks.flat import FlatNetwork, Joined, Shifted, width_of
from sigma_vae.registry import register

__all__ = ["conv"]

SMALLEST = 4


@register.network("conv", latents="flat", reads_clips=False, has_prior=True)
def conv(
    shape: Sequence[int],
    out_channels: int,
    latent_dim: int = 20,
    width: int = 32,
    conditions: Conditions | None = None,
) -> FlatNetwork:
    """The paper's released network for SVHN: three convolutions down to a quarter of the size, and three back.

    With 28×28×1 data, 20 latents and width 32 it has the reference's 990 249 parameters. Where 4 does not divide a
    size, the decoder's output is cropped from the next multiple.

    Args:
        shape: of one example, ``(C, H, W)``.
        out_channels: ``likelihood.in_channels``.
        latent_dim: size of z.
        width: channels of the first layer.
        conditions: labels and covariates to be given; their embedding is added to the channels of the first layer, and
            joined to the latents.

    Raises:
        ValueError: the data are not images, or smaller than 4×4.

    >>> sum(p.numel() for p in conv((1, 28, 28), out_channels=1).parameters())
    990249
    """
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"the conv network reads images (C, H, W) of at least {SMALLEST}×{SMALLEST}, got an example of shape {tuple(shape)};"
            " use the mlp network for tables, series and tiny images"
        )
    channels, rows, columns = shape
    small = (4 * width, -(-rows // 4), -(-columns // 4))
    flat = small[0] * small[1] * small[2]
    odd = (0, columns % 2, 0, rows % 2)
    encoder = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.ZeroPad2d(odd) if any(odd) else nn.Identity(),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 2 * latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim + width_of(conditions), flat),
        nn.Unflatten(1, small),
        nn.ConvTranspose2d(4 * width, 2 * width, 6, stride=2, padding=2),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 6, stride=2, padding=2),
        nn.ReLU(),
        nn.ConvTranspose2d(width, out_channels, 5, padding=2),
        _Crop(rows, columns),
    )
    if conditions is None:
        return FlatNetwork(encoder, decoder, latent_dim)
    return FlatNetwork(Shifted(encoder[0], encoder[1:], width), Joined(decoder), latent_dim, conditions=conditions)


@final
class _Crop(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns

    def forward(self, image: Tensor) -> Tensor:
        return image[..., : self.rows, : self.columns]
