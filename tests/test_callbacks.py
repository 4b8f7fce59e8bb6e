"""Hooks and loggers of a training, what it returns, and the data that it takes."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.loggers import CSVLogger
from test_resuming import BATCHES, EPOCHS, Killed, few, stop_at, train  # noqa: F401 (a fixture)

from sigma_vae import VAE, Gaussian, mlp
from sigma_vae.config import TrainingConfig
from sigma_vae.data import as_splits
from sigma_vae.training import Callback, Context, fit, make_loggers
from sigma_vae.training.checkpoints import newest

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


def vae_for(few):  # noqa: F811
    torch.manual_seed(0)
    return VAE(mlp(few.shape, 1, latent_dim=2, width=8), Gaussian(1, mean="unit"))


def fitted(few, out=None, *, resume=False, vae=None, **words):  # noqa: F811
    config = TrainingConfig(epochs=EPOCHS, batch_size=8, log_every=1, checkpoint_minutes=0.0)
    return fit(vae or vae_for(few), few, config, out=out, device="cpu", resume=resume, progress=False, **words)


def test_callbacks_are_called_at_every_step_whatever_a_look_takes(few):  # noqa: F811
    recorder = Recorder()
    fitted(few, callbacks=[recorder])
    expected = [f"start 0 of {STEPS}"]
    for step in range(1, STEPS + 1):
        expected.append(f"step {step}")
        if step % BATCHES == 0:
            expected.append(f"validation {step} {step // BATCHES - 1} True")
    assert recorder.calls == [*expected, "end"]


def test_the_state_of_callbacks_and_what_they_log_survive_a_kill(few, tmp_path, monkeypatch):  # noqa: F811
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
    assert [step for step, _ in logged] == [str(step) for step in (BATCHES - 1, STEPS - 1) for _ in range(2)]


def test_a_callback_ends_a_training_after_a_validation(few):  # noqa: F811
    class Enough(Recorder):
        def on_step(self, context: Context) -> None:
            super().on_step(context)
            if context.step == 3:
                context.stop()

    enough = Enough()
    result = fitted(few, callbacks=[enough])
    assert result.steps < STEPS
    assert enough.calls[-2].startswith(f"validation {result.steps} ")


def test_fit_returns_its_validations_and_where_the_best_is_kept(few, tmp_path):  # noqa: F811
    result = fitted(few, tmp_path)
    assert [row["step"] for row in result.history] == [BATCHES - 1, STEPS - 1]
    scores = {row["step"]: row["validation/elbo_nats"] for row in result.history}
    assert result.best_score == max(scores.values()) == scores[result.best_step]
    assert (result.steps, result.folder) == (STEPS, tmp_path)
    again = fitted(few, tmp_path, resume=True)
    assert again == result
    assert fitted(few).folder is None


def test_a_tensor_is_trained_on(few):  # noqa: F811
    x = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    vae = VAE(mlp((1, 5, 5), 1, latent_dim=2, width=8), Gaussian(1, levels=None))
    result = fit(vae, x, TrainingConfig(epochs=1, batch_size=8), device="cpu", progress=False)
    assert result.steps == -(-len(as_splits(x).train) // 8)
    assert len(as_splits(x).train) < 40  # the others are for validation and test


def test_loggers_may_be_names_and_objects_of_fabric(few, tmp_path):  # noqa: F811
    theirs = CSVLogger(tmp_path / "theirs", name="a", flush_logs_every_n_steps=1)
    fitted(few, tmp_path / "run", loggers=["csv", theirs])
    assert not (tmp_path / "run" / "tensorboard").exists()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        ours = [row["step"] for row in csv.DictReader(file) if row["train/loss_nats"]]
    with open(f"{theirs.log_dir}/metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss_nats"]] == ours


def test_the_config_names_the_loggers(few, tmp_path):  # noqa: F811
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


def test_a_resumed_run_goes_on_in_weights_and_biases(few, tmp_path, monkeypatch):  # noqa: F811
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


def test_a_resumed_run_goes_on_in_mlflow(few, tmp_path, monkeypatch):  # noqa: F811
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
def test_the_file_store_of_mlflow_receives_the_metrics(few, tmp_path, monkeypatch):  # noqa: F811
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
def test_weights_and_biases_offline_receives_the_metrics(few, tmp_path, monkeypatch):  # noqa: F811
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
