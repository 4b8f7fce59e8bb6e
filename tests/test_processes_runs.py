"""Runs on several processes: the commands, the folder that they leave, and that evaluation and calibration are those of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launched import on_processes, results_of
from safetensors.torch import load_file

from sigma_vae.cli import main

METRICS = ["iwae", "oracle", "information", "calibration"]


def command(_: int, *words: str) -> None:
    assert main(words) == 0


def numbers(report: Any) -> Any:
    """Without what says where and when it was measured."""
    return {key: value for key, value in report.items() if key != "how"}


def close(found: Any, truth: Any, where: str = "") -> None:
    assert type(found) is type(truth), where
    if isinstance(truth, dict):
        assert found.keys() == truth.keys(), where
        for key in truth:
            close(found[key], truth[key], f"{where}.{key}")
    elif isinstance(truth, list):
        assert len(found) == len(truth), where
        for i, pair in enumerate(zip(found, truth, strict=True)):
            close(*pair, f"{where}[{i}]")
    elif isinstance(truth, float):
        assert found == pytest.approx(truth, rel=1e-6, abs=1e-6), where
    else:
        assert found == truth, where


@pytest.fixture(scope="module", params=["evaluate", "calibrate", "fit-prior"])
def both(request: pytest.FixtureRequest, digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what three leave of the same command."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("alone", "together"):
        shutil.copytree(digits_run, folder / name)
    options = {
        "evaluate": ["--metrics", *METRICS, "--draws", "4"],
        "calibrate": ["--split", "validation"],
        "fit-prior": ["--prior", "gaussian"],
    }[request.param]
    assert main([request.param, str(folder / "alone"), *options, "--device", "cpu"]) == 0
    on_processes(3, command, request.param, str(folder / "together"), *options, "--device", "cpu")
    return folder / "alone", folder / "together"


def test_three_processes_measure_and_fit_what_one_does(both):
    alone, together = both
    assert sorted(path.name for path in alone.rglob("*")) == sorted(path.name for path in together.rglob("*"))
    reports = [json.loads((out / "evaluation.json").read_text()) for out in (together, alone)]
    close(*map(numbers, reports))
    weights, truth = (load_file(out / "model" / "model.safetensors") for out in (together, alone))
    close({name: value.tolist() for name, value in weights.items()}, {name: value.tolist() for name, value in truth.items()})


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sigma_vae"]
    return subprocess.run(
        [*start, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )


def test_torchrun_trains_one_run_and_the_first_process_speaks(tmp_path):
    size = ["--network", "mlp", "--width", "16", "--latent-dim", "2", "--epochs", "1", "--accumulate", "2"]
    done = torchrun("train", "digits", *size, "--device", "cpu", "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # of one process
    assert report == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["examples"] == 180
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "model.safetensors", "samples.png"} <= left


def twice(_: Path, run: str) -> list[int]:
    return [main(["train", "digits", "--out", run]), main(["evaluate", "nowhere"])]


def test_a_refusal_is_one_on_every_process(tmp_path, digits_run):
    before = {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}
    assert results_of(2, twice, tmp_path, str(digits_run)) == [[1, 1]] * 2
    assert before == {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}


def alone_only(_: Path) -> str:
    with pytest.raises(SystemExit, match="runs on one process"):
        main(["sample", "runs/any"])
    return "refused"


def test_a_command_of_one_process_is_refused_on_several(tmp_path):
    assert results_of(2, alone_only, tmp_path) == ["refused"] * 2
