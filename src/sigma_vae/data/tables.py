"""Tables: CSV, TSV and Parquet files, and data frames."""

import csv
import difflib
import gzip
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.cache import file_record
from sigma_vae.data.levels import Array
from sigma_vae.data.splits import SPLIT_WORDS, Raw, SplitName
from sigma_vae.registry import register

__all__ = ["TABLES", "from_frames", "holds_tables", "read_tables"]

if TYPE_CHECKING:
    import pandas as pd


TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
"""Endings of table files."""
_NAMELESS = "Unnamed: "  # how pandas names a column without a name: usually row numbers


def holds_tables(path: Path, config: DataConfig) -> bool:
    """Whether a path is a folder with a table for its training split: train.csv, say."""
    return path.is_dir() and "train" in _tables(path)


@register.source("tables", options={"layout", "columns"}, endings=TABLES, reads=holds_tables, rank=1)
def read_tables(config: DataConfig) -> Raw:
    """Read rows of numbers ``(N, C)``; with layout ``n-t``, series ``(N, 1, T)`` whose times are the columns.

    In a folder, train.csv is read, and test.csv and validation.csv if they exist (or .tsv, .parquet, .csv.gz). All
    numeric columns (and true/false ones, as 1 and 0) are read, or those in ``columns``. They are real values,
    standardised by default; with ``levels``, integers 0..levels−1.

    Raises:
        ValueError: a file is missing or damaged; a column is missing or not numeric; values are missing; or no column
            is left.
    """
    path = config.path
    if not path.exists():
        raise ValueError(f"expected a table at {path}, got no such file; check the path")
    files: dict[SplitName, Path] = _tables(path) if path.is_dir() else {"train": path}
    raw = from_frames({split: _read(file) for split, file in files.items()}, config, {s: str(f) for s, f in files.items()})
    return replace(raw, name=str(path), files=[file_record(file) for file in files.values()])


def from_frames(frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, names: Mapping[SplitName, str]) -> Raw:
    """Read the rows of data frames, at least one for train, as :func:`read_tables` reads files.

    Raises:
        ValueError: a column is missing or not numeric; values are missing; or no column is left.
    """
    if config.layout not in ("auto", "n-c", "n-t"):
        raise ValueError(f"{config.source}: a table has layout n-c or n-t, got {config.layout}; give one of these, or none")
    frames = {split: frame.set_axis([str(name) for name in frame.columns], axis=1) for split, frame in frames.items()}
    columns, left_out = _columns(frames["train"], config.columns, names["train"])
    parts = {split: _numbers(frame, columns, config, names[split]) for split, frame in frames.items()}
    kinds = {split: "integers" if part.dtype.kind == "i" else "fractions" for split, part in parts.items()}
    if len(set(kinds.values())) > 1:
        got = ", ".join(f"{kind} in {Path(names[split]).name}" for split, kind in kinds.items())
        raise ValueError(f"{config.source} needs integers in all tables or in none, got {got}; save them alike")
    words = [f"columns {', '.join(columns)}", *([f"columns left out: {', '.join(left_out)}"] if left_out else [])]
    return Raw(config.source, parts, preprocessing=words, standardise=True, columns=tuple(columns))


def _tables(folder: Path) -> dict[SplitName, Path]:
    found: dict[SplitName, Path] = {}
    for word, split in SPLIT_WORDS.items():
        for path in (folder / f"{word}{ending}" for ending in TABLES):
            if path.is_file() and split in found:
                raise ValueError(f"{folder} needs one table for each split, got {found[split].name} and {path.name}; drop one")
            if path.is_file():
                found[split] = path
    return found


def _read(path: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        sign = "\t" if ".tsv" in path.name.lower() else ","
        _check_header(_header(path, sign), path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would cut rows that are longer than the header
            return pd.read_csv(path, sep=sign, index_col=False, low_memory=False)
    except (OSError, EOFError, ValueError, ImportError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({type(error).__name__}: {error}); repair or save it anew"
        ) from error


def _header(path: Path, sign: str) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=sign), [])


def _check_header(names: Sequence[str], path: Path) -> None:
    """Refuse a header of numbers, which is a row of values, unless they rise, as times do."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return
    if numbers and any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(
            f"its first row needs the names of the columns, got the numbers {', '.join(names[:5])}, ...; add names"
        )


def _columns(frame: "pd.DataFrame", asked: Sequence[str], path: str) -> tuple[list[str], list[str]]:
    """Choose the columns to read, and list the others."""
    names = list(frame.columns)
    if asked:
        _check_columns(frame, asked, path)
        return list(asked), [name for name in names if name not in asked]
    numeric = [name for name in names if _is_numeric(frame, name) and not name.startswith(_NAMELESS)]
    if not numeric:
        raise ValueError(
            f"{path} needs numeric columns, got none among {_few(names) or 'no columns'}; name them or make them numbers"
        )
    return numeric, [name for name in names if name not in numeric]


def _check_columns(frame: "pd.DataFrame", asked: Iterable[str], path: str) -> None:
    for name in asked:
        if name not in frame.columns:
            near = difflib.get_close_matches(name, frame.columns, n=1)
            guess = f"did you mean {near[0]}?" if near else "choose others with --columns"
            raise ValueError(f"{path} needs the column {name}, got {_few(list(frame.columns))}; {guess}")
        if not _is_numeric(frame, name):
            raise ValueError(
                f"{path}: column {name} needs numbers, got {frame[name].dtype}; leave it out, or make them numbers"
            )


def _is_numeric(frame: "pd.DataFrame", name: str) -> bool:
    from pandas.api.types import is_bool_dtype, is_complex_dtype, is_numeric_dtype

    dtype = frame[name].dtype
    return bool(is_bool_dtype(dtype) or (is_numeric_dtype(dtype) and not is_complex_dtype(dtype)))


def _numbers(frame: "pd.DataFrame", columns: list[str], config: DataConfig, path: str) -> Array:
    _check_columns(frame, columns, path)
    chosen = frame[columns]
    if not len(chosen):
        raise ValueError(f"{path} needs at least one row, got none; check the file")
    missing = {str(name): int(count) for name, count in chosen.isna().sum().items() if count}
    if missing:
        counts = _few([f"{name} ({count})" for name, count in missing.items()])
        raise ValueError(
            f"{path} needs a value in every one of {len(chosen)} rows, got missing ones in {counts}; fill them in, drop these rows, or"
            " leave the columns out: --columns with the others"
        )
    values = chosen.to_numpy(np.float64)
    if config.levels is not None and all(chosen[name].dtype.kind in "biu" for name in columns):
        values = values.astype(np.int64)
    return values[:, np.newaxis] if config.layout == "n-t" else values


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
