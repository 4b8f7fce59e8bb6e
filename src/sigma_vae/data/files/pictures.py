"""From pictures of any size and mode to arrays of one shape, by a plan that is fixed before the first one is decoded."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, final

import numpy as np

from sigma_vae.config import ImageConfig
from sigma_vae.data.files.picture_rules import Colour, Fit, Probe, channels, common_size, remarks, window
from sigma_vae.data.levels import Array
from sigma_vae.data.raw import UnreadableError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PicturePlan", "plan", "probe"]

_ORIENTATION = 0x0112  # the EXIF tag; values of 5 and more exchange width and height
_MODES: dict[Colour, str] = {"grey": "L", "grey+alpha": "LA", "rgb": "RGB", "rgba": "RGBA"}


@final
@dataclass(frozen=True)
class PicturePlan:
    """How each picture of a set becomes an array ``(C, H, W)`` of one shape: made by :func:`plan`.

    The order is: upright by its EXIF orientation, channels, window (``crop``, or what ``fit`` says), resizing to ``size``.

    Args:
        crop: side of the central square that is cut out, in pixels.
        size: side that the window is resized to, in pixels.
        fit: ``crop`` and ``pad`` make the window square where ``crop`` does not.
        colour: the channels.
        bits: of a value: 1, 8 or 16.
        height: of the result.
        width: of the result.
        remarks: what else was done to some pictures, in words.

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
        """Of a decoded picture: ``(C, H, W)``."""
        return (1 if self.colour == "grey" else len(_MODES[self.colour]), self.height, self.width)

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """Of a decoded picture."""
        return "uint16" if self.bits == 16 else "uint8"

    @property
    def levels(self) -> int:
        """How many values a datum can take: 2, 256 or 65536."""
        return 1 << self.bits

    @property
    def words(self) -> list[str]:
        """What is done, for the record of a run."""
        kept = f"pictures as {self.colour}, {self.bits} bit{'s' * (self.bits > 1)}, upright by their EXIF orientation"
        window = self._window_words()
        resized = f"resized to {self.size}×{self.size} (Pillow, bilinear with antialiasing)" if self.size else ""
        return [word for word in (kept, *self.remarks, window, resized) if word]

    def _window_words(self) -> str:
        if self.crop:
            return f"cut to the central {self.crop}×{self.crop}"
        words = {"crop": "cut to the largest central square", "pad": "padded with black to squares", "stretch": "stretched"}
        return words.get(self.fit, "")

    def read(self, file: Path | bytes | IO[bytes]) -> Array:
        """Decode a file.

        Raises:
            UnreadableError: it is broken, or not what it was when the plan was made.
        """
        from PIL import Image

        try:
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        except Exception as error:
            raise _unreadable(error) from error
        with image:
            return self.decode(image)

    def decode(self, image: "Image") -> Array:
        """Decode a picture that Pillow has opened; safe in several threads, each with an image of its own.

        Returns:
            Levels ``(C, H, W)``, uint8 or uint16.

        Raises:
            UnreadableError: it is broken, or not of the size that the plan was made for.
        """
        try:
            shaped = self._resized(self._windowed(self._converted(_upright(image))))
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
        width, height = window(image.width, image.height, self.crop, self.fit)
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
    """Width, height and mode of a picture, from its header (palettes: from the whole).

    The mode is Pillow's, but for palettes, of which it is what they hold: ``L``, ``RGB`` or ``RGBA``; and ``RGB;16`` and the
    like for 16-bit colours, of which Pillow reads the upper 8 bits.

    Raises:
        UnreadableError: it is no picture, or broken.

    >>> from PIL import Image
    >>> buffer = io.BytesIO()
    >>> Image.new("RGB", (4, 2)).save(buffer, format="PNG")
    >>> probe(buffer.getvalue())
    (4, 2, 'RGB')
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width, _mode(image)) if turned else (width, height, _mode(image))
    except Exception as error:  # as in decode
        raise _unreadable(error) from error


def plan(sizes_and_modes: Iterable[Probe], images: ImageConfig, name: str) -> PicturePlan:
    """The one shape that all pictures get.

    Args:
        sizes_and_modes: what :func:`probe` says of each.
        images: what the user wants.
        name: of the set, for messages.

    Raises:
        ValueError: there are none; they differ in size or channels, and the user does not say what is to be done; or they are of a
            kind that has no levels.

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
    colour, bits = channels(modes, images, name)
    width, height = common_size(sizes, images, name)
    return PicturePlan(images.crop, images.size, images.fit, colour, bits, height, width, remarks(modes, colour))


def _mode(image: "Image") -> str:
    from PIL.ImageFile import ImageFile

    if image.mode in ("P", "PA"):
        return "RGBA" if _has_alpha(image) else "L" if _is_grey(image) else "RGB"
    raw = str(image.tile[0].args) if isinstance(image, ImageFile) and image.tile else ""
    return f"{image.mode};16" if image.mode in ("LA", "RGB", "RGBA") and ";16" in raw else image.mode


def _has_alpha(image: "Image") -> bool:
    return image.mode == "PA" or "transparency" in image.info


def _is_grey(image: "Image") -> bool:
    palette = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    return bool((palette == palette[:, :1]).all())


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _as_float(image: "Image") -> "Image":
    """16 bits are exact in float32; Pillow's own 16-bit modes are resized and converted through 8."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.ndim != 2 or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"it needs grey levels 0..65535, its values go from {pixels.min()} to {pixels.max()}")
    return Image.fromarray(pixels.astype(np.float32))


def _unreadable(error: Exception) -> UnreadableError:
    return UnreadableError(f"{type(error).__name__}: {error}")
