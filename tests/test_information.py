"""Laws of the information estimators: closed forms of Gaussian codes, all pairs of codes by SciPy, quadrature, saturation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import batches_of, encoder_vae
from scipy import integrate, special, stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sigma_vae import VAE, Fixed, Gaussian, hierarchical, sequence
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation import information as module
from sigma_vae.evaluation.bounds import iwae
from sigma_vae.evaluation.information import information
from sigma_vae.networks.hierarchical import Diagonal, draw
from sigma_vae.priors import GaussianPrior, StandardNormal
from sigma_vae.types import Inference, Maps, Network, Prior
from sigma_vae.vae import keyed_noise

DIM = 5
COVARIANCE = np.diag([4.0, 2.0, 1.0, 0.5, 0.1])
GAINS = {
    "few nats": np.array([[0.4, 0.3, 0.0, 0.0, 0.1], [0.0, -0.2, 0.5, 0.5, 0.0]]),
    "more nats": np.array([[1.0, 0.8, 0.0, 0.0, 0.3], [0.3, -0.7, 1.5, 1.0, 0.0]]),
}
DEVIATION = np.array([0.6, 0.9])


def gaussian_data(n: int, seed: int = 0) -> Tensor:
    """Whose mean is 0 and whose covariance is the one above, exactly: then so are the codes' moments."""
    x = np.random.default_rng(seed).standard_normal((n, DIM))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T @ np.sqrt(COVARIANCE)
    return torch.from_numpy(x).float()


def closed_forms(gain: np.ndarray, deviation: np.ndarray) -> tuple[float, float]:
    """Mutual information of x and z, and KL(q(z)‖N(0, I))."""
    of_means = gain @ COVARIANCE @ gain.T
    aggregate = of_means + np.diag(deviation**2)
    mutual = 0.5 * (np.linalg.slogdet(aggregate)[1] - 2 * np.log(deviation).sum())
    marginal = 0.5 * (np.trace(aggregate) - len(gain) - np.linalg.slogdet(aggregate)[1])
    return float(mutual), float(marginal)


@pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
def test_the_rate_falls_into_its_closed_forms(gain: np.ndarray) -> None:
    mutual, marginal = closed_forms(gain, DEVIATION)
    vae = encoder_vae(gain, DEVIATION)
    report = information(vae, batches_of(gaussian_data(3000)), batches_of(gaussian_data(3000, seed=1)))
    mean_kl = report["mean_kl_nats"]["mean"]
    assert mean_kl == pytest.approx(mutual + marginal, abs=0.01)
    assert report["marginal_kl_moments_nats"] == pytest.approx(marginal, abs=0.01)
    assert mean_kl - report["marginal_kl_moments_nats"] == pytest.approx(mutual, abs=0.01)
    held_out = report["marginal_kl_held_out_nats"]
    assert marginal - 0.1 < held_out["mean"] < marginal + 4 * held_out["standard_error"]
    best = max(report["marginal_kl_moments_nats"], held_out["mean"])
    assert report["marginal_kl_at_least_nats"] == best
    assert report["mutual_information_at_most_nats"] == pytest.approx(mean_kl - best, abs=1e-9)
    bracket = report["log_sum_exp"]
    assert bracket["mutual_information_at_least_nats"] - 0.08 < mutual < bracket["mutual_information_at_most_nats"] + 0.08
    for one, other in (("least", "most"), ("most", "least")):
        parts = bracket[f"mutual_information_at_{one}_nats"] + bracket[f"marginal_kl_at_{other}_nats"]
        assert parts == pytest.approx(mean_kl, abs=1e-6)


def test_the_bracket_is_what_scipy_says_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    n, gain = 120, GAINS["more nats"]
    x = gaussian_data(n)
    vae = encoder_vae(gain, DEVIATION)
    mean = x.double().numpy() @ gain.T
    z = mean + DEVIATION * keyed_noise(torch.arange(n), 4)(torch.Size([n, 2])).double().numpy()
    pairs = stats.norm.logpdf(z[:, None], mean, DEVIATION).sum(-1)
    own, others = pairs.diagonal(), np.where(np.eye(n, dtype=bool), -np.inf, pairs)
    at_least = (own - special.logsumexp(pairs, axis=1)).mean() + math.log(n)
    at_most = (own - special.logsumexp(others, axis=1)).mean() + math.log(n - 1)
    for chunk in (1, 7 * n, 10**6):
        monkeypatch.setattr(module, "CHUNK", chunk)
        bracket = information(vae, batches_of(x, 50), batches_of(x), seed=4)["log_sum_exp"]
        assert bracket["mutual_information_at_least_nats"] == pytest.approx(at_least, abs=1e-9)
        assert bracket["mutual_information_at_most_nats"] == pytest.approx(at_most, abs=1e-9)
        assert bracket["log_n_nats"] == math.log(n)


def test_standard_errors_are_those_of_other_test_examples() -> None:
    """Of many independent test sets the estimates spread as one of them says; the fitted densities are the same."""
    vae, training = encoder_vae(GAINS["more nats"], DEVIATION), batches_of(gaussian_data(2000, seed=1))
    random = np.random.default_rng(2)
    sets = [torch.from_numpy(random.standard_normal((200, DIM)) @ np.sqrt(COVARIANCE)).float() for _ in range(60)]
    reports = [information(vae, batches_of(x), training, seed=i) for i, x in enumerate(sets)]
    for place in ("", "log_sum_exp"):
        found = [report[place] if place else report for report in reports]
        assert found[0].standard_errors
        for name in found[0].standard_errors:
            spread = np.std([each[name] for each in found], ddof=1)
            said = np.mean([each.standard_errors[name] for each in found])
            assert 0.65 < said / spread < 1.5, (place, name)
    rows = {row.name: row for row in module.InformationMetric("information").rows(reports[0])}
    at_most = rows["mutual_information_at_most_nats (in expectation)"]
    assert at_most.standard_error == f"{reports[0].standard_errors['mutual_information_at_most_nats']:.4f}"


def test_a_report_without_standard_errors_is_read() -> None:
    """As versions before this one wrote it."""
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    content = information(vae, batches_of(x), batches_of(x)).to_json()
    del content["standard_errors"], content["log_sum_exp"]["standard_errors"]
    report = module.Information.from_json(content)
    assert report.to_json() == content
    assert all(row.value for row in module.InformationMetric("information").rows(report))


def test_the_bracket_saturates_and_the_certified_bound_does_not() -> None:
    n, gain, deviation = 400, 2 * np.eye(DIM)[:4], np.full(4, 1e-3)
    mutual, marginal = closed_forms(gain, deviation)
    report = information(encoder_vae(gain, deviation), batches_of(gaussian_data(n)), batches_of(gaussian_data(n, seed=1)))
    bracket = report["log_sum_exp"]
    assert mutual > math.log(n) + 10
    assert math.log(n) - 1e-6 < bracket["mutual_information_at_least_nats"] <= math.log(n) + 1e-9
    assert bracket["mutual_information_at_most_nats"] > mutual + 100  # worthless, too
    assert report["mutual_information_at_most_nats"] == pytest.approx(mutual, abs=0.2)
    assert report["marginal_kl_at_least_nats"] == pytest.approx(marginal, abs=0.2)


def test_of_two_clusters_the_held_out_density_knows_more_than_the_moments() -> None:
    """Against an integral of the aggregate posterior, a mixture of two Gaussians."""
    n, deviation = 2000, np.array([0.3])
    x = (torch.arange(n, dtype=torch.float32) % 2 * 4 - 2)[:, None]
    report = information(encoder_vae(np.ones((1, 1)), deviation), batches_of(x), batches_of(x))
    z = np.linspace(-6, 6, 20_001)
    q = 0.5 * (stats.norm.pdf(z, -2, 0.3) + stats.norm.pdf(z, 2, 0.3))
    truth = integrate.trapezoid(special.xlogy(q, q) - q * stats.norm.logpdf(z), z)
    held_out = report["marginal_kl_held_out_nats"]
    assert truth - 0.05 < held_out["mean"] < truth + 4 * held_out["standard_error"]
    assert report["marginal_kl_moments_nats"] < truth - 0.5
    assert report["marginal_kl_at_least_nats"] == held_out["mean"]


def test_a_fitted_prior_is_the_one_that_counts() -> None:
    gain = GAINS["more nats"]
    mutual, _ = closed_forms(gain, DEVIATION)
    vae, training = encoder_vae(gain, DEVIATION), gaussian_data(3000, seed=1)
    vae.fit_prior([training], GaussianPrior(2).double())
    report = information(vae, batches_of(gaussian_data(3000)), batches_of(training))
    assert report["marginal_kl_moments_nats"] is None
    assert report["mean_kl_nats"]["mean"] == pytest.approx(mutual, abs=0.05)
    assert 0 <= report["marginal_kl_at_least_nats"] < 0.05
    assert report["mutual_information_at_most_nats"] == pytest.approx(mutual, abs=0.05)


def test_training_codes_do_not_share_the_noise_of_test_codes() -> None:
    """Codes that are noise alone: a density that had seen the noise of the test codes would know them."""
    vae = encoder_vae(np.zeros((2, DIM)), np.ones(2))
    held_out = information(vae, batches_of(gaussian_data(300)), batches_of(gaussian_data(300, seed=1)))[
        "marginal_kl_held_out_nats"
    ]
    assert held_out["mean"] < 2 * held_out["standard_error"]


def test_no_bound_is_negative() -> None:
    """Where codes are those of the prior, what little was fitted to training codes is worse than it."""
    gain, deviation = np.zeros((2, DIM)), np.ones(2)
    report = information(encoder_vae(gain, deviation), batches_of(gaussian_data(300)), batches_of(gaussian_data(100, seed=1)))
    assert report["marginal_kl_held_out_nats"]["mean"] < 0
    assert 0 <= report["marginal_kl_at_least_nats"] < 1e-9
    assert report["mutual_information_at_most_nats"] == pytest.approx(0, abs=1e-9)


def test_few_examples_do_not_raise_the_bounds() -> None:
    """Where q(z) is the prior, but the moments of 40 of its codes are not those of it."""
    x, training = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (40, 4000))
    report = information(
        encoder_vae(math.sqrt(0.9) * np.eye(8), np.full(8, math.sqrt(0.1))), batches_of(x), batches_of(training)
    )
    spread = np.cov(x.numpy().T, bias=True)
    of_themselves = 0.9 * spread + 0.1 * np.eye(8)
    assert 0.5 * (np.trace(of_themselves) - 8 - np.linalg.slogdet(of_themselves)[1]) > 0.2
    assert report["marginal_kl_moments_nats"] < 0.02
    assert report["marginal_kl_at_least_nats"] < 0.02


def test_few_training_codes_give_no_density() -> None:
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    assert information(vae, batches_of(x), batches_of(x[:2]))["marginal_kl_held_out_nats"] is None
    assert information(vae, batches_of(x), batches_of(x[:3]))["marginal_kl_held_out_nats"] is not None


def test_of_many_examples_evenly_spaced_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian_data(250)
    vae = encoder_vae(GAINS["few nats"], DEVIATION)
    whole = information(vae, batches_of(x), batches_of(x))
    monkeypatch.setattr(module, "MOST_LATENTS", 100)
    report = information(vae, batches_of(x), batches_of(x))
    chosen = x[torch.arange(100) * 5 // 2]
    truth = kl_divergence(vae.encode(chosen), Normal(0.0, 1.0)).sum(1).mean()
    assert (whole["examples"], report["examples"]) == (250, 100)
    assert report["mean_kl_nats"]["mean"] == pytest.approx(truth.item(), rel=1e-6)
    assert report["active_units"] == whole["active_units"]


def test_of_many_training_examples_a_part_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced: of sorted data some of all sorts."""
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(250)
    part = information(vae, batches_of(x), batches_of(x[torch.arange(100) * 5 // 2]))
    monkeypatch.setattr(module, "MOST_TRAINING_LATENTS", 100)
    for share in ({}, {"size": 7}, {"size": 99}):
        report = information(vae, batches_of(x), batches_of(x, **share))
        assert report["marginal_kl_held_out_nats"] == pytest.approx(part["marginal_kl_held_out_nats"], rel=1e-9)


@pytest.mark.parametrize(("variance", "active"), [(0.0099, 0), (0.0101, 1)])
def test_a_unit_is_active_where_its_mean_varies_by_a_hundredth(variance: float, active: int) -> None:
    gain = np.zeros((2, DIM))
    gain[0, 2] = math.sqrt(variance)  # of data of variance 1
    vae, x = encoder_vae(gain, DEVIATION), gaussian_data(200)
    vae.calibrate([x])
    assert information(vae, batches_of(x), batches_of(x))["active_units"] == active
    assert evaluate(vae, batches_of(x, 33))["active_units"] == active


# -- networks of a user ----------------------------------------------------------------------------------------------------


class Own(Network):
    """Latents as maps, and a prior that is a part of the network, N(0, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(DIM, 2 * 4)
        self.decoder = nn.Linear(4, DIM)

    @property
    def latents(self) -> Maps:
        return Maps(1, 2, 2)

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        mean, log_std = self.encoder(x.flatten(1)).reshape(-1, 2, 1, 2, 2).unbind(1)
        return Normal(mean, log_std.exp())

    def decode(self, z: Any, condition: Tensor | None = None) -> Tensor:
        features: Tensor = self.decoder(z.flatten(1))
        return features

    def infer(self, x: Tensor, *given: Any, noise: Any = None, **others: Any) -> Inference:
        posterior = self.posterior(x)
        unit = torch.randn_like(posterior.loc) if noise is None else noise(posterior.loc.shape)
        z = posterior.loc + posterior.scale * unit
        prior = Normal(0.0, 1.0)
        log_ratio = (prior.log_prob(z) - posterior.log_prob(z)).flatten(1).sum(1)
        return Inference(self.decode(z), x, kl_divergence(posterior, prior).flatten(1).sum(1, keepdim=True), log_ratio)

    def generate(self, n: int, *given: Any, generator: Any = None, **others: Any) -> Tensor:
        return self.decode(torch.randn(n, 4, generator=generator))


class OwnWithPrior(Own):
    """The same, with the prior where others find it."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = Flattened(4)


class Flattened(Prior):
    """N(0, I) over maps."""

    is_standard = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = StandardNormal(size)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.inner.log_prob(z.flatten(1))

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        return self.inner.kl(Normal(posterior.loc.flatten(1), posterior.scale.flatten(1)), z.flatten(1))

    def sample(self, n: int, generator: Any = None, temperature: float = 1.0) -> Tensor:
        return self.inner.sample(n, generator, temperature)


def test_a_network_of_ones_own_has_information_whether_or_not_it_keeps_its_prior() -> None:
    reports, x = [], gaussian_data(300)
    for make in (Own, OwnWithPrior):
        torch.manual_seed(0)
        vae = VAE(make(), Gaussian(DIM, Fixed(0.3), spatial_dims=0, levels=None))
        vae.calibrate([x])
        evaluated = evaluate(vae, batches_of(x), batches_of(x))
        report = information(vae, batches_of(x, 64), batches_of(x))
        assert report.mean_kl_nats.mean == pytest.approx(evaluated.rate_nats.mean, rel=1e-5)
        assert (report.latent_dim, report.active_units) == (4, evaluated.active_units)
        assert iwae(vae, batches_of(x), draws=4, measures=["iwae_nats"]).iwae_nats.mean > evaluated.elbo_nats.mean - 0.5
        reports.append(report)
    assert reports[0].marginal_kl_moments_nats is None  # nobody knows that its prior is N(0, I)
    assert reports[1].marginal_kl_moments_nats is not None
    assert reports[0].marginal_kl_held_out_nats.mean == pytest.approx(reports[1].marginal_kl_held_out_nats.mean, abs=1e-4)
    first, second = (report.log_sum_exp.to_json() for report in reports)
    assert first.pop("standard_errors") == pytest.approx(second.pop("standard_errors"), abs=1e-5)
    assert first == pytest.approx(second, abs=1e-5)


# -- layers of latents -----------------------------------------------------------------------------------------------------


def ladder_and_images(n: int = 30) -> tuple[VAE, Batches]:
    torch.manual_seed(0)
    likelihood = Gaussian(1, Fixed(0.3))
    vae = VAE(hierarchical((1, 8, 8), 1, latent_dim=2, width=8, plan="8,8d2,4,4d2/2,4m2,8m4"), likelihood)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = Batches(InMemory(images), Scaling(256), 7)
    vae.calibrate(batches)
    return vae, batches


def test_the_layers_of_a_ladder_sum_to_its_rate() -> None:
    vae, batches = ladder_and_images()
    report, evaluated = information(vae, batches, batches, seed=3), evaluate(vae, batches, seed=3)
    assert sum(report["kl_per_layer_nats"]) == pytest.approx(report["mean_kl_nats"], abs=1e-9)
    assert report["mean_kl_nats"] == pytest.approx(evaluated["rate_nats"]["mean"], rel=1e-5)
    assert report["kl_per_layer_nats"] == pytest.approx(evaluated["kl_per_layer_nats"], rel=1e-5)
    assert report["latents_per_layer"] == [2 * 2 * 2, 2 * 4 * 4, 2 * 8 * 8]


def test_a_layer_that_says_nothing_has_no_active_latents() -> None:
    vae, batches = ladder_and_images()
    last = vae.network.decoder[1].posterior[-1]
    with torch.no_grad():
        last.weight.zero_()  # the posterior is N(0, 1), as every prior is at first
        last.bias[1] = math.sqrt(2 * 0.02)  # 0.02 nats at each place of one channel
        vae.network.decoder[2].posterior[-1].weight.zero_()
        vae.network.decoder[2].posterior[-1].bias[0] = math.sqrt(2 * 0.005)  # not enough
    report = information(vae, batches, batches)
    assert report["active_latents_per_layer"][1:] == [4 * 4, 0]
    assert report["kl_per_layer_nats"][1:] == pytest.approx([16 * 0.02, 64 * 0.005], rel=1e-4)


def test_the_kl_of_a_latent_is_that_of_its_gaussians() -> None:
    values = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    found = draw(Diagonal(values[0], values[1]), Diagonal(values[2], values[3]), values[4])
    torch.testing.assert_close(
        found.latent_kl, kl_divergence(Normal(values[0], values[1].exp()), Normal(values[2], values[3].exp()))
    )


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_other_latents_and_a_single_code_are_refused() -> None:
    clips = torch.zeros(2, 4, 1, 8, 8)
    video: Any = VAE(sequence((1, 8, 8), 1, latent_dim=2, width=2), Gaussian(1, Fixed(0.3)))
    with pytest.raises(ValueError, match=r"SequenceNetwork defines neither posterior\(x\)"):
        information(video, batches_of(clips), batches_of(clips))
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    with pytest.raises(ValueError, match="at least two test examples"):
        information(vae, batches_of(x[:1]), batches_of(x))
