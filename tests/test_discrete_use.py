"""Families without a scale in use: draws, gradients, extreme numbers, mistakes, compiling, training."""

import json

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_discrete import FAMILIES, Family, colour_masses, each, features, levels_of

from sigma_vae import Bernoulli, BitwiseCategorical, Categorical, ContinuousBernoulli, LogisticMixture, models
from sigma_vae.cli import main
from sigma_vae.likelihoods.base import Unscaled
from sigma_vae.likelihoods.densities import in_chunks

RGB = Family("logistic-mixture-rgb", lambda *a, **k: LogisticMixture(3, components=3, **k), lambda *a: np.empty(0), channels=3)
ALL = (*FAMILIES, RGB)
every = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)


def make(family: Family, spatial_dims: int = 2, levels: int | None = None) -> Unscaled:
    return family.make(family.channels, spatial_dims=spatial_dims, levels=levels or family.levels)


# -- draws and moments -------------------------------------------------------------------------------------------------------------


@each
def test_draws_follow_the_masses_and_the_mean_is_theirs(family: Family) -> None:
    likelihood = family.make(1, spatial_dims=0, levels=family.levels)
    h = features(likelihood, (1,), seed=3)
    masses = np.exp(family.log_masses(h.numpy(), 1, family.levels))[0, 0]
    torch.manual_seed(0)
    draws = likelihood(h).sample((20_000,)).numpy().ravel()
    counts = np.bincount(np.round(draws * (family.levels - 1)).astype(int), minlength=family.levels)
    common = masses * len(draws) > 10
    expected = np.append(masses[common], masses[~common].sum()) * len(draws)
    seen = np.append(counts[common], counts[~common].sum())
    few = expected > 0
    assert stats.chisquare(seen[few], expected[few] * seen.sum() / expected.sum()).pvalue > 1e-3
    if family.name.startswith("continuous"):
        assert stats.kstest(draws, lambda x: np.expm1(float(h) * x) / np.expm1(float(h))).pvalue > 1e-3
    else:
        assert set(np.round(draws * (family.levels - 1), 4)) <= set(range(family.levels))
        mean = masses @ np.linspace(0, 1, family.levels)
        np.testing.assert_allclose(float(likelihood(h).mean), mean, rtol=1e-9)


def test_colours_follow_the_masses() -> None:
    likelihood = LogisticMixture(3, components=2, spatial_dims=0, levels=4)
    h = features(likelihood, (1,), seed=1)
    masses = colour_masses(h[0].numpy(), 4)
    torch.manual_seed(0)
    draws = torch.round(likelihood(h).sample((40_000,))[:, 0] * 3).long()
    counts = torch.bincount(draws @ torch.tensor([16, 4, 1]), minlength=64).numpy()
    assert stats.chisquare(counts, masses.ravel() / masses.sum() * len(draws)).pvalue > 1e-3
    red = masses.sum((1, 2)) @ np.arange(4) / 3
    mean = likelihood(h).mean[0]
    assert float(mean[0]) == pytest.approx(red, rel=1e-9)
    # The later channels' mean is approximate: exact but for the cut at the ends of the range.
    assert mean[1:].numpy() == pytest.approx([masses.sum(axis) @ np.arange(4) / 3 for axis in ((0, 2), (0, 1))], abs=0.06)


@every
def test_a_generator_decides_the_draws(family: Family) -> None:
    p = make(family, 0)(features(make(family, 0), (50,)))
    a, b = (p.sample(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


# Both sides of where the series ends, and of 0.
LOGITS = np.array([0, 1e-12, 1e-6, 1e-3, 0.0999, 0.1001, 0.7, 5, 40])
LOGITS = np.concatenate([-LOGITS[::-1], LOGITS])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_reparametrised_draws_are_quantiles_and_move_as_they_do(dtype: torch.dtype, close: float) -> None:
    """Truth: x = log(1 + u(e^h - 1))/h and its slope in h, in 60 digits, with the very u that was drawn."""

    def quantile(u: float, h: float) -> mpmath.mpf:
        with mpmath.workdps(60):
            return mpmath.log1p(mpmath.mpf(u) * mpmath.expm1(h)) / mpmath.mpf(h) if h else mpmath.mpf(u)

    def slope(u: float, h: float) -> mpmath.mpf:
        with mpmath.workdps(60):
            u, h, grown = mpmath.mpf(u), mpmath.mpf(h), mpmath.mpf(u) * mpmath.expm1(h)
            return u * mpmath.exp(h) / (h * (1 + grown)) - mpmath.log1p(grown) / h**2 if h else u * (1 - u) / 2

    h = torch.from_numpy(LOGITS).to(dtype)[:, None].expand(-1, 20).clone().requires_grad_()
    p = ContinuousBernoulli(1, spatial_dims=0)(h.reshape(-1, 1))
    assert p.has_rsample
    x = p.rsample(generator=torch.Generator().manual_seed(0))
    u = torch.rand(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).flatten().tolist()
    (found,) = torch.autograd.grad(x.sum(), h)
    pairs = list(zip(u, h.flatten().tolist(), strict=True))
    np.testing.assert_allclose(x.detach().flatten(), [float(quantile(*pair)) for pair in pairs], rtol=0, atol=close)
    np.testing.assert_allclose(found.flatten(), [float(slope(*pair)) for pair in pairs], rtol=0, atol=close)
    assert torch.equal(x, p.sample(generator=torch.Generator().manual_seed(0)))


def test_reparametrised_draws_stay_in_range_at_extremes_and_others_have_none() -> None:
    h = torch.tensor([-1e4, -200.0, 200.0, 1e4]).repeat_interleave(1000)[:, None].requires_grad_()
    x = ContinuousBernoulli(1, spatial_dims=0)(h).rsample()
    (slope,) = torch.autograd.grad(x.sum(), h)
    assert x.min() >= 0
    assert x.max() <= 1
    assert slope.isfinite().all()
    assert slope.min() >= 0
    p = Categorical(1, spatial_dims=0)(torch.zeros(2, 256))
    assert not p.has_rsample
    with pytest.raises(ValueError, match="are levels and have no gradient"):
        p.rsample()


# -- gradients -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100])
@every
def test_gradients_in_parts_are_the_numeric_ones(family: Family, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = min(family.levels, 4)
    likelihood = make(family, 1, levels)
    monkeypatch.setattr("sigma_vae.likelihoods.densities.CPU_FEATURES", rows * likelihood.in_channels * 2)
    h = features(likelihood, (4,), (2,)).requires_grad_()
    x = torch.from_numpy(np.random.default_rng(0).integers(0, levels, (4, family.channels, 2)) / (levels - 1))
    assert torch.autograd.gradcheck(
        lambda h: likelihood(h, x).log_prob(x), h, rtol=1e-5, atol=1e-7, nondet_tol=1e-12
    )  # weighted by example


@pytest.mark.parametrize(
    "gradient", [None, lambda h, x, out: (h.sin() * x.cos()).sum(1) + 0 * out.copy_(x.cos() * h.cos()).sum()]
)
def test_in_chunks_is_plain_autograd(gradient) -> None:
    h, x = torch.randn(2, 7, 5, dtype=torch.float64)
    h.requires_grad_()

    def formula(h, x):
        return (h.sin() * x.cos()).sum(1)

    parts, whole, weights = in_chunks(formula, h, x, gradient, features=10), formula(h, x), torch.arange(7.0).double()
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    for _ in range(2):  # a graph that is retained gives the same again
        ours, theirs = (torch.autograd.grad(value, h, weights, retain_graph=True)[0] for value in (parts, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(value, h, weights, create_graph=True)[0] for value in (parts, whole)]
    ours, theirs = (torch.autograd.grad(slope.square().sum(), h)[0] for slope in slopes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    size=st.sampled_from([0.0, 1.0, 20.0, 200.0, 1e4]), half=st.booleans(), seed=st.integers(0, 99), row=st.sampled_from(ALL)
)
def test_nothing_is_ever_infinite(size: float, half: bool, seed: int, row: Family) -> None:
    likelihood = make(row, 1)
    generator = torch.Generator().manual_seed(seed)
    h = size * (2 * torch.rand((2, likelihood.in_channels, row.levels), generator=generator) - 1)
    h = (h.bfloat16() if half else h).requires_grad_()
    x = (torch.arange(row.levels) / (row.levels - 1)).expand(2, row.channels, -1)
    for value in (likelihood(h, x).log_prob(x), likelihood.log_mass(h, x)):
        assert value.dtype == torch.float32
        (slope,) = torch.autograd.grad(value.sum(), h)
        assert value.isfinite().all()
        assert slope.isfinite().all()
    p = likelihood(h.detach())
    assert ((p.mean >= 0) & (p.mean <= 1)).all()
    assert ((p.sample() >= 0) & (p.sample() <= 1)).all()


# -- a module among others -----------------------------------------------------------------------------------------------------------


@every
def test_nothing_is_stored_and_eval_does_not_look_at_x(family: Family) -> None:
    likelihood = make(family, 1).eval()
    assert not likelihood.state_dict()
    h, x = features(likelihood, (3,), (8,)), levels_of(family, (3, family.channels, 8))
    likelihood.calibrate([(h, x)])
    value = likelihood(h).log_prob(x)
    torch.testing.assert_close(likelihood.train()(h, 1 - x).log_prob(x), value, rtol=0, atol=0)
    torch.testing.assert_close(likelihood.distribution(h, refitted=True).log_prob(x), value, rtol=0, atol=0)


@every
def test_a_family_without_a_scale_says_so(family: Family) -> None:
    likelihood = make(family, 1)
    h = features(likelihood, (3,), (8,))
    claims = (likelihood.has_scale, likelihood.takes_scale, likelihood.predicts_scale, likelihood.has_post_hoc)
    assert not any(claims)
    assert likelihood.sigma() is None
    assert likelihood.refitted_log_scales() == {}
    likelihood.start(0.5)
    p = likelihood(h)
    assert not p.exponential_family
    assert p.standardised(p.mean) is None
    if family.name.startswith("logistic"):
        assert p.squared_errors(p.mean, p.mean) is None
    else:
        variance, square = p.squared_errors(p.mean + 0.5, p.mean)
        torch.testing.assert_close(square, torch.full_like(square, 0.25))
        torch.testing.assert_close(variance, p.moments()[1])


@pytest.mark.parametrize("levels", [2, 5])
def test_a_density_that_is_asked_for_levels_draws_them(levels: int) -> None:
    likelihood = ContinuousBernoulli(1, spatial_dims=0, levels=levels)
    h, values = torch.tensor([[1.7]], dtype=torch.float64), torch.arange(levels, dtype=torch.float64) / (levels - 1)
    p = likelihood.distribution(h, observes="level")
    masses = torch.stack([p.log_prob(value.reshape(1, 1)).exp() for value in values]).flatten()
    assert masses.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.mean.item() == pytest.approx(float(masses @ values), abs=1e-12)
    assert not p.has_rsample
    assert p.moments() is None
    draws = p.sample((20_000,), generator=torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount((draws * (levels - 1)).round().long(), minlength=levels)
    assert set(draws.tolist()) <= set(values.tolist())
    assert stats.chisquare(counts.numpy(), masses.numpy() * len(draws)).pvalue > 1e-3


# -- mistakes ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Categorical(1)(torch.zeros(2, 255, 4, 4)), "reads 256 decoder channels, got 255"),
        (lambda: LogisticMixture(3)(torch.zeros(2)), "reads 100 decoder channels"),
        (lambda: LogisticMixture(3, components=0), "at least 1 component, got 0"),
        (lambda: BitwiseCategorical(1, levels=17), "power of two levels, as in 256, got 17"),
        (lambda: Categorical(1, levels=None), "needs to know how many"),
        (lambda: Categorical(1, spatial_dims=0)(torch.zeros(1, 256), torch.full((1, 1), 0.1234)), "expects levels k/255"),
        (lambda: ContinuousBernoulli(1, spatial_dims=0)(torch.zeros(1, 1), torch.full((1, 1), 1.5)), r"data in \[0, 1\]"),
        (
            lambda: ContinuousBernoulli(1, spatial_dims=0).log_mass(torch.zeros(1, 1), torch.full((1, 1), 0.1234)),
            "levels k/255",
        ),
        (lambda: ContinuousBernoulli(1, levels=None).log_mass(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), "real-valued"),
        (lambda: Bernoulli(1).log_mass(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), "objective, not a likelihood"),
        (lambda: Bernoulli(1)(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 2)), "was given data of shape"),
        (lambda: Bernoulli(1, levels=2)(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.3)), "levels k/1"),
        (lambda: Categorical(1).distribution(torch.zeros(1, 256, 1, 1), observes="density"), "has no density"),
        (lambda: models.likelihood("categorical/optimal", 1), "takes no scale"),
        (lambda: models.likelihood("categorical:3", 1), "categorical takes nothing after a colon"),
        (lambda: models.likelihood("logistic-mixture:0", 1), "takes a number of components, got '0'"),
        (lambda: models.likelihood("continuous-bernoulli", 1, observes="level"), "not on the probabilities of their levels"),
        (lambda: models.likelihood("logistic-mixtur", 1), "did you mean 'logistic-mixture'"),
    ],
)
def test_mistakes_are_named(mistake, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


# -- training ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["bernoulli", "continuous-bernoulli", "categorical", "bitwise-categorical", "logistic-mixture:2", "logistic-mixture"],
)
def test_it_trains_is_evaluated_and_drawn(name: str, tmp_path) -> None:
    out, source = tmp_path / "run", "digits"
    if name.startswith("bitwise"):  # 16 levels: a power of two
        from sklearn.datasets import load_digits

        source = str(tmp_path / "digits16.npz")
        images = load_digits().images.clip(0, 15)[:300] / 15
        np.savez(source, train=np.uint8(np.round(images * 255)))
    words = ["train", source, "--network", "mlp", "--width", "16", "--max-steps", "8", "--likelihood", name, "--out", str(out)]
    assert main(words) == 0
    report = json.loads((out / "evaluation.json").read_text())
    assert ("bits_per_dim" in report) == (name != "bernoulli")
    assert ("objective_nats" in report) == (name == "bernoulli")
    assert main(["sample", str(out), "--n", "4"]) == 0
    assert main(["score", str(out)]) == 0
