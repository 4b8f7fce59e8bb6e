"""Other data for a run's model, and runs whose data are somewhere else."""

import csv
import errno
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sigma_vae import runs
from sigma_vae.cli import main
from sigma_vae.vae import keyed_noise

RANDOM = np.random.default_rng(0)
SMALL = ["--network", "mlp", "--width", "8", "--latent-dim", "2", "--max-steps", "3", "--batch-size", "20"]
PICTURES = RANDOM.integers(0, 256, (60, 4, 4)).astype(np.uint8)
TABLE = pd.DataFrame(1e6 + RANDOM.standard_normal((60, 3)), columns=["a", "b", "c"])


def trained(folder, kind):
    """A run, with its data beside it."""
    place = folder / "data"
    place.mkdir()
    if kind == "array":
        np.save(place / "own.npy", PICTURES)
    elif kind == "masks":
        np.save(place / "own.npy", (PICTURES > 127).astype(np.uint8) * 255)
    elif kind == "table":
        TABLE.assign(name="x").to_csv(place / "own.csv", index=False)
    else:
        (place / "own").mkdir()
        for i, picture in enumerate(PICTURES):
            Image.fromarray(picture).save(place / "own" / f"p{i:02}.png")
    (source,) = [path for path in place.iterdir() if not path.name.startswith(".")]
    assert main(["train", str(source), *SMALL, "--out", str(folder / "run")]) == 0
    return folder / "run", source


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["array", "masks", "table", "folder"])
def test_other_data_are_scored_as_the_runs_own_are(kind, tmp_path, capsys):
    """The own file, read as other data: all rows, in their order, by the model's own scaling."""
    run, source = trained(tmp_path, kind)
    assert main(["score", str(run), "--data", str(source)]) == 0
    table = rows(run / f"scores-{source.stem}.csv")
    assert len(table) == 60
    assert table[3]["example"] == ("p03.png" if kind == "folder" else "3")
    opened = runs.open_run(run, "cpu")
    x = torch.tensor(TABLE.to_numpy()) if kind == "table" else torch.from_numpy(PICTURES)[:, None].double()
    x = (x > 127).double() if kind == "masks" else x if kind == "table" else x / 255
    if kind == "table":
        mean, std = (
            torch.tensor(values, dtype=torch.float64) for values in (opened.data.scaling.mean, opened.data.scaling.deviation)
        )
        x = (x - mean) / std
    scores = opened.vae.score(x.float(), keyed_noise(torch.arange(60)))
    volume = opened.data.scaling.log_volume_nats(opened.data.shape)
    found = [float(row["elbo_nats"]) for row in table]
    np.testing.assert_allclose(found, (scores.log_likelihood - scores.rate - volume).detach().numpy(), rtol=1e-4, atol=1e-3)
    for command in ("encode", "reconstruct"):
        assert main([command, str(run), "--data", str(source)]) == 0
    with np.load(run / f"codes-{source.stem}.npz") as codes:
        np.testing.assert_allclose(codes["mean"], opened.vae.encode(x.float()).loc.detach().numpy(), atol=1e-4)
    capsys.readouterr()


WRONG = {
    "another size": (lambda folder: np.save(folder / "new.npy", PICTURES[:, :3]), "examples of shape .* was trained on"),
    "other levels": (lambda folder: np.save(folder / "new.npy", PICTURES.astype(np.uint16) + 200), "levels"),
    "real values": (lambda folder: np.save(folder / "new.npy", 3.5 * PICTURES), r"floats in \[0, 1\]"),
    "nothing": (lambda folder: None, "got no such file"),
}


@pytest.mark.parametrize(("make", "says"), WRONG.values(), ids=WRONG)
def test_data_that_do_not_fit_are_refused_in_a_line(make, says, tmp_path, capsys):
    import re

    run, _ = trained(tmp_path, "array")
    make(tmp_path)
    capsys.readouterr()
    assert main(["score", str(run), "--data", str(tmp_path / "new.npy")]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(says, said)


COMMANDS = ["evaluate", "score", "encode", "reconstruct", "resume", "calibrate", "fit-prior"]


def test_a_run_whose_data_have_moved_says_how_to_go_on(tmp_path, capsys):
    run, source = trained(tmp_path, "array")
    run = run.rename(tmp_path / "elsewhere")
    moved = source.rename(tmp_path / "moved.npy")
    capsys.readouterr()
    for command in COMMANDS:
        assert main([command, str(run)]) == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert f"no longer at {source}" in said
        assert f"`source` into {run / 'config.yaml'}" in said
    assert main(["score", str(run), "--data", str(moved)]) == 0  # one way that it says
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace(str(source), str(moved)), encoding="utf-8")
    assert main(["evaluate", str(run)]) == 0  # the other


WRITERS = {
    "samples.png": ["sample"],
    "samples.npz": ["sample"],
    "scores.csv": ["score"],
    "scores.parquet": ["score"],
    "codes.npz": ["encode"],
    "again.png": ["reconstruct"],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, digits_run, tmp_path, capsys, monkeypatch):
    """The disk is full when the new file is to be kept."""
    run = shutil.copytree(digits_run, tmp_path / "run")
    out = tmp_path / name
    out.write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main([*WRITERS[name], str(run), "--out", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


@pytest.mark.parametrize("unit", [1, 255])
def test_a_run_from_before_levels_were_found_keeps_those_of_the_dtype(unit, tmp_path):
    """Its config says nothing of that, and its data look like two levels now."""
    np.save(tmp_path / "bits.npy", unit * (PICTURES > 127).astype(np.uint8))
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "bits.npy"), *SMALL, "--levels-from", "dtype", "--out", str(out)]) == 0
    before = runs.evaluate.read_evaluation(out)
    lines = (out / "config.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "config.yaml").write_text("".join(line for line in lines if "levels_from" not in line), encoding="utf-8")
    assert runs.open_run(out, "cpu").data.levels == 256
    after = runs.evaluate_run(out, device="cpu")
    assert after.elbo_nats.mean == before.elbo_nats.mean
    assert after.bits_per_dim.mean == before.bits_per_dim.mean
