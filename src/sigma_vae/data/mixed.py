"""Tables whose columns are of all types, in splits: rows are written as floats by a schema."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, final, get_args

import numpy as np
import torch

from sigma_vae.columns import Family
from sigma_vae.config import DataConfig
from sigma_vae.data.batches import Scaling
from sigma_vae.data.cache import cached_rows, file_record, file_stamp
from sigma_vae.data.levels import Array
from sigma_vae.data.schema import TableSchema
from sigma_vae.data.splits import SPLITS, SplitName, Splits, few, fingerprint, hold_out
from sigma_vae.data.stores import InMemory, Mapped, Store
from sigma_vae.data.tables import TABLES, read_table, table_files

if TYPE_CHECKING:
    import pandas as pd

LARGE = 2**23
"""Values of a Parquet file from which it is read a part at a time."""
PART, BUFFER = 2**22, 2**20
"""Values of such a part, and bytes read ahead in each of its columns."""
TEXTS = (".txt", ".dat", ".txt.gz", ".dat.gz")
EXCEL = (".xlsx",)


class Table(Protocol):
    """Columns by name: a data frame, or a file that is read when it is asked for them."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def __getitem__(self, name: str) -> Any: ...


AnyTable = TypeVar("AnyTable", bound=Table)


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
    if all(path.suffix == ".parquet" and _is_large(path) for path in files.values()):
        tables = {split: ParquetTable(path) for split, path in files.items()}
        words = []
        found = _splits(tables, config, str(config.path), schema, lambda table, schema: table.stored(schema, config))
    else:
        read = {split: _read(path, config) for split, path in files.items()}
        words = list(dict.fromkeys(word for _, said in read.values() for word in said))
        found = splits_of_frames({split: frame for split, (frame, _) in read.items()}, config, str(config.path), schema)
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
    named = {split: frame.set_axis([str(name) for name in frame.columns], axis=1) for split, frame in frames.items()}

    def store(frame: "pd.DataFrame", schema: TableSchema) -> Store:
        return InMemory(schema.encode(frame, unknown=config.unknown))

    return _splits(named, config, name, schema, store)


def _splits(
    tables: Mapping[SplitName, AnyTable],
    config: DataConfig,
    name: str,
    schema: TableSchema | None,
    stored: Callable[[AnyTable, TableSchema], Store],
) -> Splits:
    """Splits of data frames, or of tables that read a column or some rows when they are asked for them."""
    import pandas as pd

    for table in tables.values():
        if missing := [each for each in config.columns if each not in table.columns]:
            raise ValueError(
                f"{name} needs the column {missing[0]}, got {few(list(table.columns))}; choose others with --columns"
            )
    rows: dict[SplitName, Store] = {split: InMemory(torch.arange(len(table))) for split, table in tables.items()}
    chosen, held_out = hold_out(rows, config, name, ("rows", "file"))

    def column(of: str) -> "pd.Series":
        every = [table[of] for table in tables.values() if of in table.columns]
        return cast("pd.Series", pd.concat(every, ignore_index=True) if len(every) > 1 else every[0])

    if schema is None:
        names = list(config.columns or tables["train"].columns)
        training = chosen.get("train", np.arange(len(tables["train"])))  # the first table's rows come first
        schema = TableSchema.of_columns(names, column, training, families=_families(config), exclude=config.exclude)
    parts = {split: stored(table, schema) for split, table in tables.items()}
    parts |= {split: parts["train"].select(torch.from_numpy(each)) for split, each in chosen.items()}
    parts = {split: parts[split] for split in SPLITS}
    numbers = {split: np.arange(len(table)) for split, table in tables.items()}
    numbers |= {split: numbers["train"][each] for split, each in chosen.items()}
    record = {
        "source": config.source,
        "files": [],
        "counts": {split: len(part) for split, part in parts.items()},
        "preprocessing": "; ".join([schema.words(), "kept as rows of a schema", *held_out]),
        "fingerprint": fingerprint(parts),
        "columns": [column.name for column in schema.columns],
    }
    return Splits(name, parts["train"], parts["validation"], parts["test"], Scaling(schema=schema), record, names=numbers)


@final
class ParquetTable:
    """A Parquet file of which one column, or a part of the rows, is in memory at a time."""

    def __init__(self, path: Path) -> None:
        from pyarrow.parquet import ParquetFile

        self.path = path
        self.file = ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        known = self.file.schema_arrow
        index = (known.pandas_metadata or {}).get("index_columns", [])
        self.columns: list[str] = [name for name in known.names if name not in index]

    def __len__(self) -> int:
        return int(self.file.metadata.num_rows)

    def __getitem__(self, name: str) -> "pd.Series":
        """All values of a column."""
        column: pd.Series = self.file.read(columns=[name]).to_pandas()[name].reset_index(drop=True)
        times = _times(column)
        return column if times is None else times

    def parts(self, columns: Sequence[str]) -> Iterator["pd.DataFrame"]:
        """These columns of the rows, so many rows at a time that a part has the same size for any number of columns."""
        rows = max(1, PART // max(1, len(columns)))
        for batch in self.file.iter_batches(batch_size=rows, columns=list(columns)):
            yield batch.to_pandas().reset_index(drop=True)

    def stored(self, schema: TableSchema, config: DataConfig) -> Mapped:
        """The rows as the schema writes them, in the cache beside the file; they are read a part at a time."""
        names = [column.name for column in schema.columns]
        identity = {"table": file_stamp(self.path), "schema": asdict(schema), "unknown": config.unknown}
        shape = (len(self), schema.row.width)
        folder = None if config.cache is None else Path(config.cache).expanduser()

        def encoded() -> Iterator[Array]:
            for frame in self.parts(names):
                yield schema.encode(frame, unknown=config.unknown).numpy()

        return cached_rows(encoded, shape, identity, self.path.parent, folder)


def _is_large(path: Path) -> bool:
    from pyarrow.parquet import read_metadata

    known = read_metadata(path)
    return bool(known.num_rows * known.num_columns >= LARGE)


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
