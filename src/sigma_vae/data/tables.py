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
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sigma_vae.conditions import split_name
from sigma_vae.config import DataConfig
from sigma_vae.data.archives import check_unpacked, gunzipped
from sigma_vae.data.cache import file_record
from sigma_vae.data.splits import SPLIT_WORDS, SPLITS, Raw, SplitName, counted, few
from sigma_vae.data.stores import Array
from sigma_vae.registry import register

if TYPE_CHECKING:
    import pandas as pd


TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
"""Endings of table files in a folder; alone, .txt and .dat are tables too."""
TABLE_OPTIONS = frozenset({"layout", "columns", "exclude", "decimal", "missing", "window", "stride"})
"""Options that apply to tables."""
_HEAD = 2**16  # bytes from which the dialect of a text file is found
_SIGNS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", r"\s+": "blanks"}
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
_THOUSANDS = {".": ",", ",": "."}
_NUMBER = {
    decimal: rf"[+-]?(?:[1-9]\d{{0,2}}(?:\{sign}\d{{3}})+(?:\{decimal}\d*)?|(?:\d+\{decimal}?\d*|\{decimal}\d+)(?:[eE][+-]?\d+)?)"
    for decimal, sign in _THOUSANDS.items()
}
_UNIT = r"\s*([^\d\s.,:/-][^\d]*)?"
_LIKE_OPTION = re.compile(r"-[^\d.]")
_WITHOUT = "without the unit"
_SUMS = r"((grand|sub)[ -]?)?totals?:?|sum:?|mean:?|average:?"
_CURRENCY = r"^([+-]?)\s*([$€£¥])\s*([+-]?[\d.,]+)$"
_APOSTROPHES = r"(?<=\d)['\u2019\u00a0\u202f](?=\d{3})"  # and thin blanks: signs between thousands
_MOST_WORDS = 5  # that an error names as words for missing values
_NAMELESS = "Unnamed: "  # how pandas names a column without a name: usually row numbers


def holds_tables(path: Path, config: DataConfig) -> bool:
    """Whether a path is a folder with a table for its training split: train.csv, say."""
    return path.is_dir() and "train" in table_files(path)


@register.source(
    "tables", options=TABLE_OPTIONS, endings=(*TABLES, ".txt", ".dat", ".txt.gz", ".dat.gz"), reads=holds_tables, rank=1
)
def read_tables(config: DataConfig) -> Raw:
    """Read rows of numbers ``(N, C)``; with layout ``n-t``, series ``(N, 1, T)`` whose times are the columns.

    In a folder, train.csv is read, and test.csv and validation.csv if they exist (or .tsv, .parquet, .csv.gz). All
    numeric columns (and true/false ones, as 1 and 0) are read, but those in ``exclude``; or those in ``columns``. They
    are real values, standardised by default; with ``levels``, integers 0..levels−1. Separator (blanks too), decimal
    sign, encoding and comment lines are found; thousands (1,502.76) and one unit throughout (12 EUR, 3.1%) are
    understood. ``decimal`` settles what the comma of 1,100 means. Rows with one of the words in ``missing``, or with
    an empty cell beside them, are dropped.

    Raises:
        ValueError: a file is missing or damaged; a column is missing or not numeric; values are missing; or no column
            is left.
    """
    path = config.path
    if not path.exists():
        raise ValueError(f"expected a table at {path}, got no such file; check the path")
    files: dict[SplitName, Path] = table_files(path) if path.is_dir() else {"train": path}
    read = {split: read_table(file, config) for split, file in files.items()}
    for split, (frame, _) in read.items():
        _check_header([str(name) for name in frame.columns], config.layout, str(files[split]))
    words = list(dict.fromkeys(word for _, said in read.values() for word in said))
    known = replace(config, decimal=",") if _COMMAS in words else config
    raw = from_frames({split: frame for split, (frame, _) in read.items()}, known, {s: str(f) for s, f in files.items()})
    record = [file_record(file) for file in files.values()]
    raw = replace(raw, name=str(path), files=record, preprocessing=[*words, *raw.preprocessing])
    return raw if config.window is None else _windowed(raw, config)


def from_frames(frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, names: Mapping[SplitName, str]) -> Raw:
    """Read the rows of data frames, at least one for train, as :func:`read_tables` reads files.

    Raises:
        ValueError: a column is missing or not numeric; values are missing; or no column is left.
    """
    if config.layout not in ("auto", "n-c", "n-t"):
        raise ValueError(f"{config.source}: a table has layout n-c or n-t, got {config.layout}; give one of these, or none")
    frames = {split: frame.set_axis([str(name) for name in frame.columns], axis=1) for split, frame in frames.items()}
    frames = {split: _masked(frame.reset_index(drop=True), config.missing) for split, frame in frames.items()}
    given = [split_name(name)[0] for name in config.condition]
    unread = tuple(name for name in given if name not in config.columns and name in frames["train"].columns)
    config = replace(config, exclude=(*config.exclude, *unread))
    before = frames
    frames, said = _all_converted(frames, config, names)
    columns, left_out = _columns(frames["train"], config, names["train"])
    whole = {split: _whole(frame, columns, config, names[split]) for split, frame in frames.items()}
    dropped = [word for split, frame in frames.items() if (word := _dropped(frame[columns], split))]
    parts = {split: _numbers(frame, config) for split, frame in whole.items()}
    kinds = {split: "integers" if part.dtype.kind == "i" else "fractions" for split, part in parts.items()}
    if len(set(kinds.values())) > 1:
        got = ", ".join(f"{kind} in {Path(names[split]).name}" for split, kind in kinds.items())
        raise ValueError(f"{config.source} needs integers in all tables or in none, got {got}; save them alike")
    words = [
        f"columns {', '.join(columns)}",
        *([f"columns left out: {', '.join(left_out)}"] if left_out else []),
        *said,
        *dropped,
        *(word for split, frame in frames.items() if (word := _summed(frame, left_out, split))),
    ]
    rows = {split: frame.index.to_numpy() for split, frame in whole.items()}  # some may be left out
    labels = {split: _labels_of(before[split], given, whole[split].index.to_numpy(), names[split]) for split in frames}
    return Raw(config.source, parts, preprocessing=words, standardise=True, columns=tuple(columns), names=rows, labels=labels)


def _labels_of(frame: "pd.DataFrame", given: Sequence[str], rows: Array, name: str) -> dict[str, Array]:
    """The columns that a model is given, of the rows that are left."""
    if missing := [column for column in given if column not in frame.columns]:
        raise ValueError(
            f"{name} has no column {missing[0]} to condition on, only {few([str(each) for each in frame.columns])}"
        )
    return {column: _plain_column(frame[column].loc[rows.tolist()]) for column in given}


def _plain_column(column: "pd.Series[Any]") -> Array:
    """Numbers as they are, anything else as objects, None where there is nothing."""
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iufb":
        return column.to_numpy()
    return np.array([None if missing else value for value, missing in zip(column, column.isna(), strict=True)], dtype=object)


def _windowed(raw: Raw, config: DataConfig) -> Raw:
    """Windows ``(n, C, window)`` of series whose times are rows; a single series is cut into three, one after the other."""
    assert config.window is not None
    if config.layout not in ("auto", "n-c"):
        raise ValueError(f"window is for a series whose times are rows, got layout {config.layout}; leave one of them out")
    parts = {split: np.asarray(part) for split, part in raw.parts.items()}
    first = dict.fromkeys(parts, 0)
    if list(parts) == ["train"] and config.test_fraction:
        whole = parts["train"]
        cut = segments(len(whole), config.window, config.validation_fraction, config.test_fraction)
        parts = {split: whole[part] for split, part in zip(SPLITS, cut, strict=True)}
        first = {split: part.start for split, part in zip(SPLITS, cut, strict=True)}
    found = {split: np.ascontiguousarray(windows(part, config.window, config.stride)) for split, part in parts.items()}
    names = {split: first[split] + config.stride * np.arange(len(part)) for split, part in found.items()}
    words = f"windows of {config.window} rows, each {config.stride} after the one before"
    cut_words = ["training, validation and test one after the other"] if len(raw.parts) < len(parts) else []
    return replace(raw, parts=found, names=names, preprocessing=[*raw.preprocessing, words, *cut_words])


def _all_converted(
    frames: Mapping[SplitName, "pd.DataFrame"], config: DataConfig, names: Mapping[SplitName, str]
) -> tuple[dict[SplitName, "pd.DataFrame"], list[str]]:
    """Convert the columns that may be read, in all tables alike."""
    done, said = {}, {}
    for split, frame in frames.items():
        if twice := frame.columns[frame.columns.duplicated()].tolist():
            raise ValueError(f"{names[split]} needs a name of its own for each column, got {twice[0]} twice; rename one")
        wanted = [name for name in config.columns or frame.columns if name in frame.columns and name not in config.exclude]
        done[split], said[split] = _converted(frame, wanted, config, names[split])
    units = {split: [word for word in words if _WITHOUT in word] for split, words in said.items()}
    if any(words != units["train"] for words in units.values()):
        got = "; ".join(f"{split}: {', '.join(words) or 'plain numbers'}" for split, words in units.items())
        raise ValueError(f"{config.source} needs the same units in all tables, got {got}; save them alike")
    return done, list(dict.fromkeys(word for words in said.values() for word in words))


def table_files(folder: Path) -> dict[SplitName, Path]:
    """The table of each split in a folder."""
    found: dict[SplitName, Path] = {}
    for word, split in SPLIT_WORDS.items():
        for path in (folder / f"{word}{ending}" for ending in TABLES):
            if path.is_file() and split in found:
                raise ValueError(f"{folder} needs one table for each split, got {found[split].name} and {path.name}; drop one")
            if path.is_file():
                found[split] = path
    return found


def read_table(path: Path, config: DataConfig) -> tuple["pd.DataFrame", list[str]]:
    """Read a table, and say how where that was not plain."""
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            return _parquet(path), []
        dialect = _dialect(path, config.decimal)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # pandas would cut rows that are longer than the header
            try:
                frame, comments = _parsed(path, dialect, config.missing)
            except UnicodeDecodeError:
                dialect = replace(dialect, encoding="latin-1")
                frame, comments = _parsed(path, dialect, config.missing)
    except (OSError, EOFError, ValueError, ImportError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({type(error).__name__}: {str(error).strip()}); repair or save it anew"
        ) from error
    return frame, [*dialect.words(), *([f"skipped {counted(comments, 'comment line')} after the names"] if comments else [])]


def _parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd
    from pyarrow.parquet import read_metadata

    known = read_metadata(path)
    check_unpacked(str(path), 8 * known.num_rows * known.num_columns, path.stat().st_size)
    return pd.read_parquet(path)


_COMMAS = "decimal commas"


@dataclass(frozen=True)
class _Dialect:
    """Separator, decimal sign and encoding of a text file."""

    separator: str
    skipped: int = 0
    decimal: str = "."
    encoding: str = "utf-8-sig"
    usual: str = ","
    names: tuple[str, ...] = ()
    in_comment: bool = False
    """Whether the names are in the last comment line before the rows."""

    def words(self) -> list[str]:
        """Say what differs from a plain CSV file."""
        said = [
            (self.separator != self.usual, f"separated by {_SIGNS[self.separator]}"),
            (self.decimal != ".", _COMMAS),
            (self.encoding != "utf-8-sig", f"text in {self.encoding}"),
            (self.in_comment, "names from the comment line before the rows"),
            (self.skipped > self.in_comment, f"skipped {counted(self.skipped - self.in_comment, 'line')} before the names"),
        ]
        repeated = sorted({name for name in self.names if name and self.names.count(name) > 1})
        return [word for told, word in said if told] + [
            f"several columns are named {name}, the second is {name}.1" for name in repeated
        ]


def _parsed(path: Path, dialect: _Dialect, missing: Sequence[str]) -> tuple["pd.DataFrame", int]:
    """Read the rows; also count the comment lines among them."""
    import pandas as pd

    source, comments = _without_comments(path, dialect) if _has_comments(path) else (path, 0)
    frame = pd.read_csv(
        source,
        sep=dialect.separator,
        skiprows=dialect.skipped,
        header=None if dialect.in_comment else 0,
        names=list(dialect.names) if dialect.in_comment else None,
        decimal=dialect.decimal,
        encoding=dialect.encoding,
        na_values=list(missing),
        index_col=False,
        skipinitialspace=True,
        low_memory=False,
    )
    return frame.rename(columns=lambda name: re.sub(r"\s*[\r\n]+\s*", " ", name.strip())), comments


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _has_comments(path: Path) -> bool:
    found, before = False, b""
    with path.open("rb") as file:
        for block in gunzipped(path) if path.suffix.lower() == ".gz" else iter(lambda: file.read(2**20), b""):
            found = found or re.search(rb"[\r\n]\0?#", before + block) is not None
            before = block[-2:]
    return found


def _without_comments(path: Path, dialect: _Dialect) -> tuple[StringIO, int]:
    with _opened(path) as file:
        lines = file.read().decode(dialect.encoding).splitlines(keepends=True)
    rows = _rows(lines[dialect.skipped :])
    return StringIO("".join([*lines[: dialect.skipped], *rows])), len(lines) - dialect.skipped - len(rows)


def _rows(lines: list[str]) -> list[str]:
    """Leave comment lines out; where most lines begin with #, it belongs to their values."""
    rows = [line for line in lines if not line.startswith("#")]
    return rows if 2 * len(rows) > len(lines) else lines


def _dialect(path: Path, decimal: str) -> _Dialect:
    """Find separator, decimal sign, encoding and the lines before the names from the start of a file."""
    usual = "\t" if ".tsv" in path.name.lower() else ","
    with _opened(path) as file:
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
    rows = [line for line in _rows(lines[skipped:]) if line.strip()]
    sign = said[1] if said and said[1] in _SIGNS else _separator(rows, usual)
    table = _split(rows, sign)
    commas = _has_commas([field.strip() for row in table[1:] for field in row], decimal) if sign != "," else decimal == ","
    names = tuple(name.strip() for name in table[0]) if table else ()
    comment = _split([lines[skipped - 1].lstrip("#")], sign)[0] if skipped and said is None else []
    in_comment = len(comment) == len(names) and _with_numbers(names) and not _with_numbers(comment)
    if in_comment:
        names = tuple(name.strip() for name in comment)
    return _Dialect(sign, skipped, "," if commas else ".", encoding, usual, names, in_comment)


def _has_commas(fields: list[str], decimal: str) -> bool:
    """Whether numbers have decimal commas: those that cannot be thousands decide."""
    if decimal != "auto":
        return decimal == ","
    commas = any(
        "," in field and re.fullmatch(_NUMBER[","], field) and not re.fullmatch(_NUMBER["."], field) for field in fields
    )
    if commas and any(_DECIMAL_POINT.fullmatch(field) for field in fields):
        raise ValueError(
            "it has numbers with decimal commas and with decimal points; write them alike, or if the points mark thousands: --decimal ,"
        )
    return commas


def _with_numbers(fields: Sequence[str]) -> bool:
    return any(_number(field.replace(",", ".")) is not None for field in fields)


def _split(rows: Sequence[str], sign: str) -> list[list[str]]:
    if sign == r"\s+":
        rows, sign = [row.replace("\t", " ").strip() for row in rows], " "
    return list(csv.reader(rows, delimiter=sign, skipinitialspace=True))


def _separator(rows: Sequence[str], usual: str) -> str:
    """Find the sign that splits the names, and all rows alike; a comma is asked late, as it may be a decimal one."""
    for sign in _SIGNS:
        counts = [len(row) for row in _split(rows, sign)]
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
        f" {few([format(number, 'g') for number in numbers])}; add a row of names,"
        " or if these are the times of series: --layout n-t"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _masked(frame: "pd.DataFrame", missing: Sequence[str]) -> "pd.DataFrame":
    """Empty the cells that hold a word for a missing value."""
    if not missing:
        return frame
    words, numbers = [word.strip() for word in missing], [number for word in missing if (number := _number(word)) is not None]
    for name in frame.columns[~frame.columns.duplicated(keep=False)]:
        column = frame[name]
        found = column.isin(numbers) if column.dtype.kind in "iuf" else column.astype(str).str.strip().isin(words)
        frame = frame.assign(**{name: column.mask(found)}) if found.any() else frame
    return frame


def _converted(frame: "pd.DataFrame", wanted: Sequence[str], config: DataConfig, path: str) -> tuple["pd.DataFrame", list[str]]:
    """Turn columns of text or objects into numbers where that is sure, and say so; leave true text as it is.

    Raises:
        ValueError: some values of a column are numbers, but not all.
    """
    words, bad = [], {}
    for name in wanted:
        column = frame[name]
        if column.dtype.kind in "biufcmM" or str(column.dtype).lower().startswith(("int", "uint", "float", "bool", "category")):
            continue
        numbers, said, others = _as_numbers(column, config.decimal)
        if numbers is not None:
            frame = frame.assign(**{name: numbers})
        words += [f"{name}: {word}" for word in said]
        if len(others):
            bad[name] = others
    if bad:
        raise ValueError(_no_numbers(bad, config.missing, path, len(frame)))
    return frame, words


def _as_numbers(column: "pd.Series", decimal: str) -> tuple["pd.Series | None", list[str], "pd.DataFrame"]:
    """A column as numbers, None for text; remarks; and the values that are no numbers, or unclear, though others are."""
    import pandas as pd

    present = column.dropna()
    none = pd.DataFrame({"value": present[:0], "unclear": False})
    if present.map(lambda value: isinstance(value, bool | np.bool_ | Decimal)).all() and len(present):
        return pd.to_numeric(column.astype(object).map(float, na_action="ignore"), errors="coerce"), [], none
    text = present.astype(str).str.strip()
    bare = text.str.replace("−", "-").str.replace(_APOSTROPHES, "", regex=True).str.replace(_CURRENCY, r"\1\3 \2", regex=True)
    read = {sign: bare.str.extract(f"^({number}){_UNIT}$") for sign, number in _NUMBER.items()}
    sign = decimal if decimal != "auto" else max(read, key=lambda sign: read[sign][0].notna().sum())
    parts, other = read[sign], _THOUSANDS[sign]
    found, units = parts[0].notna(), parts[1].fillna("")
    plain = any((each[0].notna() & each[1].isna()).any() for each in read.values())
    if not plain and (found.mean() <= 0.5 or not len(found)):
        return None, [], none
    unit = units[found].mode()[0] if found.any() else ""
    grouped = parts[0].str.contains(other, na=False, regex=False)
    sure = rf"\{other}\d{{3}}(?:\{other}\d{{3}})*\{sign}|\{other}\d{{3}}\{other}"
    thousands = bool(grouped.any()) and (decimal != "auto" or bool(parts[0].str.contains(sure, na=False).any()))
    unclear = grouped & (not thousands)
    bad = ~found | (units != unit) | unclear
    if bad.any():
        return None, [], pd.DataFrame({"value": text, "unclear": unclear})[bad]
    said = [f"{_WITHOUT} {unit}"] if unit else []
    said += [f"{'commas' if other == ',' else 'points'} taken for thousands"] if thousands else []
    said += [_COMMAS] if sign == "," and decimal == "auto" else []
    numbers = pd.to_numeric(parts[0].str.replace(other, "", regex=False).str.replace(sign, ".", regex=False))
    return numbers.reindex(column.index), said, none


def _no_numbers(bad: Mapping[str, "pd.DataFrame"], missing: Sequence[str], path: str, rows: int) -> str:
    """Name the first value that is no number, and what would help with all of them."""
    name, cells = next(iter(bad.items()))
    value, more = str(cells["value"].iloc[0]), len(cells) - 1
    words = sorted({word for each in bad.values() for word in each["value"]})
    remedies = []
    if cells["unclear"].iloc[0]:
        remedies.append("say what its sign means: --decimal . (1,100 is 1100) or --decimal , (1,100 is 1.1)")
    elif (
        len(words) <= _MOST_WORDS
        and all(map(str.isprintable, words))
        and len({row for each in bad.values() for row in each.index}) <= rows / 2
    ):
        words = sorted([*missing, *words], key=lambda word: not _LIKE_OPTION.match(word))
        first = "--missing" + ("=" if _LIKE_OPTION.match(words[0]) else " ")
        remedies.append(f"drop {'such rows' if more else 'this row'}: {first}{' '.join(map(shlex.quote, words))}")
    which = "the column" if len(bad) == 1 else "such columns"
    remedies.append(f"leave {which} out: --exclude {' '.join(map(shlex.quote, bad))}")
    like = f" (and {more} more like it)" if more else ""
    return (
        f"{path}: column {name} needs numbers throughout, got {value!r} in row {cells.index[0] + 1} of {rows}{like};"
        f" {', or '.join(remedies)}"
    )


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
            f"{path} needs numeric columns, got none among {few(names) or 'no columns'}; name them or make them numbers"
        )
    return numeric, [name for name in names if name not in numeric]


def _check_names(frame: "pd.DataFrame", asked: Iterable[str], path: str) -> None:
    for name in asked:
        if name not in frame.columns:
            near = difflib.get_close_matches(name, frame.columns, n=1)
            guess = f"did you mean {near[0]}?" if near else "choose others with --columns"
            raise ValueError(f"{path} needs the column {name}, got {few(list(frame.columns))}; {guess}")


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


def _whole(frame: "pd.DataFrame", columns: list[str], config: DataConfig, path: str) -> "pd.DataFrame":
    """The rows without missing values; without ``missing``, there must be none with one."""
    _check_columns(frame, columns, path)
    chosen = frame[columns]
    if not len(chosen):
        raise ValueError(f"{path} needs at least one row, got none; check the file")
    kept = chosen.dropna()
    if len(kept) == len(chosen) or (config.missing and len(kept)):
        return kept
    counts = {str(name): int(count) for name, count in chosen.isna().sum().items() if count}
    dense = [name for name, count in counts.items() if 2 * count > len(chosen)]
    drop = [] if dense or not len(kept) else ["drop these rows: --missing NA"]
    exclude = f"leave the columns out: --exclude {' '.join(map(shlex.quote, dense or counts))}"
    raise ValueError(
        f"{path} needs a value in every one of {counted(len(chosen), 'row')}, got missing ones in"
        f" {few([f'{name} ({count})' for name, count in counts.items()])}; {', or '.join(['fill them in', *drop, exclude])}"
    )


def _dropped(chosen: "pd.DataFrame", split: str) -> str:
    """Say how many rows have a missing value, and where."""
    counts = [f"{name} ({count})" for name, count in chosen.isna().sum().items() if count]
    rows = int(chosen.isna().any(axis=1).sum())
    return f"{split}: dropped {rows} of {counted(len(chosen), 'row')} for missing values in {few(counts)}" if rows else ""


def _summed(frame: "pd.DataFrame", texts: list[str], split: str) -> str:
    """Say that the last row may sum up the others."""
    for name in frame.columns.intersection(texts):
        last = frame[name].iloc[-1]
        if re.fullmatch(_SUMS, str(last).strip(), re.IGNORECASE) and (frame[name] == last).sum() == 1:
            return f"{split}: the last row is {last!r} in column {name}: remove it from the file if it sums up the others"
    return ""


def _numbers(chosen: "pd.DataFrame", config: DataConfig) -> Array:
    import pandas as pd

    if config.levels is not None and config.missing:  # a column with empty cells is read as floats
        chosen = chosen.apply(pd.to_numeric, downcast="integer")
    values = chosen.to_numpy(np.float64)
    if config.levels is not None and all(dtype.kind in "biu" for dtype in chosen.dtypes):
        values = values.astype(np.int64)
    return values[:, np.newaxis] if config.layout == "n-t" else values


# -- windows of a long series, and scores put back on the time axis ----------------------------------------------------


def windows(series: npt.NDArray[np.floating], window: int, stride: int = 1) -> npt.NDArray[np.floating]:
    """Windows ``(n, C, window)`` of a series ``(T, C)``, each a stride after the one before.

    Raises:
        ValueError: the series is shorter than a window.

    >>> windows(np.arange(5.0)[:, None], window=3, stride=2)[:, 0]
    array([[0., 1., 2.],
           [2., 3., 4.]])
    """
    if window < 1 or stride < 1:
        raise ValueError(f"window and stride are at least 1, got {window} and {stride}")
    if len(series) < window:
        raise ValueError(f"a window of {window} needs a series as long, got {len(series)} times; take a shorter window")
    return np.lib.stride_tricks.sliding_window_view(series, window, axis=0)[::stride]


def on_time_axis(
    scores: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], window: int, length: int
) -> npt.NDArray[np.float64]:
    """Mean score of the windows that hold each time, ``(length,)``; NaN where none does.

    Args:
        scores: of windows ``(n,)``.
        starts: the first time of each.
        window: their length.
        length: of the series.

    >>> on_time_axis(np.array([1.0, 3.0]), np.array([0, 2]), window=3, length=5)
    array([1., 1., 2., 3., 3.])
    """
    total, count = np.zeros(length + 1), np.zeros(length + 1)
    for sums, values in ((total, scores), (count, np.ones(len(scores)))):
        np.add.at(sums, starts, values)
        np.add.at(sums, np.minimum(starts + window, length), -values)
    held = np.round(count.cumsum()[:-1])
    found: npt.NDArray[np.float64] = np.full(length, np.nan)
    np.divide(total.cumsum()[:-1], held, out=found, where=held > 0)
    return found


def segments(length: int, window: int, validation_fraction: float, test_fraction: float) -> tuple[slice, slice, slice]:
    """Times for training, validation and test, one after the other, so that no window is in two of them.

    Raises:
        ValueError: one is shorter than a window.

    >>> segments(100, 5, 0.1, 0.2)
    (slice(0, 72, None), slice(72, 80, None), slice(80, 100, None))
    """
    test = length - round(test_fraction * length)
    validation = test - round(validation_fraction * test)
    parts = slice(0, validation), slice(validation, test), slice(test, length)
    if short := [part for part in parts if part.stop - part.start < window]:
        raise ValueError(
            f"a series of {length} times is cut into training, validation and test, and one of {short[0].stop - short[0].start} times has"
            f" no window of {window}; take a shorter window, or larger fractions"
        )
    return parts
