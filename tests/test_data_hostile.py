"""Hostile or odd files: pipes, looped links and configs made to cost time; reading never hangs."""

import gzip
import io
import os
import shutil
import socket
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from sigma_vae.config import DataConfig, RunConfig, read
from sigma_vae.data.arrays import read_images
from sigma_vae.data.load import load

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes need a Unix")


def _pictures(folder: Path, ending: str = "png", count: int = 12) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{ending}")
    return folder


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("put", [os.mkfifo, _socket, _loop], ids=["pipe", "socket", "looped folder"])
def test_a_folder_is_read_past_what_is_no_regular_file(put: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _pictures(tmp_path / "data")
    monkeypatch.chdir(folder)  # names of sockets are short
    put(Path("odd.png").absolute() if put is not _socket else Path("odd.png"))  # type: ignore[operator]
    assert sum(load(DataConfig(str(folder))).record["counts"].values()) == 12


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.zip", "x.png"])
def test_a_pipe_as_the_data_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="needs to be a file or a folder, got a pipe"):
        load(DataConfig(str(tmp_path / name)))


@pytest.mark.parametrize("ending", ["jfif", "jp2", "j2k", "avif", "tga", "pnm", "pcx"])
def test_pictures_that_pillow_writes_are_read(ending: str, tmp_path: Path) -> None:
    from PIL import Image

    if "." + ending not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know .{ending}")
    assert load(DataConfig(str(_pictures(tmp_path / "data", ending)))).shape == (3, 8, 8)


def test_tars_and_copies_need_no_unix_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _pictures(tmp_path / "data")
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(folder, "data")
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "pwrite")
    in_tar, in_folder = (
        load(DataConfig(str(tmp_path / name), cache=str(tmp_path / name[-3:]))) for name in ("data.tar", "data")
    )
    assert in_tar.record["fingerprint"] == in_folder.record["fingerprint"]


@pytest.mark.parametrize(
    "text", ["[" * 300_000, "a: 1\n" * 120_000, "[" + "1," * 65_000 + "]", "[" * 30_000, "- " * 30_000, "{a: " * 15_000]
)
def test_a_hostile_config_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"cannot be read as YAML|more than|is not a RunConfig"):
        read(tmp_path / "config.yaml", RunConfig)
    assert time.process_time() - start < 4


BESIDE = {  # folders of pictures, and those that are left out
    "masks": (["images", "masks"], "masks"),
    "anomalies": (["train/good", "test/good", "ground_truth/broken"], "ground_truth"),
    "thumbnails": (["full", "thumbs"], "thumbs"),
    "of a network store": (["full", "@eaDir"], "@eaDir"),
    "of a desktop": (["full", ".thumbnails"], ".thumbnails"),
    "of a Mac": (["full", "__MACOSX"], "__MACOSX"),
    "masks alone": (["masks"], None),
    "other folders": (["cats", "dogs"], None),
}


@pytest.mark.parametrize("packed", ["", ".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize(("folders", "left_out"), BESIDE.values(), ids=BESIDE)
def test_masks_and_thumbnails_beside_pictures_are_left_out_and_said(folders, left_out, packed: str, tmp_path: Path) -> None:
    for folder in folders:
        _pictures(tmp_path / "data" / folder)
    if packed:
        shutil.make_archive(str(tmp_path / "data"), {".tar.gz": "gztar"}.get(packed, packed[1:]), tmp_path / "data")
    data = load(DataConfig(str(tmp_path / f"data{packed}")))
    kept = len(folders) - (left_out is not None)
    assert sum(data.record["counts"].values()) == 12 * kept
    said = "folders of masks or thumbnails: " in data.record["preprocessing"]
    assert said == bool(left_out)
    if left_out:
        assert f"{left_out} (12)" in data.record["preprocessing"]


ZEROS = np.zeros((3000, 1000), np.uint8)


def _claiming(pages: int, side: int) -> bytes:
    """A TIFF whose pages all claim the same few bytes as their pixels."""
    length = 2 + 8 * 12 + 4
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8 + pages * length), (278, side), (279, side * side)]
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    following = [8 + (number + 1) * length for number in range(pages - 1)] + [0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(page + struct.pack("<I", there) for there in following) + bytes(1000)


@pytest.mark.parametrize(
    ("pages", "side", "message"),
    [
        (1, 60_000, "DecompressionBombError: .*3600000000 pixels"),
        (2000, 9000, "have 162000000000 pixels in .* more than such a file can hold"),
        (3, 20_000, "DecompressionBombError"),
        (12, 100, "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_tiff_that_claims_more_than_it_has_is_refused_at_once(pages, side, message, alone, tmp_path: Path) -> None:
    folder = tmp_path if alone else _pictures(tmp_path / "data")
    (folder / "bomb.tif").write_bytes(_claiming(pages, side))
    start = time.process_time()
    with pytest.raises(ValueError, match=message if alone or pages != 12 else "16-bit|same channels"):
        load(DataConfig(str(folder / "bomb.tif" if alone else folder)))
    assert time.process_time() - start < 10


def test_a_later_page_of_a_tiff_is_checked_like_the_first(tmp_path: Path) -> None:
    small, large = _claiming(1, 4), _claiming(1, 30_000)
    joined = bytearray(small + large)
    joined[8 + 2 + 8 * 12 : 8 + 2 + 8 * 12 + 4] = struct.pack("<I", len(small) + 8)
    (tmp_path / "bomb.tif").write_bytes(joined)
    with pytest.raises(ValueError, match=r"30000×30000 are more than .* pixels|DecompressionBombError"):
        load(DataConfig(str(tmp_path / "bomb.tif")))


def _sparse_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (10**7, 64, 64), "u1", chunks=(1, 64, 64), compression="gzip")[0] = 1


def _untouched_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", (10**8, 100), "f8")


def _overlong_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("train", (2**40, 2**40), "f8", chunks=(1, 64))


def _tar_of_zeros(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = 2**20
            archive.addfile(member, io.BytesIO(bytes(2**20)))


def _gzipped(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


BOMBS = {
    "a.npz": lambda path: np.savez_compressed(path, train=ZEROS),
    "chosen.npz": lambda path: np.savez_compressed(path, data=ZEROS, other=ZEROS),
    "written once.h5": _sparse_h5,
    "never written.h5": _untouched_h5,
    "beyond numbers.h5": _overlong_h5,
    "a.tar.gz": _tar_of_zeros,
    "a.tgz": _tar_of_zeros,
    "a.csv.gz": lambda path: _gzipped(path, b"a,b\n" + 2**19 * b"0,0\n"),
    "a.txt.gz": lambda path: _gzipped(path, b"a b\n" + 2**19 * b"0 0\n"),
    "a.parquet": lambda path: pd.DataFrame({"a": np.zeros(2**20)}).to_parquet(path),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.data.archives.LARGEST_MEMBER", 2**20)
    path = tmp_path / name
    BOMBS[name](path)
    assert path.stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"^[^\n]*unpacks to [^\n]*, over 500 times as many[^\n]*$") as error:
        load(DataConfig(str(path), **({"cache": str(tmp_path / "cache")} if name.endswith((".h5", "tgz", "tar.gz")) else {})))
    assert name in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_gzipped_idx_file_that_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.data.archives.LARGEST_MEMBER", 2**20)
    _gzipped(tmp_path / "images.gz", struct.pack(">IIII", 0x803, 3000, 28, 28) + bytes(3000 * 784))
    with pytest.raises(ValueError, match=r"images.gz has \d+ bytes and unpacks to"):
        read_images(tmp_path / "images.gz")


def test_what_a_bombs_error_advises_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.data.archives.LARGEST_MEMBER", 2**20)
    np.savez(tmp_path / "a.npz", train=ZEROS)
    assert load(DataConfig(str(tmp_path / "a.npz"))).shape == (1000,)
    _sparse_h5(tmp_path / "sparse.h5")
    with h5py.File(tmp_path / "sparse.h5") as old, h5py.File(tmp_path / "new.h5", "w") as new:
        new["x"] = old["x"][:30]
    assert load(DataConfig(str(tmp_path / "new.h5"))).shape == (1, 64, 64)


def _with_shape(shape: str, end: bytes = b"") -> bytes:
    """A .npy file whose header claims this shape of int8, after which there are 6 values."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(6) + end


@pytest.mark.parametrize("shape", ["(4, 2)", "(3, 1)", "(1000000000000, 4)", "(4294967296, 4294967296)", "(0, 5)"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_a_header_that_claims_other_sizes_than_there_are_is_refused(name: str, shape: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.npy":
        path.write_bytes(_with_shape(shape))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train.npy", _with_shape(shape))
    with pytest.raises(ValueError, match=rf"{name}.* claims \d+ bytes of values, shape .*, and holds 6; save it anew$"):
        load(DataConfig(str(path)))


def test_a_long_header_of_an_array_is_one_line(tmp_path: Path) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (6,{' ' * 20_000}), }}\n".encode()
    (tmp_path / "a.npy").write_bytes(np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(6))
    with pytest.raises(ValueError, match=r"^.*a.npy cannot be read as .npy or .npz.*save it anew[^\n]*$"):
        load(DataConfig(str(tmp_path / "a.npy")))


def test_an_array_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", ZEROS)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = ZEROS
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    for name in ("a.npy", "a.h5"):
        with pytest.raises(ValueError, match=r"has 3000000 bytes, the memory of this machine 1000000; save fewer examples"):
            load(DataConfig(str(tmp_path / name)))


def test_a_huge_member_of_a_small_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigma_vae.data.archives.LARGEST_MEMBER", 2**20)
    folder = _pictures(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
        archive.writestr("bomb.png", bytes(2**21))
    assert (tmp_path / "data.zip").stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"1 of 13 pictures cannot be read .*more than a picture has"):
        load(DataConfig(str(tmp_path / "data.zip")))
