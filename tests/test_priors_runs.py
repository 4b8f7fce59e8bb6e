"""Fitted priors of runs: trained with, fitted afterwards, taken back, and shown beside N(0, I)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sigma_vae import models, runs
from sigma_vae.cli import main
from sigma_vae.config import ModelConfig, RunConfig, read
from sigma_vae.evaluation.elbo import standard_prior
from sigma_vae.priors import MixturePrior, StandardNormal
from sigma_vae.runs import refit

RESULTS = (
    "config.yaml",
    "evaluation.json",
    "model/model.json",
    "model/model.safetensors",
    "samples.png",
    "reconstructions.png",
)


@pytest.fixture(scope="module")
def fitted_run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of digits with a mixture fitted to it; tests read it."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    shutil.copytree(digits_run, folder)
    assert main(["fit-prior", str(folder), "--json", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits_run, tmp_path / "run")
    return tmp_path / "run"


def report(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_fitted_prior_raises_the_bound_and_leaves_the_rest(digits_run: Path, fitted_run: Path) -> None:
    before, after = report(digits_run), report(fitted_run)
    assert after["prior"].startswith("mixture:")
    assert before["prior"] == "standard"
    assert after["standard_prior"] == {name: before[name] for name in after["standard_prior"]}
    assert after["elbo_nats"]["mean"] > before["elbo_nats"]["mean"]
    assert after["bits_per_dim"]["mean"] < before["bits_per_dim"]["mean"]
    assert after["distortion_nats"] == before["distortion_nats"]
    assert after["entropy_identity"] is None
    ours, theirs = (models.load(folder / "model").vae.state_dict() for folder in (digits_run, fitted_run))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_fitted_run_shows_samples_of_both_priors(digits_run: Path, fitted_run: Path) -> None:
    pictures = [
        np.asarray(Image.open(path))
        for path in (fitted_run / "samples.png", fitted_run / "samples-standard-prior.png", digits_run / "samples.png")
    ]
    np.testing.assert_array_equal(pictures[1], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])
    assert not (digits_run / "samples-standard-prior.png").exists()


def test_fitting_afterwards_is_training_with_the_prior(digits_config: RunConfig, run: Path, tmp_path: Path) -> None:
    config = replace(digits_config, model=replace(digits_config.model, prior="mixture:3"))
    trained = runs.train(config, tmp_path / "trained", progress=False)
    assert trained == runs.fit_prior(run, "mixture:3", device="cpu") == report(run)
    ours, theirs = contents(run), contents(tmp_path / "trained")
    for name in (*RESULTS, "samples-standard-prior.png"):
        assert ours[name] == theirs[name], name


def test_a_chosen_number_is_saved_and_chosen_again_in_a_replay(fitted_run: Path) -> None:
    chosen = report(fitted_run)["prior"]
    saved = models.load(fitted_run / "model")
    prior = saved.vae.network.prior
    assert isinstance(prior, MixturePrior)
    assert saved.config.prior == chosen == f"mixture:{prior.components}"
    assert read(fitted_run / "config.yaml", RunConfig).model.prior == "auto"


def test_back_to_the_standard_prior_everything_is_as_it_was(digits_run: Path, run: Path, capsys) -> None:
    assert main(["fit-prior", str(run), "--prior", "gaussian", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "N(0, I)" in said
    assert "gaussian" in said
    assert main(["fit-prior", str(run), "--prior", "standard", "--device", "cpu"]) == 0
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "N(0, I)" in line]
    assert "standard" not in header  # it is N(0, I): one column
    assert contents(run) == contents(digits_run)


def test_a_failure_on_the_way_leaves_the_run_as_it_was(digits_run: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError("no space left")

    for name in ("draw", "write_json", "write", "_exchange"):
        with monkeypatch.context() as patch:
            patch.setattr(refit, name, fails)
            with pytest.raises(OSError, match="no space left"):
                runs.fit_prior(run, "gaussian", device="cpu")
        assert contents(run) == contents(digits_run), name
    (run / "model").rename(run / "model.before")  # as if killed between the two renames
    assert runs.fit_prior(run, "gaussian", device="cpu")["prior"] == "gaussian"
    assert not [path for path in run.iterdir() if path.name in ("model.before", "prior.new")]


@pytest.mark.parametrize("prior", ["fitted", "standard", None])
def test_samples_are_of_the_prior_that_is_asked_for(
    prior: str | None, digits_run: Path, fitted_run: Path, tmp_path: Path
) -> None:
    words = ["--n", "6", "--out", str(tmp_path / "a.npz"), "--device", "cpu"]

    def sampled(run: Path, *more: str) -> np.ndarray:
        assert main(["sample", str(run), *words, *more]) == 0
        with np.load(tmp_path / "a.npz") as file:
            return file["samples"]

    usual = sampled(digits_run)
    ours = sampled(fitted_run, *(["--prior", prior] if prior else []))
    assert np.array_equal(ours, usual) == (prior == "standard")


def test_samples_of_the_standard_prior_have_a_name_of_their_own(run: Path, capsys) -> None:
    assert main(["sample", str(run), "--prior", "standard"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "samples-standard-prior-0.png")


def test_the_standard_prior_is_there_only_for_a_while(fitted_run: Path) -> None:
    vae = models.load(fitted_run / "model").vae
    fitted = vae.network.prior
    with standard_prior(vae):
        assert isinstance(vae.network.prior, StandardNormal)
    assert vae.network.prior is fitted
    with pytest.raises(ValueError, match="show is"), standard_prior(vae):
        vae.sample(1, "neither")
    assert vae.network.prior is fitted


def test_a_model_from_before_there_were_priors_still_loads(run: Path) -> None:
    path = run / "model" / "model.json"
    description = json.loads(path.read_text())
    del description["model"]["prior"]
    path.write_text(json.dumps(description))
    saved = models.load(run / "model")
    assert saved.config.prior == "standard"
    assert isinstance(saved.vae.network.prior, StandardNormal)


MISTAKES = {
    "name": (["train", "digits", "--network", "mlp", "--prior", "mixtur"], "did you mean 'mixture'"),
    "number": (["train", "digits", "--network", "mlp", "--prior", "mixture:x"], "as in mixture:20"),
    "ladder": (["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--prior", "mixture"], "does not have"),
    "too many components": (["train", "digits", "--network", "mlp", "--prior", "mixture:2000"], "needs at least 2000 training"),
    "no run": (["fit-prior", "nowhere"], "holds no run"),
    "name afterwards": (["fit-prior", "RUN", "--prior", "flaw"], "did you mean 'flow'"),
    "too many afterwards": (["fit-prior", "RUN", "--prior", "mixture:2000"], "needs at least 2000 training"),
    "not fitted": (
        ["sample", "RUN", "--prior", "fitted", "--out", "a.png"],
        "has no fitted prior; fit one: sigma-vae fit-prior",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_done(mistake: str, digits_run: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES[mistake]
    before = contents(digits_run)
    assert main([str(digits_run) if word == "RUN" else word for word in words]) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert contents(digits_run) == before


def test_a_ladder_takes_no_fitted_prior_afterwards(tmp_path, capsys) -> None:
    words = ["train", "digits", "--network", "hierarchical:2,2d2/1,2m1", "--width", "8", "--max-steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    before = contents(tmp_path / "run")
    assert main(["fit-prior", str(tmp_path / "run")]) == 1
    assert "single layer of flat latents" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
    assert main(["sample", str(tmp_path / "run"), "--prior", "fitted"]) == 1
    assert "leave --prior out" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), "--prior", "standard", "--n", "2"]) == 0


def test_a_resumed_run_is_given_its_prior_anew(digits_config: RunConfig, tmp_path: Path) -> None:
    model = ModelConfig("mlp", latent_dim=2, width=8, prior="gaussian")
    config = replace(digits_config, model=model, training=replace(digits_config.training, epochs=1, start="random"))
    first = runs.train(config, tmp_path / "run", progress=False)
    second = runs.resume(tmp_path / "run", epochs=2, progress=False)
    assert first["prior"] == second["prior"] == "gaussian"
    assert first["standard_prior"] != second["standard_prior"]
