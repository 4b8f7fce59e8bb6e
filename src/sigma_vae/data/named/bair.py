"""BAIR robot pushing, 64×64 (Ebert et al. 2017, https://arxiv.org/abs/1710.05268): the official TFRecord files, unpacked or not."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.clips import clip_lengths
from sigma_vae.data.files.tfrecord import Record, bytes_features, find_records, read_record
from sigma_vae.data.levels import Array
from sigma_vae.data.named.folders import folders
from sigma_vae.data.raw import Encoded, Raw, UnreadableError, file_stamp
from sigma_vae.data.remember import remembered
from sigma_vae.data.splits import SplitName

__all__ = ["read_bair"]

_ARCHIVE = "bair_robot_pushing_dataset_v0.tar"
_FOLDER = "softmotion30_44k"
_COUNTS: dict[SplitName, int] = {"train": 43264, "test": 256}
_KEY = "{}/image_aux1/encoded"  # nothing is encoded: these are the bytes of the pixels
_LENGTH, _SIDE, _CHANNELS = 30, 64, 3
_FRAMES, _TEST_FRAMES = 12, 30


@dataclass(frozen=True)
class _Piece:
    """A TFRecord file, or the part of an archive that is one."""

    path: Path
    name: str
    start: int
    end: int


_Pieces = dict[SplitName, list[_Piece]]


def read_bair(config: DataConfig) -> Raw:
    """The 43 264 train and 256 test sequences of 30 frames, as the camera ``image_aux1`` sees them.

    A clip is the beginning of a sequence, as in SVG (Denton and Fergus 2018, https://arxiv.org/abs/1802.07687): 12 frames in
    training (2 that are given, 10 that are predicted) and 30 in test (2 and 28) unless the config says otherwise.

    Raises:
        ValueError: the files are nowhere, incomplete or damaged; or clips are asked for that are longer than the sequences.
    """
    frames, test_frames = clip_lengths(config.clips, _FRAMES, _TEST_FRAMES)
    if max(frames, test_frames) > _LENGTH:
        raise ValueError(f"bair has sequences of {_LENGTH} frames, got clips of {max(frames, test_frames)}; ask for fewer")
    place, pieces = _find(config.root)
    parts = {
        split: _encoded(split, found, place, frames if split == "train" else test_frames, config)
        for split, found in pieces.items()
    }
    words = [f"official train and test sequences, camera image_aux1, first {frames} frames (test: {test_frames}) of {_LENGTH}"]
    return Raw("bair", parts, _records(pieces), words, levels=256, clips=True)


def _find(root: str | None) -> tuple[Path, _Pieces]:
    """Folder beside which decoded clips are kept, and the files of each split."""
    places = folders("bair", root)
    for place in places:
        for where, look in ((place / _FOLDER, _unpacked), (place, _unpacked), (place / _ARCHIVE, _archived)):
            if any((pieces := look(where)).values()):
                return place, _complete(pieces, where)
    raise ValueError(
        f"bair needs {_FOLDER}/train/*.tfrecords and {_FOLDER}/test/*.tfrecords, or {_ARCHIVE}, found neither in "
        f"{', '.join(map(str, places)) or 'any place, as none is given'}; give the folder that holds them as --root or in"
        " SIGMA_VAE_DATA"
    )


def _complete(pieces: _Pieces, where: Path) -> _Pieces:
    if missing := [split for split, found in pieces.items() if not found]:
        raise ValueError(f"bair needs TFRecord files of train and test in {where}, got none of {missing[0]}; put them there")
    return pieces


def _unpacked(folder: Path) -> _Pieces:
    try:
        return {
            split: [_Piece(path, path.name, 0, path.stat().st_size) for path in sorted((folder / split).glob("*.tfrecords"))]
            for split in _COUNTS
        }
    except OSError as error:
        raise ValueError(f"bair: {error.filename} cannot be read ({error.strerror}); fetch it again") from error


def _archived(archive: Path) -> _Pieces:
    """Where an archive that is not compressed has its files."""
    if not archive.is_file():
        return {}
    try:
        with tarfile.open(archive, "r:") as tar:
            members = sorted((m for m in tar if m.isfile() and m.name.endswith(".tfrecords")), key=lambda member: member.name)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{archive} cannot be read as a .tar: {error}; fetch it again") from error
    return {
        split: [
            _Piece(archive, member.name, member.offset_data, member.offset_data + member.size)
            for member in members
            if Path(member.name).parent == Path(_FOLDER, split)
        ]
        for split in _COUNTS
    }


def _encoded(split: SplitName, pieces: Sequence[_Piece], place: Path, frames: int, config: DataConfig) -> Encoded:
    files = [[*file_stamp(piece.path), piece.name, piece.start, piece.end] for piece in pieces]
    identity = {"files": files, "reader": "bair-1"}
    found = remembered(place, config.cache, identity | {"of": "records"}, lambda: list(_index(pieces)))
    records = [Record(pieces[number].path, offset, length) for number, offset, length in found]
    if len(records) != _COUNTS[split]:
        raise ValueError(
            f"bair needs the published {_COUNTS[split]} sequences of {split}, got {len(records)} in {len(pieces)} files of "
            f"{pieces[0].path.parent}; take the official files, whole"
        )
    return Encoded(
        names=[f"{pieces[number].name} at byte {offset}" for number, offset, _ in found],
        shape=(frames, _CHANNELS, _SIDE, _SIDE),
        dtype="uint8",
        decode=lambda i: _clip(records[i], frames),
        identity=identity | {"frames": frames},
        home=place,
        skip_unreadable=config.images.unreadable == "skip",
    )


def _index(pieces: Sequence[_Piece]) -> Iterator[tuple[int, int, int]]:
    for number, piece in enumerate(pieces):
        for record in find_records(piece.path, piece.start, piece.end):
            yield number, record.offset, record.length


def _clip(record: Record, frames: int) -> Array:
    names = [_KEY.format(number) for number in range(frames)]
    found = bytes_features(read_record(record), names)
    expected = _SIDE * _SIDE * _CHANNELS
    if wrong := [name for name in names if len(found.get(name, b"")) != expected]:
        got = f"{len(found[wrong[0]])} bytes" if wrong[0] in found else "none"
        raise UnreadableError(f"{record.path}, record at byte {record.offset}: {wrong[0]} needs {expected} bytes, got {got}")
    pixels = np.frombuffer(b"".join(found[name] for name in names), np.uint8)
    return pixels.reshape(frames, _SIDE, _SIDE, _CHANNELS).transpose(0, 3, 1, 2)


def _records(pieces: _Pieces) -> list[dict[str, Any]]:
    return [
        {
            "path": str(found[0].path.resolve() if found[0].path.suffix == ".tar" else found[0].path.resolve().parent),
            "split": split,
            "files": len(found),
            "bytes": sum(piece.end - piece.start for piece in found),
        }
        for split, found in pieces.items()
    ]
