"""Data sets published as MATLAB files: SVHN and the Frey faces.

SVHN: Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers. Frey faces: Roweis & Saul 2000,
https://cs.nyu.edu/~roweis/data.html.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_record
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.named.official import Official, find, find_splits, read_official
from sigma_vae.data.pictures import PicturePlan
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.registry import register

__all__ = ["read_frey_faces", "read_svhn"]

Images = npt.NDArray[np.uint8]

_SVHN_FILES: dict[SplitName, str] = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
_SVHN_COUNTS: dict[SplitName, int] = {"train": 73257, "test": 26032}
_SVHN_PICTURE = (32, 32, "RGB")
_SVHN_SIZE = 28  # the paper's
_FREY_FILE = "frey_rawface.mat"
_FREY_COUNTS: dict[SplitName, int] = {"train": 1965}


@register.source("svhn", options={"root", "cache", "size"})
def read_svhn(config: DataConfig) -> Raw:
    """Read the official 73 257 train and 26 032 test images of SVHN's cropped digits.

    They are resized to 28×28, the paper's size; ``size=32`` keeps them as published. The 531 131 easier "extra" images
    are not read (the hub's copy includes them: 1 GB more to download).

    Raises:
        ValueError: the files are missing, incomplete, damaged, or not the published ones.
    """
    size = config.images.size or _SVHN_SIZE
    config = replace(config, images=replace(config.images, size=None if size == _SVHN_PICTURE[0] else size))
    place = HubPlace("ufldl-stanford/svhn", "cropped_digits", "image")
    official = Official("svhn", " and ".join(_SVHN_FILES.values()), _SVHN_COUNTS, _SVHN_PICTURE, place)
    return read_official(official, config, lambda folder: _svhn_in(folder, official.plan(config.images), config))


@register.source("frey-faces", options={"root"})
def read_frey_faces(config: DataConfig) -> Raw:
    """Read 1 965 frames ``(1, 28, 20)`` of one face, from a video.

    Raises:
        ValueError: the file is missing, damaged, or not the published one.
    """
    return read_official(Official("frey-faces", _FREY_FILE, _FREY_COUNTS, (20, 28, "L")), config, _frey_in)


def _svhn_in(folder: Path, chosen: PicturePlan, config: DataConfig) -> Raw | None:
    files = find_splits(folder, _SVHN_FILES, "svhn")
    if not files:
        return None
    # MATLAB's order: rows, columns, colours, examples.
    parts = {split: _resized(np.moveaxis(_array(path, "X", (32, 32, 3)), -1, 0), chosen) for split, path in files.items()}
    words = ["official train and test images, without extra", *chosen.words]
    records = [file_record(path) for path in files.values()]
    labels = {split: {"label": _digits(path)} for split, path in files.items()} if config.condition else {}
    return Raw("svhn", parts, records, words, levels=256, labels=labels)


def _digits(path: Path) -> Images:
    """The digits of the images; the file writes 0 as 10."""
    digits: Images = _array(path, "y", None).reshape(-1) % 10
    return digits


def _resized(images: Images, chosen: PicturePlan) -> Images:
    """Resize from ``(N, 32, 32, 3)`` to ``(N, 3, size, size)``."""
    if chosen.shape[1:] == images.shape[1:3]:
        return np.moveaxis(images, -1, 1)
    from PIL import Image

    result = np.empty((len(images), *chosen.shape), np.uint8)
    for row, image in zip(result, images, strict=True):
        row[...] = chosen.decode(Image.fromarray(np.ascontiguousarray(image)))
    return result


def _frey_in(folder: Path) -> Raw | None:
    path = find(folder, _FREY_FILE)
    if path is None:
        return None
    images = _array(path, "ff", (560,)).T.reshape(-1, 1, 28, 20)
    words = ["frames of one video without splits: held-out frames resemble their neighbours in the training split"]
    return Raw("frey-faces", {"train": images}, [file_record(path)], words, levels=256)


def _array(path: Path, key: str, leading: tuple[int, ...] | None) -> Images:
    """Read an array of a MATLAB file: ``leading`` axes, then the axis of examples; None: of any shape."""
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path, variable_names=[key])
    except Exception as error:  # scipy raises many unrelated kinds for damaged files
        raise ValueError(
            f"{path} cannot be read as a MATLAB file ({type(error).__name__}: {error}); fetch the file again"
        ) from error
    array = content.get(key)
    shaped = isinstance(array, np.ndarray) and leading in (None, array.shape[:-1])
    if not isinstance(array, np.ndarray) or not shaped or array.dtype != np.uint8:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "none"
        raise ValueError(
            f"{path} needs an array {key} of uint8 with shape {(*(leading or ()), 'N')}, got {got}; take the official file"
        )
    return array
