"""Runs that are killed, terminated, damaged, or out of room: nothing that was made is lost, and what to do is said."""

import errno
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import ended, started
from PIL import Image
from test_resuming import assert_same, state, train

from sigma_vae import models, runs
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, read
from sigma_vae.data import Splits, load
from sigma_vae.training import NonFiniteLossError, checkpoints
from sigma_vae.training.callbacks import MetricsTable, rows_before
from sigma_vae.training.checkpoints import damage, exclusive, newest, read_sealed, step_of, write_sealed
from sigma_vae.training.step import Stepper

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks, mounts and limits of Linux")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    return load(DataConfig(str(path), validation_fraction=0.2, test_fraction=0.1))


def run_cli(words: list[str], told: Path) -> tuple[int | None, str]:
    code = ended(started(told, main, words))
    return code, told.read_text(encoding="utf-8")


def die_after(events: int) -> None:
    """SIGKILL this process at one of the moments where a step begins, bytes of a checkpoint are written, forced to disk, or renamed."""
    left = iter(range(events))

    def watched(function):
        def watching(*arguments, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return watching

    os.replace, os.fsync = watched(os.replace), watched(os.fsync)
    checkpoints._Recorder.write = watched(checkpoints._Recorder.write)
    Stepper.step = watched(Stepper.step)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 1e30}], ids=["ends", "fails"])
def test_a_training_that_is_over_leaves_signals_as_they_were_and_nothing_in_memory(options, few, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    made: list[weakref.ref[Stepper]] = []
    init = Stepper.__init__

    def noted(stepper: Stepper, *words: object) -> None:
        made.append(weakref.ref(stepper))
        init(stepper, *words)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch, suppress(NonFiniteLossError) if options else nullcontext():
            patch.setattr(Stepper, "__init__", noted)
            train(few, tmp_path, **options)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        if options:
            gc.collect()  # the error's own frames have held it until now
        assert [stepper() for stepper in made] == [None]
    finally:
        gc.enable()


def go_on(few: Splits, out: Path, options: dict[str, float], moments: int) -> None:
    die_after(moments)
    train(few, out, resume=newest(out / "checkpoints") is not None, **options)


@LINUX
def test_a_run_killed_again_and_again_at_random_moments_ends_as_the_whole_one(few, tmp_path):
    options = {"epochs": 3, "validate_every": 3, "ema_decay": 0.9, "patience": 5}
    whole = state(tmp_path / "whole", train(few, tmp_path / "whole", **options))
    out, moments, ends = tmp_path / "killed", random.Random(0), [-signal.SIGKILL]
    while ends[-1] == -signal.SIGKILL:
        ends.append(ended(started(tmp_path / "told", go_on, few, out, options, moments.randrange(100, 2000))))
        assert len(ends) < 200, "no way forward"
    assert ends[-1] == 0, (tmp_path / "told").read_text()
    assert len(ends) > 4  # the first of which is none
    assert_same(state(out, train(few, out, resume=True, **options)), whole)


WORDS = ["--network", "mlp", "--width", "8", "--latent-dim", "2", "--batch-size", "8", "--log-every", "1", "--device", "cpu"]
EPOCHS = "60"


@pytest.fixture(scope="module")
def command(few):
    """Words that train."""
    return lambda out, *more: ["train", few.record["source"], "--out", str(out), "--epochs", EPOCHS, *WORDS, *more]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(out, "--validate-every", "50", "--json")) == 0
    return out


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("model/model.safetensors", "metrics.csv", "evaluation.json", "reconstructions.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(out: Path) -> int:
    return (out / "metrics.csv").read_text().count("\n") if (out / "metrics.csv").exists() else 0


@LINUX
def test_sigterm_ends_a_run_that_resumes_to_the_very_same(whole, command, tmp_path):
    out = tmp_path / "run"
    process = started(tmp_path / "told", main, command(out, "--validate-every", "50"))
    wait_for(lambda: rows(out) > 60)
    process.terminate()
    process.terminate()  # a launcher that passes it on, beside the cluster that sends it to all
    assert ended(process) == 143
    assert "terminated (SIGTERM)" in (tmp_path / "told").read_text()
    assert 0 < step_of(out / "checkpoints" / "last.ckpt") < 60 * 5
    assert not (out / "model").exists()
    assert main(["resume", str(out)]) == 0
    assert_same_run(out, whole)


@LINUX
@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_command_killed_whenever_resumes_to_the_very_same(seconds, whole, command, tmp_path):
    out = tmp_path / "run"
    process = started(tmp_path / "told", main, command(out, "--validate-every", "50", "--checkpoint-minutes", "0"))
    wait_for((out / "config.yaml").exists)
    time.sleep(seconds)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert main(["resume", str(out)]) == 0  # the lock of the killed one keeps nobody out
    assert_same_run(out, whole)


@LINUX
def test_a_second_process_in_the_same_folder_is_refused(command, tmp_path, capsys):
    out = tmp_path / "run"
    process = started(tmp_path / "told", main, command(out, "--epochs", "10000", "--patience", "None"))
    wait_for(lambda: rows(out) > 60)
    assert main(["resume", str(out)]) == 1
    assert "another process is writing into" in capsys.readouterr().err
    process.terminate()
    assert ended(process) == 143


def test_a_lock_alone_is_no_run(command, tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(ValueError, match="another process"), exclusive(tmp_path / "run"):
        pass
    assert main(command(tmp_path / "run", "--max-steps", "1", "--json")) == 0


CHANGES = {"evaluate": runs.evaluate_run, "calibrate": runs.calibrate_run, "fit-prior": runs.fit_prior}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_process_at_a_time_changes_a_finished_run(change, digits_run, tmp_path):
    out = shutil.copytree(digits_run, tmp_path / "run")
    with exclusive(out), pytest.raises(ValueError, match="another process is writing into"):
        change(out, device="cpu")
    assert contents(out) == {tmp_path / "run" / path.relative_to(digits_run): b for path, b in contents(digits_run).items()}
    with pytest.raises(ValueError, match="holds no run"):
        change(tmp_path / "nowhere", device="cpu")
    assert not (tmp_path / "nowhere").exists()
    change(out, device="cpu")  # none waits for itself


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_folder_that_was_taken_while_the_data_were_read_stays_as_it_is(digits_config, tmp_path, monkeypatch):
    out, read = tmp_path / "run", models.data
    short = replace(digits_config, training=replace(digits_config.training, epochs=1))

    def slowly(config: DataConfig) -> Splits:
        monkeypatch.undo()
        runs.train(short, out, progress=False)
        found.update(contents(out))
        return read(config)

    found: dict[Path, bytes] = {}
    monkeypatch.setattr(models, "data", slowly)
    with pytest.raises(ValueError, match="already exists and is never overwritten"):
        runs.train(replace(short, seed=2), out, progress=False)
    assert found
    assert contents(out) == found


def test_a_training_that_broke_off_before_its_folder_was_a_run_begins_anew(digits_config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    short = replace(digits_config, training=replace(digits_config.training, max_steps=1))

    def full(path: Path, config: RunConfig) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(sys.modules["sigma_vae.runs.train"], "write", full)
    with pytest.raises(OSError, match="make room, then train again"):
        runs.train(short, out, progress=False)
    monkeypatch.undo()
    assert (out / "environment.json").exists()
    (out / "config.new.yaml").write_text("data:")  # as a killed process leaves it
    runs.train(short, out, progress=False)
    assert not (out / "config.new.yaml").exists()
    for name in ("config.yaml", "mine.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(ValueError, match="already exists and is never overwritten"):
            runs.train(short, tmp_path / name, progress=False)


def test_a_run_goes_on_from_any_folder(tmp_path, monkeypatch):
    """Where its data's root and their decoded copies are, is kept as an absolute path."""
    pictures = tmp_path / "data" / "pictures"
    pictures.mkdir(parents=True)
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)):
        Image.fromarray(picture).save(pictures / f"{number:02}.png")
    data = DataConfig("pictures", root="data", cache="copies", validation_fraction=0.2)
    model, training = ModelConfig("mlp", latent_dim=2, width=8), TrainingConfig(epochs=1, batch_size=8)
    (tmp_path / "pictures").mkdir()  # not these, which a source without a root would mean
    monkeypatch.chdir(tmp_path)
    runs.train(RunConfig(data, model, training, device="cpu"), tmp_path / "run", progress=False)
    before = sorted((tmp_path / "copies").iterdir())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs.resume(tmp_path / "run", epochs=2, progress=False)
    assert sorted((tmp_path / "copies").iterdir()) == before != []
    assert not list(Path.cwd().iterdir())
    config = read(tmp_path / "run" / "config.yaml", RunConfig)
    assert (config.data.source, config.data.root) == ("pictures", str(tmp_path / "data"))


def test_what_a_scheduler_says_of_others_is_not_believed(few, tmp_path, monkeypatch):
    said = {"NTASKS": "4", "JOB_NAME": "train", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0", "NODELIST": "a1"}
    for name, value in said.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    train(few, tmp_path, max_steps=1)
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 1


@pytest.mark.parametrize("minutes", [float("inf"), float("nan"), 1e13, 0.0])
def test_a_time_that_no_clock_counts_is_refused(minutes):
    with pytest.raises(ValueError, match="max_minutes is"):
        TrainingConfig(max_minutes=minutes)


def test_a_folder_is_a_folder_whatever_its_name(few, digits_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = replace(digits_config, training=replace(digits_config.training, max_steps=1))
    for name in ("memory:x", "a::b"):
        train(few, Path(name), max_steps=1)
        assert step_of(tmp_path / name / "checkpoints" / "last.ckpt") == 1
        runs.train(short, Path(f"{name}-run"), progress=False)
        assert (tmp_path / f"{name}-run" / "model" / "model.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a::b", "a::b-run", "memory:x", "memory:x-run"]


def test_a_table_of_metrics_is_on_the_disk_before_it_takes_the_name_of_the_old_one(tmp_path, monkeypatch):
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, real=real: (done.append(name), real(*words)))
    table = MetricsTable(tmp_path / "metrics.csv", [{"step": 0, "a": 1.0}])
    table.log_metrics({"b": 2.0}, 1)
    assert done == ["fsync", "replace"] * 2
    assert rows_before(tmp_path / "metrics.csv", 9) == [{"step": "0", "a": "1.0"}, {"step": "1", "b": "2.0"}]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit": lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
    "a flipped bit of the digest": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("spoil", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(spoil, few, tmp_path, caplog):
    out, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    whole = state(tmp_path / "whole", train(few, tmp_path / "whole"))
    train(few, out)
    before = step_of(folder / "previous.ckpt")
    last = folder / "last.ckpt"
    last.write_bytes(spoil(last.read_bytes()))
    assert newest(folder) == folder / "previous.ckpt"
    assert before < 8
    caplog.clear()
    again = train(few, out, resume=True)
    assert f"going on from {folder / 'previous.ckpt'}" in caplog.text
    assert_same(state(out, again), whole)
    assert damage(folder / "previous.ckpt") is None  # the damaged one did not take its place
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=r"no whole checkpoint .* delete the folder"):
        train(few, out, resume=True)


def test_the_best_weights_belong_to_the_checkpoint_that_is_resumed(few, tmp_path, caplog):
    """The run was killed after a new best, and before the checkpoint that knows of it."""
    out, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    train(few, out, epochs=1, start="random")
    known = (folder / "best.ckpt").read_bytes()
    shutil.copytree(folder, tmp_path / "then")
    train(few, out, epochs=2, resume=True, start="random")
    assert (folder / "best.ckpt").read_bytes() != known
    assert (folder / "best-before.ckpt").read_bytes() == known
    shutil.copy(tmp_path / "then" / "last.ckpt", folder / "last.ckpt")
    vae = train(few, out, epochs=1, resume=True, start="random")  # nothing to do, but to take the best
    assert torch.equal(
        vae.state_dict()["network.decoder.0.weight"],
        torch.load(tmp_path / "then" / "best.ckpt", weights_only=True)["model"]["network.decoder.0.weight"],
    )
    for path in folder.glob("best*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    train(few, out, epochs=1, resume=True, start="random")
    assert "best.ckpt is lost or damaged" in caplog.text


def test_a_sealed_file_is_a_plain_archive(tmp_path):
    write_sealed({"a": torch.arange(3), "step": 5, "format": checkpoints.FORMAT}, tmp_path / "a.ckpt")
    assert torch.equal(torch.load(tmp_path / "a.ckpt", weights_only=True)["a"], torch.arange(3))
    assert read_sealed(tmp_path / "a.ckpt").keys() == {"a", "step", "format"}
    assert step_of(tmp_path / "a.ckpt") == 5
    assert damage(tmp_path / "absent.ckpt") == "cannot be read (No such file or directory)"
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_checkpoint_of_the_old_engine_is_refused_with_the_way_out(few, tmp_path):
    state = {"pytorch-lightning_version": "2.6.1", "global_step": 5, "state_dict": {}}
    write_sealed(state, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="train anew into another folder, or go on with the version that wrote it"):
        train(few, tmp_path, resume=True)
    write_sealed({"step": 5}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of this version"):
        train(few, tmp_path, resume=True)


def test_checkpoints_of_another_training_are_not_overwritten(few, tmp_path):
    train(few, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="checkpoints of another training"):
        train(few, tmp_path, max_steps=1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)  # also where a broken test has left a process there


def test_a_full_disk_stops_a_run_that_resumes_to_the_very_same(whole, command, small_disk, tmp_path, capsys):
    out, ballast = small_disk / "run", small_disk / "ballast"
    process = started(tmp_path / "told", main, command(out, "--validate-every", "50", "--checkpoint-minutes", "0"))
    wait_for(lambda: rows(out) > 60)
    with suppressed_full_disk(), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert ended(process) == 1
    said = (tmp_path / "told").read_text()
    assert "no room" in said
    assert f"make room, then continue: sigma-vae resume {out}" in said
    assert "Traceback" not in said
    assert newest(out / "checkpoints") is not None
    ballast.unlink()
    assert not list((out / "checkpoints").glob("*.part"))
    capsys.readouterr()
    assert main(["resume", str(out)]) == 0
    assert_same_run(out, whole)


def suppressed_full_disk():
    return pytest.raises(OSError, match=os.strerror(errno.ENOSPC))


def limited(words: list[str]) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
    return main(words)


@LINUX
def test_files_that_may_not_grow_stop_a_run_with_a_remedy(command, tmp_path):
    assert ended(started(tmp_path / "told", limited, command(tmp_path / "run"))) == 1
    said = (tmp_path / "told").read_text()
    assert "the checkpoint cannot be written (File too large)" in said
    assert "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_said(whole, command, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "run")
    if subprocess.run(["mount", "--bind", "-o", "ro", str(copy), str(copy)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        for words in (["resume", str(copy)], command(copy / "inside", "--max-steps", "1")):
            assert main(words) == 1
            said = capsys.readouterr().err
            assert "cannot be written" in said
            assert "take a folder that can" in said
        assert main(["sample", str(copy), "--n", "2", "--out", str(tmp_path / "a.png")]) == 0  # what only reads, works
        assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    finally:
        subprocess.run(["umount", str(copy)], check=True)
