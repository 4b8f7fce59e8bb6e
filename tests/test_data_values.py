"""The values of data: the levels that they use, numbers that float32 cannot hold, and the arrays that people name."""

import csv
import json
import math
from dataclasses import asdict, replace

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from numpy.lib.recfunctions import structured_to_unstructured
from PIL import Image
from scipy import stats

from sigma_vae import models, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import Scaling, Splits, as_batches, as_splits, load
from sigma_vae.data import batches as scaling
from sigma_vae.data.inspect import inspect
from sigma_vae.data.splits import SPLITS
from sigma_vae.data.stores import InMemory

RANDOM = np.random.default_rng(0)
BITS = RANDOM.integers(0, 2, (60, 4, 4))
BYTES = RANDOM.integers(0, 256, (60, 4, 4))


def together(splits):
    return torch.cat([splits.values(name) for name in SPLITS])


GRIDS = {  # values, the levels found, a word of the remark
    "0 and 1": (BITS.astype(np.uint8), 2, "two levels"),
    "0 and 255": ((255 * BITS).astype(np.uint8), 2, "0 and 255: two levels"),
    "0 and 7 of 16 bits": ((7 * BITS).astype(np.uint16), 2, "0 and 7: two levels"),
    "1 and 2": ((1 + BITS).astype(np.uint8), 256, "--levels 2"),
    "booleans": (BITS.astype(bool), 2, ""),
    "floats 0 and 1": (BITS.astype(np.float32), 2, "two levels"),
    "doubles 0 and 1": (BITS.astype(float), 2, "two levels"),
    "bytes": (BYTES.astype(np.uint8), 256, ""),
    "even bytes": ((BYTES // 2 * 2).astype(np.uint8), 256, "multiples of 2: --levels 128"),
    "bytes in 16 bits": ((BYTES * 257).astype(np.uint16), 256, "multiples of 257"),
    "12 bits in 16": ((BYTES * 16).astype(np.uint16), 65536, "--levels 4096"),
    "k/255": ((BYTES / 255).astype(np.float32), 256, "k/255"),
    "k/255 in doubles": (BYTES / 255, 256, "k/255"),
    "k/100": (RANDOM.integers(0, 101, (60, 4, 4)) / 100, None, "--levels 101"),
    "real": (RANDOM.random((60, 4, 4)), None, ""),
    "one value": (np.full((60, 4, 4), 9, np.uint8), 256, ""),
    "0 and 255, and one 7": (
        np.where(np.arange(9600) == 5, 7, 255 * np.resize(BITS, 9600)).reshape(-1, 4, 4).astype(np.uint8),
        256,
        "all but 1 of 9600 values are 0 or 255; repair the others (7)",
    ),
}


@pytest.mark.parametrize("place", ["object", "file", "large"])
@pytest.mark.parametrize(("values", "levels", "words"), GRIDS.values(), ids=GRIDS)
def test_the_levels_that_data_use_are_found_and_said(values, levels, words, place, tmp_path, monkeypatch):
    if place == "object":
        splits = as_splits(values)
    else:
        np.save(tmp_path / "a.npy", values)
        monkeypatch.setattr("sigma_vae.data.arrays.LARGE", 1 if place == "large" else 2**28)
        splits = load(DataConfig(str(tmp_path / "a.npy")))
    assert splits.levels == levels
    assert words in splits.record["preprocessing"]
    if levels is not None:
        low, high = (0, 1) if values.dtype.kind == "f" else (0, values.max()) if levels == 2 else (0, levels - 1)
        high = 65535 if "257" in words else high
        found = np.sort(together(splits).numpy().ravel())
        np.testing.assert_allclose(found, np.sort(((values - low) / (high - low)).ravel()), atol=1e-6)


def odd(values, value):
    """The same values, with one that lies between their levels."""
    values = values.copy()
    values[5, 0, 0] = value
    return values


OFF_GRID = {  # values of train, values of test, the levels found, words of the remark
    "0 and 255": ((255 * BITS).astype(np.uint8), 7, 256, "7, which is none of the 2 levels of train: read as 256 levels"),
    "257 k": (
        (257 * BYTES).astype(np.uint16),
        300,
        65536,
        "300, which is none of the 256 levels of train: read as 65536 levels",
    ),
    "floats 0 and 1": (
        BITS.astype(np.float32),
        0.25,
        None,
        "0.25, which is none of the 2 levels of train: read as real values",
    ),
    "floats 0 and 1, then k/255": (
        BITS.astype(float),
        51 / 255,
        256,
        "0.2, which is none of the 2 levels of train: read as 256",
    ),
    "k/255": (BYTES / 255, 0.5, None, "0.5, which is none of the 256 levels of train: read as real values"),
}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("values", "value", "levels", "words"), OFF_GRID.values(), ids=OFF_GRID)
def test_a_value_between_the_levels_of_train_is_said(values, value, levels, words, split, tmp_path):
    np.savez(tmp_path / "a.npz", train=values, **{split: odd(values, value)})
    splits = load(DataConfig(str(tmp_path / "a.npz")))
    assert splits.levels == levels
    assert f"{split} has the value {words}" in splits.record["preprocessing"]
    stored = splits.values(split)[5, 0, 0, 0].item()
    assert stored == pytest.approx(value / (1 if values.dtype.kind == "f" else levels - 1))


@pytest.mark.parametrize(
    ("values", "value", "levels"), [((255 * BITS).astype(np.uint8), 7, 2), ((2 * (BYTES // 2)).astype(np.uint8), 7, 128)]
)
def test_a_value_between_given_levels_is_refused_and_named(values, value, levels, tmp_path):
    np.savez(tmp_path / "a.npz", train=values, test=odd(values, value))
    with pytest.raises(
        ValueError, match=rf"a.npz \(test\) needs the {levels} levels .* got the value 7; .* leave --levels out"
    ):
        load(DataConfig(str(tmp_path / "a.npz"), levels=levels))
    assert load(DataConfig(str(tmp_path / "a.npz"))).levels == 256


def test_new_data_of_a_model_of_real_values_are_no_levels():
    splits = as_splits(RANDOM.random((60, 4, 4)))
    again = next(iter(as_batches(BYTES / 255, splits, batch_size=60))).x
    np.testing.assert_allclose(again.numpy()[:, 0], BYTES / 255, rtol=1e-6)
    with pytest.raises(ValueError, match=r"needs floats, got torch.uint8; save the data as floats"):
        next(iter(as_batches(BYTES.astype(np.uint8), splits)))


def test_the_dtype_decides_where_it_is_asked_to():
    assert as_splits((255 * BITS).astype(np.uint8)).levels == 2
    config = DataConfig("digits", levels_from="dtype")
    assert config.levels_from == "dtype"


@pytest.mark.parametrize(("values", "levels"), [(2 * (BYTES // 2), 128), (255 * BITS, 2), (17 * (BYTES // 17), 16)])
def test_given_levels_may_lie_further_apart(values, levels):
    splits = as_splits(values.astype(np.uint8), levels=levels)
    steps = (together(splits) * (levels - 1)).numpy()
    np.testing.assert_allclose(
        np.sort(steps.ravel()), np.sort(values.ravel() // (255 // (levels - 1) if levels != 128 else 2)), atol=1e-4
    )


def test_new_data_are_read_like_those_of_the_model():
    splits = as_splits((255 * BITS).astype(np.uint8))
    again = next(iter(as_batches((255 * BITS[:5]).astype(np.uint8), splits))).x
    np.testing.assert_array_equal(again.numpy()[:, 0], BITS[:5])


FAR = RANDOM.standard_normal((400, 4))
UNITS = {
    "times": (1.7e9, 1.0), "pascals": (101325.0, 0.02), "huge": (0.0, 1e80), "tiny": (0.0, 1e-60), "far and tiny": (1.0, 1e-12),
    "as they are": (0.0, 1.0), "1e-30": (0.0, 1e-30), "1e30": (0.0, 1e30),
}  # fmt: skip


@pytest.mark.parametrize("place", ["npy", "npz", "h5", "csv", "parquet", "frame", "array"])
@pytest.mark.parametrize(("offset", "unit"), UNITS.values(), ids=UNITS)
def test_units_and_offsets_do_not_change_what_a_model_reads(offset, unit, place, tmp_path):
    """The mean is subtracted in float64, whatever the data come from; and samples go back to the data's units."""
    values = offset + unit * FAR
    frame = pd.DataFrame(values, columns=list("abcd"))
    path = tmp_path / f"data.{place}"
    if place == "npy":
        np.save(path, values)
    elif place == "npz":
        np.savez(path, train=values)
    elif place == "h5":
        with h5py.File(path, "w") as file:
            file["x"] = values
    elif place == "csv":
        frame.to_csv(path, index=False, float_format="%.17g")
    elif place == "parquet":
        frame.to_parquet(path)
    if place in ("frame", "array"):
        splits = as_splits(frame if place == "frame" else values, standardise="yes")
    else:
        splits = load(DataConfig(str(path), standardise="yes"))
    plain = as_splits(FAR, standardise="yes")
    digits = max(1e-6, 4e-16 * abs(offset) / unit) * 10
    for name in SPLITS:
        np.testing.assert_allclose(splits.values(name).numpy(), plain.values(name).numpy(), atol=digits)
        undone = splits.scaling.undo(splits.values(name)).numpy()
        np.testing.assert_allclose((undone - offset) / unit, plain.scaling.undo(plain.values(name)).numpy(), atol=2 * digits)
    volume = splits.scaling.log_volume_nats(splits.shape) - plain.scaling.log_volume_nats(plain.shape)
    assert volume == pytest.approx(4 * np.log(unit), abs=1e-3)


def test_integers_far_from_zero_keep_their_digits():
    seconds = (1.7e9 + 20 * FAR).astype(np.int64)
    splits = as_splits(seconds, standardise="yes")
    for column in range(4):
        assert len(np.unique(together(splits).numpy()[:, column])) == len(np.unique(seconds[:, column]))


IMAGES = {"imgs": BYTES.astype(np.uint8)}
PICKLED = {"metadata": np.array({"title": "shapes"}, dtype=object)}
NAMED = {  # content, columns, counts of the splits that are there
    "dsprites": (IMAGES | PICKLED | {"latents_values": FAR[:60]}, (), 60),
    "keras": (
        {"x_train": BYTES[:50].astype(np.uint8), "y_train": np.arange(50), "x_test": BYTES[50:].astype(np.uint8)},
        (),
        60,
    ),
    "medmnist": (
        {f"{word}_images": BYTES[:20].astype(np.uint8) for word in ("train", "val", "test")} | {"train_labels": np.zeros(20)},
        (),
        60,
    ),
    "X and y": ({"X": BYTES.astype(np.uint8), "y": np.arange(60)}, (), 60),
    "positional": ({"arr_0": BYTES.astype(np.uint8), "arr_1": np.arange(60)}, (), 60),
    "chosen": ({"one": BYTES.astype(np.uint8), "two": BYTES[:30].astype(np.uint8)} | PICKLED, ("two",), 30),
}


@pytest.mark.parametrize(("content", "columns", "count"), NAMED.values(), ids=NAMED)
def test_arrays_are_found_by_the_names_that_people_give(content, columns, count, tmp_path):
    np.savez(tmp_path / "a.npz", **content)
    splits = load(DataConfig(str(tmp_path / "a.npz"), columns=columns))
    assert sum(len(splits.store(name)) for name in SPLITS) == count
    assert splits.shape == (1, 4, 4)


RAGGED = np.empty(40, dtype=object)
RAGGED[:] = [RANDOM.random(5 + i % 3) for i in range(40)]
RECORDS = np.zeros(40, dtype=[("a", "f4"), ("b", "f4")])
RECORDS["a"], RECORDS["b"] = RANDOM.random((2, 40))
SPARSE = scipy.sparse.random(40, 6, 0.5, format="csr", random_state=0)
PARTS = {"data": SPARSE.data, "indices": SPARSE.indices, "indptr": SPARSE.indptr, "shape": SPARSE.shape}
SERIES = {f"patient_{i}": RANDOM.random((20 + i, 3)) for i in range(12)}
ODD = {  # what is saved, words of the error, what the error advises to save, options, the shape of an example then
    "ragged": (RAGGED, r"dtype object; .*cut or padded to one.*numpy.stack", np.stack([x[:5] for x in RAGGED]), {}, (5,)),
    "records": (RECORDS, r"numpy.lib.recfunctions.structured_to_unstructured", structured_to_unstructured(RECORDS), {}, (2,)),
    "one axis": (RANDOM.random(100), r"save array\[:, None\]", RANDOM.random(100)[:, None], {}, (1,)),
    "a long series": (RANDOM.random(1000), r"reshape\(-1, 50\).*n-t", RANDOM.random((20, 50)), {"layout": "n-t"}, (1, 50)),
    "text": (np.array(list("0123456789")), r"got dtype <U1; write its values as numbers", np.eye(10)[:, :3], {}, (3,)),
    "a sparse matrix": (PARTS, r"parts of a sparse matrix .*toarray\(\)", SPARSE.toarray(), {}, (6,)),
    "another one": (
        {"row": [0], "col": [0], "data": [1.0], "shape": [4, 4], "format": b"coo"}, r"toarray\(\)", np.eye(10)[:, :3], {}, (3,)
    ),
    "series of unequal lengths": (
        SERIES, r"patient_7.* and 2 more; .*numpy.stack", np.stack([x[:20] for x in SERIES.values()]), {"layout": "n-c-t"}, (20, 3)
    ),
}  # fmt: skip


def _save_all(path, content):
    arrays = content if isinstance(content, dict) else {"train": content}
    if path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                values = np.asarray(array)
                if array is RAGGED:
                    file.create_dataset(key, len(array), h5py.vlen_dtype(float))[...] = array
                else:
                    file[f"matrix/{key}" if content is PARTS else key] = (
                        values.astype("S") if values.dtype.kind == "U" else values
                    )


@pytest.mark.parametrize("ending", ["npy", "npz", "h5", "object"])
@pytest.mark.parametrize("name", ODD)
def test_odd_arrays_are_refused_with_a_remedy_that_leads_on(name, ending, tmp_path):
    content, words, better, options, shape = ODD[name]
    if isinstance(content, dict) and ending in ("npy", "object"):
        pytest.skip("one array has no keys")

    def read(content, **options):
        if ending == "object":
            return as_splits(content, **options)
        _save_all(tmp_path / f"a.{ending}", content)
        return load(DataConfig(str(tmp_path / f"a.{ending}"), **options))

    with pytest.raises(ValueError, match=words.replace("<U1", r"(<U1|\|S1)")) as error:
        read(content)
    assert "\n" not in str(error.value)
    assert read(better, **options).shape == shape


def test_arrays_that_could_both_be_meant_are_listed(tmp_path):
    np.savez(tmp_path / "a.npz", one=BYTES, two=BYTES)
    with pytest.raises(ValueError, match="the keys one, two; choose one with --columns"):
        load(DataConfig(str(tmp_path / "a.npz")))
    with pytest.raises(ValueError, match="one of the keys one, two, got three"):
        load(DataConfig(str(tmp_path / "a.npz"), columns=("three",)))


# -- Real values in their own units: what is reported does not depend on the units a model works in, but by the Jacobian

COLUMNS = 5
UNITS_OF_FILES = np.array([1000.0, 0.01, 1.0, 60.0, 2.0])


def table(folder, units=1.0, name="table.npz"):
    state = np.random.RandomState(0)
    rows = state.normal(size=(400, 2)) @ state.normal(size=(2, COLUMNS)) + 0.1 * state.normal(size=(400, COLUMNS))
    rows = (rows + 5) * units
    np.savez(folder / name, train=rows[:300], validation=rows[300:350], test=rows[350:])
    return DataConfig(str(folder / name), standardise="yes")


def run(folder, data, likelihood):
    model = ModelConfig("mlp", likelihood, latent_dim=2, width=16, prior="standard")
    config = RunConfig(data, model, TrainingConfig(epochs=3, batch_size=32), device="cpu")
    return runs.train(config, folder, progress=False)


def metrics(folder, name):
    with (folder / "metrics.csv").open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file) if row.get(name)])


def test_channels_have_mean_0_and_deviation_1_on_training_data(tmp_path):
    data = load(table(tmp_path, UNITS_OF_FILES))
    values = data.values("train").double()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0, correction=0), 1, rtol=1e-5)
    raw = np.load(tmp_path / "table.npz")
    np.testing.assert_allclose(data.scaling.undo(data.values("test")), raw["test"], rtol=1e-4)
    assert data.levels is None
    assert models.vae(ModelConfig("mlp"), data.shape, data.scaling).likelihood.mean == "identity"


@pytest.mark.parametrize("place", ["object", "file", "large"])
@pytest.mark.parametrize("offset", [1e3, 1.7e9])
def test_the_mean_is_subtracted_before_values_are_rounded(tmp_path, monkeypatch, place, offset):
    """In float32, each value would be off by up to half a step of numbers like the mean."""
    values = (offset + 1000 * np.random.RandomState(0).normal(size=(200, 3))).astype(np.float32)
    monkeypatch.setattr("sigma_vae.data.objects.LARGE", 1)
    np.save(tmp_path / "a.npy", values)
    data = {"object": values, "file": tmp_path / "a.npy", "large": np.load(tmp_path / "a.npy", mmap_mode="r")}[place]
    splits = as_splits(data, standardise="yes")
    exact = (splits.stored("test").double().numpy() - splits.scaling.mean) / splits.scaling.deviation
    np.testing.assert_array_equal(splits.values("test").numpy(), exact.astype(np.float32))
    (batch,) = splits.batches("test", 200)
    np.testing.assert_array_equal(batch.x.numpy(), exact.astype(np.float32))


def test_moments_are_those_of_all_examples_though_few_are_taken_together(monkeypatch):
    values = torch.from_numpy(np.random.RandomState(0).randn(90, 3, 4) * 5 + 1e3).float()
    monkeypatch.setattr(scaling, "CHUNK", 100)
    sizes, take = [], InMemory.take
    monkeypatch.setattr(InMemory, "take", lambda store, rows, epoch=0: sizes.append(len(rows)) or take(store, rows, epoch))
    found = scaling.standardisation(InMemory(values), "made")
    channels = values.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(found.mean, channels.mean(1), rtol=1e-14)
    np.testing.assert_allclose(found.deviation, channels.std(1), rtol=1e-12)
    assert max(sizes) == 8
    values[:, 1] = 0.1
    with pytest.raises(ValueError, match="1, counted from 0, have the same value"):
        scaling.standardisation(InMemory(values), "made")


@pytest.mark.parametrize("likelihood", ["gaussian/optimal", "gaussian/per-pixel", "student-t/optimal-channel"])
def test_other_units_shift_every_bound_by_the_jacobian(tmp_path, likelihood):
    one = run(tmp_path / "one", table(tmp_path, name="one.npz"), likelihood)
    other = run(tmp_path / "other", table(tmp_path, UNITS_OF_FILES, "other.npz"), likelihood)
    jacobian = sum(math.log(unit) for unit in UNITS_OF_FILES)
    for name in ("elbo_nats", "elbo_post_hoc_nats"):
        assert other[name]["mean"] == pytest.approx(one[name]["mean"] - jacobian, abs=1e-3)
    assert other["distortion_nats"]["mean"] == pytest.approx(one["distortion_nats"]["mean"] + jacobian, abs=1e-3)
    assert other["rate_nats"]["mean"] == pytest.approx(one["rate_nats"]["mean"], abs=1e-4)
    assert "bits_per_dim" not in other
    for name in ("train/loss_nats", "train/distortion_nats", "validation/elbo_nats", "validation/distortion_nats"):
        shifts = metrics(tmp_path / "other", name) - metrics(tmp_path / "one", name)
        np.testing.assert_allclose(shifts, -jacobian if "elbo" in name else jacobian, atol=1e-3)
    if likelihood == "gaussian/optimal":
        gaps = [report["entropy_identity"] for report in (one, other)]
        assert gaps[1]["elbo_nats"] == pytest.approx(gaps[0]["elbo_nats"] - jacobian, abs=1e-3)
        assert gaps[1]["gap_nats_per_dim"] == pytest.approx(gaps[0]["gap_nats_per_dim"], abs=1e-4)


def test_a_bound_in_the_datas_own_units_is_that_of_a_gaussian(tmp_path):
    """Independent columns, no latents used: the best bound is the entropy of the data, which numpy knows in their units."""
    state = np.random.RandomState(1)
    rows = state.normal(size=(4000, 3)) * [3.0, 0.5, 20.0]
    np.savez(tmp_path / "a.npz", train=rows[:3000], validation=rows[3000:3500], test=rows[3500:])
    model = ModelConfig("mlp", "gaussian/optimal", latent_dim=1, width=8)
    training = TrainingConfig(epochs=10, batch_size=100, learning_rate=3e-3)
    config = RunConfig(DataConfig(str(tmp_path / "a.npz"), standardise="yes"), model, training, device="cpu")
    report = runs.train(config, tmp_path / "run", progress=False)
    truth = -sum(0.5 * math.log(2 * math.pi * math.e * s**2) for s in (3.0, 0.5, 20.0))
    assert report["elbo_nats"]["mean"] == pytest.approx(truth, abs=0.15)
    saved = models.load(str(tmp_path / "run"))
    np.testing.assert_allclose(saved.scaling.deviation, rows[:3000].std(0), rtol=1e-5)


def test_series_are_standardised_channel_by_channel(tmp_path):
    array = np.random.RandomState(0).normal(size=(60, 2, 7)) * np.array([1.0, 50.0])[:, None]
    np.save(tmp_path / "a.npy", array)
    data = load(DataConfig(str(tmp_path / "a.npy"), layout="n-c-t", standardise="yes"))
    assert data.shape == (2, 7)
    assert len(data.scaling.deviation) == 2
    expected = 7 * sum(math.log(s) for s in data.scaling.deviation)
    assert data.scaling.log_volume_nats(data.shape) == pytest.approx(expected)
    assert data.values("train").std() == pytest.approx(1, abs=0.01)


def test_pictures_and_samples_are_in_the_datas_own_units(tmp_path):
    """Values about 0.75 that hardly differ: as standardised, half of them would be black."""
    values = 0.75 + 0.01 * np.random.RandomState(0).normal(size=(40, 1, 8, 8))
    np.save(tmp_path / "a.npy", values)
    model, training = ModelConfig("mlp", "gaussian/fixed:1", latent_dim=1, width=4), TrainingConfig(max_steps=1)
    data = DataConfig(str(tmp_path / "a.npy"), layout="n-c-h-w", standardise="yes")
    runs.train(RunConfig(data, model, training, device="cpu"), tmp_path / "run", progress=False)
    for name in ("samples", "reconstructions"):
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            shown = np.asarray(picture)
        assert shown.min() > 0.6 * 255, name


def test_misuse_is_refused(tmp_path):
    config = table(tmp_path)
    with pytest.raises(ValueError, match="--standardise yes"):
        load(replace(config, standardise="no"))
    rows = np.random.RandomState(0).normal(size=(50, 3))
    rows[:, 1] = 4
    np.save(tmp_path / "constant.npy", rows)
    with pytest.raises(ValueError, match="1, counted from 0, have the same value"):
        load(DataConfig(str(tmp_path / "constant.npy"), standardise="yes"))
    with pytest.raises(ValueError, match="256 levels, which are not standardised"):
        load(replace(config, levels=256))
    with pytest.raises(ValueError, match="17 levels, which are not standardised"):
        load(DataConfig("digits", standardise="yes"))


def test_undoing_is_the_inverse_on_any_device_and_shape(tmp_path):
    scaling = load(table(tmp_path)).scaling
    stored = torch.randn(4, COLUMNS) * 100
    torch.testing.assert_close(scaling.undo(scaling(stored)), stored.double(), rtol=1e-6, atol=1e-4)


# -- What is found out about data is what was put into them ------------------------------------------------------------

STATE = np.random.RandomState(0)


def splits(train, validation=None, test=None, scaling=Scaling(levels=256), clips=False):  # noqa: B008 (frozen)
    others = [train[:5] ^ 1 if part is None else part for part in (validation, test)]
    parts = [InMemory(torch.from_numpy(np.ascontiguousarray(part))) for part in (train, *others)]
    return Splits("made", *parts, scaling, {"preprocessing": "made"}, clips)


def noise(n, *shape):
    return STATE.randint(0, 256, (n, *shape)).astype(np.uint8)


@pytest.fixture
def taken(monkeypatch):
    """How many values are looked at together, where that is at most 1000."""
    monkeypatch.setattr(scaling, "CHUNK", 1000)
    sizes, take = [], InMemory.take

    def counted(store, positions, epoch=0):
        result = take(store, positions, epoch)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(InMemory, "take", counted)
    return sizes


def test_statistics_are_numpys_and_scipys(taken):
    train = noise(177, 3, 6, 5)
    train[:, 1] //= 4
    found = inspect(splits(train))
    values = (train / 255).transpose(1, 0, 2, 3).reshape(3, -1)
    for channel, row in zip(found.channels, values, strict=True):
        assert channel.mean == pytest.approx(row.mean(), rel=1e-12)
        assert channel.deviation == pytest.approx(row.std(), rel=1e-12)
        assert (channel.least, channel.largest) == (row.min(), row.max())
        assert channel.excess_kurtosis == pytest.approx(stats.kurtosis(row), rel=1e-9)
    assert found.levels_used == 256
    assert found.share_at_least_level == pytest.approx((train == 0).mean())
    assert found.share_at_largest_level == pytest.approx((train == 255).mean())
    assert found.shape == (3, 6, 5)
    assert max(taken) == 990


@pytest.mark.parametrize("constant", [0, 4, 30])
def test_constant_values_are_counted(constant, taken):
    train = noise(99, 1, 6, 5)
    train.reshape(len(train), -1)[:, :constant] = 7
    found = inspect(splits(train))
    assert found.constant_values == constant
    assert any("never change" in reason for reason in found.reasons) == (constant > 0)


def test_duplicates_are_counted_by_where_they_are():
    train, validation, test = noise(60, 1, 4, 4), noise(20, 1, 4, 4), noise(20, 1, 4, 4)
    train[1] = train[0]
    validation[:3] = train[5:8]
    test[:4] = train[10:14]
    test[19] = validation[19]
    found = {(one.split, one.among): one.count for one in inspect(splits(train, validation, test)).duplicates}
    expected = {("train", "train"): 1, ("validation", "train"): 3, ("test", "train"): 4, ("test", "validation"): 1}
    assert found == expected


def test_clips_of_other_lengths_are_duplicates_by_their_first_frames():
    train, test = noise(9, 3, 1, 4, 4), noise(4, 5, 1, 4, 4)
    test[1, :3] = train[7]
    found = inspect(splits(train, train[:2] ^ 1, test, clips=True)).duplicates
    assert [(one.split, one.among, one.count) for one in found] == [("test", "train", 1)]


def real(values):
    parts = [values[:-20], values[-20:-10], values[-10:]]
    return Splits("made", *(InMemory(torch.from_numpy(p)) for p in parts), Scaling(), {"preprocessing": ""})


SUGGESTIONS = {
    "two levels": (lambda: splits(noise(50, 1, 4, 4) % 2, scaling=Scaling(levels=2)), "bernoulli"),
    "few levels, many examples": (lambda: splits(noise(4000, 1, 2, 2) % 4, scaling=Scaling(levels=4)), "categorical"),
    "few levels, few examples": (lambda: splits(noise(100, 1, 2, 2) % 4, scaling=Scaling(levels=4)), "gaussian/optimal"),
    "8 bits": (lambda: splits(noise(100, 3, 8, 8)), "gaussian/optimal"),
    "outliers": (lambda: real(STATE.standard_t(2.5, (5000, 1, 4))), "student-t/optimal"),
    "a table": (lambda: real(STATE.normal(size=(500, 6))), "gaussian/optimal-channel"),
    "a series": (lambda: real(STATE.normal(size=(500, 2, 30))), "gaussian/optimal"),
}


@pytest.mark.parametrize("kind", SUGGESTIONS)
def test_the_data_suggest_their_likelihood(kind):
    make, expected = SUGGESTIONS[kind]
    found = inspect(make())
    assert found.likelihood == expected
    assert found.reasons
    assert json.loads(json.dumps(asdict(found)))["likelihood"] == expected


def test_clips_are_looked_at_frame_by_frame():
    clips = noise(30, 4, 1, 3, 3)
    found = inspect(splits(clips, clips=True))
    assert found.shape == (1, 3, 3)
    assert found.frames == {"train": 4, "validation": 4, "test": 4}
    assert found.channels[0].mean == pytest.approx((clips / 255).mean())


def test_the_command_prints_it_and_draws_the_first_examples(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "digits"]) == 0
    said = capsys.readouterr().out
    assert "train 1455" in said
    assert "suggested likelihood: gaussian/optimal" in said
    assert "inspect-digits.png" in said
    pixels = np.asarray(Image.open(tmp_path / "inspect-digits.png"))
    first = load(DataConfig("digits")).values("train")[0, 0]
    zoom = pixels.shape[0] // (8 * 9 + 1)
    corner = pixels[zoom : 9 * zoom : zoom, zoom : 9 * zoom : zoom]
    np.testing.assert_array_equal(corner, (first * 255).round().byte().numpy())
    assert main(["inspect", "digits", "--json", "--out", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == 17
    assert main(["inspect", "nothing-there"]) == 1


def test_the_command_names_columns_and_counts_frames(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("height,[mass]\n" + "".join(f"{i},{i * i}\n" for i in range(20)))
    assert main(["inspect", "table.csv"]) == 0
    said = capsys.readouterr().out
    assert "columns height, [mass]" in said
    assert "│ height " in said
    assert "│ [mass] " in said
    np.savez("clips.npz", train=noise(4, 3, 1, 6, 6), validation=noise(2, 3, 1, 6, 6), test=noise(2, 5, 1, 6, 6))
    assert main(["inspect", "clips.npz"]) == 0
    assert "clips of 3 frames (test: 5)" in " ".join(capsys.readouterr().out.split())


def test_json_stands_alone_while_pictures_are_decoded(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, pixels in enumerate(noise(12, 4, 4)):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    assert main(["inspect", "pictures", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("{")
    assert json.loads(out)["counts"] == {"train": 10, "validation": 1, "test": 1}
