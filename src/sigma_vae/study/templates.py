"""The templates of what a study writes, and the signs in them."""

import base64
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["SIGNS", "template"]

SIGNS = {"holds": "✓", "does not": "✗", "not shown": "?"}
"""Words and signs, not colours alone."""


def template(name: str, *, escape: bool) -> "Template":
    """A template of this package; ``escape`` is for HTML."""
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
