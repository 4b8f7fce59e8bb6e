"""Sphinx: Markdown pages, and the API from its docstrings."""

import ast
import inspect
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path

project = "sigma-vae"
copyright = "2026, the sigma-vae authors"
author = "The sigma-vae authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
myst_heading_anchors = 2  # so that pages can link to a heading
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "auto"
nb_execution_in_temp = True  # tutorials write runs and pictures
nb_execution_timeout = 600
nb_execution_raise_on_error = True
exclude_patterns = ["studies/**"]  # reports of studies are pages of their own
html_theme = "furo"
html_title = "sigma-vae"
napoleon_custom_sections = [("Shapes", "notes_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
suppress_warnings = ["myst.header"]

MODULES = (
    *("sigma_vae", "sigma_vae.models", "sigma_vae.vae", "sigma_vae.config", "sigma_vae.types", "sigma_vae.registry"),
    *("sigma_vae.data", "sigma_vae.networks", "sigma_vae.likelihoods", "sigma_vae.priors", "sigma_vae.conditions"),
    *("sigma_vae.training", "sigma_vae.evaluation", "sigma_vae.codec", "sigma_vae.runs", "sigma_vae.study"),
    *("sigma_vae.columns", "sigma_vae.tabular", "sigma_vae.sklearn", "sigma_vae.lightning", "sigma_vae.hub"),
    *("sigma_vae.progress", "sigma_vae.optimisers"),
)
"""Modules whose names are public; they are listed with a sentence each where api.rst has ``.. all-names::``."""


def sentence_of(module: str, name: str) -> str:
    """The first sentence of a public name's docstring; empty where it has none."""
    made = getattr(import_module(module), name)
    described = inspect.isclass(made) or inspect.isfunction(made)
    text = made.__doc__ if described else _below_assignment(module, name)
    paragraph = inspect.cleandoc(text or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(paragraph.split()))[0]


def _below_assignment(module: str, name: str) -> str:
    """The string below the assignment of a constant or type, in this module or where it comes from."""
    own = Path(inspect.getsourcefile(import_module(module)) or "")
    for path in (own, *sorted(own.parent.rglob("*.py"))):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for one, after in pairwise(body):
            targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if described and any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return str(after.value.value)
    return ""


def all_names() -> dict[str, dict[str, str]]:
    """The sentences of all public names, by module."""
    found = {module: import_module(module).__all__ for module in MODULES}
    return {module: {name: sentence_of(module, name) for name in names} for module, names in found.items()}


def _listed(app: object, document: str, source: list[str]) -> None:
    if document == "api":
        lines = []
        for module, names in all_names().items():
            lines += [
                f"**{module}**",
                "",
                *(f":py:obj:`{name} <{module}.{name}>`\n   {say}\n" for name, say in names.items()),
            ]
        source[0] = source[0].replace(".. all-names::", "\n".join(lines))


def setup(app: object) -> None:
    """Fill in the list of names when api.rst is read."""
    app.connect("source-read", _listed)  # type: ignore[attr-defined]
