"""Hostile or odd files: pipes, looped links and configs made to cost time; reading never hangs."""

import os
import socket
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from sigma_vae.config import DataConfig, RunConfig, read
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


@pytest.mark.parametrize("ending", ["jfif", "jp2", "avif"])
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
    "of a network store": (["full", "@eaDir"], ""),
    "masks alone": (["masks"], None),
    "other folders": (["cats", "dogs"], None),
}


@pytest.mark.parametrize(("folders", "left_out"), BESIDE.values(), ids=BESIDE)
def test_masks_and_thumbnails_beside_pictures_are_left_out_and_said(folders, left_out, tmp_path: Path) -> None:
    for folder in folders:
        _pictures(tmp_path / "data" / folder)
    data = load(DataConfig(str(tmp_path / "data")))
    kept = len(folders) - (left_out is not None)
    assert sum(data.record["counts"].values()) == 12 * kept
    said = "folders of masks or thumbnails: " in data.record["preprocessing"]
    assert said == bool(left_out)
    if left_out:
        assert f"{left_out} (12)" in data.record["preprocessing"]


def test_a_huge_member_of_a_small_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.setattr("sigma_vae.data.archives.LARGEST_MEMBER", 2**20)
    folder = _pictures(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
        archive.writestr("bomb.png", bytes(2**21))
    assert (tmp_path / "data.zip").stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"1 of 13 pictures cannot be read .*more than a picture has"):
        load(DataConfig(str(tmp_path / "data.zip")))
