"""Sample quality: a model that is the source of the data is at the floor, others are far; no number depends on how it is made."""

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor, nn

from sigma_vae import VAE, FlatNetwork, Gaussian, models
from sigma_vae.config import ModelConfig
from sigma_vae.data import Scaling, Splits
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.features import load_extractor
from sigma_vae.evaluation.quality import quality, video_quality
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
