"""Other data for a run's model, and runs whose data are somewhere else."""

import csv
import errno
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from official import COUNTS, encoded, images_of, write_idx
from PIL import Image

from sigma_vae import runs
from sigma_vae.cli import main
from sigma_vae.data import as_splits
from sigma_vae.data.named import images
from sigma_vae.vae import keyed_noise

RANDOM = np.random.default_rng(0)
SMALL = [
    "--network",
    "mlp",
    "--width",
    "8",
    "--latent-dim",
    "2",
    "--max-steps",
    "3",
    "--batch-size",
    "20",
    "--prior",
    "standard",
]
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
    elif kind == "clips":
        np.save(place / "own.npy", np.tile(PICTURES, (1, 2, 2)).reshape(12, 5, 1, 8, 8))
    else:
        (place / "own").mkdir()
        for i, picture in enumerate(PICTURES):
            Image.fromarray(picture).save(place / "own" / f"p{i:02}.png")
    (source,) = [path for path in place.iterdir() if not path.name.startswith(".")]
    special = ["--network", "sequence", "--layout", "n-t-c-h-w", "--batch-size", "4"] if kind == "clips" else []
    assert main(["train", str(source), *SMALL, *special, "--out", str(folder / "run")]) == 0
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
    assert_splits_are_told(run, table, opened.data)
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
        assert codes["example"].astype(str).tolist() == [row["example"] for row in table]
        np.testing.assert_allclose(codes["mean"], opened.vae.encode(x.float()).loc.detach().numpy(), atol=1e-4)
    capsys.readouterr()


def assert_splits_are_told(run, whole, data):
    """Of each split, and of the whole file, by the names of the examples."""
    kept = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    by_split = {split: [row for row in whole if row["split"] == split] for split in kept}
    for split, ours in by_split.items():
        assert main(["score", str(run), "--split", split]) == 0
        table = rows(run / f"scores-{split}.csv")
        assert [row["example"] for row in table] == [str(name) for name in kept[split]]
        assert {row["split"] for row in table} == {split}
        assert sorted(row["example"] for row in ours) == sorted(row["example"] for row in table)
        alike = {row["example"]: row["rate_nats"] for row in whole}
        np.testing.assert_allclose(
            [float(row["rate_nats"]) for row in table], [float(alike[row["example"]]) for row in table], rtol=1e-3
        )
    assert sum(map(len, kept.values())) == len(whole)
    assert [len(kept[split]) for split in kept] == list(data.record["counts"].values())


def test_examples_that_are_not_the_runs_own_have_no_split(tmp_path):
    """Of a file with more rows, of one in another order, and for a run from before splits were kept."""
    run, source = trained(tmp_path, "array")
    np.save(tmp_path / "more.npy", np.concatenate([PICTURES, PICTURES[:1]]))
    assert main(["score", str(run), "--data", str(tmp_path / "more.npy")]) == 0
    splits = [row["split"] for row in rows(run / "scores-more.csv")]
    assert [splits.count(split) for split in ("train", "validation", "test", "")] == [49, 5, 6, 1]
    assert splits[-1] == ""
    np.save(tmp_path / "turned.npy", np.concatenate([PICTURES[1:], PICTURES[:1]]))
    assert main(["score", str(run), "--data", str(tmp_path / "turned.npy")]) == 0
    assert "split" not in rows(run / "scores-turned.csv")[0]
    (run / "splits.json").unlink()
    assert main(["score", str(run), "--data", str(source)]) == 0
    assert "split" not in rows(run / "scores-own.csv")[0]
    assert main(["score", str(run)]) == 0


NOT_SPLITS = [
    "",
    "7",
    "[]",
    "{}",
    '{"train": 7, "validation": [], "test": []}',
    '{"train": [[0]], "validation": [{}], "test": [null]}',
]


@pytest.mark.parametrize("content", [*NOT_SPLITS, '{"train": ["0"], "validation": [1e99], "test": [true]}', "[" * 10**5])
def test_a_damaged_record_of_splits_is_told_or_says_nothing(content, digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    (run / "splits.json").write_text(content, encoding="utf-8")
    capsys.readouterr()
    code = main(["score", str(run), "--data", "digits", "--out", str(tmp_path / "scores.csv")])
    said = capsys.readouterr().err.strip().splitlines()
    assert (code, len(said)) in ((0, 0), (1, 1))
    assert code == 1 or "split" not in rows(tmp_path / "scores.csv")[0]


def test_the_index_of_a_data_frame_names_its_rows():
    index = [f"person {i}" for i in range(60)]
    data = as_splits(TABLE.set_axis(index))
    assert sorted(np.concatenate([data.names[split] for split in ("train", "validation", "test")])) == sorted(index)
    values = data.scaling.undo(data.values("test"))
    np.testing.assert_allclose(values, TABLE.set_axis(index).loc[data.names["test"]], rtol=1e-6)


def test_other_data_are_evaluated_aside(tmp_path, capsys):
    """The own file, read as other data, has the bounds of all its examples; the run's own evaluation stays."""
    run, source = trained(tmp_path, "array")
    before = (run / "evaluation.json").read_bytes()
    test = source.rename(tmp_path / "test.npy")  # the run's own data are not needed
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(test)]) == 0
    assert f"written: {run / 'evaluation-data-test.json'}" in capsys.readouterr().out
    assert (run / "evaluation.json").read_bytes() == before
    assert (run / "calibration-data-test.png").exists()
    report = json.loads((run / "evaluation-data-test.json").read_text())
    assert main(["score", str(run), "--data", str(test)]) == 0
    scores = [float(row["elbo_nats"]) for row in rows(run / "scores-data-test.csv")]
    assert report["elbo_nats"]["mean"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert (report["data"], report["split"], report["examples"]) == (str(test), "all", 60)
    assert main(["evaluate", str(run), "--data", str(test), "--metrics", "iwae", "--draws", "2"]) == 0
    again = json.loads((run / "evaluation-data-test.json").read_text())
    assert again.pop("iwae")
    assert again == report  # sections of the same examples are kept
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(test), "--metrics", "information"]) == 1
    assert "no training data are given; leave it out of the metrics" in capsys.readouterr().err


def test_other_clips_are_predicted(tmp_path):
    run, source = trained(tmp_path, "clips")
    assert main(["predict", str(run), "--data", str(source), "--n", "12", "--out", str(tmp_path / "new.npz")]) == 0
    with np.load(tmp_path / "new.npz") as found:
        np.testing.assert_allclose(found["originals"], np.load(source) / 255, atol=1e-6)
        assert found["predictions"].shape == (3, 12, 3, 1, 8, 8)
    assert main(["predict", str(run), "--data", str(source)]) == 0
    assert (run / "predictions-own.gif").exists()
    assert not (run / "predictions-test.png").exists()


def test_a_prior_is_fitted_to_other_data(tmp_path):
    """Shifted data have other latents; the evaluation is still of the run's own test split."""
    run, _ = trained(tmp_path, "table")
    own = runs.fit_prior(run, "gaussian", device="cpu")
    (TABLE + 3).to_csv(tmp_path / "new.csv", index=False)
    assert main(["fit-prior", str(run), "--prior", "gaussian", "--data", str(tmp_path / "new.csv")]) == 0
    report = runs.evaluate.read_evaluation(run)
    assert report.rate_nats.mean > own.rate_nats.mean + 0.1
    assert report.examples == own.examples
    assert report.about["prior_fitted_on"]["data"] == str(tmp_path / "new.csv")
    assert report.about["prior_fitted_on"]["examples"] == 49
    runs.evaluate_run(run, device="cpu")
    assert "prior_fitted_on" in runs.evaluate.read_evaluation(run).about


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


def named(folder):
    """A run of a named set, whose files are in a folder."""
    write_idx(folder / "root", images_of("mnist"))
    assert main(["train", "mnist", "--root", str(folder / "root"), *SMALL, "--out", str(folder / "run")]) == 0
    return folder / "root"


def pattern(folder):
    """A run of several archives, by a pattern."""
    (folder / "shards").mkdir()
    for shard in range(2):
        with zipfile.ZipFile(folder / "shards" / f"s{shard}.zip", "w") as file:
            for i, picture in enumerate(PICTURES[30 * shard :][:30]):
                file.writestr(f"{i:02}.png", encoded(picture))
    assert main(["train", str(folder / "shards" / "s*.zip"), *SMALL, "--out", str(folder / "run")]) == 0
    return folder / "shards" / "s*.zip"


MOVED = {
    "array": lambda folder: trained(folder, "array")[1],
    "folder": lambda folder: trained(folder, "folder")[1],
    "pattern": pattern,
    "named": named,
}


@pytest.mark.parametrize("make", MOVED.values(), ids=MOVED)
def test_a_run_whose_data_have_moved_says_how_to_go_on(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images, "_MNIST_COUNTS", COUNTS["mnist"])
    monkeypatch.setitem(images._MEANS, "mnist", float(images_of("mnist")["train"].mean()))
    place = make(tmp_path)
    run = (tmp_path / "run").rename(tmp_path / "elsewhere")
    folder = place if make is named else place.parent
    there = folder.rename(tmp_path / "moved")
    moved = there if make is named else there / place.name
    capsys.readouterr()
    for command in COMMANDS:
        assert main([command, str(run)]) == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert f"no longer at {place}" in said
        assert f"sigma-vae evaluate {run} --root FOLDER" in said
    if make is not named:
        for command in ("score", "evaluate", "encode", "reconstruct"):
            assert main([command, str(run), "--data", str(moved)]) == 0  # one way that it says
    assert main(["evaluate", str(run), "--root", str(there)]) == 0  # the other
    for command in COMMANDS:
        assert main([command, str(run)]) == 0
    assert str(moved) in (run / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("deep", ["", "data", "data/deeper"])
def test_data_are_found_in_the_folders_that_they_were_in(deep, tmp_path):
    run, source = trained(tmp_path, "folder")
    before = runs.evaluate.read_evaluation(run)
    (tmp_path / "new" / deep).mkdir(parents=True)
    source.rename(tmp_path / "new" / deep / source.name)
    if deep == "data/deeper":
        with pytest.raises(ValueError, match=f"the folder that holds own, the data of {run}; .*new does not have it"):
            runs.move_data(run, str(tmp_path / "new"))
        return
    runs.move_data(run, str(tmp_path / "new"))
    assert runs.evaluate_run(run, device="cpu").elbo_nats.mean == before.elbo_nats.mean


def test_other_data_are_not_taken_for_those_that_moved(digits_run, tmp_path, capsys):
    run, source = trained(tmp_path, "array")
    config = (run / "config.yaml").read_bytes()
    (tmp_path / "new").mkdir()
    np.save(tmp_path / "new" / source.name, PICTURES[::-1])
    for root, says in (("new", "have changed since it was trained"), ("empty", "does not have it")):
        for command in ("evaluate", "resume"):
            assert main([command, str(run), "--root", str(tmp_path / root)]) == 1
            assert says in capsys.readouterr().err
    shutil.copytree(digits_run, tmp_path / "digits")
    for root in (tmp_path, tmp_path / "nowhere"):  # the remedy is not the option that was refused
        assert main(["evaluate", str(tmp_path / "digits"), "--root", str(root)]) == 1
        assert capsys.readouterr().err.strip().endswith(f"root says nothing about digits, got {str(root)!r}; leave it out")
    assert main(["evaluate", "hf-vae:x", "--data", "digits", "--root", str(tmp_path)]) == 1
    assert "has none; give the data as --data PATH" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == config


def test_an_unfinished_run_is_resumed_where_its_data_are_now(tmp_path, capsys):
    run, source = trained(tmp_path, "array")
    shutil.rmtree(run / "model")
    source.rename(tmp_path / source.name)
    assert main(["resume", str(run)]) == 1
    assert f"sigma-vae resume {run} --root FOLDER" in capsys.readouterr().err
    assert main(["resume", str(run), "--root", str(tmp_path)]) == 0
    assert runs.config_of(run).data.path == tmp_path / source.name


def test_a_run_of_a_named_set_without_its_files_says_where_they_are_given(tmp_path, capsys, monkeypatch):
    """Their folder is there, and other ones may be given."""
    monkeypatch.setattr(images, "_MNIST_COUNTS", COUNTS["mnist"])
    monkeypatch.setitem(images._MEANS, "mnist", float(images_of("mnist")["train"].mean()))
    root = named(tmp_path)
    for file in root.iterdir():
        file.unlink()
    write_idx(tmp_path / "other", images_of("mnist"))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"for this run: sigma-vae evaluate {tmp_path / 'run'} --root FOLDER" in said
    assert main(["evaluate", str(tmp_path / "run"), "--root", str(tmp_path / "other")]) == 0


WRITERS = {
    "samples.png": ["sample"],
    "samples.npz": ["sample"],
    "scores.csv": ["score"],
    "scores.parquet": ["score"],
    "codes.npz": ["encode"],
    "again.png": ["reconstruct"],
    "page.png": ["inspect"],
    "moving.gif": ["sample"],
    "predicted.gif": ["predict"],
    "predicted.png": ["predict"],
    "predicted.npz": ["predict"],
}


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def clips_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("clips"), "clips")[0]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, digits_run, clips_run, tmp_path, capsys, monkeypatch):
    """The disk is full when the new file is to be kept."""
    moving = name.startswith(("moving", "predicted"))
    run = shutil.copytree(clips_run if moving else digits_run, tmp_path / "run")
    source = "digits" if WRITERS[name] == ["inspect"] else str(run)
    out = tmp_path / name
    out.write_bytes(b"old")

    monkeypatch.setattr("os.fsync", full)
    capsys.readouterr()
    assert main([*WRITERS[name], source, "--out", str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


@pytest.mark.parametrize("command", [["evaluate"], ["evaluate", "--data", "digits"], ["predict"]])
def test_a_full_disk_leaves_the_files_of_a_run(command, digits_run, clips_run, tmp_path, capsys, monkeypatch):
    """Pages of an evaluation, its numbers, and predictions in the run's folder, one after the other."""
    run = shutil.copytree(clips_run if command == ["predict"] else digits_run, tmp_path / "run")
    command = [command[0], str(run), *command[1:]]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for room in range(3):
        with monkeypatch.context() as patch:
            written = iter(range(room))
            patch.setattr("os.fsync", lambda _, written=written: full(None) if next(written, None) is None else None)
            code = main(command)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        if code == 0:  # so many files were all
            assert room > 1
            return
        assert "No space left on device" in capsys.readouterr().err
    pytest.fail("more files than expected")


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
