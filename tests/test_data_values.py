"""The values of data: the levels that they use, numbers that float32 cannot hold, and the arrays that people name."""

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from numpy.lib.recfunctions import structured_to_unstructured

from sigma_vae.config import DataConfig
from sigma_vae.data import as_batches, as_splits, load
from sigma_vae.data.splits import SPLITS

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
