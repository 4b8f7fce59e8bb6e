"""A study's folder: which grid it is of."""

from dataclasses import replace
from pathlib import Path

from sigma_vae.configfile import read, write
from sigma_vae.study.cell import finished
from sigma_vae.study.grid import StudySpec, cells

__all__ = ["SPEC", "claim", "spec_of"]

SPEC = "study.yaml"


def spec_of(out: Path) -> StudySpec:
    """The grid that the folder is of.

    Raises:
        ValueError: it is of none.
    """
    if not (out / SPEC).is_file():
        raise ValueError(f"{out} holds no study (no {SPEC}); do one: sigma-vae study run SPEC --out {out}")
    return read(out / SPEC, StudySpec)


def claim(spec: StudySpec, out: Path) -> None:
    """Make the folder one of this grid: a new one, or one of a grid of which this has all that is finished.

    Raises:
        ValueError: it has finished cells that this grid has not.
    """
    keys = {cell.key for cell in cells(spec)}
    if (out / SPEC).exists():
        before = spec_of(out)
        lost = [cell for cell in cells(before) if cell.key not in keys and finished(cell, out)]
        if lost:
            raise ValueError(
                f"{out} holds the study {before.title!r} with {len(lost)} finished cells that this grid has not, as {lost[0].place};"
                " give another --out, or a grid that has them too"
            )
    out.mkdir(parents=True, exist_ok=True)
    write(out / SPEC, replace(spec, sizes={}))
