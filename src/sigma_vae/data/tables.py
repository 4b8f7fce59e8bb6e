"""Tables: CSV, TSV and Parquet files, and data frames."""

import codecs
import csv
import difflib
import gzip
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
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
_HEAD = 2**16  # bytes from which the dialect of a text file is found
_SIGNS = ("\t", ";", "|", ",")
_DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_WITH_UNIT = r"^([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))\s*([^\d\s.,:/-][^\d]*)?$"
_DISCRETE = 20  # rows per distinct value from which a column is taken for discrete
_NAMELESS = "Unnamed: "  # how pandas names a column without a name: usually row numbers


def holds_tables(path: Path, config: DataConfig) -> bool:
    """Whether a path is a folder with a table for its training split: train.csv, say."""
    return path.is_dir() and "train" in _tables(path)


@register.source("tables", options={"layout", "columns", "exclude"}, endings=TABLES, reads=holds_tables, rank=1)
def read_tables(config: DataConfig) -> Raw:
    """Read rows of numbers ``(N, C)``; with layout ``n-t``, series ``(N, 1, T)`` whose times are the columns.

    In a folder, train.csv is read, and test.csv and validation.csv if they exist (or .tsv, .parquet, .csv.gz). All
    numeric columns (and true/false ones, as 1 and 0) are read, but those in ``exclude``; or those in ``columns``. They
    are real values, standardised by default; with ``levels``, integers 0..levels−1. Separator, decimal sign and
    encoding are found; thousands (1,502.76) and one unit throughout (12 EUR, 3.1%) are understood.

    Raises:
        ValueError: a file is missing or damaged; a column is missing or not numeric; values are missing; or no column
            is left.
    """
    path = config.path
    if not path.exists():
        raise ValueError(f"expected a table at {path}, got no such file; check the path")
    files: dict[SplitName, Path] = _tables(path) if path.is_dir() else {"train": path}
    read = {split: _read(file) for split, file in files.items()}
    for split, (frame, _) in read.items():
        _check_header([str(name) for name in frame.columns], config.layout, str(files[split]))
    raw = from_frames({split: frame for split, (frame, _) in read.items()}, config, {s: str(f) for s, f in files.items()})
    words = list(dict.fromkeys(word for _, said in read.values() for word in said))
    record = [file_record(file) for file in files.values()]
    return replace(raw, name=str(path), files=record, preprocessing=[*words, *raw.preprocessing])


def from_frames(frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, names: Mapping[SplitName, str]) -> Raw:
    """Read the rows of data frames, at least one for train, as :func:`read_tables` reads files.

    Raises:
        ValueError: a column is missing or not numeric; values are missing; or no column is left.
    """
    if config.layout not in ("auto", "n-c", "n-t"):
        raise ValueError(f"{config.source}: a table has layout n-c or n-t, got {config.layout}; give one of these, or none")
    frames = {split: frame.set_axis([str(name) for name in frame.columns], axis=1) for split, frame in frames.items()}
    frames, said = _all_converted(frames, config, names)
    columns, left_out = _columns(frames["train"], config, names["train"])
    parts = {split: _numbers(frame, columns, config, names[split]) for split, frame in frames.items()}
    kinds = {split: "integers" if part.dtype.kind == "i" else "fractions" for split, part in parts.items()}
    if len(set(kinds.values())) > 1:
        got = ", ".join(f"{kind} in {Path(names[split]).name}" for split, kind in kinds.items())
        raise ValueError(f"{config.source} needs integers in all tables or in none, got {got}; save them alike")
    words = [f"columns {', '.join(columns)}", *([f"columns left out: {', '.join(left_out)}"] if left_out else []), *said]
    if config.levels is None and (discrete := _discrete(parts["train"], columns, config)):
        words.append(
            f"discrete columns: {_few(discrete)} (a density of discrete values has no upper bound, so do not compare its nats;"
            " --exclude leaves them out)"
        )
    return Raw(config.source, parts, preprocessing=words, standardise=True, columns=tuple(columns))


def _all_converted(
    frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, names: Mapping[SplitName, str]
) -> tuple[dict[SplitName, "pd.DataFrame"], list[str]]:
    """Convert the columns that may be read, in all tables alike."""
    done, said = {}, {}
    for split, frame in frames.items():
        if twice := frame.columns[frame.columns.duplicated()].tolist():
            raise ValueError(f"{names[split]} needs a name of its own for each column, got {twice[0]} twice; rename one")
        wanted = [name for name in config.columns or frame.columns if name in frame.columns and name not in config.exclude]
        done[split], said[split] = _converted(frame, wanted, names[split])
    if any(words != said["train"] for words in said.values()):
        got = "; ".join(f"{split}: {', '.join(words) or 'plain numbers'}" for split, words in said.items())
        raise ValueError(f"{config.source} needs the same units in all tables, got {got}; save them alike")
    return done, said["train"]


def _discrete(values: Array, columns: Sequence[str], config: DataConfig) -> list[str]:
    """Names of the columns with few distinct values for their rows."""
    if config.layout == "n-t":
        return []
    counts = [len(np.unique(column)) for column in values.T]
    return [
        name
        for name, count in zip(columns, counts, strict=True)
        if 2 <= count and (count == 2 or count * _DISCRETE <= len(values))
    ]


def _tables(folder: Path) -> dict[SplitName, Path]:
    found: dict[SplitName, Path] = {}
    for word, split in SPLIT_WORDS.items():
        for path in (folder / f"{word}{ending}" for ending in TABLES):
            if path.is_file() and split in found:
                raise ValueError(f"{folder} needs one table for each split, got {found[split].name} and {path.name}; drop one")
            if path.is_file():
                found[split] = path
    return found


def _read(path: Path) -> tuple["pd.DataFrame", list[str]]:
    """Read a table, and say how where that was not plain."""
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path), []
        dialect = _dialect(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would cut rows that are longer than the header
            try:
                frame = _parsed(path, dialect)
            except UnicodeDecodeError:
                dialect = replace(dialect, encoding="latin-1")
                frame = _parsed(path, dialect)
    except (OSError, EOFError, ValueError, ImportError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({type(error).__name__}: {str(error).strip()}); repair or save it anew"
        ) from error
    return frame, dialect.words()


@dataclass(frozen=True)
class _Dialect:
    """How a text file writes its rows."""

    separator: str
    skipped: int = 0
    decimal: str = "."
    encoding: str = "utf-8-sig"
    usual: str = ","
    names: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Say what differs from a plain CSV file."""
        sign = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}[self.separator]
        said = [
            (self.separator != self.usual, f"separated by {sign}"),
            (self.decimal != ".", "decimal commas"),
            (self.encoding != "utf-8-sig", f"text in {self.encoding}"),
            (self.skipped > 0, f"skipped {self.skipped} lines before the names"),
        ]
        repeated = sorted({name for name in self.names if name and self.names.count(name) > 1})
        return [word for told, word in said if told] + [
            f"several columns are named {name}, the second is {name}.1" for name in repeated
        ]


def _parsed(path: Path, dialect: _Dialect) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.read_csv(
        path,
        sep=dialect.separator,
        skiprows=dialect.skipped,
        decimal=dialect.decimal,
        thousands="." if dialect.decimal == "," else None,
        encoding=dialect.encoding,
        index_col=False,
        skipinitialspace=True,
        low_memory=False,
    )
    return frame.rename(columns=str.strip)


def _dialect(path: Path) -> _Dialect:
    """Find separator, decimal sign, encoding and the lines before the names from the start of a file."""
    usual = "\t" if ".tsv" in path.name.lower() else ","
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        head = file.read(_HEAD)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text = head.decode(encoding, errors="replace")
    if "\0" in text:
        raise ValueError("it holds bytes that are no text")
    lines = text.splitlines()
    if len(head) == _HEAD:
        lines = lines[:-1]  # cut short
    skipped = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), 0)
    said = re.fullmatch(r"sep=(.)", lines[skipped].strip("\r\n"), re.IGNORECASE) if lines else None
    skipped += said is not None
    rows = [line for line in lines[skipped:] if line.strip()]
    sign = said[1] if said and said[1] in _SIGNS else _separator(rows, usual)
    table = list(csv.reader(rows, delimiter=sign, skipinitialspace=True))
    fields = [field.strip() for row in table[1:] for field in row]
    commas = sign != "," and any(_DECIMAL_COMMA.fullmatch(field) for field in fields)
    if commas and any(_DECIMAL_POINT.fullmatch(field) for field in fields):
        raise ValueError("it has numbers with decimal commas and with decimal points; write them alike")
    names = tuple(name.strip() for name in table[0]) if table else ()
    return _Dialect(sign, skipped, "," if commas else ".", encoding, usual, names)


def _separator(rows: Sequence[str], usual: str) -> str:
    """Find the sign that splits the names, and all rows alike; a comma is asked last, as it may be a decimal one."""
    for sign in _SIGNS:
        counts = [len(row) for row in csv.reader(rows, delimiter=sign, skipinitialspace=True)]
        if counts and counts[0] > 1 and len(set(counts[1:])) <= 1 and counts[-1] >= counts[0]:
            return sign
    return usual


def _check_header(names: Sequence[str], layout: str, path: str) -> None:
    """Refuse a row of values in place of the names: only times, years and row numbers are numbers as names."""
    numbers = [number for name in names if (number := _number(name)) is not None]
    steps = [b - a for a, b in pairwise(numbers)]
    rising = all(step > 0 for step in steps)
    counted = (
        len(numbers) < 3 and all(step == 1 for step in steps) and numbers[:1] in ([0], [1], *([y] for y in range(1500, 2200)))
    )
    regular = len(numbers) > 2 and max(steps) - min(steps) <= 1e-3 * max(steps)
    if not numbers or (rising and (counted or regular or layout == "n-t")):
        return
    raise ValueError(
        f"{path}: its first row needs the names of the columns, got the numbers"
        f" {_few([format(number, 'g') for number in numbers])}; add a row of names,"
        " or if these are the times of series: --layout n-t"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _converted(frame: "pd.DataFrame", wanted: Sequence[str], path: str) -> tuple["pd.DataFrame", list[str]]:
    """Turn columns of text or objects into numbers where that is sure, and say so; leave true text as it is.

    Raises:
        ValueError: most values of a column are numbers, but not all.
    """
    words = []
    for name in wanted:
        column = frame[name]
        if column.dtype.kind in "biufcmM" or str(column.dtype).lower().startswith(("int", "uint", "float", "bool", "category")):
            continue
        numbers, word = _as_numbers(column, name, path)
        if numbers is not None:
            frame = frame.assign(**{name: numbers})
        words += [word] if word else []
    return frame, words


def _as_numbers(column: "pd.Series", name: str, path: str) -> tuple["pd.Series | None", str]:
    import pandas as pd

    present = column.dropna()
    if present.map(lambda value: isinstance(value, bool | np.bool_ | Decimal)).all() and len(present):
        return pd.to_numeric(column.astype(object).map(float, na_action="ignore"), errors="coerce"), ""
    text = present.astype(str).str.strip()
    parts = text.str.extract(_WITH_UNIT)
    found = parts[0].notna()
    if found.mean() <= 0.5 or not len(present):
        return None, ""
    units = parts[1].fillna("")
    unit = units[found].mode()[0]
    thousands = bool(parts[0].str.contains(r",\d{3}(?:,\d{3})*\.", na=False).any())
    bad = ~found | (units != unit) | (parts[0].str.contains(",", na=False) & (not thousands))
    if bad.any():
        row = int(column.index.get_indexer_for(present.index[bad.to_numpy()][:1])[0])
        raise ValueError(
            f"{path}: column {name} needs numbers throughout, got {present[bad].iloc[0]!r} in row {row + 1} of {len(column)} (and"
            f" {int(bad.sum()) - 1} more like it); repair or drop these rows, or leave the column out: --exclude {shlex.quote(name)}"
        )
    said = [f"without the unit {unit}"] if unit else []
    said += ["commas taken for thousands"] if thousands else []
    numbers = pd.to_numeric(parts[0].str.replace(",", "")).reindex(column.index)
    return numbers, f"{name}: {' and '.join(said)}" if said else ""


def _columns(frame: "pd.DataFrame", config: DataConfig, path: str) -> tuple[list[str], list[str]]:
    """Choose the columns to read, and list the others."""
    names, asked = list(frame.columns), config.columns
    _check_names(frame, config.exclude, path)
    if both := sorted({*asked} & {*config.exclude}):
        raise ValueError(
            f"{path}: a column is chosen or excluded, got {both[0]} in columns and in exclude; leave it out of one"
        )
    if asked:
        _check_columns(frame, asked, path)
        return list(asked), [name for name in names if name not in asked]
    numeric = [
        name for name in names if name not in config.exclude and _is_numeric(frame, name) and not name.startswith(_NAMELESS)
    ]
    if not numeric:
        raise ValueError(
            f"{path} needs numeric columns, got none among {_few(names) or 'no columns'}; name them or make them numbers"
        )
    return numeric, [name for name in names if name not in numeric]


def _check_names(frame: "pd.DataFrame", asked: Iterable[str], path: str) -> None:
    for name in asked:
        if name not in frame.columns:
            near = difflib.get_close_matches(name, frame.columns, n=1)
            guess = f"did you mean {near[0]}?" if near else "choose others with --columns"
            raise ValueError(f"{path} needs the column {name}, got {_few(list(frame.columns))}; {guess}")


def _check_columns(frame: "pd.DataFrame", asked: Sequence[str], path: str) -> None:
    _check_names(frame, asked, path)
    for name in asked:
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
            f" leave the columns out: --exclude {' '.join(map(shlex.quote, missing))}"
        )
    values = chosen.to_numpy(np.float64)
    if config.levels is not None and all(chosen[name].dtype.kind in "biu" for name in columns):
        values = values.astype(np.int64)
    return values[:, np.newaxis] if config.layout == "n-t" else values


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
