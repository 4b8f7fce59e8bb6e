"""VAEs of data frames, in Python and on the command line."""

import json
import pickle
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from sigma_vae import models
from sigma_vae.cli import main
from sigma_vae.config import TrainingConfig
from sigma_vae.sklearn import VAEOutlierDetector, VAETransformer
from sigma_vae.tabular import ESS, TabularVAE, _training


def people(n: int = 500) -> pd.DataFrame:
    """Sex decides about height; height about mass; some values are missing."""
    rng = np.random.default_rng(0)
    male = rng.random(n) < 0.5
    height = (rng.normal(165, 6, n) + 13 * male).round(1)
    mass = (height - 100 + rng.normal(0, 5, n)).round(1)
    frame = pd.DataFrame({"sex": np.where(male, "male", "female"), "height": height, "mass": mass, "visits": rng.poisson(3, n)})
    frame.loc[rng.random(n) < 0.2, "mass"] = np.nan
    return frame


@pytest.fixture(scope="module")
def fitted() -> TabularVAE:
    return TabularVAE(latent_dim=4, width=32, training=TrainingConfig(max_steps=800)).fit(people())


def test_samples_are_like_the_data(fitted: TabularVAE) -> None:
    data, drawn = people(), fitted.sample(2000)
    assert drawn.dtypes.to_dict() == data.dtypes.to_dict()
    assert drawn.mass.isna().mean() == pytest.approx(data.mass.isna().mean(), abs=0.04)
    assert drawn.height.mean() == pytest.approx(data.height.mean(), abs=1.5)
    assert drawn.height.corr(drawn.mass) == pytest.approx(data.height.corr(data.mass), abs=0.12)
    difference = drawn.groupby("sex").height.mean()
    assert difference["male"] - difference["female"] == pytest.approx(13, abs=4)
    pd.testing.assert_frame_equal(fitted.sample(5, seed=3), fitted.sample(5, seed=3))


def test_modes_are_the_likeliest_categories_and_numbers_are_drawn_as_before(fitted: TabularVAE) -> None:
    drawn, modes = (fitted.sample(400, discrete=kind, missing=False, seed=2) for kind in ("draw", "mode"))
    pd.testing.assert_frame_equal(drawn[["height", "mass"]], modes[["height", "mass"]])
    z = fitted.vae.network.prior.sample(400, torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = fitted.vae.network.decode(z)
    sex = fitted.schema.row.places[[column.name for column in fitted.schema.columns].index("sex")].start
    assert modes.sex.tolist() == np.where(features[:, sex] > 0, "male", "female").tolist()  # a logit above 0
    assert (modes.sex != drawn.sex).any()


def test_conditional_samples_have_the_known_values_and_the_rest_given_them(fitted: TabularVAE) -> None:
    drawn = fitted.sample(500, where={"sex": "male"})
    assert (drawn.sex == "male").all()
    assert 100 < drawn.attrs[ESS] <= 10_000
    known = people().query("sex == 'male'")
    assert drawn.height.mean() == pytest.approx(known.height.mean(), abs=2.5)
    tall = fitted.sample(300, where={"height": 185.0})
    assert (tall.height == 185.0).all()
    assert (tall.sex == "male").mean() > 0.8
    assert tall.mass.mean() == pytest.approx(85, abs=5)


def test_missing_values_are_filled_in_from_the_others(fitted: TabularVAE) -> None:
    data = people().assign(other="kept")
    filled = fitted.impute(data)
    assert not filled.drop(columns="other").isna().any().any()
    observed = data.mass.notna()
    pd.testing.assert_frame_equal(filled[observed], data[observed])
    assert np.corrcoef(filled.mass[~observed], data.height[~observed])[0, 1] > 0.8
    one, two = (fitted.impute(data, "draw", seed=seed).mass[~observed] for seed in (0, 1))
    assert (one - two).std() == pytest.approx(np.sqrt(2) * 5, rel=0.35)


def test_log_probabilities_add_up_and_do_not_depend_on_other_rows(fitted: TabularVAE) -> None:
    data = people(60)
    terms, log_prob = fitted.elbo(data), fitted.log_prob(data)
    np.testing.assert_allclose(terms[list(data.columns)].sum(axis=1) - terms.rate, terms.elbo, rtol=1e-10)
    assert (terms.mass[data.mass.isna()] == 0).all()
    assert log_prob.mean() > np.mean([fitted.elbo(data, seed=seed).elbo.mean() for seed in range(8)])
    np.testing.assert_allclose(fitted.log_prob(data.iloc[:7]), log_prob[:7], rtol=1e-5)
    report = fitted.report(data)
    assert report.bits.notna().tolist() == [True, False, False, True]
    assert report.bits["sex"] == pytest.approx(-report.log_likelihood_nats["sex"] / np.log(2))
    assert report.observed["mass"] == data.mass.notna().sum()


def test_units_change_densities_by_their_jacobian_alone() -> None:
    """Metres in place of centimetres: log 100 nats for each observed height, and the same model."""
    config = TrainingConfig(max_steps=20)
    data = people(100)[["sex", "height"]]
    one = TabularVAE(latent_dim=2, width=8, training=config, prior="standard").fit(data)
    two = TabularVAE(latent_dim=2, width=8, training=config, prior="standard").fit(data.assign(height=data.height / 100))
    np.testing.assert_allclose(two.log_prob(data.assign(height=data.height / 100)) - one.log_prob(data), np.log(100), atol=2e-3)


def test_there_are_no_more_latents_than_columns() -> None:
    model = TabularVAE(width=8, training=TrainingConfig(max_steps=2), prior="standard")
    assert [model.fit(data).encode(data).shape[1] for data in (people(40), people(40)[["sex", "height"]])] == [4, 2]
    assert model.fit(people(40)).encode(people(40)).shape[1] == 4  # the asked number is not forgotten


def test_length_of_training_follows_the_rows() -> None:
    assert [_training(rows).max_steps for rows in (200, 10_000, 1_000_000)] == [500, 4_000, 5_000]


def test_models_are_saved_without_pickle(fitted: TabularVAE, tmp_path) -> None:
    data = people(20)
    fitted.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    again = TabularVAE.load(tmp_path / "model")
    np.testing.assert_array_equal(again.log_prob(data), fitted.log_prob(data))
    assert again.schema == fitted.schema
    assert again.encode(data).shape == (20, 4)


def test_a_large_file_gives_the_same_model_as_a_small_one(tmp_path, monkeypatch) -> None:
    """Its rows are in a mapped file, and are read a part at a time."""
    people(100).to_parquet(tmp_path / "people.parquet")

    def log_prob() -> np.ndarray:
        model = TabularVAE(latent_dim=2, width=8, training=TrainingConfig(max_steps=20), prior="standard")
        return model.fit(tmp_path / "people.parquet").log_prob(people(10), draws=4)

    whole = log_prob()
    monkeypatch.setattr(sys.modules["sigma_vae.data.load"], "LARGE", 1)
    monkeypatch.setattr(sys.modules["sigma_vae.data.load"], "PART", 40)
    np.testing.assert_array_equal(log_prob(), whole)
    assert list(tmp_path.glob(".sigma-vae/*/examples.npy"))


def test_misuse_is_explained(fitted: TabularVAE, tmp_path) -> None:
    with pytest.raises(ValueError, match="beside a data frame"):
        TabularVAE().fit("people.csv", validation=people(3))
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        TabularVAE().fit("nowhere.csv")
    with pytest.raises(ValueError, match="not fitted yet"):
        TabularVAE().sample(1)
    with pytest.raises(ValueError, match="where names columns"):
        fitted.sample(1, where={"age": 3})
    with pytest.raises(ValueError, match="has the categories female, male"):
        fitted.sample(1, where={"sex": "none"})
    with pytest.raises(ValueError, match="at least 1"):
        fitted.sample(0)
    with pytest.raises(ValueError, match="two rows"):
        TabularVAE().fit(people(1))
    with pytest.raises(ValueError, match='discrete is "draw" or "mode"'):
        fitted.sample(1, discrete="mean")
    with pytest.raises(ValueError, match="at least one row"):
        fitted.log_prob(people(3).iloc[:0])
    with pytest.raises(ValueError, match="at least 2"):
        fitted.log_prob(people(3), draws=1)


def run(*words: str) -> int:
    return main(list(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line on a CSV file."""
    folder = tmp_path_factory.mktemp("table")
    people().to_csv(folder / "people.csv", index=False)
    sizes = ("--latent-dim", "3", "--width", "16", "--max-steps", "150")
    assert run("train", str(folder / "people.csv"), "--likelihood", "mixed", "--out", str(folder / "run"), *sizes) == 0
    return folder


def test_the_command_line_trains_samples_imputes_and_scores_tables(trained, capsys) -> None:
    run_folder = str(trained / "run")
    description = json.loads((trained / "run/model/model.json").read_text(encoding="utf-8"))
    assert [column["name"] for column in description["scaling"]["schema"]["columns"]] == ["sex", "height", "mass", "visits"]
    assert run("sample", run_folder, "--n", "30", "--where", "sex=male", "visits=2", "--out", str(trained / "x.csv")) == 0
    assert "effective sample size" in capsys.readouterr().out
    drawn = pd.read_csv(trained / "x.csv")
    assert list(drawn.columns) == ["sex", "height", "mass", "visits"]
    assert (drawn.sex == "male").all()
    assert (drawn.visits == 2).all()
    assert run("sample", run_folder, "--n", "4", "--out", str(trained / "x.parquet")) == 0
    assert pd.read_parquet(trained / "x.parquet").dtypes.to_dict() == people().dtypes.to_dict()
    assert run("impute", run_folder, str(trained / "people.csv"), "--draws", "16", "--out", str(trained / "y.csv")) == 0
    assert not pd.read_csv(trained / "y.csv").isna().any().any()
    assert run("score", run_folder, "--data", str(trained / "people.csv")) == 0
    scores = pd.read_csv(trained / "run/scores-people.csv")
    assert scores.split.value_counts().to_dict() == {"train": 405, "test": 50, "validation": 45}
    assert run("evaluate", run_folder, "--json") == 0
    assert "elbo_nats" in capsys.readouterr().out


def test_excel_files_are_read_and_written(trained, capsys) -> None:
    sheet, drawn = trained / "people.xlsx", trained / "drawn.xlsx"
    people().to_excel(sheet, index=False)
    assert run("sample", str(trained / "run"), "--n", "40", "--out", str(drawn)) == 0
    again = pd.read_excel(drawn)
    assert list(again.columns) == list(people().columns)
    assert set(again.sex.dropna()) <= {"female", "male"}
    assert (again.visits.dropna() % 1 == 0).all()
    assert run("impute", str(trained / "run"), str(sheet), "--draws", "4", "--out", str(trained / "filled.xlsx")) == 0
    filled, missing = pd.read_excel(trained / "filled.xlsx"), people().isna()
    assert not filled.isna().any().any()
    pd.testing.assert_frame_equal(filled.mask(missing), people(), check_dtype=False)
    assert run("score", str(trained / "run"), "--data", str(sheet)) == 0
    assert len(pd.read_csv(trained / "run/scores-people.csv")) == len(people())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "RUN", "--where", "sex", "--out", "x.csv"), "column=value"),
        (("sample", "RUN", "--show", "draw"), "always draws"),
        (("sample", "RUN", "--out", "x.png"), ".csv or .parquet or .xlsx"),
        (("impute", "RUN", "nowhere.csv", "--out", "x.csv"), "nowhere.csv"),
    ],
)
def test_wrong_words_are_explained(trained, capsys, words: tuple[str, ...], said: str) -> None:
    assert run(*(str(trained / "run") if word == "RUN" else word for word in words)) == 1
    assert said in capsys.readouterr().err


def test_tables_of_numbers_are_sampled_as_tables_too(trained, capsys) -> None:
    people()[["height", "visits"]].astype(float).to_csv(trained / "numbers.csv", index=False)
    words = ("--latent-dim", "2", "--width", "8", "--max-steps", "10", "--out", str(trained / "numbers"))
    assert run("train", str(trained / "numbers.csv"), *words) == 0
    assert run("sample", str(trained / "numbers"), "--n", "3", "--out", str(trained / "z.csv")) == 0
    assert list(pd.read_csv(trained / "z.csv").columns) == ["height", "visits"]
    assert run("sample", str(trained / "numbers"), "--where", "height=2") == 1
    assert "likelihood mixed" in capsys.readouterr().err
    assert run("impute", str(trained / "numbers"), str(trained / "numbers.csv"), "--out", str(trained / "z.csv")) == 1


def test_mixed_is_for_tables(capsys) -> None:
    assert run("train", "digits", "--likelihood", "mixed", "--out", "nowhere") == 1
    assert "reads tables" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mixed is for tables"):
        models.likelihood("mixed", 3)


# -- Estimators: scikit-learn's own checks, pickles without code, pipelines, grid search, images, outliers -------------

TINY = {"latent_dim": 2, "width": 4, "max_steps": 1, "prior": "standard", "random_state": 0}
SMALL = {"latent_dim": 3, "width": 16, "max_steps": 150, "prior": "standard", "random_state": 0}


@pytest.mark.parametrize(
    "estimator", [VAETransformer(**TINY), VAEOutlierDetector(draws=2, **TINY)], ids=lambda e: type(e).__name__
)
def test_scikit_learns_own_checks_pass(estimator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that are skipped
        failed, passed = [], 0
        for each, check in estimator_checks_generator(estimator):
            try:
                check(each)
                passed += 1
            except Exception as error:
                if "Skip" not in type(error).__name__:
                    failed.append((check, error))
    assert not failed
    assert passed > 30


def rows(n: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 2)) @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(n, 5)) + 3


def test_latents_explain_the_data() -> None:
    x = rows()
    model = VAETransformer(**SMALL).fit(x)
    again = model.inverse_transform(model.transform(x))
    assert np.square(again - x).mean() < 0.05 * x.var(0).mean()
    assert model.get_feature_names_out().tolist() == ["vaetransformer0", "vaetransformer1", "vaetransformer2"]
    drawn = model.sample(500)
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=0.4)
    np.testing.assert_array_equal(drawn, model.sample(500))


def test_scores_are_log_densities_in_the_data_s_units() -> None:
    x = rows(400)
    model = VAETransformer(**SMALL).fit(x[:300])
    law = stats.multivariate_normal(x[:300].mean(0), np.cov(x[:300].T))
    assert model.score(x[300:]) == pytest.approx(law.logpdf(x[300:]).mean(), abs=0.6)
    scaled = clone(model).fit(10 * x[:300])
    assert scaled.score(10 * x[300:]) == pytest.approx(model.score(x[300:]) - 5 * np.log(10), abs=0.01)


@pytest.mark.parametrize("kind", [VAETransformer, VAEOutlierDetector])
def test_pickles_hold_no_code_and_give_the_same_numbers(kind) -> None:
    x = rows(60)
    model = kind(**TINY).fit(x)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.score_samples(x), model.score_samples(x))
    assert set(model.__getstate__()["model_files"]) == {"model.json", "model.safetensors"}
    assert "vae_" not in model.__getstate__()
    with pytest.raises(Exception, match="not fitted"):
        pickle.loads(pickle.dumps(clone(model))).score_samples(x)


def test_they_work_in_pipelines_and_grid_search() -> None:
    x = pd.DataFrame(rows(80), columns=list("abcde"))
    pipeline = make_pipeline(StandardScaler(), VAETransformer(**TINY), PCA(1))
    assert pipeline.fit_transform(x).shape == (80, 1)
    search = GridSearchCV(VAETransformer(**TINY), {"latent_dim": [1, 2]}, cv=2).fit(x)
    assert search.best_params_["latent_dim"] in (1, 2)
    assert search.best_estimator_.feature_names_in_.tolist() == list("abcde")


def test_the_same_random_state_gives_the_same_model_and_leaves_global_generators_alone() -> None:
    x = rows(50)
    before = np.random.get_state()[1].copy()
    one, two, other = (VAEOutlierDetector(**{**TINY, "random_state": seed}).fit(x).score_samples(x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_outliers_are_found_and_names_of_pyod_agree() -> None:
    x = rows()
    odd = x[:20].copy()
    odd[:, 0] *= -1  # each value is usual, the row is not
    model = VAEOutlierDetector(0.05, **SMALL).fit(x)
    new, truth = np.concatenate([rows()[:60], odd]), np.repeat([0, 1], [60, 20])
    assert roc_auc_score(truth, -model.score_samples(new)) > 0.97
    np.testing.assert_array_equal(model.decision_scores_, -model.score_samples(x))
    np.testing.assert_array_equal(model.labels_, (model.predict(x) == -1).astype(int))
    assert model.labels_.mean() == pytest.approx(0.05, abs=0.006)
    assert model.threshold_ == -model.offset_
    np.testing.assert_array_equal(model.score_samples(new), model.score_samples(new))


def test_sigma_is_steady_though_few_examples_are_held_out() -> None:
    """20 residuals alone give log σ a standard error of 0.16; a constant column counts as having one residual of 1."""
    x = np.random.default_rng(0).normal(size=(200, 12))
    x[:, 0] = 3.0
    model = VAEOutlierDetector(**{**SMALL, "latent_dim": 1, "max_steps": 20}).fit(x)
    log_sigma = np.log(model.vae_.likelihood.sigma().flatten().numpy())
    assert log_sigma[0] == pytest.approx(-0.5 * np.log(181), abs=1e-3)
    assert abs(log_sigma[1:].mean()) < 0.2  # the latent explains a part of the noise
    assert log_sigma[1:].std() < 0.08


@pytest.mark.parametrize("criterion", ["rate", "reconstruction", "p-value"])
def test_other_criteria(criterion: str) -> None:
    x = rows()
    far = x[:30] + 30
    model = VAEOutlierDetector(0.1, criterion=criterion, **SMALL).fit(x)
    assert roc_auc_score(np.repeat([0, 1], [200, 30]), -model.score_samples(np.concatenate([x, far]))) > 0.95
    if criterion == "p-value":
        assert ((0 < model.score_samples(x)) & (model.score_samples(x) <= 1)).all()
        assert (model.predict(far) == -1).all()


def test_images_are_read_too() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.random((40, 1, 1, 1)), 64, -1).reshape(40, 1, 8, 8) + 0.05 * rng.normal(size=(40, 1, 8, 8))
    model = VAETransformer(network="mlp", **{**SMALL, "latent_dim": 1}).fit(x)
    assert model.transform(x).shape == (40, 1)
    assert model.inverse_transform(model.transform(x)).shape == x.shape
    assert abs(np.corrcoef(model.transform(x)[:, 0], x.mean((1, 2, 3)))[0, 1]) > 0.95
    with pytest.raises(ValueError, match="fitted to examples of shape"):
        model.transform(x[:, :, :4])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"contamination": 0.9}, "at most 0.5"), ({"criterion": "size"}, "criterion is")],
)
def test_misuse_of_estimators_is_explained(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VAEOutlierDetector(**options).fit(rows(10))
