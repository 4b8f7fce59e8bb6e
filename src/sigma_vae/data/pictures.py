"""Pictures: one plan that gives them all one shape, and the reader for folders, archives and shards of them."""

import hashlib
import io
import json
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeVar, final

import numpy as np

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data.archives import ARCHIVES, DAMAGED, SYSTEM_FOLDERS, Container, Folder, container
from sigma_vae.data.cache import FOLDER, file_record, file_stamp, remembered
from sigma_vae.data.splits import SPLIT_WORDS, SPLITS, Raw, SplitName
from sigma_vae.data.stores import Array, Encoded, UnreadableError
from sigma_vae.registry import register

if TYPE_CHECKING:
    from PIL.Image import Image

Probe = tuple[int, int, str]
"""Width, height and mode of a picture, seen upright."""
Colour = Literal["grey", "grey+alpha", "rgb", "rgba"]
Fit = Literal["refuse", "crop", "stretch", "pad"]

_CANONICAL = {"1": "1", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
_CANONICAL |= {mode: "I;16" for mode in ("I", "I;16", "I;16B", "I;16L", "I;16N")}
_CANONICAL |= {f"{mode};{bits}": mode for mode in ("LA", "RGB", "RGBA") for bits in range(9, 17)}
_CANONICAL |= {f"I;{bits}": "I;16" for bits in range(9, 16)}
_KINDS: dict[str, tuple[Colour, int]] = {
    "1": ("grey", 1),
    "L": ("grey", 8),
    "I;16": ("grey", 16),
    "LA": ("grey+alpha", 8),
    "RGB": ("rgb", 8),
    "RGBA": ("rgba", 8),
}
_ORIENTATION = 0x0112  # the EXIF tag; values of 5 and more exchange width and height
_SUBFILE = 254  # the TIFF tag that tells what a page is
_MOST_PIXELS = 2**30  # of all pages together, in a file of any size
_MOST_PIXELS_PER_BYTE = 8192  # black and white pages with little on them
_MODES: dict[Colour, str] = {"grey": "L", "grey+alpha": "LA", "rgb": "RGB", "rgba": "RGBA"}


@final
@dataclass(frozen=True)
class PicturePlan:
    """Turn each picture of a set into an array ``(C, H, W)`` of one shape; made by :func:`plan`.

    Order of the steps: upright by EXIF orientation, channels, window (``crop`` or ``fit``), resizing to ``size``.

    Args:
        crop: side of the central square to cut out, in pixels.
        size: side to resize the window to, in pixels.
        fit: without ``crop``, the window: ``crop`` and ``pad`` make it square.
        colour: the channels.
        bits: bits per value: 1, 8 or 16.
        height, width: size of the result.
        remarks: losses of some pictures, in words.

    >>> from PIL import Image
    >>> halves = plan([(4, 2, "L")], ImageConfig(fit="crop"), "halves")
    >>> halves.shape, halves.dtype, halves.levels
    ((1, 2, 2), 'uint8', 256)
    >>> halves.decode(Image.fromarray(np.uint8([[1, 2, 3, 4], [5, 6, 7, 8]]))).tolist()
    [[[2, 3], [6, 7]]]
    """

    crop: int | None
    size: int | None
    fit: Fit
    colour: Colour
    bits: int
    height: int
    width: int
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a decoded picture: ``(C, H, W)``."""
        return (1 if self.colour == "grey" else len(_MODES[self.colour]), self.height, self.width)

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """Dtype of a decoded picture."""
        return "uint16" if self.bits == 16 else "uint8"

    @property
    def levels(self) -> int:
        """Number of values that a datum can take: 2, 256 or 65536."""
        return 1 << self.bits

    @property
    def words(self) -> list[str]:
        """The steps in words, for the record of a run."""
        kept = f"pictures as {self.colour}, {self.bits} bit{'s' * (self.bits > 1)}, upright by their EXIF orientation"
        fits = {"crop": "cut to the largest central square", "pad": "padded with black to squares", "stretch": "stretched"}
        window = f"cut to the central {self.crop}×{self.crop}" if self.crop else fits.get(self.fit, "")
        resized = f"resized to {self.size}×{self.size} (Pillow, bilinear with antialiasing)" if self.size else ""
        return [word for word in (kept, *self.remarks, window, resized) if word]

    def read(self, file: Path | bytes | IO[bytes]) -> Array:
        """Decode a file.

        Raises:
            UnreadableError: it is broken, or differs from its header.
        """
        from PIL import Image

        try:
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        except Exception as error:
            raise _unreadable(error) from error
        with image:
            return self.decode(image)

    def decode(self, image: "Image") -> Array:
        """Decode an opened picture; safe in several threads, each with its own image.

        Returns:
            Levels ``(C, H, W)``, uint8 or uint16.

        Raises:
            UnreadableError: it is broken, or has another size than its header says.
        """
        from PIL import ImageOps

        try:
            shaped = self._resized(self._windowed(self._converted(ImageOps.exif_transpose(image))))
            array = self._array(np.asarray(shaped))
        except Exception as error:  # Pillow's decoders raise many unrelated kinds; all of them mean: broken
            raise _unreadable(error) from error
        if array.shape != self.shape:
            raise UnreadableError(f"it needs shape {self.shape}, as its file said before, got {array.shape}")
        return array

    def _converted(self, image: "Image") -> "Image":
        if self.bits == 16:
            return _as_float(image)
        if self.bits == 1:
            return image if image.mode == "1" else image.convert("1")
        if image.mode in ("P", "PA") and _has_alpha(image):
            image = image.convert("RGBA")  # straight to RGB, Pillow warns of the transparency that is lost
        elif image.mode in ("CMYK", "YCbCr"):
            image = image.convert("RGB")
        mode = _MODES[self.colour]
        return image if image.mode == mode else image.convert(mode)

    def _windowed(self, image: "Image") -> "Image":
        width, height = _window(image.width, image.height, self.crop, self.fit)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))  # black where the window goes beyond the picture

    def _resized(self, image: "Image") -> "Image":
        from PIL import Image

        target = (self.width, self.height)
        return image if self.size is None or image.size == target else image.resize(target, Image.Resampling.BILINEAR)

    def _array(self, pixels: Array) -> Array:
        if self.bits == 16:
            pixels = np.rint(pixels.astype(np.float64)).astype(np.uint16)
        pixels = pixels.astype(self.dtype)
        return pixels[np.newaxis] if pixels.ndim == 2 else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def probe(file: Path | bytes | IO[bytes]) -> Probe:
    """Return width, height and mode of a picture file, from its header (for palettes: from the whole file).

    The mode is Pillow's, with two exceptions: for palettes it is the mode of their colours, ``L``, ``RGB`` or ``RGBA``;
    for 16-bit colours, of which Pillow reads the upper 8 bits, it is ``RGB;16`` and the like. A TIFF of several pages is
    described by its first, see :func:`pages`.

    Raises:
        UnreadableError: it is not a picture, or broken.

    >>> from PIL import Image
    >>> buffer = io.BytesIO()
    >>> Image.new("RGB", (4, 2)).save(buffer, format="PNG")
    >>> probe(buffer.getvalue())
    (4, 2, 'RGB')
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return probe_image(image)
    except Exception as error:  # as in decode
        raise _unreadable(error) from error


def pages(file: Path | bytes | IO[bytes]) -> tuple[dict[int, Probe], int]:
    """Probe the pages of a picture file: all pages of a TIFF, else the first picture.

    Returns:
        Width, height and mode by number of page, and the count of the others: reduced copies and masks in a TIFF, or 1 for
        the frames after the first of an animation.

    Raises:
        UnreadableError: it is not a picture, or broken, or claims more pixels than Pillow allows.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.format != "TIFF":
                return {0: probe_image(image)}, int(getattr(image, "is_animated", False))
            found = dict(_tiff_pages(image))
            _check_claim(sum(width * height for (width, height, _), _ in found.values()), image.fp)
    except Exception as error:  # as in decode
        raise _unreadable(error) from error
    whole = {number: seen for number, (seen, kind) in found.items() if not kind} or {0: found[0][0]}
    return whole, len(found) - len(whole)


def _tiff_pages(image: "Image") -> Iterator[tuple[int, tuple[Probe, int]]]:
    """Yield each page's number, probe and kind: not 0 for reduced copies (bit 0) and masks (bit 2)."""
    number = 0
    while True:
        try:
            image.seek(number)
        except EOFError:
            return
        kind = getattr(image, "tag_v2", {}).get(_SUBFILE, 0)
        yield number, (probe_image(image), kind & 0b101)
        number += 1


def _check_claim(pixels: int, file: IO[bytes] | None) -> None:
    """Refuse a small file whose pages have more pixels than compression explains: they share their data."""
    size = 0 if file is None else file.seek(0, os.SEEK_END)
    if pixels > max(_MOST_PIXELS, _MOST_PIXELS_PER_BYTE * size):
        raise ValueError(f"its pages have {pixels} pixels in {size} bytes, more than such a file can hold")


def probe_image(image: "Image") -> Probe:
    """Return width, height and mode of a picture that Pillow has opened, as :func:`probe` does for files."""
    from PIL import Image

    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow checks first pages only
        raise Image.DecompressionBombError(f"{width}×{height} are more than {2 * Image.MAX_IMAGE_PIXELS} pixels")
    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width, _mode(image)) if turned else (width, height, _mode(image))


def plan(sizes_and_modes: Iterable[Probe], images: ImageConfig, name: str) -> PicturePlan:
    """Find one shape for all pictures, given each picture's :func:`probe` and the user's options.

    Raises:
        ValueError: there are none; they differ in size or channels and no option resolves it; or their mode has no
            levels.

    >>> plan([(3, 3, "L"), (4, 4, "L")], ImageConfig(), "squares")
    Traceback (most recent call last):
    ...
    ValueError: squares: pictures need one size, got 2: 3×3 (1), 4×4 (1) (width×height); resize them (--size 3, say), or cut the same
    square from each (--crop 3)
    """
    probed = list(sizes_and_modes)
    if not probed:
        raise ValueError(f"{name}: expected pictures, got none that can be read; check the path")
    sizes = Counter((width, height) for width, height, _ in probed)
    modes = Counter(mode for *_, mode in probed)
    colour, bits = _channels(modes, images, name)
    width, height = _common_size(sizes, images, name)
    return PicturePlan(images.crop, images.size, images.fit, colour, bits, height, width, _remarks(modes, colour))


def _mode(image: "Image") -> str:
    from PIL.ImageFile import ImageFile

    if image.mode in ("P", "PA"):
        return "RGBA" if _has_alpha(image) else "L" if _is_grey(image) else "RGB"
    raw = str(image.tile[0][3]) if isinstance(image, ImageFile) and image.tile else ""
    return f"{image.mode};16" if image.mode in ("LA", "RGB", "RGBA") and ";16" in raw else image.mode


def _has_alpha(image: "Image") -> bool:
    return image.mode == "PA" or "transparency" in image.info


def _is_grey(image: "Image") -> bool:
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    return bool((palette == palette[:, :1]).all())


def _as_float(image: "Image") -> "Image":
    """Convert 16-bit grey to float32, which is exact: Pillow resizes its own 16-bit modes through 8 bits."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"it needs grey levels 0..65535, its values go from {pixels.min()} to {pixels.max()}, which .npy files can hold"
        )
    return Image.fromarray(pixels.astype(np.float32))


def _unreadable(error: Exception) -> UnreadableError:
    return UnreadableError(f"{type(error).__name__}: {error}")


def _window(width: int, height: int, crop: int | None, fit: str) -> tuple[int, int]:
    """Return width and height of the part to take around the centre; larger than the picture if it is padded.

    >>> _window(5, 3, crop=None, fit="pad")
    (5, 5)
    """
    if crop is not None:
        return crop, crop
    side = {"crop": min(width, height), "pad": max(width, height)}.get(fit)
    return (width, height) if side is None else (side, side)


def _common_size(sizes: Counter[tuple[int, int]], images: ImageConfig, name: str) -> tuple[int, int]:
    """Return width and height that all pictures get, given the count of each (width, height).

    >>> _common_size(Counter({(5, 3): 2, (3, 3): 1}), ImageConfig(fit="crop"), "some")
    (3, 3)
    """
    _check_fit(images, name)
    if images.crop is not None:
        _check_crop(sizes, images.crop, name)
    windows: Counter[tuple[int, int]] = Counter()
    for size, count in sizes.items():
        windows[_window(*size, images.crop, images.fit)] += count
    if images.size is not None:
        oblong = Counter({size: count for size, count in windows.items() if size[0] != size[1]})
        if oblong and images.fit == "refuse":
            raise ValueError(
                f"{name}: size {images.size} needs square pictures, got {_sizes(oblong)}; cut the central"
                " square (--fit crop), stretch (--fit stretch) or pad with black (--fit pad)"
            )
        return images.size, images.size
    if len(windows) > 1:
        least = min(min(size) for size in sizes)
        fit = "" if images.fit != "refuse" or all(w == h for w, h in windows) else " with --fit crop, stretch or pad"
        raise ValueError(
            f"{name}: pictures need one size, got {len(windows)}: {_sizes(windows)}; resize them"
            f" (--size {least}, say{fit}), or cut the same square from each (--crop {least})"
        )
    return next(iter(windows))


def _check_fit(images: ImageConfig, name: str) -> None:
    if images.fit != "refuse" and images.crop is not None:
        raise ValueError(f"{name}: fit {images.fit} has no effect on the squares of crop {images.crop}; leave out one of them")
    if images.fit == "stretch" and images.size is None:
        raise ValueError(f"{name}: fit stretch needs a size to stretch pictures to, got none; give --size, 64 say")


def _check_crop(sizes: Counter[tuple[int, int]], crop: int, name: str) -> None:
    if small := Counter({size: count for size, count in sizes.items() if min(size) < crop}):
        raise ValueError(
            f"{name}: crop {crop} needs pictures of at least {crop}×{crop}, got {_sizes(small)}; crop at most"
            f" {min(min(size) for size in sizes)}"
        )


def _channels(modes: Counter[str], images: ImageConfig, name: str) -> tuple[Colour, int]:
    """Return channels and bits per value that all pictures get, given the count of each mode.

    >>> _channels(Counter({"1": 2, "L": 1}), ImageConfig(), "some")
    ('grey', 8)
    """
    if unknown := Counter({mode: count for mode, count in modes.items() if mode not in _CANONICAL}):
        raise ValueError(
            f"{name}: pictures need modes {', '.join(dict.fromkeys(_CANONICAL.values()))} or palettes, got {listed(unknown)};"
            " convert them, or save floats as .npy"
        )
    kinds = {_CANONICAL[mode] for mode in modes}
    if kinds == {"1"} and images.size is None and images.colour in ("auto", "grey"):
        return "grey", 1
    kinds = {"L" if kind == "1" else kind for kind in kinds}  # black and white are two of the greys
    if "I;16" in kinds and (len(kinds) > 1 or images.colour not in ("auto", "grey")):
        raise ValueError(
            f"{name}: 16-bit grey pictures cannot be mixed with others or get colours, got {listed(modes)} and colour"
            f" {images.colour}; convert them to one kind"
        )
    if "I;16" in kinds or (images.colour == "auto" and len(kinds) == 1):
        return _KINDS[kinds.pop()]
    if images.colour == "auto":
        raise ValueError(
            f"{name}: pictures need the same channels, got modes {listed(modes)}; say which to keep: --colour grey, rgb or rgba"
        )
    return images.colour, 8


def _remarks(modes: Counter[str], colour: Colour) -> tuple[str, ...]:
    """Describe what some pictures lose, in words.

    >>> _remarks(Counter({"RGBA": 2, "RGB": 1}), "rgb")
    ('transparency ignored (2 of 3)',)
    """
    deep = Counter[str]()
    for mode, count in modes.items():
        kind, _, bits = mode.partition(";")
        if kind in ("LA", "RGB", "RGBA") and bits:
            deep[f"the upper 8 of {bits} bits of each colour"] += count
        elif kind == "I" and bits.isdecimal() and bits != "16":
            deep[f"grey of {bits} bits in 16"] += count
    deep["transparency ignored"] = sum(
        count for mode, count in modes.items() if _CANONICAL[mode] in ("LA", "RGBA") and colour in ("grey", "rgb")
    )
    deep["colours to luma (ITU-R 601)"] = sum(
        count for mode, count in modes.items() if _CANONICAL[mode] in ("RGB", "RGBA") and colour == "grey"
    )
    return tuple(f"{what} ({count} of {modes.total()})" for what, count in deep.items() if count)


def _sizes(counts: Counter[tuple[int, int]]) -> str:
    return listed(Counter({f"{width}×{height}": count for (width, height), count in counts.items()})) + " (width×height)"


def listed(counts: Counter[str]) -> str:
    """List the most frequent things with their counts.

    >>> listed(Counter(["a", "b", "a"]))
    'a (2), b (1)'
    """
    most = ", ".join(f"{thing} ({count})" for thing, count in counts.most_common(5))
    return most + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


@cache
def picture_endings() -> frozenset[str]:
    """Endings of the picture files that Pillow opens here, with those of pillow-heif where it is installed."""
    from PIL import Image

    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    forms = Image.registered_extensions()
    return frozenset(ending for ending, form in forms.items() if form in Image.OPEN and form not in _ONLY_RECOGNISED)


_ONLY_RECOGNISED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))
"""Formats that Pillow cannot decode, or leaves to another program."""
_HEIF = (".heic", ".heif", ".hif")
_OF_SEVERAL = re.compile(rb"GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP|....ftyp", re.DOTALL)
"""The first bytes of files that may hold several pictures: GIF, TIFF, WebP, AVIF and HEIF."""
_SIGNATURES = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP", re.DOTALL)
"""The first bytes of the usual pictures, for files without an ending."""
PICTURE_OPTIONS = frozenset({"cache", "crop", "size", "fit", "colour", "unreadable"})
"""Options of the config that decide how pictures are read."""
_HEADER = 2**16  # bytes: enough for the size and mode of nearly every picture
_MASKS = frozenset(
    "mask masks ground_truth groundtruth gt segmentation segmentations annotation annotations labels thumbs thumbnails".split()
)
"""Names of folders whose pictures belong to other pictures."""
_SHARD = re.compile(r"[-_.\d]")
"""The end of the first word in the name of a shard."""


@final
class _One(Container):
    """A picture file alone, as a container."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def names(self) -> list[str]:
        """Its name."""
        return [self.path.name]

    def read(self, name: str, most: int = -1) -> bytes:
        """Read the file."""
        with self.path.open("rb") as file:
            return file.read(most)

    def stamp(self, names: list[str]) -> Any:
        """The file's own stamp."""
        return file_stamp(self.path)


_Seen = list[Any] | str
"""The pages of a picture file, each as number, width, height and mode, and the count of the others; or the error."""


@dataclass(frozen=True, slots=True)
class _Picture:
    """A file or one of its pages, and the name of the outermost folder or of the shard that contains it, if it names a split."""

    holder: Container
    name: str
    word: str
    page: int | None = None

    @property
    def label(self) -> str:
        page = "" if self.page is None else f" page {self.page + 1}"
        name = self.name if isinstance(self.holder, Folder | _One) else f"{self.holder.path.name}/{self.name}"
        return name + page

    def open(self) -> IO[bytes]:
        """Open the file; one in a folder is read only where it is needed."""
        if isinstance(self.holder, Folder):
            return (self.holder.path / self.name).open("rb")
        return self.holder.path.open("rb") if isinstance(self.holder, _One) else io.BytesIO(self.holder.read(self.name))

    def look(self) -> _Seen:
        """Find the pages, by the header if that is enough."""
        try:
            head = self.holder.read(self.name, _HEADER)
            if len(head) == _HEADER and not _OF_SEVERAL.match(head):
                with suppress(UnreadableError):
                    return _seen(*pages(head))
            with self.open() as file:
                return _seen(*pages(file))
        except (UnreadableError, *DAMAGED) as error:
            return str(error)

    def decode(self, how: PicturePlan) -> Array:
        try:
            if self.page is None:
                return how.read(self.holder.read(self.name))
            image = _opened.image_of(self)
            image.seek(self.page)
        except UnreadableError:
            raise
        except Exception as error:
            raise UnreadableError(f"{type(error).__name__}: {error}") from error
        return how.decode(image)


def _seen(found: dict[int, Probe], others: int) -> _Seen:
    return [[[number, *one] for number, one in found.items()], others]


class _Opened(threading.local):
    """A thread's open file of several pages: a page is reached only through those before it."""

    of: tuple[Container, str] | None = None
    image: Any = None

    def image_of(self, picture: _Picture) -> Any:
        from PIL import Image

        if self.of != (picture.holder, picture.name):
            file = picture.open()
            self.image, self.of = Image.open(file), (picture.holder, picture.name)
            weakref.finalize(self.image, file.close)
        return self.image


_opened = _Opened()


def _is_archive(path: Path) -> bool:
    """Whether a file name is that of an archive.

    >>> _is_archive(Path("shard-000.tar")), _is_archive(Path("shard-000.tar.gz")), _is_archive(Path("rows.csv.gz"))
    (True, True, False)
    """
    return path.name.lower().endswith(ARCHIVES)


def _is_glob(path: Path) -> bool:
    """Whether a path is a pattern for several files.

    >>> _is_glob(Path("shards/train-*.tar"))
    True
    """
    return any(sign in path.name for sign in "*?[") and not path.exists()


def _may_hold_pictures(path: Path, config: DataConfig) -> bool:
    """Whether a path is a picture, a pattern for archives, or a folder, which holds pictures if no other kind reads it."""
    return path.is_dir() or _is_glob(path) or (path.is_file() and _has_ending(path.name))


@register.source("pictures", options=PICTURE_OPTIONS, endings=ARCHIVES, reads=_may_hold_pictures, rank=3)
def read_pictures(config: DataConfig) -> Raw:
    """Read the pictures below a folder, in an archive, or in several archives (shards), as levels ``(N, C, H, W)``.

    Each page of a TIFF is a picture; of animations, the first frame is read. Folders train, validation (valid, val) and
    test are the splits; names of shards may also begin with these words. Pictures are sorted by path. They are decoded
    once, into a cache.

    Raises:
        ValueError: there is no picture; some are broken, and ``unreadable`` does not allow that; their sizes or modes
            differ; or some are outside the splits' folders.
    """
    path = config.path
    room = Path(config.cache).expanduser() if config.cache else path.resolve().parent / FOLDER
    holders = _holders(path, room)
    found, others, beside = _pictures(holders)
    if not found:
        raise ValueError(
            f"{path} needs pictures (.png, .jpg, .tif and others that Pillow opens) or archives of them ({', '.join(ARCHIVES)}),"
            f" got {listed(others) or 'nothing'}; {to_read_heif(others) or 'check the path'}"
        )
    stamps = _digest(
        # With the folder's name: decoded copies of neighbouring folders share one place.
        [
            [holder.path.resolve().name, holder.stamp([picture.name for picture in group])]
            for holder, group in groupby(found, attrgetter("holder"))
        ]
    )
    readable, remarks = _readable(found, stamps, path, config)
    how = plan([(width, height, mode) for _, (width, height, mode) in readable], config.images, str(path))
    splits = split_by_folder([picture for picture, _ in readable], str(path))
    parts = {split: _encoded(group, how, {"files": stamps, "split": split}, path, config) for split, group in splits.items()}
    left_out = [f"left out pictures beside the others, in folders of masks or thumbnails: {listed(beside)}"] if beside else []
    words = [*how.words, *remarks, *left_out, *_ignored(others)]
    classes = {split: [class_folder(each.name, each.word) for each in group] for split, group in splits.items()}
    return Raw(
        str(path),
        parts,
        [_record(holder, found) for holder in holders],
        words,
        levels=2 if how.levels == 2 else None,
        labels=class_labels(classes),
    )


def class_folder(name: str, word: str) -> str | None:
    """The subfolder that a file is in; None where that is the folder of its split, called ``word``, or there is none.

    >>> class_folder("train/cat/1.png", "train"), class_folder("train/1.png", "train")
    ('cat', None)
    """
    folder = PurePosixPath(name).parent.name
    return None if folder in ("", word) else folder


def class_labels(classes: Mapping[SplitName, list[str | None]]) -> dict[SplitName, dict[str, list[str | None]]]:
    """The label of each example of a split by its folder; nothing where no example has one."""
    return {split: {"label": own} for split, own in classes.items()} if any(any(own) for own in classes.values()) else {}


def _holders(path: Path, room: Path) -> list[Container]:
    if _is_glob(path):
        files = sorted(path.parent.glob(path.name))
        if not files or not all(map(_is_archive, files)):
            raise ValueError(
                f"{path} needs to match archives ({', '.join(ARCHIVES)}), got {', '.join(map(str, files[:5])) or 'nothing'};"
                " check the pattern, or give a folder"
            )
        return [container(file, room) for file in files]
    if not path.exists():
        raise ValueError(f"expected an archive of pictures at {path}, got no such file; check the path")
    if path.is_file() and not _is_archive(path):
        return [_One(path)]
    whole = container(path, room)
    shards = [path / name for name in whole.names if _is_archive(Path(name))] if isinstance(whole, Folder) else []
    if not shards or any(map(_has_ending, whole.names)):
        return [whole]
    return [container(shard, room) for shard in shards]


def _pictures(holders: list[Container]) -> tuple[list[_Picture], Counter[str], Counter[str]]:
    """List all pictures; count the other files by ending, and the pictures that are masks or thumbnails by folder."""
    found, others, beside = [], Counter[str](), Counter[str]()
    for holder in holders:
        names = [name for name in holder.names if _is_picture(holder, name)]
        masks = {name: folder for name in names if (folder := _mask_folder(name))}
        if len(masks) < len(names):
            names = [name for name in names if name not in masks]
            beside.update(masks.values())
        if names:
            beside.update(hidden_pictures(holder))
        pictures = {*names, *masks}
        others.update(PurePosixPath(name).suffix or name for name in holder.names if name not in pictures)
        shard = "" if isinstance(holder, Folder) else _split_word(_SHARD.split(holder.path.name)[0], holder.path.parent.name)
        found += [_Picture(holder, name, shard or word) for name, word in zip(names, folder_words(names), strict=True)]
    return found, others, beside


def _mask_folder(name: str) -> str:
    """The folder that makes a picture a mask or a thumbnail of another one; "" if there is none.

    >>> _mask_folder("bottle/ground_truth/broken/000.png"), _mask_folder("masks.png")
    ('ground_truth', '')
    """
    return next((part for part in PurePosixPath(name).parts[:-1] if part.lower() in _MASKS), "")


def folder_words(names: list[str]) -> list[str]:
    """Return for each file its outermost folder, below folders that contain everything, if it names a split; else "".

    >>> folder_words(["data/train/a.png", "data/Test/b.png", "data/c.png"])
    ['train', 'Test', '']
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    while folders and all(parts and parts[0] == folders[0][0] and parts[0].lower() not in SPLIT_WORDS for parts in folders):
        folders = [parts[1:] for parts in folders]
    return [_split_word(parts[0]) if parts else "" for parts in folders]


def _split_word(*words: str) -> str:
    return next((word for word in words if word.lower() in SPLIT_WORDS), "")


def _has_ending(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in picture_endings()


def _is_picture(holder: Container, name: str) -> bool:
    """Whether a file is a picture by its ending, or by its first bytes if it has none."""
    if not has_no_ending(name):
        return _has_ending(name)
    try:
        return begins_like_picture(holder.read(name, 16))
    except DAMAGED:
        return False


def has_no_ending(name: str) -> bool:
    """Whether a name says nothing about the kind of file.

    >>> has_no_ending("IM000001"), has_no_ending("scan.001"), has_no_ending("scan.png")
    (True, True, False)
    """
    return re.fullmatch(r"\.?\d*", os.path.splitext(name)[1]) is not None


def begins_like_picture(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a PNG, JPEG, GIF, TIFF or WebP."""
    return _SIGNATURES.match(head) is not None


def hidden_pictures(holder: Container) -> Counter[str]:
    """Count the pictures in hidden folders and in those of systems (``@eaDir``, ``__MACOSX``), by folder."""
    folders = (_hidden_folder(os.path.dirname(name)) for name in holder.hidden if _has_ending(name))
    return Counter(folder for folder in folders if folder)


def _hidden_folder(path: str) -> str:
    return next((part for part in PurePosixPath(path).parts if is_hidden(part)), "")


def is_hidden(folder: str) -> bool:
    """Whether a folder is left out for its name.

    >>> is_hidden("@eaDir"), is_hidden(".thumbnails"), is_hidden("cats")
    (True, True, False)
    """
    return folder in SYSTEM_FOLDERS or folder.startswith(".")


def _readable(
    found: list[_Picture], stamps: str, path: Path, config: DataConfig
) -> tuple[list[tuple[_Picture, list[Any]]], list[str]]:
    """Select the pictures with readable headers, page by page, return these too, and describe the others in words."""

    def look() -> list[_Seen]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(_Picture.look, found))

    looked = remembered(path.resolve().parent, config.cache, {"pages, sizes and modes of": stamps}, look)
    # Failures are tried again: the disk may have failed, not the file.
    pairs = [(picture, picture.look() if isinstance(seen, str) else seen) for picture, seen in zip(found, looked, strict=True)]
    readable = [(picture, *seen) for picture, seen in pairs if not isinstance(seen, str)]
    broken = [(picture.label, wrong) for picture, wrong in pairs if isinstance(wrong, str)]
    paged = [
        (replace(picture, page=number if len(own) > 1 else None), one) for picture, own, _ in readable for number, *one in own
    ]
    remarks = _of_pages(readable)
    if not broken:
        return paged, remarks
    labels = ", ".join(label for label, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
    if config.images.unreadable == "refuse" or len(broken) == len(found):
        remedy = "repair or remove them, or leave them out: --unreadable skip" if paged else "repair or convert them"
        raise ValueError(
            f"{path}: {len(broken)} of {len(found)} pictures cannot be read ({labels}; the first: {broken[0][1]}); {remedy}"
        )
    return paged, [f"left out {len(broken)} of {len(found)} as unreadable ({labels})", *remarks]


def _of_pages(readable: list[tuple[_Picture, list[Any], int]]) -> list[str]:
    """Describe in words how files of several pictures are read."""
    several = [(picture.label, len(own)) for picture, own, _ in readable if len(own) > 1]
    first = [picture.label for picture, own, others in readable if others and len(own) == 1]
    left_out = sum(others for _, own, others in readable if len(own) > 1)
    few = ", ".join(f"{label} ({count})" for label, count in several[:5]) + (", ..." if len(several) > 5 else "")
    return [
        *([f"each page of a TIFF with several is an example: {few}"] if several else []),
        *([f"left out {left_out} reduced copies and masks among their pages"] if left_out else []),
        *([f"the first picture of files with several: {', '.join(first[:5])}{', ...' * (len(first) > 5)}"] if first else []),
    ]


class _Placed(Protocol):
    """An example with its name, and the folder that names its split."""

    @property
    def label(self) -> str: ...
    @property
    def word(self) -> str: ...


_Example = TypeVar("_Example", bound=_Placed)


def split_by_folder(examples: list[_Example], name: str) -> dict[SplitName, list[_Example]]:
    """Split examples by their folders; all are for training if no folder names a split.

    Raises:
        ValueError: no folder names the training split, two name one split, or an example is outside of them.
    """
    words = Counter(example.word for example in examples if example.word)
    if not words:
        return {"train": examples}
    outside = [example.label for example in examples if not example.word]
    splits = [SPLIT_WORDS[word.lower()] for word in words]
    if outside or "train" not in splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"{name} needs its examples in train, and in validation and test or those split at random, or none in any of them; got"
            f" {listed(words)}{f' and {len(outside)} elsewhere ({outside[0]}, say)' if outside else ''}; move or rename them"
        )
    return {
        split: [example for example in examples if SPLIT_WORDS[example.word.lower()] == split]
        for split in SPLITS
        if split in splits
    }


def _encoded(pictures: list[_Picture], how: PicturePlan, identity: dict[str, Any], path: Path, config: DataConfig) -> Encoded:
    names = [picture.label for picture in pictures]
    identity |= {"plan": asdict(how), "names": _digest(names)}
    return Encoded(
        names,
        how.shape,
        how.dtype,
        decode=lambda i: pictures[i].decode(how),
        identity=identity,
        home=path.resolve().parent,
        skip_unreadable=config.images.unreadable == "skip",
        videos=_file_numbers(pictures) if any(picture.page is not None for picture in pictures) else None,
    )


def _file_numbers(pictures: list[_Picture]) -> list[int]:
    """Number the files that the pictures come from."""
    numbers: dict[tuple[Path, str], int] = {}
    return [numbers.setdefault((picture.holder.path, picture.name), len(numbers)) for picture in pictures]


def _ignored(others: Counter[str]) -> list[str]:
    remedy = f" ({heif})" if (heif := to_read_heif(others)) else ""
    return [f"ignored files that are not pictures: {listed(others)}{remedy}"] if others else []


def to_read_heif(others: Counter[str]) -> str:
    """Say what reads HEIF pictures, if there are any among the endings of ignored files."""
    found = [ending for ending in others if ending.lower() in _HEIF]
    if not found:
        return ""
    return f"to read {found[0]}: pip install pillow-heif, or convert them: magick mogrify -format jpg *{found[0]}"


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
