"""Laws of the families without a scale: bounded, discrete, logistic mixture. Truth is scipy's, mpmath's or NumPy's, in float64."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch import Tensor

from sigma_vae import Bernoulli, BitwiseCategorical, Categorical, ContinuousBernoulli, LogisticMixture, models
from sigma_vae.cli import main
from sigma_vae.likelihoods.base import Unscaled
from sigma_vae.likelihoods.densities import in_chunks

# -- what NumPy and scipy say: log-masses of all levels, (pixels, channels, levels), from features (pixels, in_channels) ----------


def bernoulli(h: np.ndarray, channels: int, levels: int) -> np.ndarray:
    return stats.bernoulli.logpmf(np.arange(2), special.expit(h)[..., None])


def continuous_bernoulli(h: np.ndarray, channels: int, levels: int) -> np.ndarray:
    edges = np.clip((np.arange(levels + 1) - 0.5) / (levels - 1), 0, 1)

    def integral(logit: float, low: float, high: float) -> float:
        return integrate.quad(lambda x: np.exp(logit * x), low, high, epsabs=0, epsrel=1e-12)[0]

    masses = [[integral(logit, *bin) for bin in itertools.pairwise(edges)] for logit in h.ravel()]
    totals = [integral(logit, 0, 1) for logit in h.ravel()]
    return np.log(np.array(masses) / np.array(totals)[:, None]).reshape(*h.shape, levels)


def categorical(h: np.ndarray, channels: int, levels: int) -> np.ndarray:
    return special.log_softmax(h.reshape(len(h), channels, levels), axis=-1)


def bitwise(h: np.ndarray, channels: int, levels: int) -> np.ndarray:
    width = levels.bit_length() - 1
    bits = np.array([[int(bit) for bit in f"{k:0{width}b}"] for k in range(levels)])
    p = special.expit(h.reshape(len(h), channels, 1, width))
    return stats.bernoulli.logpmf(bits, p).sum(-1)


def logistic_bins(means: np.ndarray, scales: np.ndarray, levels: int) -> np.ndarray:
    """Masses of all levels, (..., levels), from the nearer tail."""
    edges = 2 * (np.arange(1, levels) - 0.5) / (levels - 1) - 1
    below = stats.logistic.cdf(edges, means[..., None], scales[..., None])
    above = stats.logistic.sf(edges, means[..., None], scales[..., None])
    below = np.concatenate([np.zeros_like(below[..., :1]), below, np.ones_like(below[..., :1])], -1)
    above = np.concatenate([np.ones_like(above[..., :1]), above, np.zeros_like(above[..., :1])], -1)
    return np.where(below[..., :-1] > 0.5, -np.diff(above), np.diff(below))


def mixture(h: np.ndarray, channels: int, levels: int) -> np.ndarray:
    components = h.shape[1] // (1 + 2 * channels)
    logits, rest = h[:, :components], h[:, components:].reshape(len(h), 2, channels, components)
    weights = special.softmax(logits, -1)
    least = np.log(255 / (levels - 1)) - 7  # VDVAE's, for 256 levels
    masses = logistic_bins(rest[:, 0], np.exp(np.maximum(rest[:, 1], least)), levels)
    return np.log(np.einsum("pk,pckl->pcl", weights, masses))


def colour_masses(h: np.ndarray, levels: int) -> np.ndarray:
    """One pixel's features to the masses of all colours, (levels, levels, levels)."""
    components = len(h) // 10
    weights, rest = special.softmax(h[:components]), h[components:].reshape(3, 3, components)
    (r, g, b), scales, (gr, br, bg) = rest[0], np.exp(np.maximum(rest[1], np.log(255 / (levels - 1)) - 7)), np.tanh(rest[2])
    y = np.linspace(-1, 1, levels)
    red = logistic_bins(r, scales[0], levels)  # (K, R)
    green = logistic_bins(g[:, None] + gr[:, None] * y, np.broadcast_to(scales[1][:, None], (components, levels)), levels)
    means = b[:, None, None] + br[:, None, None] * y[:, None] + bg[:, None, None] * y
    blue = logistic_bins(means, np.broadcast_to(scales[2][:, None, None], means.shape), levels)
    return np.einsum("k,kr,krg,krgb->rgb", weights, red, green, blue)


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[..., Unscaled]
    log_masses: Callable[[np.ndarray, int, int], np.ndarray]
    levels: int = 256
    channels: int = 2
    """Of the brute-force tests: the mixture's channels share a component, so that one channel's masses say all."""


FAMILIES = (
    Family("bernoulli", Bernoulli, bernoulli, levels=2),
    Family("continuous-bernoulli", ContinuousBernoulli, continuous_bernoulli),
    Family("continuous-bernoulli-2", ContinuousBernoulli, continuous_bernoulli, levels=2),
    Family("categorical", Categorical, categorical),
    Family("categorical-17", Categorical, categorical, levels=17),
    Family("bitwise-categorical", BitwiseCategorical, bitwise),
    Family("logistic-mixture", lambda *a, **k: LogisticMixture(*a, components=3, **k), mixture, channels=1),
    Family("logistic-mixture-2", lambda *a, **k: LogisticMixture(*a, components=3, **k), mixture, levels=2, channels=1),
)
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SHAPES = {"table": ((5,), (3,)), "series": ((5,), (2, 7)), "image": ((4,), (3, 4, 5)), "clip": ((2, 3), (1, 4, 4))}


def features(likelihood: Unscaled, batch: tuple[int, ...], space: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(1.5 * random.standard_normal((*batch, likelihood.in_channels, *space)) - 0.7)


def levels_of(family: Family, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    x = np.random.default_rng(seed).integers(0, family.levels, shape) / (family.levels - 1)
    x.flat[:2] = 0, 1
    return torch.from_numpy(x)


def all_masses(family: Family, likelihood: Unscaled, h: Tensor) -> Tensor:
    """Our log-masses (pixels, channels, levels) of one channel at a time: the others' level is held, its mass taken off."""
    ours = torch.empty(len(h), family.channels, family.levels, dtype=torch.float64)
    single = family.make(1, spatial_dims=0, levels=family.levels)
    per_channel = h.reshape(len(h), family.channels, -1)
    for c, k in itertools.product(range(family.channels), range(family.levels)):
        x = torch.full((len(h), 1), k / (family.levels - 1), dtype=h.dtype)
        ours[:, c, k] = single.log_mass(per_channel[:, c], x).double()
    return ours


# -- probabilities ---------------------------------------------------------------------------------------------------------------


@each
def test_masses_are_the_references_and_sum_to_one(family: Family) -> None:
    likelihood = family.make(family.channels, spatial_dims=0, levels=family.levels)
    h = features(likelihood, (6,))
    h[0, : family.channels] = torch.tensor([1e-7, -0.49])[: family.channels]  # where the continuous Bernoulli turns uniform
    truth = family.log_masses(h.numpy(), family.channels, family.levels)

    ours = all_masses(family, likelihood, h)

    np.testing.assert_allclose(ours.numpy(), truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.exp().sum(-1).numpy(), 1, atol=1e-12)
    np.testing.assert_allclose(all_masses(family, likelihood, h.float()).exp().sum(-1).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
@each
def test_log_mass_sums_over_the_event(family: Family, kind: str) -> None:
    batch, event = SHAPES[kind]
    likelihood = family.make(event[0], spatial_dims=len(event) - 1, levels=family.levels)
    h, x = features(likelihood, batch, event[1:]), levels_of(family, (*batch, *event))
    if family.log_masses is mixture and event[0] > 1:
        single = likelihood(h).log_prob(x)
        assert single.shape == batch  # the numbers are those of the colour and channel tests below
        return
    flat = np.moveaxis(h.numpy(), len(batch), -1).reshape(-1, likelihood.in_channels)
    levels = np.moveaxis(np.round(x.numpy() * (family.levels - 1)).astype(int), len(batch), -1).reshape(-1, event[0])
    truth = np.take_along_axis(family.log_masses(flat, event[0], family.levels), levels[..., None], -1)
    truth = truth.reshape(int(np.prod(batch)), -1).sum(1).reshape(batch)

    p = likelihood(h, x)

    assert (p.batch_shape, p.event_shape) == (batch, event)
    assert p.mean.shape == p.sample().shape == (*batch, *event)
    assert p.sample((7,)).shape == (7, *batch, *event)
    np.testing.assert_allclose(likelihood.log_mass(h, x).numpy(), truth, rtol=1e-9)
    np.testing.assert_allclose(likelihood.log_mass(h, x, refitted=True).numpy(), truth, rtol=1e-9)
    if not family.name.startswith("continuous"):
        np.testing.assert_allclose(p.log_prob(torch.stack([x, x])).numpy(), [truth, truth], rtol=1e-9)


# -- distribution functions ------------------------------------------------------------------------------------------------------


def marginal_masses(family: Family, h: np.ndarray) -> np.ndarray:
    """Masses (pixels, channels, levels) of each channel by itself."""
    return np.exp(family.log_masses(h, family.channels, family.levels))


@each
def test_level_cdf_adds_up_the_references_masses(family: Family) -> None:
    likelihood = family.make(family.channels, spatial_dims=0, levels=family.levels)
    h = features(likelihood, (6,))
    h[0, : family.channels] = torch.tensor([1e-7, -0.49])[: family.channels]
    upto = marginal_masses(family, h.numpy()).cumsum(-1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        found = []
        for k in range(family.levels):
            x = torch.full((6, family.channels), k / (family.levels - 1), dtype=dtype)
            found.append(torch.stack(likelihood.element_cdf(h.to(dtype), x, "level"), -1))
        ours = torch.stack(found, -2).double().numpy()
        np.testing.assert_allclose(ours[..., 1], upto, rtol=0, atol=tolerance)
        np.testing.assert_allclose(ours[..., 1:, 0], upto[..., :-1], rtol=0, atol=tolerance)
        assert (ours[..., 0, 0] == 0).all()
        assert (ours[..., -1, 1] == 1).all()
        assert (np.diff(ours[..., 1]) >= 0).all()
        mass = [
            family.make(1, spatial_dims=0, levels=family.levels).log_mass(
                h.reshape(6 * family.channels, -1).to(dtype),
                torch.full((6 * family.channels, 1), k / (family.levels - 1), dtype=dtype),
            )
            for k in range(family.levels)
        ]
        mass = torch.stack(mass, -1).exp().double().reshape(6, family.channels, family.levels).numpy()
        np.testing.assert_allclose(ours[..., 1] - ours[..., 0], mass, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("kind", SHAPES)
@each
def test_cdfs_have_the_shape_of_the_data(family: Family, kind: str) -> None:
    batch, event = SHAPES[kind]
    likelihood = family.make(event[0], spatial_dims=len(event) - 1, levels=family.levels)
    h, x = features(likelihood, batch, event[1:]), levels_of(family, (*batch, *event))
    both = torch.stack(likelihood.element_cdf(h, x, "level"))
    assert both.shape == (2, *x.shape)
    # Each place is by itself: its features alone give the same.
    flat = likelihood.element_cdf if not event[1:] else family.make(event[0], spatial_dims=0, levels=family.levels).element_cdf
    axis = len(batch)
    rows = torch.stack(
        flat(h.movedim(axis, -1).reshape(-1, likelihood.in_channels), x.movedim(axis, -1).reshape(-1, event[0]), "level")
    )
    torch.testing.assert_close(both.movedim(axis + 1, -1).reshape(2, -1, event[0]), rows, rtol=1e-12, atol=1e-12)
    assert torch.equal(both, torch.stack(likelihood.element_cdf(h, x, "level", refitted=True)))


def test_the_mixtures_channels_are_given_those_before() -> None:
    levels = 7
    likelihood = LogisticMixture(3, components=4, spatial_dims=0, levels=levels)
    colours = torch.cartesian_prod(*[torch.arange(levels, dtype=torch.float64) / (levels - 1)] * 3)
    for pixel in features(likelihood, (3,)):
        masses = colour_masses(pixel.numpy(), levels)
        red, green = masses.sum((1, 2)), masses.sum(2)
        given = [
            np.broadcast_to(red[:, None, None], masses.shape),
            np.broadcast_to((green / red[:, None])[:, :, None], masses.shape),
            masses / green[:, :, None],
        ]
        below, upto = likelihood.element_cdf(pixel.expand(len(colours), -1), colours, "level")
        for c, mass in enumerate(given):
            total = mass.cumsum(c)
            np.testing.assert_allclose(upto[:, c].numpy(), total.ravel(), rtol=1e-9)
            np.testing.assert_allclose(below[:, c].numpy(), (total - mass).ravel(), rtol=1e-9, atol=1e-12)


def test_two_channels_of_a_mixture_are_given_the_first_though_they_share_but_the_component() -> None:
    likelihood = LogisticMixture(2, components=3, spatial_dims=0, levels=17)
    pairs = torch.cartesian_prod(*[torch.arange(17, dtype=torch.float64) / 16] * 2)
    (h,) = features(likelihood, (1,)).numpy()
    weights, (means, log_scales) = special.softmax(h[:3]), h[3:].reshape(2, 2, 3)
    bins = logistic_bins(means, np.exp(log_scales), 17)
    joint = np.einsum("k,ka,kb->ab", weights, *bins)
    _, upto = likelihood.element_cdf(torch.from_numpy(h).expand(len(pairs), -1), pairs, "level")
    np.testing.assert_allclose(upto[:, 0].numpy(), np.repeat(joint.sum(1).cumsum(), 17), rtol=1e-9)
    np.testing.assert_allclose(upto[:, 1].numpy(), (joint / joint.sum(1, keepdims=True)).cumsum(1).ravel(), rtol=1e-9)


def test_many_rows_give_the_cdfs_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture and the categorical work part by part."""
    monkeypatch.setattr("sigma_vae.likelihoods.densities.CPU_FEATURES", 64)
    for likelihood in (LogisticMixture(3, components=2, spatial_dims=1, levels=17), Categorical(2, spatial_dims=1, levels=17)):
        h = features(likelihood, (9,), (5,))
        x = torch.randint(0, 17, (9, likelihood.channels, 5)).double() / 16
        together = likelihood.element_cdf(h, x, "level")
        for i in range(9):
            for ours, one in zip(together, likelihood.element_cdf(h[i : i + 1], x[i : i + 1], "level"), strict=True):
                torch.testing.assert_close(ours[i : i + 1], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("logit", [-1e4, -30, -0.5, -0.4999, -1e-3, -1e-9, 0, 1e-5, 0.3, 2, 30, 1e4])
def test_the_continuous_bernoulli_distribution_function_and_variance(logit: float) -> None:
    points = [0.0, 1e-5, 0.3, 0.5, 0.999, 1.0]
    with mpmath.workdps(60):
        t = mpmath.mpf(logit)
        cdf = [float(mpmath.expm1(t * mpmath.mpf(x)) / mpmath.expm1(t) if t else mpmath.mpf(x)) for x in points]
        variance = float(1 / t**2 - 1 / (4 * mpmath.sinh(t / 2) ** 2) if t else mpmath.mpf(1) / 12)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-6)):
        x = torch.tensor(points, dtype=dtype)[:, None]
        p = ContinuousBernoulli(1, spatial_dims=0)(torch.full_like(x, logit))
        below, upto = p.element_cdf(x)
        assert torch.equal(below, upto)
        np.testing.assert_allclose(upto[:, 0].double().numpy(), cdf, rtol=0, atol=tolerance)
        np.testing.assert_allclose(p.moments()[1][:, 0].double().numpy(), variance, rtol=100 * tolerance)


@each
def test_the_distribution_function_of_draws_is_uniform(family: Family) -> None:
    density = family.name.startswith("continuous")
    likelihood = family.make(3, spatial_dims=0, levels=family.levels)
    torch.manual_seed(5)
    h = features(likelihood, (7000,))
    x = likelihood(h).sample(generator=torch.Generator().manual_seed(6))
    values = []
    for draws in (x, 1 - x):
        below, upto = likelihood.element_cdf(h, draws, "density" if density else "level")
        values.append(below + torch.rand(below.shape, dtype=below.dtype) * (upto - below))
    own, mirrored = values
    assert stats.kstest(own.flatten().numpy(), "uniform").pvalue > 1e-2
    assert stats.kstest(mirrored.flatten().numpy(), "uniform").pvalue < 1e-4
    correlations = np.corrcoef(
        stats.norm.ppf(own.clamp(1e-9, 1 - 1e-9).numpy().T)
    )  # channels, given those before, are independent
    assert np.abs(correlations - np.eye(3)).max() < 4 / np.sqrt(len(own))


@each
def test_moments_are_the_brute_force_sums(family: Family) -> None:
    likelihood = family.make(family.channels, spatial_dims=0, levels=family.levels)
    h = features(likelihood, (6,))
    moments = likelihood(h).moments()
    if family.log_masses is mixture:
        assert moments is None
        return
    if family.log_masses is continuous_bernoulli:
        return  # above, of the density
    masses, grid = marginal_masses(family, h.numpy()), np.arange(family.levels) / (family.levels - 1)
    mean = (masses * grid).sum(-1)
    np.testing.assert_allclose(moments[0].numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(moments[1].numpy(), (masses * grid**2).sum(-1) - mean**2, rtol=1e-8)
    torch.testing.assert_close(moments[0], likelihood(h).mean)


def test_what_has_no_distribution_function_says_so() -> None:
    h, x = torch.zeros(2, 1), torch.full((2, 1), 0.5)
    with pytest.raises(ValueError, match="objective, not a likelihood"):
        Bernoulli(1, spatial_dims=0).element_cdf(h, torch.ones(2, 1), "level")
    with pytest.raises(ValueError, match="has no density"):
        Categorical(1, spatial_dims=0, levels=3).element_cdf(torch.zeros(2, 3), x, "density")
    with pytest.raises(ValueError, match="real-valued data"):
        ContinuousBernoulli(1, spatial_dims=0, levels=None).element_cdf(h, x, "level")
    with pytest.raises(ValueError, match="off"):
        Bernoulli(1, spatial_dims=0, levels=2).element_cdf(h, x, "level")


def test_the_mixtures_colours_are_the_references_and_sum_to_one() -> None:
    levels = 17
    likelihood = LogisticMixture(3, components=4, spatial_dims=0, levels=levels)
    colours = torch.cartesian_prod(*[torch.arange(levels, dtype=torch.float64) / (levels - 1)] * 3)
    h = features(likelihood, (3,))
    for pixel in h:
        ours = likelihood.log_mass(pixel.expand(len(colours), -1), colours)
        truth = colour_masses(pixel.numpy(), levels)
        np.testing.assert_allclose(ours.numpy(), np.log(truth).ravel(), rtol=1e-9)
        assert float(ours.exp().sum()) == pytest.approx(1, abs=1e-12)
        ours = likelihood.log_mass(pixel.float().expand(len(colours), -1), colours.float())
        assert float(ours.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_channels_of_the_mixture_share_its_component() -> None:
    likelihood = LogisticMixture(2, components=3, spatial_dims=0, levels=17)
    pairs = torch.cartesian_prod(*[torch.arange(17, dtype=torch.float64) / 16] * 2)
    (h,) = features(likelihood, (1,)).numpy()
    weights, (means, log_scales) = special.softmax(h[:3]), h[3:].reshape(2, 2, 3)
    bins = logistic_bins(means, np.exp(log_scales), 17)
    truth = np.log(np.einsum("k,ka,kb->ab", weights, *bins)).ravel()
    ours = likelihood.log_mass(torch.from_numpy(h).expand(len(pairs), -1), pairs)
    np.testing.assert_allclose(ours.numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("logit", [-1e4, -30, -0.5, -0.4999, -1e-3, -1e-9, 0, 1e-5, 0.3, 2, 30, 1e4])
def test_the_continuous_bernoulli_density_has_its_normaliser_mean_and_gradient(logit: float) -> None:
    with mpmath.workdps(60):
        t, x = mpmath.mpf(logit), mpmath.mpf(0.3)
        normaliser = mpmath.log(mpmath.expm1(t) / t) if t else mpmath.mpf(0)
        mean = 1 / (1 - mpmath.exp(-t)) - 1 / t if t else mpmath.mpf(0.5)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-6)):
        h = torch.tensor([[logit]], dtype=dtype, requires_grad=True)
        p = ContinuousBernoulli(1, spatial_dims=0)(h)
        value = p.log_prob(torch.tensor([[0.3]], dtype=dtype)).sum()
        value.backward()
        assert value.item() == pytest.approx(float(t * x - normaliser), rel=tolerance, abs=tolerance)
        assert p.mean.item() == pytest.approx(float(mean), rel=tolerance, abs=tolerance / 10)
        assert h.grad.item() == pytest.approx(float(x - mean), rel=tolerance, abs=tolerance)


def test_the_mixtures_far_tails_are_mpmaths() -> None:
    likelihood = LogisticMixture(1, components=1, spatial_dims=0)
    for mean, log_scale, k in itertools.product([-3.0, 0.1, 40.0], [-7.0, -2.0, 9.0, 20.0], [0, 1, 128, 254, 255]):
        with mpmath.workdps(2500):  # of a difference from 1
            y, s = mpmath.mpf(2 * k) / 255 - 1, mpmath.exp(mpmath.mpf(log_scale))
            ends = [(y + side * mpmath.mpf(1) / 255 - mean) / s for side in (-1, 1)]
            low, high = (1 / (1 + mpmath.exp(-end)) for end in ends)
            truth = mpmath.log((1 if k == 255 else high) - (0 if k == 0 else low))
        h = torch.tensor([[0.0, mean, log_scale]], dtype=torch.float64)
        ours = likelihood.log_mass(h, torch.tensor([[k / 255]], dtype=torch.float64))
        assert float(ours) == pytest.approx(float(truth), rel=1e-9), (mean, log_scale, k)


# -- Families without a scale in use: draws, gradients, extreme numbers, mistakes, compiling, training -----------------

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


@pytest.mark.parametrize("levels", [48, 50])
@pytest.mark.parametrize("peak", [0.0, 20.0, 40.0, 60.0, 1000.0, np.inf])
def test_the_categorical_is_the_softmax_wherever_its_peaks_are(
    peak: float, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shift by some of the levels alone would overflow from 88 on. Beside an infinite peak other levels are impossible."""
    monkeypatch.setattr("sigma_vae.likelihoods.densities.CPU_FEATURES", 1)  # a row at a time
    monkeypatch.setattr("sigma_vae.likelihoods.discrete.CPU_BLOCK", 250 * levels)
    torch.manual_seed(0)
    h, k = 3 * torch.randn(5, levels, 601), torch.randint(levels, (5, 1, 601))
    at_peak = torch.zeros_like(h, dtype=torch.bool).scatter_(1, torch.randint(levels, k.shape), True)
    if peak == np.inf:
        h = h.masked_fill(~at_peak.scatter(1, k, True), -np.inf)
    else:
        h[2:] += peak * at_peak[2:]  # the first rows take the shift by some levels
    h64, h = h.double().requires_grad_(), h.requires_grad_()
    value = Categorical(1, spatial_dims=1, levels=levels)(h).log_prob(k / (levels - 1))
    truth = torch.log_softmax(h64, 1).gather(1, k).sum((1, 2))
    weights = torch.arange(1.0, 6.0)
    (slope,), (true_slope,) = torch.autograd.grad(value, h, weights), torch.autograd.grad(truth, h64, weights.double())
    torch.testing.assert_close(value, truth.float(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(slope, true_slope.float(), rtol=0, atol=1e-5)


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
