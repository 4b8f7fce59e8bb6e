"""Counts: probabilities are scipy's, a solved dispersion is the maximum of scipy's likelihood, sparse data stay sparse."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy import optimize, special, stats
from torch import Tensor

from sigma_vae import (
    VAE,
    Fixed,
    Gaussian,
    Multinomial,
    NegativeBinomial,
    Optimal,
    PerPixel,
    Poisson,
    ZeroInflatedNegativeBinomial,
    mlp,
    models,
    runs,
)
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import as_batches, as_splits, load
from sigma_vae.data.inspect import inspect
from sigma_vae.data.stores import Sparse
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.likelihoods.counts import NegativeBinomialCounts

RANDOM = np.random.default_rng(0)
MEANS = np.exp(np.linspace(-4, 6, 7))
SIGMA = 0.7
NAMES = (
    "poisson poisson:library multinomial negative-binomial/fixed:0.7 negative-binomial/optimal negative-binomial/optimal-channel"
    " negative-binomial:library/optimal negative-binomial/per-pixel negative-binomial/per-image negative-binomial/shared"
    " zero-inflated-negative-binomial/optimal zero-inflated-negative-binomial:library/per-pixel"
).split()


def nbinom(mean: np.ndarray, sigma: float | np.ndarray) -> stats.rv_discrete:
    """scipy's, with variance μ + σ²μ²."""
    return stats.nbinom(1 / np.square(sigma), 1 / (1 + np.square(sigma) * mean))


def log_prob(name: str, k: np.ndarray, h: np.ndarray) -> np.ndarray:
    """scipy's word on rows of counts, for features as wide as the data (and logits of zeros)."""
    if name == "poisson":
        return stats.poisson.logpmf(k, np.exp(h)).sum(1)
    if name == "poisson:library":
        return stats.poisson.logpmf(k, special.softmax(h, 1) * k.sum(1, keepdims=True)).sum(1)
    if name == "multinomial":
        return stats.multinomial.logpmf(k, k.sum(1), special.softmax(h, 1))
    if name == "negative-binomial":
        return nbinom(np.exp(h), SIGMA).logpmf(k).sum(1)
    means, logits = np.split(h, 2, 1)
    counted = special.log_expit(-logits) + nbinom(np.exp(means), SIGMA).logpmf(k)
    return np.where(k == 0, np.logaddexp(special.log_expit(logits), counted), counted).sum(1)


LIKELIHOODS = {
    "poisson": lambda: Poisson(7),
    "poisson:library": lambda: Poisson(7, library=True),
    "multinomial": lambda: Multinomial(7),
    "negative-binomial": lambda: NegativeBinomial(7, Fixed(SIGMA)),
    "zero-inflated": lambda: ZeroInflatedNegativeBinomial(7, Fixed(SIGMA)),
}


def rows(n: int = 5, channels: int = 7, extra: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts, many zeros and a few large ones among them, and features."""
    random = np.random.default_rng(seed)
    h = random.normal(size=(n, channels + extra)) * 2
    k = random.poisson(np.exp(h[:, :channels]) * random.gamma(1, 1, (n, channels))).astype(float)
    k[0, :2] = 0, 1000
    return k, h


# -- probabilities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_prob_is_scipys(name: str) -> None:
    likelihood = LIKELIHOODS[name]()
    k, h = rows(extra=likelihood.in_channels - 7)
    x, features = torch.from_numpy(k), torch.from_numpy(h)
    truth = log_prob(name, k, h)
    np.testing.assert_allclose(likelihood(features).log_prob(x).numpy(), truth, rtol=1e-9)
    np.testing.assert_allclose(likelihood.log_mass(features, x).numpy(), truth, rtol=1e-9)
    np.testing.assert_allclose(likelihood(features.float()).log_prob(x).numpy(), truth, rtol=1e-5)
    np.testing.assert_allclose(likelihood(features.bfloat16()).log_prob(x).numpy(), truth, rtol=0.1)


@pytest.mark.parametrize("sigma", [1e-3, 0.05, 1.0, 7.0])
@pytest.mark.parametrize("mean", [1e-2, 3.0, 1e3, 1e6])
def test_single_counts_up_to_a_million_are_scipys_in_float32_too(mean: float, sigma: float) -> None:
    k = np.unique([0, 1, 2, 100, round(mean), 10**6]).astype(float)
    truth = nbinom(np.array(mean), sigma).logpmf(k)
    for dtype, tolerance in ((torch.float64, 2e-9), (torch.float32, 1e-5)):
        log_mean = torch.tensor(k * 0 + np.log(mean), dtype=dtype)
        ours = NegativeBinomialCounts(log_mean, torch.tensor(np.log(sigma), dtype=dtype), 1).element_log_prob(
            torch.tensor(k, dtype=dtype)
        )
        np.testing.assert_allclose(ours.double().numpy(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["poisson", "negative-binomial", "zero-inflated"])
def test_masses_sum_to_one_and_the_distribution_function_is_their_sum(name: str) -> None:
    likelihood = LIKELIHOODS[name]()
    h = torch.linspace(-3, 3, likelihood.in_channels, dtype=torch.float64)[None]
    k = torch.arange(20_000, dtype=torch.float64)[:, None].expand(-1, 7)
    p = likelihood(h)
    masses = p.element_log_prob(k).exp()
    torch.testing.assert_close(masses.sum(0), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-9)
    below, upto = p.element_cdf(k)
    torch.testing.assert_close(upto, masses.cumsum(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(below[1:], upto[:-1], rtol=0, atol=1e-9)
    assert not below[0].any()
    torch.testing.assert_close(p.mean[0], (masses * k).sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(p.variance[0], (masses * (k - p.mean).square()).sum(0), rtol=1e-5, atol=0)


def test_multinomial_masses_sum_to_one_and_each_count_is_binomial_given_those_before() -> None:
    total, likelihood = 6, Multinomial(3)
    h = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64)
    p = special.softmax(h.numpy()[0])
    k = torch.tensor([[a, b, total - a - b] for a in range(total + 1) for b in range(total + 1 - a)], dtype=torch.float64)
    assert likelihood(h).log_prob(k).exp().sum().item() == pytest.approx(1, abs=1e-12)
    below, upto = likelihood(h).element_cdf(k)
    first, second, _ = k.numpy().T
    np.testing.assert_allclose(upto[:, 0].numpy(), stats.binom.cdf(first, total, p[0]), atol=1e-12)
    np.testing.assert_allclose(below[:, 0].numpy(), stats.binom.cdf(first - 1, total, p[0]), atol=1e-12)
    np.testing.assert_allclose(upto[:, 1].numpy(), stats.binom.cdf(second, total - first, p[1] / (p[1] + p[2])), atol=1e-12)
    np.testing.assert_allclose(upto[:, 2].numpy(), 1)
    np.testing.assert_allclose(likelihood(h).element_log_prob(k).sum(1).numpy(), likelihood(h).log_prob(k).numpy())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_have_the_mean_and_the_variance(name: str) -> None:
    likelihood = LIKELIHOODS[name]().double()
    h = torch.linspace(-1, 2, likelihood.in_channels, dtype=torch.float64)[None]
    likelihood.typical_total.fill_(40.0)
    p = likelihood(h)
    draws = p.sample((20_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, draws.round())
    error = (draws.mean(0) - p.mean) / (p.variance / len(draws)).sqrt()
    assert error.abs().max() < 4.5
    assert likelihood(h[:0]).sample().shape == (0, *p.event_shape)
    torch.testing.assert_close(draws.var(0), p.variance, rtol=0.15, atol=0)
    if name == "multinomial":
        assert (draws.sum(-1) == 40).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_a_million_counts_and_extreme_features(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0, 1e6], [1e6, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for size in (1.0, 14.0, 1e4):
        likelihood = models.likelihood(name, 3, spatial_dims=0).train()
        h = (torch.linspace(-1, 1, 3 * likelihood.in_channels).reshape(3, -1) * size).to(dtype).requires_grad_()
        loss = likelihood(h, x).log_prob(x).sum()
        loss.backward()
        assert loss.isfinite()
        assert h.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    likelihood = models.likelihood(name, 4, spatial_dims=0).double()
    k, h = rows(channels=4, extra=likelihood.in_channels - 4)
    x, features = torch.from_numpy(k), torch.from_numpy(h).requires_grad_()
    likelihood.calibrate([(features.detach(), x)])
    likelihood.eval()
    assert torch.autograd.gradcheck(lambda h: likelihood(h).log_prob(x), (features,), rtol=1e-4)


# -- the dispersion --------------------------------------------------------------------------------------------------------


def best_log_sigma(k: np.ndarray, mean: np.ndarray, pi: float | np.ndarray = 0.0) -> float:
    """Where scipy's likelihood is largest."""

    def loss(log_sigma: float) -> float:
        masses = (1 - pi) * nbinom(mean, np.exp(log_sigma)).pmf(k) + pi * (k == 0)
        return -np.log(masses).sum()

    return float(optimize.minimize_scalar(loss, bounds=(-3, 2), method="bounded", options={"xatol": 1e-10}).x)


def drawn(sigma: np.ndarray, n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-means, and counts with these dispersions of the columns."""
    random = np.random.default_rng(seed)
    log_mean = random.normal(1.5, 1, (n, len(sigma)))
    shape = 1 / np.square(sigma)
    return log_mean, random.poisson(np.exp(log_mean) * random.gamma(shape, 1 / shape, (n, len(sigma)))).astype(float)


def test_the_solved_dispersion_is_the_maximum_of_scipys_likelihood() -> None:
    log_mean, k = drawn(np.array([0.3, 0.8, 1.5]))
    h, x = torch.from_numpy(log_mean), torch.from_numpy(k)
    one, each = NegativeBinomial(3).double(), NegativeBinomial(3, Optimal("channel")).double()
    for likelihood in (one, each):
        likelihood.calibrate([(h[:1000], x[:1000]), (h[1000:], x[1000:])])
    assert one.log_sigma().item() == pytest.approx(best_log_sigma(k, np.exp(log_mean)), abs=1e-6)
    for column, ours in enumerate(each.log_sigma().tolist()):
        assert ours == pytest.approx(best_log_sigma(k[:, column], np.exp(log_mean[:, column])), abs=1e-6)


def test_with_inflated_zeros_it_is_the_maximum_too() -> None:
    log_mean, k = drawn(np.array([0.8]))
    k[RANDOM.random(k.shape) < 0.3] = 0
    likelihood = ZeroInflatedNegativeBinomial(1).double()
    logit = np.full_like(log_mean, special.logit(0.3))
    likelihood.calibrate([(torch.from_numpy(np.concatenate([log_mean, logit], 1)), torch.from_numpy(k))])
    assert likelihood.log_sigma().item() == pytest.approx(best_log_sigma(k, np.exp(log_mean), 0.3), abs=1e-6)


def test_with_a_library_the_means_are_shares_of_each_rows_total() -> None:
    log_mean, k = drawn(np.array([0.8, 0.8, 0.8]))
    likelihood = NegativeBinomial(3, library=True).double()
    likelihood.calibrate([(torch.from_numpy(log_mean), torch.from_numpy(k))])
    means = special.softmax(log_mean, 1) * k.sum(1, keepdims=True)
    kept = k.sum(1) > 0
    assert likelihood.log_sigma().item() == pytest.approx(best_log_sigma(k[kept], means[kept]), abs=1e-6)
    assert likelihood.eval()(torch.from_numpy(log_mean[:1])).mean.sum().item() == pytest.approx(k.sum(1).mean())


def test_columns_with_few_counts_share_one_dispersion() -> None:
    log_mean, k = drawn(np.array([0.5, 0.5, 0.5, 0.5]))
    log_mean[:, 1:3], k[:, 1:3] = -6, RANDOM.random((len(k), 2)) < 0.003  # some ten counts above zero
    assert ((k[:, 1:3] > 0).sum(0) < 20).all()
    likelihood = NegativeBinomial(4, Optimal("channel")).double()
    likelihood.calibrate([(torch.from_numpy(log_mean), torch.from_numpy(k))])
    found = likelihood.log_sigma()
    assert found[1] == found[2]
    assert found[0] != found[3]
    assert found[0].item() == pytest.approx(best_log_sigma(k[:, 0], np.exp(log_mean[:, 0])), abs=1e-6)


def test_counts_that_vary_less_than_poissons_put_it_on_the_floor() -> None:
    likelihood = NegativeBinomial(2).double()
    likelihood.calibrate([(torch.full((50, 2), 5.0).double().log(), torch.full((50, 2), 5.0))])
    assert likelihood.sigma().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("per", ["batch", "channel", "pixel", "image"])
def test_training_solves_for_the_batch_and_evaluation_does_not_look(per: str) -> None:
    log_mean, k = drawn(np.array([0.6] * 4), 400)
    h, x = (torch.from_numpy(a).reshape(-1, 2, 2) for a in (log_mean, k))
    likelihood = NegativeBinomial(2, Optimal(per), spatial_dims=1).double()
    likelihood(h, x)
    stored = likelihood.eval()(h).log_sigma
    assert torch.equal(likelihood(h, x).log_sigma, stored)
    solved = likelihood.train()(h, x).log_sigma
    shape = {"batch": (1, 1), "channel": (2, 1), "pixel": (2, 2), "image": (400, 1, 1)}[per]
    assert tuple(solved.shape) == shape
    if per != "image":
        copy = NegativeBinomial(2, Optimal(per), spatial_dims=1).double()
        copy.calibrate([(h, x)])
        torch.testing.assert_close(solved, copy.log_sigma(), rtol=0, atol=1e-4)
        higher, here = likelihood.eval()(h).log_prob(x).sum(), NegativeBinomialCounts(h, solved + 0.1, 2).log_prob(x).sum()
        assert higher > here


def test_a_predicted_dispersion_is_refitted_by_one_factor() -> None:
    log_mean, k = drawn(np.array([0.9, 0.9]))
    raw = np.log(np.linspace(0.2, 0.4, len(k)))[:, None].repeat(2, 1)
    likelihood = NegativeBinomial(2, PerPixel()).double().eval()
    h, x = torch.from_numpy(np.concatenate([log_mean, raw], 1)), torch.from_numpy(k)
    likelihood.calibrate([(h, x)])
    refitted = likelihood.distribution(h, refitted=True)
    best = refitted.log_prob(x).sum()
    for shift in (-0.02, 0.02):
        assert NegativeBinomialCounts(refitted.log_rate, refitted.log_sigma + shift, 1).log_prob(x).sum() < best


# -- misuse ----------------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros(2, 3)
MISUSE = {
    "fractions": (lambda: Poisson(3)(ZEROS, ZEROS + 0.5), "expects counts"),
    "negative": (lambda: Poisson(3)(ZEROS, ZEROS - 1), "expects counts"),
    "NaN": (lambda: NegativeBinomial(3)(ZEROS, ZEROS * float("nan")), "expects counts"),
    "another shape": (lambda: Multinomial(3)(ZEROS, ZEROS[:, :2]), "data of shape"),
    "a density": (lambda: Poisson(3).distribution(ZEROS, observes="density"), "has no density"),
    "no dispersion yet": (lambda: NegativeBinomial(3).eval()(ZEROS), "no stored σ yet"),
    "a generator": (lambda: NegativeBinomial(3).calibrate(pair for pair in [(ZEROS, ZEROS)]), "not a generator"),
    "no data": (lambda: NegativeBinomial(3).calibrate([]), "no data to fit"),
    "broadcast counts": (lambda: Poisson(3)(ZEROS).log_prob(ZEROS[:, :1]), "would be broadcast"),
    "an argument": (lambda: models.likelihood("poisson:depth", 3), "after the colon comes library"),
    "a scale for poisson": (lambda: models.likelihood("poisson/optimal", 3), "takes no scale"),
    "levels": (lambda: models.likelihood("negative-binomial/optimal", 3, observes="level"), "leave observes out"),
    "diverged": (lambda: Poisson(3)(ZEROS * float("nan")).sample(), "cannot be drawn"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_a_value_error(name: str) -> None:
    misuse, message = MISUSE[name]
    with pytest.raises(ValueError, match=message) as told:
        misuse()
    assert "\n" not in str(told.value)


# -- models ----------------------------------------------------------------------------------------------------------------


def factors(n: int = 240, genes: int = 12, seed: int = 0) -> np.ndarray:
    """Counts of a low-rank negative binomial."""
    random = np.random.default_rng(seed)
    mean = np.exp(random.normal(size=(n, 2)) @ random.normal(size=(2, genes)) * 0.7 + random.normal(0.5, 1, genes))
    return random.poisson(mean * random.gamma(2, 0.5, mean.shape))


def test_the_encoder_reads_logarithms_and_the_start_knows_the_means() -> None:
    x = torch.from_numpy(factors()).float()
    seen: list[Tensor] = []
    likelihood = Poisson(12)
    vae = VAE(mlp((12,), likelihood.in_channels, latent_dim=2), likelihood)
    vae.network.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.equal(vae.network.infer(x).target, x)
    torch.testing.assert_close(seen[0], torch.log1p(x))
    vae.start_from([x])
    torch.testing.assert_close(vae.likelihood(vae.network.decode(torch.zeros(1, 2))).mean[0], x.mean(0), rtol=0.05, atol=0.05)


def test_other_likelihoods_leave_the_encoders_input() -> None:
    x = torch.rand(2, 3)
    assert Gaussian(3, spatial_dims=0).encoder_input(x) is x


@pytest.mark.parametrize("name", ["negative-binomial/optimal", "multinomial", "zero-inflated-negative-binomial/optimal"])
def test_a_model_that_draws_its_own_data_is_calibrated(name: str) -> None:
    """The randomised PIT of draws from p(x|z) is uniform, where the posterior says which z they are from."""
    likelihood = models.likelihood(name, 6, spatial_dims=0)
    vae = VAE(mlp((6,), likelihood.in_channels, latent_dim=1), likelihood).eval()
    with torch.no_grad():
        for parameter in vae.network.parameters():
            parameter.zero_()
        vae.network.decoder[-2].bias[:6] = torch.linspace(0, 2, 6)
    likelihood.typical_total.fill_(30)
    for kind in ("level",) if likelihood.has_scale else ():
        likelihood.scale.store(kind, torch.full((1,), -0.5))
    torch.manual_seed(0)
    data = as_splits(vae.sample(3000, "draw").numpy(), counts=True)
    found = calibration(vae, data.batches("train", 512)).level
    for percent, share in found.coverage.items():
        assert share.mean == pytest.approx(float(percent) / 100, abs=0.012)


# -- data ------------------------------------------------------------------------------------------------------------------


def test_sparse_rows_are_made_dense_by_the_batch_and_equal_the_dense_ones(tmp_path: Path) -> None:
    x = factors()
    scipy.sparse.save_npz(tmp_path / "sparse.npz", scipy.sparse.csc_matrix(x))
    np.savez(tmp_path / "dense.npz", x)
    sparse, dense = (load(DataConfig(str(tmp_path / f"{kind}.npz"), counts=True)) for kind in ("sparse", "dense"))
    assert isinstance(sparse.train, Sparse)
    assert sparse.train.matrix is sparse.test.matrix
    assert sparse.scaling == dense.scaling
    assert sparse.record["preprocessing"].startswith("sparse: ")
    for split in ("train", "validation", "test"):
        assert torch.equal(sparse.values(split), dense.values(split))
    assert len({sparse.store(split).fingerprint() for split in ("train", "validation", "test")}) == 3
    objects = as_splits(scipy.sparse.csr_matrix(x), counts=True)
    assert torch.equal(objects.values("test"), dense.values("test"))
    again = as_batches(scipy.sparse.csr_matrix(x), objects)
    assert torch.equal(next(iter(again)).x, torch.from_numpy(x[:128]).float())
    real = load(DataConfig(str(tmp_path / "sparse.npz")))
    assert real.scaling.standardised
    torch.testing.assert_close(real.values("train").mean(0), torch.zeros(12), atol=1e-5, rtol=0)


def annotated(x: np.ndarray, path: Path) -> None:
    import anndata
    import pandas as pd

    from sigma_vae.data.counts import _plain

    obs = _plain(pd.DataFrame({"batch": ["a", "b"] * (len(x) // 2)}, index=[f"cell{i}" for i in range(len(x))]))
    var = _plain(pd.DataFrame(index=[f"gene{i}" for i in range(x.shape[1])]))
    made = anndata.AnnData(scipy.sparse.csr_matrix(np.log1p(x)), obs=obs, var=var)
    made.layers["counts"] = scipy.sparse.csr_matrix(x.astype(np.float32))
    made.write_h5ad(path)


def test_an_h5ad_file_is_trained_on_and_gets_its_latents_back(tmp_path: Path) -> None:
    import anndata

    from sigma_vae.cli.outputs import encode

    x, path, out = factors(), tmp_path / "cells.h5ad", tmp_path / "run"
    annotated(x, path)
    config = RunConfig(
        DataConfig(str(path), layer="counts", exclude=("gene3",), condition=("batch",)),
        ModelConfig(likelihood="negative-binomial:library/optimal-channel", latent_dim=2, width=16),
        TrainingConfig(max_steps=4, logger=("csv",)),
    )
    report = runs.train(config, out, progress=False)
    assert report.bits_per_dim.mean == pytest.approx(-report.elbo_nats.mean / (11 * np.log(2)))
    assert runs.config_of(out).data.counts
    assert runs.open_model(out, "cpu").vae.network.conditions.only_classes.classes == ("a", "b")
    encode(str(out), out=str(tmp_path / "encoded.h5ad"), expression=True)
    found = anndata.read_h5ad(tmp_path / "encoded.h5ad")
    data = runs.open_run(out, "cpu").data
    assert list(found.obs_names) == data.names["test"].tolist()
    assert list(found.var_names) == [f"gene{i}" for i in range(12) if i != 3]
    assert found.obsm["X_sigma_vae"].shape == found.obsm["X_sigma_vae_std"].shape == (24, 2)
    np.testing.assert_array_equal(found.layers["counts"].toarray(), data.values("test").numpy())
    totals = np.asarray(found.layers["sigma_vae"].sum(1))
    np.testing.assert_allclose(totals, data.values("validation").sum(1).mean(), rtol=1e-4)
    encode(str(out), data=str(path), out=str(tmp_path / "all.h5ad"))
    assert anndata.read_h5ad(tmp_path / "all.h5ad").shape == x.shape
    assert json.loads((out / "model" / "model.json").read_text())["scaling"]["counts"]


@pytest.mark.parametrize("name", ["poisson", "negative-binomial/optimal"])
def test_tables_and_arrays_of_counts_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    x = factors(60, 4)
    np.savetxt(tmp_path / "a.csv", x, "%d", delimiter=",", header="a,b,c,d", comments="")
    np.save(tmp_path / "a.npy", x.astype(np.float64))
    found = [load(DataConfig(str(tmp_path / file), counts=True)) for file in ("a.csv", "a.npy")]
    assert torch.equal(found[0].values("train"), found[1].values("train"))
    model = models.vae(ModelConfig(likelihood=name, network="mlp"), found[0].shape, found[0].scaling)
    assert model.elbo(found[0].values("train")).total.isfinite().all()
    with pytest.raises(ValueError, match="no likelihood of counts"):
        models.vae(ModelConfig(network="mlp"), found[0].shape, found[0].scaling)
    with pytest.raises(ValueError, match="a likelihood of counts, and the data are no counts"):
        models.vae(ModelConfig(likelihood=name, network="mlp"), (4,), load(DataConfig(str(tmp_path / "a.csv"))).scaling)


REFUSED = {
    "fractions": (np.full((9, 2), 0.5), {}, "needs counts"),
    "negative": (np.full((9, 2), -1), {}, "needs counts"),
    "too large": (np.full((9, 2), 2**24), {}, "needs counts"),
    "NaN": (np.full((9, 2), np.nan), {}, "needs counts"),
    "sparse fractions": (scipy.sparse.csr_matrix(np.full((9, 2), 0.5)), {}, "needs counts"),
    "levels": (np.ones((9, 2)), {"levels": 3}, "does not go with levels"),
    "standardised": (np.ones((9, 2)), {"standardise": "yes"}, "does not go with standardise"),
    "clips": (np.ones((9, 3, 4, 4), np.uint8), {"layout": "n-t-h-w"}, "does not go with clips"),
    "a layer": (scipy.sparse.csr_matrix(np.ones((9, 2))), {"layer": "x"}, "says nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_count_is_refused(name: str) -> None:
    values, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as told:
        as_splits(values, counts=True, **options)
    assert "\n" not in str(told.value)


def test_broken_files_are_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"no such thing")
    matrix = scipy.sparse.csr_matrix(np.eye(9))
    matrix.indices[3] = 700
    scipy.sparse.save_npz(tmp_path / "a.npz", matrix)
    annotated(factors(10, 3), tmp_path / "b.h5ad")
    cases = {
        "a.h5ad": ({}, "cannot be read as an AnnData file"),
        "a.npz": ({}, "broken sparse matrix"),
        "b.h5ad": ({"layer": "no"}, "has no layer 'no', it has counts"),
        "./b.h5ad": ({"columns": ("gene9",)}, "has no column 'gene9'"),
        "../x.h5ad": ({}, "no such file"),
    }
    for file, (options, message) in cases.items():
        with pytest.raises(ValueError, match=message) as told:
            load(DataConfig(str(tmp_path / file), counts=True, **options))
        assert "\n" not in str(told.value)


def test_inspection_suggests_a_likelihood_of_counts() -> None:
    import pandas as pd

    counts = pd.DataFrame(factors(200, 5) * 3)
    assert inspect(as_splits(counts)).likelihood == "negative-binomial/optimal"
    assert inspect(as_splits(counts, counts=True)).likelihood == "negative-binomial/optimal"
    assert inspect(as_splits(counts + 0.5)).likelihood != "negative-binomial/optimal"
    assert inspect(as_splits(counts.clip(upper=9))).likelihood != "negative-binomial/optimal"
