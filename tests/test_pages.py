"""Tutorials run from their first cell to their last, at toy size; links lead somewhere; the README is short."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gallery  # noqa: E402

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *TUTORIALS])
CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(CELL.findall(path.read_text(encoding="utf-8")))
    few, changed = re.subn(r"^steps = \d+$", "steps = 20", code, flags=re.MULTILINE)
    assert changed == 1
    exec(compile(few, str(path), "exec"), {"__name__": "tutorial"})


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    tree = text.partition("```{toctree}")[2].split()
    for path in [*ROOT.glob("docs/*.md"), *TUTORIALS]:
        name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or name in tree


def test_the_api_page_has_a_sentence_for_every_public_name() -> None:
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    every = [(module, name, says) for module, names in conf["all_names"]().items() for name, says in names.items()]
    assert [(module, name, says) for module, name, says in every if not re.fullmatch(r"\S.{8,}[.:]", says)] == []
    source = [(ROOT / "docs" / "api.rst").read_text(encoding="utf-8")]
    conf["_listed"](None, "api", source)
    assert [name for module, name, says in every if f"<{module}.{name}>`\n   {says}" not in source[0]] == []


def test_every_module_with_public_names_is_listed_or_inside_a_package_that_is() -> None:
    listed = runpy.run_path(str(ROOT / "docs" / "conf.py"))["MODULES"]
    package = ROOT / "src" / "sigma_vae"
    inside = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    names = {name.partition(".")[2] or "__init__" for name in listed}
    assert inside - names == {"__main__", "build", "cli", "extras"}  # build is the former name of models


def test_the_gallery_is_made_by_the_commands_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, commands in gallery.sections(gallery.PAGE):
        assert gallery.picture_of(commands).suffix == ".png"
    short = [
        ["train", "digits", "--network", "mlp", "--max-steps", "9000", "--out", "run"],
        ["sample", "run", "--out", "a.png"],
    ]
    monkeypatch.setattr(gallery, "sections", lambda page: [("Samples", short)])
    gallery.main(tmp_path / "gallery.png", steps=2)
    with Image.open(tmp_path / "gallery.png") as picture:
        assert min(picture.size) > 100


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert text.count("![") == 1
