"""Results of a study as one table: a row for each cell, prior and split, a column for each number."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigma_vae.config import replacing
from sigma_vae.study.cell import CELLS, known
from sigma_vae.study.grid import Cell, as_column, in_words

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PICTURE", "RESULTS", "collect", "is_kept", "leaves", "tabulate", "write_table"]

RESULTS = "results.parquet"
PICTURE = "picture."
"""Start of the names of columns with pictures, in the table of a kept study."""


def collect(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """Gather what the cells have written in ``results.parquet``, and return it as a table.

    Columns: ``key``, ``status``, ``error``, ``failures``, one for each axis, ``prior``, ``split``, ``observes``
    (whether the bounds are of a ``"density"`` or of a ``"level"``), ``training_seconds``, ``core_seconds``, ``curve``
    (steps and validation ELBO), then each value of the evaluation under its dotted name. A mean has its own name, and
    its error is at ``....standard_error``. An axis whose values are not all numbers has them as words (null:
    ``"null"``). A cell that failed has one row; one that has not ended has none.

    The table of a kept study is read, not written.
    """
    table = tabulate(cells, out)
    if not is_kept(out):
        write_table(table, out)
    return table


def tabulate(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """Return the table of :func:`collect` and write nothing."""
    import pandas as pd

    if is_kept(out):
        kept = pd.read_parquet(out / RESULTS)
        return kept[kept["key"].isin([cell.key for cell in cells])].reset_index(drop=True)
    columns: dict[str, dict[str, Any]] = {
        axis: as_column([cell.place[axis] for cell in cells]) for axis in (cells[0].place if cells else ())
    }
    rows = [row for cell in cells for row in _rows(cell, columns, out)]
    return pd.DataFrame(rows) if rows else pd.DataFrame({"key": [], "status": [], "error": []})


def is_kept(out: Path) -> bool:
    """Whether the folder holds a kept study: the table in one file, and no cells."""
    return (out / RESULTS).is_file() and not (out / CELLS).is_dir()


def write_table(table: "pd.DataFrame", out: Path) -> None:
    """Write ``results.parquet``; equal tables give equal bytes."""
    with replacing(out / RESULTS) as aside:
        table.to_parquet(aside, index=False, compression="zstd", write_statistics=False)


def leaves(report: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten the report of an evaluation: its values under dotted names.

    Words at the top repeat the cell's configuration and are left out.

    >>> dict(leaves({"data": "digits", "elbo_nats": {"mean": 1.0, "standard_error": 0.5}, "how": {"name": "x"}}))
    {'elbo_nats': 1.0, 'elbo_nats.standard_error': 0.5, 'how.name': 'x'}
    """
    for name, value in report.items():
        path = f"{before}.{name}" if before else name
        if isinstance(value, dict):
            yield from leaves(value, path)
        elif value is not None and (before or not isinstance(value, str)):
            yield path.removesuffix(".mean"), value


def _rows(cell: Cell, columns: dict[str, dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    record = known(cell, out)
    if record is None:
        return
    place = {axis: columns[axis][in_words(value)] for axis, value in cell.place.items()}
    about = {name: record.get(name) for name in ("status", "error", "failures")}
    seconds = {"training_seconds": record.get("training_seconds"), "core_seconds": record["seconds"] * record["threads"]}
    if record["status"] != "done":
        yield {"key": cell.key, **about, **place, **seconds}
        return
    for prior, reports in record["reports"].items():
        for split, report in reports.items():
            which = {"prior": prior, "split": split, "observes": report["observes"]}
            yield {"key": cell.key, **about, **place, **which, **seconds, "curve": record.get("curve"), **dict(leaves(report))}
