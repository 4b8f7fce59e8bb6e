"""Files around the code agree with each other: versions, floors, workflows."""

import ast
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

import sigma_vae
from benchmarks import gallery

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    *PYPROJECT["dependencies"],
    *(
        each
        for name in ("full", "counts", "diffusers", "hub", "lightning", "efficientnet", "dask", "test")
        for each in PYPROJECT["optional-dependencies"][name]
    ),
]
YAML = sorted([*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / ".readthedocs.yaml"])


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def name_and_floor(requirement: str) -> tuple[str, str | None]:
    found = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\d.]+))?.*", requirement)
    assert found is not None, requirement
    return normal(found[1]), found[2]


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)) + (0,) * (3 - version.count(".") - 1)


OWN = {name: floor for name, floor in map(name_and_floor, REQUIREMENTS) if name != "sigma-vae"}


@pytest.mark.parametrize("name", sorted(OWN))
def test_every_requirement_is_pinned_at_its_oldest_and_at_a_newer_version(name: str) -> None:
    oldest, newest = pins("constraints-oldest.txt")[name], pins("constraints.txt")[name]
    assert OWN[name] is not None, f"{name} has no least version"
    assert number(OWN[name]) <= number(oldest) <= number(newest)
    assert number(oldest)[:2] == number(OWN[name])[:2], "make constraints-oldest.txt"


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflows_name_make_targets_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"run: make ([\w.-]+)", text)) <= targets
    for job in yaml.safe_load(text)["jobs"].values():
        assert "uses" in job or all("uses" in step or "run" in step for step in job["steps"])


def test_tests_run_on_three_pythons_with_the_oldest_and_the_newest_torch() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]["tests"]["strategy"][
        "matrix"
    ]
    assert matrix["python"] == ["3.11", "3.13", "3.14"]
    assert matrix["torch"] == ["oldest", "newest"]
    given = {row["python"]: row["version"] for row in matrix["include"] if "python" in row}
    assert given.keys() == set(matrix["python"])
    assert given["3.11"] == f"=={pins('constraints-oldest.txt')['torch']}"


def test_pages_name_the_oldest_python_and_torch() -> None:
    words = f"Python {PYPROJECT['requires-python'].removeprefix('>=')} or later and PyTorch {OWN['torch']} or later"
    for page in ("README.md", "docs/index.md"):
        assert words in " ".join((ROOT / page).read_text(encoding="utf-8").split()), page


def test_pre_commit_has_the_ruff_that_is_pinned() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("ruff-pre-commit"))
    assert ruff["rev"] == f"v{pins('constraints.txt')['ruff']}"


def test_malicious_versions_of_lightning_are_excluded() -> None:
    lightning = [each for each in REQUIREMENTS if "lightning" in each and "sigma-vae" not in each]
    assert len(lightning) == 2
    assert all("!=2.6.2" in each and "!=2.6.3" in each for each in lightning)


def test_the_changelog_describes_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == sigma_vae.__version__


# -- Tutorials run from their first cell to their last, at toy size; links lead somewhere; the README is short ---------

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *TUTORIALS])
CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = path.read_text(encoding="utf-8"), {"__name__": "tutorial"}
    few, changed = re.subn(r"^steps = \d+$", "steps = 20", text, flags=re.MULTILINE)
    assert changed == 1
    for cell in CELL.findall(few):
        body = ast.parse(cell).body
        shown = isinstance(body[-1], ast.Expr)
        exec(compile(ast.Module(body[:-1] if shown else body, []), str(path), "exec"), names)
        if shown:  # as a notebook does
            value = eval(compile(ast.Expression(body[-1].value), str(path), "eval"), names)
            getattr(value, "_repr_html_", getattr(value, "_repr_png_", lambda: None))()


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
    assert inside - names == {"__main__", "build", "cli"}  # build is the former name of models


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
