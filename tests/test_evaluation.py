"""Evaluation: every example counted once, numbers that an independent computation gives, pictures pixel for pixel."""

import copy
import importlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from launched import on_processes
from linear_gaussian import (
    DIM,
    EXACT,
    LATENT,
    PROPOSALS,
    SIGMA,
    InDouble,
    Proposal,
    batches_of,
    draw_data,
    exact_log_likelihood,
    numbers,
)
from PIL import Image
from scipy import integrate, special, stats
from torch import Tensor, distributed, nn

from sigma_vae import (
    VAE,
    Bernoulli,
    Fixed,
    FlatNetwork,
    Gaussian,
    Optimal,
    PerPixel,
    Shared,
    StudentT,
    hierarchical,
    mlp,
    runs,
    sequence,
)
from sigma_vae.cli.runs import print_evaluation
from sigma_vae.config import EvaluationSettings
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import Column, Estimate, Evaluation, Metric, Row, bounds, calibrate, evaluate, score
from sigma_vae.evaluation.base import plain
from sigma_vae.evaluation.bounds import entropy_identity, iwae, oracle, ppca
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.plots import drawable, pairs, save_grid
from sigma_vae.evaluation.suite import columns
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.networks import principal as module
from sigma_vae.networks.principal import Principal, principal
from sigma_vae.priors import GaussianPrior
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


def test_an_evaluation_infers_once_and_says_what_each_metric_says_alone(opened, monkeypatch):
    vae, held_out, training = opened.vae, opened.data.batches("test", 50), opened.data.batches("train", 500)
    alone = information(vae, held_out, training), calibration(vae, held_out)
    infer, seen = type(vae.network).infer, []
    monkeypatch.setattr(type(vae.network), "infer", lambda self, x, *more: seen.append(len(x)) or infer(self, x, *more))
    together = evaluate(vae, held_out, settings=EvaluationSettings(metrics=("calibration",)))
    assert sum(seen) == len(held_out.store)
    assert plain(together.calibration) == plain(alone[1])
    together = evaluate(vae, held_out, training, settings=EvaluationSettings(metrics=("information",)))
    assert numbers(together.information) == pytest.approx(numbers(alone[0]), rel=1e-6, abs=1e-6)


def test_bounds_with_the_standard_prior_are_those_of_the_model_that_has_it(opened):
    vae, batches = copy.deepcopy(opened.vae), opened.data.batches("test", 50)
    vae.fit_prior(opened.data.batches("train", 500), GaussianPrior(4))
    expected = numbers(evaluate(opened.vae, batches))
    found = evaluate(vae, batches).standard_prior
    assert {name: expected[name] for name in numbers(found)} == pytest.approx(numbers(found), rel=1e-9)


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
)


@pytest.mark.parametrize(("module", "name"), OLD)
def test_old_names_warn_and_work(module, name):
    module = importlib.import_module(f"sigma_vae.evaluation.{module}")
    with pytest.warns(DeprecationWarning, match=rf"{name} is now sigma_vae\.evaluation\.\w+\.{name}"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


# -- Laws of importance-weighted bounds and of the oracle σ: a linear-Gaussian model, quadrature, and one process or many

over_proposals = pytest.mark.parametrize("proposal", PROPOSALS, ids=lambda proposal: proposal.name)


# -- against the exact log-likelihood --------------------------------------------------------------------------------------


@over_proposals
def test_bounds_are_below_the_exact_value_rise_and_reach_it(proposal: Proposal) -> None:
    """The same x many times: the standard error is that of the draws alone."""
    x = draw_data(1, seed=3).expand(600, -1)
    exact = float(exact_log_likelihood(x[:1].numpy()).item())
    report = iwae(proposal.vae(), batches_of(x), draws=128, measures=["iwae_nats"])
    error = 4 * report["iwae_nats"]["standard_error"] + 1e-5
    at = dict(zip(report["by_draws"]["draws"], report["by_draws"]["iwae_nats"], strict=True))
    assert exact - error - 6e-3 < at[128] < exact + error  # what it lacks is about var(w)/2k
    assert at[128] == report["iwae_nats"]["mean"]
    elbo = evaluate_elbo(proposal.vae(), x)
    if proposal.exact:
        assert elbo["mean"] == pytest.approx(exact, abs=4 * elbo["standard_error"])
    else:
        rising = [at[k] for k in (1, 2, 4, 8, 16)]
        assert rising == sorted(rising)
        assert max(at[1], elbo["mean"]) < exact - 0.05
        assert at[64] > exact - 0.03
    size = report["effective_sample_size"]["iwae_nats"]["mean"]
    assert size == pytest.approx(128) if proposal.exact else 25 < size < 0.97 * 128


def evaluate_elbo(vae: VAE, x: Tensor) -> dict[str, float]:
    vae.calibrate([x])  # for the post-hoc values alone
    found: dict[str, float] = evaluate(vae, batches_of(x))["elbo_nats"]
    return found


def test_the_exact_posterior_has_constant_weights() -> None:
    x = draw_data(50)
    exact = exact_log_likelihood(x.numpy())
    vae = EXACT.vae()
    report = iwae(vae, batches_of(x), draws=8, measures=["iwae_nats"])
    np.testing.assert_allclose(report["by_draws"]["iwae_nats"], exact.mean(), atol=1e-5)
    assert report["effective_sample_size"]["iwae_nats"]["mean"] == pytest.approx(8, abs=1e-4)
    vae.calibrate([x])
    scores = score(vae, batches_of(x))
    np.testing.assert_allclose(scores.log_likelihood + scores.log_ratio, exact, atol=1e-5)
    assert float((scores.log_likelihood - scores.rate - torch.from_numpy(exact)).abs().max()) > 0.1


@over_proposals
def test_weights_from_an_analytic_kl_overshoot(proposal: Proposal) -> None:
    x, draws = draw_data(300), 64
    vae = proposal.vae()
    vae.calibrate([x])
    scores = [score(vae, batches_of(x), seed) for seed in range(draws)]
    exact = exact_log_likelihood(x.numpy()).mean()

    def bound(log_weights: list[Tensor]) -> float:
        return float(special.logsumexp(torch.stack(log_weights).numpy(), axis=0).mean() - math.log(draws))

    assert bound([s.log_likelihood + s.log_ratio for s in scores]) < exact + 0.02
    assert bound([s.log_likelihood - s.rate for s in scores]) > exact + 0.1


@over_proposals
def test_bounds_are_what_numpy_says(proposal: Proposal) -> None:
    x, draws = draw_data(40), 6
    vae = proposal.vae()
    report = iwae(vae, batches_of(x, 16), draws, seed=5, measures=["iwae_nats"])
    noise = keyed_noise(torch.arange(40), 5)
    with torch.no_grad():
        q = vae.encode(x)
    mean, std = q.loc.numpy(), q.scale.numpy()
    log_weights = []
    for _ in range(draws):
        z = mean + std * noise(torch.Size([40, LATENT])).double().numpy()
        loc = vae.network.decode(torch.from_numpy(z)).detach().numpy()
        log_weights.append(
            stats.norm.logpdf(x.double().numpy(), loc, SIGMA).sum(1)
            + (stats.norm.logpdf(z) - stats.norm.logpdf(z, mean, std)).sum(1)
        )
    for k, ours in zip(report["by_draws"]["draws"], report["by_draws"]["iwae_nats"], strict=True):
        truth = special.logsumexp(log_weights[:k], axis=0) - math.log(k)
        assert ours == pytest.approx(truth.mean(), abs=1e-5)
    assert report["by_draws"]["draws"] == [1, 2, 4, 6]
    assert report["iwae_nats"]["standard_error"] == pytest.approx(truth.std(ddof=1) / math.sqrt(40), abs=1e-5)
    weights = special.softmax(log_weights, axis=0)
    sizes = 1 / np.square(weights).sum(0)
    assert report["effective_sample_size"]["iwae_nats"]["mean"] == pytest.approx(sizes.mean(), rel=1e-4)


def test_densities_are_those_of_the_data_in_their_own_units() -> None:
    x, deviation = draw_data(30), (0.1, 2.0, 30.0, 1.0, 5.0, 7.0)
    stored = x * torch.tensor(deviation) + 3
    scaling = Scaling(mean=(3.0,) * DIM, deviation=deviation)
    report = iwae(EXACT.vae(), Batches(InMemory(stored), scaling, 30), draws=2, measures=["iwae_nats"])
    truth = exact_log_likelihood(scaling(stored).numpy()).mean() - np.log(deviation).sum()
    assert report["iwae_nats"]["mean"] == pytest.approx(truth, abs=1e-5)


# -- against numerical integration -----------------------------------------------------------------------------------------

LEVELS = 8


@final
class Curve(nn.Module):
    """One latent to three values."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        z = z.double()
        return torch.cat([0.5 + 0.4 * torch.sin(z), torch.sigmoid(self.slope * z), 0.5 + 0.2 * z], 1)


@final
class Guess(nn.Module):
    """A posterior that is about right."""

    def forward(self, x: Tensor) -> Tensor:
        mean = 2.5 * (x.double().mean(1, keepdim=True) - 0.5)
        return torch.cat([mean, torch.full_like(mean, math.log(0.6**2))], 1)


def log_mass_by_quadrature(x: np.ndarray, sigma: float) -> float:
    z = np.linspace(-9, 9, 20_001)
    with torch.no_grad():
        loc = Curve()(torch.from_numpy(z)[:, None]).numpy()
    half = 0.5 / (LEVELS - 1)
    upper, lower = np.where(x > 1 - half, np.inf, x + half), np.where(x < half, -np.inf, x - half)
    masses = stats.norm.cdf(upper, loc, sigma) - stats.norm.cdf(lower, loc, sigma)
    return float(np.log(integrate.trapezoid(stats.norm.pdf(z) * masses.prod(1), z)))


@pytest.mark.parametrize("observes", ["density", "level"])
def test_bits_reach_the_integral_over_the_latent(observes: Any) -> None:
    likelihood = Gaussian(3, Fixed(0.15), spatial_dims=0, levels=LEVELS, observes=observes)
    vae = VAE(FlatNetwork(Guess(), Curve(), 1), likelihood).double()
    one = torch.tensor([[2, 1, 3]], dtype=torch.uint8)
    batches = Batches(InMemory(one.expand(400, -1)), Scaling(LEVELS), 400)
    vae.calibrate(batches)
    report = iwae(vae, batches, draws=128)
    evaluated = evaluate(vae, batches)
    refitted = float(likelihood.scale.level_log_scale.exp())
    assert abs(math.log(refitted / 0.15)) > 0.1
    for name, sigma in (("bits_per_dim", 0.15), ("bits_per_dim_post_hoc", refitted)):
        truth = -log_mass_by_quadrature(one.numpy() / (LEVELS - 1), sigma) / (3 * math.log(2))
        measured = report[f"iwae_{name}"]
        assert measured["mean"] == pytest.approx(truth, abs=4 * measured["standard_error"] + 1e-3)
        assert report["by_draws"][f"iwae_{name}"][0] > truth + 0.05
        assert evaluated[name]["mean"] > truth + 0.05
    if observes == "level":
        assert report["iwae_nats"]["mean"] == pytest.approx(-report["iwae_bits_per_dim"]["mean"] * 3 * math.log(2))


# -- any network, batch size, chunk and process ----------------------------------------------------------------------------


def images(n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def flat() -> VAE:
    return VAE(InDouble(mlp((1, 4, 4), 1, latent_dim=3, width=8)), Gaussian(1, Fixed(0.3)))


def ladder() -> VAE:
    network = hierarchical((1, 4, 4), 2, latent_dim=2, width=8, plan="4,4d2/2x2,4m2")
    return VAE(InDouble(network), Gaussian(1, PerPixel()))


def video() -> VAE:
    return VAE(InDouble(sequence((1, 8, 8), 1, latent_dim=2, width=2)), Gaussian(1, Optimal()))


NETWORKS: dict[str, tuple[Callable[[], VAE], tuple[int, ...]]] = {
    "flat": (flat, (1, 4, 4)),
    "ladder": (ladder, (1, 4, 4)),
    "video": (video, (4, 1, 8, 8)),
}


def model_and_data(name: str, n: int) -> tuple[VAE, Callable[..., Batches]]:
    """A model whose weights are random, calibrated on its data."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    vae, store = make().double().eval(), InMemory(images(n, shape))
    vae.calibrate(Batches(store, Scaling(256), n))

    def batches(size: int, **arguments: int) -> Batches:
        return Batches(store, Scaling(256), size, **arguments)

    return vae, batches


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_the_bound_of_its_draws(name: str) -> None:
    vae, batches = model_and_data(name, 6)
    report = iwae(vae, batches(6), draws=3, seed=2)
    batch = next(iter(batches(6)))
    noise = keyed_noise(batch.positions, 2)
    inferences = [vae.network.infer(batch.x, noise=noise) for _ in range(3)]
    likelihood, dims = vae.likelihood, int(inferences[0].target[0].numel())
    truths = {
        "iwae_nats": lambda h, x: likelihood(h).log_prob(x),
        "iwae_post_hoc_nats": lambda h, x: likelihood.distribution(h, refitted=True).log_prob(x),
        "iwae_bits_per_dim": likelihood.log_mass,
        "iwae_bits_per_dim_post_hoc": lambda h, x: likelihood.log_mass(h, x, refitted=True),
    }
    for measure, log_p in truths.items():
        with torch.no_grad():
            log_weights = [log_p(i.h, i.target).reshape(6, -1).sum(1) + i.log_ratio for i in inferences]
        truth = float(special.logsumexp(torch.stack(log_weights).numpy(), axis=0).mean() - math.log(3))
        truth = -truth / (dims * math.log(2)) if "bits" in measure else truth
        assert report[measure]["mean"] == pytest.approx(truth, rel=1e-9)
    first = score(vae, batches(6), seed=2)
    assert report["by_draws"]["iwae_nats"][0] == pytest.approx(float((first.log_likelihood + first.log_ratio).mean()), rel=1e-9)


def everything(vae: VAE, batches: Batches) -> dict[str, float]:
    scores = {name: value.tolist() for name, value in score(vae, batches)._asdict().items() if value is not None}
    return numbers(
        [scores, iwae(vae, batches, draws=3), oracle(vae, batches), evaluate(vae, batches), calibration(vae, batches)]
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_no_bound_depends_on_the_batch_size(name: str) -> None:
    vae, batches = model_and_data(name, 11)
    whole = everything(vae, batches(256))
    assert whole["/0/rate/10"] > 0
    for size in (1, 7):
        assert everything(vae, batches(size)) == pytest.approx(whole, rel=1e-6, abs=1e-6)


def test_no_number_depends_on_how_many_draws_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw_data(20)
    reports = []
    for features in (1, 20 * DIM * 3, 10**9):
        monkeypatch.setattr(bounds, "FEATURES", features)
        reports.append(numbers(iwae(PROPOSALS[1].vae(), batches_of(x), draws=8, measures=["iwae_nats"])))
    assert reports[0] == pytest.approx(reports[1], rel=1e-9)
    assert reports[0] == pytest.approx(reports[2], rel=1e-9)


PROCESSES, EXAMPLES, BATCH = 2, 13, 5
"""Shares of 2 and 3 of each batch, and of 1 and 2 of the last one."""


def all_reports(share: dict[str, int]) -> dict[str, dict[str, float]]:
    ladder, batches = model_and_data("ladder", EXAMPLES)
    mine = batches(BATCH, **share)
    layers = VAE(copy.deepcopy(ladder.network.inner).float(), ladder.likelihood)
    linear, data = PROPOSALS[1].vae(Optimal()), draw_data(EXAMPLES)
    linear.calibrate([data])
    of_data = batches_of(data, BATCH, **share)
    return {
        "linear": everything(linear, of_data) | numbers(evaluate(linear, of_data, of_data), "training"),
        "information": numbers(information(linear, of_data, of_data)),
        "ladder": numbers([iwae(ladder, mine, draws=3), score(ladder, mine).kl.tolist(), calibration(ladder, mine)]),
        "layers": numbers(information(layers, mine, mine)),
    }


def one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    torch.save(all_reports({"rank": rank, "world_size": PROCESSES}), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    on_processes(PROCESSES, one_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(PROCESSES)]
    for name, alone in all_reports({}).items():
        tolerance = 1e-5 if name == "layers" else 1e-6  # the only one in float32
        assert ranks[0][name] == pytest.approx(alone, rel=tolerance, abs=tolerance)
        assert ranks[1][name] == ranks[0][name]


def test_a_share_without_its_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="share of one of 2 processes, but there are 1"):
        iwae(EXACT.vae(), batches_of(draw_data(4), rank=0, world_size=2), draws=1, measures=["iwae_nats"])
    with pytest.raises(ValueError, match="share of one of 2 processes, but there are 1"):
        calibration(EXACT.vae(), batches_of(draw_data(4), rank=0, world_size=2))


def test_scores_come_in_the_order_of_the_split() -> None:
    vae, x = EXACT.vae(Optimal()), draw_data(12)
    vae.calibrate([x])
    ordered, shuffled = (score(vae, batches_of(x, 5, shuffle=shuffle, seed=1)) for shuffle in (False, True))
    assert torch.equal(ordered.log_likelihood, shuffled.log_likelihood)
    assert torch.equal(ordered.kl, shuffled.kl)


# -- the oracle σ ----------------------------------------------------------------------------------------------------------


@final
class Constant(nn.Module):
    """The same for all: a posterior that is N(0, 1), or features that are 0."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1)


@pytest.mark.parametrize("scale", [Optimal, lambda: Fixed(1.0), lambda: Shared(0.2)])
@pytest.mark.parametrize("ratio", [0.7, 1.02, 1.3, 2.1])
def test_the_leak_is_that_of_the_formula(scale: Callable[[], Scale], ratio: float) -> None:
    """Residuals are the data themselves."""
    random, dims = np.random.default_rng(0), 5
    training, test = (torch.from_numpy(random.standard_normal((200, dims))).float() for _ in range(2))
    test *= math.sqrt(ratio * float(training.square().mean() / test.square().mean()))
    vae = VAE(FlatNetwork(Constant(2), Constant(dims), 1), Gaussian(dims, scale(), spatial_dims=0, levels=None)).double()
    vae.calibrate([training])
    before = copy.deepcopy(vae.state_dict())
    report = oracle(vae, batches_of(test, 64))
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
    truth = dims / 2 * (ratio - 1 - math.log(ratio))
    assert report["leak_nats"]["mean"] == pytest.approx(truth, rel=1e-2)
    assert report["leak_formula_nats"] == pytest.approx(truth, rel=1e-4, abs=1e-6)
    assert report["mse_over_variance"] == pytest.approx(ratio, rel=1e-5)
    best = -dims / 2 * (math.log(2 * math.pi * float(test.double().square().mean())) + 1)
    assert report["oracle_nats"]["mean"] == pytest.approx(best, abs=1e-5)
    assert not [name for name in numbers(report) if "elbo" in name or "bits" in name]


def test_the_formula_speaks_of_one_sigma_of_a_gaussian_density_alone() -> None:
    x = images(20, (4,))
    batches = Batches(InMemory(x), Scaling(256), 20)
    for likelihood in (
        StudentT(4, spatial_dims=0),
        Gaussian(4, PerPixel(), spatial_dims=0),
        Gaussian(4, Optimal(per="channel"), spatial_dims=0),
        Gaussian(4, spatial_dims=0, observes="level"),
    ):
        torch.manual_seed(0)
        vae = VAE(mlp((4,), likelihood.in_channels, latent_dim=2, width=8), likelihood)
        vae.calibrate([next(iter(batches)).x * 0.5])
        report = oracle(vae, batches)
        assert report["leak_formula_nats"] is report["mse_over_variance"] is None
        assert report["leak_level_nats"]["mean"] > 0
        if likelihood.observes == "level":
            assert report["oracle_nats"] == report["oracle_level_nats"]


def test_where_sigma_is_at_its_floor_there_is_no_formula() -> None:
    """Residuals, again, are the data: a thousandth at most, below the floor."""
    dims, test = 3, 1e-3 * torch.rand(50, 3)
    likelihood = Gaussian(dims, Optimal(floor=0.01), spatial_dims=0, levels=None)
    vae = VAE(FlatNetwork(Constant(2), Constant(dims), 1), likelihood).double()
    vae.calibrate([torch.full((10, dims), 0.1)])
    report = oracle(vae, batches_of(test))
    assert report["leak_formula_nats"] is report["mse_over_variance"] is None
    assert report["leak_nats"]["mean"] == pytest.approx(dims * math.log(10), rel=2e-3)  # but for the residuals' own squares


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_what_has_no_bound_is_refused() -> None:
    x = images(4, (1, 4, 4))
    batches = Batches(InMemory(x), Scaling(256), 4)
    bernoulli = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), Bernoulli(1))
    with pytest.raises(ValueError, match="is an objective, not a likelihood"):
        iwae(bernoulli, batches)
    with pytest.raises(ValueError, match="has no σ"):
        oracle(bernoulli, batches)
    vae = EXACT.vae()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        iwae(vae, batches_of(draw_data(4)), draws=0)
    for measures in (["iwae_bits_per_dim"], ["elbo"], []):
        with pytest.raises(ValueError, match=r"one or more of iwae_nats, iwae_post_hoc_nats \(there are bits only"):
            iwae(vae, batches_of(draw_data(4)), measures=measures)


# -- Probabilistic PCA, against scipy's Gaussians, exact bins, and a VAE whose ELBO it is ------------------------------

CASES = {  # examples, dims, latents, offset, spread
    "tall": (500, 6, 2, 0.0, 1.0),
    "one direction": (500, 6, 1, 5.0, 1.0),
    "as many as dims": (500, 6, 6, 0.0, 1.0),
    "more than dims": (500, 6, 9, 0.0, 1.0),
    "wide": (20, 50, 7, 0.0, 1.0),
    "far from zero": (500, 6, 2, 1e4, 1.0),
    "small": (500, 6, 2, 0.0, 1e-4),
}


def drawn(n: int, dims: int, offset: float = 0.0, spread: float = 1.0) -> torch.Tensor:
    random = np.random.default_rng(0)
    x = random.standard_normal((n, dims)) @ np.diag(0.7 ** np.arange(dims)) @ random.standard_normal((dims, dims))
    return torch.from_numpy(offset + spread * x)


def reference(x: np.ndarray, latents: int) -> stats._multivariate.multivariate_normal_frozen:
    """The Gaussian of Tipping and Bishop, by NumPy's singular values."""
    mean = x.mean(0)
    _, singular, rows = np.linalg.svd(x - mean)
    variances = np.zeros(x.shape[1])
    variances[: len(singular)] = singular**2 / len(x)
    latents = min(latents, len(mean) - 1, len(x) // 2)
    rest = variances[latents:].mean()
    return stats.multivariate_normal(mean, rows.T @ np.diag([*variances[:latents], *[rest] * (len(mean) - latents)]) @ rows)


@pytest.mark.parametrize(("n", "dims", "latents", "offset", "spread"), CASES.values(), ids=CASES)
def test_the_density_is_that_of_scipy(n, dims, latents, offset, spread):
    x = drawn(n, dims, offset, spread)
    fitted = principal(lambda: x.split(170), latents)
    np.testing.assert_allclose(fitted.log_prob(x), reference(x.numpy(), latents).logpdf(x.numpy()), rtol=1e-6, atol=1e-6)


def test_the_leading_part_is_that_of_the_whole_covariance(monkeypatch):
    x = drawn(300, 200)
    whole = principal(lambda: [x], 10)
    monkeypatch.setattr(module, "EXACT_DIMS", 50)
    leading = principal(lambda: x.split(64), 10)
    torch.testing.assert_close(leading.variances, whole.variances, rtol=1e-6, atol=0)
    torch.testing.assert_close(leading.log_prob(x), whole.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x", [torch.ones(5, 3), torch.ones(1, 3)], ids=["constant", "one example"])
def test_data_without_variance_have_none(x):
    assert principal(lambda: [x], 2) is None
    assert ppca(_untrained(3), batches_of(x), batches_of(x), 2) is None


def test_the_elbo_of_the_best_linear_vae_is_this_density():
    training, held_out = draw_data(20_000), draw_data(4000, seed=1)
    vae = EXACT.vae()
    vae.calibrate(batches_of(training))
    bound = ppca(vae, batches_of(training), batches_of(held_out), LATENT)
    assert bound.components == LATENT < DIM
    assert bound.log_likelihood_nats.mean == pytest.approx(exact_log_likelihood(held_out.numpy()).mean(), abs=0.005)
    elbo = evaluate(vae, batches_of(held_out)).elbo_nats
    assert bound.log_likelihood_nats.mean == pytest.approx(elbo.mean, abs=4 * elbo.standard_error)


def _untrained(dims: int, levels: int | None = None) -> VAE:
    return VAE(mlp((dims,), dims, latent_dim=2, width=8), Gaussian(dims, spatial_dims=0, levels=levels, mean="identity"))


def levels_of(n: int, dims: int, levels: int) -> torch.Tensor:
    x = drawn(n, dims)
    x = (x - x.min()) / (x.max() - x.min())
    return (x * (levels - 1)).round().to(torch.uint8)


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_the_bits_bound_the_probability_of_bins(levels):
    """Bins of two dimensions, integrated by scipy under the same Gaussian."""
    stored = levels_of(300, 2, levels)
    batches = Batches(InMemory(stored), Scaling(levels=levels), batch_size=100)
    bound = ppca(_untrained(2, levels), batches, batches, 1)
    x, distance = stored.double().numpy() / (levels - 1), 1 / (levels - 1)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    covariance = vectors @ np.diag(values + distance**2 / 12) @ vectors.T
    gaussian = stats.multivariate_normal(x.mean(0), covariance)
    bins = [gaussian.cdf(row + distance / 2, lower_limit=row - distance / 2) for row in x]
    exact = -np.mean(np.log2(bins)) / 2
    assert exact <= bound.bits_per_dim.mean + 1e-6
    assert bound.bits_per_dim.mean == pytest.approx(exact, abs=0.3 if levels < 256 else 0.01)


def test_nats_are_in_the_units_of_the_data():
    x = drawn(400, 3)
    scaling = Scaling(mean=(1.0, 2.0, 3.0), deviation=(10.0, 0.1, 5.0))
    own = ppca(_untrained(3), batches_of(x.float()), batches_of(x.float()), 3)
    scaled = Batches(InMemory(x.float()), scaling, batch_size=64)
    again = ppca(_untrained(3), scaled, scaled, 3)  # with as many latents as dims, a Gaussian of any covariance
    assert again.log_likelihood_nats.mean == pytest.approx(own.log_likelihood_nats.mean, abs=1e-3)


def test_precision_has_the_trace_of_the_inverse():
    fitted = Principal(torch.zeros(5).double(), torch.eye(5).double()[:, :2], torch.tensor([4.0, 2.0]).double(), 0.5)
    assert fitted.trace_of_precision == pytest.approx(1 / 4 + 1 / 2 + 3 / 0.5)
    assert fitted.widened(1.0).trace_of_precision == pytest.approx(1 / 5 + 1 / 3 + 3 / 1.5)


def test_a_model_behind_the_linear_one_is_told_so(tmp_path, capsys):
    from sigma_vae.cli import main

    run = str(tmp_path / "run")
    assert main(["train", "digits", "--out", run, "--network", "mlp", "--start", "random", "--max-steps", "20"]) == 0
    said = capsys.readouterr().out
    assert "pPCA" in said
    assert "under-trained" in said
