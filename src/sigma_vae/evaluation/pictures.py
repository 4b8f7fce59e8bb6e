"""Grids of images as PNG."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["drawable", "pairs", "save_grid"]

WIDTH = 500


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether examples ``(C, H, W)`` can be shown: grey or red, green and blue."""
    return len(shape) == 3 and shape[0] in (1, 3)


def pairs(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Rows of originals, each with the row of its reconstructions below: for :func:`save_grid` with as many columns."""
    rows = zip(torch.split(originals, columns), torch.split(reconstructions, columns), strict=True)
    return torch.cat([image for row in rows for image in row])


def save_grid(path: Path, images: Tensor, columns: int | None = None, zoom: int | None = None) -> None:
    """Write images ``(n, C, H, W)`` with values in [0, 1] as one picture, read by rows; values outside are clipped.

    Each pixel becomes zoom × zoom; so many that the picture is about 500 wide, unless given.

    Raises:
        ValueError: the channels are neither 1 nor 3.
    """
    from PIL import Image

    if images.dim() != 4 or not drawable(tuple(images.shape[1:])):
        raise ValueError(
            f"a picture shows images (n, C, H, W) with 1 or 3 channels, got {tuple(images.shape)}; write .npz instead"
        )
    n, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = 1
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    values = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(values):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    zoom = zoom or max(1, round(WIDTH / picture.width))
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
