"""Laws of every likelihood in the table of cases: what they return is what scipy, mpmath or a closed form says."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from cases import (
    CASES,
    FAMILIES,
    FLOOR,
    LEAST_SIGMA,
    NAMES,
    OPTIMAL_CASES,
    SHAPES,
    Case,
    Family,
    cdfs,
    features_and_data,
    log_density,
    log_mass,
)
from cases import soft_clip as two_sided_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from sigma_vae import Fixed, Gaussian, Optimal, PerImage, PerPixel, RunningMinimum, Shared, StudentT
from sigma_vae.likelihoods.base import LocationScale
from sigma_vae.likelihoods.densities import log1mexp, log_ndtr, normal_interval_log_prob, soft_clip

EVENT = (2, 3, 4)


def close(ours: Tensor, truth: np.ndarray, tolerance: float = 1e-9) -> None:
    """Relative; absolute near 0, where a relative error of the probability is an absolute one of its logarithm."""
    np.testing.assert_allclose(ours.detach().double().numpy(), truth, rtol=tolerance, atol=tolerance)


def split(case: Case, h: Tensor, channels: int, spatial_dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale features."""
    loc, raw = np.split(h.numpy(), [channels], axis=h.dim() - spatial_dims - 1)
    return loc, raw


# -- probabilities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_log_prob_is_scipys(case: Case, kind: str) -> None:
    batch, event = SHAPES[kind]
    dims = len(event) - 1
    h, x = features_and_data(case, batch, event)
    loc, raw = split(case, h, event[0], dims)
    log_scale = case.log_scale(raw, dims, case.stored(event)[case.observes])
    if case.observes == "density":
        truth = log_density(case.family.law, x.numpy(), loc, log_scale)
    else:
        truth = log_mass(case.family.law, x.numpy(), loc, log_scale, 256)

    distribution = case.settled(event)(h)

    assert distribution.batch_shape == batch
    assert distribution.event_shape == event
    close(distribution.log_prob(x), truth.sum(tuple(range(len(batch), truth.ndim))))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("post_hoc", [False, True])
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_log_mass_is_scipys_with_the_scale_of_levels(case: Case, post_hoc: bool, levels: int) -> None:
    h, x = features_and_data(case, (3,), EVENT, levels)
    loc, raw = split(case, h, EVENT[0], 2)
    stored = case.stored(EVENT)["level"]
    log_scale = case.base(raw, 2) + stored if post_hoc else case.log_scale(raw, 2, stored)
    truth = log_mass(case.family.law, x.numpy(), 1 / (1 + np.exp(-loc)), log_scale, levels)

    likelihood = case.settled(EVENT, levels=levels, mean="unit")

    close(likelihood.log_mass(h, x, refitted=post_hoc), truth.sum((1, 2, 3)))


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_post_hoc_uses_the_refitted_scale(case: Case) -> None:
    h, x = features_and_data(case, (3,), EVENT)
    loc, raw = split(case, h, EVENT[0], 2)
    log_scale = case.base(raw, 2) + case.stored(EVENT)[case.observes]
    if case.observes == "density":
        truth = log_density(case.family.law, x.numpy(), loc, log_scale)
    else:
        truth = log_mass(case.family.law, x.numpy(), loc, log_scale, 256)
    close(case.settled(EVENT).distribution(h, refitted=True).log_prob(x), truth.sum((1, 2, 3)))


@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_masses_far_from_the_mean_are_scipys(family: Family) -> None:
    sigma, loc, level = (
        a.ravel() for a in np.meshgrid([3e-3, 0.05, 1, 30], [-40, -1, -0.01, 0, 0.4, 1, 2.5, 40], [0, 1, 128, 254, 255])
    )
    x = level / 255
    truth = log_mass(family.law, x, loc, np.log(sigma), 256)
    for value in np.unique(sigma):
        likelihood = family.likelihood(1, Fixed(value), spatial_dims=0, observes="level")
        here = sigma == value
        ours = likelihood(torch.from_numpy(loc[here, None])).log_prob(torch.from_numpy(x[here, None]))
        close(ours, truth[here])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_masses_sum_to_one(family: Family, levels: int, dtype: torch.dtype) -> None:
    means = torch.tensor([-0.3, 0.0, 0.1234, 0.5 / 255, 0.5, 0.77, 1.0, 1.3], dtype=dtype)
    x = (torch.arange(levels, dtype=dtype) / (levels - 1)).repeat(len(means), 1)
    h = means[:, None].expand(-1, levels)
    for sigma in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        likelihood = family.likelihood(1, Fixed(sigma), spatial_dims=0, levels=levels, observes="level")
        masses = likelihood(h.reshape(-1, 1)).log_prob(x.reshape(-1, 1)).exp().reshape(h.shape).double().sum(1)
        assert (masses - 1).abs().max() < 1e-6, f"at σ = {sigma}"


@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_density_integrates_to_one(family: Family) -> None:
    likelihood = family.likelihood(1, Fixed(0.2), spatial_dims=0)
    distribution = likelihood(torch.full((1, 1), 0.4, dtype=torch.float64))

    def density(x: float) -> float:
        return float(distribution.log_prob(torch.tensor([[x]], dtype=torch.float64)).exp())

    total = sum(integrate.quad(density, *bounds)[0] for bounds in ((-np.inf, 0.4), (0.4, np.inf)))
    assert total == pytest.approx(1, abs=1e-7)


# -- distribution functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observes", ["density", "level"])
@pytest.mark.parametrize("post_hoc", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("case", CASES[::2], **NAMES)
def test_element_cdf_is_scipys(case: Case, kind: str, post_hoc: bool, observes: str) -> None:
    """Of either measure, whatever the likelihood was trained on."""
    batch, event = SHAPES[kind]
    dims = len(event) - 1
    h, x = features_and_data(case, batch, event, noise=0.3)
    loc, raw = split(case, h, event[0], dims)
    stored = case.stored(event)[observes]
    log_scale = case.base(raw, dims) + stored if post_hoc else case.log_scale(raw, dims, stored)
    truth = cdfs(case.family.law, x.numpy(), loc, log_scale, 256 if observes == "level" else None)
    below, upto = case.settled(event).element_cdf(h, x, observes, refitted=post_hoc)
    assert below.shape == upto.shape == x.shape
    close(below, truth[0])
    close(upto, truth[1])
    assert torch.equal(below, upto) == (observes == "density")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_levels_add_up_to_their_distribution_function(family: Family, levels: int, dtype: torch.dtype) -> None:
    x, tolerance = (torch.arange(levels, dtype=dtype) / (levels - 1))[:, None], 1e-5 if dtype == torch.float32 else 1e-12
    for loc, sigma in itertools.product((-0.3, 0.5 / 255, 0.77, 1.3), (1e-3, 0.03, 0.5, 10.0)):
        p = family.likelihood(1, Fixed(sigma), spatial_dims=0, levels=levels, observes="level")(torch.full_like(x, loc))
        below, upto = p.element_cdf(x)
        assert below[0] == 0
        assert upto[-1] == 1
        assert torch.equal(below[1:], upto[:-1]) or (below[1:] - upto[:-1]).abs().max() < (
            1e-5 if dtype.itemsize == 4 else 1e-12
        )
        assert (upto.diff(dim=0) >= 0).all()
        mass = p.element_log_prob(x).exp()
        torch.testing.assert_close(upto - below, mass, rtol=0, atol=tolerance)


@pytest.mark.parametrize("observes", ["density", "level"])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_the_distribution_function_of_draws_is_uniform(family: Family, observes: str) -> None:
    torch.manual_seed(2)
    h = torch.rand(20_000, 1, dtype=torch.float64)
    p, narrow = (family.likelihood(1, Fixed(s), spatial_dims=0, levels=17, observes=observes)(h) for s in (0.2, 0.18))
    draws = p.sample()
    values = []
    for distribution in (p, narrow):
        below, upto = distribution.element_cdf(draws)
        values.append((below + torch.rand_like(below) * (upto - below)).flatten().numpy())
    assert stats.kstest(values[0], "uniform").pvalue > 1e-2
    assert stats.kstest(values[1], "uniform").pvalue < 1e-2  # what it says of a σ that is 10 % off


@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_residual_variance_is_scipys(family: Family) -> None:
    p = family.likelihood(2, Fixed(0.2), spatial_dims=0)(torch.zeros(3, 2, dtype=torch.float64))
    assert float(p.residual_variance) == pytest.approx(0.04 * family.law.var(), rel=1e-12)


def test_a_heavy_tail_has_no_variance() -> None:
    h = torch.zeros(1, 1)
    assert StudentT(1, Fixed(0.2), df=2, spatial_dims=0)(h).residual_variance == math.inf
    predicted = StudentT(1, Fixed(1.0), df="predicted", spatial_dims=0)
    variance = predicted(torch.tensor([[0.0, -3.0], [0.0, 3.0]], dtype=torch.float64)).residual_variance
    assert variance[0] == math.inf
    df = 4 * math.exp(3)  # far from the ends of its range
    assert float(variance[1]) == pytest.approx(df / (df - 2), rel=1e-2)


# -- draws and moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.observes == "density"], **NAMES)
def test_draws_follow_the_density(case: Case) -> None:
    h, _ = features_and_data(case, (5,), EVENT)
    loc, raw = split(case, h, EVENT[0], 2)
    log_scale = case.log_scale(raw, 2, case.stored(EVENT)["density"])
    torch.manual_seed(0)
    draws = case.settled(EVENT)(h).sample(torch.Size([400])).numpy()
    standardised = (draws - loc) / np.exp(log_scale)
    assert stats.kstest(standardised.ravel(), case.family.law.cdf).pvalue > 1e-3
    # What the test would say of a σ that is 4 % off:
    assert stats.kstest(1.04 * standardised.ravel(), case.family.law.cdf).pvalue < 1e-3


@pytest.mark.parametrize("loc", [-0.1, 0.37, 0.95])
@pytest.mark.parametrize("family", FAMILIES, **NAMES)
def test_draws_of_levels_follow_the_masses(family: Family, loc: float) -> None:
    levels, n = 17, 40_000
    likelihood = family.likelihood(1, Fixed(0.15), spatial_dims=0, levels=levels, observes="level")
    torch.manual_seed(1)
    draws = likelihood(torch.full((1, 1), loc)).sample(torch.Size([n])).flatten()
    grid = np.arange(levels) / (levels - 1)
    expected = n * np.exp(log_mass(family.law, grid, np.asarray(loc), np.log(0.15), levels))
    observed = np.bincount((draws * (levels - 1)).round().long().numpy(), minlength=levels)
    assert torch.isin(draws, torch.from_numpy(grid).float()).all()
    rare = expected < 5
    observed, expected = ([*a[~rare], a[rare].sum()] for a in (observed, expected))
    if expected[-1] < 1:  # scipy's statistic wants no near-empty cell
        assert observed[-1] <= 5
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("case", [case for case in CASES if case.observes == "level"], **NAMES)
def test_mean_of_levels_is_the_brute_force_sum(case: Case, levels: int) -> None:
    event = (2, 3)
    h, _ = features_and_data(case, (4,), event, levels)
    loc, raw = split(case, h, 2, 1)
    log_scale = np.broadcast_to(case.log_scale(raw, 1, case.stored(event)["level"]), loc.shape)
    grid = np.arange(levels) / (levels - 1)
    masses = np.exp(log_mass(case.family.law, grid, loc[..., None], log_scale[..., None], levels))
    close(case.settled(event, levels=levels)(h).mean, (grid * masses).sum(-1))


@pytest.mark.parametrize("mean", ["identity", "unit"])
def test_mean_map(mean: str) -> None:
    h = torch.linspace(-9, 9, 12, dtype=torch.float64).reshape(2, 6)
    truth = h.numpy() if mean == "identity" else 1 / (1 + np.exp(-h.numpy()))
    close(Gaussian(6, Fixed(1), spatial_dims=0, mean=mean)(h).mean, truth, 1e-15)


@pytest.mark.parametrize("case", [case for case in CASES if case.observes == "density"], **NAMES)
def test_entropy_is_scipys(case: Case) -> None:
    h, _ = features_and_data(case, (3,), EVENT)
    _, raw = split(case, h, EVENT[0], 2)
    log_scale = np.broadcast_to(case.log_scale(raw, 2, case.stored(EVENT)["density"]), (3, *EVENT))
    close(case.settled(EVENT)(h).entropy(), (log_scale + case.family.law.entropy()).sum((1, 2, 3)))


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_a_generator_makes_draws_repeatable(case: Case) -> None:
    h, _ = features_and_data(case, (3,), EVENT)
    distribution = case.settled(EVENT)(h)
    first, again, other = (distribution.sample(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert distribution.sample(torch.Size([2, 5])).shape == (2, 5, 3, *EVENT)


@pytest.mark.parametrize("name", ["per-pixel", "shared"])
def test_rsample_carries_gradients_to_mean_and_scale(name: str) -> None:
    case = next(case for case in CASES if case.scale.name == name and case.observes == "density")
    likelihood = case.make(channels=2)
    h = features_and_data(case, (3,), EVENT)[0].requires_grad_()
    draw = likelihood(h).rsample(generator=torch.Generator().manual_seed(0))
    draw.sum().backward()
    close(h.grad[:, :2], np.ones((3, *EVENT)))
    assert h.grad[:, 2:].abs().sum() > 0 or likelihood.scale.log_scale.grad.abs() > 0
    assert not likelihood(h).sample().requires_grad


# -- precision -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_gradients_are_finite_at_extreme_inputs(case: Case, dtype: torch.dtype) -> None:
    extremes = torch.tensor(list(itertools.product([-1e4, 0.0, 0.5, 1.0, 1e4], [-20.0, 20.0], [0.0, 1.0])))
    for mean, training in itertools.product(("identity", "unit"), (True, False)):
        likelihood = case.make(spatial_dims=0, mean=mean)
        likelihood.scale.store("density", torch.full((1,) * 1, FLOOR))
        likelihood.train(training)
        extra = extremes[:, 1:2].expand(-1, likelihood.in_channels - 1)
        h = torch.cat([extremes[:, :1], extra], 1).to(dtype).requires_grad_()
        log_prob = likelihood(h, extremes[:, 2:]).log_prob(extremes[:, 2:])
        log_prob.sum().backward()
        assert log_prob.isfinite().all()
        assert h.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in likelihood.parameters())
        likelihood.eval()
        assert likelihood.log_mass(h, extremes[:, 2:]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_half_precision_features_are_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    h, x = (t.float() for t in features_and_data(case, (3,), EVENT))
    likelihood = case.settled(EVENT).float()
    half = h.to(dtype)
    truth = likelihood(half.float()).log_prob(x)
    assert truth.dtype == torch.float32
    assert torch.equal(likelihood(half).log_prob(x), truth)
    assert torch.equal(likelihood.log_mass(half, x), likelihood.log_mass(half.float(), x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(likelihood(half).log_prob(x), truth)
    likelihood.train()
    assert torch.equal(likelihood(half, x).log_prob(x), likelihood(half.float(), x).log_prob(x))


def test_log_ndtr_and_its_derivatives() -> None:
    points = [-1e6, -1e3, -50.0, -5.0, -1.0, 0.0, 1.0, 5.0, 12.0]
    with mpmath.workdps(60):
        mills = [float(mpmath.npdf(p) / mpmath.ncdf(p)) if p > -1e3 else -p - 1 / p for p in points]
        value = [float(mpmath.log(mpmath.ncdf(p))) for p in points[2:]]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x = torch.tensor(points, dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(log_ndtr(x).sum(), x)
        np.testing.assert_allclose(grad.double().numpy(), mills, rtol=max(tolerance, 1e-11))
        np.testing.assert_allclose(log_ndtr(x).detach().double().numpy()[2:], value, rtol=tolerance)


def test_log_ndtr_has_a_finite_curvature_everywhere() -> None:
    """The solver of levels needs it: where erfcx overflows it was 0·∞, and one outlier spoilt the σ of a batch."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-1e6, -30.0, -3.0, 0.0, 3.0, 12.9, 13.1, 30.0, 40.0, 1e6], dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(log_ndtr(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert curvature.isfinite().all()
        mills = slope.detach().double()
        truth = -mills * (mills + x.detach().double())
        np.testing.assert_allclose(curvature[2:].double().numpy(), truth[2:].numpy(), atol=1e-5)


@pytest.fixture(scope="module")
def interval_grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centers, widths, and the log of the normal mass to 15 digits, from mpmath at 80."""
    centers = [0, 1e-3, -0.3, 0.9, -1.7, 3, -6, 9, -14, 30, -100, 1e3]
    widths = [1e-8, 1e-4, 0.01, 0.3, 0.99, 1.01, 2, 5, 17, 60]
    grid = np.array(list(itertools.product(centers, widths)))
    with mpmath.workdps(80):
        root = mpmath.sqrt(2)

        def one(center: float, width: float) -> float:
            lower, upper = abs(mpmath.mpf(center)) - mpmath.mpf(width) / 2, abs(mpmath.mpf(center)) + mpmath.mpf(width) / 2
            return float(mpmath.log((mpmath.erfc(lower / root) - mpmath.erfc(upper / root)) / 2))

        truth = np.array([one(float(c), float(w)) for c, w in grid])
    return grid[:, 0], grid[:, 1], truth


def test_normal_interval_is_mpmaths(interval_grid: tuple[np.ndarray, ...]) -> None:
    center, width, truth = interval_grid
    np.testing.assert_allclose(
        normal_interval_log_prob(torch.from_numpy(center), torch.from_numpy(width)).numpy(), truth, rtol=1e-12, atol=1e-12
    )
    in_float32 = normal_interval_log_prob(torch.from_numpy(center).float(), torch.from_numpy(width).float())
    np.testing.assert_allclose(in_float32.double().numpy(), truth, rtol=2e-6, atol=2e-6)


def test_normal_interval_has_the_gradient_of_the_mass(interval_grid: tuple[np.ndarray, ...]) -> None:
    """d/dcenter = (φ(upper) − φ(lower)) / mass and d/dwidth = (φ(upper) + φ(lower)) / 2 mass."""
    center, width, truth = interval_grid
    c, w = (torch.from_numpy(a).requires_grad_() for a in (center, width))
    grads = torch.autograd.grad(normal_interval_log_prob(c, w).sum(), (c, w))
    upper, lower = (np.exp(stats.norm.logpdf(center + side * width / 2) - truth) for side in (1, -1))
    np.testing.assert_allclose(grads[1].numpy(), (upper + lower) / 2, rtol=1e-7, atol=1e-12)
    # The difference cancels in this reference where the bin is narrow: judge it by the size of its terms.
    assert (
        np.abs(grads[0].numpy() - (upper - lower)) <= 1e-7 * np.maximum(1, upper + lower) * np.maximum(1, abs(center))
    ).all()


def test_log1mexp_and_soft_clip() -> None:
    points = [1e-12, 1e-3, 0.5, 0.7, 3.0, 40.0]
    t = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    with mpmath.workdps(40):
        truth = [float(mpmath.log(1 - mpmath.exp(-mpmath.mpf(v)))) for v in points]
        slope = [float(1 / mpmath.expm1(mpmath.mpf(v))) for v in points]
    close(log1mexp(t), np.array(truth), 1e-13)
    (grad,) = torch.autograd.grad(log1mexp(t).sum(), t)
    np.testing.assert_allclose(grad.numpy(), slope, rtol=1e-12)
    x = torch.tensor([-1e4, -50.0, -6.0, -1.0, 0.0, 3.0, 6.0, 50.0, 1e4], dtype=torch.float64, requires_grad=True)
    clipped = soft_clip(x, FLOOR, FLOOR + 20)
    close(clipped, two_sided_clip(x.detach().numpy()), 1e-13)
    (grad,) = torch.autograd.grad(clipped.sum(), x)
    assert (grad >= 0).all()
    assert grad.isfinite().all()


FINITE = st.floats(-1e30, 1e30)


@settings(max_examples=100, deadline=None, database=None)
@given(center=FINITE, log_width=st.floats(-20, 20))
def test_normal_interval_is_never_nan_and_never_positive(center: float, log_width: float) -> None:
    for dtype in (torch.float32, torch.float64):
        c = torch.tensor(center, dtype=dtype, requires_grad=True)
        w = torch.tensor(log_width, dtype=dtype).exp().requires_grad_()
        value = normal_interval_log_prob(c, w)
        assert not value.isnan()
        assert value <= 1e-6
        if value.isfinite():
            assert all(grad.isfinite() for grad in torch.autograd.grad(value, (c, w)))


@settings(max_examples=60, deadline=None, database=None)
@given(
    case=st.sampled_from(CASES),
    loc=st.floats(-1e5, 1e5, width=32),
    raw=st.floats(-1e4, 1e4, width=32),
    level=st.integers(0, 255),
    training=st.booleans(),
)
def test_no_likelihood_gives_nan_or_infinity(case: Case, loc: float, raw: float, level: int, training: bool) -> None:
    likelihood = case.make(spatial_dims=0).train(training)
    likelihood.scale.store("density", torch.full((1,), -2.0))
    h = torch.tensor([[loc, *[raw] * (likelihood.in_channels - 1)]], requires_grad=True)
    x = torch.full((1, 1), level / 255)
    log_prob = likelihood(h, x).log_prob(x)
    (grad,) = torch.autograd.grad(log_prob.sum(), h)
    assert log_prob.isfinite().all()
    assert grad.isfinite().all()


@settings(max_examples=60, deadline=None, database=None)
@given(
    family=st.sampled_from(FAMILIES),
    observes=st.sampled_from(["density", "level"]),
    log_scale=st.floats(-20, 20),
    logit=st.floats(-1e4, 1e4, width=32),
)
def test_no_scale_and_no_level_gives_nan_or_infinity(family: Family, observes: str, log_scale: float, logit: float) -> None:
    likelihood = family.likelihood(1, Fixed(math.exp(log_scale)), spatial_dims=0, mean="unit", observes=observes)
    h = torch.full((256, 1), logit, requires_grad=True)
    x = torch.linspace(0, 1, 256)[:, None]
    log_prob = likelihood(h, x).log_prob(x)
    (grad,) = torch.autograd.grad(log_prob.sum(), h)
    assert log_prob.isfinite().all()
    assert grad.isfinite().all()


# -- modules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_shapes_in_training(case: Case, kind: str) -> None:
    batch, event = SHAPES[kind]
    likelihood = case.make(channels=event[0], spatial_dims=len(event) - 1).double()
    assert likelihood.in_channels == event[0] + case.scale.extra(event[0])
    h, x = features_and_data(case, batch, event)
    distribution = likelihood(h, x)
    assert distribution.log_prob(x).shape == batch
    assert distribution.mean.shape == distribution.sample().shape == (*batch, *event)
    assert distribution.scale.broadcast_to(x.shape).shape == x.shape
    likelihood.calibrate([(h, x)])
    likelihood.eval()
    assert likelihood.log_mass(h, x).shape == likelihood.log_mass(h, x, refitted=True).shape == batch


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_eval_does_not_look_at_x(case: Case) -> None:
    h, x = features_and_data(case, (3,), EVENT)
    likelihood = case.settled(EVENT)
    before = {name: value.clone() for name, value in likelihood.state_dict().items()}
    truth = likelihood(h).log_prob(x)
    assert torch.equal(likelihood(h, x).log_prob(x), truth)
    assert torch.equal(likelihood(h, 1 - x).log_prob(x), truth)
    assert all(torch.equal(value, before[name]) for name, value in likelihood.state_dict().items())
    if case.scale.kind == "optimal":  # in training it does look
        assert not torch.equal(likelihood.train()(h, x).log_prob(x), truth)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("case", CASES, **NAMES)
def test_state_dict_round_trip(case: Case, calibrated: bool) -> None:
    h, x = (t.float() for t in features_and_data(case, (3,), EVENT))
    saved, fresh = (case.make(channels=2) for _ in range(2))
    if calibrated:
        saved.calibrate([(h, x)])
        for parameter in saved.parameters():
            parameter.data.sub_(0.123)
    fresh.load_state_dict(saved.state_dict(), strict=True)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in saved.state_dict().items())
    if calibrated:
        assert torch.equal(saved.eval()(h).log_prob(x), fresh.eval()(h).log_prob(x))
        assert torch.equal(saved.log_mass(h, x, refitted=True), fresh.log_mass(h, x, refitted=True))
        refit = case.make(channels=2)  # a stored σ gives way to what is loaded, also back to "none yet"
        refit.calibrate([(h, x)])
        refit.load_state_dict(case.make(channels=2).state_dict(), strict=True)
        with pytest.raises(ValueError, match="no stored σ yet"):
            refit.eval().distribution(h, refitted=True)


# -- one door, and what evaluation may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_everything_is_derived_from_the_distribution(case: Case) -> None:
    h, x = features_and_data(case, (3,), EVENT)
    likelihood = case.settled(EVENT)
    assert torch.equal(likelihood(h).log_prob(x), likelihood.distribution(h, observes=case.observes).log_prob(x))
    for refitted in (False, True):
        by_level = likelihood.distribution(h, observes="level", refitted=refitted)
        assert torch.equal(likelihood.log_mass(h, x, refitted=refitted), by_level.log_prob(x))
        for observes in ("density", "level"):
            p = likelihood.distribution(h, x, observes=observes, refitted=refitted)
            for ours, theirs in zip(likelihood.element_cdf(h, x, observes, refitted=refitted), p.element_cdf(x), strict=True):
                assert torch.equal(ours, theirs)
    assert set((likelihood.distribution(h, observes="level").sample() * 255).round(decimals=6).flatten().tolist()) <= set(
        range(256)
    )


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_a_training_step_solves_for_what_is_trained_on_alone(case: Case) -> None:
    h, x = features_and_data(case, (3,), EVENT)
    other = "level" if case.observes == "density" else "density"
    likelihood = case.settled(EVENT).train()
    stored = {name: value.clone() for name, value in likelihood.state_dict().items()}
    for ask in (
        lambda: likelihood.distribution(h, x, observes=other).log_scale,
        lambda: likelihood.distribution(h, x, refitted=True).log_scale,
        lambda: likelihood.log_mass(h, x),
        lambda: likelihood.element_cdf(h, x, case.observes)[1],
    ):
        first = ask()
        assert torch.equal(ask(), first)
        assert all(torch.equal(value, stored[name]) for name, value in likelihood.state_dict().items())
    solved = likelihood.distribution(h, x, observes=case.observes).log_scale
    assert torch.equal(solved, likelihood.eval()(h).log_scale) == (case.scale.kind != "optimal")


@pytest.mark.parametrize("case", CASES, **NAMES)
def test_a_likelihood_says_what_its_scale_is(case: Case) -> None:
    h, _ = features_and_data(case, (3,), EVENT)
    likelihood = case.settled(EVENT)
    assert likelihood.has_scale
    assert likelihood.takes_scale
    assert likelihood.predicts_scale == (case.scale.kind == "predicted")
    assert likelihood.has_post_hoc == (case.scale.kind != "optimal")
    one_sigma = case.scale.kind != "predicted" and case.scale.per == "batch"
    assert likelihood.sigma_is_rmse == (case.family.name == "gaussian" and case.observes == "density" and one_sigma)
    unasked = -math.log(64 * 255)  # a fixed σ is not given a floor
    floor = unasked if case.scale.name == "fixed" else FLOOR
    assert likelihood.log_floor == pytest.approx(-20 if likelihood.predicts_scale else floor)
    stored = likelihood.refitted_log_scales()
    assert {name: value.tolist() for name, value in stored.items()} == {
        name: value.tolist() for name, value in case.stored(EVENT).items()
    }
    for refitted in (False, True):
        for observes in ("density", "level"):
            log_sigma = likelihood.log_sigma(observes, refitted=refitted)
            if likelihood.predicts_scale:
                assert log_sigma is None
                assert likelihood.sigma(observes, refitted=refitted) is None
                continue
            used = likelihood.distribution(h, observes=observes, refitted=refitted)
            assert torch.equal(log_sigma.expand(used.log_scale.shape), used.log_scale)
            assert torch.equal(likelihood.sigma(observes, refitted=refitted), log_sigma.exp())
    assert case.make().refitted_log_scales() == {}


def test_asking_for_sigma_changes_nothing() -> None:
    """In training, a pass puts a learned σ back onto its floor; a look at it does not."""
    likelihood = Gaussian(1, Shared(1e-4, LEAST_SIGMA), spatial_dims=0).train()
    assert likelihood.sigma().item() == pytest.approx(1e-4)
    assert likelihood.sigma().item() == pytest.approx(1e-4)
    likelihood(torch.zeros(3, 1), torch.zeros(3, 1))
    assert likelihood.sigma().item() == pytest.approx(math.exp(FLOOR))


def test_only_a_learned_scale_has_a_start() -> None:
    for case in CASES:
        likelihood = case.family.likelihood(1, Shared() if case.scale.name == "shared" else case.scale.make())
        before = {name: value.clone() for name, value in likelihood.state_dict().items()}
        likelihood.start(0.5)
        started = case.scale.name == "shared"
        assert all(torch.equal(value, before[name]) for name, value in likelihood.state_dict().items()) != started
        if started:
            assert likelihood.sigma().item() == pytest.approx(0.5)


def test_a_distribution_says_what_evaluation_may_ask() -> None:
    x, scores = torch.tensor([[0.25]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)
    for family in FAMILIES:
        density, levels = (
            family.likelihood(1, Fixed(0.5), spatial_dims=0).distribution(torch.zeros_like(x), observes=observes)
            for observes in ("density", "level")
        )
        assert density.exponential_family == bool(family.power)
        assert not levels.exponential_family
        assert density.standardised(x).item() == pytest.approx(0.5)
        assert levels.standardised(x) is None
        variance = 0.25 * family.law.var()
        assert [value.item() for value in density.squared_errors(x, scores)] == pytest.approx([variance, 0.0625])
        assert [value.item() for value in levels.squared_errors(x, scores)] == pytest.approx([variance, 4 * variance])


def test_old_names_still_work_and_warn() -> None:
    likelihood, h, x = Gaussian(1, Fixed(0.5)), torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    likelihood.calibrate([(h, x)])
    with pytest.warns(DeprecationWarning, match=r"distribution\(h, refitted=True\)"):
        old = likelihood.post_hoc(h)
    assert torch.equal(old.log_scale, likelihood.distribution(h, refitted=True).log_scale)
    with pytest.warns(DeprecationWarning, match="refitted="):
        assert torch.equal(likelihood.log_mass(h, x, post_hoc=True), likelihood.log_mass(h, x, refitted=True))
    with pytest.warns(DeprecationWarning, match="refitted="):
        ours = likelihood.element_cdf(h, x, "density", post_hoc=True)
    assert torch.equal(ours[0], likelihood.element_cdf(h, x, "density", refitted=True)[0])
    with pytest.warns(DeprecationWarning, match="law is now residual"):
        assert old.law is old.residual


# -- misuse ----------------------------------------------------------------------------------------------------------------

LEVELS = torch.zeros(2, 1, 4, 4)
MISUSE = {
    "no channels": (lambda: Gaussian(0), "channels counts"),
    "negative space": (lambda: Gaussian(1, spatial_dims=-1), "spatial_dims is 0"),
    "one level": (lambda: Gaussian(1, levels=1), "levels counts"),
    "unknown mean": (lambda: Gaussian(1, mean="sigmoid"), 'mean is "identity" or "unit"'),
    "unknown probability": (lambda: Gaussian(1, observes="mass"), 'observes is "density" or "level"'),
    "levels of real data": (lambda: Gaussian(1, levels=None, observes="level"), "how many levels"),
    "unknown group": (lambda: Optimal(per="row"), "Optimal"),
    "floor 0": (lambda: Optimal(floor=0.0), "floor is the smallest"),
    "floor below 0": (lambda: PerPixel(floor=-1.0), "floor is the smallest"),
    "floor NaN": (lambda: PerImage(floor=float("nan")), "floor is the smallest"),
    "σ = 0": (lambda: Fixed(0.0), "σ > 0"),
    "σ NaN": (lambda: Fixed(float("nan")), "σ > 0"),
    "σ infinite": (lambda: Shared(float("inf")), "σ > 0"),
    "β = 0": (lambda: Fixed.from_beta(0.0), "β > 0"),
    "channels of h": (lambda: Gaussian(3, PerPixel())(torch.zeros(2, 3, 4, 4)), r"reads 6 decoder channels, got 3"),
    "axes of h": (lambda: Gaussian(1, Fixed(1))(torch.zeros(2, 1)), r"reads 1 decoder channels, got \(2, 1\)"),
    "shape of x": (lambda: Gaussian(1, Fixed(1))(LEVELS, LEVELS[..., 1:]), r"shape \(2, 1, 4, 3\)"),
    "shape of x to log_mass": (lambda: Gaussian(1, Fixed(1)).log_mass(LEVELS, LEVELS[:1]), r"shape \(1, 1, 4, 4\)"),
    "x off its levels": (lambda: Gaussian(1, Fixed(1)).log_mass(LEVELS, LEVELS + 0.5 / 255), r"levels k/255"),
    "x above 1": (lambda: Gaussian(1, Fixed(1)).log_mass(LEVELS, LEVELS + 2), r"levels k/255"),
    "x in 0..255": (lambda: Gaussian(1, Fixed(1)).log_mass(LEVELS, LEVELS + 128), r"scale 256-level data by 1/255"),
    "x NaN": (lambda: Gaussian(1, Fixed(1)).log_mass(LEVELS, LEVELS * float("nan")), r"levels k/255"),
    "mass of real data": (lambda: Gaussian(1, Fixed(1), levels=None).log_mass(LEVELS, LEVELS), "levels=None"),
    "nothing stored": (lambda: Gaussian(1).eval()(LEVELS), "no stored σ yet"),
    "nothing stored for levels": (lambda: Gaussian(1).eval().log_mass(LEVELS, LEVELS), "no stored σ yet"),
    "no x in training": (lambda: Gaussian(1)(LEVELS), "no stored σ yet"),
    "never calibrated": (lambda: Gaussian(1, Shared()).distribution(LEVELS, refitted=True), "no stored σ yet"),
    "nothing to calibrate on": (lambda: Gaussian(1).calibrate([]), "no data to fit a scale on"),
    "df below 1": (lambda: StudentT(1, df=0.5), "df is a number from 1"),
    "df NaN": (lambda: StudentT(1, df=float("nan")), "df is a number from 1"),
    "df misspelt": (lambda: StudentT(1, df="learnt"), '"learned" or "predicted", got \'learnt\''),
    "levels with a learned df": (lambda: StudentT(1, df="learned", observes="level"), "pass a number"),
    "levels with a predicted df": (lambda: StudentT(1, df="predicted", observes="level"), "pass a number"),
    "channels of predicted df": (lambda: StudentT(1, Fixed(1), df="predicted")(LEVELS), "reads 2 decoder channels, got 1"),
    "no running minimum yet": (lambda: Gaussian(1, RunningMinimum()).eval()(LEVELS), "no stored σ yet"),
    "a used generator": (lambda: Gaussian(1).calibrate(pair for pair in [(LEVELS, LEVELS)]), "generator"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_a_value_error(name: str) -> None:
    misuse, message = MISUSE[name]
    with pytest.raises(ValueError, match=message):
        misuse()


@pytest.mark.parametrize("case", OPTIMAL_CASES, **NAMES)
def test_an_optimal_scale_is_known_after_one_step(case: Case) -> None:
    h, x = features_and_data(case, (3,), EVENT)
    likelihood: LocationScale = case.make(channels=2).double()
    likelihood(h, x)
    assert likelihood.eval()(h).log_prob(x).isfinite().all()
    assert likelihood.log_mass(h, x).isfinite().all()


KINDS = (
    "gaussian/optimal laplace/per-pixel logistic/per-image student-t/shared bernoulli continuous-bernoulli categorical"
    " bitwise-categorical logistic-mixture poisson multinomial negative-binomial/optimal zero-inflated-negative-binomial/per-pixel"
).split()
BAD_INPUTS = {  # features and data, and what is said, or None where they are as good as float32
    "unsigned features": (lambda h, x: (h.to(torch.uint8), x), None),
    "unsigned both": (lambda h, x: (h.to(torch.uint8), x.to(torch.uint8)), None),
    "integer data": (lambda h, x: (h, x.round().long()), None),
    "booleans": (lambda h, x: (h > 0, x > 0.5), None),
    "half precision": (lambda h, x: (h.half(), x.bfloat16()), None),
    "complex features": (lambda h, x: (h.to(torch.complex64), x), "expected real numbers"),
    "complex data": (lambda h, x: (h, x.to(torch.complex64)), "expected real numbers"),
    "scalar features": (lambda h, x: (h.sum(), x), "decoder channels"),
    "scalar data": (lambda h, x: (h, x.sum()), "data of shape"),
    "no space": (lambda h, x: (h[..., :0], x[..., :0]), "empty axis"),
    "another batch": (lambda h, x: (h, x[:1]), "data of shape"),
    "another channel": (lambda h, x: (h[:, :1], torch.cat([x, x], 1)), "decoder channels|data of shape"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_any_type_and_shape_are_read_or_refused_in_a_line(name: str, kind: str) -> None:
    from sigma_vae import models

    likelihood = models.likelihood(name, 3, levels=2)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, likelihood.in_channels, 4, 4, generator=generator)
    x = torch.rand(2, 3, 4, 4, generator=generator).round()
    change, says = BAD_INPUTS[kind]
    h, x = change(h, x)
    if says is not None:
        with pytest.raises(ValueError, match=says) as told:
            likelihood.distribution(h, x).log_prob(x)
        assert "\n" not in str(told.value)
        return
    plain = likelihood.distribution(h.float(), x.float()).log_prob(x.float())
    torch.testing.assert_close(likelihood.distribution(h, x).log_prob(x), plain)
