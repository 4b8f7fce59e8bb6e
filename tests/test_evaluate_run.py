"""One evaluation of a finished run: a section for each metric, kept while the weights stay; runs side by side."""

import json
import math
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from sigma_vae import runs
from sigma_vae.cli import main
from sigma_vae.evaluation import score
from sigma_vae.evaluation.settings import EvaluationSettings

CHEAP = ("iwae", "oracle", "information", "calibration", "quality")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A TorchScript file: eight features of an image."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    path = tmp_path_factory.mktemp("features") / "eight.pt"
    torch.jit.trace(network, torch.zeros(1, 1, 8, 8)).save(str(path))
    return path


@pytest.fixture(scope="module")
def evaluated(digits_run, features, tmp_path_factory):
    """A copy of the run, with every metric measured."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(digits_run, run)
    settings = EvaluationSettings(metrics=CHEAP, draws=4, features=(str(features),), samples=100)
    runs.evaluate_run(run, settings, device="cpu")
    return run


@pytest.fixture(scope="module")
def other(digits_config, tmp_path_factory):
    """The same data, another likelihood."""
    run = tmp_path_factory.mktemp("other") / "run"
    model = replace(digits_config.model, likelihood="gaussian/fixed:1.0", prior="mixture:3")
    runs.train(replace(digits_config, model=model, training=replace(digits_config.training, epochs=1)), run, progress=False)
    return run


def stored(run):
    return json.loads((run / "evaluation.json").read_text())


def test_every_metric_has_its_section_and_says_how_it_was_measured(evaluated):
    report = stored(evaluated)
    assert set(CHEAP) <= set(report)
    assert report["iwae"]["draws"] == 4
    assert report["iwae"]["iwae_nats"]["mean"] > report["elbo_nats"]["mean"]
    assert report["oracle"]["leak_nats"]["mean"] > 0
    quality = report["quality"]["eight.pt"]
    assert (quality["examples"], quality["split"], quality["extractor"]["dim"]) == (100, "test", 8)
    assert set(quality["samples"]) == {"means", "draws"}
    assert report["how"]["model_sha256"]
    assert (evaluated / "calibration.png").stat().st_size > 10_000
    assert str(evaluated) not in json.dumps(report)


def test_sections_are_kept_while_the_weights_stay(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = stored(run)
    runs.evaluate_run(run, EvaluationSettings(metrics=("iwae",), draws=2), device="cpu")
    after = stored(run)
    assert after.pop("iwae")["draws"] == 2
    before.pop("iwae")
    assert after == before
    runs.fit_prior(run, "gaussian", device="cpu")  # another model
    runs.evaluate_run(run, EvaluationSettings(metrics=()), device="cpu")
    assert not set(CHEAP) & set(stored(run))


def test_the_validation_split_has_a_file_of_its_own(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("evaluation.json", "calibration.png")}
    report = runs.evaluate_run(run, EvaluationSettings(metrics=("calibration",), split="validation"), device="cpu")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "calibration-validation.png").exists()
    assert report["split"] == "validation"
    assert report["examples"] == len(runs.open_run(run, "cpu").data.store("validation"))
    assert json.loads((run / "evaluation-validation.json").read_text()) == report


def test_what_cannot_be_measured_is_found_before_the_work_and_changes_nothing(evaluated, tmp_path, capsys):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = (run / "evaluation.json").read_bytes()
    assert main(["evaluate", str(run), "--metrics", "quality", "iwae", "--features", "nowhere.pt"]) == 1
    assert "there is no such file" in capsys.readouterr().err
    for words, says in (
        (["--draws", "0"], "draws is at least 1, got 0"),
        (["--samples", "0"], "samples is at least 1, got 0"),
        (["--best-of", "0"], "best_of is at least 1, got 0"),
        (["--batch-statistics"], "say of how many the best is taken"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", str(run), *words])
        assert says in " ".join(capsys.readouterr().err.split())
    assert (run / "evaluation.json").read_bytes() == before


def test_the_table_has_every_section(evaluated, features, tmp_path, capsys):
    run = shutil.copytree(evaluated, tmp_path / "run")
    assert main(["evaluate", str(run), "--metrics", "iwae", "--draws", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in (
        "iwae_nats, 2 draws",
        "leak_nats",
        "mutual_information_at_most_nats",
        "95 % interval covers",
        "Fréchet distance",
    ):
        assert word in printed


def test_runs_are_compared_by_what_compares(evaluated, other, capsys):
    first, second = runs.compare([evaluated, other])
    assert first["bits_per_dim_post_hoc"] == stored(evaluated)["bits_per_dim_post_hoc"]
    assert (first["prior"], second["prior"]) == ("standard", "mixture:3")
    assert first["frechet eight.pt"] == stored(evaluated)["quality"]["eight.pt"]["samples"]["means"]["frechet"]
    assert main(["compare", str(evaluated), str(other)]) == 0
    assert "gaussian/fixed:1.0" in "".join(capsys.readouterr().out.split())
    assert main(["compare", str(evaluated), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [first, second]


def test_paired_differences_are_of_each_example(evaluated, other):
    first, second = runs.compare([evaluated, other], paired=True, device="cpu")
    assert first["bits_per_dim_post_hoc - first"] is None
    bits = []
    for run in (evaluated, other):
        opened = runs.open_run(run, "cpu")
        scores = score(opened.vae, opened.data.batches("test", 64))
        bits.append((scores.rate - scores.log_mass_post_hoc).numpy() / (64 * math.log(2)))
    difference = bits[1] - bits[0]
    found = second["bits_per_dim_post_hoc - first"]
    assert found["mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert found["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)), rel=1e-4)
    means = [run["bits_per_dim_post_hoc"]["mean"] for run in (first, second)]
    assert found["mean"] == pytest.approx(means[1] - means[0], abs=1e-4)


def test_nats_of_densities_and_of_levels_are_not_compared(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    report = stored(run) | {"observes": "level"}
    (run / "evaluation.json").write_text(json.dumps(report))
    assert [row["elbo_post_hoc_nats"] for row in runs.compare([evaluated, run])] == [None, None]


@pytest.mark.parametrize(("key", "value"), [("data", "other.npz"), ("split", "validation"), ("examples", 3)])
def test_what_was_evaluated_on_something_else_is_not_compared(key, value, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(stored(run) | {key: value}))
    with pytest.raises(ValueError, match=f"different {key}"):
        runs.compare([evaluated, run])


def test_one_run_compares_with_nothing(evaluated, tmp_path):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        runs.compare([evaluated])
    with pytest.raises(ValueError, match="missing or broken"):
        runs.compare([evaluated, tmp_path])


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    for field in fields(EvaluationSettings):
        assert f"--{field.name.replace('_', '-')}" in text
