"""What a report is made of, before it is HTML or Markdown."""

from typing import NamedTuple

__all__ = ["PLOTS", "Card", "Picture", "Section", "Table", "minus"]

PLOTS = "report-files"
"""The folder of what a report draws."""


class Card(NamedTuple):
    """A claim, with a line for each verdict: the word, and the finding."""

    name: str
    sentence: str
    verdicts: tuple[tuple[str, str], ...]
    rule: str


class Table(NamedTuple):
    """Words in rows; the first column says what a row is."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """In HTML it is shown when asked for."""


class Picture(NamedTuple):
    """A file, what it shows in words, and what is written below it."""

    place: str
    """From the study's folder on: of what the report draws, or of what a run has drawn."""
    content: bytes
    alt: str
    caption: str

    @property
    def kind(self) -> str:
        """Its media type."""
        return "image/svg+xml" if self.place.endswith(".svg") else "image/png"


class Section(NamedTuple):
    """A heading with what is below it."""

    title: str
    words: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    further: tuple[str, ...] = ()
    """Words at the end."""

    @property
    def empty(self) -> bool:
        """Whether there are no data."""
        return not (self.cards or self.tables or self.pictures)


def minus(number: str) -> str:
    """With the sign that is as wide as a plus.

    >>> minus("-1.5 ± 0.1")
    '−1.5 ± 0.1'
    """
    return number.replace("-", "−")
