"""Estimators: scikit-learn's own checks, pickles without code, pipelines, grid search, images, outliers."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from sigma_vae.sklearn import VAEOutlierDetector, VAETransformer

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
def test_misuse_is_explained(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VAEOutlierDetector(**options).fit(rows(10))
