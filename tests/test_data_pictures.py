"""Every kind of picture becomes the array that its pixels are; what does not fit together is refused or made to fit as told."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae.config import ClipConfig, DataConfig, ImageConfig
from sigma_vae.data import load, videos
from sigma_vae.data.pictures import plan, probe
from sigma_vae.data.stores import UnreadableError
from sigma_vae.data.videos import Film, Frames

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


# -- Clips are the frames that were in the videos, in whatever order they are decoded; broken videos are refused -------

av = pytest.importorskip("av", reason="videos need the package av")

SPLITS = ("train", "validation", "test")
FORMATS = {
    "h264.mp4": ("libx264", "yuv420p"),
    "h264.mov": ("libx264", "yuv420p"),
    "h264.mkv": ("libx264", "yuv420p"),
    "vp8.webm": ("libvpx", "yuv420p"),
    "vp9.webm": ("libvpx-vp9", "yuv420p"),
    "mpeg4.avi": ("mpeg4", "yuv420p"),
    "motion-jpeg.avi": ("mjpeg", "yuvj420p"),
    "lossless.mkv": ("ffv1", "bgr0"),
    "lossless-grey.mkv": ("ffv1", "gray"),
    "raw.avi": ("rawvideo", "bgr24"),
    "palette.gif": ("gif", "rgb8"),
}
LOSSLESS = ("lossless.mkv", "raw.avi")


def pictures(count, seed=0, height=16, width=24):
    """Frames that all differ, smooth enough for any codec."""
    rows, columns = np.mgrid[:height, :width]
    frames = [
        np.stack([(rows * 7 + 9 * t + 50 * seed) % 256, (columns * 5 + 11 * t) % 256, np.full_like(rows, 5 * t % 256)], -1)
        for t in range(count)
    ]
    return np.stack(frames).astype(np.uint8)


def write_video(path, frames, codec=None, pixel_format=None, **options):
    codec, pixel_format = (codec, pixel_format) if codec else FORMATS.get(path.name, ("ffv1", "bgr0"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w", **options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = pixel_format, 12
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(folder, frames, ending=".png"):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}{ending}")
    return folder


def decoded_frames(path, pixel_format="rgb24"):
    """All frames (T, C, H, W), from the first to the last, by nothing but PyAV."""
    with av.open(path) as container:
        arrays = [frame.to_ndarray(format=pixel_format) for frame in container.decode(video=0)]
    stacked = np.stack(arrays)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


def cut(frames, length, step=1):
    """Windows side by side, independently: thinned out first, then cut."""
    thinned = frames[::step]
    return np.stack([thinned[i : i + length] for i in range(0, len(thinned) - length + 1, length)])


def rows(part):
    return sorted(map(bytes, np.ascontiguousarray(part).reshape(len(part), -1)))


def together(splits):
    return rows(torch.cat([splits.stored(name) for name in SPLITS]).numpy())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, pictures(100)) for name in FORMATS}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_clips_are_the_frames_of_the_video(made, monkeypatch, tmp_path, name, step):
    monkeypatch.setattr("sigma_vae.data.cache.PIECE", 2)  # several threads enter the video in the middle
    monkeypatch.setattr(videos, "MARKS_APART", 10)
    grey = name == "lossless-grey.mkv"
    splits = load(DataConfig(str(made[name]), cache=str(tmp_path), clips=ClipConfig(frames=4, frame_step=step)))
    assert splits.clips
    assert splits.shape == (1 if grey else 3, 16, 24)
    assert together(splits) == rows(cut(decoded_frames(made[name], "gray" if grey else "rgb24"), 4, step))
    if name in LOSSLESS:
        assert together(splits) == rows(cut(pictures(100).transpose(0, 3, 1, 2), 4, step))


@pytest.mark.parametrize("name", FORMATS)
def test_windows_in_any_order_and_thread(made, monkeypatch, name):
    monkeypatch.setattr(videos, "MARKS_APART", 10)
    video = Film(made[name])
    survey = video.survey()
    assert survey.frames == 100
    shared = plan(survey.probes, ImageConfig(), name)
    places = [videos.Window(0, start) for start in videos.starts(100, 3, 2)]
    clips = videos.Windows([(video, survey)], places, 3, 2, shared)
    expected = cut(decoded_frames(made[name], "gray" if shared.shape[0] == 1 else "rgb24"), 3, 2)
    order = np.random.RandomState(0).permutation(len(places)).tolist()
    for number in order:
        assert np.array_equal(clips(number), expected[number])
    with ThreadPoolExecutor(4) as pool:
        for number, clip in zip(order, pool.map(clips, order), strict=True):
            assert np.array_equal(clip, expected[number])


def write_deep(path, pixel_format, values):
    """Frames with these values as they are, of 9 to 16 bits in two bytes each."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *values.shape[1:], pixel_format
        for each in values:
            frame = av.VideoFrame(values.shape[2], values.shape[1], pixel_format)
            for plane in frame.planes:
                plane.update(np.resize(each, plane.buffer_size // 2).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("pixel_format", "bits"), [("gray16le", 16), ("gray12le", 12), ("gray10le", 10)])
def test_grey_videos_keep_all_their_bits(tmp_path, pixel_format, bits):
    values = np.random.RandomState(0).randint(0, 2**bits, (12, 16, 32)).astype(np.uint16)
    path = str(write_deep(tmp_path / "deep.mkv", pixel_format, values))
    splits = load(DataConfig(path, clips=ClipConfig(frames=1)))
    assert splits.levels == 65536
    assert together(splits) == rows(values[:, None, None])
    words = splits.record["preprocessing"]
    assert "pictures as grey, 16 bits" in words
    assert (f"grey of {bits} bits in 16 (1 of 1)" in words) == (bits < 16)
    if bits < 16:
        assert load(DataConfig(path, clips=ClipConfig(frames=1), levels=2**bits)).levels == 2**bits


@pytest.mark.parametrize(("pixel_format", "said"), [("yuv420p10le", True), ("yuv420p", False)])
def test_colours_of_more_than_8_bits_are_said_to_be_reduced(tmp_path, pixel_format, said):
    path = write_video(tmp_path / "clip.mkv", pictures(12), "ffv1", pixel_format)
    splits = load(DataConfig(str(path), clips=ClipConfig(frames=1)))
    assert splits.levels == 256
    assert ("the upper 8 of 10 bits of each colour (1 of 1)" in splits.record["preprocessing"]) == said


def test_folders_of_thumbnails_are_no_videos(tmp_path):
    for name in ("a", "b", "c"):
        write_frames(tmp_path / name, pictures(4))
    write_frames(tmp_path / "a" / "@eaDir", pictures(8))
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4)))
    assert splits.record["counts"] == {"train": 1, "validation": 1, "test": 1}
    assert "left out pictures in folders of thumbnails: @eaDir (8)" in splits.record["preprocessing"]


def test_a_frame_is_one_page(tmp_path):
    write_frames(tmp_path / "a", pictures(4), ".tif")
    first, *rest = map(Image.fromarray, pictures(3))
    first.save(tmp_path / "a" / "4.tif", save_all=True, append_images=rest)
    with pytest.raises(
        ValueError, match=r"4.tif cannot be decoded: it has 3 pages, .*leave --frames out to read them as pictures"
    ):
        load(DataConfig(str(tmp_path), clips=ClipConfig(frames=2)))
    assert sum(load(DataConfig(str(tmp_path))).record["counts"].values()) == 7


class Opened:
    """Counts how often a video is entered, and how many frames are decoded."""

    def __init__(self, monkeypatch):
        self.entries = self.frames = 0
        enter = Film._decoded

        def counted(film, *arguments, **options):
            self.entries += 1
            for frame in enter(film, *arguments, **options):
                self.frames += 1
                yield frame

        monkeypatch.setattr(Film, "_decoded", counted)


def test_decoding_is_linear(made, monkeypatch):
    video = Film(made["h264.mp4"])
    survey = video.survey()
    places = [videos.Window(0, start) for start in videos.starts(100, 2, 1)]
    clips = videos.Windows([(video, survey)], places, 2, 1, plan(survey.probes, ImageConfig(), "video"))
    opened = Opened(monkeypatch)
    for number in range(len(places)):
        clips(number)
    assert (opened.entries, opened.frames) == (1, 100)


def test_a_long_video_is_entered_near_to_where_it_is_wanted(made, monkeypatch):
    monkeypatch.setattr(videos, "MARKS_APART", 10)
    for name in set(FORMATS) - {"palette.gif"}:  # a GIF has one key frame
        video = Film(made[name])
        survey = video.survey()
        assert len(survey.marks) > 4
        with monkeypatch.context() as patch:
            opened = Opened(patch)
            next(video.frames(90, survey))
        assert opened.frames <= 15, name


def test_a_far_window_is_not_reached_frame_by_frame(made, monkeypatch):
    monkeypatch.setattr(videos, "MARKS_APART", 10)
    video = Film(made["h264.mp4"])
    survey = video.survey()
    clips = videos.Windows(
        [(video, survey)], [videos.Window(0, 0), videos.Window(0, 90)], 2, 1, plan(survey.probes, ImageConfig(), "")
    )
    opened = Opened(monkeypatch)
    clips(0)
    assert np.array_equal(clips(1), decoded_frames(made["h264.mp4"])[90:92])
    assert opened.frames <= 20


MARKS = {"a frame that is no key frame": (17, 17 * 512), "no frame": (12, 12 * 512 + 1), "behind the end": (12, 10**6)}


@pytest.mark.parametrize("mark", MARKS)
def test_frames_are_found_where_a_seek_leads_elsewhere(made, mark):
    video = Film(made["h264.mp4"])
    survey = video.survey()
    misled = videos.Survey(survey.frames, survey.probes, [(0, 0), MARKS[mark]])
    shared = plan(survey.probes, ImageConfig(), "video")
    assert np.array_equal(next(video.frames(20, misled))(shared), decoded_frames(made["h264.mp4"])[20])


def test_frames_in_folders_go_by_their_numbers(tmp_path):
    videos = [pictures(23, seed) for seed in range(4)]
    for number, frames in enumerate(videos):
        write_frames(tmp_path / f"video {number}", frames)
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=11, frame_step=2)))
    assert together(splits) == rows(np.concatenate([cut(frames.transpose(0, 3, 1, 2), 11, 2) for frames in videos]))
    assert splits.record["counts"] == {"train": 2, "validation": 1, "test": 1}
    one = load(DataConfig(str(tmp_path / "video 0"), clips=ClipConfig(frames=2)))
    assert together(one) == rows(cut(videos[0].transpose(0, 3, 1, 2), 2))
    assert "clips of one video are in several splits, as there is only one" in one.record["preprocessing"]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "Valid", "TEST")])
def test_folders_of_splits(tmp_path, names):
    parts = dict(zip(names, (pictures(20, 0), pictures(12, 1), pictures(17, 2)), strict=True))
    for name, frames in parts.items():
        write_video(tmp_path / name / "below" / "a.mkv", frames)
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=5, test_frames=8)))
    for split, frames in zip(SPLITS, parts.values(), strict=True):
        expected = cut(frames.transpose(0, 3, 1, 2), 8 if split == "test" else 5)
        assert np.array_equal(splits.stored(split).numpy(), expected)
    assert "clips of 5 frames (test: 8), side by side; 3 frames at the ends of videos dropped" in splits.record["preprocessing"]


def owners(splits, videos, length):
    """For each split, the videos that its clips are from."""
    clips = {bytes(clip): owner for owner, frames in enumerate(videos) for clip in cut(frames.transpose(0, 3, 1, 2), length)}
    return [{clips[bytes(clip.numpy())] for clip in splits.stored(split)} for split in SPLITS]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_video_is_in_two_splits(tmp_path, seed):
    videos = [pictures(9 + 4 * number, number) for number in range(5)]
    for number, frames in enumerate(videos):
        write_video(tmp_path / f"{number}.mkv", frames)
    config = DataConfig(str(tmp_path), clips=ClipConfig(frames=3), split_seed=seed, test_fraction=0.4)
    splits = load(config)
    of_train, of_validation, of_test = owners(splits, videos, 3)
    assert [len(of_train), len(of_validation), len(of_test)] == [2, 1, 2]
    assert of_train | of_validation | of_test == set(range(5))
    assert sum(splits.record["counts"].values()) == sum(len(frames) // 3 for frames in videos)
    assert f"all from 2 videos at random (seed {seed})" in splits.record["preprocessing"]


def test_two_videos_are_shared_out_by_clips(tmp_path):
    for number in range(2):
        write_video(tmp_path / f"{number}.mkv", pictures(30, number))
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=3)))
    assert splits.record["counts"] == {"train": 16, "validation": 2, "test": 2}
    assert "clips of one video are in several splits, as there are only 2" in splits.record["preprocessing"]


def test_a_train_folder_is_split_by_videos(tmp_path):
    videos = [pictures(12, number) for number in range(3)]
    for number, place in enumerate(("train", "train", "test")):
        write_video(tmp_path / place / f"{number}.mkv", videos[number])
    sets = owners(load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4))), videos, 4)
    assert sets[2] == {2}
    assert sorted(map(len, sets)) == [1, 1, 1]


def test_pictures_of_frames_are_planned_like_others(tmp_path):
    for number, (height, width) in enumerate([(16, 24), (20, 20), (16, 24)]):
        write_video(tmp_path / f"{number}.mkv", pictures(8, number, height, width))
    with pytest.raises(ValueError, match="pictures need one size, got 2"):
        load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4)))
    images = ImageConfig(fit="crop", size=8, colour="grey")
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4), images=images))
    assert splits.shape == (1, 8, 8)
    assert "cut to the largest central square; resized to 8×8" in splits.record["preprocessing"]
    left = Image.fromarray(pictures(8, 0)[5]).convert("L").crop((4, 0, 20, 16)).resize((8, 8), Image.Resampling.BILINEAR)
    assert bytes(np.asarray(left)) in {
        bytes(frame.numpy()) for name in SPLITS for clip in splits.stored(name) for frame in clip
    }


def test_default_clips_have_16_frames_and_are_not_surveyed_again(made, monkeypatch, tmp_path):
    path = made["lossless.mkv"]
    config = DataConfig(path.name, root=str(path.parent), cache=str(tmp_path), validation_fraction=0.3, test_fraction=0.3)
    splits = load(config)
    assert splits.train.shape == (16, 3, 16, 24)
    assert "4 frames at the ends of videos dropped" in splits.record["preprocessing"]
    monkeypatch.setattr(Film, "survey", lambda film: pytest.fail("the video was gone through again"))
    assert load(config).record == splits.record


TURNED = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("clockwise", TURNED)
def test_videos_are_turned_as_they_are_shown(tmp_path, clockwise):
    """Telephones keep frames as the sensor lies, and the way to turn them in the track's matrix (ISO 14496-12, 8.3.2)."""
    path = write_video(tmp_path / "turned.mp4", pictures(32), "libx264", "yuv420p")
    plain = decoded_frames(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version and flags, times, track, duration, and what else is before the matrix
    a, b, c, d = (number * 0x10000 for number in TURNED[clockwise])
    assert struct.unpack_from(">iiiii", content, start) == (0x10000, 0, 0, 0, 0x10000)
    struct.pack_into(">iiiii", content, start, a, b, 0, c, d)
    path.write_bytes(content)
    splits = load(DataConfig(str(path), clips=ClipConfig(frames=4)))
    assert together(splits) == rows(cut(np.rot90(plain, -clockwise // 90, (2, 3)), 4))


BROKEN_VIDEOS = {
    "half an mp4": ("h264.mp4", lambda content: content[: len(content) // 2], "cannot be decoded: .*Invalid data"),
    "half a matroska": ("h264.mkv", lambda content: content[: len(content) // 2], "is cut off: it ends after .* s of 4.00 s"),
    "half a webm": ("vp9.webm", lambda content: content[: len(content) // 2], "is cut off: it ends after .* s of 4.00 s"),
    "half an avi": ("raw.avi", lambda content: content[: len(content) // 2], "cannot be decoded"),
    "half a gif": ("palette.gif", lambda content: content[: len(content) // 2], "is cut off: it has no trailer"),
    "noise in an mp4": ("h264.mp4", lambda content: noisy(content), "(cannot be decoded|damaged frames)"),
    "text": ("h264.mp4", lambda content: b"no video at all" * 99, "cannot be decoded"),
    "empty": ("h264.mp4", lambda content: b"", "cannot be decoded"),
    "headers alone": (
        "raw.avi",
        lambda content: content[: content.index(b"movi") + 4],
        "(cannot be decoded|no frames|cut off)",
    ),
}


def noisy(content):
    middle = len(content) // 2
    return content[:middle] + np.random.RandomState(0).bytes(400) + content[middle + 400 :]


@pytest.mark.parametrize("kind", BROKEN_VIDEOS)
def test_broken_videos_are_refused_or_left_out(made, tmp_path, kind):
    name, change, message = BROKEN_VIDEOS[kind]
    broken = tmp_path / f"broken{made[name].suffix}"
    broken.write_bytes(change(made[name].read_bytes()))
    for number in range(3):
        write_video(tmp_path / f"whole {number}.mkv", pictures(8, number))
    with pytest.raises(ValueError, match=f"1 of 4 videos cannot be read: .*broken.* {message}.*--unreadable skip"):
        load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4)))
    splits = load(DataConfig(str(tmp_path), clips=ClipConfig(frames=4), images=ImageConfig(unreadable="skip")))
    assert splits.record["counts"] == {"train": 2, "validation": 2, "test": 2}
    assert f"left out 1 unreadable videos ({broken.name})" in splits.record["preprocessing"]


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="has no video stream"):
        load(DataConfig(str(path)))


def test_broken_pictures_among_frames(tmp_path):
    for number in range(3):
        write_frames(tmp_path / str(number), pictures(6, number), ".bmp")
    path = tmp_path / "1" / "4.bmp"
    whole = path.read_bytes()
    config = DataConfig(str(tmp_path), clips=ClipConfig(frames=2))
    path.write_bytes(whole[:-20])  # the header is whole: what is wrong shows when the pixels are read
    with pytest.raises(
        ValueError, match=r"1 of \d examples cannot be decoded \(1 from frame 4\); the first says: .*4\.bmp cannot"
    ):
        load(config)
    skipping = DataConfig(str(tmp_path), clips=ClipConfig(frames=2), images=ImageConfig(unreadable="skip"))
    splits = load(skipping)
    assert sum(splits.record["counts"].values()) == 8
    assert sorted(map(len, owners(splits, [pictures(6, number) for number in range(3)], 2))) == [1, 1, 1]
    path.write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"1 of 3 videos cannot be read: .*4\.bmp cannot be decoded"):
        load(config)
    (tmp_path / "3").mkdir()
    write_frames(tmp_path / "3" / "below", pictures(6, 3), ".bmp")
    assert sum(load(skipping).record["counts"].values()) == 9


def test_what_is_no_video_is_listed(tmp_path):
    for number in range(3):
        write_video(tmp_path / f"{number}.mkv", pictures(16, number))
    write_frames(tmp_path / "photos", pictures(2))
    (tmp_path / "notes").write_text("")
    splits = load(DataConfig(str(tmp_path)))
    assert "ignored files that are not videos: " in splits.record["preprocessing"]
    assert ".png (2)" in splits.record["preprocessing"]
    assert "without ending (1)" in splits.record["preprocessing"]


def test_folders_are_videos_only_where_they_hold_some(tmp_path):
    asked, not_asked = DataConfig("any", clips=ClipConfig(frames=4)), DataConfig("any")
    write_frames(tmp_path / "pictures" / "of a class", pictures(2))
    write_video(tmp_path / "gifs" / "a.gif", pictures(2), "gif", "rgb8")
    write_video(tmp_path / "films" / "below" / "A.MKV", pictures(2), "ffv1", "bgr0", format="matroska")
    (tmp_path / "empty" / ".sigma-vae").mkdir(parents=True)
    (tmp_path / "empty" / ".sigma-vae" / "a.mp4").touch()
    found = {name: videos.holds_videos(tmp_path / name, asked) for name in ("pictures", "gifs", "films", "empty")}
    assert found == {"pictures": True, "gifs": True, "films": True, "empty": False}
    found = {name: videos.holds_videos(tmp_path / name, not_asked) for name in ("pictures", "gifs", "films", "empty")}
    assert found == {"pictures": False, "gifs": False, "films": True, "empty": False}


def linked(folder):
    write_video(folder / "a.mkv", pictures(8))
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    return folder


def with_test_alone(folder):
    write_video(folder / "test" / "a.mkv", pictures(8))
    return folder


def with_two_validations(folder):
    for name in ("train", "val", "valid"):
        write_video(folder / name / "a.mkv", pictures(8))
    return folder


def with_one_outside(folder):
    write_video(folder / "train" / "a.mkv", pictures(8))
    return write_video(folder / "more" / "b.mkv", pictures(8)).parent.parent


REFUSED_VIDEOS = {
    "outside of splits": (with_one_outside, {}, "needs its videos in train, got more/b.mkv; move it, or rename"),
    "too short": (lambda folder: write_video(folder / "a.mkv", pictures(15)), {}, r"a.mkv \(15\); ask for .*--frames 15"),
    "too short with steps": (
        lambda folder: write_video(folder / "a.mkv", pictures(9)),
        {"clips": ClipConfig(frames=4, frame_step=3)},
        r"4 frames with frame_step 3 need videos of 10 frames, got a.mkv \(9\); ask for shorter clips \(--frames 3\)",
    ),
    "nowhere": (lambda folder: folder / "a.mp4", {}, "got no such file; check the path"),
    "link to nowhere": (linked, {}, r"gone.mp4 cannot be read \(No such file or directory\); mend or remove"),
    "test alone": (with_test_alone, {}, "needs a folder train, .* got test; rename them"),
    "two validations": (with_two_validations, {}, "at most one each .* got train, valid, val; rename them"),
    "test of other length": (
        lambda folder: write_video(folder / "a.mkv", pictures(9)),
        {"clips": ClipConfig(frames=2, test_frames=4)},
        "needs a folder test for clips of another length .* frames 2 and test_frames 4",
    ),
    "layout": (lambda folder: write_video(folder / "a.mkv", pictures(9)), {"layout": "n-c"}, "layout says nothing about"),
}


@pytest.mark.parametrize("kind", REFUSED_VIDEOS)
def test_misuse_is_refused(tmp_path, kind):
    make, options, message = REFUSED_VIDEOS[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(make(tmp_path)), **options))


def test_frames_of_a_folder_are_read_when_they_are_wanted(tmp_path):
    folder = write_frames(tmp_path / "a", pictures(4))
    video = Frames(tuple(folder / f"{number}.png" for number in range(4)))
    survey = video.survey()
    assert (survey.frames, survey.probes) == (4, [(24, 16, "RGB")])
    (folder / "3.png").unlink()
    frames = video.frames(2, survey)
    assert np.array_equal(next(frames)(plan(survey.probes, ImageConfig(), "a")), pictures(4)[2].transpose(2, 0, 1))
