"""Laws of the scales: what is solved is the optimum, on one process or several, and nothing is learned from what is scored."""

import itertools
import math
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cases import CASES, FAMILIES, FLOOR, LEAST_SIGMA, NAMES, Case, Family, features_and_data, log_density, log_mass, minimum
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import on_processes
from scipy import stats
from torch import Tensor, distributed

from sigma_vae import Fixed, Gaussian, Laplace, Optimal, PerImage, PerPixel, RunningMinimum, Shared, StudentT, models
from sigma_vae.cli import main
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.densities import (
    student_t_entropy,
    student_t_interval_log_prob,
    student_t_log_cdf,
    student_t_log_prob,
)
from sigma_vae.likelihoods.discrete import LogisticMixture
from sigma_vae.likelihoods.residuals import LAPLACE, LOGISTIC, NORMAL, Discretized, ResidualDistribution, student_t
from sigma_vae.likelihoods.scales import OLD_BOUNDS
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
    on_processes(len(SHARDS), one_rank, str(folder))
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


# -- Floors on σ are relative: no unit, no number of levels, and no spread of the data makes them tell in ordinary data

SCALES = {
    "optimal": Optimal, "optimal-channel": lambda: Optimal(per="channel"), "shared": Shared, "per-image": PerImage,
    "per-pixel": PerPixel, "running-minimum": RunningMinimum,
}  # fmt: skip


@pytest.mark.parametrize("levels", [2, 16, 256, 4096, 65536])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_exact_predictions_cost_no_bits(family: Family, levels: int) -> None:
    x = torch.arange(0, levels, max(1, levels // 50)).double()[:, None] / (levels - 1)
    for dtype, most in ((torch.float64, 1e-3), (torch.float32, 5e-3)):
        likelihood = family.likelihood(1, Optimal(), spatial_dims=0, levels=levels).to(dtype)
        likelihood.calibrate([(x.to(dtype), x.to(dtype))])
        bits = -likelihood.eval().log_mass(x.to(dtype), x.to(dtype)).mean() / math.log(2)
        assert 0 <= float(bits) < most


@pytest.mark.parametrize("levels", [16, 256, 65536])
@pytest.mark.parametrize("std_levels", [0.3, 3.0])
def test_bits_of_levels_are_the_code_length_by_hand(levels: int, std_levels: float) -> None:
    """Means between levels, and residuals of less than a level: the ideal code of a Gaussian in bins, by scipy."""
    random = np.random.default_rng(0)
    mean = random.uniform(0.3, 0.7, 4000) * (levels - 1)
    level = np.clip(np.round(mean + std_levels * random.standard_normal(4000)), 0, levels - 1)
    law = stats.norm(mean, std_levels)
    upper, lower = np.where(level == levels - 1, np.inf, level + 0.5), np.where(level == 0, -np.inf, level - 0.5)
    code_length = -np.log2(law.cdf(upper) - law.cdf(lower)).mean()
    h, x = (torch.from_numpy(values / (levels - 1))[:, None] for values in (mean, level))
    likelihood = Gaussian(1, Optimal(), spatial_dims=0, levels=levels)
    likelihood.calibrate([(h, x)])
    bits = -likelihood.eval().log_mass(h, x).mean() / math.log(2)
    assert float(bits) == pytest.approx(code_length, abs=0.01)  # with σ solved for these values, not the one they came from
    assert float(likelihood.sigma("level")) * (levels - 1) == pytest.approx(std_levels, rel=0.05)


@pytest.mark.parametrize("power", [-30, -12, -3, 0, 3, 12, 30])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_real_values_in_other_units_have_the_same_nats(family: Family, scale: type, power: int) -> None:
    """log p(a·x) = log p(x) − D·log a, where data and mean are scaled, and predicted log σ shifted, by a."""
    a, random = 10.0**power, np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((50, 2)))
    loc = x + 0.01 * torch.from_numpy(random.standard_normal((50, 2)))

    def nats(unit: float) -> torch.Tensor:
        likelihood = family.likelihood(2, scale(), spatial_dims=0, levels=None).double()
        likelihood.set_floor(std=unit)
        likelihood.start(0.02 * unit)
        raw = torch.full((50, likelihood.in_channels - 2), math.log(0.02 * unit), dtype=torch.float64)
        h = torch.cat([loc * unit, raw], 1)
        likelihood.calibrate([(h, x * unit)])
        return likelihood.train().distribution(h, x * unit).log_prob(x * unit).detach() + 2 * math.log(unit)

    torch.testing.assert_close(nats(a), nats(1.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("levels", [2, 16, 256, 65536])
def test_the_mixture_resolves_the_same_part_of_a_level(levels: int) -> None:
    """A narrow component on a level leaves the same mass outside its bin, whatever the number of levels."""
    likelihood = LogisticMixture(1, components=1, spatial_dims=0, levels=levels)
    x = torch.full((1, 1), (levels // 2) / (levels - 1), dtype=torch.float64)
    h = torch.cat([torch.zeros(1, 1), 2 * x - 1, torch.full((1, 1), -100.0)], 1).double()
    mass = 2 / (1 + math.exp(-0.5 * math.exp(7) * 2 / 255)) - 1 if levels > 2 else None
    if mass is not None:
        assert float(likelihood.log_mass(h, x).exp()) == pytest.approx(mass, rel=1e-6)
    assert float(likelihood.log_mass(h, x)) > -0.2


@pytest.mark.parametrize("seed", [20, 48])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_black_and_white_data_get_the_best_of_several_maxima(family: Family, seed: int) -> None:
    """Right and wrong predictions of end levels: with Student-t a search from the density's σ ends 0.1 to 0.2 bits too low."""
    random = np.random.default_rng(seed)
    x = (random.random(2000) < 0.3) * 1.0
    spreads = np.exp(random.uniform(-12, -1, size=3))
    kind = random.choice(3, 2000, p=random.dirichlet([1, 1, 1]))
    error = np.abs(random.standard_normal(2000) * spreads[kind])
    error = np.where(random.random(2000) < random.choice([0.02, 0.1, 0.2, 0.3]), 1 - error * 0.5, error)
    loc = np.clip(np.where(x > 0.5, 1 - error, error), 0, 1)
    likelihood = family.likelihood(1, Optimal(), spatial_dims=0, observes="level").double()
    found = float(likelihood(torch.from_numpy(loc)[:, None], torch.from_numpy(x)[:, None]).log_scale)
    heights = [log_mass(family.law, x, loc, log_scale, 256).mean() for log_scale in np.linspace(likelihood.log_floor, 8, 100)]
    assert log_mass(family.law, x, loc, found, 256).mean() >= max(heights) - 1e-6


def test_floors_are_saved_with_the_model_and_old_models_keep_theirs() -> None:
    made = Gaussian(1, PerPixel(), spatial_dims=0, levels=None)
    made.set_floor(std=1e-9)
    again = Gaussian(1, PerPixel(), spatial_dims=0, levels=None)
    again.load_state_dict(made.state_dict())
    assert (again.scale.log_floor, again.scale.log_ceiling) == (made.scale.log_floor, made.scale.log_ceiling)
    old = {name: value for name, value in made.state_dict().items() if not name.endswith("log_bounds")}
    again.load_state_dict(old)
    assert (again.scale.log_floor, again.scale.log_ceiling) == OLD_BOUNDS
    given = Gaussian(1, PerPixel(floor=0.1), spatial_dims=0, levels=None)
    given.load_state_dict(old)
    assert given.scale.log_floor == pytest.approx(math.log(0.1))


def test_a_given_floor_is_kept() -> None:
    likelihood = Gaussian(1, Optimal(floor=0.5), spatial_dims=0)
    likelihood.set_floor(1e-3, std=7.0)
    assert likelihood.log_floor == pytest.approx(math.log(0.5))
    assert Gaussian(1, Fixed(0.1), spatial_dims=0).log_floor == pytest.approx(-math.log(64 * 255))
    assert StudentT(1, Optimal(), spatial_dims=0, levels=None).log_floor == pytest.approx(math.log(1e-6))


SMALL = ["--network", "mlp", "--width", "8", "--latent-dim", "2", "--batch-size", "20"]


def test_an_evaluation_says_that_sigma_lies_on_its_floor(tmp_path, capsys) -> None:
    """A constant picture: every value is predicted exactly, in the end."""
    np.save(tmp_path / "grey.npy", np.full((60, 2, 2), 0, dtype=np.uint8))
    words = ["train", str(tmp_path / "grey.npy"), *SMALL, "--levels", "256", "--learning-rate", "0.3", "--epochs", "60"]
    assert main([*words, "--scale-floor", "1", "--out", str(tmp_path / "run")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "100.0% of σ lie on the floor, 0.00392" in said
    assert "would add up to 2.8 nats" in said  # 4 values × log 2
    saved = models.load(tmp_path / "run")
    assert saved.vae.likelihood.log_floor == pytest.approx(-math.log(255))


# -- Student-t: its distribution function against mpmath, and degrees of freedom that are told, learned and predicted --

DF = (1.0, 1.5, 4.0, 30.0, 1000.0)
POINTS = [-1e8, -1e3, -40.0, -9.0, -3.01, -3.0, -2.99, -2.0, -1.0, -0.3, -1e-3, 0.0, 0.5, 2.0, 2.9, 3.1, 12.0]


def above(z: float, df: float) -> mpmath.mpf:
    z, df = mpmath.mpf(z), mpmath.mpf(df)
    if z < 0:
        return 1 - above(-z, df)
    return mpmath.betainc(df / 2, mpmath.mpf(1) / 2, 0, df / (df + z**2), regularized=True) / 2


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("df", DF)
def test_log_cdf_is_mpmaths(df: float, as_tensor: bool) -> None:
    with mpmath.workdps(50):
        truth = np.array([float(mpmath.log(above(-z, df))) for z in POINTS])
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        z = torch.tensor(POINTS, dtype=dtype)
        ours = student_t_log_cdf(z, torch.full_like(z, df) if as_tensor else df)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.double().numpy(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("df", DF)
def test_log_cdf_has_slope_and_curvature_of_the_law(df: float) -> None:
    z = torch.tensor([-40.0, -9.0, -3.1, -2.9, -1.0, 0.0, 0.5, 2.9, 3.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(student_t_log_cdf(z, df).sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    at = z.detach().numpy()
    mills = np.exp(stats.t.logpdf(at, df) - stats.t.logcdf(at, df))
    np.testing.assert_allclose(slope.detach().numpy(), mills, rtol=1e-9)
    np.testing.assert_allclose(curvature.numpy(), mills * (-(df + 1) * at / (df + at**2) - mills), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("df", DF)
def test_interval_is_mpmaths(df: float) -> None:
    centers, widths = [0, 1e-3, -0.3, 0.9, -1.7, 3, -6, 30, 100, 1e4], [1e-8, 1e-4, 0.01, 0.3, 0.49, 0.51, 0.99, 2, 5, 60]
    grid = np.array(list(itertools.product(centers, widths)), dtype=float)
    with mpmath.workdps(60):
        edges = [(abs(mpmath.mpf(c)) - mpmath.mpf(w) / 2, abs(mpmath.mpf(c)) + mpmath.mpf(w) / 2) for c, w in grid]
        truth = np.array([float(mpmath.log(above(lower, df) - above(upper, df))) for lower, upper in edges])
    for dtype, tolerance in ((torch.float64, 2e-11), (torch.float32, 5e-6)):
        ours = student_t_interval_log_prob(*torch.from_numpy(grid).to(dtype).T, df)
        np.testing.assert_allclose(ours.double().numpy(), truth, rtol=tolerance, atol=tolerance)


@settings(max_examples=100, deadline=None, database=None)
@given(
    center=st.floats(-1e30, 1e30),
    small=st.floats(-9, 9),
    log_width=st.floats(-20, 20),
    df=st.floats(1, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_nan_and_no_infinity(center: float, small: float, log_width: float, df: float, dtype: torch.dtype) -> None:
    c = torch.tensor([center, small], dtype=dtype, requires_grad=True)
    w = torch.tensor(log_width, dtype=dtype).exp().requires_grad_()
    for value in (student_t_interval_log_prob(c, w, df), student_t_log_cdf(c, df), student_t_log_prob(c, df)):
        assert value.isfinite().all()
        grads = torch.autograd.grad(value.sum(), (c, w), allow_unused=True)
        assert all(grad.isfinite().all() for grad in grads if grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_of_degrees_is_many_numbers(dtype: torch.dtype) -> None:
    """Values and the gradient in ν; two large log-gammas would lose four digits of float32 here."""
    df = torch.tensor([1.0, 1.7, 4.0, 33.0, 1000.0], dtype=dtype, requires_grad=True)
    nu = df.detach().double().numpy()
    z = torch.full_like(df, 1.3)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-10
    np.testing.assert_allclose(
        student_t_log_prob(z, df).detach().double().numpy(), stats.t.logpdf(z.double().numpy(), nu), rtol=tolerance
    )
    np.testing.assert_allclose(
        student_t_entropy(df).detach().double().numpy(), stats.t.entropy(nu), rtol=1e-4 if dtype == torch.float32 else 1e-9
    )
    (grad,) = torch.autograd.grad(student_t_log_prob(z, df).sum(), df)
    step = 1e-4 * nu
    slope = (stats.t.logpdf(1.3, nu + step) - stats.t.logpdf(1.3, nu - step)) / (2 * step)
    np.testing.assert_allclose(grad.double().numpy(), slope, rtol=1e-3, atol=1e-6 if dtype == torch.float32 else 1e-10)


def data(df: float, n: int = 20_000) -> torch.Tensor:
    return torch.from_numpy(stats.t.rvs(df, size=(n, 1), scale=0.1, random_state=0)).float()


def test_learned_degrees_of_freedom_find_those_of_the_data() -> None:
    x = data(3.0)
    likelihood = StudentT(1, Optimal(), df="learned", spatial_dims=0, levels=None)
    assert likelihood.in_channels == 1
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(60):
        loss = -likelihood(torch.zeros_like(x), x).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth, _, scale = stats.t.fit(x.double().numpy().ravel(), floc=0)
    assert float(likelihood.log_df.detach().exp()) == pytest.approx(truth, rel=0.02)
    assert float(likelihood.eval()(torch.zeros_like(x)).scale) == pytest.approx(scale, rel=0.1)  # its running mean lags
    with torch.no_grad():
        likelihood.log_df.fill_(99.0)  # a step too far is taken back, and has a gradient again
    likelihood.train()(torch.zeros_like(x), x).log_prob(x).sum().backward()
    assert float(likelihood.log_df.detach().exp()) == pytest.approx(1000)


@pytest.mark.parametrize("space", [(), (3,), (2, 3)])
def test_predicted_degrees_of_freedom_are_scipys(space: tuple[int, ...]) -> None:
    """As Takahashi et al.: mean, scale and ν of each value from the decoder."""
    likelihood = StudentT(2, PerPixel(), df="predicted", spatial_dims=len(space)).double().eval()
    assert likelihood.in_channels == 6
    random = np.random.default_rng(0)
    h, x = random.standard_normal((5, 6, *space)), random.integers(0, 256, (5, 2, *space)) / 255
    loc, raw, own = np.split(h, 3, axis=1)
    scale = np.exp(clip(raw, -math.log(64 * 255), 20 - math.log(64 * 255)))
    df = np.exp(clip(own + math.log(4), 0, math.log(1000)))
    axes = tuple(range(1, h.ndim))
    distribution = likelihood(torch.from_numpy(h))
    ours = distribution.log_prob(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, stats.t.logpdf(x, df, loc, scale).sum(axes), rtol=1e-9)
    np.testing.assert_allclose(distribution.entropy().numpy(), (stats.t.entropy(df) + np.log(scale)).sum(axes), rtol=1e-9)
    lower, upper = ((x + side / 510 - loc) / scale for side in (-1, 1))
    mirrored = lower + upper > 0
    lower, upper = np.where(mirrored, -upper, lower), np.where(mirrored, -lower, upper)
    mass = np.log(stats.t.cdf(upper, df) - stats.t.cdf(lower, df))
    inner = (x > 0) & (x < 1)
    elements = likelihood.distribution(torch.from_numpy(h), observes="level")
    np.testing.assert_allclose(elements.element_log_prob(torch.from_numpy(x)).numpy()[inner], mass[inner], rtol=1e-8)


def clip(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + np.logaddexp(0, high - np.logaddexp(0, high - x) - low)


def test_predicted_degrees_of_freedom_are_trained_and_survive_extremes() -> None:
    likelihood = StudentT(1, PerPixel(), df="predicted", spatial_dims=0)
    h = torch.tensor(list(itertools.product([-1e4, 0.5, 1e4], [-20.0, 20.0], [-1e4, 0.0, 1e4])), requires_grad=True)
    log_prob = likelihood(h).log_prob(torch.full((len(h), 1), 0.5))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert h.grad.isfinite().all()
    assert h.grad[:, 2].abs().max() > 0.1
    assert likelihood.eval().log_mass(h, torch.ones(len(h), 1)).isfinite().all()
    draw = likelihood(torch.zeros(1000, 3, requires_grad=True)).rsample()
    assert draw.isfinite().all()
    assert draw.requires_grad


def test_a_mass_has_no_gradient_in_the_degrees_of_freedom() -> None:
    likelihood = StudentT(1, Fixed(0.1), df="learned", spatial_dims=0).eval()
    mass = likelihood.log_mass(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="has no gradient in its degrees of freedom"):
        mass.sum().backward()


@pytest.mark.parametrize(("zeros", "log_sigma"), [(1.0, -7.0), (0.9, -7.0), (0.5, None)])
def test_many_perfect_values_are_no_harm(zeros: float, log_sigma: float | None) -> None:
    """With more than 1/(ν + 1) of the values off 0 the optimum is finite; else it is the floor."""
    residual = np.where(np.arange(100) < 100 * zeros, 0, np.linspace(0.1, 0.3, 100))
    x = torch.from_numpy(residual)[:, None]
    solved = float(StudentT(1, Optimal(floor=math.exp(-7)), spatial_dims=0).double()(torch.zeros_like(x), x).log_scale)
    if log_sigma is None:
        score = np.mean(5 * residual**2 / (4 * math.exp(2 * solved) + residual**2))
        assert score == pytest.approx(1, abs=1e-9)
        assert solved > -7
    else:
        assert solved == log_sigma


def test_outliers_of_any_size_are_solved() -> None:
    residual = np.concatenate([stats.norm.rvs(scale=0.02, size=500, random_state=0), [1e3, -1e6]])
    x = torch.from_numpy(residual)[:, None]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        solved = float(StudentT(1, Optimal(), spatial_dims=0).to(dtype)(torch.zeros_like(x).to(dtype), x.to(dtype)).log_scale)
        score = np.mean(5 * residual**2 / (4 * math.exp(2 * solved) + residual**2))
        assert score == pytest.approx(1, abs=tolerance)
