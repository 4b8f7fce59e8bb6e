"""Grids of images as PNG, clips as PNG or GIF."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["drawable", "in_unit_range", "pairs", "save_clips", "save_grid"]

WIDTH = 500
MILLISECONDS = 250
"""For which a GIF shows each frame."""
ROUNDING = 1e-6


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether examples ``(C, H, W)`` can be shown: grey or red, green and blue."""
    return len(shape) == 3 and shape[0] in (1, 3)


def in_unit_range(x: Tensor) -> Tensor:
    """The same values, seen to be in [0, 1] but for rounding.

    Raises:
        ValueError: they are not.

    >>> in_unit_range(torch.tensor([0.0, 255.0]))
    Traceback (most recent call last):
    ...
    ValueError: images are looked at with values in [0, 1], got values from 0 to 255; rescale the data
    """
    low, high = float(x.min()), float(x.max())
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):
        raise ValueError(
            f"images are looked at with values in [0, 1], got values from {low:.3g} to {high:.3g}; rescale the data"
        )
    return x


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
    _grid(images, columns, zoom).save(path)


def save_clips(path: Path, clips: Tensor, columns: int | None = None) -> None:
    """Write clips ``(n, T, C, H, W)``: as a .png with a clip a row, or as a .gif, a grid of so many columns that moves.

    Raises:
        ValueError: the channels are neither 1 nor 3.
    """
    if path.suffix != ".gif":
        save_grid(path, clips.flatten(0, 1), columns=clips.shape[1])
        return
    first, *rest = [_grid(frame, columns, None) for frame in clips.unbind(1)]
    first.save(path, save_all=True, append_images=rest, duration=MILLISECONDS, loop=0)


def _grid(images: Tensor, columns: int | None, zoom: int | None) -> "Image":
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
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
