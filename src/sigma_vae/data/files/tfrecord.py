"""TFRecord files and the ``tf.train.Example`` messages in them, read without TensorFlow.

The framing is that of https://www.tensorflow.org/tutorials/load_data/tfrecord, the encoding of messages that of
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sigma_vae.data.files.crc32c import crc32c
from sigma_vae.data.raw import UnreadableError

__all__ = ["Record", "bytes_features", "find_records", "read_record"]

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
