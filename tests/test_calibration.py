"""Calibration: models that are right by construction, models that are not, and the command that refits σ."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import batches_of, encoder_vae
from safetensors.torch import load_file
from scipy import integrate, special, stats
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from sigma_vae import (
    VAE,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Fixed,
    FlatNetwork,
    Gaussian,
    Laplace,
    LogisticMixture,
    Optimal,
    PerImage,
    PerPixel,
    StudentT,
    hierarchical,
    mlp,
    runs,
    sequence,
)
from sigma_vae.cli import main
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import evaluate
from sigma_vae.evaluation import information as module
from sigma_vae.evaluation.bounds import iwae
from sigma_vae.evaluation.calibration import INTERVALS, LAGS, PIT_BINS, Correlations, calibration, deciles
from sigma_vae.evaluation.information import information
from sigma_vae.evaluation.plots import save_page
from sigma_vae.networks.hierarchical import Diagonal, draw
from sigma_vae.priors import GaussianPrior, StandardNormal
from sigma_vae.runs.folder import sigma_fitted_on
from sigma_vae.types import Batch, Inference, Likelihood, Maps, Network, Prior
from sigma_vae.vae import keyed_noise

# -- models that are calibrated by construction: x is drawn from what the decoder makes of the very z that is drawn for it ----------

EXAMPLES, SPACE, LATENTS = 1500, (5, 6), 4


class Features(nn.Module):
    """A fixed affine map to features, of which some may be moved to make the model wrong."""

    def __init__(self, channels: int, shape: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(0.4 * torch.randn(LATENTS, channels, *shape, generator=random))
        self.bias = nn.Parameter(torch.randn(channels, *shape, generator=random))
        self.move = move

    def forward(self, z: Tensor) -> Tensor:
        return self.move(torch.einsum("bl,l...->b...", z, self.weight) + self.bias)


class Nothing(nn.Module):
    """A posterior that is the prior."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2 * LATENTS)


def model(likelihood: Likelihood, move: Callable[[Tensor], Tensor] = lambda h: h) -> VAE:
    space = SPACE[: likelihood.spatial_dims]
    return VAE(FlatNetwork(Nothing(), Features(likelihood.in_channels, space, move), LATENTS), likelihood)


@torch.no_grad()
def drawn(vae: VAE, n: int = EXAMPLES) -> Tensor:
    """Data of the model itself, given the latents that an evaluation with seed 0 draws for them."""
    z = keyed_noise(torch.arange(n))(torch.Size([n, LATENTS]))
    torch.manual_seed(7)
    return vae.eval().likelihood(vae.network.decode(z)).sample()


def batches(x: Tensor, levels: int | None, size: int = 400) -> Batches:
    stored = x if levels is None else (x * (levels - 1)).round().to(torch.uint8)
    return Batches(InMemory(stored), Scaling(levels), size)


@dataclass(frozen=True)
class Right:
    name: str
    make: Callable[[], Likelihood]
    levels: int | None
    kind: str

    def report(self, move: Callable[[Tensor], Tensor] = lambda h: h) -> dict:
        x = drawn(model(self.make()))
        return calibration(model(self.make(), move), batches(x, self.levels))


RIGHT = (
    Right("gaussian", lambda: Gaussian(1, PerPixel(), levels=None), None, "density"),
    Right("gaussian-fixed", lambda: Gaussian(1, Fixed(0.7), levels=None), None, "density"),
    Right("laplace-per-image", lambda: Laplace(2, PerImage(), levels=None, spatial_dims=1), None, "density"),
    Right("student-t", lambda: StudentT(1, PerPixel(), df="predicted", levels=None), None, "density"),
    Right("continuous-bernoulli", lambda: ContinuousBernoulli(3, levels=None, spatial_dims=0), None, "density"),
    Right("gaussian-levels", lambda: Gaussian(1, PerPixel(), levels=17, observes="level"), 17, "level"),
    Right("categorical", lambda: Categorical(1, levels=5), 5, "level"),
    Right("bernoulli", lambda: Bernoulli(1, levels=2), 2, "level"),
    Right("logistic-mixture", lambda: LogisticMixture(3, components=2, levels=17), 17, "level"),
)
each_right = pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)


def outside_the_band(report: dict, kind: str) -> list[str]:
    """Intervals and bins whose counts a calibrated model would not show once in a thousand such tests (Bonferroni)."""
    n = report["values"]
    quantile = stats.norm.ppf(1 - 1e-3 / 2 / (len(INTERVALS) + PIT_BINS))
    expected = {name: float(name) / 100 for name in report[kind]["coverage"]}
    found = {name: one["mean"] for name, one in report[kind]["coverage"].items()}
    expected |= {f"bin {i}": 1 / PIT_BINS for i in range(PIT_BINS)}
    found |= {f"bin {i}": share for i, share in enumerate(report[kind]["pit"])}
    return [name for name, p in expected.items() if abs(found[name] - p) > quantile * math.sqrt(p * (1 - p) / n)]


@each_right
def test_a_model_that_is_right_lies_within_the_binomial_band(right: Right) -> None:
    report = right.report()
    assert report["examples"] == EXAMPLES
    assert sum(report[right.kind]["pit"]) == pytest.approx(1)
    assert outside_the_band(report, right.kind) == []
    kinds = {"density", "density_post_hoc", "level", "level_post_hoc"}
    assert all(report[other] is None for other in kinds - {right.kind})
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("right", [right for right in RIGHT if right.name.startswith("gaussian")], ids=lambda right: right.name)
def test_a_model_that_is_wrong_does_not(right: Right, factor: float) -> None:
    if right.name == "gaussian-fixed":
        x = drawn(model(right.make()))
        wrong = calibration(model(Gaussian(1, Fixed(0.7 * factor), levels=None)), batches(x, None))
    else:
        wrong = right.report(lambda h: torch.cat([h[:, :1], h[:, 1:] + math.log(factor)], 1))
    assert {"50", "80", "90", "95", "bin 0", "bin 9", "bin 10", "bin 19"} <= set(outside_the_band(wrong, right.kind))
    if right.levels is None and right.name == "gaussian-fixed":  # and by how much, in closed form
        for nominal in INTERVALS:
            truth = 2 * stats.norm.cdf(factor * stats.norm.ppf(0.5 + nominal / 2)) - 1
            error = 5 * math.sqrt(truth * (1 - truth) / wrong["values"])
            assert wrong["density"]["coverage"][f"{100 * nominal:g}"]["mean"] == pytest.approx(truth, abs=error)


def test_classes_that_are_too_sure_or_not_sure_enough_lie_outside() -> None:
    right = next(right for right in RIGHT if right.name == "categorical")
    for factor in (0.5, 2.0):
        assert {"50", "80"} <= set(outside_the_band(right.report(lambda h, factor=factor: factor * h), "level"))


def test_the_standard_error_is_that_of_examples() -> None:
    """Pixels of an image that are wrong together say less than their number: the error is that of independent examples."""
    n = 800
    shift = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = (shift + 0.01 * torch.randn(n, 1, *SPACE, generator=torch.Generator().manual_seed(1))).float()
    vae = model(Gaussian(1, Fixed(1.0), levels=None), lambda h: 0 * h)
    inside = calibration(vae, batches(x, None))["density"]["coverage"]["50"]
    shares = (x.abs() <= stats.norm.ppf(0.75)).float().mean((1, 2, 3)).numpy()
    assert inside["mean"] == pytest.approx(shares.mean(), abs=1e-4)
    assert inside["standard_error"] == pytest.approx(shares.std(ddof=1) / math.sqrt(n), rel=1e-3)


def test_a_single_example_has_no_standard_error() -> None:
    vae = model(Gaussian(1, Fixed(1.0), levels=None), lambda h: 0 * h)
    coverage = calibration(vae, batches(torch.zeros(1, 1, *SPACE), None))["density"]["coverage"]
    assert coverage == {f"{100 * nominal:g}": {"mean": 1.0, "standard_error": None} for nominal in INTERVALS}


def test_coverage_above_zero_leaves_out_the_least_level() -> None:
    x = torch.zeros(50, 1, *SPACE)
    x[:, :, 0, :3] = 1  # a tenth
    vae = model(Gaussian(1, Fixed(0.05), levels=256), lambda h: 0 * h)
    report = calibration(vae, batches(x, 256))["density"]
    assert report["coverage"]["90"]["mean"] == pytest.approx(0.9)
    assert set(report["coverage_above_zero"].values()) == {0.0}
    assert calibration(vae, batches(0 * x, 256))["density"]["coverage_above_zero"] is None


@pytest.mark.parametrize("right", [RIGHT[0], RIGHT[5], RIGHT[8]], ids=lambda right: right.name)
def test_no_number_depends_on_the_batch_size(right: Right) -> None:
    vae = model(right.make())
    x = drawn(vae, 60)
    reference, *others = (calibration(vae, batches(x, right.levels, size)) for size in (60, 1, 7))

    def flat(content: object) -> list[float]:
        parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else None
        if parts is None:
            return [-1.0 if content is None else float(content)]
        return [number for part in parts for number in flat(part)]

    truth = flat(reference.to_json())
    for other in others:
        assert len(flat(other.to_json())) == len(truth)
        for ours, theirs in zip(flat(other.to_json()), truth, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert calibration(vae, batches(x, right.levels), seed=1) != reference  # other draws


# -- σ against error ---------------------------------------------------------------------------------------------------------------


def test_bins_by_sigma_recover_a_known_heteroscedasticity() -> None:
    vae = model(Gaussian(1, PerPixel(), levels=None))
    x = drawn(vae, 4000)
    found = calibration(vae, batches(x, None))["sigma"]
    with torch.no_grad():
        h = vae.network.decode(keyed_noise(torch.arange(4000))(torch.Size([4000, LATENTS])))
        variance = vae.likelihood(h).scale.square().double().flatten()
    truth = [float(part.mean()) for part in variance.sort().values.tensor_split(10)]
    values = found["per_value"]
    assert sum(values["count"]) == x.numel()
    np.testing.assert_allclose(values["predicted_variance"], truth, rtol=1e-2)
    error = 5 * math.sqrt(2 * 10 / x.numel())  # of a mean of squares
    np.testing.assert_allclose(values["mean_squared_error"], truth, rtol=2 * error)
    per_example = found["per_example"]
    assert per_example["count"] == [400] * 10
    assert per_example["predicted_variance"] == sorted(per_example["predicted_variance"])
    np.testing.assert_allclose(per_example["mean_squared_error"], per_example["predicted_variance"], rtol=0.15)


def test_one_sigma_is_one_bin_and_has_no_correlation() -> None:
    vae = model(Gaussian(1, Fixed(0.7), levels=None))
    found = calibration(vae, batches(drawn(vae), None))["sigma"]
    for name, count in (("per_value", EXAMPLES * 30), ("per_example", EXAMPLES)):
        assert found[name]["count"] == [count]
        assert found[name]["predicted_variance"] == pytest.approx([0.49])
        assert found[name]["mean_squared_error"] == pytest.approx([0.49], rel=0.05)
    assert found["correlation_of_logs"] is None


def test_a_sigma_for_each_image_goes_with_its_error() -> None:
    vae = model(Laplace(1, PerImage(), levels=None), lambda h: torch.cat([h[:, :1], 3 * h[:, 1:]], 1))
    x = drawn(vae)
    found = calibration(vae, batches(x, None))["sigma"]
    with torch.no_grad():
        p = vae.likelihood(vae.network.decode(keyed_noise(torch.arange(EXAMPLES))(torch.Size([EXAMPLES, LATENTS]))))
        log_sigma, log_error = p.log_scale.flatten().numpy(), (x - p.loc).square().mean((1, 2, 3)).sqrt().log().numpy()
    assert found["correlation_of_logs"] == pytest.approx(np.corrcoef(log_sigma, log_error)[0, 1], abs=1e-4)
    assert found["correlation_of_logs"] > 0.5


@pytest.mark.parametrize("name", ["gaussian-levels", "categorical", "continuous-bernoulli", "bernoulli"])
def test_errors_of_levels_and_of_families_without_sigma_match_their_variance(name: str) -> None:
    """Of a model that is right; its discretized Gaussian has means far beyond the end levels."""
    right = next(right for right in RIGHT if right.name == name)
    found = right.report()["sigma"]["per_value"]
    assert len(found["count"]) >= 8  # fewer than ten where many predictions are the same
    ratio = np.array(found["mean_squared_error"]) / found["predicted_variance"]
    np.testing.assert_allclose(ratio, 1, atol=0.15)
    assert abs(np.average(ratio, weights=found["count"]) - 1) < 0.03


def test_what_has_no_variance_has_no_sigma_report() -> None:
    for likelihood, levels in ((StudentT(1, Fixed(0.3), df=2, levels=None), None), (LogisticMixture(1, levels=17), 17)):
        vae = model(likelihood)
        assert calibration(vae, batches(drawn(vae, 20), levels))["sigma"] is None


def test_deciles_are_quantile_bins() -> None:
    variance = torch.rand(103, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = deciles(variance, 3 * variance)
    truth = [part.mean() for part in np.array_split(np.sort(variance.numpy()), 10)]
    np.testing.assert_allclose(found["predicted_variance"], truth, rtol=1e-12)
    np.testing.assert_allclose(found["mean_squared_error"], 3 * np.array(truth), rtol=1e-12)
    assert len(deciles(variance[:4], variance[:4])["count"]) == 4


# -- residuals ---------------------------------------------------------------------------------------------------------------------


def ar1(rho: float, n: int, length: int, seed: int = 0) -> Tensor:
    """Stationary, of variance 1."""
    noise = np.random.default_rng(seed).standard_normal((n, length))
    r = noise.copy()
    for i in range(1, length):
        r[:, i] = rho * r[:, i - 1] + math.sqrt(1 - rho**2) * noise[:, i]
    return torch.from_numpy(r)


@pytest.mark.parametrize("rho", [0.0, 0.8, -0.5])
def test_the_autocorrelation_of_a_known_process(rho: float) -> None:
    n, width, height = 200, 40, 30
    r = ar1(rho, n * height, width).reshape(n, 1, height, width)
    correlations = Correlations(2)
    for part in r.split(64):
        correlations.add(part)
    found = correlations.report()
    error = 5 * math.sqrt((1 + rho**2) / (1 - rho**2)) / math.sqrt(r.numel())
    np.testing.assert_allclose(found["axes"]["width"]["autocorrelation"], [rho**k for k in range(LAGS + 1)], atol=error)
    np.testing.assert_allclose(found["axes"]["height"]["autocorrelation"], [1] + [0] * LAGS, atol=error)
    assert found["axes"]["width"]["pairs"] == [n * height * (width - k) for k in range(LAGS + 1)]
    assert found["channels"] is None
    assert found["count"] == r.numel()


@pytest.mark.parametrize("shape", [(9, 3, 6, 7), (9, 4, 2, 6, 7), (9, 2, 7)])
def test_correlations_are_numpys(shape: tuple[int, ...]) -> None:
    """With a mean, with channels that depend on each other, in frames, streamed."""
    dims = 1 if len(shape) == 3 else 2
    channel = len(shape) - dims - 1
    random = np.random.default_rng(0)
    r = 2 + random.standard_normal(shape) + random.standard_normal((*shape[:channel], 1, *shape[channel + 1 :]))
    correlations = Correlations(dims)
    for part in torch.from_numpy(r).split(4):
        correlations.add(part)
    found = correlations.report()
    names = {3: {"length": 2}, 4: {"height": 2, "width": 3}, 5: {"time": 1, "height": 3, "width": 4}}[len(shape)]
    assert found["axes"].keys() == names.keys()
    centred = r - r.mean()
    for name, axis in names.items():
        size = shape[axis]
        truth = [
            (np.take(centred, range(size - k), axis) * np.take(centred, range(k, size), axis)).mean() / r.var()
            for k in range(min(LAGS + 1, size))
        ]
        np.testing.assert_allclose(found["axes"][name]["autocorrelation"], truth, atol=1e-12)
    np.testing.assert_allclose(
        found["channels"], np.corrcoef(np.moveaxis(r, channel, 0).reshape(shape[channel], -1)), atol=1e-12
    )


@pytest.mark.parametrize("value", [0.0, 7.7])
def test_residuals_without_variation_have_no_correlations(value: float) -> None:
    """Nor where the sums' rounding looks like some."""
    correlations = Correlations(2)
    correlations.add(torch.full((64, 3, 28, 28), value))
    assert correlations.report() == {"axes": None, "channels": None, "count": 64 * 3 * 28 * 28}


@each_right
def test_the_residuals_of_a_model_that_is_right_are_white(right: Right) -> None:
    report = right.report()
    found, error = report["residuals"], 5 / math.sqrt(report["values"] / 3)
    for axis in (found["axes"] or {}).values():
        assert axis["autocorrelation"][0] == 1
        for value, pairs in zip(axis["autocorrelation"][1:], axis["pairs"][1:], strict=True):
            assert abs(value) < 5 / math.sqrt(pairs)
    if found["channels"] is not None:
        np.testing.assert_allclose(found["channels"], np.eye(len(found["channels"])), atol=error)
    assert (found["axes"] is None) == (right.make().spatial_dims == 0)


def test_what_a_decoder_misses_shows_in_its_residuals() -> None:
    x = 0.7 * ar1(0.6, EXAMPLES * 5, 6).reshape(EXAMPLES, 1, 5, 6)
    axes = calibration(model(Gaussian(1, Fixed(0.7), levels=None), lambda h: 0 * h), batches(x.float(), None))["residuals"][
        "axes"
    ]
    np.testing.assert_allclose(axes["width"]["autocorrelation"], [0.6**k for k in range(6)], atol=0.03)
    np.testing.assert_allclose(axes["height"]["autocorrelation"], [1, 0, 0, 0, 0], atol=0.03)


# -- all kinds of data and networks -------------------------------------------------------------------------------------------------


def colour() -> tuple[VAE, Batches]:
    network = hierarchical((3, 16, 16), 6, plan="4,4d2/2,4m2", latent_dim=2, width=4)
    return VAE(network, Gaussian(3, PerPixel(), mean="unit")), batches(torch.rand(10, 3, 16, 16), 256, 4)


def clips() -> tuple[VAE, Batches]:
    network = sequence((1, 32, 32), 1, latent_dim=2, width=2, context_frames=2)
    return VAE(network, Gaussian(1, Fixed(0.3), mean="unit")), batches(torch.rand(5, 6, 1, 32, 32), 256, 2)


def standardised() -> tuple[VAE, Batches]:
    store, scaling = InMemory(5 + 3 * torch.randn(40, 4)), Scaling(mean=(5.0,) * 4, deviation=(3.0,) * 4)
    likelihood = StudentT(4, Optimal(per="channel"), df="learned", spatial_dims=0, levels=None)
    return VAE(mlp((4,), 4, latent_dim=2, width=8), likelihood), Batches(store, scaling, 16)


@pytest.mark.parametrize(
    ("make", "values", "axes", "channels"),
    [
        (colour, 10 * 768, {"height": 9, "width": 9}, 3),
        (clips, 5 * 4 * 1024, {"time": 4, "height": 9, "width": 9}, None),
        (standardised, 160, None, 4),
    ],
    ids=["ladder", "clips", "table"],
)
def test_every_network_and_kind_of_data(
    make: Callable, values: int, axes: dict | None, channels: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae, data = make()
    vae.calibrate(data)
    report = calibration(vae.train(), data)
    assert not vae.training
    assert report["values"] == values == round(sum(report["sigma"]["per_value"]["count"]))
    optimal = isinstance(vae.likelihood.scale, Optimal)
    there = {"density"} | ({"level"} if vae.likelihood.levels else set())
    there |= set() if optimal else {f"{kind}_post_hoc" for kind in there}
    assert {name for name in ("density", "density_post_hoc", "level", "level_post_hoc") if report[name]} == there
    found = report["residuals"]
    assert (found["axes"] and {name: len(row["pairs"]) for name, row in found["axes"].items()}) == axes
    assert (found["channels"] and len(found["channels"])) == channels
    save_page(tmp_path / "page.png", json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert (tmp_path / "page.png").stat().st_size > 10_000


@dataclass(frozen=True)
class Masked:
    """One batch of clips of unequal lengths."""

    batch: Batch
    world_size: int = 1

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch


def test_frames_beyond_a_clips_end_count_for_nothing() -> None:
    torch.manual_seed(0)
    vae, _ = clips()
    x, mask = torch.rand(3, 6, 1, 32, 32), torch.arange(6) < torch.tensor([6, 4, 5])[:, None]
    stored = (x * 255).round() / 255
    empty = torch.where(mask[..., None, None, None], stored, 0)
    reports = [calibration(vae, Masked(Batch(frames, torch.arange(3), mask))) for frames in (stored, empty)]
    assert reports[0] == reports[1]
    assert reports[0]["values"] == (4 + 2 + 3) * 1024
    assert sum(reports[0]["sigma"]["per_value"]["count"]) == reports[0]["values"] == reports[0]["residuals"]["count"]
    assert "time" not in reports[0]["residuals"]["axes"]  # frames of one row follow those of another clip


def test_calibrating_moves_the_post_hoc_coverage_alone() -> None:
    vae = model(Gaussian(1, Fixed(2.0), levels=None), lambda h: 0 * h)
    x = 0.3 * torch.randn(EXAMPLES, 1, *SPACE, generator=torch.Generator().manual_seed(0))
    before = calibration(vae, batches(x, None))
    vae.calibrate(batches(x, None))
    after = calibration(vae, batches(x, None))
    assert before["density_post_hoc"] is None
    assert after["density"] == before["density"]
    assert after["density"]["coverage"]["50"]["mean"] > 0.99
    assert outside_the_band(after, "density_post_hoc") == []


def test_an_objective_and_broken_features_are_refused() -> None:
    vae = VAE(mlp((1, 5, 6), 1, latent_dim=2, width=4), Bernoulli(1))
    with pytest.raises(ValueError, match="objective, not a likelihood"):
        calibration(vae, batches(torch.rand(3, 1, 5, 6), 256))
    broken = model(Gaussian(1, Fixed(1.0), levels=None), lambda h: h * math.nan)
    with pytest.raises(ValueError, match="not finite"):
        calibration(broken, batches(torch.rand(3, 1, 5, 6), None))


# -- the page ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_page_is_written_in_the_form_that_its_ending_says(ending: str, tmp_path: Path) -> None:
    report = RIGHT[8].report()  # without variances
    path = tmp_path / f"page.{ending}"
    save_page(path, report, "a title")
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(begins)
    again = tmp_path / f"again.{ending}"
    save_page(again, report, "a title")
    assert ending == "svg" or again.read_bytes() == path.read_bytes()


def test_a_page_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="should end in"):
        save_page(tmp_path / "page.jpg", {})
    assert list(tmp_path.iterdir()) == []


# -- the command -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unit_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unit-variance run of seconds."""
    folder = tmp_path_factory.mktemp("runs") / "unit"
    words = ["train", "digits", "--network", "mlp", "--width", "16", "--latent-dim", "2", "--epochs", "1", "--start", "random"]
    words += ["--prior", "standard", "--likelihood", "gaussian/fixed:1.0", "--json"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(unit_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unit_run, tmp_path / "run"))


def noise_images(path: Path, n: int = 200, shape: tuple[int, ...] = (8, 8), levels: int = 17) -> Path:
    """Most values at one of the ends: less predictable than digits."""
    random = np.random.default_rng(0)
    values, ends = random.integers(0, levels, (n, *shape)), random.integers(0, 2, (n, *shape)) * (levels - 1)
    np.save(path, np.where(random.random((n, *shape)) < 0.8, ends, values).astype(np.uint8))
    return path


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_sigma_of_other_data_is_theirs_and_all_else_stays(run: Path, tmp_path: Path, capsys) -> None:
    before, old = json.loads((run / "evaluation.json").read_text()), load_file(run / "model" / "model.safetensors")
    path = noise_images(tmp_path / "noise.npy")
    capsys.readouterr()
    assert main(["calibrate", str(run), "--data", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    opened = runs.open_run(run, "cpu")

    scale = said["sigma_post_hoc"]
    x = np.load(path) / 16
    means = (
        opened.vae.likelihood(opened.vae.network.decode(torch.zeros(1, 2))).mean[0, 0].detach().numpy()
    )  # all latents collapsed
    assert scale["density"]["before"] == pytest.approx(before["sigma_post_hoc_density"])
    assert scale["density"]["after"] == pytest.approx(np.sqrt(np.square(x - means).mean()), rel=0.02)
    assert scale["level"]["after"] > scale["level"]["before"]

    new = load_file(run / "model" / "model.safetensors")
    assert {name for name in new if not torch.equal(new[name], old[name])} == {
        "likelihood.scale.density_log_scale",
        "likelihood.scale.level_log_scale",
    }
    after = json.loads((run / "evaluation.json").read_text())
    assert after == said["evaluation"]
    assert after["sigma_post_hoc_density"] == scale["density"]["after"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"entropy_identity", "how", "sigma_fitted_on"} == {
        "elbo_post_hoc_nats",
        "bits_per_dim_post_hoc",
        "sigma_post_hoc_density",
        "sigma_post_hoc_level",
    }
    assert after["bits_per_dim_post_hoc"]["mean"] > before["bits_per_dim_post_hoc"]["mean"] + 0.1  # σ is too wide for digits
    record = {"data": str(path), "split": "validation", "examples": 18, "noise_seed": 0}
    assert after["sigma_fitted_on"].items() >= record.items()
    assert sigma_fitted_on(run) == after["sigma_fitted_on"]


def test_the_runs_own_validation_split_gives_back_what_training_left(run: Path, capsys) -> None:
    before = json.loads((run / "evaluation.json").read_text())
    assert before["sigma_fitted_on"]["split"] == "validation"
    trained = before["sigma_fitted_on"]["training_sigma"]
    assert main(["calibrate", str(run), "--split", "train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sigma_post_hoc"]
    assert {name: found[name]["after"] for name in found} == pytest.approx(trained, rel=1e-5)
    assert main(["calibrate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "fitted on 162 examples of digits (validation)" in said
    assert sigma_fitted_on(run) == before["sigma_fitted_on"]
    assert main(["calibrate", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{before['sigma_post_hoc_density']:.5f} -> {before['sigma_post_hoc_density']:.5f}" in said
    after = json.loads((run / "evaluation.json").read_text())
    assert after["bits_per_dim_post_hoc"]["mean"] == pytest.approx(before["bits_per_dim_post_hoc"]["mean"], abs=1e-5)
    assert main(["calibrate", str(run), "--split", "test"]) == 0
    assert "held-out numbers" in capsys.readouterr().out
    best = json.loads((run / "evaluation.json").read_text())
    assert best["bits_per_dim_post_hoc"]["mean"] < after["bits_per_dim_post_hoc"]["mean"]  # no σ is better for these examples
    assert best["sigma_fitted_on"]["examples"] == best["examples"]


def test_commands_look_at_a_part_of_many_examples_and_say_so(run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sigma_vae.runs.evaluate.AFFORDABLE_VALUES", 100 * 64)
    monkeypatch.setattr("sigma_vae.runs.evaluate.CALIBRATION_VALUES", 100 * 64)
    assert main(["evaluate", str(run)]) == 0
    assert (part := runs.read_evaluation(run)).bounds.examples == 100
    assert part.of_examples == 180
    assert "100 of 180 test" in " ".join(capsys.readouterr().out.split())
    for options, words in (("", "100 of 162 examples"), ("--examples 200", "162 examples")):
        assert main(["calibrate", str(run), *options.split()]) == 0
        assert f"fitted on {words}" in capsys.readouterr().out
    for options in ("--examples 200", "--metrics calibration"):
        assert main(["evaluate", str(run), *options.split()]) == 0
        assert runs.read_evaluation(run).bounds.examples == 180


def test_a_refit_is_evaluated_on_as_many_examples_as_the_run_was_last(run: Path, capsys) -> None:
    for options, examples in (("--examples 20", "20 of 180"), ("", "180")):
        assert main(["evaluate", str(run), *options.split()]) == 0
        before = json.loads((run / "evaluation.json").read_text())
        assert main(["calibrate", str(run)]) == 0
        after = json.loads((run / "evaluation.json").read_text())
        assert (after["examples"], after["elbo_nats"]) == (before["examples"], pytest.approx(before["elbo_nats"], rel=1e-5))
        assert f"evaluated again on {examples} test examples" in capsys.readouterr().out


def test_a_config_says_how_other_data_are_read(run: Path, tmp_path: Path) -> None:
    noise_images(tmp_path / "noise.npy", n=100)
    config = f"data: {{source: {tmp_path / 'noise.npy'}, levels: 17, validation_fraction: 0.4}}"
    (tmp_path / "other.yaml").write_text(config)
    report = runs.calibrate_run(run, str(tmp_path / "other.yaml"), "validation", device="cpu", seed=3)
    record = {"data": str(tmp_path / "noise.npy"), "split": "validation", "examples": 36, "noise_seed": 3}
    assert report["sigma_fitted_on"].items() >= record.items()


def test_an_optimal_scale_has_no_other_sigma(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "digits", "--network", "mlp", "--width", "4", "--max-steps", "2", "--json", "--out", str(run)]) == 0
    before = json.loads((run / "evaluation.json").read_text())
    report = runs.calibrate_run(run, str(noise_images(tmp_path / "noise.npy")), device="cpu")["evaluation"]
    assert report["elbo_nats"] == report["elbo_post_hoc_nats"]
    assert report["elbo_nats"]["mean"] < before["elbo_nats"]["mean"] - 0.5


def test_standardised_data_are_read_by_the_runs_own_mean_and_deviation(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, mean in (("table", 3.0), ("other", 5.0)):
        np.savetxt(
            tmp_path / f"{name}.csv", mean + random.standard_normal((300, 3)), delimiter=",", header="a,b,c", comments=""
        )
    words = ["train", str(tmp_path / "table.csv"), "--network", "mlp", "--width", "4", "--max-steps", "2", "--json"]
    run = tmp_path / "run"
    assert main([*words, "--likelihood", "gaussian/fixed:1.0", "--out", str(run)]) == 0
    result = runs.calibrate_run(run, str(tmp_path / "other.csv"), device="cpu")
    density = result["sigma_post_hoc"]["density"]
    assert density["after"] > math.sqrt(3)  # two deviations away: √(1 + 2²), less what the untrained mean is off
    assert density["before"] < 1.5
    assert result["sigma_post_hoc"]["level"] == {"before": None, "after": None}
    table = (tmp_path / "other.csv").read_text()
    (tmp_path / "swapped.csv").write_text(table.replace("a,b,c", "b,a,c"))
    swapped = runs.calibrate_run(run, str(tmp_path / "swapped.csv"), device="cpu")["sigma_post_hoc"]["density"]
    assert swapped["after"] != density["after"]  # columns are read by their names
    config = f"data: {{source: {tmp_path / 'swapped.csv'}, standardise: 'yes'}}"
    (tmp_path / "swapped.yaml").write_text(config)
    with pytest.raises(ValueError, match=r"trained on the columns a, b, c, .*swapped.csv has b, a, c"):
        runs.calibrate_run(run, str(tmp_path / "swapped.yaml"), device="cpu")


def test_a_predicted_scale_gets_a_factor(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    words = ["train", "digits", "--network", "mlp", "--width", "4", "--max-steps", "2", "--likelihood", "gaussian/per-pixel"]
    assert main([*words, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(run), "--split", "validation"]) == 0
    assert "factor_post_hoc_density" in capsys.readouterr().out


MISFITS = {
    "no such data": ("nowhere.npy", "no such file"),
    "shape": ("small.npy", "examples of shape (1, 8, 8); got"),
    "levels": ("levels.npy", "needs integers in 0..16"),
    "real values": ("reals.npy", "needs values k/16"),
    "clips": ("clips.npy", "with clips of such frames"),
    "no config": ("broken.yaml", "cannot be read as YAML"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_data_that_do_not_fit_are_refused_and_nothing_changes(
    misfit: str, run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    noise_images(Path("small.npy"), shape=(6, 8))
    noise_images(Path("levels.npy"), levels=256)
    noise_images(Path("clips.npy"), shape=(4, 1, 8, 8), levels=17)
    np.save("reals.npy", np.random.default_rng(0).random((20, 8, 8)))
    Path("broken.yaml").write_text("data: {")
    before = contents(run)
    data, says = MISFITS[misfit]
    assert main(["calibrate", str(run), "--data", data]) == 1
    assert says in capsys.readouterr().err
    assert contents(run) == before


def test_a_likelihood_without_sigma_has_nothing_to_fit(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    words = ["train", "digits", "--network", "mlp", "--width", "4", "--max-steps", "2", "--likelihood", "categorical", "--json"]
    assert main([*words, "--out", str(run)]) == 0
    before = contents(run)
    assert main(["calibrate", str(run)]) == 1
    assert "has no σ to fit" in capsys.readouterr().err
    assert contents(run) == before


@pytest.mark.parametrize("interruption", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
@pytest.mark.parametrize("moment", ["while it is written", "before it takes its place"])
def test_an_interrupted_write_leaves_the_old_model(interruption, moment: str, run: Path, monkeypatch) -> None:
    before = contents(run)

    def never(*_: object) -> None:
        raise interruption

    function = "fsync" if moment == "while it is written" else "replace"
    monkeypatch.setattr(f"sigma_vae.config.os.{function}", never)
    assert main(["calibrate", str(run), "--split", "validation"]) in (1, 130)
    assert contents(run) == before


def test_training_on_forgets_what_sigma_was_fitted_on(run: Path) -> None:
    runs.calibrate_run(run, split="validation", device="cpu")
    assert sigma_fitted_on(run)["split"] == "validation"
    runs.calibrate_run(run, split="test", device="cpu")
    report = runs.resume(run, epochs=2, progress=False)
    assert sigma_fitted_on(run)["split"] == report["sigma_fitted_on"]["split"] == "validation"


# -- Laws of the information estimators: closed forms of Gaussian codes, all pairs of codes by SciPy, quadrature, saturation

DIM = 5
COVARIANCE = np.diag([4.0, 2.0, 1.0, 0.5, 0.1])
GAINS = {
    "few nats": np.array([[0.4, 0.3, 0.0, 0.0, 0.1], [0.0, -0.2, 0.5, 0.5, 0.0]]),
    "more nats": np.array([[1.0, 0.8, 0.0, 0.0, 0.3], [0.3, -0.7, 1.5, 1.0, 0.0]]),
}
DEVIATION = np.array([0.6, 0.9])


def gaussian_data(n: int, seed: int = 0) -> Tensor:
    """Whose mean is 0 and whose covariance is the one above, exactly: then so are the codes' moments."""
    x = np.random.default_rng(seed).standard_normal((n, DIM))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T @ np.sqrt(COVARIANCE)
    return torch.from_numpy(x).float()


def closed_forms(gain: np.ndarray, deviation: np.ndarray) -> tuple[float, float]:
    """Mutual information of x and z, and KL(q(z)‖N(0, I))."""
    of_means = gain @ COVARIANCE @ gain.T
    aggregate = of_means + np.diag(deviation**2)
    mutual = 0.5 * (np.linalg.slogdet(aggregate)[1] - 2 * np.log(deviation).sum())
    marginal = 0.5 * (np.trace(aggregate) - len(gain) - np.linalg.slogdet(aggregate)[1])
    return float(mutual), float(marginal)


@pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
def test_the_rate_falls_into_its_closed_forms(gain: np.ndarray) -> None:
    mutual, marginal = closed_forms(gain, DEVIATION)
    vae = encoder_vae(gain, DEVIATION)
    report = information(vae, batches_of(gaussian_data(3000)), batches_of(gaussian_data(3000, seed=1)))
    mean_kl = report["mean_kl_nats"]["mean"]
    assert mean_kl == pytest.approx(mutual + marginal, abs=0.01)
    assert report["marginal_kl_moments_nats"] == pytest.approx(marginal, abs=0.01)
    assert mean_kl - report["marginal_kl_moments_nats"] == pytest.approx(mutual, abs=0.01)
    held_out = report["marginal_kl_held_out_nats"]
    assert marginal - 0.1 < held_out["mean"] < marginal + 4 * held_out["standard_error"]
    best = max(report["marginal_kl_moments_nats"], held_out["mean"])
    assert report["marginal_kl_at_least_nats"] == best
    assert report["mutual_information_at_most_nats"] == pytest.approx(mean_kl - best, abs=1e-9)
    bracket = report["log_sum_exp"]
    assert bracket["mutual_information_at_least_nats"] - 0.08 < mutual < bracket["mutual_information_at_most_nats"] + 0.08
    for one, other in (("least", "most"), ("most", "least")):
        parts = bracket[f"mutual_information_at_{one}_nats"] + bracket[f"marginal_kl_at_{other}_nats"]
        assert parts == pytest.approx(mean_kl, abs=1e-6)


def test_the_bracket_is_what_scipy_says_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    n, gain = 120, GAINS["more nats"]
    x = gaussian_data(n)
    vae = encoder_vae(gain, DEVIATION)
    mean = x.double().numpy() @ gain.T
    z = mean + DEVIATION * keyed_noise(torch.arange(n), 4)(torch.Size([n, 2])).double().numpy()
    pairs = stats.norm.logpdf(z[:, None], mean, DEVIATION).sum(-1)
    own, others = pairs.diagonal(), np.where(np.eye(n, dtype=bool), -np.inf, pairs)
    at_least = (own - special.logsumexp(pairs, axis=1)).mean() + math.log(n)
    at_most = (own - special.logsumexp(others, axis=1)).mean() + math.log(n - 1)
    for chunk in (1, 7 * n, 10**6):
        monkeypatch.setattr(module, "CHUNK", chunk)
        bracket = information(vae, batches_of(x, 50), batches_of(x), seed=4)["log_sum_exp"]
        assert bracket["mutual_information_at_least_nats"] == pytest.approx(at_least, abs=1e-9)
        assert bracket["mutual_information_at_most_nats"] == pytest.approx(at_most, abs=1e-9)
        assert bracket["log_n_nats"] == math.log(n)


def test_standard_errors_are_those_of_other_test_examples() -> None:
    """Of many independent test sets the estimates spread as one of them says; the fitted densities are the same."""
    vae, training = encoder_vae(GAINS["more nats"], DEVIATION), batches_of(gaussian_data(2000, seed=1))
    random = np.random.default_rng(2)
    sets = [torch.from_numpy(random.standard_normal((200, DIM)) @ np.sqrt(COVARIANCE)).float() for _ in range(60)]
    reports = [information(vae, batches_of(x), training, seed=i) for i, x in enumerate(sets)]
    for place in ("", "log_sum_exp"):
        found = [report[place] if place else report for report in reports]
        assert found[0].standard_errors
        for name in found[0].standard_errors:
            spread = np.std([each[name] for each in found], ddof=1)
            said = np.mean([each.standard_errors[name] for each in found])
            assert 0.65 < said / spread < 1.5, (place, name)
    rows = {row.name: row for row in module.InformationMetric("information").rows(reports[0])}
    at_most = rows["mutual_information_at_most_nats (in expectation)"]
    assert at_most.standard_error == f"{reports[0].standard_errors['mutual_information_at_most_nats']:.4f}"


def test_a_report_without_standard_errors_is_read() -> None:
    """As versions before this one wrote it."""
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    content = information(vae, batches_of(x), batches_of(x)).to_json()
    del content["standard_errors"], content["log_sum_exp"]["standard_errors"]
    report = module.Information.from_json(content)
    assert report.to_json() == content
    assert all(row.value for row in module.InformationMetric("information").rows(report))


def test_the_bracket_saturates_and_the_certified_bound_does_not() -> None:
    n, gain, deviation = 400, 2 * np.eye(DIM)[:4], np.full(4, 1e-3)
    mutual, marginal = closed_forms(gain, deviation)
    report = information(encoder_vae(gain, deviation), batches_of(gaussian_data(n)), batches_of(gaussian_data(n, seed=1)))
    bracket = report["log_sum_exp"]
    assert mutual > math.log(n) + 10
    assert math.log(n) - 1e-6 < bracket["mutual_information_at_least_nats"] <= math.log(n) + 1e-9
    assert bracket["mutual_information_at_most_nats"] > mutual + 100  # worthless, too
    assert report["mutual_information_at_most_nats"] == pytest.approx(mutual, abs=0.2)
    assert report["marginal_kl_at_least_nats"] == pytest.approx(marginal, abs=0.2)


def test_of_two_clusters_the_held_out_density_knows_more_than_the_moments() -> None:
    """Against an integral of the aggregate posterior, a mixture of two Gaussians."""
    n, deviation = 2000, np.array([0.3])
    x = (torch.arange(n, dtype=torch.float32) % 2 * 4 - 2)[:, None]
    report = information(encoder_vae(np.ones((1, 1)), deviation), batches_of(x), batches_of(x))
    z = np.linspace(-6, 6, 20_001)
    q = 0.5 * (stats.norm.pdf(z, -2, 0.3) + stats.norm.pdf(z, 2, 0.3))
    truth = integrate.trapezoid(special.xlogy(q, q) - q * stats.norm.logpdf(z), z)
    held_out = report["marginal_kl_held_out_nats"]
    assert truth - 0.05 < held_out["mean"] < truth + 4 * held_out["standard_error"]
    assert report["marginal_kl_moments_nats"] < truth - 0.5
    assert report["marginal_kl_at_least_nats"] == held_out["mean"]


def test_a_fitted_prior_is_the_one_that_counts() -> None:
    gain = GAINS["more nats"]
    mutual, _ = closed_forms(gain, DEVIATION)
    vae, training = encoder_vae(gain, DEVIATION), gaussian_data(3000, seed=1)
    vae.fit_prior([training], GaussianPrior(2).double())
    report = information(vae, batches_of(gaussian_data(3000)), batches_of(training))
    assert report["marginal_kl_moments_nats"] is None
    assert report["mean_kl_nats"]["mean"] == pytest.approx(mutual, abs=0.05)
    assert 0 <= report["marginal_kl_at_least_nats"] < 0.05
    assert report["mutual_information_at_most_nats"] == pytest.approx(mutual, abs=0.05)


def test_training_codes_do_not_share_the_noise_of_test_codes() -> None:
    """Codes that are noise alone: a density that had seen the noise of the test codes would know them."""
    vae = encoder_vae(np.zeros((2, DIM)), np.ones(2))
    held_out = information(vae, batches_of(gaussian_data(300)), batches_of(gaussian_data(300, seed=1)))[
        "marginal_kl_held_out_nats"
    ]
    assert held_out["mean"] < 2 * held_out["standard_error"]


def test_no_bound_is_negative() -> None:
    """Where codes are those of the prior, what little was fitted to training codes is worse than it."""
    gain, deviation = np.zeros((2, DIM)), np.ones(2)
    report = information(encoder_vae(gain, deviation), batches_of(gaussian_data(300)), batches_of(gaussian_data(100, seed=1)))
    assert report["marginal_kl_held_out_nats"]["mean"] < 0
    assert 0 <= report["marginal_kl_at_least_nats"] < 1e-9
    assert report["mutual_information_at_most_nats"] == pytest.approx(0, abs=1e-9)


def test_few_examples_do_not_raise_the_bounds() -> None:
    """Where q(z) is the prior, but the moments of 40 of its codes are not those of it."""
    x, training = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (40, 4000))
    report = information(
        encoder_vae(math.sqrt(0.9) * np.eye(8), np.full(8, math.sqrt(0.1))), batches_of(x), batches_of(training)
    )
    spread = np.cov(x.numpy().T, bias=True)
    of_themselves = 0.9 * spread + 0.1 * np.eye(8)
    assert 0.5 * (np.trace(of_themselves) - 8 - np.linalg.slogdet(of_themselves)[1]) > 0.2
    assert report["marginal_kl_moments_nats"] < 0.02
    assert report["marginal_kl_at_least_nats"] < 0.02


def test_few_training_codes_give_no_density() -> None:
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    assert information(vae, batches_of(x), batches_of(x[:2]))["marginal_kl_held_out_nats"] is None
    assert information(vae, batches_of(x), batches_of(x[:3]))["marginal_kl_held_out_nats"] is not None


def test_of_many_examples_evenly_spaced_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian_data(250)
    vae = encoder_vae(GAINS["few nats"], DEVIATION)
    whole = information(vae, batches_of(x), batches_of(x))
    monkeypatch.setattr(module, "MOST_LATENTS", 100)
    report = information(vae, batches_of(x), batches_of(x))
    chosen = x[torch.arange(100) * 5 // 2]
    truth = kl_divergence(vae.encode(chosen), Normal(0.0, 1.0)).sum(1).mean()
    assert (whole["examples"], report["examples"]) == (250, 100)
    assert report["mean_kl_nats"]["mean"] == pytest.approx(truth.item(), rel=1e-6)
    assert report["active_units"] == whole["active_units"]


def test_of_many_training_examples_a_part_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced: of sorted data some of all sorts."""
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(250)
    part = information(vae, batches_of(x), batches_of(x[torch.arange(100) * 5 // 2]))
    monkeypatch.setattr(module, "MOST_TRAINING_LATENTS", 100)
    for share in ({}, {"size": 7}, {"size": 99}):
        report = information(vae, batches_of(x), batches_of(x, **share))
        assert report["marginal_kl_held_out_nats"] == pytest.approx(part["marginal_kl_held_out_nats"], rel=1e-9)


@pytest.mark.parametrize(("variance", "active"), [(0.0099, 0), (0.0101, 1)])
def test_a_unit_is_active_where_its_mean_varies_by_a_hundredth(variance: float, active: int) -> None:
    gain = np.zeros((2, DIM))
    gain[0, 2] = math.sqrt(variance)  # of data of variance 1
    vae, x = encoder_vae(gain, DEVIATION), gaussian_data(200)
    vae.calibrate([x])
    assert information(vae, batches_of(x), batches_of(x))["active_units"] == active
    assert evaluate(vae, batches_of(x, 33))["active_units"] == active


# -- networks of a user ----------------------------------------------------------------------------------------------------


class Own(Network):
    """Latents as maps, and a prior that is a part of the network, N(0, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(DIM, 2 * 4)
        self.decoder = nn.Linear(4, DIM)

    @property
    def latents(self) -> Maps:
        return Maps(1, 2, 2)

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> Normal:
        mean, log_std = self.encoder(x.flatten(1)).reshape(-1, 2, 1, 2, 2).unbind(1)
        return Normal(mean, log_std.exp())

    def decode(self, z: Any, condition: Tensor | None = None) -> Tensor:
        features: Tensor = self.decoder(z.flatten(1))
        return features

    def infer(self, x: Tensor, *given: Any, noise: Any = None, **others: Any) -> Inference:
        posterior = self.posterior(x)
        unit = torch.randn_like(posterior.loc) if noise is None else noise(posterior.loc.shape)
        z = posterior.loc + posterior.scale * unit
        prior = Normal(0.0, 1.0)
        log_ratio = (prior.log_prob(z) - posterior.log_prob(z)).flatten(1).sum(1)
        return Inference(self.decode(z), x, kl_divergence(posterior, prior).flatten(1).sum(1, keepdim=True), log_ratio)

    def generate(self, n: int, *given: Any, generator: Any = None, **others: Any) -> Tensor:
        return self.decode(torch.randn(n, 4, generator=generator))


class OwnWithPrior(Own):
    """The same, with the prior where others find it."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = Flattened(4)


class Flattened(Prior):
    """N(0, I) over maps."""

    is_standard = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = StandardNormal(size)

    def log_prob(self, z: Tensor) -> Tensor:
        return self.inner.log_prob(z.flatten(1))

    def kl(self, posterior: Normal, z: Tensor) -> Tensor:
        return self.inner.kl(Normal(posterior.loc.flatten(1), posterior.scale.flatten(1)), z.flatten(1))

    def sample(self, n: int, generator: Any = None, temperature: float = 1.0) -> Tensor:
        return self.inner.sample(n, generator, temperature)


def test_a_network_of_ones_own_has_information_whether_or_not_it_keeps_its_prior() -> None:
    reports, x = [], gaussian_data(300)
    for make in (Own, OwnWithPrior):
        torch.manual_seed(0)
        vae = VAE(make(), Gaussian(DIM, Fixed(0.3), spatial_dims=0, levels=None))
        vae.calibrate([x])
        evaluated = evaluate(vae, batches_of(x), batches_of(x))
        report = information(vae, batches_of(x, 64), batches_of(x))
        assert report.mean_kl_nats.mean == pytest.approx(evaluated.rate_nats.mean, rel=1e-5)
        assert (report.latent_dim, report.active_units) == (4, evaluated.active_units)
        assert iwae(vae, batches_of(x), draws=4, measures=["iwae_nats"]).iwae_nats.mean > evaluated.elbo_nats.mean - 0.5
        reports.append(report)
    assert reports[0].marginal_kl_moments_nats is None  # nobody knows that its prior is N(0, I)
    assert reports[1].marginal_kl_moments_nats is not None
    assert reports[0].marginal_kl_held_out_nats.mean == pytest.approx(reports[1].marginal_kl_held_out_nats.mean, abs=1e-4)
    first, second = (report.log_sum_exp.to_json() for report in reports)
    assert first.pop("standard_errors") == pytest.approx(second.pop("standard_errors"), abs=1e-5)
    assert first == pytest.approx(second, abs=1e-5)


# -- layers of latents -----------------------------------------------------------------------------------------------------


def ladder_and_images(n: int = 30) -> tuple[VAE, Batches]:
    torch.manual_seed(0)
    likelihood = Gaussian(1, Fixed(0.3))
    vae = VAE(hierarchical((1, 8, 8), 1, latent_dim=2, width=8, plan="8,8d2,4,4d2/2,4m2,8m4"), likelihood)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = Batches(InMemory(images), Scaling(256), 7)
    vae.calibrate(batches)
    return vae, batches


def test_the_layers_of_a_ladder_sum_to_its_rate() -> None:
    vae, batches = ladder_and_images()
    report, evaluated = information(vae, batches, batches, seed=3), evaluate(vae, batches, seed=3)
    assert sum(report["kl_per_layer_nats"]) == pytest.approx(report["mean_kl_nats"], abs=1e-9)
    assert report["mean_kl_nats"] == pytest.approx(evaluated["rate_nats"]["mean"], rel=1e-5)
    assert report["kl_per_layer_nats"] == pytest.approx(evaluated["kl_per_layer_nats"], rel=1e-5)
    assert report["latents_per_layer"] == [2 * 2 * 2, 2 * 4 * 4, 2 * 8 * 8]


def test_a_layer_that_says_nothing_has_no_active_latents() -> None:
    vae, batches = ladder_and_images()
    last = vae.network.decoder[1].posterior[-1]
    with torch.no_grad():
        last.weight.zero_()  # the posterior is N(0, 1), as every prior is at first
        last.bias[1] = math.sqrt(2 * 0.02)  # 0.02 nats at each place of one channel
        vae.network.decoder[2].posterior[-1].weight.zero_()
        vae.network.decoder[2].posterior[-1].bias[0] = math.sqrt(2 * 0.005)  # not enough
    report = information(vae, batches, batches)
    assert report["active_latents_per_layer"][1:] == [4 * 4, 0]
    assert report["kl_per_layer_nats"][1:] == pytest.approx([16 * 0.02, 64 * 0.005], rel=1e-4)


def test_the_kl_of_a_latent_is_that_of_its_gaussians() -> None:
    values = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    found = draw(Diagonal(values[0], values[1]), Diagonal(values[2], values[3]), values[4])
    torch.testing.assert_close(
        found.latent_kl, kl_divergence(Normal(values[0], values[1].exp()), Normal(values[2], values[3].exp()))
    )


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_other_latents_and_a_single_code_are_refused() -> None:
    clips = torch.zeros(2, 4, 1, 8, 8)
    video: Any = VAE(sequence((1, 8, 8), 1, latent_dim=2, width=2), Gaussian(1, Fixed(0.3)))
    with pytest.raises(ValueError, match=r"SequenceNetwork defines neither posterior\(x\)"):
        information(video, batches_of(clips), batches_of(clips))
    vae, x = encoder_vae(GAINS["few nats"], DEVIATION), gaussian_data(50)
    with pytest.raises(ValueError, match="at least two test examples"):
        information(vae, batches_of(x[:1]), batches_of(x))
