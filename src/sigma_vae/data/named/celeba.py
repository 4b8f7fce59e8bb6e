"""CelebA (Liu, Luo, Wang & Tang 2015, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html): aligned faces, 178×218 JPEGs."""

import hashlib
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_record, file_stamp
from sigma_vae.data.hub import HubPlace
from sigma_vae.data.levels import Array
from sigma_vae.data.named.official import Official, check_counts, find, read_official
from sigma_vae.data.pictures import PicturePlan
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.data.stores import Encoded, UnreadableError
from sigma_vae.registry import register

__all__ = ["read_celeba"]

_COUNTS: dict[SplitName, int] = {"train": 162770, "validation": 19867, "test": 19962}
_PARTITIONS: dict[str, SplitName] = {"0": "train", "1": "validation", "2": "test"}
_PARTITION_FILES = ("list_eval_partition.txt", "list_eval_partition.csv")
_PICTURES = "img_align_celeba"
_FILES = f"{_PICTURES}.zip or the folder {_PICTURES} that it holds, with list_eval_partition.txt (or .csv)"
_CROP, _SIZE = 148, 64


class _Files(NamedTuple):
    """The files of the pictures, in a folder or a zip."""

    path: Path
    total: int
    read: Callable[[str], bytes]
    stamp: list[Any]
    """Plain values that change when one of the files does."""


@register.source("celeba", options={"root", "cache", "crop", "size"})
def read_celeba(config: DataConfig) -> Raw:
    """Read the official 162 770 train, 19 867 validation and 19 962 test pictures of CelebA.

    They are cropped to the central square of ``crop`` pixels (default 148) and resized to ``size`` (default 64). Both
    change every measured number. Work on VAEs mostly crops 148; ``crop=128`` is rows 45 to 172 and columns 25 to 152 of
    Dai & Wipf (2019).

    Raises:
        ValueError: the files are missing, incomplete, damaged, or not the published ones.
    """
    images = replace(config.images, crop=config.images.crop or _CROP, size=config.images.size or _SIZE)
    config = replace(config, images=images)
    place = HubPlace("flwrlabs/celeba", "img_align+identity+attr", "image")
    official = Official("celeba", _FILES, _COUNTS, (178, 218, "RGB"), place)
    return read_official(official, config, partial(_in_folder, official=official, chosen=official.plan(images)))


def _in_folder(folder: Path, official: Official, chosen: PicturePlan) -> Raw | None:
    pictures, partition = _pictures(folder), find(folder, *_PARTITION_FILES)
    if pictures is None and partition is None:
        return None
    if pictures is None or partition is None:
        missing = _PICTURES if pictures is None else _PARTITION_FILES[0]
        raise ValueError(f"celeba needs {_FILES} in {folder}, got no {missing}; put both there")
    names = _splits(partition)
    check_counts(official, {split: len(part) for split, part in names.items()}, str(partition))
    if pictures.total != sum(_COUNTS.values()):
        raise ValueError(
            f"{pictures.path} needs {sum(_COUNTS.values())} pictures, got {pictures.total}; take the official files, whole"
        )
    parts = {
        split: Encoded(
            part,
            chosen.shape,
            chosen.dtype,
            _decoder(part, pictures, official, chosen),
            {"files": [pictures.stamp, file_stamp(partition)], "split": split, "plan": asdict(chosen)},
            folder,
        )
        for split, part in names.items()
    }
    words = ["official train, validation and test pictures", *chosen.words]
    return Raw("celeba", parts, [_record(pictures), file_record(partition)], words, levels=256)


def _pictures(folder: Path) -> _Files | None:
    inner = find(folder, f"{_PICTURES}/{_PICTURES}", _PICTURES)  # Kaggle's copy has a folder within the folder
    if inner is not None and inner.is_dir():
        return _unzipped(inner)
    archive = find(folder, f"{_PICTURES}.zip")
    return None if archive is None else _zipped(archive)


def _unzipped(folder: Path) -> _Files:
    stamps = [file_stamp(path) for path in sorted(folder.glob("*.jpg"))]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    return _Files(folder, len(stamps), lambda name: (folder / name).read_bytes(), [folder.name, digest])


def _zipped(path: Path) -> _Files:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a zip: {error}; fetch the file again") from error
    members = {name.rsplit("/", 1)[-1]: name for name in archive.namelist() if name.endswith(".jpg") and "__MACOSX" not in name}
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock:
            return archive.read(members[name])

    return _Files(path, len(members), read, file_stamp(path))


def _splits(partition: Path) -> dict[SplitName, list[str]]:
    """Read the names of each split's files, in order, from lines of a file name and 0, 1 or 2."""
    splits: dict[SplitName, list[str]] = {name: [] for name in _COUNTS}
    lines = partition.read_text(encoding="utf-8", errors="replace").splitlines()
    header = partition.suffix == ".csv"
    for number, line in enumerate(lines[header:], 1 + header):
        words = line.replace(",", " ").split()
        if words and (len(words) != 2 or words[1] not in _PARTITIONS):
            raise ValueError(f"{partition} needs lines like '000001.jpg 0', with 0, 1 or 2, got {line!r} as line {number}")
        if words:
            splits[_PARTITIONS[words[1]]].append(words[0])
    return splits


def _decoder(names: list[str], files: _Files, official: Official, chosen: PicturePlan) -> Callable[[int], Array]:
    def decode(i: int) -> Array:
        try:
            content = files.read(names[i])
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UnreadableError(f"{names[i]}: {type(error).__name__}: {error}") from error
        return official.decode(chosen, content)

    return decode


def _record(files: _Files) -> dict[str, object]:
    if files.path.is_file():
        return file_record(files.path)
    return {"path": str(files.path.resolve()), "count": files.total}
