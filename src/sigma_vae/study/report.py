"""A study's report: verdicts, tables, plots and samples on one page, as HTML that needs nothing else, and as Markdown."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

from sigma_vae import __version__
from sigma_vae.study import outcomes, sections
from sigma_vae.study.cell import folder_of, known, record_of
from sigma_vae.study.comparisons import settings
from sigma_vae.study.folder import claim, spec_of
from sigma_vae.study.grid import cells
from sigma_vae.study.pieces import PLOTS, Picture
from sigma_vae.study.results import collect, tabulate
from sigma_vae.study.templates import SIGNS, template

__all__ = ["keep", "report"]


def report(out: Path) -> None:
    """Write ``report.html``, one page that needs no network and no other file, and ``report.md`` with its plots under ``report-files``.

    They are made from ``study.yaml``, the cells' ``cell.json`` and the pictures of their runs, the same bytes of the same data but for one
    line with the date. What has not been measured has no section.

    Args:
        out: the study's folder.

    Raises:
        ValueError: it is no study's folder, or no cell has ended.
    """
    spec = spec_of(out)
    found = settings(spec, out)
    parts = [
        sections.judged(found),
        sections.ended(spec, out, found),
        outcomes.results(spec, tabulate(cells(spec), out)),
        sections.differences(found),
        sections.figures(found),
        sections.samples(found, out),
    ]
    there = [part for part in parts if not part.empty]
    made = f"Made on {datetime.now(UTC):%Y-%m-%d} by sigma-vae {__version__}."
    content = {"title": spec.title, "about": spec.about, "made": made, "sections": there, "signs": SIGNS}
    (out / "report.html").write_text(template("report.html.j2", escape=True).render(content), encoding="utf-8")
    (out / "report.md").write_text(template("report.md.j2", escape=False).render(content), encoding="utf-8")
    _write_plots(out, [picture for part in there for picture in part.pictures if picture.place.startswith(f"{PLOTS}/")])


def keep(out: Path, to: Path) -> None:
    """Copy what the report is made of, with small pictures, and write it there: what of a study is worth keeping beside code.

    Args:
        out: the study's folder.
        to: a new folder, or one of the same study.

    Raises:
        ValueError: ``out`` is no study's folder, no cell has ended, or ``to`` is the same folder, one with trained runs, which a copy
            without weights would replace, or has finished cells of another grid.
    """
    if to.resolve() == out.resolve():
        raise ValueError(f"a study is copied to another folder, got {to} twice")
    trained = [run for run in to.glob("cells/*/run") if (run / "model").exists() or (run / "checkpoints").exists()]
    if trained:
        raise ValueError(
            f"{to} holds the weights of {len(trained)} runs, which a copy without weights would replace; give another --to: a new"
            " folder, or one that this study was copied to before"
        )
    spec = spec_of(out)
    pictures = sections.samples(settings(spec, out), out).pictures
    claim(spec, to)
    shutil.rmtree(to / "cells", ignore_errors=True)
    for cell in cells(spec):
        if known(cell, out) is not None:
            folder_of(cell, to).mkdir(parents=True)
            shutil.copyfile(record_of(cell, out), record_of(cell, to))
    for picture in pictures:
        (to / picture.place).parent.mkdir(exist_ok=True)
        (to / picture.place).write_bytes(picture.content)
    collect(cells(spec), to)
    report(to)


def _write_plots(out: Path, pictures: list[Picture]) -> None:
    shutil.rmtree(out / PLOTS, ignore_errors=True)  # those of another grid
    if pictures:
        (out / PLOTS).mkdir()
    for picture in pictures:
        (out / picture.place).write_bytes(picture.content)
