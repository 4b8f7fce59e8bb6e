"""Axes of an array, brought into order; and which of several arrays is which split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sigma_vae.config import Layout
from sigma_vae.data.levels import Array
from sigma_vae.data.splits import SPLIT_WORDS, SplitName

__all__ = ["CLIPS", "channels_first", "layout_of", "parts_by_key"]

_AXES = {
    "n-h-w": 3,
    "n-h-w-c": 4,
    "n-c-h-w": 4,
    "n-c-t": 3,
    "n-t": 2,
    "n-c": 2,
    "n-t-h-w": 4,
    "n-t-h-w-c": 5,
    "n-t-c-h-w": 5,
}
_ONE_CHANNEL = {"n-h-w": 1, "n-t": 1, "n-t-h-w": 2}
CLIPS = frozenset(("n-t-h-w", "n-t-h-w-c", "n-t-c-h-w"))
"""Layouts of clips: their examples are ``(T, C, H, W)``."""
_CHANNEL_COUNTS = (1, 3, 4)
_Content = TypeVar("_Content", bound=Any)


def channels_first(array: Array, layout: Layout, name: str) -> Array:
    """Bring an array into the order ``(N, C, *space)``, or ``(N, T, C, H, W)`` of clips; a view.

    >>> channels_first(np.zeros((5, 8, 8, 3)), "n-h-w-c", "rgb").shape
    (5, 3, 8, 8)
    >>> channels_first(np.zeros((5, 9)), "n-t", "series").shape
    (5, 1, 9)
    >>> channels_first(np.zeros((5, 9, 8, 8)), "n-t-h-w", "clips").shape
    (5, 9, 1, 8, 8)

    Raises:
        ValueError: the array has another number of axes, or nothing in it.
    """
    if array.ndim != _AXES[layout]:
        raise ValueError(
            f"{name} needs {_AXES[layout]} axes for layout {layout}, got shape {array.shape}; give the right --layout"
        )
    if array.size == 0:
        raise ValueError(f"{name} needs at least one example with at least one value, got shape {array.shape}")
    if layout in _ONE_CHANNEL:
        return np.expand_dims(array, _ONE_CHANNEL[layout])
    if layout.endswith("-c") and layout != "n-c":
        return np.moveaxis(array, -1, 2 if layout in CLIPS else 1)
    return array


def layout_of(shape: tuple[int, ...], layout: Layout, name: str) -> Layout:
    """The layout that is asked for; where that is auto, the one that the shape tells.

    >>> layout_of((100, 3, 32, 32), "auto", "images")
    'n-c-h-w'

    Raises:
        ValueError: the shape tells none, or two.
    """
    if layout != "auto":
        return layout
    if len(shape) in (2, 3):
        return "n-c" if len(shape) == 2 else "n-h-w"
    if len(shape) not in (4, 5):
        raise ValueError(
            f"{name} needs 2 to 5 axes, examples first, got shape {shape}; reshape it to one of {', '.join(_AXES)}"
        )
    before: Layout = "n-c-h-w" if len(shape) == 4 else "n-t-c-h-w"
    after: Layout = "n-h-w-c" if len(shape) == 4 else "n-t-h-w-c"
    first, last = shape[-3] in _CHANNEL_COUNTS, shape[-1] in _CHANNEL_COUNTS
    if first == last:
        raise ValueError(
            f"{name} needs either its third axis from the end or its last one to have 1, 3 or 4 channels to tell the order of the"
            f" axes, got shape {shape}; give --layout {before} or --layout {after}"
        )
    return before if first else after


def parts_by_key(content: Mapping[str, _Content], path: Path) -> tuple[dict[SplitName, _Content], list[str]]:
    """The split that each array is for, by its key; and the keys of those that are for none.

    >>> parts_by_key({"train": 1, "val": 2, "labels": 3}, Path("a.npz"))
    ({'train': 1, 'validation': 2}, ['labels'])

    Raises:
        ValueError: no array is the training split, or two are one split.
    """
    found = [(SPLIT_WORDS[key], array) for key, array in content.items() if key in SPLIT_WORDS]
    parts = dict(found)
    if len(parts) < len(found):
        raise ValueError(
            f"{path} needs one array for each split, got the keys {', '.join(content)}; drop all but one name of each"
        )
    if not found and len(content) == 1:
        return {"train": next(iter(content.values()))}, []
    if "train" not in parts:
        raise ValueError(
            f"{path} needs the key train (with validation and test, or split at random), or one array alone, got the keys "
            f"{', '.join(content) or 'of an empty archive'}; rename them"
        )
    return {name: parts[name] for name in dict.fromkeys(SPLIT_WORDS.values()) if name in parts}, [
        key for key in content if key not in SPLIT_WORDS
    ]
