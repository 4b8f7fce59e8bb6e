"""Published sets of clips: BAIR robot pushing from its official TFRecord files, and Moving MNIST.

BAIR: Ebert et al. 2017, https://arxiv.org/abs/1710.05268. Stochastic Moving MNIST has digits that bounce off the walls
in random directions, generated anew in each epoch by the rules of SVG (Denton and Fergus 2018,
https://arxiv.org/abs/1802.07687; data/moving_mnist.py of https://github.com/edenton/svg). It is not the fixed,
deterministic file mnist_test_seq.npy of Srivastava et al. (2015).
"""

import hashlib
import struct
import tarfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import numpy as np
import numpy.typing as npt

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import read_images
from sigma_vae.data.cache import file_record, file_stamp, remembered
from sigma_vae.data.named.images import FILES, find_splits, folders, mnist_5k, whose
from sigma_vae.data.splits import ORDER, Raw, SplitName, clip_lengths, count_of, shuffled
from sigma_vae.data.stores import Array, Encoded, Generated, UnreadableError
from sigma_vae.registry import register

_BAIR_ARCHIVE = "bair_robot_pushing_dataset_v0.tar"
_BAIR_FOLDER = "softmotion30_44k"
_BAIR_COUNTS: dict[SplitName, int] = {"train": 43264, "test": 256}
_BAIR_KEY = "{}/image_aux1/encoded"  # nothing is encoded: these are the bytes of the pixels
_BAIR_LENGTH, _BAIR_SIDE, _BAIR_CHANNELS = 30, 64, 3
_BAIR_FRAMES, _BAIR_TEST_FRAMES = 12, 30


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
    frames, test_frames = clip_lengths(config.clips, _BAIR_FRAMES, _BAIR_TEST_FRAMES)
    if max(frames, test_frames) > _BAIR_LENGTH:
        raise ValueError(f"bair has sequences of {_BAIR_LENGTH} frames, got clips of {max(frames, test_frames)}; ask for fewer")
    place, pieces = _find(config.root)
    parts = {
        split: _encoded(split, found, place, frames if split == "train" else test_frames, config)
        for split, found in pieces.items()
    }
    words = [
        f"official train and test sequences, camera image_aux1, first {frames} frames (test: {test_frames}) of {_BAIR_LENGTH}"
    ]
    return Raw("bair", parts, _records(pieces), words, levels=256, clips=True)


def _find(root: str | None) -> tuple[Path, _Pieces]:
    """Find the files of each split, and the folder in which decoded clips are kept."""
    places = folders("bair", root)
    for place in places:
        for where, look in ((place / _BAIR_FOLDER, _unpacked), (place, _unpacked), (place / _BAIR_ARCHIVE, _archived)):
            if any((pieces := look(where)).values()):
                return place, _complete(pieces, where)
    raise ValueError(
        f"bair needs {_BAIR_FOLDER}/train/*.tfrecords and {_BAIR_FOLDER}/test/*.tfrecords, or {_BAIR_ARCHIVE}, found neither in "
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
            for split in _BAIR_COUNTS
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
            if Path(member.name).parent == Path(_BAIR_FOLDER, split)
        ]
        for split in _BAIR_COUNTS
    }


def _encoded(split: SplitName, pieces: Sequence[_Piece], place: Path, frames: int, config: DataConfig) -> Encoded:
    files = [[*file_stamp(piece.path), piece.name, piece.start, piece.end] for piece in pieces]
    identity = {"files": files, "reader": "bair-1"}

    def index() -> list[tuple[int, int, int]]:
        found = ((number, find_records(piece.path, piece.start, piece.end)) for number, piece in enumerate(pieces))
        return [(number, record.offset, record.length) for number, records in found for record in records]

    found = remembered(place, config.cache, identity | {"of": "records"}, index)
    records = [Record(pieces[number].path, offset, length) for number, offset, length in found]
    if len(records) != _BAIR_COUNTS[split]:
        raise ValueError(
            f"bair needs the published {_BAIR_COUNTS[split]} sequences of {split}, got {len(records)} in {len(pieces)} files of "
            f"{pieces[0].path.parent}; take the official files, whole"
        )
    return Encoded(
        names=[f"{pieces[number].name} at byte {offset}" for number, offset, _ in found],
        shape=(frames, _BAIR_CHANNELS, _BAIR_SIDE, _BAIR_SIDE),
        dtype="uint8",
        decode=lambda i: _clip(records[i], frames),
        identity=identity | {"frames": frames},
        home=place,
        skip_unreadable=config.images.unreadable == "skip",
    )


def _clip(record: Record, frames: int) -> Array:
    names = [_BAIR_KEY.format(number) for number in range(frames)]
    found = bytes_features(read_record(record), names)
    expected = _BAIR_SIDE * _BAIR_SIDE * _BAIR_CHANNELS
    if wrong := [name for name in names if len(found.get(name, b"")) != expected]:
        got = f"{len(found[wrong[0]])} bytes" if wrong[0] in found else "none"
        raise UnreadableError(f"{record.path}, record at byte {record.offset}: {wrong[0]} needs {expected} bytes, got {got}")
    pixels = np.frombuffer(b"".join(found[name] for name in names), np.uint8)
    return pixels.reshape(frames, _BAIR_SIDE, _BAIR_SIDE, _BAIR_CHANNELS).transpose(0, 3, 1, 2)


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


# -- Moving MNIST ------------------------------------------------------------------------------------------------------

Images = npt.NDArray[np.uint8]

_CLIPS: dict[SplitName, int] = {"train": 10_000, "validation": 1_000, "test": 1_000}
_FRAMES, _TEST_FRAMES = 15, 30
_SIDE = 64


@final
@dataclass(frozen=True, eq=False)
class BouncingDigits:
    """Generate clips of two digits that move over a black square.

    On a canvas of 64×64, digits are 32×32, start at 0 to 31 from the top and the left, and move by −4 to 4 pixels per
    frame in each direction, all uniform. A digit that would leave is put at that edge (0 or 31); its velocity across
    the edge is drawn again from 1 to 4 inwards, and the one along it from −4 to 4. Top and bottom are checked before
    left and right. Levels of overlapping digits add up, to 255 at most. On canvases of other sides, all of these
    numbers are scaled in proportion.

    Args:
        images: images of digits ``(N, H, W)``, resized to half the side (Pillow, bilinear with antialiasing).
        frames: frames per clip.
        side: side of the canvas, a multiple of 16.

    Shapes:
        a clip ``(frames, 1, side, side)``, uint8.

    >>> white = BouncingDigits(np.full((1, 28, 28), 255, np.uint8), frames=5, side=64)
    >>> clip = white(np.random.default_rng(0))
    >>> clip.shape, int(clip.max())
    ((5, 1, 64, 64), 255)
    """

    images: Images
    frames: int
    side: int

    def __call__(self, generator: np.random.Generator) -> Images:
        """Generate one clip."""
        canvas = np.zeros((self.frames, self.side, self.side), np.uint16)
        digit_side = self.side // 2
        for _ in range(2):
            digit = self._resized(self.images[generator.integers(len(self.images))])
            for frame, (y, x) in zip(canvas, self._path(generator), strict=False):
                frame[y : y + digit_side, x : x + digit_side] += digit
        return np.minimum(canvas, 255).astype(np.uint8)[:, np.newaxis]

    def _resized(self, image: Images) -> Images:
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((self.side // 2, self.side // 2), Image.Resampling.BILINEAR))

    def _path(self, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Yield the digit's position in each frame, endlessly."""
        limit, fastest = self.side // 2 - 1, self.side // 16
        x, y = generator.integers(0, limit + 1, 2).tolist()
        dx, dy = generator.integers(-fastest, fastest + 1, 2).tolist()
        while True:
            if not 0 <= y <= limit:
                y, dy, dx = _bounce(y, limit, fastest, generator)
            if not 0 <= x <= limit:
                x, dx, dy = _bounce(x, limit, fastest, generator)
            yield y, x
            x, y = x + dx, y + dy


def _bounce(position: int, limit: int, fastest: int, generator: np.random.Generator) -> tuple[int, int, int]:
    """Return the position at the crossed edge, and new velocities across and along it."""
    inward = int(generator.integers(1, fastest + 1))
    along = int(generator.integers(-fastest, fastest + 1))
    return (0, inward, along) if position < 0 else (limit, -inward, along)


@register.source("moving-mnist", options={"root", "size", "frames", "test_frames"})
def read_moving_mnist(config: DataConfig) -> Raw:
    """Generate 10 000 new training clips per epoch (15 frames), and 1 000 fixed ones for validation (15) and test (30).

    The three splits use different images of digits. If MNIST's official files are in ``root``, or in the folder of
    SIGMA_VAE_DATA or its subfolder mnist, test uses the test images, and validation a share of the training images.
    Otherwise all use shares of the 5 000 images of ``mnist-5k``. Files of the same kind, such as Fashion-MNIST's, work
    as well.

    Raises:
        ValueError: a file is missing in ``root``, or damaged; or a size or fraction is out of range.
    """
    side = config.images.size or _SIDE
    if side % 16:
        raise ValueError(f"moving-mnist needs a canvas whose side is a multiple of 16, got size {side}; give 64 or 32, say")
    frames, test_frames = clip_lengths(config.clips, _FRAMES, _TEST_FRAMES)
    images, source, files = _digits(config)
    split, fastest = _without_overlap(images, config), side // 16
    parts = {
        name: _clips(name, split[name], test_frames if name == "test" else frames, side, config.split_seed) for name in _CLIPS
    }
    words = [
        f"two digits of {source} at {side // 2}×{side // 2} (Pillow, bilinear with antialiasing), bouncing stochastically as in SVG,"
        f" velocities -{fastest} to {fastest}",
        f"clips of {frames} frames (test: {test_frames}), generated anew in each training epoch from {len(split['train'])} images;"
        f" validation and test fixed, from {len(split['validation'])} and {len(split['test'])} others",
    ]
    return Raw("moving-mnist", parts, files, words, levels=256, clips=True)


def _clips(name: SplitName, images: Images, frames: int, side: int, seed: int) -> Generated:
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    # Each split has its own stream: with the seed itself, validation would repeat the paths of the first epoch.
    own = int(np.random.SeedSequence((seed, list(_CLIPS).index(name))).generate_state(1)[0])
    identity = f"moving-mnist-1 {digest} {frames} {side}"
    return Generated(BouncingDigits(images, frames, side), _CLIPS[name], own, identity, fresh=name == "train")


def _digits(config: DataConfig) -> tuple[dict[SplitName, Images], str, list[dict[str, Any]]]:
    """Return train images, and test images if there are any; their name; their files."""
    places = folders("mnist", config.root)
    for folder in places:
        if files := find_splits(folder, FILES, "moving-mnist"):
            images = {name: read_images(path) for name, path in files.items()}
            return images, whose(images["train"]) or f"the files in {folder}", [file_record(path) for path in files.values()]
    if config.root:
        raise ValueError(
            f"moving-mnist needs {' and '.join(FILES.values())} in {places[0]}, got no such file; give the folder, or none for"
            " mnist-5k"
        )
    raw = mnist_5k(config)
    train = raw.parts["train"]
    assert isinstance(train, np.ndarray), "the package has an array"
    return {"train": train[:, 0].astype(np.uint8)}, "mnist-5k", raw.files


def _without_overlap(images: dict[SplitName, Images], config: DataConfig) -> dict[SplitName, Images]:
    """Hold out images for each split, with the fractions and the seed that hold out examples elsewhere."""
    order = shuffled(len(images["train"]), config.split_seed)
    result = dict(images)
    for name in (split for split in ORDER if split not in images):
        count = count_of(name, len(order), config)
        result[name], order = images["train"][np.sort(order[:count])], order[count:]
    return result | {"train": images["train"][np.sort(order)]}
