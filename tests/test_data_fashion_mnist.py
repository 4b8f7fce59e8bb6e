"""Fashion-MNIST is found in every place it may be in, pixel for pixel, and damaged files are refused."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sigma_vae.config import DataConfig
from sigma_vae.data import load
from sigma_vae.data.named import fashion_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
COUNTS = {"train": 60, "test": 10}


def idx(images, magic=0x803):
    return struct.pack(">IIII", magic, *images.shape) + images.tobytes()


def official(seed=0, counts=COUNTS):
    state = np.random.RandomState(seed)
    return {name: state.randint(0, 256, (count, 28, 28)).astype(np.uint8) for name, count in counts.items()}


def write_idx(folder, images, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, stem in (("train", "train-images-idx3-ubyte"), ("test", "t10k-images-idx3-ubyte")):
        content = idx(images[name])
        (folder / (stem + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_hub(folder, images):
    """A repository in the hub's layout: Parquet files with PNG images and labels, and a card that names them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def png(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    (folder / "fashion_mnist").mkdir(parents=True)
    card = ["---", "configs:", "- config_name: fashion_mnist", "  default: true", "  data_files:"]
    for name, part in images.items():
        card += [f"  - split: {name}", f"    path: fashion_mnist/{name}-*"]
        pixels = pa.array([png(image) for image in part], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"image": pixels, "label": pa.array([0] * len(part), pa.int64())})
        metadata = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
        table = table.replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, folder / "fashion_mnist" / f"{name}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.fixture
def small_official(monkeypatch, tmp_path):
    """Fashion-MNIST of 60 and 10 images, and no other place that might hold the real one."""
    monkeypatch.setattr(fashion_mnist, "_COUNTS", COUNTS)
    monkeypatch.setattr(fashion_mnist, "_PREFIXES", (tmp_path / "nowhere", tmp_path / "usr"))
    monkeypatch.setattr(fashion_mnist, "_HUB", str(tmp_path / "no-hub"))
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"the network was touched: {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def rows(part):
    """The examples as a sorted list, to compare splits as multisets."""
    return sorted(map(bytes, part.reshape(len(part), -1).contiguous().numpy()))


def assert_official(splits, images):
    assert np.array_equal(splits.stored("test")[:, 0].numpy(), images["test"])
    held_in = rows(torch.cat([splits.stored("train"), splits.stored("validation")]))
    assert held_in == rows(torch.from_numpy(images["train"]))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["root", "variable", "below variable", "prefix"])
def test_fashion_mnist_is_found(small_official, monkeypatch, tmp_path, zipped, place):
    images = official()
    folders = {"below variable": tmp_path / "fashion-mnist", "prefix": tmp_path / "usr/share/datasets/fashion-mnist"}
    write_idx(folders.get(place, tmp_path), images, zipped)
    if "variable" in place:
        monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path))
    splits = load(DataConfig("fashion-mnist", root=str(tmp_path) if place == "root" else None))
    assert_official(splits, images)
    assert len(splits.record["files"]) == 2


def test_fashion_mnist_from_the_hub(small_official, no_network, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the hub needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(fashion_mnist, "_HUB", str(write_hub(tmp_path / "hub", official())))
    splits = load(DataConfig("fashion-mnist"))
    assert_official(splits, official())
    assert splits.record["files"][0]["hub"].endswith("hub")


def test_fashion_mnist_nowhere_names_every_place(small_official, no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="nor on the hub") as error:
        load(DataConfig("fashion-mnist"))
    for place in ("mine", "mine/fashion-mnist", "nowhere/share/datasets/fashion-mnist", "no-hub"):
        assert str(tmp_path / place) in str(error.value)


def test_real_fashion_mnist_pixel_for_pixel(monkeypatch):
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"the Debian package dataset-fashion-mnist is not installed: no files in {DEBIAN}")
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)
    images = {}
    for name, stem in (("train", "train"), ("test", "t10k")):
        with gzip.open(DEBIAN / f"{stem}-images-idx3-ubyte.gz") as file:
            images[name] = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28).copy()
    splits = load(DataConfig("fashion-mnist"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54000, 6000, 10000)
    assert_official(splits, images)


def damaged(folder, change, zipped=False):
    write_idx(folder, official(), zipped)
    path = folder / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(change(path.read_bytes()))


DAMAGED = {
    "truncated": (lambda content: content[:-1], False, "needs 47040 bytes for images .*, got 47039"),
    "too long": (lambda content: content + b"\0", False, "got 47041"),
    "truncated gzip": (lambda content: content[:2000], True, "cannot be read"),
    "broken gzip": (lambda content: content[:50] + b"\xff" * 200 + content[250:], True, "cannot be read"),
    "bad magic": (lambda content: idx(official()["train"], magic=0x801), False, "magic number 0x00000803 .* got 0x00000801"),
    "no header": (lambda content: b"abc", False, "header of 16 bytes, got 3"),
    "fewer images": (lambda content: idx(official()["test"]), False, r"needs images \(60, 28, 28\)"),
    "other size": (lambda content: idx(np.zeros((60, 14, 14), np.uint8)), False, r"got \(60, 14, 14\)"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(small_official, tmp_path, kind):
    change, zipped, message = DAMAGED[kind]
    damaged(tmp_path, change, zipped)
    with pytest.raises(ValueError, match=message):
        load(DataConfig("fashion-mnist", root=str(tmp_path)))


def test_half_a_data_set_is_refused(small_official, tmp_path):
    with pytest.raises(ValueError, match="no such file; give the folder"):
        load(DataConfig("fashion-mnist", root=str(tmp_path)))
    write_idx(tmp_path, official())
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="got no t10k-images-idx3-ubyte"):
        load(DataConfig("fashion-mnist", root=str(tmp_path)))
