"""Tables in the dialects that people have, the levels that arrays use, and values far from 0."""

import csv
import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from sigma_vae.config import DataConfig
from sigma_vae.data import as_batches, as_splits, load

STATE = np.random.RandomState(0)
ROWS = np.column_stack([STATE.normal(5, 1, 60), STATE.normal(0, 3, 60), STATE.uniform(900, 1900, 60)]).round(3)
NAMES = ["längd", "temp", "price"]


def lines(sign=",", number="{:.3f}".format, names=NAMES, after=""):
    rows = [sign.join([*map(number, row), "abc"[i % 3]]) + after for i, row in enumerate(ROWS)]
    return "\n".join([sign.join([*names, "kind"]), *rows])


def comma(x):
    return f"{x:.3f}".replace(".", ",")


def german(x):
    return f"{x:,.3f}".replace(",", "_").replace(".", ",").replace("_", ".")


PLAIN = lines()
DIALECTS = {
    "plain": (PLAIN, "utf-8", ""),
    "semicolons": (lines(";"), "utf-8", "semicolons"),
    "bars": (lines("|"), "utf-8", "bars"),
    "tabs": (lines("\t"), "utf-8", "tabs"),
    "decimal commas": (lines(";", comma), "utf-8", "decimal commas"),
    "decimal commas and tabs": (lines("\t", comma), "utf-8", "decimal commas"),
    "decimal commas and thousands": (lines(";", german), "utf-8", "decimal commas"),
    "thousands": (lines(",", lambda x: f'"{x:,.3f}"'), "utf-8", "price: commas taken for thousands"),
    "comments": ("# a logger\n# 2024\n" + PLAIN, "utf-8", "skipped 2"),
    "sep": ("sep=;\n" + lines(";"), "utf-8", "semicolons"),
    "bom": (PLAIN, "utf-8-sig", ""),
    "latin": (PLAIN, "latin-1", "latin-1"),
    "utf-16": (lines("\t"), "utf-16", "utf-16"),
    "spaces": (lines(", "), "utf-8", ""),
    "spaces about signs": (lines(" ; "), "utf-8", "semicolons"),
    "trailing": (lines(names=NAMES, after=","), "utf-8", ""),
    "windows": (PLAIN.replace("\n", "\r\n"), "utf-8", ""),
    "units": (lines(number="{:.3f} EUR".format), "utf-8", "price: without the unit EUR"),
    "percent": (lines(number="{:.3f}%".format), "utf-8", "temp: without the unit %"),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_one_table_is_the_same_in_every_dialect(tmp_path, name, ending):
    text, encoding, said = DIALECTS[name]
    path = tmp_path / f"a{ending}"
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    data = load(DataConfig(str(path), validation_fraction=0.1))
    assert data.record["columns"] == NAMES
    assert said in data.record["preprocessing"]
    assert "columns left out: kind" in data.record["preprocessing"]
    every = np.concatenate([data.scaling.undo(data.values(split)) for split in ("train", "validation", "test")])
    np.testing.assert_allclose(every[np.argsort(every[:, 2])], ROWS[np.argsort(ROWS[:, 2])], rtol=1e-5, atol=1e-5)


SPOILT = {
    "?": (7, "?"),
    "two units": (9, "5 USD"),
    "text": (11, "none given"),
    "a total": (59, "Total"),
    "a range": (3, "5-7"),
    "thousands by chance": (4, "1,502"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_column_that_is_mostly_numbers_is_an_error_with_value_row_and_remedy(tmp_path, name):
    row, value = SPOILT[name]
    cells = [[*map(str, each)] for each in ROWS]
    cells[row][1] = value
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b c", "d"], *cells])
    with pytest.raises(ValueError, match=rf"b c.*row {row + 1} of 60.*--exclude 'b c'"):
        load(DataConfig(str(path)))
    assert load(DataConfig(str(path), exclude=("b c",))).record["columns"] == ["a", "d"]
    assert load(DataConfig(str(path), columns=("a", "d"))).record["columns"] == ["a", "d"]


@pytest.mark.parametrize(
    "first", ["6.7,1.2,3.4,kind", "0,16.7,1502.7", ",1.2,1502.7", "7,a,b", "1.5,2.5", "3.1,2,x"], ids=lambda first: first
)
def test_a_first_row_of_values_is_not_taken_for_names(tmp_path, first):
    (tmp_path / "a.csv").write_text("\n".join([first] * 30))
    with pytest.raises(ValueError, match=r"first row needs the names"):
        load(DataConfig(str(tmp_path / "a.csv")))


@pytest.mark.parametrize("first", ["0,1,2", "2019,2020", "id,2019,2020", "0.1,0.2,0.3", ",0", "x,y"])
def test_times_years_and_row_numbers_are_names(tmp_path, first):
    width = first.count(",") + 1
    rows = [",".join(f"{value:.3f}" for value in row) for row in STATE.normal(size=(30, width))]
    (tmp_path / "a.csv").write_text("\n".join([first, *rows]))
    assert sum(load(DataConfig(str(tmp_path / "a.csv"))).record["counts"].values()) == 30


def test_decimals_and_booleans_of_data_frames_are_numbers():
    numbers = STATE.normal(size=40).round(3)
    frame = pd.DataFrame(
        {"a": [Decimal(str(x)) for x in numbers], "b": numbers, "c": pd.Series([True, False] * 20, dtype=object)}
    )
    data = as_splits(frame)
    assert data.record["columns"] == ["a", "b", "c"]
    np.testing.assert_array_equal(data.stored("train")[:, 0], data.stored("train")[:, 1])
    frame.loc[3, "c"] = None
    with pytest.raises(ValueError, match=r"missing ones in c \(1\).*--exclude c"):
        as_splits(frame)
    assert as_splits(frame, exclude=["c"]).record["columns"] == ["a", "b"]


def test_units_that_differ_between_tables_are_refused(tmp_path):
    for split, unit in (("train", "EUR"), ("test", "USD")):
        (tmp_path / f"{split}.csv").write_text("\n".join(["a", *(f"{x:.3f} {unit}" for x in STATE.normal(size=30))]))
    with pytest.raises(ValueError, match=r"same units in all tables.*EUR.*USD"):
        load(DataConfig(str(tmp_path)))


def test_discrete_columns_are_said():
    frame = pd.DataFrame({"a": STATE.normal(size=100), "b": [0, 1] * 50, "c": STATE.randint(0, 4, 100)})
    assert "discrete columns: b, c (a density of discrete values has no upper bound" in as_splits(frame).record["preprocessing"]
    assert "discrete" not in as_splits(frame, exclude=["b", "c"]).record["preprocessing"]


def test_a_constant_column_is_named_with_its_remedy():
    frame = pd.DataFrame({"a": STATE.normal(size=40), "one": 1.5})
    with pytest.raises(ValueError, match=r"one have the same value.*--exclude one"):
        as_splits(frame)


BITS = STATE.randint(0, 2, (40, 6, 6))
BYTES = np.arange(40 * 36).reshape(40, 6, 6) % 256
Z = STATE.normal(size=(200, 4))


@pytest.mark.parametrize("unit", [1e-80, 1e-30, 1e-10, 1.0, 1e10, 1e30, 1e80])
@pytest.mark.parametrize("offset", [0, 1, 1e6])
def test_standardised_values_do_not_depend_on_units_or_offsets(unit, offset):
    values = (Z + offset) * unit
    data = as_splits(values, standardise="yes")
    plain = as_splits(Z, standardise="yes").values("train")
    np.testing.assert_allclose(data.values("train"), plain, rtol=2e-5, atol=1e-4 if offset == 1 else 2e-5)
    again = next(iter(as_batches(values, data, batch_size=200))).x
    own = data.scaling.undo(again).double().numpy()
    np.testing.assert_allclose(own / unit, values / unit, rtol=1e-6, atol=2e-6)
    assert len(np.unique(own)) == values.size


def test_times_since_1970_keep_their_spread_from_every_source(tmp_path):
    far = 1.7e9 + Z
    np.save(tmp_path / "a.npy", far)
    np.savez(tmp_path / "a.npz", train=far)
    pd.DataFrame(far, columns=list("abcd")).to_csv(tmp_path / "a.csv", index=False)
    sources = [*(load(DataConfig(str(tmp_path / name), standardise="yes")) for name in ("a.npy", "a.npz", "a.csv"))]
    sources += [as_splits(far, standardise="yes"), as_splits(pd.DataFrame(far))]
    expected = as_splits(Z, standardise="yes").values("train")
    for data in sources:
        np.testing.assert_allclose(data.values("train"), expected, atol=1e-5)


def test_values_that_float32_would_round_are_refused_unless_standardised():
    values = 0.75 + 1e-9 * Z
    with pytest.raises(ValueError, match=r"spread float32 cannot hold.*--standardise yes"):
        as_splits(values)
    assert as_splits(values, standardise="yes").values("train").std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (Z.astype(np.int16), "--standardise yes"),
        (BITS.astype(np.int8) - 1, "--standardise yes"),
        (BYTES.astype(np.int64), "--levels 256"),
        (np.tanh(Z), r"\(x \+ 1\) / 2"),
        (Z + 1j, "two channels"),
        (np.array([np.zeros(3), np.zeros(4)] * 10, dtype=object)[:, None], "padded to one"),
    ],
)
def test_other_arrays_are_refused_with_a_remedy(values, remedy):
    with pytest.raises(ValueError, match=remedy):
        as_splits(values)
    if values.dtype.kind == "i":
        assert as_splits(values, standardise="yes").levels is None
