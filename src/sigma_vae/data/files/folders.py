"""The user's own pictures: folders, zip and tar archives, and shards of them."""

import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import FOLDER
from sigma_vae.data.files.arrays import path_of
from sigma_vae.data.files.containers import ARCHIVES, DAMAGED, Container, Folder, container
from sigma_vae.data.files.pictures import PicturePlan, plan, probe
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import Encoded, Raw, UnreadableError, file_record
from sigma_vae.data.remember import remembered
from sigma_vae.data.splits import SPLIT_WORDS, SplitName

__all__ = ["PICTURES", "is_archive", "is_glob", "read_pictures"]

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".gif"))
"""Endings of the files that are read as pictures."""
_ANIMATED = (".gif", ".webp", ".tif", ".tiff")
_HEADER = 2**16  # bytes: nearly every picture says its size and mode in them


@dataclass(frozen=True, slots=True)
class _Picture:
    """A file, and the folders that it lies in, from which its split is told."""

    holder: Container
    name: str
    folders: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.name if isinstance(self.holder, Folder) else f"{self.holder.path.name}/{self.name}"

    def probe(self) -> list[Any] | str:
        """Width, height and mode; or what is wrong."""
        for most in (_HEADER, -1):
            try:
                return [*probe(self.holder.read(self.name, most))]
            except (UnreadableError, *DAMAGED) as error:
                wrong = str(error)
        return wrong

    def decode(self, how: PicturePlan) -> Array:
        try:
            content = self.holder.read(self.name)
        except DAMAGED as error:
            raise UnreadableError(f"{type(error).__name__}: {error}") from error
        return how.read(content)


def is_archive(path: Path) -> bool:
    """Whether a name is that of an archive.

    >>> is_archive(Path("shard-000.tar")), is_archive(Path("shard-000.tar.gz")), is_archive(Path("rows.csv.gz"))
    (True, True, False)
    """
    return path.name.lower().endswith(ARCHIVES)


def is_glob(path: Path) -> bool:
    """Whether a path is a pattern for several files.

    >>> is_glob(Path("shards/train-*.tar"))
    True
    """
    return any(sign in path.name for sign in "*?[") and not path.exists()


def read_pictures(config: DataConfig) -> Raw:
    """The pictures of a folder or archive with all folders in it, or of several archives (shards): levels ``(N, C, H, W)``.

    Folders train, validation (valid, val) and test within it are its splits; shards may also begin with these words. Pictures are
    sorted by their path. They are decoded once, into a cache.

    Raises:
        ValueError: there is nothing, or no picture; some cannot be read, and are not to be skipped; they do not fit together; or
            some lie outside of the splits' folders.
    """
    path = path_of(config)
    room = Path(config.cache).expanduser() if config.cache else path.resolve().parent / FOLDER
    holders = _holders(path, room)
    found, others = _pictures(holders)
    if not found:
        raise ValueError(
            f"{path} needs pictures ({', '.join(sorted(PICTURES))}) or archives of them ({', '.join(ARCHIVES)}), got"
            f" {_listed(others) or 'nothing'}; check the path"
        )
    stamps = _digest(
        # The name of the folder too: what is decoded of several folders that lie side by side is kept in one place.
        [
            [holder.path.resolve().name, holder.stamp([picture.name for picture in group])]
            for holder, group in groupby(found, attrgetter("holder"))
        ]
    )
    readable, unreadable = _readable(found, stamps, path, config)
    how = plan([(width, height, mode) for _, (width, height, mode) in readable], config.images, str(path))
    splits = _splits([picture for picture, _ in readable], str(path))
    parts = {
        split: _encoded(pictures, how, {"files": stamps, "split": split}, path, config) for split, pictures in splits.items()
    }
    words = [*how.words, *unreadable, *_words(found, others)]
    return Raw(str(path), parts, [_record(holder, found) for holder in holders], words, levels=2 if how.levels == 2 else None)


def _holders(path: Path, room: Path) -> list[Container]:
    if is_glob(path):
        files = sorted(path.parent.glob(path.name))
        if not files or not all(map(is_archive, files)):
            raise ValueError(
                f"{path} needs to match archives ({', '.join(ARCHIVES)}), got {', '.join(map(str, files[:5])) or 'nothing'};"
                " check the pattern, or give a folder"
            )
        return [container(file, room) for file in files]
    if not path.exists():
        raise ValueError(f"expected an archive of pictures at {path}, got no such file; check the path")
    whole = container(path, room)
    shards = [path / name for name in whole.names if is_archive(Path(name))] if isinstance(whole, Folder) else []
    if not shards or any(map(_is_picture, whole.names)):
        return [whole]
    return [container(shard, room) for shard in shards]


def _pictures(holders: list[Container]) -> tuple[list[_Picture], Counter[str]]:
    """All pictures, and how many files of which ending are none."""
    found, others = [], Counter[str]()
    for holder in holders:
        names = [name for name in holder.names if _is_picture(name)]
        others.update(PurePosixPath(name).suffix or name for name in holder.names if not _is_picture(name))
        folders = [PurePosixPath(name).parts[:-1] for name in names]
        shard = () if isinstance(holder, Folder) else _of_shard(holder.path)
        folders = [shard or parts for parts in _below_common(folders)]
        found += [_Picture(holder, name, parts) for name, parts in zip(names, folders, strict=True)]
    return found, others


def _below_common(folders: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """There is often one folder that holds everything: splits lie below it."""
    while folders and all(parts and parts[0] == folders[0][0] and parts[0].lower() not in SPLIT_WORDS for parts in folders):
        folders = [parts[1:] for parts in folders]
    return folders


def _of_shard(path: Path) -> tuple[str, ...]:
    for word in (re.split(r"[-_.\d]", path.name)[0], path.parent.name):
        if word.lower() in SPLIT_WORDS:
            return (word,)
    return ()


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES


def _readable(
    found: list[_Picture], stamps: str, path: Path, config: DataConfig
) -> tuple[list[tuple[_Picture, list[Any]]], list[str]]:
    """The pictures whose header can be read, with what it says; and in words which were left out."""

    def look() -> list[list[Any] | str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(_Picture.probe, found))

    probed = remembered(path.resolve().parent, config.cache, {"sizes and modes of": stamps}, look)
    # What failed is tried again: it may have been the disk, not the file.
    pairs = [(picture, picture.probe() if isinstance(seen, str) else seen) for picture, seen in zip(found, probed, strict=True)]
    readable = [(picture, seen) for picture, seen in pairs if not isinstance(seen, str)]
    broken = [(picture.label, wrong) for picture, wrong in pairs if isinstance(wrong, str)]
    if not broken:
        return readable, []
    labels = ", ".join(label for label, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
    if config.images.unreadable == "refuse" or len(broken) == len(found):
        raise ValueError(
            f"{path}: {len(broken)} of {len(found)} pictures cannot be read ({labels}; the first: {broken[0][1]}); repair or remove"
            " them, or leave them out: --unreadable skip"
        )
    left_out = f"left out {len(broken)} of {len(found)} as unreadable ({labels})"
    return readable, [left_out]


def _splits(pictures: list[_Picture], name: str) -> dict[SplitName, list[_Picture]]:
    """True splits where there are folders of that name, otherwise all to train."""
    told = [
        picture.folders[0] if picture.folders and picture.folders[0].lower() in SPLIT_WORDS else None for picture in pictures
    ]
    words = Counter(word for word in told if word)
    if not words:
        return {"train": pictures}
    outside = [picture.label for picture, word in zip(pictures, told, strict=True) if word is None]
    splits = [SPLIT_WORDS[word.lower()] for word in words]
    if outside or "train" not in splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"{name} needs its pictures in train, and in validation and test or those split at random, or none in any of them; got"
            f" {_listed(words)}{f' and {len(outside)} elsewhere ({outside[0]}, say)' if outside else ''}; move or rename them"
        )
    return {
        split: [picture for picture, word in zip(pictures, told, strict=True) if word and SPLIT_WORDS[word.lower()] == split]
        for split in dict.fromkeys(SPLIT_WORDS.values())
        if split in splits
    }


def _encoded(pictures: list[_Picture], how: PicturePlan, identity: dict[str, Any], path: Path, config: DataConfig) -> Encoded:
    def decode(i: int) -> Array:
        return pictures[i].decode(how)

    names = [picture.label for picture in pictures]
    identity |= {"plan": asdict(how), "names": _digest(names)}
    skip = config.images.unreadable == "skip"
    return Encoded(names, how.shape, how.dtype, decode, identity, path.resolve().parent, skip)


def _words(found: list[_Picture], others: Counter[str]) -> list[str]:
    animated = any(picture.name.lower().endswith(_ANIMATED) for picture in found)
    return [
        *(["of several pictures in one file the first"] if animated else []),
        *([f"files that are no pictures ignored: {_listed(others)}"] if others else []),
    ]


def _record(holder: Container, found: list[_Picture]) -> dict[str, Any]:
    if not isinstance(holder, Folder):
        return file_record(holder.path)
    names = [picture.name for picture in found]
    return {
        "path": str(holder.path.resolve()),
        "count": len(names),
        "bytes": sum(stamp[1] or 0 for stamp in holder.stamp(names)),
    }


def _digest(stamps: list[Any]) -> str:
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{thing} ({count})" for thing, count in counts.most_common(5)) + (", ..." if len(counts) > 5 else "")
