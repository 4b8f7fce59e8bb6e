"""The results of each place of a grid beside the paper's figures, for the report and the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sigma_vae.runs.sections import Section, Table
from sigma_vae.study.comparisons import ELBO, STANDARD
from sigma_vae.study.grid import StudySpec, cells, format_place, in_words
from sigma_vae.study.statistics import shown, summary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PLOTS", "failures", "how_far", "minus", "results"]

PLOTS = "report-files"
"""Folder of the plots of a report in Markdown."""


def minus(number: str) -> str:
    """Write a true minus sign, which is as wide as a plus.

    >>> minus("-1.5 ± 0.1")
    '−1.5 ± 0.1'
    """
    return number.replace("-", "−")


PAPER = ("paper: ELBO, nats (it prints −ELBO)", "paper: FID")
LONGEST = 300
"""Characters of an error that a table shows; ``results.parquet`` has all of them."""


def how_far(spec: StudySpec, rows: "pd.DataFrame") -> str:
    """Count the cells that are done, failed, or have not ended.

    Args:
        spec: the grid.
        rows: of :func:`~sigma_vae.study.results.tabulate`.
    """
    states = rows.drop_duplicates("key")["status"].tolist()
    done, failed, total = states.count("done"), states.count("failed"), len(cells(spec))
    return f"{done} of {total} cells are done, {failed} failed, {total - len(states)} have not ended."


def failures(spec: StudySpec, rows: "pd.DataFrame") -> tuple[Table, ...]:
    """List the cells that failed, with the error of each; nothing where none did."""
    place = {cell.key: format_place(cell.place) for cell in cells(spec)}
    failed = rows[rows["status"] == "failed"].to_dict("records")
    short = [f"{error[:LONGEST]} …" if len(error) > LONGEST else error for error in (row["error"] for row in failed)]
    lines = tuple((place[row["key"]], error, f"{row['failures']:.0f}") for row, error in zip(failed, short, strict=True))
    return (Table("Cells that failed", ("cell", "error", "times"), lines),) if lines else ()


def results(spec: StudySpec, rows: "pd.DataFrame") -> Section:
    """Show mean ± std over seeds for each place and prior, beside the paper's figures.

    Args:
        spec: the grid.
        rows: of :func:`~sigma_vae.study.results.tabulate`.
    """
    by = [name for name in spec.axes if name != "seed"]
    found = summary(rows, by)
    titles = shown(found.columns)
    metrics = list(titles)
    published = spec.published.get("rows", {})
    heads = (*(name.rpartition(".")[2] for name in by), "prior", "seeds", *(titles[name].title for name in metrics))
    lines = []
    for line in found.to_dict("records"):
        failed = f", {line['failed']} failed" if line["failed"] else ""
        ours = (*(in_words(line[name]) for name in by), line["prior"], f"{line['seeds']}{failed}")
        lines.append((*ours, *(minus(line[name]) for name in metrics), *(_published(spec, line) if published else ())))
    words = "Test split, mean ± std over seeds. Fewer bits, a higher ELBO and smaller distances are better."
    if f"{ELBO}.level" in metrics:
        words += " The ELBO of densities and the ELBO of levels measure different things and do not compare."
    table = Table("Results", heads + (PAPER if published else ()), tuple(lines))
    return Section("Results of the runs", (words,), tables=(table, *_others(spec)), further=_about_published(spec))


def _about_published(spec: StudySpec) -> tuple[str, ...]:
    words = tuple(
        f"{name.capitalize()}: {str(spec.published[name]).rstrip('.')}."
        for name in ("source", "note", "claim")
        if name in spec.published
    )
    if "columns" in spec.published:
        words += (f"Where one row has several of the paper's figures, they are for {' / '.join(spec.published['columns'])}.",)
    if spec.published.get("rows"):
        words += ("The paper's figures are for its own data and networks: compare the order of the rows, not the numbers.",)
    return words


def _published(spec: StudySpec, line: Mapping[Any, Any]) -> tuple[str, str]:
    """The paper's figures for the row's likelihood; only beside N(0, I), which is the paper's prior."""
    known_rows = {str(name): row for name, row in spec.published["rows"].items()}
    row = next((known_rows[str(value)] for value in line.values() if str(value) in known_rows), None)
    if row is None or line["prior"] != STANDARD:
        return "", ""
    columns = spec.published.get("columns", [])
    return _figures(row, next((columns.index(value) for value in line.values() if value in columns), None))


def _figures(row: Mapping[str, Any], at: int | None) -> tuple[str, str]:
    """ELBO and FID from one of the paper's columns, or from all."""

    def words(value: Any, sign: int) -> str:
        if isinstance(value, list):
            return words(value[at], sign) if at is not None else " / ".join(words(each, sign) for each in value)
        return "–" if value is None else minus(f"{sign * value:g}")

    return words(row.get("negative_elbo_nats"), -1), words(row.get("fid"), 1)


def _others(spec: StudySpec) -> tuple[Table, ...]:
    """Rows of the paper that match no row of ours."""
    ours = {in_words(value) for values in spec.axes.values() for value in values} if STANDARD in spec.priors else set()
    others = {str(name): row for name, row in spec.published.get("rows", {}).items() if str(name) not in ours}
    noted = any("note" in row for row in others.values())
    notes = {name: (str(row.get("note", "")),) if noted else () for name, row in others.items()}
    rows = tuple((name, *_figures(row, None), *notes[name]) for name, row in others.items())
    heads = ("decoder", *PAPER, "note") if noted else ("decoder", *PAPER)
    return (Table("Rows of the paper without a match in this study", heads, rows),) if rows else ()
