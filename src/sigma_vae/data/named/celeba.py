"""CelebA: aligned faces, 178×218 (Liu, Luo, Wang & Tang 2015, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)."""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from sigma_vae.config import DataConfig
from sigma_vae.data.archives import DAMAGED, Container, Folder, container
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
_ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
_FILES = f"{_PICTURES}.zip or the folder {_PICTURES} that it holds, with list_eval_partition.txt (or .csv)"
_CROP, _SIZE = 148, 64


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
    return read_official(official, config, partial(_in_folder, official=official, config=config))


def _in_folder(folder: Path, official: Official, config: DataConfig) -> Raw | None:
    chosen: PicturePlan = official.plan(config.images)
    pictures, partition = _pictures(folder), find(folder, *_PARTITION_FILES)
    if pictures is None and partition is None:
        return None
    if pictures is None or partition is None:
        missing = _PICTURES if pictures is None else _PARTITION_FILES[0]
        raise ValueError(f"celeba needs {_FILES} in {folder}, got no {missing}; put both there")
    names = _splits(partition)
    check_counts(official, {split: len(part) for split, part in names.items()}, str(partition))
    members = {PurePosixPath(name).name: name for name in pictures.names if name.endswith(".jpg")}
    if len(members) != sum(_COUNTS.values()):
        raise ValueError(
            f"{pictures.path} needs {sum(_COUNTS.values())} pictures, got {len(members)}; take the official files, whole"
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
    inner = find(folder, f"{_PICTURES}/{_PICTURES}", _PICTURES)  # Kaggle's copy has a folder within the folder
    path = inner if inner is not None and inner.is_dir() else find(folder, f"{_PICTURES}.zip")
    return None if path is None else container(path, folder)


def _stamp_and_record(pictures: Container, names: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return values that change when a picture does, and the origin of the pictures for the record of a run."""
    if not isinstance(pictures, Folder):
        return file_stamp(pictures.path), file_record(pictures.path)
    digest = hashlib.sha256(repr(pictures.stamp(names)).encode()).hexdigest()
    return [pictures.path.name, digest], {"path": str(pictures.path.resolve()), "count": len(names)}


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
