"""Sections of a page: tables, pictures and words, and the templates that set them in one HTML file."""

import base64
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Card", "Picture", "Section", "Table", "template"]


class Card(NamedTuple):
    """A claim with its verdicts, each a word and a finding."""

    name: str
    sentence: str
    verdicts: tuple[tuple[str, str], ...]
    rule: str


class Table(NamedTuple):
    """A table of words; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether HTML shows it only on demand."""
    stacks: bool = False
    """Whether a narrow screen shows the cells of a row below each other."""


class Picture(NamedTuple):
    """A picture with its alternative text and caption."""

    place: str
    """Path relative to the folder of the study or run, of a plot or a picture."""
    content: bytes
    alt: str
    caption: str

    @property
    def kind(self) -> str:
        """Its media type."""
        return "image/svg+xml" if self.is_plot else "image/png"

    @property
    def is_plot(self) -> bool:
        """Whether it is drawn from numbers, which its alternative text has."""
        return self.place.endswith(".svg")


class Section(NamedTuple):
    """A heading with its content."""

    title: str
    words: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    further: tuple[str, ...] = ()
    """Paragraphs at the end."""
    points: tuple[str, ...] = ()
    """A list at the beginning."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.cards or self.tables or self.pictures)


def template(name: str, package: str = "sigma_vae.runs", *, escape: bool = True) -> "Template":
    """Load a template of a package, this one unless given; ``escape`` is for HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"base64": _base64, "line": _line, "code": _code}
    return environment.from_string(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _code(words: str) -> str:
    """Set what stands between backticks as code that is not broken."""
    from markupsafe import Markup, escape

    parts = str(escape(words)).split("`")
    return Markup("").join(Markup(f"<code>{part}</code>" if i % 2 else part) for i, part in enumerate(parts))


def _line(words: str) -> str:
    """Escape a text for one line of Markdown."""
    for sign in ("\\", "`", "*", "|", "[", "_", "~"):
        words = words.replace(sign, "\\" + sign)
    return " ".join(words.replace("&", "&amp;").replace("<", "&lt;").split())
