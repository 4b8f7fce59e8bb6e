"""Student-t: its distribution function against mpmath, and degrees of freedom that are told, learned and predicted."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sigma_vae import Fixed, Optimal, PerPixel, StudentT
from sigma_vae.likelihoods.densities import (
    student_t_entropy,
    student_t_interval_log_prob,
    student_t_log_cdf,
    student_t_log_prob,
)

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
