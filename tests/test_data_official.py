"""Published data sets are found in every place they may be in, pixel for pixel; what is damaged or hostile is refused."""

import gzip
import io
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from official import (
    COUNTS,
    HUB,
    WRITERS,
    cifar_batches,
    encoded,
    idx,
    images_of,
    old_pickle,
    write_celeba,
    write_cifar10,
    write_hub,
    write_idx,
)
from scipy.io import savemat

from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import load
from sigma_vae.data.named import images as named

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CIFAR_SLICE = Path(__file__).parents[2] / "shared" / "data" / "cifar10_slice.npz"
NAMES = list(COUNTS)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Every data set in miniature, and no other place that might hold the real one."""
    datasets = pytest.importorskip("datasets", reason="the hub needs the package datasets")
    monkeypatch.setattr(named, "_MNIST_COUNTS", COUNTS["mnist"])
    monkeypatch.setattr(named, "_MEANS", {name: float(images_of(name)["train"].mean()) for name in ("mnist", "fashion-mnist")})
    monkeypatch.setattr(named, "_PREFIXES", (tmp_path / "nowhere", tmp_path / "usr"))
    monkeypatch.setattr(named, "_CIFAR_COUNTS", COUNTS["cifar10"])
    monkeypatch.setattr(named, "_SVHN_COUNTS", COUNTS["svhn"])
    monkeypatch.setattr(named, "_FREY_COUNTS", COUNTS["frey-faces"])
    monkeypatch.setattr(named, "_CELEBA_COUNTS", COUNTS["celeba"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a folder OWNER/NAME there stands in for the hub's


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"the network was touched: {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def expected(name, images, crop=148, size=None):
    """What a data set's pictures must become ``(N, C, H, W)``, by other means than the library's."""
    from PIL import Image

    def resized(image, side):
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))

    if name == "celeba":
        top, left = (218 - crop) // 2, (178 - crop) // 2
        images = [resized(image[top : top + crop, left : left + crop], size or 64) for image in images]
    if name == "svhn":
        images = [resized(image, size or 28) for image in images]
    images = np.stack(list(images))
    return images[:, np.newaxis] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def as_published(name, images):
    """CelebA's pictures went through JPEG."""
    from PIL import Image

    if name != "celeba":
        return images
    return {split: [np.asarray(Image.open(io.BytesIO(encoded(i, "JPEG")))) for i in part] for split, part in images.items()}


def rows(part):
    """The examples as a sorted list, to compare splits as multisets."""
    return sorted(bytes(np.ascontiguousarray(row)) for row in part)


def assert_same(splits, name, images, **options):
    """Splits that were published are kept in order; the others are held out from train, and nothing is lost."""
    for split in set(images) - {"train"}:
        assert np.array_equal(splits.stored(split).numpy(), expected(name, images[split], **options))
    held = [split for split in ("train", "validation", "test") if split == "train" or split not in images]
    together = torch.cat([splits.stored(split) for split in held]).numpy()
    assert rows(together) == rows(expected(name, images["train"], **options))
    assert splits.levels == 256
    assert splits.stored("train").dtype == torch.uint8


@pytest.mark.parametrize("place", ["root", "variable", "below variable"])
@pytest.mark.parametrize("name", NAMES)
def test_found_in_every_place(small, no_network, monkeypatch, tmp_path, name, place):
    images = images_of(name)
    WRITERS[name](tmp_path / name if place == "below variable" else tmp_path, images)
    if place != "root":
        monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path))
    splits = load(DataConfig(name, root=str(tmp_path) if place == "root" else None))
    assert_same(splits, name, as_published(name, images))
    assert splits.record["files"]
    assert json.loads(json.dumps(splits.record)) == splits.record
    assert all(str(tmp_path) in file["path"] for file in splits.record["files"])


VARIANTS = {
    "idx unzipped": ("mnist", {"zipped": False}),
    "cifar binary": ("cifar10", {"binary": True}),
    "cifar python archive": ("cifar10", {"packed": True}),
    "cifar binary archive": ("cifar10", {"binary": True, "packed": True}),
    "celeba zip": ("celeba", {"zipped": True}),
    "celeba csv": ("celeba", {"csv": True}),
    "celeba nested": ("celeba", {"nested": True, "csv": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_form(small, tmp_path, variant):
    name, options = VARIANTS[variant]
    images = images_of(name)
    WRITERS[name](tmp_path, images, **options)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert_same(load(DataConfig(name, root=str(tmp_path))), name, as_published(name, images))
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(".sigma-vae" in path.parts for path in new)  # archives are not unpacked


@pytest.mark.parametrize("name", list(HUB))
def test_found_on_the_hub(small, no_network, tmp_path, name):
    images = images_of(name)
    write_hub(Path(), name, images)
    splits, again = load(DataConfig(name)), load(DataConfig(name))
    assert_same(splits, name, images)
    assert splits.record == again.record
    assert json.loads(json.dumps(splits.record)) == splits.record
    assert [file["split"] for file in splits.record["files"]] == list(images)
    assert splits.record["files"][0]["hub"].startswith(f"hub:{HUB[name][0]}")
    assert (tmp_path / "hub-cache/.sigma-vae").is_dir()


def test_the_folder_of_its_name_comes_first(small, monkeypatch, tmp_path):
    """MNIST and Fashion-MNIST have files of the same names: both can lie under one folder."""
    monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path))
    write_idx(tmp_path, images_of("mnist"))
    write_idx(tmp_path / "fashion-mnist", images_of("fashion-mnist", 1))
    monkeypatch.setitem(named._MEANS, "fashion-mnist", float(images_of("fashion-mnist", 1)["train"].mean()))
    assert_same(load(DataConfig("mnist")), "mnist", images_of("mnist"))
    assert_same(load(DataConfig("fashion-mnist")), "fashion-mnist", images_of("fashion-mnist", 1))


def test_the_hubs_decoded_copy_lies_where_the_user_says(small, no_network, tmp_path):
    write_hub(Path(), "mnist", images_of("mnist"))
    load(DataConfig("mnist", cache=str(tmp_path / "mine")))
    assert list((tmp_path / "mine").glob("*/examples.npy"))
    assert not (tmp_path / "hub-cache/.sigma-vae").exists()


def test_the_debian_package_comes_before_the_hub(small, no_network, tmp_path):
    write_idx(tmp_path / "usr/share/datasets/fashion-mnist", images_of("fashion-mnist"))
    assert_same(load(DataConfig("fashion-mnist")), "fashion-mnist", images_of("fashion-mnist"))
    with pytest.raises(ValueError, match=r"mnist needs train-images.*cannot be loaded from the hub"):
        load(DataConfig("mnist"))


@pytest.mark.parametrize("name", NAMES)
def test_nowhere_names_every_place_and_the_remedy(small, no_network, monkeypatch, tmp_path, name):
    monkeypatch.setenv("SIGMA_VAE_DATA", str(tmp_path / "mine"))
    with pytest.raises(
        ValueError, match=f"^{name} needs .* found no such file in .*; put the files in a folder .* --root"
    ) as error:
        load(DataConfig(name))
    places = [str(tmp_path / "mine"), str(tmp_path / "mine" / name), *([HUB[name][0]] if name in HUB else [])]
    assert all(place in str(error.value) for place in places)
    with pytest.raises(ValueError, match="found no such file in") as error:
        load(DataConfig(name, root=str(tmp_path / "empty")))
    assert str(tmp_path / "empty") in str(error.value)
    assert "mine" not in str(error.value)
    assert "hub" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_other_counts_than_published_are_refused(small, tmp_path, name):
    images = images_of(name)
    WRITERS[name](tmp_path, images | {"train": np.concatenate([images["train"]] * 2)})
    with pytest.raises(ValueError, match=f"needs the published examples of {name}, {COUNTS[name]['train']} train.* got "):
        load(DataConfig(name, root=str(tmp_path)))


def test_other_counts_on_the_hub_are_refused(small, no_network):
    write_hub(Path(), "cifar10", {"train": images_of("cifar10")["train"][:-1], "test": images_of("cifar10")["test"]})
    with pytest.raises(ValueError, match=r"hub:uoft-cs/cifar10 needs the published .* 20 train, 4 test, got 19 train, 4 test"):
        load(DataConfig("cifar10"))


@pytest.mark.parametrize("name", ["cifar10", "celeba"])
def test_other_sizes_on_the_hub_are_refused(small, no_network, name):
    write_hub(Path(), name, {split: part[:, 1:] for split, part in images_of(name).items()})
    with pytest.raises(ValueError, match="cannot be decoded"):
        load(DataConfig(name))


@pytest.mark.parametrize(("size", "hub"), [(32, False), (32, True), (28, True), (16, False)])
def test_svhn_of_any_size(small, no_network, tmp_path, size, hub):
    images = images_of("svhn")
    write_hub(Path(), "svhn", images) if hub else WRITERS["svhn"](tmp_path, images)
    config = DataConfig("svhn", root=None if hub else str(tmp_path), images=ImageConfig(size=size))
    splits = load(config)
    assert splits.shape == (3, size, size)
    if size == 32:
        assert np.array_equal(splits.stored("test").numpy(), images["test"].transpose(0, 3, 1, 2))
    assert_same(splits, "svhn", images, size=size)
    assert ("bilinear" in splits.record["preprocessing"]) == (size != 32)


def test_svhn_is_resized_as_an_antialiased_triangle_does(small, tmp_path):
    images = images_of("svhn")
    WRITERS["svhn"](tmp_path, images)
    ours = load(DataConfig("svhn", root=str(tmp_path))).stored("test").float()
    whole = torch.from_numpy(images["test"].transpose(0, 3, 1, 2)).float()
    theirs = torch.nn.functional.interpolate(whole, (28, 28), mode="bilinear", antialias=True)
    assert (ours - theirs).abs().max() < 1.01  # Pillow rounds after each of the two passes


@pytest.mark.parametrize("hub", [True, False])
def test_celebas_crop_of_128_is_that_of_dai_and_wipf(small, no_network, tmp_path, hub):
    images = images_of("celeba")
    write_hub(Path(), "celeba", images) if hub else write_celeba(tmp_path, images)
    published = images if hub else as_published("celeba", images)
    root = None if hub else str(tmp_path)
    whole = load(DataConfig("celeba", root=root, images=ImageConfig(crop=128, size=128)))
    test = np.stack([image[45:173, 25:153] for image in published["test"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(whole.stored("test").numpy(), test)
    small_one = load(DataConfig("celeba", root=root, images=ImageConfig(crop=140, size=32)))
    assert_same(small_one, "celeba", published, crop=140, size=32)
    assert "140" in small_one.record["preprocessing"]


def test_a_changed_picture_is_decoded_anew(small, tmp_path):
    write_celeba(tmp_path, images_of("celeba"))
    before = load(DataConfig("celeba", root=str(tmp_path)))
    picture = tmp_path / "img_align_celeba/000003.jpg"
    picture.write_bytes(encoded(np.zeros((218, 178, 3), np.uint8), "JPEG"))
    assert load(DataConfig("celeba", root=str(tmp_path))).record["fingerprint"] != before.record["fingerprint"]


def test_frey_faces_says_that_neighbours_are_alike(small, tmp_path):
    WRITERS["frey-faces"](tmp_path, images_of("frey-faces"))
    splits = load(DataConfig("frey-faces", root=str(tmp_path)))
    assert splits.shape == (1, 28, 20)
    assert "resemble their neighbours" in splits.record["preprocessing"]
    assert "at random" in splits.record["preprocessing"]


def test_the_writers_pickle_is_pythons_own():
    """The hand-made batch is what an ordinary unpickler reads as such: the reader is not tested against a format of our own."""
    image = images_of("cifar10")["train"][:4].transpose(0, 3, 1, 2).reshape(4, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of numpy mind the old names of their modules
        batch = pickle.loads(old_pickle(image), encoding="bytes")
    assert np.array_equal(batch[b"data"], image)
    assert batch[b"labels"] == [0, 1, 2, 3]
    assert batch[b"batch_label"] == b"training batch 1 of 5"


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"data": bad}, lambda bad: {"labels": [bad], "data": 1}])
def test_a_hostile_batch_is_refused_and_does_not_run(small, monkeypatch, tmp_path, wrap, packed):
    harm = tmp_path / "harm"
    content = pickle.dumps(wrap(Hostile(harm)), protocol=2)
    pickle.loads(content)
    harm.rmdir()  # it would run, elsewhere
    monkeypatch.setattr("official.cifar_batches", lambda images, binary: cifar_batches(images) | {"data_batch_3": content})
    write_cifar10(tmp_path / "data", images_of("cifar10"), packed=packed)
    with pytest.raises(ValueError, match=r"data_batch_3.* it names (posix|nt)\.mkdir, which is not run; fetch the file again"):
        load(DataConfig("cifar10", root=str(tmp_path / "data")))
    assert not harm.exists()


def objects(content):
    """The same pickle with an array of Python objects."""
    return content.replace(b"U\x02u1", b"U\x02O8")


def called(content):
    """The same pickle that calls numpy.ndarray itself."""
    return b"\x80\x02cnumpy\nndarray\n(K\x05tR."


BATCHES = {
    "objects": (objects, r"array of b'O8', not of bytes"),
    "called": (called, r"calls numpy\.ndarray, which is not run"),
    "truncated": (lambda content: content[:-100], "data_batch_3 needs to be a pickle"),
    "empty": (lambda content: b"", "data_batch_3 needs to be a pickle"),
    "no dict": (lambda content: pickle.dumps([1, 2], 2), "needs an array data .* got list"),
    "no data": (lambda content: pickle.dumps({"labels": [1]}, 2), "needs an array data .* got NoneType"),
    "other width": (lambda content: old_pickle(np.zeros((4, 100), np.uint8)), r"\(images, 3072\), got shape \(4, 100\)"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_damaged_batches_are_refused(small, tmp_path, kind):
    change, message = BATCHES[kind]
    write_cifar10(tmp_path, images_of("cifar10"))
    path = tmp_path / "cifar-10-batches-py/data_batch_3"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(DataConfig("cifar10", root=str(tmp_path)))


def cut(path, count=100):
    path.write_bytes(path.read_bytes()[:-count])


def lines(path, change):
    path.write_text(change(path.read_text()))


DAMAGE = {
    "batch missing": (
        "cifar10",
        {},
        lambda folder: (folder / "cifar-10-batches-py/data_batch_4").unlink(),
        "got no data_batch_4; put all",
    ),
    "binary cut": (
        "cifar10",
        {"binary": True},
        lambda folder: cut(folder / "cifar-10-batches-bin/test_batch.bin"),
        "records of 3073 bytes, got 12192",
    ),
    "archive cut": (
        "cifar10",
        {"packed": True},
        lambda folder: cut(folder / "cifar-10-python.tar.gz", 2000),
        "cifar-10-python.tar.gz cannot be read",
    ),
    "no archive": (
        "cifar10",
        {},
        lambda folder: (
            (folder / "cifar-10-batches-py").rename(folder / "x") and (folder / "cifar-10-python.tar.gz").write_text("?")
        ),
        "cannot be read: ReadError",
    ),
    "svhn half": ("svhn", {}, lambda folder: (folder / "test_32x32.mat").unlink(), "got no test_32x32.mat; put both"),
    "svhn cut": ("svhn", {}, lambda folder: cut(folder / "train_32x32.mat"), "cannot be read as a MATLAB file"),
    "svhn other": (
        "svhn",
        {},
        lambda folder: (
            WRITERS["frey-faces"](folder, images_of("frey-faces"))
            or (folder / "frey_rawface.mat").replace(folder / "train_32x32.mat")
        ),
        r"array X of uint8 with shape \(32, 32, 3, 'N'\), got none",
    ),
    "frey transposed": (
        "frey-faces",
        {},
        lambda folder: savemat(folder / "frey_rawface.mat", {"ff": images_of("frey-faces")["train"].reshape(-1, 560)}),
        r"needs an array ff of uint8 with shape \(560, 'N'\), got uint8 \(40, 560\)",
    ),
    "frey of floats": (
        "frey-faces",
        {},
        lambda folder: savemat(folder / "frey_rawface.mat", {"ff": np.zeros((560, 40))}),
        r"got float64 \(560, 40\)",
    ),
    "partition missing": (
        "celeba",
        {},
        lambda folder: (folder / "list_eval_partition.txt").unlink(),
        "got no list_eval_partition.txt; put both",
    ),
    "pictures missing": (
        "celeba",
        {"zipped": True},
        lambda folder: (folder / "img_align_celeba.zip").unlink(),
        "got no img_align_celeba; put both",
    ),
    "one picture missing": (
        "celeba",
        {},
        lambda folder: (folder / "img_align_celeba/000003.jpg").unlink(),
        "needs 21 pictures, got 20",
    ),
    "one picture renamed": (
        "celeba",
        {},
        lambda folder: (folder / "img_align_celeba/000003.jpg").rename(folder / "img_align_celeba/3.jpg"),
        r"1 of \d+ examples cannot be decoded \(000003.jpg\)",
    ),
    "one picture cut": (
        "celeba",
        {},
        lambda folder: cut(folder / "img_align_celeba/000003.jpg", 9000),
        r"1 of \d+ examples cannot be decoded \(000003.jpg\)",
    ),
    "one picture of another size": (
        "celeba",
        {},
        lambda folder: (folder / "img_align_celeba/000003.jpg").write_bytes(encoded(np.zeros((218, 179, 3), np.uint8), "JPEG")),
        r"1 of \d+ examples cannot be decoded \(000003.jpg\)",
    ),
    "zip cut": (
        "celeba",
        {"zipped": True},
        lambda folder: cut(folder / "img_align_celeba.zip"),
        "cannot be read as zip archive",
    ),
    "partition of 3": (
        "celeba",
        {},
        lambda folder: lines(folder / "list_eval_partition.txt", lambda text: text[:-2] + "3\n"),
        "with 0, 1 or 2, got '000021.jpg 3' as line 21",
    ),
    "partition short": (
        "celeba",
        {},
        lambda folder: lines(folder / "list_eval_partition.txt", lambda text: "\n".join(text.split("\n")[:9])),
        r"list_eval_partition.txt needs the published examples of celeba, 12 train, 4 validation, 5 test, got",
    ),
    "idx half": ("mnist", {}, lambda folder: (folder / "t10k-images-idx3-ubyte.gz").unlink(), "got no t10k-images-idx3-ubyte"),
    "another's idx": (
        "mnist",
        {},
        lambda folder: write_idx(folder, {split: part // 2 for split, part in images_of("mnist").items()}),
        "training images of mnist, whose mean grey level is",
    ),
    "dangling link": (
        "svhn",
        {},
        lambda folder: (folder / "test_32x32.mat").unlink() or (folder / "test_32x32.mat").symlink_to("gone.mat"),
        "got a link to gone.mat, which is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_data_sets_are_refused(small, tmp_path, kind):
    name, options, damage, message = DAMAGE[kind]
    WRITERS[name](tmp_path, images_of(name), **options)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(DataConfig(name, root=str(tmp_path)))


IDX = {
    "truncated": (lambda content: content[:-1], False, "needs 47040 bytes for images .*, got 47039"),
    "too long": (lambda content: content + b"\0", False, "got 47041"),
    "truncated gzip": (lambda content: content[:2000], True, "cannot be read"),
    "broken gzip": (lambda content: content[:50] + b"\xff" * 200 + content[250:], True, "cannot be read"),
    "bad magic": (lambda content: b"\0\0\x08\x01" + content[4:], False, "magic number 0x00000803 .* got 0x00000801"),
    "no header": (lambda content: b"abc", False, "header of 16 bytes, got 3"),
    "other size": (lambda content: idx(np.zeros((60, 14, 14), np.uint8)), False, r"needs images of \(28, 28\), got \(14, 14\)"),
}


@pytest.mark.parametrize("kind", IDX)
def test_damaged_idx_files_are_refused(small, tmp_path, kind):
    change, zipped, message = IDX[kind]
    write_idx(tmp_path, images_of("mnist"), zipped)
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(DataConfig("mnist", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("mnist", images=ImageConfig(size=14)), "size says nothing about mnist"),
        (DataConfig("svhn", images=ImageConfig(crop=14)), "crop says nothing about svhn"),
        (DataConfig("frey-faces", cache="x"), "cache says nothing about frey-faces"),
        (DataConfig("celeba", images=ImageConfig(unreadable="skip")), "unreadable says nothing about celeba"),
        (DataConfig("cifar10", levels=2, root="x"), "cifar10 needs"),
    ],
)
def test_options_that_would_do_nothing_are_refused(small, config, message):
    with pytest.raises(ValueError, match=message):
        load(config)


def test_the_real_fashion_mnist_pixel_for_pixel(monkeypatch):
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"the Debian package dataset-fashion-mnist is not installed: no files in {DEBIAN}")
    monkeypatch.delenv("SIGMA_VAE_DATA", raising=False)
    images = {}
    for name, stem in (("train", "train"), ("test", "t10k")):
        with gzip.open(DEBIAN / f"{stem}-images-idx3-ubyte.gz") as file:
            images[name] = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)
    splits = load(DataConfig("fashion-mnist"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (54000, 6000, 10000)
    assert_same(splits, "fashion-mnist", images)
    with pytest.raises(ValueError, match=r"training images of mnist, .* got 72\.940 \(fashion-mnist\)"):
        load(DataConfig("mnist", root=str(DEBIAN)))


@pytest.mark.parametrize("binary", [True, False])
def test_real_images_of_cifar10_pixel_for_pixel(small, monkeypatch, tmp_path, binary):
    if not CIFAR_SLICE.is_file():
        pytest.skip(f"no images of CIFAR-10 at {CIFAR_SLICE}")
    with np.load(CIFAR_SLICE) as content:
        images = {split: content[split].transpose(0, 2, 3, 1) for split in ("train", "test")}
    monkeypatch.setattr(named, "_CIFAR_COUNTS", {split: len(part) for split, part in images.items()})
    write_cifar10(tmp_path, images, binary)
    assert_same(load(DataConfig("cifar10", root=str(tmp_path))), "cifar10", images)


def write_labels(name, folder, images):
    """The files of labels that the writers of pictures leave out; the classes that are written, by split."""
    if name in ("mnist", "fashion-mnist"):
        for split, stem in (("train", "train-labels-idx1-ubyte"), ("test", "t10k-labels-idx1-ubyte")):
            labels = np.arange(len(images[split])) % 10
            (folder / stem).write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())
    if name == "celeba":
        count = sum(map(len, images.values()))
        rows = [f"{i:06}.jpg  1 {-1 if i % 2 else 1}" for i in range(1, count + 1)]
        (folder / "list_attr_celeba.txt").write_text("\n".join([str(count), "Bald Smiling", *rows, ""]))


LABELLED = {
    "mnist": ("label", lambda names, n: [str(i % 10) for i in range(n)]),
    "fashion-mnist": ("label", lambda names, n: [str(i % 10) for i in range(n)]),
    "cifar10": ("label", lambda names, n: ["airplane", "automobile", "bird", "cat"][:n]),
    "svhn": ("label", lambda names, n: ["0"] * n),
    "celeba": ("Smiling", lambda names, n: [str(int(name[:6]) % 2 == 0) for name in names]),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_those_of_the_test_images(small, no_network, tmp_path, name):
    images = images_of(name)
    WRITERS[name](tmp_path / name, images)
    write_labels(name, tmp_path / name, images)
    condition, classes = LABELLED[name]
    splits = load(DataConfig(name, root=str(tmp_path / name), condition=(condition,), cache=str(tmp_path / "cache")))
    (variable,) = splits.conditions.variables
    rows = splits.test.condition(torch.arange(len(splits.test)))[:, 0]
    assert [variable.classes[int(row)] for row in rows] == classes(splits.names["test"], len(rows))


def test_labels_on_the_hub(small, no_network, tmp_path):
    write_hub(Path.cwd(), "mnist", images_of("mnist"))
    splits = load(DataConfig("mnist", condition=("label",), cache=str(tmp_path / "cache")))
    assert [each.classes for each in splits.conditions.variables] == [("0",)]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\0\0\x08\x03" + content[4:]])
def test_damaged_labels_are_refused(small, tmp_path, damage):
    images = images_of("mnist")
    WRITERS["mnist"](tmp_path / "mnist", images)
    write_labels("mnist", tmp_path / "mnist", images)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="of labels and a byte for each"):
        load(DataConfig("mnist", root=str(tmp_path / "mnist"), condition=("label",)))
