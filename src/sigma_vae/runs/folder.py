"""The files of a run folder."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sigma_vae import models
from sigma_vae.config import RunConfig, read, read_text, write_whole
from sigma_vae.data import Splits
from sigma_vae.training import resolve_device
from sigma_vae.training.checkpoints import exclusive, with_remedy
from sigma_vae.training.distributed import first_of_node_first
from sigma_vae.vae import VAE

__all__ = [
    "Run",
    "config_of",
    "evaluation_batch",
    "fitted_on",
    "held",
    "keep",
    "model_digest",
    "open_model",
    "open_run",
    "read_json",
    "same_data",
    "write_json",
]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report; one that is there stands until the new one is whole."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        ValueError: it is missing or broken.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or broken: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold what a run writes there, but {type(content).__name__}")
    return content


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


def open_model(out: Path, device: str = "auto") -> models.Saved:
    """The model of a finished run alone, on the device; its data may be gone.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    config_of(out)
    if not (out / "model" / "model.json").exists():
        raise ValueError(f"{out} has no finished model yet; finish it: sigma-vae resume {out}")
    saved = models.load(out / "model")
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
        data = models.data(config.data)
    record = read_json(out / "environment.json").get("data")
    known = record.get("fingerprint") if isinstance(record, dict) else None
    if known != data.record["fingerprint"]:
        raise ValueError(
            f"the data of {out} have changed since it was trained; restore them, or train anew into another folder"
        )
    return data


KEY = "sigma_fitted_on"


def keep(out: Path, vae: VAE, record: dict[str, Any]) -> None:
    """Write the model's weights and scales anew, with a record of what σ was fitted on; the old file stands until the new one is whole.

    Both are one file, so that neither is ever there without the other; a training that goes on writes it without the record.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    write_whole(out / "model" / "model.safetensors", save(state, metadata={KEY: json.dumps(record, ensure_ascii=False)}))


def fitted_on(out: Path) -> dict[str, Any] | None:
    """What a later calibration fitted σ on, as :func:`keep` wrote it; None where training did, on its own training split."""
    from safetensors import safe_open

    path = out / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = (file.metadata() or {}).get(KEY)
    if record is None:
        return None
    try:
        content = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not say in JSON what its σ was fitted on: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} says that its σ was fitted on {content!r}, which is no record of data")
    return content


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's folder while this one does.

    Raises:
        ValueError: the folder holds no run, or another process is at work in it.
        OSError: the folder cannot be written.
    """
    config_of(out)  # where there is no run, no folder is made for one
    with with_remedy(out, "do it again"), exclusive(out):
        yield
