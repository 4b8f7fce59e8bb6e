"""Tables whose columns are of all types, in splits: rows are written as floats by a schema."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import torch

from sigma_vae.columns import Family
from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_record
from sigma_vae.data.scaling import Scaling
from sigma_vae.data.schema import TableSchema
from sigma_vae.data.splits import SPLITS, SplitName, Splits, fingerprint, hold_out
from sigma_vae.data.stores import InMemory, Store
from sigma_vae.data.tables import TABLES, read_table, table_files

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["mixed_splits", "read_frame", "splits_of_frames"]

TEXTS = (".txt", ".dat", ".txt.gz", ".dat.gz")
EXCEL = (".xlsx",)


def mixed_splits(config: DataConfig, schema: TableSchema | None = None) -> Splits:
    """Read a table with columns of all types; its schema is found in the training rows, categories in all rows.

    A ``schema`` that is known already is used as it is.

    Raises:
        ValueError: the source is no table, or its columns do not fit the config.
    """
    given = (config.levels is not None, config.standardise != "auto", config.layout not in ("auto", "n-c"), config.window)
    if any(given):
        raise ValueError(
            "the likelihood mixed reads a table's columns as they are; leave out levels, standardise, layout and window for it"
        )
    files = _files(config)
    read = {split: _read(path, config) for split, path in files.items()}
    words = list(dict.fromkeys(word for _, said in read.values() for word in said))
    frames = {split: _chosen(frame, config, files[split]) for split, (frame, _) in read.items()}
    found = splits_of_frames(frames, config, str(config.path), schema)
    record = found.record | {"files": [file_record(path) for path in files.values()]}
    record["preprocessing"] = "; ".join([*words, record["preprocessing"]])
    return replace(found, record=record)


def read_frame(config: DataConfig, split: SplitName) -> tuple["pd.DataFrame", SplitName | None]:
    """Read the table of one split where a folder has splits, else the whole table; and say which split it is.

    Raises:
        ValueError: the source is no table, or is damaged.
    """
    files = _files(config)
    chosen: SplitName = split if split in files else "train"
    frame, _ = _read(files[chosen], config)
    return frame, chosen if len(files) > 1 else None


def splits_of_frames(
    frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, name: str, schema: TableSchema | None = None
) -> Splits:
    """Hold out the missing splits of data frames, find the schema unless it is given, and write the rows as floats.

    Raises:
        ValueError: there are too few rows, or columns do not fit the config.
    """
    import pandas as pd

    rows: dict[SplitName, Store] = {split: InMemory(torch.arange(len(frame))) for split, frame in frames.items()}
    chosen, held_out = hold_out(rows, config, name, ("rows", "file"))
    train = frames["train"]
    if schema is None:
        whole = pd.concat([*frames.values()], ignore_index=True) if len(frames) > 1 else train
        training = chosen.get("train", np.arange(len(train)))  # the first frame's rows come first
        schema = TableSchema.infer(whole, training, families=_families(config), exclude=config.exclude)
    encoded = {split: schema.encode(frame, unknown=config.unknown) for split, frame in frames.items()}
    parts: dict[SplitName, Store] = {split: InMemory(x) for split, x in encoded.items()}
    parts |= {split: InMemory(encoded["train"][torch.from_numpy(each)]) for split, each in chosen.items()}
    parts = {split: parts[split] for split in SPLITS}
    names = {split: np.arange(len(frame)) for split, frame in frames.items()}
    names |= {split: names["train"][each] for split, each in chosen.items()}
    record = {
        "source": config.source,
        "files": [],
        "counts": {split: len(part) for split, part in parts.items()},
        "preprocessing": "; ".join([schema.words(), "kept as rows of a schema", *held_out]),
        "fingerprint": fingerprint(parts),
        "columns": [column.name for column in schema.columns],
    }
    return Splits(name, parts["train"], parts["validation"], parts["test"], Scaling(schema=schema), record, names=names)


def _families(config: DataConfig) -> dict[str, Family]:
    families = {}
    for text in config.families:
        name, _, family = text.rpartition("=")
        if not name or family not in get_args(Family):
            raise ValueError(f"families are written as column=family, with one of {', '.join(get_args(Family))}; got {text!r}")
        families[name] = cast(Family, family)
    return families


def _files(config: DataConfig) -> dict[SplitName, Path]:
    path = config.path
    if path.is_dir() and "train" in (files := table_files(path)):
        return files
    if not path.is_file() or not path.name.lower().endswith((*TABLES, *TEXTS, *EXCEL)):
        raise ValueError(
            f"the likelihood mixed reads tables ({', '.join((*TABLES, *EXCEL))}, or a folder with train.csv), got {config.source!r}"
        )
    return {"train": path}


def _read(path: Path, config: DataConfig) -> tuple["pd.DataFrame", list[str]]:
    frame, words = (_excel(path, config), []) if path.suffix in EXCEL else read_table(path, config)
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    for name in frame.columns:
        if (times := _times(frame[name])) is not None:
            frame[name] = times
    return frame, words


def _excel(path: Path, config: DataConfig) -> "pd.DataFrame":
    import pandas as pd

    try:
        return pd.read_excel(path, na_values=list(config.missing))
    except ImportError as error:
        raise ValueError(
            f"{path} is read with openpyxl, which is not installed; pip install openpyxl, or save it as .csv"
        ) from error


def _chosen(frame: "pd.DataFrame", config: DataConfig, path: Path) -> "pd.DataFrame":
    if missing := [name for name in config.columns if name not in frame.columns]:
        raise ValueError(f"{path} needs the column {missing[0]}, got {', '.join(frame.columns)}; choose others with --columns")
    return frame[list(config.columns)] if config.columns else frame


def _times(values: "pd.Series") -> "pd.Series | None":
    """Points of time, where a file has all values written as in 2024-05-01 or 2024-05-01 12:30."""
    import pandas as pd

    if (
        values.dtype.kind not in "OT"
        or not values.dropna().astype(str).str.match(r"\d{4}-\d\d-\d\d").all()
        or values.isna().all()
    ):
        return None
    try:
        return pd.to_datetime(values, format="ISO8601")
    except (ValueError, TypeError):
        return None
