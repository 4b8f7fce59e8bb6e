"""Probabilistic PCA, against scipy's Gaussians, exact bins, and a VAE whose ELBO it is."""

import numpy as np
import pytest
import torch
from linear_gaussian import DIM, EXACT, LATENT, batches_of, draw_data, exact_log_likelihood
from scipy import stats

from sigma_vae import VAE, Gaussian, mlp
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation.bounds import ppca
from sigma_vae.networks import principal as module
from sigma_vae.networks.principal import Principal, principal

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
