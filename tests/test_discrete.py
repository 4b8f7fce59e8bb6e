"""Laws of the families without a scale: bounded, discrete, logistic mixture. Truth is scipy's, mpmath's or NumPy's, in float64."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from sigma_vae import Bernoulli, BitwiseCategorical, Categorical, ContinuousBernoulli, LogisticMixture
from sigma_vae.likelihoods.unscaled import Unscaled

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
    masses = logistic_bins(rest[:, 0], np.exp(rest[:, 1]), levels)
    return np.log(np.einsum("pk,pckl->pcl", weights, masses))


def colour_masses(h: np.ndarray, levels: int) -> np.ndarray:
    """One pixel's features to the masses of all colours, (levels, levels, levels)."""
    components = len(h) // 10
    weights, rest = special.softmax(h[:components]), h[components:].reshape(3, 3, components)
    (r, g, b), scales, (gr, br, bg) = rest[0], np.exp(rest[1]), np.tanh(rest[2])
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
    np.testing.assert_allclose(likelihood.log_mass(h, x, post_hoc=True).numpy(), truth, rtol=1e-9)
    if not family.name.startswith("continuous"):
        np.testing.assert_allclose(p.log_prob(torch.stack([x, x])).numpy(), [truth, truth], rtol=1e-9)


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
