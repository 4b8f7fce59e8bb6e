"""Folders with one array per file (.npy and .npz), and files of other programs."""

import hashlib
import math
import os
import threading
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, final

import numpy as np

from sigma_vae.config import DataConfig, Layout
from sigma_vae.data.archives import LARGEST_MEMBER, Folder
from sigma_vae.data.arrays import CLIPS, arranged, channels_first, layout_of, read_arrays, split_keys
from sigma_vae.data.cache import file_record, file_stamp, remembered
from sigma_vae.data.pictures import (
    begins_like_picture,
    class_folder,
    class_labels,
    folder_words,
    has_no_ending,
    is_hidden,
    listed,
    picture_endings,
    split_by_folder,
)
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.data.stores import Array, Encoded, UnreadableError
from sigma_vae.data.videos import ENDINGS as VIDEOS
from sigma_vae.data.videos import by_numbers
from sigma_vae.registry import register

ARRAYS = (".npy", ".npz", ".mat", ".nii", ".nii.gz", ".dcm", ".dicom", ".wav", ".flac", ".ogg")
"""Endings of files that can hold an example each."""
FILE_OPTIONS = frozenset({"cache", "unreadable"})
"""Options of the config that decide how such files are read."""

_MOST_COMPRESSED = 32
"""Bytes of a large array for each byte of its file."""

Shape = tuple[tuple[int, ...], str]
"""Shape ``(examples, ...)`` and dtype of a file's array."""


@dataclass(frozen=True)
class FileKind:
    """How files of one kind are read.

    Args:
        endings: their endings, in lower case.
        read: returns a file's examples ``(n, ...)``.
        shape: returns their shape and dtype without reading them; default: by reading them.
        layout: order of the axes once the examples of all files are one array; auto derives it from the shape.
        words: what is done to the examples.
        unread: lists the names of a file's other arrays.
    """

    endings: tuple[str, ...]
    read: Callable[[Path], Array]
    shape: Callable[[Path], Shape] | None = None
    layout: Layout = "auto"
    words: tuple[str, ...] = ()
    unread: Callable[[Path], list[str]] = lambda path: []


@dataclass(frozen=True)
class _File:
    """A file's path, its name within the folder, and the folder that names its split."""

    path: Path
    label: str
    word: str


def folder_of(*endings: str) -> Callable[[Path, DataConfig], bool]:
    """Return whether a path is a folder whose files with arrays are mostly of one kind, without pictures and videos."""
    return lambda path, config: path.is_dir() and _main_ending(path) in endings


def _main_ending(path: Path) -> str:
    found = Counter[str]()
    for file in _files_below(str(path), frozenset()):
        ending = _ending(file)
        if ending in VIDEOS or ending in picture_endings():
            return ""
        found[ending] += ending in ARRAYS
    return max(sorted(found), key=found.__getitem__, default="")


def _ending(file: str) -> str:
    """A file's ending, in lower case; without one, that of the pictures or DICOM images that its first bytes tell of."""
    if not has_no_ending(file):
        return next((ending for ending in ARRAYS if file.lower().endswith(ending)), os.path.splitext(file)[1].lower())
    with suppress(OSError), open(file, "rb") as content:
        head = content.read(132)
        return ".png" if begins_like_picture(head) else ".dcm" if head[128:] == b"DICM" else ""
    return ""


def _files_below(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Yield files one by one: the first picture of a large folder ends the search."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not is_hidden(entry.name):
                yield from _files_below(entry.path, above | {real})
            elif entry.is_file() and not entry.name.startswith("."):
                yield entry.path


def needed(module: str, path: Path, otherwise: str = "") -> Any:
    """Import a package that reads a kind of file.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{path} is read by the package {package}: pip install {package}{otherwise}") from error


def check_size(shape: Sequence[int], dtype: np.dtype[Any], path: Path) -> None:
    """Refuse an array that is no number, or that its file only claims to hold.

    Raises:
        UnreadableError: it has no numbers, or more than 1 GiB and than compression explains.
    """
    if dtype.kind not in "biufc":
        raise UnreadableError(f"it needs plain numbers, got dtype {dtype}; save it as such")
    size, most = math.prod(shape) * dtype.itemsize, max(LARGEST_MEMBER, _MOST_COMPRESSED * path.stat().st_size)
    if size > most:
        raise UnreadableError(f"it claims {size} bytes for an array of shape {tuple(shape)}, more than such a file can hold")


def examples(config: DataConfig, kind: FileKind) -> Raw:
    """Read a file, or all files of one kind below a folder, as examples of one shape, in the order of their numbers.

    Folders train, validation (valid, val) and test are the splits. The examples are read once, into a cache.

    Raises:
        ValueError: some files cannot be read, and ``unreadable`` does not allow that; or their shapes or dtypes differ.
    """
    path = config.path
    if not path.exists():
        raise ValueError(
            f"expected a file or a folder of files ({', '.join(kind.endings)}) at {path}, got none; check the path"
        )
    files, others = _files(path, kind.endings)
    stamps = [[path.resolve().name, file.label, *_stamp(file.path)] for file in files]
    read, broken = _readable(files, stamps, config, kind)
    shape, dtype = _common(read, path)
    layout = _layout((sum(count for _, (count, *_), _ in read), *shape), kind, path)
    identity = {"files": stamps, "layout": layout, "columns": config.columns, "reader": "files-1"}
    splits = split_by_folder([file for file, *_ in read], str(path))
    counts = {file: count for file, (count, *_), _ in read}
    parts = {
        split: _encoded({file: counts[file] for file in own}, _Examples(kind.read, layout, shape), dtype, config, identity)
        for split, own in splits.items()
    }
    words = [
        f"{'each file is an example' if set(counts.values()) == {1} else 'files of several examples'}, axes read as {layout}",
        *kind.words,
        *([f"ignored the arrays {', '.join(unread)} of each file"] if (unread := kind.unread(read[0][0].path)) else []),
        *([f"left out {len(broken)} of {len(files)} as unreadable ({', '.join(broken[:5])})"] if broken else []),
        *([f"ignored other files: {listed(others)}"] if others else []),
    ]
    size = {"path": str(path.resolve()), "count": len(files), "bytes": sum(file.path.stat().st_size for file in files)}
    classes = {
        split: [class_folder(file.label, file.word) for file in own for _ in range(counts[file])]
        for split, own in splits.items()
    }
    origin = [size if path.is_dir() else file_record(path)]
    return Raw(str(path), parts, origin, words, clips=layout in CLIPS, labels=class_labels(classes))


def _stamp(path: Path) -> list[Any]:
    try:
        return file_stamp(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); mend or remove this file or link") from error


def _files(path: Path, endings: tuple[str, ...]) -> tuple[list[_File], Counter[str]]:
    if not path.is_dir():
        return [_File(path, path.name, "")], Counter()
    everything = Folder(path).names
    names = sorted((name for name in everything if _ending(str(path / name)) in endings), key=by_numbers)
    others = Counter(os.path.splitext(name)[1] or name for name in {*everything} - {*names})
    return [_File(path / name, name, word) for name, word in zip(names, folder_words(names), strict=True)], others


def _readable(
    files: list[_File], stamps: list[Any], config: DataConfig, kind: FileKind
) -> tuple[list[tuple[_File, list[int], str]], list[str]]:
    """Find shape and dtype of each file's examples, and list the unreadable files."""

    def look(file: _File) -> list[Any] | str:
        try:
            shape, dtype = kind.shape(file.path) if kind.shape else _shape_of(kind.read(file.path), file.path)
        except UnreadableError as error:
            return str(error)
        return [list(shape), dtype]

    def look_at_all() -> list[list[Any] | str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(look, files))

    identity = {"shapes of": stamps, "columns": config.columns, "reader": "files-1"}
    seen = list(zip(files, remembered(config.path.resolve().parent, config.cache, identity, look_at_all), strict=True))
    broken = [(file.label, what) for file, what in seen if isinstance(what, str)]
    if len(broken) == len(files):
        raise ValueError(f"{config.path}: no file can be read, the first: {broken[0][0]}: {broken[0][1]}")
    if broken and config.images.unreadable == "refuse":
        labels = ", ".join(label for label, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise ValueError(
            f"{config.path}: {len(broken)} of {len(files)} files cannot be read ({labels}; the first: {broken[0][1]}); repair or"
            " remove them, or leave them out: --unreadable skip"
        )
    return [(file, *what) for file, what in seen if not isinstance(what, str)], [label for label, _ in broken]


@contextmanager
def damaged() -> Iterator[None]:
    """Turn the errors of a reader into :class:`UnreadableError`: damaged bytes can raise anything."""
    try:
        yield
    except UnreadableError:
        raise
    except Exception as error:
        what = str(error) or "the file is cut short or empty"
        raise UnreadableError(what if type(error) is ValueError else f"{type(error).__name__}: {what}") from error


def _shape_of(array: Array, path: Path) -> Shape:
    check_size(array.shape, array.dtype, path)
    return array.shape, array.dtype.name


def _common(read: list[tuple[_File, list[int], str]], path: Path) -> tuple[tuple[int, ...], str]:
    """The shape and dtype that all examples have."""
    shapes = Counter("×".join(map(str, shape[1:])) or "one number" for _, shape, _ in read)
    dtypes = Counter(dtype for *_, dtype in read)
    if len(shapes) > 1:
        raise ValueError(
            f"{path}: a file holds one example, and examples need one shape, got {len(shapes)}: {listed(shapes)}; cut or pad them to"
            " one shape, or join files of several examples: numpy.save('all.npy', numpy.concatenate(arrays))"
        )
    if len(dtypes) > 1:
        raise ValueError(
            f"{path}: files need one dtype, got {listed(dtypes)}; save them alike: numpy.save(file, array.astype('float32'))"
        )
    return tuple(read[0][1][1:]), read[0][2]


def _layout(shape: tuple[int, ...], kind: FileKind, path: Path) -> Layout:
    try:
        return layout_of(shape, kind.layout, str(path))
    except ValueError as error:
        if kind.layout != "auto" or len(shape) not in (4, 5):
            raise
        raise ValueError(
            f"{error}; if these are volumes, save each slice as a file, as no network here reads volumes"
        ) from error


@final
class _Examples:
    """Reads files; each thread keeps its current one."""

    def __init__(self, read: Callable[[Path], Array], layout: Layout, shape: tuple[int, ...]) -> None:
        self._read, self._layout, self._shape = read, layout, shape
        self._kept = threading.local()

    def shape(self) -> tuple[int, ...]:
        """Shape of an example, channels first."""
        nothing = np.broadcast_to(np.zeros((), np.uint8), (1, *self._shape))
        return channels_first(nothing, self._layout, "an example").shape[1:]

    def decode(self, path: Path, number: int) -> Array:
        if self._kept.__dict__.get("path") != path:
            self._kept.array, self._kept.path = self._read(path), path
        array: Array = self._kept.array
        if array.shape[1:] != self._shape or number >= len(array):
            raise UnreadableError(f"it needs examples of shape {self._shape}, as before, got {array.shape[1:]}")
        example: Array = channels_first(array[number : number + 1], self._layout, str(path))[0]
        return example


def _encoded(counts: dict[_File, int], reader: _Examples, dtype: str, config: DataConfig, identity: dict[str, Any]) -> Encoded:
    rows = [(file, number) for file, count in counts.items() for number in range(count)]
    several = max(counts.values()) > 1
    names = [f"{file.label}[{number}]" if several else file.label for file, number in rows]
    place = {file: number for number, file in enumerate(counts)}
    return Encoded(
        names,
        reader.shape(),
        _stored(np.dtype(dtype), config.standardise == "yes"),
        decode=lambda i: reader.decode(rows[i][0].path, rows[i][1]),
        identity=identity | {"names": hashlib.sha256("\n".join(names).encode()).hexdigest()},
        home=config.path.resolve().parent,
        skip_unreadable=config.images.unreadable == "skip",
        videos=[place[file] for file, _ in rows] if several else None,
    )


def _stored(dtype: np.dtype[Any], real: bool) -> str:
    """The dtype in the cache: one that tensors have, and that keeps the values."""
    if dtype.kind in "iu" and dtype.itemsize >= 4:
        return "float64" if real else "int64"
    return {"bool": "uint8", "longdouble": "float64", "float128": "float64"}.get(dtype.name, dtype.name)


@register.source("array-files", options=FILE_OPTIONS | {"layout", "columns"}, reads=folder_of(".npy", ".npz"), rank=2)
def read_array_files(config: DataConfig) -> Raw:
    """Read a folder of .npy and .npz files, one example each; or one file per split: train.npy, test.npy.

    Of .npz files, ``columns`` can give the key of the array.

    Raises:
        ValueError: as for :func:`examples`.
    """
    if whole := files_of_splits(config, (".npy", ".npz"), read_arrays):
        return whole
    read, shape = partial(_read, columns=config.columns), partial(_shape, columns=config.columns)
    unread = partial(_unread, columns=config.columns)
    return examples(config, FileKind((".npy", ".npz"), read, shape, config.layout, unread=unread))


def files_of_splits(config: DataConfig, endings: tuple[str, ...], read: Callable[[DataConfig], Raw]) -> Raw | None:
    """Read a folder whose files are named as splits are (train.npy, x_test.npy), each with many examples; else None."""
    found = {file.stem: file for file in sorted(config.path.iterdir()) if file.suffix.lower() in endings}
    try:
        chosen = split_keys(list(found), str(config.path))
    except ValueError:
        return None
    if len(chosen) < 2:
        return None
    raws = {split: read(replace(config, source=str(found[key]), root=None)) for split, key in chosen.items()}
    files = [file for raw in raws.values() for file in raw.files]
    unread = {file.name for file in config.path.iterdir()} - {Path(file["path"]).name for file in files}
    words = dict.fromkeys(word for raw in raws.values() for word in raw.preprocessing)
    ignored = [f"ignored other files: {', '.join(sorted(unread))}"] if unread else []
    parts = {split: raw.parts["train"] for split, raw in raws.items()}
    return Raw(str(config.path), parts, files, [*words, *ignored], clips=raws["train"].clips)


def _read(path: Path, columns: tuple[str, ...]) -> Array:
    _shape(path, columns)  # refuses what the header only claims
    with damaged(), path.open("rb") as file:
        content: Any = np.load(file, allow_pickle=False)
        if path.suffix.lower() == ".npz":
            content = content[key_of_array(content.files, columns, path)]
        return np.asarray(content)[np.newaxis]


def _shape(path: Path, columns: tuple[str, ...]) -> Shape:
    """Shape and dtype by the header alone, which may claim any size."""
    with damaged(), path.open("rb") as file:
        if path.suffix.lower() == ".npy":
            shape, dtype = _header(file)
            left = path.stat().st_size - file.tell()
        else:
            content = np.load(file, allow_pickle=False)
            member = content.zip.getinfo(key_of_array(content.files, columns, path) + ".npy")
            with content.zip.open(member) as array:
                shape, dtype = _header(array)
                left = member.file_size - array.tell()
    check_size(shape, dtype, path)
    if left != math.prod(shape) * dtype.itemsize:
        raise UnreadableError(f"it claims an array of shape {shape} and dtype {dtype}, and has {left} bytes")
    return (1, *shape), dtype.name


def _unread(path: Path, columns: tuple[str, ...]) -> list[str]:
    if path.suffix.lower() == ".npy":
        return []
    with path.open("rb") as file:
        keys = list(np.load(file, allow_pickle=False).files)
    return [key for key in keys if key != key_of_array(keys, columns, path)]


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    return tuple(shape), dtype


def key_of_array(keys: list[str], columns: tuple[str, ...], path: Path) -> str:
    """Choose a file's array: the one that ``columns`` gives, else by the words for examples.

    Raises:
        ValueError: there is no such array, or the keys do not tell.
    """
    if columns and (len(columns) > 1 or columns[0] not in keys):
        raise UnreadableError(f"columns gives one of the keys {', '.join(keys)}, got {', '.join(columns)}")
    return columns[0] if columns else str(split_keys(keys, path.name)["train"])


# -- files of other programs: MATLAB, NIfTI and DICOM scans, and sound -------------------------------------------------

_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".dicom")
_SOUND = (".wav", ".flac", ".ogg")
_HDF5 = b"\x89HDF\r\n\x1a\n"
"""First bytes at 512 of MATLAB 7.3 files, which are HDF5."""
_NUMBERS = {kind: kind for kind in "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()}
_NUMBERS |= {"double": "float64", "single": "float32", "logical": "bool"}


@register.source("matlab", options=FILE_OPTIONS | {"layout", "columns"}, endings=(".mat",), reads=folder_of(".mat"), rank=2)
def read_matlab(config: DataConfig) -> Raw:
    """Read the arrays of a MATLAB file, chosen as in .npz files; or a folder of such files, one example each.

    An array ``(rows, columns[, colours], examples)``, as MATLAB stacks images, is recognised by its square images.

    Raises:
        ValueError: the file cannot be read, or its arrays do not match.
    """
    path = config.path
    if path.is_dir():
        unread = partial(_unread_of_matlab, columns=config.columns)
        return files_of_splits(config, (".mat",), read_matlab) or examples(
            config,
            FileKind((".mat",), partial(_example_of_matlab, columns=config.columns), layout=config.layout, unread=unread),
        )
    try:
        found = _matlab_arrays(path)
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    chosen = _chosen(found, config.columns, path)
    try:
        arrays: dict[SplitName, Array] = {split: _matlab_array(path, key) for split, key in chosen.items()}
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    last = [split for split, array in arrays.items() if _has_examples_last(array.shape)]
    ordered, used = arranged(
        {s: np.moveaxis(a, -1, 0) if s in last else a for s, a in arrays.items()}, config.layout, str(path)
    )
    ignored = ", ".join(key for key in found if key not in chosen.values())
    words = [
        f"axes read as {used}",
        *(["examples along the last axis, as MATLAB stacks images"] if last else []),
        *([f"ignored the arrays {ignored}"] if ignored else []),
    ]
    return Raw(str(path), ordered, [file_record(path)], words, clips=used in CLIPS)


def _has_examples_last(shape: tuple[int, ...]) -> bool:
    """Whether an array is a stack of square images along its last axis.

    >>> _has_examples_last((32, 32, 3, 500)), _has_examples_last((28, 28, 90)), _has_examples_last((90, 28, 28))
    (True, True, False)
    """
    square = len(shape) in (3, 4) and shape[0] == shape[1] != shape[-1]
    return square and (len(shape) == 3 or shape[2] in (1, 3, 4)) and shape[-1] not in (1, 3, 4)


def _example_of_matlab(path: Path, columns: tuple[str, ...]) -> Array:
    with damaged():
        array = _matlab_array(path, _chosen(_matlab_arrays(path), columns, path)["train"])
    return array.reshape(1, -1) if 1 in array.shape and array.ndim == 2 else array[np.newaxis]


def _unread_of_matlab(path: Path, columns: tuple[str, ...]) -> list[str]:
    found = _matlab_arrays(path)
    return [key for key in found if key not in _chosen(found, columns, path).values()]


def _chosen(found: Mapping[str, Shape], columns: tuple[str, ...], path: Path) -> dict[SplitName, str]:
    keys = [key for key, (shape, _) in found.items() if max(shape, default=1) > 1]  # MATLAB's numbers are arrays, too
    return {"train": key_of_array(keys, columns, path)} if columns else split_keys(keys, str(path))


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return _HDF5 in file.read(1024)


def _matlab_arrays(path: Path) -> dict[str, Shape]:
    """Shape and dtype of a file's arrays of numbers."""
    with damaged():
        if _is_hdf5(path):
            import h5py

            with h5py.File(path) as file:
                sets = {key: each for key, each in file.items() if isinstance(each, h5py.Dataset) and each.dtype.kind in "biuf"}
                return {key: (each.shape[::-1], each.dtype.name) for key, each in sets.items()}
        from scipy.io import whosmat

        return {key: (shape, _NUMBERS[kind]) for key, shape, kind in whosmat(path) if kind in _NUMBERS}


def _matlab_array(path: Path, key: str) -> Array:
    shape, dtype = _matlab_arrays(path)[key]
    check_size(shape, np.dtype(dtype), path)
    with damaged():
        if _is_hdf5(path):
            import h5py

            with h5py.File(path) as file:
                return np.asarray(file[key][()]).T  # HDF5 lists MATLAB's axes from the last one
        from scipy.io import loadmat

        return np.asarray(loadmat(path, variable_names=[key], mat_dtype=True)[key], dtype)


@register.source("nifti", options=FILE_OPTIONS, endings=_NIFTI, reads=folder_of(*_NIFTI), rank=2)
def read_nifti(config: DataConfig) -> Raw:
    """Read NIfTI scans, a file or a folder of them: each slice along the third axis is an example.

    Raises:
        ValueError: nibabel is not installed, a file is damaged, or slices differ in shape.
    """
    nibabel = needed("nibabel", config.path)
    words = ("each slice of a scan along its third axis is an example, as no network here reads volumes",)
    return examples(config, FileKind(_NIFTI, partial(_slices, nibabel), layout="n-h-w", words=words))


def _slices(nibabel: Any, path: Path) -> Array:
    with damaged():
        image = nibabel.load(path)
        check_size(image.shape, image.get_data_dtype(), path)
        scan = np.asanyarray(image.dataobj)
        while scan.ndim < 3:
            scan = scan[..., np.newaxis]
        return np.ascontiguousarray(scan.reshape(*scan.shape[:2], -1).transpose(2, 1, 0))


@register.source("dicom", options=FILE_OPTIONS, endings=_DICOM, reads=folder_of(*_DICOM), rank=2)
def read_dicom(config: DataConfig) -> Raw:
    """Read DICOM images, a file or a folder of them, as their stored values; each frame of a file is an example.

    Raises:
        ValueError: pydicom is not installed, a file is damaged, or images differ in shape.
    """
    pydicom = needed("pydicom", config.path, ", or make pictures of them: magick mogrify -format png *.dcm")
    words = ("stored values, without rescaling by slope and intercept",)
    return examples(config, FileKind(_DICOM, partial(_frames, pydicom), layout="n-h-w-c", words=words))


def _frames(pydicom: Any, path: Path) -> Array:
    with damaged():
        image = pydicom.dcmread(path)
        several, colours = int(image.get("NumberOfFrames", 1)), int(image.get("SamplesPerPixel", 1))
        return np.asarray(image.pixel_array).reshape(several, image.Rows, image.Columns, colours)


@register.source("sound", options=FILE_OPTIONS, endings=_SOUND, reads=folder_of(*_SOUND), rank=2)
def read_sound(config: DataConfig) -> Raw:
    """Read sound files of one length, an example each, as series with a channel for each microphone.

    Samples of 8 and 16 bits are levels, with silence in the middle; others are real values in [−1, 1].

    Raises:
        ValueError: a file is damaged, or needs soundfile; or lengths differ.
    """
    return examples(config, FileKind(_SOUND, _sound, layout="n-c-t", words=("samples of 16 bits as levels, silence at 32768",)))


def _sound(path: Path) -> Array:
    with damaged(), path.open("rb") as file:
        try:
            content = wave.open(file)
        except (wave.Error, EOFError) as error:
            if path.suffix.lower() == ".wav" and "unknown format" not in str(error):
                raise
        else:
            return _samples(content)
    convert = f", or convert it: ffmpeg -i {quote(path.name)} -c:a pcm_s16le {quote(path.stem + '-16.wav')}"
    soundfile = needed("soundfile", path, convert)
    with damaged():
        deep = "int16" if soundfile.info(path).subtype == "PCM_16" else "float32"
        samples, _ = soundfile.read(path, dtype=deep, always_2d=True)
        return np.asarray(_levels(samples) if deep == "int16" else samples).T[np.newaxis]


def _samples(content: wave.Wave_read) -> Array:
    channels, width, count = content.getnchannels(), content.getsampwidth(), content.getnframes()
    read = content.readframes(count)
    if len(read) != channels * width * count:
        raise UnreadableError(f"it is cut off: it has {len(read)} of {channels * width * count} bytes")
    return _pcm(read, width).reshape(1, -1, channels).transpose(0, 2, 1)


def _pcm(content: bytes, width: int) -> Array:
    """Samples of 1 to 4 bytes each, as levels where they are at most 16 bits."""
    if width == 1:
        return np.frombuffer(content, np.uint8)
    if width == 2:
        return _levels(np.frombuffer(content, "<i2"))
    whole = np.zeros((len(content) // width, 4), np.uint8)
    whole[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return whole.view("<i4")[:, 0] / (2.0**31)


def _levels(samples: Array) -> Array:
    return (samples.astype(np.int32) + 2**15).astype(np.uint16)
