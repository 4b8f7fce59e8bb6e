"""Evaluation: every example counted once, numbers that an independent computation gives, pictures pixel for pixel."""

import importlib
import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from sigma_vae import VAE, Gaussian, StudentT, mlp, runs
from sigma_vae.cli.runs import print_evaluation
from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Scaling
from sigma_vae.evaluation import Column, Estimate, Evaluation, Metric, Row, calibrate, evaluate, score
from sigma_vae.evaluation.bounds import entropy_identity
from sigma_vae.evaluation.plots import drawable, pairs, save_grid
from sigma_vae.evaluation.suite import columns
from sigma_vae.registry import register
from sigma_vae.vae import keyed_noise


@pytest.fixture(scope="module")
def opened(digits_run):
    return runs.open_run(digits_run, "cpu")


def independent_scores(opened):
    """From the model's own features: scipy's densities and masses, NumPy's sums, float64."""
    x = opened.data.values("test")
    with torch.no_grad():
        inference = opened.vae.network.infer(x, noise=keyed_noise(torch.arange(len(x))))
    mean, values = torch.sigmoid(inference.h).double().numpy(), x.double().numpy()
    scale = opened.vae.likelihood.scale
    density, level = (float(value.exp()) for value in (scale.density_log_scale, scale.level_log_scale))
    log_likelihood = stats.norm.logpdf(values, mean, density).sum((1, 2, 3))
    upper = np.where(values > 1 - 1e-6, np.inf, values + 0.5 / 16)
    lower = np.where(values < 1e-6, -np.inf, values - 0.5 / 16)
    mass = np.log(stats.norm.cdf(upper, mean, level) - stats.norm.cdf(lower, mean, level)).sum((1, 2, 3))
    return log_likelihood, mass, inference.kl.sum(-1).double().numpy()


def test_bounds_are_what_scipy_says(opened):
    report = evaluate(opened.vae, opened.data.batches("test", 64))
    log_likelihood, mass, rate = independent_scores(opened)
    n = len(rate)
    assert report["examples"] == n == len(opened.data.test)
    elbo = log_likelihood - rate
    assert report["elbo_nats"]["mean"] == pytest.approx(elbo.mean(), rel=1e-5, abs=1e-4)
    assert report["elbo_nats"]["standard_error"] == pytest.approx(elbo.std(ddof=1) / math.sqrt(n), rel=1e-4)
    assert report["rate_nats"]["mean"] == pytest.approx(rate.mean(), rel=1e-5)
    assert report["distortion_nats"]["mean"] == pytest.approx(-log_likelihood.mean(), rel=1e-5, abs=1e-4)
    bits = (rate - mass) / (64 * math.log(2))
    assert report["bits_per_dim"]["mean"] == pytest.approx(bits.mean(), rel=1e-5)
    assert report["bits_per_dim_post_hoc"] == report["bits_per_dim"]  # an optimal σ is its own refit


def test_no_number_depends_on_the_batch_size(opened):
    reference = score(opened.vae, opened.data.batches("test", 180))
    for size in (1, 7, 64):
        other = score(opened.vae, opened.data.batches("test", size))
        for name, ours, theirs in zip(reference._fields, reference, other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=name)
        assert float((reference.log_likelihood - other.log_likelihood).mean().abs()) < 1e-5


def test_another_noise_seed_gives_other_draws(opened):
    ours, theirs = (score(opened.vae, opened.data.batches("test", 180), seed) for seed in (0, 1))
    assert not torch.equal(ours.log_likelihood, theirs.log_likelihood)
    assert torch.equal(ours.rate, theirs.rate)  # analytic


def test_active_units_are_latents_whose_mean_varies(opened):
    batches = opened.data.batches("test", 50)
    means = np.concatenate([opened.vae.encode(batch.x).loc.detach().numpy() for batch in batches])
    assert evaluate(opened.vae, batches)["active_units"] == int((means.astype(np.float64).var(0) > 0.01).sum())


def test_the_entropy_sum_is_computed_from_entropies(opened):
    result = entropy_identity(opened.vae, opened.data.batches("train", 500))
    x = opened.data.values("train")
    q = opened.vae.encode(x)
    sigma = float(opened.vae.likelihood.scale.density_log_scale.exp())
    expected = (
        stats.norm.entropy(scale=q.scale.detach().double().numpy()).sum(1).mean()
        - 4 * stats.norm.entropy()
        - 64 * stats.norm.entropy(scale=sigma)
    )
    assert result["entropies_nats"] == pytest.approx(expected, rel=1e-5)
    assert result["gap_nats_per_dim"] == pytest.approx((result["elbo_nats"] - expected) / 64, abs=1e-5)


def test_the_entropy_sum_does_not_speak_of_student_t(opened):
    likelihood = StudentT(1, levels=17, mean="unit")
    vae = VAE(mlp((1, 8, 8), likelihood.in_channels, latent_dim=4, width=32), likelihood)
    vae.calibrate([next(iter(opened.data.batches("test", 50))).x])
    assert entropy_identity(vae, opened.data.batches("train", 500)) is None


def test_an_unconverged_model_has_an_entropy_gap(opened):
    import copy

    vae = copy.deepcopy(opened.vae)
    with torch.no_grad():
        vae.network.encoder[-1].bias[:4] += 8.0  # latents that are far too large for their prior
    data = opened.data.batches("train", 500)
    converged, broken = (abs(entropy_identity(model, data)["gap_nats_per_dim"]) for model in (opened.vae, vae))
    assert broken > 10 * converged


def test_evaluating_a_run_again_gives_the_same_file(digits_run):
    before = (digits_run / "evaluation.json").read_bytes()
    runs.evaluate_run(digits_run, EvaluationSettings(metrics=()), device="cpu")
    assert (digits_run / "evaluation.json").read_bytes() == before


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    images = torch.rand(5, 3, 4, 6)
    save_grid(tmp_path / "grid.png", images, columns=3, zoom=1)
    with Image.open(tmp_path / "grid.png") as file:
        picture = np.asarray(file)
    assert picture.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    for i, image in enumerate(images):
        top, left = 1 + 5 * (i // 3), 1 + 7 * (i % 3)
        shown = picture[top : top + 4, left : left + 6]
        np.testing.assert_array_equal(shown, np.rint(image.numpy().transpose(1, 2, 0) * 255).astype(np.uint8))


def test_originals_stand_above_their_reconstructions():
    originals, again = torch.arange(5.0), torch.arange(5.0) + 10
    assert pairs(originals, again, columns=2).tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 14]


@pytest.mark.parametrize("shape", [(2, 8, 8), (8,), (1, 8)])
def test_what_is_no_picture_is_not_drawn(shape, tmp_path):
    assert not drawable(shape)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        save_grid(tmp_path / "grid.png", torch.zeros(4, *shape))


def test_the_pictures_of_a_run_have_the_size_of_their_grids(digits_run):
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(digits_run / name) as picture:
            side = 8 * 9 + 1  # 8 images of 8 pixels, a line around each
            assert picture.size == (side * round(500 / side),) * 2
            assert picture.mode == "L"


# -- typed results ---------------------------------------------------------------------------------------------------------


def test_results_are_read_by_attribute_by_key_and_from_json(opened):
    settings = EvaluationSettings(metrics=("iwae", "oracle", "information", "calibration"), draws=2)
    report = evaluate(opened.vae, opened.data, settings=settings)
    assert report.elbo_nats.mean == report["elbo_nats"]["mean"] == report.bounds.elbo_nats.mean
    assert report.iwae.iwae_nats == report["iwae"]["iwae_nats"] == report.results["iwae"].iwae_nats
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    again = Evaluation.from_json(content)
    assert again == report == content
    for name, result in report.results.items():
        assert type(again.results[name]) is type(result)
    assert again.iwae.effective_sample_size["iwae_nats"].mean == report.iwae.effective_sample_size["iwae_nats"].mean
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(AttributeError, match="has no 'fid'; it has elbo_nats"):
        report.fid  # noqa: B018
    with pytest.raises(KeyError):
        report["fid"]
    with pytest.raises(ValueError, match="the bounds is not a ElboResult: rate_nats"):
        Evaluation.from_json({name: value for name, value in content.items() if name != "rate_nats"})


def test_sections_of_metrics_that_are_not_registered_here_are_kept(opened):
    content = evaluate(opened.vae, opened.data.batches("test", 64)).to_json() | {"theirs": {"number": 1}}
    assert Evaluation.from_json(content).to_json() == content


# -- a metric of one's own -------------------------------------------------------------------------------------------------


class Brightness(Metric):
    """Mean of the decoder's samples."""

    result = Estimate
    columns = (Column("brightness", "brightness of samples", 3),)

    def obstacle(self, vae, data, settings):
        return "only means of samples are looked at" if settings.samples > 100 else None

    def measure(self, vae, data, settings):
        with torch.no_grad():
            return Estimate.of(vae.sample(settings.samples, generator=torch.Generator().manual_seed(0)).flatten(1).mean(1))

    def rows(self, result):
        yield Row("brightness of samples", f"{result.mean:.3f}")


@pytest.fixture
def brightness(monkeypatch):
    with monkeypatch.context() as patch:
        register.metric.names()  # ours are there first
        patch.setattr(register.metric, "_entries", dict(register.metric._entries))
        register.metric("brightness")(Brightness)
        yield


@pytest.mark.usefixtures("brightness")
def test_a_metric_is_one_class(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    settings = EvaluationSettings(metrics=("brightness",), samples=50)
    report = runs.evaluate_run(run, settings, device="cpu")
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["brightness"] == {"mean": report.brightness.mean, "standard_error": report.brightness.standard_error}
    assert runs.evaluate_run(run, EvaluationSettings(metrics=()), device="cpu").brightness == report.brightness  # kept
    print_evaluation(report)
    row = next(line for line in capsys.readouterr().out.splitlines() if "brightness of samples" in line)
    assert f"{report.brightness.mean:.3f}" in row
    rows = runs.compare([digits_run, run])
    assert [row["brightness"] for row in rows] == [None, stored["brightness"]]
    assert columns(["brightness", "rate_nats"])["brightness"].title == "brightness of samples"
    with pytest.raises(ValueError, match="brightness cannot be measured: only means"):
        runs.evaluate_run(run, EvaluationSettings(metrics=("brightness",), samples=500), device="cpu")


def test_a_metric_that_is_not_there_gets_a_suggestion(opened):
    with pytest.raises(ValueError, match="there is no metric 'calibraton'; did you mean 'calibration'"):
        evaluate(opened.vae, opened.data, settings=EvaluationSettings(metrics=("calibraton",)))


# -- data of any kind ------------------------------------------------------------------------------------------------------


def test_held_out_examples_come_in_any_form(opened):
    x = opened.data.values("test")
    reference = score(opened.vae, opened.data.batches("test", 64))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=7)
    for data in (opened.data, x, x.numpy(), loader, torch.utils.data.TensorDataset(x), "digits"):
        scores = score(opened.vae, data, like=opened.data)
        torch.testing.assert_close(scores.log_likelihood, reference.log_likelihood, rtol=1e-5, atol=1e-4)
    report = evaluate(opened.vae, x, opened.data.values("train"))
    assert report.elbo_nats.mean == pytest.approx(float((reference.log_likelihood - reference.rate).mean()), abs=1e-4)
    assert report.entropy_identity == evaluate(opened.vae, opened.data).entropy_identity
    with pytest.raises(ValueError, match="quality cannot be measured: it compares with training images"):
        evaluate(opened.vae, x, settings=EvaluationSettings(metrics=("quality",)))
    with pytest.raises(ValueError, match=r"information cannot be measured: .* no training data are given"):
        evaluate(opened.vae, x, settings=EvaluationSettings(metrics=("information",)))


def test_frames_of_data_are_scored_in_their_own_units():
    import pandas as pd

    table = pd.DataFrame(np.random.default_rng(0).normal(5, 3, (40, 2)), columns=["a", "b"])
    scaling = Scaling(mean=(5.0, 5.0), deviation=(3.0, 3.0))
    vae = VAE(mlp((2,), 2, latent_dim=1, width=4), Gaussian(2, spatial_dims=0, levels=None)).eval()
    calibrate(vae, table, like=scaling)
    again = VAE(vae.network, Gaussian(2, spatial_dims=0, levels=None)).eval()
    again.calibrate([scaling(torch.tensor(table.to_numpy(np.float32)))])
    assert float(vae.likelihood.sigma()) == pytest.approx(float(again.likelihood.sigma()))
    standardised = score(vae, scaling(torch.tensor(table.to_numpy(np.float32))))
    expected = standardised.log_likelihood - 2 * math.log(3)
    torch.testing.assert_close(score(vae, table, like=scaling).log_likelihood, expected, rtol=1e-5, atol=1e-5)


# -- old names -------------------------------------------------------------------------------------------------------------

OLD = (
    ("suite", "entropy_identity"),
    ("suite", "scores_under_standard_prior"),
    ("suite", "standard_prior"),
    ("video", "video_quality"),
)


@pytest.mark.parametrize(("module", "name"), OLD)
def test_old_names_warn_and_work(module, name):
    module = importlib.import_module(f"sigma_vae.evaluation.{module}")
    with pytest.warns(DeprecationWarning, match=rf"{name} is now sigma_vae\.evaluation\.\w+\.{name}"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
