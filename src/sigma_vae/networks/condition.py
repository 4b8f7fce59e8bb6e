"""Layers that read the embedding of a condition beside their input."""

from typing import final

import torch
from torch import Tensor, nn

from sigma_vae.conditions import WIDTH, Conditions

__all__ = ["Joined", "Shifted", "width_of"]


def width_of(conditions: Conditions | None) -> int:
    """Size of the conditions' embedding; 0 where there are none."""
    return 0 if conditions is None else WIDTH


@final
class Joined(nn.Module):
    """Concatenate the input, as a vector, with the embedding.

    Shapes:
        x ``(batch, *shape)``, embedding ``(batch, size)``; the module reads ``(batch, values + size)``.

    >>> Joined(nn.Linear(16 + 32, 5))(torch.zeros(2, 1, 4, 4), torch.zeros(2, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Output of the module."""
        joined: Tensor = self.module(torch.cat([x.flatten(1), embedding.to(x.dtype)], 1))
        return joined


@final
class Shifted(nn.Module):
    """Add a linear map of the embedding to the channels between two parts of a network.

    Args:
        first: from the input to ``(batch, channels, *space)``.
        rest: from there on.
        channels: number of channels between them.

    >>> encoder = Shifted(nn.Conv2d(1, 8, 3), nn.Flatten(), channels=8)
    >>> encoder(torch.zeros(2, 1, 4, 4), torch.zeros(2, 32)).shape
    torch.Size([2, 32])
    """

    def __init__(self, first: nn.Module, rest: nn.Module, channels: int) -> None:
        super().__init__()
        self.first = first
        self.shift = nn.Linear(WIDTH, channels, bias=False)
        self.rest = rest

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Output of the last part."""
        features: Tensor = self.first(x)
        shift = self.shift(embedding)
        output: Tensor = self.rest(features + shift.reshape(*shift.shape, *[1] * (features.dim() - 2)))
        return output
