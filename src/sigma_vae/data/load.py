"""Data sets by name and files by path: find the registered reader, check its values, hold out the missing splits.

A new kind of data is one function in one file. It is found when its module is in this package, or when an installed
package names it in the entry-point group ``sigma_vae.sources``::

    @register.source("zarr", options={"layout"}, endings=(".zarr.zip",))
    def read_zarr(config: DataConfig) -> Raw: ...
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast, final, get_args

import numpy as np
import torch

from sigma_vae.columns import Family
from sigma_vae.conditions import Conditions, split_name
from sigma_vae.config import DataConfig
from sigma_vae.data.batches import Scaling, standardisation
from sigma_vae.data.cache import cached, cached_rows, file_record, file_stamp
from sigma_vae.data.counts import count_store
from sigma_vae.data.schema import TableSchema
from sigma_vae.data.splits import SPLITS, Names, Raw, SplitName, Splits, few, fingerprint, hold_out
from sigma_vae.data.stores import (
    Array,
    Encoded,
    Generated,
    Grid,
    InMemory,
    Labelled,
    Mapped,
    Part,
    Sparse,
    Store,
    discrete_columns,
    encode,
    find_grid,
    given_grid,
    native_levels,
    real_values,
)
from sigma_vae.data.tables import TABLES, read_table, table_files
from sigma_vae.registry import register

if TYPE_CHECKING:
    import pandas as pd

COMMON = frozenset(
    {
        *("source", "levels", "levels_from", "standardise", "counts", "validation_fraction", "test_fraction", "split_seed"),
        *("condition", "stratify"),
    }
)
"""Options of :class:`~sigma_vae.config.DataConfig` that apply to all data."""
CHUNK = 2**22
"""Values of a mapped file checked at a time."""


@final
@dataclass(frozen=True)
class Source:
    """A registered kind of data: a data set with a name, or files of one kind.

    ``register.source`` takes the last four as keywords, above the reader ``(DataConfig) -> Raw``. A kind without
    ``endings`` and ``reads`` is a data set, and ``source`` gives its name.

    Args:
        name: the name that it is registered under.
        pattern: the name as help texts write it, with what may follow a colon.
        read: the reader. Raises ValueError if the data are missing or damaged.
        options: the options that it reads, beyond those that all data have.
        endings: endings of the files that it reads, in lower case.
        reads: whether it reads a path that no ending tells: a folder, or a pattern for several files.
        rank: kinds of a lower rank are asked first.
    """

    name: str
    pattern: str
    read: Callable[[DataConfig], Raw]
    options: Set[str] = frozenset()
    endings: tuple[str, ...] = ()
    reads: Callable[[Path, DataConfig], bool] | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        """Refuse options that do not exist."""
        if unknown := self.options - _flat(asdict(DataConfig("any"))).keys():
            raise ValueError(f"the data source {self.name!r} reads options of DataConfig, got {', '.join(sorted(unknown))}")

    @property
    def is_named(self) -> bool:
        """Whether it is a data set with a name, not a kind of file."""
        return not self.endings and self.reads is None

    def has(self, path: Path, config: DataConfig) -> bool:
        """Whether this kind of file reads the path."""
        by_name = bool(self.endings) and path.name.lower().endswith(self.endings) and not path.is_dir()
        return by_name or (self.reads is not None and self.reads(path, config))


def load(config: DataConfig) -> Splits:
    """Read a data set, and hold out the splits that it does not have.

    The held-out examples depend only on ``split_seed``, the fractions and the number of examples.

    Raises:
        ValueError: the source is unknown, missing or damaged, or its values contradict the config.
        OSError: decoded copies cannot be written.
    """
    if config.mixed:
        return mixed_splits(config)
    return splits_from(_required(config).read(config), config)


def _required(config: DataConfig) -> Source:
    source = source_of(config)
    if source is None:
        near = difflib.get_close_matches(config.source.lower(), names(), n=1)
        guess = f"did you mean {near[0]}?" if near else "give one of these."
        raise ValueError(f"expected {known()}, got {config.source!r}; {guess}")
    refuse_unread(config, source.options if source.is_named else source.options | {"root"})
    return source


class Whole(NamedTuple):
    """The examples of a source in their order, and their names; ``split`` is None where the source has no splits."""

    store: Store
    names: Names
    clips: bool
    split: SplitName | None


def load_whole(config: DataConfig, split: SplitName, conditions: Conditions | None = None) -> Whole:
    """Read one split of a data set where it has splits, else all of it; nothing is held out.

    ``conditions`` are those of a model; the examples' own are read as these.

    Raises:
        ValueError: as for :func:`load`.
        OSError: as for :func:`load`.
    """
    if config.window is not None:  # all windows, in their order
        config = replace(config, validation_fraction=0.0, test_fraction=0.0)
    raw = _required(config).read(config)
    chosen: SplitName = split if split in raw.parts else "train"
    store, names = store_of(raw.parts[chosen], raw, chosen, config, [], conditions)
    return Whole(store, names, raw.clips, chosen if len(raw.parts) > 1 else None)


def source_of(config: DataConfig) -> Source | None:
    """Find the reader of a config's source; None if it is neither a name nor a path of a known kind.

    Raises:
        ValueError: the path is a link to nothing, or no regular file or folder.
    """
    kinds = _sources()
    head, colon, _ = config.source.partition(":")
    for source in kinds:
        if source.is_named and source.name == head and bool(colon) == (":" in source.pattern):
            return source
    path = config.path
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; mend the link, or give another path")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} needs to be a file or a folder, got a pipe, socket or device; save its content in a file")
    return next((source for source in kinds if not source.is_named and source.has(path, config)), None)


def names() -> tuple[str, ...]:
    """Names of the data sets: ours in alphabetical order, then those of installed packages.

    >>> "digits" in names()
    True
    """
    return tuple(source.name for source in _sources() if source.is_named and ":" not in source.pattern)


def endings() -> tuple[str, ...]:
    """Endings of the files that can be read."""
    return tuple(ending for source in _sources() for ending in source.endings)


def known() -> str:
    """Everything that a source can be, for messages and help texts."""
    patterns = [source.pattern for source in _sources() if source.is_named and ":" in source.pattern]
    return f"a data set ({', '.join(names())}), {', '.join(patterns)}, or the path of a folder or of a file ({', '.join(endings())})"


def _sources() -> list[Source]:
    """All registered kinds, in the order in which they are asked."""
    found = []
    for entry in register.source:
        try:
            found.append(Source(entry.name, entry.pattern, entry.object, **entry.facts))
        except TypeError as error:
            raise ValueError(f"the data source {entry.name!r} of {entry.package} has a wrong declaration: {error}") from error
    return sorted(found, key=lambda source: source.rank)


def refuse_unread(config: DataConfig, options: Set[str]) -> None:
    """Refuse an option that would have no effect: the reader reads only ``options`` and those that all data have.

    Raises:
        ValueError: another option differs from its default.
    """
    given, usual = _flat(asdict(config)), _flat(asdict(DataConfig(config.source)))
    for name, value in given.items():
        if name not in COMMON | options and value != usual[name]:
            raise ValueError(f"{name} says nothing about {config.source}, got {value!r}; leave it out")


def splits_from(raw: Raw, config: DataConfig) -> Splits:
    """Check a reader's output, hold out the missing splits, and record what was done.

    Raises:
        ValueError: values contradict the config, or there are too few examples.
        OSError: decoded copies cannot be written.
    """
    standardise = _standardise(config, raw)
    words = list(raw.preprocessing)
    decoded = {split: _decoded(part, raw, split, config, words) for split, part in raw.parts.items()}
    read = {split: part for split, (part, _) in decoded.items()}
    names = {split: each for split, (_, each) in decoded.items()}
    labels = {split: _labels(raw, split, config.condition, names[split]) for split in raw.parts}
    grid = None if standardise or config.counts else _grid(raw, read, config, words)
    stored = {split: _store(part, grid, standardise, config, f"{raw.name} ({split})") for split, part in read.items()}
    nouns = ("clips", "video") if raw.clips else ("examples", "file")
    if config.condition:
        conditions = Conditions.of(labels["train"])
        stored = {split: Labelled(store, conditions, conditions.encode(labels[split])) for split, store in stored.items()}
    rows, held_out = hold_out(stored, config, raw.name, nouns)
    parts = stored | {split: stored["train"].select(torch.from_numpy(chosen)) for split, chosen in rows.items()}
    parts = {split: parts[split] for split in SPLITS}
    names |= {split: names["train"][chosen] for split, chosen in rows.items()}
    scaling = Scaling(grid and grid.levels, counts=config.counts)
    if standardise:
        scaling = standardisation(parts["train"], raw.name, raw.columns)
    words += [*(_discrete(read["train"], raw.columns) if not scaling.discrete else []), _stored_as(scaling), *held_out]
    record = {
        "source": config.source,
        "files": raw.files,
        "counts": {name: len(part) for name, part in parts.items()},
        "preprocessing": "; ".join(words),
        "fingerprint": fingerprint(parts),
        **({"columns": list(raw.columns)} if raw.columns else {}),
    }
    return Splits(raw.name, parts["train"], parts["validation"], parts["test"], scaling, record, raw.clips, names)


def store_of(
    part: Part, raw: Raw, split: SplitName, config: DataConfig, words: list[str], conditions: Conditions | None = None
) -> tuple[Store, Names]:
    """Check one split's values and bring them into stored form, with their names; ``words`` gets what had to be left out.

    The examples get these conditions, where there are any.

    Raises:
        ValueError: values contradict the config.
        OSError: decoded copies cannot be written.
    """
    read, names = _decoded(part, raw, split, config, words)
    standardise = _standardise(config, raw)
    grid = None if standardise or config.counts else _grid(raw, {split: read}, config, words)
    store = _store(read, grid, standardise, config, f"{raw.name} ({split})")
    if conditions is None:
        return store, names
    return Labelled(store, conditions, conditions.encode(_labels(raw, split, conditions.names, names))), names


def _labels(raw: Raw, split: SplitName, wanted: Sequence[str], names: Names) -> dict[str, Array]:
    """The columns of a split's labels that are wanted, of the examples that are left."""
    known = raw.labels.get(split, {})
    plain = {name: split_name(name)[0] for name in wanted}
    if missing := [name for name in plain.values() if name not in known]:
        have = f"only {few(list(known))}" if known else "no labels at all"
        raise ValueError(f"{raw.name} ({split}) has no {missing[0]} to condition on, {have}; give one of these, or none")
    found = {name: np.asarray(known[column]) for name, column in plain.items()}
    part = raw.parts[split]
    if not isinstance(part, Encoded) or len(part) == len(names):
        return found
    left = set(names.tolist())
    kept = [number for number, name in enumerate(part.names) if name in left]
    return {name: column[kept] for name, column in found.items()}


Read = Array | Mapped | Generated | Sparse


def _discrete(train: Read, columns: Sequence[str]) -> list[str]:
    """Say which columns of rows of real values are discrete."""
    if isinstance(train, Generated | Sparse) or len(train.shape) != (1 if isinstance(train, Mapped) else 2):
        return []
    found = discrete_columns(train.array if isinstance(train, Mapped) else train)
    names = [columns[i] if columns else str(i) for i in found]
    remedy = "--exclude leaves them out" if columns else "counted from 0; leave them out"
    why = "a density of discrete values has no upper bound, so do not compare its nats"
    return [f"discrete columns: {few(names)} ({why}; {remedy})"] if found else []


def _decoded(part: Part, raw: Raw, split: SplitName, config: DataConfig, words: list[str]) -> tuple[Read, Names]:
    """Decode examples that are still encoded, into the cache; also name them."""
    if not isinstance(part, Encoded):
        return part, raw.names.get(split, np.arange(len(part)))
    mapped, skipped = cached(part, None if config.cache is None else Path(config.cache).expanduser())
    if skipped:
        total = len(mapped) + len(skipped)
        words.append(f"{split}: left out {len(skipped)} of {total} as unreadable ({', '.join(skipped[:5])})")
    left_out = set(skipped)
    return mapped, np.array([name for name in part.names if name not in left_out], dtype=object)


def _grid(raw: Raw, read: Mapping[SplitName, Read], config: DataConfig, words: list[str]) -> Grid | None:
    """The levels of the data, None for real values: those that are known or given, else those that the values use."""
    if raw.levels is not None and config.levels not in (None, raw.levels):
        raise ValueError(f"{raw.name} has {raw.levels} levels, got levels={config.levels}; leave levels out")
    if raw.levels is not None:
        return Grid(raw.levels)
    stored = {split: part.array if isinstance(part, Mapped) else part for split, part in read.items()}
    if any(isinstance(part, Sparse) for part in stored.values()):
        raise ValueError(
            f"{raw.name} is sparse, and is read as counts (--counts) or as real values to standardise; give one of these"
        )
    arrays = {split: array for split, array in stored.items() if not isinstance(array, Generated | Sparse)}
    if len(dtypes := {array.dtype.name for array in arrays.values()}) > 1:
        raise ValueError(f"{raw.name} needs one dtype for all splits, got {', '.join(sorted(dtypes))}; save them alike")
    if config.levels is not None:
        return given_grid(arrays, config.levels, raw.name)
    if config.levels_from == "dtype":
        native = native_levels(next(iter(arrays.values())), raw.name)
        return None if native is None else Grid(native)
    grid, remark = find_grid(arrays, raw.name)
    words += [remark] if remark else []
    return grid


def _store(part: Read, grid: Grid | None, standardise: bool, config: DataConfig, name: str) -> Store:
    if config.counts:
        return count_store(part, name)
    if isinstance(part, Generated):
        return part
    if isinstance(part, Sparse):
        real_values(part.matrix.data, name)
        return part
    if isinstance(part, Mapped):
        return _checked(part, grid, standardise, name)
    if standardise:
        return InMemory(real_values(part, name))
    if grid is None:
        return InMemory(encode(part, None, name))
    return InMemory(encode(part if part.dtype.kind == "f" else grid.of(part), grid.levels, name))


def _checked(mapped: Mapped, grid: Grid | None, standardise: bool, name: str) -> Mapped:
    """Check a file's values, which stay as they are."""
    if standardise or mapped.array.dtype.kind == "f":
        rows = max(1, CHUNK // math.prod(mapped.shape))
        for start in range(0, len(mapped.array), rows):
            some = mapped.array[start : start + rows]
            if standardise:
                real_values(some, name)
            else:
                encode(some, grid and grid.levels, name)
    elif grid is not None:
        least, greatest = (int(grid.of(end)) for end in (mapped.array.min(), mapped.array.max()))
        if least < 0 or greatest >= grid.levels:
            raise ValueError(
                f"{name} needs levels 0..{grid.levels - 1} for levels={grid.levels}, but its values go"
                f"{f' down to {least}' if least < 0 else f' up to {greatest}'}; give the right --levels"
            )
    as_they_are = grid is None or (mapped.array.dtype.kind != "f" and grid == Grid(grid.levels))
    return mapped if as_they_are else replace(mapped, grid=grid)


def _standardise(config: DataConfig, raw: Raw) -> bool:
    known = config.levels if config.levels is not None else raw.levels
    if config.counts and (raw.clips or config.levels is not None or config.standardise == "yes"):
        what = "clips" if raw.clips else "levels" if config.levels is not None else "standardise"
        raise ValueError(
            f"{raw.name}: counts are modelled as they are, which does not go with {what}; leave out --{what} or --counts"
        )
    if config.counts:
        return False
    if config.standardise == "yes" and known is not None:
        raise ValueError(f"{raw.name} has {known} levels, which are not standardised; leave out one of levels and standardise")
    wanted = config.standardise == "yes" or (config.standardise == "auto" and raw.standardise and known is None)
    if wanted and raw.clips:
        raise ValueError(f"{raw.name} holds clips, which cannot be standardised; bring their values into [0, 1]")
    return wanted


def _stored_as(scaling: Scaling) -> str:
    if scaling.counts:
        return "kept as counts"
    if scaling.levels is not None:
        return f"kept as levels 0..{scaling.levels - 1}"
    return "standardised by mean and std of the training split" if scaling.standardised else "kept as float32 values"


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    nested = {key: value for key, value in options.items() if isinstance(value, dict)}
    plain = {key: value for key, value in options.items() if key not in nested}
    return plain | {key: value for inner in nested.values() for key, value in inner.items()}


# -- tables with columns of all types ----------------------------------------------------------------------------------

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
