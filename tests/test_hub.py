"""Models on the Hub: pushed to a folder, taken back from a local cache in the Hub's own layout; no network is touched."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from sigma_vae import VAE, Gaussian, mlp, models, runs
from sigma_vae.cli import main
from sigma_vae.config import TrainingConfig
from sigma_vae.evaluation import evaluate
from sigma_vae.training import fit

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the Hub needs the package huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")
NAME = "someone/digits"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE=1 and HF_HUB_CACHE, which are read when the package is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def cached(folder: Path, cache: Path, name: str = NAME) -> Path:
    """Put a folder into a cache, as a download of the main branch would."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return cache


def drawn(vae: VAE) -> torch.Tensor:
    return vae.eval().sample(5, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def staged(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is uploaded of a run."""
    run = shutil.copytree(digits_run, tmp_path_factory.mktemp("hub") / "run")
    assert main(["push", str(run), NAME, "--out", str(run.parent / "staged")]) == 0
    return run.parent / "staged"


def test_a_run_comes_back_to_the_bit(staged: Path, digits_run: Path, tmp_path: Path) -> None:
    cached(staged, tmp_path / "cache")
    vae = VAE.from_pretrained(NAME)
    assert not vae.training
    assert torch.equal(drawn(vae), drawn(models.load(digits_run).vae))


def test_a_vae_comes_back_to_the_bit(tmp_path: Path) -> None:
    vae = VAE(mlp((1, 8, 8), 1, latent_dim=3, width=8), Gaussian(1, levels=17, mean="unit"))
    with pytest.raises(ValueError, match=r"does not know the shape .*Origin\.of\(vae, data\)"):
        vae.save_pretrained(tmp_path / "model")
    data = models.data("digits")
    fit(vae, data, TrainingConfig(max_steps=3, batch_size=32), progress=False)
    vae.save_pretrained(tmp_path / "model", evaluation=evaluate(vae, data))
    cached(tmp_path / "model", tmp_path / "elsewhere")
    net = mlp((1, 8, 8), 1, latent_dim=3, width=8)
    again = VAE.from_pretrained(NAME, network=net, cache_dir=tmp_path / "elsewhere", local_files_only=True)
    assert torch.equal(drawn(again), drawn(vae))
    assert torch.equal(drawn(VAE.from_pretrained(tmp_path / "model", network=net)), drawn(vae))
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| elbo_nats |" in text
    assert 'from_pretrained("OWNER/NAME", network=your_network)' in text


def test_what_is_uploaded_has_a_card_and_no_paths_or_code(staged: Path, digits_run: Path) -> None:
    assert {path.suffix for path in staged.rglob("*") if path.is_file()} <= {".md", ".json", ".yaml", ".png", ".safetensors"}
    text = (staged / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "sigma-vae"
    report = json.loads((digits_run / "evaluation.json").read_text())
    assert f"| bits_per_dim | {report['bits_per_dim']['mean']:.4f} ±" in text
    assert "sigma_post_hoc_density" in text
    for picture in ("samples.png", "calibration.png", "reconstructions.png"):
        assert f"]({picture})" in text
        assert (staged / picture).is_file()
    assert "sigma-vae replay config.yaml" in text
    for path in staged.rglob("*.*"):
        if path.suffix in (".md", ".json", ".yaml"):
            assert str(Path.home()) not in path.read_text(encoding="utf-8")


def test_a_source_of_your_own_is_cut_to_its_name(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["train", str(tmp_path / "mine.npy"), "--network", "mlp", "--width", "4", "--max-steps", "2", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert main(["push", str(tmp_path / "run"), NAME, "--out", str(tmp_path / "staged")]) == 0
    assert runs.config_of(tmp_path / "staged").data.source == "mine.npy"
    everything = "".join(p.read_text() for p in (tmp_path / "staged").rglob("*.*") if p.suffix in (".md", ".json", ".yaml"))
    assert str(tmp_path) not in everything
    assert str(tmp_path).encode() not in (tmp_path / "staged" / "model" / "model.safetensors").read_bytes()
    cached(tmp_path / "staged", tmp_path / "cache")
    assert main(["score", f"hub:{NAME}", "--data", str(tmp_path / "mine.npy"), "--out", str(tmp_path / "s.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "s.csv")) == 60


READ = {
    "sample": (["--n", "4"], "samples-0.png"),
    "reconstruct": (["--n", "4"], "reconstructions-test.png"),
    "encode": ([], "codes-test.npz"),
    "score": ([], "scores-test.csv"),
    "evaluate": (["--metrics", "information"], None),
}


@pytest.mark.parametrize("command", READ)
def test_a_model_on_the_hub_is_a_run_wherever_one_is_read(
    command: str, staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cached(staged, tmp_path / "cache")
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options, written = READ[command]
    assert main([command, f"hub:{NAME}", *options]) == 0
    assert [path.name for path in Path().iterdir()] == ([] if written is None else [written])
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_a_model_on_the_hub_compares_with_a_run(
    staged: Path, digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(staged, tmp_path / "cache")
    assert main(["compare", str(digits_run), f"hub:{NAME}", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["bits_per_dim_post_hoc"] == second["bits_per_dim_post_hoc"]


MISTAKES = {
    "not there": (["sample", "hub:someone/else"], "cannot be read from the Hub, nor from its cache"),
    "no name": (["sample", "hub:digits"], "is called OWNER/NAME"),
    "written to": (["calibrate", f"hub:{NAME}"], "hf download someone/digits --local-dir digits"),
    "pushed without a name": (["push", "RUN", "digits"], "is called OWNER/NAME"),
    "no run": (["push", "nowhere", NAME], "holds no run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(
    mistake: str, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES[mistake]
    assert main([str(digits_run) if word == "RUN" else word for word in words]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    with pytest.raises(ValueError, match="OWNER/NAME"):
        VAE.from_pretrained(tmp_path / "nowhere")


def test_pushing_makes_a_repository_and_uploads_the_folder(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Api:
        def __init__(self, token: str | None) -> None:
            asked.append(token)

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            asked.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = models.load(digits_run).vae.push_to_hub(NAME, private=True, token="secret")
    assert address == f"https://hub/{NAME}"
    assert asked == ["secret", (NAME, True, True), (NAME, ["README.md", "model.json", "model.safetensors"])]
