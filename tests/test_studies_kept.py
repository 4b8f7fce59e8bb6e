"""The studies under ``docs/studies`` are what their data make of them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from sigma_vae import study
from sigma_vae.study.grid import cells
from sigma_vae.study.runner import spec_of

DOCS = Path(__file__).parents[1] / "docs"
KEPT = sorted(path.parent for path in (DOCS / "studies").glob("*/study.yaml"))


def undated(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if "Made on 20" not in line]


def test_there_are_some() -> None:
    assert KEPT


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_a_kept_report_is_made_anew_by_one_command_byte_for_byte_but_for_its_date(kept: Path, tmp_path: Path) -> None:
    again = tmp_path / kept.name
    shutil.copytree(kept, again, ignore=shutil.ignore_patterns("report*"))
    study.report(again)
    for name in ("report.html", "report.md"):
        assert undated(again / name) == undated(kept / name), name
    plots = sorted(path.name for path in (kept / "report-files").iterdir())
    assert plots == sorted(path.name for path in (again / "report-files").iterdir())
    for name in plots:
        assert (again / "report-files" / name).read_bytes() == (kept / "report-files" / name).read_bytes(), name


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_a_kept_table_is_that_of_its_cells_all_of_which_ended(kept: Path, tmp_path: Path) -> None:
    grid = cells(spec_of(kept))
    again = tmp_path / kept.name
    shutil.copytree(kept, again)
    table = study.collect(grid, again)
    pd.testing.assert_frame_equal(table, pd.read_parquet(kept / "results.parquet"))
    assert len({tuple(row) for row in table[list(spec_of(kept).axes)].itertuples(index=False)}) == len(grid)


def test_the_page_of_claims_is_what_the_kept_studies_say() -> None:
    assert study.verdicts(KEPT) == (DOCS / "claims.md").read_text(encoding="utf-8"), "sigma-vae study verdicts docs/studies/*"
