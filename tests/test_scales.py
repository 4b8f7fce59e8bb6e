"""Laws of the scales: what is solved is the optimum, on one process or several, and nothing is learned from what is scored."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, FAMILIES, FLOOR, LEAST_SIGMA, NAMES, Case, Family, features_and_data, log_density, log_mass, minimum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing

from sigma_vae import Fixed, Gaussian, Laplace, Optimal, PerImage, PerPixel, RunningMinimum, Shared, StudentT
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.distributions import Discretized
from sigma_vae.likelihoods.residuals import LAPLACE, LOGISTIC, NORMAL, ResidualDistribution, student_t
from sigma_vae.likelihoods.solve import Observed, _slope_and_curvature

EVENT = (2, 2, 3)
AXES = {"batch": (0, 1, 2, 3), "image": (1, 2, 3), "channel": (0, 2, 3), "pixel": (0,)}
"""Of (B, C, H, W), over which one σ is shared."""
GROUPS = tuple(AXES)
OPTIMAL_DENSITIES = [case for case in CASES if case.scale.kind == "optimal" and case.observes == "density"]
OPTIMAL_LEVELS = [case for case in CASES if case.scale.kind == "optimal" and case.observes == "level"]
FEW = settings(max_examples=25, deadline=None, database=None)


def per_of(case: Case) -> str:
    return case.scale.name.removeprefix("optimal").lstrip("-") or "batch"


def groups(values: np.ndarray, per: str) -> list[np.ndarray]:
    """The elements that share a σ, one array each, in the order of the solved σ."""
    axes = AXES[per]
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    return list(values.transpose(*kept, *axes).reshape(math.prod(values.shape[axis] for axis in kept), -1))


def best_density(family: Family, residual: np.ndarray, per: str) -> np.ndarray:
    return np.array([max(family.best_log_scale(group), FLOOR) for group in groups(residual, per)])


def best_levels(family: Family, x: np.ndarray, loc: np.ndarray, per: str, base: np.ndarray | float = 0.0) -> np.ndarray:
    """By scipy's search over scipy's masses."""

    def one(x: np.ndarray, loc: np.ndarray, base: np.ndarray) -> float:
        return minimum(lambda log_scale: -log_mass(family.law, x, loc, base + log_scale, 256).sum())

    base = np.broadcast_to(base, x.shape)
    return np.array([one(*group) for group in zip(*(groups(a, per) for a in (x, loc, base)), strict=True)])


def random_data(seed: int, spread: float = 0.1, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Mean and data, residuals of another size in each group."""
    random = np.random.default_rng(seed)
    size = spread * np.exp(random.standard_normal((batch, 1, 1, 1)) + random.standard_normal(EVENT))
    x = random.random((batch, *EVENT))
    return torch.from_numpy(x + size * random.standard_normal(x.shape)), torch.from_numpy(x)


# -- the optimum -----------------------------------------------------------------------------------------------------------


@FEW
@given(case=st.sampled_from(OPTIMAL_DENSITIES), seed=st.integers(0, 10**6), spread=st.floats(0.05, 1e3))
def test_the_optimum_is_stationary_and_beats_its_neighbours(case: Case, seed: int, spread: float) -> None:
    h, x = random_data(seed, spread)
    per, law = per_of(case), case.family.law
    solved = case.make(channels=2).double()(h, x).log_scale.numpy()
    residuals, scales = groups((x - h).numpy(), per), solved.ravel()
    assert len(residuals) == len(scales)
    for residual, log_scale in zip(residuals, scales, strict=True):
        if log_scale == FLOOR:
            continue
        at = {shift: log_density(law, residual, 0.0, log_scale + shift).sum() for shift in (0, 1e-4, -1e-4, 0.01, -0.01, 1, -1)}
        assert abs(at[1e-4] - at[-1e-4]) / 2e-4 < 1e-4 * len(residual)
        assert all(at[0] > at[shift] for shift in at if shift)


@pytest.mark.parametrize("case", OPTIMAL_DENSITIES, **NAMES)
def test_density_is_solved_to_the_optimum(case: Case) -> None:
    h, x = random_data(1)
    solved = case.make(channels=2).double()(h, x).log_scale
    truth = best_density(case.family, (x - h).numpy(), per_of(case))
    np.testing.assert_allclose(solved.numpy().ravel(), truth, rtol=1e-12 if case.family.power else 1e-9)
    assert not solved.requires_grad


@pytest.mark.parametrize("case", OPTIMAL_LEVELS, **NAMES)
def test_levels_are_solved_to_the_optimum_of_their_mass(case: Case) -> None:
    h, x = features_and_data(case, (8,), EVENT, noise=0.2)
    truth = best_levels(case.family, x.numpy(), h.numpy(), per_of(case))
    for dtype in (torch.float32, torch.float64):
        solved = case.make(channels=2).to(dtype)(h.to(dtype), x.to(dtype)).log_scale
        np.testing.assert_allclose(solved.double().numpy().ravel(), np.maximum(truth, FLOOR), atol=1e-4)


def test_one_outlier_does_not_spoil_the_scale_of_levels() -> None:
    """Its bin has mass 1 to rounding, where the curvature of log Φ was NaN in float32."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (8, *EVENT)) / 255
    loc = x + 0.02 * random.standard_normal(x.shape)
    x.flat[:4], loc.flat[:4] = (0, 0, 1, 1), (-0.4, -0.4, 1.5, 1.5)
    likelihood = Gaussian(2, Optimal(), observes="level")
    solved = likelihood(torch.from_numpy(loc).float(), torch.from_numpy(x).float()).log_scale
    (truth,) = best_levels(CASES[0].family, x, loc, "batch")
    assert float(solved) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("residual", [NORMAL, LAPLACE, LOGISTIC, student_t(3.0)], ids=lambda residual: residual.name)
def test_slope_and_curvature_of_levels_are_autograds(residual: ResidualDistribution, levels: int) -> None:
    """In end bins and others, with means on levels, on edges of bins and outside; far out in float32 they are finite."""
    top = levels - 1
    x = torch.tensor([0, 0, 0, top, top, top // 2, top // 2, 1, 1]).double() / top
    loc = torch.tensor([-0.2, 0, 0.7, 1.3, 0.2, 0.5, 0.1, 1 / top, 1.5 / top], dtype=torch.float64)
    for log_scale in (-3.0, -1.0, 0.5, 3.0):
        variable = torch.full_like(x, log_scale, requires_grad=True)
        masses = Discretized(residual, loc[None], variable[None], 1, levels).element_log_prob(x[None])
        (slope,) = torch.autograd.grad(masses.sum(), variable, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), variable)
        found = _slope_and_curvature(Observed(residual, loc, loc.new_zeros(()), x), torch.tensor(log_scale).double(), levels)
        np.testing.assert_allclose(found[0].numpy(), slope.detach().numpy(), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found[1].numpy(), curvature.numpy(), rtol=1e-5, atol=1e-7)
    for log_scale in (-18.0, FLOOR, 12.0):
        single = Observed(residual, loc.float(), torch.zeros(()), x.float())
        assert _slope_and_curvature(single, torch.tensor(log_scale), levels).isfinite().all()


def test_a_mean_at_the_wrong_end_gives_finite_gradients() -> None:
    """The mass of an end level then grows with σ up to infinity."""
    x = torch.tensor([0.0, 1.0]).reshape(2, 1)
    h = (1 - x).requires_grad_()
    for levels in (2, 256):
        distribution = Gaussian(1, Optimal(), spatial_dims=0, observes="level", levels=levels)(h, x)
        (grad,) = torch.autograd.grad(distribution.log_prob(x).sum(), h)
        assert (grad * (x - h) > 0).all()  # and they still point to the data
        assert grad.isfinite().all()


@pytest.mark.parametrize("family", [Gaussian, Laplace, StudentT])
@FEW
@given(seed=st.integers(0, 10**6), sigma=st.floats(0.01, 10))
def test_finer_groups_and_fitted_scales_score_higher(family: type[LocationScale], seed: int, sigma: float) -> None:
    h, x = random_data(seed)

    def score(scale: Any) -> float:
        return float(family(2, scale)(h, x).log_prob(x).sum())

    batch = score(Optimal())
    assert batch >= score(Fixed(sigma)) - 1e-9
    assert score(Optimal(per="image")) >= batch
    assert score(Optimal(per="channel")) >= batch
    assert score(Optimal(per="pixel")) >= score(Optimal(per="channel"))


@pytest.mark.parametrize("per", GROUPS)
def test_detached_scale_has_the_gradient_of_the_attached_one(per: str) -> None:
    """The envelope theorem: full NLL with σ = √MSE under the gradient, and Σ_g (n_g/2) log MSE_g."""
    h, x = random_data(2)
    h.requires_grad_()
    loss = -Gaussian(2, Optimal(per=per))(h, x).log_prob(x).sum()
    mse = (x - h).square().mean(AXES[per], keepdim=True)
    attached = (0.5 * (x - h).square() / mse + 0.5 * torch.log(2 * math.pi * mse)).sum()
    logs = 0.5 * (x.numel() / mse.numel()) * mse.log().sum()
    ours, *others = (torch.autograd.grad(value, h, retain_graph=True)[0] for value in (loss, attached, logs))
    assert loss.item() == pytest.approx(attached.item(), rel=1e-12)
    for other in others:
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12 * other.abs().max().item())
    assert (ours - others[0] * 1.001).abs().max() > 1e-6  # the tolerance can fail


# -- calibrate -------------------------------------------------------------------------------------------------------------


def uneven(h: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(h.split([9, 3, 11, 1]), x.split([9, 3, 11, 1]), strict=True))


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_calibrate_solves_density_and_levels_over_uneven_batches(case: Case) -> None:
    h, x = features_and_data(case, (24,), EVENT, noise=0.15)
    likelihood = case.make(channels=2).double().eval()
    likelihood.calibrate(uneven(h, x))

    loc, raw = np.split(h.numpy(), [2], axis=1)
    base = np.broadcast_to(case.base(raw, 2), loc.shape)
    residual = (x.numpy() - loc) / np.exp(base)
    density = np.array([case.family.best_log_scale(group) for group in groups(residual, case.scale.per)])
    level = best_levels(case.family, x.numpy(), loc, case.scale.per, base)
    assert likelihood.scale.density_log_scale.shape == case.stored_shape(EVENT)
    np.testing.assert_allclose(
        likelihood.scale.density_log_scale.numpy().ravel(), density, atol=1e-12 if case.family.power else 1e-9
    )
    np.testing.assert_allclose(likelihood.scale.level_log_scale.numpy().ravel(), level, atol=1e-4)
    assert abs(density - level).max() > 1e-3  # two different optima, so that a mix-up is seen
    truth = log_density(case.family.law, residual, 0.0, broadcast(density, case)) - base
    if case.observes == "density":
        np.testing.assert_allclose(
            likelihood.distribution(h, refitted=True).log_prob(x).numpy(), truth.sum((1, 2, 3)), rtol=1e-9
        )


def broadcast(flat: np.ndarray, case: Case) -> np.ndarray:
    return flat.reshape(case.stored_shape(EVENT))


@pytest.mark.parametrize("case", [case for case in CASES if case.scale.kind != "optimal"], **NAMES)
def test_calibrate_leaves_a_scale_of_its_own_alone(case: Case) -> None:
    h, x = features_and_data(case, (24,), EVENT)
    likelihood = case.settled(EVENT)
    own, mass = likelihood(h).log_prob(x), likelihood.log_mass(h, x)
    likelihood.calibrate(uneven(h, x))
    assert torch.equal(likelihood(h).log_prob(x), own)
    assert torch.equal(likelihood.log_mass(h, x), mass)
    assert likelihood.distribution(h, refitted=True).log_prob(x).sum() > own.sum()
    assert likelihood.log_mass(h, x, refitted=True).sum() > mass.sum()


def test_a_predicted_scale_is_refitted_by_one_factor() -> None:
    h, x = random_data(3, batch=40)
    raw = torch.from_numpy(np.random.default_rng(0).uniform(-3, 0, h.shape))
    likelihood = Gaussian(2, PerPixel()).double()
    likelihood.calibrate([(torch.cat([h, raw], 1), x.mul(255).round() / 255)])
    ratio = likelihood.distribution(torch.cat([h, raw], 1), refitted=True).scale / likelihood(torch.cat([h, raw], 1)).scale
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-12, atol=0)


@pytest.mark.parametrize("log_sigma", [-5.99, -5.0, -4.0, 0.0, 9.0])
@pytest.mark.parametrize("per", GROUPS)
def test_no_soft_clip_widens_the_optimum(per: str, log_sigma: float) -> None:
    x = torch.zeros(4, *EVENT, dtype=torch.float64)
    h = x + math.exp(log_sigma) * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    solved = Gaussian(2, Optimal(per=per)).double()(h, x).log_scale
    np.testing.assert_allclose(solved.numpy(), log_sigma, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("observes", ["density", "level"])
@pytest.mark.parametrize("per", GROUPS)
def test_a_perfect_fit_lies_exactly_on_the_hard_floor(per: str, observes: str) -> None:
    x = torch.full((4, *EVENT), 51 / 255)
    for floor, truth in ((math.exp(-6), -6.0), (0.25, math.log(0.25))):
        likelihood = Gaussian(2, Optimal(per=per, floor=floor), observes=observes)
        distribution = likelihood(x, x)
        assert (distribution.log_scale == torch.tensor(truth)).all()
        assert distribution.log_prob(x).isfinite().all()
        likelihood.calibrate([(x, x)])
        assert (likelihood.scale.stored(observes) == torch.tensor(truth)).all()


def test_shared_scale_returns_from_below_the_floor() -> None:
    likelihood = Gaussian(1, Shared(1e-4, LEAST_SIGMA), spatial_dims=0)
    h, x = torch.zeros(3, 1), torch.full((3, 1), 0.5)
    distribution = likelihood(h, x)
    assert distribution.log_scale.item() == pytest.approx(FLOOR, rel=1e-6)
    (grad,) = torch.autograd.grad(-distribution.log_prob(x).sum(), likelihood.scale.log_scale)
    assert grad < 0  # gradient descent widens σ again


@pytest.mark.parametrize("per", GROUPS)
def test_running_mean_converges_to_the_optimum_and_eval_uses_it(per: str) -> None:
    likelihood = Gaussian(2, Optimal(per=per)).double()
    random = np.random.default_rng(0)
    x = torch.zeros(32, *EVENT, dtype=torch.float64)
    sizes = np.linspace(0.05, 0.2, math.prod(EVENT)).reshape(EVENT)
    likelihood(x + 5.0, x)  # a first batch that is far off is forgotten
    for _ in range(1500):
        likelihood(torch.from_numpy(sizes * random.standard_normal(x.shape)), x)
    shared = {"batch": (0, 1, 2), "image": (0, 1, 2), "channel": (1, 2), "pixel": ()}[per]
    truth = np.broadcast_to(0.5 * np.log((sizes**2).mean(shared, keepdims=True)), EVENT)
    stored = likelihood.eval()(x).log_scale.numpy()
    np.testing.assert_allclose(np.broadcast_to(stored, (1, *EVENT))[0], truth, atol=0.06)


@pytest.mark.parametrize(("ratio", "factor"), [(0.5, 1.0), (1.0, 1.0), (1.4, 1.4), (50.0, 2.0)])
@pytest.mark.parametrize("per", GROUPS)
def test_held_out_residuals_widen_sigma_in_training_alone(per: str, ratio: float, factor: float) -> None:
    h, x = torch.rand(2, 6, *EVENT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    likelihood = Gaussian(2, Optimal(per=per)).double()
    narrow = likelihood(h, x).log_scale
    stored = likelihood.eval()(h).log_scale
    likelihood.widen(ratio)
    torch.testing.assert_close(likelihood(h).log_scale, stored, rtol=0, atol=0)
    torch.testing.assert_close(likelihood.train()(h, x).log_scale, narrow + math.log(factor))
    before = {name: value for name, value in likelihood.state_dict().items() if name != "scale.log_widening"}
    likelihood.load_state_dict(before)  # of a model that was saved when there was no such number
    torch.testing.assert_close(likelihood(h, x).log_scale, narrow)


def test_the_running_minimum_is_the_papers_recursion() -> None:
    """mse = min(mse, 0.99 mse + 0.01 batch mse), as in Asperti & Trentin's code; the same σ in training and evaluation."""
    likelihood = Gaussian(2, RunningMinimum()).double()
    mse = None
    for seed, spread in enumerate([0.1, 0.05, 0.3, 0.02, 0.08, 0.01]):
        h, x = random_data(seed, spread)
        batch = float((x - h).square().mean())
        mse = batch if mse is None else min(mse, 0.99 * mse + 0.01 * batch)
        sigma = likelihood.train()(h, x).scale
        assert float(sigma) == pytest.approx(math.sqrt(mse), rel=1e-12)
        assert not sigma.requires_grad
        assert torch.equal(likelihood.eval()(h).scale, sigma)
        assert torch.equal(likelihood(h, x).scale, sigma)  # and evaluation leaves it so


def test_a_calibration_stores_post_hoc_values_beside_the_running_minimum() -> None:
    h, x = features_and_data(CASES[0], (24,), EVENT, noise=0.15)
    for family in (Gaussian, Laplace, StudentT):
        likelihood, optimal = family(2, RunningMinimum()).double(), family(2, Optimal()).double()
        likelihood(h[:3], x[:3])
        own = likelihood.eval()(h).log_prob(x)
        for each in (likelihood, optimal.eval()):
            each.calibrate(uneven(h, x))
        assert torch.equal(likelihood(h).log_prob(x), own)
        torch.testing.assert_close(likelihood.distribution(h, refitted=True).log_prob(x), optimal(h).log_prob(x))
        fresh = family(2, RunningMinimum()).double()
        fresh.load_state_dict(likelihood.state_dict(), strict=True)
        assert torch.equal(fresh.eval()(h).log_prob(x), own)
        assert torch.equal(fresh.log_mass(h, x, refitted=True), likelihood.log_mass(h, x, refitted=True))


# -- formulas --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "constant"), [(10, 4054.0), (1, 1346.2), (0.1, -1361.6)])
def test_beta_has_the_constants_of_the_papers_table(beta: float, constant: float) -> None:
    zeros = torch.zeros(1, 3, 28, 28)
    assert zeros.numel() == 2352
    ours = -Gaussian(3, Fixed.from_beta(beta))(zeros).log_prob(zeros)
    assert float(ours) == pytest.approx(constant, abs=0.06)


@pytest.mark.parametrize("beta", [0.03, 1.0, 7.0])
def test_beta_is_the_weight_that_it_says(beta: float) -> None:
    h, x = random_data(4)
    kl = torch.from_numpy(np.random.default_rng(1).exponential(20, len(x)))
    scale = Fixed.from_beta(beta)
    elbo = Gaussian(2, scale)(h, x).log_prob(x) - kl
    objective = (x - h).square().sum((1, 2, 3)) + beta * kl
    constant = -2 * scale.sigma**2 * elbo - objective
    assert scale.sigma**2 == pytest.approx(beta / 2, rel=1e-12)
    assert float(constant.max() - constant.min()) < 1e-10


@pytest.mark.parametrize("ratio", [0.5, 1.024, 1.3, 2.1])
def test_leak_of_a_scale_taken_from_the_evaluated_data(ratio: float) -> None:
    """(D/2)(r − 1 − ln r), with r = MSE_eval / σ²_train: 14.8 nats at r = 1.30 and D = 784."""
    h, x = random_data(5)
    likelihood = Gaussian(2, Optimal()).double()
    likelihood.calibrate([(h, x)])
    wider = x + math.sqrt(ratio) * (h - x)
    honest = likelihood.eval()(wider, x).log_prob(x).sum()
    leaked = likelihood.train()(wider, x).log_prob(x).sum()
    assert float(leaked - honest) == pytest.approx(x.numel() / 2 * (ratio - 1 - math.log(ratio)), rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("observes", ["density", "level"])
@pytest.mark.parametrize("family", [Gaussian, Laplace, StudentT])
def test_beta_nll_weighs_each_element_by_its_detached_scale(family: type[LocationScale], observes: str, beta: float) -> None:
    case = next(case for case in CASES if case.scale.name == "per-pixel")
    h, x = features_and_data(case, (4,), EVENT)
    law = next(row for row in FAMILIES if row.likelihood is family).law
    h.requires_grad_()
    distribution = family(2, PerPixel(), observes=observes).double()(h, x)
    loc, log_scale = h.detach().numpy()[:, :2], distribution.log_scale.detach().numpy()
    if observes == "density":
        elements = log_density(law, x.numpy(), loc, log_scale)
    else:
        elements = log_mass(law, x.numpy(), loc, log_scale, 256)
    ours = distribution.weighted_log_prob(x, beta)
    truth = (np.exp(2 * beta * log_scale) * elements).sum((1, 2, 3))
    np.testing.assert_allclose(ours.detach().numpy(), truth, rtol=1e-9)
    if (
        family is Gaussian and observes == "density" and beta == 1
    ):  # Seitzer et al.: then the mean has the gradient of ½(x − μ)²
        (grad,) = torch.autograd.grad(ours.sum(), h)
        np.testing.assert_allclose(grad[:, :2].numpy(), x.numpy() - loc, rtol=1e-9)


# -- several processes -----------------------------------------------------------------------------------------------------

SHARDS = (3, 13)
SHARED_OVER_RANKS = tuple(itertools.product(("batch", "channel", "pixel"), ("density", "level")))


def decoded(weight: Tensor, x: Tensor) -> Tensor:
    return x + torch.einsum("bchw,cd->bdhw", x - 0.4, weight)


def shard_data() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(6)
    x = random.integers(0, 256, (sum(SHARDS), *EVENT)) / 255
    x[: SHARDS[0]] = 0.5 + (x[: SHARDS[0]] - 0.5) * 0.02  # the shards differ, or a local σ would do
    x = np.round(x * 255) / 255
    return torch.from_numpy(random.normal(0, 0.2, (2, 2))), torch.from_numpy(x)


def solve(weight: Tensor, x: Tensor, share: float, likelihood: LocationScale) -> dict[str, Tensor]:
    """σ and the gradient of this share of the loss."""
    weight = weight.clone().requires_grad_()
    distribution = likelihood(decoded(weight, x), x)
    loss = -share * distribution.log_prob(x).mean()
    return {"log_scale": distribution.log_scale, "grad": torch.autograd.grad(loss, weight)[0]}


def all_results(x: Tensor, weight: Tensor, share: float) -> dict[str, dict[str, Tensor]]:
    results = {}
    for per, observes in SHARED_OVER_RANKS:
        likelihood = Gaussian(2, Optimal(per=per), observes=observes).double()
        results[f"{per}/{observes}"] = solve(weight, x, share, likelihood)
        likelihood.calibrate(list(zip(decoded(weight, x).split(2), x.split(2), strict=True)))
        results[f"{per}/{observes}"] |= dict(likelihood.scale.named_buffers())
    for name, likelihood in (
        ("running-minimum", Gaussian(2, RunningMinimum())),
        ("student-t", StudentT(2)),
        ("learned", StudentT(2, df="learned")),
    ):
        solve(weight, x, share, likelihood.double())
        results[name] = solve(0.9 * weight, x, share, likelihood) | dict(likelihood.scale.named_buffers())
    rmse = float((decoded(weight, x) - x).square().mean().sqrt())
    results["local"] = solve(weight, x, share, Gaussian(2, Fixed(rmse)))
    return results


def one_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARDS))
    torch.set_num_threads(1)
    weight, x = shard_data()
    share = len(SHARDS) * SHARDS[rank] / sum(SHARDS)
    results = all_results(x.split(SHARDS)[rank], weight, share)
    for result in results.values():  # as DistributedDataParallel does
        distributed.all_reduce(result["grad"])
        result["grad"] /= len(SHARDS)
    torch.save(results, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(one_rank, args=(str(folder),), nprocs=len(SHARDS))
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(len(SHARDS))]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    weight, x = shard_data()
    return all_results(x, weight, 1.0)


@pytest.mark.parametrize(
    "name", [*(f"{per}/{observes}" for per, observes in SHARED_OVER_RANKS), "running-minimum", "student-t", "learned"]
)
def test_two_processes_are_one(name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Also on uneven shards, where each rank's loss is weighted by its share of the examples."""
    for rank in ranks:
        assert rank[name].keys() == alone[name].keys()
        for key, truth in alone[name].items():
            torch.testing.assert_close(rank[name][key], truth, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_a_local_scale_would_be_seen(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    truth = alone["batch/density"]["grad"]
    assert (ranks[0]["local"]["grad"] - truth).norm() > 1e-3 * truth.norm()
    torch.testing.assert_close(alone["local"]["grad"], truth, rtol=1e-9, atol=1e-9)


def test_an_image_has_its_own_scale_on_any_process() -> None:
    h, x = random_data(7)
    whole = Gaussian(2, Optimal(per="image"))(h, x).log_scale
    parts = [Gaussian(2, Optimal(per="image"))(h[i : i + 1], x[i : i + 1]).log_scale for i in range(len(x))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_the_scale_that_is_not_trained_follows_the_one_that_is():
    """After a calibration has set both, training on the density moves the level's σ by the same factor."""
    likelihood = Gaussian(channels=1)
    x = torch.randint(0, 256, (64, 1, 8, 8)) / 255
    likelihood.calibrate([(x + 0.3 * torch.randn(x.shape), x)])
    gap = likelihood.scale.level_log_scale - likelihood.scale.density_log_scale
    for _ in range(300):
        likelihood(x + 0.05 * torch.randn(x.shape), x)
    assert likelihood.scale.density_log_scale.exp().item() < 0.15
    torch.testing.assert_close(likelihood.scale.level_log_scale - likelihood.scale.density_log_scale, gap)


def test_level_training_refuses_data_off_their_levels():
    likelihood = Gaussian(channels=1, observes="level")
    x = torch.full((2, 1, 2, 2), 3.7)
    with pytest.raises(ValueError, match=r"levels k/255 in \[0, 1\]"):
        likelihood(torch.zeros_like(x), x)


@pytest.mark.parametrize("scale", [PerImage, PerPixel])
def test_a_perfect_prediction_has_a_finite_refit(scale):
    likelihood = Gaussian(channels=1, scale=scale())
    x = torch.randint(0, 256, (8, 1, 4, 4)) / 255
    h = torch.cat([x, torch.zeros_like(x)], dim=1)
    likelihood.calibrate([(h, x)])
    assert torch.isfinite(likelihood.distribution(h, refitted=True).log_prob(x)).all()
    assert torch.isfinite(likelihood.log_mass(h, x, refitted=True)).all()


def test_a_broken_batch_does_not_stay_in_the_stored_scale():
    likelihood = Gaussian(channels=1)
    x = torch.randint(0, 256, (16, 1, 4, 4)) / 255
    likelihood(x + 0.1, x)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert likelihood(x + 0.1, broken).log_prob(broken).isnan().all()  # it is not hidden either
    assert likelihood.eval()(x).log_prob(x).isfinite().all()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda h, x: [(h, x * float("nan"))], "NaN or infinite"),
        (lambda h, x: [(h, x * 255)], r"levels of the data in \[0, 1\]"),
        (lambda h, x: [(h * float("nan"), x)], "no finite σ"),
        (lambda h, x: iter([(h, x)]), "not a generator"),
        (lambda h, x: [], "no data"),
    ],
    ids=["nan", "range", "weights", "generator", "empty"],
)
def test_calibrate_refuses_what_it_cannot_fit_and_keeps_what_it_had(spoil, says):
    likelihood = Gaussian(channels=1)
    x = torch.randint(0, 256, (16, 1, 4, 4)) / 255
    likelihood.calibrate([(x + 0.1, x)])
    before = likelihood.scale.density_log_scale.clone()
    with pytest.raises(ValueError, match=says):
        likelihood.calibrate(spoil(x + 0.1, x))
    assert torch.equal(likelihood.scale.density_log_scale, before)


@pytest.mark.parametrize("observes", ["density", "level"])
def test_values_of_another_shape_are_not_broadcast(observes):
    distribution = Gaussian(channels=3, scale=Fixed(0.1), observes=observes)(torch.zeros(8, 3, 4, 4))
    for shape in ((8, 1, 4, 4), (4, 4)):
        with pytest.raises(ValueError, match="broadcast"):
            distribution.log_prob(torch.zeros(shape))


def test_a_given_scale_is_not_moved_to_the_data():
    given_sigma, free = Shared(0.25), Shared()
    for scale in (given_sigma, free):
        scale.start(0.5)
        scale.start(0.7)  # a second training starts from what the first has learnt
    assert given_sigma.log_scale.exp().item() == pytest.approx(0.25)
    assert free.log_scale.exp().item() == pytest.approx(0.5)
