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
from sigma_vae.cli.runs import print_evaluation
from sigma_vae.config import EvaluationSettings
from sigma_vae.evaluation import Estimate, Evaluation, score
from sigma_vae.evaluation.bounds import IwaeMetric
from sigma_vae.evaluation.elbo import ElboResult
from sigma_vae.evaluation.quality import Features, VideoQuality
from sigma_vae.runs.folder import write_json

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
    runs.train(
        replace(digits_config, model=model, training=replace(digits_config.training, epochs=1, start="random")),
        run,
        progress=False,
    )
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
    assert (run / "calibration.png").exists()
    runs.fit_prior(run, "gaussian", device="cpu")  # another model
    assert not (run / "calibration.png").exists()
    runs.evaluate_run(run, EvaluationSettings(metrics=("oracle",)), device="cpu")
    assert set(CHEAP) & set(stored(run)) == {"oracle"}
    before = stored(run)
    assert runs.fit_prior(run, "gaussian", device="cpu") == before == stored(run)  # the same model


def test_resuming_what_is_finished_loses_nothing_and_what_is_not_leaves_nothing_behind(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = stored(run)
    runs.resume(run, progress=False)
    assert stored(run) == before
    assert (run / "calibration.png").exists()
    runs.resume(run, epochs=7, progress=False)
    assert not set(CHEAP) & set(stored(run))
    assert not (run / "calibration.png").exists()


def test_a_broken_report_is_measured_anew(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    (run / "evaluation.json").write_text((evaluated / "evaluation.json").read_text()[:100])
    report = runs.evaluate_run(run, EvaluationSettings(metrics=()), device="cpu")
    assert report == stored(run) == {name: value for name, value in stored(evaluated).items() if name not in CHEAP}


def test_a_report_stands_until_the_next_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"minutes": 10})

    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"minutes": 20})
    assert json.loads(path.read_text()) == {"minutes": 10}
    assert list(tmp_path.iterdir()) == [path]


def test_the_validation_split_has_a_file_of_its_own(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = [(run / name).read_bytes() for name in ("evaluation.json", "calibration.png")]
    report = runs.evaluate_run(run, EvaluationSettings(metrics=("calibration",), split="validation"), device="cpu")
    assert [(run / name).read_bytes() for name in ("evaluation.json", "calibration.png")] == before
    assert (run / "calibration-validation.png").read_bytes() != before[1]
    assert report["split"] == "validation"
    assert report["examples"] == len(runs.open_run(run, "cpu").data.store("validation"))
    assert json.loads((run / "evaluation-validation.json").read_text()) == report


def test_what_cannot_be_measured_is_found_before_the_work_and_changes_nothing(
    evaluated, features, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(evaluated, tmp_path / "run")
    before = (run / "evaluation.json").read_bytes()
    monkeypatch.setattr(IwaeMetric, "measure", lambda *arguments: pytest.fail("minutes of work"))
    copied = shutil.copy(features, tmp_path)
    for words, says in (
        (["--features", "nowhere.pt"], "there is no such file"),
        (["--features", str(features), str(copied)], "has a section of its name, got eight.pt, eight.pt"),
        (["--samples", "5"], "quality cannot be measured: it needs more than 5 samples"),
        (["--best-of", "2"], "predicts no frames"),
    ):
        assert main(["evaluate", str(run), "--metrics", "iwae", "quality", *words]) == 1
        assert says in capsys.readouterr().err
    for words, says in (
        (["--draws", "0"], "draws is at least 1, got 0"),
        (["--samples", "0"], "samples is at least 1, got 0"),
        (["--best-of", "0"], "best_of is at least 1, got 0"),
        (["--seed", "-1"], "seed is a number from 0 to 2³² − 1, got -1"),
        (["--features"], "features names at least one extractor"),
        (["--batch-statistics"], "give best_of, the number of predictions"),
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
        "kernel distance",
        "eight.pt: data",
        "features of 1×8×8, preprocessing none",
    ):
        assert word in printed


def test_runs_are_compared_by_what_compares(evaluated, other, capsys):
    first, second = runs.compare([evaluated, other])
    assert first["bits_per_dim_post_hoc"] == stored(evaluated)["bits_per_dim_post_hoc"]
    assert (first["prior"], second["prior"]) == ("standard", "mixture:3")
    assert first["frechet eight.pt, 100 images"] == stored(evaluated)["quality"]["eight.pt"]["samples"]["means"]["frechet"]
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


def test_a_run_without_an_evaluation_gets_the_remedy(evaluated, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["compare", str(evaluated), str(tmp_path / "run")]) == 1
    assert f"make one: sigma-vae evaluate {tmp_path / 'run'}" in capsys.readouterr().err


def test_an_objective_has_no_bound_to_compare(evaluated, digits_config, tmp_path):
    model = replace(digits_config.model, likelihood="bernoulli")
    training = replace(digits_config.training, max_steps=1)
    runs.train(replace(digits_config, model=model, training=training), tmp_path / "run", progress=False)
    _, second, third = runs.compare([evaluated, tmp_path / "run", evaluated], paired=True, device="cpu")
    assert (second["elbo_post_hoc_nats"], second["elbo_post_hoc_nats - first"]) == (None, None)
    assert third["elbo_post_hoc_nats - first"] == {"mean": 0, "standard_error": 0}


def test_nats_of_densities_and_of_levels_are_not_compared(evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    report = stored(run) | {"observes": "level"}
    (run / "evaluation.json").write_text(json.dumps(report))
    assert [row["elbo_post_hoc_nats"] for row in runs.compare([evaluated, run])] == [None, None]


def test_frechet_distances_of_other_numbers_of_images_or_other_features_are_not_beside_each_other(
    evaluated, other, features, tmp_path
):
    run = shutil.copytree(other, tmp_path / "run")
    settings = EvaluationSettings(metrics=("quality",), features=(str(features),), samples=60)
    section = runs.evaluate_run(run, settings, device="cpu")["quality"]["eight.pt"]
    ours, theirs = runs.compare([evaluated, run])
    assert not {name for name in ours if "frechet" in name} & {name for name in theirs if "frechet" in name}
    assert theirs["frechet eight.pt, 60 images"] == section["samples"]["means"]["frechet"]
    assert theirs["frechet eight.pt, 60 images, N(0, I)"] == section["samples_standard_prior"]["means"]["frechet"]
    report = stored(run)
    report["quality"]["eight.pt"]["extractor"]["sha256"] = "0123456789"
    report["quality"]["eight.pt"]["examples"] = 100
    (run / "evaluation.json").write_text(json.dumps(report))
    ours, theirs = runs.compare([evaluated, run])
    assert "frechet eight.pt 01234567, 100 images" in theirs.keys() - ours.keys()


@pytest.mark.parametrize("how", [{}, {"model_sha256": "of other weights"}, {"split_fingerprint": "of other examples"}])
def test_numbers_of_other_weights_or_examples_are_not_compared(how, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    report = stored(run)
    report["how"] = report["how"] | how if how else {}
    (run / "evaluation.json").write_text(json.dumps(report))
    says = "by their fingerprint" if "split_fingerprint" in how else "evaluate it anew: sigma-vae evaluate"
    with pytest.raises(ValueError, match=says):
        runs.compare([evaluated, run])


@pytest.mark.parametrize(
    ("key", "value"), [("data", "other.npz"), ("split", "validation"), ("examples", 3), ("levels", 4), ("dims", 8)]
)
def test_what_was_evaluated_on_something_else_is_not_compared(key, value, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(stored(run) | {key: value}))
    with pytest.raises(ValueError, match=f"different {key}"):
        runs.compare([evaluated, run])


def test_one_run_compares_with_nothing(evaluated, tmp_path):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        runs.compare([evaluated])
    with pytest.raises(ValueError, match="has no evaluation; make one: sigma-vae evaluate"):
        runs.compare([evaluated, tmp_path])


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    for field in fields(EvaluationSettings):
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_small_table_is_evaluated_by_what_applies_to_it(tmp_path, capsys):
    np.savetxt(tmp_path / "t.csv", np.random.default_rng(0).normal(5, 2, (12, 2)), delimiter=",", header="a,b", comments="")
    run = tmp_path / "run"
    words = ["--width", "4", "--latent-dim", "1", "--epochs", "1", "--prior", "gaussian", "--out", str(run), "--json"]
    assert main(["train", str(tmp_path / "t.csv"), *words]) == 0
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert stored(run)["examples"] == 1
    assert "calibration" in stored(run)
    assert "information" not in stored(run)
    for metric, says in (("information", "there is one example"), ("quality", "images have 1 or 3 channels")):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--metrics", metric]) == 1
        assert says in capsys.readouterr().err
    assert main(["evaluate", str(run), "--metrics", "iwae", "oracle", "--draws", "2"]) == 0
    assert main(["fit-prior", str(run), "--prior", "mixture"]) == 0
    assert main(["calibrate", str(run), "--split", "validation"]) == 0


def test_every_distance_is_printed_with_how_many_of_what_it_is_of(capsys):
    def features(examples: int) -> Features:
        extractor = {"input": [3, 4, 4], "preprocessing": "none"}
        return Features(frechet=1.5, examples=examples, rank_deficient=True, extractor=extractor)

    video = VideoQuality(
        split="test",
        seed=0,
        show="mean",
        context_frames=2,
        predicted_frames=3,
        data={"preprocessing": "cut"},
        clips=features(7),
        frames=features(21),
    )
    one = Estimate(1.0, None)
    elbo = ElboResult(
        examples=7, dims=4, levels=None, observes="density", noise_seed=0, rate_nats=one, distortion_nats=one, elbo_nats=one
    )
    about = {"data": "[/x]", "split": "test", "network": "sequence", "likelihood": "gaussian/optimal"}
    print_evaluation(Evaluation({"elbo": elbo, "quality": {"[b].pt": video}}, about))
    printed = " ".join(capsys.readouterr().out.split())
    for says in (
        "[/x] · sequence",
        "clips ([b].pt, 7 of test)",
        "frames ([b].pt, 21 of test)",
        "[b].pt: data cut; features of 3×4×4",
    ):
        assert says in printed
