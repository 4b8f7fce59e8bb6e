"""Floors on σ are relative: no unit, no number of levels, and no spread of the data makes them tell in ordinary data."""

import math

import numpy as np
import pytest
import torch
from cases import FAMILIES, NAMES, Family, log_mass
from scipy import stats

from sigma_vae import Fixed, Gaussian, Optimal, PerImage, PerPixel, RunningMinimum, Shared, StudentT, models
from sigma_vae.cli import main
from sigma_vae.likelihoods.logistic_mixture import LogisticMixture
from sigma_vae.likelihoods.scales import OLD_BOUNDS

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
