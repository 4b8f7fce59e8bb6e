"""The file of coded examples: a header that lists its parts with their digests, then the parts."""

import hashlib
import io
import json
import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "DamagedError", "Header", "Notes", "Opened", "Part", "digest_of", "pack_raw", "read", "unpack_raw", "write"]

Array = npt.NDArray[np.generic]

MAGIC = b"\x89SVAE\r\n"
FORMAT = 2
START = struct.Struct("<7sBI16s")
"""Magic, format, length of the header, its digest."""
DIGEST_BYTES = 16
HEADER_BYTES = 2**26
RAW_BYTES = 2**31
"""Largest header and raw part, when decompressed."""
SPARE_SEEDS = 2**16


@final
class DamagedError(ValueError):
    """Bytes of a file are missing or altered; ``whole`` are the positions of the examples that can still be decoded."""

    def __init__(self, message: str, whole: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.whole = list(whole)


Notes = tuple[tuple[int, ...], tuple[int, ...]]


@final
@dataclass(frozen=True)
class Part:
    """A run of examples that is decoded as a whole.

    Args:
        examples: how many.
        size: in bytes.
        digest: of the bytes.
        content: digest of the examples.
        seeds: words of initial bits; 0 for raw examples.
        noted: notes about numbers that lie near the middle between two roundings (see ``Rounding``): of posteriors, and of
            the model; as gaps.
    """

    examples: int
    size: int
    digest: str
    content: str
    seeds: int = 0
    noted: Notes = ((), ())


@final
@dataclass(frozen=True)
class Header:
    """The beginning of a file: all that a decoder has to know.

    Args:
        model: digest of the weights.
        check: digest of numbers that the model computes from fixed inputs.
        check_noted: notes about these numbers, like a part's.
        machine: versions and processor that they were computed with.
        shape: of an example that the model codes.
        levels: of its values.
        chunks: parts of coded examples, in order.
        raw: the part of examples that the model cannot represent.
        raw_positions: their positions among all examples.
        about: the caller's own words, such as names.
    """

    model: str
    check: str
    check_noted: Notes
    machine: dict[str, str]
    shape: tuple[int, ...]
    levels: int
    chunks: tuple[Part, ...]
    raw: Part | None
    raw_positions: tuple[int, ...]
    about: dict[str, Any]

    @property
    def examples(self) -> int:
        """Number of all examples."""
        return sum(chunk.examples for chunk in self.chunks) + len(self.raw_positions)

    def positions(self) -> list[list[int]]:
        """Positions of the examples of each chunk, and last those of the raw part."""
        raw = set(self.raw_positions)
        coded = iter([i for i in range(self.examples) if i not in raw])
        return [[next(coded) for _ in range(chunk.examples)] for chunk in self.chunks] + [list(self.raw_positions)]


class Opened(NamedTuple):
    """A header, the bytes of its parts (chunks, then the raw part), None where they are damaged, and what is wrong."""

    header: Header
    payloads: list[bytes | None]
    problem: str

    @property
    def whole(self) -> list[int]:
        """Positions of the examples whose part is not damaged."""
        parts = zip(self.header.positions(), self.payloads, strict=True)
        return sorted(i for positions, payload in parts if payload is not None for i in positions)


def digest_of(*parts: bytes) -> str:
    """A digest of 128 bits, in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[: 2 * DIGEST_BYTES]


def write(header: Header, payloads: Sequence[bytes]) -> bytes:
    """All bytes of a file."""
    content = zlib.compress(json.dumps(asdict(header), separators=(",", ":"), ensure_ascii=False).encode(), 9)
    start = START.pack(MAGIC, FORMAT, len(content), bytes.fromhex(digest_of(content)))
    return b"".join([start, content, *payloads])


def read(blob: bytes) -> Opened:
    """Read the header, and check the digest of each part.

    Raises:
        ValueError: these are no coded examples, or their format is newer.
        DamagedError: the header is damaged, so that nothing can be decoded.
    """
    if len(blob) < START.size or not blob.startswith(MAGIC):
        raise ValueError("this is no file of `sigma-vae compress`: it does not begin like one")
    _, number, length, digest = START.unpack_from(blob)
    if number != FORMAT:
        raise ValueError(f"the file has format {number}, this version reads {FORMAT}; decode it with the version that wrote it")
    content = blob[START.size : START.size + length]
    if len(content) != length or bytes.fromhex(digest_of(content)) != digest:
        raise DamagedError("the file's header is damaged, so no example can be decoded; copy the file again from where it was")
    header = _header(content)
    return _opened(header, blob[START.size + length :])


def _opened(header: Header, rest: bytes) -> Opened:
    payloads: list[bytes | None] = []
    start = 0
    for part in (*header.chunks, header.raw):
        size = 0 if part is None else part.size
        payload = rest[start : start + size]
        start += size
        good = part is None or digest_of(payload) == part.digest
        payloads.append(payload if good else None)
    damaged = payloads.count(None)
    opened = Opened(header, payloads, "")
    if len(rest) == start and not damaged:
        return opened
    length = (
        f"it has {abs(len(rest) - start)} bytes too {'many' if len(rest) > start else 'few'}; " if len(rest) != start else ""
    )
    return opened._replace(
        problem=f"the file is damaged: {length}{damaged} of {len(payloads) - (header.raw is None)} parts are altered or missing;"
        f" whole are {len(opened.whole)} of {header.examples} examples: {_ranges(opened.whole)}"
    )


def _header(content: bytes) -> Header:
    """Check the types of what a writer, perhaps a hostile one, has put into a header."""
    try:
        text = zlib.decompressobj().decompress(content, HEADER_BYTES)
        found = json.loads(text)
        found["chunks"] = tuple(_part(chunk) for chunk in found["chunks"])
        found["raw"] = None if found["raw"] is None else _part(found["raw"])
        for name in ("shape", "raw_positions"):
            found[name] = tuple(_count(number) for number in found[name])
        found["check_noted"] = _notes(found["check_noted"])
        header = Header(**found)
        _count(header.levels - 2)
        consistent = len(set(header.raw_positions)) == len(header.raw_positions) == (header.raw.examples if header.raw else 0)
        texts = (header.model, header.check, *header.machine.values())
        if not (consistent and all(isinstance(text, str) for text in texts) and isinstance(header.about, dict)):
            raise ValueError("its entries contradict each other")
        if header.raw_positions and max(header.raw_positions) >= header.examples:
            raise ValueError("it has raw examples beyond its last one")
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the file's header is no header of coded examples: {error}") from error
    return header


def _part(found: dict[str, Any]) -> Part:
    part = Part(**{**found, "noted": _notes(found["noted"])})
    for number in (part.examples, part.size, part.seeds):
        _count(number)
    if part.seeds > part.size // 4 + SPARE_SEEDS or part.examples > 2**31:
        raise ValueError(
            f"a part of {part.size} bytes cannot have {part.seeds} words of initial bits, {part.examples} examples"
        )
    return part


def _notes(found: Any) -> Notes:
    posterior, model = (tuple(_count(number) for number in notes) for notes in found)
    return posterior, model


def _count(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"expected a number of at least 0, got {number!r}")
    return number


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: ``0-99, 200-299``.

    >>> _ranges([0, 1, 2, 5, 7, 8]), _ranges([])
    ('0-2, 5, 7-8', 'none')
    """
    if not numbers:
        return "none"
    array = np.asarray(numbers)
    runs = np.split(array, np.flatnonzero(np.diff(array) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def pack_raw(arrays: Sequence[Array]) -> bytes:
    """Arrays of any shape and type, one after the other in NumPy's format, compressed by LZMA."""
    whole = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(whole, array, allow_pickle=False)
    return lzma.compress(whole.getvalue(), preset=9)


def unpack_raw(payload: bytes, count: int) -> list[Array]:
    """The arrays of :func:`pack_raw`.

    Raises:
        ValueError: these are no such bytes.
    """
    try:
        whole = io.BytesIO(lzma.LZMADecompressor().decompress(payload, RAW_BYTES))
        return [np.lib.format.read_array(whole, allow_pickle=False) for _ in range(count)]
    except (lzma.LZMAError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"the file's raw examples cannot be read: {error}") from error
