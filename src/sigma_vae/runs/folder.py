"""Files of a run folder: the run, its model, its data, its reports."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sigma_vae import models
from sigma_vae.config import DataConfig, RunConfig, read, read_text, write_whole
from sigma_vae.data import Batches, Splits, names
from sigma_vae.data.load import load_whole
from sigma_vae.data.splits import SplitName
from sigma_vae.evaluation.base import EVALUATION_BATCH, evaluation_batch
from sigma_vae.training import resolve_device
from sigma_vae.training.checkpoints import exclusive, with_remedy
from sigma_vae.training.distributed import first_of_node_first
from sigma_vae.vae import VAE

__all__ = [
    "SIGMA_FITTED_ON",
    "Run",
    "config_of",
    "data_of",
    "evaluation_batch",
    "lock_run",
    "model_digest",
    "new_data",
    "open_model",
    "open_run",
    "read_json",
    "save_refitted",
    "sigma_fitted_on",
    "sigma_record",
    "write_json",
]

SIGMA_FITTED_ON = "sigma_fitted_on"
"""Key of the record, in reports and in the file of the weights."""


class Run(NamedTuple):
    """A finished run: its configuration, its model and its data."""

    config: RunConfig
    vae: VAE
    data: Splits


def open_run(out: Path, device: str = "auto") -> Run:
    """Open a finished run, with its model on the device.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one, or its data have changed.
    """
    config = config_of(out)
    return Run(config, open_model(out, device).vae, data_of(out, config))


def open_model(out: Path, device: str = "auto") -> models.Saved:
    """Open the model of a finished run, on the device; its data are not needed.

    Raises:
        ValueError: the folder is missing, holds no run, an unfinished or a broken one.
    """
    config_of(out)
    if not (out / "model" / "model.json").exists():
        raise ValueError(f"{out} has no finished model yet; finish it: sigma-vae resume {out}")
    saved = models.load(out / "model")
    return saved._replace(vae=saved.vae.to(resolve_device(device)))


def config_of(out: Path) -> RunConfig:
    """Read the configuration of a run.

    Raises:
        ValueError: the folder is missing or holds no run.
    """
    if not (out / "config.yaml").exists():
        raise ValueError(f"{out} holds no run (no config.yaml); train one: sigma-vae train DATA --out {out}")
    return read(out / "config.yaml", RunConfig)


def data_of(out: Path, config: RunConfig) -> Splits:
    """Load the data that a run was trained on.

    Raises:
        ValueError: they have changed: examples of the training split may now be in the test split.
    """
    try:
        with first_of_node_first():
            data = models.data(config.data)
    except ValueError as error:
        if (moved := _moved(out, config.data)) is None:
            raise
        raise moved from error
    record = read_json(out / "environment.json").get("data")
    known = record if isinstance(record, dict) else {}
    if not _same(known, data.record):
        data = models.data(replace(config.data, levels_from="dtype"))  # as it was done before
    if not _same(known, data.record):
        raise ValueError(
            f"the data of {out} have changed since it was trained; restore them, or train again into another folder"
        )
    return data


def _same(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of the same examples, stored in the same way: 0 and 1 may be two levels, or two of 256."""

    def stored_as(words: object) -> list[str]:
        return [part for part in str(words).split("; ") if part.startswith(("kept as", "standardised"))]

    same = [stored_as(each.get("preprocessing")) for each in (record, other)]
    return record.get("fingerprint") == other.get("fingerprint") and same[0] == same[1]


def _moved(out: Path, config: DataConfig) -> ValueError | None:
    """The error of data whose path is gone, which says how to go on; None if it is not."""
    is_path = config.source not in names() and not config.source.startswith("hub:")
    if not is_path or config.path.exists() or any(sign in config.source for sign in "*?["):
        return None
    return ValueError(
        f"the data of {out} are no longer at {config.path}; put them back, or write their new place as `source` into"
        f" {out / 'config.yaml'}. score, encode and reconstruct take other data: --data PATH"
    )


def new_data(out: Path, saved: models.Saved, source: str, split: SplitName) -> tuple[Batches, list[str]]:
    """Read other data for a run's model: with the options, columns, levels and standardisation of the run's own data.

    Nothing is held out: of data without splits, all examples are taken, in their order. The run's own data are not
    needed.

    Returns:
        The examples on the model's device, and their names where they are files.

    Raises:
        ValueError: the data cannot be read in this way, or have another shape.
    """
    own = config_of(out).data
    record = read_json(out / "environment.json").get("data")
    known = record.get("columns", []) if isinstance(record, dict) else None
    if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
        raise ValueError(f"{out / 'environment.json'} does not say the columns of the run's data, got {known!r}")
    columns = tuple(known) if own.layout != "n-t" else own.columns
    real = saved.scaling.levels is None
    config = replace(
        own,
        source=source if source in names() or not Path(source).exists() else str(Path(source).resolve()),
        root=None,
        columns=columns,
        exclude=(),
        levels=None if source in names() else saved.scaling.levels,
        levels_from="dtype" if real else own.levels_from,
        standardise="yes" if saved.scaling.standardised else "no",
    )
    store, labels, clips = load_whole(config, split)
    shape = store.shape[1:] if clips else store.shape
    if (shape, clips) != (saved.shape, saved.vae.network.reads_clips):
        raise ValueError(
            f"{source} has examples of shape {shape}, the model of {out} was trained on {saved.shape}; cut or resize them"
        )
    frames = store.shape[0] if clips else 1
    size = max(1, EVALUATION_BATCH // frames)
    return Batches(store.to(saved.vae.device), saved.scaling, size), labels


def model_digest(out: Path) -> str:
    """SHA-256 of the run's weights and scales."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def save_refitted(out: Path, vae: VAE, record: dict[str, Any]) -> None:
    """Write the model's weights and refitted scales, with a record of the data that σ was fitted on.

    Both are in one file, so neither is ever there without the other. The old file remains until the new one is whole.
    """
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}
    metadata = {SIGMA_FITTED_ON: json.dumps(record, ensure_ascii=False)}
    write_whole(out / "model" / "model.safetensors", save(state, metadata=metadata))


def sigma_record(data: Splits, split: SplitName, seed: int = 0) -> dict[str, Any]:
    """The record of a σ that was fitted on a split of these data."""
    return {
        "data": data.record["source"],
        "split": split,
        "examples": len(data.store(split)),
        "fingerprint": data.record["fingerprint"],
        "noise_seed": seed,
    }


def sigma_fitted_on(out: Path) -> dict[str, Any] | None:
    """Read the record of :func:`save_refitted`; None where there is no σ, or an older version trained the model."""
    from safetensors import safe_open

    path = out / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = (file.metadata() or {}).get(SIGMA_FITTED_ON)
    if record is None:
        return None
    try:
        content = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a record of what σ was fitted on that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} says that σ was fitted on {content!r}, which is no record of data")
    return content


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's folder.

    Raises:
        ValueError: the folder holds no run, or another process is writing into it.
        OSError: the folder cannot be written.
    """
    config_of(out)  # first: a folder without a run gets no lock file
    with with_remedy(out, "do it again"), exclusive(out):
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report; the old file remains until the new one is whole."""
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
        raise ValueError(f"{path} holds no report, but {type(content).__name__}")
    return content
