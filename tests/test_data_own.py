"""The user's own files come back as they were written, in their splits; whatever is wrong with them is said."""

import gzip
import io
import os
import re
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import AppendingTiffWriter

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import arrays, cache, load, pictures
from sigma_vae.data.load import load_whole

SPLITS = ("train", "validation", "test")
STATE = np.random.RandomState(0)
GREY = STATE.randint(0, 256, (12, 5, 4)).astype(np.uint8)
RGB = STATE.randint(0, 256, (12, 5, 4, 3)).astype(np.uint8)
DEEP = STATE.randint(0, 65536, (12, 5, 4)).astype(np.uint16)


def rows(part):
    """The examples as a sorted list, to compare splits as multisets."""
    return sorted(map(bytes, np.ascontiguousarray(part.reshape(len(part), -1))))


def together(splits):
    return rows(torch.cat([splits.stored(name) for name in SPLITS]).numpy())


def png(pixels, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


def named(images, *folders, ending=".png"):
    """File names and contents of pictures, shared out over folders."""
    return {f"{folders[i * len(folders) // len(images)]}{i:02}{ending}": png(image) for i, image in enumerate(images)}


def as_folder(place, files):
    for name, content in files.items():
        path = place / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return place / "data"


def as_zip(place, files, name="data.zip"):
    with zipfile.ZipFile(place / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return place / name


def as_tar(place, files, name="data.tar"):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place / name, "w:gz" if name.endswith("gz") else "w") as archive:
        for member, content in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return place / name


def as_shards(place, files, pattern="shards/{:03}.tar"):
    names = sorted(files)
    for i in range(3):
        # As in WebDataset: what belongs to one example follows one another, under one name.
        members = {name: files[name] for name in names[i::3]} | {f"{i}.json": b"{}", f"{i}.cls": b"7"}
        as_tar(place, members, pattern.format(i))
    return place / "shards"


HOLDERS = {
    "folder": as_folder,
    "folder of a folder": lambda place, files: as_folder(place, {f"in/ner/{name}": content for name, content in files.items()}),
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": lambda place, files: as_tar(place, files, "data.tar.gz"),
    "tgz": lambda place, files: as_tar(place, files, "data.tgz"),
    "zip of a folder": lambda place, files: as_zip(place, {f"data/inner/{name}": content for name, content in files.items()}),
    "tar of .": lambda place, files: as_tar(place, {f"./{name}": content for name, content in files.items()}),
}


@pytest.fixture(params=HOLDERS)
def holder(request, tmp_path):
    return lambda files: HOLDERS[request.param](tmp_path, files)


@pytest.mark.parametrize("images", [GREY, DEEP, RGB], ids=["8 bit", "16 bit", "rgb"])
def test_pictures_are_held_out_from_folders_of_classes(holder, images):
    path = holder(named(images, "cats/", "dogs/brown/", "") | {"notes.txt": b"", ".hidden.png": b"", "__MACOSX/a.png": b""})
    config = DataConfig(str(path))
    splits = load(config)
    expected = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    assert splits.shape == expected.shape[1:]
    assert together(splits) == rows(expected)
    assert "ignored files that are not pictures: .txt (1)" in splits.record["preprocessing"]
    assert load(config).record == splits.record


@pytest.mark.parametrize("words", [("train/", "val/", "test/"), ("Train/a/", "valid/b/", "test/")])
def test_split_folders_are_splits_in_the_order_of_their_paths(holder, words):
    splits = load(DataConfig(str(holder(named(GREY, *words)))))
    for i, name in enumerate(SPLITS):
        assert np.array_equal(splits.stored(name)[:, 0].numpy(), GREY[4 * i : 4 * i + 4])


def test_train_and_test_alone_leave_validation_to_be_held_out(tmp_path):
    splits = load(DataConfig(str(as_folder(tmp_path, named(GREY, "train/", "train/more/", "test/"))), validation_fraction=0.25))
    assert np.array_equal(splits.stored("test")[:, 0].numpy(), GREY[8:])
    assert (len(splits.train), len(splits.validation)) == (6, 2)


@pytest.mark.parametrize("source", ["shards", "shards/*.tar", "shards/0*"])
def test_shards_are_read_one_after_the_other(tmp_path, source):
    files = named(GREY, "")
    as_shards(tmp_path, files)
    splits = load(DataConfig(source, root=str(tmp_path)))
    assert together(splits) == rows(GREY)
    assert len(splits.record["files"]) == 3
    assert ".json (3)" in splits.record["preprocessing"]


@pytest.mark.parametrize("pattern", ["shards/{}-000.tar", "shards/{}/000.tar"])
def test_shards_of_splits(tmp_path, pattern):
    for i, word in enumerate(("train", "val", "test")):
        as_tar(tmp_path, named(GREY[4 * i : 4 * i + 4], "x/"), pattern.format(word))
    splits = load(DataConfig(str(tmp_path / "shards")))
    for i, name in enumerate(SPLITS):
        assert np.array_equal(splits.stored(name)[:, 0].numpy(), GREY[4 * i : 4 * i + 4])


def test_every_ending_is_read(tmp_path):
    forms = {
        ".png": "PNG",
        ".bmp": "BMP",
        ".webp": "WEBP",
        ".tif": "TIFF",
        ".TIFF": "TIFF",
        ".ppm": "PPM",
        ".jpg": "JPEG",
        ".jpeg": "JPEG",
    }
    flat = np.full((5, 4, 3), 60, np.uint8)  # JPEG and WebP keep one grey
    path = as_folder(tmp_path, {f"{i}{ending}": png(flat, form) for i, (ending, form) in enumerate(forms.items())})
    splits = load(DataConfig(str(path), test_fraction=0.2, validation_fraction=0.2))
    assert sum(len(splits.store(name)) for name in SPLITS) == len(forms)
    assert np.abs(torch.cat([splits.stored(name) for name in SPLITS]).numpy() - 60.0).max() <= 1
    greys = {f"{i}.{ending}": png(GREY[i], ending) for i, ending in enumerate(["gif", "pgm", "ppm", "png"]) if ending != "pgm"}
    path = as_folder(tmp_path / "grey", greys | {"1.pgm": png(GREY[1], "PPM"), "2.ppm": png(GREY[2], "PPM")})
    assert together(load(DataConfig(str(path), test_fraction=0.3, validation_fraction=0.3))) == rows(GREY[:4])


def stack(images, form="TIFF", **options):
    buffer = io.BytesIO()
    first, *rest = map(Image.fromarray, images)
    first.save(buffer, form, save_all=True, append_images=rest, **options)
    return buffer.getvalue()


def said(path, **options):
    return load(DataConfig(str(path), test_fraction=0.25, validation_fraction=0.25, **options)).record["preprocessing"]


@pytest.mark.parametrize("images", [GREY, DEEP, RGB], ids=["8 bit", "16 bit", "rgb"])
def test_each_page_of_a_tiff_is_an_example(holder, images):
    path = holder(
        {"b.tif": stack(images[:7]), "a.png": png(images[7]), "c.tif": png(images[8], "TIFF"), "d.TIFF": stack(images[9:])}
    )
    config = DataConfig(str(path))
    splits = load(config)
    assert together(splits) == rows(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
    assert "each page of a TIFF with several is an example: " in splits.record["preprocessing"]
    assert "the first picture of" not in splits.record["preprocessing"]
    store, names, *_ = load_whole(config, "test")
    assert [name.rpartition("/")[2] for name in names] == [
        "a.png",
        *(f"b.tif page {number}" for number in range(1, 8)),
        "c.tif",
        *(f"d.TIFF page {number}" for number in (1, 2, 3)),
    ]
    second = store.take(torch.tensor([2])).numpy()[0]
    assert np.array_equal(second, images[1][None] if images.ndim == 3 else images[1].transpose(2, 0, 1))


def test_a_tiff_alone_is_a_data_set_of_its_pages(tmp_path):
    images = STATE.randint(0, 256, (200, 5, 4)).astype(np.uint8)
    (tmp_path / "stack.tif").write_bytes(stack(images, compression="tiff_deflate"))
    (tmp_path / "other.png").write_bytes(png(GREY[0]))
    splits = load(DataConfig(str(tmp_path / "stack.tif")))
    assert together(splits) == rows(images)
    assert splits.record["files"] == [{"path": str(tmp_path / "stack.tif"), "bytes": os.path.getsize(tmp_path / "stack.tif")}]
    with pytest.raises(ValueError, match="needs 3 examples, one for each of train, test, validation, got 1"):
        load(DataConfig(str(tmp_path / "other.png")))


def test_pages_of_one_tiff_are_in_one_split(tmp_path):
    """Neighbouring pages of a stack are alike."""
    path = as_folder(tmp_path, {f"{i}.tif": stack(GREY[3 * i : 3 * i + 3]) for i in range(4)})
    splits = load(DataConfig(str(path)))
    assert splits.record["counts"] == {"train": 6, "validation": 3, "test": 3}
    assert rows(splits.stored("test").numpy()) in [rows(GREY[3 * i : 3 * i + 3]) for i in range(4)]
    assert "test: 3 examples, all from 1 file at random" in splits.record["preprocessing"]


def test_pages_of_several_sizes_are_refused_like_pictures(tmp_path):
    path = as_folder(tmp_path, {"a.tif": stack([GREY[0], GREY[1, :4], *GREY[2:]])})
    with pytest.raises(ValueError, match=r"need one size, got 2: 4×5 \(11\), 4×4 \(1\) .*--crop 4"):
        load(DataConfig(str(path)))
    assert sum(load(DataConfig(str(path), images=ImageConfig(crop=4))).record["counts"].values()) == 12


def test_reduced_pages_of_a_tiff_are_left_out(tmp_path):
    """Bit 0 of the tag NewSubfileType says that a page is a smaller copy of another one."""
    buffer = io.BytesIO()
    with AppendingTiffWriter(buffer, True) as writer:
        for number, pixels in enumerate([GREY[0], GREY[0, :2, :2], *GREY[1:8]]):
            Image.fromarray(pixels).save(writer, "TIFF", tiffinfo={254: int(number == 1)})
            writer.newFrame()
    path = as_folder(tmp_path, {"a.tif": buffer.getvalue()})
    assert "left out 1 reduced copies and masks among their pages" in said(path)
    assert together(load(DataConfig(str(path)))) == rows(GREY[:8])


def test_the_first_of_several_pictures_is_said_where_there_are_several(tmp_path):
    single = {f"{i}.{form.lower()}": png(GREY[i], form) for i, form in enumerate(["GIF", "PNG", "GIF", "TIFF"])}
    assert "several" not in said(as_folder(tmp_path / "single", single))
    animated = single | {"4.gif": stack(GREY[4:7], "GIF"), "5.png": stack(GREY[5:8], "PNG")}
    path = as_folder(tmp_path / "animated", animated)
    assert "the first picture of files with several: 4.gif, 5.png;" in said(path)
    assert together(load(DataConfig(str(path), test_fraction=0.25, validation_fraction=0.25))) == rows(GREY[:6])


@pytest.mark.parametrize("hold", [as_folder, as_zip, as_tar])
def test_pictures_without_an_ending_are_known_by_their_first_bytes(tmp_path, hold):
    forms = ["PNG", "GIF", "TIFF", "PNG"]
    files = {f"pictures/{i:03}": png(GREY[i], form) for i, form in enumerate(forms)} | {"scan.004": png(GREY[4])}
    path = hold(tmp_path, files | {"README": b"Portable", "LICENSE": b""})
    words = said(path)
    assert together(load(DataConfig(str(path), test_fraction=0.25, validation_fraction=0.25))) == rows(GREY[:5])
    assert "ignored files that are not pictures: LICENSE (1), README (1)" in words or "README (1), LICENSE (1)" in words


HEIF_REMEDY = "to read .heic: pip install pillow-heif, or convert them: magick mogrify -format jpg \\*.heic"


@pytest.fixture
def endings_anew():
    pictures.picture_endings.cache_clear()
    yield
    pictures.picture_endings.cache_clear()


def test_heif_pictures_are_never_dropped_without_a_word(tmp_path, monkeypatch, endings_anew):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    photos = {f"{i}.heic": b"....ftypheic" for i in range(2)}
    with pytest.raises(ValueError, match=rf"got .heic \(2\); {HEIF_REMEDY}"):
        load(DataConfig(str(as_folder(tmp_path / "alone", photos))))
    assert re.search(rf"not pictures: .heic \(2\) \({HEIF_REMEDY}\)", said(as_folder(tmp_path, photos | named(GREY, ""))))


def test_heif_pictures_are_read_where_their_package_is_installed(tmp_path, endings_anew, monkeypatch):
    def open_png(file=None, name=None):
        return PngImageFile(io.BytesIO(file.read()[12:]), name)

    def register():
        Image.register_open("HEIF", open_png, lambda prefix: prefix[4:12] == b"ftypheic")
        Image.register_extension("HEIF", ".heic")

    Image.init()
    for name in ("OPEN", "EXTENSION", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    files = {f"{i:02}.HEIC": b"\0\0\0\x18ftypheic" + png(image) for i, image in enumerate(GREY)}
    assert together(load(DataConfig(str(as_folder(tmp_path, files))))) == rows(GREY)


def test_mixed_sizes_are_made_to_fit_as_told(tmp_path):
    images = [GREY[i, : 3 + i % 3] for i in range(12)]
    path = str(as_folder(tmp_path, named(images, "")))
    with pytest.raises(ValueError, match=r"need one size, got 3: 4×3 \(4\), 4×4 \(4\), 4×5 \(4\)"):
        load(DataConfig(path))
    with pytest.raises(ValueError, match=r"size 3 needs square pictures, got 4×3 \(4\), 4×5 \(4\)"):
        load(DataConfig(path, images=ImageConfig(size=3)))
    splits = load(DataConfig(path, images=ImageConfig(crop=3)))
    assert together(splits) == rows(np.stack([image[(len(image) - 3) // 2 :][:3, :3] for image in images]))
    assert load(DataConfig(path, images=ImageConfig(size=6, fit="pad", colour="rgb"))).shape == (3, 6, 6)
    with pytest.raises(ValueError, match="fit pad has no effect on the squares of crop 3; leave out one"):
        load(DataConfig(path, images=ImageConfig(crop=3, fit="pad")))
    with pytest.raises(ValueError, match="fit stretch needs a size to stretch pictures to, got none; give --size"):
        load(DataConfig(path, images=ImageConfig(fit="stretch")))


def truncated(files, name, size):
    return files | {name: files[name][:size]}


BROKEN = {"in its header": 20, "in its pixels": 60, "wholly": 0}


@pytest.mark.parametrize("kind", BROKEN)
def test_unreadable_pictures_are_refused_or_left_out(tmp_path, kind):
    path = as_folder(tmp_path, truncated(named(GREY, ""), "07.png", BROKEN[kind]))
    with pytest.raises(ValueError, match=r"1 of 12 .* cannot be .*07.png.*--unreadable skip"):
        load(DataConfig(str(path)))
    skip = DataConfig(str(path), images=ImageConfig(unreadable="skip"))
    for _ in range(2):
        splits = load(skip)
        assert together(splits) == rows(np.delete(GREY, 7, 0))
        assert "left out 1 of 12 as unreadable (07.png)" in splits.record["preprocessing"]
    with pytest.raises(ValueError, match="1 of 12"):
        load(DataConfig(str(path)))


def test_dangling_links_are_unreadable_until_they_are_mended(tmp_path):
    path = as_folder(tmp_path, named(GREY, ""))
    moved = (path / "03.png").rename(tmp_path / "there.png")
    (path / "03.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(ValueError, match=r"1 of 12 pictures cannot be read \(03.png; the first: .*No such file"):
        load(DataConfig(str(path)))
    assert together(load(DataConfig(str(path), images=ImageConfig(unreadable="skip")))) == rows(np.delete(GREY, 3, 0))
    moved.rename(tmp_path / "elsewhere.png")
    assert together(load(DataConfig(str(path)))) == rows(GREY)


def test_headers_may_be_long(holder, monkeypatch):
    note = PngInfo()
    note.add_text("note", "x" * 2**17)
    buffer = io.BytesIO()
    Image.fromarray(GREY[0]).save(
        buffer, format="PNG", pnginfo=note
    )  # what is noted comes before the pixels, not before the size
    exif = Image.Exif()
    exif[0x9286] = (
        "x" * 60000
    )  # a user's comment, before the size of a JPEG; a second segment makes it longer than what is read first
    photo = io.BytesIO()
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**18)  # older Pillow has no room for both segments when it writes
    Image.fromarray(GREY[0]).save(photo, format="JPEG", exif=exif, comment=b"y" * 60000)
    splits = load(
        DataConfig(
            str(holder({f"{i}.png": buffer.getvalue() for i in range(4)} | {"4.jpg": photo.getvalue()})),
            test_fraction=0.2,
            validation_fraction=0.2,
        )
    )
    assert sum(np.array_equal(image[0], GREY[0]) for name in SPLITS for image in splits.stored(name).numpy()) == 4


def test_links_to_folders_are_followed_once(tmp_path):
    path = as_folder(tmp_path, named(GREY, "train/"))
    shutil.copytree(path / "train", tmp_path / "elsewhere")
    (path / "test").symlink_to(tmp_path / "elsewhere")
    (path / "train" / "all").symlink_to(path)  # a folder within itself
    splits = load(DataConfig(str(path)))
    assert rows(splits.stored("test").numpy()) == rows(GREY)
    assert len(splits.train) + len(splits.validation) == 12


def test_changed_pictures_are_decoded_anew(tmp_path):
    path = as_folder(tmp_path, named(GREY, ""))
    before = load(DataConfig(str(path)))
    (path / "00.png").write_bytes(png(255 - GREY[0]))
    os.utime(path / "00.png", ns=(1, 1))
    after = load(DataConfig(str(path)))
    assert together(after) == rows(np.concatenate([255 - GREY[:1], GREY[1:]]))
    assert before.record["fingerprint"] != after.record["fingerprint"]


def test_other_content_of_the_same_size_and_date_is_noticed(tmp_path):
    """As tools that copy with dates leave it behind."""
    for images in (GREY, 255 - GREY):
        for i, image in enumerate(images):
            (tmp_path / "pictures").mkdir(exist_ok=True)
            path = tmp_path / "pictures" / f"{i}.bmp"
            path.write_bytes(png(image, "BMP"))
            os.utime(path, ns=(1, 1))
        assert together(load(DataConfig(str(tmp_path / "pictures")))) == rows(images)


@pytest.mark.parametrize("kept", [None, "shared"])
def test_folders_with_files_of_the_same_names_sizes_and_times_are_apart(tmp_path, kept):
    for place, images in (("a", GREY), ("b", 255 - GREY)):
        (tmp_path / place).mkdir()
        for i, image in enumerate(images):
            path = tmp_path / place / f"{i}.bmp"
            path.write_bytes(png(image, "BMP"))
            os.utime(path, ns=(1, 1))
        splits = load(DataConfig(str(tmp_path / place), cache=kept and str(tmp_path / kept)))
        assert together(splits) == rows(images)


def test_decoded_copies_lie_beside_the_data_or_where_told(tmp_path):
    path = as_folder(tmp_path, named(GREY, ""))
    first = load(DataConfig(str(path), cache=str(tmp_path / "told")))
    assert not (tmp_path / ".sigma-vae").exists()
    again = load(DataConfig(str(path)))
    assert (tmp_path / ".sigma-vae").is_dir()
    assert sorted(os.listdir(path)) == sorted(named(GREY, ""))
    assert first.record["fingerprint"] == again.record["fingerprint"]


def test_twelve_bits_are_checked_though_they_lie_in_sixteen(tmp_path):
    path = str(as_folder(tmp_path, named(DEEP // 16, "")))
    splits = load(DataConfig(path, levels=4096))
    assert together(splits) == rows(DEEP // 16)
    assert torch.equal(splits.values("train"), splits.stored("train").float() / 4095)
    assert load(DataConfig(path)).levels == 65536
    greatest = int((DEEP // 16).max())
    with pytest.raises(ValueError, match=rf"needs levels 0..2047 for levels=2048, but its values go up to {greatest}"):
        load(DataConfig(path, levels=2048))


PNG = png(GREY[0])
BAD_PLACES = {
    "empty folder": (lambda place: as_folder(place, {"x/.keep": b""}), {}, "needs pictures .* got nothing; check the path"),
    "no pictures": (lambda place: as_folder(place, {"a.txt": b"", "b.doc": b""}), {}, r"got .txt \(1\), .doc \(1\)"),
    "empty zip": (lambda place: as_zip(place, {}), {}, "needs pictures .* got nothing"),
    "no zip": (lambda place: as_folder(place, {"a.zip": b"PK"}) / "a.zip", {}, "cannot be read as zip archive .* make it anew"),
    "no tar": (lambda place: as_folder(place, {"a.tar": b"x" * 999}) / "a.tar", {}, "cannot be read as tar archive"),
    "no gzip": (lambda place: as_folder(place, {"a.tar.gz": b"x" * 999}) / "a.tar.gz", {}, "cannot be read as gz archive"),
    "tar cut within a file": (
        lambda place: cut_tar(place, 1024 * 5 + 600),
        {},
        "cannot be read as tar archive .*unexpected end",
    ),
    "tar cut within a header": (
        lambda place: cut_tar(place, 1024 * 5 + 300),
        {},
        "after 5 files comes neither another one nor the end mark",
    ),
    "tar cut between files": (
        lambda place: cut_tar(place, 1024 * 5),
        {},
        "after 5 files comes neither another one nor the end mark",
    ),
    "cut gzip": (
        lambda place: as_folder(place, {"a.tgz": as_tar(place, named(GREY, ""), "b.tgz").read_bytes()[:-30]}) / "a.tgz",
        {},
        "cannot be read as tgz archive",
    ),
    "cut zip": (
        lambda place: as_folder(place, {"a.zip": as_zip(place, named(GREY, "")).read_bytes()[:-30]}) / "a.zip",
        {},
        "cannot be read as zip archive",
    ),
    "no archive": (lambda place: place / "absent.zip", {}, "expected an archive of pictures .* no such file"),
    "no match": (lambda place: place / "a-*.tar", {}, "needs to match archives .* got nothing"),
    "matches pictures": (
        lambda place: as_folder(place, named(GREY, "")) / "*.png",
        {},
        "needs to match archives .* or give a folder",
    ),
    "link to nothing": (lambda place: linked(place, "data"), {}, "is a link to nowhere, which is not there; mend the link"),
    "file as link to nothing": (lambda place: linked(place, "data.npy"), {}, "is a link to nowhere"),
    "outside of splits": (
        lambda place: as_folder(place, named(GREY, "train/", "more/")),
        {},
        r"in train, and .* got train \(6\) and 6 elsewhere \(more/06.png, say\)",
    ),
    "no train": (lambda place: as_folder(place, named(GREY, "test/")), {}, r"got test \(12\); move or rename"),
    "two of one split": (lambda place: as_folder(place, named(GREY, "train/", "val/", "valid/")), {}, "move or rename"),
    "all broken": (
        lambda place: as_folder(place, {f"{i}.png": b"" for i in range(4)}),
        {"images": ImageConfig(unreadable="skip")},
        "4 of 4 pictures cannot be read",
    ),
    "layout": (lambda place: as_folder(place, named(GREY, "")), {"layout": "n-h-w"}, "layout says nothing about"),
    "levels of bits": (lambda place: as_folder(place, named(GREY > 9, "")), {"levels": 256}, "has 2 levels, got levels=256"),
    "clip options": (
        lambda place: as_folder(place, {"a.npy": b""}) / "a.npy",
        {"columns": ("a",)},
        "columns says nothing about",
    ),
}


def cut_tar(place, size):
    """Of an archive whose files have a block of header and one of content each."""
    return as_folder(place, {"a.tar": as_tar(place, named(GREY, "")).read_bytes()[:size]}) / "a.tar"


def linked(place, name):
    (place / name).symlink_to("nowhere")
    return place / name


@pytest.mark.parametrize("kind", BAD_PLACES)
def test_bad_places_are_refused(tmp_path, kind):
    make, options, message = BAD_PLACES[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(make(tmp_path)), **options))


def test_a_gzipped_archive_needs_room_to_be_unpacked(tmp_path):
    path = as_tar(tmp_path, named(GREY, ""), "data.tar.gz")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be unpacked in .*/file/no-folder: .*; give another folder: --cache FOLDER"):
        load(DataConfig(str(path), cache=str(tmp_path / "file" / "no-folder")))
    assert together(load(DataConfig(str(path), cache=str(tmp_path / "folder")))) == rows(GREY)
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith("data")) == ["file", "folder"]


def test_a_damaged_member_of_a_zip_is_unreadable(tmp_path):
    path = as_zip(tmp_path, {f"{i:02}.bmp": png(image, "BMP") for i, image in enumerate(GREY)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("05.bmp").header_offset + 60] ^= 255  # in its compressed pixels
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 12 .* cannot be .*data.zip/05.bmp"):
        load(DataConfig(str(path)))


# Arrays


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(arrays, "LARGE", 1)


LAYOUTS = {
    "n-h-w": (GREY, GREY[:, None]),
    "n-h-w-c": (RGB, RGB.transpose(0, 3, 1, 2)),
    "n-c-h-w": (RGB.transpose(0, 3, 1, 2), RGB.transpose(0, 3, 1, 2)),
    "n-t": (GREY[:, 0], GREY[:, :1]),
    "n-c-t": (GREY, GREY),
    "n-c": (GREY[:, 0], GREY[:, 0]),
    "n-t-h-w": (RGB, RGB[:, :, None]),
    "n-t-c-h-w": (RGB[..., None], RGB[..., None]),
    "n-t-h-w-c": (RGB[..., None], np.moveaxis(RGB[..., None], -1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "<f4"])
def test_large_arrays_are_what_small_ones_are(tmp_path, monkeypatch, layout, dtype):
    array, expected = LAYOUTS[layout]
    array, expected = (array.astype(dtype), expected.astype(dtype)) if dtype != "<f4" else (array / 299, expected / 299)
    np.save(tmp_path / "data.npy", array.astype(dtype))
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("group/x", data=array.astype(dtype), chunks=True, compression="gzip")
    small = load(DataConfig(str(tmp_path / "data.npy"), layout=layout))
    monkeypatch.setattr(arrays, "LARGE", 1)
    mapped = load(DataConfig(str(tmp_path / "data.npy"), layout=layout))
    copied = load(DataConfig(str(tmp_path / "data.h5"), layout=layout, columns=("group/x",)))
    assert together(small) == rows(torch.from_numpy(expected.astype(dtype)).to(small.stored("train").dtype).numpy())
    for large in (mapped, copied):
        assert large.clips == small.clips == (layout[2:3] == "t" and layout != "n-t")
        assert large.levels == small.levels
        assert type(large.train).__name__ == ("InMemory" if dtype == "<f4" else "Mapped")
        for name in SPLITS:
            assert torch.equal(large.values(name), small.values(name))


def test_layouts_of_one_file_differ_in_their_fingerprint(tmp_path, all_large):
    np.save(tmp_path / "data.npy", STATE.randint(0, 256, (12, 3, 4, 3)).astype(np.uint8))
    prints = {
        load(DataConfig(str(tmp_path / "data.npy"), layout=layout)).record["fingerprint"]
        for layout in ("n-c-h-w", "n-h-w-c", "n-t-h-w")
    }
    assert len(prints) == 3


def test_a_mapped_array_is_known_by_its_content(tmp_path, all_large):
    path = tmp_path / "data.npy"
    prints = []
    for array in (GREY, 255 - GREY, GREY):
        np.save(path, array)
        os.utime(path, ns=(1, 1))
        prints.append(load(DataConfig(str(path))).record["fingerprint"])
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("array", [np.asfortranarray(GREY), GREY.astype(">u2")], ids=["Fortran", "big-endian"])
def test_arrays_that_need_conversion_are_read_though_they_are_large(tmp_path, all_large, array):
    np.save(tmp_path / "data.npy", array)
    splits = load(DataConfig(str(tmp_path / "data.npy"), levels=256))
    assert type(splits.train).__name__ == "InMemory"
    assert together(splits) == rows(GREY)


def test_large_arrays_keep_to_their_levels(tmp_path, all_large):
    np.save(tmp_path / "data.npy", DEEP // 16)
    assert load(DataConfig(str(tmp_path / "data.npy"), levels=4096)).levels == 4096
    with pytest.raises(ValueError, match=r"needs levels 0\.\.99 for levels=100"):
        load(DataConfig(str(tmp_path / "data.npy"), levels=100))


def test_large_arrays_that_are_cut_short_are_refused(tmp_path, all_large):
    np.save(tmp_path / "data.npy", GREY)
    (tmp_path / "data.npy").write_bytes((tmp_path / "data.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot be read as \.npy or \.npz"):
        load(DataConfig(str(tmp_path / "data.npy")))


# HDF5


def as_hdf5(place, **datasets):
    with h5py.File(place / "data.hdf5", "w") as file:
        for key, values in datasets.items():
            file[key.replace("__", "/")] = values
    return str(place / "data.hdf5")


NESTED = {"train__x": GREY[:6], "val__x": GREY[6:9], "test__x": GREY[9:], "train__y": np.zeros(6)}
KEYS = {
    "one": ({"x": GREY}, ()),
    "splits": ({"train": GREY[:6], "valid": GREY[6:9], "test": GREY[9:], "labels": np.zeros(12)}, ()),
    "one of several": ({"x": GREY, "y": np.zeros(12)}, ("x",)),
    "nested": ({"a__b__x": GREY, "y": np.zeros(12)}, ("/a/b/x",)),
    "groups": (NESTED, ("x",)),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("large", [False, True])
def test_hdf5_keys(tmp_path, monkeypatch, kind, large):
    monkeypatch.setattr(arrays, "LARGE", 1 if large else 2**28)
    datasets, columns = KEYS[kind]
    splits = load(DataConfig(as_hdf5(tmp_path, **datasets), columns=columns))
    assert together(splits) == rows(GREY)
    assert ("ignored" in splits.record["preprocessing"]) == (
        len(datasets) > 1 and not (kind == "splits" and len(datasets) == 3)
    )
    if kind in ("splits", "groups"):
        for name, part in zip(SPLITS, (GREY[:6], GREY[6:9], GREY[9:]), strict=True):
            assert np.array_equal(splits.stored(name)[:, 0].numpy(), part)


def test_blocks_of_an_hdf5_file_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LARGE", 1)
    numbers = np.arange(300, dtype=np.uint16)[:, None]
    splits = load(DataConfig(as_hdf5(tmp_path, x=numbers)))
    assert sorted(torch.cat([splits.stored(name) for name in SPLITS]).flatten().tolist()) == list(range(300))


def test_large_examples_of_an_hdf5_file_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LARGE", 1)
    monkeypatch.setattr(cache, "PIECE_BYTES", 5 * GREY[0].nbytes)
    sizes, read = [], arrays._Rows._read

    def counted(rows, number):
        block = read(rows, number)
        sizes.append(len(block))
        return block

    monkeypatch.setattr(arrays._Rows, "_read", counted)
    assert together(load(DataConfig(as_hdf5(tmp_path, x=GREY)))) == rows(GREY)
    assert sorted(sizes) == [2, 5, 5]


BAD_HDF5 = {
    "no key": ({"x": GREY}, {"columns": ("y",)}, "has no data set y, only x; give one of its keys"),
    "two keys": ({"x": GREY}, {"columns": ("x", "y")}, "columns gives one key of an HDF5 file, got x, y"),
    "several": ({"one": GREY, "two": GREY}, {}, "needs the key train .* got the keys one, two"),
    "nothing": ({}, {}, "needs the key train"),
    "groups without train": ({"test__x": GREY, "val__x": GREY}, {"columns": ("x",)}, "needs the key train"),
    "dtypes": ({"train": GREY, "test": GREY / 255}, {}, "one dtype for all splits"),
    "words": ({"x": np.array([b"a"] * 9)[:, None]}, {"levels": 2}, "needs numbers"),
    "scalar": ({"x": 5}, {}, "2 to 5 axes"),
    "no values": ({"x": h5py.Empty("f")}, {}, "needs the key train"),
    "empty": ({"x": GREY[:0]}, {}, "at least one example"),
}


@pytest.mark.parametrize("kind", BAD_HDF5)
def test_bad_hdf5_files_are_refused(tmp_path, kind):
    datasets, options, message = BAD_HDF5[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(as_hdf5(tmp_path, **datasets), **options))


@pytest.mark.parametrize("size", [0, 100, -100])
@pytest.mark.parametrize("large", [False, True])
def test_truncated_hdf5_files_are_refused(tmp_path, monkeypatch, size, large):
    monkeypatch.setattr(arrays, "LARGE", 1 if large else 2**28)
    path = as_hdf5(tmp_path, x=GREY)
    content = (tmp_path / "data.hdf5").read_bytes()
    (tmp_path / "data.hdf5").write_bytes(content[:size] if size else b"no HDF5")
    with pytest.raises(ValueError, match=r"cannot be read as HDF5: .* cut short"):
        load(DataConfig(path))
    with pytest.raises(ValueError, match="no such file"):
        load(DataConfig(str(tmp_path / "absent.h5")))


def test_damaged_parts_of_an_hdf5_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LARGE", 1)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        place = file.create_dataset("x", data=GREY, chunks=(4, 5, 4), fletcher32=True).id.get_chunk_info(1).byte_offset
    content = bytearray((tmp_path / "data.h5").read_bytes())
    content[place] ^= 255
    (tmp_path / "data.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"12 of 12 examples cannot be decoded \(x\[0\]"):
        load(DataConfig(str(tmp_path / "data.h5")))


# Tables

FRAME = pd.DataFrame(
    {
        "height": STATE.normal(170, 10, 30),
        "name": [f"n{i}" for i in range(30)],
        "children": STATE.randint(0, 5, 30),
        "smokes": STATE.rand(30) > 0.5,
    }
)
NUMBERS = FRAME[["height", "children", "smokes"]].to_numpy(np.float64)


def write(frame, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return str(path)


def raw(splits, *names):
    """Standardised values in the data's own units again."""
    return np.concatenate([splits.scaling.undo(splits.values(name)).numpy() for name in names or SPLITS])


def by_first(values):
    return values[np.argsort(values[:, 0])]


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "tsv.gz", "parquet", "CSV"])
def test_numeric_columns_of_tables(tmp_path, ending):
    splits = load(DataConfig(write(FRAME, tmp_path / f"data.{ending}")))
    assert splits.shape == (3,)
    assert splits.levels is None
    values = splits.values("train").double()
    assert torch.allclose(values.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(values.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-5)
    assert np.allclose(by_first(raw(splits)), by_first(NUMBERS), rtol=1e-5, atol=1e-5)
    assert splits.record["columns"] == ["height", "children", "smokes"]
    assert "columns height, children, smokes; columns left out: name" in splits.record["preprocessing"]


def test_chosen_columns_come_in_the_order_asked_for(tmp_path):
    splits = load(DataConfig(write(FRAME, tmp_path / "data.csv"), columns=("children", "height")))
    assert splits.record["columns"] == ["children", "height"]
    assert np.allclose(by_first(raw(splits)[:, ::-1]), by_first(NUMBERS[:, :2]), rtol=1e-5, atol=1e-5)


def test_row_numbers_are_left_out(tmp_path):
    FRAME.to_csv(tmp_path / "data.csv")  # with the index, a column without a name
    splits = load(DataConfig(str(tmp_path / "data.csv")))
    assert splits.record["columns"] == ["height", "children", "smokes"]
    assert "Unnamed: 0" in splits.record["preprocessing"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_folder_of_tables_has_true_splits(tmp_path, ending):
    for name, part in {"train": FRAME[:20], "val": FRAME[20:25], "test": FRAME[25:]}.items():
        write(part, tmp_path / "data" / f"{name}.{ending}")
    splits = load(DataConfig(str(tmp_path / "data")))
    for name, part in zip(SPLITS, (NUMBERS[:20], NUMBERS[20:25], NUMBERS[25:]), strict=True):
        assert np.allclose(raw(splits, name), part, rtol=1e-5, atol=1e-5)
    assert len(splits.record["files"]) == 3


def test_integers_are_real_values_unless_levels_are_given(tmp_path):
    path = write(FRAME[["children", "smokes"]], tmp_path / "data.csv")
    assert load(DataConfig(path)).levels is None
    splits = load(DataConfig(path, levels=5))
    assert splits.levels == 5
    assert together(splits) == rows(NUMBERS[:, 1:].astype(np.uint8))
    with pytest.raises(ValueError, match=r"integers in 0\.\.3 for levels=4"):
        load(DataConfig(path, levels=4))
    with pytest.raises(ValueError, match=r"needs floats in \[0, 1\].*--standardise yes"):
        load(DataConfig(path, standardise="no"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_series_in_rows_are_standardised_as_one_channel(tmp_path, ending):
    series = STATE.normal(5, 3, (30, 7)).astype(np.float32).astype(np.float64)
    series[:, 2] = 4  # a constant time is no constant channel
    path = write(pd.DataFrame(series, columns=[str(t) for t in range(7)]), tmp_path / f"data.{ending}")
    splits = load(DataConfig(path, layout="n-t"))
    assert splits.shape == (1, 7)
    train = raw(splits, "train")
    assert splits.scaling.mean == pytest.approx([train.mean()], rel=1e-5)
    assert splits.scaling.deviation == pytest.approx([train.std()], rel=1e-5)
    assert np.allclose(by_first(raw(splits)[:, 0]), by_first(series), rtol=1e-5, atol=1e-5)


HOLES = FRAME.assign(height=FRAME["height"].where(FRAME.index > 3), children=FRAME["children"].where(FRAME.index != 8))
BAD_TABLES = {
    "missing": (
        HOLES,
        {},
        r"in every one of 30 rows, got missing ones in height \(4\), children \(1\); .*--exclude height children",
    ),
    "constant": (FRAME.assign(children=3), {}, r"channels \(columns\) children have the same value"),
    "constant series": (
        FRAME[["children", "smokes"]] * 0,
        {"layout": "n-t"},
        r"channels \(columns\) 0, counted from 0, have the same value",
    ),
    "no such column": (FRAME, {"columns": ("heigth",)}, "needs the column heigth, got height, name, .*did you mean height"),
    "no number": (FRAME, {"columns": ("name",)}, "column name needs numbers, got (str|object)"),
    "nothing numeric": (FRAME[["name"]], {}, "needs numeric columns, got none among name"),
    "no rows": (FRAME[:0].astype({"height": float}), {"columns": ("height",)}, "(at least one row|needs numbers)"),
    "layout": (FRAME, {"layout": "n-h-w"}, "a table has layout n-c or n-t, got n-h-w"),
    "infinite": (
        FRAME.replace({"height": {FRAME["height"][3]: np.inf}}),
        {},
        r"1 that are NaN or infinite, the first at \(3, 0\)",
    ),
    "floats with levels": (FRAME[["height"]], {"levels": 10}, r"needs floats in \[0, 1\]"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_bad_tables_are_refused(tmp_path, kind, ending):
    frame, options, message = BAD_TABLES[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(write(frame, tmp_path / f"data.{ending}"), **options))


BAD_FILES = {
    "empty": ("csv", b"", "cannot be read as a table .*EmptyDataError"),
    "long rows": ("csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as a table"),
    "all rows long": ("csv", b"a,b\n1,2,3\n1,2,3\n", "cannot be read as a table"),
    "no header": ("csv", b"1.5,0.5\n2.5,3.5\n4,5\n6,7\n", "first row needs the names of the columns, got the numbers 1.5, 0.5"),
    "no text": ("csv", b"\xfa\x00\x01\x02", "cannot be read as a table"),
    "no gzip": ("csv.gz", b"a,b\n1,2\n", "cannot be read as a table"),
    "cut gzip": ("csv.gz", gzip.compress(b"a,b\n1,2\n" * 99)[:-12], "cannot be read as a table"),
    "no parquet": ("parquet", b"PAR1 nothing", "cannot be read as a table"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_tables_are_refused(tmp_path, kind):
    ending, content, message = BAD_FILES[kind]
    (tmp_path / f"data.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(tmp_path / f"data.{ending}")))


def test_levels_are_integers_in_all_tables_or_in_none(tmp_path):
    """1 is the second of five levels, 1.0 the last one."""
    write(pd.DataFrame({"a": [0, 1, 4] * 9}), tmp_path / "data" / "train.csv")
    write(pd.DataFrame({"a": [0.0, 1.0, 1.0]}), tmp_path / "data" / "test.csv")
    with pytest.raises(ValueError, match=r"needs integers in all tables or in none, got integers in train.csv, .*in test.csv"):
        load(DataConfig(str(tmp_path / "data"), levels=5))


def test_folders_of_tables_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a table at .* no such file"):
        load(DataConfig(str(tmp_path / "absent.csv")))
    write(FRAME, tmp_path / "data" / "train.csv")
    write(FRAME.drop(columns="children"), tmp_path / "data" / "test.csv")
    with pytest.raises(
        ValueError, match=r"test.csv needs the column children, got height, name, smokes; choose others with --columns"
    ):
        load(DataConfig(str(tmp_path / "data")))
    config = DataConfig(str(tmp_path / "data"), columns=("height",))
    assert load(config).shape == (1,)
    write(FRAME, tmp_path / "data" / "valid.parquet")
    assert len(load(replace(config)).validation) == 30
    write(FRAME, tmp_path / "data" / "val.csv")
    with pytest.raises(ValueError, match=r"one table for each split, got valid.parquet and val.csv"):
        load(config)
