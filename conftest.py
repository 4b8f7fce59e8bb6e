"""Docstrings of the package, and the code and commands of README and docs, are tests; a run that several tests look at."""

import builtins
import os
import shlex
from collections.abc import Iterator
from doctest import NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from sybil import Example, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from sigma_vae import runs, study
from sigma_vae.cli import main
from sigma_vae.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from sigma_vae.evaluation import plots
from sigma_vae.registry import Registry, register
from sigma_vae.runs import page

# The tests' models are tiny: more threads only wait for each other. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def run_commands(example: Example) -> None:
    """Run the `sigma-vae` commands of a console block; other commands install things and are not for a test."""
    example.namespace["__builtins__"] = builtins  # Sybil removes it, but commands may call functions that a page defines
    for line in example.parsed.splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["sigma-vae"]:
            assert main(words[1:]) == 0, line


@pytest.fixture(scope="module")
def in_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands of a page write into a folder of its own, one after the other."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("page"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def names_of_the_page() -> Iterator[None]:
    """Names that a page registers are gone after it."""
    registries = [registry for registry in vars(register).values() if isinstance(registry, Registry)]
    before = [list(registry) for registry in registries]  # looked up once, so that our own are there
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries = {entry.name: entry for entry in entries}


def seed(namespace: dict[str, object]) -> None:
    """Doctests see torch's names without importing them, and the same random numbers each time."""
    torch.manual_seed(0)
    namespace.update(torch=torch, nn=torch.nn)


pages = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("console", run_commands)],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    fixtures=["in_temporary_folder", "names_of_the_page"],
    setup=seed,
)
docstrings = Sybil(
    parsers=[DocTestParser(optionflags=NORMALIZE_WHITESPACE)],
    path="src",
    pattern="*.py",
    document_types={".py": PythonDocStringDocument},
    setup=seed,
)
pytest_collect_file = (pages + docstrings).pytest()

# -- pages of runs -----------------------------------------------------------------------------------------------------

svg = plots.svg


def sketch(draw: plots.Draw, entries: int, height: float = 1.0) -> bytes:
    """Plot the numbers of a page but do not lay them out and render them, which would take most of the time of a short run."""
    draw(Figure().subplots())
    return b"<svg/>"


assert study.report.__globals__["svg"] is svg, "reports of studies, which have been imported, stay whole"
plots.svg = page.svg = sketch

# -- a small trained run -----------------------------------------------------------------------------------------------

MODEL = ModelConfig(network="mlp", likelihood="gaussian/optimal", latent_dim=4, width=32, prior="standard")
TRAINING = TrainingConfig(epochs=6, batch_size=32, learning_rate=5e-3, log_every=5)


@pytest.fixture(scope="session")
def digits_config() -> RunConfig:
    """Seconds to train."""
    return RunConfig(DataConfig("digits"), MODEL, TRAINING, seed=1, device="cpu")


@pytest.fixture(scope="session")
def digits_run(digits_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its page as users have it; tests read it, and write elsewhere."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, page):
            patch.setattr(module, "svg", svg)
        runs.train(digits_config, folder, progress=False)
    return folder
