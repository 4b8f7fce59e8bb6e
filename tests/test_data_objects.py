"""Data from Python are read as the same data from files are: same examples, same splits, same fingerprint."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sigma_vae import models
from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import as_batches, as_splits, load, objects
from sigma_vae.data.load import Source

STATE = np.random.RandomState(0)
GREY = STATE.randint(0, 256, (30, 6, 5)).astype(np.uint8)
RGB = STATE.randint(0, 256, (30, 6, 5, 3)).astype(np.uint8)
FLOATS = GREY.astype(np.float32) / 255
CLIPS = STATE.randint(0, 256, (30, 2, 6, 5, 3)).astype(np.uint8)
TABLE = pd.DataFrame({"height": STATE.randn(30), "mass": STATE.randn(30) * 9, "name": [f"n{i}" for i in range(30)]})
SPLITS = ("train", "validation", "test")


class Items(Dataset):
    """A map-style data set of whatever it is given."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def labelled(items):
    return Items([(item, 7) for item in items])


def named(items):
    return Items([{"image": item, "label": 7, "weights": 0.5} for item in items])


def images(array):
    return [Image.fromarray(one) for one in array]


def own_collate(batch):
    return {"x": torch.stack([torch.from_numpy(one) for one in batch])}


def table_of(**columns):
    return datasets.Dataset.from_dict(columns)


def arrays_of(array):
    features = datasets.Features({"x": datasets.Array2D(array.shape[1:], "uint8"), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"x": list(array), "label": list(range(len(array)))}, features=features)


SAME = {
    "array": (GREY, GREY),
    "array, channels last": (RGB, RGB),
    "array of floats": (FLOATS, FLOATS),
    "array of float64": (FLOATS.astype(np.float64), FLOATS),
    "boolean array": (GREY > 99, GREY > 99),
    "16 bits": (GREY.astype(np.uint16) * 257, GREY.astype(np.uint16) * 257),
    "rows": (FLOATS.reshape(30, 30), FLOATS.reshape(30, 30)),
    "clips": (CLIPS, CLIPS),
    "tensor": (torch.from_numpy(GREY), GREY),
    "tensor with gradient": (torch.from_numpy(FLOATS).requires_grad_(), FLOATS),
    "bfloat16": (torch.from_numpy((GREY > 99).astype(np.float32)).bfloat16(), (GREY > 99).astype(np.float32)),
    "list of arrays": (list(GREY), GREY),
    "list of images": (images(GREY), GREY),
    "tensor data set": (TensorDataset(torch.from_numpy(RGB), torch.arange(30)), RGB),
    "data set of arrays": (Items(RGB), RGB),
    "data set of tensors": (Items(torch.from_numpy(FLOATS)), FLOATS),
    "data set with labels": (labelled(torch.from_numpy(GREY)), GREY),
    "data set of dicts": (named(torch.from_numpy(GREY)), GREY),
    "data set of images": (labelled(images(RGB)), RGB),
    "subset": (Subset(Items(np.concatenate([GREY, GREY])), range(30)), GREY),
    "loader": (DataLoader(labelled(torch.from_numpy(GREY)), 7), GREY),
    "shuffling loader": (DataLoader(labelled(torch.from_numpy(GREY)), 7, shuffle=True, drop_last=True), GREY),
    "loader with its own collation": (DataLoader(Items(GREY), 7, collate_fn=own_collate), GREY),
    "loader of batches": (DataLoader(Items(torch.from_numpy(GREY).split(8)), None), GREY),
    "hub images": (table_of(image=images(RGB), label=list(range(30))), RGB),
    "hub arrays": (arrays_of(GREY), GREY),
    "hub lists": (table_of(x=FLOATS.astype(np.float64).tolist(), name=["a"] * 30), FLOATS),
}


def saved(folder, array):
    np.save(folder / "data.npy", array)
    return str(folder / "data.npy")


@pytest.mark.parametrize("kind", SAME)
def test_objects_are_what_files_are(tmp_path, kind):
    data, array = SAME[kind]
    options = {"test_fraction": 0.2, "validation_fraction": 0.25}
    splits = as_splits(data, **options, seed=3)
    expected = load(DataConfig(saved(tmp_path, array), **options, split_seed=3))
    assert splits.record["fingerprint"] == expected.record["fingerprint"]
    assert (splits.shape, splits.levels, splits.frames) == (expected.shape, expected.levels, expected.frames)
    assert "validation: 6 of 30 examples at random (seed 3)" in splits.record["preprocessing"]
    for split in SPLITS:
        assert torch.equal(splits.values(split), expected.values(split))


@pytest.mark.parametrize("kind", SAME)
def test_a_temporary_file_holds_the_same_examples(monkeypatch, tmp_path, kind):
    data, _ = SAME[kind]
    expected = as_splits(data)
    monkeypatch.setattr(objects, "MEMORY", 500)
    monkeypatch.setattr(objects, "LARGE", 1)
    collected = "read into memory" in expected.record["preprocessing"]
    splits = as_splits(data, cache=tmp_path / "room") if collected else as_splits(data)
    assert (f"30 examples read into a temporary file in {tmp_path / 'room'}" in splits.record["preprocessing"]) == collected
    for split in SPLITS:
        assert torch.equal(splits.values(split), expected.values(split))
    if collected:
        assert list((tmp_path / "room").iterdir()) == []  # it has no name that could be left behind


@pytest.mark.parametrize("standardise", ["no", "yes"])
def test_mapped_floats_are_checked(monkeypatch, standardise):
    bad = FLOATS.copy()
    bad[29, 5, 4] = np.nan
    monkeypatch.setattr(objects, "MEMORY", 500)
    monkeypatch.setattr(objects, "LARGE", 1)
    with pytest.raises(ValueError, match="needs finite values, got 1"):
        as_splits(Items(bad), standardise=standardise)


FRAMES = {
    "frame": TABLE,
    "hub table": datasets.Dataset.from_pandas(TABLE),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_are_what_tables_are(tmp_path, kind):
    TABLE.to_parquet(tmp_path / "data.parquet")
    expected, splits = load(DataConfig(str(tmp_path / "data.parquet"))), as_splits(FRAMES[kind])
    assert splits.record["fingerprint"] == expected.record["fingerprint"]
    assert splits.scaling == expected.scaling
    assert splits.record["columns"] == ["height", "mass"]
    assert "columns left out: name" in splits.record["preprocessing"]
    assert as_splits(FRAMES[kind], columns=["mass"], name="people").record["columns"] == ["mass"]


def test_a_frame_is_left_as_it_was():
    frame = pd.DataFrame({1: [0.5, 1.0, 2.0, 3.0], 2: [1.0, 0.0, 0.0, 1.0]})
    as_splits(frame, test_fraction=0.25, validation_fraction=0.4)
    assert list(frame.columns) == [1, 2]


PARTS = {
    "two": ((GREY[:20], GREY[20:]), ("train", "validation")),
    "three": ((GREY[:20], torch.from_numpy(GREY[20:25]), Items(GREY[25:])), SPLITS),
    "dict": ({"train": GREY[:20], "val": GREY[20:25], "test": GREY[25:]}, SPLITS),
    "dict of two": ({"train": GREY[:20], "test": GREY[20:]}, ("train", "test")),
    "hub": (
        datasets.DatasetDict({"train": arrays_of(GREY[:20]), "test": arrays_of(GREY[20:]), "extra": arrays_of(GREY)}),
        ("train", "test"),
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_splits_of_ones_own_are_kept(kind):
    data, own = PARTS[kind]
    splits = as_splits(data)
    assert sum(splits.record["counts"].values()) == 30
    for split in set(SPLITS) - set(own):
        assert f"{split}: " in splits.record["preprocessing"]
    if set(own) == set(SPLITS):
        assert np.array_equal(torch.cat([splits.stored(split) for split in SPLITS])[:, 0].numpy(), GREY)
    if kind == "hub":
        assert "ignored the keys extra" in splits.record["preprocessing"]


def test_a_loader_that_leaves_examples_out_gives_the_others():
    chosen = [3, 8, 9, 20, 21, 22]
    splits = as_splits(
        DataLoader(Items(torch.from_numpy(GREY)), 4, sampler=SubsetRandomSampler(chosen)),
        test_fraction=0.2,
        validation_fraction=0.2,
    )
    found = torch.cat([splits.stored(split) for split in SPLITS])[:, 0].numpy()
    assert sorted(map(bytes, found)) == sorted(map(bytes, GREY[chosen]))


def test_names_configs_and_splits():
    digits = load(DataConfig("digits"))
    assert as_splits(digits) is digits
    for splits in (as_splits("digits"), as_splits(DataConfig("digits")), models.data("digits")):
        assert splits.record == digits.record
    assert as_splits("digits", seed=1).record["fingerprint"] != digits.record["fingerprint"]
    assert models.data(GREY).shape == (1, 6, 5)


def test_levels_layout_and_name():
    splits = as_splits(torch.from_numpy(FLOATS), levels=256, name="mine")
    assert splits.levels == 256
    assert (splits.name, splits.record["source"]) == ("mine", "mine")
    assert splits.record["files"] == [{"object": "torch.Tensor", "split": "train"}]
    assert as_splits(GREY, layout="n-c-t").shape == (6, 5)


def test_images_of_several_sizes_are_resized():
    several = [*images(GREY), *images(GREY[:, :4, :4])]
    splits = as_splits(several, images=ImageConfig(size=4, fit="crop"))
    assert splits.shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"pictures need one size, got 2: 5×6 \(1\), 4×4 \(1\)"):
        as_splits(several)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 6, 6)


REFUSED = {
    "something else": (lambda: as_splits(3), "expected a NumPy array, tensor, .*got builtins.int; convert it"),
    "stream": (lambda: as_splits(Endless()), "got .*Endless; wrap it in a DataLoader"),
    "four splits": (lambda: as_splits((GREY,) * 4), r"a tuple of data is \(train, validation\) or .*got 4 items"),
    "labels as a split": (lambda: as_splits((GREY, np.arange(30))), r"tuple.*needs one dtype for all splits"),
    "no train": (lambda: as_splits({"one": GREY, "two": GREY}), "dict needs the key train"),
    "nothing": (lambda: as_splits([]), "list .train. needs at least one example, got none"),
    "shapes": (lambda: as_splits([GREY[0], GREY[1, :3]]), r"examples of one shape and dtype, got \(6, 5\) uint8 and \(3, 5\)"),
    "words": (lambda: as_splits(["a", "b", "c"]), "examples that are tensors, arrays or PIL images, got str; convert them"),
    "two arrays": (
        lambda: as_splits(Items([{"a": GREY[0], "b": GREY[0]}])),
        "one tensor, array or PIL image, got 2 in a dict of a, b",
    ),
    "not alike": (lambda: as_splits([*images(GREY), GREY[0]]), "needs PIL images throughout, got ndarray"),
    "large floats": (lambda: as_splits(FLOATS * 9), r"needs floats in \[0, 1\], but its values go from"),
    "share": (
        lambda: as_splits(DataLoader(Items(GREY), sampler=DistributedSampler(Items(GREY), 2, 0))),
        "DistributedSampler has only the share of one process; give its data set",
    ),
    "options of splits": (lambda: as_splits(load(DataConfig("digits")), levels=3), "options say nothing about Splits"),
    "options of a config": (lambda: as_splits(DataConfig("digits"), seed=3), "options say nothing about DataConfig"),
    "name of a name": (lambda: as_splits("digits", name="mine"), "name is for objects without one, got name='mine'"),
    "options of splits in batches": (
        lambda: as_batches(load(DataConfig("digits")), load(DataConfig("digits")), layout="n-c"),
        "options say nothing about Splits",
    ),
    "columns of an array": (lambda: as_splits(GREY, columns=["a"]), "columns says nothing about ndarray"),
    "layout of a frame": (lambda: as_splits(TABLE, layout="n-h-w"), "a table has layout n-c or n-t, got n-h-w"),
    "frames and arrays": (lambda: as_splits((TABLE, FLOATS)), "data frames in all splits or in none"),
    "hub column": (lambda: as_splits(arrays_of(GREY), columns=["y"]), "has no column y, only x, label"),
    "two hub columns": (
        lambda: as_splits(table_of(a=images(GREY[:3]), b=images(GREY[:3]))),
        "needs one column of images or arrays, got a, b; choose one",
    ),
    "batch": (
        lambda: as_splits(DataLoader(Items(GREY), 2, collate_fn=len)),
        "batches that are, or begin with, a tensor, got int",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_misuse_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        make()


LIKE = {
    "levels": (lambda: as_splits(GREY), GREY),
    "channels last": (lambda: as_splits(RGB), RGB),
    "floats": (lambda: as_splits(FLOATS), FLOATS),
    "floats of levels": (lambda: as_splits(GREY), FLOATS),
    "rows": (lambda: as_splits(GREY, layout="n-c-t"), GREY),
    "other order of axes": (lambda: as_splits(RGB), RGB.transpose(0, 3, 1, 2)),
    "ambiguous": (lambda: as_splits(RGB[:, :, :3], layout="n-h-w-c"), RGB[:, :, :3]),
    "clips": (lambda: as_splits(CLIPS), CLIPS),
    "frame": (lambda: as_splits(TABLE), TABLE),
    "frame, columns moved": (lambda: as_splits(TABLE), TABLE[["name", "mass", "height"]]),
    "standardised array": (lambda: as_splits(FLOATS, standardise="yes"), FLOATS),
    "data set": (lambda: as_splits(GREY), labelled(images(GREY))),
    "one split of several": (lambda: as_splits(GREY), {"train": GREY[:3], "test": GREY}),
}


@pytest.mark.parametrize("kind", LIKE)
def test_batches_are_those_of_the_models_data(kind):
    make, data = LIKE[kind]
    like = make()
    batches = as_batches(data, like, batch_size=7)
    assert len(batches.store) == 30
    rows = torch.cat([batch.x for batch in batches])
    known = torch.cat([like.values(split) for split in SPLITS])
    order = sorted(map(bytes, rows.flatten(1).numpy()))
    assert order == sorted(map(bytes, known.flatten(1).numpy()))
    assert batches.scaling == like.scaling


def test_batches_of_names_and_splits_are_of_one_split():
    digits = load(DataConfig("digits"))
    for data in ("digits", DataConfig("digits"), digits):
        batches = as_batches(data, digits, 50, split="validation")
        assert torch.equal(torch.cat([batch.x for batch in batches]), digits.values("validation"))
    assert len(as_batches(torch.zeros(4, 1, 6, 5), digits.scaling).store) == 4


def test_a_file_is_read_like_the_models_data(tmp_path):
    like = as_splits(FLOATS * 9, standardise="yes")
    batches = as_batches(saved(tmp_path, FLOATS * 9), like, 50)
    assert torch.equal(torch.cat([batch.x for batch in batches]), like.values("test"))
    like = as_splits(GREY // 16, levels=16)
    batches = as_batches(tmp_path / saved(tmp_path, (GREY // 16).astype(np.int64)), like, 50)
    assert torch.equal(torch.cat([batch.x for batch in batches]), like.values("test"))


UNFIT = {
    "shape": (GREY[:, :4], lambda: as_splits(GREY), r"images or rows of shape \(1, 6, 5\), .* got .* \(1, 4, 5\)"),
    "clips": (CLIPS, lambda: as_splits(RGB), r"images or rows of shape \(3, 6, 5\), .* got clips of frames"),
    "levels": (GREY, lambda: as_splits(GREY // 16, levels=16), r"integers in 0\.\.15 for levels=16"),
    "other levels": ("digits", lambda: as_splits(GREY), "digits needs 256 levels, like the model's data, got 17 levels"),
    "columns": (TABLE[["mass"]], lambda: as_splits(TABLE), "needs the column height"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_data_that_do_not_fit_the_model_are_refused(kind):
    data, make, message = UNFIT[kind]
    with pytest.raises(ValueError, match=message):
        as_batches(data, make())


PACKAGE = '''
import numpy as np

from sigma_vae.data.splits import Raw
from sigma_vae.registry import register


@register.source("zeros", options={"size"}, endings=(".zeros",), reads=lambda path, config: (path / "zeros").is_file())
def read_zeros(config):
    """As many black images as the file says."""
    place = config.path / "zeros" if config.path.is_dir() else config.path
    side = config.images.size or 4
    return Raw(str(place), {"train": np.zeros((int(place.read_text()), 1, side, side), np.uint8)})


@register.source("ones")
def read_ones(config):
    """Twenty white images."""
    return Raw("ones", {"train": np.full((20, 1, 4, 4), 255, np.uint8)})
'''

SCRIPT = """
from sigma_vae.config import DataConfig, ImageConfig
from sigma_vae.data import as_splits, load, names
from sigma_vae.data.load import known

assert names()[-1] == "ones", names()
assert load(DataConfig("ones")).values("test").min() == 1
assert load(DataConfig("a.zeros")).shape == (1, 4, 4)
assert load(DataConfig("folder", images=ImageConfig(size=6))).shape == (1, 6, 6)
assert as_splits("a.zeros").record["counts"] == {"train": 24, "validation": 3, "test": 3}
assert ".zeros" in known() and "ones" in known()
for source, options, message in (("nones", {}, "did you mean ones?"), ("ones", {"levels": 3, "layout": "n-c"}, "layout says nothing")):
    try:
        load(DataConfig(source, **options))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(source)
"""


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'mine' reads options of DataConfig, got colour_space, sizes"):
        Source("mine", "mine", lambda config: None, options={"size", "sizes", "colour_space"})


def test_an_installed_package_adds_data_formats(tmp_path):
    (tmp_path / "package" / "dummy_zeros-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "package" / "dummy_zeros.py").write_text(PACKAGE)
    (tmp_path / "package" / "dummy_zeros-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dummy-zeros\nVersion: 1.0\n"
    )
    (tmp_path / "package" / "dummy_zeros-1.0.dist-info" / "entry_points.txt").write_text(
        "[sigma_vae.sources]\nzeros = dummy_zeros:read_zeros\n"
    )
    (tmp_path / "folder").mkdir()
    for place in ("a.zeros", "folder/zeros"):
        (tmp_path / place).write_text("30")
    path = os.pathsep.join([str(tmp_path / "package"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
