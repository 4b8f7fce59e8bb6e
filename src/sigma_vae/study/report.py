"""A study's report: verdicts, tables, plots and samples on one page, as HTML that needs nothing else, and as Markdown."""

import base64
import shutil
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from sigma_vae import __version__
from sigma_vae.study import sections
from sigma_vae.study.comparisons import settings
from sigma_vae.study.grid import StudySpec, cells
from sigma_vae.study.pieces import Section
from sigma_vae.study.results import tabulate

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["report"]

FILES = "report-files"
SIGNS = {"holds": "✓", "does not": "✗", "not shown": "?"}
"""Words and signs, not colours alone."""


def report(spec: StudySpec, out: Path) -> None:
    """Write ``report.html``, one page that needs no network and no other file, and ``report.md`` with its pictures under ``report-files``.

    They are made from the cells' ``cell.json`` and the pictures of their runs, the same bytes of the same data but for one line with the
    date. What has not been measured has no section.

    Args:
        spec: the grid.
        out: the study's folder.

    Raises:
        ValueError: no cell is finished.
    """
    found = settings(spec, out)
    parts = [
        sections.judged(found),
        sections.ended(spec, out, found),
        sections.table(spec, tabulate(cells(spec), out)),
        sections.differences(found),
        sections.figures(found),
        sections.samples(found, out),
    ]
    there = [part for part in parts if not part.empty]
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} by sigma-vae {__version__}."
    content = {"title": spec.title, "about": spec.about, "made": made, "sections": there, "signs": SIGNS, "files": FILES}
    (out / "report.html").write_text(_template("report.html.j2", escape=True).render(content), encoding="utf-8")
    (out / "report.md").write_text(_template("report.md.j2", escape=False).render(content), encoding="utf-8")
    _write_pictures(out / FILES, there)


def _write_pictures(folder: Path, parts: list[Section]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # those of another grid
    pictures = [picture for part in parts for picture in part.pictures]
    if pictures:
        folder.mkdir()
    for picture in pictures:
        (folder / picture.name).write_bytes(picture.content)


def _template(name: str, *, escape: bool) -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"base64": lambda content: base64.b64encode(content).decode(), "line": _line}
    return environment.from_string(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _line(words: str) -> str:
    """For Markdown: one line, in which nothing is a sign."""
    for sign in ("\\", "`", "*", "|", "[", "_", "~"):
        words = words.replace(sign, "\\" + sign)
    return " ".join(words.replace("&", "&amp;").replace("<", "&lt;").split())
