"""Progress of long work: a bar in a terminal, a line a minute elsewhere. Only commands show it; in Python nothing is printed.

Whatever passes over data, or repeats steps, says so by :func:`steps` or :func:`bar`. The outermost of them is drawn.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, TypeVar, final

__all__ = ["SECONDS_BETWEEN_LINES", "Screen", "bar", "hidden", "screen", "shown", "steps"]

SECONDS_BEFORE = 0.5
"""Time that work takes before it has a bar."""
SECONDS_BETWEEN = 0.25
"""Time between two drawings: drawing takes milliseconds, which would slow short steps."""
SECONDS_BETWEEN_LINES = 60.0
"""Time between two lines where output is redirected."""

T = TypeVar("T")
Advance = Callable[..., None]


@final
class Screen:
    """Where progress is drawn, and whether something is drawn there now.

    Args:
        command: the name that lines begin with.
        file: standard error.
    """

    def __init__(self, command: str, file: TextIO) -> None:
        self.command, self.file = command, file
        self.taken = False
        self.said = time.monotonic()


screen: Screen | None = None
"""The screen of the command that runs."""


def shown(command: str, *, file: TextIO | None = None) -> AbstractContextManager[None]:
    """Show the progress of the work inside, on standard error."""
    return _on(Screen(command, sys.stderr if file is None else file))


def hidden() -> AbstractContextManager[None]:
    """Show nothing of the work inside, which has a bar or a table of its own."""
    return _on(None)


@contextmanager
def _on(new: Screen | None) -> Iterator[None]:
    global screen
    before, screen = screen, new
    try:
        yield
    finally:
        screen = before


@contextmanager
def bar(doing: str, total: int | None = None) -> Iterator[Advance]:
    """Yield a function to call with the number of pieces that are done now: one, unless given.

    Args:
        doing: what is done, as "examples" or "compressing".
        total: number of pieces; None where it is not known, and the bar only moves.
    """
    here = screen
    if here is None or here.taken:
        yield lambda done=1: None
        return
    drawn = _Bar(here, doing, total) if here.file.isatty() else _Lines(here, doing, total)
    here.taken = True
    try:
        yield drawn.advance
    finally:
        here.taken = False
        drawn.stop()


def steps(doing: str, items: Sequence[T], sizes: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Yield the items, and show how many of their pieces are done.

    >>> list(steps("numbers", range(3)))
    [0, 1, 2]
    """
    if screen is None or screen.taken:
        yield from items
        return
    with bar(doing, sum(map(sizes, items))) as advance:
        for item in items:
            yield item
            advance(sizes(item))


@final
class _Bar:
    def __init__(self, here: Screen, doing: str, total: int | None) -> None:
        self.here, self.doing, self.total = here, doing, total
        self.began = self.drawn = time.monotonic()
        self.done = 0
        self.progress: Any = None
        if total is None:
            self._start()

    def advance(self, done: int = 1) -> None:
        self.done += done
        now = time.monotonic()
        if self.progress is None and now - self.began > SECONDS_BEFORE:
            self._start()
        if self.progress is not None and now - self.drawn > SECONDS_BETWEEN:
            self.drawn = now
            self.progress.update(self.task, completed=self.done)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        shown = columns if self.total is not None else columns[:2]
        console = Console(file=self.here.file)
        self.progress = Progress(*shown, console=console, transient=True, redirect_stdout=False, refresh_per_second=4)
        self.task = self.progress.add_task(self.doing, total=self.total, completed=self.done)
        self.progress.start()


@final
class _Lines:
    def __init__(self, here: Screen, doing: str, total: int | None) -> None:
        self.here, self.doing, self.total = here, doing, total
        self.began = time.monotonic()
        self.done = 0

    def advance(self, done: int = 1) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.here.said >= SECONDS_BETWEEN_LINES:
            self.here.said = now
            print(f"{self.here.command}: {self.doing}, {self._how_far(now - self.began)}", file=self.here.file, flush=True)

    def stop(self) -> None:
        """Nothing is left to be removed."""

    def _how_far(self, seconds: float) -> str:
        if self.total is None:
            return f"{self.done} done"
        left = seconds / self.done * (self.total - self.done) / 60
        return f"{self.done} of {self.total} done, about {left:.0f} min left"
