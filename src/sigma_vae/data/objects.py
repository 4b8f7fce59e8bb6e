"""Data from Python as splits or batches: arrays, tensors, data frames, torch and Hugging Face data sets."""

import hashlib
import io
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from sigma_vae.conditions import split_name
from sigma_vae.config import DataConfig, ImageConfig, Layout
from sigma_vae.data.arrays import CLIPS, LARGE, arranged, layout_like, parts_by_key
from sigma_vae.data.batches import Batches, Scaling
from sigma_vae.data.counts import from_anndata, from_sparse
from sigma_vae.data.hub import named_labels
from sigma_vae.data.load import load, names, refuse_unread, splits_from, store_of
from sigma_vae.data.pictures import PICTURE_OPTIONS, PicturePlan, Probe, plan, probe_image
from sigma_vae.data.splits import SPLITS, Raw, SplitName, Splits, counted
from sigma_vae.data.stores import Array, Mapped, Part, Store
from sigma_vae.data.tables import TABLE_OPTIONS, from_frames

MEMORY = 2**30
"""Bytes of examples that are collected in memory; more go into a temporary file."""
EXPECTED = (
    "a NumPy array, tensor, sparse matrix, AnnData, pandas DataFrame, torch Dataset or DataLoader, Hugging Face data set, list of"
    " examples, a tuple or dict of these for train, validation and test, a name or path, a DataConfig, or Splits"
)


def as_splits(
    data: object,
    *,
    name: str | None = None,
    layout: Layout = "auto",
    levels: int | None = None,
    columns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    decimal: Literal["auto", ".", ","] = "auto",
    missing: Sequence[str] = (),
    standardise: Literal["auto", "yes", "no"] = "auto",
    counts: bool = False,
    layer: str | None = None,
    images: ImageConfig | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    cache: str | Path | None = None,
    condition: object = (),
    stratify: bool = False,
) -> Splits:
    """Turn data of any kind into train, validation and test splits.

    Values are read as from files: uint8 and uint16 are levels, floats in [0, 1] are kept as real values (or checked to
    be levels, where ``levels`` is given), the columns of a data frame are standardised, and images may have their
    channels first or last. Splits that the data do not have are held out; ``Splits.record`` says how. Arrays that need
    no conversion are not copied: leave them as they are.

    Args:
        data: one of

            * a NumPy array, or a tensor on any device, with the examples along the first axis;
            * a pandas DataFrame, whose numeric columns are taken;
            * a sparse matrix of SciPy, or an AnnData, rows by columns: rows are made dense batch by batch;
            * a map-style torch ``Dataset``, or a list: of each item, the item itself, or the first of a tuple: a
              tensor, an array or a PIL image. All are read once, into memory, or into a temporary file if they are more
              than 1 GiB; random transforms are frozen by that;
            * a finite torch ``DataLoader``: its data set if it goes over all of it with the default collation, else its
              batches;
            * a Hugging Face ``Dataset`` or ``DatasetDict``: its column of images or arrays, or its numeric columns as a
              table;
            * a tuple (train, validation) or (train, validation, test), or a dict with these keys, of any of the above;
            * a name or path, read as ``DataConfig(source=data)``; or a :class:`~sigma_vae.config.DataConfig`;
            * :class:`~sigma_vae.data.Splits`, which are returned as they are.
        name: name of the data in messages and records; default: the type of ``data``.
        layout: order of the axes of arrays: n examples, c channels, h rows, w columns, t times.
        levels: number of values that a datum can take; default: from the values where that is sure, else from the dtype.
        columns: columns of a data frame, or the column of a Hugging Face data set.
        exclude: columns of a data frame to leave out.
        decimal: decimal sign of a data frame's texts; auto: found where it is sure.
        missing: words that mean a missing value in a data frame; rows with one, or with an empty cell, are dropped.
        standardise: scale real values to mean 0 and std 1; auto: only tables.
        counts: read values as counts 0, 1, 2, ..., for likelihoods of counts.
        layer: of an AnnData, the layer to read in place of X.
        images: how pictures of a Hugging Face data set or PIL images get one shape.
        validation_fraction: share of the training examples held out for validation, if there is no validation split.
        test_fraction: share of the examples held out for test, if there is no test split.
        seed: seed of the hold-out.
        cache: folder for the temporary file, or, for names and paths, for decoded copies.
        condition: what a model is to be given beside each example. Names (a text, or a tuple of them) of columns: of a data
            frame, a Hugging Face data set, or a source by name or path; ``"label"`` is the second tensor of a
            ``TensorDataset``. Or the values: an array or a list of labels, or columns by name; for data in several splits, a
            dict of these by split.
        stratify: hold out examples in proportion to the classes.

    Raises:
        ValueError: ``data`` is of another kind, or its values are not what the options say.

    >>> splits = as_splits(np.zeros((20, 8, 8, 3), np.uint8))
    >>> splits.shape, splits.levels, splits.record["counts"]
    ((3, 8, 8), 256, {'train': 16, 'validation': 2, 'test': 2})
    >>> splits.record["preprocessing"].split("; ")[:3]
    ['axes read as n-h-w-c', 'kept as levels 0..255', 'test: 2 of 20 examples at random (seed 0)']
    """
    if name is not None and isinstance(data, str | Path | DataConfig | Splits):
        raise ValueError(f"name is for objects without one, got name={name!r} for {type(data).__name__}; leave it out")
    wanted, labels = _condition(condition)
    config = DataConfig(
        source=str(data) if isinstance(data, str | Path) else name or type(data).__name__,
        cache=None if cache is None else str(cache),
        condition=wanted,
        stratify=stratify,
        layout=layout,
        levels=levels,
        columns=tuple(columns),
        exclude=tuple(exclude),
        decimal=decimal,
        missing=tuple(missing),
        standardise=standardise,
        counts=counts,
        layer=layer,
        images=images or ImageConfig(),
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        split_seed=seed,
    )
    if (found := _with_splits(data, config)) is not None:
        return found
    raw = _raw(data, replace(config, condition=()) if labels else config)
    return splits_from(replace(raw, labels=labels) if labels else raw, config)


def _condition(condition: object) -> tuple[tuple[str, ...], dict[SplitName, Mapping[str, Any]]]:
    """Names of the columns of a condition; and the columns, where these are given and not their names."""
    if isinstance(condition, str):
        return (condition,), {}
    if isinstance(condition, tuple) and all(isinstance(name, str) for name in condition):
        return condition, {}
    by_split = isinstance(condition, Mapping) and bool(condition) and all(key in SPLITS for key in condition)
    whole: Mapping[Any, Any] = condition if by_split else {"train": condition}  # type: ignore[assignment]
    labels: dict[SplitName, Mapping[str, Any]] = {split: _columns_of(each) for split, each in whole.items()}
    return tuple(labels["train"]), labels


def _columns_of(labels: Any) -> dict[str, Any]:
    if isinstance(labels, Mapping) or _is_a(labels, "pandas", "DataFrame"):
        return {str(name): labels[name] for name in labels}
    return {"label": labels}


def as_batches(
    data: object,
    like: Splits | Scaling,
    batch_size: int = 128,
    *,
    split: SplitName = "test",
    layout: Layout = "auto",
    columns: Sequence[str] = (),
    images: ImageConfig | None = None,
    cache: str | Path | None = None,
) -> Batches:
    """Turn new data into batches for a model that exists: scaled and checked like the data that it was trained on.

    Args:
        data: as for :func:`as_splits`. Nothing is held out: data without splits are taken whole. Of several splits, and
            of a name or path, ``split`` is taken.
        like: the model's data, or only their scaling; with the data, shape and columns are checked as well.
        batch_size: examples per batch.
        split: the split to take.
        layout: as for :func:`as_splits`.
        columns: as for :func:`as_splits`; default: those of the model's data.
        images: as for :func:`as_splits`.
        cache: as for :func:`as_splits`.

    Raises:
        ValueError: the data do not fit the model.

    >>> model_data = as_splits(np.zeros((20, 8, 8), np.uint8))
    >>> [len(batch.x) for batch in as_batches(torch.zeros(5, 1, 8, 8), model_data, batch_size=3)]
    [3, 2]
    """
    scaling = like.scaling if isinstance(like, Splits) else like
    known = like if isinstance(like, Splits) else None
    config = DataConfig(
        source=str(data) if isinstance(data, str | Path) else type(data).__name__,
        cache=None if cache is None else str(cache),
        layout=layout,
        columns=tuple(columns),
        images=images or ImageConfig(),
    )
    if not isinstance(data, Splits | DataConfig) and config.source not in names():  # those know their own levels
        standardise: Literal["yes", "no"] = "yes" if scaling.standardised else "no"
        levels_from: Literal["values", "dtype"] = "dtype" if scaling.levels is None else "values"
        config = replace(config, levels=scaling.levels, levels_from=levels_from, standardise=standardise, counts=scaling.counts)
    if (splits := _with_splits(data, config)) is not None:
        _check_scaling(splits, scaling)
        store, clips = splits.store(split), splits.clips
    else:
        raw = _raw(data, config, known)
        chosen: SplitName = split if split in raw.parts else "train"
        store, clips = store_of(raw.parts[chosen], raw, chosen, config, [])[0], raw.clips
    if known is not None:
        _check_shape(store, clips, known, config.source)
    return Batches(store, scaling, batch_size)


def _with_splits(data: object, config: DataConfig) -> Splits | None:
    """Return the splits of data that know them: a name or path, a config, or splits; None for other objects."""
    if isinstance(data, str | Path):
        return load(config)
    if not isinstance(data, Splits | DataConfig):
        return None
    if config != DataConfig(config.source):
        raise ValueError(f"options say nothing about {type(data).__name__}, which have their own; leave them out")
    return load(data) if isinstance(data, DataConfig) else data


def _check_scaling(splits: Splits, scaling: Scaling) -> None:
    own = splits.scaling
    if (own.levels, own.standardised, own.counts) != (scaling.levels, scaling.standardised, scaling.counts):
        raise ValueError(
            f"{splits.name} needs {_scale_words(scaling)}, like the model's data, got {_scale_words(splits.scaling)}; read it with other"
            " levels, standardise or counts"
        )


def _scale_words(scaling: Scaling) -> str:
    if scaling.counts:
        return "counts"
    if scaling.levels is not None:
        return f"{scaling.levels} levels"
    return "real values to standardise" if scaling.standardised else "real values in [0, 1]"


def _check_shape(store: Store, clips: bool, like: Splits, name: str) -> None:
    shape = store.shape[1:] if clips else store.shape
    if shape != like.shape or clips != like.clips:
        kinds = ("images or rows", "clips of frames")
        raise ValueError(
            f"{name} needs {kinds[like.clips]} of shape {like.shape}, like the model's data, got {kinds[clips]} of shape {shape};"
            " reshape them, or give the layout"
        )


@dataclass(frozen=True)
class _Found:
    """The examples of one split, and known facts about them."""

    values: Any
    """An array, or a data frame."""
    options: frozenset[str] = frozenset({"layout"})
    """Options of the config that apply to them."""
    layout: Layout = "auto"
    levels: int | None = None
    words: tuple[str, ...] = ()


def _raw(data: object, config: DataConfig, like: Splits | None = None) -> Raw:
    """Read an object whole; where the config leaves it open, columns and layout are those of the model's data."""
    parts, ignored = _by_split(data, config.source)
    labels = {split: f"{config.source} ({split})" for split in parts}
    files = [{"object": f"{type(part).__module__}.{type(part).__qualname__}", "split": split} for split, part in parts.items()]
    if any(_is_matrix(part) for part in parts.values()):
        return replace(_from_matrices(parts, config, labels, like), files=files)
    found = {split: _found(part, config, labels[split]) for split, part in parts.items()}
    for one in found.values():
        refuse_unread(config, one.options)
    frames = [_is_a(one.values, "pandas", "DataFrame") for one in found.values()]
    if any(frames) and not all(frames):
        raise ValueError(f"{config.source} needs data frames in all splits or in none; convert the others")
    words = list(dict.fromkeys(chain.from_iterable(one.words for one in found.values())))
    words += [f"ignored the keys {', '.join(ignored)}"] if ignored else []
    if all(frames):
        chosen = replace(config, columns=config.columns or (tuple(like.record.get("columns", ())) if like else ()))
        raw = from_frames({split: one.values for split, one in found.items()}, chosen, labels)
        raw = replace(raw, names={split: one.values.index.to_numpy() for split, one in found.items()})
    else:
        raw = _from_arrays(found, config, like)
    if config.condition and not raw.labels:
        raw = replace(raw, labels={split: _labels_of(part, config.condition, labels[split]) for split, part in parts.items()})
    return replace(raw, files=files, preprocessing=[*words, *raw.preprocessing])


def _labels_of(part: object, wanted: Sequence[str], name: str) -> dict[str, Any]:
    """Columns of an object's labels by name: of a Hugging Face data set, or the second tensor of a ``TensorDataset``."""
    columns = [split_name(each)[0] for each in wanted]
    if _is_a(part, "datasets", "Dataset"):
        table: Any = part
        if missing := [column for column in columns if column not in table.features]:
            raise ValueError(f"{name} has no column {missing[0]} to condition on, only {', '.join(table.features)}")
        return {column: named_labels(table, column) for column in columns}
    if isinstance(part, TensorDataset) and columns == ["label"] and len(part.tensors) == 2:
        return {"label": part.tensors[1]}
    raise ValueError(f"{name} has no column {columns[0]} to condition on; give the labels themselves: condition=LABELS")


def _is_matrix(part: object) -> bool:
    """Whether it is an AnnData or a sparse matrix."""
    return _is_a(part, "anndata", "AnnData") or hasattr(part, "tocsr")


def _from_matrices(
    parts: Mapping[SplitName, object], config: DataConfig, labels: Mapping[SplitName, str], like: Splits | None
) -> Raw:
    known = tuple(like.record.get("columns", ())) if like is not None else ()
    raws = {}
    for split, part in parts.items():
        annotated = _is_a(part, "anndata", "AnnData")
        refuse_unread(config, {"layer", "columns", "exclude"} if annotated else set())
        chosen = replace(config, columns=config.columns or known)
        matrix: Any = part
        raws[split] = from_anndata(matrix, chosen, labels[split]) if annotated else from_sparse(matrix, labels[split])
    if len({raw.columns for raw in raws.values()}) > 1:
        raise ValueError(f"{config.source} needs the same columns in all splits; choose those that all have with columns")
    return replace(
        raws["train"],
        name=config.source,
        parts={split: raw.parts["train"] for split, raw in raws.items()},
        names={split: raw.names["train"] for split, raw in raws.items() if raw.names},
        labels={split: raw.labels["train"] for split, raw in raws.items() if raw.labels},
    )


def _by_split(data: object, name: str) -> tuple[dict[SplitName, object], list[str]]:
    """Assign objects to splits; also return the keys that belong to no split."""
    if isinstance(data, Mapping):
        return parts_by_key(data, name)
    if not isinstance(data, tuple):
        return {"train": data}, []
    if len(data) not in (2, 3):
        raise ValueError(
            f"a tuple of data is (train, validation) or (train, validation, test), got {len(data)} items; give one of these"
        )
    return dict(zip(SPLITS, data, strict=False)), []


def _from_arrays(found: Mapping[SplitName, _Found], config: DataConfig, like: Splits | None) -> Raw:
    train = found["train"]
    layout = config.layout if train.layout == "auto" else train.layout
    if like is not None and layout == "auto":
        layout = layout_like(train.values.shape, like.shape, like.clips)
    ordered, used = arranged({split: one.values for split, one in found.items()}, layout, config.source)
    parts = {split: _part(array, config) for split, array in ordered.items()}
    return Raw(config.source, parts, [], [f"axes read as {used}"], levels=train.levels, clips=used in CLIPS)


def _part(array: Array, config: DataConfig) -> Part:
    """Keep a large mapped array in its file, if its numbers can be used as they are."""
    if not isinstance(array, np.memmap) or array.nbytes < LARGE or not array.dtype.isnative:
        return array
    levels = array.dtype.name in ("uint8", "uint16") and config.standardise != "yes"
    if not levels and (array.dtype.name != "float32" or config.levels is not None):
        return array
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    rows = max(1, LARGE // (array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        digest.update(np.ascontiguousarray(array[start : start + rows]).data)
    return Mapped(array, digest.hexdigest())


def _found(data: object, config: DataConfig, name: str) -> _Found:
    """Read the examples of one split."""
    if isinstance(data, Tensor):
        return _Found(_numpy(data))
    if isinstance(data, np.ndarray):
        return _Found(data)
    if _is_a(data, "pandas", "DataFrame"):
        return _Found(data, TABLE_OPTIONS)
    if _is_a(data, "datasets", "Dataset"):
        return _hugging_face(data, config, name)
    if isinstance(data, TensorDataset):
        return _Found(_numpy(data.tensors[0]))
    if isinstance(data, DataLoader):
        return _loader(data, config, name)
    if isinstance(data, Dataset | list) and not isinstance(data, IterableDataset):
        return _collected(_items(data, name), config, name)
    remedy = "wrap it in a DataLoader" if isinstance(data, IterableDataset) else "convert it to one of these"
    raise ValueError(f"{name}: expected {EXPECTED}; got {type(data).__module__}.{type(data).__qualname__}; {remedy}")


def _is_a(thing: object, package: str, kind: str) -> bool:
    """Whether an object is of a class in a package, without importing it: if there is such an object, it is loaded."""
    found = getattr(sys.modules.get(package), kind, None)
    return isinstance(found, type) and isinstance(thing, found)


def _numpy(tensor: Tensor) -> Array:
    values = tensor.detach().cpu()
    array: Array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array


def _items(data: Any, name: str) -> Iterator[object]:
    """Yield the examples of a map-style data set, without their labels."""
    try:
        count = len(data)
    except TypeError as error:
        raise ValueError(f"{name}: {type(data).__name__} needs a length; define __len__, or wrap it in a DataLoader") from error
    return (_first(data[i], name) for i in range(count))


def _first(item: object, name: str) -> object:
    """Pick the example out of an item: the item itself, the first of a tuple, or the only array of a dict."""
    if isinstance(item, tuple | list) and item:
        return item[0]
    if not isinstance(item, Mapping):
        return item
    arrays = [v for v in item.values() if _is_picture(v) or (isinstance(v, Tensor | np.ndarray) and v.ndim > 0)]
    if len(arrays) != 1:
        raise ValueError(
            f"{name} needs items with one tensor, array or PIL image, got {len(arrays)} in a dict of {', '.join(map(str, item))};"
            " let the data set return the example alone, or first in a tuple"
        )
    return arrays[0]


def _is_picture(thing: object) -> bool:
    return _is_a(thing, "PIL.Image", "Image")


def _loader(loader: "DataLoader[Any]", config: DataConfig, name: str) -> _Found:
    """Read the data set of a loader that covers all of it with the default collation, else the loader's batches."""
    sampler, data = loader.sampler, loader.dataset
    if isinstance(sampler, DistributedSampler):
        raise ValueError(
            f"{name}: a DataLoader with a DistributedSampler has only the share of one process; give its data set, which is distributed"
            " here"
        )
    if not isinstance(data, IterableDataset) and loader.batch_size is not None and loader.collate_fn is default_collate:
        whole = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(data)  # type: ignore[arg-type]
        if whole or isinstance(sampler, SequentialSampler):
            return _found(data, config, name)
    return _collected(chain.from_iterable(_batch(batch, name) for batch in loader), config, name)


def _batch(batch: object, name: str) -> Iterable[object]:
    found = _first(batch, name)
    if not isinstance(found, Tensor | np.ndarray | list):
        raise ValueError(
            f"{name} needs batches that are, or begin with, a tensor, got {type(found).__name__}; change the collate_fn"
        )
    return found


def _hugging_face(table: Any, config: DataConfig, name: str) -> _Found:
    """Read a column of images or arrays, or numeric columns as a data frame."""
    features = table.features
    if unknown := [column for column in config.columns if column not in features]:
        raise ValueError(f"{name} has no column {unknown[0]}, only {', '.join(features)}; choose one of these with columns")
    pictures = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    arrays = [column for column, feature in features.items() if _array_dtype(feature) is not None]
    wanted = list(config.columns) or pictures or arrays
    special = [column for column in wanted if column in pictures or column in arrays]
    if not special:
        return _Found(table.to_pandas(), TABLE_OPTIONS)
    if len(wanted) > 1:
        raise ValueError(f"{name} needs one column of images or arrays, got {', '.join(wanted)}; choose one with columns")
    (column,) = wanted
    if column in pictures:
        items = (row[column] for row in table.select_columns(wanted))
    else:
        dtype = np.dtype(_array_dtype(features[column]))  # without it, integers of all kinds become int64
        numbers = table.select_columns(wanted).with_format("numpy", dtype=dtype)
        items = (row[column] for row in numbers)
    found = _collected(items, config, name)
    return replace(found, options=found.options | {"columns"})


def _array_dtype(feature: Any) -> str | None:
    """Dtype of the numbers in a column of lists or arrays; None for other columns."""
    kind = type(feature).__name__
    if kind in ("Array2D", "Array3D", "Array4D", "Array5D"):
        return str(feature.dtype)
    inner: Any = getattr(feature, "feature", None)
    if inner is None:
        return None
    if type(inner).__name__ == "Value":
        return str(inner.dtype) if str(inner.dtype).startswith(("bool", "int", "uint", "float")) else None
    return _array_dtype(inner)


def _collected(examples: Iterable[object], config: DataConfig, name: str) -> _Found:
    """Read all examples once, into memory or a temporary file."""
    rows = iter(examples)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{name} needs at least one example, got none")
    whole = chain([first], rows)
    room = None if config.cache is None else str(Path(config.cache).expanduser())
    if room is not None:
        Path(room).mkdir(parents=True, exist_ok=True)
    if _is_picture(first):
        pictures = _Pictures(config.images, name)
        array, where = _written(map(pictures, whole), room, name)
        return _Found(array, PICTURE_OPTIONS - {"unreadable"}, "n-c-h-w", *pictures.outcome(where))
    array, where = _written((_example(one, name) for one in whole), room, name)
    return _Found(array, frozenset({"layout", "cache"}), words=(where,))


def _example(one: object, name: str) -> Array:
    if isinstance(one, Tensor):
        return _numpy(one)
    if isinstance(one, np.ndarray | np.generic | int | float | bool | list):
        return np.asarray(one)
    raise ValueError(f"{name} needs examples that are tensors, arrays or PIL images, got {type(one).__name__}; convert them")


class _Pictures:
    """Decodes PIL images, which must all come out alike."""

    def __init__(self, images: ImageConfig, name: str) -> None:
        self.images = images
        self.name = name
        self.plans: dict[Probe, PicturePlan] = {}

    def __call__(self, image: Any) -> Array:
        if not _is_picture(image):
            raise ValueError(f"{self.name} needs PIL images throughout, got {type(image).__name__}; convert the others")
        probe = probe_image(image)
        if probe not in self.plans:
            self.plans[probe] = plan([probe], self.images, self.name)
            kinds = {(each.shape, each.bits) for each in self.plans.values()}
            if len(kinds) > 1:
                plan(self.plans, self.images, self.name)  # raises: it says what differs, and what to do
        return self.plans[probe].decode(image)

    def outcome(self, where: str) -> tuple[int | None, tuple[str, ...]]:
        """Return the levels, if the dtype does not imply them, and the steps in words."""
        first = next(iter(self.plans.values()))
        return (2 if first.levels == 2 else None), (where, *first.words)


def _written(examples: Iterator[Array], folder: str | None, name: str) -> tuple[Array, str]:
    """Write examples of one shape and dtype into one array; also say where it is.

    A temporary file has no name, and disappears when nothing maps it any more.
    """
    first, count = next(examples), 0
    memory = io.BytesIO()
    file: IO[bytes] = memory
    with ExitStack() as stack:
        for count, example in enumerate(chain([first], examples), 1):
            if (example.shape, example.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{name} needs examples of one shape and dtype, got {first.shape} {first.dtype} and {example.shape}"
                    f" {example.dtype} (example {count - 1}); resize or convert them"
                )
            if file is memory and file.tell() + example.nbytes > MEMORY:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                file.write(memory.getbuffer())
            file.write(np.ascontiguousarray(example).data)
        shape = (count, *first.shape)
        if file is memory:
            return np.frombuffer(memory.getbuffer(), first.dtype).reshape(
                shape
            ), f"{counted(count, 'example')} read into memory"
        file.flush()
        where = f"{counted(count, 'example')} read into a temporary file in {folder or tempfile.gettempdir()}"
        return np.memmap(file, first.dtype, "r", shape=shape), where
