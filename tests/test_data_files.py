"""Folders with an array per file, and files of other programs, come back as they were written."""

import csv
import gzip
import shlex
import sys
import wave
import zipfile
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import as_batches, as_splits, load
from sigma_vae.data.load import load_whole
from sigma_vae.data.splits import SPLITS

STATE = np.random.RandomState(0)
GREY = STATE.randint(0, 256, (12, 6, 5)).astype(np.uint8)
RGB = STATE.randint(0, 256, (12, 6, 5, 3)).astype(np.uint8)
REAL = STATE.normal(size=(12, 6, 5))


def folder(place, arrays, save=np.save, ending=".npy"):
    """One file for each array, whose names sort otherwise than their numbers."""
    place.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        save(place / f"scan {number}{ending}", array)
    return str(place)


def whole(path, **options):
    """All examples in the order of their files, as a model gets them before scaling."""
    store, names, *_ = load_whole(DataConfig(path, **options), "train")
    names = list(names)
    return store.take(torch.arange(len(store))).numpy(), names


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        (GREY, {}, GREY[:, None]),
        (GREY.astype(np.uint16) * 200, {}, GREY[:, None].astype(np.uint16) * 200),
        (RGB, {}, RGB.transpose(0, 3, 1, 2)),
        (RGB.transpose(0, 3, 1, 2), {"layout": "n-c-h-w"}, RGB.transpose(0, 3, 1, 2)),
        (GREY > 99, {}, GREY[:, None] > 99),
        (np.float32(STATE.rand(12, 6, 5)), {}, None),
        (GREY / 255, {}, GREY[:, None]),
        (REAL, {"standardise": "yes"}, None),
        (REAL[:, 0], {"standardise": "yes"}, REAL[:, 0]),
        (GREY.astype(np.int16) - 100, {"standardise": "yes"}, GREY[:, None].astype(np.int16) - 100),
        (GREY.astype(np.int64), {"levels": 256}, GREY[:, None]),
        (GREY.astype(np.uint32) + 2**30, {"standardise": "yes"}, GREY[:, None] + 2.0**30),
        (REAL.astype(np.longdouble), {"standardise": "yes"}, REAL[:, None]),
        (np.float16(GREY / 256), {}, np.float16(GREY / 256)[:, None]),
    ],
    ids=[
        "8 bit",
        "16 bit",
        "rgb",
        "rgb first",
        "bool",
        "floats",
        "k/255",
        "real",
        "rows",
        "signed",
        "integers",
        "large",
        "long",
        "half",
    ],
)
def test_a_folder_with_an_array_per_file(tmp_path, save, arrays, options, expected):
    ending = ".npy" if save is np.save else ".npz"
    path = folder(tmp_path / "scans", arrays, save, ending)
    values, names = whole(path, **options)
    assert np.array_equal(values, arrays[:, None] if expected is None else expected)
    assert names == [f"scan {number}{ending}" for number in range(12)]
    splits = load(DataConfig(path, **options))
    assert splits.record["counts"] == {"train": 10, "validation": 1, "test": 1}
    assert "each file is an example, axes read as n-" in splits.record["preprocessing"]


def test_arrays_in_folders_of_splits(tmp_path):
    for split, arrays in zip(("train", "val", "test"), np.split(GREY, 3), strict=True):
        folder(tmp_path / "data" / split, arrays)
    (tmp_path / "data" / "notes.txt").write_text("")
    splits = load(DataConfig(str(tmp_path / "data")))
    for split, arrays in zip(SPLITS, np.split(GREY, 3), strict=True):
        assert np.array_equal(splits.stored(split)[:, 0].numpy(), arrays)
    assert "ignored other files: .txt (1)" in splits.record["preprocessing"]


def test_links_among_arrays_are_followed_once(tmp_path):
    folder(tmp_path / "elsewhere", GREY)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "all").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    assert sum(load(DataConfig(str(tmp_path / "data"))).record["counts"].values()) == 12
    (tmp_path / "elsewhere" / "scan 3.npy").unlink()
    (tmp_path / "elsewhere" / "scan 3.npy").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"scan 3.npy cannot be read .No such file or directory.; mend or remove"):
        load(DataConfig(str(tmp_path / "data")))


@pytest.mark.parametrize(
    ("ending", "save"),
    [(".npy", np.save), (".npz", np.savez), (".mat", lambda path, array: savemat(path, {"x": array}))],
)
def test_a_file_for_each_split_holds_many_examples(tmp_path, ending, save):
    for name, arrays in {"x_train": GREY, "x_test": GREY[:3], "y_train": np.zeros(12)}.items():
        save(tmp_path / f"{name}{ending}", arrays)
    splits = load(DataConfig(str(tmp_path)))
    assert splits.record["counts"] == {"train": 11, "validation": 1, "test": 3}
    assert np.array_equal(splits.stored("test")[:, 0].numpy(), GREY[:3])
    assert f"ignored other files: y_train{ending}" in splits.record["preprocessing"]


def test_pictures_beside_arrays_are_what_is_read(tmp_path):
    path = folder(tmp_path / "data", GREY[:4])
    for number, pixels in enumerate(RGB):
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
    splits = load(DataConfig(path))
    assert splits.shape == (3, 6, 5)
    assert "ignored files that are not pictures: .npy (4)" in splits.record["preprocessing"]


def test_only_the_examples_of_the_moment_are_in_memory(tmp_path, monkeypatch):
    path = folder(tmp_path / "scans", GREY)
    splits = load(DataConfig(path))
    monkeypatch.setattr(np, "load", lambda *args, **options: pytest.fail("read again"))
    assert isinstance(splits.train.array, np.memmap)


def header(shape, kind="|u1"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def zipped(place, content):
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)


def with_file(name, content):
    def make(place):
        path = folder(place, GREY)
        (place / name).write_bytes(content)
        return path

    return make


def bomb(place):
    path = folder(place, GREY)
    zipped(place / "bomb.npz", header((2**26,)) + bytes(2**26))
    return path


BAD = {
    "sizes": (lambda place: folder(place, [GREY[0], GREY[1, :4]]), {}, r"one shape, got 2: 6×5 \(1\), 4×5 \(1\); cut or pad"),
    "dtypes": (lambda place: folder(place, [GREY[0], REAL[0]]), {}, "one dtype, got .*float64"),
    "volumes": (lambda place: folder(place, REAL[None].repeat(4, 0)), {}, "if these are volumes, save each slice as a file"),
    "volumes of channels": (
        lambda place: folder(place, GREY[:, None, None].repeat(7, 2)),
        {},
        "if these are volumes, save each slice as a file",
    ),
    "objects": (
        lambda place: folder(place, [np.array([None])]),
        {},
        "no file can be read, the first: scan 0.npy: it needs plain numbers",
    ),
    "words": (lambda place: folder(place, [np.array(["a"])]), {}, "needs plain numbers, got dtype <U1"),
    "numbers": (lambda place: folder(place, [np.array(3.0)] * 4), {}, "needs 2 to 5 axes"),
    "complex": (lambda place: folder(place, REAL * 1j), {}, "take real and imaginary part as two channels"),
    "signed": (lambda place: folder(place, GREY.astype(np.int16) - 9), {}, "real values with --standardise yes"),
    "too many levels": (lambda place: folder(place, GREY.astype(np.int16)), {"levels": 9}, "values go up to .*right --levels"),
    "below": (lambda place: folder(place, GREY.astype(np.int16) - 9), {"levels": 256}, "values go down to -9; give the right"),
    "infinite": (lambda place: folder(place, REAL / 0), {"standardise": "yes"}, "needs finite values"),
    "cut": (
        with_file("cut.npy", header((6, 5)) + bytes(9)),
        {},
        r"1 of 13 files .*cut.npy.*has 9 bytes\); .*--unreadable skip",
    ),
    "no array": (with_file("a.npy", b"text"), {}, "1 of 13 files cannot be read .*a.npy"),
    "no archive": (with_file("a.npz", b"PK\3\4"), {}, "1 of 13 files cannot be read .*a.npz"),
    "terabytes": (
        with_file("a.npy", header((2**40,))),
        {},
        r"claims 1099511627776 bytes for an array of shape \(1099511627776,\)",
    ),
    "keys": (
        lambda place: folder(place, GREY, lambda path, array: np.savez(path, a=array, b=array), ".npz"),
        {},
        "got the keys a, b; choose one with --columns",
    ),
    "no key": (lambda place: folder(place, GREY, np.savez, ".npz"), {"columns": ("x",)}, "one of the keys arr_0, got x"),
}


def splits_of(train, test):
    def make(place):
        place.mkdir()
        np.save(place / "train.npy", train)
        np.save(place / "test.npy", test)
        return str(place)

    return make


BAD |= {
    "dtypes of splits": (splits_of(GREY, REAL), {}, "needs one dtype for all splits, got float64, uint8; save them alike"),
    "shapes of splits": (splits_of(GREY, GREY[:, 1:]), {}, "examples of all splits need one shape"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("kind", BAD)
def test_bad_folders_of_arrays_are_refused(tmp_path, kind):
    make, options, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        load(DataConfig(make(tmp_path / "data"), **options))
    assert "\n" not in str(caught.value)


def test_a_bomb_among_arrays_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sigma_vae.data.files.LARGEST_MEMBER", 2**20)
    with pytest.raises(ValueError, match=r"claims 67108864 bytes .* more than such a file can hold"):
        load(DataConfig(bomb(tmp_path / "data")))


def test_unreadable_arrays_are_left_out_as_told(tmp_path):
    path = with_file("scan 3.npy", b"")(tmp_path / "data")
    values, names = whole(path, images=ImageConfig(unreadable="skip"))
    assert np.array_equal(values[:, 0], np.delete(GREY, 3, 0))
    assert "scan 3.npy" not in names


def save_matlab(path, array):
    savemat(path, {"image": array, "rate": 3.0}, do_compression=True)


def save_matlab_73(path, array):
    with h5py.File(path, "w", userblock_size=512) as file:
        file["image"], file["rate"] = array.T, np.array([[3.0]])


@pytest.mark.parametrize("save", [save_matlab, save_matlab_73])
@pytest.mark.parametrize("arrays", [GREY, np.float32(STATE.rand(12, 6, 5)), RGB], ids=["8 bit", "floats", "rgb"])
def test_folders_of_matlab_files(tmp_path, save, arrays):
    values, names = whole(folder(tmp_path / "data", arrays, save, ".mat"))
    assert np.array_equal(values, arrays[:, None] if arrays.ndim == 3 else arrays.transpose(0, 3, 1, 2))
    assert names[9:] == ["scan 9.mat", "scan 10.mat", "scan 11.mat"]
    assert "ignored the arrays rate of each file" in load(DataConfig(str(tmp_path / "data"))).record["preprocessing"]


def test_other_arrays_of_each_file_are_named(tmp_path):
    path = folder(tmp_path / "data", GREY, lambda place, array: np.savez(place, image=array, label=3), ".npz")
    values, _ = whole(path)
    assert np.array_equal(values[:, 0], GREY)
    assert "ignored the arrays label of each file" in load(DataConfig(path)).record["preprocessing"]


@pytest.mark.parametrize("save", [save_matlab, save_matlab_73])
@pytest.mark.parametrize(
    ("array", "expected", "last"),
    [
        (GREY, GREY[:, None], False),
        (GREY[:, :5].transpose(1, 2, 0), GREY[:, None, :5], True),
        (RGB[:, :5].transpose(1, 2, 3, 0), RGB[:, :5].transpose(0, 3, 1, 2), True),
        (RGB, RGB.transpose(0, 3, 1, 2), False),
    ],
    ids=["grey", "grey last", "rgb last", "rgb"],
)
def test_a_matlab_file_of_many_examples(tmp_path, save, array, expected, last):
    save(tmp_path / "data.mat", array)
    path = str(tmp_path / "data.mat")
    assert np.array_equal(whole(path)[0], expected)
    words = load(DataConfig(path)).record["preprocessing"]
    assert ("examples along the last axis, as MATLAB stacks images" in words) == last
    assert "ignored the arrays rate" in words


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"x" * 2000, {}, "data.mat cannot be read as a MATLAB file"),
        ({"a": GREY, "b": GREY}, {}, "got the keys a, b; choose one with --columns"),
        ({"a": GREY, "b": GREY}, {"columns": ("c",)}, "one of the keys a, b, got c"),
        ({"names": np.array(["x", "y"])}, {}, "needs the key train"),
    ],
)
def test_bad_matlab_files_are_refused(tmp_path, content, options, message):
    path = tmp_path / "data.mat"
    path.write_bytes(content) if isinstance(content, bytes) else savemat(path, content)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(str(path), **options))


@pytest.mark.parametrize(("ending", "content"), [(".wav", b"RIFF"), (".mat", b"MATLAB 5.0"), (".npy", b""), (".npz", b"PK")])
def test_files_that_all_are_damaged_are_refused_with_the_reason(tmp_path, ending, content):
    path = folder(tmp_path / "data", [content] * 3, Path.write_bytes, ending)
    with pytest.raises(ValueError, match=rf"no file can be read, the first: scan 0{ending}: .*\w"):
        load(DataConfig(path, images=ImageConfig(unreadable="skip")))


def test_a_matlab_file_that_claims_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sigma_vae.data.files.LARGEST_MEMBER", 2**16)
    savemat(tmp_path / "data.mat", {"x": np.zeros((2**8, 2**12), np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match="claims 1048576 bytes"):
        load(DataConfig(str(tmp_path / "data.mat")))


def save_wave(width):
    def save(path, samples):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(samples.shape[1])
            file.setsampwidth(width)
            file.setframerate(8000)
            file.writeframes(
                samples.tobytes() if width != 3 else samples.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
            )

    return save


SHORT = STATE.randint(-(2**15), 2**15, (12, 40, 2))
SOUNDS = {
    "8 bit": (1, GREY.reshape(12, 15, 2), {}, GREY.reshape(12, 15, 2).transpose(0, 2, 1)),
    "16 bit": (2, SHORT.astype("<i2"), {}, SHORT.transpose(0, 2, 1) + 2**15),
    "24 bit": (3, SHORT * 256 + 7, {"standardise": "yes"}, (SHORT * 256 + 7).transpose(0, 2, 1) / 2**23),
    "32 bit": (4, SHORT.astype("<i4") * 999, {"standardise": "yes"}, SHORT.transpose(0, 2, 1) * 999 / 2**31),
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_folders_of_sound_files(tmp_path, kind):
    width, samples, options, expected = SOUNDS[kind]
    path = folder(tmp_path / "data", samples, save_wave(width), ".wav")
    assert np.array_equal(whole(path, **options)[0], expected)
    assert load(DataConfig(path, **options)).levels == {1: 256, 2: 65536}.get(width)


def test_sound_that_is_cut_off_or_of_several_lengths_is_refused(tmp_path):
    path = folder(tmp_path / "data", [*SHORT.astype("<i2"), SHORT[0, :30].astype("<i2")], save_wave(2), ".wav")
    with pytest.raises(ValueError, match=r"need one shape, got 2: 2×40 \(12\), 2×30 \(1\); cut or pad"):
        load(DataConfig(path))
    (tmp_path / "data" / "scan 12.wav").write_bytes((tmp_path / "data" / "scan 0.wav").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"1 of 13 files .*scan 12.wav.*cut off"):
        load(DataConfig(path))


MISSING = {
    "nibabel": (".nii.gz", b"\x1f\x8b", "pip install nibabel"),
    "pydicom": (".dcm", b"DICM", "pip install pydicom, or make pictures of them: magick mogrify -format png"),
    "soundfile": (
        ".flac",
        b"fLaC",
        "pip install soundfile, or convert it: ffmpeg -i 'scan 0.flac' -c:a pcm_s16le 'scan 0-16.wav'",
    ),
}


@pytest.mark.parametrize("package", MISSING)
@pytest.mark.parametrize("alone", [True, False])
def test_what_a_missing_package_would_read_is_said(tmp_path, monkeypatch, package, alone):
    ending, content, message = MISSING[package]
    monkeypatch.setitem(sys.modules, package, None)
    path = folder(tmp_path / "data", [content], Path.write_bytes, ending)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(f"{path}/scan 0{ending}" if alone else path))


def save_array(path, array):
    with path.open("wb") as file:
        np.save(file, array)


@pytest.fixture
def packages(monkeypatch):
    """The packages that read scans and sound, as far as they are used, over files that hold arrays."""

    def nifti(path):
        array = np.load(path)
        return SimpleNamespace(shape=array.shape, get_data_dtype=lambda: array.dtype, dataobj=array)

    def dicom(path):
        array = np.load(path)
        frames = {} if array.ndim == 2 else {"NumberOfFrames": str(len(array))}
        return SimpleNamespace(pixel_array=array, Rows=array.shape[-2], Columns=array.shape[-1], get=frames.get)

    def sound(path, dtype, always_2d):
        return np.load(path).astype(dtype), 8000

    monkeypatch.setitem(sys.modules, "nibabel", SimpleNamespace(load=nifti))
    monkeypatch.setitem(sys.modules, "pydicom", SimpleNamespace(dcmread=dicom))
    monkeypatch.setitem(
        sys.modules,
        "soundfile",
        SimpleNamespace(
            read=sound, info=lambda path: SimpleNamespace(subtype="PCM_16" if np.load(path).dtype == "i2" else "FLOAT")
        ),
    )


def test_dicom_images_without_an_ending_are_known_by_their_first_bytes(tmp_path, packages, monkeypatch):
    def save(path, array):
        path.write_bytes(bytes(128) + b"DICM" + array.tobytes())

    def read(path):
        array = np.frombuffer(path.read_bytes()[132:], np.uint8).reshape(6, 5)
        return SimpleNamespace(pixel_array=array, Rows=6, Columns=5, get={}.get)

    monkeypatch.setattr(sys.modules["pydicom"], "dcmread", read)
    path = folder(tmp_path / "data", GREY[:11], save, "")
    save(tmp_path / "data" / "1.2.840.113619.2", GREY[11])
    (tmp_path / "data" / "README").write_text("about")
    values, names = whole(path)
    assert np.array_equal(values[:, 0], GREY[[11, *range(11)]])
    assert names[:3] == ["1.2.840.113619.2", "scan 0", "scan 1"]


SCANS = {
    "slices": (".nii.gz", GREY.reshape(3, 4, 6, 5).transpose(0, 3, 2, 1), {}, GREY[:, None]),
    "one slice": (".nii", GREY.transpose(0, 2, 1), {}, GREY[:, None]),
    "slices over time": (".nii", GREY.reshape(3, 2, 2, 6, 5).transpose(0, 4, 3, 1, 2), {}, GREY[:, None]),
    "frames": (".dcm", GREY.reshape(3, 4, 6, 5), {}, GREY[:, None]),
    "dicom": (".dcm", GREY.astype(np.uint16), {}, GREY[:, None]),
    "flac": (".flac", SHORT.astype(np.int16), {}, SHORT.transpose(0, 2, 1) + 2**15),
    "ogg": (".ogg", SHORT / 2**15, {"standardise": "yes"}, SHORT.transpose(0, 2, 1) / 2**15),
}


@pytest.mark.parametrize("kind", SCANS)
def test_scans_and_sound_by_their_packages(tmp_path, packages, kind):
    ending, arrays, options, expected = SCANS[kind]
    path = folder(tmp_path / "data", arrays, save_array, ending)
    values, names = whole(path, **options)
    assert np.array_equal(values, expected)
    several = len(expected) // len(arrays)
    assert names[-1] == f"scan {len(arrays) - 1}{ending}" + (f"[{several - 1}]" if several > 1 else "")
    if several > 1:  # neighbouring slices are alike: whole files are held out
        splits = load(DataConfig(path, **options))
        assert splits.record["counts"] == {"train": 4, "validation": 4, "test": 4}
        assert "test: 4 examples, all from 1 file at random" in splits.record["preprocessing"]


def test_a_scan_alone_is_a_data_set_of_its_slices(tmp_path, packages):
    save_array(tmp_path / "scan.nii", GREY.transpose(2, 1, 0))
    splits = load(DataConfig(str(tmp_path / "scan.nii")))
    assert splits.record["counts"] == {"train": 10, "validation": 1, "test": 1}
    words = splits.record["preprocessing"]
    assert "each slice of a scan along its third axis is an example, as no network here reads volumes" in words
    assert "examples of one file are in several splits, as there is only one" in words


# -- Tables in the dialects that people have, the levels that arrays use, and values far from 0 ------------------------

RANDOM = np.random.RandomState(0)
Z = np.random.RandomState(1).normal(size=(200, 4))
ROWS = np.column_stack([RANDOM.normal(5, 1, 60), RANDOM.normal(0, 3, 60), RANDOM.uniform(900, 1900, 60)]).round(3)
NAMES = ["längd", "temp", "price"]


def lines(sign=",", number="{:.3f}".format, names=NAMES, after=""):
    rows = [sign.join([*map(number, row), "abc"[i % 3]]) + after for i, row in enumerate(ROWS)]
    return "\n".join([sign.join([*names, "kind"]), *rows])


def comma(x):
    return f"{x:.3f}".replace(".", ",")


def german(x):
    return f"{x:,.3f}".replace(",", "_").replace(".", ",").replace("_", ".")


PLAIN = lines()
DIALECTS = {
    "plain": (PLAIN, "utf-8", ""),
    "semicolons": (lines(";"), "utf-8", "semicolons"),
    "bars": (lines("|"), "utf-8", "bars"),
    "tabs": (lines("\t"), "utf-8", "tabs"),
    "decimal commas": (lines(";", comma), "utf-8", "decimal commas"),
    "decimal commas and tabs": (lines("\t", comma), "utf-8", "decimal commas"),
    "decimal commas and thousands": (lines(";", german), "utf-8", "decimal commas"),
    "thousands": (lines(",", lambda x: f'"{x:,.3f}"'), "utf-8", "price: commas taken for thousands"),
    "comments": ("# a logger\n# 2024\n" + PLAIN, "utf-8", "skipped 2 lines before"),
    "a comment": ("# a logger, of ours, of old, of all\n" + PLAIN, "utf-8", "skipped 1 line before"),
    "a comment after the names": (PLAIN.replace("\n", "\n# degrees\n", 1), "utf-8", "skipped 1 comment line after the names"),
    "comments among the rows": (
        "\n".join(row + "\n#, back, on, line" * (i in (9, 60)) for i, row in enumerate(PLAIN.split("\n"))),
        "utf-8",
        "skipped 2 comment lines after the names",
    ),
    "comments before and after": ("# log\n" + PLAIN + "\n# end", "utf-8", "skipped 1 line before the names; skipped 1 comment"),
    "names in a comment": ("# log\n# " + lines(" "), "utf-8", "names from the comment line before the rows; skipped 1 line"),
    "blanks": (lines(" "), "utf-8", "separated by blanks"),
    "runs of blanks": ("\n".join("   " + row for row in lines("   ", "{:9.3f}".format).split("\n")), "utf-8", "by blanks"),
    "blanks and decimal commas": (lines("  ", comma), "utf-8", "separated by blanks; decimal commas"),
    "sep": ("sep=;\n" + lines(";"), "utf-8", "semicolons"),
    "bom": (PLAIN, "utf-8-sig", ""),
    "latin": (PLAIN, "latin-1", "latin-1"),
    "utf-16": (lines("\t"), "utf-16", "utf-16"),
    "spaces": (lines(", "), "utf-8", ""),
    "spaces about signs": (lines(" ; "), "utf-8", "semicolons"),
    "trailing": (lines(names=NAMES, after=","), "utf-8", ""),
    "windows": (PLAIN.replace("\n", "\r\n"), "utf-8", ""),
    "units": (lines(number="{:.3f} EUR".format), "utf-8", "price: without the unit EUR"),
    "dollars": (lines(number=lambda x: f"${x:.3f}".replace("$-", "-$")), "utf-8", "price: without the unit $"),
    "apostrophes": (lines(number=lambda x: f"{x:,.3f}".replace(",", "'")), "utf-8", ""),
    "thin blanks": (
        lines(";", lambda x: comma(float(f"{x:.3f}")) if x < 1000 else f"1\u202f{comma(x)[1:]}"),
        "utf-8",
        "decimal commas",
    ),
    "minus signs": (PLAIN.replace("-", "−"), "utf-8", ""),
    "percent": (lines(number="{:.3f}%".format), "utf-8", "temp: without the unit %"),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".txt", ".dat.gz"])
def test_one_table_is_the_same_in_every_dialect(tmp_path, name, ending):
    text, encoding, said = DIALECTS[name]
    path = tmp_path / f"a{ending}"
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    data = load(DataConfig(str(path), validation_fraction=0.1))
    assert data.record["columns"] == NAMES
    assert said in data.record["preprocessing"]
    assert "columns left out: kind" in data.record["preprocessing"]
    every = np.concatenate([data.scaling.undo(data.values(split)) for split in ("train", "validation", "test")])
    np.testing.assert_allclose(every[np.argsort(every[:, 2])], ROWS[np.argsort(ROWS[:, 2])], rtol=1e-5, atol=1e-5)


def csv_of(path, names, cells):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *cells])
    return str(path)


def test_values_that_begin_with_a_hash_are_no_comments(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["id", "a"], [[f"#{i}", x] for i, x in enumerate(Z[:, 0])])
    assert load(DataConfig(path)).record["counts"] == {"train": 162, "validation": 18, "test": 20}


OFFERED = {  # the last rows of a table of a, b, kind; what drops the rows that are not numbers; rows left
    "a total": ([["Total", "", ""]], ("Total",), 60),
    "a total beside numbers": ([["1.5", "Sum", ""], ["Total", "12.5", "x"]], ("Sum", "Total"), 60),
    "dashes": ([["--", "2.5", "x"], ["-", "2.5", "x"]], ("--", "-"), 60),
    "a question mark": ([["?", "2.5", "x"], ["1.5", "?", "x"]], ("?",), 60),
}


@pytest.mark.parametrize(("last", "words", "left"), OFFERED.values(), ids=OFFERED)
def test_the_rows_that_are_no_numbers_can_be_dropped_as_the_error_says(tmp_path, last, words, left):
    path = csv_of(tmp_path / "a.csv", ["a", "b", "kind"], [*([a, b, "x"] for a, b, _ in ROWS), *last])
    with pytest.raises(ValueError, match=r"drop (this row|such rows): --missing[ =]") as error:
        load(DataConfig(path))
    offered = str(error.value).split("--missing")[1][1:].split(",")[0]
    assert tuple(shlex.split(offered)) == words
    with pytest.raises(ValueError, match=r"--missing[ =](-- )?none ") as error:
        load(DataConfig(path, missing=("none",)))
    offered = str(error.value).split("--missing")[1][1:].split(", or")[0]
    assert set(shlex.split(offered)) == {"none", *words}
    data = load(DataConfig(path, missing=words))
    assert sum(data.record["counts"].values()) == left
    assert f"train: dropped {len(last)} of {60 + len(last)} rows for missing values in" in data.record["preprocessing"]


@pytest.mark.parametrize(("last", "said"), [("Total", True), ("grand total", True), ("Totalenergies", False), ("x", False)])
def test_a_last_row_that_sums_up_the_others_is_said(tmp_path, last, said):
    path = csv_of(tmp_path / "a.csv", ["kind", "a"], [*(["x", a] for a in ROWS[:, 0]), [last, ROWS[:, 0].sum()]])
    words = load(DataConfig(path)).record["preprocessing"]
    assert (f"the last row is '{last}' in column kind: remove it from the file if it sums" in words) == said


@pytest.mark.parametrize("ending", ["csv", "parquet", "frame"])
def test_words_for_missing_values_drop_their_rows(tmp_path, ending):
    frame = pd.DataFrame({"a": ROWS[:, 0].astype(object), "b": ROWS[:, 1], "on": [True, False] * 30})
    frame.loc[3, "a"], frame.loc[8, "b"], frame.loc[9, "b"] = "?", -999, np.nan
    frame["a"] = frame["a"].astype(str)
    path = tmp_path / f"a.{ending}"
    {"csv": frame.to_csv, "parquet": frame.to_parquet, "frame": lambda *_, **__: None}[ending](path, index=False)

    def read(**options):
        return as_splits(frame, **options) if ending == "frame" else load(DataConfig(str(path), **options))

    data = read(missing=("?", "-999"))
    assert data.record["columns"] == ["a", "b", "on"]
    assert "train: dropped 3 of 60 rows for missing values in a (1), b (2)" in data.record["preprocessing"]
    kept = np.delete(ROWS[:, :2], [3, 8, 9], axis=0)
    every = np.concatenate([data.stored(split).numpy()[:, :2] for split in ("train", "validation", "test")])
    np.testing.assert_allclose(every[every[:, 0].argsort()], kept[kept[:, 0].argsort()], rtol=1e-6)
    with pytest.raises(ValueError, match=r"got '\?' in row 4 of 60; drop this row: --missing '\?'"):
        read()
    with pytest.raises(ValueError, match=r"missing ones in b \(1\); .*drop these rows: --missing NA"):
        read(exclude=("a",))
    assert "dropped 1 of 60 rows" in read(exclude=("a",), missing=("NA",)).record["preprocessing"]


def test_rows_that_are_left_keep_their_numbers(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["a"], [["?" if i in (2, 5) else i * 1.5] for i in range(12)])
    store, names, *_ = load_whole(DataConfig(path, missing=("?",)), "test")
    assert names[:5].tolist() == [0, 1, 3, 4, 6]
    assert len(names) == len(store)


def test_a_column_without_values_is_left_out_rather_than_all_rows():
    frame = pd.DataFrame({"a": ROWS[:, 0], "none": np.nan})
    with pytest.raises(
        ValueError, match=r"missing ones in none \(60\); fill them in, or leave the columns out: --exclude none$"
    ):
        as_splits(frame)
    with pytest.raises(ValueError, match=r"--exclude none$"):
        as_splits(frame, missing=("NA",))


def test_levels_remain_integers_where_rows_are_dropped(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["a", "b"], [["" if i == 7 else i % 3, i % 2] for i in range(60)])
    assert load(DataConfig(path, levels=3, missing=("NA",))).values("train").unique().tolist() == [0.0, 0.5, 1.0]


COMMAS = {  # sign between the columns, a value, its meaning by decimal sign (None: an error that names the option)
    "quoted": (",", "1,100", {"auto": None, ".": 1100, ",": 1.1}),
    "semicolons": (";", "1,100", {"auto": None, ".": 1100, ",": 1.1}),
    "points": (",", "1.100", {"auto": 1.1, ".": 1.1, ",": 1100}),
    "with a unit": (",", "1,100 EUR", {"auto": None, ".": 1100, ",": 1.1}),
    "millions": (",", "1,100,000", {"auto": 1.1e6, ".": 1.1e6}),
    "with decimals": (",", "1,100.5", {"auto": 1100.5, ".": 1100.5}),
    "german": (",", "1.100,5", {"auto": 1100.5, ",": 1100.5}),
    "not three digits": (",", "1,1", {"auto": 1.1, ",": 1.1}),
    "a zero": (";", "0,125", {"auto": 0.125, ",": 0.125}),
}


@pytest.mark.parametrize("place", ["file", "frame"])
@pytest.mark.parametrize(("sign", "value", "meanings"), COMMAS.values(), ids=COMMAS)
def test_an_option_settles_what_a_comma_means(tmp_path, sign, value, meanings, place):
    cells = [[value if i else value.replace("1", "2", 1), i] for i in range(40)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=sign).writerows([["a", "b"], *cells])
    frame = pd.DataFrame(cells, columns=["a", "b"])

    def read(decimal):
        return (
            as_splits(frame, decimal=decimal)
            if place == "frame"
            else load(DataConfig(str(tmp_path / "a.csv"), decimal=decimal))
        )

    for decimal, meaning in meanings.items():
        if meaning is None:
            with pytest.raises(ValueError, match=r"column a .* in row 1 of 40 .*--decimal \. .*--decimal ,"):
                read(decimal)
        else:
            assert meaning in read(decimal).stored("train")[:, 0].double().numpy().round(6).tolist()


@pytest.mark.parametrize("share", [2, 3, 20])
def test_a_column_with_few_numbers_is_an_error_and_one_with_none_is_text(tmp_path, share):
    names = [str(i) if i % share == 1 else f"A{i}" for i in range(60)]
    path = csv_of(
        tmp_path / "a.csv", ["id", "place", "a"], [[name, f"B{name}", x] for name, x in zip(names, Z[:60, 0], strict=True)]
    )
    with pytest.raises(ValueError, match=r"column id needs numbers throughout, got 'A0' in row 1 of 60 .*--exclude id"):
        load(DataConfig(path))
    assert "columns left out: id, place" in load(DataConfig(path, exclude=("id",))).record["preprocessing"]


def test_names_and_values_with_line_ends_are_said_in_one_line(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["a\nb", "c"], [["x\ny" if i == 3 else i, i] for i in range(30)])
    with pytest.raises(
        ValueError, match=r"^.*column a b needs .* got 'x\\ny' in row 4 of 30; leave the column out: --exclude 'a b'$"
    ):
        load(DataConfig(path))
    assert load(DataConfig(path, exclude=("a b",))).record["columns"] == ["c"]


def test_all_columns_to_leave_out_are_named_at_once(tmp_path):
    cells = [[f"A{i}" if i % 2 else i, f"B{i}" if i % 3 else i, x] for i, x in enumerate(Z[:60, 0])]
    with pytest.raises(ValueError, match=r"--exclude one two$"):
        load(DataConfig(csv_of(tmp_path / "a.csv", ["one", "two", "a"], cells)))


SPOILT = {
    "?": (7, "?"),
    "two units": (9, "5 USD"),
    "a unit with three digits": (9, "5.125 USD"),
    "text": (11, "none given"),
    "a total": (59, "Total"),
    "a range": (3, "5-7"),
    "thousands by chance": (4, "1,502"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_column_that_is_mostly_numbers_is_an_error_with_value_row_and_remedy(tmp_path, name):
    row, value = SPOILT[name]
    cells = [[*map(str, each)] for each in ROWS]
    cells[row][1] = value
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b c", "d"], *cells])
    with pytest.raises(ValueError, match=rf"b c.*row {row + 1} of 60.*--exclude 'b c'") as error:
        load(DataConfig(str(path)))
    assert ("--decimal" in str(error.value)) == (value == "1,502")
    assert load(DataConfig(str(path), exclude=("b c",))).record["columns"] == ["a", "d"]
    assert load(DataConfig(str(path), columns=("a", "d"))).record["columns"] == ["a", "d"]


@pytest.mark.parametrize(
    "first", ["6.7,1.2,3.4,kind", "0,16.7,1502.7", ",1.2,1502.7", "7,a,b", "1.5,2.5", "3.1,2,x"], ids=lambda first: first
)
def test_a_first_row_of_values_is_not_taken_for_names(tmp_path, first):
    (tmp_path / "a.csv").write_text("\n".join([first] * 30))
    with pytest.raises(ValueError, match=r"first row needs the names"):
        load(DataConfig(str(tmp_path / "a.csv")))


@pytest.mark.parametrize("first", ["0,1,2", "2019,2020", "id,2019,2020", "0.1,0.2,0.3", ",0", "x,y"])
def test_times_years_and_row_numbers_are_names(tmp_path, first):
    width = first.count(",") + 1
    rows = [",".join(f"{value:.3f}" for value in row) for row in RANDOM.normal(size=(30, width))]
    (tmp_path / "a.csv").write_text("\n".join([first, *rows]))
    assert sum(load(DataConfig(str(tmp_path / "a.csv"))).record["counts"].values()) == 30


def test_decimals_and_booleans_of_data_frames_are_numbers():
    numbers = RANDOM.normal(size=40).round(3)
    frame = pd.DataFrame(
        {"a": [Decimal(str(x)) for x in numbers], "b": numbers, "c": pd.Series([True, False] * 20, dtype=object)}
    )
    data = as_splits(frame)
    assert data.record["columns"] == ["a", "b", "c"]
    np.testing.assert_array_equal(data.stored("train")[:, 0], data.stored("train")[:, 1])
    frame.loc[3, "c"] = None
    with pytest.raises(ValueError, match=r"missing ones in c \(1\).*--exclude c"):
        as_splits(frame)
    assert as_splits(frame, exclude=["c"]).record["columns"] == ["a", "b"]


def test_units_that_differ_between_tables_are_refused(tmp_path):
    for split, unit in (("train", "EUR"), ("test", "USD")):
        (tmp_path / f"{split}.csv").write_text("\n".join(["a", *(f"{x:.3f} {unit}" for x in RANDOM.normal(size=30))]))
    with pytest.raises(ValueError, match=r"same units in all tables.*EUR.*USD"):
        load(DataConfig(str(tmp_path)))


def test_a_table_without_thousands_goes_with_one_that_has_them(tmp_path):
    for split, factor in (("train", 1000), ("test", 1)):
        csv_of(tmp_path / f"{split}.csv", ["kind", "a"], [["x", f"{factor * x:,.3f}"] for x in ROWS[:, 0]])
    (tmp_path / "test.csv").write_text((tmp_path / "test.csv").read_text().replace("kind,", "").replace("x,", ""))
    data = load(DataConfig(str(tmp_path)))
    np.testing.assert_allclose(data.stored("test")[:, 0], ROWS[:, 0], rtol=1e-6)
    assert "a: commas taken for thousands" in data.record["preprocessing"]


def test_discrete_columns_are_said():
    frame = pd.DataFrame({"a": RANDOM.normal(size=100), "b": [0, 1] * 50, "c": RANDOM.randint(0, 4, 100)})
    assert "discrete columns: b, c (a density of discrete values has no upper bound" in as_splits(frame).record["preprocessing"]
    assert "discrete" not in as_splits(frame, exclude=["b", "c"]).record["preprocessing"]


@pytest.mark.parametrize("place", ["npy", "npz", "h5", "object"])
@pytest.mark.parametrize("dtype", [np.float32, float, np.int32])
def test_discrete_columns_of_arrays_are_said(tmp_path, place, dtype):
    rows = np.column_stack([1000 * RANDOM.normal(size=100), [0, 1] * 50, RANDOM.randint(0, 4, 100), np.arange(100)]).astype(
        dtype
    )
    path = tmp_path / f"a.{place}"
    if place == "h5":
        with h5py.File(path, "w") as file:
            file["x"] = rows
    elif place != "object":
        {"npy": np.save, "npz": np.savez}[place](path, rows)
    data = as_splits(rows if place == "object" else path, standardise="yes")
    assert "discrete columns: 1, 2 (a density of discrete values has no upper bound" in data.record["preprocessing"]
    assert "discrete" not in as_splits(rows[:, [0, 3]], standardise="yes").record["preprocessing"]
    assert "discrete" not in as_splits(BYTES.astype(np.uint8).reshape(40, 36)).record["preprocessing"]


def test_a_constant_column_is_named_with_its_remedy():
    frame = pd.DataFrame({"a": RANDOM.normal(size=40), "one": 1.5})
    with pytest.raises(ValueError, match=r"one have the same value.*--exclude one"):
        as_splits(frame)


BITS = RANDOM.randint(0, 2, (40, 6, 6))
BYTES = np.arange(40 * 36).reshape(40, 6, 6) % 256


@pytest.mark.parametrize("unit", [1e-80, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e80])
@pytest.mark.parametrize("offset", [0, 1, 1e6])
def test_standardised_values_do_not_depend_on_units_or_offsets(unit, offset):
    values = (Z + offset) * unit
    data = as_splits(values, standardise="yes")
    plain = as_splits(Z, standardise="yes").values("train")
    np.testing.assert_allclose(data.values("train"), plain, rtol=2e-5, atol=1e-4 if offset == 1 else 2e-5)
    again = next(iter(as_batches(values, data, batch_size=200))).x
    own = data.scaling.undo(again).double().numpy()
    np.testing.assert_allclose(own / unit, values / unit, rtol=1e-6, atol=2e-6)
    assert len(np.unique(own)) == values.size


def test_times_since_1970_keep_their_spread_from_every_source(tmp_path):
    far = 1.7e9 + Z
    np.save(tmp_path / "a.npy", far)
    np.savez(tmp_path / "a.npz", train=far)
    pd.DataFrame(far, columns=list("abcd")).to_csv(tmp_path / "a.csv", index=False)
    sources = [*(load(DataConfig(str(tmp_path / name), standardise="yes")) for name in ("a.npy", "a.npz", "a.csv"))]
    sources += [as_splits(far, standardise="yes"), as_splits(pd.DataFrame(far))]
    expected = as_splits(Z, standardise="yes").values("train")
    for data in sources:
        np.testing.assert_allclose(data.values("train"), expected, atol=1e-5)


def test_values_that_float32_would_round_are_refused_unless_standardised():
    values = 0.75 + 1e-9 * Z
    with pytest.raises(ValueError, match=r"spread float32 cannot hold.*--standardise yes"):
        as_splits(values)
    assert as_splits(values, standardise="yes").values("train").std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (Z.astype(np.int16), "--standardise yes"),
        (BITS.astype(np.int8) - 1, "--standardise yes"),
        (BYTES.astype(np.int64), "--levels 256"),
        (np.tanh(Z), r"\(x \+ 1\) / 2"),
        (Z + 1j, "two channels"),
        (np.array([np.zeros(3), np.zeros(4)] * 10, dtype=object)[:, None], "padded to one"),
    ],
)
def test_other_arrays_are_refused_with_a_remedy(values, remedy):
    with pytest.raises(ValueError, match=remedy):
        as_splits(values)
    if values.dtype.kind == "i":
        assert as_splits(values, standardise="yes").levels is None
