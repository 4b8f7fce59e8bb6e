"""Folders with an array per file, and files of other programs, come back as they were written."""

import sys
import wave
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import load
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
