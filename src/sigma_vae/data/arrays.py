"""Arrays: .npy, .npz, HDF5 and IDX files, and the order of the axes of any array."""

import hashlib
import math
import os
import re
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from sigma_vae.conditions import split_name
from sigma_vae.config import DataConfig, Layout
from sigma_vae.data.archives import check_unpacked, gunzipped
from sigma_vae.data.cache import digest_of, file_record, file_stamp, piece_of
from sigma_vae.data.splits import SPLIT_WORDS, SPLITS, Raw, SplitName, few
from sigma_vae.data.stores import Array, Encoded, Mapped, Part, UnreadableError, check_kind
from sigma_vae.registry import register

_AXES: dict[Layout, int] = {layout: layout.count("-") + 1 for layout in get_args(Layout) if layout != "auto"}
FEW, LONG = 4, 9
"""Channels that a series may have, and its least length, to be told from a picture by its shape."""
_ONE_CHANNEL = {"n-h-w": 1, "n-t": 1, "n-t-h-w": 2}
CLIPS = frozenset(("n-t-h-w", "n-t-h-w-c", "n-t-c-h-w"))
"""Layouts of clips, whose examples are ``(T, C, H, W)``."""
_CHANNEL_COUNTS = (1, 3, 4)
_EXAMPLES = frozenset(("x", "image", "images", "img", "imgs", "data", "samples", "examples", "features", "inputs", "arr_0"))
"""Words for examples in the keys of archives."""
_Content = TypeVar("_Content", bound=Any)
_SPARSE = ({"data", "indices", "indptr"}, {"data", "shape", "format"})
LARGE = 2**28
"""Bytes from which an array stays in its file, if its numbers can be used as they are."""
_CHUNKS = 2**28
"""Bytes of decompressed chunks that HDF5 caches: neighbouring blocks often share one."""
_MAGIC = 0x00000803  # unsigned bytes, three axes
_MAGIC_OF_LABELS = 0x00000801
_GZIP = b"\x1f\x8b"


@register.source("arrays", options={"layout", "columns"}, endings=(".npy", ".npz"))
def read_arrays(config: DataConfig) -> Raw:
    """Read the arrays of a .npy or .npz file, channels first.

    Of an .npz file, ``columns`` can give the key of the array; without it the splits are found by their names, see
    :func:`split_keys`. Other arrays are not read, so pickled ones do no harm. A .npy file of uint8 or uint16 from 256
    MiB on is mapped into memory instead.

    Raises:
        ValueError: the file is missing or unreadable, has pickled objects, or its arrays do not match.
    """
    path = config.path
    if not path.is_file():
        raise ValueError(f"expected a .npy or .npz file at {path}, got no such file; check the path")
    arrays, ignored = _read(path, config.columns, mapped=config.standardise != "yes")
    labels: dict[SplitName, dict[str, Array]] = {}
    if config.condition and path.suffix.lower() == ".npz":
        with _told(path, *_NUMPY), np.load(path, allow_pickle=False) as content:
            chosen = label_keys(ignored, config.condition, list(arrays), str(path))
            labels = {split: {name: content[key] for name, key in keys.items()} for split, keys in chosen.items()}
        ignored = [key for key in ignored if not any(key in keys.values() for keys in chosen.values())]
    ordered, used = arranged(arrays, config.layout, str(path))
    words = [f"axes read as {used}", *([f"ignored the arrays {', '.join(ignored)}"] if ignored else [])]
    parts: dict[SplitName, Part] = {name: _part(array, path, used) for name, array in ordered.items()}
    return Raw(str(path), parts, [file_record(path)], words, clips=used in CLIPS, labels=labels)


def _read(path: Path, columns: tuple[str, ...], mapped: bool) -> tuple[dict[SplitName, Array], list[str]]:
    """Read the arrays of the splits, and list the keys of the others."""
    if path.suffix.lower() == ".npz":
        return _read_archive(path, columns)
    if columns:
        raise ValueError(f"columns says nothing about {path}, which holds one array; leave it out")
    with _told(path, *_NUMPY):
        if mapped and path.stat().st_size >= LARGE:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if _is_usable(array):
                return {"train": array}, []
            _check_memory(str(path), array.nbytes)
            return {"train": np.array(array)}, []
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size, path.stat().st_size, str(path))
            file.seek(0)
            return {"train": np.lib.format.read_array(file, allow_pickle=False)}, []


def _read_archive(path: Path, columns: tuple[str, ...]) -> tuple[dict[SplitName, Array], list[str]]:
    with _told(path, *_NUMPY), path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        keys = list(content.files)
        if columns and (len(columns) > 1 or columns[0] not in keys):
            raise ValueError(f"{path}: columns gives one of the keys {', '.join(keys)}, got {', '.join(columns)}")
        chosen: dict[SplitName, str] = {"train": columns[0]} if columns else split_keys(keys, str(path))
        for key in chosen.values():
            info = content.zip.getinfo(key if key in content.zip.namelist() else f"{key}.npy")
            with content.zip.open(info) as member:
                _check_header(member, info.file_size, info.compress_size, f"{path} ({key})")
        return {split: content[key] for split, key in chosen.items()}, [key for key in keys if key not in chosen.values()]


def _check_header(file: IO[bytes], size: int, packed: int, name: str) -> None:
    """Compare what the header of an array claims with the bytes that there are, before memory is taken for it."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return
    reads = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reads(file)
    check_kind(dtype, name)
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed != held:
        raise ValueError(
            f"{name} cannot be read as .npy or .npz: it claims {claimed} bytes of values, shape {shape}, and holds {held}; save it anew"
        )
    check_unpacked(name, claimed, packed)
    _check_memory(name, claimed)


def _check_memory(name: str, size: int) -> None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and size > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(
            f"{name} has {size} bytes, the memory of this machine {memory}; save fewer examples, or as uint8 or uint16 in a .npy file,"
            " which is read in parts"
        )


_NUMPY = (
    ".npy or .npz of plain numbers",
    "save it anew with numpy.save or numpy.savez (pickled objects are refused, as loading them runs code)",
)
_HDF5 = "HDF5", "it may be cut short or of another kind"


@contextmanager
def _told(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Say of which file an error of the reader is; damaged bytes can raise anything."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(
            f"{path} claims more values than memory holds: {error}; save it anew, or check where it is from"
        ) from error
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise ValueError(str(error)) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as {kind}: {first}; {remedy}") from error


def _is_usable(array: Array) -> bool:
    """Whether batches can be cut out of the file directly."""
    return array.dtype.name in ("uint8", "uint16") and array.dtype.isnative and array.flags.c_contiguous


def _part(array: Array, path: Path, layout: str) -> Part:
    if not isinstance(array, np.memmap):
        return array
    return Mapped(array, hashlib.sha256(f"{digest_of(path)} {layout}".encode()).hexdigest())


@register.source("hdf5", options={"layout", "columns", "cache"}, endings=(".h5", ".hdf5"))
def read_hdf5(config: DataConfig) -> Raw:
    """Read data sets of an HDF5 file, channels first.

    Without ``columns``, the keys train, validation (valid, val) and test are the splits; a single data set is used
    whatever its key. ``columns`` can give a key (``group/name`` if it is nested): of one data set, or of one in each of
    the groups train, validation and test. Data sets of uint8 or uint16 from 256 MiB on are copied into the cache, a
    slice at a time; others are read whole.

    Raises:
        ValueError: the file is missing, damaged or not HDF5; there is no such key; or the data sets do not match.
    """
    import h5py

    path = config.path
    if not path.is_file():
        raise ValueError(f"expected an HDF5 file at {path}, got no such file; check the path")
    with _told(path, *_HDF5), h5py.File(path) as file:
        datasets = _datasets(file)
        chosen = _chosen(datasets, config.columns, path)
        found, _ = parts_by_key(chosen, str(path))
        ignored = sorted({*datasets} - {dataset.name.strip("/") for dataset in found.values()})
        for dataset in found.values():
            _check_dataset(dataset, f"{path} ({dataset.name.strip('/')})", config)
        _check_dtypes({split: str(dataset.dtype) for split, dataset in found.items()}, str(path))
        used = layout_of(found["train"].shape, config.layout, str(path))
        parts = {split: _hdf5_part(dataset, path, used, config) for split, dataset in found.items()}
        keys = label_keys(ignored, config.condition, list(found), str(path))
        labels = {split: {name: _label_column(datasets[key]) for name, key in each.items()} for split, each in keys.items()}
        ignored = [key for key in ignored if not any(key in each.values() for each in keys.values())]
    words = [f"axes read as {used}", *([f"ignored the data sets {', '.join(ignored)}"] if ignored else [])]
    return Raw(str(path), parts, [file_record(path)], words, clips=used in CLIPS, labels=labels)


def _label_column(dataset: Any) -> Array:
    """A data set of labels; its words as text."""
    import h5py

    return np.asarray(dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()])


def label_keys(
    keys: Sequence[str], wanted: Sequence[str], splits: Sequence[SplitName], name: str
) -> dict[SplitName, dict[str, str]]:
    """Choose the key of each label in each split: its name, or where there are splits, its name beside a word for the split.

    >>> label_keys(["y_train", "y_test", "note"], ["y"], ["train", "test"], "keras.npz")
    {'train': {'y': 'y_train'}, 'test': {'y': 'y_test'}}
    >>> label_keys(["labels"], ["labels:class"], ["train"], "a.npz")
    {'train': {'labels': 'labels'}}

    Raises:
        ValueError: there is no such key.
    """
    found: dict[SplitName, dict[str, str]] = {}
    for split in splits if wanted else ():
        words = [word for word, of in SPLIT_WORDS.items() if of == split]
        for text in wanted:
            plain, _ = split_name(text)
            likely = [f"{a}{sign}{b}" for word in words for a, b in ((plain, word), (word, plain)) for sign in "_-./"]
            likely = [*likely, plain] if len(splits) == 1 else likely
            key = next((key for key in likely if key in keys), None)
            if key is None:
                raise ValueError(
                    f"{name} ({split}) has no {plain} to condition on, such as {likely[0] if len(splits) > 1 else plain}; its other"
                    f" keys are {few(keys) or 'none'}"
                )
            found.setdefault(split, {})[plain] = key
    return found


def _datasets(file: Any) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}

    def note(name: str, thing: Any) -> None:
        if isinstance(thing, h5py.Dataset) and thing.shape is not None:
            found[name] = thing

    file.visititems(note)
    return found


def _chosen(datasets: Mapping[str, Any], columns: tuple[str, ...], path: Path) -> dict[str, Any]:
    if not columns:
        return dict(datasets)
    if len(columns) > 1:
        raise ValueError(f"{path}: columns gives one key of an HDF5 file, got {', '.join(columns)}; give one")
    key = columns[0].strip("/")
    if key in datasets:
        return {"train": datasets[key]}
    if nested := {word: datasets[f"{word}/{key}"] for word in SPLIT_WORDS if f"{word}/{key}" in datasets}:
        return nested
    raise ValueError(f"{path} has no data set {key}, only {', '.join(datasets) or 'none at all'}; give one of its keys")


def _check_dataset(dataset: Any, name: str, config: DataConfig) -> None:
    """Refuse data sets of which hardly anything was written, or more than is read whole."""
    check_kind(dataset.dtype, name)
    size, stored = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    if not (dataset.is_virtual or dataset.external):  # those are stored elsewhere
        check_unpacked(name, size, stored, "copy the examples that were written into a new file")
    if not _in_parts(dataset, config):
        _check_memory(name, size)


def _in_parts(dataset: Any, config: DataConfig) -> bool:
    return dataset.nbytes >= LARGE and dataset.dtype.name in ("uint8", "uint16") and config.standardise != "yes"


def _hdf5_part(dataset: Any, path: Path, layout: Layout, config: DataConfig) -> Part:
    name = f"{path} ({dataset.name.strip('/')})"
    whole = np.broadcast_to(np.zeros((), np.uint8), dataset.shape or ())  # has the shape; nothing is read
    shape = channels_first(whole, layout, name).shape
    if not _in_parts(dataset, config):
        return channels_first(np.asarray(dataset[()]), layout, name)
    rows = _Rows(path, dataset.name, layout, piece_of(dataset.nbytes // shape[0]))
    identity = {"file": file_stamp(path), "key": dataset.name, "layout": layout}
    names = [f"{dataset.name.strip('/')}[{i}]" for i in range(shape[0])]
    return Encoded(names, shape[1:], dataset.dtype.name, rows.decode, identity, path.resolve().parent)


class _Rows:
    """Reads a data set block by block; each thread keeps its current block."""

    def __init__(self, path: Path, key: str, layout: Layout, block: int) -> None:
        self._path, self._key, self._layout, self._block = path, key, layout, block
        self._lock = threading.Lock()
        self._kept = threading.local()

    def decode(self, i: int) -> Array:
        number, row = divmod(i, self._block)
        if self._kept.__dict__.get("number") != number:
            self._kept.block, self._kept.number = self._read(number), number
        example: Array = self._kept.block[row]
        return example

    def _read(self, number: int) -> Array:
        try:
            with self._lock:
                block = self._dataset[number * self._block : (number + 1) * self._block]
        except (OSError, RuntimeError) as error:
            raise UnreadableError(f"{type(error).__name__}: {error}") from error
        return channels_first(block, self._layout, str(self._path))

    @cached_property
    def _dataset(self) -> Any:
        import h5py

        file = h5py.File(self._path, rdcc_nbytes=_CHUNKS)
        weakref.finalize(self, file.close)
        return file[self._key]


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """Read grey images ``(N, H, W)`` from an IDX file, gzipped or not.

    Raises:
        ValueError: the file cannot be read, has no images, or has the wrong length.
    """
    content = _content(path)
    if len(content) < 16:
        raise ValueError(f"{path} needs an IDX header of 16 bytes, got {len(content)} bytes; fetch the file again")
    magic, *shape = struct.unpack(">IIII", content[:16])
    if magic != _MAGIC:
        raise ValueError(
            f"{path} needs the magic number {_MAGIC:#010x} of images, got {magic:#010x}; this is another kind of file"
        )
    expected = shape[0] * shape[1] * shape[2]
    if len(content) - 16 != expected:
        raise ValueError(
            f"{path} needs {expected} bytes for images {tuple(shape)}, got {len(content) - 16}; fetch the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(shape)


def read_labels(path: Path) -> npt.NDArray[np.uint8]:
    """Read labels ``(N,)`` from an IDX file, gzipped or not.

    Raises:
        ValueError: the file cannot be read, has no labels, or has the wrong length.
    """
    content = _content(path)
    magic, count = struct.unpack(">II", content[:8]) if len(content) >= 8 else (0, 0)
    if magic != _MAGIC_OF_LABELS or len(content) != 8 + count:
        raise ValueError(
            f"{path} needs the magic number {_MAGIC_OF_LABELS:#010x} of labels and a byte for each, got {magic:#010x} and"
            f" {len(content)} bytes; fetch the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=8)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        return b"".join(gunzipped(path)) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch the file again") from error


def arranged(arrays: Mapping[SplitName, Array], layout: Layout, name: str) -> tuple[dict[SplitName, Array], Layout]:
    """Bring the arrays of all splits into one order of axes, channels first.

    Returns:
        Views of the arrays, and the layout that they had.

    Raises:
        ValueError: their dtypes or numbers of axes differ, or the order of the axes is ambiguous.
    """
    _check_dtypes({split: str(array.dtype) for split, array in arrays.items()}, name)
    check_kind(arrays["train"].dtype, name)
    used = layout_of(arrays["train"].shape, layout, name)
    return {split: channels_first(array, used, f"{name} ({split})") for split, array in arrays.items()}, used


def _check_dtypes(dtypes: Mapping[SplitName, str], name: str) -> None:
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{name} needs one dtype for all splits, got {dict(dtypes)}; save them alike")


def parts_by_key(content: Mapping[str, _Content], name: str) -> tuple[dict[SplitName, _Content], list[str]]:
    """Assign arrays to splits by their keys; also return the keys that belong to no split.

    >>> parts_by_key({"train": 1, "val": 2, "labels": 3}, "a.npz")
    ({'train': 1, 'validation': 2}, ['labels'])

    Raises:
        ValueError: there is no training split, or a split has two arrays.
    """
    chosen = split_keys(list(content), name)
    return {split: content[key] for split, key in chosen.items()}, [key for key in content if key not in chosen.values()]


def split_keys(keys: Sequence[str], name: str) -> dict[SplitName, str]:
    """Choose the key of each split: a split's name, with a word for examples (``x_train``, ``test_images``) or without.

    Without splits, it is the only key, or the only one that is a word for examples (``imgs``, ``data``, ``arr_0``).

    >>> split_keys(["x_train", "y_train", "x_test", "y_test"], "keras.npz")
    {'train': 'x_train', 'test': 'x_test'}

    Raises:
        ValueError: there is no training split, or a split has two arrays.
    """
    if any(parts <= {key.rpartition("/")[2] for key in keys} for parts in _SPARSE):
        raise ValueError(
            f"{name} needs arrays, got the parts of a sparse matrix ({few(keys)}); save the array that scipy.sparse gives by toarray()"
        )
    found = [(split, key) for key in keys if (split := _split_of(key)) is not None]
    parts = dict(found)
    if len(parts) < len(found):
        raise ValueError(
            f"{name} needs one array for each split, got the keys {', '.join(keys)}; drop all but one name of each"
        )
    if not found:
        named = [key for key in keys if key.lower() in _EXAMPLES]
        if len(keys) == 1 or len(named) == 1:
            return {"train": (named or keys)[0]}
    if "train" not in parts:
        raise ValueError(
            f"{name} needs the key train (with validation and test, or split at random), or one array alone, got the keys "
            f"{few(keys) or 'of an empty archive'}; choose one with --columns, rename them, or if each holds one example, cut or pad"
            " these to one length and save them as one array (numpy.stack)"
        )
    return {split: parts[split] for split in SPLITS if split in parts}


def _split_of(key: str) -> SplitName | None:
    """The split that a key names, perhaps with a word for examples before or after it."""
    if key in SPLIT_WORDS:
        return SPLIT_WORDS[key]
    words = re.split(r"[_\-./ ]+", key.lower())
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    return splits[0] if len(splits) == 1 and len(words) == 2 and any(word in _EXAMPLES for word in words) else None


def layout_of(shape: tuple[int, ...], layout: Layout, name: str) -> Layout:
    """Return the given layout; for auto, derive it from the shape.

    >>> layout_of((100, 3, 32, 32), "auto", "images")
    'n-c-h-w'

    Raises:
        ValueError: the shape allows no layout, or several.
    """
    if layout != "auto":
        return layout
    if len(shape) == 2:
        return "n-c"
    if len(shape) == 3:
        return _of_three_axes(shape, name)
    if len(shape) == 1:
        raise ValueError(
            f"{name} needs 2 to 5 axes, examples first, got shape {shape}; save array[:, None] for examples of one value each, or"
            " array.reshape(-1, 50) for pieces of one series, 50 values long, say (--layout n-t)"
        )
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
            + (f", or for volumes --layout {before}, whose channels are then the {shape[1]} slices" if len(shape) == 4 else "")
        )
    return before if first else after


def _of_three_axes(shape: tuple[int, ...], name: str) -> Layout:
    """Pictures, or series of a few channels, as no picture has so few rows.

    Raises:
        ValueError: the channels are last, which could be meant as slim pictures as well.

    >>> _of_three_axes((100, 28, 28), "x.npy"), _of_three_axes((100, 3, 64), "x.npy")
    ('n-h-w', 'n-c-t')
    """
    rows, columns = shape[1:]
    if rows <= FEW < LONG <= columns:
        return "n-c-t"
    if 1 < columns <= FEW < LONG <= rows:
        raise ValueError(
            f"{name} has shape {shape}: for series of {columns} channels save array.swapaxes(1, 2); for pictures of {columns} columns"
            " give --layout n-h-w"
        )
    return "n-h-w"


def layout_like(shape: tuple[int, ...], example: tuple[int, ...], clips: bool) -> Layout:
    """Find the layout that gives examples, or frames of clips, of this shape ``(C, *space)``; auto if none does.

    >>> layout_like((100, 32, 32, 3), (3, 32, 32), clips=False), layout_like((100, 6, 5), (6, 5), clips=False)
    ('n-h-w-c', 'n-c-t')
    """
    nothing = np.broadcast_to(np.zeros((), np.uint8), shape)
    for layout in sorted(_AXES, key=lambda name: "-c-" not in name):  # channels first where both would do
        if len(shape) == _AXES[layout] and (layout in CLIPS) == clips:
            if channels_first(nothing, layout, "").shape[2 if clips else 1 :] == example:
                return layout
    return "auto"


def channels_first(array: Array, layout: Layout, name: str) -> Array:
    """View an array in the order ``(N, C, *space)``, or ``(N, T, C, H, W)`` for clips.

    >>> channels_first(np.zeros((5, 8, 8, 3)), "n-h-w-c", "rgb").shape
    (5, 3, 8, 8)
    >>> channels_first(np.zeros((5, 9)), "n-t", "series").shape
    (5, 1, 9)
    >>> channels_first(np.zeros((5, 9, 8, 8)), "n-t-h-w", "clips").shape
    (5, 9, 1, 8, 8)

    Raises:
        ValueError: the array has another number of axes, or is empty.
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
