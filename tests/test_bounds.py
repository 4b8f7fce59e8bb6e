"""Laws of importance-weighted bounds and of the oracle σ: a linear-Gaussian model, quadrature, and one process or many."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
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
from scipy import integrate, special, stats
from torch import Tensor, distributed, multiprocessing, nn

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
    sequence,
)
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import bounds, evaluate, score
from sigma_vae.evaluation.bounds import iwae, oracle
from sigma_vae.evaluation.calibration import calibration
from sigma_vae.evaluation.information import information
from sigma_vae.likelihoods.scales import Scale
from sigma_vae.vae import keyed_noise

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
def test_no_number_depends_on_the_batch_size(name: str) -> None:
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
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=PROCESSES)
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
