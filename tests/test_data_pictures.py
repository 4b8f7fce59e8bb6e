"""Every kind of picture becomes the array that its pixels are; what does not fit together is refused or made to fit as told."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sigma_vae.config import ImageConfig
from sigma_vae.data.pictures import plan, probe
from sigma_vae.data.stores import UnreadableError

STATE = np.random.RandomState(0)
GREY = STATE.randint(0, 256, (6, 8)).astype(np.uint8)
RGB = STATE.randint(0, 256, (6, 8, 3)).astype(np.uint8)
RGBA = STATE.randint(0, 256, (6, 8, 4)).astype(np.uint8)
DEEP = STATE.randint(0, 65536, (6, 8)).astype(np.uint16)
BITS = GREY > 127


def file_of(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def decoded(content, images=ImageConfig()):  # noqa: B008, frozen
    return plan([probe(content)], images, "it").read(content)


def channels_first(pixels):
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def palette(entries, **options):
    """A PNG of palette indices 0..3, with these colours."""
    image = Image.fromarray(GREY % 4).convert("P")
    image.putdata((GREY % 4).flatten().tolist())
    image.putpalette(np.uint8(entries).flatten().tobytes())
    return file_of(image, **options)


def png(depth, colour, rows):
    """A PNG by the letter of its specification, of modes that Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", rows.shape[1], len(rows), depth, colour, 0, 0, 0)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


GREYS = np.uint8([[9, 9, 9], [70, 70, 70], [255, 255, 255], [0, 0, 0]])
COLOURS = np.uint8([[9, 0, 7], [70, 1, 70], [255, 0, 0], [0, 0, 0]])
COLOURS_16 = STATE.randint(0, 65536, (6, 8, 3)).astype(">u2")
KINDS = {
    "1 bit": (lambda: file_of(Image.fromarray(BITS)), BITS, 2),
    "8-bit grey": (lambda: file_of(Image.fromarray(GREY)), GREY, 256),
    "16-bit grey": (lambda: file_of(Image.fromarray(DEEP)), DEEP, 65536),
    "16-bit grey, by the letter": (lambda: png(16, 0, DEEP.astype(">u2")), DEEP, 65536),
    "16-bit TIFF": (lambda: file_of(Image.fromarray(DEEP), "TIFF"), DEEP, 65536),
    "32-bit TIFF": (lambda: file_of(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP, 65536),
    "16-bit PGM": (lambda: b"P5 8 6 65535\n" + DEEP.astype(">u2").tobytes(), DEEP, 65536),
    "rgb": (lambda: file_of(Image.fromarray(RGB)), RGB, 256),
    "rgb TIFF": (lambda: file_of(Image.fromarray(RGB), "TIFF"), RGB, 256),
    "rgb BMP": (lambda: file_of(Image.fromarray(RGB), "BMP"), RGB, 256),
    "rgb PPM": (lambda: b"P6 8 6 255\n" + RGB.tobytes(), RGB, 256),
    "rgb WebP": (lambda: file_of(Image.fromarray(RGB), "WEBP", lossless=True), RGB, 256),
    "rgba": (lambda: file_of(Image.fromarray(RGBA)), RGBA, 256),
    "grey and alpha": (lambda: file_of(Image.fromarray(RGBA[..., :2], "LA")), RGBA[..., :2], 256),
    "16-bit rgb": (lambda: png(16, 2, COLOURS_16), (COLOURS_16 >> 8).astype(np.uint8), 256),
    "grey palette": (lambda: palette(GREYS), GREYS[GREY % 4][..., 0], 256),
    "colour palette": (lambda: palette(COLOURS), COLOURS[GREY % 4], 256),
    "transparent palette": (
        lambda: palette(COLOURS, transparency=b"\xff\x80\xff\x00"),
        np.concatenate([COLOURS[GREY % 4], np.uint8([255, 128, 255, 0])[GREY % 4][..., None]], -1),
        256,
    ),
    "gif": (
        lambda: file_of(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(GREY.T.reshape(6, 8))]),
        GREY,
        256,
    ),
    "cmyk": (
        lambda: file_of(Image.fromarray(RGBA, "CMYK"), "TIFF"),
        np.rint((255.0 - RGBA[..., :3]) * (255.0 - RGBA[..., 3:]) / 255),
        256,
    ),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_what_was_written(kind):
    make, pixels, levels = KINDS[kind]
    content = make()
    how = plan([probe(content)], ImageConfig(), "it")
    array = how.read(content)
    assert array.shape == how.shape
    assert array.dtype == how.dtype == ("uint16" if levels == 65536 else "uint8")
    assert how.levels == levels
    # Converting CMYK rounds a product of bytes, differently from one version to another; all else is exact.
    assert np.abs(array.astype(int) - channels_first(pixels).astype(int)).max() <= (kind == "cmyk")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    """The EXIF tag says which side of the stored rows is up: row 0 and column 0 lie at these sides of the scene."""
    sides = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.T,
        6: lambda p: p[::-1].T,
        7: lambda p: p[::-1, ::-1].T,
        8: lambda p: p.T[::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for pixels in (GREY, DEEP):
        content = file_of(Image.fromarray(pixels), exif=exif)
        expected = sides[orientation](pixels)
        assert probe(content)[:2] == expected.shape[::-1]
        assert np.array_equal(decoded(content)[0], expected)


SHAPES = {
    "crop": (ImageConfig(crop=4), GREY[1:5, 2:6]),
    "fit crop": (ImageConfig(fit="crop"), GREY[:, 1:7]),
    "fit pad": (ImageConfig(fit="pad"), np.pad(GREY, ((1, 1), (0, 0)))),
    "crop then size": (ImageConfig(crop=4, size=2), GREY[1:5, 2:6]),
    "fit crop then size": (ImageConfig(fit="crop", size=3), GREY[:, 1:7]),
    "fit pad then size": (ImageConfig(fit="pad", size=5), np.pad(GREY, ((1, 1), (0, 0)))),
    "stretch": (ImageConfig(fit="stretch", size=4), GREY),
    "enlarge": (ImageConfig(fit="crop", size=11), GREY[:, 1:7]),
}


def triangles(pixels, size):
    """Bilinear resizing with antialiasing: triangles as wide as a new pixel (or an old one, if that is wider), in float64."""
    for axis, old in enumerate(pixels.shape):
        step = old / size
        centres = (np.arange(size) + 0.5) * step
        weights = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(step, 1))
        weights /= weights.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
    return pixels


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("deep", [False, True])
def test_windows_and_resizing(kind, deep):
    images, window = SHAPES[kind]
    factor = 257 if deep else 1
    array = decoded(file_of(Image.fromarray(GREY.astype(np.uint16) * 257 if deep else GREY)), images)[0].astype(float)
    if images.size is None:
        assert np.array_equal(array, window.astype(int) * factor)
    else:  # 16 bits are rounded once, so that they show whether anything went through 8; Pillow rounds 8 bits for each axis
        assert array.shape == (images.size, images.size)
        assert np.abs(array - triangles(window.astype(float) * factor, images.size)).max() < (0.51 if deep else 1.51)


def test_black_and_white_is_grey_once_resized():
    content = file_of(Image.fromarray(BITS))
    how = plan([probe(content)], ImageConfig(size=4, fit="stretch"), "it")
    assert how.levels == 256
    assert np.abs(how.read(content)[0] - triangles(BITS * 255.0, 4)).max() < 1.51


LUMA = np.rint(RGB @ [0.299, 0.587, 0.114])
CONVERSIONS = {
    "rgb to grey": (Image.fromarray(RGB), "grey", LUMA),
    "grey to rgb": (Image.fromarray(GREY), "rgb", GREY[..., None].repeat(3, -1)),
    "bits to rgb": (Image.fromarray(BITS), "rgb", BITS[..., None].repeat(3, -1) * 255),
    "rgba to rgb": (Image.fromarray(RGBA), "rgb", RGBA[..., :3]),
    "rgb to rgba": (Image.fromarray(RGB), "rgba", np.concatenate([RGB, np.full((6, 8, 1), 255)], -1)),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_colours_are_converted(kind):
    image, colour, expected = CONVERSIONS[kind]
    array = decoded(file_of(image), ImageConfig(colour=colour)).astype(int)
    assert np.abs(array - channels_first(expected).astype(int)).max() <= (colour == "grey")  # luma in 16-bit fixed point


SQUARES = [(8, 8, "L"), (6, 6, "L"), (8, 8, "L")]
REFUSED = {
    "none": ([], {}, "expected pictures, got none"),
    "sizes": (SQUARES, {}, r"need one size, got 2: 8×8 \(2\), 6×6 \(1\) .*--size 6, say\)"),
    "oblong sizes": ([*SQUARES, (8, 6, "L")], {}, "got 3: .* with --fit crop, stretch or pad"),
    "crops of several sizes": ([(8, 6, "L"), (9, 7, "L")], {"fit": "crop"}, "need one size, got 2: 6×6"),
    "many sizes": ([(n, n, "L") for n in range(1, 9)], {}, "got 8: .* and 3 more"),
    "oblong": ([*SQUARES, (8, 6, "L")], {"size": 4}, r"size 4 needs square pictures, got 8×6 \(1\).*--fit crop"),
    "small": (SQUARES, {"crop": 7}, r"crop 7 needs pictures of at least 7×7, got 6×6 \(1\).*crop at most 6"),
    "modes": ([(8, 8, "L"), (8, 8, "RGB")], {}, r"same channels, got modes L \(1\), RGB \(1\); .*--colour grey, rgb or rgba"),
    "alpha": ([(8, 8, "RGBA"), (8, 8, "RGB")], {}, "same channels"),
    "depths": ([(8, 8, "L"), (8, 8, "I;16")], {"colour": "grey"}, "16-bit grey pictures cannot be mixed"),
    "deep colour": ([(8, 8, "I;16")], {"colour": "rgb"}, "16-bit grey pictures cannot be mixed with others or get colours"),
    "floats": ([(8, 8, "F")], {}, r"need modes 1, L, .* got F \(1\); convert them, or save floats as .npy"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_together_is_refused(kind):
    probed, options, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        plan(probed, ImageConfig(**options), "it")


@pytest.mark.parametrize(
    ("probed", "options", "shape"),
    [
        (SQUARES, {"size": 5}, (1, 5, 5)),
        (SQUARES, {"crop": 6}, (1, 6, 6)),
        ([(8, 6, "L"), (6, 9, "L")], {"fit": "crop"}, (1, 6, 6)),
        ([(8, 6, "L"), (6, 9, "RGB")], {"fit": "stretch", "size": 4, "colour": "rgb"}, (3, 4, 4)),
        ([(8, 6, "L"), (8, 6, "1")], {}, (1, 6, 8)),
        ([(8, 6, "CMYK"), (8, 6, "RGB")], {}, (3, 6, 8)),
    ],
)
def test_what_fits_has_one_shape(probed, options, shape):
    how = plan(probed, ImageConfig(**options), "it")
    assert how.shape == shape
    assert how.levels == 256


def test_what_is_done_is_said():
    probed = [(9, 9, "RGBA"), (9, 9, "RGB;16")]
    words = "; ".join(plan(probed, ImageConfig(crop=8, size=4, colour="grey"), "it").words)
    for part in (
        "grey, 8 bits",
        "EXIF",
        "central 8×8",
        "resized to 4×4",
        "bilinear",
        "upper 8 of 16",
        "transparency ignored",
        "luma",
    ):
        assert part in words


BROKEN = {
    "empty": b"",
    "text": b"not a picture",
    "header cut": file_of(Image.fromarray(RGB))[:20],
    "out of range": file_of(Image.fromarray(np.full((6, 8), -1, np.int32)), "TIFF"),
    "pixels cut": file_of(Image.fromarray(STATE.randint(0, 256, (64, 64, 3)).astype(np.uint8)))[:900],
    "jpeg cut": file_of(Image.fromarray(STATE.randint(0, 256, (64, 64, 3)).astype(np.uint8)), "JPEG")[:900],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_unreadable(kind):
    with pytest.raises(UnreadableError):
        decoded(BROKEN[kind])


def test_a_picture_that_has_changed_is_unreadable():
    with pytest.raises(UnreadableError, match=r"needs shape \(1, 6, 8\), as its file said before, got \(1, 8, 6\)"):
        plan([(8, 6, "L")], ImageConfig(), "it").read(file_of(Image.fromarray(GREY.T)))
