"""Laws of the priors: densities, draws, KL, fits; truth is SciPy's, a sum over a grid, or a model whose marginal is known."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, special, stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from sigma_vae import VAE, Fixed, FlatNetwork, Gaussian, Optimal, hierarchical, mlp, models, runs
from sigma_vae.cli import main
from sigma_vae.config import ModelConfig, RunConfig, read
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.priors import FittedPrior, FlowPrior, GaussianPrior, MixturePrior, StandardNormal, flow
from sigma_vae.priors.gaussian import best_prior
from sigma_vae.runs import evaluate
from sigma_vae.types import Batch, Prior
from sigma_vae.types import fitted as fit_to
from sigma_vae.vae import SEED_OFFSET, keyed_noise, standard_prior

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-1.5, 0.0], [1.0, 1.2], [1.2, -1.0]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.25, -0.2], [-0.2, 0.3]]])

PRIORS: dict[str, Callable[[int], Prior]] = {
    "standard": StandardNormal,
    "gaussian": GaussianPrior,
    "mixture:3": lambda latent_dim: MixturePrior(latent_dim, 3),
    "mixture": MixturePrior,
    "flow": FlowPrior,
}
FITTED = [name for name in PRIORS if name != "standard"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, and a flow that is trained for a moment: its laws hold wherever it stops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "STEPS", 20)
        patch.setattr(flow, "LOOK_EVERY", 10)
        yield
    torch.set_num_threads(threads)


def clusters(n: int, seed: int) -> Tensor:
    """Draws from three known Gaussians, ``(n, 2)`` in float64."""
    random = np.random.default_rng(seed)
    which = random.choice(3, n, p=WEIGHTS)
    factors = np.linalg.cholesky(COVARIANCES)
    return torch.from_numpy(MEANS[which] + np.einsum("nij,nj->ni", factors[which], random.standard_normal((n, 2))))


def mixture_density(z: np.ndarray, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """SciPy's, of a mixture of Gaussians, in nats."""
    parts = [stats.multivariate_normal.logpdf(z, mean, cov) for mean, cov in zip(means, covariances, strict=True)]
    return special.logsumexp(np.stack(parts) + np.log(weights)[:, None], axis=0)


def fitted(name: str, codes: Tensor, held_out: Tensor, seed: int = 0) -> Prior:
    prior = PRIORS[name](codes.shape[1]).to(codes.dtype)
    if isinstance(prior, FittedPrior):
        prior.fit(codes, held_out, seed)
    return prior


@pytest.fixture(scope="module", params=PRIORS)
def prior(request: pytest.FixtureRequest) -> Prior:
    return fitted(request.param, clusters(3000, seed=0), clusters(1000, seed=1))


# -- densities and draws ---------------------------------------------------------------------------------------------------

SIDE = np.linspace(-7, 7, 281)
STEP = SIDE[1] - SIDE[0]


@torch.no_grad()
def on_grid(prior: Prior) -> np.ndarray:
    grid = torch.from_numpy(np.stack(np.meshgrid(SIDE, SIDE, indexing="ij"), -1))
    return prior.log_prob(grid).exp().numpy()


def test_a_density_sums_to_one(prior: Prior) -> None:
    assert on_grid(prior).sum() * STEP**2 == pytest.approx(1, abs=1e-3)


def test_draws_have_the_density(prior: Prior) -> None:
    draws = prior.sample(4000, torch.Generator().manual_seed(1)).numpy()
    density = on_grid(prior) * STEP**2
    for axis in (0, 1):
        cdf = density.sum(1 - axis).cumsum()
        assert stats.kstest(draws[:, axis], lambda z, cdf=cdf: np.interp(z, SIDE + STEP / 2, cdf)).pvalue > 1e-3
    product = np.prod(draws, axis=1)
    expected = (density * SIDE[:, None] * SIDE).sum()
    assert abs(product.mean() - expected) < 4 * product.std() / math.sqrt(len(draws))


def base_noise(prior: Prior, z: Tensor) -> Tensor:
    """What a draw was made of, up to an affine map that is the same for all temperatures."""
    return prior.transform()(prior.moments.whiten(z)) if isinstance(prior, FlowPrior) else z


@torch.no_grad()
def test_the_generator_decides_and_the_temperature_scales_the_noise(prior: Prior) -> None:
    def draw(temperature: float = 1.0, seed: int = 3) -> Tensor:
        return prior.sample(50, torch.Generator().manual_seed(seed), temperature)

    before = torch.get_rng_state()
    cold, warm, half = (base_noise(prior, draw(temperature)) for temperature in (0.0, 1.0, 0.5))
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(half - cold, 0.5 * (warm - cold))
    assert (warm - cold).std() > 0.1
    points = prior.components if isinstance(prior, MixturePrior) else 1
    assert points is not None
    assert len(draw(0.0).round(decimals=6).unique(dim=0)) <= points


def test_a_cold_mixture_gives_its_means_as_often_as_it_should() -> None:
    prior = fitted("mixture:3", clusters(3000, seed=0), clusters(1000, seed=1))
    assert isinstance(prior, MixturePrior)
    draws = prior.sample(5000, torch.Generator().manual_seed(0), temperature=0.0)
    counts = [(draws == mean).all(-1).sum().item() for mean in prior.means]
    assert stats.chisquare(counts, 5000 * prior.log_weights.exp().numpy()).pvalue > 1e-3


POSTERIOR = Normal(
    torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.5, 0.2]]).double(), torch.tensor([[1.0, 1.0], [0.1, 0.3], [0.5, 0.05]]).double()
)


@torch.no_grad()
def test_kl_is_the_mean_of_the_log_ratio(prior: Prior) -> None:
    torch.manual_seed(0)
    z = POSTERIOR.sample((5_000,))
    log_ratio = POSTERIOR.log_prob(z).sum(-1) - prior.log_prob(z)
    kl = prior.kl(POSTERIOR, z).expand(log_ratio.shape)
    error = (kl - log_ratio).std(0) / math.sqrt(len(z))
    assert ((kl - log_ratio).mean(0).abs() < 4 * error).all()
    # A single draw says more than the log-ratio does, wherever the posterior is narrow.
    assert kl[:, 1:].var(0).mean() < log_ratio[:, 1:].var(0).mean()


def test_kl_from_a_gaussian_is_that_of_torch_and_of_a_sum_over_a_grid() -> None:
    prior = fitted("gaussian", clusters(3000, seed=0), clusters(10, seed=1))
    kl = prior.kl(POSTERIOR, torch.full_like(POSTERIOR.loc, math.nan))  # no draw is needed
    assert isinstance(prior, GaussianPrior)
    full = MultivariateNormal(POSTERIOR.loc, POSTERIOR.scale.square().diag_embed())
    torch.testing.assert_close(kl, kl_divergence(full, MultivariateNormal(prior.mean, scale_tril=prior.scale_tril)))
    covariance = (prior.scale_tril @ prior.scale_tril.T).numpy()
    first = stats.multivariate_normal(POSTERIOR.loc[0].numpy(), np.eye(2))
    grid = np.stack(np.meshgrid(SIDE, SIDE, indexing="ij"), -1)
    log_ratio = first.logpdf(grid) - stats.multivariate_normal.logpdf(grid, prior.mean.numpy(), covariance)
    by_grid = integrate.trapezoid(integrate.trapezoid(first.pdf(grid) * log_ratio, SIDE), SIDE)
    assert float(kl[0]) == pytest.approx(by_grid, abs=1e-6)


def test_a_mixtures_density_is_scipys() -> None:
    codes = clusters(3000, seed=0)
    prior = fitted("mixture:3", codes, codes)
    assert isinstance(prior, MixturePrior)
    covariances = (prior.scale_trils @ prior.scale_trils.mT).numpy()
    truth = mixture_density(codes.numpy(), prior.log_weights.exp().numpy(), prior.means.numpy(), covariances)
    np.testing.assert_allclose(prior.log_prob(codes).numpy(), truth, rtol=1e-6)
    np.testing.assert_allclose(prior.float().log_prob(codes.float()).numpy(), truth, atol=1e-4)


# -- fits ------------------------------------------------------------------------------------------------------------------


def test_a_known_aggregate_posterior_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "STEPS", 80)
    held_out = clusters(5000, seed=2)
    truth = mixture_density(held_out.numpy(), WEIGHTS, MEANS, COVARIANCES).mean()
    densities = {}
    for name in FITTED:
        prior = fitted(name, clusters(6000, seed=0), clusters(2000, seed=1))
        densities[name] = float(prior.log_prob(held_out).mean())
        if name == "mixture":
            assert isinstance(prior, MixturePrior)
            assert prior.components is not None
            assert prior.components > 1
    assert densities["mixture:3"] == pytest.approx(truth, abs=0.01)
    assert densities["mixture"] == pytest.approx(truth, abs=0.02)
    assert truth > densities["flow"] > densities["gaussian"] + 0.1


def test_codes_of_a_gaussian_need_one_component() -> None:
    torch.manual_seed(0)
    codes = torch.randn(4000, 3).double() @ torch.tensor([[2.0, 0.5, 0.0], [0.0, 0.1, 0.0], [0.0, 0.3, 1.0]]).double() + 3
    prior = fitted("mixture", codes[:3000], codes[3000:])
    assert isinstance(prior, MixturePrior)
    assert prior.components == 1
    gaussian = fitted("gaussian", codes[:3000], codes[3000:])
    torch.testing.assert_close(prior.log_prob(codes), gaussian.log_prob(codes), atol=0.01, rtol=0)


def test_a_gaussian_has_the_moments_of_the_codes() -> None:
    codes = clusters(500, seed=0)
    prior = GaussianPrior(2).double()
    prior.fit(codes)
    np.testing.assert_allclose(prior.mean.numpy(), codes.numpy().mean(0))
    np.testing.assert_allclose((prior.scale_tril @ prior.scale_tril.T).numpy(), np.cov(codes.numpy().T, bias=True))


@pytest.mark.parametrize("name", FITTED)
def test_codes_in_single_precision_and_of_unequal_spreads_are_fitted(name: str) -> None:
    torch.manual_seed(0)
    codes = torch.randn(600, 6) * torch.tensor([1.0, 1.0, 1e-2, 1.0, 1e-2, 3.0]) + 20 * (torch.arange(600) % 2)[:, None]
    prior = fitted(name, codes, codes)
    assert prior.log_prob(codes).dtype == torch.float32
    assert bool(prior.log_prob(codes).isfinite().all())
    assert prior.sample(3).dtype == torch.float32


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_repeats_and_leaves_the_global_generator_alone(name: str) -> None:
    codes, held_out = clusters(400, seed=0), clusters(100, seed=1)
    before = torch.get_rng_state()
    first, again, other = (fitted(name, codes, held_out, seed).log_prob(codes) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "gaussian")


def test_a_flow_needs_no_held_out_codes_no_gradients_and_only_one_latent() -> None:
    codes = clusters(400, seed=0)[:, :1]
    prior = FlowPrior(1).double()
    with torch.no_grad():
        prior.fit(codes)
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    side = torch.linspace(-8, 8, 4001).double()
    assert float(prior.log_prob(side[:, None]).exp().sum() * (side[1] - side[0])) == pytest.approx(1, abs=1e-3)


CHECKED = """
import sys
from torch.distributions import Normal
from sigma_vae.priors import FlowPrior

FlowPrior(2)
assert "zuko" in sys.modules
Normal(0.0, -1.0)
"""


def test_torch_still_checks_arguments_of_distributions() -> None:
    """In a process of its own: torch.compile, too, switches the checks off in the one that it is used in."""
    ended = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "constraint GreaterThan" in ended.stderr


@pytest.mark.parametrize("name", FITTED)
def test_an_unfitted_prior_is_of_no_use_until_it_is_loaded(name: str) -> None:
    codes = clusters(500, seed=0)
    made = fitted(name, codes, codes)
    fresh = MixturePrior(2, made.components).double() if isinstance(made, MixturePrior) else PRIORS[name](2).double()
    for use in (lambda: fresh.log_prob(codes), lambda: fresh.sample(2), lambda: fresh.kl(POSTERIOR, POSTERIOR.loc)):
        with pytest.raises(ValueError, match="is not fitted yet; fit it to latents"):
            use()
    fresh.load_state_dict(copy.deepcopy(fresh).state_dict())
    with pytest.raises(ValueError, match="is not fitted yet"):
        fresh.sample(2)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.log_prob(codes), made.log_prob(codes))
    assert torch.equal(copy.deepcopy(fresh).log_prob(codes), made.log_prob(codes))


CODES = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no latents": (lambda: GaussianPrior(0), "at least 1; got 0"),
    "no components": (lambda: MixturePrior(2, 0), "components counts the Gaussians"),
    "another size": (lambda: GaussianPrior(3).fit(CODES), r"latents are \(n, 3\), one row per example; got \(50, 2\)"),
    "not a table": (lambda: FlowPrior(2).fit(CODES[0]), r"got \(2,\)"),
    "too few for a covariance": (lambda: GaussianPrior(2).fit(CODES[:2]), "needs at least 3 examples, got 2"),
    "too few for the components": (lambda: MixturePrior(2, 60).fit(CODES), "needs at least 60 examples, got 50"),
    "not finite": (lambda: MixturePrior(2, 1).fit(CODES.log()), "got NaN or infinity"),
    "in a plane": (lambda: GaussianPrior(2).fit(CODES[:, :1].expand(-1, 2)), "lie in a plane"),
    "nothing to choose by": (lambda: MixturePrior(2).fit(CODES), "give held_out"),
    "another size held out": (lambda: MixturePrior(2).fit(CODES, CODES[:, :1]), r"got \(50, 1\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str) -> None:
    make, says = MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        make()


# -- in a model ------------------------------------------------------------------------------------------------------------

DIM, NOISE = 5, 0.4


def linear_vae(prior: Prior | None = None) -> VAE:
    """X = A z + b + noise, with an encoder of its own: its bound is far from tight."""
    torch.manual_seed(0)
    encoder = nn.Linear(DIM, 4)
    network = FlatNetwork(encoder, nn.Linear(2, DIM), 2, prior)
    with torch.no_grad():
        encoder.weight[2:] *= 0.1
        network.decoder.weight *= 2
    return VAE(network, Gaussian(DIM, Fixed(NOISE), spatial_dims=0, levels=None)).double().eval()


def as_mixture(prior: Prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and covariances of a prior that is one of Gaussians."""
    if isinstance(prior, MixturePrior):
        return prior.log_weights.exp().numpy(), prior.means.numpy(), (prior.scale_trils @ prior.scale_trils.mT).numpy()
    assert isinstance(prior, GaussianPrior)
    return np.ones(1), prior.mean.numpy()[None], (prior.scale_tril @ prior.scale_tril.T).numpy()[None]


@pytest.mark.parametrize("name", ["gaussian", "mixture:3"])
@torch.no_grad()
def test_the_elbo_bounds_the_known_marginal_and_importance_weights_give_it(name: str) -> None:
    vae = linear_vae(fitted(name, clusters(2000, seed=0), clusters(500, seed=1)))
    a, b = vae.network.decoder.weight.numpy(), vae.network.decoder.bias.numpy()
    weights, means, covariances = as_mixture(vae.network.prior)
    x = torch.from_numpy(clusters(3, seed=3).numpy() @ a.T + b + NOISE * np.random.default_rng(0).standard_normal((3, DIM)))
    log_likelihood = mixture_density(x.numpy(), weights, means @ a.T + b, a @ covariances @ a.T + NOISE**2 * np.eye(DIM))
    draws = 40_000
    inference = vae.network.infer(x.repeat(draws, 1))
    fits = vae.likelihood(inference.h).log_prob(inference.target)
    elbo = (fits - inference.kl.sum(-1)).reshape(draws, -1)
    assert (elbo.mean(0).numpy() < log_likelihood - 0.05).all()
    log_weights = (fits + inference.log_ratio).reshape(draws, -1)
    estimate, size = special.logsumexp(log_weights.numpy(), axis=0) - math.log(draws), draws
    relative = (log_weights - torch.from_numpy(estimate)).exp()
    assert (relative.var(0) / size).sqrt().max() < 0.1  # or it would say nothing
    np.testing.assert_allclose(estimate, log_likelihood, atol=float(4 * (relative.var(0) / size).sqrt().max()))


@torch.no_grad()
def test_a_fitted_prior_that_is_standard_changes_nothing() -> None:
    prior = GaussianPrior(2).double()
    prior.load_state_dict({"mean": torch.zeros(2), "scale_tril": torch.eye(2)})
    x = torch.randn(20, DIM).double()
    ours, usual = (linear_vae(p).network.infer(x, noise=keyed_noise(torch.arange(20))) for p in (prior, None))
    torch.testing.assert_close(ours.kl, usual.kl)
    torch.testing.assert_close(ours.log_ratio, usual.log_ratio)


def image_vae(latent_dim: int = 3) -> VAE:
    torch.manual_seed(0)
    likelihood = Gaussian(1, Optimal())
    vae = VAE(mlp((1, 4, 4), likelihood.in_channels, latent_dim, width=16), likelihood)
    vae.calibrate([images(30)])
    return vae


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FITTED)
def test_fitting_the_prior_changes_nothing_else(name: str) -> None:
    vae = image_vae().train()
    vae.network.decoder.eval()  # a part that was frozen
    before, modes = copy.deepcopy(vae.state_dict()), [part.training for part in vae.network.decoder.modules()]
    vae.fit_prior([images(200)], models.prior(name, 3), [images(60, seed=1)], seed=2)
    after = vae.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".")[1] for key in after.keys() - before.keys()} == {"prior"}
    assert vae.training
    assert vae.network.encoder.training
    assert [part.training for part in vae.network.decoder.modules()] == modes
    x, posterior = images(200), vae.encode(images(200))
    draws = posterior.loc + posterior.scale * keyed_noise(torch.arange(200), seed=2 + SEED_OFFSET)(posterior.loc.shape)
    gain = vae.network.prior.log_prob(draws) - StandardNormal(3).log_prob(draws)
    assert gain.mean() > 0
    assert vae.sample(5).shape == (5, 1, 4, 4)
    assert vae.elbo(x).total.shape == (200,)


def test_codes_do_not_depend_on_the_batches() -> None:
    x, means = images(50), []
    positions = torch.arange(50)
    loaders = ([x], x.split(7), [(part, part) for part in x.split(7)], [Batch(x.flip(0), positions.flip(0))])
    for loader in loaders:
        vae = image_vae()
        vae.fit_prior(loader, GaussianPrior(3))
        prior = vae.network.prior
        assert isinstance(prior, GaussianPrior)
        means.append(prior.mean)
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0])


def test_what_cannot_be_fitted_leaves_the_prior_that_was() -> None:
    vae = image_vae()
    for loader, prior, says in (
        ([images(3)], GaussianPrior(3), "at least 4 examples"),
        ([], GaussianPrior(3), "gave no batch"),
        ([images(30)], GaussianPrior(4), r"latents are \(n, 4\)"),
        ([images(30)], MixturePrior(3), "give held_out"),
    ):
        with pytest.raises(ValueError, match=says):
            vae.fit_prior(loader, prior)
        assert isinstance(vae.network.prior, StandardNormal)
    ladder = VAE(hierarchical((1, 4, 4), 1, plan="4,4d4/1,4m1"), Gaussian(1))
    with pytest.raises(ValueError, match="no single layer of flat latents"):
        ladder.fit_prior([images(30)], GaussianPrior(3))


# -- names and saved models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_a_saved_model_has_its_prior(name: str, tmp_path) -> None:
    config = ModelConfig("mlp", latent_dim=3, width=16, prior=name)
    vae = models.vae(config, (1, 4, 4), Scaling(256))
    assert isinstance(vae.network.prior, StandardNormal)  # what it is trained with
    vae.calibrate([images(30)])
    if name != "standard":
        made = models.prior(name, 3)
        vae.fit_prior([images(200)], made, [images(60, seed=1)])
        vae.network.replace_prior(made)  # a simpler one may have been better
    models.save(tmp_path / "model", vae, config, (1, 4, 4), Scaling(256))
    saved = models.load(tmp_path / "model")
    found = vae.network.prior
    assert saved.config.prior == (f"mixture:{found.components}" if isinstance(found, MixturePrior) else name)
    ours, theirs = (v.sample(6, generator=torch.Generator().manual_seed(0)) for v in (vae.eval(), saved.vae))
    assert torch.equal(ours, theirs)
    ours, theirs = (v.elbo(images(9), noise=keyed_noise(torch.arange(9))).total for v in (vae, saved.vae))
    assert torch.equal(ours, theirs)


def test_a_users_own_prior_has_no_name(tmp_path) -> None:
    class Own(Prior):
        log_prob = kl = sample = None  # type: ignore[assignment]

    config = ModelConfig("mlp", latent_dim=3, width=16)
    vae = models.vae(config, (1, 4, 4), Scaling(256))
    vae.network.replace_prior(Own())
    with pytest.raises(ValueError, match="Own has no name"):
        models.save(tmp_path / "model", vae, config, (1, 4, 4), Scaling(256))


@pytest.mark.parametrize(
    ("network", "name", "says"),
    [
        ("mlp", "mixtur", "did you mean 'mixture'"),
        ("mlp", "standrad", "did you mean 'standard'"),
        ("mlp", "gaussian:3", "gaussian takes nothing after a colon"),
        ("mlp", "mixture:", "takes a number of components, got .*as in mixture:20"),
        ("mlp", "mixture:0", "takes a number of components"),
        ("mlp", "mixture:two", "takes a number of components"),
        ("hierarchical:4,4d4/1,4m1", "mixture", "single layer of flat latents, which hierarchical:4,4d4/1,4m1 does not have"),
        ("hierarchical:4,4d4/1,4m1", "standrad", "did you mean 'standard'"),
    ],
)
def test_a_prior_that_cannot_be_is_refused_with_the_model(network: str, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.vae(ModelConfig(network, prior=name), (1, 4, 4), Scaling(256))


@pytest.mark.parametrize("seed", [0, 7])
def test_codes_share_no_noise_with_each_other_or_with_an_evaluation(seed: int) -> None:
    """Posteriors that know nothing are noise alone: with shared noise, held-out latents would be the fitted ones."""
    vae = image_vae()
    with torch.no_grad():
        for parameter in vae.network.encoder[-1].parameters():
            parameter.zero_()
    for prior in (MixturePrior(3, 20), MixturePrior(3)):
        vae.fit_prior([images(300)], prior, [images(300, seed=1)], seed)
        with torch.no_grad():
            assert vae.elbo(images(300, seed=2), noise=keyed_noise(torch.arange(300), seed)).rate.mean() > -0.01
    assert prior.components == 1


LATENTS = {  # latents that a richer prior does not describe better than a simpler one
    "standard normal": lambda random, n, d: random.standard_normal((n, d)),
    "correlated": lambda random, n, d: random.standard_normal((n, d)) @ np.linalg.qr(random.standard_normal((d, d)))[0] * 2,
    "two clusters": lambda random, n, d: random.standard_normal((n, d)) + 8 * random.integers(0, 2, (n, 1)),
    "narrow": lambda random, n, d: 0.01 * random.standard_normal((n, d)),
}


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize(
    ("prior", "n", "d"), [("mixture", 10, 3), ("mixture:5", 60, 2), ("gaussian", 40, 30), ("flow", 300, 8)]
)
def test_a_fitted_prior_is_never_worse_than_the_simple_ones_on_held_out_latents(kind, prior, n, d):
    from scipy import stats

    random = np.random.default_rng(0)
    draw = LATENTS[kind]
    latents, held_out = (torch.from_numpy(draw(random, size, d)) for size in (n, 500))
    made = models.prior(prior, d).double()
    made.fit(latents, held_out)
    best, densities = best_prior([made], latents, held_out)
    assert list(densities.values()) == sorted(densities.values(), reverse=True)
    found = float(best.log_prob(held_out).mean())
    assert found == pytest.approx(next(iter(densities.values())))
    assert found >= stats.norm.logpdf(held_out.numpy()).sum(1).mean() - 1e-9
    assert found >= float(made.log_prob(held_out).mean()) - 1e-9


def test_the_flow_gives_way_to_a_gaussian_on_gaussian_latents():
    generator = torch.Generator().manual_seed(0)
    latents, held_out = (torch.randn(n, 32, generator=generator) @ torch.diag(torch.linspace(0.3, 3, 32)) for n in (300, 2000))
    made = models.prior("flow", 32)
    made.fit(latents, held_out)
    best, densities = best_prior([made], latents, held_out)
    assert densities["FlowPrior"] <= densities[next(iter(densities))]
    assert float(best.log_prob(held_out).mean()) >= densities["moments"] - 1e-4


def test_latents_too_large_for_float32_are_told():
    latents = 1e39 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="is not finite"):
        fit_to(models.prior("gaussian", 2), latents, None, 0)


# -- Fitted priors of runs: trained with, fitted afterwards, taken back, and shown beside N(0, I) ----------------------

RESULTS = (
    "config.yaml",
    "evaluation.json",
    "model/model.json",
    "model/model.safetensors",
    "samples.png",
    "reconstructions.png",
)


@pytest.fixture(scope="module")
def fitted_run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of digits with a mixture fitted to it; tests read it."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    shutil.copytree(digits_run, folder)
    assert main(["fit-prior", str(folder), "--json", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_run, tmp_path / "run")
    return tmp_path / "run"


def report(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_fitted_prior_raises_the_bound_and_leaves_the_rest(digits_run: Path, fitted_run: Path) -> None:
    before, after = report(digits_run), report(fitted_run)
    assert after["prior"].startswith("mixture:")
    assert before["prior"] == "standard"
    assert after["standard_prior"] == {name: before[name] for name in after["standard_prior"]}
    assert after["elbo_nats"]["mean"] > before["elbo_nats"]["mean"]
    assert after["bits_per_dim"]["mean"] < before["bits_per_dim"]["mean"]
    assert after["distortion_nats"] == before["distortion_nats"]
    assert after["entropy_identity"] is None
    ours, theirs = (models.load(folder / "model").vae.state_dict() for folder in (digits_run, fitted_run))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_fitted_run_shows_samples_of_both_priors(digits_run: Path, fitted_run: Path) -> None:
    pictures = [
        np.asarray(Image.open(path))
        for path in (fitted_run / "samples.png", fitted_run / "samples-standard-prior.png", digits_run / "samples.png")
    ]
    np.testing.assert_array_equal(pictures[1], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    assert not (digits_run / "samples-standard-prior.png").exists()


def test_fitting_afterwards_is_training_with_the_prior(digits_config: RunConfig, run: Path, tmp_path: Path) -> None:
    config = replace(digits_config, model=replace(digits_config.model, prior="mixture:3"))
    trained = runs.train(config, tmp_path / "trained", progress=False)
    assert trained == runs.fit_prior(run, "mixture:3", device="cpu") == report(run)
    ours, theirs = contents(run), contents(tmp_path / "trained")
    for name in (*RESULTS, "samples-standard-prior.png"):
        assert ours[name] == theirs[name], name


def test_a_chosen_number_is_saved_and_chosen_again_in_a_replay(fitted_run: Path) -> None:
    chosen = report(fitted_run)["prior"]
    saved = models.load(fitted_run / "model")
    prior = saved.vae.network.prior
    assert isinstance(prior, MixturePrior)
    assert saved.config.prior == chosen == f"mixture:{prior.components}"
    assert read(fitted_run / "config.yaml", RunConfig).model.prior == "auto"


def test_back_to_the_standard_prior_everything_is_as_it_was(digits_run: Path, run: Path, capsys) -> None:
    assert main(["fit-prior", str(run), "--prior", "gaussian", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "N(0, I)" in said
    assert "gaussian" in said
    assert main(["fit-prior", str(run), "--prior", "standard", "--device", "cpu"]) == 0
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "N(0, I)" in line]
    assert "standard" not in header  # it is N(0, I): one column
    assert contents(run) == contents(digits_run)


def test_a_failure_on_the_way_leaves_the_run_as_it_was(digits_run: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError("no space left")

    for name in ("draw", "write_json", "write", "_exchange"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, name, fails)
            with pytest.raises(OSError, match="no space left"):
                runs.fit_prior(run, "gaussian", device="cpu")
        assert contents(run) == contents(digits_run), name
    (run / "model").rename(run / "model.before")  # as if killed between the two renames
    assert runs.fit_prior(run, "gaussian", device="cpu")["prior"] == "gaussian"
    assert not [path for path in run.iterdir() if path.name in ("model.before", "prior.new")]


@pytest.mark.parametrize("prior", ["fitted", "standard", None])
def test_samples_are_of_the_prior_that_is_asked_for(
    prior: str | None, digits_run: Path, fitted_run: Path, tmp_path: Path
) -> None:
    words = ["--n", "6", "--out", str(tmp_path / "a.npz"), "--device", "cpu"]

    def sampled(run: Path, *more: str) -> np.ndarray:
        assert main(["sample", str(run), *words, *more]) == 0
        with np.load(tmp_path / "a.npz") as file:
            return file["samples"]

    usual = sampled(digits_run)
    ours = sampled(fitted_run, *(["--prior", prior] if prior else []))
    assert np.array_equal(ours, usual) == (prior == "standard")


def test_samples_of_the_standard_prior_have_a_name_of_their_own(run: Path, capsys) -> None:
    assert main(["sample", str(run), "--prior", "standard"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "samples-standard-prior-0.png")


def test_the_standard_prior_is_there_only_for_a_while(fitted_run: Path) -> None:
    vae = models.load(fitted_run / "model").vae
    fitted = vae.network.prior
    with standard_prior(vae):
        assert isinstance(vae.network.prior, StandardNormal)
    assert vae.network.prior is fitted
    with pytest.raises(ValueError, match="show is"), standard_prior(vae):
        vae.sample(1, "neither")
    assert vae.network.prior is fitted


def test_a_model_from_before_there_were_priors_still_loads(run: Path) -> None:
    path = run / "model" / "model.json"
    description = json.loads(path.read_text())
    del description["model"]["prior"]
    path.write_text(json.dumps(description))
    saved = models.load(run / "model")
    assert saved.config.prior == "standard"
    assert isinstance(saved.vae.network.prior, StandardNormal)


MISTAKES_OF_RUNS = {
    "name": (["train", "digits", "--network", "mlp", "--prior", "mixtur"], "did you mean 'mixture'"),
    "number": (["train", "digits", "--network", "mlp", "--prior", "mixture:x"], "as in mixture:20"),
    "ladder": (["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--prior", "mixture"], "does not have"),
    "too many components": (["train", "digits", "--network", "mlp", "--prior", "mixture:2000"], "needs at least 2000 training"),
    "no run": (["fit-prior", "nowhere"], "holds no run"),
    "name afterwards": (["fit-prior", "RUN", "--prior", "flaw"], "did you mean 'flow'"),
    "too many afterwards": (["fit-prior", "RUN", "--prior", "mixture:2000"], "needs at least 2000 training"),
    "not fitted": (
        ["sample", "RUN", "--prior", "fitted", "--out", "a.png"],
        "has no fitted prior; fit one: sigma-vae fit-prior",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES_OF_RUNS)
def test_a_mistake_is_refused_before_anything_is_done(mistake: str, digits_run: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES_OF_RUNS[mistake]
    before = contents(digits_run)
    assert main([str(digits_run) if word == "RUN" else word for word in words]) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert contents(digits_run) == before


def test_a_ladder_takes_no_fitted_prior_afterwards(tmp_path, capsys) -> None:
    words = ["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--width", "8", "--max-steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    before = contents(tmp_path / "run")
    assert main(["fit-prior", str(tmp_path / "run")]) == 1
    assert "single layer of flat latents" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
    assert main(["sample", str(tmp_path / "run"), "--prior", "fitted"]) == 1
    assert "leave --prior out" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), "--prior", "standard", "--n", "2"]) == 0


def test_a_resumed_run_is_given_its_prior_anew(digits_config: RunConfig, tmp_path: Path) -> None:
    model = ModelConfig("mlp", latent_dim=2, width=8, prior="gaussian")
    config = replace(digits_config, model=model, training=replace(digits_config.training, epochs=1, start="random"))
    first = runs.train(config, tmp_path / "run", progress=False)
    second = runs.resume(tmp_path / "run", epochs=2, progress=False)
    assert first["prior"] == second["prior"] == "gaussian"
    assert first["standard_prior"] != second["standard_prior"]


def test_sigma_and_calibration_do_not_ask_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, batches = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=4), Gaussian(1, levels=None)), torch.rand(4, 16, 1, 4, 4)
    held_out = Batches(InMemory(batches[0]), Scaling(), 16)
    vae.calibrate(batches)
    sigma, measured = vae.likelihood.sigma(), calibration(vae, held_out).to_json()
    vae.fit_prior(batches, GaussianPrior(2))
    prior = vae.network.prior
    monkeypatch.setattr(GaussianPrior, "kl", None)
    monkeypatch.setattr(GaussianPrior, "log_prob", None)
    vae.calibrate(batches)
    assert vae.likelihood.sigma() == sigma
    assert calibration(vae, held_out).to_json() == measured
    assert vae.network.prior is prior
