"""Data sets by name and files by path; data without splits of their own are split here."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.archives import ARCHIVES
from sigma_vae.data.arrays import path_of, read_arrays, read_hdf5
from sigma_vae.data.cache import cached
from sigma_vae.data.holdout import hold_out
from sigma_vae.data.hub import HUB_PREFIX, read_hub
from sigma_vae.data.levels import encode, native_levels, real_values
from sigma_vae.data.named import NAMED
from sigma_vae.data.pictures import is_glob, read_pictures
from sigma_vae.data.raw import Encoded, Part, Raw, Source
from sigma_vae.data.scaling import Scaling, standardisation
from sigma_vae.data.splits import SplitName, Splits, fingerprint
from sigma_vae.data.stores import Generated, InMemory, Mapped, Store
from sigma_vae.data.tables import TABLES, holds_tables, read_tables
from sigma_vae.data.videos import ENDINGS as VIDEO_ENDINGS
from sigma_vae.data.videos import OPTIONS, holds_videos, read_videos

__all__ = ["ENDINGS", "NAMES", "load", "source_of"]

_ARRAYS = Source(read_arrays, {"layout"})
_HDF5 = Source(read_hdf5, {"layout", "columns", "cache"})
_TABLES = Source(read_tables, {"layout", "columns"})
_VIDEOS = Source(read_videos, OPTIONS)
_PICTURES = Source(read_pictures, {"cache", "crop", "size", "fit", "colour", "unreadable"})

ENDINGS: Mapping[str, Source] = {
    ".npy": _ARRAYS,
    ".npz": _ARRAYS,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    **dict.fromkeys(TABLES, _TABLES),
    **dict.fromkeys(ARCHIVES, _PICTURES),
    **dict.fromkeys(VIDEO_ENDINGS, _VIDEOS),
}
"""File ending to reader, with the options that it reads."""


def source_of(path: Path, config: DataConfig) -> Source | None:
    """The reader for a path; None where it is of no known kind.

    A folder is for tables where one is called train (train.csv, say), for videos where it holds some, else for pictures.

    Raises:
        ValueError: the path is a link to nothing.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; mend the link, or give another path")
    if path.is_dir():
        return _TABLES if holds_tables(path) else _VIDEOS if holds_videos(path, config.clips) else _PICTURES
    if is_glob(path):
        return _PICTURES
    return next((source for ending, source in ENDINGS.items() if path.name.lower().endswith(ending)), None)


NAMES: tuple[str, ...] = tuple(NAMED)
"""The data sets that have a name."""

COMMON = {"source", "levels", "standardise", "validation_fraction", "test_fraction", "split_seed"}
"""Options that all data have."""

HUB = Source(read_hub, {"cache", "columns", "crop", "size", "fit", "colour", "unreadable"})
"""Any data set of pictures on the hub."""


def load(config: DataConfig) -> Splits:
    """Read a data set and hold out what it has no split of its own for.

    Which examples are held out depends on ``split_seed``, the fractions and the number of examples alone.

    Raises:
        ValueError: the source is unknown, missing or damaged, or its values are not what the config says.
        OSError: decoded copies cannot be written.
    """
    source = _source(config)
    _refuse_unread(config, source)
    raw = source.read(config)
    standardise = _standardise(config, raw)
    levels = None if standardise else _levels(raw, config.levels)
    words = list(raw.preprocessing)
    stored = {name: _store(part, raw, name, levels, standardise, config, words) for name, part in raw.parts.items()}
    parts, held_out = hold_out(stored, config, raw.name)
    scaling = standardisation(parts["train"], raw.name, raw.columns) if standardise else Scaling(levels)
    words += [_stored_as(scaling), *held_out]
    record = {
        "source": config.source,
        "files": raw.files,
        "counts": {name: len(part) for name, part in parts.items()},
        "preprocessing": "; ".join(words),
        "fingerprint": fingerprint(parts),
        **({"columns": list(raw.columns)} if raw.columns else {}),
    }
    return Splits(raw.name, parts["train"], parts["validation"], parts["test"], scaling, record, raw.clips)


def _source(config: DataConfig) -> Source:
    if config.source in NAMED:
        return NAMED[config.source]
    if config.source.startswith(HUB_PREFIX):
        return HUB
    path = path_of(config)
    if source := source_of(path, config):
        return source
    near = difflib.get_close_matches(config.source.lower(), NAMES, n=1)
    guess = f"did you mean {near[0]}?" if near else "give one of these."
    raise ValueError(
        f"expected a data set ({', '.join(NAMES)}), hub:OWNER/NAME, or the path of a folder or of a file ({', '.join(ENDINGS)}),"
        f" got {config.source!r}; {guess}"
    )


def _standardise(config: DataConfig, raw: Raw) -> bool:
    known = config.levels if config.levels is not None else raw.levels
    if config.standardise == "yes" and known is not None:
        raise ValueError(f"{raw.name} has {known} levels, which are not standardised; leave out one of levels and standardise")
    wanted = config.standardise == "yes" or (config.standardise == "auto" and raw.standardise and known is None)
    if wanted and raw.clips:
        raise ValueError(f"{raw.name} holds clips, which cannot be standardised; bring their values into [0, 1]")
    return wanted


def _refuse_unread(config: DataConfig, source: Source) -> None:
    """An option that would do nothing is a mistake."""
    read = COMMON | source.options | ({"root"} if config.source not in NAMED and source is not HUB else set())
    given, usual = _flat(asdict(config)), _flat(asdict(DataConfig(config.source)))
    for name, value in given.items():
        if name not in read and value != usual[name]:
            raise ValueError(f"{name} says nothing about {config.source}, got {value!r}; leave it out")


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    nested = {key: value for key, value in options.items() if isinstance(value, dict)}
    plain = {key: value for key, value in options.items() if key not in nested}
    return plain | {key: value for inner in nested.values() for key, value in inner.items()}


def _store(
    part: Part, raw: Raw, split: SplitName, levels: int | None, standardise: bool, config: DataConfig, words: list[str]
) -> Store:
    name = f"{raw.name} ({split})"
    if isinstance(part, Generated):
        return part
    if isinstance(part, Mapped):
        return _checked(part, levels, name)
    if isinstance(part, Encoded):
        mapped, skipped = cached(part, None if config.cache is None else Path(config.cache).expanduser())
        if skipped:
            words.append(f"{split}: left out {len(skipped)} of {len(part.names)} as unreadable ({', '.join(skipped[:5])})")
        return _checked(mapped, levels, name)
    return InMemory(real_values(part, name) if standardise else encode(part, levels, name))


def _checked(mapped: Mapped, levels: int | None, name: str) -> Mapped:
    """What lies in a file is as it was found: values may go beyond levels that are fewer than its type has."""
    native = native_levels(mapped.array, name)
    if levels is not None and native is not None and levels < native and (greatest := int(mapped.array.max())) >= levels:
        raise ValueError(
            f"{name} needs levels 0..{levels - 1} for levels={levels}, but its values go up to {greatest}; give the right --levels"
        )
    return mapped


def _stored_as(scaling: Scaling) -> str:
    if scaling.levels is not None:
        return f"kept as levels 0..{scaling.levels - 1}"
    return "standardised by mean and deviation of the training split" if scaling.standardised else "kept as float32 values"


def _levels(raw: Raw, asked: int | None) -> int | None:
    if raw.levels is not None and asked not in (None, raw.levels):
        raise ValueError(f"{raw.name} has {raw.levels} levels, got levels={asked}; leave levels out")
    if asked is not None:
        return asked
    if raw.levels is not None:
        return raw.levels
    train = raw.parts["train"]
    assert not isinstance(train, Generated), "what is generated has known levels"
    if isinstance(train, Encoded):
        return native_levels(np.empty(0, train.dtype), raw.name)
    return native_levels(train.array if isinstance(train, Mapped) else train, raw.name)
