"""A run that is stopped anywhere and resumed ends as the one that never was: bit for bit, on one thread."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning_fabric.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sigma_vae import VAE, Gaussian, mlp, models
from sigma_vae.config import DataConfig, HardwareConfig, ModelConfig, TrainingConfig
from sigma_vae.data import as_splits, load
from sigma_vae.training import Callback, Context, checkpoints, fit, make_loggers
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
    "an epoch a call": {"steps_per_call": 16, "likelihood": "gaussian/shared", "patience": 2},
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
    assert [int(row["step"]) for row in table if row["validation/elbo_nats"]] == [-1, BATCHES - 1, EPOCHS * BATCHES - 1]


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


# -- Hooks and loggers of a training, what it returns, and the data that it takes --------------------------------------

STEPS = EPOCHS * BATCHES


class Recorder(Callback):
    """Notes when it was called; its count of steps survives a resumption."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps = 0

    def on_fit_start(self, context: Context) -> None:
        self.calls.append(f"start {context.step} of {context.total_steps}")

    def on_step(self, context: Context) -> None:
        self.steps += 1
        self.calls.append(f"step {context.step}")

    def on_validation(self, context: Context) -> None:
        context.log({"mine/steps": float(self.steps)})
        self.calls.append(f"validation {context.step} {context.epoch} {context.metrics['validation/elbo_nats'] < 0}")

    def on_fit_end(self, context: Context) -> None:
        self.calls.append("end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def vae_for(few):
    torch.manual_seed(0)
    return VAE(mlp(few.shape, 1, latent_dim=2, width=8), Gaussian(1, mean="unit"))


def fitted(few, out=None, *, resume=False, vae=None, **words):
    config = TrainingConfig(epochs=EPOCHS, batch_size=8, log_every=1, checkpoint_minutes=0.0)
    return fit(vae or vae_for(few), few, config, out=out, device="cpu", resume=resume, progress=False, **words)


def test_callbacks_are_called_at_every_step_whatever_a_look_takes(few):
    recorder = Recorder()
    fitted(few, callbacks=[recorder])
    expected = [f"start 0 of {STEPS}", "validation 0 -1 True"]
    for step in range(1, STEPS + 1):
        expected.append(f"step {step}")
        if step % BATCHES == 0:
            expected.append(f"validation {step} {step // BATCHES - 1} True")
    assert recorder.calls == [*expected, "end"]


def test_the_state_of_callbacks_and_what_they_log_survive_a_kill(few, tmp_path, monkeypatch):
    first = Recorder()
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(Killed):
            fitted(few, tmp_path, callbacks=[first, Recorder()])
    assert first.calls[-1] == "end"
    assert newest(tmp_path / "checkpoints") is not None
    second, other = Recorder(), Recorder()
    fitted(few, tmp_path, resume=True, callbacks=[second, other])
    assert second.steps == other.steps == STEPS
    with (tmp_path / "metrics.csv").open() as file:
        logged = [(row["step"], row["mine/steps"]) for row in csv.DictReader(file) if row.get("mine/steps")]
    assert [step for step, _ in logged] == [str(step) for step in (-1, BATCHES - 1, STEPS - 1) for _ in range(2)]


def test_a_callback_ends_a_training_after_a_validation(few):
    class Enough(Recorder):
        def on_step(self, context: Context) -> None:
            super().on_step(context)
            if context.step == 3:
                context.stop()

    enough = Enough()
    result = fitted(few, callbacks=[enough])
    assert result.steps < STEPS
    assert enough.calls[-2].startswith(f"validation {result.steps} ")


def test_fit_returns_its_validations_and_where_the_best_is_kept(few, tmp_path):
    result = fitted(few, tmp_path)
    assert [row["step"] for row in result.history] == [-1, BATCHES - 1, STEPS - 1]
    scores = {row["step"]: row["validation/elbo_nats"] for row in result.history}
    assert result.best_score == max(scores.values()) == scores[result.best_step]
    assert (result.steps, result.folder) == (STEPS, tmp_path)
    again = fitted(few, tmp_path, resume=True)
    assert again == result
    assert fitted(few).folder is None


def test_a_tensor_is_trained_on(few):
    x = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    vae = VAE(mlp((1, 5, 5), 1, latent_dim=2, width=8), Gaussian(1, levels=None))
    result = fit(vae, x, TrainingConfig(epochs=1, batch_size=8), device="cpu", progress=False)
    assert result.steps == -(-len(as_splits(x).train) // 8)
    assert len(as_splits(x).train) < 40  # the others are for validation and test


def test_loggers_may_be_names_and_objects_of_fabric(few, tmp_path):
    theirs = CSVLogger(tmp_path / "theirs", name="a", flush_logs_every_n_steps=1)
    fitted(few, tmp_path / "run", loggers=["csv", theirs])
    assert not (tmp_path / "run" / "tensorboard").exists()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        ours = [row["step"] for row in csv.DictReader(file) if row["train/loss_nats"]]
    with open(f"{theirs.log_dir}/metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss_nats"]] == ours


def test_the_config_names_the_loggers(few, tmp_path):
    train(few, tmp_path, logger=("tensorboard",))
    assert (tmp_path / "tensorboard").exists()
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        make_loggers([name], tmp_path)


def test_unknown_loggers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="csv, tensorboard, wandb, mlflow, got comet"):
        make_loggers(["comet"], tmp_path)


class Wandb:
    """The few calls of Weights & Biases that a logger makes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.started: list[dict[str, object]] = []
        self.ended: list[int] = []

    def init(self, **words):
        self.started.append(words)
        end = lambda exit_code: self.ended.append(exit_code)  # noqa: E731
        return SimpleNamespace(id="abc", define_metric=lambda *_, **__: None, log=self.rows.append, finish=end)


def test_a_resumed_run_goes_on_in_weights_and_biases(few, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume in (False, True):
        fitted(few, tmp_path / "run", resume=resume, loggers=["wandb"])
    assert [words["id"] for words in wandb.started] == [None, "abc"]
    assert wandb.started[0]["name"] == "run"
    assert wandb.ended == [0, 0]
    assert [row["step"] for row in wandb.rows if "train/loss_nats" in row] == list(range(STEPS))


class MLflowClient:
    rows: list[tuple[str, int]] = []  # noqa: RUF012
    states: list[str] = []  # noqa: RUF012

    def update_run(self, run_id, status):
        self.states.append(status)

    def log_metric(self, run_id, name, value, step):
        self.rows.append((name, step))

    def set_terminated(self, run_id, status):
        self.states.append(status)


def test_a_resumed_run_goes_on_in_mlflow(few, tmp_path, monkeypatch):
    asked: list[str | None] = []

    def start_run(run_id, run_name):
        asked.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    module = SimpleNamespace(
        MlflowClient=MLflowClient, start_run=start_run, end_run=lambda: None, set_experiment=lambda name: None
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for resume in (False, True):
        fitted(few, tmp_path / "run", resume=resume, loggers=["mlflow"])
    assert asked == [None, "abc"]
    assert MLflowClient.states == ["RUNNING", "FINISHED"] * 2
    assert [step for name, step in MLflowClient.rows if name == "train/loss_nats"] == list(range(STEPS))


@pytest.mark.filterwarnings("ignore")
def test_the_file_store_of_mlflow_receives_the_metrics(few, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    fitted(few, tmp_path / "run", loggers=["mlflow", "csv"])
    client, run_id = mlflow.MlflowClient(), (tmp_path / "run" / "mlflow-run.txt").read_text(encoding="utf-8").strip()
    found = client.get_metric_history(run_id, "train/loss_nats")
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss_nats"]]
    assert [point.step for point in found] == list(range(STEPS))
    assert [point.value for point in found] == pytest.approx([float(row["train/loss_nats"]) for row in rows])
    assert client.get_run(run_id).info.status == "FINISHED"


def payload(log: bytes) -> bytes:
    """The records of a LevelDB log after a header of seven bytes; each has seven of its own, and none crosses 32 KiB."""
    at, found = 7, b""
    while at + 7 <= len(log):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size = int.from_bytes(log[at + 4 : at + 6], "little")
        found, at = found + log[at + 7 : at + 7 + size], at + 7 + size
    return found


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline_receives_the_metrics(few, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fitted(few, tmp_path / "run", loggers=["wandb", "csv"])
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as rows:
        losses = [float(row["train/loss_nats"]) for row in csv.DictReader(rows) if row["train/loss_nats"]]
    kept = payload(file.read_bytes())
    assert len(losses) == STEPS
    assert kept.count(b"train/loss_nats") >= STEPS
    assert [loss for loss in losses if json.dumps(loss).encode() not in kept] == []
    assert wandb.run is None
