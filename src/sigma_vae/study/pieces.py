"""What a report is made of, before it is HTML or Markdown."""

from typing import NamedTuple

__all__ = ["Card", "Picture", "Section", "Table", "minus"]


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


class Picture(NamedTuple):
    """A file, what it shows in words, and what is written below it."""

    name: str
    content: bytes
    alt: str
    caption: str

    @property
    def kind(self) -> str:
        """Its media type."""
        return "image/svg+xml" if self.name.endswith(".svg") else "image/jpeg"


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
