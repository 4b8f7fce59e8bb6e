"""BAIR robot pushing, 64×64 (Ebert et al. 2017, https://arxiv.org/abs/1710.05268), from its official TFRecord files."""

import struct
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_stamp, remembered
from sigma_vae.data.levels import Array
from sigma_vae.data.named.official import folders
from sigma_vae.data.splits import Raw, SplitName, clip_lengths
from sigma_vae.data.stores import Encoded, UnreadableError
from sigma_vae.registry import register

__all__ = ["Record", "bytes_features", "find_records", "read_bair", "read_record"]

_ARCHIVE = "bair_robot_pushing_dataset_v0.tar"
_FOLDER = "softmotion30_44k"
_COUNTS: dict[SplitName, int] = {"train": 43264, "test": 256}
_KEY = "{}/image_aux1/encoded"  # nothing is encoded: these are the bytes of the pixels
_LENGTH, _SIDE, _CHANNELS = 30, 64, 3
_FRAMES, _TEST_FRAMES = 12, 30


@dataclass(frozen=True)
class Record:
    """The place of a record's message in its file."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class _Piece:
    """A TFRecord file, or its place in an archive."""

    path: Path
    name: str
    start: int
    end: int


_Pieces = dict[SplitName, list[_Piece]]


@register.source("bair", options={"root", "cache", "frames", "test_frames", "unreadable"})
def read_bair(config: DataConfig) -> Raw:
    """BAIR robot pushing: 43 264 train and 256 test sequences of 30 frames from the camera ``image_aux1``.

    A clip is the start of a sequence, as in SVG (Denton and Fergus 2018, https://arxiv.org/abs/1802.07687): by
    default, 12 frames in training (2 given, 10 predicted) and 30 in test (2 and 28).

    Raises:
        ValueError: the files are missing, incomplete or damaged; or the clips are longer than the sequences.
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
    """Find the files of each split, and the folder in which decoded clips are kept."""
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
    """Find the files inside an uncompressed archive."""
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

    def index() -> list[tuple[int, int, int]]:
        found = ((number, find_records(piece.path, piece.start, piece.end)) for number, piece in enumerate(pieces))
        return [(number, record.offset, record.length) for number, records in found for record in records]

    found = remembered(place, config.cache, identity | {"of": "records"}, index)
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


_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types; groups are long out of use


def find_records(path: Path, start: int = 0, end: int | None = None) -> Iterator[Record]:
    """Find the records between two offsets of a file, or of an archive, reading and checking only their headers.

    Raises:
        ValueError: a header is damaged, or the last record is cut off.
    """
    end = path.stat().st_size if end is None else end
    with path.open("rb") as file:
        offset = start
        while offset < end:
            length = _read_header(file, path, offset, end)
            yield Record(path, offset + _HEADER.size, length)
            offset += _HEADER.size + length + _CHECKSUM.size


def _read_header(file: IO[bytes], path: Path, offset: int, end: int) -> int:
    file.seek(offset)
    header = file.read(min(_HEADER.size, end - offset))
    if len(header) == _HEADER.size:
        length, checksum = _HEADER.unpack(header)
        if _masked(header[:8]) != checksum:
            raise ValueError(
                f"{path} needs a TFRecord header at byte {offset} with checksum {_masked(header[:8]):#010x}, got {checksum:#010x};"
                " the file is damaged or of another kind: fetch it again"
            )
        if offset + _HEADER.size + length + _CHECKSUM.size <= end:
            return int(length)
    raise ValueError(f"{path} is cut off within the record at byte {offset}, as it ends at byte {end}; fetch the file again")


def read_record(record: Record) -> bytes:
    """Read the message of a record.

    Raises:
        UnreadableError: its checksum is wrong.
    """
    with record.path.open("rb") as file:
        file.seek(record.offset)
        content = file.read(record.length + _CHECKSUM.size)
    message, checksum = content[: record.length], content[record.length :]
    if checksum != _CHECKSUM.pack(_masked(message)):
        raise UnreadableError(f"{record.path} is damaged: the record at byte {record.offset} has a wrong checksum")
    return message


def bytes_features(message: bytes, names: Collection[str]) -> dict[str, bytes]:
    r"""Extract features with a single value from a ``tf.train.Example``.

    The context of a ``SequenceExample`` has the same encoding. Missing features and numeric ones are left out.

    >>> feature = b"\x0a\x03" + b"\x0a\x01!"
    >>> entry = b"\x0a\x01k" + b"\x12\x05" + feature
    >>> bytes_features(b"\x0a\x0c" + b"\x0a\x0a" + entry, ["k"])
    {'k': b'!'}

    Raises:
        UnreadableError: the message is of another kind.
    """
    wanted = {name.encode(): name for name in names}
    try:
        return {wanted[name]: bytes(value) for name, value in _bytes_values(memoryview(message)) if name in wanted}
    except IndexError as error:
        raise UnreadableError(f"expected a tf.train.Example, got {len(message)} bytes of another kind ({error})") from error


def _bytes_values(message: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield each name with each of its values: field 1 of each message, but in a map's entry the key is 1, the value 2."""
    for features in _fields(message, 1):
        for entry in _fields(features, 1):
            name = bytes(next(_fields(entry, 1), b""))
            for feature in _fields(entry, 2):
                for values in _fields(feature, 1):
                    yield from ((name, value) for value in _fields(values, 1))


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yield the delimited fields of that number, and skip all others."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _DELIMITED:
            length, position = _varint(message, position)
            value = message[position : position + length]
            if len(value) < length:
                raise IndexError(f"a field of {length} bytes has {len(value)}")
            position += length
            if tag >> 3 == number:
                yield value
        elif kind == _VARINT:
            _, position = _varint(message, position)
        elif kind in (_FOUR_BYTES, _EIGHT_BYTES):
            position += 4 if kind == _FOUR_BYTES else 8
        else:
            raise IndexError(f"wire type {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Decode a number in groups of 7 bits, the lowest first; return it and its end."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _masked(data: bytes) -> int:
    """CRC32C (RFC 3720), rotated and shifted as in TFRecord: checksums of data with checksums stay random."""
    import google_crc32c

    checksum = int(google_crc32c.value(data))
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
