"""A run that is stopped anywhere and resumed ends as the one that never was: bit for bit, on one thread."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sigma_vae import models
from sigma_vae.config import DataConfig, HardwareConfig, ModelConfig, TrainingConfig
from sigma_vae.data import load
from sigma_vae.training import checkpoints, fit
from sigma_vae.training.checkpoints import newest
from sigma_vae.training.step import Stepper

EPOCHS, BATCHES = 2, 4


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Four batches an epoch, the last of them smaller."""
    path = tmp_path_factory.mktemp("data") / "few.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    data = load(DataConfig(str(path), validation_fraction=0.2, test_fraction=0.1))
    assert len(data.batches("train", 8)) == BATCHES
    assert len(data.train) % 8
    return data


def train(few, out: Path, *, resume: bool = False, likelihood: str = "gaussian/optimal", steps_per_call: int = 1, **options):
    torch.manual_seed(0)
    vae = models.vae(ModelConfig("mlp", likelihood, latent_dim=2, width=8), few.shape, few.scaling)
    hardware = HardwareConfig(steps_per_call=steps_per_call)
    config = TrainingConfig(
        **{"epochs": EPOCHS, "batch_size": 8, "log_every": 1, "checkpoint_minutes": 0.0, "hardware": hardware, **options}
    )
    fit(vae, few, config, out=out, device="cpu", resume=resume, progress=False)
    return vae


def state(out: Path, vae) -> dict[str, object]:
    """Everything that a run leaves behind, but the times."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(out / "checkpoints" / "best.ckpt", weights_only=True)
    del checkpoint["seconds"]
    return {
        "weights": vae.state_dict(),
        "last": checkpoint,
        "best": best,
        "metrics": (out / "metrics.csv").read_bytes(),
        "events": logged_events(out),
    }


def logged_events(out: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def assert_same(ours, theirs, where="") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


class Killed(BaseException):
    """Nothing catches it."""


def stop_at(step: int, monkeypatch) -> None:
    whole = Stepper.step

    def stopping(self, batch, number):
        if number == step:
            raise Killed
        return whole(self, batch, number)

    monkeypatch.setattr(Stepper, "step", stopping)


CASES = {
    "an epoch each": {},
    "averaged": {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 3, "likelihood": "gaussian/shared"},
    "validated every 3": {"validate_every": 3, "ema_decay": 0.9},
    "validated every 4": {"validate_every": 4, "likelihood": "gaussian/running-minimum"},
    "validated never but at the end": {"validate_every": 100},
    "at most 7 steps": {"max_steps": 7, "schedule": "cosine"},
    "at most 7 steps, validated every 2": {"max_steps": 7, "validate_every": 2},
    "skipped steps": {"skip_gradient_norm": 30.0, "gradient_clip_norm": 1.0},
    "impatient": {"learning_rate": 0.0, "patience": 1, "ema_decay": 0.5},
    "three steps a call": {"steps_per_call": 3, "schedule": "cosine", "warmup_steps": 3, "skip_gradient_norm": 30.0},
    "three steps a call, at most 6 steps": {"steps_per_call": 3, "max_steps": 6, "likelihood": "gaussian/running-minimum"},
    "an epoch a call": {"steps_per_call": 16, "likelihood": "gaussian/shared", "patience": 1},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_run_stopped_at_any_step_ends_as_the_whole_one(options, few, tmp_path, monkeypatch):
    whole = state(tmp_path / "whole", train(few, tmp_path / "whole", **options))
    steps = whole["last"]["step"]
    resumed = tmp_path / "resumed"
    for step in range(1, steps):  # again and again the same run
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(Killed):
                train(few, resumed, resume=newest(resumed / "checkpoints") is not None, **options)
    assert_same(state(resumed, train(few, resumed, resume=True, **options)), whole)
    assert_same(state(resumed, train(few, resumed, resume=True, **options)), whole)  # nothing is left to do


@pytest.mark.parametrize(("before", "after"), [(3, 3), (1, 1), (3, 1), (1, 16)])
def test_a_validation_whose_checkpoint_was_not_written_has_one_row(before, after, few, tmp_path, monkeypatch):
    """Whatever the number of steps in a call was then and is now."""
    whole = state(tmp_path / "whole", train(few, tmp_path / "whole"))
    write = checkpoints.write_sealed

    def dying(checkpoint, path, *others):
        if path.name == "last.ckpt" and checkpoint["step"] == EPOCHS * BATCHES:
            raise Killed
        write(checkpoint, path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_sealed", dying)
        with pytest.raises(Killed):
            train(few, tmp_path / "run", steps_per_call=before)
    resumed = state(tmp_path / "run", train(few, tmp_path / "run", steps_per_call=after, resume=True))
    for kind in ("metrics", "events", "weights"):
        assert_same(resumed[kind], whole[kind], kind)
    table = csv.DictReader(whole["metrics"].decode().splitlines())
    assert [int(row["step"]) for row in table if row["validation/elbo_nats"]] == [BATCHES - 1, EPOCHS * BATCHES - 1]


@pytest.mark.parametrize(
    "options", [{}, {"validate_every": 3, "ema_decay": 0.9}, {"validate_every": 100}, {"steps_per_call": 3}]
)
def test_a_finished_run_goes_on_as_the_longer_one(options, few, tmp_path):
    """Also where it was validated at its end out of turn."""
    train(few, tmp_path / "short", epochs=1, **options)
    train(few, tmp_path / "short", epochs=2, resume=True, **options)
    train(few, tmp_path / "long", epochs=2, **options)
    short, long = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("short", "long"))
    for name in ("step", "model", "optimizer", "noise", "data"):
        assert_same(short[name], long[name], name)
    table = csv.DictReader((tmp_path / "short" / "metrics.csv").read_text().splitlines())
    steps = [row["step"] for row in table if row["train/loss_nats"]]
    assert steps == [str(step) for step in range(2 * BATCHES)]
