"""What pictures of several sizes and modes have in common, or must be told: the one size and the channels that all of them get."""

from collections import Counter
from collections.abc import Callable
from typing import Literal, TypeVar

from sigma_vae.config import ImageConfig

__all__ = ["Colour", "Fit", "Probe", "channels", "common_size", "remarks", "window"]

Probe = tuple[int, int, str]
"""Width, height and mode of a picture, as it is when it is seen upright."""
Colour = Literal["grey", "grey+alpha", "rgb", "rgba"]
Fit = Literal["refuse", "crop", "stretch", "pad"]

_CANONICAL = {"1": "1", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
_CANONICAL |= {mode: "I;16" for mode in ("I", "I;16", "I;16B", "I;16L", "I;16N")}
_CANONICAL |= {mode: mode.removesuffix(";16") for mode in ("LA;16", "RGB;16", "RGBA;16")}
_KINDS: dict[str, tuple[Colour, int]] = {
    "1": ("grey", 1),
    "L": ("grey", 8),
    "I;16": ("grey", 16),
    "LA": ("grey+alpha", 8),
    "RGB": ("rgb", 8),
    "RGBA": ("rgba", 8),
}
_Thing = TypeVar("_Thing")


def window(width: int, height: int, crop: int | None, fit: str) -> tuple[int, int]:
    """Width and height of what is taken of a picture, around its centre; more than there is where it is padded.

    >>> window(5, 3, crop=None, fit="pad")
    (5, 5)
    """
    if crop is not None:
        return crop, crop
    side = {"crop": min(width, height), "pad": max(width, height)}.get(fit)
    return (width, height) if side is None else (side, side)


def common_size(sizes: Counter[tuple[int, int]], images: ImageConfig, name: str) -> tuple[int, int]:
    """Width and height that all pictures get, from how many there are of each (width, height).

    >>> common_size(Counter({(5, 3): 2, (3, 3): 1}), ImageConfig(fit="crop"), "some")
    (3, 3)

    Raises:
        ValueError: there is none, and the user does not say what is to be done; a crop is larger than a picture; or ``fit`` has
            nothing to fit.
    """
    _check_fit(images, name)
    if images.crop is not None:
        _check_crop(sizes, images.crop, name)
    windows: Counter[tuple[int, int]] = Counter()
    for size, count in sizes.items():
        windows[window(*size, images.crop, images.fit)] += count
    if images.size is not None:
        oblong = Counter({size: count for size, count in windows.items() if size[0] != size[1]})
        if oblong and images.fit == "refuse":
            raise ValueError(
                f"{name}: size {images.size} needs square pictures, got {_listed(oblong, _times)} (width×height); cut the central"
                " square (--fit crop), stretch (--fit stretch) or pad with black (--fit pad)"
            )
        return images.size, images.size
    if len(windows) > 1:
        least = min(min(size) for size in sizes)
        fit = "" if images.fit != "refuse" or all(w == h for w, h in windows) else " with --fit crop, stretch or pad"
        raise ValueError(
            f"{name}: pictures need one size, got {len(windows)}: {_listed(windows, _times)} (width×height); resize them"
            f" (--size {least}, say{fit}), or cut the same square from each (--crop {least})"
        )
    return next(iter(windows))


def _check_fit(images: ImageConfig, name: str) -> None:
    if images.fit != "refuse" and images.crop is not None:
        raise ValueError(f"{name}: fit {images.fit} says nothing about squares of crop {images.crop}; leave out one of them")
    if images.fit == "stretch" and images.size is None:
        raise ValueError(f"{name}: fit stretch needs a size to stretch pictures to, got none; give --size, 64 say")


def _check_crop(sizes: Counter[tuple[int, int]], crop: int, name: str) -> None:
    if small := Counter({size: count for size, count in sizes.items() if min(size) < crop}):
        raise ValueError(
            f"{name}: crop {crop} needs pictures of at least {crop}×{crop}, got {_listed(small, _times)} (width×height); crop at most"
            f" {min(min(size) for size in sizes)}"
        )


def channels(modes: Counter[str], images: ImageConfig, name: str) -> tuple[Colour, int]:
    """Channels and bits of a value that all pictures get, from how many there are of each mode.

    >>> channels(Counter({"1": 2, "L": 1}), ImageConfig(), "some")
    ('grey', 8)

    Raises:
        ValueError: modes differ, and the user does not say what is to be done; or a mode has no levels.
    """
    if unknown := Counter({mode: count for mode, count in modes.items() if mode not in _CANONICAL}):
        raise ValueError(
            f"{name}: pictures need modes {', '.join(dict.fromkeys(_CANONICAL.values()))} or palettes, got {_listed(unknown, str)};"
            " convert them, or save floats as .npy"
        )
    kinds = {_CANONICAL[mode] for mode in modes}
    if kinds == {"1"} and images.size is None and images.colour in ("auto", "grey"):
        return "grey", 1
    kinds = {"L" if kind == "1" else kind for kind in kinds}  # black and white are two of the greys
    if "I;16" in kinds and (len(kinds) > 1 or images.colour not in ("auto", "grey")):
        raise ValueError(
            f"{name}: 16-bit grey pictures cannot be mixed with others or get colours, got {_listed(modes, str)} and colour"
            f" {images.colour}; convert them to one kind"
        )
    if "I;16" in kinds or (images.colour == "auto" and len(kinds) == 1):
        return _KINDS[kinds.pop()]
    if images.colour == "auto":
        raise ValueError(
            f"{name}: pictures need the same channels, got modes {_listed(modes, str)}; say which to keep: --colour grey, rgb or rgba"
        )
    return images.colour, 8


def remarks(modes: Counter[str], colour: Colour) -> tuple[str, ...]:
    """What is lost of some pictures, in words.

    >>> remarks(Counter({"RGBA": 2, "RGB": 1}), "rgb")
    ('transparency ignored (2 of 3)',)
    """
    deep = sum(count for mode, count in modes.items() if mode in ("LA;16", "RGB;16", "RGBA;16"))
    alpha = sum(count for mode, count in modes.items() if _CANONICAL[mode] in ("LA", "RGBA"))
    coloured = sum(count for mode, count in modes.items() if _CANONICAL[mode] in ("RGB", "RGBA"))
    return tuple(
        f"{what} ({count} of {modes.total()})"
        for what, count in (
            ("the upper 8 of 16 bits of each colour", deep),
            ("transparency ignored", alpha if colour in ("grey", "rgb") else 0),
            ("colours to luma (ITU-R 601)", coloured if colour == "grey" else 0),
        )
        if count
    )


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _listed(counts: Counter[_Thing], say: Callable[[_Thing], str]) -> str:
    most = [f"{say(thing)} ({count})" for thing, count in counts.most_common(5)]
    return ", ".join(most) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")
