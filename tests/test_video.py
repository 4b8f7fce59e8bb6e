"""Runs on clips through the command line, their pictures, and how predictions are judged."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from sigma_vae import VAE, Gaussian, mlp, models, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.config import read as read_config
from sigma_vae.data import Batches, Scaling, Splits
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.plots import save_clips
from sigma_vae.evaluation.video import predictions, psnr, ssim
from sigma_vae.training import fit
from sigma_vae.vae import keyed_noise

TRAIN_LENGTH, TEST_LENGTH, SIDE, PAST = 5, 7, 8, 2


def clips(n: int, length: int, seed: int, channels: int = 1) -> torch.Tensor:
    """Noise that moves one pixel to the right a frame."""
    first = np.random.default_rng(seed).integers(0, 256, (n, 1, channels, SIDE, SIDE), dtype=np.uint8)
    return torch.from_numpy(np.concatenate([np.roll(first, t, -1) for t in range(length)], 1))


def splits(channels: int = 1) -> Splits:
    parts = [
        clips(n, t, seed, channels) for seed, (n, t) in enumerate([(24, TRAIN_LENGTH), (8, TRAIN_LENGTH), (10, TEST_LENGTH)])
    ]
    return Splits(
        "moving noise",
        *map(InMemory, parts),
        Scaling(256),
        {"fingerprint": "made up", "counts": {}, "preprocessing": "none"},
        clips=True,
    )


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A run on clips, trained for a moment; the data that every command reads are these."""
    with pytest.MonkeyPatch.context() as patch:
        named = models.data
        patch.setattr(models, "data", lambda config: splits() if config.source == "clips" else named(config))
        config = RunConfig(
            DataConfig("clips"),
            ModelConfig("sequence", latent_dim=3, width=4, context_frames=PAST),
            TrainingConfig(epochs=2, batch_size=8, log_every=1, ema_decay=0.9),
            device="cpu",
        )
        folder = tmp_path_factory.mktemp("runs") / "clips"
        runs.train(config, folder, progress=False)
        yield folder


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def frames_of(path) -> list[np.ndarray]:
    """What a GIF shows each quarter of a second; frames that do not differ are one in the file."""
    with Image.open(path) as picture:
        found = []
        for t in range(picture.n_frames):
            picture.seek(t)
            found += [np.asarray(picture.convert("L"))] * round(picture.info["duration"] / 250)
        return found


def cell(canvas: np.ndarray, row: int, column: int, zoom: int) -> np.ndarray:
    """The image at a place of a grid, without its zoom."""
    small = canvas[::zoom, ::zoom]
    top, left = 1 + row * (SIDE + 1), 1 + column * (SIDE + 1)
    return small[top : top + SIDE, left : left + SIDE]


def test_a_run_on_clips_scores_what_it_predicts(moving) -> None:
    report = json.loads((moving / "evaluation.json").read_text())
    assert report["dims"] == (TEST_LENGTH - PAST) * SIDE**2
    assert report["context_frames"] == PAST
    run = runs.open_run(moving, "cpu")
    x = run.data.values("test")
    with torch.no_grad():
        inference = run.vae.network.infer(x, noise=keyed_noise(torch.arange(10)))
        mass = run.vae.likelihood.log_mass(inference.h, x[:, PAST:]).double().sum(1)
    bits = (inference.kl[:, 0].double() - mass) / math.log(2) / (TEST_LENGTH - PAST) / SIDE**2
    assert report["bits_per_dim"]["mean"] == pytest.approx(float(bits.mean()), rel=1e-5)


def test_scores_of_clips_are_those_of_the_evaluation(moving, tmp_path) -> None:
    import pandas as pd

    assert main(["score", str(moving), "--out", str(tmp_path / "s.csv")]) == 0
    report, table = json.loads((moving / "evaluation.json").read_text()), pd.read_csv(tmp_path / "s.csv")
    assert len(table) == 10
    for name in ("bits_per_dim", "elbo_nats", "rate_nats"):
        assert table[name].mean() == pytest.approx(report[name]["mean"], rel=1e-5)


def test_a_run_on_clips_goes_on_where_it_stopped(moving, tmp_path) -> None:
    import shutil

    again = tmp_path / "again"
    shutil.copytree(moving, again)
    assert main(["resume", str(again), "--epochs", "3", "--json"]) == 0
    once = tmp_path / "once"
    config = read_config(moving / "config.yaml", RunConfig)
    training = TrainingConfig(epochs=3, batch_size=8, log_every=1, ema_decay=0.9)
    runs.train(RunConfig(config.data, config.model, training, config.seed, config.device), once, progress=False)
    assert (again / "evaluation.json").read_bytes() == (once / "evaluation.json").read_bytes()


def test_pictures_of_a_run_show_clips(moving) -> None:
    truth = splits().stored("test").numpy()
    strip = read(moving / "reconstructions.png")
    zoom = strip.shape[1] // (TEST_LENGTH * (SIDE + 1) + 1)
    assert strip.shape == ((16 * (SIDE + 1) + 1) * zoom, (TEST_LENGTH * (SIDE + 1) + 1) * zoom)
    for clip, t in ((0, 0), (3, 6)):
        np.testing.assert_array_equal(cell(strip, 2 * clip, t, zoom), truth[clip, t, 0])
    for t in range(PAST):  # what is given is shown as it is, what is predicted is not
        np.testing.assert_array_equal(cell(strip, 2 * 3 + 1, t, zoom), truth[3, t, 0])
    assert not np.array_equal(cell(strip, 2 * 3 + 1, PAST, zoom), truth[3, PAST, 0])
    samples = read(moving / "samples.png")
    np.testing.assert_array_equal(cell(samples, 5, 1, samples.shape[1] // (TEST_LENGTH * 9 + 1)), truth[5, 1, 0])
    assert len(frames_of(moving / "samples.gif")) == len(frames_of(moving / "reconstructions.gif")) == TEST_LENGTH


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
@pytest.mark.parametrize("ending", ["png", "gif", "npz"])
def test_other_commands_take_clips(command: str, ending: str, moving, tmp_path) -> None:
    out = tmp_path / f"a.{ending}"
    assert main([command, str(moving), "--n", "12" if command == "sample" else "3", "--out", str(out)]) == 0
    if ending == "gif":
        assert len(frames_of(out)) == TEST_LENGTH
    if ending == "npz":
        with np.load(out) as arrays:
            made = arrays["samples" if command == "sample" else "reconstructions"]
            assert made.shape == (12 if command == "sample" else 3, TEST_LENGTH, 1, SIDE, SIDE)
            np.testing.assert_allclose(made[:3, :PAST], splits().stored("test")[:3, :PAST] / 255, atol=1e-6)
            if command == "sample":  # of ten clips the first come again, with other latents
                np.testing.assert_array_equal(made[10:, :PAST], made[:2, :PAST])
                assert not np.array_equal(made[10:, PAST:], made[:2, PAST:])


def test_predict_writes_a_strip_and_a_gif(moving, capsys) -> None:
    assert main(["predict", str(moving), "--n", "2", "--samples", "3"]) == 0
    assert capsys.readouterr().out.split() == [str(moving / f"predictions-test.{ending}") for ending in ("png", "gif")]
    strip, truth = read(moving / "predictions-test.png"), splits().stored("test").numpy()
    zoom = strip.shape[1] // (TEST_LENGTH * (SIDE + 1) + 1)
    assert strip.shape[0] == (2 * 4 * (SIDE + 1) + 1) * zoom
    for clip in range(2):
        for t in range(TEST_LENGTH):
            np.testing.assert_array_equal(cell(strip, 4 * clip, t, zoom), truth[clip, t, 0])
        for sample in range(1, 4):
            np.testing.assert_array_equal(cell(strip, 4 * clip + sample, 1, zoom), truth[clip, 1, 0])
    moved = frames_of(moving / "predictions-test.gif")
    assert len(moved) == TEST_LENGTH
    zoom = moved[0].shape[1] // (4 * (SIDE + 1) + 1)
    for t, frame in enumerate(moved):
        np.testing.assert_allclose(cell(frame, 1, 0, zoom).astype(int), truth[1, t, 0], atol=1)


def test_predict_takes_its_counts(moving, tmp_path) -> None:
    out = tmp_path / "a.npz"
    words = ["predict", str(moving), "--n", "3", "--samples", "2", "--context", "4", "--frames", "9", "--show", "draw"]
    made = []
    for seed in (0, 0, 1):
        assert main([*words, "--seed", str(seed), "--out", str(out)]) == 0
        with np.load(out) as arrays:
            made.append(arrays["predictions"])
    assert made[0].shape == (2, 3, 9, 1, SIDE, SIDE)
    np.testing.assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert main([*words, "--batch-statistics", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert not np.array_equal(made[0], arrays["predictions"])
    assert main([*words, "--out", str(tmp_path / "a.png")]) == 0
    strip = read(tmp_path / "a.png")
    zoom = strip.shape[1] // (13 * (SIDE + 1) + 1)
    assert (cell(strip, 0, 12, zoom) == 255).all()  # the clip has ended
    assert not (cell(strip, 1, 12, zoom) == 255).all()


MISTAKES = {
    "context": (["predict", "RUN", "--context", "8"], "from 1 to the 7 frames"),
    "nothing": (["predict", "RUN", "--frames", "0"], "at least 1, got 0"),
    "clips": (["predict", "RUN", "--n", "0"], "at least 1, got 0"),
    "ending": (["predict", "RUN", "--out", "a.jpg"], "should end in .png or .gif or .npz"),
    "codes": (["encode", "RUN"], "no single layer of flat latents"),
    "temperature": (["predict", "RUN", "--temperature", "-1", "--out", "a.gif"], "at least 0, got -1"),
    "network": (["train", "clips", "--network", "conv", "--out", "a"], "has clips, and the network conv is not for that"),
    "too short": (
        ["train", "clips", "--network", "sequence", "--context-frames", "5", "--out", "a"],
        "leaves nothing to predict",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistake: str, moving, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, says = MISTAKES[mistake]
    assert main([str(moving) if word == "RUN" else word for word in words]) == 1
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_network_of_choice_for_clips_is_one_that_predicts() -> None:
    data = splits()
    vae = models.vae(ModelConfig(latent_dim=3, width=4), data.shape, data.scaling, clips=data.clips)
    assert vae.network.context_frames == PAST
    with pytest.raises(ValueError, match="has clips and needs a network that reads clips, got FlatNetwork"):
        fit(models.vae(ModelConfig(width=4), data.shape, data.scaling), data, device="cpu", progress=False)


def test_still_data_predict_nothing(digits_run, tmp_path, capsys) -> None:
    for words in (["predict", str(digits_run)], ["evaluate", str(digits_run), "--best-of", "2"]):
        assert main(words) == 1
        assert "predicts no frames" in capsys.readouterr().err
    assert main(["sample", str(digits_run), "--out", str(tmp_path / "a.gif")]) == 1
    assert main(["train", "digits", "--network", "sequence", "--out", str(tmp_path / "run")]) == 1
    assert "has no clips" in capsys.readouterr().err


def test_clips_of_other_channels_are_no_picture(tmp_path) -> None:
    for ending in ("png", "gif"):
        with pytest.raises(ValueError, match="1 or 3 channels"):
            save_clips(tmp_path / f"a.{ending}", torch.zeros(2, 3, 2, 4, 4))
    save_clips(tmp_path / "a.gif", torch.rand(2, 3, 3, 4, 4), columns=2)
    assert len(frames_of(tmp_path / "a.gif")) == 3


# -- how near predictions come ---------------------------------------------------------------------------------------------


def plain_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> float:
    """One channel, window after window."""
    values = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = (image[top : top + 7, left : left + 7].ravel() for image in (x, y))
            covariance = np.cov(a, b)
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            light = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
            values.append(light * (2 * covariance[0, 1] + c2) / (covariance[0, 0] + covariance[1, 1] + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_psnr_and_ssim_are_as_defined(batch: tuple[int, ...], data_range: float) -> None:
    random = np.random.default_rng(0)
    x = random.random((*batch, 3, 9, 11))
    y = np.clip(x + 0.2 * random.standard_normal(x.shape), 0, 1)
    ours = ssim(torch.from_numpy(x), torch.from_numpy(y), data_range), psnr(torch.from_numpy(x), torch.from_numpy(y))
    for i in np.ndindex(*batch):
        channels = list(zip(x[i], y[i], strict=True))
        assert float(ours[0][i]) == pytest.approx(np.mean([plain_ssim(a, b, data_range) for a, b in channels]), rel=1e-9)
        assert float(ours[1][i]) == pytest.approx(
            np.mean([-10 * np.log10(((a - b) ** 2).mean()) for a, b in channels]), rel=1e-9
        )
    with pytest.raises(ValueError, match="needs images of that size"):
        ssim(torch.zeros(1, 6, 9), torch.zeros(1, 6, 9))


def test_the_best_sample_is_the_one_with_the_highest_ssim(moving) -> None:
    run, samples = runs.open_run(moving, "cpu"), 4
    x = run.data.values("test")
    with torch.no_grad():
        values = []
        for sample in range(samples):
            noise = keyed_noise(torch.arange(10), 5 * samples + sample)
            shown = run.vae.network.predict(x[:, :PAST], TEST_LENGTH - PAST, lambda h: run.vae.likelihood(h).mean, noise).frames
            pairs = [(shown[i, t], x[i, PAST + t]) for i in range(10) for t in range(TEST_LENGTH - PAST)]
            values.append([[float(psnr(*pair)), float(ssim(*pair))] for pair in pairs])
    table = np.array(values).reshape(samples, 10, TEST_LENGTH - PAST, 2)
    best = table[table[..., 1].mean(2).argmax(0), np.arange(10)]
    report = predictions(run.vae, run.data.batches("test", 4), samples, seed=5)
    for i, name in enumerate(("psnr_db", "ssim")):
        np.testing.assert_allclose(report[f"{name}_per_frame"], best[..., i].mean(0), rtol=1e-5)
        assert report[name]["mean"] == pytest.approx(best[..., i].mean(), rel=1e-5)
        assert report[name]["standard_error"] == pytest.approx(best[..., i].mean(1).std(ddof=1) / math.sqrt(10), rel=1e-3)
        assert report[f"{name}_average_sample"]["mean"] == pytest.approx(table[..., i].mean(), rel=1e-5)
        errors = best[..., i].std(0, ddof=1) / math.sqrt(10)
        np.testing.assert_allclose(report[f"{name}_per_frame_standard_error"], errors, rtol=1e-3)
        low, high = stats.norm.interval(0.95, best[..., i].mean(0), errors)
        np.testing.assert_allclose(report[f"{name}_per_frame_interval_95"], np.stack([low, high], 1), rtol=1e-4)
        each = best[..., i].mean(1)
        whole = stats.norm.interval(0.95, each.mean(), each.std(ddof=1) / math.sqrt(10))
        assert report[name]["interval_95"] == pytest.approx(whole, rel=1e-4)
    assert (report["clips"], report["noise_seed"]) == (10, 5)
    assert report["ssim"]["mean"] > report["ssim_average_sample"]["mean"]
    other = predictions(run.vae, run.data.batches("test", 4), samples, seed=5, batch_statistics=True)
    assert other["batch_statistics"]
    assert other["ssim"] != report["ssim"]


def test_one_clip_has_no_interval(moving) -> None:
    run = runs.open_run(moving, "cpu")
    report = predictions(run.vae, run.data.batches("test", 4, limit=1), 2)
    assert report["psnr_db"]["interval_95"] == [None, None]
    assert report["ssim_per_frame_interval_95"] == [[None, None]] * (TEST_LENGTH - PAST)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report


def test_evaluate_reports_the_best_of_many(moving, capsys) -> None:
    before = (moving / "evaluation.json").read_text()
    assert main(["evaluate", str(moving), "--best-of", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predictions"]["samples"] == 2
    assert len(report["predictions"]["ssim_per_frame"]) == TEST_LENGTH - PAST
    assert {name: value for name, value in report.items() if name not in ("predictions", "calibration")} == json.loads(before)
    assert main(["evaluate", str(moving), "--best-of", "2"]) == 0
    assert "psnr_db" in capsys.readouterr().out
    (moving / "evaluation.json").write_text(before)


def test_clips_of_another_range_have_no_psnr(moving) -> None:
    store = InMemory(255 * torch.rand(2, TEST_LENGTH, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"with values in \[0, 1\]"):
        predictions(runs.open_run(moving, "cpu").vae, Batches(store, Scaling(), 2), 1)


def test_only_a_video_network_predicts() -> None:
    vae = VAE(mlp((1, 8, 8), 1, width=4), Gaussian(1))
    with pytest.raises(ValueError, match="predicts no frames"):
        predictions(vae, splits().batches("test", 4))
