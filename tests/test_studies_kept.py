"""The studies kept under ``docs/studies``: their reports and the page of claims follow from their data."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from sigma_vae import study
from sigma_vae.config import write

DOCS = Path(__file__).parents[1] / "docs"
KEPT = sorted(path.parent for path in (DOCS / "studies").glob("*/results.parquet"))


def undated(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if "Made on 20" not in line]


def test_there_are_some() -> None:
    assert KEPT


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_a_kept_report_is_made_anew_by_one_command_byte_for_byte_but_for_its_date(kept: Path, tmp_path: Path) -> None:
    shutil.copyfile(kept / "results.parquet", tmp_path / "results.parquet")
    study.report(tmp_path)
    assert undated(tmp_path / "report.html") == undated(kept / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "results.parquet"]


def test_a_folder_that_keeps_its_grid_beside_the_table_is_read(tmp_path: Path) -> None:
    """As they were kept before the table held the grid."""
    table = pd.read_parquet(KEPT[0] / "results.parquet")
    table.attrs.clear()
    table.to_parquet(tmp_path / "results.parquet")
    write(tmp_path / "study.yaml", study.spec_of(KEPT[0]))
    study.report(tmp_path)
    assert undated(tmp_path / "report.html") == undated(KEPT[0] / "report.html")


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_all_cells_of_a_kept_study_are_done_and_have_numbers_of_both_splits(kept: Path) -> None:
    spec = study.spec_of(kept)
    grid = study.cells(spec)
    table = study.collect(grid, kept)
    assert (table["status"] == "done").all()
    rows = {(cell.key, prior, split) for cell in grid for prior in spec.priors for split in ("test", "validation")}
    assert set(table[["key", "prior", "split"]].itertuples(index=False, name=None)) == rows
    assert len(table) == len(rows)
    assert table["rate_nats"].notna().all()


def test_the_page_of_claims_is_what_the_kept_studies_say() -> None:
    assert study.verdicts(KEPT) == (DOCS / "claims.md").read_text(encoding="utf-8"), "sigma-vae study verdicts docs/studies/*"


def test_pages_show_pictures_that_are_there() -> None:
    for page in (DOCS.parent / "README.md", DOCS / "studies.md"):
        named = [part.partition(")")[0] for part in page.read_text(encoding="utf-8").split("](")[1:]]
        shown = [page.parent / name for name in named if "studies/" in name and "://" not in name]
        assert shown
        assert all(path.exists() for path in shown), page
