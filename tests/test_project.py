"""Files around the code agree with each other: versions, floors, workflows."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sigma_vae

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
