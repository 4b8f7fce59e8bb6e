"""BAIR robot pushing, 64×64 (Ebert et al. 2017, https://arxiv.org/abs/1710.05268): the official TFRecord files, unpacked or not."""

import struct
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_stamp, remembered
from sigma_vae.data.levels import Array
from sigma_vae.data.named.official import folders
from sigma_vae.data.splits import Raw, SplitName, clip_lengths
from sigma_vae.data.stores import Encoded, UnreadableError
from sigma_vae.registry import register

__all__ = ["Record", "bytes_features", "crc32c", "find_records", "read_bair", "read_record"]

Registers = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed
_FILLS = b"\x54\x64\x1f\x64"
"""These four bytes take an empty register to all ones, which is how the checksum begins."""
_LANE = 256
"""Bytes that one lane goes over: many short lanes keep NumPy's calls few and long."""


def crc32c(data: bytes) -> int:
    r"""The checksum of RFC 3720 (appendix B.4), polynomial 0x1EDC6F41.

    A register that starts empty is linear in the message over GF(2), and leading zeros leave it empty. So the message, with zeros
    before it, is cut into lanes of equal length that advance together; then neighbours are joined: that of A followed by B is
    :math:`M_{|B|} r_A \oplus r_B`, where M moves a register over |B| zeros.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    content = _FILLS + data
    width = _LANE if len(content) >= 16 * _LANE else len(content) + len(content) % 2
    padded = content.rjust(-(-len(content) // width) * width, b"\0")
    words = np.frombuffer(padded, "<u2").reshape(-1, width // 2).T
    registers = _advance(np.zeros(words.shape[1], np.uint32), np.ascontiguousarray(words))
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _multiply(_zeros_matrix(width, level), registers[0::2]) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def _advance(registers: Registers, words: npt.NDArray[np.uint16]) -> Registers:
    """Each register over its column of words."""
    table = _table()
    for row in words:
        registers = table[(registers ^ row) & 0xFFFF] ^ (registers >> 16)
    return registers


@cache
def _table() -> Registers:
    """The register after each word of two bytes."""
    registers = np.arange(2**16, dtype=np.uint32)
    for _ in range(16):
        registers = (registers >> np.uint32(1)) ^ (registers & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return registers


@cache
def _zeros_matrix(width: int, level: int) -> Registers:
    """What becomes of each of the 32 bits of a register over width · 2^level zeros."""
    if level == 0:
        return _advance(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros((width // 2, 32), np.uint16))
    half = _zeros_matrix(width, level - 1)
    return _multiply(half, half)


def _multiply(matrix: Registers, registers: Registers) -> Registers:
    result = np.zeros_like(registers)
    for bit, column in enumerate(matrix):
        result ^= column * ((registers >> np.uint32(bit)) & np.uint32(1))
    return result


_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types; groups are long out of use


@dataclass(frozen=True)
class Record:
    """Where the message of a record lies."""

    path: Path
    offset: int
    length: int


def find_records(path: Path, start: int = 0, end: int | None = None) -> Iterator[Record]:
    """Go through the records between two offsets; of each only the header is read, and checked.

    Args:
        path: of the file; an archive that holds it uncompressed does as well.
        start: offset of the first record.
        end: offset behind the last one; the end of the file unless given.

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
    """The message of a record.

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
    r"""Features of one value each out of a ``tf.train.Example`` (or the context of a ``SequenceExample``, which is encoded alike).

    Features that are missing, or hold numbers, are left out.

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
    """Each name with each of its values; field 1 is what we want in every message but the map's entry: 1 its key, 2 its value."""
    for features in _fields(message, 1):
        for entry in _fields(features, 1):
            name = bytes(next(_fields(entry, 1), b""))
            for feature in _fields(entry, 2):
                for values in _fields(feature, 1):
                    yield from ((name, value) for value in _fields(values, 1))


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The delimited fields of that number; all others are passed over."""
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
    """A number in groups of 7 bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _masked(data: bytes) -> int:
    """TFRecord's way to keep a checksum: of data that hold checksums, one is no longer a fixed pattern."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


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


@register.source("bair", options={"root", "cache", "frames", "test_frames", "unreadable"})
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
