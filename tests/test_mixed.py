"""The likelihood of a table's row: each column against scipy, missing values, σ in closed form, an exact marginal likelihood."""

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet
from scipy import stats
from torch import Tensor, nn

from sigma_vae import VAE, FlatNetwork
from sigma_vae.columns import DF, Column, Row
from sigma_vae.config import DataConfig, parse
from sigma_vae.data.batches import Scaling
from sigma_vae.data.load import mixed_splits
from sigma_vae.data.schema import TableSchema
from sigma_vae.likelihoods.mixed import Mixed, best_log_dispersion
from sigma_vae.tabular import TabularVAE

KNOTS = ((-3.0, -2.0), (0.0, 0.5), (4.0, 3.0))
LAWS = {"gaussian": stats.norm, "laplace": stats.laplace, "student-t": stats.t(DF)}
TRANSFORMS = {
    "identity": (lambda x: x, lambda x: np.ones_like(x), np.array([-3.0, 0.1, 7.0])),
    "log": (np.log, lambda x: 1 / x, np.array([1e-3, 0.7, 60.0])),
    "logit": (lambda x: np.log(x / (1 - x)), lambda x: 1 / (x * (1 - x)), np.array([1e-3, 0.4, 0.999])),
    "knots": (
        lambda x: np.where(x < 0, 0.5 + x * 2.5 / 3, 0.5 + x * 2.5 / 4),
        lambda x: np.where(x < 0, 2.5 / 3, 2.5 / 4),
        np.array([-5.0, -1.0, 9.0]),
    ),
}
CATEGORIES = ("a", "b", "c")
ALL = (
    Column("kind", "categorical", categories=CATEGORIES),
    Column("size", "gaussian", scale=10.0, shift=2.0),
    Column("visits", "poisson", shift=1.0, scale=0.5),
    Column("yes", "bernoulli", categories=(0, 1)),
    Column("claims", "negative-binomial", shift=1.0, scale=0.5),
    Column("income", "student-t", transform="log"),
    Column("age", "gaussian", transform="knots", knots=KNOTS),
    Column("few", "categorical", categories=("x", "y")),
)


def settled(columns: tuple[Column, ...]) -> Mixed:
    """In eval mode and float64, with different σ."""
    likelihood = Mixed(columns).double().eval()
    for k, block in enumerate(likelihood.row.numbers):
        likelihood.scales[k].store("density", torch.linspace(-0.5, 0.3, len(block)).double())
    likelihood.log_dispersion.fill_(0.7)
    return likelihood


def row_of(likelihood: Mixed, n: int = 5) -> tuple[Tensor, Tensor]:
    """Features, and rows drawn from them."""
    torch.manual_seed(0)
    h = torch.randn(n, likelihood.in_channels).double()
    return h, likelihood(h).sample()


@pytest.mark.parametrize("family", LAWS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_densities_of_real_values_are_scipys_in_their_own_units(family: str, transform: str) -> None:
    column = Column("x", family, transform=transform, shift=0.3, scale=2.0, knots=KNOTS if transform == "knots" else ())
    forward, slope, x = TRANSFORMS[transform]
    likelihood = settled((column,))
    y = column.encode(torch.tensor(x))
    np.testing.assert_allclose(column.decode(y).numpy(), x, rtol=1e-12)
    rows = torch.stack([y, torch.zeros(3).double()], 1)
    h = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)
    sigma = np.exp(-0.5)
    standard = (forward(x) - 0.3) / 2
    expected = LAWS[family].logpdf((standard - h[:, 0].numpy()) / sigma) - np.log(sigma) + np.log(slope(x) / 2)
    np.testing.assert_allclose(likelihood(h).log_prob(rows).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("dispersion", [-3.0, 0.7, 6.0])
def test_masses_of_counts_are_scipys(dispersion: float) -> None:
    likelihood = settled((ALL[2], ALL[4]))
    likelihood.log_dispersion.fill_(dispersion)
    k = torch.arange(40).double()
    h = torch.tensor([0.4, 1.0], dtype=torch.float64).expand(40, 2)
    x = torch.stack([ALL[2].encode(k), ALL[4].encode(k), 0 * k, 0 * k], 1)
    mean, r = np.exp(1 + 0.5 * np.array([0.4, 1.0])), np.exp(dispersion)
    expected = np.stack([stats.poisson.logpmf(k, mean[0]), stats.nbinom.logpmf(k, r, r / (r + mean[1]))], 1)
    np.testing.assert_allclose(likelihood(h).column_log_prob(x).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["kind", "yes", "few", "visits", "claims"])
def test_masses_sum_to_one(name: str) -> None:
    column = next(column for column in ALL if column.name == name)
    likelihood, count = settled((column,)), max(len(column.categories), 0) or 3000
    values = torch.arange(count)
    if column.family == "categorical":
        x = torch.nn.functional.one_hot(values, count).double()
    else:
        x = (values if column.family == "bernoulli" else column.encode(values.double()))[:, None].double()
    h = torch.randn(likelihood.in_channels, generator=torch.Generator().manual_seed(1)).double().expand(count, -1)
    total = likelihood(h).log_prob(torch.cat([x, torch.zeros(count, 1)], 1)).exp().sum()
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_the_total_is_the_sum_of_columns_and_missing_values_are_not_scored() -> None:
    likelihood = settled(ALL)
    h, x = row_of(likelihood)
    p, row = likelihood(h), likelihood.row
    each = p.column_log_prob(x)
    np.testing.assert_allclose(p.log_prob(x), each.sum(1), rtol=1e-12)
    np.testing.assert_allclose(p.element_log_prob(x).sum(1), each.sum(1), rtol=1e-12)
    for i, place in enumerate(row.places):
        masked = x.clone()
        masked[:, place], masked[:, row.features + i] = 0, 1
        np.testing.assert_allclose(p.log_prob(masked), each.sum(1) - each[:, i], rtol=1e-10)


def test_columns_in_another_order_have_the_same_probabilities() -> None:
    one, other = settled(ALL[:4]), settled(tuple(reversed(ALL[:4])))
    torch.manual_seed(0)
    parts = [torch.randn(3, column.width).double() for column in ALL[:4]]
    values = [torch.nn.functional.one_hot(torch.tensor([0, 2, 1]), 3).double(), *(torch.ones(3, 1).double() for _ in range(3))]

    def scored(likelihood: Mixed) -> Tensor:
        h, x = torch.zeros(3, likelihood.in_channels).double(), torch.zeros(3, likelihood.row.width).double()
        for column, part, value in zip(ALL[:4], parts, values, strict=True):
            place = likelihood.row.places[likelihood.columns.index(column)]
            h[:, place], x[:, place] = part, value
        return likelihood(h).log_prob(x)

    torch.testing.assert_close(scored(one), scored(other))


def test_draws_have_the_distribution_function_of_the_columns() -> None:
    likelihood = settled(ALL)
    torch.manual_seed(3)
    h = torch.randn(1, likelihood.in_channels).double().expand(4000, -1)
    x = likelihood(h).sample()
    below, upto = likelihood(h).element_cdf(x)
    assert bool((below <= upto).all())
    u = below + (upto - below) * torch.rand(below.shape).double()  # uniform where the distribution is right
    for i in range(likelihood.row.features):
        assert stats.kstest(u[:, i].numpy(), "uniform").pvalue > 1e-3, i


@pytest.mark.parametrize("family", LAWS)
def test_values_missing_at_random_do_not_bias_sigma(family: str) -> None:
    """The best σ is that of the observed values alone: mean square, mean absolute, or the root of the likelihood equation."""
    likelihood = Mixed((Column("x", family), Column("y", family))).double()
    row = likelihood.row
    torch.manual_seed(0)
    x = torch.randn(3000, row.width).double() * torch.tensor([0.5, 3.0, 1.0, 1.0])
    missing = torch.rand(3000, 2) < torch.tensor([0.4, 0.7])
    x[:, :2] = x[:, :2].masked_fill(missing, 100.0)  # of no consequence
    x[:, 2:] = missing.double()
    h = torch.zeros(3000, 2).double()
    likelihood.calibrate(list(zip(h.split(512), x.split(512), strict=True)))
    for j in range(2):
        r = x[~missing[:, j], j].numpy()
        sigma = float(likelihood.sigma()[j])
        statistic = {"gaussian": (r / sigma) ** 2, "laplace": np.abs(r / sigma)}.get(
            family, (DF + 1) * (r / sigma) ** 2 / (DF + (r / sigma) ** 2)
        )
        assert statistic.mean() == pytest.approx(1, rel=1e-5)
    likelihood.train()(h, x)
    tracked = likelihood.eval().sigma()
    likelihood.calibrate([(h, x)])
    torch.testing.assert_close(tracked, likelihood.sigma(), rtol=1e-5, atol=0)


def test_a_batch_without_observed_values_leaves_sigma_as_it_was() -> None:
    likelihood = Mixed((Column("x", "student-t"), Column("y", "gaussian")))
    h, x = torch.zeros(4, 2, requires_grad=True), torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 4)
    likelihood.scales[2].store("density", torch.tensor([0.5]))
    total = likelihood(h, x).log_prob(x).sum()
    total.backward()
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())
    assert likelihood.scales[2].density_log_scale.item() == pytest.approx(0.5)


def test_the_dispersion_is_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    mean, r = 4.0, np.array([0.8, 5.0])
    k = np.stack([rng.negative_binomial(each, each / (each + mean), 2000) for each in r], 1)
    found = best_log_dispersion(
        torch.full((2000, 2), np.log(mean)), torch.tensor(k).double(), torch.ones(2000, 2).double(), torch.zeros(2)
    )
    for j in range(2):

        def total(log_r: float, j: int = j) -> float:
            return stats.nbinom.logpmf(k[:, j], np.exp(log_r), np.exp(log_r) / (np.exp(log_r) + mean)).sum()

        best = float(found[j])
        assert best == pytest.approx(np.log(r[j]), abs=0.2)
        assert total(best) > max(total(best - 0.01), total(best + 0.01))


def test_masses_of_counts_are_right_in_single_precision_too() -> None:
    """Where r is large, two log-gammas of ten millions cancel."""
    likelihood = settled((ALL[4],)).float()
    likelihood.log_dispersion.fill_(14.0)
    k, mean = torch.arange(10.0), np.exp(1 + 0.5)
    x = torch.stack([ALL[4].encode(k), 0 * k], 1)
    found = likelihood(torch.ones(10, 1)).log_prob(x)
    np.testing.assert_allclose(found.numpy(), stats.poisson.logpmf(k, mean), rtol=1e-4, atol=1e-4)


def test_weights_and_sigma_are_saved() -> None:
    likelihood, other = settled(ALL).float(), Mixed(ALL).eval()
    other.load_state_dict(likelihood.state_dict())
    h, x = (each.float() for each in row_of(settled(ALL)))
    assert torch.equal(likelihood(h).log_prob(x), other(h).log_prob(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "categorical"}, "needs 2 or more"),
        ({"categories": ("a",)}, "got 1 categories"),
        ({"scale": 0.0}, "above 0"),
        ({"transform": "knots"}, "two or more rising pairs"),
        ({"transform": "knots", "knots": ((0.0, 1.0), (1.0, 0.0))}, "rising"),
    ],
)
def test_impossible_columns_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(Column("x", "gaussian"), **change)


def test_wrong_shapes_are_refused() -> None:
    likelihood = Mixed(ALL)
    with pytest.raises(ValueError, match="size the decoder by"):
        likelihood(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="was given data of shape"):
        likelihood(torch.zeros(2, likelihood.in_channels), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one column"):
        Mixed(())
    with pytest.raises(ValueError, match="not a generator"):
        likelihood.calibrate(iter([]))


# -- the exact marginal likelihood of a linear-Gaussian table with missing values ------------------------------------------

DIMS, LATENTS, ROWS = 5, 2, 3000


def factor_table(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Loadings, noise variances, values and masks of a factor analysis with values missing at random."""
    rng = np.random.default_rng(7)
    loadings, noise = rng.normal(size=(DIMS, LATENTS)), rng.uniform(0.2, 0.8, DIMS)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, LATENTS)) @ loadings.T + rng.normal(size=(ROWS, DIMS)) * np.sqrt(noise)
    return loadings, noise, x, rng.random((ROWS, DIMS)) < 0.25


def marginal(loadings: np.ndarray, mean: np.ndarray, noise: np.ndarray, x: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Log-density of each row's observed values: a Gaussian of covariance WWᵀ + Ψ without the missing dimensions."""
    covariance = loadings @ loadings.T + np.diag(noise)
    total = np.zeros(len(x))
    for pattern in np.unique(missing, axis=0):
        rows, seen = (missing == pattern).all(1), ~pattern
        if seen.any():
            law = stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)])
            total[rows] = law.logpdf(x[rows][:, seen])
    return total


def encoded(x: np.ndarray, missing: np.ndarray) -> Tensor:
    return torch.tensor(np.concatenate([np.where(missing, 0, x), missing], 1), dtype=torch.float32)


def test_a_linear_table_with_missing_values_reaches_its_exact_marginal_likelihood() -> None:
    torch.manual_seed(0)
    loadings, noise, x, missing = factor_table(0)
    columns = tuple(Column(f"x{i}", "gaussian") for i in range(DIMS))
    encoder = nn.Sequential(nn.Linear(2 * DIMS, 64), nn.ReLU(), nn.Linear(64, 2 * LATENTS))
    decoder = nn.Linear(LATENTS, DIMS)
    vae = VAE(FlatNetwork(encoder, decoder, LATENTS), Mixed(columns)).train()
    rows = encoded(x, missing)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900)
    for _ in range(900):
        optimizer.zero_grad()
        (-vae.elbo(rows[torch.randint(ROWS, (512,))]).total.mean()).backward()
        optimizer.step()
        schedule.step()
    vae.eval().calibrate([rows])
    _, _, new, gone = factor_table(1)
    model = TabularVAE()
    model.vae, model.schema = vae, TableSchema(columns, {})
    frame = pd.DataFrame(np.where(gone, np.nan, new)[:1000], columns=[column.name for column in columns])
    found = model.log_prob(frame, draws=512).mean()
    weight, bias = decoder.weight.detach().numpy(), decoder.bias.detach().numpy()
    own = marginal(weight, bias, np.square(vae.likelihood.sigma().numpy()), new[:1000], gone[:1000]).mean()
    best = marginal(loadings, np.zeros(DIMS), noise, new[:1000], gone[:1000]).mean()
    assert found == pytest.approx(own, abs=0.02)  # the estimate is right
    assert found == pytest.approx(best, abs=0.02)  # and so is the model


def test_slopes_of_all_transforms_are_those_of_autograd() -> None:
    columns = [
        Column(name, "gaussian", transform=name, shift=0.1, scale=0.7, knots=KNOTS if name == "knots" else ())
        for name in TRANSFORMS
    ]
    row = Row(columns)
    x = torch.tensor([[-2.0, 0.3, 0.2, -1.0], [5.0, 2.0, 0.9, 7.0]], dtype=torch.float64, requires_grad=True)
    y = torch.stack([column.encode(x[:, i]) for i, column in enumerate(columns)], 1)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(row.log_slopes(y.detach()), slope.log())


# -- Schemas of tables: types, what is left out, a round trip in all dtypes, and errors of new data --------------------

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
    monkeypatch.setattr(sys.modules["sigma_vae.data.load"], "LARGE", 1)
    monkeypatch.setattr(sys.modules["sigma_vae.data.load"], "PART", N)
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
