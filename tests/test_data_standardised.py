"""Real values in their own units: what is reported does not depend on the units a model works in, but by the Jacobian."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae import models, runs
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import as_splits, load, scaling
from sigma_vae.data.stores import InMemory

COLUMNS = 5
UNITS = np.array([1000.0, 0.01, 1.0, 60.0, 2.0])


def table(folder, units=1.0, name="table.npz"):
    state = np.random.RandomState(0)
    rows = state.normal(size=(400, 2)) @ state.normal(size=(2, COLUMNS)) + 0.1 * state.normal(size=(400, COLUMNS))
    rows = (rows + 5) * units
    np.savez(folder / name, train=rows[:300], validation=rows[300:350], test=rows[350:])
    return DataConfig(str(folder / name), standardise="yes")


def run(folder, data, likelihood):
    model = ModelConfig("mlp", likelihood, latent_dim=2, width=16, prior="standard")
    config = RunConfig(data, model, TrainingConfig(epochs=3, batch_size=32), device="cpu")
    return runs.train(config, folder, progress=False)


def metrics(folder, name):
    with (folder / "metrics.csv").open() as file:
        return np.array([float(row[name]) for row in csv.DictReader(file) if row.get(name)])


def test_channels_have_mean_0_and_deviation_1_on_training_data(tmp_path):
    data = load(table(tmp_path, UNITS))
    values = data.values("train").double()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0, correction=0), 1, rtol=1e-5)
    raw = np.load(tmp_path / "table.npz")
    np.testing.assert_allclose(data.scaling.undo(data.values("test")), raw["test"], rtol=1e-4)
    assert data.levels is None
    assert models.vae(ModelConfig("mlp"), data.shape, data.scaling).likelihood.mean == "identity"


@pytest.mark.parametrize("place", ["object", "file", "large"])
@pytest.mark.parametrize("offset", [1e3, 1.7e9])
def test_the_mean_is_subtracted_before_values_are_rounded(tmp_path, monkeypatch, place, offset):
    """In float32, each value would be off by up to half a step of numbers like the mean."""
    values = (offset + 1000 * np.random.RandomState(0).normal(size=(200, 3))).astype(np.float32)
    monkeypatch.setattr("sigma_vae.data.objects.LARGE", 1)
    np.save(tmp_path / "a.npy", values)
    data = {"object": values, "file": tmp_path / "a.npy", "large": np.load(tmp_path / "a.npy", mmap_mode="r")}[place]
    splits = as_splits(data, standardise="yes")
    exact = (splits.stored("test").double().numpy() - splits.scaling.mean) / splits.scaling.deviation
    np.testing.assert_array_equal(splits.values("test").numpy(), exact.astype(np.float32))
    (batch,) = splits.batches("test", 200)
    np.testing.assert_array_equal(batch.x.numpy(), exact.astype(np.float32))


def test_moments_are_those_of_all_examples_though_few_are_taken_together(monkeypatch):
    values = torch.from_numpy(np.random.RandomState(0).randn(90, 3, 4) * 5 + 1e3).float()
    monkeypatch.setattr(scaling, "CHUNK", 100)
    sizes, take = [], InMemory.take
    monkeypatch.setattr(InMemory, "take", lambda store, rows, epoch=0: sizes.append(len(rows)) or take(store, rows, epoch))
    found = scaling.standardisation(InMemory(values), "made")
    channels = values.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(found.mean, channels.mean(1), rtol=1e-14)
    np.testing.assert_allclose(found.deviation, channels.std(1), rtol=1e-12)
    assert max(sizes) == 8
    values[:, 1] = 0.1
    with pytest.raises(ValueError, match="1, counted from 0, have the same value"):
        scaling.standardisation(InMemory(values), "made")


@pytest.mark.parametrize("likelihood", ["gaussian/optimal", "gaussian/per-pixel", "student-t/optimal-channel"])
def test_other_units_shift_every_bound_by_the_jacobian(tmp_path, likelihood):
    one = run(tmp_path / "one", table(tmp_path, name="one.npz"), likelihood)
    other = run(tmp_path / "other", table(tmp_path, UNITS, "other.npz"), likelihood)
    jacobian = sum(math.log(unit) for unit in UNITS)
    for name in ("elbo_nats", "elbo_post_hoc_nats"):
        assert other[name]["mean"] == pytest.approx(one[name]["mean"] - jacobian, abs=1e-3)
    assert other["distortion_nats"]["mean"] == pytest.approx(one["distortion_nats"]["mean"] + jacobian, abs=1e-3)
    assert other["rate_nats"]["mean"] == pytest.approx(one["rate_nats"]["mean"], abs=1e-4)
    assert "bits_per_dim" not in other
    for name in ("train/loss_nats", "train/distortion_nats", "validation/elbo_nats", "validation/distortion_nats"):
        shifts = metrics(tmp_path / "other", name) - metrics(tmp_path / "one", name)
        np.testing.assert_allclose(shifts, -jacobian if "elbo" in name else jacobian, atol=1e-3)
    if likelihood == "gaussian/optimal":
        gaps = [report["entropy_identity"] for report in (one, other)]
        assert gaps[1]["elbo_nats"] == pytest.approx(gaps[0]["elbo_nats"] - jacobian, abs=1e-3)
        assert gaps[1]["gap_nats_per_dim"] == pytest.approx(gaps[0]["gap_nats_per_dim"], abs=1e-4)


def test_a_bound_in_the_datas_own_units_is_that_of_a_gaussian(tmp_path):
    """Independent columns, no latents used: the best bound is the entropy of the data, which numpy knows in their units."""
    state = np.random.RandomState(1)
    rows = state.normal(size=(4000, 3)) * [3.0, 0.5, 20.0]
    np.savez(tmp_path / "a.npz", train=rows[:3000], validation=rows[3000:3500], test=rows[3500:])
    model = ModelConfig("mlp", "gaussian/optimal", latent_dim=1, width=8)
    training = TrainingConfig(epochs=10, batch_size=100, learning_rate=3e-3)
    config = RunConfig(DataConfig(str(tmp_path / "a.npz"), standardise="yes"), model, training, device="cpu")
    report = runs.train(config, tmp_path / "run", progress=False)
    truth = -sum(0.5 * math.log(2 * math.pi * math.e * s**2) for s in (3.0, 0.5, 20.0))
    assert report["elbo_nats"]["mean"] == pytest.approx(truth, abs=0.15)
    saved = models.load(str(tmp_path / "run"))
    np.testing.assert_allclose(saved.scaling.deviation, rows[:3000].std(0), rtol=1e-5)


def test_series_are_standardised_channel_by_channel(tmp_path):
    array = np.random.RandomState(0).normal(size=(60, 2, 7)) * np.array([1.0, 50.0])[:, None]
    np.save(tmp_path / "a.npy", array)
    data = load(DataConfig(str(tmp_path / "a.npy"), layout="n-c-t", standardise="yes"))
    assert data.shape == (2, 7)
    assert len(data.scaling.deviation) == 2
    expected = 7 * sum(math.log(s) for s in data.scaling.deviation)
    assert data.scaling.log_volume_nats(data.shape) == pytest.approx(expected)
    assert data.values("train").std() == pytest.approx(1, abs=0.01)


def test_pictures_and_samples_are_in_the_datas_own_units(tmp_path):
    """Values about 0.75 that hardly differ: as standardised, half of them would be black."""
    values = 0.75 + 0.01 * np.random.RandomState(0).normal(size=(40, 1, 8, 8))
    np.save(tmp_path / "a.npy", values)
    model, training = ModelConfig("mlp", "gaussian/fixed:1", latent_dim=1, width=4), TrainingConfig(max_steps=1)
    data = DataConfig(str(tmp_path / "a.npy"), layout="n-c-h-w", standardise="yes")
    runs.train(RunConfig(data, model, training, device="cpu"), tmp_path / "run", progress=False)
    for name in ("samples", "reconstructions"):
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            shown = np.asarray(picture)
        assert shown.min() > 0.6 * 255, name


def test_misuse_is_refused(tmp_path):
    config = table(tmp_path)
    with pytest.raises(ValueError, match="--standardise yes"):
        load(replace(config, standardise="no"))
    rows = np.random.RandomState(0).normal(size=(50, 3))
    rows[:, 1] = 4
    np.save(tmp_path / "constant.npy", rows)
    with pytest.raises(ValueError, match="1, counted from 0, have the same value"):
        load(DataConfig(str(tmp_path / "constant.npy"), standardise="yes"))
    with pytest.raises(ValueError, match="256 levels, which are not standardised"):
        load(replace(config, levels=256))
    with pytest.raises(ValueError, match="17 levels, which are not standardised"):
        load(DataConfig("digits", standardise="yes"))


def test_undoing_is_the_inverse_on_any_device_and_shape(tmp_path):
    scaling = load(table(tmp_path)).scaling
    stored = torch.randn(4, COLUMNS) * 100
    torch.testing.assert_close(scaling.undo(scaling(stored)), stored.double(), rtol=1e-6, atol=1e-4)
