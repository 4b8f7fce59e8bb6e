"""Results of a study as one table: a row for each cell, prior and split, a column for each number."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigma_vae.study.cell import known
from sigma_vae.study.grid import Cell, as_column, in_words

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["collect", "flat", "tabulate"]


def collect(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """Write ``results.parquet`` from what the cells have written, and return it.

    Columns: ``key``, ``status``, ``error``, one for each axis, ``prior``, ``split``, ``observes`` (what the bounds are of,
    ``"density"`` or ``"level"``), ``training_seconds``, ``core_seconds``, then every number of the evaluation under its dotted name; a
    mean under its own name, with its error at ``....standard_error``. An axis whose values are not all numbers has them as words (null:
    ``"null"``). A cell that failed has one row; one that has not ended has none.
    """
    table = tabulate(cells, out)
    table.to_parquet(out / "results.parquet", index=False, compression="zstd", write_statistics=False)
    return table


def tabulate(cells: Sequence[Cell], out: Path) -> "pd.DataFrame":
    """The table of :func:`collect`, and nothing is written."""
    import pandas as pd

    columns: dict[str, dict[str, Any]] = {
        axis: as_column([cell.place[axis] for cell in cells]) for axis in (cells[0].place if cells else ())
    }
    return pd.DataFrame([row for cell in cells for row in _rows(cell, columns, out)])


def flat(report: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a report under dotted names; lists and words are left out.

    >>> dict(flat({"elbo_nats": {"mean": 1.0, "standard_error": 0.5}, "how": {"n": 2, "name": "x"}}))
    {'elbo_nats': 1.0, 'elbo_nats.standard_error': 0.5, 'how.n': 2}
    """
    for name, value in report.items():
        path = f"{before}.{name}" if before else name
        if isinstance(value, dict):
            yield from flat(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path.removesuffix(".mean"), value


def _rows(cell: Cell, columns: dict[str, dict[str, Any]], out: Path) -> Iterator[dict[str, Any]]:
    record = known(cell, out)
    if record is None:
        return
    place = {axis: columns[axis][in_words(value)] for axis, value in cell.place.items()}
    about = {"key": cell.key, "status": record["status"], "error": record.get("error"), **place}
    taken = {"training_seconds": record.get("training_seconds"), "core_seconds": record["seconds"] * record["threads"]}
    if record["status"] != "done":
        yield about | taken
        return
    for prior, reports in record["reports"].items():
        for split, report in reports.items():
            of = {"prior": prior, "split": split, "observes": report["observes"]}
            yield {**about, **of, **taken, **dict(flat(report))}
