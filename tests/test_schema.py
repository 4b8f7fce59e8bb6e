"""Schemas of tables: types, what is left out, a round trip in all dtypes, and errors of new data."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet

from sigma_vae.columns import Column
from sigma_vae.config import DataConfig, parse
from sigma_vae.data.batches import Scaling
from sigma_vae.data.mixed import mixed_splits
from sigma_vae.data.schema import TableSchema

N = 300


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "id": np.arange(N) + 7,
            "name": [f"person {i}" for i in range(N)],
            "constant": 1.0,
            "normal": rng.normal(size=N).round(2),
            "skewed": np.exp(3 * rng.normal(size=N)),
            "share": rng.beta(0.3, 0.4, N).clip(1e-6, 1 - 1e-6),
            "count": rng.poisson(4, N),
            "spread": rng.negative_binomial(0.7, 0.02, N),
            "few": rng.integers(0, 3, N),
            "text": rng.choice(["x", "y", "z"], N),
            "flag": rng.random(N) < 0.3,
            "grade": pd.Categorical(rng.choice(["low", "mid", "high"], N), ["low", "mid", "high"], ordered=True),
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 900, N), unit="D"),
            "zoned": (pd.Timestamp("2024-01-01", tz="Europe/Berlin") + pd.to_timedelta(rng.integers(0, 9000, N), unit="s")),
            "float32": rng.normal(size=N).round(3).astype(np.float32),
            "nullable": pd.array(rng.integers(-400, 400, N), dtype="Int64"),
            "maybe": pd.array(rng.random(N) < 0.5, dtype="boolean"),
            "string": pd.array(rng.choice(["p", "q"], N), dtype="string"),
            "uint8": rng.integers(0, 200, N).astype(np.uint8),
        }
    )
    for name, rate in (("normal", 0.2), ("text", 0.1), ("nullable", 0.3), ("maybe", 0.3), ("string", 0.1), ("day", 0.05)):
        frame.loc[rng.random(N) < rate, name] = pd.NA if name in ("nullable", "maybe", "string") else None
    return frame


def test_types_are_inferred_and_useless_columns_left_out_and_said() -> None:
    schema = TableSchema.infer(table())
    families = {column.name: column.family for column in schema.columns}
    assert schema.left_out == {"id": "identifier", "name": "identifier or text", "constant": "constant"}
    assert {name for name, family in families.items() if family == "bernoulli"} == {"flag", "maybe", "string"}
    assert {name for name, family in families.items() if family == "categorical"} == {"few", "text", "grade"}
    assert families["count"] in ("poisson", "negative-binomial")
    assert families["spread"] == "negative-binomial"
    transforms = {column.name: column.transform for column in schema.columns}
    assert transforms["skewed"] == "log"
    assert transforms["share"] in ("logit", "knots")
    assert "left out: id (identifier)" in schema.words()


def test_decoding_gives_the_same_data_frame_in_the_same_dtypes() -> None:
    frame = table()
    schema = TableSchema.infer(frame)
    back = schema.decode(schema.encode(frame), missing=True)
    kept = frame[[column.name for column in schema.columns]]
    assert back.dtypes.to_dict() == kept.dtypes.to_dict()
    close = ["skewed", "share"]  # not rounded, so exact to float32
    pd.testing.assert_frame_equal(back.drop(columns=close), kept.drop(columns=close))
    pd.testing.assert_frame_equal(back[close], kept[close], rtol=1e-4)


def test_draws_stay_in_the_ranges_and_decimals_of_the_data() -> None:
    frame = table()
    schema = TableSchema.infer(frame)
    x = torch.randn(500, schema.row.width, generator=torch.Generator().manual_seed(0)) * 5
    drawn = schema.decode(schema.with_missing(x, torch.Generator().manual_seed(0)), missing=True)
    for name in ("normal", "skewed", "count", "uint8", "day", "zoned", "nullable"):
        low, high = frame[name].min(), frame[name].max()
        slack = 1e-5 * abs(high) if isinstance(high, float) else high - high
        assert drawn[name].dropna().between(low - slack, high + slack).all(), name
    rounded = drawn["normal"].dropna()
    assert np.allclose(rounded, rounded.round(2))
    assert drawn["nullable"].isna().mean() == pytest.approx(frame["nullable"].isna().mean(), abs=0.07)
    assert not drawn["count"].isna().any()


def test_the_schema_is_kept_as_json() -> None:
    scaling = Scaling(schema=TableSchema.infer(table()))
    again = parse(json.loads(json.dumps(asdict(scaling))), Scaling, "model.json")
    assert again == scaling


def test_families_and_exclusions_can_be_given() -> None:
    schema = TableSchema.infer(
        table(), families={"normal": "laplace", "few": "poisson", "name": "categorical"}, exclude=["text"]
    )
    families = {column.name: column.family for column in schema.columns}
    assert (families["normal"], families["few"], families["name"]) == ("laplace", "poisson", "categorical")
    assert schema.left_out["text"] == "excluded"
    name = next(column for column in schema.columns if column.name == "name")
    assert name.other
    assert len(name.categories) == 60


def test_transforms_are_found_in_the_training_rows_alone() -> None:
    frame = table()
    rows = np.arange(0, N, 2)
    schema = TableSchema.infer(frame, rows)
    frame.loc[1::2, "skewed"] *= 3
    other = TableSchema.infer(frame, rows)
    one, two = (next(c for c in each.columns if c.name == "skewed") for each in (schema, other))
    assert (one.shift, one.scale) == (two.shift, two.scale)
    assert one.high < two.high


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frame: frame.drop(columns="few"), "need the column 'few'"),
        (lambda frame: frame.assign(normal="much"), "column normal needs numbers, got 'much'"),
        (lambda frame: frame.assign(text="new"), "column text has the categories x, y, z, got 'new' in row 0"),
        (lambda frame: frame.assign(day=["soon"] * N), "column day needs points of time"),
        (lambda frame: frame.assign(skewed=np.inf), "needs finite numbers"),
        (lambda frame: frame.assign(spread=-1), "needs counts"),
    ],
)
def test_new_data_that_do_not_fit_are_refused(change: object, words: str) -> None:
    schema = TableSchema.infer(table())
    with pytest.raises(ValueError, match=words):
        schema.encode(change(table()))  # type: ignore[operator]


def test_unknown_categories_may_be_missing_or_other() -> None:
    frame = pd.DataFrame({"city": [f"c{i % 90}" for i in range(900)], "kind": ["a", "b", "c"] * 300})
    schema = TableSchema.infer(frame, families={"city": "categorical"})
    new = pd.DataFrame({"city": ["nowhere", "c1"], "kind": ["d", "a"]})
    x = schema.encode(new, unknown="other")
    city, kind = (x[:, place] for place in schema.row.places)
    assert city[0].argmax() == 59
    assert kind[0].sum() == 0
    assert schema.row.masks(x).tolist() == [[False, True], [False, False]]


def test_numbers_that_a_file_wrote_in_another_way_are_the_same_categories() -> None:
    schema = TableSchema.infer(pd.DataFrame({"n": [0, 1, 2] * 20}))
    for values in ([0.0, 2.0], ["0", "2"]):
        assert schema.encode(pd.DataFrame({"n": values}))[:, :3].argmax(1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("frame", "options", "words"),
    [
        (pd.DataFrame({"a": [1.0, 1.0]}), {}, "a column that varies, got a \\(constant\\)"),
        (pd.DataFrame({"a": [1.0, 2.5]}), {"families": {"b": "gaussian"}}, "no column 'b'"),
        (pd.DataFrame({"a": ["x", "y"]}), {"families": {"a": "gaussian"}}, "needs numbers"),
        (pd.DataFrame({"a": [-1.5, 2.5, 3.0]}), {"families": {"a": "poisson"}}, "counts 0, 1, 2"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), {}, "twice"),
    ],
)
def test_impossible_tables_are_refused(frame: pd.DataFrame, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TableSchema.infer(frame, **options)


def test_a_large_parquet_file_is_read_a_column_or_a_part_at_a_time(tmp_path, monkeypatch) -> None:
    frame = table()
    frame.to_parquet(tmp_path / "table.parquet", row_group_size=70)
    config = DataConfig(str(tmp_path / "table.parquet"), mixed=True, exclude=("few",), families=("normal=student-t",))
    whole = mixed_splits(config)
    held: list[int] = []

    class Counted(parquet.ParquetFile):
        def read(self, **options):
            found = super().read(**options)
            held.append(found.num_rows * found.num_columns)
            return found

        def iter_batches(self, **options):
            for batch in super().iter_batches(**options):
                held.append(batch.num_rows * batch.num_columns)
                yield batch

    monkeypatch.setattr(parquet, "ParquetFile", Counted)
    monkeypatch.setattr("sigma_vae.data.mixed.LARGE", 1)
    monkeypatch.setattr("sigma_vae.data.mixed.PART", N)
    parts = mixed_splits(config)
    assert sum(held) > 2 * N * (len(whole.scaling.schema.columns))  # for the schema, and for the rows
    assert max(held) == N  # of 300 × 19
    assert parts.scaling.schema == whole.scaling.schema
    assert parts.record["preprocessing"] == whole.record["preprocessing"]
    for split in ("train", "validation", "test"):
        assert torch.equal(parts.stored(split), whole.stored(split))
    held.clear()
    assert mixed_splits(config, whole.scaling.schema).record["fingerprint"] == parts.record["fingerprint"]
    assert not held  # it is in the cache


def test_files_are_read_with_dates_text_and_missing_values(tmp_path) -> None:
    table().to_csv(tmp_path / "table.csv", index=False)
    data = mixed_splits(DataConfig(str(tmp_path / "table.csv"), mixed=True, exclude=("uint8",), families=("normal=student-t",)))
    assert data.scaling.schema is not None
    columns = {column.name: column for column in data.scaling.schema.columns}
    assert columns["day"].time
    assert columns["normal"].family == "student-t"
    assert "uint8" not in columns
    assert data.record["counts"] == {"train": 243, "validation": 27, "test": 30}
    assert data.shape == (data.scaling.schema.row.width,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"families": ("normal",)}, "column=family"),
        ({"families": ("normal=cauchy",)}, "column=family"),
        ({"levels": 4}, "leave out levels"),
        ({"columns": ("nothing",)}, "needs the column nothing"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options: dict, words: str) -> None:
    table().to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match=words):
        mixed_splits(DataConfig(str(tmp_path / "table.csv"), mixed=True, **options))
    with pytest.raises(ValueError, match="reads tables"):
        mixed_splits(DataConfig("digits", mixed=True))


def test_other_data_are_scaled_as_before() -> None:
    assert Scaling(levels=4).schema is None
    assert Column("x", "gaussian").width == 1
