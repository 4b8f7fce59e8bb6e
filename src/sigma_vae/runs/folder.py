"""The files of a run folder: what is read from it, and what is written into it."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from sigma_vae import build
from sigma_vae.config import RunConfig
from sigma_vae.configfile import read
from sigma_vae.data import Splits
from sigma_vae.runs.reports import read_json
from sigma_vae.training import resolve_device
from sigma_vae.training.processes import first_of_node_first
from sigma_vae.vae import VAE

__all__ = ["Run", "config_of", "evaluation_batch", "model_digest", "open_model", "open_run", "same_data"]

EVALUATION_BATCH = 256


class Run(NamedTuple):
    """A finished run: its configuration, its model and its data."""

    config: RunConfig
    vae: VAE
    data: Splits


def open_run(out: Path, device: str = "auto") -> Run:
    """A finished run, with its model on the device.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    config = config_of(out)
    return Run(config, open_model(out, device).vae, same_data(out, config))


def open_model(out: Path, device: str = "auto") -> build.Saved:
    """The model of a finished run alone, on the device; its data may be gone.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    config_of(out)
    if not (out / "model" / "model.json").exists():
        raise ValueError(f"{out} has no finished model yet; finish it: sigma-vae resume {out}")
    saved = build.load(out / "model")
    return saved._replace(vae=saved.vae.to(resolve_device(device)))


def model_digest(out: Path) -> str:
    """SHA-256 of the run's weights and scales: what an evaluation is of."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def evaluation_batch(data: Splits) -> int:
    """How many examples a batch has where nothing is trained: of clips so many fewer as they have frames."""
    return max(1, EVALUATION_BATCH // (data.frames or 1))


def config_of(out: Path) -> RunConfig:
    """What the folder's run was made of.

    Raises:
        ValueError: the folder is missing or holds no run.
    """
    if not (out / "config.yaml").exists():
        raise ValueError(f"{out} holds no run (no config.yaml); train one: sigma-vae train DATA --out {out}")
    return read(out / "config.yaml", RunConfig)


def same_data(out: Path, config: RunConfig) -> Splits:
    """The data that the run was trained on: changed data may move what it was trained on into the test split."""
    with first_of_node_first():
        data = build.data(config.data)
    record = read_json(out / "environment.json").get("data")
    known = record.get("fingerprint") if isinstance(record, dict) else None
    if known != data.record["fingerprint"]:
        raise ValueError(
            f"the data of {out} have changed since it was trained; restore them, or train anew into another folder"
        )
    return data
