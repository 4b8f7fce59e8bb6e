"""Files of a run folder: the run, its model, its data, its reports."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sigma_vae import models
from sigma_vae.config import DataConfig, RunConfig, parse, read, read_text, write, write_whole
from sigma_vae.data import Batches, Scaling, Splits, names
from sigma_vae.data.load import Whole, load_whole, mixed_splits, read_frame, refuse_unread, source_of
from sigma_vae.data.schema import TableSchema
from sigma_vae.data.splits import SPLITS, Names, SplitName, fingerprint
from sigma_vae.data.stores import InMemory
from sigma_vae.evaluation.base import evaluation_batch
from sigma_vae.evaluation.suite import table
from sigma_vae.training import resolve_device
from sigma_vae.training.checkpoints import exclusive, with_remedy
from sigma_vae.training.distributed import first_of_node_first, from_first, shared
from sigma_vae.vae import VAE

SIGMA_FITTED_ON = "sigma_fitted_on"
"""Key of the record, in reports and in the file of the weights."""
SPLITS_BYTES = 2**26
"""Largest ``splits.json``: what :func:`read_json` reads."""


class Run(NamedTuple):
    """A finished run: its configuration, its model and its data."""

    config: RunConfig
    vae: VAE
    data: Splits

    def _repr_html_(self) -> str:
        made = self.config.model
        rows = {"data": self.data.name, "examples": str(self.data.record.get("counts", "")), "network": made.network}
        return table("A run", rows | {"likelihood": made.likelihood, "seed": str(self.config.seed)}) + self.vae._repr_html_()


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
            schema = _schema_of(out) if config.data.mixed else None
            data = models.data(config.data) if schema is None else mixed_splits(config.data, schema)
    except ValueError as error:
        if (moved := _moved(out, config.data)) is not None:
            raise moved from error
        if config.data.source in names():
            raise ValueError(f"{error} (for this run: {_with_root(out)})") from error
        raise
    record = read_json(out / "environment.json").get("data")
    known = record if isinstance(record, dict) else {}
    if not _same(known, data.record):
        data = models.data(replace(config.data, levels_from="dtype"))  # as it was done before
    if not _same(known, data.record):
        raise ValueError(
            f"the data of {out} have changed since it was trained; restore them, or train again into another folder"
        )
    return data


def move_data(out: Path, root: str) -> None:
    """Keep the new place of a run's data, which moved as a whole, in its configuration.

    Args:
        out: folder of the run.
        root: the folder that holds them now: the files of a named data set; else the file, folder or pattern that the
            run was trained on, perhaps in the folders that it was in.

    Raises:
        ValueError: they are not there, are other data, or come with a package and lie in no folder.
    """
    config = config_of(out)
    moved = replace(config, data=_below(out, config.data, Path(root).expanduser().resolve()))
    data_of(out, moved)  # raises if they are not those of the run

    def keep() -> None:
        with lock_run(out):
            write(out / "config.yaml", moved)

    from_first(keep)


def _below(out: Path, config: DataConfig, root: Path) -> DataConfig:
    """The same data below another root."""
    if config.root is not None or config.source in names():
        moved = replace(config, root=str(root))
        if (source := source_of(moved)) is not None:
            refuse_unread(moved, source.options)  # data that come with a package lie in no folder
        return moved
    parts = config.path.parts
    found = (root.joinpath(*parts[i:]) for i in range(1, len(parts)))
    place = next((path for path in found if _there(path)), None)
    if place is None:
        raise ValueError(f"--root is the folder that holds {parts[-1]}, the data of {out}; {root} does not have it")
    return replace(config, source=str(place))


def _with_root(out: Path) -> str:
    """The command that says where a run's data are now."""
    command = "evaluate" if (out / models.MODEL / "model.json").exists() else "resume"
    return f"sigma-vae {command} {out} --root FOLDER"


def _schema_of(out: Path) -> TableSchema | None:
    """The columns that the run's model reads; None before it has a model."""
    path = out / models.MODEL / "model.json"
    return parse(read_json(path).get("scaling"), Scaling, str(path)).schema if path.exists() else None


def _same(record: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of the same examples, stored in the same way: 0 and 1 may be two levels, or two of 256."""

    def stored_as(words: object) -> list[str]:
        return [part for part in str(words).split("; ") if part.startswith(("kept as", "standardised"))]

    same = [stored_as(each.get("preprocessing")) for each in (record, other)]
    return record.get("fingerprint") == other.get("fingerprint") and same[0] == same[1]


def _moved(out: Path, config: DataConfig) -> ValueError | None:
    """The error of data whose place is gone, which says how to go on; None if it is not."""
    root = None if config.root is None else Path(config.root).expanduser()
    if root is not None and not root.exists():
        place = root
    elif config.source in names() or config.source.startswith("hub:") or _there(config.path):
        return None
    else:
        place = config.path
    return ValueError(
        f"the data of {out} are no longer at {place}; put them back, or name the folder that holds them now, which the run"
        f" keeps: {_with_root(out)}. evaluate, score, encode, reconstruct and predict take other data: --data PATH"
    )


def _there(path: Path) -> bool:
    """Whether there is such a file or folder, or files of such a pattern."""
    return path.exists() or (path.parent.is_dir() and any(path.parent.glob(path.name)))


class NewData(NamedTuple):
    """Other data for a run's model."""

    batches: Batches
    names: Names
    """Names of the examples: files, or numbers from 0."""
    split: SplitName | None
    """The split that they are, where their source has splits."""
    splits: Names | None
    """The run's split of each example, empty for a new one; None if the run's own data are not among them."""


def new_data(out: Path, saved: models.Saved, source: str, split: SplitName) -> NewData:
    """Read other data for a run's model: with the options, columns, levels and standardisation of the run's own data.

    Nothing is held out: of data without splits, all examples are taken, in their order. The run's own data are not
    needed. Of several processes, each gets its share of every batch. A network that reads other sizes than that of
    training is told the size of these data (:meth:`VAE.resize`).

    Raises:
        ValueError: the data cannot be read in this way, or have another shape.
    """
    with first_of_node_first():
        found = _found(new_config(out, saved.scaling, source), saved, split)
    store = found.store
    shape = store.shape[1:] if found.clips else store.shape
    if (shape, found.clips) != (saved.shape, saved.vae.network.reads_clips):
        kind, trained = (found.clips, shape[0], len(shape)), (False, saved.shape[0], len(saved.shape))
        if not saved.vae.network.has_resize or kind != trained:
            raise ValueError(
                f"{source} has examples of shape {shape}, the model of {out} was trained on {saved.shape}; cut or resize them"
            )
        saved.vae.resize(shape[1:])
    alone = Splits(source, store, store, store, saved.scaling, {}, found.clips)
    batches = shared(alone, split, evaluation_batch(alone), saved.vae.device)
    return NewData(batches, found.names, found.split, None if found.split else _splits_of(out, found))


def _found(config: DataConfig, saved: models.Saved, split: SplitName) -> Whole:
    schema = saved.scaling.schema
    if schema is None:
        return load_whole(config, split, saved.vae.network.conditions)
    frame, chosen = read_frame(config, split)
    store = InMemory(schema.encode(frame, unknown=config.unknown))
    return Whole(store, np.arange(len(frame)), False, chosen)


def word_of(source: str) -> str:
    """A word for the files written of other data: the name of their file or set, other than those of the splits.

    >>> word_of("images/new.npy"), word_of("test.csv"), word_of("a/*.png")
    ('new', 'data-test', 'data')
    """
    word = re.sub(r"[^\w.-]+", "-", Path(source).stem).strip("-.")
    return word if word and word not in SPLITS else f"data-{word}".strip("-")


def columns_of(out: Path) -> list[str]:
    """Names of the columns of a run's data; empty where they have none.

    Raises:
        ValueError: the run does not say them.
    """
    record = read_json(out / "environment.json").get("data")
    known = record.get("columns", []) if isinstance(record, dict) else None
    if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
        raise ValueError(f"{out / 'environment.json'} does not say the columns of the run's data, got {known!r}")
    return known


def new_config(out: Path, scaling: Scaling, source: str) -> DataConfig:
    """Options that read other data for a run's model: those of its own, with the model's levels or standardisation.

    Raises:
        ValueError: the run does not say the columns of its data.
    """
    own, known = config_of(out).data, columns_of(out)
    named = source in names()
    return replace(
        own,
        source=source if named or not Path(source).exists() else str(Path(source).resolve()),
        root=own.root if named and source == own.source else None,
        columns=tuple(known) if own.layout != "n-t" else own.columns,
        exclude=(),
        levels=None if named else scaling.levels,
        levels_from="dtype" if scaling.levels is None else own.levels_from,
        standardise="yes" if scaling.standardised else "no",
    )


def write_splits(out: Path, data: Splits) -> None:
    """Keep which examples are in which split, by their names; not of many millions, which ``split_seed`` tells as well."""
    content = json.dumps({split: data.names[split].tolist() for split in SPLITS}, ensure_ascii=False)
    if len(content) <= SPLITS_BYTES:
        write_whole(out / "splits.json", content + "\n")


def _splits_of(out: Path, found: Whole) -> Names | None:
    """The run's split of each example, empty for a new one; None if its own are not among them, or it does not know."""
    if not (out / "splits.json").exists():
        return None
    kept, record = read_json(out / "splits.json"), read_json(out / "environment.json").get("data")
    rows = {name: row for row, name in enumerate(found.names.tolist())}
    try:
        chosen = {split: np.array([rows[name] for name in kept[split]], dtype=np.int64) for split in SPLITS}
    except (KeyError, TypeError):  # other examples
        return None
    parts = {split: found.store.select(torch.from_numpy(each)) for split, each in chosen.items()}
    if not isinstance(record, dict) or record.get("fingerprint") != fingerprint(parts):
        return None
    each = np.full(len(found.store), "", dtype=object)
    for split, numbers in chosen.items():
        each[numbers] = split
    return each


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


def fitted_on(data: Splits, split: SplitName) -> dict[str, Any]:
    """Describe the data that something was fitted on, for a report."""
    return {
        "data": data.record.get("source", data.name),
        "split": split,
        "examples": len(data.store(split)),
        "fingerprint": data.record.get("fingerprint"),
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
