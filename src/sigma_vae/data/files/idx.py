"""IDX, the file format of MNIST and its kin."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_images"]

_MAGIC = 0x00000803  # unsigned bytes, three axes
_GZIP = b"\x1f\x8b"


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """Grey images ``(N, H, W)`` of an IDX file, gzipped or not.

    Raises:
        ValueError: the file cannot be read, holds something else than images, or has the wrong length.
    """
    content = _content(path)
    if len(content) < 16:
        raise ValueError(f"{path} needs an IDX header of 16 bytes, got {len(content)} bytes; fetch the file again")
    magic, *shape = struct.unpack(">IIII", content[:16])
    if magic != _MAGIC:
        raise ValueError(
            f"{path} needs the magic number {_MAGIC:#010x} of images, got {magic:#010x}; this is another kind of file"
        )
    expected = shape[0] * shape[1] * shape[2]
    if len(content) - 16 != expected:
        raise ValueError(
            f"{path} needs {expected} bytes for images {tuple(shape)}, got {len(content) - 16}; fetch the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == _GZIP else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch the file again") from error
