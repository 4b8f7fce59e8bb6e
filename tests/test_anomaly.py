"""Anomaly scores: exact values on a linear-Gaussian model, ranks, maps, windows, and the command line."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from linear_gaussian import DIM, Proposal, batches_of, draw_data, exact_log_likelihood

from sigma_vae import VAE, Categorical, Gaussian, mlp, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, RunConfig
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.data.tables import on_time_axis, windows
from sigma_vae.evaluation.anomaly import (
    SCORES,
    anomalies,
    check_scores,
    complexity_bits,
    element_nats,
    p_values,
)


def test_the_density_is_exact_where_the_posterior_is() -> None:
    """With the exact posterior every importance weight is p(x)."""
    x = draw_data(20)
    found = anomalies(Proposal("exact").vae(), batches_of(x), draws=3)
    np.testing.assert_allclose(-found.density, exact_log_likelihood(x.numpy()), rtol=1e-9)
    assert bool((found.reconstruction < found.density).all())
    assert bool((found.rate > 0).all())


def test_scores_do_not_depend_on_order_batch_or_call() -> None:
    x = draw_data(30)
    vae = Proposal("spread", spread=1.3).vae()
    one, again, other = (anomalies(vae, batches_of(values, size)) for values, size in ((x, 30), (x, 7), (x.flip(0), 30)))
    for name in ("density", "rate", "reconstruction"):
        torch.testing.assert_close(getattr(one, name), getattr(again, name), rtol=1e-12, atol=0)
        torch.testing.assert_close(getattr(one, name), getattr(other, name).flip(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("deviation", [None, (2.0,) * DIM])
def test_maps_add_up_to_the_reconstruction_in_the_data_s_units(deviation: tuple[float, ...] | None) -> None:
    x = draw_data(5)
    scaling = Scaling() if deviation is None else Scaling(mean=(0.0,) * DIM, deviation=deviation)
    found = anomalies(Proposal("exact").vae(), Batches(InMemory(x), scaling, 5), draws=4, maps=True)
    assert found.maps is not None
    assert found.maps.shape == x.shape
    torch.testing.assert_close(found.maps.flatten(1).sum(1), found.reconstruction)


@pytest.mark.parametrize("levels", [4, 256])
def test_maps_of_masses_add_up_too(levels: int) -> None:
    torch.manual_seed(0)
    likelihood = Categorical(1, levels=levels)
    h = torch.randn(2, levels, 3, 3).double()
    x = likelihood(h).sample()
    torch.testing.assert_close(element_nats(likelihood, h, x).sum((1, 2, 3)), -likelihood(h).log_prob(x), rtol=1e-6, atol=0)


def test_bits_of_levels_are_there_for_densities_too() -> None:
    torch.manual_seed(0)
    levels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    likelihood = Gaussian(1)
    vae = VAE(mlp((1, 4, 4), 1, latent_dim=2, width=8), likelihood)
    vae.calibrate([levels / 255])
    found = anomalies(vae, Batches(InMemory(levels), Scaling(256), 6))
    assert found.bits is not None
    # a density's nats differ from those of masses by the log of the distance of levels
    np.testing.assert_allclose(found.bits * np.log(2) - found.density, 16 * np.log(255), atol=1.5)


def test_p_values_are_uniform_for_examples_like_the_reference_and_never_too_small() -> None:
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(200):
        reference, new = (torch.tensor(rng.normal(size=n)) for n in (99, 50))
        rates.append(float((p_values(new, reference) <= 0.1).double().mean()))
    assert np.mean(rates) == pytest.approx(0.1, abs=0.02)
    ties = p_values(torch.tensor([1.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert ties.item() == pytest.approx(3 / 4)


def test_simple_examples_take_fewer_bits_under_a_compressor() -> None:
    noise = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    flat, noisy = complexity_bits(torch.cat([torch.zeros_like(noise), noise])).tolist()
    assert flat < 200
    assert noisy > 0.95 * 8 * noise.numel()


def test_scores_of_windows_go_back_to_their_times() -> None:
    series = np.arange(20.0).reshape(10, 2)
    parts = windows(series, 4, 3)
    assert parts.shape == (3, 2, 4)
    np.testing.assert_array_equal(parts[1], series[3:7].T)
    found = on_time_axis(np.array([1.0, 2.0, 6.0]), np.array([0, 3, 6]), 4, 11)
    np.testing.assert_array_equal(found, [1, 1, 1, 1.5, 2, 2, 4, 6, 6, 6, np.nan])
    for arguments, words in (((series, 0), "at least 1"), ((series, 11), "shorter window")):
        with pytest.raises(ValueError, match=words):
            windows(*arguments)


def test_names_of_scores_are_checked() -> None:
    assert check_scores(["all"]) == SCORES
    assert check_scores(["rate", "density"]) == ("density", "rate")
    with pytest.raises(ValueError, match="got 'bits'"):
        check_scores(["bits"])
    with pytest.raises(ValueError, match="at least 1"):
        anomalies(Proposal("exact").vae(), batches_of(draw_data(2)), draws=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    sizes = ("--network", "mlp", "--latent-dim", "2", "--width", "8", "--max-steps", "20")
    assert main(["train", "digits", *sizes, "--out", str(folder / "digits")]) == 0
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=80).round(3), "b": rng.choice(["x", "y"], 80)})
    frame.to_csv(folder / "table.csv", index=False)
    words = ("--likelihood", "mixed", *sizes, "--out", str(folder / "table"))
    assert main(["train", str(folder / "table.csv"), *words]) == 0
    return folder


def test_the_command_line_scores_draws_and_maps_the_oddest_images(trained) -> None:
    run = trained / "digits"
    assert main(["score", str(run)]) == 0
    plain = pd.read_csv(run / "scores-test.csv")
    assert list(plain.columns) == ["example", "split", "log_likelihood_nats", "rate_nats", "elbo_nats", "bits_per_dim"]
    assert main(["score", str(run), "--scores", "all", "--draws", "2", "--maps", str(trained / "maps.npz")]) == 0
    every = pd.read_csv(run / "scores-test.csv")
    pd.testing.assert_frame_equal(every[plain.columns], plain)
    added = [name for name in every if name not in plain]
    assert added == ["density_odd_nats", "bits_minus_complexity", "rate_odd_nats", "reconstruction_odd_nats", "p_value"]
    assert every.p_value.between(0, 1).all()
    assert (every.p_value.rank() + every.density_odd_nats.rank()).std() < 0.05 * len(every)
    maps = np.load(trained / "maps.npz")
    np.testing.assert_allclose(maps["maps"].reshape(len(every), -1).sum(1), every.reconstruction_odd_nats, rtol=1e-4, atol=1e-4)
    assert (run / "oddest-test.png").exists()


def test_the_command_line_lists_the_oddest_rows_of_a_table(trained, capsys) -> None:
    run = trained / "table"
    pd.DataFrame({"a": [0.0, 400.0], "b": ["x", "y"]}).to_csv(trained / "new.csv", index=False)
    words = ("--data", str(trained / "new.csv"), "--scores", "density", "p-value", "--maps", str(trained / "new.npz"))
    assert main(["score", str(run), *words]) == 0
    said = capsys.readouterr().out
    assert "the oddest by density_odd_nats:\n  1: " in said
    assert "most in a" in said
    assert np.load(trained / "new.npz")["columns"].tolist() == ["a", "b"]
    assert main(["score", str(run), "--scores", "bits-minus-complexity"]) == 1
    assert "levels" in capsys.readouterr().err


def test_series_are_scored_on_the_time_axis(tmp_path, capsys) -> None:
    times = np.arange(700)
    values = np.sin(times / 4) + 0.05 * np.random.default_rng(0).normal(size=700)
    pd.DataFrame({"value": values}).to_csv(tmp_path / "series.csv", index=False)
    values[500:510] += 2
    pd.DataFrame({"value": values}).to_csv(tmp_path / "new.csv", index=False)
    sizes = ("--network", "mlp", "--latent-dim", "4", "--width", "16", "--max-steps", "150")
    words = ("--window", "16", "--stride", "2", "--out", str(tmp_path / "run"))
    assert main(["train", str(tmp_path / "series.csv"), *sizes, *words]) == 0
    record = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["data"]
    assert record["counts"] == {"train": 276, "validation": 24, "test": 28}  # of 567, 63 and 70 times
    assert (
        main(["score", str(tmp_path / "run"), "--data", str(tmp_path / "new.csv"), "--scores", "density", "--draws", "4"]) == 0
    )
    found = pd.read_csv(tmp_path / "run/series-new.csv")
    assert len(found) == 700
    assert 490 <= found.density_odd_nats.argmax() < 520
    assert (tmp_path / "run/series-new.png").exists()
    assert main(["score", str(tmp_path / "run")]) == 0
    assert pd.read_csv(tmp_path / "run/series-test.csv").time.tolist() == list(range(630, 700))
    assert main(["train", str(tmp_path / "series.csv"), "--window", "400", "--out", str(tmp_path / "other")]) == 1
    assert "take a shorter window" in capsys.readouterr().err


def test_one_command_goes_from_a_csv_to_anomaly_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(400, 2))
    table = pd.DataFrame(cause @ rng.normal(size=(2, 5)) + 0.1 * rng.normal(size=(400, 5)), columns=list("abcde"))
    table.loc[[7, 77, 177], "a"] += 4
    table.to_csv("table.csv", index=False)
    train, asked = runs.train, []

    def shortly(config, folder, **words):
        asked.append((config, words))
        return train(replace(config, training=replace(config.training, max_steps=300)), folder, **words)

    monkeypatch.setattr("sigma_vae.cli.outputs.runs.train", shortly)
    assert main(["score", "table.csv", "--out", "scores.csv"]) == 0
    assert asked == [(RunConfig(DataConfig("table.csv")), {"progress": True})]
    found = pd.read_csv("scores.csv")
    assert len(found) == 400
    assert set(found.split) == {"train", "validation", "test"}
    assert set(found.density_odd_nats.nlargest(3).index) == {7, 77, 177}
    assert "177" in capsys.readouterr().out.partition("scores.csv")[2]
    assert main(["score", "table.csv"]) == 1
    assert "sigma-vae score runs/table --data table.csv" in capsys.readouterr().err
    assert main(["score", "nothing.csv"]) == 1
    assert "nothing.csv" in capsys.readouterr().err
