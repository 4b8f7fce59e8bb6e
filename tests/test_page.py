"""The page of a run and the words about it: numbers from the files, advice from made-up curves, plots in sentences."""

import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from test_study_report import CHROMIUM, FRAME, LOOK, Page

from sigma_vae import models, progress, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.data import Batches, Scaling
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation import Evaluation
from sigma_vae.evaluation.suite import meaning, report_rows
from sigma_vae.priors import GaussianPrior
from sigma_vae.runs.evaluate import read_evaluation
from sigma_vae.runs.page import Curves, advice, read_curves, shows
from sigma_vae.training import loop
from sigma_vae.training.callbacks import Bar, Lines

CONFIG = RunConfig(DataConfig("digits"), ModelConfig("mlp"), TrainingConfig())
MAP = RunConfig(DataConfig("digits"), ModelConfig("spatial:f4c3"), TrainingConfig())


def reported(**changes: object) -> Evaluation:
    bounds = {
        "elbo_nats": {"mean": 40.0, "standard_error": 1.0},
        "rate_nats": {"mean": 20.0, "standard_error": 1.0},
        "distortion_nats": {"mean": -60.0, "standard_error": 1.0},
        "examples": 100, "dims": 64, "levels": None, "observes": "density", "noise_seed": 0, "latent_dim": 20, "active_units": 20,
    }  # fmt: skip
    return Evaluation.from_json(bounds | changes)


def made_up(values: list[float]) -> Curves:
    """A validation each epoch of ten steps."""
    steps = [10 * (i + 1) - 1 for i in range(len(values))]
    return Curves(
        {
            "validation/elbo_nats": list(zip(steps, values, strict=True)),
            "epoch": [(step, float(i)) for i, step in enumerate(steps)],
        }
    )


RISING, LEVEL = [10.0 * i for i in range(10)], [0.0, 50, 80, 90, 95, 97, 98, 98.5, 98.2, 98.4]
FALLING = [0.0, 60, 90, 95, 90, 85, 80, 75, 70, 65]
ADVICE = {
    "rising": ({}, RISING, CONFIG, ["still rising", "sigma-vae resume RUN --epochs 20"]),
    "rising, with a limit": (
        {},
        RISING,
        RunConfig(CONFIG.data, CONFIG.model, TrainingConfig(max_steps=100)),
        ["larger --max-steps"],
    ),
    "early": ({}, FALLING, CONFIG, ["best at epoch 4 of 10", "30 nats lower"]),
    "level": ({}, LEVEL, CONFIG, []),
    "too few to judge": ({}, RISING[:4], CONFIG, []),
    "unused": ({"active_units": 12}, LEVEL, CONFIG, ["8 of 20 latents are unused", "--latent-dim 12"]),
    "unused places of a map": ({"active_units": 12}, LEVEL, MAP, ["8 of 20 latents are unused"]),
    "no rate": (
        {"rate_nats": {"mean": 0.001, "standard_error": 0.0}, "active_units": 0},
        LEVEL,
        CONFIG,
        ["The latent is unused", "0.001 nats"],
    ),
    "floor": ({"sigma_floor": 0.001, "sigma_on_floor_share": 0.25}, LEVEL, CONFIG, ["25.0% of σ lie on the floor"]),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_follows_from_curves_and_numbers(case: str) -> None:
    changes, values, config, words = ADVICE[case]
    said = advice(Path("RUN"), config, reported(**changes), made_up(values))
    assert len(said) == bool(words), said
    for word in words:
        assert word in said[0]
    assert config is not MAP or "--latent-dim" not in said[0]  # which a map does not have


def test_the_advice_to_go_on_is_a_command_that_works(digits_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(digits_run, tmp_path / "run")
    (said,) = [
        line for line in advice(run, runs.config_of(run), read_evaluation(run), read_curves(run)) if "still rising" in line
    ]
    words = re.search(r"`sigma-vae (.*)`", said)[1].split()
    assert words[-1] == "12"
    assert main([*words, "--quiet"]) == 0
    assert len(read_curves(run).score) == 13  # the start's too


def test_every_number_has_a_meaning(digits_run: Path) -> None:
    rows = list(report_rows(read_evaluation(digits_run)))
    assert len(rows) > 8
    assert [row.name for row in rows if not meaning(row.name)] == []


def calibrated_by(factor: float, law: stats.rv_continuous = stats.norm, shift: float = 0.0) -> dict:
    """What the calibration metric reports where errors follow another law than the model's N(0, 1), from quantiles."""
    errors = factor * law.ppf((np.arange(20_000) + 0.5) / 20_000) + shift
    pit = stats.norm.cdf(errors)
    levels = (50, 80, 90, 95)
    coverage = {str(p): {"mean": float((abs(pit - 0.5) <= p / 200).mean()), "standard_error": 0.0} for p in levels}
    shares = (np.histogram(pit, 20, (0, 1))[0] / len(pit)).tolist()
    bins = {"predicted_variance": [1.0], "mean_squared_error": [float((errors**2).mean())], "count": [len(errors)]}
    return {
        "examples": 10, "values": len(errors), "level": None, "density_post_hoc": None, "level_post_hoc": None,
        "density": {"coverage": coverage, "pit": shares},
        "sigma": {"per_value": bins, "per_example": bins, "correlation_of_logs": None},
        "residuals": {"axes": {"width": {"autocorrelation": [1.0, 0.4], "pairs": [10, 9]}}, "channels": None},
    }  # fmt: skip


SHOWS = {
    "right": (calibrated_by(1), "All intervals hold about", "about flat", "as large as"),
    "too sure": (calibrated_by(2), "too narrow", "too few values in the middle", "2.00 times"),
    "not sure enough": (calibrated_by(0.5), "too wide", "too many values in the middle", "0.50 times"),
    "heavy tails": (calibrated_by(1 / math.sqrt(2), stats.laplace), "heavier tails", "middle", "as large as"),
    "light tails": (calibrated_by(2 * math.sqrt(3), stats.uniform, -math.sqrt(3)), "lighter tails", "middle", "as large as"),
    "too high": (calibrated_by(1, shift=-0.7), "", "leans to the left", ""),
}


@pytest.mark.parametrize("case", SHOWS)
def test_a_sentence_says_what_a_plot_of_calibration_shows(case: str) -> None:
    result, coverage, pit, error = SHOWS[case]
    said = shows(result)
    assert coverage in said["coverage"]
    assert pit in said["pit"]
    assert error in said["error"]
    assert "correlate by 0.40" in said["residuals"]


@pytest.fixture(scope="module")
def page(digits_run: Path) -> Page:
    return Page((digits_run / "report.html").read_text(encoding="utf-8"))


def test_a_run_has_a_page_in_one_file(page: Page, digits_run: Path) -> None:
    headings = [title for title in ("What to do", "What was trained on what", "Numbers", "Training", "Calibration", "Latents")]
    assert all(title in page.text for title in (*headings, "Samples and reconstructions", "Oddest and most typical examples"))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(links) >= 12
    assert all(link.startswith("data:") for link in links)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(len(attributes["alt"]) > 20 for attributes in pictures)
    assert {"lang": "en"} in [attributes for tag, attributes in page.tags if tag == "html"]


def test_its_numbers_are_those_of_the_evaluation(page: Page, digits_run: Path) -> None:
    report = json.loads((digits_run / "evaluation.json").read_text())
    (rows,) = [rows for caption, rows in page.tables.items() if "Mean ± standard error over 180" in caption]
    shown = {row[0]: row[1] for row in rows}
    for name in ("elbo_nats", "rate_nats", "bits_per_dim"):
        assert shown[name].startswith(f"{report[name]['mean']:.4f} ±")


def test_its_latents_and_odd_examples_are_right(page: Page, digits_run: Path, tmp_path: Path) -> None:
    """Against torch's KL, and the command that scores."""
    run = runs.open_run(digits_run, "cpu")
    x = next(iter(run.data.batches("test", 500))).x
    with torch.no_grad():
        posterior = run.vae.encode(x)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
    (alt,) = [attributes["alt"] for tag, attributes in page.tags if "KL of each latent" in attributes.get("alt", "")]
    shown = dict(re.findall(r"(\d+): (\d+\.\d+)", alt))
    assert {name: float(value) for name, value in shown.items()} == pytest.approx(
        {str(i): float(value) for i, value in enumerate(kl)}, abs=0.006
    )
    assert main(["score", str(digits_run), "--out", str(tmp_path / "scores.csv")]) == 0
    table = pd.read_csv(tmp_path / "scores.csv").sort_values("elbo_nats")
    rows = page.tables["Examples with the lowest and the highest bound"][1:]
    assert [int(row[1]) for row in rows] == [*table["example"][:8], *table["example"][::-1][:8]]


@pytest.mark.parametrize(
    ("options", "examples", "fitted_on"),
    [
        ("--network mlp --max-steps 16 --batch-size 4 --prior standard", 16 * 4 // 8, 16 * 4 // 8),
        ("--network mlp --max-steps 48 --batch-size 128 --latent-dim 2 --prior gaussian", 48 * 128 // 8 // 10, 48 * 128 // 8),
    ],
    ids=["usual", "a prior whose densities take long"],
)
def test_a_short_training_has_a_page_of_few_examples(
    options: str, examples: int, fitted_on: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CALIBRATION_VALUES", 5 * 64)
    monkeypatch.setattr(GaussianPrior, "density_passes", 10)
    words = f"train digits {options} --width 4 --quiet --out".split()
    assert main([*words, str(tmp_path / "run")]) == 0
    assert read_evaluation(tmp_path / "run").bounds.examples == examples
    seen = min(len(runs.open_run(tmp_path / "run", "cpu").data.validation), fitted_on)
    assert read_evaluation(tmp_path / "run").about["sigma_fitted_on"]["examples"] == seen
    assert f"Of {examples} test examples" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_run_without_its_data_has_the_rest(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["train", str(tmp_path / "x.npy"), "--network", "mlp", "--width", "4", "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    (tmp_path / "x.npy").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "no longer at" in text
    assert "Numbers" in text
    assert "Calibration</h2>" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="a browser, chromium, is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_screen(digits_run: Path, tmp_path: Path, width: int) -> None:
    inner = (digits_run / "report.html").read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=inner) + LOOK, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
    ]
    words = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dumped = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    title = dumped.partition("<title>")[2].partition("</title>")[0].split()
    assert title[0] == "wide"
    assert int(title[1]) <= int(title[3]) <= width
    assert title[4:] == ["clipped", "0"]


def test_a_run_folder_is_its_model_its_checkpoint_and_little_else(digits_run: Path) -> None:
    sizes = {path.relative_to(digits_run).as_posix(): path.stat().st_size for path in digits_run.rglob("*") if path.is_file()}
    needed = {"model/model.safetensors", "checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    assert {name for name in sizes if name.startswith("checkpoints/") and "lock" not in name} <= needed
    assert sum(size for name, size in sizes.items() if name not in needed) < 400_000  # the page and the pictures


def test_the_command_ends_with_words_pictures_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["train", "digits", "--network", "mlp", "--width", "8", "--epochs", "6", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"epoch 6/6, step \d+ of \d+: loss -?[\d.]+ validation -?[\d.]+ nats [\d.]+ bits/dim\n", said)
    assert "likelihood gaussian/optimal: one σ for all values" in said
    assert "rate_nats: Information in the latents" in said
    for name in ("report.html", "samples.png", "reconstructions.png"):
        assert str(tmp_path / "run" / name) in said
    assert f"next: sigma-vae evaluate {tmp_path / 'run'}" in said


def test_quiet_prints_the_folder_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "digits", "--network", "mlp", "--width", "8", "--max-steps", "2", "--out", str(tmp_path / "run")]
    assert main([*words, "--quiet"]) == 0
    assert capfd.readouterr() == (f"run folder: {tmp_path / 'run'}\n", "")


def context(**metrics: float) -> SimpleNamespace:
    config = TrainingConfig(epochs=100)
    return SimpleNamespace(step=1200, total_steps=20_000, epoch=11, config=config, metrics=metrics, stopping=False)


METRICS = {"train/loss_nats": -611.83, "validation/elbo_nats": 601.77, "validation/bits_per_dim": 2.4635}


def test_the_bar_fits_80_columns_and_names_validation() -> None:
    bar = Bar()
    console = Console(width=80, force_terminal=True, color_system=None, record=True)
    bar.progress = type(bar.progress)(*bar.progress.columns, console=console, auto_refresh=False)
    bar.task = bar.progress.add_task("", numbers="")
    bar.on_fit_start(context(**METRICS))
    bar.on_fit_end(context(**METRICS))
    last = "epoch" + console.export_text().rpartition("epoch")[2].rstrip()
    assert len(last) <= 80
    assert last.endswith("loss -611.8 validation 601.8 nats 2.46 bits/dim")


def test_redirected_progress_is_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("sigma_vae.training.callbacks.time.monotonic", lambda: next(clock))
    lines, state = Lines(), context(**METRICS)
    state.step = 0
    lines.on_fit_start(state)
    for _ in range(12):
        state.step += 100
        lines.on_step(state)
    said = capsys.readouterr().out.splitlines()
    assert 3 <= len(said) <= 5  # of twelve looks, 25 seconds or more apart
    assert all(
        re.match(r"epoch 12/100, step \d+ of 20000, at most \d+ min left: loss -611.8 validation 601.8 nats", s) for s in said
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pass_over_data(file: io.StringIO, monkeypatch: pytest.MonkeyPatch, seconds: int) -> list[int]:
    """Two passes over 100 examples in batches of 10, each of which takes this long."""
    clock = iter(range(0, 10**6, seconds))
    monkeypatch.setattr("sigma_vae.progress.time.monotonic", lambda: next(clock))
    batches = Batches(InMemory(torch.zeros(100, 1, dtype=torch.uint8)), Scaling(levels=2), 10)
    with progress.shown("sigma-vae score", file=file):
        return [len(batch.x) for _ in range(2) for batch in batches]


def test_a_redirected_pass_over_data_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    assert pass_over_data(file, monkeypatch, 25) == [10] * 20
    said = file.getvalue().splitlines()
    assert said[0] == "sigma-vae score: examples, 20 of 100 done, about 3 min left"  # 50 s for 20 examples
    assert len(said) == 7  # of 20 batches, 25 seconds each and one more for each pass


def test_a_pass_over_data_has_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal()
    assert pass_over_data(file, monkeypatch, 25) == [10] * 20
    assert "examples" in file.getvalue()
    assert "/100" in file.getvalue()
    assert "score" not in file.getvalue()


def test_progress_is_shown_once_and_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 90))
    monkeypatch.setattr("sigma_vae.progress.time.monotonic", lambda: next(clock))
    file = io.StringIO()
    assert list(progress.steps("nowhere", "ab")) == ["a", "b"]
    with progress.shown("x", file=file):
        with progress.hidden():
            assert list(progress.steps("hidden", "ab")) == ["a", "b"]
        assert [inner for _ in progress.steps("outer", "ab") for inner in progress.steps("inner", "cd")] == [*"cdcd"]
        next(iter(progress.steps("left", "ab")))
        with progress.bar("unknown") as advance:
            advance(7)
    assert (
        file.getvalue()
        == "x: outer, 1 of 2 done, about 2 min left\nx: outer, 2 of 2 done, about 0 min left\nx: unknown, 7 done\n"
    )


SHOWN_BY = {
    "evaluate": ("examples", []),
    "score": ("examples", ["--out", "scores.csv"]),
    "encode": ("examples", ["--out", "codes.npz"]),
    "calibrate": ("examples", []),
    "fit-prior": ("fitting a mixture", ["--prior", "mixture:2"]),
    "sample": ("decoding samples", ["--out", "samples.png"]),
    "report": ("writing the page", []),
    "compress": ("compressing", ["--out", "digits.sv"]),
}


@pytest.mark.parametrize("command", SHOWN_BY)
def test_a_command_shows_its_progress_on_a_terminal(
    command: str, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS_BEFORE", -1.0)
    shutil.copytree(digits_run, "run")
    doing, options = SHOWN_BY[command]
    for more, expected in (["--quiet"], False), ([], True):
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        assert main([command, "run", *options, *more]) == 0
        assert (doing in terminal.getvalue()) is expected
        assert "\x1b" not in capsys.readouterr().out


def binary() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (300, 6, 6), dtype=np.uint8)


def columns() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 3)) * [0.1, 1, 10]


CHOSEN = {
    "binary pictures": (binary, (), "bernoulli"),
    "binary pictures, an option that bernoulli has not": (binary, ("--mean", "unit"), "gaussian/optimal"),
    "a table": (columns, ("--standardise", "yes"), "gaussian/optimal-channel"),
    "a table, but a likelihood is given": (
        columns,
        ("--standardise", "yes", "--likelihood", "laplace/optimal"),
        "laplace/optimal",
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_likelihood_is_the_one_that_inspect_suggests(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, options, expected = CHOSEN[case]
    np.save(tmp_path / "x.npy", data())
    train = ["train", str(tmp_path / "x.npy"), "--network", "mlp", "--width", "4", "--max-steps", "2", *options]
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    assert runs.config_of(tmp_path / "run").model.likelihood == expected
    assert ("likelihood " + expected in capsys.readouterr().out) == ("--likelihood" not in options)


def test_auto_without_data_says_what_to_do() -> None:
    data = models.data("digits")
    config = ModelConfig("mlp", "auto")
    with pytest.raises(
        ValueError, match=r"likelihood auto needs data; give the name that models.likelihood_for\(config, data\)"
    ):
        models.vae(config, data.shape, data.scaling)
    name, _ = models.likelihood_for(config, data)
    assert models.vae(ModelConfig("mlp", name), data.shape, data.scaling).likelihood.has_scale


def test_series_of_three_channels_are_no_pictures(tmp_path: Path) -> None:
    series = np.random.default_rng(0).random((50, 3, 40))
    np.save(tmp_path / "x.npy", series)
    assert models.data(tmp_path / "x.npy").shape == (3, 40)
    np.save(tmp_path / "y.npy", series.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"for series of 3 channels save array\.swapaxes"):
        models.data(tmp_path / "y.npy")
    assert models.data(DataConfig(str(tmp_path / "y.npy"), layout="n-h-w")).shape == (1, 40, 3)
    np.save(tmp_path / "z.npy", series.reshape(50, 12, 10))
    assert models.data(tmp_path / "z.npy").shape == (1, 12, 10)


def test_the_samples_of_the_page_are_those_of_the_folder(page: Page, digits_run: Path) -> None:
    with Image.open(digits_run / "samples.png") as picture:
        assert picture.size[0] > 100
    assert any("Samples, latents drawn from the prior standard" in attributes.get("alt", "") for _, attributes in page.tags)
