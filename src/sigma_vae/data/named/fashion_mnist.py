"""Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747): the official files, wherever they are."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.files.idx import read_images
from sigma_vae.data.raw import Raw, file_record
from sigma_vae.data.splits import SplitName

__all__ = ["read_fashion_mnist"]

_VARIABLE = "SIGMA_VAE_DATA"
_PREFIXES = (Path("/usr"), Path("/usr/local"))
_HUB = "zalando-datasets/fashion_mnist"
_STEMS: dict[SplitName, str] = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_COUNTS: dict[SplitName, int] = {"train": 60000, "test": 10000}
_SIZE = (28, 28)


def read_fashion_mnist(config: DataConfig) -> Raw:
    """The official 60 000 train and 10 000 test images.

    Looked for in ``root`` alone if that is given; else in the folder that SIGMA_VAE_DATA names, in the folders of the
    Debian package, and on the hub.

    Raises:
        ValueError: the files are nowhere, incomplete or damaged.
    """
    root = config.root
    folders = [Path(root).expanduser()] if root else _folders()
    for folder in folders:
        files: dict[SplitName, Path] = {name: path for name in _STEMS if (path := _find(folder, _STEMS[name]))}
        if files:
            return _from_files(folder, files)
    if root:
        raise ValueError(
            f"fashion-mnist needs {_expected()} in {folders[0]}, got no such file; give the folder that holds them"
        )
    return _from_hub(folders)


def _folders() -> list[Path]:
    named = os.environ.get(_VARIABLE)
    own = [Path(named).expanduser(), Path(named).expanduser() / "fashion-mnist"] if named else []
    return own + [prefix / "share" / "datasets" / "fashion-mnist" for prefix in _PREFIXES]


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _expected() -> str:
    return " and ".join(f"{stem}[.gz]" for stem in _STEMS.values())


def _from_files(folder: Path, files: dict[SplitName, Path]) -> Raw:
    if missing := [f"{stem}[.gz]" for name, stem in _STEMS.items() if name not in files]:
        raise ValueError(f"fashion-mnist needs {_expected()} in {folder}, got no {missing[0]}; put both files there")
    parts = {name: _checked(read_images(path), name, str(path)) for name, path in files.items()}
    return _raw(parts, [file_record(path) for path in files.values()])


def _from_hub(folders: list[Path]) -> Raw:
    parts: dict[SplitName, npt.NDArray[np.uint8]] = {}
    try:
        from datasets import load_dataset

        for name in _STEMS:
            images = load_dataset(_HUB, split=name)["image"]
            parts[name] = np.stack([np.asarray(image) for image in images])
    except Exception as error:  # offline, its libraries raise many unrelated kinds; all of them mean: not there either
        places = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"fashion-mnist needs {_expected()}, found neither in {places} nor on the hub as {_HUB} "
            f"({type(error).__name__}: {error}); put the files in a folder and give it as --root or in {_VARIABLE}"
        ) from error
    checked = {name: _checked(part, name, f"{_HUB} ({name})") for name, part in parts.items()}
    return _raw(checked, [{"hub": _HUB, "split": name} for name in checked])


def _checked(images: npt.NDArray[np.uint8], name: SplitName, where: str) -> npt.NDArray[np.uint8]:
    expected = (_COUNTS[name], *_SIZE)
    if images.shape != expected or images.dtype != np.uint8:
        raise ValueError(
            f"{where} needs images {expected} of uint8, got {images.shape} of {images.dtype}; take the official file"
        )
    return images


def _raw(parts: dict[SplitName, npt.NDArray[np.uint8]], files: list[dict[str, object]]) -> Raw:
    arrays = {name: part[:, np.newaxis] for name, part in parts.items()}
    return Raw("fashion-mnist", arrays, files, ["official train and test images"], levels=256)
